"""The pictures of a run, as PNG files from the arrays of metrics.npz.

Axis letters: A arms (a learned arm once per policy), P policies, E environments, T epochs, S slots, R rounds.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np

from esper_jax.enums import BASELINE, LEARNED, POLICY, Stage
from esper_jax.evidence.statistics import mean_interval
from esper_jax.evidence.tables import measured, metric_of, values
from esper_jax.metric import Metric

# A backend that matplotlib does not know, such as the one that notebooks name, keeps it from being imported; none is
# used here.
_backend = os.environ.pop("MPLBACKEND", None)
try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator
finally:
    if _backend is not None:
        os.environ["MPLBACKEND"] = _backend

# Okabe-Ito: told apart by colour-blind readers, too.
COLOURS = ("#0072b2", "#009e73", "#cc79a7", "#56b4e9", "#8c564b", "#e69f00", "#999999", "#f0e442")
STAGE_COLOURS = {
    Stage.GERMINATED: "#f0e442",
    Stage.TRAINING: "#e69f00",
    Stage.BLENDING: "#56b4e9",
    Stage.HOLDING: "#cc79a7",
    Stage.FOSSILIZED: "#009e73",
    Stage.PRUNED: "#000000",
    Stage.EMBARGOED: "#888888",
    Stage.RESETTING: "#bbbbbb",
}


def _picture(draw: Callable[..., tuple[Figure, str]]) -> Callable[..., str]:
    """Of a function `(metrics, data, ...)` that draws, one `(path, metrics, data, ...)` that writes a PNG file and
    returns the caption.

    Drawn with matplotlib's own defaults, whatever the settings of the user; the file is either complete or absent.
    """

    @functools.wraps(draw)
    def write(path: Path, *args, **kwargs) -> str:
        work = path.with_name(path.name + ".tmp")
        try:
            with matplotlib.rc_context():
                matplotlib.rcdefaults()
                figure, caption = draw(*args, **kwargs)
                FigureCanvasAgg(figure).print_figure(work, format="png", dpi=110)
            work.replace(path)
        finally:
            with contextlib.suppress(OSError):
                work.unlink(missing_ok=True)
        return caption

    return write


@_picture
def curves(metrics: dict[str, np.ndarray], data: str) -> tuple[Figure, str]:
    """Validation by epoch, and its paired difference to the baseline."""
    metric = metric_of(metrics)
    found = {arm: samples.mean(0) for arm, samples in values(metrics, "val").items()}  # [E, T]
    names = list(found)
    envs, epochs = found[BASELINE].shape
    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, base in ((left, 0), (right, found[BASELINE])):
        ends = {}
        for name in names if axes is left else [name for name in names if name != BASELINE]:
            middle = _band(axes, np.arange(1, epochs + 1), found[name] - base, _style(names, name))
            ends[name] = middle[-1]
        _label_ends(axes, epochs, ends, names)
        axes.set_xlabel("epoch of the host's training")
        _plain_axes(axes)
    left.set_ylabel(f"validation {metric.name} ({metric.unit})")
    right.set_ylabel(f"paired difference to {BASELINE} ({metric.points})")
    right.axhline(0, color="black", linewidth=1)
    figure.suptitle(f"{metric.name} on {data}: {envs} environments per arm, same keys in every arm".capitalize())
    return figure, (
        f"Validation {metric.name} by epoch on {data}: mean of {envs} environments with 95 % intervals (Student t; a "
        f"learned arm is the mean of its policies), and the paired difference to the bare host ({BASELINE}). It is "
        "that of the whole network, also of seeds that were not kept in the end; the table is about what was kept."
    )


@_picture
def learning(metrics: dict[str, np.ndarray], data: str) -> tuple[Figure, str]:
    """What the policies got better at while they were trained."""
    kept = metrics["rounds/stage"][..., -1, :] == Stage.FOSSILIZED  # [R, P, E, S]
    rounds, policies, envs = kept.shape[:3]
    figure = Figure(figsize=(12, 4), layout="constrained")
    panels = figure.subplots(1, 3)
    x = np.arange(1, rounds + 1)
    for axes, samples, label in (
        (panels[0], np.nansum(metrics["rounds/reward"], axis=-1), "return of an episode (sum of rewards)"),
        (panels[1], kept.sum(-1), "seeds kept per episode"),
    ):
        for p in range(policies):
            _band(axes, x, samples[:, p].T, {"color": COLOURS[p % len(COLOURS)], "marker": "."})
        axes.set_ylabel(label)
    for p in range(policies):
        colour = COLOURS[p % len(COLOURS)]
        panels[2].plot(x, metrics["learner/entropy"][:, p], color=colour, marker=".", label=f"policy {p}")
    panels[2].legend(frameon=False)
    panels[2].set_ylabel("entropy of the policy (1: undecided)")
    panels[2].set_ylim(0, 1.05)
    for axes in panels:
        axes.set_xlabel("round")
        _whole_numbers(axes.xaxis)
        _plain_axes(axes)
    figure.suptitle(f"Training on {data}: {policies} x {envs} environments per round (policies x environments)")
    return figure, (
        f"Training of the policies: mean of {envs} environments per round with 95 % intervals (Student t): return, "
        "seeds kept, entropy."
    )


@_picture
def grown(metrics: dict[str, np.ndarray], data: str) -> tuple[Figure, str]:
    """Which module each arm kept in which slot, in how many environments, and when."""
    stage, blueprint = metrics["arms/stage"], metrics["arms/blueprint"]
    names, policies = [str(name) for name in metrics["arms/names"]], metrics["arms/policy_seed"]
    modules = metrics["arms/blueprints"]
    metric, results = metric_of(metrics), measured(metrics)
    alone = [name for name in names if names.count(name) == 1]
    shown = [a for a, name in enumerate(names) if name != BASELINE]
    n_slots, envs = stage.shape[-1], stage.shape[1]
    columns = min(3, len(shown))
    lines = -(-len(shown) // columns)
    figure = Figure(figsize=(4.4 * columns, lines * (0.7 + 0.45 * n_slots) + 0.8), layout="constrained")
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).ravel()
    drawn = set()
    for axes, a in zip(panels, shown, strict=False):
        for s in range(n_slots):
            left, bottom = 0.0, n_slots - 1 - s  # slot 0 on top, where the features come from
            kept = stage[a, :, -1, s] == Stage.FOSSILIZED
            kinds, counts = np.unique(blueprint[a, kept, -1, s], return_counts=True)
            for kind, count in sorted(zip(kinds, counts, strict=True), key=lambda pair: -pair[1]):
                here = kept & (blueprint[a, :, -1, s] == kind)
                born, done = (np.median(_first(stage[a, here, :, s], wanted)) for wanted in _MILESTONES)
                drawn.add(kind)
                axes.barh(bottom, count / envs, 0.8, left, edgecolor="white", **_blueprint_look(kind))
                if count / envs > 0.28:
                    text = f"{modules[kind]}\n{born:.0f} to {done:.0f}"
                    axes.text(left + count / envs / 2, bottom, text, ha="center", va="center", fontsize=7)
                left += count / envs
        if not (stage[a, :, -1] == Stage.FOSSILIZED).any():
            axes.text(0.5, (n_slots - 1) / 2, "nothing kept", ha="center", va="center", color="#777777")
        title = names[a] if names[a] in alone else f"{names[a]} {policies[a]}"
        gain = results[a] - results[names.index(BASELINE)]
        size = metrics["arms/committed_size"][a, :, -1].mean()
        axes.set_title(
            f"{title}: {gain.mean():+.{_digits(metric)}f} {metric.points}, x{size:.2f}", loc="left", fontsize=9
        )
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[len(shown) :]:
        axes.set_visible(False)
    panels[0].set_xlim(0, 1)
    panels[0].set_yticks(range(n_slots), [f"slot {s}" for s in reversed(range(n_slots))])
    handles = [Patch(edgecolor="white", label=modules[kind], **_blueprint_look(kind)) for kind in sorted(drawn)]
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8, frameon=False)
    figure.suptitle(
        f"What was kept on {data}: share of {envs} environments (numbers: epochs, germinated to fossilised)"
    )
    return figure, (
        f"Which module was kept in which slot, as a share of {envs} environments (white: none), with the median epochs "
        f"of germination and fossilisation; in the titles the mean gain over {BASELINE} and the parameters of what was "
        "kept. Learned arms have a panel per policy."
    )


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
        gone = ~np.isin(stage, [Stage.GERMINATED, Stage.TRAINING, Stage.BLENDING, Stage.HOLDING, Stage.FOSSILIZED])
        return epochs - np.argmax(gone[:, ::-1], axis=1) + 1
    return np.argmax(stage == wanted, axis=1) + 1


def _blueprint_look(kind: int) -> dict[str, Any]:
    """Colour of a module by its number in the catalog; hatched from the ninth on."""
    rank = int(kind) - 1
    return {"facecolor": COLOURS[rank % len(COLOURS)], "hatch": "/" * 3 * (rank // len(COLOURS))}


@_picture
def seeds(metrics: dict[str, np.ndarray], data: str, env: int | None = None) -> tuple[Figure, str]:
    """The life of the seeds in one environment under each arm that grows.

    A learned arm is shown with its first policy. By default it is the environment whose test result under that policy
    is the median one.
    """
    everyone = [str(name) for name in metrics["arms/names"]]
    names = list(dict.fromkeys(everyone))
    metric, results = metric_of(metrics), measured(metrics)
    if env is None:
        samples = results[everyone.index(POLICY)]
        env = int(np.argsort(samples, kind="stable")[(len(samples) - 1) // 2])
    shown = [name for name in names if name != BASELINE]
    n_slots = metrics["arms/stage"].shape[-1]
    epochs = metrics["arms/stage"].shape[2]
    figure = Figure(figsize=(12, 1 + len(shown) * (0.35 + 0.4 * n_slots)), layout="constrained")
    panels = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
    for axes, name in zip(panels, shown, strict=True):
        a = everyone.index(name)
        lanes = (metrics[f"arms/{field}"][a, env] for field in ("stage", "alpha", "blueprint", "panic"))
        _swimlanes(axes, metrics["arms/blueprints"], *lanes)
        axes.set_title(
            f"{name}: test {metric.name} of what was kept {results[a, env]:.{_digits(metric)}f}",
            loc="left",
            fontsize=10,
        )
    panels[-1].set_xlabel("epoch of the host's training")
    panels[-1].set_xlim(0.5, epochs + 0.5)
    _whole_numbers(panels[-1].xaxis)
    handles: list[Patch | Line2D] = [Line2D([], [], color="red", linestyle=":", label="rollback")]
    handles[:0] = [Patch(color=colour, label=stage.name.lower()) for stage, colour in STAGE_COLOURS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8, frameon=False)
    figure.suptitle(f"Seeds in environment {env} on {data} (pale: not blended in; full colour: up to alpha)")
    return figure, (
        f"Life of the seeds in environment {env} (the median one under the first policy): a lane per slot, coloured by "
        "stage at the end of each epoch; the height of the full colour is alpha, how much of the seed is blended in."
    )


def _swimlanes(
    axes: Axes, modules: np.ndarray, stage: np.ndarray, alpha: np.ndarray, blueprint: np.ndarray, panic: np.ndarray
) -> None:
    epochs, n_slots = stage.shape
    x = np.arange(1, epochs + 1)
    for s in range(n_slots):
        bottom = n_slots - 1 - s  # slot 0 on top, where the features come from
        for kind, colour in STAGE_COLOURS.items():
            here = stage[:, s] == kind
            axes.bar(x[here], 0.85, 1, bottom, color=colour, alpha=0.4, linewidth=0)
            axes.bar(x[here], 0.85 * alpha[here, s], 1, bottom, color=colour, linewidth=0)
        previous = np.concatenate([[-1], blueprint[:-1, s]])
        for t in np.flatnonzero((blueprint[:, s] >= 0) & (blueprint[:, s] != previous)):
            axes.text(x[t] - 0.4, bottom + 0.42, modules[blueprint[t, s]], fontsize=7, va="center")
    for t in np.flatnonzero(panic):
        axes.axvline(x[t] + 0.5, color="red", linestyle=":")
    axes.set_yticks(np.arange(n_slots) + 0.42, [f"slot {s}" for s in reversed(range(n_slots))])
    axes.set_ylim(-0.1, n_slots)
    axes.spines[["top", "right"]].set_visible(False)


def _whole_numbers(axis: Axis) -> None:
    """Ticks at whole epochs and rounds."""
    cast(MaxNLocator, axis.get_major_locator()).set_params(integer=True)  # what a linear axis starts with


def _plain_axes(axes: Axes) -> None:
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _style(names: list[str], name: str) -> dict:
    """The policy stands out, the bare host is black; an arm looks the same in every picture."""
    if name == BASELINE:
        return {"color": "black", "linestyle": "--"}
    if name in LEARNED:
        return {"color": "#d55e00", "linewidth": 3, "linestyle": "-" if name == POLICY else ":"}
    others = [other for other in names if other not in (BASELINE, *LEARNED)]
    return {"color": COLOURS[others.index(name) % len(COLOURS)]}


def _band(axes: Axes, x: np.ndarray, samples: np.ndarray, style: dict) -> Any:
    """Mean over the first axis, with its interval as a band. Returns the mean."""
    interval = mean_interval(samples)
    (line,) = axes.plot(x, interval.mean, **style)
    axes.fill_between(x, interval.low, interval.high, color=line.get_color(), alpha=0.12, linewidth=0)
    return interval.mean


def _label_ends(axes: Axes, last: int, ends: dict[str, float], names: list[str]) -> None:
    """Names beside the ends of the lines, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    gap = (high - low) * 0.045
    heights, previous = {}, -np.inf
    for name, end in sorted(ends.items(), key=lambda item: item[1]):
        previous = heights[name] = max(end, previous + gap)
    shift = np.mean([ends[name] - height for name, height in heights.items()])
    for name, height in heights.items():
        colour = _style(names, name)["color"]
        axes.annotate(
            name, (last, ends[name]), (last * 1.05, height + shift), color=colour, va="center",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 0},
        )  # fmt: skip
    _whole_numbers(axes.xaxis)
    axes.set_xticks([tick for tick in axes.get_xticks() if 1 <= tick <= last])
    axes.set_xlim(1, last * 1.25)
