"""Notices a broken training run and takes it back to its last good state (Esper's Tolaria governor).

    state = init(cfg, kernels)
    state, verdict = judge(state, vitals, cfg=cfg, random_guess_loss=ln(classes))     # once per epoch

`judge` looks at an epoch's *vitals* by the rules of the configuration. `check` are the reference's: one validation
loss, judged by named detectors. What was accepted is what the next epochs are compared with. Everything is pure: a
snapshot is a value, and a rollback in one environment of a population is a selection that leaves the others bitwise as
they were.

`experiments.faults` compares the robust rules with others on faults that were put into training runs. Their thresholds
were chosen on half of its seeds, so that neither clean runs nor growth on small hosts alarm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
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
RECENT = 3  # accepted epochs that the robust rules compare with
NOTHING = float(jnp.finfo(jnp.float32).max)  # a loss that any other is below
BACKED_OFF = 3  # the panic in a row from which on the learning rates are lowered


@struct.dataclass
class Vitals:
    """What is looked at after an epoch."""

    loss: Array  # f32[] validation
    accuracy: Array  # f32[] validation, percentage points
    accuracy_std: Array  # f32[] of such an accuracy by chance
    train_loss: Array  # f32[]
    sizes: Array  # f32[L] Euclidean norm of each of the host's kernels
    finite: Array  # bool[] the whole state is


@struct.dataclass
class Recent:
    """What the last accepted epochs were like: what the robust rules compare with."""

    losses: Array  # f32[RECENT] validation, the newest last; NOTHING where there is none to compare with
    accuracies: Array  # f32[RECENT] in the same way; -NOTHING
    train_loss: Array  # f32[] of the last one; NOTHING
    sizes: Array  # f32[L] of the last one; 0


@struct.dataclass
class GovernorState:
    """Accepted losses and the present run of anomalies; W is `cfg.history_window`."""

    history: Array  # f32[W] accepted losses, the newest last; entries before the last `count` are 0 and mean nothing
    count: Array  # i32[] accepted losses held
    consecutive: Array  # i32[] divergent losses in a row
    pending: Array  # bool[] the last loss was divergent
    reason: Array  # i32[] PanicReason of the latest alarm, confirmed or not
    panic_loss: Array  # f32[] the loss that raised it (non-finite for NON_FINITE); meaningless when reason is NONE
    recent: Recent
    in_a_row: Array  # i32[] panics, each soon after the one before
    since_panic: Array  # i32[] epochs accepted since the last panic
    given_up: Array  # bool[] too many panics in a row


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


def init(cfg: GovernorConfig, kernels: int = 0) -> GovernorState:
    """A governor that has seen nothing, of a host with so many kernels."""
    return GovernorState(
        history=jnp.zeros(cfg.history_window, jnp.float32),
        count=jnp.int32(0),
        consecutive=jnp.int32(0),
        pending=jnp.bool_(False),
        reason=jnp.int32(PanicReason.NONE),
        panic_loss=jnp.float32(0),
        recent=Recent(
            losses=jnp.full(RECENT, NOTHING, jnp.float32),
            accuracies=jnp.full(RECENT, -NOTHING, jnp.float32),
            train_loss=jnp.float32(NOTHING),
            sizes=jnp.zeros(kernels, jnp.float32),
        ),
        in_a_row=jnp.int32(0),
        since_panic=jnp.int32(0),
        given_up=jnp.bool_(False),
    )


def kernels(host: Any) -> list[Array]:
    """The host's trained arrays of more than one axis."""
    return [leaf for leaf in jax.tree.leaves(host.params) if leaf.ndim > 1]


def accuracy_std(accuracy: Array, measured: int) -> Array:
    """Points by which an accuracy on so many examples deviates by chance: the binomial distribution's."""
    p = jnp.clip(accuracy / 100, 0.01, 0.99)  # so that chance does something at 0 and at 100 points, too
    return 100 * jnp.sqrt(p * (1 - p) / measured)


def vitals(model: Any, optimiser: Any, *, loss: Array, accuracy: Array, train_loss: Array, measured: int) -> Vitals:
    """What `judge` looks at; `measured` is on how many examples (or tokens) loss and accuracy were measured."""
    leaves = [leaf for leaf in jax.tree.leaves((model, optimiser)) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return Vitals(
        loss=loss,
        accuracy=accuracy,
        accuracy_std=accuracy_std(accuracy, measured),
        train_loss=train_loss,
        sizes=jnp.stack([jnp.sqrt(jnp.square(kernel).sum()) for kernel in kernels(model.host)]),
        finite=jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]).all(),
    )


def restated(state: GovernorState, rise: Array) -> GovernorState:
    """Where a seed has left the network, what came before is not what the next epoch is to be compared with: losses are
    raised by what the seed was worth in the last counterfactual evaluation, `rise` f32[], and accuracies forgotten.
    Where it is 0, nothing changes."""
    recent = state.recent
    return state.replace(
        recent=recent.replace(
            losses=recent.losses + rise,
            train_loss=recent.train_loss + rise,
            accuracies=jnp.where(rise == 0, recent.accuracies, -NOTHING),
        )
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
    after = state.replace(
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


def robust_detectors(recent: Recent, seen: Vitals) -> Mapping[str, Detector]:
    """Rules about changes from one epoch to the next, for the names of `DETECTORS`.

    Each change is told apart from what clean training does by a margin in its own unit: relative ones alarm at the end,
    where losses are small. The first epoch has nothing to be compared with but for being finite.
    """

    def broken(stats, loss, cfg, random_guess_loss):
        return non_finite(stats, loss, cfg, random_guess_loss) | ~jnp.isfinite(seen.train_loss) | ~seen.finite

    def worse(stats, loss, cfg, random_guess_loss):
        rise = (loss - recent.losses.min()) / random_guess_loss
        drop = recent.accuracies.max() - seen.accuracy
        unlikely = drop > cfg.accuracy_drop + cfg.accuracy_noise * seen.accuracy_std
        ratio = seen.sizes / recent.sizes
        moved = (recent.sizes > 0) & ((ratio > cfg.weight_growth) | (ratio < 1 / cfg.weight_growth))
        return (
            (rise > cfg.loss_rise)
            | (seen.train_loss - recent.train_loss > cfg.train_loss_rise * random_guess_loss)
            | (unlikely & (rise > cfg.accuracy_loss_rise))
            | moved.any()
        )

    return {"non_finite": broken, "lobotomy": lobotomy, "divergence": worse}


def judge(
    state: GovernorState, seen: Vitals, *, cfg: GovernorConfig, random_guess_loss: Array | float
) -> tuple[GovernorState, Verdict]:
    """Judges an epoch by the rules of `cfg`. `random_guess_loss` is ln(number of classes), or of tokens.

    The robust rules panic at once. By `cfg.give_up` panics in a row, a panic before `cfg.probation` epochs were
    accepted since the last one, a state is given up: from then on nothing panics. The
    reference's rules never give up.
    """
    how = {"cfg": cfg, "random_guess_loss": random_guess_loss}
    if cfg.rules == "robust":
        how |= {"cfg": replace(cfg, min_panics=1), "detectors": robust_detectors(state.recent, seen)}
    elif cfg.rules == "off":
        never = lambda stats, loss, cfg, random_guess_loss: jnp.bool_(False)
        how |= {"detectors": {"non_finite": non_finite, "lobotomy": never, "divergence": never}}
    after, verdict = check(state, seen.loss, **how)
    panic = verdict.panic & ~state.given_up & (cfg.rules != "off")
    accepted = verdict.accepted
    following = (state.in_a_row > 0) & (state.since_panic < cfg.probation)
    in_a_row = jnp.where(panic, jnp.where(following, state.in_a_row + 1, 1), state.in_a_row)
    recent = Recent(
        losses=jnp.append(state.recent.losses[1:], seen.loss),
        accuracies=jnp.append(state.recent.accuracies[1:], seen.accuracy),
        train_loss=seen.train_loss,
        sizes=seen.sizes,
    )
    after = after.replace(
        recent=select(accepted, recent, state.recent),
        in_a_row=in_a_row,
        since_panic=jnp.where(panic, 0, state.since_panic + accepted.astype(jnp.int32)),
        given_up=state.given_up | ((in_a_row >= cfg.give_up) & (cfg.rules == "robust")),
    )
    return after, verdict.replace(panic=panic)


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
    checksum: Array  # i32[] of the model when it was taken
    recent: Recent | None = None  # what the epochs that led to it were like

    @property
    def intact(self) -> Array:
        """bool[]: the model is bit for bit what was taken."""
        return checksum(self.model) == self.checksum


def checksum(model: Any) -> Array:
    """i32[]: the bits of all numbers with their places, each scrambled, summed modulo 2^32."""
    total = jnp.uint32(0)
    for number, leaf in enumerate(jax.tree.leaves(model)):
        bits = jax.lax.bitcast_convert_type(leaf.astype(jnp.float32).ravel(), jnp.uint32)
        place = jnp.arange(bits.size, dtype=jnp.uint32) + jnp.uint32(number << 24)
        total = total + _scrambled(bits ^ _scrambled(place)).sum(dtype=jnp.uint32)
    return jax.lax.bitcast_convert_type(total, jnp.int32)


def _scrambled(x: Array) -> Array:
    """A bijection of u32 in which a bit changes half of all others (Wellons' lowbias32): plain sums would not see two
    signs that change."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 16)


def snapshot(model: Any, slots: SlotState, recent: Recent | None = None) -> Snapshot:
    """Takes a snapshot; to be kept only where the verdict was `accepted`.

    `model` is any pytree node with `.host` (a pytree) and `.seeds` (a tuple of one pytree per slot), both holding
    parameters and statistics, and `.replace`.
    """
    return Snapshot(
        model=model,
        fossil=slots.stage == Stage.FOSSILIZED,
        slots=slots,
        checksum=checksum(model),
        recent=recent,
    )


def best_snapshot(newest: Snapshot, older: Snapshot, in_a_row: Array) -> Snapshot:
    """Which one to go back to: the newest, unless its bits have changed or the last rollback to it was in vain."""
    return select(newest.intact & (in_a_row <= 1) | ~older.intact, newest, older)


def admit_fossils(last: Snapshot, model: Any, slots: SlotState) -> Snapshot:
    """Adds to a snapshot the fossils that it doesn't have, as they are now; the rest of it stays.

    To be called when a seed was fossilised, before it trains on: its variables have just been validated, and a
    rollback must neither lose it nor leave it diverged if this epoch's loss is not accepted.
    """
    new = (slots.stage == Stage.FOSSILIZED) & ~last.fossil
    seeds = _select_seeds(new, model.seeds, last.model.seeds)
    with_seeds = last.model.replace(seeds=seeds)
    return last.replace(
        model=with_seeds,
        fossil=last.fossil | new,
        slots=select(new, slots, last.slots),
        checksum=checksum(with_seeds) + last.checksum - checksum(last.model),  # damage stays visible
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
