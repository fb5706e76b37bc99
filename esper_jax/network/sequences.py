"""Layers of a transformer as plain functions on `[..., L, d]`: L tokens of a sequence, d channels.

Weights lie `[in, out]`; sums and statistics are float32 whatever the dtype of the features.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from esper_jax.network.host import Layout
from esper_jax.types import Array

LAYER_NORM_EPSILON = 1e-5
SEQUENCES = Layout(channel_axis=2, example_axis=0, rank=3)  # a tile is [N, L, d]


def linear(x: Array, kernel: Array, bias: Array | None = None) -> Array:
    """`x @ kernel + bias`: `[..., I]`, `[I, O]`, `[O]` to `[..., O]`."""
    # as one matrix: XLA's CPU code for a gradient summed over several axes takes up to twice as long
    rows = x.reshape(-1, x.shape[-1])
    y = lax.dot(rows, kernel.astype(x.dtype), preferred_element_type=jnp.float32)
    if bias is not None:
        y = y + bias[None]
    return y.astype(x.dtype).reshape(*x.shape[:-1], -1)


def layer_norm(x: Array, scale: Array, bias: Array) -> Array:
    """LayerNorm over the channels, eps 1e-5: `[..., d]`, `[d]`, `[d]`."""
    centred = x.astype(jnp.float32)
    centred = centred - centred.mean(-1, keepdims=True)
    inv_std = lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + LAYER_NORM_EPSILON)
    per_channel = lambda v: v.reshape((1,) * (x.ndim - 1) + (-1,))
    return (centred * inv_std * per_channel(scale) + per_channel(bias)).astype(x.dtype)


def dropout(key: Array | None, x: Array, rate: float) -> Array:
    """Zero with probability `rate`, the rest scaled by 1 / (1 - rate); x itself without a key or a rate."""
    if key is None or rate == 0:
        return x
    kept = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)


def causal_attention(
    x: Array, qkv: Array, qkv_bias: Array, heads: int, *, rate: float = 0.0, key: Array | None = None
) -> Array:
    """What the heads say, side by side, before the output projection: `[..., L, d]` to the same shape.

    Args:
      qkv: f32 `[d, 3d]`, its columns q, k, v in that order, each with the heads side by side.
      rate: of the dropout on the attention's weights, where there is a key.
    """
    shape, (length, d) = x.shape, x.shape[-2:]
    q, k, v = jnp.split(linear(x, qkv, qkv_bias).reshape(-1, length, 3 * heads, d // heads), 3, axis=2)
    if key is None or rate == 0:
        return jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(shape)
    # `dot_product_attention` knows no dropout of its weights
    logits = jnp.einsum("blhc,bmhc->bhlm", q, k, preferred_element_type=jnp.float32) * (d // heads) ** -0.5
    weights = jax.nn.softmax(jnp.where(jnp.tri(length, dtype=bool), logits, -jnp.inf)).astype(x.dtype)
    return jnp.einsum("bhlm,bmhc->blhc", dropout(key, weights, rate), v).reshape(shape)


def gelu(x: Array) -> Array:
    """x Phi(x), exactly (by erf)."""
    return jax.nn.gelu(x, approximate=False)
