"""Means with intervals, and what they allow one to say.

The samples are environments: different host initialisations and data orders on the same images. Environment e has the
same keys in every arm, so arms are compared by the differences within environments. A learned arm has P policies, all
of them in every environment: then the interval is over both.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from scipy.special import stdtrit

from esper_jax.metric import Metric

CONFIDENCE = 0.95
METHOD = "±: 95 % Student t intervals over environments and policies; differences are paired by environment"


class Interval(NamedTuple):
    """A mean and the interval around it; NaN where there were too few samples."""

    mean: float
    low: float
    high: float
    n: int  # samples that were measured

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0  # False for NaN


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
    half = np.where(n > 1, np.sqrt(squares / np.maximum(n - 1, 1) / np.maximum(n, 1)) * _quantile(n), np.nan)
    fields: list[Any] = [np.asarray(field) for field in (mean, mean - half, mean + half, n)]
    return Interval(*(field.item() if field.ndim == 0 else field for field in fields))


def _quantile(n: np.ndarray) -> np.ndarray:
    return stdtrit(np.maximum(n - 1, 1).astype(float), 0.5 + CONFIDENCE / 2)


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
    samples = np.asarray(samples, np.float64)
    samples = samples[:, ~np.isnan(samples).any(0)]
    policies, envs = samples.shape
    if policies == 1 or envs < 2:
        return mean_interval(samples.mean(0) if samples.size else np.array([np.nan]))
    mean, by_policy, by_env = samples.mean(), samples.mean(1), samples.mean(0)
    rest = samples - by_policy[:, None] - by_env + mean
    freedom = np.array([policies - 1, envs - 1, (policies - 1) * (envs - 1)])
    between = envs * ((by_policy - mean) ** 2).sum(), policies * ((by_env - mean) ** 2).sum(), (rest**2).sum()
    of_policy, of_env, of_rest = np.array(between) / freedom
    parts = np.array([max(of_policy - of_rest, 0.0), max(of_env, of_rest)]) / samples.size
    half = np.sqrt((stdtrit(freedom[:2], 0.5 + CONFIDENCE / 2) ** 2 * parts).sum())
    return Interval(mean.item(), (mean - half).item(), (mean + half).item(), envs)


def verdict(
    values: dict[str, np.ndarray],
    size: dict[str, np.ndarray],
    *,
    learned: tuple[str, ...],
    baseline: str,
    data: str,
    metric: Metric,
    meant: str | None = None,
) -> str:
    """One sentence on what the intervals allow one to claim, and what not.

    Args:
      values: f[P, E] per arm, of what was kept on the report-test split, in the metric's unit: the same environments in
        each arm, P = 1 for a rule; NaN where not measured.
      size: f[P, E] parameters relative to the bare host.
      learned: the arms that are policies.
      meant: other data, about which nothing may be claimed.
    """
    arms = [arm for arm in values if arm != baseline]
    gains = {arm: values[arm] - values[baseline] for arm in arms}
    parts = _claims("", gains, f"than {baseline}", baseline, metric)
    rules = [arm for arm in arms if arm not in learned]
    for policy in (arm for arm in arms if arm in learned):
        gains = {rule: values[policy] - values[rule] for rule in rules}
        share = {rule: _added(size[policy]) / _added(size[rule]) for rule in rules if _added(size[rule]) > 0}
        parts += _claims(f"{policy} is ", gains, "than", f"{policy} against", metric, share)
    policies = max((len(values[arm]) for arm in arms if arm in learned), default=0)
    if policies == 1:
        parts.append("one policy was trained, so nothing may be claimed about how training varies")
    if meant:
        parts.append(f"nothing may be claimed about {meant}")
    n = values[baseline].shape[1]
    trained = f" and {policies} policies trained from different seeds" if policies > 1 else ""
    what = f"report-test {metric.name} of what was kept"
    return f"On {data}, by {what} of {n} environments per arm with the same keys{trained}: {'; '.join(parts)}."


def _added(size: np.ndarray) -> float:
    return float(np.nanmean(size)) - 1


def _claims(
    subject: str,
    differences: dict[str, np.ndarray],
    than: str,
    against: str,
    metric: Metric,
    share: dict[str, float] | None = None,
) -> list[str]:
    """What may be said about each difference, sorted into better, worse and unknown.

    With `share`, the subject's added parameters over those of the other: better, or as good by the metric's margin at
    under half.
    """
    said: dict[str, list[str]] = {"better": [], "worse": []}
    unknown, frugal = [], []
    for name, samples in differences.items():
        gain = crossed_interval(samples)
        mean, low, high = (signed(value, metric.digits) for value in gain[:3])
        text = f"{name} ({mean} [{low}, {high}])"
        least = gain.low if metric.higher_is_better else -gain.high
        if gain.excludes_zero:
            said["better" if least > 0 else "worse"].append(text)
        elif not (share and least > -metric.margin and share.get(name, np.inf) < 0.5):
            unknown.append(name)
        if share and -metric.margin < least <= 0 and share.get(name, np.inf) < 0.5:
            frugal.append(f"{text} with {share[name]:.2f} times the parameters that it adds")
    if frugal:
        said[f"not worse by more than {metric.margin:g} {metric.points}"] = frugal
    if subject:
        parts = [f"{subject}{side} {than} {', '.join(names)}" for side, names in said.items() if names]
        return parts + ([f"nothing may be claimed about {against} {', '.join(unknown)}"] if unknown else [])
    parts = [f"{side} {than}: {', '.join(names)}" for side, names in said.items() if names]
    return parts + ([f"nothing may be claimed about {', '.join(unknown)} against {against}"] if unknown else [])


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
