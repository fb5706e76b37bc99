"""What an action does to the slots (slots_and_hosts 3.4-3.8). An illegal or gate-failed request changes nothing."""

from __future__ import annotations

import jax.numpy as jnp
from flax import struct
from jax import lax

from esper_jax.config import LifecycleConfig
from esper_jax.lifecycle import alpha, masks, stages
from esper_jax.trees import select
from esper_jax.types import (
    ALPHA_CURVES,
    ALPHA_SPEED_EPOCHS,
    ALPHA_TARGETS,
    STYLE_ALGORITHM,
    STYLE_CURVE,
    TEMPO_EPOCHS,
    Action,
    AlphaAlgorithm,
    Array,
    Op,
    SlotState,
    Stage,
)


@struct.dataclass
class Request:
    """An action in the units of the lifecycle; all scalars."""

    op: Array  # i32[] Op
    slot: Array  # i32[]
    blueprint: Array  # i32[] number in the catalog
    algorithm: Array  # i32[] AlphaAlgorithm; NONE keeps the present one (SET_ALPHA_TARGET)
    ramp_curve: Array  # i32[] AlphaCurve of the first ramp (GERMINATE)
    ramp_epochs: Array  # i32[] length of the first ramp (GERMINATE)
    target: Array  # f32[] alpha to blend to
    steps: Array  # i32[] length of a later ramp; 0 is at once
    curve: Array  # i32[] AlphaCurve of a later ramp


@struct.dataclass
class Outcome:
    """What came of a request."""

    op: Array  # i32[] the op that was carried out; WAIT if the request was refused
    legal: Array  # bool[] the op was legal on that slot
    success: Array  # bool[] legal, and its gate (if any) passed
    gate_level: Array  # i32[] gate that was asked, -1 = none
    gate_passed: Array  # bool[]
    gate_score: Array  # f32[]
    germinated: Array  # bool[S] this slot has a new seed, whose parameters are to be made
    gate_created: Array  # bool[S] this slot needs a new gate network


def decode(action: Action) -> Request:
    """Indices of the heads to the values behind them."""
    look_up = lambda table, index, dtype=jnp.int32: jnp.asarray(table, dtype)[index]
    return Request(
        op=action.op,
        slot=action.slot,
        blueprint=action.blueprint,
        algorithm=look_up(STYLE_ALGORITHM, action.style),
        ramp_curve=look_up(STYLE_CURVE, action.style),
        ramp_epochs=look_up(TEMPO_EPOCHS, action.tempo),
        target=look_up(ALPHA_TARGETS, action.alpha_target, jnp.float32),
        steps=look_up(ALPHA_SPEED_EPOCHS, action.alpha_speed),
        curve=look_up(ALPHA_CURVES, action.alpha_curve),
    )


def execute(slots: SlotState, request: Request, score: Array, cfg: LifecycleConfig) -> tuple[SlotState, Outcome]:
    """Carries out one request; `score` (f32[]) is the environment's present one, remembered by a germination."""
    here = jnp.arange(slots.stage.shape[0], dtype=jnp.int32) == request.slot
    allowed = masks.legal_slots(slots, cfg)[request.op] & here
    gates = stages.gate(slots, cfg)
    asks_gate = (request.op == Op.ADVANCE) | (request.op == Op.FOSSILIZE)
    done = allowed & (gates.passed | ~asks_gate)
    had_gate = slots.has_gate

    effects = {
        Op.WAIT: lambda slots, where: slots,
        Op.GERMINATE: lambda slots, where: select(where, _germinate(slots, where, request, score), slots),
        Op.SET_ALPHA_TARGET: lambda slots, where: _set_alpha_target(slots, where, request),
        Op.PRUNE: lambda slots, where: _prune(slots, where, request),
        Op.FOSSILIZE: _fossilize,
        Op.ADVANCE: lambda slots, where: _advance(slots, where, cfg),
    }
    legal = allowed.any() | (request.op == Op.WAIT)
    success = done.any() | (request.op == Op.WAIT)
    # a branch per op: as selects, the predicates of all ops would be computed again for each of the many leaves
    after = lax.switch(jnp.where(success, request.op, Op.WAIT), [effects[op] for op in Op], slots, done)
    gated = allowed & asks_gate
    return after, Outcome(
        op=jnp.where(success, request.op, Op.WAIT),
        legal=legal,
        success=success,
        gate_level=jnp.where(gated.any(), jnp.max(jnp.where(gated, gates.level, -1)), -1),
        gate_passed=(gated & gates.passed).any(),
        gate_score=jnp.where(gated, gates.score, 0).sum(),
        germinated=done & (request.op == Op.GERMINATE),
        gate_created=after.has_gate & ~had_gate,
    )


# Effects on the slots in `where` (bool[S]), for which the op is legal.


def _germinate(slots: SlotState, where: Array, request: Request, score: Array) -> SlotState:
    fresh = stages.empty(slots.stage.shape[0])
    put = lambda value, old: jnp.where(where, value, old)
    fresh = fresh.replace(
        blueprint=put(request.blueprint, fresh.blueprint),
        algorithm=put(request.algorithm, fresh.algorithm),
        ramp_curve=put(request.ramp_curve, fresh.ramp_curve),
        ramp_epochs=put(request.ramp_epochs, fresh.ramp_epochs),
        ramp_target=put(request.target, fresh.ramp_target),
        metrics=fresh.metrics.replace(germination_score=put(score, fresh.metrics.germination_score)),
    )
    return stages.enter(fresh, where, Stage.GERMINATED)


def _advance(slots: SlotState, where: Array, cfg: LifecycleConfig) -> SlotState:
    to_training = where & (slots.stage == Stage.GERMINATED)
    to_blending = where & (slots.stage == Stage.TRAINING)
    to_holding = where & (slots.stage == Stage.BLENDING)
    gated = slots.algorithm == AlphaAlgorithm.GATE

    after = stages.enter(slots, to_training, Stage.TRAINING)
    after = stages.enter(after, to_blending, Stage.BLENDING)
    after = stages.enter(after, to_holding, Stage.HOLDING)
    ramp = alpha.retarget(after.alpha, to_blending, slots.ramp_target, slots.ramp_epochs, slots.ramp_curve)
    return after.replace(
        alpha=alpha.place(ramp, to_holding, 1.0),
        isolate=jnp.where(to_training, True, jnp.where(to_blending, cfg.isolate_after_training, after.isolate)),
        has_gate=jnp.where(to_blending, gated, jnp.where(to_holding, after.has_gate & gated, after.has_gate)),
    )


def _fossilize(slots: SlotState, where: Array) -> SlotState:
    after = stages.enter(slots, where, Stage.FOSSILIZED)
    return after.replace(alpha=alpha.place(after.alpha, where, 1.0))


def _set_alpha_target(slots: SlotState, where: Array, request: Request) -> SlotState:
    partial = where & (slots.stage == Stage.HOLDING) & (request.target < 1 - alpha.TOLERANCE)
    after = stages.enter(slots, partial, Stage.BLENDING)
    changes = where & (request.algorithm != AlphaAlgorithm.NONE)
    algorithm = jnp.where(changes, request.algorithm, after.algorithm)
    return after.replace(
        algorithm=algorithm,
        has_gate=jnp.where(changes, algorithm == AlphaAlgorithm.GATE, after.has_gate),
        alpha=alpha.retarget(after.alpha, where, request.target, request.steps, request.curve),
    )


def _prune(slots: SlotState, where: Array, request: Request) -> SlotState:
    blended = stages.is_in(slots.stage, (Stage.BLENDING, Stage.HOLDING)) & (slots.alpha.alpha > 0)
    gradual = where & blended & (request.steps > 0)
    after = stages.enter(slots, gradual & (slots.stage == Stage.HOLDING), Stage.BLENDING)
    after = after.replace(alpha=alpha.retarget(after.alpha, gradual, 0.0, request.steps, request.curve))
    return stages.prune_now(after, where & ~gradual)
