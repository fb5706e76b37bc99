"""What a host is judged by, besides its loss (no JAX here: those who read finished runs need it too)."""

from __future__ import annotations

import math
from typing import Any, NamedTuple


class Metric(NamedTuple):
    """What is measured, its unit, which direction is better, and its natural scale.

    Controllers, gates, tracker, attribution and the rewards of the reference see a *score*: 0 is the worst, more is
    better, and 1 is as much of the unit as `scale` says. For images that is a percentage point of accuracy, so their
    thresholds are the reference's. Arrays are f32 of any shape, of JAX or of NumPy.
    """

    name: str
    unit: str
    scale: float  # of the unit, what a score of 1 is
    worst: float  # what a score of 0 is
    best: float
    per_nat: float | None = None  # of a loss; None is accuracy, which is counted
    margin: float = 0.0  # of the unit: what a report calls hardly worse
    digits: int = 2  # behind the point, in reports
    points: str = ""  # what differences are called

    @property
    def higher_is_better(self) -> bool:
        return self.best > self.worst

    @property
    def sign(self) -> int:
        """What a difference is multiplied by so that more is better."""
        return 1 if self.higher_is_better else -1

    @property
    def span(self) -> float:
        """The best score."""
        return abs(self.best - self.worst) / self.scale

    def value(self, accuracy: Any, loss: Any) -> Any:
        """In the metric's unit, from an accuracy in percentage points and a mean loss in nats."""
        return accuracy if self.per_nat is None else loss * self.per_nat

    def score(self, accuracy: Any, loss: Any) -> Any:
        """See the class."""
        value = self.value(accuracy, loss)
        return (value - self.worst if self.higher_is_better else self.worst - value) / self.scale


MOST_PERPLEXITY_LOSS = 20.0  # nats; from there on the reference calls it infinite


def perplexity(loss: float) -> float:
    """exp of a mean cross-entropy in nats; infinite from a loss of 20 on (training_and_ppo), NaN of NaN.

    >>> perplexity(0.0), perplexity(25.0)
    (1.0, inf)
    """
    return math.inf if loss >= MOST_PERPLEXITY_LOSS else math.exp(loss)


ACCURACY = Metric("accuracy", "%", scale=1.0, worst=0.0, best=100.0, margin=2.0, points="points")


def bits_per_character(vocabulary: int, characters_per_token: float = 1.0) -> Metric:
    """Of text: a score of 1 is a hundredth of a bit; a uniform guess among the tokens has 0.

    >>> metric = bits_per_character(256)
    >>> round(metric.score(None, math.log(256)), 9), round(metric.score(None, math.log(128)), 9), metric.span
    (0.0, 100.0, 800.0)
    """
    per_nat = 1 / (math.log(2) * characters_per_token)
    worst = math.log(vocabulary) * per_nat
    return Metric(
        "bits per character", "bits", scale=0.01, worst=worst, best=0.0, per_nat=per_nat, margin=0.02, digits=3,
        points="bits",
    )  # fmt: skip
