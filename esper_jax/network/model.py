"""Host and slots together (part of Esper's Kasmina): the forward pass, and the same under many alpha configurations.

K alpha configurations are on/off patterns `bool[K, S]`: a slot that is off is set to alpha 0, one that is on keeps
its own alpha. `Array` axes: T tiles, C channels, H W image, N images in a tile, B images in a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jax.custom_batching import custom_vmap

from esper_jax.config import AnyHostConfig, HostConfig, TransformerConfig
from esper_jax.network import blend, cnn, seed_bank, transformer
from esper_jax.network.blend import Controls, SeedVars
from esper_jax.network.blueprints import Blueprint
from esper_jax.network.host import Host, SlotFunction, apply
from esper_jax.types import Array, SlotState


@struct.dataclass
class Model:
    """A host and the seeds in its slots; without seeds it is the bare host, whose boundaries are left alone."""

    host: Host
    seeds: tuple[SeedVars, ...]  # one per slot, in the order of the forward pass, or none at all

    @property
    def kinds(self) -> tuple[Blueprint, ...]:
        """Kinds of seeds that the slots can hold."""
        return self.seeds[0].kinds if self.seeds else ()


class Family(NamedTuple):
    """What is made of one kind of configuration; `example` is the shape of one input: (H, W, C) or (L,)."""

    init: Callable[..., Host]  # (key, cfg, example, outputs)
    check: Callable[..., None]  # (cfg, example), raises ValueError if the host cannot read such inputs


FAMILIES = {
    HostConfig: Family(
        lambda key, cfg, example, outputs: cnn.init(key, cfg, channels=example[-1], classes=outputs),
        lambda cfg, example: cnn.check_image_size(cfg, min(example[:2])),
    ),
    TransformerConfig: Family(
        lambda key, cfg, example, outputs: transformer.init(key, cfg, vocabulary=outputs),
        lambda cfg, example: transformer.check_length(cfg, *example),
    ),
}


def kinds(cfg: AnyHostConfig, modules: tuple[str | Blueprint, ...] | None = None) -> tuple[Blueprint, ...]:
    """What the numbers of the seeds' kinds stand for in this host; by default all of the package's modules for it.

    In a language model their gates are causal. By name alone (`seed_bank.table`), modules have the reference's.
    """
    table = seed_bank.table(tuple(cfg.modules) if modules is None else modules, cfg.modules)
    if isinstance(cfg, TransformerConfig) and cfg.gate == "causal":
        return tuple(kind._replace(layout=kind.layout._replace(causal=True)) for kind in table)
    return table


def check(cfg: AnyHostConfig, example: tuple[int, ...]) -> None:
    """Raises ValueError if the host cannot read inputs of that shape: images (H, W, C) or sequences (L,)."""
    FAMILIES[type(cfg)].check(cfg, example)


def init(
    key: Array,
    cfg: AnyHostConfig,
    *,
    blueprints: tuple[str | Blueprint, ...] | None = None,
    example: tuple[int, ...] = (32, 32, 3),
    outputs: int = 10,
) -> Model:
    """A new host with empty slots.

    Args:
      blueprints: the kinds of seeds that the slots can hold; by default all of the package's modules for this host.
      example: shape of one input: an image (H, W, C) or a sequence (L,).
      outputs: classes, or tokens of the vocabulary.
    """
    zeros, table = lambda length: jnp.zeros(length, jnp.float32), kinds(cfg, blueprints)
    size = lambda width: seed_bank.packed_size(table, width)
    seeds = tuple(SeedVars(zeros(size(w)), zeros(blend.gate_size(w)), w, table) for w in cfg.slot_widths)
    return Model(FAMILIES[type(cfg)].init(key, cfg, example, outputs), seeds)


def _slot_functions(model: Model, controls: Controls) -> dict[int, SlotFunction]:
    """`{segment: function on tiles}` for every slot."""
    return {
        segment: lambda tiles, s=s: blend.apply_slot(jax.tree.map(lambda x: x[s], controls), model.seeds[s], tiles)
        for s, segment in enumerate(model.host.cfg.slot_segments[: len(model.seeds)])
    }


def forward(
    model: Model,
    state: SlotState,
    x: Array,
    alpha_override: Array | None = None,
    *,
    train: bool = False,
    tile_pixels: int = 0,
    dtype: str = "float32",
    key: Array | None = None,
) -> tuple[Array, Model]:
    """Logits of a batch, f32 `[B, ..., outputs]`, and the model with new running statistics (if `train`).

    `alpha_override` f32[S] replaces the slots' alphas (NaN keeps one); vmap over `[K, S]` evaluates K configurations.
    The other arguments are those of `host.apply`.
    """
    functions = _slot_functions(model, blend.controls(state, model.kinds, alpha_override))
    logits, host = apply(model.host, x, train=train, slots=functions, tile_pixels=tile_pixels, dtype=dtype, key=key)
    return logits, model.replace(host=host)


def live_slots(model: Model, state: SlotState) -> Array:
    """bool[S]: slots whose alpha matters, that is with a seed in the forward pass and alpha above 0."""
    controls = blend.controls(state, model.kinds)
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


def forward_all_configurations(
    model: Model,
    state: SlotState,
    x: Array,
    measure: Callable[..., Array] = lambda logits: logits,
    *operands: Any,
    dtype: str = "float32",
) -> Array:
    """Logits f32 `[B, ..., outputs]` of a batch, taken as one tile, under all different on/off patterns of the live
    slots, or what `measure(logits, *operands)` makes of them: `[2^S, ...]`.

    Prefixes are shared: a segment runs once for every different pattern of the live slots before it, so three live
    slots cost 1 + 2 + 4 segments and one final read-out each, not 8 networks, and a host without live slots one pass.
    Rows beyond the number of different patterns are undefined; `distinct_configurations` says which row is which
    pattern. `measure` sees one row at a time, since 8 rows of logits over a vocabulary would not fit a cache; the
    arrays that it needs have to be its operands.
    """
    controls = blend.controls(state, model.kinds)
    live = live_slots(model, state)
    slot_of_segment = {segment: s for s, segment in enumerate(model.host.cfg.slot_segments)}
    # features of the different patterns so far, and how many there are
    features, count = model.host.embed(x, dtype=dtype, tile_pixels=0), jnp.int32(1)

    for segment in range(model.host.n_segments):
        features = _map_first(lambda host, x, i=segment: host.eval_segment(i, x), model.host, features, count)
        if segment in slot_of_segment:
            s = slot_of_segment[segment]
            control = jax.tree.map(lambda leaf, s=s: leaf[s], controls)
            features = _split(model.seeds[s], control, live[s], features, count)
            count = jnp.where(live[s], 2 * count, count)
    read = lambda given, x: measure(given[0].read_out(x), *given[1])
    return _map_first(read, (model.host, operands), features, count)


def _map_first(fun: Callable[[Any, Array], Array], given: Any, xs: Array, count: Array) -> Array:
    """`fun(given, x)` of the first `count` (at least one) rows x of `xs`; the others stay undefined.

    Under vmap the first rows of all are computed together, then those that are left, from wherever they are.
    """
    most = xs.shape[0]

    @custom_vmap
    def run(given, xs, count):
        shape = jax.eval_shape(fun, given, jax.ShapeDtypeStruct(xs.shape[1:], xs.dtype))
        out = jnp.zeros((most, *shape.shape), shape.dtype)
        return lax.fori_loop(0, count, lambda k, out: out.at[k].set(fun(given, xs[k])), out)

    @run.def_vmap
    def rule(size, batched, *operands):
        given, xs, count = seed_bank.spread(size, tuple(batched), operands)
        first = jax.vmap(fun)(given, xs[:, 0])
        if most == 1:
            return first[:, None], True
        rows = xs.reshape(size * most, *xs.shape[2:])
        number = jnp.arange(most)
        order = jnp.argsort(~((number > 0)[None] & (number[None] < count[:, None])).ravel(), stable=True)
        out = jnp.zeros((size, most, *first.shape[1:]), first.dtype).at[:, 0].set(first)
        body = lambda at: jax.vmap(fun)(jax.tree.map(lambda leaf: leaf[at // most], given), rows[at])
        out = seed_bank.in_blocks(body, out.reshape(size * most, *first.shape[1:]), order, 0, (count - 1).sum())
        return out.reshape(size, most, *first.shape[1:]), True

    return run(given, xs, count)


def _split(seed: SeedVars, control: Controls, live: Array, features: Array, count: Array) -> Array:
    """Rows k become rows 2k (slot off) and 2k + 1 (slot on) if the slot is live; `[K, ...]` to `[2K, ...]`.

    Under vmap the rows of all for which a seed has to run are one list of `blend.apply_slot`.
    """
    most = features.shape[0]

    @custom_vmap
    def run(seed, control, live, features, count):
        def both(k, out):
            h = features[k]
            on = blend.apply_slot(control, seed, h[None])[0]
            return out.at[2 * k].set(h).at[2 * k + 1].set(on)

        out = jnp.concatenate([features, jnp.zeros_like(features)])
        return lax.fori_loop(0, jnp.where(live, count, 0), both, out)

    @run.def_vmap
    def rule(size, batched, *operands):
        seed, control, live, features, count = seed_bank.spread(size, tuple(batched), operands)
        each = lambda leaf: jnp.repeat(leaf, most, axis=0)
        wanted = each(live) & (jnp.arange(most)[None] < count[:, None]).ravel()
        control = jax.tree.map(each, control)
        control = control.replace(kind=jnp.where(wanted, control.kind, 0))
        rows = features.reshape(size * most, 1, *features.shape[2:])
        on = jax.vmap(blend.apply_slot)(control, jax.tree.map(each, seed), rows).reshape(features.shape)
        apart = jnp.stack([features, on], axis=2).reshape(size, 2 * most, *features.shape[2:])
        together = jnp.concatenate([features, features], axis=1)
        return jnp.where(live.reshape(size, *[1] * (apart.ndim - 1)), apart, together), True

    return run(seed, control, live, features, count)
