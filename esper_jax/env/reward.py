"""Reward of one transition: every term is a function of its own and the components add up to the total.

The formulas are those of the later reference system with its faults mended: the reward describes the transition that
was *realised* (a refused op earns what WAIT earns, less its cost), and shaping is potential-based over the whole
environment. Scores, contributions and improvements are points of
the metric: of accuracy, percentage points (0-100).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from esper_jax.config import RewardConfig
from esper_jax.types import Array, Op, Stage

# The reference's defaults that no study has varied; the ones that are varied are `RewardWeights`.
DISCOUNT_STEEPNESS = 3.0  # of the sigmoid that discounts credit when the seeds as a whole hurt
DISCOUNT_THRESHOLD = 0.5  # below it, neither ratio penalty nor synergy
SAFE_IMPROVEMENT = 0.1  # total improvement up to this counts as none
SUSPICIOUS_RATIO = 5.0  # contribution over total improvement
SUSPICIOUS_CONTRIBUTION = 1.0  # smaller ones are not looked at
RATIO_SLOPE = 0.1  # penalty per multiple of SUSPICIOUS_RATIO
MAX_RATIO_PENALTY = 0.3
UNEXPLAINED_SCALE = 10.0  # contribution at which a seed without total improvement gets the whole penalty
BLENDING_WARNING, BLENDING_WARNING_SLOPE, MAX_BLENDING_GROWTH = 0.1, 0.05, 0.3
HOLDING_WARNING, HOLDING_WARNING_SLOPE, MAX_HOLDING_WARNING = 0.1, 0.05, 0.3
HOLDING_GRACE_EPOCHS = 2  # the warning starts in this epoch of HOLDING
SYNERGY_STEEPNESS = 0.5
MIN_FOSSILIZE_CONTRIBUTION = 1.0  # also what makes a fossil count as contributing
MIN_HOLDING_EPOCHS = 5.0  # epochs in HOLDING for the whole fossilisation reward
FOSSILIZE_BASE, FOSSILIZE_SCALE = 0.5, 0.1
FOSSILIZE_NONCONTRIBUTING = -0.2
FOSSILIZE_HARMFUL, FOSSILIZE_HARMFUL_SLOPE, MAX_FOSSILIZE_HARM = -0.5, 0.2, 1.0
FOSSILIZE_RANSOM = -0.3  # extra, for a seed that looks useful in an environment that its seeds have made worse
RANSOM_CONTRIBUTION, RANSOM_IMPROVEMENT = 0.1, -0.2
FOSSILIZE_INVALID = -1.0
FOSSILIZE_QUALITY_CEILING = 3.0  # contributing fossils at which the bonus saturates; one is paid at a time
PRUNE_HURTING, PRUNE_HURTING_CONTRIBUTION = 0.15, -0.5
PRUNE_ACCEPTABLE = 0.1
PRUNE_GOOD, PRUNE_GOOD_SLOPE, MIN_PRUNE_GOOD = -0.3, 0.05, -0.9
PRUNE_EARLY = -0.1
PRUNE_UNMEASURED_AGE = 5  # pruned younger than this without a measured contribution: early
PRUNE_BONUS_AGE = 3  # pruned younger than this: no bonus for having removed a harmful seed
PRUNE_TOO_YOUNG = -0.3  # per epoch short of the least prunable age
PRUNE_NOTHING, PRUNE_FOSSIL = -0.2, -1.0
GERMINATE_OCCUPIED = -0.3
ADVANCE_FROM_TRAINING = -0.1
SIMPLIFIED_ACTION_COST = 0.01
SIMPLIFIED_SCORE_WEIGHT = 3.0  # per score as a fraction
SIMPLIFIED_FOSSIL_WEIGHT = 2.0  # per contributing fossil
EPOCH_BONUS, MAX_EPOCH_BONUS = 0.3, 2.0

# Potential of each stage, indexed by the stage's value; 5 is retired, empty slots and cooldown have none.
STAGE_POTENTIAL = (0.0, 0.0, 1.0, 2.0, 3.5, 0.0, 5.5, 6.0, 0.0, 0.0, 0.0)


@struct.dataclass
class RewardWeights:
    """Weights of the terms, f32[] each and traced, so a grid of them compiles once. Costs are positive."""

    contribution_weight: Array
    proxy_factor: Array  # of contribution_weight, before a contribution was measured
    shaping_weight: Array
    gamma: Array  # the learner's discount
    rent_weight: Array
    max_rent: Array
    rent_host_floor: Array  # parameters; smaller hosts pay rent as if they had so many
    base_slot_rent_ratio: Array  # host parameters' share that an occupied slot costs
    alpha_shock_coef: Array
    max_alpha_shock: Array
    occupancy_cost: Array  # per occupied slot beyond the free ones
    free_slots: Array
    fossil_maintenance_cost: Array  # per fossil
    germinate_cost: Array
    fossilize_cost: Array
    prune_cost: Array
    set_alpha_target_cost: Array
    terminal_score_weight: Array
    fossilize_terminal_scale: Array
    synergy_weight: Array
    param_budget: Array
    param_penalty_weight: Array
    min_prune_age: Array  # epochs
    loss_scale: Array  # points per nat, see `paired`
    loss_cap: Array  # nats
    price: Array  # points per multiple of the host's parameters
    harvest: Array  # share of the last value that is the committed network's, in [0, 1]

    @classmethod
    def from_config(cls, cfg: RewardConfig, gamma: float, min_prune_age: int = 1) -> RewardWeights:
        """Weights of a configuration; `gamma` is PPO's, so that shaping and learner cannot disagree."""
        outside = {"gamma": gamma, "min_prune_age": min_prune_age}
        names = cls.__dataclass_fields__
        return cls(**{name: jnp.float32(outside[name] if name in outside else getattr(cfg, name)) for name in names})


@struct.dataclass
class RewardInputs:
    """What the terms read.

    The fields of the seeds (`SEED_FIELDS`) are `[S]` for `reward`, which judges every seed at every step and not only
    the one that the controller happens to address; the terms themselves see one seed at a time, as scalars.

    Values without `_valid` are always there; a value whose flag is False may hold anything. "Before" is the state that
    the action was chosen in, "after" the state that the transition ends in (executed, ticked, trained, measured).

    `contribution` and `total_improvement` come from this transition's table of scores where it still measures them
    (the slot is live after the transition; any slot is live after it), else they are the last measured ones: a seed
    that was just pruned is judged by what it last contributed.
    """

    requested_op: Array  # i32[] Op that the controller asked for; its cost is due whatever becomes of it
    slot: Array  # i32[] the slot that the action targeted
    succeeded: Array  # bool[] the op was legal, passed its gate and was executed
    # The slot before the action.
    has_seed: Array  # bool[] a seed is in the slot, fossils included; not in cooldown
    stage: Array  # i32[] Stage
    epochs_in_stage: Array  # i32[]
    seed_age: Array  # i32[] epochs measured since germination
    # The seed that was there before the action, as measured most recently.
    contribution: Array  # f32[] score minus the score with this slot off
    contribution_valid: Array  # bool[]
    germination_score: Array  # f32[] score when the seed was germinated
    germination_score_valid: Array  # bool[]
    stage_improvement: Array  # f32[] score minus the score when the present stage was entered
    stage_improvement_valid: Array  # bool[]
    interaction_sum: Array  # f32[] sum of its pair interactions
    interaction_valid: Array  # bool[]
    # The environment after the transition.
    total_improvement: Array  # f32[] score minus the score with all seeds off
    total_improvement_valid: Array  # bool[]
    val_score: Array  # f32[]
    committed_score: Array  # f32[] score with everything off that is not fossilised; read by `sparse` at the end
    best_score: Array  # f32[] of a perfect host
    contributing_fossils: Array  # i32[] so far in this episode, this transition's included (`is_contributing`)
    terminal: Array  # bool[] the episode ends with this transition
    host_params: Array  # f32[] parameters of the host
    slot_stage: Array  # i32[S] Stage
    slot_epochs_in_stage: Array  # i32[S]
    slot_alpha: Array  # f32[S]
    slot_params: Array  # f32[S] parameters of the seed with its gate
    # Kept from before the action.
    previous_potential: Array  # f32[] `potential` of the state that the action was chosen in
    previous_alpha: Array  # f32[S] 0 where no seed was
    previous_params: Array  # f32[S] 0 where no seed was

    @property
    def op(self) -> Array:
        """i32[] the op that took place: WAIT when the requested one was refused."""
        return jnp.where(self.succeeded, self.requested_op, Op.WAIT)

    @property
    def on_fossil(self) -> Array:
        """bool[] the targeted seed is fossilised: nothing is left to decide about it."""
        return self.has_seed & (self.stage == Stage.FOSSILIZED)

    @property
    def measured(self) -> Array:
        """bool[] the targeted slot has a seed whose contribution is known."""
        return self.has_seed & self.contribution_valid

    @property
    def known_contribution(self) -> Array:
        """f32[] `contribution`, 0 where unknown, so that no arithmetic touches an invalid value."""
        return jnp.where(self.measured, self.contribution, 0.0)

    @property
    def known_improvement(self) -> Array:
        """f32[] `total_improvement`, 0 where unknown."""
        return jnp.where(self.total_improvement_valid, self.total_improvement, 0.0)


SEED_FIELDS = (
    "has_seed", "stage", "epochs_in_stage", "seed_age", "contribution", "contribution_valid", "germination_score",
    "germination_score_valid", "stage_improvement", "stage_improvement_valid", "interaction_sum",
    "interaction_valid",
)  # fmt: skip


@struct.dataclass
class RewardComponents:
    """Summands of a reward, f32[] each, costs negative; a mode leaves 0 in what it does not pay."""

    attribution: Array  # includes the ratio penalty
    blending_warning: Array
    holding_warning: Array
    shaping: Array
    synergy: Array
    compute_rent: Array
    alpha_shock: Array
    occupancy_rent: Array
    fossilized_rent: Array
    action_cost: Array
    action_shaping: Array  # includes the bonus for fossilising a contributing seed
    terminal: Array
    death_penalty: Array = struct.field(default_factory=lambda: jnp.float32(0))  # of a rollback, see `death`
    gain: Array = struct.field(default_factory=lambda: jnp.float32(0))  # change of the gain over the twin, see `paired`
    size: Array = struct.field(default_factory=lambda: jnp.float32(0))  # change of the price of what is blended in
    harvest: Array = struct.field(default_factory=lambda: jnp.float32(0))  # the last value becomes what is kept

    @classmethod
    def zeros(cls) -> RewardComponents:
        return cls(**{name: jnp.float32(0) for name in cls.__dataclass_fields__})

    def total(self) -> Array:
        """f32[] the reward."""
        return sum(jax.tree.leaves(self))


def death(penalty: float, clip: float) -> RewardComponents:
    """The reward of a transition that the governor had to undo: `-penalty` within +-clip, and nothing else."""
    return RewardComponents.zeros().replace(death_penalty=jnp.clip(jnp.float32(-penalty), -clip, clip))


def _float(count: Array) -> Array:
    return jnp.asarray(count, jnp.float32)


# Potential-based shaping (Ng, Harada and Russell, 1999).


def stage_potential(stage: Array, epochs_in_stage: Array) -> Array:
    """Potential of a seed: its stage's, and a bonus of 0.3 per epoch in it up to 2.0. Any shape."""
    base = jnp.asarray(STAGE_POTENTIAL, jnp.float32)[stage]
    return base + jnp.clip(EPOCH_BONUS * _float(epochs_in_stage), 0.0, MAX_EPOCH_BONUS)


def potential(stage: Array, epochs_in_stage: Array) -> Array:
    """Potential of an environment: sum over slots, i32[S] and i32[S] -> f32[].

    Empty slots and cooldown count 0. FOSSILIZED is absorbing: 6.0 however long it lasts.
    """
    epochs = jnp.where(stage == Stage.FOSSILIZED, 0, epochs_in_stage)
    return jnp.sum(jnp.where(_occupied(stage), stage_potential(stage, epochs), 0.0))


def shaping(weight: Array, gamma: Array, phi_next: Array, phi_previous: Array) -> Array:
    """`weight * (gamma * phi_next - phi_previous)`; pass 0 for the potential of a terminal state.

    Over an episode the discounted sum is -weight times the first state's potential, whatever was done in it.
    """
    return weight * (gamma * phi_next - phi_previous)


# Attribution: what the targeted seed is worth.


def attribution_discount(inputs: RewardInputs) -> Array:
    """f32[] in (0, 1]: 1 unless the seeds as a whole hurt, then `sigmoid(3 * total_improvement)`."""
    improvement = inputs.known_improvement
    hurts = inputs.measured & (improvement < 0)
    return jnp.where(hurts, jax.nn.sigmoid(DISCOUNT_STEEPNESS * improvement), 1.0)


def ratio_penalty(inputs: RewardInputs, discount: Array) -> Array:
    """f32[] <= 0 for a seed that claims far more than all seeds together improve ("ransomware").

    A host can grow dependent on a seed: removing it then hurts although it never helped. From five times the total
    improvement the penalty grows by 0.1 per further fivefold, up to 0.3; with no total improvement to speak of, it
    grows with the contribution itself.
    """
    contribution, improvement = inputs.known_contribution, inputs.known_improvement
    excess = jnp.maximum(contribution / jnp.maximum(improvement, SAFE_IMPROVEMENT) - SUSPICIOUS_RATIO, 0.0)
    by_ratio = jnp.minimum(RATIO_SLOPE * excess / SUSPICIOUS_RATIO, MAX_RATIO_PENALTY)
    unexplained = MAX_RATIO_PENALTY * jnp.clip(contribution / UNEXPLAINED_SCALE, 0.0, 1.0)
    penalty = -jnp.where(improvement > SAFE_IMPROVEMENT, by_ratio, unexplained)
    suspicious = (contribution > SUSPICIOUS_CONTRIBUTION) & (discount >= DISCOUNT_THRESHOLD)
    return jnp.where(suspicious & inputs.total_improvement_valid, penalty, 0.0)


def progress_bound(progress: Array, contribution: Array, formula: str) -> Array:
    """Value of a seed from observed progress and measured contribution, 0 unless both are positive. f32[].

    `harmonic`: their harmonic mean, hence below twice the smaller; `minimum`: the smaller.

    Raises:
      ValueError: for another formula.
    """
    p, c = jnp.maximum(progress, 0.0), jnp.maximum(contribution, 0.0)
    if formula == "harmonic":
        return 2 * p * c / jnp.maximum(p + c, 1e-8)
    if formula == "minimum":
        return jnp.minimum(p, c)
    raise ValueError(f"attribution formula {formula!r}: must be harmonic or minimum")


def measured_attribution(inputs: RewardInputs, weights: RewardWeights, discount: Array, formula: str) -> Array:
    """f32[] credit for the measured contribution, bounded by the progress since germination.

    A harmful seed gives its whole contribution; a helpful one half of it when the progress is unknown, all of it when
    it is less than the progress, otherwise `progress_bound`, each times the discount.
    """
    contribution = inputs.known_contribution
    progress = jnp.where(inputs.germination_score_valid, inputs.val_score - inputs.germination_score, 0.0)
    bounded = jnp.where(contribution < progress, contribution, progress_bound(progress, contribution, formula))
    value = jnp.where(inputs.germination_score_valid, bounded, contribution / 2)
    return weights.contribution_weight * jnp.where(contribution < 0, contribution, discount * value)


def proxy_attribution(inputs: RewardInputs, weights: RewardWeights) -> Array:
    """f32[] >= 0 credit before a contribution was measured: the gain in the present stage, from BLENDING on."""
    gain = jnp.where(inputs.stage_improvement_valid, jnp.maximum(inputs.stage_improvement, 0.0), 0.0)
    return jnp.where(inputs.stage >= Stage.BLENDING, weights.contribution_weight * weights.proxy_factor * gain, 0.0)


def attribution(inputs: RewardInputs, weights: RewardWeights, formula: str) -> Array:
    """f32[] credit for the targeted seed, ratio penalty included; 0 without a seed and for a fossil.

    FOSSILIZE while the seeds as a whole hurt earns none; PRUNE turns the sign, since it throws the value away. The
    penalty is added after that, so it never becomes a bonus.
    """
    discount = attribution_discount(inputs)
    measured = measured_attribution(inputs, weights, discount, formula)
    credit = jnp.where(inputs.contribution_valid, measured, proxy_attribution(inputs, weights))
    harmful = inputs.total_improvement_valid & (inputs.known_improvement < 0)
    credit = jnp.where((inputs.op == Op.FOSSILIZE) & harmful, 0.0, credit)
    credit = jnp.where(inputs.op == Op.PRUNE, -credit, credit) + ratio_penalty(inputs, discount)
    return jnp.where(inputs.has_seed & ~inputs.on_fossil, credit, 0.0)


# Warnings and synergy of the targeted seed.


def blending_warning(inputs: RewardInputs) -> Array:
    """f32[] in [-0.4, 0] while a seed is blended in although the seeds as a whole hurt; grows with the epochs."""
    growth = jnp.minimum(BLENDING_WARNING_SLOPE * _float(inputs.epochs_in_stage), MAX_BLENDING_GROWTH)
    harmful = inputs.total_improvement_valid & (inputs.known_improvement < 0)
    blending = inputs.has_seed & (inputs.stage == Stage.BLENDING)
    return jnp.where(blending & harmful, -BLENDING_WARNING - growth, 0.0)


def holding_warning(inputs: RewardInputs, attribution: Array) -> Array:
    """f32[] in [-0.3, 0] for drawing attribution from a held seed, from the second epoch, without deciding on it."""
    late = _float(jnp.maximum(inputs.epochs_in_stage - HOLDING_GRACE_EPOCHS, 0))
    size = jnp.minimum(HOLDING_WARNING + HOLDING_WARNING_SLOPE * late, MAX_HOLDING_WARNING)
    held = inputs.has_seed & (inputs.stage == Stage.HOLDING) & (inputs.epochs_in_stage >= HOLDING_GRACE_EPOCHS)
    decided = (inputs.op == Op.FOSSILIZE) | (inputs.op == Op.PRUNE)
    return jnp.where(held & ~decided & (attribution > 0), -size, 0.0)


def synergy_value(interaction_sum: Array, weights: RewardWeights) -> Array:
    """f32[] `weight * tanh(0.5 * interactions)` for positive interactions, else 0."""
    return weights.synergy_weight * jnp.tanh(SYNERGY_STEEPNESS * jnp.maximum(interaction_sum, 0.0))


def synergy(inputs: RewardInputs, weights: RewardWeights, discount: Array, attribution: Array) -> Array:
    """f32[] >= 0 for a seed that works better together with others, if it earns its attribution honestly."""
    honest = (discount >= DISCOUNT_THRESHOLD) & (attribution > 0)
    interactions = jnp.where(inputs.interaction_valid, inputs.interaction_sum, 0.0)
    return jnp.where(inputs.has_seed & honest, synergy_value(interactions, weights), 0.0)


# What all slots cost.


def _occupied(stage: Array) -> Array:
    return (stage >= Stage.GERMINATED) & (stage <= Stage.FOSSILIZED)


def effective_params(alpha: Array, seed_params: Array, live: Array, host_params: Array, base_ratio: Array) -> Array:
    """Parameters in effect, f32[]: per live slot a share of the host's and alpha times the seed's. Arrays are [S]."""
    return jnp.sum(jnp.where(live, base_ratio * host_params + alpha * seed_params, 0.0))


def alpha_energy(alpha: Array, previous_alpha: Array, previous_seed_params: Array, host_params: Array) -> Array:
    """Squared alpha change, weighted with the seeds' former size relative to the host's. f32[S], `host_params` > 0."""
    return jnp.sum(jnp.square(alpha - previous_alpha) * previous_seed_params) / host_params


def compute_rent(params: Array, host_params: Array, weights: RewardWeights) -> Array:
    """f32[] <= 0: `-min(weight * log(1 + params / max(host_params, floor)), max_rent)`; free without params."""
    growth = jnp.maximum(params, 0.0) / _rent_base(host_params, weights)
    return jnp.where(host_params > 0, -jnp.minimum(weights.rent_weight * jnp.log1p(growth), weights.max_rent), 0.0)


def alpha_shock(energy: Array, weights: RewardWeights) -> Array:
    """f32[] <= 0 for changing the network abruptly."""
    return -jnp.minimum(weights.alpha_shock_coef * energy, weights.max_alpha_shock)


def occupancy_rent(occupied: Array, weights: RewardWeights) -> Array:
    """f32[] <= 0 for each occupied slot, fossils included, beyond the free ones; i32[] count."""
    return -weights.occupancy_cost * jnp.maximum(_float(occupied) - weights.free_slots, 0.0)


def fossilized_rent(fossils: Array, weights: RewardWeights) -> Array:
    """f32[] <= 0 for each fossil; i32[] count."""
    return -weights.fossil_maintenance_cost * _float(fossils)


def _rent_base(host_params: Array, weights: RewardWeights) -> Array:
    return jnp.maximum(jnp.maximum(host_params, weights.rent_host_floor), 1.0)


# The action.


def action_cost(requested_op: Array, weights: RewardWeights) -> Array:
    """f32[] <= 0, due for asking. WAIT and ADVANCE are free."""
    costs = [
        0.0,
        weights.germinate_cost,
        weights.set_alpha_target_cost,
        weights.prune_cost,
        weights.fossilize_cost,
        0.0,
    ]
    return -jnp.stack([jnp.float32(cost) for cost in costs])[requested_op]


def legitimacy(inputs: RewardInputs) -> Array:
    """f32[] in [0, 1]: share of the epochs that a seed should have been held before it is fossilised."""
    return jnp.minimum(_float(inputs.epochs_in_stage) / MIN_HOLDING_EPOCHS, 1.0)


def is_contributing(op: Array, total_improvement: Array, total_improvement_valid: Array) -> Array:
    """bool[] this transition added a fossil that counts: FOSSILIZE took place with at least 1 point of improvement."""
    return (op == Op.FOSSILIZE) & total_improvement_valid & (total_improvement >= MIN_FOSSILIZE_CONTRIBUTION)


def fossilize_shaping(inputs: RewardInputs) -> Array:
    """f32[] what FOSSILIZE earns: up to 0.5 + 0.1 per point contributed; negative when the seeds as a whole hurt."""
    contribution, improvement = inputs.known_contribution, inputs.known_improvement
    ransom = inputs.measured & (contribution > RANSOM_CONTRIBUTION) & (improvement < RANSOM_IMPROVEMENT)
    harm = FOSSILIZE_HARMFUL - jnp.minimum(FOSSILIZE_HARMFUL_SLOPE * jnp.abs(improvement), MAX_FOSSILIZE_HARM)
    harm = harm + jnp.where(ransom, FOSSILIZE_RANSOM, 0.0)
    earned = (FOSSILIZE_BASE + FOSSILIZE_SCALE * contribution) * legitimacy(inputs)
    contributes = inputs.measured & (contribution >= MIN_FOSSILIZE_CONTRIBUTION)
    value = jnp.where(improvement < 0, harm, jnp.where(contributes, earned, FOSSILIZE_NONCONTRIBUTING))
    held = inputs.has_seed & (inputs.stage == Stage.HOLDING)
    return jnp.where(held & inputs.total_improvement_valid, value, FOSSILIZE_INVALID)


def fossilize_bonus(inputs: RewardInputs, weights: RewardWeights) -> Array:
    """f32[] >= 0 paid at once for a contributing fossil (`scale * tanh(1/3)`), so that credit need not wait."""
    bonus = weights.fossilize_terminal_scale * jnp.tanh(1.0 / FOSSILIZE_QUALITY_CEILING) * legitimacy(inputs)
    held = inputs.has_seed & (inputs.stage == Stage.HOLDING)
    helps = inputs.total_improvement_valid & (inputs.known_improvement >= 0)
    contributes = inputs.measured & (inputs.known_contribution >= MIN_FOSSILIZE_CONTRIBUTION)
    return jnp.where(held & helps & contributes, bonus, 0.0)


def prune_shaping(inputs: RewardInputs, weights: RewardWeights) -> Array:
    """f32[] what PRUNE earns: a bonus for a harmful seed, a penalty for a useful, young or fossilised one."""
    contribution, age = inputs.known_contribution, _float(inputs.seed_age)
    hurting = jnp.where(age < PRUNE_BONUS_AGE, PRUNE_EARLY, PRUNE_HURTING)
    good = jnp.maximum(PRUNE_GOOD - PRUNE_GOOD_SLOPE * contribution, MIN_PRUNE_GOOD)
    judged = jnp.where(contribution < 0, PRUNE_ACCEPTABLE, good)
    judged = jnp.where(contribution < PRUNE_HURTING_CONTRIBUTION, hurting, judged)
    unmeasured = jnp.where(age < PRUNE_UNMEASURED_AGE, PRUNE_EARLY, 0.0)
    value = jnp.where(inputs.measured, judged, unmeasured)
    value = jnp.where(age < weights.min_prune_age, PRUNE_TOO_YOUNG * (weights.min_prune_age - age), value)
    value = jnp.where(inputs.on_fossil, PRUNE_FOSSIL, value)
    return jnp.where(inputs.has_seed, value, PRUNE_NOTHING)


def action_shaping(inputs: RewardInputs, weights: RewardWeights) -> Array:
    """f32[] what the op that took place earns by itself."""
    op = inputs.op
    training = inputs.has_seed & (inputs.stage == Stage.TRAINING)
    value = jnp.where((op == Op.ADVANCE) & training, ADVANCE_FROM_TRAINING, 0.0)
    value = jnp.where((op == Op.GERMINATE) & inputs.has_seed, GERMINATE_OCCUPIED, value)
    value = jnp.where(op == Op.PRUNE, prune_shaping(inputs, weights), value)
    return jnp.where(op == Op.FOSSILIZE, fossilize_shaping(inputs) + fossilize_bonus(inputs, weights), value)


# The end of an episode.


def terminal_score(inputs: RewardInputs, weights: RewardWeights) -> Array:
    """f32[] `weight * score` on the terminal transition, else 0."""
    return jnp.where(inputs.terminal, weights.terminal_score_weight * inputs.val_score, 0.0)


def sparse_terminal(score: Array, best: Array, params: Array, weights: RewardWeights) -> Array:
    """f32[] in [-1, 1]: score as a fraction of the best one, less the price of the parameters that were kept."""
    cost = weights.param_penalty_weight * params / weights.param_budget
    return jnp.clip(score / best - cost, -1.0, 1.0)


# Modes.


def _environment_shaping(inputs: RewardInputs, weights: RewardWeights) -> Array:
    phi_next = jnp.where(inputs.terminal, 0.0, potential(inputs.slot_stage, inputs.slot_epochs_in_stage))
    return shaping(weights.shaping_weight, weights.gamma, phi_next, inputs.previous_potential)


def _shaped(inputs: RewardInputs, weights: RewardWeights, formula: str) -> RewardComponents:
    occupied = _occupied(inputs.slot_stage)
    fossils = inputs.slot_stage == Stage.FOSSILIZED
    alpha = jnp.where(occupied, inputs.slot_alpha, 0.0)
    pays = occupied & (inputs.slot_stage >= Stage.BLENDING)
    params = effective_params(alpha, inputs.slot_params, pays, inputs.host_params, weights.base_slot_rent_ratio)
    base = _rent_base(inputs.host_params, weights)
    energy = alpha_energy(alpha, inputs.previous_alpha, inputs.previous_params, base)

    def judge(seed, targeted):
        """Terms of one seed; for a seed that the action did not target nothing took place."""
        one = inputs.replace(**seed, succeeded=inputs.succeeded & targeted)
        credit = attribution(one, weights, formula)
        together = synergy(one, weights, attribution_discount(one), credit)
        return credit, blending_warning(one), holding_warning(one, credit), together

    seeds = {name: jnp.atleast_1d(getattr(inputs, name)) for name in SEED_FIELDS}
    targeted = jnp.arange(seeds["stage"].shape[0], dtype=jnp.int32) == inputs.slot
    credit, blending, holding, together = (jnp.sum(term) for term in jax.vmap(judge)(seeds, targeted))
    target = inputs.replace(**{name: leaf[inputs.slot] for name, leaf in seeds.items()})
    return RewardComponents(
        attribution=credit,
        blending_warning=blending,
        holding_warning=holding,
        shaping=_environment_shaping(inputs, weights),
        synergy=together,
        compute_rent=compute_rent(params, inputs.host_params, weights),
        alpha_shock=alpha_shock(energy, weights),
        occupancy_rent=occupancy_rent(jnp.sum(occupied), weights),
        fossilized_rent=fossilized_rent(jnp.sum(fossils), weights),
        action_cost=action_cost(inputs.requested_op, weights),
        action_shaping=action_shaping(target, weights),
        terminal=terminal_score(inputs, weights),
    )


def _simplified(inputs: RewardInputs, weights: RewardWeights) -> RewardComponents:
    score = SIMPLIFIED_SCORE_WEIGHT * inputs.val_score / inputs.best_score
    end = score + SIMPLIFIED_FOSSIL_WEIGHT * _float(inputs.contributing_fossils)
    return RewardComponents.zeros().replace(
        shaping=_environment_shaping(inputs, weights),
        action_cost=jnp.where(inputs.requested_op == Op.WAIT, 0.0, -SIMPLIFIED_ACTION_COST),
        terminal=jnp.where(inputs.terminal, end, 0.0),
    )


def _sparse(inputs: RewardInputs, weights: RewardWeights) -> RewardComponents:
    kept = jnp.sum(jnp.where(inputs.slot_stage == Stage.FOSSILIZED, inputs.slot_params, 0.0))
    end = sparse_terminal(inputs.committed_score, inputs.best_score, kept, weights)
    return RewardComponents.zeros().replace(terminal=jnp.where(inputs.terminal, end, 0.0))


@struct.dataclass
class Course:
    """What `paired` reads of an episode, or of a stretch of one; fields of `StepInfo`. Losses may be non-finite."""

    val_loss: Array  # f32[T]
    committed_loss: Array  # f32[T] with everything off that is not fossilised
    blended_size: Array  # f32[T] parameters of the host and of the seeds that are blended in, relative to the host
    committed_size: Array  # f32[T] of the host and of the fossilised seeds, relative to the host
    accepted: Array  # bool[T] the governor took the loss
    panic: Array  # bool[T] the governor rolled the run back
    episode_over: Array  # bool[T] the episode ends with this row

    @classmethod
    def of(cls, record: Any) -> Course:
        """These fields of a larger record."""
        return cls(**{name: getattr(record, name) for name in cls.__dataclass_fields__})


def last_accepted(values: Array, accepted: Array) -> Array:
    """f32[T]: for each epoch the value of the last one whose loss the governor took (bool[T]); at first, the first."""
    return values[jax.lax.cummax(jnp.where(accepted, jnp.arange(values.shape[0], dtype=jnp.int32), 0))]


def paired(course: Course, twin_loss: Array, weights: RewardWeights, fine: RewardComponents) -> RewardComponents:
    """Rewards of an episode by its gain over the twin, the same keys without growth; components f32[T].

    With L the validation loss and n the parameters relative to the host's, an epoch is worth
    `v_t = loss_scale (L_twin,t - L_t) - price (n_t - 1)` and its transition pays `v_t - v_(t-1)`: a difference reward
    (Wolpert and Tumer, 2002) in the form of a potential, so an episode returns its last value and all that it shares
    with the twin (host, data order) cancels. It is exactly 0 until a seed is blended in. The last value is, to the
    share `harvest`, that of the committed network: what is not kept is worth nothing.

    Losses above `loss_cap`, and those that are not finite, count as `loss_cap`. An epoch whose loss the governor did
    not accept is worth what the last accepted one was, the network that would be kept too; one that it rolled back pays
    the fine besides. The first row has nothing before it and pays 0.

    Args:
      twin_loss: f32[T] of the twin in the same epochs; see `last_accepted`.
      fine: of a rollback, see `death`.
    """
    cap = lambda loss: jnp.where(jnp.isfinite(loss), jnp.minimum(loss, weights.loss_cap), weights.loss_cap)
    held = lambda value: last_accepted(value, course.accepted)
    ahead = lambda loss: weights.loss_scale * (cap(twin_loss) - cap(loss))
    cost = lambda params: -weights.price * (params - 1.0)
    change = lambda value: jnp.concatenate([jnp.zeros_like(value[:1]), jnp.diff(value)])

    gain, size = held(ahead(course.val_loss)), held(cost(course.blended_size))
    kept = held(ahead(course.committed_loss) + cost(course.committed_size))
    return jax.tree.map(lambda leaf: jnp.where(course.panic, leaf, 0.0), fine).replace(
        gain=change(gain),
        size=change(size),
        harvest=jnp.where(course.episode_over, weights.harvest * (kept - (gain + size)), 0.0),
    )


def reward(inputs: RewardInputs, weights: RewardWeights, mode: str, attribution: str) -> RewardComponents:
    """Reward of one realised transition, by component; `.total()` is the number.

    Args:
      inputs: of one environment.
      weights: traced.
      mode: static; `shaped` pays every term, `simplified` shaping, a flat cost per action and the final score,
        `sparse` only the final score of what was committed to, less its size; `paired` pays nothing here, since it
        needs the course of an episode and not only one transition (see the function of that name).
      attribution: static; `harmonic` or `minimum`, see `progress_bound`.

    Raises:
      ValueError: for another mode or attribution.
    """
    if mode == "paired":
        components = RewardComponents.zeros()
    elif mode == "shaped":
        components = _shaped(inputs, weights, attribution)
    elif mode == "simplified":
        components = _simplified(inputs, weights)
    elif mode == "sparse":
        components = _sparse(inputs, weights)
    else:
        raise ValueError(f"reward mode {mode!r}: must be paired, shaped, simplified or sparse")
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), components)
