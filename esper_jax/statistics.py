"""Means with intervals, and what they allow one to say.

The samples are environments: different host initialisations and data orders on the same images. Environment e has the
same keys in every arm, so arms are compared by the differences within environments.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit

CONFIDENCE = 0.95
METHOD = "±: 95 % Student t intervals over environments; differences are paired by environment"


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
    fields = (mean, mean - half, mean + half, n)
    return Interval(*(field.item() if np.ndim(field) == 0 else field for field in map(np.asarray, fields)))


def _quantile(n: np.ndarray) -> np.ndarray:
    return stdtrit(np.maximum(n - 1, 1).astype(float), 0.5 + CONFIDENCE / 2)


def verdict(accuracy: dict[str, np.ndarray], *, policy: str, baseline: str, data: str, metric: str) -> str:
    """One sentence on what the intervals allow one to claim, and what not.

    Args:
      accuracy: f[E] per arm, the same environments in each; NaN where not measured.
      metric: what the numbers are, such as "report-test accuracy".
    """
    arms = [arm for arm in accuracy if arm != baseline]
    parts = _claims("", {arm: accuracy[arm] - accuracy[baseline] for arm in arms}, f"than {baseline}", baseline)
    if policy in accuracy:
        gains = {rule: accuracy[policy] - accuracy[rule] for rule in arms if rule != policy}
        parts += _claims(f"the {policy} is ", gains, "than", f"{policy} against")
        parts.append(f"the {policy} comes from one training seed, so nothing may be claimed about how training varies")
    if data != "cifar10":
        parts.append("nothing may be claimed about CIFAR-10")
    n = len(accuracy[baseline])
    return f"On {data}, by {metric} of {n} environments per arm with the same keys: {'; '.join(parts)}."


def _claims(subject: str, differences: dict[str, np.ndarray], than: str, against: str) -> list[str]:
    """What may be said about each difference, sorted into better, worse and unknown."""
    said: dict[str, list[str]] = {"better": [], "worse": []}
    unknown = []
    for name, samples in differences.items():
        gain = mean_interval(samples)
        if gain.excludes_zero:
            side = said["better" if gain.low > 0 else "worse"]
            side.append(f"{name} ({signed(gain.mean)} [{signed(gain.low)}, {signed(gain.high)}])")
        else:
            unknown.append(name)
    if subject:
        parts = [f"{subject}{side} {than} {', '.join(names)}" for side, names in said.items() if names]
        return parts + ([f"nothing may be claimed about {against} {', '.join(unknown)}"] if unknown else [])
    parts = [f"{side} {than}: {', '.join(names)}" for side, names in said.items() if names]
    return parts + ([f"nothing may be claimed about {', '.join(unknown)} against {against}"] if unknown else [])


def signed(value: float, digits: int = 2) -> str:
    """A number with its sign, "-" if it was not measured."""
    return "-" if np.isnan(value) else f"{value:+.{digits}f}"
