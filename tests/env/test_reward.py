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
    contribution=np.nan, contribution_valid=False, germination_accuracy=np.nan, germination_accuracy_valid=False,
    stage_improvement=np.nan, stage_improvement_valid=False, interaction_sum=np.nan, interaction_valid=False,
    total_improvement=np.nan, total_improvement_valid=False, val_accuracy=50.0, committed_accuracy=50.0,
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
        has_seed=True, stage=Stage.BLENDING, epochs_in_stage=3, seed_age=8, contribution=3.0, val_accuracy=72.0,
        germination_accuracy=70.0, total_improvement=3.0, interaction_sum=0.8,
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
        requested_op=Op.FOSSILIZE, contribution=4.0, total_improvement=-2.0, val_accuracy=68.0,
        germination_accuracy=70.0, epochs_in_stage=3, slot_stage=[Stage.FOSSILIZED], slot_epochs_in_stage=[1],
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
        requested_op=Op.FOSSILIZE, contribution=2.0, total_improvement=2.0, val_accuracy=80.0, terminal=True,
        germination_accuracy=74.0, slot_stage=[Stage.FOSSILIZED], slot_epochs_in_stage=[1], slot_params=[8000.0],
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
        requested_op=Op.PRUNE, contribution=6.0, total_improvement=0.8, val_accuracy=71.0, germination_accuracy=70.2,
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
    x = held(contribution=3.0, val_accuracy=75.0, germination_accuracy=71.0, total_improvement=3.0)
    assert SHAPED(x).holding_warning == pytest.approx(-0.2)
    assert SHAPED(x).total() == pytest.approx(2.858468, abs=1e-5)


def test_harmful_seed_in_blending():
    # E7: c = -0.7 is a full penalty, J = -0.4 < 0 in the second epoch: warning -0.1 - 0.1
    x = make(
        has_seed=True, stage=Stage.BLENDING, epochs_in_stage=2, contribution=-0.7, total_improvement=-0.4,
        val_accuracy=64.0, germination_accuracy=64.4,
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
        terminal=True, val_accuracy=90.0, committed_accuracy=82.0, slot_stage=[Stage.FOSSILIZED, Stage.HOLDING],
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
    x = held(requested_op=Op.FOSSILIZE, val_accuracy=80.0, contributing_fossils=1, terminal=True)
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
    x = held(contribution=3.0, val_accuracy=75.0, germination_accuracy=71.0, total_improvement=3.0)
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
        val_accuracy=draw(st.floats(0, 100, width=32)), committed_accuracy=draw(st.floats(0, 100, width=32)),
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
    changes |= {"germination_accuracy": value, "germination_accuracy_valid": not np.isnan(value)}
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
    progress = x.val_accuracy - x.germination_accuracy
    if x.measured and x.germination_accuracy_valid and x.op != Op.PRUNE:
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
    base = R.sparse_terminal(accuracy, params, WEIGHTS)
    assert R.sparse_terminal(accuracy + better, params, WEIGHTS) >= base
    assert R.sparse_terminal(accuracy, params + more, WEIGHTS) <= base


def test_minimum_never_pays_more_than_harmonic():
    p, c = jnp.meshgrid(jnp.linspace(-2, 10, 25), jnp.linspace(-2, 10, 25))
    harmonic, minimum = R.progress_bound(p, c, "harmonic"), R.progress_bound(p, c, "minimum")
    assert (minimum <= harmonic + 1e-6).all() and (harmonic <= 2 * minimum + 1e-6).all()
    assert R.progress_bound(2.0, 3.0, "harmonic") == pytest.approx(2.4)


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
    for mode in ("shaped", "simplified", "sparse"):
        for leaf in jax.tree.leaves(R.reward(held(), WEIGHTS, mode, "harmonic")):
            assert leaf.dtype == jnp.float32 and leaf.shape == () and not leaf.weak_type


def test_unknown_mode_and_formula_are_refused():
    with pytest.raises(ValueError, match="escrow"):
        R.reward(held(), WEIGHTS, "escrow", "harmonic")
    with pytest.raises(ValueError, match="geometric"):
        R.reward(held(), WEIGHTS, "shaped", "geometric")
