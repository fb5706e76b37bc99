"""The pictures of a run, as PNG files from the arrays of metrics.npz.

Axis letters: A arms, E environments, T epochs, S slots, R rounds.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from esper_jax.report import BASELINE
from esper_jax.statistics import mean_interval
from esper_jax.train import POLICY
from esper_jax.types import BLUEPRINTS, Stage

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


def curves(path: Path, metrics: dict[str, np.ndarray], data: str) -> str:
    """Validation accuracy by epoch, and its paired difference to the baseline. Returns the caption."""
    names = [str(name) for name in metrics["arms/names"]]
    accuracy = metrics["arms/val_accuracy"]
    _, envs, epochs = accuracy.shape
    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    base = names.index(BASELINE)
    for axes, samples in ((left, accuracy), (right, accuracy - accuracy[base])):
        ends = {}
        for a, name in enumerate(names):
            if axes is right and a == base:
                continue
            middle = _band(axes, np.arange(1, epochs + 1), samples[a], _style(names, name))
            ends[name] = middle[-1]
        _label_ends(axes, epochs, ends, names)
        axes.set_xlabel("epoch of the host's training")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    left.set_ylabel("validation accuracy (%)")
    right.set_ylabel(f"paired difference to {BASELINE} (percentage points)")
    right.axhline(0, color="black", linewidth=1)
    figure.suptitle(f"Accuracy on {data}: {envs} environments per arm, same keys in every arm")
    figure.savefig(path, dpi=110)
    return (
        f"Validation accuracy by epoch on {data}: mean of {envs} environments with 95 % intervals (Student t), and the "
        f"paired difference to the bare host ({BASELINE})."
    )


def learning(path: Path, metrics: dict[str, np.ndarray], data: str) -> str:
    """What the policy got better at while it was trained. Returns the caption."""
    reward, accuracy = metrics["rounds/reward"], metrics["rounds/val_accuracy"]
    rounds, envs = accuracy.shape[:2]
    figure = Figure(figsize=(12, 4), layout="constrained")
    panels = figure.subplots(1, 3)
    x = np.arange(1, rounds + 1)
    for axes, samples, label in (
        (panels[0], np.nansum(reward, axis=2), "return of an episode (sum of rewards)"),
        (panels[1], accuracy[:, :, -1], "final validation accuracy (%)"),
    ):
        _band(axes, x, samples.T, {"color": COLOURS[0], "marker": "."})
        axes.set_ylabel(label)
    panels[2].plot(x, metrics["learner/entropy"], color=COLOURS[1], marker=".")
    panels[2].set_ylabel("entropy of the policy (1: undecided)")
    panels[2].set_ylim(0, 1.05)
    for axes in panels:
        axes.set_xlabel("round")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"Training of the policy on {data}: {envs} environments per round")
    figure.savefig(path, dpi=110)
    return f"Training of the policy: mean of {envs} environments per round with 95 % intervals (Student t), entropy."


def seeds(path: Path, metrics: dict[str, np.ndarray], data: str, env: int | None = None) -> str:
    """The life of the seeds in one environment under each arm that grows. Returns the caption.

    By default it is the environment whose test accuracy under the policy is the median one.
    """
    names = [str(name) for name in metrics["arms/names"]]
    accuracy = metrics["arms/test_accuracy"]
    if env is None:
        samples = accuracy[names.index(POLICY)]
        env = int(np.argsort(samples, kind="stable")[(len(samples) - 1) // 2])
    shown = [name for name in names if name != BASELINE]
    n_slots = metrics["arms/stage"].shape[-1]
    epochs = metrics["arms/stage"].shape[2]
    figure = Figure(figsize=(12, 1 + len(shown) * (0.35 + 0.4 * n_slots)), layout="constrained")
    panels = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
    for axes, name in zip(panels, shown, strict=True):
        a = names.index(name)
        lanes = (metrics[f"arms/{field}"][a, env] for field in ("stage", "alpha", "blueprint", "panic"))
        _swimlanes(axes, *lanes)
        axes.set_title(f"{name}: test accuracy {accuracy[a, env]:.1f} %", loc="left", fontsize=10)
    panels[-1].set_xlabel("epoch of the host's training")
    panels[-1].set_xlim(0.5, epochs + 0.5)
    panels[-1].xaxis.get_major_locator().set_params(integer=True)
    handles = [Patch(color=colour, label=stage.name.lower()) for stage, colour in STAGE_COLOURS.items()]
    handles.append(Line2D([], [], color="red", linestyle=":", label="rollback"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8, frameon=False)
    figure.suptitle(f"Seeds in environment {env} on {data} (pale: not blended in; full colour: up to alpha)")
    figure.savefig(path, dpi=110)
    return (
        f"Life of the seeds in environment {env} (the median one under the policy): a lane per slot, coloured by stage "
        "at the end of each epoch; the height of the full colour is alpha, how much of the seed is blended in."
    )


def _swimlanes(axes: Axes, stage: np.ndarray, alpha: np.ndarray, blueprint: np.ndarray, panic: np.ndarray) -> None:
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
            axes.text(x[t] - 0.4, bottom + 0.42, BLUEPRINTS[blueprint[t, s]], fontsize=7, va="center")
    for t in np.flatnonzero(panic):
        axes.axvline(x[t] + 0.5, color="red", linestyle=":")
    axes.set_yticks(np.arange(n_slots) + 0.42, [f"slot {s}" for s in reversed(range(n_slots))])
    axes.set_ylim(-0.1, n_slots)
    axes.spines[["top", "right"]].set_visible(False)


def _style(names: list[str], name: str) -> dict:
    """The policy stands out, the bare host is black; an arm looks the same in every picture."""
    if name == BASELINE:
        return {"color": "black", "linestyle": "--"}
    if name == POLICY:
        return {"color": "#d55e00", "linewidth": 3}
    others = [other for other in names if other not in (BASELINE, POLICY)]
    return {"color": COLOURS[others.index(name) % len(COLOURS)]}


def _band(axes: Axes, x: np.ndarray, samples: np.ndarray, style: dict) -> np.ndarray:
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
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xticks([tick for tick in axes.get_xticks() if 1 <= tick <= last])
    axes.set_xlim(1, last * 1.25)
