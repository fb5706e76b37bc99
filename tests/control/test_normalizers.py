"""Running statistics: hand-worked values, agreement with one pass over everything, and with several devices."""

import functools

import chex
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax.sharding import PartitionSpec as P

from esper_jax.control import normalizers as N


def test_exponential_mean_by_hand():
    # mean 0.99*0 + 0.01*1; var 0.99*1 + 0.01*0 + 0.01*0.99*(1 - 0)^2 = 0.9999
    state = N.update(N.init(2), jnp.ones((5, 2)), momentum=0.99)
    np.testing.assert_allclose(state.mean, 0.01, rtol=1e-6)
    np.testing.assert_allclose(state.var, 0.9999, rtol=1e-6)
    assert state.count == pytest.approx(5.0001)


@pytest.mark.parametrize("sizes", [(1, 2, 60), (30, 30), (7,)])
def test_equal_weights_agree_with_one_pass(sizes):
    rng = np.random.default_rng(0)
    batches = [rng.normal([3.0, -100.0], [2.0, 0.5], (size, 2)).astype(np.float32) for size in sizes]
    state = N.init(2)
    for batch in batches:
        state = N.update(state, jnp.asarray(batch))
    everything = np.concatenate(batches).astype(np.float64)
    # the initial mean 0 has the weight of 1e-4 rows
    np.testing.assert_allclose(state.mean, everything.mean(0), rtol=1e-4)
    drag = 1e-4 / len(everything) * everything.mean(0) ** 2
    np.testing.assert_allclose(state.var, everything.var(0) + drag, rtol=1e-3)
    assert state.count == pytest.approx(len(everything), abs=1e-2)


def test_normalise_clamps_and_survives_a_constant_feature():
    state = N.update(N.init(1), jnp.full((1000, 1), 5.0), momentum=0.0)
    assert state.var == 0
    np.testing.assert_allclose(
        N.normalise(state, jnp.array([[5.0], [5.01], [6.0], [-6.0]]))[:, 0], [0, 1, 10, -10], 1e-4
    )


@pytest.mark.parametrize("momentum", [None, 0.9])
def test_devices_share_their_statistics(momentum):
    batch = jnp.asarray(np.random.default_rng(1).normal(5, 3, (8, 3)), jnp.float32)
    start = N.update(N.init(3), batch[:3] - 2)
    alone = N.update(start, batch, momentum=momentum)
    mesh = jax.make_mesh((4,), ("env",), axis_types=(jax.sharding.AxisType.Auto,))
    update = functools.partial(N.update, momentum=momentum, axis_name="env")
    shared = jax.jit(jax.shard_map(update, mesh=mesh, in_specs=(P(), P("env")), out_specs=P(), check_vma=False))
    chex.assert_trees_all_close(shared(start, batch), alone, rtol=1e-5)


def test_rewards_by_hand():
    # 1 is only clamped; 2: deviation of (1, 2) is sqrt(0.5), 2/0.7071 = 2.828427; 3: deviation of (1, 2, 3) is 1
    state, out = N.reward_update_and_normalise(N.reward_init(), jnp.array([1.0, 2.0, 3.0]))
    np.testing.assert_allclose(out, [1.0, 2.828427, 3.0], rtol=1e-6)
    assert (state.mean, state.m2, state.count) == (2, 2, 3)
    assert N.reward_normalise(state, jnp.float32(5.0)) == 5 and N.reward_normalise(state, jnp.float32(-50.0)) == -10


def test_rewards_that_do_not_vary():
    _, out = N.reward_update_and_normalise(N.reward_init(), jnp.array([30.0, 30.0, 0.0]))
    # the first is clamped, the second divided by almost nothing and clamped
    np.testing.assert_allclose(out, [10, 10, 0])
    _, zeros = N.reward_update_and_normalise(N.reward_init(), jnp.zeros(4))
    np.testing.assert_array_equal(zeros, 0)


def test_rewards_in_pieces_are_the_same_stream():
    rewards = jnp.asarray(np.random.default_rng(2).normal(1, 2, 12), jnp.float32)
    whole_state, whole = N.reward_update_and_normalise(N.reward_init(), rewards)
    state, first = N.reward_update_and_normalise(N.reward_init(), rewards[:5])
    state, second = N.reward_update_and_normalise(state, rewards[5:])
    chex.assert_trees_all_equal((state, jnp.concatenate([first, second])), (whole_state, whole))
    assert state.m2 / 11 == pytest.approx(float(np.var(rewards, ddof=1)), rel=1e-5)


STREAM = jax.jit(N.reward_update_and_normalise)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=10, max_size=10))
def test_any_rewards_stay_finite_and_bounded(rewards):
    state, out = STREAM(N.reward_init(), jnp.asarray(rewards, jnp.float32))
    assert np.isfinite(out).all() and (np.abs(out) <= 10).all()
    assert state.m2 >= 0 and state.count.dtype == jnp.int32


def test_values_are_untouched_until_warm():
    returns = jnp.asarray(np.random.default_rng(3).normal(4, 3, 31), jnp.float32)
    state = N.value_update(N.value_init(), returns)
    assert N.value_normalise(state, jnp.float32(7.0)) == 7
    state = N.value_update(state, jnp.array([4.0]))
    everything = np.append(returns, 4.0)
    assert state.count == 32 and state.var == pytest.approx(everything.var(), rel=1e-5)
    scaled = N.value_normalise(state, jnp.float32(7.0))
    assert scaled == pytest.approx(7 / np.sqrt(everything.var() + 1e-4), rel=1e-5)
    assert N.value_denormalise(state, scaled) == pytest.approx(7, rel=1e-6)
    # from now on an exponential mean: one batch moves it by a hundredth
    later = N.value_update(state, jnp.full(500, float(state.mean) + 1))
    assert later.mean - state.mean == pytest.approx(0.01, abs=1e-5)


def test_states_are_float32():
    for state in (N.update(N.init(2), jnp.ones((3, 2))), N.value_update(N.value_init(), jnp.ones(3))):
        for leaf in jax.tree.leaves(state):
            assert leaf.dtype == jnp.float32 and not leaf.weak_type
