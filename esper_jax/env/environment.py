"""One environment: a host that trains, one epoch and one decision per step (Esper's Simic and Tolaria).

    state, obs = env.reset(key)
    state, obs, reward, done, info = env.step(key, state, action)

Everything is a pure function of (config, dataset, key, actions). `reset` is a step from a newborn state in which only
WAIT is legal, so the first epoch is trained and measured by the same code as all others. The key given to `step`
decides the data order, the augmentation and a new seed's parameters, never the controller's choice: two controllers
that get the same keys see the same host and the same batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from esper_jax.config import Config
from esper_jax.data import Dataset, epoch_batches, normalise, train_batch
from esper_jax.env import attribution, evaluation, governor, host_training, observation, reward, tracker
from esper_jax.env.evaluation import Evaluation
from esper_jax.env.governor import GovernorState, Snapshot
from esper_jax.env.reward import RewardComponents, RewardWeights
from esper_jax.env.tracker import TrackerState
from esper_jax.lifecycle import masks, operations, stages
from esper_jax.network import blend, cnn, seed_bank
from esper_jax.network import model as networks
from esper_jax.network.model import Model
from esper_jax.trees import select, strong
from esper_jax.types import Action, Array, Observation, Op, Signals, SlotState, Stage


@struct.dataclass
class EnvState:
    """Everything that one environment carries from epoch to epoch."""

    epoch: Array  # i32[] epochs trained; 0 is newborn
    model: Model
    optimiser: host_training.OptimiserState
    slots: SlotState
    governor: GovernorState
    kept: Snapshot  # last good state
    tracker: TrackerState
    signals: Signals
    evaluation: Evaluation  # of the last accepted epoch
    improvement: Array  # f32[] accuracy minus that with all seeds off, when last measured
    improvement_valid: Array  # bool[]
    last_op: Array  # i32[] op asked for at the last decision
    last_success: Array  # bool[] it was carried out
    rollbacks: Array  # i32[] in this episode
    germinated: Array  # i32[] seeds, in this episode
    fossilised: Array  # i32[]
    contributing_fossils: Array  # i32[] fossilised while the seeds together gave at least one point
    pruned: Array  # i32[] by the controller or at the end of a blend-out, not by the governor


@struct.dataclass
class Grown:
    """What an episode leaves: the network, the records of its slots and what was done to them."""

    model: Model
    slots: SlotState
    rollbacks: Array  # i32[] each, as in EnvState
    germinated: Array
    fossilised: Array
    pruned: Array

    @classmethod
    def of(cls, state: EnvState) -> Grown:
        return cls(**{name: getattr(state, name) for name in cls.__dataclass_fields__})


@struct.dataclass
class StepInfo:
    """What happened in one step, for telemetry. Raw measurements: losses may be non-finite here."""

    requested_op: Array  # i32[]
    op: Array  # i32[] what was carried out; WAIT if the request was refused
    slot: Array  # i32[]
    legal: Array  # bool[]
    success: Array  # bool[] legal, and its gate passed
    gate_level: Array  # i32[] -1 = no gate was asked
    gate_passed: Array  # bool[]
    train_loss: Array  # f32[]
    train_accuracy: Array  # f32[]
    val_loss: Array  # f32[]
    val_accuracy: Array  # f32[]
    accepted: Array  # bool[] the governor took the loss
    panic: Array  # bool[] the governor rolled the run back
    panic_reason: Array  # i32[] PanicReason
    table: Array  # f32[K] accuracy of each on/off configuration
    committed_accuracy: Array  # f32[] of what is fossilised, everything else off
    committed_loss: Array  # f32[]
    per_class: Array  # f32[classes]
    stage: Array  # i32[S] at the end of the step
    alpha: Array  # f32[S]
    blueprint: Array  # i32[S]
    contribution: Array  # f32[S] this epoch's
    contribution_valid: Array  # bool[S]
    shapley: Array  # f32[S]
    shapley_valid: Array  # bool[S]
    interaction: Array  # f32[S]
    interaction_valid: Array  # bool[S]
    gradient_ratio: Array  # f32[S]
    gradient_health: Array  # f32[S]
    gradient_valid: Array  # bool[S]
    params: Array  # i32[] of the host and of every seed present
    blended_size: Array  # f32[] parameters of the host and of the seeds whose alpha is above 0, relative to the host's
    committed_size: Array  # f32[] of the host and of the fossilised seeds, relative to the host's
    components: RewardComponents
    episode_over: Array  # bool[] this was epoch T


class Env(NamedTuple):
    """Pure functions of one environment; `vmap` or `lax.map` them over many."""

    init: Callable  # key -> EnvState, newborn: no epoch trained yet
    reset: Callable  # key -> (EnvState, Observation), first epoch done
    step: Callable  # (key, EnvState, Action) -> (EnvState, Observation, reward f32[], done bool[], StepInfo)
    observe: Callable  # EnvState -> Observation
    report: Callable  # Grown -> Evaluation on the report-test split
    n_slots: int
    n_features: int


def make_env(cfg: Config, dataset: Dataset, weights: RewardWeights | None = None) -> Env:
    """Binds the static configuration; `dataset` and `weights` (by default those of `cfg.reward`) may be traced.

    `done` is True at epoch T and after a rollback: that transition ends what the learner may look ahead to, while the
    environment itself goes on from the restored state until epoch T. Raises ValueError if the images are too small for
    the host or the training split smaller than a batch.
    """
    n_slots = len(cfg.host.slot_names)
    classes = len(dataset.classes)
    _, height, width, channels = dataset.train.images.shape
    cnn.check_image_size(cfg.host, min(height, width))
    train_size = dataset.train.labels.shape[0]
    if train_size < cfg.training.batch_size:
        raise ValueError(f"TrainingConfig.batch_size = {cfg.training.batch_size}: must be at most {train_size} images")
    if weights is None:
        weights = RewardWeights.from_config(cfg.reward, cfg.ppo.gamma, cfg.lifecycle.min_prune_age)
    offered = tuple(cfg.lifecycle.blueprints)
    kinds = seed_bank.table(offered)
    horizon = cfg.training.epochs
    configurations = attribution.configurations(n_slots)
    random_guess_loss = math.log(classes)
    fine = reward.death(cfg.governor.death_penalty, cfg.reward.clip)  # of a rollback

    def prepare(images):
        return normalise(dataset, images).astype(cfg.training.compute_dtype)

    def measure(model, state, split):
        pixels = cfg.training.tile_pixels
        return evaluation.evaluate(model, state, split.images, split.labels, prepare, tile_pixels=pixels)

    def seed_params(state: SlotState) -> Array:
        """i32[S]: parameters of the seed in each slot, with its gate."""
        number = seed_bank.kind_of(state.blueprint, offered)
        sizes = [
            jnp.asarray(seed_bank.param_counts(kinds, w))[number[s]] + blend.gate_size(w) * state.has_gate[s]
            for s, w in enumerate(cfg.host.slot_widths)
        ]
        return jnp.where(stages.is_active(state.stage), jnp.stack(sizes), 0)

    def sizes(state: EnvState) -> tuple[Array, Array]:
        """f32[] twice: parameters with the seeds that are blended in, and with the fossils, relative to the host's."""
        added, host = seed_params(state.slots), cnn.param_count(state.model.host)
        live = networks.live_slots(state.model, state.slots)
        fossil = state.slots.stage == Stage.FOSSILIZED
        relative = lambda there: 1.0 + jnp.where(there, added, 0).sum() / host
        return relative(live), relative(fossil)

    def init(key: Array) -> EnvState:
        model = networks.init(key, cfg.host, blueprints=offered, channels=channels, classes=classes)
        state = stages.empty(n_slots)
        watch = tracker.init(cfg.tracker)
        guess = 100.0 / classes
        _, signals = tracker.update(
            watch, cfg=cfg.tracker, epoch=0, train_loss=random_guess_loss, train_accuracy=guess,
            val_loss=random_guess_loss, val_accuracy=guess, available_slots=n_slots,
        )  # fmt: skip
        signals = signals.replace(history_valid=jnp.zeros_like(signals.history_valid))
        unmeasured = Evaluation(
            loss=jnp.float32(random_guess_loss),
            accuracy=jnp.float32(guess),
            table=jnp.full(len(configurations), guess),
            committed=jnp.float32(guess),
            committed_loss=jnp.float32(random_guess_loss),
            per_class=jnp.full(classes, guess),
            per_class_valid=jnp.zeros(classes, bool),
        )
        none = jnp.int32(0)
        newborn = EnvState(
            epoch=none,
            model=model,
            optimiser=host_training.init(model, cfg.training),
            slots=state,
            governor=governor.init(cfg.governor),
            kept=governor.snapshot(model, state),
            tracker=watch,
            signals=signals,
            evaluation=unmeasured,
            improvement=jnp.float32(0),
            improvement_valid=jnp.bool_(False),
            last_op=jnp.int32(Op.WAIT),
            last_success=jnp.bool_(True),
            rollbacks=none,
            germinated=none,
            fossilised=none,
            contributing_fossils=none,
            pruned=none,
        )
        return strong(newborn)

    def observe(state: EnvState) -> Observation:
        inputs = observation.Inputs(state.signals, state.slots, state.last_op, state.last_success, jnp.float32(horizon))
        legal = masks.legal(state.slots, cfg.lifecycle, allowed=state.epoch > 0)
        return Observation(observation.encode(inputs), legal, state.signals, state.slots)

    def act(key: Array, state: EnvState, action: Action):
        """Executes the action and ticks the slots. Returns the new state and what came of it."""
        permitted = masks.permits(masks.legal(state.slots, cfg.lifecycle, allowed=state.epoch > 0), action)
        request = operations.decode(action)
        request = request.replace(op=jnp.where(permitted, action.op, Op.WAIT))
        after, outcome = operations.execute(state.slots, request, state.evaluation.accuracy, cfg.lifecycle)
        outcome = outcome.replace(legal=outcome.legal & permitted, success=outcome.success & permitted)

        seeds = []
        number = seed_bank.kind_of(request.blueprint, offered)
        for s, (seed, w) in enumerate(zip(state.model.seeds, cfg.host.slot_widths, strict=True)):
            seed_key, gate_key = jax.random.split(jax.random.fold_in(key, s))
            fresh = seed_bank.germinate(seed_key, kinds, w, number)
            params = jnp.where(outcome.germinated[s], fresh, seed.params)
            gate = jnp.where(outcome.gate_created[s], blend.gate_init(gate_key, w), seed.gate)
            seeds.append(seed.replace(params=params, gate=gate))
        model = state.model.replace(seeds=tuple(seeds))
        optimiser = host_training.reset_momentum(state.optimiser, outcome.germinated, outcome.gate_created)
        # a seed's weights were validated just before it was fossilised: keep them as they are now
        kept = lax.cond(
            outcome.op == Op.FOSSILIZE,
            governor.admit_fossils,
            lambda kept, model, slots: kept,
            state.kept,
            model,
            after,
        )
        after = stages.tick(after, cfg.lifecycle)
        return state.replace(model=model, optimiser=optimiser, slots=after, kept=kept), outcome

    def train(key: Array, state: EnvState):
        """One epoch. A rollback changes the data order of what follows, or the same batches would break it again."""
        key = jax.random.fold_in(key, state.rollbacks)
        order_key, augment_key = jax.random.split(key)
        t = cfg.training
        indices = epoch_batches(order_key, train_size, t.batches_per_epoch, t.batch_size)
        keys = jax.random.split(augment_key, t.batches_per_epoch)
        fetch = lambda batch: train_batch(batch[0], dataset, batch[1])
        model, optimiser, metrics = host_training.train_epoch(
            state.model, state.optimiser, state.slots, (keys, indices), fetch, t
        )
        host_params = cnn.param_count(model.host)
        state = state.replace(model=model, optimiser=optimiser, epoch=state.epoch + 1)
        return state.replace(slots=host_training.record_gradients(state.slots, metrics, host_params)), metrics

    def judge(state: EnvState, measured: Evaluation, new_fossil: Array):
        """The governor's verdict and its consequences."""
        watch, verdict = governor.check(
            state.governor, measured.loss, cfg=cfg.governor, random_guess_loss=random_guess_loss
        )
        due = verdict.accepted & ((state.epoch % cfg.governor.snapshot_epochs == 0) | new_fossil)
        renew = lambda kept, model, slots: governor.snapshot(model, slots)
        kept = lax.cond(due, renew, lambda kept, model, slots: kept, state.kept, state.model, state.slots)
        model, restored = lax.cond(
            verdict.panic, governor.rollback, lambda kept, model, slots: (model, slots), kept, state.model, state.slots
        )
        nobody = jnp.zeros(n_slots, bool)
        state = state.replace(
            governor=select(verdict.panic, governor.after_rollback(watch), watch),
            kept=kept,
            model=model,
            slots=restored,
            optimiser=host_training.reset_momentum(state.optimiser, nobody, nobody, everything=verdict.panic),
            rollbacks=state.rollbacks + verdict.panic,
        )
        return state, verdict

    def record(state: EnvState, measured: Evaluation, worth, metrics, verdict):
        """Seed metrics, tracker and attribution. A loss that was not accepted leaves them as they were."""
        accepted = verdict.accepted
        evaluation = select(accepted, measured, state.evaluation)
        seen = stages.record_contribution(state.slots, worth.contribution, worth.contribution_valid & accepted)
        m = seen.metrics
        seen = seen.replace(
            metrics=m.replace(
                interaction_sum=jnp.where(accepted, worth.interaction_sum, m.interaction_sum),
                boost_received=jnp.where(accepted, worth.boost, m.boost_received),
                interaction_valid=jnp.where(accepted, worth.interaction_valid, m.interaction_valid),
            )
        )
        seen = stages.record_accuracy(seen, evaluation.accuracy)
        watch, signals = tracker.update(
            state.tracker,
            cfg=cfg.tracker,
            epoch=state.epoch,
            train_loss=metrics.loss,
            train_accuracy=metrics.accuracy,
            val_loss=jnp.where(accepted, measured.loss, jnp.nan),  # the tracker skips what is not finite
            val_accuracy=measured.accuracy,
            available_slots=(seen.stage == Stage.DORMANT).sum(),
        )
        known = accepted & worth.total_improvement_valid
        return state.replace(
            slots=select(verdict.panic, state.slots, seen),
            tracker=watch,
            signals=signals,
            evaluation=evaluation,
            improvement=jnp.where(known, worth.total_improvement, state.improvement),
            improvement_valid=known | state.improvement_valid,
        )

    def pay(before: EnvState, after: EnvState, outcome, action, worth, verdict) -> tuple[RewardComponents, Array]:
        """Reward of the transition that was realised, and whether it added a contributing fossil."""
        old = before.slots
        has_seed = stages.is_active(old.stage)
        accuracy = after.evaluation.accuracy
        measured_now = worth.contribution_valid & verdict.accepted
        contributing = reward.is_contributing(outcome.op, after.improvement, after.improvement_valid)
        inputs = reward.RewardInputs(
            requested_op=action.op,
            succeeded=outcome.success,
            slot=action.slot,
            has_seed=has_seed,
            stage=old.stage,
            epochs_in_stage=old.epochs_in_stage,
            seed_age=old.epochs_total,
            contribution=jnp.where(measured_now, worth.contribution, old.metrics.contribution),
            contribution_valid=measured_now | old.metrics.contribution_valid,
            germination_accuracy=old.metrics.germination_accuracy,
            germination_accuracy_valid=has_seed,
            stage_improvement=accuracy - old.metrics.stage_start_accuracy,
            stage_improvement_valid=has_seed & (old.epochs_total > 0),
            interaction_sum=worth.interaction_sum,
            interaction_valid=worth.interaction_valid & verdict.accepted,
            total_improvement=after.improvement,
            total_improvement_valid=after.improvement_valid & has_seed.any(),
            val_accuracy=accuracy,
            committed_accuracy=after.evaluation.committed,
            contributing_fossils=before.contributing_fossils + contributing,
            terminal=after.epoch >= horizon,
            host_params=jnp.float32(cnn.param_count(before.model.host)),
            slot_stage=after.slots.stage,
            slot_epochs_in_stage=after.slots.epochs_in_stage,
            slot_alpha=after.slots.alpha.alpha,
            slot_params=seed_params(after.slots).astype(jnp.float32),
            previous_potential=reward.potential(old.stage, old.epochs_in_stage),
            previous_alpha=jnp.where(has_seed, old.alpha.alpha, 0.0),
            previous_params=seed_params(old).astype(jnp.float32),
        )
        components = reward.reward(inputs, weights, cfg.reward.mode, cfg.reward.attribution)
        return select(verdict.panic, fine, components), contributing

    def pay_alone(before: EnvState, info: StepInfo) -> RewardComponents:
        """The reward `paired` as far as one environment knows it: the fall of its own loss instead of the gain over a
        twin, whose part no action changes. Where environments are mapped the twin is known (`reward.paired`), and so
        is the size at the last accepted epoch, which here is that of the state before the step."""
        blended, committed = sizes(before)
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
        return jax.tree.map(lambda leaf: leaf[1], reward.paired(both, jnp.zeros(2), weights, fine))

    def step(key: Array, state: EnvState, action: Action):
        action = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.int32), action)
        germination_key, train_key = jax.random.split(key)
        before = state
        state, outcome = act(germination_key, state, action)
        acted = state.slots
        state, metrics = train(train_key, state)
        live = networks.live_slots(state.model, state.slots)
        measured = measure(state.model, state.slots, dataset.validation)
        worth = attribution.attribute(measured.table, configurations, live)
        blended, committed = sizes(state)
        fossilised = outcome.op == Op.FOSSILIZE
        state, verdict = judge(state, measured, fossilised)
        state = record(state, measured, worth, metrics, verdict)
        components, contributing = pay(before, state, outcome, action, worth, verdict)
        pruned = (acted.stage == Stage.PRUNED) & (before.slots.stage != Stage.PRUNED)
        pruned |= (acted.stage == Stage.EMBARGOED) & stages.is_active(before.slots.stage)
        state = state.replace(
            last_op=jnp.clip(action.op, 0, len(Op) - 1),
            last_success=outcome.success,
            germinated=state.germinated + outcome.germinated.any(),
            fossilised=state.fossilised + fossilised,
            contributing_fossils=state.contributing_fossils + contributing,
            pruned=state.pruned + pruned.sum(),
        )
        over = state.epoch >= horizon
        info = StepInfo(
            requested_op=action.op,
            op=outcome.op,
            slot=action.slot,
            legal=outcome.legal,
            success=outcome.success,
            gate_level=outcome.gate_level,
            gate_passed=outcome.gate_passed,
            train_loss=metrics.loss,
            train_accuracy=metrics.accuracy,
            val_loss=measured.loss,
            val_accuracy=measured.accuracy,
            accepted=verdict.accepted,
            panic=verdict.panic,
            panic_reason=verdict.reason,
            table=measured.table,
            committed_accuracy=measured.committed,
            committed_loss=measured.committed_loss,
            per_class=measured.per_class,
            stage=state.slots.stage,
            alpha=state.slots.alpha.alpha,
            blueprint=jnp.where(stages.is_active(state.slots.stage), state.slots.blueprint, -1),
            contribution=worth.contribution,
            contribution_valid=worth.contribution_valid,
            shapley=worth.shapley,
            shapley_valid=worth.shapley_valid,
            interaction=worth.interaction_sum,
            interaction_valid=worth.interaction_valid,
            gradient_ratio=state.slots.metrics.gradient_ratio,
            gradient_health=state.slots.metrics.gradient_health,
            gradient_valid=state.slots.metrics.gradient_valid,
            params=cnn.param_count(state.model.host) + seed_params(state.slots).sum(),
            blended_size=blended,
            committed_size=committed,
            components=components,
            episode_over=over,
        )
        if cfg.reward.mode == "paired":
            info = info.replace(components=pay_alone(before, info))
        return state, observe(state), info.components.total(), over | verdict.panic, info

    def reset(key: Array):
        host_key, step_key = jax.random.split(key)
        state, obs, *_ = step(step_key, init(host_key), Action())
        return state, obs

    def report(grown: Grown) -> Evaluation:
        return measure(grown.model, grown.slots, dataset.test)

    return Env(init, reset, step, observe, report, n_slots, observation.size(n_slots))
