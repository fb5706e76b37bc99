"""Intervals of statistics that are no means, by resampling policies and environments."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from esper_jax.evidence.statistics import Interval, complete, difference, of_parts

RESAMPLES = 2000


def interquartile_mean(values: np.ndarray) -> np.ndarray:
    """Mean of the middle half of all P E values of f[..., P, E] (rliable, Agarwal et al. 2021: a trimmed mean).

    A quarter, rounded down, is left out at either end; so is NaN, before. NaN if nothing was measured.
    """
    values = np.asarray(values, np.float64)
    ordered = np.sort(values.reshape(*values.shape[:-2], -1))  # NaN comes last
    n = (~np.isnan(ordered)).sum(-1, keepdims=True)
    rank = np.arange(ordered.shape[-1])
    middle = (rank >= n // 4) & (rank < n - n // 4)
    total = np.where(middle, ordered, 0).sum(-1)
    return np.where(n[..., 0] > 0, total / np.maximum(middle.sum(-1), 1), np.nan)


def bootstrap_interval(
    statistic: Callable[..., np.ndarray], *arms: np.ndarray, null: float = 0.0, seed: int = 0
) -> Interval:
    """Any statistic of several arms with a 95 % interval for other policies and other environments; deterministic.

    Environments are resampled for all arms together, since they are the same ones, and policies within each arm.
    (Rliable resamples the runs of every task by themselves; here that would be wrong, since one policy plays in all
    environments.) Three to eight policies are too few for percentiles, which are then far too narrow. So the resamples
    give variances alone: with other environments, with other policies of an arm, and what both together do beyond the
    two apart (the crossed bootstrap of Owen, 2007). Each is corrected for what the variance of n samples falls short,
    n / (n - 1); then they are parts of an interval as the mean squares of `crossed_interval` are, with which the
    interval of a mean agrees. Environments that were not measured in some row of some arm are left out.

    Args:
      statistic: of arrays f[..., P, E], as many as arms, with or without leading axes: f[...].
      arms: f[P, E], a P for each, the same environments; of one row, policies do not count. Arms of the same policies
        are no independent arms: give their differences as one.
      null: what the p-value is of.
    """
    kept = complete([np.asarray(arm, np.float64) for arm in arms])
    envs = kept[0].shape[1]
    if envs < 2:
        return Interval(float(statistic(*kept)) if envs else float("nan"), float("nan"), float("nan"), envs)
    whole = float(statistic(*kept))
    rng = np.random.default_rng(seed)
    columns = rng.integers(envs, size=(RESAMPLES, envs))
    elsewhere = [np.moveaxis(arm[:, columns], 0, 1) for arm in kept]  # [B, P, E]
    by_envs = statistic(*elsewhere)
    parts, rest = [], 0.0
    for k, arm in enumerate(kept):
        policies = len(arm)
        if policies == 1:
            continue
        rows = rng.integers(policies, size=(RESAMPLES, policies))
        by_policies = statistic(*kept[:k], arm[rows], *kept[k + 1 :])
        both = statistic(*elsewhere[:k], arm[rows[:, :, None], columns[:, None]], *elsewhere[k + 1 :])
        more = policies / (policies - 1)
        of_rest = np.var(both - by_policies - by_envs + whole) * more * envs / (envs - 1)
        parts.append((max(np.var(by_policies) * more - of_rest, 0.0), policies - 1))
        rest += of_rest
    parts.append((max(np.var(by_envs) * envs / (envs - 1), rest), envs - 1))
    return of_parts(whole, parts, envs, null=null)


def probability_of_improvement(x: np.ndarray, y: np.ndarray, *, higher_is_better: bool) -> Interval:
    """P(x better than y) of f[P, E] and f[Q, E] in an environment, equals counting one half; p-value of one half.

    Rliable's, the Mann-Whitney U statistic within each of its tasks (Agarwal et al. 2021), which are environments here:
    the mean over them and over all pairs of policies. Where no resample moves it, such as a 1 in every environment,
    resampling cannot tell how far it might be off: then there is no interval.
    """
    sign = 1 if higher_is_better else -1

    def share(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        ahead = sign * (x[..., :, None, :] - y[..., None, :, :])  # [..., P, Q, E]
        return ((ahead > 0) + (ahead == 0) / 2).mean((-3, -2, -1))

    found = bootstrap_interval(share, x, y, null=0.5)
    if found.half == 0:
        return Interval(found.mean, float("nan"), float("nan"), found.n)
    return found._replace(low=max(found.low, 0.0), high=min(found.high, 1.0))


def gap_closed(policy: np.ndarray, random: np.ndarray, oracle: np.ndarray, *, higher_is_better: bool) -> Interval:
    """(policy - random) / (oracle - random) of the means of f[P, E], f[Q, E] and f[R, E]: how far towards the best.

    NaN without an interval unless the oracle is better than random beyond its own interval: there is nothing to
    divide by.
    """
    whole = difference(oracle, random)
    if not (whole.low > 0 if higher_is_better else whole.high < 0):
        return Interval(float("nan"), float("nan"), float("nan"), whole.n)
    mean = lambda arm: arm.mean((-2, -1))
    closed = lambda policy, random, oracle: (mean(policy) - mean(random)) / (mean(oracle) - mean(random))
    return bootstrap_interval(closed, policy, random, oracle)
