"""The result of a run: its table and its sentence, from the arrays of metrics.npz."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from esper_jax.enums import BASELINE, LEARNED
from esper_jax.evidence.statistics import METHOD, crossed_interval, signed, verdict

# 80 columns have to be enough for a table.
COLUMNS = ("arm", "test %", f"minus {BASELINE}", "final %", f"loss - {BASELINE}", "params", "kept")
NOTES = (
    f"{METHOD}.",
    "* the interval of the difference excludes 0; not corrected for the number of comparisons.",
    "test %, differences, params (relative to the bare host): of what was kept (fossilised). final %: of the network",
    f"as it was at the end. loss - {BASELINE}: nats of report-test loss, lower is better. kept: seeds per environment.",
)


def by_arm(metrics: dict[str, np.ndarray], field: str) -> dict[str, np.ndarray]:
    """f[P, E] of each arm, P = 1 for a rule, from the arrays of metrics.npz."""
    names = [str(name) for name in metrics["arms/names"]]
    return {arm: metrics[f"arms/{field}"][[name == arm for name in names]] for arm in dict.fromkeys(names)}


def sizes(metrics: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """f[P, E] parameters of each arm's committed networks, relative to the bare host."""
    return {arm: size[..., -1] for arm, size in by_arm(metrics, "committed_size").items()}


def table(metrics: dict[str, np.ndarray]) -> list[list[str]]:
    """The cells under `COLUMNS`, a row per arm; "-" for what was not measured."""
    accuracy, final, loss, kept = (
        by_arm(metrics, field) for field in ("test_committed", "test_accuracy", "test_committed_loss", "fossilised")
    )
    size, rows = sizes(metrics), []
    for arm in accuracy:
        difference = lambda samples, arm=arm: "-" if arm == BASELINE else _starred(samples[arm] - samples[BASELINE])
        plain = (_plain(np.nanmean(accuracy[arm])), difference(accuracy), _plain(np.nanmean(final[arm])))
        rows.append([arm, *plain, difference(loss), f"x{size[arm].mean():.2f}", f"{kept[arm].mean():.1f}"])
    return rows


def _plain(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.2f}"


def _starred(samples: np.ndarray) -> str:
    interval = crossed_interval(samples)
    half = interval.high - interval.mean
    text = signed(interval.mean) + ("" if np.isnan(half) else f" ± {half:.2f}")
    return text + ("*" if interval.excludes_zero else " ")


def sentence(metrics: dict[str, np.ndarray], data: str) -> str:
    """What may be claimed and what not."""
    metric = "report-test accuracy of what was kept"
    accuracy = by_arm(metrics, "test_committed")
    return verdict(accuracy, sizes(metrics), learned=LEARNED, baseline=BASELINE, data=data, metric=metric)


def text_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned with spaces, the first to the left and the others to the right."""
    lines = [columns, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    aligned = [[c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(x, widths, strict=True))] for x in lines]
    return "\n".join("  ".join(line).rstrip() for line in aligned)
