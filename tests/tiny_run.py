"""The smallest run that does everything: two rounds and a comparison of the environment in `tiny`, compiled once."""

import contextlib
import functools
import threading
from typing import NamedTuple

import jax
import tiny

from esper_jax import make_train
from esper_jax.control import baselines
from esper_jax.run import compilation, records
from esper_jax.train import Train

CONFIG = tiny.CONFIG.replace(
    n_envs=2,
    policy_seeds=2,
    report_envs=2,
    rounds=2,
    devices=1,
    **{"training.epochs": 8, "ppo.minibatches": 1, "ppo.epochs": 1, "ppo.hidden_size": 8},
)
ARMS = ("never", "eager", "random", "policy", "policy_greedy")
ROWS = ("never", "eager", "random", "policy", "policy", "policy_greedy", "policy_greedy")  # of arms/<field>


@functools.cache
def train():
    rules = {
        "never": baselines.never(),
        "eager": baselines.eager("conv_light", lifecycle=CONFIG.lifecycle),
        "random": baselines.random(),
    }
    return make_train(CONFIG, tiny.dataset(), rules)


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
    return Result(states, rounds, records.arm_arrays(arms, CONFIG.lifecycle.catalog), ahead, later, compiled)
