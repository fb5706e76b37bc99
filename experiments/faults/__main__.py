"""How well faults in training are noticed, and what becomes of them.

    python -m experiments.faults [--preset smoke|quick|full] [--out FILE.json]

puts faults into a population of hosts on the digits, compares detectors on the same traces, and then lets the default
governor act. A fault is harmful if the mean accuracy of the ten epochs from it on is more than five points below that
of the same environment without it. The governor's thresholds were chosen on the seeds of even numbers; what is reported
is about the others. smoke takes two to three minutes on two cores, quick a quarter of an hour, full more than an hour.
"""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from esper_jax import data, presets
from esper_jax.config import Config, GovernorConfig
from esper_jax.evidence.tables import text_table
from esper_jax.run import command, devices, files, options, provenance
from experiments.faults import detectors, population
from experiments.faults.detectors import DEFAULT, DETECTORS, Share
from experiments.faults.population import KINDS, NUMBER, Cell, Plan

PROGRAM = "python -m experiments.faults"
TIMES = (3, 8, 21, 41)  # two of them in the first ten epochs
PLANS = {
    "smoke": Plan(seeds=8, clean=32, times=(8, 21), window=25, all_severities=False),
    "quick": Plan(seeds=32, clean=128, times=TIMES, window=25, all_severities=False),
    "full": Plan(seeds=32, clean=512, times=TIMES, window=25, all_severities=True),
}
REPORTED = 1  # the half of the seeds, by their number modulo 2, that no threshold was chosen on
LAST_EPOCHS = 5  # of a window, whose mean accuracy is the final one
RECOVERED_POINTS = 1.0
NEVER_YET = 10**6
OVERHEAD_REPEATS = 7


@dataclass(frozen=True)
class Options:
    """Puts faults into training, compares detectors on the same traces, and lets the default governor act."""

    preset: Literal["smoke", "quick", "full"] = "quick"
    """how many seeds, times and severities of each fault"""
    out: Path | None = None
    """file for the rows and the summary, as JSON"""


def configuration(plan: Plan) -> Config:
    """The host of 1,386 parameters on the digits, which learns 96 % in 20 epochs."""
    return presets.get("quick", "digits").replace(
        host=presets.HOSTS["digits"],
        governor=GovernorConfig(),
        devices=0,
        **{
            "training.epochs": plan.epochs,
            "lifecycle.blueprints": ("conv_light", "attention"),
            "governor.snapshot_epochs": plan.snapshot_epochs,
        },
    )


def main(argv: list[str] | None = None) -> int:
    command.use_plain_streams()
    try:
        with command.refusing(ValueError, OSError):
            argv = sys.argv[1:] if argv is None else argv
            options.check(argv, Options)
            chosen = options.cli(Options, argv, prog=PROGRAM, default=Options())
            if chosen.out is not None and not chosen.out.absolute().parent.is_dir():
                raise ValueError(f"--out {chosen.out}: must be a file in a folder that exists")
            report = measure(PLANS[chosen.preset], print)
            report = {"preset": chosen.preset, **report}
            if chosen.out is not None:
                files.write_json(chosen.out, report)
                print(f"wrote {chosen.out}")
            return 0
    except command.Refusal as error:
        return command.refused(error)


def measure(plan: Plan, say) -> dict[str, Any]:
    """Everything; `say` prints a line."""
    started = time.perf_counter()
    cfg = configuration(plan)
    open_loop = cfg.replace(**{"governor.rules": "off"})
    dataset = data.load(cfg.data)
    measured, guess = int(dataset.validation.labels.size), math.log(dataset.outputs)
    cells = population.cells(plan)
    say(
        f"{dataset.name}: {plan.seeds} seeds, {len(plan.times)} times, {len(cells.seed):,} environments with something "
        f"done to them, {plan.clean} without"
    )
    base, play = population.make(open_loop, plan, dataset)
    kept, base_trace = base(np.arange(plan.clean, dtype=np.int32))
    trace = play(kept, cells)
    say(f"traces: {time.perf_counter() - started:.0f} s")
    cases = detectors.cases(plan, base_trace, cells, trace)
    clean = detectors.clean_cases(base_trace)
    halves = {}
    for name, detector in DETECTORS.items():
        alarms = [detectors.first_alarm(detector(seen, measured, guess), seen.length) for seen in (cases, clean)]
        halves[name] = [detectors.score(*alarms, cases, clean, half) for half in (0, 1)]
    scores = {name: pair[REPORTED] for name, pair in halves.items()}
    say("\n".join(["", *_detector_table(scores), "", *_kind_table(scores), ""]))

    _, governed = population.make(cfg, plan, dataset)
    acted = governed(kept, cells)
    outcome = recovery(plan, base_trace, cases, trace, acted)
    cost = overhead(plan, kept, {"off": play, "robust": governed})
    stored = size(jax.tree.map(lambda leaf: leaf[0, 0], kept))
    say("\n".join(_outcome_lines(outcome, cost, stored)))
    default = scores[DEFAULT]
    return {
        "recall": default.recall.value,
        "false_alarms_clean": default.false_alarms_clean.value,
        "false_alarms_confusers": default.false_alarms_confusers.value,
        "median_delay": default.median_delay,
        "p95_delay": default.p95_delay,
        "recovery": outcome["recovery"]["value"],
        "others_unchanged": outcome["others_unchanged"],
        "overhead": cost,
        "bytes": stored,
        "outcome": outcome,
        "detectors": {name: [_plain(score) for score in pair] for name, pair in halves.items()},
        "rows": _rows(plan, cases, trace, acted),
        "data": dataset.name,
        "device": provenance.device(cfg),
        "versions": provenance.versions(),
        "config": cfg.to_dict(),
        "seconds": round(time.perf_counter() - started, 1),
    }


# --- what the governor makes of it -----------------------------------------------------------------------------------


def recovery(plan: Plan, base, cases, free, acted) -> dict[str, Any]:
    """Of the harmful faults on the reported half that the governor rolled back, what came of them."""
    cells = cases.cells
    reported = cells.seed % 2 == REPORTED
    twin = detectors.twin_rows(cells)
    final = lambda trace: trace.accuracy[:, -LAST_EPOCHS:].mean(1)
    noticed = cases.harmful & reported & acted.panic.any(1)
    well = final(acted) >= final(free)[twin] - RECOVERED_POINTS
    permanent = np.array([kind.permanent for kind in KINDS])[cells.kind]
    lasting = np.array([kind.lasting for kind in KINDS])[cells.kind]
    start = np.array(plan.times)[cells.time]
    untouched = cells.kind == NUMBER["clean"]
    same = all(
        np.array_equal(mine[row], whole[cells.seed[row], start[row] : start[row] + plan.window])
        for mine, whole in ((acted.loss, base.loss), (acted.accuracy, base.accuracy), (acted.sizes, base.sizes))
        for row in np.flatnonzero(untouched)
    )
    groups = {"once": ~permanent & ~lasting, "learning rate for ever": lasting, "labels for ever": permanent}
    lost = _lost_epochs(plan, cells, acted, GovernorConfig().probation)
    return {
        "recovery": _share(Share.of(well, noticed & ~permanent)),
        "recovery_all": _share(Share.of(well, noticed)),
        "by_duration": {name: _share(Share.of(well, noticed & group)) for name, group in groups.items()},
        "without_governor": _share(Share.of(final(free) >= final(free)[twin] - RECOVERED_POINTS, noticed)),
        "other_order": _share(Share.of(well, reported & (cells.kind == NUMBER["another data order"]))),
        "by_kind": {
            kind.name: _share(Share.of(well, noticed & (cells.kind == number)))
            for number, kind in enumerate(KINDS)
            if (noticed & (cells.kind == number)).any()
        },
        "given_up": {name: _share(Share.of(acted.given_up[:, -1], noticed & group)) for name, group in groups.items()},
        "panics_median": float(np.median(acted.panic.sum(1)[noticed])) if noticed.any() else math.nan,
        "lost_epochs_median": float(np.median(lost[noticed])) if noticed.any() else math.nan,
        "lost_epochs_p95": float(np.percentile(lost[noticed], 95)) if noticed.any() else math.nan,
        "others_unchanged": bool(same),
    }


def _lost_epochs(plan: Plan, cells: Cell, acted, probation: int) -> np.ndarray:
    """i32 [N]: epochs of training that rollbacks threw away, the broken ones included, by the cadence of snapshots: one
    that was damaged counts as the one that was taken in its place."""
    start, lost = np.array(plan.times)[cells.time], np.zeros(len(cells.seed), np.int32)
    for row, first in enumerate(start):
        kept = first - first % plan.snapshot_epochs if first >= plan.snapshot_epochs else first  # epochs it has had
        older, trained, in_a_row, since = max(1, kept - plan.snapshot_epochs), first, 0, NEVER_YET
        for k in range(plan.window):
            if acted.given_up[row, k - 1] if k else False:
                break
            trained += 1
            if acted.panic[row, k]:
                in_a_row = in_a_row + 1 if since < probation else 1
                kept = kept if in_a_row == 1 else older
                lost[row] += trained - kept
                trained, since = kept, 0
            elif acted.accepted[row, k]:
                since += 1
                if (first + k + 1) % plan.snapshot_epochs == 0:
                    kept, older = trained, kept
    return lost


def overhead(plan: Plan, kept, programs: dict[str, Any]) -> dict[str, float]:
    """What judging costs an epoch: the same clean environments with the robust rules and without any, in turn."""
    n = min(plan.seeds, 8)
    column = np.zeros(n, np.int32)
    clean = Cell(np.arange(n, dtype=np.int32) % plan.seeds, column + NUMBER["clean"], column, column)
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for run in programs.values():
        run(kept, clean)
    for _ in range(OVERHEAD_REPEATS):
        for name, run in programs.items():
            begun = time.perf_counter()
            run(kept, clean)
            seconds[name].append(time.perf_counter() - begun)
    ratio = np.array(seconds["robust"]) / np.array(seconds["off"]) - 1
    quartiles = np.percentile(ratio, [25, 50, 75])
    return {"share_of_an_epoch": float(quartiles[1]), "quartile_distance": float(quartiles[2] - quartiles[0]),
            "n": len(ratio)}  # fmt: skip


def size(state) -> dict[str, int]:
    """Bytes of one environment."""
    of = lambda tree: int(sum(leaf.nbytes for leaf in jax.tree.leaves(tree)))
    return {
        "governor": of(state.governor),
        "two_snapshots": of((state.snapshot, state.older)),
        "model_and_optimiser": of((state.model, state.optimiser)),
    }


# --- what is shown ---------------------------------------------------------------------------------------------------


def _shown(share: Share, digits: int = 3) -> str:
    low, high = share.interval
    return f"{share.value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]" if share.n else "-"


def _detector_table(scores) -> list[str]:
    """On the reported half of the seeds, with 95 % Wilson intervals."""
    columns = ("detector", "recall", "clean", "confusers", "harmless", "delay", "p95", "n harmful/clean/confusers")
    rows = [
        (
            name, _shown(s.recall), _shown(s.false_alarms_clean), _shown(s.false_alarms_confusers),
            f"{s.alarms_harmless.value:.2f}", f"{s.median_delay:.0f}", f"{s.p95_delay:.0f}",
            f"{s.recall.n} / {s.false_alarms_clean.n} / {s.false_alarms_confusers.n}",
        )
        for name, s in scores.items()
    ]  # fmt: skip
    notes = (
        "recall: of harmful faults, with a first alarm that came not before them. clean, confusers: share of runs with",
        "an alarm. harmless: of faults that did no harm, no mistake. delay: epochs. Seeds that nothing was chosen on.",
    )
    return [text_table(columns, rows), *notes]


def _kind_table(scores) -> list[str]:
    """Per kind of fault or confuser: the default and the reference."""
    rows = []
    for kind in KINDS[1:]:
        mine = [scores[name].by_kind[kind.name] for name in (DEFAULT, "reference")]
        shown = [f"{share.hits} of {share.n}" for share in mine]
        rows.append((kind.name, "confuser" if kind.harmless else "fault", *shown))
    return [text_table(("what was done", "", "robust alarms", "reference alarms"), rows)]


def _outcome_lines(outcome, cost, stored) -> list[str]:
    shown = lambda entry: _shown(Share(entry["hits"], entry["n"]))
    durations = ", ".join(f"{name} {shown(entry)}" for name, entry in outcome["by_duration"].items())
    given_up = ", ".join(f"{name} {entry['hits']} of {entry['n']}" for name, entry in outcome["given_up"].items())
    ratio = stored["two_snapshots"] / stored["model_and_optimiser"]
    return [
        f"recovery (mean accuracy of the last {LAST_EPOCHS} epochs at most a point under the twin's) of harmful faults",
        f"that were rolled back, but for data that stay bad: {shown(outcome['recovery'])} n = "
        f"{outcome['recovery']['n']}; with these {shown(outcome['recovery_all'])}; {durations}",
        f"without a governor: {shown(outcome['without_governor'])}; no fault, but the batches in another "
        f"order, as after a rollback: {shown(outcome['other_order'])}",
        f"given up: {given_up}; panics per fault, median {outcome['panics_median']:.0f}; epochs lost, median "
        f"{outcome['lost_epochs_median']:.0f}, p95 {outcome['lost_epochs_p95']:.0f}",
        f"clean environments among the others bitwise as by themselves: {outcome['others_unchanged']}; judging costs "
        f"{100 * cost['share_of_an_epoch']:+.2f} % ± {100 * cost['quartile_distance']:.2f} of an epoch "
        f"(n = {cost['n']}); "
        f"two snapshots hold {stored['two_snapshots']:,} bytes, {ratio:.2f} of model and optimiser",
    ]


def _share(share: Share) -> dict[str, Any]:
    low, high = share.interval
    return {"value": share.value, "low": low, "high": high, "hits": share.hits, "n": share.n}


def _plain(score) -> dict[str, Any]:
    plain = {}
    for name, value in score._asdict().items():
        if isinstance(value, Share):
            value = _share(value)
        elif isinstance(value, dict):
            value = {kind: [share.hits, share.n] for kind, share in value.items()}
        plain[name] = value
    return plain


def _rows(plan: Plan, cases, free, acted) -> list[dict[str, Any]]:
    """One for each environment in which something was done."""
    twin = detectors.twin_rows(cases.cells)
    final = lambda trace, row: round(float(trace.accuracy[row, -LAST_EPOCHS:].mean()), 3)
    rows = []
    for row, (seed, number, severity, moment) in enumerate(zip(*cases.cells, strict=True)):
        kind = KINDS[number]
        panics = np.flatnonzero(acted.panic[row])
        rows.append({
            "seed": int(seed), "kind": kind.name, "confuser": kind.harmless, "severity": kind.severities[severity],
            "time": plan.times[moment], "harmful": bool(cases.harmful[row]),
            "final_twin": final(free, twin[row]), "final_free": final(free, row), "final_governed": final(acted, row),
            "first_panic": int(panics[0]) if panics.size else None, "panics": int(panics.size),
            "given_up": bool(acted.given_up[row, -1]),
        })  # fmt: skip
    return rows


if __name__ == "__main__":
    devices.use_cpus()  # a device per core, before the first use of a device
    command.leave(main())
