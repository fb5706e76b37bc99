"""One self-contained HTML page that works without a network, from the arrays and the run card of a finished run.

Pictures are inline SVG that somebody else has drawn (`figures`), so that a page can also be had without matplotlib.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from esper_jax.enums import BASELINE, POLICY
from esper_jax.evidence import growth, tables
from esper_jax.evidence.controls import CONTROLS
from esper_jax.evidence.growth import Fate
from esper_jax.evidence.statistics import crossed_interval
from esper_jax.evidence.tables import plus_minus

Arrays = dict[str, np.ndarray]


class Drawn(NamedTuple):
    """A panel of a picture in a page."""

    svg: str
    caption: str


class Pictures(NamedTuple):
    """The pictures of a page by name, and why others, or `ALL`, could not be drawn."""

    drawn: dict[str, list[Drawn]]
    lost: dict[str, str]


ALL = "all"


def page(
    title: str,
    metrics: Arrays,
    card: dict[str, Any],
    pictures: Pictures,
    *,
    meant: str | None = None,
    samples: str = "",
) -> str:
    """The HTML page of a run.

    Args:
      metrics: of metrics.npz.
      card: the run card (run.json).
      pictures: without those that show nothing of this run, which is said in their place.
      meant: data that were meant and are not these, said loudly.
      samples: what networks wrote, of text.
    """
    data = card["data"]["name"]
    show = lambda name, missing="": _shown(pictures, name, missing)
    claim, answers = tables.sentence(metrics, data, meant), tables.answers(metrics)
    verdict = [
        f'<p class="loud">Data: {escaped(data)}, not {escaped(meant)}.</p>' if meant else "",
        f'<p class="claim">{escaped(tables.headline(metrics, data, meant))}</p>',
        html_table(("question", "answer"), answers, "words") if answers else "",
        _folded("Everything that may be claimed, and what not", _paragraph(claim)),
        html_table(tables.columns(metrics), tables.table(metrics)),
        html_note(tables.notes(metrics, card["data"].get("bigram_loss"))),
        _folded("The same without the weight of outliers", html_table(*tables.robust(metrics)) + html_note(_ROBUST)),
        _folded("What the words mean", _glossary(metrics["arms/names"])),
        _folded("Run card", f"<pre>{escaped(json.dumps(card, indent=2))}</pre>"),
    ]
    no_rounds = "Not measured: no policy was trained in this run."
    flops = "" if "arms/train_flops" in metrics else "FLOPs of the training that was executed: not measured."
    sections = {
        "Learning": show("learning", no_rounds),
        "Paired differences": show("paired", "Not measured: there is no arm but the bare host."),
        "Frontier": show("frontier") + (html_note([flops]) if flops else ""),
        "While hosts train": show("curves"),
        "What was kept, where and when": show("grown"),
        "Lives of the seeds": show("seeds", "Not measured: there is no learned arm."),
        "What became of the seeds": _survival(metrics),
        "What each slot is worth": _worth(metrics),
        "Parts of the reward": show("rewards", no_rounds),
        "Does the reward pay for gain?": show("audit", "Not measured.")
        + html_note(["This is the run's own reward: python -m experiments.audit RUN plays the comparison under each."]),
        "Health of the learner": show("health", no_rounds),
        "What is decided when": show("decisions", "Not measured: there is no learned arm."),
    }
    if samples:
        sections["Samples"] = f"<pre>{escaped(samples)}</pre>\n"
    return document(title, "\n".join(filter(None, verdict)), sections)


def document(title: str, top: str, sections: Mapping[str, str]) -> str:
    """A page with a heading, what comes first, and sections by their headings; HTML throughout but for the headings."""
    numbered = list(enumerate(sections.items(), 1))
    links = " ".join(f'<a href="#s{i}">{escaped(heading)}</a>' for i, (heading, _) in numbered)
    # sections with few pictures may share a row
    width = lambda inside: {1: ' class="one"', 2: ' class="two"'}.get(inside.count("<figure>"), "")
    body = "".join(
        f'<section id="s{i}"{width(inside)}>\n<h2>{escaped(heading)}</h2>\n{inside}</section>\n'
        for i, (heading, inside) in numbered
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escaped(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{escaped(title)}</h1>
{top}
<nav>{links}</nav>
<main>
{body}</main>
</body>
</html>
"""


_ROBUST = (
    "Interquartile mean: of the middle half of all episodes. better: how probably an episode of the arm is better than "
    "that of the bare host in the same environment (Agarwal et al., 2021). 95 % intervals, by resampling environments "
    "and policies.",
)

_STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #222222; --quiet: #5a5a5a; --line: #d8d8d8; --box: #f4f4f4; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #16181b; --ink: #e6e6e6; --quiet: #a8a8a8; --line: #3c4046; --box: #22262b; }
}
body { font: 16px/1.5 system-ui, sans-serif; max-width: 82rem; margin: 1.5rem auto; padding: 0 1rem;
  color: var(--ink); background: var(--paper); }
h1 { font-size: 1.1rem; font-weight: normal; color: var(--quiet); margin: 0; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .75rem; border-top: 1px solid var(--line); padding-top: 1rem; }
p, .note, details { max-width: 60rem; }
.claim { font-size: clamp(1.2rem, 2.4vw, 1.7rem); line-height: 1.35; margin: .75rem 0 1rem; }
.loud { background: #a34700; color: #ffffff; padding: .25rem 1rem; font-weight: bold; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 1rem 0; }
th, td { padding: .25rem .75rem; text-align: right; border-bottom: 1px solid var(--line); white-space: pre; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
table.words td { white-space: normal; text-align: left; vertical-align: top; }
table.words th { text-align: left; }
main, .panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 23rem), 1fr)); gap: 0 2rem;
  align-items: start; }
.panels { row-gap: 1.5rem; }
section { grid-column: 1 / -1; min-width: 0; }
section.one { grid-column: auto; }
@media (max-width: 40rem) { th, td { padding: .2rem .4rem; font-size: .85rem; } }
@media (min-width: 51rem) { section.two { grid-column: span 2; } }
figure { margin: 0; max-width: 34rem; }
figure svg { width: 100%; height: auto; display: block; fill: currentColor;
  font-family: "DejaVu Sans", Verdana, sans-serif; }
figure svg * { stroke-linejoin: round; stroke-linecap: butt; }
figcaption, .note { color: var(--quiet); font-size: .85rem; line-height: 1.4; }
figcaption { margin-top: .35rem; }
details { margin: .5rem 0; } summary { cursor: pointer; }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1rem; font-size: .9rem; margin-top: 1.5rem; }
a { color: inherit; }
pre { background: var(--box); padding: 1rem; overflow-x: auto; font-size: .8rem; white-space: pre-wrap;
  overflow-wrap: anywhere; }
dt { font-weight: bold; } dd { margin: 0 0 .4rem 1rem; }
"""


def escaped(value: object) -> str:
    return html.escape(str(value))


def _paragraph(text: str) -> str:
    return f"<p>{escaped(text)}</p>\n"


def html_note(lines: Iterable[str]) -> str:
    return f'<p class="note">{"<br>".join(map(escaped, lines))}</p>\n'


def _folded(summary: str, inside: str) -> str:
    return f"<details><summary>{escaped(summary)}</summary>\n{inside}</details>\n"


def html_table(columns: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "numbers") -> str:
    """Cells under their heads; wide ones scroll by themselves."""
    head = "".join(f"<th>{escaped(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{escaped(cell)}</td>" for cell in row) + "</tr>\n" for row in rows)
    inside = f"<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody>"
    return f'<div class="scroll"><table class="{kind}">{inside}</table></div>\n'


def html_panels(panels: Iterable[Drawn]) -> str:
    """Side by side as far as there is room."""
    figures = "".join(f"<figure>{p.svg}<figcaption>{escaped(p.caption)}</figcaption></figure>\n" for p in panels)
    return f'<div class="panels">\n{figures}</div>\n'


def _shown(pictures: Pictures, name: str, missing: str) -> str:
    """A picture, or why it is not there: it failed, or there is nothing to be drawn."""
    if why := pictures.lost.get(name) or pictures.lost.get(ALL):
        return _paragraph(f"This picture could not be drawn: {why}")
    panels = pictures.drawn.get(name)
    return html_panels(panels) if panels else _paragraph(missing or "Not measured.")


def _glossary(arms: Iterable[str]) -> str:
    """Of words, and of the controls that are there."""
    words = {
        "host, slot, seed": "the network that is trained; a place after one of its blocks; a small module that is put "
        "there (germinated), trained, blended in, and kept (fossilised) or pruned",
        "arm": f"who decides about that: {BASELINE} is the bare host; random, eager, periodic and heuristic are rules; "
        "policy is learned, policy_greedy its likeliest actions",
        "environment": "a host's initialisation and order of data, the same in every arm, so that arms are compared "
        "within environments",
        "round, episode, epoch": "one update of the policies; one host trained from beginning to end; one pass of its "
        "training, after which the arm decides",
        "gain": f"what was kept at the end, measured on data that nothing else sees, against {BASELINE} in the same "
        "environment; more is better",
    } | {arm: CONTROLS[arm].what for arm in dict.fromkeys(map(str, arms)) if arm in CONTROLS}
    return "<dl>" + "".join(f"<dt>{escaped(w)}</dt><dd>{escaped(what)}</dd>\n" for w, what in words.items()) + "</dl>\n"


def _survival(metrics: Arrays) -> str:
    metric, rows = tables.metric_of(metrics), growth.survival(metrics)
    if not rows:
        return _paragraph("No arm germinated a seed.")
    shown = [
        (row.arm, row.blueprint, str(row.germinated), *(str(row.fates[fate]) for fate in Fate),
         plus_minus(row.contribution, metric.digits))
        for row in rows
    ]  # fmt: skip
    fates = ("kept", "pruned", "rolled back", "open")
    return html_table(("arm", "blueprint", "germinated", *fates, f"contribution, {metric.points}"), shown) + html_note([
        "Seeds of the comparison's episodes, all policies of an arm together. rolled back: taken out by the governor. "
        "open: there at the end, but not fossilised.",
        f"contribution: what that seed adds to validation {metric.name}, told by switching it alone off (more is "
        "better), at the last epoch of its life where that was measured; mean of environments with its 95 % interval.",
    ])  # fmt: skip


def _worth(metrics: Arrays) -> str:
    """Shapley values and interactions of the slots under the learned policies, on report-test."""
    if POLICY not in metrics["arms/names"] or "arms/test_table" not in metrics:
        return _paragraph("Not measured.")
    metric = tables.metric_of(metrics)
    scores = tables.by_arm(metrics, "test_table")[POLICY] * metric.scale  # [P, E, K]
    live = tables.by_arm(metrics, "alpha")[POLICY][:, :, -1] > 0  # [P, E, S]
    slots = live.shape[-1]
    text = lambda samples, known=True: plus_minus(crossed_interval(samples), metric.digits) if known else "-"
    held = [f"{100 * live[..., s].mean():.0f} %" for s in range(slots)]
    what = f"{metric.points} on report-test, more is better; mean over policies and environments with its 95 % interval"
    if not growth.is_complete(scores, slots):
        lost, gained = growth.alone(scores)
        rows = [
            (f"slot {s}", *(text(samples[..., s], live[..., s].any()) for samples in (lost, gained)), held[s])
            for s in range(slots)
        ]
        columns = ("slot", "lost when it alone is off", "gained by it alone", "episodes with a seed in it")
        return html_table(columns, rows) + html_note([
            f"Learned policies at the last epoch: {what}.",
            f"Of {slots} slots not all on/off configurations are measured, so there are no Shapley values.",
        ])  # fmt: skip
    values = growth.shapley_values(scores)
    rows = [(f"slot {s}", text(values[..., s], live[..., s].any()), held[s]) for s in range(slots)]
    rows.append(("together", text(scores[..., -1] - scores[..., 0], live.any()), f"{100 * live.any(-1).mean():.0f} %"))
    parts = [
        html_table(("slot", "exact Shapley value", "episodes with a seed in it"), rows),
        html_note([
            f"Learned policies at the last epoch, from all {2**slots} on/off configurations of the slots: {what}.",
            "Shapley value: what switching a slot on adds, the mean over all orders in which slots can be switched on. "
            "Together they are what all seeds add. An empty slot adds exactly 0; one that always was empty has a dash.",
        ]),
    ]  # fmt: skip
    if slots > 1:
        index = growth.interaction_index(scores)
        both = lambda i, j: (live[..., i] & live[..., j]).any()
        cells = [
            (f"slot {i}", *("-" if i == j else text(index[..., i, j], both(i, j)) for j in range(slots)))
            for i in range(slots)
        ]
        parts += [
            html_table(("interaction", *(f"slot {s}" for s in range(slots))), cells),
            html_note([
                "How much more two slots add together than each by itself (below 0: they replace each other): the "
                "pairwise Shapley interaction index of Grabisch and Roubens (1999).",
            ]),
        ]  # fmt: skip
    return "".join(parts)
