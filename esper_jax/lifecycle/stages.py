"""Stages of a slot, quality gates, and what happens by itself once per epoch (slots_and_hosts 3)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from esper_jax.config import LifecycleConfig
from esper_jax.lifecycle import alpha
from esper_jax.trees import select, strip_weak_type
from esper_jax.types import AlphaAlgorithm, AlphaCurve, AlphaMode, Array, SeedMetrics, SlotState, Stage

TRANSITIONS = {
    Stage.UNKNOWN: (Stage.DORMANT,),
    Stage.DORMANT: (Stage.GERMINATED,),
    Stage.GERMINATED: (Stage.TRAINING, Stage.PRUNED),
    Stage.TRAINING: (Stage.BLENDING, Stage.PRUNED),
    Stage.BLENDING: (Stage.HOLDING, Stage.PRUNED),
    Stage.HOLDING: (Stage.FOSSILIZED, Stage.BLENDING, Stage.PRUNED),
    Stage.FOSSILIZED: (),
    Stage.PRUNED: (Stage.EMBARGOED,),
    Stage.EMBARGOED: (Stage.RESETTING,),
    Stage.RESETTING: (Stage.DORMANT,),
}
_ALLOWED = np.zeros((11, 11), bool)
for _source, _targets in TRANSITIONS.items():
    for _target in _targets:
        _ALLOWED[_source, _target] = True

COOLDOWN = (Stage.PRUNED, Stage.EMBARGOED, Stage.RESETTING)
ACTIVE = (Stage.GERMINATED, Stage.TRAINING, Stage.BLENDING, Stage.HOLDING, Stage.FOSSILIZED)
# The stage that ADVANCE (or FOSSILIZE, from HOLDING) leads to, and the gate in front of it.
NEXT_STAGE = {
    Stage.GERMINATED: Stage.TRAINING,
    Stage.TRAINING: Stage.BLENDING,
    Stage.BLENDING: Stage.HOLDING,
    Stage.HOLDING: Stage.FOSSILIZED,
}
GATE_LEVEL = {Stage.GERMINATED: 1, Stage.TRAINING: 2, Stage.BLENDING: 3, Stage.HOLDING: 5}
RESETTING_TICKS = 1


def can_transition(source: Array, target: Array) -> Array:
    """bool: whether a slot may go from one stage to the other; False for anything that is not a stage."""
    valid = (source >= 0) & (source <= 10) & (target >= 0) & (target <= 10)
    return valid & jnp.asarray(_ALLOWED)[jnp.clip(source, 0, 10), jnp.clip(target, 0, 10)]


def is_in(stage: Array, members: tuple[Stage, ...]) -> Array:
    """bool: whether a stage is one of `members`."""
    out = jnp.zeros(jnp.shape(stage), bool)
    for member in members:
        out |= stage == member
    return out


def is_active(stage: Array) -> Array:
    """bool: a seed module is present (from GERMINATED to FOSSILIZED)."""
    return is_in(stage, ACTIVE)


def seed_count(stage: Array) -> Array:
    """i32[]: seeds alive or fossilised; slots in cooldown hold none."""
    return is_active(stage).sum(dtype=jnp.int32)


def frozen(slots: SlotState) -> Array:
    """bool[S]: the seed is being blended out, so its parameters and momentum are held."""
    return slots.alpha.mode == AlphaMode.DOWN


def empty(n_slots: int) -> SlotState:
    """Records of empty slots."""
    zero, count, no = (jnp.zeros(n_slots, dtype) for dtype in (jnp.float32, jnp.int32, bool))
    record = SlotState(
        stage=jnp.full(n_slots, Stage.DORMANT, jnp.int32),
        previous_stage=jnp.full(n_slots, Stage.DORMANT, jnp.int32),
        epochs_in_stage=count,
        previous_epochs_in_stage=count,
        epochs_total=count,
        blueprint=jnp.full(n_slots, -1, jnp.int32),
        algorithm=jnp.full(n_slots, AlphaAlgorithm.NONE, jnp.int32),
        ramp_curve=jnp.full(n_slots, AlphaCurve.LINEAR, jnp.int32),
        ramp_target=jnp.ones(n_slots, jnp.float32),
        ramp_epochs=count,
        isolate=no,
        has_gate=no,
        alpha=alpha.init(n_slots),
        metrics=SeedMetrics(
            **{name: zero for name in _FLOAT_METRICS}, **{name: no for name in _FLAGS}, contribution_age=count
        ),
    )
    return strip_weak_type(record)


_FLOAT_METRICS = (
    "initial_score", "current_score", "best_score", "stage_start_score", "germination_score",
    "contribution", "contribution_velocity", "interaction_sum", "boost_received", "gradient_norm", "gradient_ratio",
    "gradient_health", "previous_gradient_health",
)  # fmt: skip
_FLAGS = (
    "contribution_valid", "interaction_valid", "gradient_valid", "previous_gradient_valid", "gradient_vanishing",
    "gradient_exploding",
)  # fmt: skip


def enter(slots: SlotState, where: Array, stage: Stage) -> SlotState:
    """Moves the slots in `where` to a stage: the counters restart, the score of this moment becomes the baseline."""
    put = lambda value, old: jnp.where(where, value, old)
    metrics = slots.metrics
    return slots.replace(
        stage=put(stage, slots.stage),
        previous_stage=put(slots.stage, slots.previous_stage),
        previous_epochs_in_stage=put(slots.epochs_in_stage, slots.previous_epochs_in_stage),
        epochs_in_stage=put(0, slots.epochs_in_stage),
        metrics=metrics.replace(stage_start_score=put(metrics.current_score, metrics.stage_start_score)),
    )


def record_score(slots: SlotState, score: Array) -> SlotState:
    """Notes an epoch's score (f32[]) for every slot with a seed; the first one becomes its baseline."""
    here = is_active(slots.stage)
    first = here & (slots.epochs_total == 0)
    m, one = slots.metrics, here.astype(jnp.int32)
    return slots.replace(
        epochs_total=slots.epochs_total + one,
        epochs_in_stage=slots.epochs_in_stage + one,
        metrics=m.replace(
            initial_score=jnp.where(first, score, m.initial_score),
            stage_start_score=jnp.where(first, score, m.stage_start_score),
            current_score=jnp.where(here, score, m.current_score),
            best_score=jnp.where(here, jnp.maximum(m.best_score, score), m.best_score),
        ),
    )


def record_contribution(slots: SlotState, contribution: Array, measured: Array) -> SlotState:
    """Notes this epoch's contributions (f32[S]) where `measured` (bool[S]); the velocity starts with the second one."""
    m = slots.metrics
    change = 0.7 * m.contribution_velocity + 0.3 * (contribution - m.contribution)
    velocity = jnp.where(m.contribution_valid, change, m.contribution_velocity)
    return slots.replace(
        metrics=m.replace(
            contribution=jnp.where(measured, contribution, m.contribution),
            contribution_valid=m.contribution_valid | measured,
            contribution_velocity=jnp.where(measured, velocity, m.contribution_velocity),
            contribution_age=jnp.where(measured, 0, m.contribution_age + m.contribution_valid.astype(jnp.int32)),
        )
    )


def improvement_in_stage(slots: SlotState) -> Array:
    """f32[S]: points gained since the present stage was entered."""
    return slots.metrics.current_score - slots.metrics.stage_start_score


def total_improvement(slots: SlotState) -> Array:
    """f32[S]: points gained since the first epoch after germination."""
    return slots.metrics.current_score - slots.metrics.initial_score


@struct.dataclass
class GateResult:
    """Verdict of the gate in front of each slot's next stage."""

    level: Array  # i32[S] 1, 2, 3 or 5; -1 where no gate stands in front of the stage
    passed: Array  # bool[S]
    score: Array  # f32[S] in [0, 1]


def gate(slots: SlotState, cfg: LifecycleConfig) -> GateResult:
    """The quality gates (slots_and_hosts 3.5). What was never measured never passes a gate that asks for it.

    G1 to TRAINING: always. G2 to BLENDING: permissive, some epochs of training; strict, improvement, epochs and
    gradient ratio. G3 to HOLDING: alpha rests at 1; strict, also some epochs. G5 to FOSSILIZED: contribution
    measured; strict, and large enough.
    """
    stage, m = slots.stage, slots.metrics
    gained = improvement_in_stage(slots)
    full = alpha.at_full_target(slots.alpha)
    if cfg.permissive_gates:
        g2 = slots.epochs_in_stage >= cfg.min_training_epochs
        g3 = full
        g5 = m.contribution_valid
    else:
        long_enough = slots.epochs_in_stage >= cfg.strict_min_epochs
        learns = m.gradient_valid & (m.gradient_ratio >= cfg.strict_gradient_ratio)
        g2 = (gained >= cfg.strict_min_improvement) & long_enough & learns
        g3 = full & long_enough
        g5 = m.contribution_valid & (m.contribution >= cfg.strict_min_contribution)
    contribution_score = jnp.where(m.contribution_valid, jnp.clip(m.contribution / 10, 0, 1), 0)
    rows = (
        (Stage.GERMINATED, jnp.ones_like(g2), jnp.ones_like(gained)),
        (Stage.TRAINING, g2, jnp.clip(gained / 5, 0, 1)),
        (Stage.BLENDING, g3, slots.alpha.alpha),
        (Stage.HOLDING, g5, contribution_score),
    )
    level, passed, score = (jnp.full(stage.shape, -1, jnp.int32), jnp.zeros(stage.shape, bool), jnp.zeros_like(gained))
    result = GateResult(level, passed, score)
    for source, passed, score in rows:
        here = stage == source
        result = GateResult(
            level=jnp.where(here, GATE_LEVEL[source], result.level),
            passed=jnp.where(here, passed, result.passed),
            score=jnp.where(here, score, result.score),
        )
    return result


def prune_now(slots: SlotState, where: Array) -> SlotState:
    """Removes the seeds of the slots in `where` (bool[S]); the record stays for the cooldown.

    Fossils and slots without a seed are left alone.
    """
    where = where & can_transition(slots.stage, jnp.full_like(slots.stage, Stage.PRUNED))
    slots = enter(slots, where, Stage.PRUNED)
    put = lambda value, old: jnp.where(where, value, old)
    resting = alpha.init(slots.stage.shape[0]).replace(curve=slots.alpha.curve, steepness=slots.alpha.steepness)
    return slots.replace(
        alpha=jax.tree.map(put, resting, slots.alpha),
        has_gate=put(False, slots.has_gate),
        isolate=put(False, slots.isolate),
    )


def tick(slots: SlotState, cfg: LifecycleConfig) -> SlotState:
    """What happens by itself, once per epoch after the action: ramps move, a finished blend-out prunes, cooldowns pass.

    PRUNED lasts one tick, EMBARGOED `cfg.embargo_epochs`, RESETTING one; then the slot is empty.
    """
    stage = slots.stage
    ramps, reached = alpha.tick(slots.alpha, stage == Stage.BLENDING)
    slots = slots.replace(alpha=ramps)
    finished = reached & (ramps.target <= alpha.TOLERANCE)
    slots = lax.cond(finished.any(), prune_now, lambda slots, where: slots, slots, finished)
    # cooldown looks at the stage before this tick, so a slot pruned just now stays PRUNED until the next one
    cooling = is_in(stage, COOLDOWN).any()
    return lax.cond(cooling, lambda slots: _cool_down(slots, stage, cfg), lambda slots: slots, slots)


def _cool_down(slots: SlotState, stage: Array, cfg: LifecycleConfig) -> SlotState:
    counting = is_in(stage, (Stage.EMBARGOED, Stage.RESETTING)).astype(jnp.int32)
    slots = slots.replace(epochs_in_stage=slots.epochs_in_stage + counting, epochs_total=slots.epochs_total + counting)
    slots = enter(slots, stage == Stage.PRUNED, Stage.EMBARGOED)
    slots = enter(slots, (stage == Stage.EMBARGOED) & (slots.epochs_in_stage >= cfg.embargo_epochs), Stage.RESETTING)
    over = (stage == Stage.RESETTING) & (slots.epochs_in_stage >= RESETTING_TICKS)
    return select(over, empty(stage.shape[0]), slots)
