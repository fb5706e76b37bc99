"""The transformer host (part of Esper's Kasmina): pre-norm decoder with a tied read-out, cut into segments
(slots_and_hosts 1.3).

    h = tokens[x] + positions;  per layer h += attention(norm(h)), h += mlp(norm(h));  logits = norm(h) tokens^T

Linear layers start as PyTorch's (uniform +-1/sqrt(fan_in)), embeddings N(0, 0.02^2): from the reference's N(0, 1) an
untrained loss would be 284 nats, and not the ln V of a uniform guess. A slot sits after each segment.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from esper_jax.config import TransformerConfig
from esper_jax.network import sequences
from esper_jax.network.host import apply, param_count
from esper_jax.network.layers import largest_divisor, uniform_fan_in
from esper_jax.types import Array

__all__ = ["HostParams", "HostVars", "Layer", "apply", "check_length", "init", "param_count"]

EMBEDDING_STD = 0.02
MLP_EXPANSION = 4
UNROLLED = 4  # layers; a loop over two of them takes a sixth longer on a CPU


@struct.dataclass
class Layer:
    """Parameters of one layer, or of many with a leading axis; f32."""

    attention_norm: tuple[Array, Array]  # scale [d], bias [d]
    qkv: tuple[Array, Array]  # [d, 3d], [3d]
    attention_out: tuple[Array, Array]  # [d, d], [d]
    mlp_norm: tuple[Array, Array]
    mlp_in: tuple[Array, Array]  # [d, 4d], [4d]
    mlp_out: tuple[Array, Array]  # [4d, d], [d]


@struct.dataclass
class HostParams:
    tokens: Array  # f32[V, d], of the embedding and of the read-out
    positions: Array  # f32[block_size, d]
    layers: Layer  # leading axis: layers
    norm: tuple[Array, Array]  # the last one


@struct.dataclass
class HostVars:
    """Everything a host is; it tracks nothing besides its parameters."""

    params: HostParams
    cfg: TransformerConfig = struct.field(pytree_node=False)
    stats: tuple = ()

    @property
    def n_segments(self) -> int:
        return self.cfg.n_segments

    @property
    def n_outputs(self) -> int:
        """Tokens of the vocabulary."""
        return self.params.tokens.shape[0]

    def positions(self, shape: tuple[int, ...]) -> int:
        """Tokens of a sequence of `[B, L]`."""
        return shape[1]

    def embed(self, x: Array, *, dtype: str, tile_pixels: int, key: Array | None = None) -> Array:
        """Tokens i32 `[B, L]` as tiles `[T, N, L, d]`. Raises ValueError for sequences longer than `block_size`."""
        batch, length = x.shape
        check_length(self.cfg, length)
        h = self.params.tokens[x] + self.params.positions[None, :length]
        h = sequences.dropout(_fold(key, 0), h, self.cfg.dropout).astype(dtype)
        n = batch if tile_pixels == 0 else largest_divisor(batch, tile_pixels // length)
        return h.reshape(batch // n, n, length, -1)

    def train_segment(self, i: int, tiles: Array, key: Array | None) -> tuple[Array, HostVars]:
        """Segment i with dropout."""
        return self._segment(i, tiles, _fold(key, 1 + i)), self

    def eval_segment(self, i: int, tile: Array) -> Array:
        """Segment i on one tile `[N, L, d]`."""
        return self._segment(i, tile, None)

    def _segment(self, i: int, h: Array, key: Array | None) -> Array:
        """The layers of a segment on `[..., L, d]`."""
        size = self.cfg.n_layers // self.cfg.n_segments
        own = jax.tree.map(lambda leaf: leaf[i * size : (i + 1) * size], self.params.layers)

        def layer(h, number_and_params):
            number, params = number_and_params
            return _layer(self.cfg, params, h, _fold(key, number)), None

        numbers = jnp.arange(size, dtype=jnp.int32)
        return jax.lax.scan(layer, h, (numbers, own), unroll=min(size, UNROLLED))[0]

    def read_out(self, tile: Array) -> Array:
        """Logits of one tile behind the last layer: `[N, L, d]` to f32 `[N, L, V]`."""
        h = sequences.layer_norm(tile, *self.params.norm)
        tokens = self.params.tokens.astype(h.dtype)
        return jnp.einsum("nld,vd->nlv", h, tokens, precision="highest", preferred_element_type=jnp.float32)


def _fold(key: Array | None, number: int | Array) -> Array | None:
    return None if key is None else jax.random.fold_in(key, number)


def _layer(cfg: TransformerConfig, p: Layer, h: Array, key: Array | None) -> Array:
    """One layer on `[..., L, d]`."""
    drop = lambda number, x: sequences.dropout(_fold(key, number), x, cfg.dropout)
    x = sequences.layer_norm(h, *p.attention_norm)
    x = sequences.causal_attention(x, *p.qkv, cfg.n_heads, rate=cfg.dropout, key=_fold(key, 0))
    h = h + drop(1, sequences.linear(x, *p.attention_out))
    x = sequences.layer_norm(h, *p.mlp_norm)
    x = sequences.linear(sequences.gelu(sequences.linear(x, *p.mlp_in)), *p.mlp_out)
    return h + drop(2, x)


def init(key: Array, cfg: TransformerConfig, *, vocabulary: int) -> HostVars:
    """A new host for tokens 0 to `vocabulary` - 1."""
    d, embedding_key, position_key, layers_key = cfg.width, *jax.random.split(key, 3)
    embedding = lambda k, size: EMBEDDING_STD * jax.random.normal(k, (size * d,), jnp.float32).reshape(size, d)

    def linear(k: Array, i: int, o: int) -> tuple[Array, Array]:
        kernel_key, bias_key = jax.random.split(k)
        return uniform_fan_in(kernel_key, (i, o), i), uniform_fan_in(bias_key, (o,), i)

    def layer(k: Array) -> Layer:
        keys = jax.random.split(k, 4)
        return Layer(
            attention_norm=_norm(d),
            qkv=linear(keys[0], d, 3 * d),
            attention_out=linear(keys[1], d, d),
            mlp_norm=_norm(d),
            mlp_in=linear(keys[2], d, MLP_EXPANSION * d),
            mlp_out=linear(keys[3], MLP_EXPANSION * d, d),
        )

    layers = jax.vmap(layer)(jax.random.split(layers_key, cfg.n_layers))
    params = HostParams(embedding(embedding_key, vocabulary), embedding(position_key, cfg.block_size), layers, _norm(d))
    return HostVars(params, cfg)


def _norm(d: int) -> tuple[Array, Array]:
    return jnp.ones(d, jnp.float32), jnp.zeros(d, jnp.float32)


def check_length(cfg: TransformerConfig, length: int) -> None:
    """Raises ValueError if sequences are longer than the host has positions for."""
    if length > cfg.block_size:
        raise ValueError(f"TransformerConfig.block_size = {cfg.block_size}: must be at least {length}, the sequences'")
