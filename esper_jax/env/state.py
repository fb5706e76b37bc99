"""What one environment carries from epoch to epoch, and what it reports."""

from __future__ import annotations

import jax.numpy as jnp
from flax import struct

from esper_jax.env import host_training
from esper_jax.env.evaluation import Evaluation
from esper_jax.env.governor import GovernorState, Snapshot
from esper_jax.env.reward import RewardComponents
from esper_jax.env.tracker import TrackerState
from esper_jax.network.model import Model
from esper_jax.types import Array, Signals, SlotState


@struct.dataclass
class EnvState:
    """Everything that one environment carries from epoch to epoch."""

    epoch: Array  # i32[] epochs trained; 0 is newborn
    model: Model
    optimiser: host_training.OptimiserState
    slots: SlotState
    governor: GovernorState
    snapshot: Snapshot  # last good state
    older: Snapshot  # the one before it
    tracker: TrackerState
    signals: Signals
    evaluation: Evaluation  # of the last accepted epoch
    improvement: Array  # f32[] accuracy minus that with all seeds off, when last measured
    improvement_valid: Array  # bool[]
    last_op: Array  # i32[] op asked for at the last decision
    last_success: Array  # bool[] it was carried out
    lr_scale: Array  # f32[] what the learning rates are multiplied by; lowered by the governor alone
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
    first_loss: Array  # f32[] of the first training batch, before anything was learned from it
    gradient_norm: Array  # f32[] largest of the epoch's batches, before clipping
    val_loss: Array  # f32[]
    val_accuracy: Array  # f32[]
    accepted: Array  # bool[] the governor took the loss
    panic: Array  # bool[] the governor rolled the run back
    panic_reason: Array  # i32[] PanicReason
    given_up: Array  # bool[] too many panics in a row: the last good network is neither trained nor decided about
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

    @property
    def discount(self) -> Array:
        """f32[]: 0 at epoch T and after a rollback, where what follows does not count for this step; else 1."""
        return 1.0 - (self.episode_over | self.panic).astype(jnp.float32)
