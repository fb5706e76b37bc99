"""Advantages and returns against the reference's, before and after normalisation."""

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esper_jax.config import PPOConfig
from esper_jax.control import ppo


def rows(case):
    """Our arguments for the reference's rows: valid rows, terminals, and the value behind each row's last valid step.

    The reference marks truncation on the step; an open ending has no value behind it.
    """
    lengths = case["lengths"].astype(int)
    valid = np.arange(case["rewards"].shape[1]) < lengths[:, None]
    cut = case["truncated"].astype(bool)
    last = (np.arange(len(lengths)), np.maximum(lengths - 1, 0))
    bootstrap = np.where((lengths > 0) & cut[last], case["bootstrap"][last], 0).astype(np.float32)
    return valid, case["dones"].astype(bool) & ~cut, bootstrap


@jax.jit
def over_rows(rewards, values, bootstrap, terminals, valid, gamma, lam):
    one = lambda r, v, b, done, ok: ppo.gae(r, v, b, done, gamma=gamma, lam=lam, valid=ok)
    return jax.vmap(one)(rewards, values, bootstrap, terminals, valid)


def estimate(case):
    valid, terminals, bootstrap = rows(case)
    gamma, lam = np.float32(case["config/gamma"]), np.float32(case["config/gae_lambda"])
    return valid, *over_rows(case["rewards"], case["values"], bootstrap, terminals, valid, gamma, lam)


@golden.each_case("gae")
@pytest.mark.parametrize("state", ["seed", "head"])
def test_advantages_and_returns(case, state):
    valid, advantages, returns = estimate(case)
    for name, actual in (("advantages", advantages), ("returns", returns)):
        golden.close(actual[valid], case[f"{state}/{name}"][valid], f"{state}/{name}", atol=1e-4)


@golden.each_case("gae")
def test_padding_is_zero_and_has_no_influence(case):
    valid, advantages, returns = estimate(case)
    assert not advantages[~valid].any() and not returns[~valid].any()
    spoilt = dict(case, **{name: np.where(valid, case[name], np.nan) for name in ("rewards", "values")})
    _, again, _ = estimate(spoilt)
    np.testing.assert_array_equal(again, advantages)


@golden.each_case("gae")
def test_normalised_advantages(case):
    valid, advantages, _ = estimate(case)
    floor = PPOConfig().advantage_std_floor
    actual = ppo.normalise_advantages(jnp.asarray(advantages), jnp.asarray(valid), std_floor=floor)
    close = lambda state: golden.close(
        actual[valid], case[f"{state}/advantages_normalized"][valid], f"{state}/advantages_normalized", atol=1e-4
    )
    close("head")
    # The earlier reference divides by std + 1e-8, without a floor: the same wherever the floor is not reached.
    if np.std(advantages[valid]) > floor:
        close("seed")
