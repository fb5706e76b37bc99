"""The pictures of how seeds lived: what was kept where and when, lives of single seeds, and what was decided.

As in `figures`, each function returns the panels of one picture. Axis letters: A arms (a learned arm once per policy),
E environments, T epochs, S slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np

from esper_jax.enums import BASELINE, POLICY, Op, Stage
from esper_jax.evidence import growth, tables, verdict
from esper_jax.evidence.canvas import (
    COLOURS,
    HATCHES,
    PAPER,
    STAGE_COLOURS,
    Axes,
    FigureBase,
    Line2D,
    Panel,
    Patch,
    PolyCollection,
    on_colour,
    plain_axes,
    whole_numbers,
)
from esper_jax.evidence.controls import is_rule
from esper_jax.evidence.tables import measured, metric_of
from esper_jax.metric import Metric

MOST_TOGETHER = 4  # arms in a panel of what was kept
Arrays = dict[str, np.ndarray]
# Stages by letter, since colours alone are not for everyone.
LETTERS = {stage: stage.name[0] for stage in STAGE_COLOURS}


def grown(metrics: Arrays, data: str) -> list[Panel]:
    """Which module each arm kept in which slot, in how many environments, and when."""
    names = [str(name) for name in metrics["arms/names"]]
    rows = [a for a, name in enumerate(names) if name != BASELINE]
    envs, slots = metrics["arms/stage"].shape[1], metrics["arms/stage"].shape[-1]
    groups: list[list[int]] = []
    for _, each in groupby(rows, key=lambda a: names[a] if names.count(names[a]) > 1 else ""):
        together = list(each)
        groups += [together[i : i + MOST_TOGETHER] for i in range(0, len(together), MOST_TOGETHER)]
    caption = (
        f"Which module was kept in which slot on {data}, as a share of {envs} environments (blank: none), with the "
        "median epochs of germination and fossilisation where there is room; in the titles the mean difference to "
        f"{BASELINE} and the parameters of what was kept."
    )
    return [
        Panel(
            partial(_kept, metrics=metrics, shown=shown),
            f"The same for {', '.join(_titles(names, metrics, shown))}." if i else caption,
            0.55 + len(shown) * (0.42 + 0.36 * slots),
        )
        for i, shown in enumerate(groups)
    ]


def _titles(names: Sequence[str], metrics: Arrays, rows: Sequence[int]) -> list[str]:
    alone = lambda a: names.count(names[a]) == 1
    return [names[a] if alone(a) else f"{names[a]} {metrics['arms/policy_seed'][a]}" for a in rows]


def _kept(figure: FigureBase, metrics: Arrays, shown: Sequence[int]) -> None:
    stage, blueprint, modules = metrics["arms/stage"], metrics["arms/blueprint"], metrics["arms/blueprints"]
    names = [str(name) for name in metrics["arms/names"]]
    metric, results = metric_of(metrics), measured(metrics)
    n_slots, envs = stage.shape[-1], stage.shape[1]
    panels = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
    drawn = set()
    for axes, a, title in zip(panels, shown, _titles(names, metrics, shown), strict=True):
        for s in range(n_slots):
            left, bottom = 0.0, n_slots - 1 - s  # slot 0 on top, where the features come from
            kept = stage[a, :, -1, s] == Stage.FOSSILIZED
            kinds, counts = np.unique(blueprint[a, kept, -1, s], return_counts=True)
            for kind, count in sorted(zip(kinds, counts, strict=True), key=lambda pair: -pair[1]):
                here = kept & (blueprint[a, :, -1, s] == kind)
                born, done = (np.median(_first(stage[a, here, :, s], wanted)) for wanted in _MILESTONES)
                drawn.add(kind)
                axes.barh(bottom, count / envs, 0.8, left, edgecolor=PAPER, **_blueprint_look(kind))
                text = f"{modules[kind]} {born:.0f} to {done:.0f}"
                if count / envs * 62 > len(text):  # as many letters fit into the whole width
                    colour = _blueprint_look(kind)["facecolor"]
                    look = {"color": on_colour(colour), "bbox": {"facecolor": colour, "linewidth": 0, "pad": 0.5}}
                    at = left + count / envs / 2, bottom
                    axes.text(*at, text, ha="center", va="center", fontsize=8, **look)
                left += count / envs
        if not (stage[a, :, -1] == Stage.FOSSILIZED).any():
            axes.text(0.5, (n_slots - 1) / 2, "nothing kept", ha="center", va="center")
        gain = np.nanmean(results[a] - results[names.index(BASELINE)])
        size = np.nanmean(metrics["arms/committed_size"][a, :, -1])
        axes.set_title(f"{title}: {gain:+.{_digits(metric)}f} {metric.points}, ×{size:.2f}")
        axes.set_yticks(range(n_slots), [f"slot {s}" for s in reversed(range(n_slots))])
        axes.set_ylim(-0.5, n_slots - 0.5)
        axes.set_xlim(0, 1)
    panels[-1].set_xticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])
    handles = [Patch(edgecolor=PAPER, label=modules[kind], **_blueprint_look(kind)) for kind in sorted(drawn)]
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)), handlelength=1.5)


_MILESTONES = (Stage.GERMINATED, Stage.FOSSILIZED)


def _digits(metric: Metric) -> int:
    """Behind the point, in pictures: of accuracies one less than in tables."""
    return metric.digits - metric.higher_is_better


def _first(stage: np.ndarray, wanted: Stage) -> np.ndarray:
    """Epoch, counted from 1, at whose end each of `[E, T]` was in a stage for the first time since it was last empty.

    A germination is the epoch after which the slot was never empty again.
    """
    epochs = stage.shape[1]
    if wanted == Stage.GERMINATED:
        gone = ~np.isin(stage, growth.LIVE)
        return np.where(gone.any(1), epochs - np.argmax(gone[:, ::-1], axis=1) + 1, 1)
    return np.argmax(stage == wanted, axis=1) + 1


def _blueprint_look(kind: int) -> dict[str, Any]:
    """Colour of a module by its number in the catalog, and a hatch of its own."""
    rank = int(kind) - 1
    return {"facecolor": COLOURS[rank % len(COLOURS)], "hatch": HATCHES[rank % len(HATCHES)]}


def seeds(metrics: Arrays, data: str) -> list[Panel]:
    """Lives of the seeds in three environments: where the first policy gained the most, the median, and the least; in
    the median one those of the best rule, too."""
    names = [str(name) for name in metrics["arms/names"]]
    if POLICY not in names:
        return []
    metric, results = metric_of(metrics), measured(metrics)
    base, a = results[names.index(BASELINE)], names.index(POLICY)
    gain = (results[a] - base) * metric.sign
    order = [env for env in np.argsort(gain, kind="stable") if not np.isnan(gain[env])]
    if not order:
        return []
    places = {"best": order[-1], "median": order[(len(order) - 1) // 2], "worst": order[0]}
    shown = [(a, f"{POLICY} {metrics['arms/policy_seed'][a]}", place, env) for place, env in places.items()]
    rule = verdict.best(tables.values(metrics), filter(is_rule, dict.fromkeys(names)), metric)
    if rule is not None:
        shown.append((names.index(rule), rule, "median", places["median"]))
    panels: list[Panel] = []
    for row, name, place, env in shown:
        difference = results[row, env] - base[env]
        title = f"{name}, {place} environment ({env}): {difference:+.{_digits(metric)}f} {metric.points}"
        caption = f"Lives of the seeds of {name} in the environment where {shown[0][1]} {_PLACES[place]}."
        if not panels:
            caption += (
                f" On {data}; in the titles the difference to {BASELINE}. A lane per slot: colours and letters are "
                "stages at the end of each epoch, the height of the full colour how much of it is blended in (alpha)."
            )
        panels.append(
            Panel(
                partial(_life, metrics=metrics, row=row, env=int(env), title=title),
                caption,
                1.45 + 0.68 * metrics["arms/stage"].shape[-1],
            )
        )
    return panels


_PLACES = {"best": "gained the most", "median": "had its median gain", "worst": "gained the least"}


def _life(figure: FigureBase, metrics: Arrays, row: int, env: int, title: str) -> None:
    axes = figure.subplots()
    lanes = (metrics[f"arms/{field}"][row, env] for field in ("stage", "alpha", "blueprint", "panic"))
    seen = _swimlanes(axes, metrics["arms/blueprints"], *lanes)
    axes.set_title(title)
    axes.set_xlabel("epoch of the host's training")
    whole_numbers(axes.xaxis)
    handles: list[Patch | Line2D] = [
        Patch(color=colour, label=f"{LETTERS[stage]} {stage.name.lower()}")
        for stage, colour in STAGE_COLOURS.items()
        if stage in seen
    ]
    if metrics["arms/panic"][row, env].any():
        handles.append(Line2D([], [], color="#d55e00", linestyle=":", label="rollback"))
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=4, handlelength=1)


def _swimlanes(
    axes: Axes, modules: np.ndarray, stage: np.ndarray, alpha: np.ndarray, blueprint: np.ndarray, panic: np.ndarray
) -> set[Stage]:
    """A lane for each slot of `[T, S]`; the stages that occur."""
    epochs, n_slots = stage.shape
    seen = set()
    for s in range(n_slots):
        bottom = n_slots - 1 - s  # slot 0 on top, where the features come from
        starts = [0, *(np.flatnonzero(np.diff(stage[:, s])) + 1).tolist()]
        for start, end in zip(starts, [*starts[1:], epochs], strict=True):
            kind = Stage(stage[start, s])
            if kind not in STAGE_COLOURS:
                continue
            seen.add(kind)
            colour = STAGE_COLOURS[kind]
            axes.barh(bottom, end - start, 0.5, start + 0.5, align="edge", color=colour, alpha=0.35, linewidth=0)
            edges = np.repeat(np.arange(start, end + 1), 2)[1:-1] + 0.5
            if alpha[start:end, s].any():
                top = bottom + 0.5 * np.repeat(alpha[start:end, s], 2)
                axes.fill_between(edges, bottom, top, color=colour, linewidth=0)
            axes.text(start + 0.55, bottom + 0.52, LETTERS[kind], fontsize=8, va="bottom", clip_on=True)
            if blueprint[start, s] >= 0 and (not start or blueprint[start, s] != blueprint[start - 1, s]):
                late = start > 0.75 * epochs
                at = (epochs + 0.5 if late else start + 0.55), bottom + 0.75
                axes.text(*at, modules[blueprint[start, s]], fontsize=8, va="bottom", ha="right" if late else "left")
    for t in np.flatnonzero(panic):
        axes.axvline(t + 1.5, color="#d55e00", linestyle=":")
    axes.set_yticks(np.arange(n_slots) + 0.25, [f"slot {s}" for s in reversed(range(n_slots))])
    axes.set_ylim(-0.1, n_slots)
    axes.set_xlim(0.5, epochs + 0.5)
    return seen


OP_COLOURS = {
    Op.WAIT: "#999999", Op.GERMINATE: "#56b4e9", Op.SET_ALPHA_TARGET: "#e69f00", Op.PRUNE: "#d55e00",
    Op.FOSSILIZE: "#009e73", Op.ADVANCE: "#1b80c4",
}  # fmt: skip


def decisions(metrics: Arrays, data: str) -> list[Panel]:
    """What the policies ask for, by epoch, and by the stage of the slot that they ask it for."""
    if "arms/requested_op" not in metrics or POLICY not in metrics["arms/names"]:
        return []
    by_op, by_stage = growth.decisions(metrics, POLICY)
    epochs = by_op.shape[1]
    x = np.arange(1, epochs + 1)
    there = ~np.isnan(by_op[0])

    def over_time(figure: FigureBase) -> None:
        axes = figure.subplots()
        bottom = np.zeros(epochs)
        for rank, op in enumerate(Op):
            if np.nansum(by_op[op]):
                look: dict[str, Any] = {"facecolor": OP_COLOURS[op], "hatch": HATCHES[rank], "edgecolor": PAPER}
                axes.bar(x[there], by_op[op][there], 1, bottom[there], label=_words(op), linewidth=0.2, **look)
                bottom = bottom + by_op[op]
        axes.set_xlim(0.5, epochs + 0.5)
        axes.set_ylim(0, 1)
        axes.set_xlabel("epoch of the host's training")
        axes.set_ylabel("share of decisions")
        whole_numbers(axes.xaxis)
        axes.legend(ncols=3, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2, handlelength=1.5)

    pairs = sorted(by_stage, key=lambda pair: (pair[0], pair[1]))
    most = max((float(np.nanmax(by_stage[pair])) for pair in pairs), default=1.0)

    def over_stage(figure: FigureBase) -> None:
        axes = figure.subplots()
        for row, pair in enumerate(reversed(pairs)):
            for t in np.flatnonzero(np.nan_to_num(by_stage[pair])).tolist():
                shade = 0.25 + 0.75 * by_stage[pair][t] / most
                axes.add_collection(_cell(t + 1, row, OP_COLOURS[pair[0]], shade))
        labels = [f"{_words(op)} ({stage.name.lower()})" for op, stage in reversed(pairs)]
        axes.set_yticks(range(len(pairs)), labels)
        totals = [np.nanmean(by_stage[pair]) for pair in reversed(pairs)]
        for row, total in enumerate(totals):
            text = f"{100 * total:.1f} %" if total >= 0.0005 else "<0.1 %"
            axes.text(epochs + 0.7, row, text, va="center", fontsize=8)
        axes.set_xlim(0.5, epochs + 0.5)
        axes.set_ylim(-0.6, max(len(pairs), 1) - 0.4)
        axes.set_xlabel("epoch of the host's training")
        whole_numbers(axes.xaxis)
        plain_axes(axes)
        axes.grid(False, axis="y")

    n = int(metrics["arms/decision_valid"][metrics["arms/names"] == POLICY][..., -1].sum())
    panels = [
        Panel(
            over_time,
            f"What the policies ask for on {data}: shares of {n} decisions at each epoch (all policies and "
            "environments), also of those where nothing but waiting was legal.",
        )
    ]
    if pairs:
        panels.append(
            Panel(
                over_stage,
                "Each operation but waiting, in brackets the stage of the slot that it is asked for, by epoch: the "
                f"fuller the colour, the larger the share of decisions (full: {100 * most:.0f} %; blank: never). On "
                "the right the share over all epochs.",
                0.8 + 0.27 * len(pairs),
            )
        )
    return panels


def _words(op: Op) -> str:
    return op.name.lower().replace("_", " ")


def _cell(x: float, y: float, colour: str, shade: float) -> PolyCollection:
    corners = [(x - 0.5, y - 0.42), (x + 0.5, y - 0.42), (x + 0.5, y + 0.42), (x - 0.5, y + 0.42)]
    return PolyCollection([corners], facecolors=colour, alpha=shade, linewidths=0)
