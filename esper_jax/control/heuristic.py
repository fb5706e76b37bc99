"""The rule-based controller that learned growth is compared with (Esper's heuristic Tamiyo).

Germinates when the host has stabilised and stopped improving, advances a seed whenever it can, prunes one that hurts
and fossilises one that contributes. It looks at one seed at a time and never at the legality masks: a request that is
not legal is refused by the environment.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import jax.numpy as jnp
import numpy as np
from flax import struct

from esper_jax.enums import catalog
from esper_jax.lifecycle import alpha, stages
from esper_jax.types import (
    CNN_BLUEPRINTS,
    Action,
    Array,
    Controller,
    Extras,
    Observation,
    Op,
    Signals,
    SlotState,
    Stage,
)

FORGOTTEN_PENALTY = 0.1  # a blueprint's penalty below this is dropped
FULL_CONFIDENCE_PLATEAU = 5.0  # epochs
FULL_CONFIDENCE_CONTRIBUTION = 5.0  # points of score


@dataclass(frozen=True)
class HeuristicConfig:
    """Thresholds of the rules. Epochs are host epochs, scores points of the metric.

    Raises:
      ValueError: if `rotation` is empty or names a blueprint that is not in `available`.
    """

    plateau_epochs: int = 3
    """epochs of plateau before a germination"""
    min_epochs: int = 5
    """no germination before this epoch"""
    prune_patience: int = 5
    """epochs in TRAINING or BLENDING before a seed may count as failing"""
    prune_drop: float = 2.0
    """a failing seed has lost more than this since its stage began"""
    min_contribution: float = 0.5
    """a seed in HOLDING must contribute more than this to be fossilised"""
    embargo_epochs: int = 5
    """no germination for so many epochs after a prune"""
    rotation: tuple[str, ...] = ("conv_light", "conv_heavy", "attention", "norm", "depthwise")
    """blueprints in the order in which they are tried"""
    available: tuple[str, ...] = CNN_BLUEPRINTS
    """blueprints that the host can take; noop is never germinated"""
    penalty_on_prune: float = 2.0
    """added to a blueprint's penalty when a seed of it is pruned"""
    penalty_decay: float = 0.5
    """factor on all penalties, once per epoch"""
    penalty_threshold: float = 3.0
    """blueprints with a penalty from here on are skipped"""
    ransom_contribution: float = 0.1
    """a seed contributes more than this ..."""
    ransom_improvement: float = 0.0
    """... and the host has gained less than this since its germination: the host has come to depend on it"""

    def __post_init__(self):
        offered = tuple(name for name in self.available if name != "noop")
        if not self.rotation or not set(self.rotation) <= set(offered):
            allowed = ", ".join(offered)
            raise ValueError(f"HeuristicConfig.rotation = {self.rotation!r}: must be one or more of {allowed}")


class Reason(IntEnum):
    """Which rule decided."""

    EMBARGO = 0
    NOT_STABILIZED = 1
    TOO_EARLY = 2
    NO_FREE_SLOT = 3
    PLATEAU = 4  # germinate
    NOTHING_TO_DO = 5
    TO_TRAINING = 6
    FAILING_TRAINING = 7
    TO_BLENDING = 8
    FAILING_BLENDING = 9
    TO_HOLDING = 10
    RAMPING = 11
    RANSOM = 12  # prune: contributes, yet the host is worse off than before it
    NO_CONTRIBUTION = 13  # wait for a measurement
    CONTRIBUTES = 14  # fossilise
    USELESS = 15  # prune
    FELL_THROUGH = 16  # no seed is in a stage that has a rule


_REASON_OP = {
    Reason.PLATEAU: Op.GERMINATE,
    Reason.TO_TRAINING: Op.ADVANCE,
    Reason.FAILING_TRAINING: Op.PRUNE,
    Reason.TO_BLENDING: Op.ADVANCE,
    Reason.FAILING_BLENDING: Op.PRUNE,
    Reason.TO_HOLDING: Op.ADVANCE,
    Reason.RANSOM: Op.PRUNE,
    Reason.CONTRIBUTES: Op.FOSSILIZE,
    Reason.USELESS: Op.PRUNE,
}
_OP_OF_REASON = np.array([_REASON_OP.get(reason, Op.WAIT) for reason in Reason], np.int32)
_MANAGED = (Stage.GERMINATED, Stage.TRAINING, Stage.BLENDING, Stage.HOLDING)


@struct.dataclass
class HeuristicState:
    """Memory of one episode; R is the length of the rotation."""

    rotation_index: Array  # i32[] blueprints tried so far; its position is this modulo R
    germinations: Array  # i32[]
    last_prune_epoch: Array  # i32[] -100 = never
    penalty: Array  # f32[R] of each blueprint of the rotation
    last_decay_epoch: Array  # i32[]


@struct.dataclass
class Decision:
    """What to do and why."""

    op: Array  # i32[] Op
    blueprint: Array  # i32[] number in the catalog; noop unless the op is GERMINATE
    slot: Array  # i32[] the slot to germinate in, or of the seed that was looked at; 0 if there is none
    confidence: Array  # f32[] in [0, 1]
    reason: Array  # i32[] Reason


def init(cfg: HeuristicConfig) -> HeuristicState:
    """Nothing tried, nothing pruned."""
    return HeuristicState(
        rotation_index=jnp.int32(0),
        germinations=jnp.int32(0),
        last_prune_epoch=jnp.int32(-100),
        penalty=jnp.zeros(len(cfg.rotation), jnp.float32),
        last_decay_epoch=jnp.int32(-1),
    )


def decide(
    state: HeuristicState, signals: Signals, slots: SlotState, cfg: HeuristicConfig
) -> tuple[HeuristicState, Decision]:
    """One decision. The first slot whose seed is in a stage with a rule decides; without live seeds, germination."""
    state = _decay(state, signals.epoch, cfg)
    live = ~stages.is_in(slots.stage, (Stage.DORMANT, Stage.FOSSILIZED, *stages.COOLDOWN))
    managed = stages.is_in(slots.stage, _MANAGED)
    seed = jnp.argmax(managed).astype(jnp.int32)
    empty = jnp.argmax(slots.stage == Stage.DORMANT).astype(jnp.int32)

    management = jnp.where(managed.any(), _management_reason(slots, cfg)[seed], Reason.FELL_THROUGH)
    reason = jnp.where(live.any(), management, _germination_reason(state, signals, cfg)).astype(jnp.int32)
    op = jnp.asarray(_OP_OF_REASON)[reason]
    germinates, prunes = op == Op.GERMINATE, op == Op.PRUNE

    candidate, rotation_index = _next_blueprint(state, cfg)
    rotation = jnp.asarray(_rotation(cfg))
    pruned = prunes & (rotation == slots.blueprint[seed])
    confidence = jnp.where(germinates, signals.plateau_epochs.astype(jnp.float32) / FULL_CONFIDENCE_PLATEAU, 1)
    contribution = slots.metrics.contribution[seed] / FULL_CONFIDENCE_CONTRIBUTION
    confidence = jnp.where(op == Op.FOSSILIZE, contribution, confidence)
    decision = Decision(
        op=op,
        blueprint=jnp.where(germinates, rotation[candidate], 0),
        slot=jnp.where(germinates, empty, jnp.where(managed.any(), seed, 0)),
        confidence=jnp.minimum(confidence, 1).astype(jnp.float32),
        reason=reason,
    )
    return state.replace(
        rotation_index=jnp.where(germinates, rotation_index, state.rotation_index),
        germinations=state.germinations + germinates.astype(jnp.int32),
        last_prune_epoch=jnp.where(prunes, signals.epoch, state.last_prune_epoch),
        penalty=state.penalty + jnp.where(pruned, cfg.penalty_on_prune, 0),
    ), decision


def make_controller(cfg: HeuristicConfig = HeuristicConfig()) -> Controller:
    """The heuristic as a `Controller`. It germinates with the defaults of `Action` and prunes at once."""

    def act(key: Array, carry: HeuristicState, obs: Observation) -> tuple[HeuristicState, Action, Extras]:
        del key
        carry, decision = decide(carry, obs.signals, obs.slots, cfg)
        slot = jnp.where(decision.op == Op.WAIT, 0, decision.slot)
        return carry, Action(op=decision.op, slot=slot, blueprint=decision.blueprint), Extras()

    return Controller(init=lambda key: init(cfg), act=act)


def _rotation(cfg: HeuristicConfig) -> np.ndarray:
    return np.array([catalog(cfg.available).index(name) for name in cfg.rotation], np.int32)


def _decay(state: HeuristicState, epoch: Array, cfg: HeuristicConfig) -> HeuristicState:
    """Once per epoch, however often it is asked for a decision."""
    new_epoch = epoch > state.last_decay_epoch
    decayed = state.penalty * cfg.penalty_decay
    decayed = jnp.where(decayed < FORGOTTEN_PENALTY, 0, decayed)
    return state.replace(
        penalty=jnp.where(new_epoch, decayed, state.penalty),
        last_decay_epoch=jnp.maximum(epoch, state.last_decay_epoch),
    )


def _first(*rules: tuple[Array, Reason], otherwise: Reason) -> Array:
    """The reason of the first rule whose condition holds."""
    return jnp.select([condition for condition, _ in rules], [int(reason) for _, reason in rules], int(otherwise))


def _germination_reason(state: HeuristicState, signals: Signals, cfg: HeuristicConfig) -> Array:
    return _first(
        (signals.epoch - state.last_prune_epoch < cfg.embargo_epochs, Reason.EMBARGO),
        (~signals.host_stabilized, Reason.NOT_STABILIZED),
        (signals.epoch < cfg.min_epochs, Reason.TOO_EARLY),
        (signals.available_slots <= 0, Reason.NO_FREE_SLOT),
        (signals.plateau_epochs >= cfg.plateau_epochs, Reason.PLATEAU),
        otherwise=Reason.NOTHING_TO_DO,
    )


def _management_reason(slots: SlotState, cfg: HeuristicConfig) -> Array:
    """i32[S] Reason of the rule that applies to each slot; FELL_THROUGH where the stage has none."""
    stage, measured, contribution = slots.stage, slots.metrics.contribution_valid, slots.metrics.contribution
    patient = slots.epochs_in_stage >= cfg.prune_patience
    failing = patient & (stages.improvement_in_stage(slots) < -cfg.prune_drop)
    worse_off = stages.total_improvement(slots) < cfg.ransom_improvement
    holding = stage == Stage.HOLDING
    return _first(
        (stage == Stage.GERMINATED, Reason.TO_TRAINING),
        ((stage == Stage.TRAINING) & failing, Reason.FAILING_TRAINING),
        (stage == Stage.TRAINING, Reason.TO_BLENDING),
        ((stage == Stage.BLENDING) & failing, Reason.FAILING_BLENDING),
        ((stage == Stage.BLENDING) & alpha.at_full_target(slots.alpha), Reason.TO_HOLDING),
        (stage == Stage.BLENDING, Reason.RAMPING),
        # What the host gained since germination is not the seed's doing, so it never stands in for a measurement.
        (holding & ~measured, Reason.NO_CONTRIBUTION),
        (holding & (contribution > cfg.ransom_contribution) & worse_off, Reason.RANSOM),
        (holding & (contribution > cfg.min_contribution), Reason.CONTRIBUTES),
        (holding, Reason.USELESS),
        otherwise=Reason.FELL_THROUGH,
    )


def _next_blueprint(state: HeuristicState, cfg: HeuristicConfig) -> tuple[Array, Array]:
    """Position in the rotation of the next blueprint, and the rotation index after it.

    The next one that isn't penalised too much; if all are, they take turns from the least penalised up (ties by name).
    """
    size = len(cfg.rotation)
    order = (state.rotation_index + jnp.arange(size, dtype=jnp.int32)) % size
    usable = state.penalty[order] < cfg.penalty_threshold
    steps = jnp.argmax(usable)
    name_rank = jnp.asarray(np.argsort(np.argsort(np.array(cfg.rotation), kind="stable")))
    by_penalty = jnp.lexsort((name_rank, state.penalty))
    candidate = jnp.where(usable.any(), order[steps], by_penalty[state.rotation_index % size])
    return candidate, state.rotation_index + jnp.where(usable.any(), steps + 1, 1).astype(jnp.int32)
