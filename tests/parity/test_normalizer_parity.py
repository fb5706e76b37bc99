"""Normalisers against the reference's traces."""

from functools import partial

import chex
import golden
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scalar_normalizers as scalars
from hypothesis import given, settings

from esper_jax.control import normalizers as N

each_observation = golden.each_case("normalizer", lambda case: "momentum" in case)
each_reward = golden.each_case("normalizer", lambda case: "rewards" in case)
each_value = golden.each_case("normalizer", lambda case: "denormalized" in case)


def close(actual, expected, what, rtol=2e-4, scale=0.0):
    """Relative to each value, and to `scale` for values that may cross zero."""
    golden.close(actual, expected, what, rtol=rtol, atol=rtol * scale)


def close_statistics(state, case, i):
    deviation = np.sqrt(case["var"][i] + N.EPS)
    close(state.mean / deviation, case["mean"][i] / deviation, "mean over deviation", scale=1.0)
    close(state.var, case["var"][i], "var")
    close(state.count, case["count"][i], "count")


def batches(case):
    return np.split(case["batches"], np.cumsum(case["batch_sizes"])[:-1])


@each_observation
def test_observation_statistics(case):
    exponential = partial(scalars.exponential_update, momentum=float(case["momentum"]))
    update = N.update if np.isnan(case["momentum"]) else exponential
    state = N.init(case["batches"].shape[1])
    for i, batch in enumerate(batches(case)):
        state = update(state, jnp.asarray(batch))
        close_statistics(state, case, i)
        close(N.normalise(state, jnp.asarray(case["probe"])), case["normalized"][i], "normalized", scale=1.0)


@each_reward
def test_reward_trace(case):
    rewards = jnp.asarray(case["rewards"], jnp.float32)

    def step(state, reward):
        before = scalars.reward_normalise(state, reward)
        state, after = scalars.reward_update_and_normalise(state, reward[None])
        return state, (before, after[0], state.mean, state.m2)

    _, (before, after, mean, m2) = jax.lax.scan(step, scalars.reward_init(), rewards)
    size = np.max(np.abs(case["rewards"]))
    close(before, case["normalize_only_before_update"], "normalize_only_before_update", 1e-5)
    close(after, case["normalized"], "normalized", 1e-5)
    close(mean, case["mean"], "mean", 1e-5, size)
    close(m2, case["m2"], "m2", 1e-5)
    _, at_once = scalars.reward_update_and_normalise(scalars.reward_init(), rewards)
    close(at_once, case["normalized"], "normalized at once", 1e-5)


@each_value
def test_value_statistics(case):
    state = scalars.value_init()
    for i, batch in enumerate(batches(case)):
        state = scalars.value_update(state, jnp.asarray(batch))
        close_statistics(state, case, i)
        probe = jnp.asarray(case["probe"])
        close(scalars.value_normalise(state, probe), case["normalized"][i], "normalized", scale=1.0)
        close(scalars.value_denormalise(state, probe), case["denormalized"][i], "denormalized")


# --- worked by hand --------------------------------------------------------------------------------------------------


def test_exponential_mean_by_hand():
    # mean 0.99*0 + 0.01*1; var 0.99*1 + 0.01*0 + 0.01*0.99*(1 - 0)^2 = 0.9999
    state = scalars.exponential_update(N.init(2), jnp.ones((5, 2)), momentum=0.99)
    np.testing.assert_allclose(state.mean, 0.01, rtol=1e-6)
    np.testing.assert_allclose(state.var, 0.9999, rtol=1e-6)
    assert state.count == pytest.approx(5.0001)


def test_an_exponential_mean_that_keeps_nothing():
    """A constant feature has variance 0, and is normalised all the same."""
    state = scalars.exponential_update(N.init(1), jnp.full((1000, 1), 5.0), momentum=0.0)
    assert state.var == 0
    np.testing.assert_allclose(
        N.normalise(state, jnp.array([[5.0], [5.01], [6.0], [-6.0]]))[:, 0], [0, 1, 10, -10], 1e-4
    )


def test_rewards_by_hand():
    # 1 is only clamped; 2: deviation of (1, 2) is sqrt(0.5), 2/0.7071 = 2.828427; 3: deviation of (1, 2, 3) is 1
    state, out = scalars.reward_update_and_normalise(scalars.reward_init(), jnp.array([1.0, 2.0, 3.0]))
    np.testing.assert_allclose(out, [1.0, 2.828427, 3.0], rtol=1e-6)
    assert (state.mean, state.m2, state.count) == (2, 2, 3)
    assert (
        scalars.reward_normalise(state, jnp.float32(5.0)) == 5
        and scalars.reward_normalise(state, jnp.float32(-50.0)) == -10
    )


def test_rewards_that_do_not_vary():
    _, out = scalars.reward_update_and_normalise(scalars.reward_init(), jnp.array([30.0, 30.0, 0.0]))
    # the first is clamped, the second divided by almost nothing and clamped
    np.testing.assert_allclose(out, [10, 10, 0])
    _, zeros = scalars.reward_update_and_normalise(scalars.reward_init(), jnp.zeros(4))
    np.testing.assert_array_equal(zeros, 0)


def test_rewards_in_pieces_are_the_same_stream():
    rewards = jnp.asarray(np.random.default_rng(2).normal(1, 2, 12), jnp.float32)
    whole_state, whole = scalars.reward_update_and_normalise(scalars.reward_init(), rewards)
    state, first = scalars.reward_update_and_normalise(scalars.reward_init(), rewards[:5])
    state, second = scalars.reward_update_and_normalise(state, rewards[5:])
    chex.assert_trees_all_equal((state, jnp.concatenate([first, second])), (whole_state, whole))
    assert state.m2 / 11 == pytest.approx(float(np.var(rewards, ddof=1)), rel=1e-5)


STREAM = jax.jit(scalars.reward_update_and_normalise)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=10, max_size=10))
def test_any_rewards_stay_finite_and_bounded(rewards):
    state, out = STREAM(scalars.reward_init(), jnp.asarray(rewards, jnp.float32))
    assert np.isfinite(out).all() and (np.abs(out) <= 10).all()
    assert state.m2 >= 0 and state.count.dtype == jnp.int32


def test_values_are_untouched_until_warm():
    returns = jnp.asarray(np.random.default_rng(3).normal(4, 3, 31), jnp.float32)
    state = scalars.value_update(scalars.value_init(), returns)
    assert scalars.value_normalise(state, jnp.float32(7.0)) == 7
    state = scalars.value_update(state, jnp.array([4.0]))
    everything = np.append(returns, 4.0)
    assert state.count == 32 and state.var == pytest.approx(everything.var(), rel=1e-5)
    scaled = scalars.value_normalise(state, jnp.float32(7.0))
    assert scaled == pytest.approx(7 / np.sqrt(everything.var() + 1e-4), rel=1e-5)
    assert scalars.value_denormalise(state, scaled) == pytest.approx(7, rel=1e-6)
    # from now on an exponential mean: one batch moves it by a hundredth
    later = scalars.value_update(state, jnp.full(500, float(state.mean) + 1))
    assert later.mean - state.mean == pytest.approx(0.01, abs=1e-5)
