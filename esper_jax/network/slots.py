"""`blend` under the name that scripts outside this repository import."""

from esper_jax.network.blend import *  # noqa: F403
