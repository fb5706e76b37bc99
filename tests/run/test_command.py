"""Whatever stops a command is one line and an exit code."""

import io
import re
import sys
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
    with pytest.raises(SystemExit):  # after which a test goes on, unlike a process
        command.leave(2)
    assert left == [2]


def test_streams_replace_what_they_cannot_show(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    command.use_plain_streams()
    print("1 ± 2", flush=True)
    assert raw.getvalue() == b"1 ? 2\n"
