"""A run has a folder of its own, and is alone in it."""

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from esper_jax.run import folder

ROOT = Path(__file__).parent.parent.parent


def test_a_name_that_is_taken_is_not_shared(tmp_path):
    with contextlib.ExitStack() as held:
        first, second, third = (
            held.enter_context(folder.new(tmp_path / "runs" / "now", named=False)) for _ in range(3)
        )
        assert [path.name for path in (first, second, third)] == ["now", "now-2", "now-3"]
        (second / "run.json").touch()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["now-2"], "a folder without a run does not stay"
    assert [path.name for path in second.iterdir()] == ["run.json"]


def test_a_folder_that_was_there_stays(tmp_path):
    with folder.new(tmp_path, named=True) as out:
        assert (out / folder.LOCK).read_text() == f"{os.getpid()}\n"
    assert tmp_path.is_dir() and not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("full", "--out {}: is not empty; choose another folder, or go on with --resume {}"),
        ("file", "--out {}: must be a folder that is empty or can be made (File exists)"),
        ("file/in", "--out {}: must be a folder that is empty or can be made"),
        ("x" * 300, "--out {}: must be a folder that is empty or can be made (File name too long)"),
        ("x" * 300 + "/in", "--out {}: must be a folder that is empty or can be made (File name too long)"),
    ],
)
def test_a_folder_that_cannot_be_the_runs_is_refused(tmp_path, name, said):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    (tmp_path / "file").touch()
    with pytest.raises(OSError) as error, folder.new(tmp_path / name, named=True):
        pass
    assert said.format(*[tmp_path / name] * said.count("{}")) in str(error.value)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "full", "x"]


def test_the_second_is_refused_by_name(tmp_path):
    with folder.locked(tmp_path):
        for _ in range(2):  # whoever is refused leaves the lock as it is
            with pytest.raises(BlockingIOError, match=f"{tmp_path}: process {os.getpid()} is at work in this run"):
                with folder.locked(tmp_path):
                    pass
        with pytest.raises(BlockingIOError, match="at work"), folder.new(tmp_path, named=True):
            pass
    with folder.locked(tmp_path):
        pass
    assert not any(tmp_path.iterdir())


HOLD = textwrap.dedent("""
    import sys, time
    from pathlib import Path
    from esper_jax.run import folder
    with folder.locked(Path(sys.argv[1])):
        print("held", flush=True)
        time.sleep(600)
""")


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(BlockingIOError, match=f"process {process.pid} is at work"), folder.locked(tmp_path):
            pass
        process.send_signal(signal.SIGKILL)
    assert (tmp_path / folder.LOCK).exists()
    with folder.locked(tmp_path):
        assert (tmp_path / folder.LOCK).read_text() == f"{os.getpid()}\n"
    assert not any(tmp_path.iterdir())
