"""Whatever a run is doing when its process is killed, going on from there ends with the bytes of a run that was not."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from esper_jax.run import checkpoint

ROOT = Path(__file__).parent.parent.parent
KILLS = 20
TINY = (
    "--preset", "smoke", "--data", "digits", "--training.epochs", "4", "--training.batches-per-epoch", "1",
    "--lifecycle.blueprints", "norm", "conv_light", "--host.base-channels", "4", "--n-envs", "2", "--report-envs", "2",
    "--ppo.minibatches", "1", "--ppo.hidden-size", "8", "--devices", "1", "--rounds", "80", "--policy-seeds", "2",
    "--quiet",
)  # fmt: skip
BYTES = ("metrics.npz", "outcomes.csv", "lifecycle.jsonl", "summary.txt")  # what holds no time


def command(*options, cache):
    arguments = [sys.executable, "-W", "error", "-m", "experiments.cifar", *map(str, options)]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(cache)}
    return subprocess.Popen(arguments, cwd=ROOT, env=env, text=True, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)


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
        process = command(*options, cache=tmp_path / "cache")
        _, err = process.communicate(timeout=600)
        assert process.returncode == 0, err

    finished(*TINY, "--out", tmp_path / "whole")
    run, chance, done = tmp_path / "killed", random.Random(int(memory)), []
    for kill in range(KILLS):
        first, option = kill == 0, ["--memory-checkpoints"] * memory
        wanted = moments(run, memory)[kill % 5]
        before, wait = wanted(), chance.uniform(0, 0.02) * (kill % 3 > 0)
        process = command(
            *((*TINY, "--out", run) if first else ("--resume", run, "--quiet")), *option, cache=tmp_path / "cache"
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
    for name in BYTES:
        assert (run / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert not list(run.glob("**/*tmp*"))
    print(f"rounds done at each of {KILLS} kills: {done}")
