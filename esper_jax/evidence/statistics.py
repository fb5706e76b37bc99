"""Means with intervals, and p-values that agree with them.

The samples are environments: different host initialisations and data orders on the same images. Environment e has the
same keys in every arm, so arms are compared by the differences within environments. A learned arm has P policies, all
of them in every environment: then the interval is over both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.special import stdtr, stdtrit

CONFIDENCE = 0.95
METHOD = "±: 95 % Student t intervals over environments and policies; differences are paired by environment"


class Interval(NamedTuple):
    """A mean, or another statistic, and the 95 % interval around it; NaN where there were too few samples."""

    mean: float
    low: float
    high: float
    n: int  # samples that were measured
    p: float = float("nan")  # two-sided, of 0: one minus the confidence at which the interval would just touch it

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0  # False for NaN

    @property
    def half(self) -> float:
        """Half its width."""
        return (self.high - self.low) / 2


def mean_interval(samples: np.ndarray, axis: int = 0) -> Interval:
    """Mean over an axis with a 95 % Student t interval; NaN marks a sample that was not measured.

    One sample has a mean but no interval, none has neither. Fields are floats, or arrays of the remaining axes.
    """
    samples = np.asarray(samples, np.float64)
    measured = ~np.isnan(samples)
    n = measured.sum(axis)
    total = np.where(measured, samples, 0).sum(axis)
    mean = np.where(n > 0, total / np.maximum(n, 1), np.nan)
    squares = np.where(measured, (samples - np.expand_dims(mean, axis)) ** 2, 0).sum(axis)
    error = np.where(n > 1, np.sqrt(squares / np.maximum(n - 1, 1) / np.maximum(n, 1)), np.nan)
    freedom = np.maximum(n - 1, 1).astype(float)
    half = error * stdtrit(freedom, 0.5 + CONFIDENCE / 2)
    errors_away = np.divide(np.abs(mean), error, out=np.where(mean == 0, 0.0, np.inf), where=error != 0)
    p = 2 * stdtr(freedom, -errors_away)
    fields: list[Any] = [np.asarray(field) for field in (mean, mean - half, mean + half, n, p)]
    return Interval(*(field.item() if field.ndim == 0 else field for field in fields))


def crossed_interval(samples: np.ndarray) -> Interval:
    """Mean of f[P, E] with a 95 % interval for other policies *and* other environments than these.

    Both are random and every policy was in every environment. With the mean squares of a two-way layout without
    replication, the mean's variance has a part of the policies, `(MS_policy - MS_rest) / (P E)`, and one of the
    environments, `MS_env / (P E)`; each is taken times the square of its own t quantile (Howe, 1974), since pooled
    degrees of freedom (Satterthwaite, 1946) cover too seldom with few policies. Policies that differ by no more than
    the rest does add nothing: what remains is the interval over environments of the policies' mean. One policy says
    nothing about others: P = 1 is the interval over environments alone. An environment that was not measured under
    some policy is left out.
    """
    return _of_sum(np.asarray(samples, np.float64))


def difference(x: np.ndarray, y: np.ndarray, *, paired_policies: bool = False) -> Interval:
    """Mean of x f[P, E] minus mean of y f[Q, E], in the same environments, with a 95 % interval.

    The policies of the two arms are other ones: policy p of x has nothing to do with policy p of y. So the difference's
    variance has a part of each arm's policies, `(MS_policy - MS_rest) / (P E)` within the arm, and one of the
    environments, of the E differences between the arms' means over policies; each has its own t quantile, as in
    `crossed_interval`, which this is if y has one row.

    Args:
      paired_policies: row p of both arms comes from the same policy (its likeliest actions, its episodes replayed):
        then the rows' differences are the samples. Raises ValueError if there are not as many.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if paired_policies:
        if len(x) != len(y):
            raise ValueError(f"{len(x)} and {len(y)} policies: must be the same ones")
        return crossed_interval(x - y)
    common = y.mean(0)  # a shift of an environment changes nothing, and equal arms then differ by exactly 0
    return _of_sum(x - common, common - y)


def complete(arms: Sequence[np.ndarray]) -> list[np.ndarray]:
    """f[P, E] of each arm without the environments that were not measured in some row of some arm."""
    measured = ~np.any([np.isnan(arm).any(0) for arm in arms], axis=0)
    return [arm[:, measured] for arm in arms]


def _of_sum(*arms: np.ndarray) -> Interval:
    """Interval of the sum of the means of f[P, E], a P for each arm: policies of an arm apart, environments shared."""
    arms = tuple(complete(arms))
    envs = arms[0].shape[1]
    by_env = np.sum([arm.mean(0) for arm in arms], axis=0)
    if envs < 2:
        return mean_interval(by_env)
    parts, rest = [], 0.0
    for arm in (arm for arm in arms if len(arm) > 1):
        policies, mean, by_policy = len(arm), arm.mean(), arm.mean(1)
        of_policy = envs * ((by_policy - mean) ** 2).sum() / (policies - 1)
        of_rest = ((arm - by_policy[:, None] - arm.mean(0) + mean) ** 2).sum() / (policies - 1) / (envs - 1)
        parts.append((max(of_policy - of_rest, 0.0) / arm.size, policies - 1))
        rest += of_rest / arm.size
    parts.append((max(by_env.var(ddof=1) / envs, rest), envs - 1))
    return of_parts(by_env.mean().item(), parts, envs)


def of_parts(mean: float, parts: Sequence[tuple[float, int]], n: int, *, null: float = 0.0) -> Interval:
    """Interval of a statistic whose variance is a sum of independent parts, each times its own t quantile (Howe, 1974).

    Args:
      parts: variances with their degrees of freedom.
      null: what the p-value is of.
    """
    variance, freedom = np.array(parts, np.float64).T
    half = _half(0.5 + CONFIDENCE / 2, variance, freedom)
    return Interval(mean, mean - half, mean + half, n, _touching(abs(mean - null), variance, freedom))


def _half(quantile: float, variance: np.ndarray, freedom: np.ndarray) -> float:
    return float(np.sqrt((stdtrit(freedom, quantile) ** 2 * variance).sum()))


LEAST_P = 1e-100  # smaller ones are not told apart


def _touching(distance: float, variance: np.ndarray, freedom: np.ndarray) -> float:
    """p at which half an interval is as wide as the distance, by bisection of its logarithm."""
    if not np.isfinite([distance, variance.sum()]).all():
        return float("nan")
    if distance == 0 or not variance.any():
        return float(distance == 0)
    low, high = np.log(LEAST_P), 0.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        if _half(np.exp(middle) / 2, variance, freedom) > distance:
            low = middle
        else:
            high = middle
    return float(np.exp(high))


def holm(p: np.ndarray) -> np.ndarray:
    """P-values f[N] corrected for their number (Holm, 1979): below 5 %, false ones among them are at most that likely.

    The k-th smallest of m is multiplied by m - k + 1, and is at least what the smaller ones became. NaN is no
    comparison and stays NaN.

    >>> holm(np.array([0.01, 0.04, np.nan, 0.03])).tolist()
    [0.03, 0.06, nan, 0.06]
    """
    p = np.asarray(p, np.float64)
    order = np.argsort(p)[: np.isfinite(p).sum()]  # NaN comes last
    adjusted = np.full(p.shape, np.nan)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)), 1)
    return adjusted


def signed(value: float, digits: int = 2) -> str:
    """A number with its sign, "-" if it was not measured.

    >>> signed(1.234), signed(float("nan"))
    ('+1.23', '-')
    """
    return "-" if np.isnan(value) else f"{value:+.{digits}f}"


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's (1904) correlation of the ranks of two f[N], equals sharing their mean rank; NaN if one is flat.

    >>> rank_correlation(np.array([1.0, 2.0, 3.0]), np.array([1.0, 4.0, 9.0]))
    1.0
    """
    from scipy.stats import rankdata  # a second to import, and a run does not need it

    x, y = (rankdata(samples) - (len(samples) + 1) / 2 for samples in (x, y))
    spread = np.sqrt((x**2).sum() * (y**2).sum())
    return float((x * y).sum() / spread) if spread > 0 else float("nan")


def eta_squared(groups: list[np.ndarray]) -> float:
    """Share of the variance of all samples that lies between the groups' means; NaN if nothing varies."""
    together = np.concatenate(groups)
    total = ((together - together.mean()) ** 2).sum()
    between = sum(len(group) * (group.mean() - together.mean()) ** 2 for group in groups)
    return float(between / total) if total > 0 else float("nan")
