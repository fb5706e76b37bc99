"""Terms, modes and the whole reward; the examples are the reference's, worked out for the mended formulas."""

import chex
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from esper_jax.config import RewardConfig
from esper_jax.env import reward as R
from esper_jax.types import Op, Stage

GAMMA = 0.995
WEIGHTS = R.RewardWeights.from_config(RewardConfig(), GAMMA)
SHAPED = jax.jit(lambda x, w=WEIGHTS: R.reward(x, w, "shaped", "harmonic"))
LIVE = (Stage.GERMINATED, Stage.TRAINING, Stage.BLENDING, Stage.HOLDING, Stage.FOSSILIZED)
FIELDS = dict(
    requested_op=Op.WAIT, slot=0, succeeded=True, has_seed=False, stage=Stage.DORMANT, epochs_in_stage=0, seed_age=0,
    contribution=np.nan, contribution_valid=False, germination_score=np.nan, germination_score_valid=False,
    stage_improvement=np.nan, stage_improvement_valid=False, interaction_sum=np.nan, interaction_valid=False,
    total_improvement=np.nan, total_improvement_valid=False, val_score=50.0, committed_score=50.0, best_score=100.0,
    contributing_fossils=0, terminal=False, host_params=100_000.0, slot_stage=[Stage.DORMANT],
    slot_epochs_in_stage=[0], slot_alpha=[0.0], slot_params=[0.0], previous_potential=0.0, previous_alpha=[0.0],
    previous_params=[0.0],
)  # fmt: skip


def make(**changes):
    """Inputs of a host without seeds, one slot, WAIT; a value that is given is valid."""
    fields = FIELDS | changes
    for name in changes:
        flag = f"{name.removesuffix('_sum')}_valid"
        if flag in FIELDS:
            fields[flag] = changes.get(flag, True)
    out = {}
    for name, value in fields.items():
        default = np.asarray(FIELDS[name])
        kind = {"f": jnp.float32, "i": jnp.int32, "b": jnp.bool_}[default.dtype.kind]
        out[name] = jnp.asarray(value, kind)
    return R.RewardInputs(**out)


def held(**changes):
    """A held seed of 4000 parameters at alpha 1, unchanged by the transition but for its 4th epoch."""
    state = dict(
        has_seed=True, stage=Stage.HOLDING, epochs_in_stage=4, seed_age=12, slot_stage=[Stage.HOLDING],
        slot_epochs_in_stage=[4], slot_alpha=[1.0], slot_params=[4000.0], previous_alpha=[1.0],
        previous_params=[4000.0], previous_potential=5.5 + 0.9,
    )  # fmt: skip
    return make(**(state | changes))


# Worked examples.


def test_helpful_seed_in_blending():
    # E1 without the timing discount, and beside it a fossil without parameters.
    # p = 72 - 70 = 2 < c = 3: B = 2*2*3/5 = 2.4.  F = 0.3(0.995(4.4 + 6) - (4.1 + 6)) = 0.0744
    # Y = 0.1 tanh(0.4) = 0.0379949.  P_e = 390 + 0.6*5000 + 390 = 3780: rent = 0.5 ln(1.0378) = 0.0185515
    # D = 0.04*5000/100000 = 0.002: shock = 0.0003916.  Two slots occupied: 0.01, one fossil: 0.002
    x = make(
        has_seed=True, stage=Stage.BLENDING, epochs_in_stage=3, seed_age=8, contribution=3.0, val_score=72.0,
        germination_score=70.0, total_improvement=3.0, interaction_sum=0.8,
        slot_stage=[Stage.BLENDING, Stage.FOSSILIZED], slot_epochs_in_stage=[3, 9], slot_alpha=[0.6, 1.0],
        slot_params=[5000.0, 0.0], previous_alpha=[0.4, 1.0], previous_params=[5000.0, 0.0],
        previous_potential=3.5 + 0.6 + 6.0,
    )  # fmt: skip
    expected = R.RewardComponents.zeros().replace(
        attribution=2.4, shaping=0.0744, synergy=0.0379949, compute_rent=-0.0185515, alpha_shock=-0.0003916,
        occupancy_rent=-0.01, fossilized_rent=-0.002,
    )  # fmt: skip
    chex.assert_trees_all_close(SHAPED(x), expected, atol=1e-5)
    assert SHAPED(x).total() == pytest.approx(2.4814518, abs=1e-5)


def test_ransomware_seed_fossilised():
    # E2: c = 4, J = -2: B = 0, f = -0.5 - 0.4 - 0.3 = -1.2, cost 0.01. HOLDING for 3 epochs becomes FOSSILIZED:
    # F = 0.3(0.995*6 - 6.4) = -0.129.  rent = 0.5 ln(1 + (390 + 8000)/100000) = 0.040283; one fossil
    x = held(
        requested_op=Op.FOSSILIZE, contribution=4.0, total_improvement=-2.0, val_score=68.0,
        germination_score=70.0, epochs_in_stage=3, slot_stage=[Stage.FOSSILIZED], slot_epochs_in_stage=[1],
        slot_params=[8000.0], previous_params=[8000.0],
    )  # fmt: skip
    got = SHAPED(x)
    assert got.attribution == 0 and got.synergy == 0 and got.holding_warning == 0
    assert got.action_shaping == pytest.approx(-1.2, abs=1e-6)
    assert got.total() == pytest.approx(-1.2 - 0.01 - 0.129 - 0.040283 - 0.002, abs=1e-5)


def test_good_seed_fossilised_at_the_end():
    # E3: c = 2 < p = 6: B = 2. n = 4: f = 0.7*0.8 = 0.56, bonus 3 tanh(1/3)*0.8 = 0.771631, cost 0.01
    # terminal: F = 0.3(0 - 6.4) = -1.92, accuracy 0.05*80 = 4; rent 0.5 ln(1.0839); one fossil
    x = held(
        requested_op=Op.FOSSILIZE, contribution=2.0, total_improvement=2.0, val_score=80.0, terminal=True,
        germination_score=74.0, slot_stage=[Stage.FOSSILIZED], slot_epochs_in_stage=[1], slot_params=[8000.0],
        previous_params=[8000.0],
    )  # fmt: skip
    got = SHAPED(x)
    assert got.action_shaping == pytest.approx(0.56 + 0.771631, abs=1e-5)
    assert got.terminal == pytest.approx(4.0) and got.shaping == pytest.approx(-1.92, abs=1e-5)
    assert got.total() == pytest.approx(2 + 1.331631 - 0.01 - 1.92 + 4 - 0.040283 - 0.002, abs=1e-5)


def test_prune_of_a_good_but_suspicious_seed():
    # E4: c = 6, J = 0.8: r = 7.5, penalty 0.1*2.5/5 = 0.05. p = 0.8: M = 2*0.8*6/6.8 = 1.411765, sign turned
    # g = max(-0.3 - 0.3, -0.9) = -0.6, cost 0.005; the slot is empty afterwards: no rent, F = 0.3(0 - 6.1) = -1.83
    # alpha 0.5 -> 0 of 4000 parameters: shock 0.1958*0.25*0.04 = 0.001958
    x = held(
        requested_op=Op.PRUNE, contribution=6.0, total_improvement=0.8, val_score=71.0, germination_score=70.2,
        epochs_in_stage=2, slot_stage=[Stage.PRUNED], slot_epochs_in_stage=[1], slot_alpha=[0.0], slot_params=[0.0],
        previous_alpha=[0.5], previous_potential=5.5 + 0.6,
    )  # fmt: skip
    expected = R.RewardComponents.zeros().replace(
        attribution=-1.411765 - 0.05, shaping=-1.83, alpha_shock=-0.001958, action_cost=-0.005, action_shaping=-0.6,
    )  # fmt: skip
    chex.assert_trees_all_close(SHAPED(x), expected, atol=2e-5)


def test_germination():
    # E5: 0.3*0.995*1.0 = 0.2985 for the new seed's potential, cost 0.02; the first slot is free and pays no rent yet
    x = make(requested_op=Op.GERMINATE, slot_stage=[Stage.GERMINATED], slot_epochs_in_stage=[0], slot_params=[4000.0])
    assert SHAPED(x).total() == pytest.approx(0.2785, abs=1e-6)


def test_waiting_in_holding():
    # E6: the reference's number exactly: B = 3 (c < p), F = 0.07995, rent = 0.5 ln(1.0439) = 0.021482, warning -0.20
    x = held(contribution=3.0, val_score=75.0, germination_score=71.0, total_improvement=3.0)
    assert SHAPED(x).holding_warning == pytest.approx(-0.2)
    assert SHAPED(x).total() == pytest.approx(2.858468, abs=1e-5)


def test_harmful_seed_in_blending():
    # E7: c = -0.7 is a full penalty, J = -0.4 < 0 in the second epoch: warning -0.1 - 0.1
    x = make(
        has_seed=True, stage=Stage.BLENDING, epochs_in_stage=2, contribution=-0.7, total_improvement=-0.4,
        val_score=64.0, germination_score=64.4,
    )  # fmt: skip
    assert SHAPED(x).attribution == pytest.approx(-0.7)
    assert SHAPED(x).blending_warning == pytest.approx(-0.2)


def test_proxy_before_the_first_measurement():
    # E8: nothing in TRAINING; from BLENDING 0.3 times the gain in the stage, never below 0
    x = make(has_seed=True, stage=Stage.TRAINING, epochs_in_stage=2, stage_improvement=0.8)
    assert SHAPED(x).attribution == 0
    blending = x.replace(stage=jnp.int32(Stage.BLENDING))
    assert SHAPED(blending).attribution == pytest.approx(0.24)
    assert SHAPED(blending.replace(stage_improvement=jnp.float32(-0.8))).attribution == 0


def test_sparse():
    # E11: 2.5 (0.82 - 0.1*600000/500000) = 1.75; here the scale is 1 and seeds that are not fossils cost nothing
    x = make(
        terminal=True, val_score=90.0, committed_score=82.0, slot_stage=[Stage.FOSSILIZED, Stage.HOLDING],
        slot_epochs_in_stage=[1, 1], slot_alpha=[1.0, 1.0], slot_params=[600_000.0, 1e6], previous_alpha=[1.0, 1.0],
        previous_params=[600_000.0, 1e6],
    )  # fmt: skip
    got = R.reward(x, WEIGHTS, "sparse", "harmonic")
    assert 2.5 * got.total() == pytest.approx(1.75, abs=1e-5)
    assert got.total() == got.terminal
    early = R.reward(x.replace(terminal=jnp.bool_(False)), WEIGHTS, "sparse", "harmonic")
    chex.assert_trees_all_equal(early, R.RewardComponents.zeros())


def test_simplified():
    # E11 with the environment's potential: F = 0.3(0 - 6.4) = -1.92, -0.01, 3*0.8 + 2*1
    x = held(requested_op=Op.FOSSILIZE, val_score=80.0, contributing_fossils=1, terminal=True)
    got = R.reward(x, WEIGHTS, "simplified", "harmonic")
    assert got.total() == pytest.approx(-1.92 - 0.01 + 2.4 + 2.0, abs=1e-5)


# Terms.


def test_attribution_discount_values():
    for improvement, expected in [
        (0.0, 1.0),
        (5.0, 1.0),
        (-0.1, 0.4256),
        (-0.5, 0.1824),
        (-1.0, 0.0474),
        (-2, 0.00247),
    ]:
        x = make(has_seed=True, contribution=1.0, total_improvement=improvement)
        assert R.attribution_discount(x) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    "contribution, improvement, expected",
    [(5, 1, 0), (10, 1, -0.1), (20, 1, -0.3), (50, 1, -0.3), (5, 0.05, -0.15), (30, 0, -0.3), (1, 0, 0), (9, -1, 0)],
)
def test_ratio_penalty_values(contribution, improvement, expected):
    x = make(has_seed=True, contribution=contribution, total_improvement=improvement)
    assert R.ratio_penalty(x, R.attribution_discount(x)) == pytest.approx(expected, abs=1e-6)


def test_warning_tables():
    blending = [make(has_seed=True, stage=Stage.BLENDING, epochs_in_stage=n, total_improvement=-1.0) for n in (1, 3, 9)]
    assert [float(R.blending_warning(x)) for x in blending] == pytest.approx([-0.15, -0.25, -0.40])
    warnings = [float(R.holding_warning(held(epochs_in_stage=n), jnp.float32(1))) for n in range(8)]
    assert warnings == pytest.approx([0, 0, -0.10, -0.15, -0.20, -0.25, -0.30, -0.30])
    assert R.holding_warning(held(), jnp.float32(0)) == 0
    for op in (Op.FOSSILIZE, Op.PRUNE):
        assert R.holding_warning(held(requested_op=op), jnp.float32(1)) == 0
        assert R.holding_warning(held(requested_op=op, succeeded=False), jnp.float32(1)) == pytest.approx(-0.2)


@pytest.mark.parametrize(
    "changes, expected",
    [
        (dict(has_seed=False), -0.2),
        (dict(stage=Stage.FOSSILIZED), -1.0),
        (dict(seed_age=0), -0.3),  # one epoch short
        (dict(seed_age=4), -0.1),  # unmeasured and young
        (dict(seed_age=5), 0.0),
        (dict(seed_age=2, contribution=-1.0), -0.1),
        (dict(seed_age=3, contribution=-1.0), 0.15),
        (dict(contribution=-0.5), 0.1),
        (dict(contribution=0.0), -0.3),
        (dict(contribution=4.0), -0.5),
        (dict(contribution=12.0), -0.9),
        (dict(contribution=50.0), -0.9),
    ],
)
def test_prune_shaping_table(changes, expected):
    assert R.prune_shaping(held(**changes), WEIGHTS) == pytest.approx(expected)


@pytest.mark.parametrize(
    "changes, expected",
    [
        (dict(has_seed=False, total_improvement=1.0), -1.0),
        (dict(stage=Stage.BLENDING, total_improvement=1.0), -1.0),
        (dict(contribution=2.0), -1.0),  # the environment's improvement was never measured
        (dict(total_improvement=1.0), -0.2),
        (dict(contribution=0.9, total_improvement=1.0), -0.2),
        (dict(contribution=2.0, total_improvement=1.0), 0.7 * 0.8),
        (dict(contribution=2.0, total_improvement=1.0, epochs_in_stage=9), 0.7),
        (dict(contribution=0.05, total_improvement=-1.0), -0.7),
        (dict(contribution=2.0, total_improvement=-0.1), -0.52),
        (dict(contribution=2.0, total_improvement=-9.0), -1.8),
    ],
)
def test_fossilize_shaping_table(changes, expected):
    assert R.fossilize_shaping(held(**changes)) == pytest.approx(expected)


def test_rent_is_monotone_and_capped():
    params = jnp.array([0.0, 1e3, 1e4, 1e5, 1e7, 1e9])
    rent = R.compute_rent(params, jnp.float32(1e5), WEIGHTS)
    assert rent[0] == 0 and rent[-1] == -1.5
    assert (jnp.diff(rent) <= 0).all()
    assert rent[3] == pytest.approx(-0.5 * np.log(2), abs=1e-6)
    # a host of 77 parameters pays as one of 200
    assert R.compute_rent(200.0, jnp.float32(77.0), WEIGHTS) == pytest.approx(-0.5 * np.log(2), abs=1e-6)
    assert R.compute_rent(200.0, jnp.float32(0.0), WEIGHTS) == 0


def test_effective_params_and_energy():
    alpha, params = jnp.array([0.6, 1.0, 0.9]), jnp.array([5000.0, 2000.0, 700.0])
    # 0.0039*100000*2 + 3000 + 2000
    live = jnp.array([True, True, False])
    assert R.effective_params(alpha, params, live, 1e5, 0.0039) == pytest.approx(5780.0)
    # (0.04*5000 + 1*2000)/1e5
    assert R.alpha_energy(alpha, jnp.array([0.4, 0.0, 0.9]), params, 1e5) == pytest.approx(0.022)
    assert R.alpha_shock(jnp.float32(100.0), WEIGHTS) == -1.0


def test_cooldown_occupies_nothing():
    slots = dict(slot_epochs_in_stage=[1] * 4, slot_alpha=[0.0] * 4, slot_params=[0.0] * 4)
    kept = dict(previous_alpha=[0.0] * 4, previous_params=[0.0] * 4)
    cooling = make(slot_stage=[Stage.PRUNED, Stage.EMBARGOED, Stage.RESETTING, Stage.DORMANT], **slots, **kept)
    assert SHAPED(cooling).occupancy_rent == 0 and SHAPED(cooling).compute_rent == 0
    occupied = make(slot_stage=[Stage.GERMINATED, Stage.FOSSILIZED, Stage.FOSSILIZED, Stage.TRAINING], **slots, **kept)
    assert SHAPED(occupied).occupancy_rent == pytest.approx(-0.03)
    assert SHAPED(occupied).fossilized_rent == pytest.approx(-0.004)


def test_contributing_fossils():
    ops = jnp.array([Op.FOSSILIZE, Op.FOSSILIZE, Op.FOSSILIZE, Op.PRUNE])
    improvement, valid = jnp.array([1.0, 0.99, 5.0, 5.0]), jnp.array([True, True, False, True])
    np.testing.assert_array_equal(R.is_contributing(ops, improvement, valid), [True, False, False, False])


# Properties.


def test_refused_op_is_wait_but_for_its_cost():
    x = held(contribution=3.0, val_score=75.0, germination_score=71.0, total_improvement=3.0)
    costs = {Op.GERMINATE: 0.02, Op.SET_ALPHA_TARGET: 0.005, Op.PRUNE: 0.005, Op.FOSSILIZE: 0.01, Op.ADVANCE: 0.0}
    for op, cost in costs.items():
        refused = SHAPED(x.replace(requested_op=jnp.int32(op), succeeded=jnp.bool_(False)))
        assert refused.action_cost == pytest.approx(-cost)
        chex.assert_trees_all_equal(refused.replace(action_cost=jnp.float32(0)), SHAPED(x))


def test_unmeasured_is_not_zero():
    measured = held(requested_op=Op.PRUNE, contribution=0.0)
    unknown = held(requested_op=Op.PRUNE)
    assert SHAPED(measured).action_shaping == pytest.approx(-0.3)
    assert SHAPED(unknown).action_shaping == 0
    proxied = make(has_seed=True, stage=Stage.BLENDING, stage_improvement=1.0)
    assert SHAPED(proxied).attribution > 0
    measured = proxied.replace(contribution=jnp.float32(0), contribution_valid=jnp.bool_(True))
    assert SHAPED(measured).attribution == 0


def test_potential_of_an_environment():
    stage = jnp.array([Stage.TRAINING, Stage.FOSSILIZED, Stage.EMBARGOED, Stage.DORMANT])
    # 2 + 0.9, 6 for ever, cooldown and empty 0
    assert R.potential(stage, jnp.array([3, 40, 4, 7])) == pytest.approx(8.9)
    # the epochs' bonus ends at 2.0
    assert R.potential(stage[:1], jnp.array([40])) == pytest.approx(4.0)


POTENTIALS = jax.jit(jax.vmap(R.potential))
seed_life = st.lists(st.tuples(st.sampled_from(list(Stage)), st.integers(0, 30)), min_size=3, max_size=3)


@settings(deadline=None, max_examples=30)
@given(st.lists(seed_life, min_size=12, max_size=12))
def test_shaping_telescopes(path):
    """Whatever is done, a whole episode's discounted shaping is minus the first potential: zero from an empty host."""
    empty = [(Stage.DORMANT, 0)] * 3
    stage, epochs = np.moveaxis(np.array([empty, *path], np.int32), -1, 0)
    phi = np.asarray(POTENTIALS(jnp.asarray(stage), jnp.asarray(epochs)))
    following = np.append(phi[1:], 0.0)
    paid = R.shaping(0.3, GAMMA, following, phi)
    assert sum(GAMMA**t * float(f) for t, f in enumerate(paid)) == pytest.approx(0.0, abs=1e-4)


def test_germinating_and_pruning_nets_nothing():
    # DORMANT -> GERMINATED (1) -> TRAINING 1..3 -> PRUNED -> EMBARGOED -> DORMANT, paid through the reward itself
    life = [(Stage.DORMANT, 0), (Stage.GERMINATED, 0), (Stage.TRAINING, 1), (Stage.TRAINING, 2), (Stage.TRAINING, 3)]
    life += [(Stage.PRUNED, 0), (Stage.EMBARGOED, 2), (Stage.DORMANT, 0)]
    paid, previous = [], 0.0
    for stage, epochs in life[1:]:
        x = make(slot_stage=[stage], slot_epochs_in_stage=[epochs], previous_potential=previous)
        paid.append(float(SHAPED(x).shaping))
        previous = float(R.potential(x.slot_stage, x.slot_epochs_in_stage))
    assert paid[0] == pytest.approx(0.3 * GAMMA)
    assert sum(GAMMA**t * f for t, f in enumerate(paid)) == pytest.approx(0.0, abs=1e-5)


points = st.floats(-20, 40, width=32)
flag = st.booleans()


@st.composite
def any_inputs(draw):
    pick = lambda strategy: [draw(strategy) for _ in range(3)]
    maybe = lambda: draw(st.one_of(st.just(float("nan")), points))
    alphas, sizes = st.floats(0, 1, width=32), st.floats(0, 1e6, width=32)
    stages = st.sampled_from([stage for stage in Stage if stage != Stage.UNKNOWN])
    changes = dict(
        requested_op=draw(st.sampled_from(list(Op))), succeeded=draw(flag), has_seed=draw(flag),
        stage=draw(st.sampled_from(LIVE)), epochs_in_stage=draw(st.integers(0, 40)), seed_age=draw(st.integers(0, 40)),
        val_score=draw(st.floats(0, 100, width=32)), committed_score=draw(st.floats(0, 100, width=32)),
        contributing_fossils=draw(st.integers(0, 4)), terminal=draw(flag),
        host_params=draw(st.floats(1, 1e6, width=32)), slot_stage=pick(stages),
        slot_epochs_in_stage=pick(st.integers(0, 40)), slot_alpha=pick(alphas), slot_params=pick(sizes),
        previous_potential=draw(st.floats(0, 22, width=32)), previous_alpha=pick(alphas), previous_params=pick(sizes),
    )  # fmt: skip
    measured = ["contribution", "stage_improvement", "interaction_sum", "total_improvement"]
    for name in measured:
        value = maybe()
        valid = f"{name.removesuffix('_sum')}_valid"
        changes |= {name: value, valid: not np.isnan(value)}
    value = maybe()
    changes |= {"germination_score": value, "germination_score_valid": not np.isnan(value)}
    return make(**changes)


SIMPLIFIED = jax.jit(lambda x: R.reward(x, WEIGHTS, "simplified", "harmonic"))
SPARSE = jax.jit(lambda x: R.reward(x, WEIGHTS, "sparse", "harmonic"))
BEFORE_PENALTY = jax.jit(lambda x: R.attribution(x, WEIGHTS, "harmonic") - PENALTY(x))
PENALTY = jax.jit(lambda x: R.ratio_penalty(x, R.attribution_discount(x)))


@settings(deadline=None, max_examples=80)
@given(any_inputs())
def test_any_transition(x):
    for compute in (SHAPED, SIMPLIFIED, SPARSE):
        got = compute(x)
        parts = [float(part) for part in jax.tree.leaves(got)]
        assert np.isfinite(parts).all()
        assert float(got.total()) == pytest.approx(sum(parts), abs=1e-4)
        assert abs(got.total()) <= 80
        if not x.terminal:
            assert got.terminal == 0
    assert abs(SPARSE(x).total()) <= 1

    got = SHAPED(x)
    costs = ["compute_rent", "alpha_shock", "occupancy_rent", "fossilized_rent", "action_cost"]
    warnings = ["blending_warning", "holding_warning"]
    assert all(getattr(got, name) <= 0 for name in costs + warnings)
    assert got.synergy >= 0 and PENALTY(x) <= 0
    if x.on_fossil or not x.has_seed:
        assert got.attribution == 0
    progress = x.val_score - x.germination_score
    if x.measured and x.germination_score_valid and x.op != Op.PRUNE:
        if progress <= 0:
            assert got.attribution <= 0
        else:
            assert got.attribution <= 2 * progress + 1e-4
    if x.measured and x.total_improvement_valid and x.total_improvement < -0.2 and x.contribution > 1:
        # useful by itself in an environment that its seeds have made worse: little credit, and none for keeping it
        assert got.synergy == 0 and got.attribution <= 0.36 * x.contribution
        if x.op == Op.FOSSILIZE:
            assert got.attribution <= 0 and got.action_shaping <= -0.8


@settings(deadline=None, max_examples=40)
@given(any_inputs())
def test_prune_turns_the_sign_of_the_credit(x):
    if x.has_seed and x.stage != Stage.FOSSILIZED:
        x = x.replace(succeeded=jnp.bool_(True))
        waited = BEFORE_PENALTY(x.replace(requested_op=jnp.int32(Op.WAIT)))
        pruned = BEFORE_PENALTY(x.replace(requested_op=jnp.int32(Op.PRUNE)))
        assert float(pruned) == pytest.approx(-float(waited), abs=1e-4)


@settings(deadline=None, max_examples=40)
@given(st.floats(0, 100), st.floats(0, 2e6), st.floats(0, 10), st.floats(0, 1e5))
def test_sparse_is_monotone(accuracy, params, better, more):
    base = R.sparse_terminal(accuracy, 100.0, params, WEIGHTS)
    assert R.sparse_terminal(accuracy + better, 100.0, params, WEIGHTS) >= base
    assert R.sparse_terminal(accuracy, 100.0, params + more, WEIGHTS) <= base


def test_minimum_never_pays_more_than_harmonic():
    p, c = jnp.meshgrid(jnp.linspace(-2, 10, 25), jnp.linspace(-2, 10, 25))
    harmonic, minimum = R.progress_bound(p, c, "harmonic"), R.progress_bound(p, c, "minimum")
    assert (minimum <= harmonic + 1e-6).all() and (harmonic <= 2 * minimum + 1e-6).all()
    assert R.progress_bound(2.0, 3.0, "harmonic") == pytest.approx(2.4)


# The reward `paired`: loss_scale 30, loss_cap 10, price .5, harvest 1; a rollback costs 10.

FINE = R.death(10.0, 10.0)
PAIRED = jax.jit(R.paired)
NAN = float("nan")


def course(loss, size=1.0, kept=None, kept_size=1.0, **flags):
    """An episode of len(loss) epochs; what is kept is the host alone, whose loss is the first, unless it is said."""
    n = len(loss)
    row = lambda value: jnp.asarray(np.broadcast_to(np.asarray(value, np.float32), n))
    marks = lambda name, value: jnp.asarray(flags.get(name, [value] * n), bool)
    over = flags.get("episode_over", [False] * (n - 1) + [True])
    return R.Course(
        val_loss=row(loss), committed_loss=row(loss[0] if kept is None else kept), blended_size=row(size),
        committed_size=row(kept_size), accepted=marks("accepted", True), panic=marks("panic", False),
        episode_over=jnp.asarray(over, bool),
    )  # fmt: skip


def pay(given, twin, fine=FINE, **weights):
    n = given.val_loss.shape[0]
    twin = jnp.asarray(np.broadcast_to(np.asarray(twin, np.float32), n))
    weights = WEIGHTS.replace(**{name: jnp.float32(x) for name, x in weights.items()})
    return jax.device_get(PAIRED(given, twin, weights, fine))


def test_value_of_an_epoch():
    # Twin 1.5 throughout. Losses 1.5, 1.4, 1.2 of 1, 1.5 and 1.5 hosts: the values of the epochs are
    #   v0 = 0;  v1 = 30 * .1 - .5 * .5 = 2.75;  v2 = 30 * .3 - .25 = 8.75
    # and the transitions pay v1 - v0 = 3 - .25 and v2 - v1 = 6. Half of what is grown is kept, with a loss of 1.3 and
    # 1.2 hosts: 30 * .2 - .1 = 5.9, so the harvest is 5.9 - 8.75 = -2.85.
    lived = course([1.5, 1.4, 1.2], [1, 1.5, 1.5], kept=[1.5, 1.5, 1.3], kept_size=[1, 1, 1.2])
    got = pay(lived, 1.5)
    np.testing.assert_allclose(got.gain, [0, 3, 6], atol=1e-5)
    np.testing.assert_allclose(got.size, [0, -0.25, 0], atol=1e-6)
    np.testing.assert_allclose(got.harvest, [0, 0, -2.85], atol=1e-5)
    np.testing.assert_allclose(got.total(), [0, 2.75, 3.15], atol=1e-5)
    others = got.replace(gain=0.0, size=0.0, harvest=0.0)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(others))
    # The twin falls as well, to 1.45 and 1.3: v1 = 30 * .05 - .25 = 1.25;  v2 = 30 * .1 - .25 = 2.75; kept -.1.
    np.testing.assert_allclose(pay(lived, [1.5, 1.45, 1.3]).total(), [0, 1.25, 1.5 - 2.85], atol=1e-5)


@pytest.mark.parametrize("harvest, total", [(0.0, 8.75), (0.5, 7.325), (1.0, 5.9)])
def test_share_of_the_harvest(harvest, total):
    # Of the episode above: nothing, half or all of the last value 8.75 becomes that of what is kept, 5.9.
    lived = course([1.5, 1.4, 1.2], [1, 1.5, 1.5], kept=[1.5, 1.5, 1.3], kept_size=[1, 1, 1.2])
    assert pay(lived, 1.5, harvest=harvest).total().sum() == pytest.approx(total, abs=1e-5)
    # An episode that is not over has not been harvested.
    going_on = lived.replace(episode_over=jnp.zeros(3, bool))
    assert not np.any(pay(going_on, 1.5, harvest=harvest).harvest)


def test_what_is_not_kept_is_worth_nothing():
    # 3 nats better than the twin, and all of it gone at the end: the host alone has the twin's loss.
    lived = course([2.0, 1.0, 0.5], [1, 2, 2], kept=[2.0, 2.5, 2.5])
    got = pay(lived, [2.0, 2.5, 2.5])
    assert got.total()[1:].tolist() == pytest.approx([44.5, 15.0 - 59.5], abs=1e-4)
    assert got.total().sum() == pytest.approx(0.0, abs=1e-4)


losses = st.one_of(st.floats(0, 14, width=32), st.sampled_from([NAN, float("inf"), -float("inf")]))


def value(loss, twin, size):
    """What an epoch is worth, once more in double precision."""
    cap = lambda x: min(float(x), 10.0) if np.isfinite(x) else 10.0
    return 30 * (cap(twin) - cap(loss)) - 0.5 * (float(size) - 1)


@st.composite
def any_episode(draw):
    """Eight epochs of anything that begin beside the twin: losses, sizes, epochs that are not accepted."""
    n, sizes = 8, st.floats(1, 6, width=32)
    several = lambda strategy: draw(st.lists(strategy, min_size=n, max_size=n))
    loss, twin, kept, size, kept_size = map(several, (losses, losses, losses, sizes, sizes))
    loss[0], size[0] = twin[0], 1.0
    accepted = [True, *several(st.booleans())[1:]]
    return course(loss, size, kept=kept, kept_size=kept_size, accepted=accepted), np.array(twin, np.float32)


@settings(deadline=None, max_examples=60)
@given(any_episode(), st.sampled_from([0.0, 0.5, 1.0]))
def test_an_episode_returns_its_last_value(episode, harvest):
    """The transitions telescope to the value of the last accepted epoch, or of what would have been kept after it."""
    lived, twin = episode
    got = pay(lived, twin, harvest=harvest)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(got))
    last = np.flatnonzero(lived.accepted)[-1]
    live = value(lived.val_loss[last], twin[last], lived.blended_size[last])
    kept = value(lived.committed_loss[last], twin[last], lived.committed_size[last])
    total = np.asarray(got.total(), np.float64).sum()
    assert total == pytest.approx((1 - harvest) * live + harvest * kept, abs=2e-3)
    # and so for the epochs up to any that was accepted
    for t in np.flatnonzero(lived.accepted)[:-1]:
        so_far = np.asarray(got.total(), np.float64)[: t + 1].sum()
        assert so_far == pytest.approx(value(lived.val_loss[t], twin[t], lived.blended_size[t]), abs=2e-3)


@settings(deadline=None, max_examples=40)
@given(st.lists(losses, min_size=8, max_size=8), st.integers(1, 8), st.lists(st.booleans(), min_size=8, max_size=8))
def test_exactly_zero_beside_the_twin(loss, blended, accepted):
    """Bitwise, while nothing is blended in and the loss is the twin's, whatever that is and whatever is accepted."""
    twin = np.array(loss, np.float32)
    there = np.arange(8) >= blended
    mine = np.where(there, np.float32(0.5), twin)
    got = pay(course(mine, 1 + 0.7 * there, kept=twin, accepted=accepted), twin)
    before = jax.tree.map(lambda leaf: leaf[:blended], got)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(before)) and (before.total() == 0).all()
    if blended < 8 and accepted[-1] and np.nan_to_num(twin[-1], nan=10) > 1:
        assert got.gain[blended:].any()


def test_losses_are_capped():
    # Twin 2. Losses 2, 9, 11, inf, nan count as 2, 9, 10, 10, 10: values 0, -210, -240, -240, -240.
    lived = course([2, 9, 11, float("inf"), NAN], kept=2.0, episode_over=[False] * 5)
    np.testing.assert_allclose(pay(lived, 2.0).gain, [0, -210, -30, 0, 0], atol=1e-4)
    # The twin's too: 2, 12, nan, inf and 3 count as 2, 10, 10, 10, 3, against 1 throughout after the first.
    lived = course([2, 1, 1, 1, 1], episode_over=[False] * 5)
    np.testing.assert_allclose(pay(lived, [2, 12, NAN, float("inf"), 3]).gain, [0, 270, 0, 0, -210], atol=1e-4)
    # And that of what is kept: with a cap of 4, 30 * (2 - 4) instead of 30 * (2 - 1).
    lived = course([2, 1], kept=[2, NAN])
    assert pay(lived, 2.0, loss_cap=4.0).total().sum() == pytest.approx(-60.0)


def test_an_epoch_that_was_not_accepted_is_worth_what_the_last_one_was():
    # Twin 1. Losses 1, .9, (5), (nan), .8 of 1, 1.4, 1.6, 1.6, 1.6 hosts: values 0, 3 - .2, again, again, 6 - .3.
    lived = course(
        [1, 0.9, 5, NAN, 0.8],
        [1, 1.4, 1.6, 1.6, 1.6],
        episode_over=[False] * 5,
        accepted=[True, True, False, False, True],
    )
    got = pay(lived, 1.0)
    np.testing.assert_allclose(got.gain, [0, 3, 0, 0, 3], atol=1e-5)
    np.testing.assert_allclose(got.size, [0, -0.2, 0, 0, -0.1], atol=1e-6)
    # What the twin does meanwhile is not paid either, but afterwards.
    got = pay(lived, [1, 1, 3, 3, 1.5])
    np.testing.assert_allclose(got.gain, [0, 3, 0, 0, 30 * 0.7 - 3], atol=1e-5)


def test_a_rollback_pays_the_fine_and_nothing_else():
    # Twin 1. The third epoch is rolled back: -10 instead of anything; the fourth starts from the value before, 2.8, and
    # is the restored host's: 30 * (1 - 1.1) = -3. The last value is 30 * (1 - .9) = 3; the return is 3 - 10.
    lived = course(
        [1, 0.9, NAN, 1.1, 0.9], [1, 1.4, 1.4, 1, 1], kept=[1, 1, NAN, 1.1, 0.9],
        accepted=[True, True, False, True, True], panic=[False, False, True, False, False],
    )  # fmt: skip
    got = pay(lived, 1.0)
    np.testing.assert_allclose(got.total(), [0, 2.8, -10, -5.8, 6], atol=1e-5)
    assert got.total().sum() == pytest.approx(3.0 - 10.0, abs=1e-5)
    chex.assert_trees_all_equal(jax.tree.map(lambda leaf: leaf[2], got), FINE)
    np.testing.assert_array_equal(got.death_penalty, [0, 0, -10, 0, 0])
    # In the last epoch too, beside the harvest: nothing was kept at the last accepted one, so its 2.8 are taken back.
    ends = course([1, 0.9, NAN], [1, 1.4, 1.4], kept=[1, 1, NAN], accepted=[1, 1, 0], panic=[0, 0, 1])
    got = pay(ends, 1.0)
    np.testing.assert_allclose([got.harvest[2], got.death_penalty[2], got.total()[2]], [-2.8, -10, -12.8], atol=1e-5)
    assert got.total().sum() == pytest.approx(-10.0, abs=1e-5)
    # another fine is another number
    assert pay(ends, 1.0, R.death(4.0, 10.0)).death_penalty[2] == -4


def test_a_grid_of_weights_compiles_once():
    """27 triples of scale, price and harvest side by side: each pays `harvest` of the kept value and the rest live."""
    lived = course([1.5, 1.4, 1.2], [1, 1.5, 1.5], kept=[1.5, 1.5, 1.3], kept_size=[1, 1, 1.2])
    traced = chex.assert_max_traces(lambda w: R.paired(lived, jnp.full(3, 1.5), w, FINE).total().sum(), n=1)
    grid = jax.jit(jax.vmap(traced))
    spread = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, 27), WEIGHTS)
    for scales in ((10.0, 20.0, 30.0), (1.0, 2.0, 3.0)):
        scale, price, harvest = (x.ravel() for x in np.meshgrid(scales, (0.0, 0.5, 2.0), (0.0, 0.5, 1.0)))
        f32 = lambda x: jnp.asarray(x, jnp.float32)
        got = grid(spread.replace(loss_scale=f32(scale), price=f32(price), harvest=f32(harvest)))
        expected = (1 - harvest) * (0.3 * scale - 0.5 * price) + harvest * (0.2 * scale - 0.2 * price)
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_one_transition_alone_is_not_paid_by_the_twin():
    """`reward` knows no course: in the mode `paired` it pays nothing."""
    got = R.reward(held(requested_op=Op.FOSSILIZE, contribution=2.0, terminal=True), WEIGHTS, "paired", "harmonic")
    chex.assert_trees_all_equal(got, R.RewardComponents.zeros())


# Form.


def test_invalid_values_never_reach_a_gradient():
    """A sweep over weights may differentiate the reward: what is masked out stays out."""
    grads = jax.jit(jax.grad(lambda w: R.reward(held(), w, "shaped", "harmonic").total()))(WEIGHTS)
    chex.assert_tree_all_finite(grads)


def test_weights_are_traced_and_the_reward_maps():
    traced = chex.assert_max_traces(lambda x, w: R.reward(x, w, "shaped", "minimum").total(), n=1)
    compiled = jax.jit(jax.vmap(traced, (0, None)))
    batch = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), held(contribution=3.0, total_improvement=1.0))
    one = compiled(batch, WEIGHTS)
    two = compiled(batch, WEIGHTS.replace(contribution_weight=jnp.float32(2.0)))
    assert one.shape == (2,) and (two > one).all()


def test_components_are_float32():
    for mode in ("paired", "shaped", "simplified", "sparse"):
        for leaf in jax.tree.leaves(R.reward(held(), WEIGHTS, mode, "harmonic")):
            assert leaf.dtype == jnp.float32 and leaf.shape == () and not leaf.weak_type
    for leaf in jax.tree.leaves(PAIRED(course([1.0, 0.5]), jnp.ones(2), WEIGHTS, FINE)):
        assert leaf.dtype == jnp.float32 and leaf.shape == (2,) and not leaf.weak_type


def test_unknown_mode_and_formula_are_refused():
    with pytest.raises(ValueError, match="escrow"):
        R.reward(held(), WEIGHTS, "escrow", "harmonic")
    with pytest.raises(ValueError, match="geometric"):
        R.reward(held(), WEIGHTS, "shaped", "geometric")
