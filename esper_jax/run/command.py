"""What surrounds the work of a command: its streams, one line for whatever stops it, and its exit code."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

STOPPED, REFUSED, BROKEN = 130, 2, 1


class Stopped(Exception):
    """Somebody asked for an end, and what was in hand has been finished."""


class Interruption:
    """What Ctrl-C and SIGTERM do: end the process within a second, or, where it is `patient`, once the work in hand is
    done; a second one ends it at once.

    A thread of its own sees to it: while a compiled program runs, the main thread hears of no signal.
    """

    def __init__(self) -> None:
        self.asked: int | None = None  # the signal that came while it was patient
        self.patient = False
        self.message: Callable[[], str] = lambda: "stopped"  # what to say at the end
        self.tidy: Callable[[], None] = lambda: None  # what else to do then

    @property
    def code(self) -> int:
        """Exit code of who was stopped by the signal, as shells count."""
        return 128 + (self.asked or signal.SIGINT)

    @contextlib.contextmanager
    def watched(self) -> Iterator[Interruption]:
        """Handles the signals inside; outside of the main thread of a program nothing is changed."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        read, write = os.pipe()
        os.set_blocking(write, False)
        fd = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        wanted = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, lambda *_: None) for number in wanted}
        threading.Thread(target=self._watch, args=(read, set(wanted)), daemon=True).start()
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(fd)
            os.close(write)  # which ends the thread

    def _watch(self, read: int, wanted: set[int]) -> None:
        while came := os.read(read, 1):
            if came[0] not in wanted:
                continue
            if self.patient and self.asked is None:
                self.asked = came[0]
                say("stopping when this round is done; once more to stop at once")
            else:
                self.asked = came[0]
                with contextlib.suppress(Exception):
                    say(self.message())
                    self.tidy()
                leave(self.code)
        os.close(read)


class Refusal(Exception):
    """What was asked for cannot be; the message is all that a person has to know."""


@contextlib.contextmanager
def refusing(*errors: type[Exception]) -> Iterator[None]:
    """Makes a Refusal of errors that say what somebody outside the program has to mend."""
    try:
        yield
    except errors as error:
        raise Refusal(line(error)) from error


def use_plain_streams() -> None:
    """A character that the encoding of a stream lacks is shown as a question mark and stops nothing."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def say(text: str) -> None:
    """A line on stderr, if that is still there."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def ended(work: Callable[[], None]) -> int:
    """The exit code of a small command that does this: what is wrong with what it was given is one line."""
    try:
        with refusing(ValueError, OSError):
            work()
    except Refusal as refusal:
        return refused(refusal)
    except KeyboardInterrupt:
        say("stopped")
        return STOPPED
    except Exception as error:
        return broken(error, None)
    return 0


def refused(error: Refusal | str) -> int:
    say(f"error: {error}")
    return REFUSED


def broken(error: BaseException, folder: Path | None) -> int:
    """One line about an error that nobody foresaw, and its traceback in a file: in the folder of the run, if any."""
    text = "".join(traceback.format_exception(error))
    try:
        where = f"the traceback is in {_keep(text, folder)}"
    except OSError:
        where = f"the traceback fits nowhere else:\n{text}"
    say(f"error: {type(error).__name__}: {line(error)[:300]} ({where})")
    return BROKEN


def _keep(text: str, folder: Path | None) -> Path:
    if folder is not None:
        with contextlib.suppress(OSError):
            path = folder / "traceback.txt"
            path.write_text(text, encoding="utf-8")
            return path
    with tempfile.NamedTemporaryFile(
        "w", prefix="esper_jax-", suffix="-traceback.txt", delete=False, encoding="utf-8"
    ) as file:
        file.write(text)
    return Path(file.name)


def leave(code: int) -> None:
    """Ends the process, without waiting for programs that are still being compiled, nor for threads of libraries, which
    at times abort an interpreter that finalises."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # None if it was closed from the start
            stream.flush()
    os._exit(code)
