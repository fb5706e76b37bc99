"""esper_jax: reinforcement learning of growth in neural networks."""

from esper_jax import presets
from esper_jax.config import Config
from esper_jax.env.environment import make_env
from esper_jax.train import make_train

__all__ = ["Config", "make_env", "make_train", "presets"]
