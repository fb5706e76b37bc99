"""What networks write: the likeliest tokens where nothing else is likely, and without seeds that are not fossils."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from esper_jax.config import TransformerConfig
from esper_jax.env import generation
from esper_jax.lifecycle import stages
from esper_jax.network import model as networks
from esper_jax.types import BLUEPRINTS, AlphaAlgorithm, Stage

CFG = TransformerConfig(width=8, n_heads=2, n_layers=1, n_segments=1, block_size=5, dropout=0.0)
PROMPT = jnp.array([3, 1, 4, 1, 5], jnp.int32)
write = jax.jit(generation.write)


@functools.cache
def certain():
    """A model whose logits are far apart, and a seed that would change them."""
    made = networks.init(jax.random.key(0), CFG, blueprints=("lora",), example=(5,), outputs=11)
    scale, bias = made.host.params.norm
    host = made.host.replace(params=made.host.params.replace(norm=(1e5 * scale, bias)))
    (seed,) = made.seeds
    return made.replace(
        host=host, seeds=(seed.replace(params=jax.random.normal(jax.random.key(1), seed.params.shape)),)
    )


def slots(stage):
    record = stages.empty(1)
    return record.replace(
        stage=jnp.array([stage], jnp.int32),
        blueprint=jnp.array([BLUEPRINTS.index("lora")], jnp.int32),
        alpha=record.alpha.replace(alpha=jnp.ones(1, jnp.float32)),
        algorithm=jnp.array([AlphaAlgorithm.ADD], jnp.int32),
    )


def test_each_token_follows_from_those_before_it():
    text = write(certain(), stages.empty(1), PROMPT)
    assert text.shape == (generation.LENGTH,) and text.dtype == jnp.int32
    written = np.concatenate([PROMPT, text])
    windows = np.stack([written[k : k + 5] for k in range(generation.LENGTH)])
    logits, _ = networks.forward(certain(), stages.empty(1), jnp.asarray(windows))
    np.testing.assert_array_equal(text, logits[:, -1].argmax(-1))


def test_what_is_not_kept_is_off():
    bare = write(certain(), stages.empty(1), PROMPT)
    np.testing.assert_array_equal(write(certain(), slots(Stage.HOLDING), PROMPT), bare)
    assert (write(certain(), slots(Stage.FOSSILIZED), PROMPT) != bare).any()
