"""Text that a network writes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from esper_jax.network import model as networks
from esper_jax.network.model import Model
from esper_jax.types import Array, SlotState, Stage

LENGTH = 240  # tokens


def write(model: Model, state: SlotState, prompt: Array, *, dtype: str = "float32") -> Array:
    """What the network of the fossilised seeds, all others off, makes of a prompt i32[L]: the next tokens, i32[LENGTH].

    Each is drawn from the network's distribution after the L before it, with the same dice for every network: two texts
    differ by what the networks know.
    """
    off = networks.live_slots(model, state) & (state.stage != Stage.FOSSILIZED)
    override = jnp.where(off, 0.0, jnp.nan)

    def draw(window, key):
        logits, _ = networks.forward(model, state, window[None], override, dtype=dtype)
        token = jax.random.categorical(key, logits[0, -1]).astype(window.dtype)
        return jnp.append(window[1:], token), token

    return lax.scan(draw, prompt, jax.random.split(jax.random.key(0), LENGTH))[1]
