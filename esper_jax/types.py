"""Enums and the structs that cross folders (Esper's Leyline).

Axis letters: E environments, S slots, T epochs of an episode, K alpha configurations, D observation features.
Every struct here describes ONE environment; a population carries a leading E axis on every leaf.
Scores and contributions are points of the metric (`metric.Metric`): for images percentage points of accuracy.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from esper_jax.enums import (  # noqa: F401 (enums are used from here)
    ALPHA_CURVES,
    ALPHA_SPEED_EPOCHS,
    ALPHA_TARGETS,
    BLUEPRINTS,
    CNN_BLUEPRINTS,
    HEAD_SIZES,
    HEADS,
    NUM_STAGES,
    RELEVANT_HEADS,
    STAGE_ONE_HOT_INDEX,
    STYLE_ALGORITHM,
    STYLE_CURVE,
    STYLES,
    TEMPO_EPOCHS,
    AlphaAlgorithm,
    AlphaCurve,
    AlphaMode,
    Op,
    PanicReason,
    Stage,
)

Array = jax.Array


@struct.dataclass
class Action:
    """One decision: an index per head, each i32[]. `Action()` is WAIT with the canonical other heads."""

    op: Array = struct.field(default_factory=lambda: jnp.int32(Op.WAIT))
    slot: Array = struct.field(default_factory=lambda: jnp.int32(0))
    blueprint: Array = struct.field(default_factory=lambda: jnp.int32(0))  # noop
    style: Array = struct.field(default_factory=lambda: jnp.int32(2))  # sigmoid_add
    tempo: Array = struct.field(default_factory=lambda: jnp.int32(1))  # 5 epochs
    alpha_target: Array = struct.field(default_factory=lambda: jnp.int32(2))  # 1.0
    alpha_speed: Array = struct.field(default_factory=lambda: jnp.int32(0))  # at once
    alpha_curve: Array = struct.field(default_factory=lambda: jnp.int32(0))  # linear


class ActionSpace(NamedTuple):
    """What there is to choose from, as a value: it is built from a configuration (`Config.action_space`)."""

    n_slots: int
    blueprints: tuple[str, ...] = BLUEPRINTS  # the catalog: names by the numbers that stand in `Action.blueprint`
    offered: tuple[int, ...] = tuple(range(1, len(BLUEPRINTS)))  # numbers that may be germinated

    @property
    def sizes(self) -> dict[str, int]:
        """Choices of every head, as in its mask."""
        return HEAD_SIZES | {"slot": self.n_slots, "blueprint": len(self.blueprints)}


@struct.dataclass
class Masks:
    """What is legal now; True = allowed. `slot_by_op[op]` is the slot mask once the op is known."""

    op: Array  # bool[6]
    slot: Array  # bool[S]
    slot_by_op: Array  # bool[6, S]
    blueprint: Array  # bool[N], by number in the catalog: 13 and the modules of one's own
    style: Array  # bool[4]
    tempo: Array  # bool[3]
    alpha_target: Array  # bool[3]
    alpha_speed: Array  # bool[4]
    alpha_curve: Array  # bool[3]


@struct.dataclass
class AlphaState:
    """Alpha controller of every slot."""

    alpha: Array  # f32[S] in [0, 1]
    start: Array  # f32[S] where the current ramp began
    target: Array  # f32[S] where it ends
    mode: Array  # i32[S] AlphaMode
    curve: Array  # i32[S] AlphaCurve
    steepness: Array  # f32[S] of the sigmoid curve
    steps_total: Array  # i32[S] length of the ramp in epochs
    steps_done: Array  # i32[S]


@struct.dataclass
class SeedMetrics:
    """What has been measured about the seed in each slot. `*_valid` False = never measured."""

    initial_score: Array  # f32[S] first score recorded after germination
    current_score: Array  # f32[S]
    best_score: Array  # f32[S]
    stage_start_score: Array  # f32[S] score when the present stage was entered
    germination_score: Array  # f32[S] environment's score when the seed was germinated
    contribution: Array  # f32[S] score minus the score with this slot off
    contribution_valid: Array  # bool[S]
    contribution_velocity: Array  # f32[S] exponential mean of contribution changes
    contribution_age: Array  # i32[S] epochs since the contribution was measured
    interaction_sum: Array  # f32[S] sum of pair interactions this epoch
    interaction_valid: Array  # bool[S]
    boost_received: Array  # f32[S] largest positive pair interaction this epoch
    gradient_norm: Array  # f32[S] of the seed, before clipping
    gradient_ratio: Array  # f32[S] exponential mean of the seed/host ratio of per-element norms
    gradient_health: Array  # f32[S] in [0, 1]
    previous_gradient_health: Array  # f32[S]
    gradient_valid: Array  # bool[S]
    previous_gradient_valid: Array  # bool[S]
    gradient_vanishing: Array  # bool[S]
    gradient_exploding: Array  # bool[S]


@struct.dataclass
class SlotState:
    """Lifecycle record of every slot. An empty slot has stage DORMANT and otherwise default values."""

    stage: Array  # i32[S] Stage
    previous_stage: Array  # i32[S]
    epochs_in_stage: Array  # i32[S] scores recorded (or cooldown ticks) since the stage was entered
    previous_epochs_in_stage: Array  # i32[S]
    epochs_total: Array  # i32[S] scores recorded (or cooldown ticks) since germination: the seed's age
    blueprint: Array  # i32[S] number in the catalog, -1 = none
    algorithm: Array  # i32[S] AlphaAlgorithm
    ramp_curve: Array  # i32[S] AlphaCurve of the first ramp, from the germination style
    ramp_target: Array  # f32[S] target of the first ramp
    ramp_epochs: Array  # i32[S] length of the first ramp
    isolate: Array  # bool[S] the seed reads stop_gradient(host features)
    has_gate: Array  # bool[S]
    alpha: AlphaState
    metrics: SeedMetrics


@struct.dataclass
class Signals:
    """What the tracker says about the host's training; finite, except `loss_delta` in the first epoch."""

    epoch: Array  # i32[] epochs trained in this episode
    train_loss: Array  # f32[]
    train_score: Array  # f32[]
    val_loss: Array  # f32[] last accepted validation loss
    val_score: Array  # f32[]
    loss_delta: Array  # f32[] previous loss minus this one; +inf on the first call of an episode
    score_delta: Array  # f32[]
    plateau_epochs: Array  # i32[]
    host_stabilized: Array  # bool[] latch
    best_val_score: Array  # f32[]
    best_val_loss: Array  # f32[] minimum over the window of the tracker, not over the episode
    loss_history: Array  # f32[5] oldest first
    score_history: Array  # f32[5]
    history_valid: Array  # bool[5]
    available_slots: Array  # i32[] empty slots


@struct.dataclass
class Observation:
    """What a controller sees."""

    features: Array  # f32[D] the encoded vector, see env.observation
    masks: Masks
    signals: Signals
    slots: SlotState


@struct.dataclass
class Extras:
    """What the learner needs about a decision; zeros from controllers that do not learn."""

    log_prob: Array = struct.field(default_factory=lambda: jnp.float32(0))  # f32[] joint over the relevant heads
    value: Array = struct.field(default_factory=lambda: jnp.float32(0))  # f32[]


class Controller(NamedTuple):
    """A controller of one environment, learned or not.

    `init(key) -> carry`; `act(key, carry, observation) -> (carry, Action, Extras)`.
    """

    init: Any
    act: Any
