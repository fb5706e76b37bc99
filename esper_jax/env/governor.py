"""Notices a broken training run and takes it back to its last good state (Esper's Tolaria governor).

One validation loss per epoch is judged by named detectors; `check` turns their answers into a verdict. Losses that were
accepted form the history that the next ones are compared with. Everything is pure: the snapshot is a value, and a
rollback in one environment of a population is a selection that leaves the others bitwise as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from esper_jax.config import GovernorConfig
from esper_jax.lifecycle import stages
from esper_jax.trees import select
from esper_jax.types import Array, PanicReason, SlotState, Stage

# A host that has forgotten everything: it was clearly better than guessing and its loss is now that of guessing.
LOBOTOMY_MEAN = 0.6  # history mean below this share of the random-guess loss
LOBOTOMY_BAND = 0.065  # and this loss within this share of it


@struct.dataclass
class GovernorState:
    """Accepted losses and the present run of anomalies; W is `cfg.history_window`."""

    history: Array  # f32[W] accepted losses, the newest last; entries before the last `count` are 0 and mean nothing
    count: Array  # i32[] accepted losses held
    consecutive: Array  # i32[] divergent losses in a row
    pending: Array  # bool[] the last loss was divergent
    reason: Array  # i32[] PanicReason of the latest alarm, confirmed or not
    panic_loss: Array  # f32[] the loss that raised it (non-finite for NON_FINITE); meaningless when reason is NONE


@struct.dataclass
class Verdict:
    """What is to be done about one loss."""

    panic: Array  # bool[] roll back now
    accepted: Array  # bool[] the loss entered the history: only then may a snapshot be taken
    reason: Array  # i32[] PanicReason; set without `panic` while a divergence is unconfirmed
    consecutive: Array  # i32[] divergent losses in a row, this one included
    threshold: Array  # f32[] mean + sensitivity standard deviations of the history; 0 when it is empty


@struct.dataclass
class Statistics:
    """Of the accepted losses, before the one that is judged."""

    count: Array  # i32[]
    mean: Array  # f32[] 0 when there are none
    std: Array  # f32[] population standard deviation
    threshold: Array  # f32[] mean + sensitivity * std
    ready: Array  # bool[] at least `min_history` losses


def init(cfg: GovernorConfig) -> GovernorState:
    """A governor that has seen nothing."""
    return GovernorState(
        history=jnp.zeros(cfg.history_window, jnp.float32),
        count=jnp.int32(0),
        consecutive=jnp.int32(0),
        pending=jnp.bool_(False),
        reason=jnp.int32(PanicReason.NONE),
        panic_loss=jnp.float32(0),
    )


def statistics(state: GovernorState, cfg: GovernorConfig) -> Statistics:
    """Mean and population deviation of the whole history, in two passes: float32 would cancel in one."""
    window = state.history.shape[0]
    held = jnp.arange(window, dtype=jnp.int32) >= window - state.count
    n = jnp.maximum(state.count, 1).astype(jnp.float32)
    mean = jnp.where(held, state.history, 0).sum() / n
    deviation = jnp.where(held, state.history - mean, 0)
    # Warm-up accepts anything finite; squares of such losses overflow float32, squares of their ratios don't.
    largest = jnp.abs(deviation).max()
    scale = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
    std = scale * jnp.sqrt(((deviation / scale) ** 2).sum() / n)
    return Statistics(
        count=state.count,
        mean=mean,
        std=std,
        threshold=mean + cfg.sensitivity * std,
        ready=state.count >= cfg.min_history,
    )


Detector = Callable[[Statistics, Array, GovernorConfig, Array], Array]


def non_finite(stats: Statistics, loss: Array, cfg: GovernorConfig, random_guess_loss: Array) -> Array:
    """bool[]: NaN or infinite."""
    return ~jnp.isfinite(loss)


def lobotomy(stats: Statistics, loss: Array, cfg: GovernorConfig, random_guess_loss: Array) -> Array:
    """bool[]: a host that had learnt is back at guessing."""
    had_learnt = stats.mean < LOBOTOMY_MEAN * random_guess_loss
    guesses = jnp.abs(loss - random_guess_loss) < LOBOTOMY_BAND * random_guess_loss
    return stats.ready & had_learnt & guesses


def divergence(stats: Statistics, loss: Array, cfg: GovernorConfig, random_guess_loss: Array) -> Array:
    """bool[]: above the absolute threshold, the statistical one and the multiple of the mean, all three."""
    above = (loss > cfg.absolute_threshold) & (loss > stats.threshold) & (loss > cfg.multiplier * stats.mean)
    return stats.ready & above


# Each decides one kind of alarm from (statistics, loss, cfg, random-guess loss). `check` takes another table with the
# same names, `fired` any table.
DETECTORS: Mapping[str, Detector] = {"non_finite": non_finite, "lobotomy": lobotomy, "divergence": divergence}


def fired(
    stats: Statistics,
    loss: Array,
    *,
    cfg: GovernorConfig,
    random_guess_loss: Array | float,
    detectors: Mapping[str, Detector] = DETECTORS,
) -> dict[str, Array]:
    """What every detector says about one loss on its own, bool[] by name: to compare detectors on the same trace."""
    return {name: detector(stats, loss, cfg, random_guess_loss) for name, detector in detectors.items()}


def check(
    state: GovernorState,
    loss: Array,
    *,
    cfg: GovernorConfig,
    random_guess_loss: Array | float,
    detectors: Mapping[str, Detector] = DETECTORS,
) -> tuple[GovernorState, Verdict]:
    """Judges one validation loss (f32[]); `random_guess_loss` is ln(number of classes).

    A non-finite loss or a lobotomy panics at once, a divergence after `cfg.min_panics` in a row; the first that applies
    in this order is the reason. A loss that raised an alarm never enters the history. `detectors` replaces the rules
    behind the three names.
    """
    loss = jnp.asarray(loss, jnp.float32)
    stats = statistics(state, cfg)
    alarms = fired(stats, loss, cfg=cfg, random_guess_loss=random_guess_loss, detectors=detectors)
    reason = jnp.where(
        alarms["non_finite"],
        PanicReason.NON_FINITE,
        jnp.where(
            alarms["lobotomy"],
            PanicReason.LOBOTOMY,
            jnp.where(alarms["divergence"], PanicReason.DIVERGENCE, PanicReason.NONE),
        ),
    ).astype(jnp.int32)
    alarm = reason != PanicReason.NONE
    divergent = reason == PanicReason.DIVERGENCE

    # Before the history is long enough nothing is known to have recovered, so a run is not ended there.
    recovered = ~alarm & stats.ready
    consecutive = jnp.where(recovered, 0, state.consecutive + divergent.astype(jnp.int32))
    panic = alarm & (~divergent | (consecutive >= cfg.min_panics))
    after = GovernorState(
        history=jnp.where(alarm, state.history, jnp.concatenate([state.history[1:], loss[None]])),
        count=jnp.where(alarm, state.count, jnp.minimum(state.count + 1, state.history.shape[0])),
        consecutive=consecutive,
        pending=jnp.where(alarm, divergent, state.pending & ~recovered),
        reason=reason,
        panic_loss=jnp.where(alarm, loss, jnp.where(recovered, 0, state.panic_loss)),
    )
    return after, Verdict(
        panic=panic, accepted=~alarm, reason=reason, consecutive=consecutive, threshold=stats.threshold
    )


def after_rollback(state: GovernorState) -> GovernorState:
    """The alarm is dealt with; the history stays, so detection is armed at once."""
    return state.replace(
        consecutive=jnp.zeros_like(state.consecutive),
        pending=jnp.zeros_like(state.pending),
        reason=jnp.full_like(state.reason, PanicReason.NONE),
        panic_loss=jnp.zeros_like(state.panic_loss),
    )


@struct.dataclass
class Snapshot:
    """The last good state: variables of the host and of every slot's seed, and the slots' records.

    Of a slot only a fossil comes back, so variables and record mean something only where `fossil` is True. Optimiser
    state, the governor's own and the tracker's are no part of it.
    """

    model: Any  # as in `snapshot`
    fossil: Array  # bool[S]
    slots: SlotState


def snapshot(model: Any, slots: SlotState) -> Snapshot:
    """Takes a snapshot; to be kept only where the verdict was `accepted`.

    `model` is any pytree node with `.host` (a pytree) and `.seeds` (a tuple of one pytree per slot), both holding
    parameters and statistics, and `.replace`.
    """
    return Snapshot(model=model, fossil=slots.stage == Stage.FOSSILIZED, slots=slots)


def admit_fossils(last: Snapshot, model: Any, slots: SlotState) -> Snapshot:
    """Adds to a snapshot the fossils that it doesn't have, as they are now; the rest of it stays.

    To be called when a seed was fossilised, before it trains on: its variables have just been validated, and a
    rollback must neither lose it nor leave it diverged if this epoch's loss is not accepted.
    """
    new = (slots.stage == Stage.FOSSILIZED) & ~last.fossil
    seeds = _select_seeds(new, model.seeds, last.model.seeds)
    return Snapshot(
        model=last.model.replace(seeds=seeds),
        fossil=last.fossil | new,
        slots=select(new, slots, last.slots),
    )


def rollback(
    last: Snapshot,
    model: Any,
    slots: SlotState,
    panic: Array | bool = True,
    *,
    prune: Callable[[SlotState, Array], SlotState] = stages.prune_now,
) -> tuple[Any, SlotState]:
    """Where `panic` (bool[]), the last good model and the slots that go with it; otherwise both bitwise unchanged.

    The host comes from the snapshot, and so do the variables and record of every fossil in it. A live seed that is no
    fossil is pruned into cooldown by `prune(slots, where)` and its variables are zeroed, so that nothing non-finite
    stays in memory. Empty and cooling slots, and a fossil unknown to the snapshot, stay as they are. Optimiser state
    is the caller's to clear.
    """
    live = stages.is_active(slots.stage) & (slots.stage != Stage.FOSSILIZED) & ~last.fossil
    restored_slots = select(last.fossil, last.slots, prune(slots, live))
    emptied = _select_seeds(live, jax.tree.map(jnp.zeros_like, model.seeds), model.seeds)
    restored = model.replace(host=last.model.host, seeds=_select_seeds(last.fossil, last.model.seeds, emptied))
    return select(panic, (restored, restored_slots), (model, slots))


def _select_seeds(where: Array, new: tuple, old: tuple) -> tuple:
    return tuple(select(where[s], new[s], old[s]) for s in range(len(old)))
