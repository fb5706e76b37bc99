"""Whatever a run is doing when its process is killed, going on from there ends with the bytes of a run that was not."""

import random
import signal
import time

import pytest
import tiny_run

from esper_jax.run import checkpoint

KILLS = 20
TINY = (
    "--preset", "smoke", "--data", "digits", "--training.epochs", "4", "--training.batches-per-epoch", "1",
    "--lifecycle.blueprints", "norm", "conv_light", "--host.base-channels", "4", "--n-envs", "2", "--report-envs", "2",
    "--ppo.minibatches", "1", "--ppo.hidden-size", "8", "--devices", "1", "--rounds", "80", "--policy-seeds", "2",
    "--quiet",
)  # fmt: skip


def moments(run, memory):
    """What to wait for before a kill, over and over: a checkpoint is written, has got its name, is dropped; a round is
    written; nothing. Each is a function that says which of them there are now."""
    there = lambda folder, pattern: frozenset(map(str, folder.glob(pattern)))
    kept = lambda: checkpoint.memory_of(run) if memory and run.exists() else run / "checkpoints"
    return (
        lambda: there(kept(), "step_*tmp*"),
        lambda: there(kept(), "step_????????"),
        lambda: there(kept(), "step_*tmp*/state"),
        lambda: there(run / "checkpoints" / "rounds", "*.npz*"),
        lambda: there(kept(), "step_*tmp*/fingerprint.json"),
    )


@pytest.mark.slow
@pytest.mark.parametrize("memory", [False, True])
def test_killed_twenty_times(tmp_path, memory):
    """Eighteen kills come at most 20 ms after something happened to a checkpoint, which is written in the background,
    or to a round; two while files are published."""

    def finished(*options):
        process = tiny_run.command(*options, XDG_CACHE_HOME=str(tmp_path / "cache"))
        _, err = process.communicate(timeout=600)
        assert process.returncode == 0, err

    finished(*TINY, "--out", tmp_path / "whole")
    run, chance, done = tmp_path / "killed", random.Random(int(memory)), []
    for kill in range(KILLS):
        first, option = kill == 0, ["--memory-checkpoints"] * memory
        wanted = moments(run, memory)[kill % 5]
        before, wait = wanted(), chance.uniform(0, 0.02) * (kill % 3 > 0)
        process = tiny_run.command(
            *((*TINY, "--out", run) if first else ("--resume", run, "--quiet")),
            *option,
            XDG_CACHE_HOME=str(tmp_path / "cache"),
        )
        if kill < KILLS - 2:
            while not wanted() - before:
                assert process.poll() is None, process.communicate()
        else:
            while not (run / "metrics.npz").exists() and not list(run.glob("*.tmp")):
                assert process.poll() is None, process.communicate()
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        done.append(len(list((run / "checkpoints" / "rounds").glob("*.npz"))))
    assert not (run / "report.html").exists()
    finished("--resume", run, "--quiet")
    for name in tiny_run.BYTES:
        assert (run / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert not list(run.glob("**/*tmp*"))
    print(f"rounds done at each of {KILLS} kills: {done}")
