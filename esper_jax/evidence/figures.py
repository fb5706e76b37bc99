"""The pictures of a run from the arrays of metrics.npz: what was compared, and how the policies learned.

Each function here returns the panels of one picture, none where nothing was measured that it could show; how seeds
lived is drawn by `lives`. Axis letters: A arms (a learned arm once per policy), P policies, E environments, T epochs,
R rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from esper_jax.enums import BASELINE, HEADS, Stage
from esper_jax.evidence import canvas, growth, tables
from esper_jax.evidence.canvas import (
    COLOURS,
    HATCHES,
    INK,
    LEARNED_COLOUR,
    MARKERS,
    PAPER,
    FigureBase,
    Panel,
    arm_style,
    band,
    gain_of,
    height_for,
    interval_mark,
    label_right,
    plain_axes,
    policy_style,
    whole_numbers,
)
from esper_jax.evidence.controls import ORACLE, STATIC, WIDE, is_control
from esper_jax.evidence.lives import decisions, grown, seeds
from esper_jax.evidence.report import Drawn
from esper_jax.evidence.statistics import crossed_interval, rank_correlation
from esper_jax.evidence.tables import measured, metric_of, values

# In the order of a page; the functions here with these names.
PICTURES = (
    "learning", "paired", "frontier", "curves", "grown", "seeds", "rewards", "audit", "health", "decisions",
)  # fmt: skip
FILES = {  # those that are files of their own as well: panels side by side, title
    "grown": (3, "What was kept on"),
    "curves": (2, "Validation on"),
    "seeds": (2, "Lives of the seeds on"),
    "learning": (3, "Training on"),
}
__all__ = ["decisions", "grown", "seeds"]  # of `lives`, so that every picture is found here

MOST_DOTS = 4_000  # in one panel; of more, every n-th is drawn
Arrays = dict[str, np.ndarray]


def write(path: Path, name: str, panels: Sequence[Panel], data: str) -> None:
    """Writes one of `FILES`."""
    columns, title = FILES[name]
    canvas.png(path, panels, f"{title} {data}", min(columns, len(panels)))


def inline(name: str, panels: Sequence[Panel]) -> list[Drawn]:
    """The panels of a picture for a page."""
    return [Drawn(canvas.svg(panel, f"{name}{i}"), panel.caption) for i, panel in enumerate(panels)]


def gains(metrics: Arrays) -> dict[str, np.ndarray]:
    """f[P, E] of each arm but the baseline, over the baseline in the same environment; better is more."""
    kept, sign = values(metrics), metric_of(metrics).sign
    return {arm: sign * (value - kept[BASELINE]) for arm, value in kept.items() if arm != BASELINE}


def curves(metrics: Arrays, data: str) -> list[Panel]:
    """Validation by epoch, and its paired difference to the baseline."""
    metric = metric_of(metrics)
    found = {arm: samples.mean(0) for arm, samples in values(metrics, "val").items()}  # [E, T]
    names = labelled(list(found))
    envs, epochs = found[BASELINE].shape
    x = np.arange(1, epochs + 1)

    def draw(figure: FigureBase, shown: Sequence[str], base: np.ndarray | float, label: str) -> None:
        axes = figure.subplots()
        ends = {}
        for name in shown:
            style = arm_style(names, name) | {"markevery": max(1, epochs // 6)}
            ends[name] = float(epochs), float(band(axes, x, found[name] - base, style)[-1])
        if BASELINE not in shown:
            axes.axhline(0, color=INK, linewidth=1)
        axes.set_xlabel("epoch of the host's training")
        axes.set_ylabel(label)
        axes.set_xlim(1, epochs)
        whole_numbers(axes.xaxis)
        plain_axes(axes)
        label_right(axes, ends, {name: arm_style(names, name)["color"] for name in names}, height_for(len(names)))

    mean = f"mean of {envs} environments with 95 % intervals (a learned arm: of its policies' mean)"
    direction = "" if metric.higher_is_better else " (lower is better)"
    whole = "It is that of the whole network, also of seeds that were not kept in the end."
    return [
        Panel(
            lambda figure: draw(figure, names, 0.0, f"validation {metric.name} ({metric.unit})"),
            f"Validation {metric.name}{direction} while hosts train on {data}: {mean}. {whole}",
            height_for(len(names)),
        ),
        Panel(
            lambda figure: draw(figure, names[1:], found[BASELINE], f"minus {BASELINE} ({metric.points})"),
            f"The same minus the bare host ({BASELINE}) in the same environment, which is the line at 0.",
            height_for(len(names)),
        ),
    ]


def labelled(names: Sequence[str]) -> list[str]:
    """The arms that have a name in a picture: of many, those of the run and the yardsticks among the controls."""
    return [name for name in names if len(names) <= 10 or not is_control(name) or name in (ORACLE, STATIC, WIDE)]


def learning(metrics: Arrays, data: str) -> list[Panel]:
    """What the policies got better at while they were trained."""
    if "rounds/reward" not in metrics:
        return []
    kept = (metrics["rounds/stage"][..., -1, :] == Stage.FOSSILIZED).sum(-1).mean(-1)  # [R, P]
    earned = np.nansum(metrics["rounds/reward"], axis=-1).mean(-1)
    policies, envs = metrics["rounds/reward"].shape[1:3]
    of = f"mean of {envs} environments, a thin line for each of {policies} policies, a thick one for their mean "
    of += "with its 95 % band (Student t over policies)"
    if policies == 1:
        of = f"mean of {envs} environments under the one policy that was trained, so there is no band"
    panels = [
        Panel(
            lambda figure: _by_round(figure, earned, "return of an episode", mean=True),
            f"Return (sum of rewards) of a training episode on {data} by round: {of}.",
        ),
        Panel(
            lambda figure: _by_round(figure, kept, "seeds kept per episode", mean=True),
            "Seeds that were kept (fossilised) per training episode; lines as before.",
        ),
    ]
    if "rounds/val_accuracy" in metrics:
        metric = metric_of(metrics) if "metric/name" in metrics else None
        right, loss = (metrics[f"rounds/val_{name}"][..., -1].mean(-1) for name in ("accuracy", "loss"))
        reached = loss if metric is None else metric.value(right, loss)
        what = "loss (nats)" if metric is None else f"{metric.name} ({metric.unit})"
        panels.append(
            Panel(
                lambda figure: _by_round(figure, reached, f"validation {what}", mean=True),
                f"Validation {what} that hosts of training episodes had reached at their last epoch; lines as before.",
            )
        )
    return panels


def _by_round(figure: FigureBase, samples: np.ndarray, label: str, *, mean: bool = False) -> None:
    """A line for each policy of f[R, P], and one for their mean."""
    axes = figure.subplots()
    rounds, policies = samples.shape
    x, every = np.arange(1, rounds + 1), max(1, rounds // 8)
    for p in range(policies):
        style = {"linewidth": 0.8 if mean else 1.3, "alpha": 0.8, "markevery": every, "label": f"policy {p}"}
        axes.plot(x, samples[:, p], **policy_style(p) | style)
    if mean and policies > 1:
        band(axes, x, samples.T, {"color": INK, "linewidth": 2.2, "label": "mean"})
    axes.set_xlabel("round")
    axes.set_ylabel(label)
    whole_numbers(axes.xaxis)
    plain_axes(axes)
    if policies > 1:
        axes.legend(ncols=3, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2, handlelength=1.5)


def paired(metrics: Arrays, data: str) -> list[Panel]:
    """The difference to the baseline in each environment, a strip for each arm."""
    metric, found = metric_of(metrics), gains(metrics)
    names = list(found)
    envs = next(iter(found.values())).shape[1] if found else 0
    step = max(1, -(-envs * len(names) // MOST_DOTS))
    if not found:
        return []

    def draw(figure: FigureBase) -> None:
        axes = figure.subplots()
        axes.axvline(0, color=INK, linewidth=1)
        places = np.random.default_rng(0).uniform(-0.16, 0.16, envs)  # so that dots do not hide each other
        for row, name in enumerate(reversed(names)):
            style, samples, interval = arm_style(names, name), found[name], crossed_interval(found[name])
            dots = samples.mean(0)[::step]
            axes.plot(dots, (row + places)[::step], "o", color=style["color"], markersize=3, alpha=0.7, mew=0)
            if len(samples) > 1:
                means = np.nanmean(samples, axis=1)
                axes.plot(means, np.full(len(means), row - 0.3), "D", color=style["color"], markersize=5, mec=PAPER)
            interval_mark(axes, interval, row + 0.3)
        axes.set_yticks(range(len(names)), names[::-1])
        axes.set_ylim(-0.6, len(names) - 0.4)
        axes.set_xlabel(f"gain over {BASELINE} ({gain_of(metric)})")
        plain_axes(axes)
        axes.grid(False, axis="y")

    caption = (
        f"Gain of each arm over the bare host ({BASELINE}) on {data}: a dot per environment (of a learned arm, the "
        "mean of its policies), a diamond below them per policy, and above them the mean with its 95 % interval. Right "
        "of 0 is better; where an interval covers 0 nothing may be claimed. Intervals are not corrected for the number "
        "of arms, the stars of the table are."
    )
    return [Panel(draw, caption + _thinned(step), 0.7 + 0.42 * len(names))]


def _thinned(step: int) -> str:
    return f" One in {step} dots is drawn." if step > 1 else ""


def frontier(metrics: Arrays, data: str) -> list[Panel]:
    """Gain against the size of what was kept, and against what training it cost."""
    metric, points = metric_of(metrics), tables.frontier(metrics)
    names = list(points)
    costs = {
        "parameters of what was kept": {name: point.size for name, point in points.items()},
        "FLOPs of the training that was executed": {name: point.flops for name, point in points.items()},
    }

    def draw(figure: FigureBase, label: str, cost: dict[str, float]) -> None:
        axes = figure.subplots()
        axes.axhline(0, color=INK, linewidth=1)
        for name, (_, _, gain) in points.items():
            style = arm_style(names, name)
            look = {"color": style["color"], "fmt": style["marker"], "markersize": 7, "capsize": 3, "elinewidth": 1.5}
            axes.errorbar([cost[name]], [gain.mean], yerr=None if np.isnan(gain.half) else gain.half, **look)
        axes.set_xscale("log")
        _multiples(axes, list(cost.values()))
        axes.set_xlabel(f"{label}, relative to {BASELINE}")
        axes.set_ylabel(f"gain ({gain_of(metric)})")
        plain_axes(axes)
        ends = {name: (cost[name], float(points[name].gain.mean)) for name in labelled(names)}
        label_right(axes, ends, {name: arm_style(names, name)["color"] for name in ends}, height_for(len(ends)))

    return [
        Panel(
            partial(draw, label=label, cost=cost),
            f"Gain over {BASELINE} on {data} with its 95 % interval against {label} (mean; the axis counts factors, so "
            "equal steps are equal ratios). Up and to the left is better: more gained with less."
            + " What has no name is another control."
            * (len(labelled(names)) < len(names)),
            height_for(len(labelled(names))),
        )
        for label, cost in costs.items()
        if not np.isnan(list(cost.values())).all()
    ]


def _multiples(axes, found: Sequence[float]) -> None:
    """Ticks of a logarithmic axis at plain factors."""
    low, high = min(1.0, *found), max(1.0, *found)
    axes.set_xlim(low / 1.08, max(high * 1.08, low * 1.2))
    fine = (0.1, 0.2, 0.5, 1, 1.02, 1.05, 1.1, 1.2, 1.5, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000)
    inside = [tick for tick in fine if low / 1.08 <= tick <= high * 1.08]
    gap = np.log(high / low) / 5
    ticks: list[float] = []
    for tick in sorted(inside, key=lambda tick: tick != 1):  # 1 has its tick before all others
        if all(abs(np.log(tick / other)) >= gap for other in ticks):
            ticks.append(tick)
    axes.set_xticks(ticks, [f"×{tick:g}" for tick in ticks])
    axes.minorticks_off()


def rewards(metrics: Arrays, data: str) -> list[Panel]:
    """The parts of the reward, stacked to the return."""
    if "rounds/reward" not in metrics:
        return []
    parts, total = growth.reward_parts(metrics), growth.mean_return(metrics)

    def draw(figure: FigureBase) -> None:
        axes = figure.subplots()
        x = np.arange(1, len(total) + 1)
        up, down = np.zeros(len(total)), np.zeros(len(total))
        for rank, (name, part) in enumerate(parts.items()):
            look: dict[str, Any] = {
                "facecolor": COLOURS[rank % len(COLOURS)], "hatch": HATCHES[rank % len(HATCHES)], "edgecolor": PAPER,
                "linewidth": 0.3, "label": name.replace("_", " "),
            }  # fmt: skip
            axes.bar(x, part, 0.85, np.where(part >= 0, up, down), **look)
            up, down = up + np.maximum(part, 0), down + np.minimum(part, 0)
        axes.plot(x, total, color=INK, marker="o", linewidth=1.5, label="return (their sum)")
        axes.axhline(0, color=INK, linewidth=1)
        axes.set_xlabel("round")
        axes.set_ylabel("reward of an episode")
        axes.set_xlim(0.4, len(total) + 0.6)
        whole_numbers(axes.xaxis)
        plain_axes(axes)
        axes.legend(ncols=3, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2, handlelength=1.5)

    episodes = np.prod(metrics["rounds/reward"].shape[1:3])
    caption = (
        f"What the reward was made of on {data}: each part summed over an episode, as the mean of the {episodes} "
        "training episodes of a round. Parts below 0 are what was paid; the line is the return, the sum of all parts."
    )
    return [Panel(draw, caption)]


def returns_and_gains(metrics: Arrays) -> tuple[np.ndarray, np.ndarray]:
    """f[A, E] return of each episode of the comparison, and what it gained over the baseline; better is more."""
    result, sign = measured(metrics), metric_of(metrics).sign
    base = result[[str(name) for name in metrics["arms/names"]].index(BASELINE)]
    return np.nansum(metrics["arms/reward"], axis=-1), sign * (result - base)


def audit(metrics: Arrays, data: str) -> list[Panel]:
    """Return against gain, a dot for each episode of the comparison."""
    if "arms/reward" not in metrics:
        return []
    # a control may be another host, whose return is that of no growth, so they do not tell what the reward pays for
    own = np.array([not is_control(str(name)) for name in metrics["arms/names"]])
    metric, arms = metric_of(metrics), metrics["arms/names"][own]
    earned, gain = (samples[own] for samples in returns_and_gains(metrics))
    correlation = rank_correlation(earned.ravel(), gain.ravel())
    names = [str(name) for name in dict.fromkeys(arms)]
    step = max(1, -(-earned.size // MOST_DOTS))

    def draw(figure: FigureBase) -> None:
        axes = figure.subplots()
        for name in names:
            style, here = arm_style(names, name), arms == name
            axes.plot(
                gain[here].ravel()[::step], earned[here].ravel()[::step], style["marker"], color=style["color"],
                alpha=0.6, markersize=4, mew=0 if name != BASELINE else 1, label=name,
            )  # fmt: skip
        axes.set_xlabel(f"gain over {BASELINE} ({gain_of(metric)})")
        axes.set_ylabel("return")
        plain_axes(axes)
        axes.legend(
            ncols=3, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2, handletextpad=0.2, markerscale=1.5
        )

    said = "cannot be told (all are alike)" if np.isnan(correlation) else f"is {correlation:.2f}"
    caption = (
        f"Return of each episode of the run's own comparison on {data} against what it gained. Spearman's rank "
        f"correlation of the two over all {earned.size} episodes {said}: 1 would mean that the reward orders them as "
        "the gain does."
    )
    return [Panel(draw, caption + _thinned(step), 3.8)]


# Of a PPO update: array, label, what it says.
_HEALTH = (
    ("approx_kl", "KL divergence", "how far a round's update moved the policy (approximate KL divergence)"),
    ("clip_fraction", "share clipped", "share of decisions whose probability ratio was clipped"),
    ("explained_variance", "explained variance", "share of the returns' variance that the critic explains: 1 is all, "
     "0 no more than a constant"),
    ("value_loss", "value error", "error of the critic (its loss, in units of the scaled returns)"),
)  # fmt: skip


def health(metrics: Arrays, data: str) -> list[Panel]:
    """Whether the learner learns soundly."""
    panels = []
    for name, label, what in _HEALTH:
        if f"learner/{name}" in metrics:
            samples = metrics[f"learner/{name}"]
            panels.append(
                Panel(
                    partial(_by_round, samples=samples, label=label),
                    f"By round, a line per policy: {what}.",
                )
            )
    panels[1:1] = _entropy(metrics)
    return panels


def _entropy(metrics: Arrays) -> list[Panel]:
    if "learner/head_entropy" in metrics:
        by_head = metrics["learner/head_entropy"]  # [R, P, heads]
        known = ~np.isnan(by_head)
        mean = np.where(known.any(1), np.nansum(by_head, axis=1) / np.maximum(known.sum(1), 1), np.nan)

        def draw(figure: FigureBase) -> None:
            axes = figure.subplots()
            x, ends, colours = np.arange(1, len(mean) + 1), {}, {}
            for head, name in enumerate(HEADS):
                there = np.flatnonzero(~np.isnan(mean[:, head]))
                colours[name] = (*COLOURS, LEARNED_COLOUR)[head]
                if there.size:
                    style: dict[str, Any] = {"color": colours[name], "marker": MARKERS[head], "linewidth": 1.3}
                    axes.plot(x, mean[:, head], markevery=max(1, len(mean) // 8), **style)
                    ends[name.replace("_", " ")] = float(x[there[-1]]), float(mean[there[-1], head])
            axes.set_xlabel("round")
            axes.set_ylabel("entropy (1: undecided)")
            axes.set_ylim(0, 1.05)
            whole_numbers(axes.xaxis)
            plain_axes(axes)
            label_right(axes, ends, {name.replace("_", " "): colour for name, colour in colours.items()}, 3.4)

        caption = (
            "How undecided the policies are about each part of a decision, where there was a choice (mean of the "
            "policies; 1: all choices alike, 0: always the same)."
        )
        return [Panel(draw, caption)]
    panels = []
    for name, label, what in (
        ("entropy", "entropy", "a whole decision"),
        ("op_entropy", "entropy of the operation", "which operation to ask for"),
    ):
        if f"learner/{name}" in metrics:
            samples = metrics[f"learner/{name}"]
            panels.append(
                Panel(
                    partial(_by_round, samples=samples, label=label),
                    f"How undecided each policy is about {what} (1: all choices alike, 0: always the same). By head of "
                    "the network it was not measured.",
                )
            )
    return panels
