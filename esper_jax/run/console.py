"""What a person sees while a run goes on: named steps and a progress bar, or plain lines when the output is piped."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import IO

import numpy as np
from rich.console import Console as RichConsole
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from esper_jax.enums import Stage
from esper_jax.evidence.tables import text_table
from esper_jax.metric import ACCURACY, Metric
from esper_jax.run import records


class _Screen(RichConsole):
    """A rich console whose reader may leave: what comes then is said to nobody, and nothing stops."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        with contextlib.suppress(OSError, ValueError):  # what is buffered would be written at the interpreter's end
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.file.fileno())
            os.close(nowhere)


class Console:
    """Lines, steps and bars on one stream; `durations` keeps the seconds of every step by name."""

    def __init__(self, *, quiet: bool = False, file: IO[str] | None = None):
        self.rich = _Screen(file=file, highlight=False)
        self.quiet = quiet
        self.live = self.rich.is_terminal and not quiet
        self.durations: dict[str, float] = {}
        self.started = time.perf_counter()

    def elapsed(self) -> float:
        """Seconds since this console was made."""
        return time.perf_counter() - self.started

    def say(self, text: str = "", *, style: str | None = None, always: bool = False) -> None:
        """A line, not broken where a terminal would; left out when quiet, unless it must be seen."""
        if always or not self.quiet:
            try:
                self.rich.print(self._shown(text), style=style, markup=False, soft_wrap=True)
            except OSError:  # such as a full disk
                self.rich.on_broken_pipe()

    def _shown(self, text: str) -> str:
        """The text in what the encoding of the stream has."""
        try:
            text.encode(self.rich.encoding)
        except UnicodeEncodeError:
            text = text.replace("±", "+-").encode(self.rich.encoding, "replace").decode(self.rich.encoding)
        return text

    def facts(self, rows: dict[str, str]) -> None:
        for name, value in rows.items():
            self.say(f"  {name:<9} {value}")

    @contextlib.contextmanager
    def step(self, name: str, what: str = "") -> Iterator[list[str]]:
        """Names what is being waited for, then says how long it took and what was appended to the list it yields."""
        said: list[str] = []
        started = time.perf_counter()
        if self.live:
            spinner = SpinnerColumn("line" if self.rich.options.ascii_only else "dots")
            columns = spinner, TextColumn("{task.description}", markup=False), TimeElapsedColumn()
            with Progress(*columns, console=self.rich, transient=True) as progress:
                progress.add_task(f"{name:<9} {what}")
                yield said
        else:
            if what:
                self.say(f"  {name:<9} {what} ...")
            yield said
        seconds = self.durations[name] = time.perf_counter() - started
        self.say(f"  {name:<9} {seconds:.1f} s  {'  '.join(said) or what}")

    @contextlib.contextmanager
    def bar(self, name: str, total: int, done: int = 0) -> Iterator[Callable[..., None]]:
        """Progress through `total` pieces of work, of which `done` were done before.

        Yields what is to be called after each piece, with what is to be said about it, and in which style.
        """
        started = time.perf_counter()
        pieces = 0

        def advance(note: str, style: str | None = None) -> None:
            nonlocal pieces
            pieces += 1
            elapsed = time.perf_counter() - started
            left = elapsed / pieces * (total - done - pieces)
            self.say(f"  {name} {done + pieces}/{total}  t={elapsed:.0f}s  left={left:.0f}s  {note}", style=style)
            if self.live:
                progress.advance(task)

        if self.live:
            columns = (
                TextColumn(f"  {name:<9}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                TextColumn("left"), TimeRemainingColumn(),
            )  # fmt: skip
            with Progress(*columns, console=self.rich, transient=True) as progress:
                task = progress.add_task(name, total=total, completed=done)
                yield advance
        else:
            yield advance
        self.durations[name] = time.perf_counter() - started

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        shown = [[self._shown(cell) for cell in row] for row in rows]
        head, *body = text_table(columns, shown).splitlines()
        self.say(head, style="bold", always=True)
        self.say("\n".join(body), always=True)


def round_note(arrays: dict[str, np.ndarray], metric: Metric = ACCURACY) -> str:
    """A round in a few numbers, from the arrays of `records.round_arrays`; means over its environments, and of the
    return one for each policy."""
    reached = metric.value(*records.reached(arrays))
    name, digits = ("acc", 1) if metric.higher_is_better else (metric.unit, metric.digits)
    returns = np.nansum(arrays["rounds/reward"], axis=-1).mean(-1)
    kept = (arrays["rounds/stage"][..., -1, :] == Stage.FOSSILIZED).sum(-1).mean()
    kl, entropy = arrays["learner/approx_kl"].mean(), arrays["learner/entropy"].mean()
    each = " ".join(f"{value:.2f}" for value in returns)
    note = f"{name}={reached:.{digits}f}  return={each}  kept={kept:.1f}  kl={kl:.3f}  entropy={entropy:.2f}"
    counts = {"rollbacks": arrays["rounds/panic"], "skipped": arrays["learner/nonfinite_updates"]}
    return note + "".join(f"  {name}={int(count.sum())}" for name, count in counts.items() if count.any())
