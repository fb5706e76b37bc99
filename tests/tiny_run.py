"""The smallest run that does everything: two rounds and a comparison of the environment in `tiny`, compiled once for
all tests of runs."""

import contextlib
import functools
import multiprocessing
import os
import pathlib
import subprocess
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import jax
import pytest
import tiny

from esper_jax import make_train
from esper_jax.config import PPOConfig
from esper_jax.control import baselines
from esper_jax.metric import ACCURACY
from esper_jax.run import compilation, estimate, records
from esper_jax.train import Train

CONFIG = tiny.CONFIG.replace(
    n_envs=8,
    policy_seeds=2,
    report_envs=8,
    rounds=2,
    devices=1,
    ppo=PPOConfig(hidden_size=8, epochs=2, minibatches=2, anneal_rounds=4),
    **{"training.epochs": 12},
)
# a function: a controller is made of arrays, and a process that imports this may have its devices still to choose
RULES = functools.cache(
    lambda: {"never": baselines.never(), "random": baselines.random(), "eager": baselines.eager("norm")}
)
ROOT = pathlib.Path(__file__).parent.parent
BYTES = ("metrics.npz", "outcomes.csv", "lifecycle.jsonl", "summary.txt")  # the files of a run that hold no time
ARMS = ("never", "random", "eager", "policy", "policy_greedy")
ROWS = ("never", "random", "eager", "policy", "policy", "policy_greedy", "policy_greedy")  # of arms/<field>


def command(*options, **environment):
    """The main job as a process of its own, on CPUs, its output in pipes."""
    arguments = [sys.executable, "-W", "error", "-m", "experiments.cifar", *map(str, options)]
    env = {**os.environ, **environment, "JAX_PLATFORMS": "cpu", "COLUMNS": "120"}
    return subprocess.Popen(arguments, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def as_users_compile(function, optimised=True):
    """What a function of a test module returns in a process of its own, where the tests' flags for XLA do not hold."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("XLA_FLAGS", raising=False)
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=spawn, initializer=_like_a_test, initargs=(optimised,)) as pool:
            return pool.submit(function).result()


def _like_a_test(optimised: bool) -> None:
    """As in conftest.py."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 4)
    jax.config.update("jax_disable_most_optimizations", not optimised)
    compilation.spare_the_collector()


@functools.cache
def train(n_devices=1):
    return make_train(CONFIG.replace(devices=n_devices), tiny.dataset(), RULES())


KEY = functools.cache(lambda: jax.random.key(0))


class Result(NamedTuple):
    """A run from its start to its end."""

    states: list  # RunState after 0, 1, ... rounds
    rounds: list  # arrays of each round
    metrics: dict  # arrays of the comparison
    ahead: list  # names of the programs that were compiled before the first round
    later: list  # and since then
    train: Train  # with its programs compiled


@contextlib.contextmanager
def compilations():
    """Yields a list that gets the name of each program that is compiled, or found in a cache."""
    names, listening = [], [True]

    def listen(event, duration, fun_name="", **_):
        if listening and event == "/jax/core/compile/backend_compile_duration":
            names.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    listening.clear()  # JAX has no public way to forget one listener


@functools.cache
def result() -> Result:
    with compilations() as ahead:
        ready = threading.Semaphore(0)
        compiled = compilation.compile_ahead(train(), CONFIG, KEY(), lambda name, seconds: ready.release())
        for _ in ("keys", "rollout", "learn", "report", "pay"):
            assert ready.acquire(timeout=600)
        states, rounds = [compiled.init(KEY())], []  # as the main job does, before the first round
    with compilations() as later:
        for _ in range(CONFIG.rounds):
            state, metrics = compiled.update(KEY(), states[-1])
            states.append(state)
            rounds.append(records.round_arrays(metrics))
        arms = compiled.compare(KEY(), states[-1], ARMS)
        work = estimate.work(CONFIG, tiny.dataset())
    return Result(
        states, rounds, records.arm_arrays(arms, CONFIG.lifecycle.catalog, ACCURACY, *work), ahead, later, compiled
    )
