"""Detectors on the same traces: what each of them says, and how it scores.

A detector sees an environment's epochs in their order and says of each whether it alarms; only its first alarm counts.
Those of `governor.judge` are the product's own code, run over the traces. The others are rivals from the literature,
with windows that fit some tens of epochs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

import jax
import numpy as np

from esper_jax.config import GovernorConfig
from esper_jax.env import governor
from experiments.faults.population import HARM_EPOCHS, KINDS, NUMBER, Cell, Plan, Trace

NEVER = 10**6  # epoch of an alarm that does not come
HARMFUL_POINTS = 5.0


class Cases(NamedTuple):
    """Environments with whatever was done to them, from their first epoch on: [N, L] with L epochs at most."""

    trace: Trace
    length: np.ndarray  # i32 [N] epochs there are
    twin_loss: np.ndarray  # f32 [N, L] of the same without a fault
    onset: np.ndarray  # i32 [N] first epoch that can show it
    harmful: np.ndarray  # bool [N]
    cells: Cell


def cases(plan: Plan, base: Trace, cells: Cell, window: Trace) -> Cases:
    """Whole courses of the continued environments, and which faults did harm: the mean accuracy of ten epochs is more
    than five points below that of the clean twin."""
    start, length = np.array(plan.times)[cells.time], plan.epochs
    at = np.arange(length)[None] - start[:, None]  # [N, L] epoch of the window
    inside = np.clip(at, 0, plan.window - 1)

    def joined(base, window):
        shape = at.shape + (1,) * (base.ndim - 2)
        later = np.take_along_axis(window, inside.reshape(shape), axis=1)
        return np.where((at < 0).reshape(shape), base[cells.seed], later)

    trace = jax.tree.map(joined, base, window)
    twin = twin_rows(cells)
    first = np.array([[_onset(kind, t, plan) for t in plan.times] for kind in KINDS])[cells.kind, cells.time]
    during = (at >= first[:, None]) & (at < first[:, None] + HARM_EPOCHS)
    drop = np.where(during, trace.accuracy[twin] - trace.accuracy, 0).sum(1) / HARM_EPOCHS
    harmless = np.array([kind.harmless for kind in KINDS])[cells.kind]
    harmful = ~harmless & (drop > HARMFUL_POINTS)
    return Cases(
        trace, start + plan.window, trace.loss[twin], start + first, harmful, cells
    )  # fmt: skip


def twin_rows(cells: Cell) -> np.ndarray:
    """Rows of the environments in which the same was done, without a fault."""
    clean = {}
    for row, (seed, number, severity, time) in enumerate(zip(*cells, strict=True)):
        kind = KINDS[number]
        if kind.harmless and kind.name in (kind.script, "clean"):
            clean[kind.script, seed, time, severity] = row
    found = zip(*cells, strict=True)
    return np.array([clean[KINDS[number].script, seed, time, severity] for seed, number, severity, time in found])


def _onset(kind, time: int, plan: Plan) -> int:
    return -time % plan.snapshot_epochs if kind.after_snapshot else kind.onset


# --- detectors: bool [N, L], where they alarm ------------------------------------------------------------------------

Detector = Callable[[Cases, int, float], np.ndarray]  # (cases, examples that validate, loss of a uniform guess)


def product(cfg: GovernorConfig) -> Detector:
    """The governor's own judgement, without a rollback."""

    def alarms(cases: Cases, measured: int, guess: float) -> np.ndarray:
        trace = cases.trace

        def epoch(state, row):
            seen = governor.Vitals(
                row.loss, row.accuracy, governor.accuracy_std(row.accuracy, measured), row.train_loss, row.sizes,
                row.finite,
            )  # fmt: skip
            state = governor.restated(state, row.rise)
            state, verdict = governor.judge(state, seen, cfg=cfg, random_guess_loss=guess)
            return state, verdict.panic

        start = governor.init(cfg, trace.sizes.shape[-1])
        run = jax.jit(jax.vmap(lambda rows: jax.lax.scan(epoch, start, rows)[1]))
        return np.asarray(run(trace))

    return alarms


def _each(course: Callable[..., int], *fields: str) -> Detector:
    """A detector from a function of one environment's courses, which returns the epoch of its alarm or NEVER."""

    def alarms(cases: Cases, measured: int, guess: float) -> np.ndarray:
        columns = [getattr(cases.trace, field) for field in fields]
        out = np.zeros(columns[0].shape, bool)
        for row, length in enumerate(cases.length):
            when = course(*(column[row, :length] for column in columns))
            if when < length:
                out[row, when] = True
        return out

    return alarms


def _loss_spike(loss: np.ndarray, window: int = 10, factor: float = 2.0, patience: int = 4) -> int:
    """llm-foundry's KillLossSpike: more than `patience` losses in a row at twice the mean of the last ones."""
    held, high = [], 0
    for t, value in enumerate(loss):
        if not np.isfinite(value):
            return t
        if len(held) >= window:
            high = high + 1 if value >= factor * np.mean(held[-window:]) else 0
            if high > patience:
                return t
        held.append(value)
    return NEVER


def _six_sigma(loss: np.ndarray, norm: np.ndarray, window: int = 10) -> int:
    """OLMo-core's rule: a loss or a gradient norm six deviations above the mean of the last ones."""
    for t in range(len(loss)):
        for values in (loss, norm):
            past = values[max(0, t - window) : t]
            high = t >= window and values[t] > past.mean() + 6 * past.std()
            if high or not np.isfinite(values[t]):
                return t
    return NEVER


def _cusum(loss: np.ndarray, window: int = 10, limit: float = 6.0, drift: float = 1.5, floor: float = 0.08) -> int:
    """One-sided CUSUM of the log loss against a median of its last values, in robust deviations of its differences."""
    total, held = 0.0, []
    for t, value in enumerate(np.log(np.maximum(loss, 1e-6))):
        if not np.isfinite(value):
            return t
        z = 0.0
        if len(held) >= window:
            past = np.array(held[-window:])
            steps = np.diff(past)
            spread = max(1.4826 * np.median(np.abs(steps - np.median(steps))), floor)
            z = (value - np.median(past[-5:])) / spread
            total = max(0.0, total + z - drift)
            if total > limit:
                return t
        if z <= 3:
            held.append(value)
    return NEVER


def _twin(cases: Cases, measured: int, guess: float) -> np.ndarray:
    """The loss against that of the same environment without a fault, which a lone environment does not know."""
    return ~np.isfinite(cases.trace.loss) | (cases.trace.loss - cases.twin_loss > GovernorConfig().loss_rise * guess)


_OFF = 1e9
_DEFAULT = GovernorConfig()
_LOSS_ALONE = replace(_DEFAULT, train_loss_rise=_OFF, accuracy_drop=_OFF, weight_growth=_OFF)

DETECTORS: Mapping[str, Detector] = {
    "robust (default)": product(_DEFAULT),
    "robust, validation loss alone": product(_LOSS_ALONE),
    "robust, without training loss": product(replace(_DEFAULT, train_loss_rise=_OFF)),
    "robust, without accuracy": product(replace(_DEFAULT, accuracy_drop=_OFF)),
    "robust, without weights": product(replace(_DEFAULT, weight_growth=_OFF)),
    "reference": product(GovernorConfig(rules="reference")),
    "loss spike (llm-foundry)": _each(_loss_spike, "loss"),
    "six deviations (OLMo-core)": _each(_six_sigma, "loss", "gradient_norm"),
    "log CUSUM": _each(_cusum, "loss"),
    "twin": _twin,
}
DEFAULT = "robust (default)"


# --- scores ----------------------------------------------------------------------------------------------------------


class Share(NamedTuple):
    """So many of so many."""

    hits: int
    n: int

    @property
    def value(self) -> float:
        """NaN of none."""
        return self.hits / self.n if self.n else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """95 %, Wilson 1927."""
        if not self.n:
            return math.nan, math.nan
        z, p, n = 1.959964, self.value, self.n
        middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)

    @classmethod
    def of(cls, hits: np.ndarray, among: np.ndarray | None = None) -> Share:
        hits = hits if among is None else hits[among]
        return cls(int(hits.sum()), int(hits.size))


def first_alarm(alarms: np.ndarray, length: np.ndarray) -> np.ndarray:
    """i32 [N]: epoch of the first alarm, or NEVER."""
    there = alarms & (np.arange(alarms.shape[1])[None] < length[:, None])
    return np.where(there.any(1), there.argmax(1), NEVER)


class Score(NamedTuple):
    """Of one detector on one half of the seeds."""

    recall: Share  # harmful faults with an alarm that came neither before them nor never
    early: Share  # harmful faults with an alarm before them
    false_alarms_clean: Share  # clean base runs, of all their epochs
    false_alarms_confusers: Share
    alarms_harmless: Share  # of faults that did no harm: no mistake
    median_delay: float  # epochs from the first one that can show the fault
    p95_delay: float
    by_kind: dict[str, Share]  # recall, or of confusers their alarms


def score(when: np.ndarray, when_clean: np.ndarray, cases: Cases, clean: Cases, half: int) -> Score:
    """Of a detector's first alarms in the cases and in the clean environments, i32 [N] each, on the seeds of one half
    (their number modulo 2)."""
    of_half, clean_half = cases.cells.seed % 2 == half, clean.cells.seed % 2 == half
    alarmed, late = when < NEVER, when >= cases.onset
    harmful, harmless = cases.harmful & of_half, ~cases.harmful & of_half
    confuser = np.array([kind.harmless and kind.name != "clean" for kind in KINDS])[cases.cells.kind]
    fault = np.array([not kind.harmless for kind in KINDS])[cases.cells.kind]
    delays = (when - cases.onset)[harmful & alarmed & late]
    by_kind = {}
    for number, kind in enumerate(KINDS):
        mine = (cases.cells.kind == number) & (of_half if kind.harmless else harmful)
        by_kind[kind.name] = Share.of(alarmed if kind.harmless else alarmed & late, mine)
    return Score(
        recall=Share.of(alarmed & late, harmful),
        early=Share.of(alarmed & ~late, harmful),
        false_alarms_clean=Share.of(when_clean < NEVER, clean_half),
        false_alarms_confusers=Share.of(alarmed, confuser & of_half),
        alarms_harmless=Share.of(alarmed, fault & harmless),
        median_delay=float(np.median(delays)) if delays.size else math.nan,
        p95_delay=float(np.percentile(delays, 95)) if delays.size else math.nan,
        by_kind=by_kind,
    )


def clean_cases(base: Trace) -> Cases:
    """The base environments themselves."""
    n, length = base.loss.shape
    none = np.zeros(n, np.int32)
    full = np.full(n, length)
    number = np.full(n, NUMBER["clean"], np.int32)
    return Cases(base, full, base.loss, full, np.zeros(n, bool), Cell(np.arange(n, dtype=np.int32), number, none, none))
