"""What each slot is worth, exactly, from the scores of the host under on/off configurations of its slots.

A table of a game with S players: `values[row]` is the score (`metric.Metric`) when the slots that are bits of
`row` are on (bit j is slot j) and the others are off. Slots that are on keep their present alpha.
"""

from __future__ import annotations

from math import factorial

import jax.numpy as jnp
import numpy as np
from flax import struct

from esper_jax.types import Array

MAX_TABLE_SLOTS = 4
"""Up to so many slots all 2^S configurations are evaluated."""


@struct.dataclass
class Attribution:
    """What one evaluation says about the slots. Points of score; 0 wherever the flag is False."""

    contribution: Array  # f32[S] score minus the score with this slot off
    contribution_valid: Array  # bool[S]
    total_improvement: Array  # f32[] score minus the score with all slots off
    total_improvement_valid: Array  # bool[] any slot is live
    interaction_sum: Array  # f32[S] sum of the pair interactions
    boost: Array  # f32[S] largest positive pair interaction
    interaction_valid: Array  # bool[S] live, and with a live partner
    shapley: Array  # f32[S]
    shapley_valid: Array  # bool[S]


def configurations(n_slots: int) -> np.ndarray:
    """bool[K, S], static: which slots are on in each configuration to evaluate.

    Up to four slots all 2^S, row k being the binary digits of k with slot 0 the lowest. Beyond that K = 2 + 2S: all on,
    all off, each slot off alone, each slot on alone.

    Raises:
      ValueError: without slots.
    """
    if n_slots < 1:
        raise ValueError(f"configurations of {n_slots} slots: must be at least 1")
    if n_slots <= MAX_TABLE_SLOTS:
        return _table_rows(n_slots)
    alone = np.eye(n_slots, dtype=bool)
    return np.concatenate([np.ones((1, n_slots), bool), np.zeros((1, n_slots), bool), ~alone, alone])


def _table_rows(n_slots: int) -> np.ndarray:
    return (np.arange(2**n_slots)[:, None] >> np.arange(n_slots)) % 2 == 1


def _n_slots(values: Array) -> int:
    n_slots = values.size.bit_length() - 1
    if values.shape != (2**n_slots,) or n_slots < 1:
        raise ValueError(f"table of shape {values.shape}: must hold the score of all 2^S configurations")
    return n_slots


def shapley(values: Array) -> Array:
    """Exact Shapley values, f32[2^S] -> f32[S] (Shapley, 1953). They sum to the gain of all slots together.

    Raises:
      ValueError: unless the table has 2^S entries.
    """
    n_slots = _n_slots(values)
    on = _table_rows(n_slots)
    bit = 2 ** np.arange(n_slots)
    without = np.stack([np.flatnonzero(~on[:, j]) for j in range(n_slots)])  # [S, 2^(S-1)] rows
    size = on.sum(1)[without]
    # share of the orders in which exactly this coalition stands before the slot
    orders = np.array([factorial(k) * factorial(n_slots - k - 1) / factorial(n_slots) for k in range(n_slots)])
    gain = values[without | bit[:, None]] - values[without]
    return jnp.sum(orders[size].astype(np.float32) * gain, axis=-1)


def interactions(values: Array) -> Array:
    """Pair interactions `v(ij) - v(i) - v(j) + v(none)` with everything else off, f32[2^S] -> f32[S, S], diagonal 0."""
    n_slots = _n_slots(values)
    bit = 2 ** np.arange(n_slots)
    alone = values[bit]
    pair = values[bit[:, None] | bit]
    return jnp.where(np.eye(n_slots, dtype=bool), 0.0, pair - alone[:, None] - alone[None] + values[0])


def leave_one_out(values: Array) -> Array:
    """Loss of score when a slot alone is switched off, f32[2^S] -> f32[S]."""
    n_slots = _n_slots(values)
    everything = 2**n_slots - 1
    return values[everything] - values[everything ^ 2 ** np.arange(n_slots)]


def committed(values: Array, fossil: Array) -> Array:
    """Score with everything off that is not fossilised, f32[2^S] and bool[S] -> f32[]."""
    return values[jnp.sum(jnp.where(fossil, 2 ** np.arange(_n_slots(values)), 0))]


def attribute(values: Array, on: np.ndarray, live: Array) -> Attribution:
    """Read off a table what each live slot is worth.

    A slot that is not live changes nothing when it is switched, so rows that differ in it alone must hold the same
    score; the row with it off is the one that is read, and it gets exactly 0 everywhere.

    Args:
      values: f32[K] score of each configuration.
      on: bool[K, S], static: `configurations(S)`, which says how the table is laid out.
      live: bool[S] slots that hold a seed whose alpha is above 0.

    Raises:
      ValueError: if `on` is another list of configurations or the shapes disagree.
    """
    (n_slots,) = live.shape
    expected = configurations(n_slots)
    if values.shape != (len(expected),) or not np.array_equal(on, expected):
        raise ValueError(
            f"scores {values.shape} under configurations {np.shape(on)}: must be those of configurations({n_slots})"
        )
    if n_slots <= MAX_TABLE_SLOTS:
        return _from_table(values, live)
    return _from_list(values, live)


def _from_table(values: Array, live: Array) -> Attribution:
    n_slots = live.shape[0]
    live_bits = jnp.sum(jnp.where(live, 2 ** np.arange(n_slots), 0))
    values = values[np.arange(2**n_slots) & live_bits]
    # a pair with a slot that is not live is 0 by arithmetic, up to rounding; the mask makes it exact
    pair = jnp.where(live[:, None] & live[None], interactions(values), 0.0)
    return Attribution(
        contribution=jnp.where(live, leave_one_out(values), 0.0),
        contribution_valid=live,
        total_improvement=values[-1] - values[0],
        total_improvement_valid=jnp.any(live),
        interaction_sum=jnp.sum(pair, axis=1),
        boost=jnp.maximum(jnp.max(pair, axis=1), 0.0),
        interaction_valid=live & (jnp.sum(live) >= 2),
        shapley=jnp.where(live, shapley(values), 0.0),
        shapley_valid=live,
    )


def _from_list(values: Array, live: Array) -> Attribution:
    n_slots = live.shape[0]
    unknown, never = jnp.zeros(n_slots, values.dtype), jnp.zeros(n_slots, bool)
    return Attribution(
        contribution=jnp.where(live, values[0] - values[2 : 2 + n_slots], 0.0),
        contribution_valid=live,
        total_improvement=jnp.where(jnp.any(live), values[0] - values[1], 0.0),
        total_improvement_valid=jnp.any(live),
        interaction_sum=unknown,
        boost=unknown,
        interaction_valid=never,
        shapley=unknown,
        shapley_valid=never,
    )
