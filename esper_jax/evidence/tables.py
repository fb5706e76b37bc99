"""The result of a run: its table and its sentences, from the arrays of metrics.npz."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from esper_jax.enums import BASELINE, LEARNED
from esper_jax.evidence import verdict
from esper_jax.evidence.bootstrap import bootstrap_interval, interquartile_mean, probability_of_improvement
from esper_jax.evidence.statistics import METHOD, Interval, signed
from esper_jax.metric import Metric, perplexity


def columns(metrics: dict[str, np.ndarray]) -> tuple[str, ...]:
    """Heads of a run's table; 80 characters have to be enough for it."""
    unit = metric_of(metrics).unit
    return ("arm", f"test {unit}", f"minus {BASELINE}", f"final {unit}", f"loss - {BASELINE}", "params", "kept")


def notes(metrics: dict[str, np.ndarray], bigram_loss: float | None = None) -> tuple[str, ...]:
    """What has to be known to read the table; `bigram_loss` in nats, of text, for comparison."""
    metric = metric_of(metrics)
    unit = metric.unit
    return (
        f"{METHOD}.",
        "* beyond chance at 5 %, corrected for the number of arms (Holm; controls by themselves); intervals are not.",
        f"test {unit}, differences, params (relative to the bare host): of what was kept (fossilised).",
        f"final {unit}: of the network as it was at the end. loss - {BASELINE}: nats of report-test loss, lower is",
        "better. kept: seeds per environment.",
        *([] if metric.higher_is_better else [f"{unit}: {metric.name}, lower is better. {_bare(metrics)}"]),
        *([] if bigram_loss is None else [f"A bigram model of the training text: {_of_loss(metric, bigram_loss)}."]),
    )


def _of_loss(metric: Metric, loss: float) -> str:
    return f"{metric.value(None, loss):.{metric.digits}f} {metric.unit}"


def _bare(metrics: dict[str, np.ndarray]) -> str:
    """The bare host's other numbers."""
    fields = ("test_committed_loss", "test_committed_accuracy")
    loss, right = (float(np.nanmean(by_arm(metrics, name)[BASELINE])) for name in fields)
    return f"{BASELINE}: {loss:.2f} nats, perplexity {perplexity(loss):.1f}, {right:.1f} % of the tokens right."


def by_arm(metrics: dict[str, np.ndarray], field: str) -> dict[str, np.ndarray]:
    """f[P, E] of each arm, P = 1 for a rule, from the arrays of metrics.npz."""
    return _split(metrics, metrics[f"arms/{field}"])


def _split(metrics: dict[str, np.ndarray], rows: np.ndarray) -> dict[str, np.ndarray]:
    names = [str(name) for name in metrics["arms/names"]]
    return {arm: rows[[name == arm for name in names]] for arm in dict.fromkeys(names)}


def sizes(metrics: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """f[P, E] parameters of each arm's committed networks, relative to the bare host."""
    return {arm: size[..., -1] for arm, size in by_arm(metrics, "committed_size").items()}


def metric_arrays(metric: Metric) -> dict[str, np.ndarray]:
    """How metrics.npz says what a run's hosts were judged by on the report-test split."""
    fields = metric._asdict().items()
    return {f"metric/{name}": np.array(np.nan if value is None else value) for name, value in fields}


def metric_of(metrics: dict[str, np.ndarray]) -> Metric:
    """Inverse of `metric_arrays`."""
    fields = {name: metrics[f"metric/{name}"].item() for name in Metric._fields}
    return Metric(**fields | {"per_nat": None if np.isnan(fields["per_nat"]) else fields["per_nat"]})


def measured(metrics: dict[str, np.ndarray], of: str = "test_committed") -> np.ndarray:
    """f[A, E, ...] in the metric's unit, a row per arm and policy.

    Args:
      of: `test_committed` (what was kept), `test` (all of the network) or `val` (by epoch).
    """
    return metric_of(metrics).value(metrics[f"arms/{of}_accuracy"], metrics[f"arms/{of}_loss"])


def values(metrics: dict[str, np.ndarray], of: str = "test_committed") -> dict[str, np.ndarray]:
    """The same by arm, f[P, E, ...] each."""
    return _split(metrics, measured(metrics, of))


def table(metrics: dict[str, np.ndarray]) -> list[list[str]]:
    """The cells under `columns`, a row per arm; "-" for what was not measured."""
    kept, final = values(metrics), values(metrics, "test")
    loss, fossils = (by_arm(metrics, field) for field in ("test_committed_loss", "fossilised"))
    size, metric, rows = sizes(metrics), metric_of(metrics), []
    digits = metric.digits
    by_value, by_loss = verdict.gains(kept), verdict.gains(loss)
    for arm in kept:
        gain, of_loss = "-", "-"
        if arm != BASELINE:
            gain = _starred(by_value[arm], digits)
            of_loss = _starred(by_loss[arm], 2 if metric.higher_is_better else digits)
        plain = (_plain(kept[arm], digits), gain, _plain(final[arm], digits), of_loss)
        rows.append([arm, *plain, times(size[arm]), _plain(fossils[arm], 1)])
    return rows


def measured_mean(samples: np.ndarray) -> float:
    """Mean of those samples that are not NaN; NaN if there is none."""
    there = samples[~np.isnan(samples)]
    return float(there.mean()) if there.size else float("nan")


def times(sizes: np.ndarray) -> str:
    """A mean relative size, "-" if none was measured.

    >>> times(np.array([1.0, 1.5, np.nan])), times(np.array([np.nan]))
    ('x1.25', '-')
    """
    mean = _plain(sizes, 2)
    return mean if mean == "-" else f"x{mean}"


def _plain(samples: np.ndarray, digits: int) -> str:
    value = measured_mean(samples)
    return "-" if np.isnan(value) else f"{value:.{digits}f}"


def _starred(claim: verdict.Claim, digits: int) -> str:
    return plus_minus(claim.interval, digits) + ("*" if claim.certain else " ")


def plus_minus(interval: Interval, digits: int) -> str:
    """A mean with its sign and half its interval, if there is one.

    >>> plus_minus(Interval(1.0, 0.5, 1.5, 9), 2)
    '+1.00 ± 0.50'
    """
    half = interval.half
    return signed(interval.mean, digits) + ("" if np.isnan(half) else f" ± {half:.{digits}f}")


def headline(metrics: dict[str, np.ndarray], data: str, meant: str | None = None) -> str:
    """What was found, for ten seconds; `meant` are other data, about which nothing may be claimed."""
    return verdict.headline(values(metrics), sizes(metrics), data=data, metric=metric_of(metrics), meant=meant)


def sentence(metrics: dict[str, np.ndarray], data: str, meant: str | None = None) -> str:
    """The headline, and what may be claimed and what not of every comparison."""
    details = verdict.details(values(metrics), sizes(metrics), data=data, metric=metric_of(metrics))
    return f"{headline(metrics, data, meant)} {details}"


def answers(metrics: dict[str, np.ndarray]) -> list[tuple[str, str]]:
    """Questions and answers of the control arms that are there."""
    return verdict.answers(values(metrics), sizes(metrics), metric_of(metrics))


class Point(NamedTuple):
    """What an arm gained, and at which price."""

    size: float  # parameters of what was kept, relative to the bare host
    flops: float  # executed in training the host, relative to the bare host; NaN where not measured
    gain: Interval  # over the bare host, in the metric's unit; more is better


def frontier(metrics: dict[str, np.ndarray]) -> dict[str, Point]:
    """Of each arm; the bare host is where all begin, and its gain is 0 without an interval."""
    kept, size, metric = values(metrics), sizes(metrics), metric_of(metrics)
    gain = verdict.gains({arm: metric.sign * value for arm, value in kept.items()})
    work = by_arm(metrics, "train_flops") if "arms/train_flops" in metrics else {}
    flops = {arm: float(np.nanmean(spent) / np.nanmean(work[BASELINE])) for arm, spent in work.items()}
    start = Interval(0.0, np.nan, np.nan, kept[BASELINE].shape[1])
    return {
        arm: Point(float(np.nanmean(size[arm])), flops.get(arm, np.nan), gain[arm].interval if arm in gain else start)
        for arm in kept
    }


def robust(metrics: dict[str, np.ndarray]) -> tuple[tuple[str, ...], list[list[str]]]:
    """Columns and rows that no outlier can move: what a mean may hide. By resampling, so it takes a second.

    The interquartile mean of an arm's gains over the bare host (in the metric's unit, as in `table`), and how probably
    it is better than the bare host in an environment.
    """
    kept, metric, rows = values(metrics), metric_of(metrics), []
    for arm in (arm for arm in kept if arm != BASELINE):
        middle = bootstrap_interval(interquartile_mean, kept[arm] - kept[BASELINE])
        better = probability_of_improvement(kept[arm], kept[BASELINE], higher_is_better=metric.higher_is_better)
        low, high = (f"{100 * value:.0f}" for value in better[1:3])
        share = "-" if np.isnan(better.mean) else f"{100 * better.mean:.0f} %"
        interval = "" if np.isnan(better.low) else f" [{low}, {high}]"
        rows.append([arm, plus_minus(middle, metric.digits), share + interval])
    return ("arm", f"interquartile mean - {BASELINE}", f"better than {BASELINE}"), rows


def samples(metrics: dict[str, np.ndarray], prompt: str, text: Callable[[np.ndarray], str]) -> str:
    """What the bare and the learned networks of the first environment write after a prompt.

    Args:
      text: of tokens.
    """
    metric, kept = metric_of(metrics), measured(metrics)
    parts = [
        "What networks of the first environment write, each token drawn with the same dice for all (of what was kept).",
        f"The prompt is where the report-test block begins: {prompt!r}",
        f"An arm that kept no seed can still differ from {BASELINE}: a seed that left has changed the host's training.",
    ]
    for arm in (BASELINE, *LEARNED):
        for a in np.flatnonzero(metrics["arms/names"] == arm):
            policy = f" {metrics['arms/policy_seed'][a]}" if arm in LEARNED else ""
            fossils = int(metrics["arms/fossilised"][a, 0])
            facts = f"{kept[a, 0]:.{metric.digits}f} {metric.unit}, {fossils} seed{'s' * (fossils != 1)} kept"
            parts.append(f"--- {arm}{policy}: {facts}\n\n{text(metrics['arms/text'][a, 0])}")
    return "\n\n".join(parts) + "\n"


def text_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned with spaces, the first to the left and the others to the right."""
    lines = [columns, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    aligned = [[c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(x, widths, strict=True))] for x in lines]
    return "\n".join("  ".join(line).rstrip() for line in aligned)
