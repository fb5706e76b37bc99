"""Reward terms against the reference, row by row: `head` is the system whose formulas the terms follow.

Three things are mended on purpose and therefore put back here before a comparison: the reference scales positive credit
and the germination by a timing discount, pays the potential per targeted slot (so GERMINATE and PRUNE carry shares
of it), and prunes from age 5. The hindsight table (case1) has no counterpart.
"""

import functools

import golden
import jax
import jax.numpy as jnp
import numpy as np

from esper_jax.config import RewardConfig
from esper_jax.env import reward as R
from esper_jax.types import Op, Stage

each_row_file = golden.each_case("reward_components", lambda case: "in/action" in case)
FORMULAS = ("harmonic", "minimum")
HEAD = dict(germinate_cost=0.15, min_prune_age=5.0)
SEED = dict(max_rent=8.0, rent_host_floor=0.0, max_alpha_shock=np.inf)
GAMMA = 0.995


def weights(**changes):
    base = R.RewardWeights.from_config(RewardConfig(), GAMMA)
    return base.replace(**{name: jnp.float32(value) for name, value in changes.items()})


def inputs(case):
    """RewardInputs with a leading row axis and one slot; NaN stays in the invalid entries on purpose."""
    given = golden.sub(case, "in")
    f = lambda name: jnp.asarray(given[name], jnp.float32)
    i = lambda name: jnp.asarray(given[name], jnp.int32)
    valid = lambda name: jnp.asarray(np.isfinite(given[name]))
    slot = jnp.zeros((len(given["action"]), 1))
    return R.RewardInputs(
        requested_op=i("action"),
        slot=jnp.zeros_like(i("action")),
        succeeded=jnp.ones_like(i("action"), bool),
        has_seed=i("has_seed") == 1,
        stage=i("stage"),
        epochs_in_stage=i("epochs_in_stage"),
        seed_age=i("seed_age_epochs"),
        contribution=f("seed_contribution"),
        contribution_valid=valid("seed_contribution"),
        germination_score=f("acc_at_germination"),
        germination_score_valid=valid("acc_at_germination"),
        stage_improvement=f("improvement_since_stage_start"),
        stage_improvement_valid=valid("improvement_since_stage_start"),
        interaction_sum=f("interaction_sum"),
        interaction_valid=valid("interaction_sum"),
        total_improvement=f("counterfactual_total_improvement"),
        total_improvement_valid=valid("counterfactual_total_improvement"),
        val_score=f("val_acc"),
        committed_score=f("val_acc"),
        best_score=jnp.full_like(f("val_acc"), 100.0),
        contributing_fossils=i("num_contributing_fossilized"),
        terminal=i("epoch") == i("max_epochs"),
        host_params=f("host_params"),
        slot_stage=slot.astype(jnp.int32),
        slot_epochs_in_stage=slot.astype(jnp.int32),
        slot_alpha=slot,
        slot_params=slot,
        previous_potential=slot[:, 0],
        previous_alpha=slot,
        previous_params=slot,
    )


def close(actual, case, name, where=None):
    """float32 against the reference's float64: 1e-5 relative.

    The absolute part covers progress, the difference of two float32 accuracies of up to 100 points (rounded by 4e-6
    each) which the harmonic bound can double.
    """
    expected = case[name]
    where = np.isfinite(expected) if where is None else where & np.isfinite(expected)
    golden.close(np.asarray(actual)[where], expected[where], name, rtol=1e-5, atol=2e-5)


def by_formula(case, function):
    """Apply `function(formula)` and pick each row's own."""
    results = [np.asarray(function(formula)) for formula in FORMULAS]
    return np.where(case["in/attribution_formula"] == 1, results[1], results[0])


def overhead(case):
    given = golden.sub(case, "in")
    without = np.maximum(given["total_params"] - given["host_params"], 0)
    return jnp.asarray(np.where(np.isfinite(given["effective_seed_params"]), given["effective_seed_params"], without))


def slot_shaping(case):
    """The reference's potential difference of the targeted slot."""
    given = {name: jnp.asarray(case[f"in/{name}"]) for name in ("stage", "epochs_in_stage")}
    stage, epochs = given["stage"], given["epochs_in_stage"]
    before = R.stage_potential(jnp.asarray(case["in/previous_stage"]), jnp.asarray(case["in/previous_epochs_in_stage"]))
    previous = jnp.where(epochs == 0, before, R.stage_potential(stage, jnp.maximum(epochs - 1, 0)))
    w = weights()
    return R.shaping(w.shaping_weight, w.gamma, R.stage_potential(stage, epochs), previous)


def head_components(case):
    """Every component of the reference's total, from our terms and the three mended things put back."""
    x, w = inputs(case), weights(**HEAD)
    rows = jax.vmap
    discount = rows(R.attribution_discount)(x)
    penalty = np.where(x.has_seed & ~x.on_fossil, rows(R.ratio_penalty)(x, discount), 0.0)
    ours = by_formula(case, lambda formula: rows(lambda x: R.attribution(x, w, formula))(x))
    timed = np.where(x.measured & (x.known_contribution >= 0), case["head/timing_discount"], 1.0)
    attribution = (ours - penalty) * timed + penalty
    credit = jnp.asarray(attribution, jnp.float32)

    op = case["in/action"]
    potential = R.stage_potential(x.stage, x.epochs_in_stage)
    departure = w.shaping_weight * w.gamma * R.stage_potential(Stage.GERMINATED, 0)
    departs = (op == Op.GERMINATE) & ~np.asarray(x.has_seed) & ~np.asarray(x.terminal)
    action = rows(R.action_shaping, (0, None))(x, w) + rows(R.action_cost, (0, None))(x.requested_op, w)
    action = action + np.where(departs, departure * case["head/fn/germinate_timing_discount"], 0.0)
    action = action - np.where((op == Op.PRUNE) & x.has_seed, w.shaping_weight * potential, 0.0)

    fossils = jnp.asarray(case["in/num_fossilized_seeds"])
    occupied = jnp.asarray(case["in/n_active_seeds"]) + fossils
    return {
        "bounded_attribution": attribution,
        "blending_warning": rows(R.blending_warning)(x),
        "holding_warning": rows(R.holding_warning)(x, credit),
        "pbrs_bonus": np.where(x.has_seed, slot_shaping(case), 0.0),
        "synergy_bonus": rows(R.synergy, (0, None, 0, 0))(x, w, discount, credit),
        "compute_rent": R.compute_rent(overhead(case), x.host_params, w),
        "alpha_shock": R.alpha_shock(jnp.asarray(case["in/alpha_delta_sq_sum"]), w),
        "occupancy_rent": -R.occupancy_rent(occupied, w),
        "fossilized_rent": -R.fossilized_rent(fossils, w),
        "action_shaping": action,
        "terminal_bonus": rows(R.terminal_score, (0, None))(x, w),
    }


@each_row_file
def test_every_component_of_head(case):
    for name, actual in head_components(case).items():
        close(actual, case, f"head/{name}")


@each_row_file
def test_head_total_is_the_sum_of_the_components(case):
    parts = {name: np.asarray(value, np.float64) for name, value in head_components(case).items()}
    costs = parts.pop("occupancy_rent") + parts.pop("fossilized_rent")
    close(sum(parts.values()) - costs, case, "head/total_reward")


@each_row_file
def test_intermediate_numbers_of_head(case):
    x, w = inputs(case), weights(**HEAD)
    discount = jax.vmap(R.attribution_discount)(x)
    close(discount, case, "head/attribution_discount")
    close(jax.vmap(R.ratio_penalty)(x, discount), case, "head/ratio_penalty")
    growth = overhead(case) / np.maximum(x.host_params, w.rent_host_floor)
    close(growth, case, "head/growth_ratio")
    progress = x.val_score - x.germination_score
    close(progress, case, "head/progress_since_germination", np.asarray(x.has_seed))


@each_row_file
def test_single_functions_of_head(case):
    x, w = inputs(case), weights(**HEAD)
    close(jax.vmap(R.fossilize_shaping)(x), case, "head/fn/fossilize_shaping")
    close(jax.vmap(R.prune_shaping, (0, None))(x, w), case, "head/fn/prune_shaping")
    close(slot_shaping(case), case, "head/fn/pbrs")
    close(R.synergy_value(x.interaction_sum, w), case, "head/fn/synergy")
    progress = x.val_score - x.germination_score
    value = by_formula(case, functools.partial(R.progress_bound, progress, x.contribution))
    close(value, case, "head/fn/attributed_value")


@each_row_file
def test_what_the_earlier_reference_shares(case):
    """`seed`: rent without floor and with its own cap, shock without cap, potential, synergy, final accuracy."""
    x, w = inputs(case), weights(**SEED)
    close(R.compute_rent(overhead(case), x.host_params, w), case, "seed/compute_rent")
    close(R.alpha_shock(jnp.asarray(case["in/alpha_delta_sq_sum"]), w), case, "seed/alpha_shock")
    close(slot_shaping(case), case, "seed/fn/pbrs")
    close(R.synergy_value(x.interaction_sum, w), case, "seed/fn/synergy")
    accuracy = jax.vmap(R.terminal_score, (0, None))(x, w)
    close(np.asarray(accuracy) + case["seed/fossilize_terminal_bonus"], case, "seed/terminal_bonus")
