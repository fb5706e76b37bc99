"""Follows the host's validation: deltas, plateau, stabilisation, short histories (Esper's Tamiyo signal tracker)."""

from __future__ import annotations

import jax.numpy as jnp
from flax import struct

from esper_jax.config import TrackerConfig
from esper_jax.lifecycle import stages
from esper_jax.trees import select
from esper_jax.types import Array, Signals, SlotState

HISTORY = 5  # entries of the histories in Signals
MIN_LOSS = 1e-8  # a relative change of a smaller loss says nothing


@struct.dataclass
class TrackerState:
    """Windows and counters; W is `cfg.history_window`. Only accepted epochs (`update`) are in here."""

    loss_window: Array  # f32[W] oldest first, right-aligned; entries before the last `count` are 0 and mean nothing
    score_window: Array  # f32[W]
    count: Array  # i32[] entries held
    plateau_epochs: Array  # i32[] epochs in a row without a gain over the previous one
    stable_epochs: Array  # i32[] epochs in a row with little relative change of the loss
    stabilized: Array  # bool[] latch
    latest: Signals  # of the last accepted epoch; before the first one only its epoch, slots and flags mean anything


def init(cfg: TrackerConfig) -> TrackerState:
    """A tracker that has seen nothing; latched from the start if `cfg.stabilization_epochs` is 0."""
    zero, none, stabilized = jnp.float32(0), jnp.int32(0), jnp.bool_(cfg.stabilization_epochs == 0)
    latest = Signals(
        epoch=none,
        train_loss=zero,
        train_score=zero,
        val_loss=zero,
        val_score=zero,
        loss_delta=jnp.float32(jnp.inf),
        score_delta=zero,
        plateau_epochs=none,
        host_stabilized=stabilized,
        best_val_score=zero,
        best_val_loss=zero,
        loss_history=jnp.zeros(HISTORY, jnp.float32),
        score_history=jnp.zeros(HISTORY, jnp.float32),
        history_valid=jnp.zeros(HISTORY, bool),
        available_slots=none,
    )
    window = jnp.zeros(cfg.history_window, jnp.float32)
    return TrackerState(window, window, none, none, none, stabilized, latest)


def update(
    state: TrackerState,
    *,
    cfg: TrackerConfig,
    epoch: Array,
    train_loss: Array,
    train_score: Array,
    val_loss: Array,
    val_score: Array,
    available_slots: Array,
) -> tuple[TrackerState, Signals]:
    """Takes in one epoch (all f32[] but `epoch` and `available_slots`, i32[]; scores as of `metric.Metric`).

    With a non-finite validation the tracker stays as it is, and the signals repeat the last accepted values under the
    given `epoch` and `available_slots`. A non-finite training value alone is replaced by the last accepted one.
    """
    accepted = jnp.isfinite(val_loss) & jnp.isfinite(val_score)
    loss, score = _or_latest(state, val_loss, val_score)
    loss_delta, score_delta = _deltas(state, loss, score)

    plateau = jnp.where(score_delta < cfg.plateau_threshold, state.plateau_epochs + 1, 0)
    comparable = (state.count > 0) & (state.latest.val_loss > MIN_LOSS) & ~state.stabilized
    change = loss_delta / jnp.where(comparable, state.latest.val_loss, 1)
    stable = (-cfg.regression_threshold < change) & (change < cfg.stabilization_threshold)
    stable_epochs = jnp.where(comparable, jnp.where(stable, state.stable_epochs + 1, 0), state.stable_epochs)
    stabilized = state.stabilized | (comparable & stable & (stable_epochs >= cfg.stabilization_epochs))

    after = state.replace(
        loss_window=jnp.append(state.loss_window[1:], loss),
        score_window=jnp.append(state.score_window[1:], score),
        count=jnp.minimum(state.count + 1, cfg.history_window),
        plateau_epochs=plateau,
        stable_epochs=stable_epochs,
        stabilized=stabilized,
    )
    signals = _signals(
        state, after, _window_minimum(after), loss, score, epoch, train_loss, train_score, available_slots
    )
    after = after.replace(latest=signals)
    after = select(accepted, after, state)
    return after, after.latest.replace(epoch=signals.epoch, available_slots=signals.available_slots)


def peek(
    state: TrackerState,
    *,
    epoch: Array,
    train_loss: Array,
    train_score: Array,
    val_loss: Array,
    val_score: Array,
    available_slots: Array,
) -> Signals:
    """Signals for values that the tracker does not take in: counters and histories are the stored ones.

    Right after an `update` with the same values both deltas are 0. A non-finite value is replaced by the last accepted
    one.
    """
    loss, score = _or_latest(state, val_loss, val_score)
    best_loss = jnp.where(state.count > 0, jnp.minimum(_window_minimum(state), loss), loss)
    return _signals(state, state, best_loss, loss, score, epoch, train_loss, train_score, available_slots)


def _signals(
    before: TrackerState,
    after: TrackerState,
    best_loss: Array,
    loss: Array,
    score: Array,
    epoch: Array,
    train_loss: Array,
    train_score: Array,
    available_slots: Array,
) -> Signals:
    """Signals of an epoch: changes since the last accepted one of `before`, counters and histories of `after`."""
    loss_delta, score_delta = _deltas(before, loss, score)
    return Signals(
        epoch=jnp.asarray(epoch, jnp.int32),
        train_loss=_finite_or(train_loss, before.latest.train_loss),
        train_score=_finite_or(train_score, before.latest.train_score),
        val_loss=loss,
        val_score=score,
        loss_delta=loss_delta,
        score_delta=score_delta,
        plateau_epochs=after.plateau_epochs,
        host_stabilized=after.stabilized,
        best_val_score=jnp.maximum(before.latest.best_val_score, score),
        best_val_loss=best_loss,
        available_slots=jnp.asarray(available_slots, jnp.int32),
        **_histories(after),
    )


@struct.dataclass
class SeedSummary:
    """One seed that stands for all of an environment; all 0 without seeds."""

    stage: Array  # i32[] Stage
    epochs_in_stage: Array  # i32[]
    alpha: Array  # f32[]
    improvement: Array  # f32[] points gained since the stage was entered


def summary_seed(slots: SlotState) -> SeedSummary:
    """The seed of the highest stage; ties go to the higher alpha, the lower contribution, the later slot.

    A contribution that was never measured ranks last.
    """
    m = slots.metrics
    chosen = stages.is_active(slots.stage)
    present = chosen.any()
    harm = jnp.where(m.contribution_valid, -m.contribution, -jnp.inf)
    for key in (slots.stage.astype(jnp.float32), slots.alpha.alpha, harm):
        chosen &= key == jnp.max(jnp.where(chosen, key, -jnp.inf))
    last = chosen.shape[0] - 1 - jnp.argmax(chosen[::-1])
    pick = lambda values: jnp.where(present, values[last], 0)
    return SeedSummary(
        stage=pick(slots.stage),
        epochs_in_stage=pick(slots.epochs_in_stage),
        alpha=pick(slots.alpha.alpha),
        improvement=pick(stages.improvement_in_stage(slots)),
    )


def _finite_or(value: Array, otherwise: Array) -> Array:
    value = jnp.asarray(value, jnp.float32)
    return jnp.where(jnp.isfinite(value), value, otherwise)


def _or_latest(state: TrackerState, loss: Array, score: Array) -> tuple[Array, Array]:
    return _finite_or(loss, state.latest.val_loss), _finite_or(score, state.latest.val_score)


def _deltas(state: TrackerState, loss: Array, score: Array) -> tuple[Array, Array]:
    """Gains over the last accepted epoch; before there is one, infinite in loss and the score itself."""
    loss_delta = jnp.where(state.count > 0, state.latest.val_loss - loss, jnp.inf)
    return loss_delta, score - state.latest.val_score


def _window_minimum(state: TrackerState) -> Array:
    held = jnp.arange(state.loss_window.shape[0], dtype=jnp.int32) >= state.loss_window.shape[0] - state.count
    return jnp.min(jnp.where(held, state.loss_window, jnp.inf))


def _histories(state: TrackerState) -> dict[str, Array]:
    return dict(
        loss_history=state.loss_window[-HISTORY:],
        score_history=state.score_window[-HISTORY:],
        history_valid=jnp.arange(HISTORY, dtype=jnp.int32) >= HISTORY - state.count,
    )
