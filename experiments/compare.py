"""Several runs that differ by their seed as one experiment: what holds on average over seeds.

    python -m experiments.compare RUN RUN RUN...

A run is one draw: its policies, its environments and their data orders follow from its seed. So a number here is a mean
over runs of a run's own mean, and its interval is Student's over runs; nothing is claimed from a single one. This is
how an experiment is spread over machines: a run for each seed of a job array, in folders of one's choice.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import tyro

from esper_jax.enums import BASELINE
from esper_jax.evidence import tables
from esper_jax.evidence.statistics import mean_interval, signed
from esper_jax.metric import Metric
from esper_jax.run import command, options, provenance, records
from esper_jax.run.console import Console

PROGRAM = "python -m experiments.compare"


class Finished(NamedTuple):
    """What is read of a run."""

    folder: Path
    card: dict[str, Any]
    gain: dict[str, float]  # of each arm over the baseline, in the metric's unit, what was kept; better is more
    size: dict[str, float]  # of what was kept, relative to the bare host
    metric: Metric


def read(folder: Path) -> Finished:
    """Raises ValueError naming the folder or file for what is no finished run."""
    card = provenance.read_finished(folder)
    metrics = records.read_arrays(folder / "metrics.npz")
    try:
        kept, metric = tables.values(metrics), tables.metric_of(metrics)
        sign = 1 if metric.higher_is_better else -1
        gain = {arm: sign * float(np.nanmean(value - kept[BASELINE])) for arm, value in kept.items()}
        size = {arm: float(np.nanmean(value)) for arm, value in tables.sizes(metrics).items()}
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{folder / 'metrics.npz'}: must be the arrays of a run: no {error}") from None
    return Finished(folder, card, gain, size, metric)


def check(runs: list[Finished]) -> None:
    """Raises ValueError unless the runs differ by their seeds alone (and where and on how many devices they ran)."""
    seeds: dict[int, Path] = {}
    first = runs[0]
    for run in runs:
        seed = run.card["config"]["seed"]
        if seed in seeds:
            raise ValueError(f"{run.folder}: has the seed {seed}, as {seeds[seed]} has: must be another draw")
        seeds[seed] = run.folder
        if not provenance.same_data(run.card["data"]["identity"], first.card["data"]["identity"]):
            raise ValueError(f"{run.folder}: is a run on other data than {first.folder}: must be the same")
        for name, value in fields(run).items():
            if value != fields(first).get(name):
                then = fields(first).get(name)
                raise ValueError(f"{run.folder}: {name} = {value}, but {then} in {first.folder}: must be the same")
        if list(run.gain) != list(first.gain):
            raise ValueError(f"{run.folder}: has the arms {', '.join(run.gain)}: must be {', '.join(first.gain)}")


def fields(run: Finished) -> dict[str, Any]:
    """What decides a run besides its seed, by dotted names."""
    flat: dict[str, Any] = {}
    for part, value in run.card["config"].items():
        flat |= {f"{part}.{name}": v for name, v in value.items()} if isinstance(value, dict) else {part: value}
    apart = ("seed", "devices", "data.data_dir", "data.files")
    return {name: value for name, value in flat.items() if name not in apart}


def rows(runs: list[Finished]) -> tuple[list[str], list[list[str]]]:
    """Columns and cells, an arm each: mean over runs with its interval, size, and every run's own."""
    digits, unit = runs[0].metric.digits, runs[0].metric.unit
    columns = [
        "arm",
        f"gain over {BASELINE}, {unit}",
        "params",
        *(f"seed {run.card['config']['seed']}" for run in runs),
    ]
    cells = []
    for arm in runs[0].gain:
        own = np.array([run.gain[arm] for run in runs])
        interval = mean_interval(own)
        half = interval.high - interval.mean
        known = "" if np.isnan(half) else f" ± {half:.{digits}f}" + ("*" if interval.excludes_zero else " ")
        mean = "-" if arm == BASELINE else signed(float(interval.mean), digits) + known
        size = np.mean([run.size[arm] for run in runs])
        cells.append([arm, mean, f"x{size:.2f}", *("-" if arm == BASELINE else signed(v, digits) for v in own)])
    return columns, cells


def main(argv: list[str] | None = None) -> int:
    command.use_plain_streams()

    def chosen(runs: Annotated[tuple[Path, ...], tyro.conf.Positional]) -> tuple[Path, ...]:
        """Several finished runs that differ by their seed, as one experiment.

        Args:
          runs: their folders, two at least.
        """
        return runs

    def work() -> None:
        console = Console()
        folders = options.cli(chosen, sys.argv[1:] if argv is None else argv, prog=PROGRAM)
        if len(folders) < 2:
            raise ValueError(f"{' '.join(map(str, folders)) or 'no folder'}: must be the folders of two runs or more")
        runs = [read(folder) for folder in folders]
        check(runs)
        console.table(*rows(runs))
        kind, data = runs[0].card["preset"], runs[0].card["data"]["name"]
        console.say(
            f"± 95 %, Student's t over {len(runs)} runs of preset {kind} on {data} with different seeds; * where that "
            "excludes 0. What was kept, on report-test.",
            always=True,
        )

    return command.ended(work)


if __name__ == "__main__":
    command.leave(main())
