"""Running statistics: hand-worked values, agreement with one pass over everything, and with several devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esper_jax.control import normalizers as N


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


def test_states_are_float32():
    for leaf in jax.tree.leaves(N.update(N.init(2), jnp.ones((3, 2)))):
        assert leaf.dtype == jnp.float32 and not leaf.weak_type


def test_a_row_that_is_not_finite_counts_for_nothing():
    """Of 1, NaN, 3 and inf in the first feature two rows are left: mean 2, variance 1; nothing of none."""
    batch = jnp.array([[1.0, 5.0], [jnp.nan, 6.0], [3.0, 7.0], [jnp.inf, 8.0]])
    got = N.update(N.init(2), batch)
    expected = N.update(N.init(2), batch[jnp.array([0, 2])])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, expected)
    np.testing.assert_allclose(got.mean, [2.0, 6.0], rtol=1e-3)
    again = N.update(got, batch[jnp.array([1, 3])])
    jax.tree.map(np.testing.assert_array_equal, again, got)
