"""The files of a finished run, and its result on the screen."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from esper_jax import data
from esper_jax.evidence import report, tables
from esper_jax.run import command, files, records
from esper_jax.run.console import Console


def publish(
    out: Path, console: Console, card: dict[str, Any], metrics: dict[str, np.ndarray], dataset: data.AnyDataset
) -> None:
    """First the numbers, which no picture can cost and nobody has to wait for.

    Args:
      card: run.json so far; what the run took is added.
    """
    with console.step("files", str(out)):
        records.write_arrays(out / "metrics.npz", metrics)
        files.write_lines(out / "lifecycle.jsonl", records.lifecycle(metrics))
        records.write_csv(out / "outcomes.csv", records.outcomes(metrics), records.OUTCOMES)
        columns, rows, notes, claim = result(metrics, card)
        text = "\n".join([title(card), "", tables.text_table(columns, rows), *notes, "", claim, ""])
        files.write_text(out / "summary.txt", text)
        if dataset.prompt is not None:
            samples = tables.samples(metrics, dataset.text(dataset.prompt), dataset.text)
            files.write_text(out / "samples.txt", samples)
    console.table(columns, rows)
    for line in (*notes, "", claim, ""):
        console.say(line, always=True)
    with console.step("report", str(out / "report.html")):
        seconds = console.durations | {"total": console.elapsed()}
        card = card | {"status": "complete", "seconds": {name: round(s, 2) for name, s in seconds.items()}}
        write_report(out, console, card, metrics)
        files.write_json(out / "run.json", card)  # last: it says that all is there
    console.say(f"wrote {out}{os.sep}  (open report.html)", always=True)


def publish_stopped(out: Path, console: Console, card: dict[str, Any]) -> None:
    """What there is of a run that was stopped: the arrays of its rounds, and how its policies learned."""
    rounds = records.RoundLog.read(out / "checkpoints" / "rounds")
    records.write_arrays(out / "metrics.npz", rounds)
    if pictures(out, console, card, rounds, ("learning",)).drawn:
        console.say(f"wrote {out / 'learning.png'}: what there is so far", always=True)


def title(card: dict[str, Any]) -> str:
    return f"esper_jax: {card['preset']} on {card['data']['name']}, seed {card['seed']}"


def result(
    metrics: dict[str, np.ndarray], card: dict[str, Any]
) -> tuple[tuple[str, ...], list[list[str]], tuple[str, ...], str]:
    """Columns and rows of a run's table, what has to be known to read it, and what may be claimed."""
    notes = tables.notes(metrics, card["data"].get("bigram_loss"))
    claim = tables.sentence(metrics, card["data"]["name"], card.get("meant"))
    return tables.columns(metrics), tables.table(metrics), notes, claim


def write_report(
    out: Path, console: Console, card: dict[str, Any], metrics: dict[str, np.ndarray], png: bool = True
) -> None:
    """report.html and, with `png`, the pictures that are files as well: of the run, and of the samples of text and the
    controls that are in its folder, if they are those of this run."""
    samples = (out / "samples.txt").read_text(encoding="utf-8") if (out / "samples.txt").exists() else ""
    controls = controls_of(out, metrics)
    if controls is None and (out / "controls.npz").exists():
        line = f"  {out / 'controls.npz'} is of another run or damaged: the report is without controls; play them again"
        console.say(line, style="bold red", always=True)
    if controls:
        if png:  # which show the run alone
            pictures(out, console, card, metrics)
        png, metrics, card = False, controls[0], card | {"controls": controls[1]}
    shown = pictures(out, console, card, metrics, png=png)
    page = report.page(title(card), metrics, card, shown, meant=card.get("meant"), samples=samples)
    files.write_text(out / "report.html", page)


def controls_of(out: Path, metrics: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
    """The arrays of a run with its controls, and what these were, if they were played and for the run as it is now."""
    try:
        arrays = records.read_arrays(out / "controls.npz")
        facts = json.loads((out / "controls.json").read_text(encoding="utf-8"))
        mine = np.isin(arrays["arms/names"], metrics["arms/names"])
        same = np.array_equal(arrays["arms/test_loss"][mine], metrics["arms/test_loss"])
    except (OSError, ValueError, KeyError, IndexError):  # there are none, or not all of them
        return None
    return (metrics | arrays, facts) if same else None


def pictures(
    out: Path,
    console: Console,
    card: dict[str, Any],
    metrics: dict[str, np.ndarray],
    names: tuple[str, ...] = (),
    png: bool = True,
) -> report.Pictures:
    """Draws pictures of a run for its page, by the names of their functions; all by default. One that fails costs no
    more than itself.

    Args:
      png: write those that are files as well.
    """
    shown = report.Pictures({}, {})

    def lose(name: str, what: str, error: Exception) -> None:
        shown.lost[name] = f"{type(error).__name__}: {command.line(error)}"
        console.say(f"  no {what}: {shown.lost[name]}", style="bold red", always=True)

    try:  # matplotlib is slow to import, and the first lines should be quick
        from esper_jax.evidence import figures
    except Exception as error:  # whatever an installation or its settings make it raise
        lose(report.ALL, "pictures", error)
        return shown
    for name in names or figures.PICTURES:
        path = out / f"{name}.png"
        is_file = png and name in figures.FILES
        try:
            panels = getattr(figures, name)(metrics, card["data"]["name"])
            if panels and is_file:
                figures.write(path, name, panels, card["data"]["name"])
            if panels:
                shown.drawn[name] = figures.inline(name, panels)
        except Exception as error:  # a run is worth more than a picture of it
            lose(name, path.name if is_file else f"picture of {name}", error)
            if is_file:
                path.unlink(missing_ok=True)
    return shown
