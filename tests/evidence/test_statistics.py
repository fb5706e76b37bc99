"""Intervals of means, differences and other statistics, what they cover, and p-values."""

import numpy as np
import pytest
from scipy import stats

from esper_jax.evidence.bootstrap import (
    bootstrap_interval,
    gap_closed,
    interquartile_mean,
    probability_of_improvement,
)
from esper_jax.evidence.statistics import crossed_interval, difference, holm, mean_interval, signed
from esper_jax.evidence.verdict import against_all, claims, gains


def test_interval_is_students():
    samples = np.random.default_rng(1).normal(3, 2, 9)
    low, high = stats.t.interval(0.95, 8, samples.mean(), stats.sem(samples))
    got = mean_interval(samples)
    np.testing.assert_allclose(got, [samples.mean(), low, high, 9, stats.ttest_1samp(samples, 0).pvalue])
    many = mean_interval(np.stack([samples, samples + 1], axis=1))
    np.testing.assert_allclose(many.low, [low, low + 1])


def test_interval_covers_as_often_as_it_says():
    samples = np.random.default_rng(2).normal(0, 1, (8, 4000))
    interval = mean_interval(samples)
    assert 0.94 < ((interval.low < 0) & (interval.high > 0)).mean() < 0.96


def test_few_samples_have_no_interval():
    one, none, gap = mean_interval([2.0]), mean_interval([np.nan]), mean_interval([1.0, np.nan, 3.0])
    assert one.mean == 2 and np.isnan(one.low) and one.n == 1 and not one.excludes_zero
    assert np.isnan(none.mean) and none.n == 0
    assert gap.mean == 2 and gap.n == 2
    assert signed(none.mean) == "-" and signed(-1.0) == "-1.00" and signed(0.5, 1) == "+0.5"


def test_one_policy_has_the_interval_over_environments():
    samples = np.random.default_rng(3).normal(1, 2, (1, 7))
    np.testing.assert_allclose(crossed_interval(samples), mean_interval(samples[0]))
    assert crossed_interval(np.array([[1.0], [3.0]]))[:1] == (2.0,)  # one environment: a mean and no more
    assert np.isnan(crossed_interval(np.array([[1.0], [3.0]])).low) and np.isnan(crossed_interval([[np.nan]]).mean)


def test_interval_of_policies_and_environments_by_hand():
    """Mean 3; of policies 1.5 and 4.5, of environments 2 and 4: mean squares 9 and 4, of the rest 4 x 0.5^2 = 1."""
    got = crossed_interval(np.array([[1.0, 2.0], [3.0, 6.0]]))
    # variances (9 - 1) / 4 and 4 / 4, each with one degree of freedom
    half = np.sqrt(2 + 1) * stats.t.ppf(0.975, 1)
    np.testing.assert_allclose(got[:4], (3, 3 - half, 3 + half, 2))
    # sqrt(3) t = 3, and Student's t with one degree of freedom is beyond sqrt(3) in a third of all draws
    np.testing.assert_allclose(got.p, 1 / 3)
    # policies that differ by less than the rest does add nothing to the interval over environments
    samples = np.array([[1.0, 5.0], [2.0, 4.0]])
    np.testing.assert_allclose(crossed_interval(samples), mean_interval(samples.mean(0)))
    # an environment that one policy was not measured in is left out
    gap = crossed_interval(np.array([[1.0, 2.0, 50.0], [3.0, 6.0, np.nan]]))
    np.testing.assert_allclose(gap, crossed_interval(np.array([[1.0, 2.0], [3.0, 6.0]])))
    flat = crossed_interval(np.zeros((3, 4)))
    assert flat == (0, 0, 0, 4, 1) and not flat.excludes_zero
    assert mean_interval([2.0, 2.0]).p == 0 and mean_interval([0.0, 0.0]).p == 1 and np.isnan(mean_interval([2.0]).p)


@pytest.mark.parametrize(
    ("policies", "deviations", "most"),
    [(3, (1.0, 1.0, 1.0), 0.98), (4, (0.5, 2.0, 1.0), 0.98), (3, (0.0, 1.0, 1.0), 1.0)],
)
def test_interval_covers_other_policies_and_environments(policies, deviations, most):
    """Effects of policy, of environment and of both; without one of the policy it may cover more often."""
    rng, envs, repetitions = np.random.default_rng(4), 32, 2000
    shapes = ((policies, 1), (1, envs), (policies, envs))
    effects = [rng.normal(0, d, (repetitions, *shape)) for d, shape in zip(deviations, shapes, strict=True)]
    intervals = [crossed_interval(samples) for samples in sum(effects)]
    assert 0.93 < np.mean([interval.low < 0 < interval.high for interval in intervals]) < most


def test_difference_by_hand():
    """x has means of policies 1.5 and 4.5, mean squares 9 and 1 (see above); y -1 and 1, 4 and no rest."""
    x, y = np.array([[1.0, 2.0], [3.0, 6.0]]), np.array([[-1.0, -1.0], [1.0, 1.0]])
    # of x's policies (9 - 1) / 4, of y's 4 / 4; of environments the variance of x - y, 2 and 4, so 2 / 2
    half = np.sqrt(2 + 1 + 1) * stats.t.ppf(0.975, 1)
    np.testing.assert_allclose(difference(x, y)[:4], (3, 3 - half, 3 + half, 2))
    # beyond 3 / sqrt(4) standard errors, of one degree of freedom all
    np.testing.assert_allclose(difference(x, y).p, 2 * stats.t.sf(1.5, 1))
    # the same policies: differences 2, 3 and 2, 5: of policies 1.25 - 0.25 = 1, of the rest 1, of environments 4
    np.testing.assert_allclose(difference(x, y, paired_policies=True), crossed_interval([[2.0, 3.0], [2.0, 5.0]]))
    with pytest.raises(ValueError, match="2 and 1 policies: must be the same"):
        difference(x, y[:1], paired_policies=True)


def test_difference_to_a_rule_is_the_crossed_interval():
    rng = np.random.default_rng(6)
    x, y = rng.normal(1, 1, (4, 9)), rng.normal(0, 1, (1, 9))
    y[0, 3] = x[2, 5] = np.nan
    np.testing.assert_allclose(difference(x, y), crossed_interval(x - y))
    assert difference(x, y).n == 7
    back = difference(y, x)
    np.testing.assert_allclose((-back.mean, -back.high, -back.low, back.p), np.array(difference(x, y))[[0, 1, 2, 4]])


def test_equal_arms_do_not_differ_at_all():
    """Nor by a rounding error, beside which another would seem large."""
    y = np.random.default_rng(7).normal(50, 10, (1, 12))
    assert difference(np.repeat(y, 3, axis=0), y)[::4] == (0, 1)


@pytest.mark.parametrize("shape", [(1, 5), (3, 8), (5, 30)])
def test_p_value_is_where_the_interval_touches(shape):
    """At 5 % the interval ends at 0, whatever its parts."""
    samples = np.random.default_rng(8).normal(0, 1, (shape)) + np.arange(shape[0])[:, None]
    interval = crossed_interval(samples)
    for edge, sign in ((interval.low, 1), (interval.high, -1)):
        inside, outside = (crossed_interval(samples - edge - sign * step) for step in (1e-4, -1e-4))
        assert inside.p > 0.05 > outside.p > 0.04 and outside.excludes_zero and not inside.excludes_zero
    assert crossed_interval(samples + 1e9).p < 1e-6


def test_holm_by_hand():
    """0.005 x 4, 0.01 x 3, 0.03 x 2, and 0.04, which is no less than the one before; then one that is no comparison."""
    got = holm(np.array([0.01, 0.04, np.nan, 0.03, 0.005]))
    np.testing.assert_allclose(got, [0.03, 0.06, np.nan, 0.06, 0.02])
    np.testing.assert_allclose(holm(np.array([0.9, 0.8])), 1)
    assert np.isnan(holm(np.array([np.nan]))).all() and len(holm(np.array([]))) == 0


def simulated(rng, envs, policies, deviations=(0.7, 1.0, 1.0)):
    """f[P, E] for each number of policies: arms that are the same on average, in environments that they share.

    Effects of the policy (none of a rule), of the arm in an environment, and of both; environments differ by more.
    """
    of_policy, of_env, rest = deviations
    shared = rng.normal(0, 3, (1, envs))
    effects = lambda p: rng.normal(0, of_policy, (p, 1)) * (p > 1) + rng.normal(0, of_env, (1, envs))
    return [shared + effects(p) + rng.normal(0, rest, (p, envs)) for p in policies]


# What 5 % may look like in a thousand repeats: 2.3 standard deviations of a binomial share more.
MOST = 0.05 + 2.3 * np.sqrt(0.05 * 0.95 / 1000)


@pytest.mark.parametrize("envs", [16, 64])
@pytest.mark.parametrize("policies", [(1, 1), (4, 1), (1, 5), (4, 4), (5, 4)])
@pytest.mark.parametrize("deviations", [(0.7, 1.0, 1.0), (0.1, 1.0, 2.0)])
def test_identical_arms_are_told_apart_in_one_of_twenty(envs, policies, deviations):
    rng = np.random.default_rng(9)
    told = 0
    for _ in range(1000):
        arms = dict(zip(("policy", "blind"), simulated(rng, envs, policies, deviations), strict=True))
        told += claims(arms, [("policy", "blind")])["policy", "blind"].certain
    assert told / 1000 <= MOST


@pytest.mark.parametrize(("envs", "policies"), [(16, 1), (16, 4), (64, 5)])
def test_arms_of_the_same_policies_are_told_apart_as_seldom(envs, policies):
    """What a policy's episodes were turned into shares its effect: row by row."""
    rng = np.random.default_rng(10)
    told = 0
    for _ in range(1000):
        x, y = simulated(rng, envs, (policies, policies), (0.5, 1.0, 1.0))
        own = rng.normal(0, 5, (policies, 1))
        told += claims({"policy": x + own, "fixed": y + own}, [("policy", "fixed")])["policy", "fixed"].certain
    assert told / 1000 <= MOST


@pytest.mark.parametrize(("family", "rows"), [(gains, (1, 1, 1, 4, 4, 4, 1)), (against_all, (1, 1, 1, 1, 5, 5, 5))])
def test_among_six_identical_arms_one_is_told_apart_in_one_of_twenty(family, rows):
    rng = np.random.default_rng(11)
    told = 0
    for _ in range(1000):
        arms = simulated(rng, 16, rows)
        subject = {"never": arms.pop()} if family is gains else {"policy": arms.pop()}
        values = {f"arm {k}": arm for k, arm in enumerate(arms)} | subject
        found = family(values) if family is gains else family(values, "policy")
        assert len(found) == 6
        told += any(claim.certain for claim in found.values())
    assert told / 1000 <= MOST


def test_interquartile_mean_is_the_trimmed_one():
    values = np.random.default_rng(12).normal(0, 1, (3, 7))
    np.testing.assert_allclose(interquartile_mean(values), stats.trim_mean(values.ravel(), 0.25))
    many = np.stack([values, values + 1])
    many[0, 1, 2:6] = np.nan
    left = values.ravel()[~np.isnan(many[0].ravel())]
    wanted = [stats.trim_mean(left, 0.25), stats.trim_mean(values.ravel(), 0.25) + 1]
    np.testing.assert_allclose(interquartile_mean(many), wanted)
    # of eight the first two and the last two go: (3 + 4 + 5 + 6) / 4
    assert interquartile_mean(np.array([[1.0, 2, 3, 4], [5, 6, 7, 800]])) == 4.5
    assert np.isnan(interquartile_mean(np.full((2, 3), np.nan)))


@pytest.mark.parametrize(
    ("policies", "deviations"),
    [((1, 1), (0, 1, 1)), ((4, 1), (1, 1, 1)), ((5, 3), (0.5, 1, 1)), ((4, 4), (0, 0.1, 2)), ((3, 1), (3, 0.1, 0.1))],
)
def test_bootstrap_of_a_mean_nearly_agrees(policies, deviations):
    """Within what 2,000 resamples vary by."""
    x, y = simulated(np.random.default_rng(13), 24, policies, deviations)
    x[0, 5] = np.nan
    mean = lambda arm: arm.mean((-2, -1))
    got, exact = bootstrap_interval(lambda x, y: mean(x) - mean(y), x, y), difference(x, y)
    np.testing.assert_allclose(got.mean, exact.mean)
    np.testing.assert_allclose(got.half, exact.half, rtol=0.08)
    assert got.n == exact.n == 23
    assert got == bootstrap_interval(lambda x, y: mean(x) - mean(y), x, y)
    assert got != bootstrap_interval(lambda x, y: mean(x) - mean(y), x, y, seed=1)


def test_bootstrap_tells_identical_arms_apart_as_seldom():
    rng = np.random.default_rng(14)
    middle = lambda x, y: interquartile_mean(x) - interquartile_mean(y)
    told = [bootstrap_interval(middle, *simulated(rng, 16, (4, 1))).excludes_zero for _ in range(300)]
    assert np.mean(told) <= 0.05 + 2.3 * np.sqrt(0.05 * 0.95 / 300)


def test_few_environments_have_no_bootstrap():
    one, none = (bootstrap_interval(interquartile_mean, np.array([[value]])) for value in (2.0, np.nan))
    assert one[::3] == (2, 1) and np.isnan(one.low) and np.isnan(none.mean) and none.n == 0


def test_probability_of_improvement_by_hand():
    """Of the pairs in the three environments x is ahead in 1, 0.5 (a tie) and 1 of 2: 2.5 of 6."""
    x, y = np.array([[3.0, 2.0, 1.0], [0.0, 1.0, 5.0]]), np.array([[2.0, 2.0, 3.0]])
    got = probability_of_improvement(x, y, higher_is_better=True)
    np.testing.assert_allclose(got.mean, 2.5 / 6)
    np.testing.assert_allclose(probability_of_improvement(x, y, higher_is_better=False).mean, 3.5 / 6)
    assert got.low == 0 and got.high == 1 and got.p > 0.05  # it cannot be told, but a probability it is
    alone = probability_of_improvement(x + 9, y, higher_is_better=True)
    assert alone.mean == 1 and np.isnan(alone.low) and np.isnan(alone.p)


def test_probability_of_improvement_is_rliables_within_an_environment():
    rng = np.random.default_rng(15)
    x, y = rng.integers(0, 5, (4, 10)).astype(float), rng.integers(0, 4, (6, 10)).astype(float)
    wanted = [stats.mannwhitneyu(x[:, e], y[:, e]).statistic / 24 for e in range(10)]
    np.testing.assert_allclose(probability_of_improvement(x, y, higher_is_better=True).mean, np.mean(wanted))
    better = probability_of_improvement(x + 1, y, higher_is_better=True)
    assert better.p < 0.05 and better.low > 0.5


def test_gap_closed():
    """Random at 50, the oracle at 60, the policy at 57.5: three quarters of the way."""
    rng = np.random.default_rng(16)
    luck = rng.normal(50, 5, (1, 20))
    noise = lambda p: (lambda sample: sample - sample.mean())(rng.normal(0, 0.5, (p, 20)))
    policy, random, oracle = luck + 7.5 + noise(3), luck + noise(1), luck + 10 + noise(1)
    got = gap_closed(policy, random, oracle, higher_is_better=True)
    np.testing.assert_allclose(got.mean, 0.75)
    assert 0.6 < got.low < 0.75 < got.high < 0.9
    np.testing.assert_allclose(gap_closed(-policy, -random, -oracle, higher_is_better=False), got)
    # nothing to divide by, or the wrong way
    for oracle in (random, random - 10):
        none = gap_closed(policy, random, oracle, higher_is_better=True)
        assert np.isnan(none.mean) and np.isnan(none.low) and none.n == 20
