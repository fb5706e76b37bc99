"""The result of a run: its table and sentence, and one self-contained HTML page that works without a network."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from esper_jax.statistics import METHOD, crossed_interval, signed, verdict
from esper_jax.train import BASELINE, LEARNED

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


def page(title: str, rows: Sequence[Sequence[str]], claim: str, pictures: dict[Path, str], card: dict[str, Any]) -> str:
    """The HTML page of a run.

    Args:
      rows: cells under `COLUMNS`.
      pictures: PNG files and their captions; they are put into the page.
      card: the run card (run.json).
    """
    esc = html.escape
    head = "".join(f"<th>{esc(column)}</th>" for column in COLUMNS)
    body = "".join("<tr>" + "".join(f"<td>{esc(cell)}</td>" for cell in row) + "</tr>\n" for row in rows)
    figures = "".join(
        f'<figure><img alt="{esc(caption)}" src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'
        f"<figcaption>{esc(caption)}</figcaption></figure>\n"
        for path, caption in pictures.items()
    )
    data = card["data"]
    warning = "" if data["name"] == "cifar10" else f'<p class="loud">Data: {esc(data["name"])}, not CIFAR-10.</p>\n'
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{esc(title)}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; display: block; overflow-x: auto; }}
th, td {{ padding: .25rem .75rem; text-align: right; border-bottom: 1px solid #ddd; white-space: pre; }}
th:first-child, td:first-child {{ text-align: left; }}
figure {{ margin: 2rem 0; }} img {{ max-width: 100%; }} figcaption, .note {{ color: #555; font-size: .9rem; }}
.claim {{ border-left: .25rem solid #0072b2; padding: .25rem 1rem; }}
.loud {{ background: #d55e00; color: #fff; padding: .25rem 1rem; font-weight: bold; }}
pre {{ background: #f5f5f5; padding: 1rem; overflow-x: auto; font-size: .8rem; }}
</style>
<h1>{esc(title)}</h1>
{warning}<p class="claim">{esc(claim)}</p>
<table><thead><tr>{head}</tr></thead>
<tbody>{body}</tbody></table>
<p class="note">{"<br>".join(map(esc, NOTES))}</p>
{figures}<h2>Run card</h2>
<pre>{esc(json.dumps(card, indent=2))}</pre>
</html>
"""
