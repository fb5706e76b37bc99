"""How a picture becomes a PNG file or a part of a page, and what looks alike in all of them.

A picture is a list of panels. A file holds all of them side by side; a page has each as inline SVG of its own, which
its layout arranges for the width of a screen. Both come from the same drawing.
"""

from __future__ import annotations

import contextlib
import html
import io
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from esper_jax.enums import BASELINE, LEARNED, POLICY, Stage
from esper_jax.evidence.statistics import Interval, mean_interval
from esper_jax.metric import Metric

# A backend that matplotlib does not know, such as the one that notebooks name, keeps it from being imported; none is
# used here. The other modules have what they need of matplotlib from this one.
_backend = os.environ.pop("MPLBACKEND", None)
try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.collections import PolyCollection as PolyCollection
    from matplotlib.figure import Figure, FigureBase
    from matplotlib.lines import Line2D as Line2D
    from matplotlib.patches import Patch as Patch
    from matplotlib.ticker import MaxNLocator
finally:
    if _backend is not None:
        os.environ["MPLBACKEND"] = _backend

# What is drawn in these two follows a page's own colours, light or dark. Nothing else may be black or white.
INK, PAPER = "#000000", "#ffffff"
ON_COLOUR = ("#111111", "#fefefe")  # of text on light and on dark ones of the colours below, see `on_colour`
# Okabe-Ito's, told apart by colour-blind readers, too; without the yellow, which is not to be seen on white, and the
# vermilion, which is the policy's, and with a lighter blue, which is to be seen on black.
COLOURS = ("#1b80c4", "#009e73", "#cc79a7", "#56b4e9", "#a6704d", "#e69f00", "#999999")
LEARNED_COLOUR = "#d55e00"
MARKERS = "os^vDPX*<>"
HATCHES = ("", "//", "--", "\\\\", "xx", "||")
STAGE_COLOURS = {
    Stage.GERMINATED: "#f0e442",
    Stage.TRAINING: "#e69f00",
    Stage.BLENDING: "#56b4e9",
    Stage.HOLDING: "#cc79a7",
    Stage.FOSSILIZED: "#009e73",
    Stage.PRUNED: INK,
    Stage.EMBARGOED: "#888888",
    Stage.RESETTING: "#bbbbbb",
}
WIDTH = 5.0  # inches, of a panel


class Panel(NamedTuple):
    """A part of a picture that can stand alone."""

    draw: Callable[[FigureBase], None]
    caption: str  # for somebody who sees nothing else
    height: float = 3.4  # inches


@contextlib.contextmanager
def _settings(**more: Any) -> Iterator[None]:
    """Matplotlib's own defaults, whatever the settings of the user, and ours."""
    ours: dict[str, Any] = {
        "axes.edgecolor": INK, "axes.labelcolor": INK, "text.color": INK, "xtick.color": INK, "ytick.color": INK,
        "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "axes.titlelocation": "left",
        "grid.color": INK, "grid.alpha": 0.15, "font.size": 10, "axes.titlesize": 10, "legend.fontsize": 9,
        "hatch.linewidth": 0.6, "lines.markersize": 4, "text.parse_math": False,
    }  # fmt: skip
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        for name, value in (ours | more).items():
            matplotlib.rcParams[name] = value  # type: ignore[literal-required, index]
        yield


def png(path: Path, panels: Sequence[Panel], title: str, columns: int) -> None:
    """Writes all panels into one file, which is either complete or absent."""
    work = path.with_name(path.name + ".tmp")
    lines = [panels[i : i + columns] for i in range(0, len(panels), columns)]
    heights = [max(panel.height for panel in line) for line in lines]
    try:
        with _settings():
            figure = Figure(figsize=(WIDTH * columns, sum(heights) + 0.4), layout="constrained")
            cells = figure.subfigures(len(lines), columns, squeeze=False, height_ratios=heights)
            for cell, panel in zip(cells.ravel(), panels, strict=False):
                panel.draw(cell)
            figure.suptitle(title)
            FigureCanvasAgg(figure).print_figure(work, format="png", dpi=110)
        work.replace(path)
    finally:
        with contextlib.suppress(OSError):
            work.unlink(missing_ok=True)


def svg(panel: Panel, name: str) -> str:
    """An `<svg>` element for a page; equal panels and names give equal bytes.

    Its text is text, in the page's font. The page has to define `--paper`, its own background.

    Args:
      name: of the picture, no other one's in the page: its ids begin with it.
    """
    drawn = io.StringIO()
    with _settings(**{
        "svg.fonttype": "none", "svg.hashsalt": name, "figure.facecolor": "none", "axes.facecolor": "none",
    }):  # fmt: skip
        figure = Figure(figsize=(WIDTH, panel.height), layout="constrained")
        panel.draw(figure)
        FigureCanvasSVG(figure).print_svg(drawn, metadata={"Date": None})
    text = drawn.getvalue()
    (size,) = re.findall(r'viewBox="([^"]*)"', text)
    body = text[text.index("<defs>") :]
    body = re.sub(r"<style type=\"text/css\">.*?</style>", "", body, count=1)  # which would be for all of the page
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', body))
    body = re.sub(r' id="([^"]*)"', lambda at: f' id="{name}-{at[1]}"' if at[1] in used else "", body)
    body = body.replace("url(#", f"url(#{name}-").replace('xlink:href="#', f'href="#{name}-')
    body = re.sub(r"font: ([^';]*?)([\d.]+px) '[^;\"]*", _font, body)  # until matplotlib 3.9
    body = re.sub(r"font-family: [^;\"]*(; )?", "", body)
    body = re.sub(r' (?:d|x|y|transform)="[^"]*"', lambda at: re.sub(r"(\.\d\d)\d+", r"\1", at[0]), body)  # of a point
    for ours, theirs in ((INK, "currentColor"), (PAPER, "var(--paper)")):
        body = body.replace(ours, theirs)
    body = re.sub(r"\s*\n\s*", "\n", body)
    return f'<svg viewBox="{size}" role="img" aria-label="{html.escape(panel.caption)}">\n{body}'


def _font(at: re.Match) -> str:
    weight = at[1].strip()
    return f"font-size: {at[2]}" + (f"; font-weight: {weight}" if weight.isdigit() else "")


def plain_axes(axes: Axes) -> None:
    axes.grid(True)
    axes.set_axisbelow(True)


def whole_numbers(axis: Axis) -> None:
    """Ticks at whole epochs and rounds."""
    cast(MaxNLocator, axis.get_major_locator()).set_params(integer=True)  # what a linear axis starts with


def arm_style(names: Sequence[str], name: str) -> dict[str, Any]:
    """The policy stands out, the bare host is dashed; an arm looks the same in every picture, also without colours."""
    if name == BASELINE:
        return {"color": INK, "linestyle": "--", "marker": "|"}
    if name in LEARNED:
        sure = name != POLICY
        return {"color": LEARNED_COLOUR, "linewidth": 2.5, "linestyle": ":" if sure else "-", "marker": "Dd"[sure]}
    others = [other for other in names if other not in (BASELINE, *LEARNED)]
    rank = others.index(name)
    dashes = ("-", "-.", (0, (6, 2)))[rank // len(COLOURS) % 3]
    return {"color": COLOURS[rank % len(COLOURS)], "linestyle": dashes, "marker": MARKERS[rank % 4 + rank // 4 % 2 * 5]}


def on_colour(background: str) -> str:
    """The colour of text on another one."""
    red, green, blue = matplotlib.colors.to_rgb(background)
    return ON_COLOUR[0.299 * red + 0.587 * green + 0.114 * blue < 0.45]


def policy_style(number: int) -> dict[str, Any]:
    return {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}


def band(axes: Axes, x: np.ndarray, samples: np.ndarray, style: dict[str, Any]) -> np.ndarray:
    """Mean over the first axis, with its interval as a band where there is one. Returns the mean."""
    interval = mean_interval(samples)
    mean, low, high = (np.asarray(field) for field in interval[:3])
    (line,) = axes.plot(x, mean, **style)
    axes.fill_between(x, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    return mean


def gain_of(metric: Metric) -> str:
    """What a gain is counted in.

    >>> from esper_jax.metric import ACCURACY
    >>> gain_of(ACCURACY)
    'points of accuracy'
    """
    return f"{metric.points} of {metric.name}" if metric.higher_is_better else f"{metric.name} saved"


def interval_mark(axes: Axes, interval: Interval, height: float, colour: str = INK) -> None:
    """A mean and its interval, which may be missing, as a horizontal bar."""
    if np.isfinite(interval.low):
        axes.plot([interval.low, interval.high], [height, height], "-", color=colour, linewidth=2.5)
    axes.plot([interval.mean], [height], "o", color=colour, markersize=6, mec=PAPER)


def height_for(labels: int) -> float:
    """Inches of a panel with so many names beside it, see `label_right`."""
    return max(3.4, 1.2 + _LINE * labels)


_LINE = 0.17  # inches, of text


def label_right(axes: Axes, ends: dict[str, tuple[float, float]], colours: dict[str, Any], height: float) -> None:
    """Names right of the axes, each joined to its point, moved apart where they would overlap.

    Args:
      ends: x and y of each, in data; those with NaN have no label.
      height: of the panel, in inches.
    """
    known = {name: at for name, at in ends.items() if np.isfinite(at).all()}
    if not known:
        return
    # heights and axes fractions: from data, whatever the scale
    to_axes = axes.transData + axes.transAxes.inverted()
    wish = {name: float(to_axes.transform(at)[1]) for name, at in known.items()}
    heights: dict[str, float] = {}
    previous, room = -np.inf, _LINE / (height - 0.8)  # a line as a share of the axes, without what is below and above
    for name in sorted(wish, key=lambda name: wish[name]):
        previous = heights[name] = max(wish[name], previous + room)
    shift = float(np.mean([wish[name] - height for name, height in heights.items()]))
    for name, height in heights.items():
        axes.annotate(
            name, known[name], (1.04, height + shift), textcoords="axes fraction", va="center", fontsize=9,
            arrowprops={"arrowstyle": "-", "color": colours[name], "linewidth": 0.7, "shrinkA": 0, "shrinkB": 2},
        )  # fmt: skip
