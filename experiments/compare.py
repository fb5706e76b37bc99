"""Several runs side by side; those that differ by their seed alone as one experiment: what holds on average over seeds.

    python -m experiments.compare RUN RUN... [--page FILE.html]

A run is one draw: its policies, its environments and their data orders follow from its seed. So a number here is a mean
over runs of a run's own mean, and its interval is Student's over runs. This is how an experiment is spread over
machines: a run for each seed of a job array, in folders of one's choice. Runs that differ by anything else, such as
reward, host or data, are other groups, named by what differs, and never pooled; a group of one run has that run's own
intervals, which say nothing about other seeds.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import tyro

from esper_jax.enums import BASELINE, Stage
from esper_jax.evidence import report, tables
from esper_jax.evidence.statistics import CONFIDENCE, Interval, crossed_interval, holm, mean_interval, signed
from esper_jax.metric import Metric
from esper_jax.run import command, files, options, provenance, records
from esper_jax.run.console import Console

PROGRAM = "python -m experiments.compare"
MOST_FIELDS = 12  # of those in which groups differ, on the screen; a page has all


class Finished(NamedTuple):
    """What is read of a run."""

    folder: Path
    card: dict[str, Any]
    gain: dict[str, Interval]  # of each arm over the baseline, in the metric's unit, what was kept; better is more
    size: dict[str, float]  # of what was kept, relative to the bare host
    learned: dict[str, np.ndarray]  # f[R] means over policies and environments, by what is measured
    metric: Metric


def read(folder: Path) -> Finished:
    """Raises ValueError naming the folder or file for what is no finished run."""
    card = provenance.read_finished(folder)
    metrics = records.read_arrays(folder / "metrics.npz")
    try:
        kept, metric = tables.values(metrics), tables.metric_of(metrics)
        gain = {arm: crossed_interval(metric.sign * (value - kept[BASELINE])) for arm, value in kept.items()}
        size = {arm: tables.measured_mean(value) for arm, value in tables.sizes(metrics).items()}
        learned = _learned(metrics, metric)
    except (KeyError, IndexError, TypeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{folder / 'metrics.npz'}: must be the arrays of a run: {reason}") from None
    return Finished(folder, card, gain, size, learned, metric)


def _learned(metrics: dict[str, np.ndarray], metric: Metric) -> dict[str, np.ndarray]:
    """Empty if no policy was trained."""
    if "rounds/reward" not in metrics:
        return {}
    at_end = {name: metrics[f"rounds/{name}"][..., -1] for name in ("val_accuracy", "val_loss")}
    samples = {
        "return of an episode": np.nansum(metrics["rounds/reward"], axis=-1),
        "seeds kept per episode": (metrics["rounds/stage"][..., -1, :] == Stage.FOSSILIZED).sum(-1),
        f"validation {metric.name} ({metric.unit})": metric.value(at_end["val_accuracy"], at_end["val_loss"]),
    }
    return {name: values.mean((1, 2)) for name, values in samples.items()}


def fields(run: Finished) -> dict[str, Any]:
    """What decides a run besides its seed (and where and on how many devices it ran), by dotted names."""
    flat: dict[str, Any] = {}
    for part, value in run.card["config"].items():
        flat |= {f"{part}.{name}": v for name, v in value.items()} if isinstance(value, dict) else {part: value}
    apart = ("seed", "devices", "data.data_dir", "data.files")
    identity = provenance.digest(run.card["data"]["identity"])
    rest = {
        "data": f"{run.card['data']['name']} ({identity})", "arms": " ".join(run.gain), "metric": run.metric.name,
    }  # fmt: skip
    return {name: value for name, value in flat.items() if name not in apart} | rest


def grouped(runs: list[Finished]) -> list[list[Finished]]:
    """Runs that differ by their seeds alone together, in the order in which they came.

    Raises ValueError if two of a group have the same seed.
    """
    groups: list[list[Finished]] = []
    for run in runs:
        for group in groups:
            if fields(group[0]) == fields(run):
                group.append(run)
                break
        else:
            groups.append([run])
    for group in groups:
        seeds: dict[int, Path] = {}
        for run in group:
            seed = run.card["config"]["seed"]
            if seed in seeds:
                raise ValueError(f"{run.folder}: has the seed {seed}, as {seeds[seed]} has: must be another draw")
            seeds[seed] = run.folder
    return groups


def differing(groups: list[list[Finished]]) -> dict[str, list[str]]:
    """The fields in which groups differ, with the value of each; "-" where one has no such field."""
    found = [fields(group[0]) for group in groups]
    names = dict.fromkeys(name for each in found for name in each)
    values = {name: [_value(each[name]) if name in each else "-" for each in found] for name in names}
    return {name: each for name, each in values.items() if len(set(each)) > 1}


def _value(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(_value, value)) or "none"
    return "none" if value is None else str(value)


def names(groups: list[list[Finished]]) -> list[str]:
    """A letter each, with what differs if that is one or two fields, and otherwise with the data's name."""
    data = [group[0].card["data"]["name"] for group in groups]
    if len(groups) == 1:
        return data
    letters = [chr(ord("A") + i) if i < 26 else str(i + 1) for i in range(len(groups))]
    found = differing(groups)
    if len(found) <= 2:
        data = [", ".join(f"{name} = {values[i]}" for name, values in found.items()) for i in range(len(groups))]
    return [f"{letter}: {what}" for letter, what in zip(letters, data, strict=True)]


def pooled(group: list[Finished]) -> dict[str, Interval]:
    """Gain of each arm, as a mean over runs with Student's interval; of one run its own interval."""
    if len(group) == 1:
        return group[0].gain
    return {arm: mean_interval(np.array([run.gain[arm].mean for run in group])) for arm in group[0].gain}


def rows(group: list[Finished]) -> tuple[list[str], list[list[str]]]:
    """Columns and cells, an arm each: mean gain with its interval, size, and every run's own."""
    digits, unit = group[0].metric.digits, group[0].metric.unit
    seeds = [f"seed {run.card['config']['seed']}" for run in group]
    found = pooled(group)
    certain = holm(np.array([np.nan if arm == BASELINE else each.p for arm, each in found.items()])) <= 1 - CONFIDENCE
    cells = []
    for (arm, interval), sure in zip(found.items(), certain, strict=True):
        size = tables.times(np.array([run.size[arm] for run in group]))
        own = [signed(run.gain[arm].mean, digits) for run in group]
        mean = tables.plus_minus(interval, digits) + ("" if np.isnan(interval.half) else "*" if sure else " ")
        cells.append([arm, "-", size, *("-" for _ in group)] if arm == BASELINE else [arm, mean, size, *own])
    return ["arm", f"gain over {BASELINE}, {unit}", "params", *seeds], cells


def note(group: list[Finished]) -> str:
    """What has to be known to read `rows`."""
    kind, data = group[0].card["preset"], group[0].card["data"]["name"]
    over = (
        f"Student's t over {len(group)} runs of preset {kind} on {data} with different seeds"
        if len(group) > 1
        else f"one run of preset {kind} on {data}, over its own environments and policies, which says nothing about "
        "other seeds"
    )
    better = "" if group[0].metric.higher_is_better else f" {group[0].metric.name} saved: more is better."
    star = "* beyond chance at 5 %, corrected for the number of arms (Holm)"
    return f"± 95 %, {over}; {star}. What was kept, on report-test.{better}"


def page(groups: list[list[Finished]]) -> str:
    """All of it as one self-contained HTML page."""
    from esper_jax.evidence import canvas  # matplotlib is slow to import
    from esper_jax.evidence import pooled as pictures

    drawn = [
        pictures.Group(
            name, group[0].metric, {arm: np.array([run.gain[arm].mean for run in group]) for arm in group[0].gain},
            pooled(group), _together(group),
        )
        for name, group in zip(names(groups), groups, strict=True)
    ]  # fmt: skip
    inline = lambda name, panels: report.html_panels(
        report.Drawn(canvas.svg(panel, f"{name}{i}"), panel.caption) for i, panel in enumerate(panels)
    )
    sections = {"Gains": inline("gains", pictures.gains(drawn))}
    if learning := pictures.learning(drawn):
        sections["Learning"] = inline("learning", learning)
    if len(groups) > 1:
        columns, cells = _differences(groups)
        sections["In what the groups differ"] = report.html_table(columns, cells, "words")
    runs = [
        (name, str(run.card["config"]["seed"]), str(run.folder), str(run.card["command"]))
        for name, group in zip(names(groups), groups, strict=True)
        for run in group
    ]
    sections["Runs"] = report.html_table(("group", "seed", "folder", "command"), runs, "words")
    top = "".join(
        f"<h3>{report.escaped(name)}</h3>\n{report.html_table(*rows(group))}{report.html_note([note(group)])}"
        for name, group in zip(names(groups), groups, strict=True)
    )
    n = sum(map(len, groups))
    return report.document(f"esper_jax: {n} runs, {len(groups)} group{'s' * (len(groups) > 1)}", top, sections)


def _together(group: list[Finished]) -> dict[str, np.ndarray]:
    """f[N, R] by what is measured. Runs of a group have as many rounds."""
    return {name: np.stack([run.learned[name] for run in group]) for name in group[0].learned}


def _differences(groups: list[list[Finished]]) -> tuple[list[str], list[list[str]]]:
    letters = [name.partition(":")[0] for name in names(groups)]
    return ["field", *letters], [[name, *values] for name, values in differing(groups).items()]


def main(argv: list[str] | None = None) -> int:
    command.use_plain_streams()

    def chosen(
        runs: Annotated[tuple[Path, ...], tyro.conf.Positional], page: Path | None = None
    ) -> tuple[tuple[Path, ...], Path | None]:
        """Several finished runs: those that differ by their seed as one experiment, others side by side.

        Args:
          runs: their folders, two at least.
          page: an HTML file to write, with pictures.
        """
        return runs, page

    def work() -> None:
        console = Console()
        folders, file = options.cli(chosen, sys.argv[1:] if argv is None else argv, prog=PROGRAM)
        if len(folders) < 2:
            raise ValueError(f"{' '.join(map(str, folders)) or 'no folder'}: must be the folders of two runs or more")
        if file is not None:
            files.check_free(file)
        groups = grouped([read(folder) for folder in folders])
        for name, group in zip(names(groups), groups, strict=True):
            if len(groups) > 1:
                console.say(name, style="bold", always=True)
            console.table(*rows(group))
            console.say(note(group), always=True)
            console.say(always=True)
        if len(groups) > 1:
            columns, cells = _differences(groups)
            console.say("In what the groups differ:", style="bold", always=True)
            console.table(columns, cells[:MOST_FIELDS])
            if len(cells) > MOST_FIELDS:
                console.say(f"and {len(cells) - MOST_FIELDS} more, which --page lists", always=True)
        if file:
            files.write_text(file, page(groups))
            console.say(f"wrote {file}", always=True)

    return command.ended(work)


if __name__ == "__main__":
    command.leave(main())
