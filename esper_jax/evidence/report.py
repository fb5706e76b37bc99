"""One self-contained HTML page that works without a network, from the files of a finished run."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def page(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    notes: Sequence[str],
    claim: str,
    pictures: dict[Path, str],
    card: dict[str, Any],
    meant: str | None = None,
    samples: str = "",
) -> str:
    """The HTML page of a run.

    Args:
      rows: cells under `columns`.
      meant: data that were meant and are not these, said loudly.
      pictures: PNG files and their captions; they are put into the page.
      card: the run card (run.json).
      samples: what networks wrote, of text.
    """
    esc = html.escape
    head = "".join(f"<th>{esc(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{esc(cell)}</td>" for cell in row) + "</tr>\n" for row in rows)
    figures = "".join(
        f'<figure><img alt="{esc(caption)}" src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'
        f"<figcaption>{esc(caption)}</figcaption></figure>\n"
        for path, caption in pictures.items()
    )
    warning = f'<p class="loud">Data: {esc(card["data"]["name"])}, not {esc(meant)}.</p>\n' if meant else ""
    written = f"<h2>Samples</h2>\n<pre>{esc(samples)}</pre>\n" if samples else ""
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{esc(title)}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; display: block; overflow-x: auto; }}
th, td {{ padding: .25rem .75rem; text-align: right; border-bottom: 1px solid #ddd; white-space: pre; }}
th:first-child, td:first-child {{ text-align: left; }}
figure {{ margin: 2rem 0; }} img {{ max-width: 100%; }} figcaption, .note {{ color: #555; font-size: .9rem; }}
.claim {{ border-left: .25rem solid #0072b2; padding: .25rem 1rem; }}
.loud {{ background: #d55e00; color: #fff; padding: .25rem 1rem; font-weight: bold; }}
pre {{ background: #f5f5f5; padding: 1rem; overflow-x: auto; font-size: .8rem; white-space: pre-wrap; }}
</style>
<h1>{esc(title)}</h1>
{warning}<p class="claim">{esc(claim)}</p>
<table><thead><tr>{head}</tr></thead>
<tbody>{body}</tbody></table>
<p class="note">{"<br>".join(map(esc, notes))}</p>
{figures}{written}<h2>Run card</h2>
<pre>{esc(json.dumps(card, indent=2))}</pre>
</html>
"""
