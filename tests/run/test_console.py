"""What is shown never costs the run."""

import io

from esper_jax.run.console import Console


class Terminal(io.TextIOWrapper):
    def isatty(self):
        return True


def shown(kind, encoding, monkeypatch):
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    raw = io.BytesIO()
    console = Console(file=kind(raw, encoding=encoding))
    with console.step("data", "shapes"):
        pass
    console.say("µ ± 1")
    console.table(("arm", "x"), [["never", "1 ± 2"], ["b", "1"]])
    console.rich.file.flush()
    return raw.getvalue().decode(encoding).splitlines()


def test_characters_that_a_stream_lacks_are_replaced(monkeypatch):
    assert shown(io.TextIOWrapper, "ascii", monkeypatch)[2:] == [
        "? +- 1", "arm         x", "never  1 +- 2", "b           1",
    ]  # fmt: skip
    assert shown(io.TextIOWrapper, "utf-8", monkeypatch)[2] == "µ ± 1"
    assert shown(io.TextIOWrapper, "latin-1", monkeypatch)[2] == "µ ± 1"


def test_a_terminal_without_unicode_has_another_spinner(monkeypatch):
    assert "".join(shown(Terminal, "ascii", monkeypatch)).isascii()
    assert not "".join(line for line in shown(Terminal, "utf-8", monkeypatch) if "data" in line).isascii()


def test_a_reader_that_left_stops_nothing():
    class Gone(io.StringIO):
        def __init__(self, error):
            self.error = error

        def write(self, text):
            raise self.error

    for error in (BrokenPipeError(), OSError(28, "No space left on device")):
        console = Console(file=Gone(error))
        console.say("one")
        with console.bar("round", 1) as advance:
            advance("two")
        assert set(console.durations) == {"round"}
