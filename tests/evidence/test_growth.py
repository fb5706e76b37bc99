"""Numbers about seeds, slots, rewards and decisions, each worked out by hand."""

import numpy as np
import pytest
import tiny_run
from made_run import run_arrays

from esper_jax.env import attribution
from esper_jax.evidence import growth, tables
from esper_jax.evidence.growth import Fate
from esper_jax.metric import ACCURACY, bits_per_character
from esper_jax.types import Op, Stage

D, G, T, B, F, P, E = (
    Stage.DORMANT, Stage.GERMINATED, Stage.TRAINING, Stage.BLENDING, Stage.FOSSILIZED, Stage.PRUNED, Stage.EMBARGOED,
)  # fmt: skip


def episodes(metric=ACCURACY):
    """One arm, three environments of six epochs, two slots; epochs are counted from 0.

    Environment 0: slot 0 germinates a `norm` at 1 that is kept; slot 1 a `conv_light` at 1 that is pruned, and one at 5
    that is open. Environment 1: slot 0 a `norm` at 2 that the governor takes out at 4. Environment 2: slot 0 was born
    with a fossil, which nobody germinated.
    """
    stage = [
        [[D, D], [G, G], [T, B], [B, P], [F, E], [F, G]],
        [[D, D], [D, D], [G, D], [T, D], [E, D], [E, D]],
        [[F, D]] * 6,
    ]
    kind = [[[-1, -1], [3, 1], [3, 1], [3, -1], [3, -1], [3, 1]], [[-1, -1]] * 2 + [[3, -1]] * 2 + [[-1, -1]] * 2]
    kind.append([[2, -1]] * 6)
    panic = np.zeros((1, 3, 6), bool)
    panic[0, 1, 4] = True
    contribution = np.full((1, 3, 6, 2), np.nan)
    contribution[0, 0, 3:5, 0] = 1.0, 4.0  # of the last epoch nothing is known
    contribution[0, 0, 2, 1] = -2.0
    contribution[0, 1, 3, 0] = 2.0
    return {
        "arms/names": np.array(["eager"]), "arms/blueprints": np.array(["noop", "conv_light", "attention", "norm"]),
        "arms/stage": np.array([stage], np.int8), "arms/blueprint": np.array([kind], np.int8), "arms/panic": panic,
        "arms/contribution": contribution, **tables.metric_arrays(metric),
    }  # fmt: skip


def test_lives_by_hand():
    arrays = episodes()
    got = growth.lives(arrays["arms/stage"], arrays["arms/blueprint"], arrays["arms/panic"])
    seeds = list(zip(*(field.tolist() for field in got), strict=True))
    # arm, environment, slot, born, last, kind, fate
    assert seeds == [
        (0, 0, 0, 1, 5, 3, Fate.KEPT),
        (0, 0, 1, 1, 2, 1, Fate.PRUNED),
        (0, 0, 1, 5, 5, 1, Fate.OPEN),
        (0, 1, 0, 2, 3, 3, Fate.ROLLED_BACK),
    ]


def test_survival_by_hand():
    norm, conv = sorted(growth.survival(episodes()), key=lambda row: row.blueprint, reverse=True)
    assert (norm.arm, norm.blueprint, norm.germinated, conv.blueprint, conv.germinated) == (
        "eager", "norm", 2, "conv_light", 2,
    )  # fmt: skip
    assert norm.fates == {Fate.KEPT: 1, Fate.PRUNED: 0, Fate.ROLLED_BACK: 1, Fate.OPEN: 0}
    assert conv.fates == {Fate.KEPT: 0, Fate.PRUNED: 1, Fate.ROLLED_BACK: 0, Fate.OPEN: 1}
    # 4 in environment 0, 2 in environment 1, nothing in environment 2: mean 3, standard error 1, t(1) = 12.706
    np.testing.assert_allclose(norm.contribution[:4], (3, 3 - 12.706, 3 + 12.706, 2), rtol=1e-4)
    # of the two in environment 0 one was measured: a mean without an interval
    assert conv.contribution.mean == -2 and np.isnan(conv.contribution.low)
    # a hundredth of a bit each
    of_text = {row.blueprint: row.contribution.mean for row in growth.survival(episodes(bits_per_character(64)))}
    assert of_text == pytest.approx({"norm": 0.03, "conv_light": -0.02})


def test_survival_without_contributions():
    arrays = episodes()
    del arrays["arms/contribution"]
    assert all(np.isnan(row.contribution.mean) for row in growth.survival(arrays))


def test_lives_are_counted_as_the_run_itself_counts_them():
    metrics = tiny_run.result().metrics
    seeds = growth.lives(metrics["arms/stage"], metrics["arms/blueprint"], metrics["arms/panic"])
    count = lambda where: np.histogram2d(
        seeds.arm[where], seeds.env[where], [np.arange(n + 1) for n in metrics["arms/germinated"].shape]
    )[0]
    np.testing.assert_array_equal(count(np.full(len(seeds.arm), True)), metrics["arms/germinated"])
    np.testing.assert_array_equal(count(seeds.fate == Fate.KEPT), metrics["arms/fossilised"])
    assert len(seeds.arm) > 0


def test_shapley_values_and_interaction_of_two_slots_by_hand():
    """v(none) = 10, v(0) = 13, v(1) = 14, v(both) = 22: slot 0 adds 3 or 8, slot 1 4 or 9; 22 - 13 - 14 + 10 = 5."""
    table = np.array([10.0, 13.0, 14.0, 22.0])
    np.testing.assert_allclose(growth.shapley_values(table), [5.5, 6.5])
    np.testing.assert_allclose(growth.interaction_index(table), [[np.nan, 5], [5, np.nan]])


def test_interaction_of_three_slots_by_hand():
    """v = 0, 1, 2, 5 without slot 2 and 3, 4, 9, 20 with it; a context of no and of one other slot weighs 1/2 each.

    Slots 0 and 1: 5 - 1 - 2 + 0 = 2 alone and 20 - 4 - 9 + 3 = 10 beside slot 2, mean 6.
    Slots 0 and 2: 4 - 1 - 3 + 0 = 0 and 20 - 5 - 9 + 2 = 8, mean 4.
    Slots 1 and 2: 9 - 2 - 3 + 0 = 4 and 20 - 5 - 4 + 1 = 12, mean 8.
    """
    table = np.array([0.0, 1, 2, 5, 3, 4, 9, 20])
    nan = np.nan
    np.testing.assert_allclose(growth.interaction_index(table), [[nan, 6, 4], [6, nan, 8], [4, 8, nan]])


@pytest.mark.parametrize("slots", [1, 2, 3, 4])
def test_shapley_values_are_those_of_the_run(slots):
    tables_ = np.random.default_rng(slots).normal(0, 1, (5, 2**slots)).astype(np.float32)
    got = growth.shapley_values(tables_)
    np.testing.assert_allclose(got, [attribution.shapley(table) for table in tables_], atol=1e-5)
    np.testing.assert_allclose(got.sum(-1), tables_[:, -1] - tables_[:, 0], atol=1e-5)
    assert growth.is_complete(tables_, slots)


def test_many_slots_by_hand():
    """Five slots: all on 50, all off 10; slot s off 40 + s, alone on 10 + 2 s."""
    table = np.array([50, 10, *range(40, 45), *range(10, 20, 2)], float)
    assert not growth.is_complete(table, 5)
    lost, gained = growth.alone(table)
    np.testing.assert_array_equal(lost, [10, 9, 8, 7, 6])
    np.testing.assert_array_equal(gained, [0, 2, 4, 6, 8])


def test_parts_of_the_reward_sum_to_the_return():
    arrays = run_arrays()
    rng, total = np.random.default_rng(0), arrays["rounds/reward"]
    gain = rng.normal(0, 1, total.shape) + 0 * total  # NaN before the first decision
    arrays |= {"rounds/reward_gain": gain, "rounds/reward_size": total - gain, "rounds/reward_rent": 0 * total}
    parts = growth.reward_parts(arrays)
    assert list(parts) == ["gain", "size"]  # rent always is 0
    np.testing.assert_allclose(sum(parts.values()), growth.mean_return(arrays))
    by_hand = [np.nansum(each) / (total.shape[1] * total.shape[2]) for each in total]
    np.testing.assert_allclose(growth.mean_return(arrays), by_hand)


def test_parts_of_a_real_runs_reward_sum_to_its_return():
    metrics = tiny_run.result().rounds[0]
    one = {name: array[None] for name, array in metrics.items()}
    np.testing.assert_allclose(sum(growth.reward_parts(one).values()), growth.mean_return(one), atol=1e-5)


def test_decisions_by_hand():
    """Of two environments one germinates in an empty slot 1 at epoch 1 and prunes it at 2, the other one waits."""
    arrays = {
        "arms/names": np.array(["policy"]),
        "arms/requested_op": np.array([[[Op.WAIT, Op.GERMINATE, Op.PRUNE], [Op.WAIT] * 3]], np.int8),
        "arms/slot": np.array([[[0, 1, 1], [0, 0, 0]]], np.int8),
        "arms/stage": np.array([[[[D, D], [D, G], [D, P]], [[D, D]] * 3]], np.int8),
        "arms/decision_valid": np.array([[[False, True, True]] * 2]),
    }
    by_op, by_stage = growth.decisions(arrays, "policy")
    nan = np.nan
    np.testing.assert_array_equal(by_op[Op.WAIT], [nan, 0.5, 0.5])
    np.testing.assert_array_equal(by_op[Op.GERMINATE], [nan, 0.5, 0])
    assert set(by_stage) == {(Op.GERMINATE, Stage.DORMANT), (Op.PRUNE, Stage.GERMINATED)}
    np.testing.assert_array_equal(by_stage[Op.PRUNE, Stage.GERMINATED], [nan, 0, 0.5])
