"""Attribution from tables of accuracies: identities of the Shapley value, masks, layouts."""

import itertools

import chex
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from esper_jax.env import attribution as A


def table(values):
    return jnp.asarray(values, jnp.float32)


def attribute(values, live):
    return A.attribute(table(values), A.configurations(len(live)), jnp.asarray(live))


def test_two_slots_by_hand():
    # v(none) = 70, v(a) = 72, v(b) = 71, v(ab) = 74: a gains 2 first and 3 second, b 1 and 2
    values = table([70, 72, 71, 74])
    np.testing.assert_allclose(A.shapley(values), [2.5, 1.5])
    np.testing.assert_allclose(A.interactions(values), [[0, 1], [1, 0]])
    np.testing.assert_allclose(A.leave_one_out(values), [3, 2])
    assert A.committed(values, jnp.array([False, True])) == 71
    assert A.committed(values, jnp.array([False, False])) == 70


@settings(deadline=None, max_examples=15)
@given(st.lists(st.floats(0, 100, width=32), min_size=8, max_size=8))
def test_shapley_is_the_mean_over_all_orders(accuracies):
    expected = np.zeros(3)
    for order in itertools.permutations(range(3)):
        row = 0
        for slot in order:
            expected[slot] += (accuracies[row | 1 << slot] - accuracies[row]) / 6
            row |= 1 << slot
    actual = A.shapley(table(accuracies))
    np.testing.assert_allclose(actual, expected, atol=1e-4)
    assert float(actual.sum()) == pytest.approx(accuracies[7] - accuracies[0], abs=1e-4)


@pytest.mark.parametrize("n_slots", [1, 2, 3, 4, 5])
def test_additive_game_gives_the_weights(n_slots):
    weights = np.array([3.0, -1.0, 0.5, 2.0, 4.0])[:n_slots]
    on = (np.arange(2**n_slots)[:, None] >> np.arange(n_slots)) % 2
    values = table(60 + on @ weights)
    np.testing.assert_allclose(A.shapley(values), weights, atol=1e-4)
    np.testing.assert_allclose(A.leave_one_out(values), weights, atol=1e-4)
    np.testing.assert_allclose(A.interactions(values), 0, atol=1e-4)


def test_symmetric_slots_share():
    size = A.configurations(4).sum(1)
    np.testing.assert_allclose(A.shapley(table(np.array([50, 60, 61, 70, 90])[size])), 10, atol=1e-4)


def test_configurations():
    np.testing.assert_array_equal(A.configurations(2), [[0, 0], [1, 0], [0, 1], [1, 1]])
    for n_slots in range(1, 5):
        assert A.configurations(n_slots).shape == (2**n_slots, n_slots)
    five = A.configurations(5)
    assert five.shape == (12, 5)
    assert five[0].all() and not five[1].any()
    np.testing.assert_array_equal(five[2:7], ~np.eye(5, dtype=bool))
    np.testing.assert_array_equal(five[7:], np.eye(5, dtype=bool))
    with pytest.raises(ValueError, match="at least 1"):
        A.configurations(0)


def test_three_live_slots_by_hand():
    # alone: 2, 1, -1; pairs 01: 5 (interaction +2), 02: 1 (0), 12: -3 (-3); all: 4
    got = attribute([60, 62, 61, 65, 59, 61, 57, 64], [True] * 3)
    np.testing.assert_allclose(got.contribution, [64 - 57, 64 - 61, 64 - 65])
    assert got.total_improvement == 4 and got.total_improvement_valid
    np.testing.assert_allclose(got.interaction_sum, [2, -1, -3])
    np.testing.assert_allclose(got.boost, [2, 2, 0])
    assert got.interaction_valid.all() and got.shapley_valid.all() and got.contribution_valid.all()
    assert float(got.shapley.sum()) == pytest.approx(4, abs=1e-5)


@pytest.mark.parametrize("live", list(itertools.product([False, True], repeat=3)))
def test_a_slot_that_is_not_live_does_not_count(live):
    """Rows that differ in it alone are equal; it gets 0, and the others what a host without it would give them."""
    rng = np.random.default_rng(0)
    own = rng.uniform(40, 90, 8)
    bits = sum(1 << j for j in range(3) if live[j])
    got = attribute(own[np.arange(8) & bits], live)
    live = np.array(live)
    for field in (got.contribution, got.shapley, got.interaction_sum, got.boost):
        assert (np.asarray(field)[~live] == 0).all()
    np.testing.assert_array_equal(got.contribution_valid, live)
    np.testing.assert_array_equal(got.shapley_valid, live)
    np.testing.assert_array_equal(got.interaction_valid, live & (live.sum() >= 2))
    assert bool(got.total_improvement_valid) == live.any()
    if live.any():
        rows = [sum(1 << j for k, j in enumerate(np.flatnonzero(live)) if i >> k & 1) for i in range(2 ** live.sum())]
        smaller = attribute(own[rows], [True] * int(live.sum()))
        np.testing.assert_allclose(np.asarray(got.shapley)[live], smaller.shapley, atol=1e-4)
        np.testing.assert_allclose(np.asarray(got.contribution)[live], smaller.contribution)
        np.testing.assert_allclose(got.total_improvement, smaller.total_improvement)
        if live.sum() >= 2:
            np.testing.assert_allclose(np.asarray(got.boost)[live], smaller.boost, atol=1e-4)
    else:
        assert got.total_improvement == 0


def test_more_than_four_slots():
    # main 80, all off 60, leave-one-out 79 .. 75, only-one unused
    values = [80, 60, 79, 78, 77, 76, 75, 61, 62, 63, 64, 65]
    got = attribute(values, [True, False, True, True, True])
    np.testing.assert_allclose(got.contribution, [1, 0, 3, 4, 5])
    assert got.total_improvement == 20
    assert not got.interaction_valid.any() and not got.shapley_valid.any()
    nobody = attribute(values, [False] * 5)
    assert nobody.total_improvement == 0 and not nobody.total_improvement_valid


def test_attribute_maps_and_keeps_its_types():
    on = A.configurations(3)
    values = table(np.random.default_rng(1).uniform(40, 90, (5, 8)))
    live = jnp.asarray(np.random.default_rng(2).uniform(size=(5, 3)) < 0.5)
    got = jax.jit(jax.vmap(lambda v, a: A.attribute(v, on, a)))(values, live)
    one = A.attribute(values[3], on, live[3])
    chex.assert_trees_all_close(jax.tree.map(lambda leaf: leaf[3], got), one, atol=1e-5)
    for leaf in jax.tree.leaves(one):
        assert leaf.dtype in (jnp.float32, jnp.bool_)


def test_wrong_tables_are_refused():
    live = jnp.ones(3, bool)
    with pytest.raises(ValueError, match="configurations"):
        A.attribute(table(np.zeros(7)), A.configurations(3), live)
    with pytest.raises(ValueError, match="configurations"):
        A.attribute(table(np.zeros(8)), A.configurations(3)[::-1], live)
    for size in (1, 6):
        with pytest.raises(ValueError, match="2\\^S"):
            A.shapley(table(np.zeros(size)))
