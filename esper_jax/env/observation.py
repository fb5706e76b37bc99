"""The observation vector: one encoder, made from a table of named features (control_and_governor 5.7).

Every value is finite and lies in the feature's stated range. What was not measured is 0 beside a flag that is 0,
never a number that looks like a measurement. `names`, `size` and `describe` are read off the same table as the vector
itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from esper_jax.types import (
    NUM_STAGES,
    STAGE_ONE_HOT_INDEX,
    ActionSpace,
    AlphaMode,
    Array,
    Op,
    Signals,
    SlotState,
    Stage,
)

HISTORY = 5
CONTRIBUTION_SCALE, BOOST_SCALE, GRADIENT_RATIO_SCALE, PLATEAU_SCALE, TEMPO_SCALE = 10.0, 5.0, 10.0, 10.0, 12.0
FRESHNESS_DECAY = 0.995


@struct.dataclass
class Inputs:
    """What the encoder reads."""

    signals: Signals
    slots: SlotState
    last_op: Array  # i32[] op asked for at the last decision; WAIT at first
    last_success: Array  # bool[] it was carried out; True at first
    epochs: Array  # f32[] length of the episode, T
    best_score: Array  # f32[] of a perfect host


class Feature(NamedTuple):
    """A row of the table. `value` gives `[width]`, or `[S, width]` for a feature of slots."""

    name: str
    width: int
    low: float
    high: float
    value: Callable[[Inputs], Array]


def symlog(x: Array) -> Array:
    """sign(x) ln(1 + |x|)."""
    return jnp.sign(x) * jnp.log1p(jnp.abs(x))


def _loss(x: Array) -> Array:
    """Losses and norms on a scale where 1 stands for about 1,100."""
    return jnp.clip(symlog(x) / 7, -1, 1)


def _of_best(i: Inputs, score: Array) -> Array:
    """A score as a fraction of the best; one below the worst counts as that."""
    return jnp.clip(score / i.best_score, 0, 1)


def _share(where: Array) -> Array:
    return where.mean(dtype=jnp.float32)


def _one_hot(index: Array, size: int) -> Array:
    return jax.nn.one_hot(index, size, dtype=jnp.float32)


def _velocity(slots: SlotState) -> Array:
    a = slots.alpha
    moving = (a.mode != AlphaMode.HOLD) & (a.steps_total > 0)
    return jnp.where(moving, (a.target - a.start) / jnp.maximum(a.steps_total, 1).astype(jnp.float32), 0)


def _stage_one_hot(stage: Array) -> Array:
    return _one_hot(jnp.asarray(STAGE_ONE_HOT_INDEX, jnp.int32)[stage], NUM_STAGES)


def _measured(flag: Array, value: Array) -> Array:
    return jnp.where(flag, value, 0)


def _freshness(slots: SlotState) -> Array:
    return _measured(
        slots.metrics.contribution_valid, FRESHNESS_DECAY ** slots.metrics.contribution_age.astype(jnp.float32)
    )


_HELD = (Stage.HOLDING, Stage.FOSSILIZED)

GLOBAL_FEATURES = (
    Feature("epoch", 1, 0, 1, lambda i: i.signals.epoch.astype(jnp.float32) / i.epochs),
    Feature("val_loss", 1, -1, 1, lambda i: _loss(i.signals.val_loss)),
    Feature("val_score", 1, 0, 1, lambda i: _of_best(i, i.signals.val_score)),
    Feature("train_score", 1, 0, 1, lambda i: _of_best(i, i.signals.train_score)),
    Feature(
        "loss_history", HISTORY, -1, 1, lambda i: _measured(i.signals.history_valid, _loss(i.signals.loss_history))
    ),
    Feature(
        "score_history", HISTORY, 0, 1,
        lambda i: _measured(i.signals.history_valid, _of_best(i, i.signals.score_history)),
    ),
    Feature("history_valid", HISTORY, 0, 1, lambda i: i.signals.history_valid),
    Feature("plateau", 1, 0, 1, lambda i: jnp.minimum(i.signals.plateau_epochs.astype(jnp.float32) / PLATEAU_SCALE, 1)),
    Feature("host_stabilized", 1, 0, 1, lambda i: i.signals.host_stabilized),
    Feature("slots_training", 1, 0, 1, lambda i: _share(i.slots.stage == Stage.TRAINING)),
    Feature("slots_blending", 1, 0, 1, lambda i: _share(i.slots.stage == Stage.BLENDING)),
    Feature("slots_held", 1, 0, 1, lambda i: _share((i.slots.stage == _HELD[0]) | (i.slots.stage == _HELD[1]))),
    Feature("last_success", 1, 0, 1, lambda i: i.last_success),
    Feature("last_op", len(Op), 0, 1, lambda i: _one_hot(i.last_op, len(Op))),
)  # fmt: skip


def _slot_features(space: ActionSpace) -> tuple[Feature, ...]:
    n_blueprints = len(space.blueprints)
    clip = lambda x, scale, low=-1: jnp.clip(x.astype(jnp.float32) / scale, low, 1)
    share = lambda n, i: jnp.minimum(n.astype(jnp.float32) / i.epochs, 1)
    m = lambda i: i.slots.metrics
    return (
        Feature("occupied", 1, 0, 1, lambda i: i.slots.stage != Stage.DORMANT),
        Feature("stage", NUM_STAGES, 0, 1, lambda i: _stage_one_hot(i.slots.stage)),
        Feature("blueprint", n_blueprints, 0, 1, lambda i: _one_hot(i.slots.blueprint, n_blueprints)),
        Feature("algorithm", 3, 0, 1, lambda i: _one_hot(i.slots.algorithm - 1, 3)),
        Feature("alpha", 1, 0, 1, lambda i: i.slots.alpha.alpha),
        Feature("alpha_target", 1, 0, 1, lambda i: i.slots.alpha.target),
        Feature("alpha_mode", 3, 0, 1, lambda i: _one_hot(i.slots.alpha.mode, 3)),
        Feature("alpha_steps_total", 1, 0, 1, lambda i: share(i.slots.alpha.steps_total, i)),
        Feature("alpha_steps_done", 1, 0, 1, lambda i: share(i.slots.alpha.steps_done, i)),
        Feature("alpha_velocity", 1, -1, 1, lambda i: _velocity(i.slots)),
        Feature("ramp_epochs", 1, 0, 1, lambda i: clip(i.slots.ramp_epochs, TEMPO_SCALE)),
        Feature("ramp_target", 1, 0, 1, lambda i: _measured(i.slots.blueprint >= 0, i.slots.ramp_target)),
        Feature(
            "contribution", 1, -1, 1,
            lambda i: _measured(m(i).contribution_valid, clip(m(i).contribution, CONTRIBUTION_SCALE)),
        ),
        Feature("contribution_valid", 1, 0, 1, lambda i: m(i).contribution_valid),
        Feature("contribution_freshness", 1, 0, 1, lambda i: _freshness(i.slots)),
        Feature("contribution_velocity", 1, -1, 1, lambda i: clip(m(i).contribution_velocity, CONTRIBUTION_SCALE)),
        Feature(
            "interaction", 1, -1, 1,
            lambda i: _measured(m(i).interaction_valid, clip(m(i).interaction_sum, CONTRIBUTION_SCALE)),
        ),
        Feature("boost", 1, 0, 1, lambda i: _measured(m(i).interaction_valid, clip(m(i).boost_received, BOOST_SCALE))),
        Feature("interaction_valid", 1, 0, 1, lambda i: m(i).interaction_valid),
        Feature("gradient_norm", 1, 0, 1, lambda i: _measured(m(i).gradient_valid, _loss(m(i).gradient_norm))),
        Feature(
            "gradient_ratio", 1, 0, 1,
            lambda i: _measured(m(i).gradient_valid, clip(m(i).gradient_ratio, GRADIENT_RATIO_SCALE)),
        ),
        Feature("gradient_health", 1, 0, 1, lambda i: _measured(m(i).gradient_valid, m(i).gradient_health)),
        Feature("gradient_valid", 1, 0, 1, lambda i: m(i).gradient_valid),
        Feature(
            "previous_gradient_health", 1, 0, 1,
            lambda i: _measured(m(i).previous_gradient_valid, m(i).previous_gradient_health),
        ),
        Feature("previous_gradient_valid", 1, 0, 1, lambda i: m(i).previous_gradient_valid),
        Feature("gradient_vanishing", 1, 0, 1, lambda i: m(i).gradient_vanishing),
        Feature("gradient_exploding", 1, 0, 1, lambda i: m(i).gradient_exploding),
        Feature("epochs_in_stage", 1, 0, 1, lambda i: share(i.slots.epochs_in_stage, i)),
        Feature("age", 1, 0, 1, lambda i: share(i.slots.epochs_total, i)),
    )  # fmt: skip


def is_time(space: ActionSpace) -> np.ndarray:
    """bool[D]: the elements that say nothing but how far the episode is."""
    return np.array([name == "epoch" for name, *_ in rows(("",) * space.n_slots, space)])


def size(space: ActionSpace) -> int:
    """Length D of the vector."""
    return sum(f.width for f in GLOBAL_FEATURES) + space.n_slots * sum(f.width for f in _slot_features(space))


def rows(slot_names: tuple[str, ...], space: ActionSpace) -> list[tuple[str, float, float]]:
    """Name, low and high of every element of the vector, in order."""
    out = []
    for prefix, features in [("", GLOBAL_FEATURES), *((f"{name}.", _slot_features(space)) for name in slot_names)]:
        for f in features:
            out += [(f"{prefix}{f.name}" + (f"[{k}]" if f.width > 1 else ""), f.low, f.high) for k in range(f.width)]
    return out


def encode(inputs: Inputs, space: ActionSpace) -> Array:
    """The vector, f32[D]: global features, then those of each slot."""
    n_slots = space.n_slots
    general = [jnp.reshape(f.value(inputs), (f.width,)) for f in GLOBAL_FEATURES]
    per_slot = [jnp.reshape(f.value(inputs), (n_slots, f.width)) for f in _slot_features(space)]
    slots = jnp.concatenate([value.astype(jnp.float32) for value in per_slot], 1)
    return jnp.concatenate([*(value.astype(jnp.float32) for value in general), slots.ravel()])
