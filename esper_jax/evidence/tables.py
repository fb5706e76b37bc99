"""The result of a run: its table and its sentence, from the arrays of metrics.npz."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from esper_jax.enums import BASELINE, LEARNED
from esper_jax.evidence.statistics import METHOD, crossed_interval, signed, verdict
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
        "* the interval of the difference excludes 0; not corrected for the number of comparisons.",
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
    for arm in kept:
        difference = lambda samples, digits=2, arm=arm: (
            "-" if arm == BASELINE else _starred(samples[arm] - samples[BASELINE], digits)
        )
        plain = (_plain(kept[arm], digits), difference(kept, digits), _plain(final[arm], digits))
        of_loss = difference(loss, 2 if metric.higher_is_better else digits)
        rows.append([arm, *plain, of_loss, f"x{size[arm].mean():.2f}", f"{fossils[arm].mean():.1f}"])
    return rows


def _plain(samples: np.ndarray, digits: int) -> str:
    value = np.nanmean(samples)
    return "-" if np.isnan(value) else f"{value:.{digits}f}"


def _starred(samples: np.ndarray, digits: int) -> str:
    interval = crossed_interval(samples)
    half = interval.high - interval.mean
    text = signed(interval.mean, digits) + ("" if np.isnan(half) else f" ± {half:.{digits}f}")
    return text + ("*" if interval.excludes_zero else " ")


def sentence(metrics: dict[str, np.ndarray], data: str, meant: str | None = None) -> str:
    """What may be claimed and what not; `meant` are other data, about which nothing may be."""
    metric = metric_of(metrics)
    kept, size = values(metrics), sizes(metrics)
    return verdict(kept, size, learned=LEARNED, baseline=BASELINE, data=data, metric=metric, meant=meant)


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
