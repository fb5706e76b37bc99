"""How a slot changes the host's features: straight-through, blend operators, gate (part of Esper's Kasmina).

The rules of slots_and_hosts 4.4-5.2. With h the host's features, s the seed's output, x what the seed read (h, with
its gradient stopped when isolated) and a the slot's alpha:

    TRAINING   y = h + (s - stop_gradient(s))      value h, the seed sees the full gradient, so does the host
    ADD        y = h + a (s - h)
    MULTIPLY   y = h (1 + a tanh(s - x))
    GATE       y = h + a g(x) (s - h)              g: a small network's sigmoid, a number per example

From BLENDING on gradients flow jointly through both branches, unless the slot is isolated.
"""

from __future__ import annotations

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from esper_jax.network import seed_bank
from esper_jax.network.blueprints import Blueprint
from esper_jax.network.host import Layout
from esper_jax.types import AlphaAlgorithm, Array, SlotState, Stage

STRAIGHT_THROUGH, ADD, MULTIPLY, GATE = range(4)


@struct.dataclass
class SeedVars:
    """What is trained in one slot."""

    params: Array  # f32[P] packed parameters of the seed, see seed_bank
    gate: Array  # f32[G] packed parameters of the gate network
    width: int = struct.field(pytree_node=False)  # channels of the slot
    # what it can hold, see `seed_bank.table`; only these are compiled
    kinds: tuple[Blueprint, ...] = struct.field(pytree_node=False)


@struct.dataclass
class Controls:
    """How each slot acts on the features, read off the lifecycle record by `controls`."""

    kind: Array  # i32[S] 0 = passes features through; otherwise the number in seed_bank.table
    mode: Array  # i32[S] STRAIGHT_THROUGH, ADD, MULTIPLY or GATE
    alpha: Array  # f32[S]
    isolate: Array  # bool[S]


def controls(slots: SlotState, kinds: tuple[Blueprint, ...], alpha_override: Array | None = None) -> Controls:
    """What the lifecycle record means for the forward pass of slots that can hold these kinds of seeds.

    A slot acts in TRAINING, BLENDING, HOLDING and FOSSILIZED. With `alpha_override` (f32[S], NaN = keep) a slot
    blends at that alpha, also in TRAINING.
    """
    stage = slots.stage
    acts = (
        (stage == Stage.TRAINING) | (stage == Stage.BLENDING) | (stage == Stage.HOLDING) | (stage == Stage.FOSSILIZED)
    )
    alpha = slots.alpha.alpha
    straight = (stage == Stage.TRAINING) & (alpha == 0)
    if alpha_override is not None:
        given = ~jnp.isnan(alpha_override)
        alpha = jnp.where(given, alpha_override, alpha)
        straight &= ~given
    algorithm = jnp.where(slots.algorithm == AlphaAlgorithm.NONE, AlphaAlgorithm.ADD, slots.algorithm)
    blending = algorithm - AlphaAlgorithm.ADD + ADD
    mode = jnp.where(straight, STRAIGHT_THROUGH, blending)
    kind = jnp.where(acts, seed_bank.kind_of(slots.blueprint, kinds), 0)
    return Controls(kind, mode, jnp.clip(alpha, 0, 1), slots.isolate | straight)


# --- gate ------------------------------------------------------------------------------------------------------------


def gate_hidden(width: int) -> int:
    """Hidden width of the gate network; the floor of 8 is the later reference's."""
    return max(8, width // 4)


def gate_size(width: int) -> int:
    """Parameters of the gate network: C m + m + m + 1."""
    return width * gate_hidden(width) + 2 * gate_hidden(width) + 1


def gate_init(key: Array, width: int) -> Array:
    """Packed parameters of a new gate network, PyTorch's default initialisation, `f32[gate_size]`."""
    hidden = gate_hidden(width)
    sizes, fans = (width * hidden, hidden, hidden, 1), (width, width, hidden, hidden)
    bounds = np.concatenate([np.full(size, fan**-0.5, np.float32) for size, fan in zip(sizes, fans, strict=True)])
    return jnp.asarray(bounds) * jax.random.uniform(key, bounds.shape, jnp.float32, -1, 1)


def gate_value(gate: Array, x: Array, layout: Layout) -> Array:
    """sigmoid(W2 relu(W1 mean(x) + b1) + b2) for every column of `layout.average`: f32 `[N]`, or `[N L]` if causal."""
    c = layout.width(x)
    # C m + 2 m + 1 parameters determine m, so a gate of another hidden width (as in older records) can be read too
    hidden = (gate.size - 1) // (c + 2)
    w1, b1, w2, b2 = jnp.split(gate, [c * hidden, (c + 1) * hidden, (c + 2) * hidden])
    inner = jax.nn.relu(w1.reshape(c, hidden).T @ layout.average(x) + b1[:, None])
    return jax.nn.sigmoid(w2 @ inner + b2)


# --- blending --------------------------------------------------------------------------------------------------------


def blend(mode: Array, h: Array, s: Array, x: Array, alpha: Array, gate: Array, layout: Layout) -> Array:
    """Host features h and seed output s mixed as `mode` says; h, s, x are one tile, alpha f32[], gate f32[G].

    Exactly h at alpha 0 and (for ADD) exactly s at alpha 1. NaN in s is not hidden.
    """
    s = s.astype(h.dtype)
    alpha = alpha.astype(h.dtype)
    # selected rather than branched: all of this fuses into one pass over a cached tile, and compiles once
    opening = jnp.where(mode == GATE, gate_value(gate, x, layout), 1).astype(h.dtype)
    weight = layout.spread(alpha * opening, h)
    # the form that is exact at its end of the range
    mixed = jnp.where(weight < 0.5, h + weight * (s - h), s - (s - h) * (1 - weight))
    multiplied = h * (1 + alpha * jnp.tanh(s - x))
    straight = h + (s - lax.stop_gradient(s))
    return jnp.where(mode == STRAIGHT_THROUGH, straight, jnp.where(mode == MULTIPLY, multiplied, mixed))


def _branches(blueprint):
    """A slot with a seed of a known blueprint on all tiles: forward, forward that keeps the seeds' stems, backward, for
    `seed_bank.differentiable_switch`."""

    layout = blueprint.layout

    def stem_of(isolate, params, h):
        x = jnp.where(isolate, lax.stop_gradient(h), h)
        return blueprint.stem_of(seed_bank.unpack(blueprint, layout.width(h), params), x)

    def blended(mode, alpha, isolate, params, gate, h, stem):
        x = jnp.where(isolate, lax.stop_gradient(h), h)
        s = blueprint.after_stem(seed_bank.unpack(blueprint, layout.width(h), params), x, stem)
        return blend(mode, h, s, x, alpha, gate, layout)

    def forward(mode, alpha, isolate, params, gate, tiles):
        one = lambda h: blended(mode, alpha, isolate, params, gate, h, stem_of(isolate, params, h))
        # straight-through has the value h, so the seed need not run
        return lax.cond(mode == STRAIGHT_THROUGH, lambda: tiles, lambda: lax.map(one, tiles))

    def keeping(mode, alpha, isolate, params, gate, tiles):
        stems = lax.map(lambda h: stem_of(isolate, params, h), tiles)
        one = lambda tile: blended(mode, alpha, isolate, params, gate, *tile)
        return lax.cond(mode == STRAIGHT_THROUGH, lambda: tiles, lambda: lax.map(one, (tiles, stems))), stems

    def backward(cotangent, stems, mode, alpha, isolate, params, gate, tiles):
        def one(sums, tile):
            h, stem, g = tile
            _, pull = jax.vjp(lambda *given: blended(mode, alpha, isolate, *given), params, gate, h, stem)
            d_params, d_gate, d_h, d_stem = pull(g)
            _, pull_stem = jax.vjp(lambda p, h: stem_of(isolate, p, h), params, h)
            d_params_stem, d_h_stem = pull_stem(d_stem)
            return (sums[0] + d_params + d_params_stem, sums[1] + d_gate), d_h + d_h_stem

        zeros = (jnp.zeros_like(params), jnp.zeros_like(gate))
        (d_params, d_gate), d_tiles = lax.scan(one, zeros, (tiles, stems, cotangent))
        return d_params, d_gate, d_tiles

    return forward, keeping, backward


@cache
def _slot_switch(kinds: tuple[Blueprint, ...]):
    """The differentiable switch over "no seed" (in place of noop) and the other kinds."""
    forward = [lambda mode, alpha, isolate, params, gate, tiles: tiles]
    keeping = [lambda mode, alpha, isolate, params, gate, tiles: (tiles, jnp.zeros_like(tiles))]
    backward = [
        lambda g, stems, mode, alpha, isolate, params, gate, tiles: (jnp.zeros_like(params), jnp.zeros_like(gate), g)
    ]
    for blueprint in kinds[1:]:
        for branches, branch in zip((forward, keeping, backward), _branches(blueprint), strict=True):
            branches.append(branch)
    return seed_bank.differentiable_switch(forward, keeping, backward, fixed=3)


def apply_slot(control: Controls, seed: SeedVars, tiles: Array) -> Array:
    """One slot on the features of all tiles `[T, ...]`; every leaf of `control` is a scalar here.

    Differentiable in `seed` and `tiles`; sparse under vmap. An empty slot returns its input.
    """
    run = _slot_switch(seed.kinds)
    return run(control.kind, control.mode, control.alpha, control.isolate, seed.params, seed.gate, tiles)
