"""Seeds of any kind in arrays of fixed shape, and their dispatch: a seed that is not there costs (almost) nothing.

The parameters of a slot's seed lie in the prefix of one vector as long as the largest blueprint needs. `switch` is a
per-environment `lax.switch` whose *batching rule* groups environments by branch: a plain vmapped switch would run every
branch for every environment.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_batching import custom_vmap

from esper_jax.enums import catalog
from esper_jax.network.blueprints import Blueprint
from esper_jax.types import Array

# --- packed parameters -----------------------------------------------------------------------------------------------


def table(modules: tuple[str | Blueprint, ...], named: Mapping[str, Blueprint]) -> tuple[Blueprint, ...]:
    """What the numbers 0, 1, 2, ... of the seeds' kinds stand for: noop, then the given blueprints.

    Args:
      named: the package's modules for this host, by name.
    """
    return tuple(named[m] if isinstance(m, str) else m for m in ("noop", *(m for m in modules if m != "noop")))


def kind_of(blueprint: Array, kinds: tuple[Blueprint, ...]) -> Array:
    """i32: number among the kinds of a number in the catalog; 0 (noop) for none and for one that is not in it."""
    names = [kind.name for kind in kinds]
    numbers = [names.index(name) if name in names else 0 for name in catalog(names)]
    return jnp.where(blueprint < 0, 0, jnp.asarray(numbers, jnp.int32)[jnp.maximum(blueprint, 0)])


def param_counts(kinds: tuple[Blueprint, ...], width: int) -> np.ndarray:
    """`i32[kinds]`: parameters of each blueprint."""
    return np.array([blueprint.param_count(width) for blueprint in kinds], np.int32)


def packed_size(kinds: tuple[Blueprint, ...], width: int) -> int:
    """Length of a slot's parameter vector: that of the largest blueprint at this width."""
    return int(param_counts(kinds, width).max())


def pack(params: dict[str, Array], size: int) -> Array:
    """Parameters one after the other, then zeros, `f32[size]`."""
    flat = [jnp.ravel(leaf) for leaf in params.values()]
    used = sum(leaf.size for leaf in flat)
    return jnp.concatenate([*flat, jnp.zeros(size - used, jnp.float32)])


def unpack(blueprint: Blueprint, width: int, vector: Array) -> dict[str, Array]:
    """Inverse of `pack`: the parameters that lie in the vector's prefix."""
    params, start = {}, 0
    for name, initial in blueprint.spec(width).items():
        params[name] = vector[start : start + initial.size].reshape(initial.shape)
        start += initial.size
    return params


def _by_tensor(kinds: tuple[Blueprint, ...], width: int, value: Callable, fill: float) -> np.ndarray:
    """`f32[kinds, tensors]`: a number for each parameter tensor of each blueprint, `fill` where there is none."""
    rows = [[value(initial) for initial in blueprint.spec(width).values()] for blueprint in kinds]
    out = np.full((len(rows), max(map(len, rows))), fill, np.float32)
    for k, row in enumerate(rows):
        out[k, : len(row)] = row
    return out


def tensor_ids(kinds: tuple[Blueprint, ...], width: int, kind: Array) -> tuple[Array, Array]:
    """Which tensor of number `kind` (i32[]) of the kinds each element belongs to, i32[packed_size], and how many
    tensors any blueprint has, int; an element behind the blueprint's last tensor gets that number.

    Computed from the few sizes: a table with a row per kind and a column per element would be megabytes of constants.
    """
    sizes = _by_tensor(kinds, width, lambda initial: initial.size, 0)
    ends = jnp.asarray(np.cumsum(sizes, 1), jnp.int32)[kind]
    element = jnp.arange(packed_size(kinds, width), dtype=jnp.int32)
    number = (element[:, None] >= ends[None]).sum(1, dtype=jnp.int32)
    return jnp.where(element < ends[-1], number, sizes.shape[1]), sizes.shape[1]


def germinate(key: Array, kinds: tuple[Blueprint, ...], width: int, kind: Array) -> Array:
    """A fresh vector for number `kind` (i32[]) of the kinds, `f32[packed_size]`; one draw serves all kinds but those
    that bring their own."""
    ids, tensors = tensor_ids(kinds, width, kind)
    used = ids < tensors
    ids = jnp.minimum(ids, tensors - 1)
    low = jnp.asarray(_by_tensor(kinds, width, lambda initial: initial.low, 0))[kind][ids]
    high = jnp.asarray(_by_tensor(kinds, width, lambda initial: initial.high, 0))[kind][ids]
    fresh = jnp.where(used, low + (high - low) * jax.random.uniform(key, ids.shape, jnp.float32), 0)
    for number, blueprint in enumerate(kinds):
        if blueprint.draw is not None:
            fresh = jnp.where(kind == number, pack(blueprint.init(key, width), ids.shape[0]), fresh)
    return fresh


# --- dispatch --------------------------------------------------------------------------------------------------------


# Elements of a batch that are computed together, where only some of a batch are. On a CPU nothing is won by more than
# one; a GPU needs a few to be busy, and what is missing to a full block is computed for nothing.
BLOCKS = {"cpu": 1}
BLOCK = 8


def in_blocks(body: Callable, out: Any, order: Array, start: Array, count: Array) -> Any:
    """Lets `body` replace some elements of the trees `out`, a block of them at a time.

    Args:
      body: (numbers i32[B] of elements) -> trees of new ones, `[B, ...]`.
      order: i32[N] numbers of elements; those at `start` to `start + count` are meant. What `body` makes of others, to
        fill up a block, is dropped.
    """
    size = order.shape[0]
    block = min(size, BLOCKS.get(jax.default_backend(), BLOCK))
    lane = jnp.arange(block, dtype=jnp.int32)

    def step(number, out):
        place = number * block + lane
        rows = order[jnp.minimum(start + place, size - 1)]
        target = jnp.where(place < count, rows, size)  # outside: dropped
        put = lambda old, new: old.at[target].set(new, mode="drop")
        return jax.tree.map(put, out, body(rows))

    return lax.fori_loop(0, -(-count // block), step, out)


def spread(size: int, batched: Any, operands: Any) -> Any:
    """Operands of a batching rule, all with the leading axis [size]."""
    to_all = lambda leaf, is_batched: leaf if is_batched else jnp.broadcast_to(leaf, (size, *jnp.shape(leaf)))
    return jax.tree.map(to_all, operands, batched)


def switch(branches: Sequence[Callable]) -> Callable:
    """`run(index, *operands) = branches[index](*operands)`, sparse under vmap; not differentiable by itself.

    One at a time it is `lax.switch`. Under vmap the first branch, which should be cheap, is run for all elements; these
    are sorted by branch, and each other one runs on its own in blocks, absent ones not at all. So every branch is
    compiled once. Branches must return arrays of one structure, shape and dtype.
    """

    @custom_vmap
    def run(index, *operands):
        return lax.switch(index, branches, *operands)

    @run.def_vmap
    def rule(size, batched, index, *operands):
        index, *operands = spread(size, tuple(batched), (index, *operands))
        order = jnp.argsort(index, stable=True)
        counts = jnp.bincount(index, length=len(branches))
        starts = jnp.cumsum(counts) - counts
        out = jax.vmap(branches[0])(*operands)
        for branch, count, start in zip(branches[1:], counts[1:], starts[1:], strict=True):
            body = lambda rows, branch=branch: jax.vmap(branch)(*jax.tree.map(lambda leaf: leaf[rows], operands))
            out = in_blocks(body, out, order, start, count)
        return out, jax.tree.map(lambda _: True, out)

    return run


def differentiable_switch(
    forward: Sequence[Callable], keeping: Sequence[Callable], backward: Sequence[Callable], fixed: int
) -> Callable:
    """`run(index, *operands)` over `forward`, whose reverse mode is a switch over `keeping`, then one over `backward`.

    `forward[i](*operands) -> out`; `keeping[i](*operands) -> (out, kept)`, the same `out` and one pytree of arrays, of
    the same shapes for all branches; `backward[i](cotangent, kept, *operands)` returns the cotangents of all operands
    but the first `fixed`, which have none. Besides `kept` only the operands are remembered: branches compute again what
    else they need, so no branch pays for another's residuals.
    """
    run_forward, run_keeping, run_backward = switch(forward), switch(keeping), switch(backward)

    @jax.custom_vjp
    def run(index, *operands):
        return run_forward(index, *operands)

    def run_fwd(index, *operands):
        out, kept = run_keeping(index, *operands)
        return out, (index, kept, operands)

    def run_bwd(residuals, cotangent):
        index, kept, operands = residuals
        return (*[None] * (1 + fixed), *run_backward(index, cotangent, kept, *operands))

    run.defvjp(run_fwd, run_bwd)
    return run
