"""Normalisers against the reference's traces."""

import golden
import jax
import jax.numpy as jnp
import numpy as np

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
    momentum = None if np.isnan(case["momentum"]) else float(case["momentum"])
    state = N.init(case["batches"].shape[1])
    for i, batch in enumerate(batches(case)):
        state = N.update(state, jnp.asarray(batch), momentum=momentum)
        close_statistics(state, case, i)
        close(N.normalise(state, jnp.asarray(case["probe"])), case["normalized"][i], "normalized", scale=1.0)


@each_reward
def test_reward_trace(case):
    rewards = jnp.asarray(case["rewards"], jnp.float32)

    def step(state, reward):
        before = N.reward_normalise(state, reward)
        state, after = N.reward_update_and_normalise(state, reward[None])
        return state, (before, after[0], state.mean, state.m2)

    _, (before, after, mean, m2) = jax.lax.scan(step, N.reward_init(), rewards)
    size = np.max(np.abs(case["rewards"]))
    close(before, case["normalize_only_before_update"], "normalize_only_before_update", 1e-5)
    close(after, case["normalized"], "normalized", 1e-5)
    close(mean, case["mean"], "mean", 1e-5, size)
    close(m2, case["m2"], "m2", 1e-5)
    _, at_once = N.reward_update_and_normalise(N.reward_init(), rewards)
    close(at_once, case["normalized"], "normalized at once", 1e-5)


@each_value
def test_value_statistics(case):
    state = N.value_init()
    for i, batch in enumerate(batches(case)):
        state = N.value_update(state, jnp.asarray(batch))
        close_statistics(state, case, i)
        probe = jnp.asarray(case["probe"])
        close(N.value_normalise(state, probe), case["normalized"][i], "normalized", scale=1.0)
        close(N.value_denormalise(state, probe), case["denormalized"][i], "denormalized")
