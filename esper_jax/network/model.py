"""Host and slots together (part of Esper's Kasmina): the forward pass, and the same under many alpha configurations.

K alpha configurations are on/off patterns `bool[K, S]`: a slot that is off is set to alpha 0, one that is on keeps
its own alpha. `Array` axes: T tiles, C channels, H W image, N images in a tile, B images in a batch.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from esper_jax.config import HostConfig
from esper_jax.network import blend, cnn, seed_bank
from esper_jax.network.blend import Controls, SeedVars
from esper_jax.network.blueprints import Blueprint
from esper_jax.types import CNN_BLUEPRINTS, Array, SlotState


@struct.dataclass
class Model:
    """A host and the seeds in its slots; without seeds it is the bare host, whose boundaries are left alone."""

    host: cnn.HostVars
    seeds: tuple[SeedVars, ...]  # one per slot, in the order of the forward pass, or none at all

    @property
    def blueprints(self) -> tuple[str | Blueprint, ...]:
        """Kinds of seeds that the slots can hold."""
        return self.seeds[0].blueprints if self.seeds else ()


def init(
    key: Array,
    cfg: HostConfig,
    *,
    blueprints: tuple[str | Blueprint, ...] = CNN_BLUEPRINTS,
    channels: int = 3,
    classes: int = 10,
) -> Model:
    """A new host with empty slots that can hold the named kinds of seeds."""
    size = lambda width: seed_bank.packed_size(seed_bank.table(blueprints), width)
    zeros = lambda length: jnp.zeros(length, jnp.float32)
    seeds = tuple(SeedVars(zeros(size(w)), zeros(blend.gate_size(w)), w, blueprints) for w in cfg.slot_widths)
    return Model(cnn.init(key, cfg, channels=channels, classes=classes), seeds)


def _slot_functions(model: Model, controls: Controls) -> dict[int, cnn.SlotFunction]:
    """`{block: function on tiles}` for every slot."""
    return {
        block: lambda tiles, s=s: blend.apply_slot(jax.tree.map(lambda leaf: leaf[s], controls), model.seeds[s], tiles)
        for s, block in enumerate(model.host.cfg.slot_blocks[: len(model.seeds)])
    }


def forward(
    model: Model,
    state: SlotState,
    x: Array,
    alpha_override: Array | None = None,
    *,
    train: bool = False,
    tile_pixels: int = 0,
) -> tuple[Array, Model]:
    """Logits of images `[B, H, W, C]`, f32 `[B, classes]`, and the model with new running statistics (if `train`).

    `alpha_override` f32[S] replaces the slots' alphas (NaN keeps one); vmap over `[K, S]` evaluates K configurations.
    The features are computed in the dtype of `x`.
    """
    functions = _slot_functions(model, blend.controls(state, model.blueprints, alpha_override))
    logits, host = cnn.apply(model.host, x, train=train, slots=functions, tile_pixels=tile_pixels)
    return logits, model.replace(host=host)


def live_slots(model: Model, state: SlotState) -> Array:
    """bool[S]: slots whose alpha matters, that is with a seed in the forward pass and alpha above 0."""
    controls = blend.controls(state, model.blueprints)
    return (controls.kind > 0) & (controls.alpha > 0)


def distinct_configurations(live: Array) -> tuple[Array, Array]:
    """Where each of all 2^S on/off patterns is found among the outputs of `forward_all_configurations`.

    Pattern k has slot j on iff bit j of k is set; patterns that differ in slots that are not live share an output.
    Returns: i32[2^S] positions, and the number of different outputs, i32[].
    """
    n_slots = live.shape[0]
    patterns = jnp.arange(2**n_slots, dtype=jnp.int32)
    position = jnp.zeros_like(patterns)
    for j in range(n_slots):
        on = (patterns >> j) & 1
        position = jnp.where(live[j], 2 * position + on, position)
    return position, 2 ** live.sum(dtype=jnp.int32)


def forward_all_configurations(model: Model, state: SlotState, tile: Array) -> Array:
    """Logits of one tile `[C, H, W, N]` under all different on/off patterns of the live slots, `f32[2^S, N, classes]`.

    Prefixes are shared: a block runs once for every different pattern of the live slots before it, so three live slots
    cost 1 + 2 + 4 blocks and one final read-out each, not 8 networks, and a host without live slots one pass. Rows
    beyond the number of different patterns are undefined; `distinct_configurations` says which row is which pattern.
    """
    controls = blend.controls(state, model.blueprints)
    live = live_slots(model, state)
    slot_of_block = {block: s for s, block in enumerate(model.host.cfg.slot_blocks)}
    features, count = tile[None], jnp.int32(1)  # features of the different patterns so far, and how many there are

    for block in range(model.host.cfg.n_blocks):
        features = _map_first(lambda x, i=block: cnn.eval_block(model.host, i, x), features, count)
        if block in slot_of_block:
            s = slot_of_block[block]
            control = jax.tree.map(lambda leaf, s=s: leaf[s], controls)
            features = _split(model.seeds[s], control, live[s], features, count)
            count = jnp.where(live[s], 2 * count, count)
    return _map_first(lambda x: cnn.read_out(model.host, x), features, count)


def _map_first(fun, xs: Array, count: Array) -> Array:
    """`fun` of the first `count` rows of `xs`; the others stay undefined (zero)."""
    shape = jax.eval_shape(fun, jax.ShapeDtypeStruct(xs.shape[1:], xs.dtype))
    out = jnp.zeros((xs.shape[0], *shape.shape), shape.dtype)
    return lax.fori_loop(0, count, lambda k, out: out.at[k].set(fun(xs[k])), out)


def _split(seed: SeedVars, control: Controls, live: Array, features: Array, count: Array) -> Array:
    """Rows k become rows 2k (slot off) and 2k + 1 (slot on) if the slot is live; `[K, ...]` to `[2K, ...]`."""

    def both(k, out):
        h = features[k]
        on = blend.apply_slot(control, seed, h[None])[0]
        return out.at[2 * k].set(h).at[2 * k + 1].set(on)

    out = jnp.concatenate([features, jnp.zeros_like(features)])
    return lax.fori_loop(0, jnp.where(live, count, 0), both, out)
