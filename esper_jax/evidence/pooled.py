"""Pictures of several runs: groups of runs that differ by their seed alone, side by side.

Axis letters: N runs of a group, R rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from esper_jax.enums import BASELINE
from esper_jax.evidence.canvas import (
    COLOURS,
    INK,
    LEARNED_COLOUR,
    MARKERS,
    FigureBase,
    Panel,
    band,
    gain_of,
    interval_mark,
    plain_axes,
    whole_numbers,
)
from esper_jax.evidence.statistics import Interval
from esper_jax.metric import Metric


class Group(NamedTuple):
    """Runs that are one experiment."""

    name: str  # short
    metric: Metric
    gain: dict[str, np.ndarray]  # f[N] of each arm over the baseline, the means of the runs; better is more
    interval: dict[str, Interval]  # of the same, over runs, or of one run over what is in it
    learned: dict[str, np.ndarray]  # f[N, R] how the policies of each run did on average, by what is measured


def _look(rank: int) -> dict[str, Any]:
    return {"color": (LEARNED_COLOUR, *COLOURS)[rank % (len(COLOURS) + 1)], "marker": MARKERS[rank % len(MARKERS)]}


def _legend(axes) -> None:
    axes.legend(ncols=3, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2, handlelength=1.2)


def gains(groups: Sequence[Group]) -> list[Panel]:
    """Gain of each arm by group, a panel for each unit: what is counted in other units has no common axis."""
    panels = []
    for unit in dict.fromkeys(gain_of(group.metric) for group in groups):
        alike = [(rank, group) for rank, group in enumerate(groups) if gain_of(group.metric) == unit]
        arms = [arm for arm in dict.fromkeys(arm for _, group in alike for arm in group.gain) if arm != BASELINE]
        caption = (
            f"Gain over {BASELINE} in {unit}, by arm and group: a mark per run, and above them the mean with its 95 % "
            "interval (Student t over runs; of a single run, over its own environments and policies). Right of 0 is "
            "better."
        )
        draw = partial(_strips, alike=alike, arms=arms, unit=unit, named=len(groups) > 1)
        panels.append(Panel(draw, caption, 1.0 + len(arms) * (0.15 + 0.24 * len(alike))))
    return panels


def _strips(
    figure: FigureBase, alike: Sequence[tuple[int, Group]], arms: Sequence[str], unit: str, named: bool
) -> None:
    axes = figure.subplots()
    axes.axvline(0, color=INK, linewidth=1)
    height = 0.8 / len(alike)
    for place, (rank, group) in enumerate(alike):
        for row, arm in enumerate(reversed(arms)):
            if arm in group.gain:
                y = row + 0.4 - (place + 0.5) * height
                samples = group.gain[arm]
                axes.plot(samples, np.full(len(samples), y - height / 5), linestyle="", markersize=4, **_look(rank))
                interval_mark(axes, group.interval[arm], y + height / 5, _look(rank)["color"])
        if named:
            axes.plot([], [], linestyle="", label=group.name, **_look(rank))
    axes.set_yticks(range(len(arms)), arms[::-1])
    axes.set_ylim(-0.6, len(arms) - 0.4)
    axes.set_xlabel(f"gain over {BASELINE} ({unit})")
    plain_axes(axes)
    axes.grid(False, axis="y")
    if named:
        _legend(axes)


def learning(groups: Sequence[Group]) -> list[Panel]:
    """How policies were learned, a panel for what is measured: the mean over the runs of each group."""
    found = dict.fromkeys(what for group in groups for what in group.learned)
    return [
        Panel(
            partial(_by_round, groups=groups, what=what),
            f"{what.capitalize()} in training, by round: the mean over the runs of each group and their policies, "
            "with a 95 % band over runs where there are several.",
        )
        for what in found
    ]


def _by_round(figure: FigureBase, groups: Sequence[Group], what: str) -> None:
    axes = figure.subplots()
    for rank, group in enumerate(groups):
        if what in group.learned:
            samples = group.learned[what]
            style = _look(rank) | {"markevery": max(1, samples.shape[1] // 8), "label": group.name}
            band(axes, np.arange(1, samples.shape[1] + 1), samples, style)
    axes.set_xlabel("round")
    axes.set_ylabel(what)
    whole_numbers(axes.xaxis)
    plain_axes(axes)
    if len(groups) > 1:
        _legend(axes)
