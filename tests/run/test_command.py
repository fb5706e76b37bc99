"""Whatever stops a command is one line and an exit code."""

import io
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from esper_jax.run import command


def broken(folder):
    try:
        raise RuntimeError("first\nsecond")
    except RuntimeError as error:
        return command.broken(error, folder)


def test_the_traceback_of_what_nobody_foresaw_is_kept(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command.tempfile, "tempdir", str(tmp_path))
    folder = tmp_path / "run"
    folder.mkdir()
    for place, pattern in (
        (folder, "run/traceback.txt"),
        (None, "esper_jax-.*-traceback.txt"),
        (tmp_path / "x", "esp"),
    ):
        assert broken(place) == 1
        (line,) = capsys.readouterr().err.splitlines()
        path = Path(re.fullmatch(r"error: RuntimeError: first second \(the traceback is in (.*)\)", line)[1])
        assert path.is_relative_to(tmp_path) and re.search(pattern, str(path))
        assert "in broken" in path.read_text() and path.read_text().endswith("RuntimeError: first\nsecond\n")


def test_only_what_is_named_is_a_refusal():
    with pytest.raises(command.Refusal, match="^one two$"), command.refusing(ValueError):
        raise ValueError("one\ntwo")
    with pytest.raises(TypeError), command.refusing(ValueError):
        raise TypeError


def test_streams_that_were_closed_from_the_start_stop_nothing(monkeypatch):
    left = []
    monkeypatch.setattr(command.os, "_exit", left.append)
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    command.use_plain_streams()
    command.say("x")
    command.leave(2)
    assert left == [2]


def test_streams_replace_what_they_cannot_show(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    command.use_plain_streams()
    print("1 ± 2", flush=True)
    assert raw.getvalue() == b"1 ? 2\n"


SCRIPT = """
import sys, time
from esper_jax.run import command

stop = command.Interruption()
stop.message = lambda: "stopped at work"
with stop.watched():
    stop.patient = sys.argv[1] == "patient"
    print("ready", flush=True)
    for _ in range(200):
        time.sleep(0.05)
        if stop.asked and len(sys.argv) < 3:
            print("done", flush=True)
            command.leave(stop.code)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("words", "signals", "out", "err"),
    [
        (["at once"], 1, "", "stopped at work\n"),
        (["patient"], 1, "done\n", "stopping when this round is done; once more to stop at once\n"),
        (
            ["patient", "for ever"],
            2,
            "",
            "stopping when this round is done; once more to stop at once\nstopped at work\n",
        ),
    ],
)
def test_signals_end_what_is_in_hand(number, words, signals, out, err):
    """At once, or when it is done, or at the second one; the exit code tells the signal."""
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    began = time.monotonic()
    for _ in range(signals):
        process.send_signal(number)
        time.sleep(0.3)
    got = process.communicate(timeout=20)
    assert got == (out, err) and process.returncode == 128 + number and time.monotonic() - began < 5


def test_a_thread_leaves_signals_alone():
    before, found = signal.getsignal(signal.SIGTERM), []

    def work():
        with command.Interruption().watched():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [before]
    with command.Interruption().watched():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before
