"""The parts of one epoch of an environment, in the order in which `environment.step` composes them.

Every function takes a `Setting` first: what an environment is bound to. None of them knows that there are other
environments. Axis letters: S slots, K alpha configurations, T epochs of an episode.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from esper_jax.config import Config
from esper_jax.data import AnyDataset
from esper_jax.env import attribution, evaluation, governor, host_training, reward, tracker
from esper_jax.env.attribution import Attribution
from esper_jax.env.evaluation import Evaluation
from esper_jax.env.governor import Verdict
from esper_jax.env.host_training import EpochMetrics
from esper_jax.env.reward import RewardComponents, RewardWeights
from esper_jax.env.state import EnvState, StepInfo
from esper_jax.lifecycle import alpha, masks, operations, stages
from esper_jax.lifecycle.operations import Outcome
from esper_jax.metric import Metric
from esper_jax.network import blend, seed_bank
from esper_jax.network import model as networks
from esper_jax.network.blueprints import Blueprint
from esper_jax.network.host import param_count
from esper_jax.network.model import Model, SeedVars
from esper_jax.trees import select, strip_weak_type
from esper_jax.types import Action, AlphaAlgorithm, Array, Masks, Op, SlotState, Stage

DROPOUT = 1  # what the key of a batch is folded with for the host's dropout
# What the key of a newborn is folded with for the seeds that it has from birth; a small number would give one of the
# keys that it is split into for the host.
FOSSILS = 2**30


@struct.dataclass
class Setting:
    """What an environment is bound to; data and weights may be traced."""

    dataset: AnyDataset
    weights: RewardWeights
    cfg: Config = struct.field(pytree_node=False)

    @property
    def n_slots(self) -> int:
        return len(self.cfg.host.slot_names)

    @property
    def kinds(self) -> tuple[Blueprint, ...]:
        """What the numbers of the seeds' kinds stand for."""
        return networks.kinds(self.cfg.host, self.cfg.lifecycle.blueprints)

    @property
    def configurations(self) -> np.ndarray:
        """bool[K, S]: the on/off patterns that are measured."""
        return attribution.configurations(self.n_slots)

    @property
    def metric(self) -> Metric:
        """Of validation."""
        return self.dataset.metric(self.dataset.validation)

    @property
    def random_guess_loss(self) -> float:
        """Nats of a uniform guess: ln(number of classes, or of tokens)."""
        return math.log(self.dataset.outputs)

    @property
    def fine(self) -> RewardComponents:
        """What a rollback is paid."""
        return reward.death(self.cfg.governor.death_penalty, self.cfg.reward.clip)


class Change(NamedTuple):
    """What a step did, from which its reward follows."""

    action: Action  # as requested
    outcome: Outcome
    attribution: Attribution
    verdict: Verdict


# --- measuring -------------------------------------------------------------------------------------------------------


def measure(setting: Setting, model: Model, slots: SlotState, split: Any) -> Evaluation:
    """One pass over a split under all on/off configurations."""
    training = setting.cfg.training
    return evaluation.evaluate(
        model,
        slots,
        split.inputs,
        split.labels,
        setting.dataset.prepare,
        metric=setting.dataset.metric(split),
        tile_pixels=training.tile_pixels,
        dtype=training.compute_dtype,
    )


def seed_params(setting: Setting, slots: SlotState) -> Array:
    """i32[S]: parameters of the seed in each slot, with its gate."""
    number = seed_bank.kind_of(slots.blueprint, setting.kinds)
    sizes = [
        jnp.asarray(seed_bank.param_counts(setting.kinds, w))[number[s]]
        + blend.gate_size(w) * slots.has_gate[s].astype(jnp.int32)
        for s, w in enumerate(setting.cfg.host.slot_widths)
    ]
    return jnp.where(stages.is_active(slots.stage), jnp.stack(sizes), 0)


def relative_sizes(setting: Setting, state: EnvState) -> tuple[Array, Array]:
    """f32[] twice: parameters with the seeds that are blended in, and with the fossils, relative to the host's."""
    added, host = seed_params(setting, state.slots), param_count(state.model.host)
    live = networks.live_slots(state.model, state.slots)
    fossil = state.slots.stage == Stage.FOSSILIZED
    relative = lambda there: 1.0 + jnp.where(there, added, 0).sum(dtype=jnp.int32).astype(jnp.float32) / host
    return relative(live), relative(fossil)


# --- the newborn -----------------------------------------------------------------------------------------------------


def newborn(setting: Setting, key: Array) -> EnvState:
    """A new host with empty slots, before its first epoch."""
    cfg, dataset, n_slots = setting.cfg, setting.dataset, setting.n_slots
    classes = len(dataset.classes)
    model = networks.init(
        key, cfg.host, blueprints=cfg.lifecycle.blueprints, example=dataset.example, outputs=dataset.outputs
    )
    slots = stages.empty(n_slots)
    guess, guess_loss = 100.0 / dataset.outputs, setting.random_guess_loss
    guess_score = setting.metric.score(guess, guess_loss)
    tracker_state = tracker.init(cfg.tracker)
    _, signals = tracker.update(
        tracker_state,
        cfg=cfg.tracker,
        epoch=0,
        train_loss=guess_loss,
        train_score=guess_score,
        val_loss=guess_loss,
        val_score=guess_score,
        available_slots=n_slots,
    )
    signals = signals.replace(history_valid=jnp.zeros_like(signals.history_valid))
    unmeasured = Evaluation(
        loss=jnp.float32(guess_loss),
        accuracy=jnp.float32(guess),
        score=jnp.float32(guess_score),
        table=jnp.full(len(setting.configurations), guess_score, jnp.float32),
        losses=jnp.full(len(setting.configurations), guess_loss, jnp.float32),
        committed_loss=jnp.float32(guess_loss),
        committed_accuracy=jnp.float32(guess),
        committed_score=jnp.float32(guess_score),
        per_class=jnp.full(classes, guess, jnp.float32),
        per_class_valid=jnp.zeros(classes, bool),
    )
    none = jnp.int32(0)
    watch = governor.init(cfg.governor, len(governor.kernels(model.host)))
    state = EnvState(
        epoch=none,
        model=model,
        optimiser=host_training.init(model, cfg.training),
        slots=slots,
        governor=watch,
        snapshot=governor.snapshot(model, slots, watch.recent),
        older=governor.snapshot(model, slots, watch.recent),
        tracker=tracker_state,
        signals=signals,
        evaluation=unmeasured,
        improvement=jnp.float32(0),
        improvement_valid=jnp.bool_(False),
        last_op=jnp.int32(Op.WAIT),
        last_success=jnp.bool_(True),
        lr_scale=jnp.float32(1),
        rollbacks=none,
        germinated=none,
        fossilised=none,
        contributing_fossils=none,
        pruned=none,
    )
    return strip_weak_type(state)


def with_fossils(setting: Setting, key: Array, state: EnvState, shape: Array) -> EnvState:
    """A newborn that has seeds, blended in and fossilised, from its first epoch on: a network that never had to grow.

    Args:
      shape: i32[S, 2] blueprint and algorithm of each slot's seed; -1 for a slot that stays empty.
    """
    blueprint, algorithm = shape[:, 0], shape[:, 1]
    here = blueprint >= 0
    gated = here & (algorithm == AlphaAlgorithm.GATE)
    slots = stages.enter(state.slots, here, Stage.FOSSILIZED)
    slots = slots.replace(
        blueprint=jnp.where(here, blueprint, slots.blueprint),
        algorithm=jnp.where(here, algorithm, slots.algorithm),
        has_gate=gated,
        alpha=alpha.place(slots.alpha, here, 1.0),
    )
    number = seed_bank.kind_of(blueprint, setting.kinds)
    seeds = tuple(
        _fresh(setting, jax.random.fold_in(key, s), seed, w, number[s], here[s], gated[s])
        for s, (seed, w) in enumerate(zip(state.model.seeds, setting.cfg.host.slot_widths, strict=True))
    )
    model = state.model.replace(seeds=seeds)
    good = governor.snapshot(model, slots, state.governor.recent)
    return state.replace(model=model, slots=slots, snapshot=good, older=good, fossilised=here.sum(dtype=jnp.int32))


def _fresh(
    setting: Setting, key: Array, seed: SeedVars, width: int, number: Array, germinated: Array, gated: Array
) -> SeedVars:
    """A slot's parameters: new ones of a kind where a seed is born, of a gate where one is."""
    seed_key, gate_key = jax.random.split(key)
    return seed.replace(
        params=jnp.where(germinated, seed_bank.germinate(seed_key, setting.kinds, width, number), seed.params),
        gate=jnp.where(gated, blend.gate_init(gate_key, width), seed.gate),
    )


# --- one epoch -------------------------------------------------------------------------------------------------------


def legal_actions(setting: Setting, state: EnvState) -> Masks:
    """What may be asked for now; before the first epoch, and once it is given up, only WAIT."""
    return masks.legal(state.slots, setting.cfg.lifecycle, allowed=(state.epoch > 0) & ~state.governor.given_up)


def act(setting: Setting, key: Array, state: EnvState, action: Action) -> tuple[EnvState, Outcome]:
    """Executes the action and ticks the slots; an action that is not legal changes nothing."""
    cfg = setting.cfg
    permitted = masks.permits(legal_actions(setting, state), action)
    request = operations.decode(action)
    request = request.replace(op=jnp.where(permitted, action.op, Op.WAIT))
    after, outcome = operations.execute(state.slots, request, state.evaluation.score, cfg.lifecycle)
    outcome = outcome.replace(legal=outcome.legal & permitted, success=outcome.success & permitted)

    number = seed_bank.kind_of(request.blueprint, setting.kinds)
    seeds = tuple(
        _fresh(setting, jax.random.fold_in(key, s), seed, w, number, outcome.germinated[s], outcome.gate_created[s])
        for s, (seed, w) in enumerate(zip(state.model.seeds, cfg.host.slot_widths, strict=True))
    )
    model = state.model.replace(seeds=seeds)
    optimiser = host_training.reset_momentum(state.optimiser, outcome.germinated, outcome.gate_created)
    # a seed's weights were validated just before it was fossilised: keep them as they are now
    admit = lambda kept: tuple(governor.admit_fossils(each, model, after) for each in kept)
    snapshots = (state.snapshot, state.older)
    newest, older = lax.cond(outcome.op == Op.FOSSILIZE, admit, lambda kept: kept, snapshots)
    after = stages.tick(after, cfg.lifecycle)
    return state.replace(model=model, optimiser=optimiser, slots=after, snapshot=newest, older=older), outcome


def train(setting: Setting, key: Array, state: EnvState) -> tuple[EnvState, EpochMetrics]:
    """One epoch. A rollback changes the data order of what follows, or the same batches would break it again."""
    dataset, cfg = setting.dataset, setting.cfg.training
    order_key, augment_key = jax.random.split(jax.random.fold_in(key, state.rollbacks))
    indices = dataset.order(order_key, cfg.batches_per_epoch, cfg.batch_size)
    keys = jax.random.split(augment_key, cfg.batches_per_epoch)
    fetch = lambda batch: (*dataset.batch(*batch), jax.random.fold_in(batch[0], DROPOUT))
    model, optimiser, metrics = host_training.train_epoch(
        state.model, state.optimiser, state.slots, (keys, indices), fetch, cfg, lr_scale=state.lr_scale
    )
    host_params = param_count(model.host)
    model, optimiser = select(state.governor.given_up, (state.model, state.optimiser), (model, optimiser))
    state = state.replace(model=model, optimiser=optimiser, epoch=state.epoch + 1)
    return state.replace(slots=host_training.record_gradients(state.slots, metrics, host_params)), metrics


def expected_rise(setting: Setting, before: EnvState, after: SlotState) -> Array:
    """f32[]: by how much the loss was higher without the seeds that are blended out, when it was last measured, times
    the share of its alpha that one of them has lost.

    0 where none is, or none of the measured configurations is without just these; what is not finite is no expectation,
    and a network that is better without them is judged as it was.
    """
    amount = lambda slots: jnp.where(networks.live_slots(before.model, slots), slots.alpha.alpha, 0.0)
    had, has = amount(before.slots), amount(after)
    lost = jnp.where(had > 0, jnp.maximum(had - has, 0) / jnp.where(had > 0, had, 1), 0)
    without = (jnp.asarray(setting.configurations) == ~(lost > 0)[None]).all(-1)
    rise = jnp.where(without, before.evaluation.losses - before.evaluation.loss, 0).sum() * lost.max()
    return jnp.where((lost > 0).any() & without.any() & jnp.isfinite(rise), jnp.maximum(rise, 0.0), 0.0)


def apply_verdict(
    setting: Setting, before: EnvState, state: EnvState, measured: Evaluation, metrics: EpochMetrics, new_fossil: Array
) -> tuple[EnvState, Verdict]:
    """The governor's verdict on an epoch and its consequences: a snapshot, or a rollback to the last good one.

    Args:
      before: the state that the step began with.
      new_fossil: bool[] a seed was fossilised in this step.
    """
    cfg = setting.cfg.governor
    robust = cfg.rules == "robust"
    seen = governor.vitals(
        state.model, state.optimiser, loss=measured.loss, accuracy=measured.accuracy, train_loss=metrics.loss,
        measured=setting.dataset.validation.labels.size,
    )  # fmt: skip
    governor_state, verdict = governor.judge(
        governor.restated(state.governor, expected_rise(setting, before, state.slots)),
        seen,
        cfg=cfg,
        random_guess_loss=setting.random_guess_loss,
    )
    cadence = state.epoch % cfg.snapshot_epochs == 0
    if cfg.rules != "reference":  # in the beginning an epoch is a large part of what has been learned
        cadence |= state.epoch < cfg.snapshot_epochs
    due = verdict.accepted & (cadence | new_fossil)
    renew = lambda newest, older: (governor.snapshot(state.model, state.slots, governor_state.recent), newest)
    newest, older = lax.cond(due, renew, lambda newest, older: (newest, older), state.snapshot, state.older)

    def back(newest, older):
        good = governor.best_snapshot(newest, older, governor_state.in_a_row) if robust else newest
        return good, governor.rollback(good, state.model, state.slots)

    stay = lambda newest, older: (newest, (state.model, state.slots))
    newest, (model, restored) = lax.cond(verdict.panic, back, stay, newest, older)
    # the snapshot's losses were those of a network with the seeds that are pruned now
    resumed = governor.after_rollback(governor_state).replace(recent=newest.recent)
    resumed = governor.restated(resumed, expected_rise(setting, before, restored))
    slower = verdict.panic & (governor_state.in_a_row >= governor.BACKED_OFF) & robust
    over = verdict.accepted & (governor_state.in_a_row > 0) & (governor_state.since_panic == cfg.probation)
    lr_scale = jnp.where(over, jnp.maximum(state.lr_scale, 1.0), state.lr_scale)
    nobody = jnp.zeros(setting.n_slots, bool)
    state = state.replace(
        governor=select(verdict.panic, resumed, governor_state),
        snapshot=newest,
        older=older,
        model=model,
        slots=restored,
        lr_scale=jnp.where(slower, cfg.backoff, 1.0) * lr_scale,
        optimiser=host_training.reset_momentum(state.optimiser, nobody, nobody, everything=verdict.panic),
        rollbacks=state.rollbacks + verdict.panic.astype(jnp.int32),
    )
    return state, verdict


def record(
    setting: Setting,
    state: EnvState,
    measured: Evaluation,
    found: Attribution,
    metrics: EpochMetrics,
    verdict: Verdict,
) -> EnvState:
    """Seed metrics, tracker and attribution. A loss that was not accepted leaves them as they were."""
    accepted = verdict.accepted
    last = select(accepted, measured, state.evaluation)
    seen = stages.record_contribution(state.slots, found.contribution, found.contribution_valid & accepted)
    m = seen.metrics
    seen = seen.replace(
        metrics=m.replace(
            interaction_sum=jnp.where(accepted, found.interaction_sum, m.interaction_sum),
            boost_received=jnp.where(accepted, found.boost, m.boost_received),
            interaction_valid=jnp.where(accepted, found.interaction_valid, m.interaction_valid),
        )
    )
    seen = stages.record_score(seen, last.score)
    tracker_state, signals = tracker.update(
        state.tracker,
        cfg=setting.cfg.tracker,
        epoch=state.epoch,
        train_loss=metrics.loss,
        train_score=setting.metric.score(metrics.accuracy, metrics.loss),
        val_loss=jnp.where(accepted, measured.loss, jnp.nan),  # the tracker skips what is not finite
        val_score=measured.score,
        available_slots=(seen.stage == Stage.DORMANT).sum(dtype=jnp.int32),
    )
    known = accepted & found.total_improvement_valid
    return state.replace(
        slots=select(verdict.panic, state.slots, seen),
        tracker=tracker_state,
        signals=signals,
        evaluation=last,
        improvement=jnp.where(known, found.total_improvement, state.improvement),
        improvement_valid=known | state.improvement_valid,
    )


# --- reward ----------------------------------------------------------------------------------------------------------


def transition_reward(
    setting: Setting, before: EnvState, after: EnvState, change: Change
) -> tuple[RewardComponents, Array]:
    """Reward of the transition that was realised, and whether it added a contributing fossil, bool[]."""
    action, outcome, found, verdict = change
    old = before.slots
    has_seed = stages.is_active(old.stage)
    score = after.evaluation.score
    measured_now = found.contribution_valid & verdict.accepted
    contributing = reward.is_contributing(outcome.op, after.improvement, after.improvement_valid)
    inputs = reward.RewardInputs(
        requested_op=action.op,
        succeeded=outcome.success,
        slot=action.slot,
        has_seed=has_seed,
        stage=old.stage,
        epochs_in_stage=old.epochs_in_stage,
        seed_age=old.epochs_total,
        contribution=jnp.where(measured_now, found.contribution, old.metrics.contribution),
        contribution_valid=measured_now | old.metrics.contribution_valid,
        germination_score=old.metrics.germination_score,
        germination_score_valid=has_seed,
        stage_improvement=score - old.metrics.stage_start_score,
        stage_improvement_valid=has_seed & (old.epochs_total > 0),
        interaction_sum=found.interaction_sum,
        interaction_valid=found.interaction_valid & verdict.accepted,
        total_improvement=after.improvement,
        total_improvement_valid=after.improvement_valid & has_seed.any(),
        val_score=score,
        committed_score=after.evaluation.committed_score,
        best_score=jnp.float32(setting.metric.span),
        contributing_fossils=before.contributing_fossils + contributing.astype(jnp.int32),
        terminal=after.epoch >= setting.cfg.training.epochs,
        host_params=jnp.float32(param_count(before.model.host)),
        slot_stage=after.slots.stage,
        slot_epochs_in_stage=after.slots.epochs_in_stage,
        slot_alpha=after.slots.alpha.alpha,
        slot_params=seed_params(setting, after.slots).astype(jnp.float32),
        previous_potential=reward.potential(old.stage, old.epochs_in_stage),
        previous_alpha=jnp.where(has_seed, old.alpha.alpha, 0.0),
        previous_params=seed_params(setting, old).astype(jnp.float32),
    )
    components = reward.reward(inputs, setting.weights, setting.cfg.reward.mode, setting.cfg.reward.attribution)
    return select(verdict.panic, setting.fine, components), contributing


def own_progress(setting: Setting, before: EnvState, info: StepInfo) -> RewardComponents:
    """The reward `paired` as far as one environment knows it: the fall of its own loss instead of the gain over a twin,
    whose part no action changes. Where environments are mapped the twin is known (`reward.paired`), and so is the size
    at the last accepted epoch, which here is that of the state before the step."""
    blended, committed = relative_sizes(setting, before)
    earlier = info.replace(
        val_loss=before.evaluation.loss,
        committed_loss=before.evaluation.committed_loss,
        blended_size=blended,
        committed_size=committed,
        accepted=jnp.bool_(True),
        panic=jnp.bool_(False),
        episode_over=jnp.bool_(False),
    )
    both = jax.tree.map(lambda *rows: jnp.stack(rows), reward.Course.of(earlier), reward.Course.of(info))
    components = reward.paired(both, jnp.zeros(2, jnp.float32), setting.weights, setting.fine)
    return jax.tree.map(lambda leaf: leaf[1], components)


# --- what is reported ------------------------------------------------------------------------------------------------


def describe(
    setting: Setting,
    state: EnvState,
    change: Change,
    measured: Evaluation,
    metrics: EpochMetrics,
    sizes: tuple[Array, Array],
    components: RewardComponents,
) -> StepInfo:
    """What happened in a step that ended in `state`; `sizes` are `relative_sizes` before the governor's verdict."""
    action, outcome, found, verdict = change
    blended, committed = sizes
    return StepInfo(
        requested_op=action.op,
        op=outcome.op,
        slot=action.slot,
        legal=outcome.legal,
        success=outcome.success,
        gate_level=outcome.gate_level,
        gate_passed=outcome.gate_passed,
        train_loss=metrics.loss,
        train_accuracy=metrics.accuracy,
        first_loss=metrics.batch_losses[0],
        gradient_norm=metrics.clip_norms.max(),
        val_loss=measured.loss,
        val_accuracy=measured.accuracy,
        accepted=verdict.accepted,
        panic=verdict.panic,
        panic_reason=verdict.reason,
        given_up=state.governor.given_up,
        table=measured.table,
        committed_accuracy=measured.committed_accuracy,
        committed_loss=measured.committed_loss,
        per_class=measured.per_class,
        stage=state.slots.stage,
        alpha=state.slots.alpha.alpha,
        blueprint=jnp.where(stages.is_active(state.slots.stage), state.slots.blueprint, -1),
        contribution=found.contribution,
        contribution_valid=found.contribution_valid,
        shapley=found.shapley,
        shapley_valid=found.shapley_valid,
        interaction=found.interaction_sum,
        interaction_valid=found.interaction_valid,
        gradient_ratio=state.slots.metrics.gradient_ratio,
        gradient_health=state.slots.metrics.gradient_health,
        gradient_valid=state.slots.metrics.gradient_valid,
        params=param_count(state.model.host) + seed_params(setting, state.slots).sum(dtype=jnp.int32),
        blended_size=blended,
        committed_size=committed,
        components=components,
        episode_over=state.epoch >= setting.cfg.training.epochs,
    )
