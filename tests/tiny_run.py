"""The smallest run that does everything: two rounds and a comparison of the environment in `tiny`, compiled once.

Compiled without optimisation, which takes a fraction of the time.
"""

import contextlib
import functools
from typing import NamedTuple

import jax
import tiny

from esper_jax import compilation, make_train, telemetry
from esper_jax.control import baselines

CONFIG = tiny.CONFIG.replace(
    n_envs=2,
    report_envs=2,
    rounds=2,
    devices=1,
    **{"training.epochs": 8, "ppo.minibatches": 1, "ppo.epochs": 1, "ppo.hidden_size": 8},
)
ARMS = ("never", "eager", "random", "policy")


@contextlib.contextmanager
def unoptimised():
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


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
    ahead: list  # seconds of each program that was compiled before the first round
    later: list  # and since then


@contextlib.contextmanager
def compilations():
    """Yields a list that gets the seconds of each compilation."""
    seconds, listening = [], [True]

    def listen(event, duration, **_):
        if listening and event == "/jax/core/compile/backend_compile_duration":
            seconds.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seconds
    listening.clear()  # JAX has no public way to forget one listener


@functools.cache
def result() -> Result:
    with unoptimised():
        states, rounds = [train().init(KEY())], []
        with compilations() as ahead:
            compilation.compile_ahead(train(), CONFIG, KEY(), states[0])
        with compilations() as later:
            for _ in range(CONFIG.rounds):
                state, metrics = train().update(KEY(), states[-1])
                states.append(state)
                rounds.append(telemetry.round_arrays(metrics))
            arms = {name: train().compare(KEY(), states[-1], name) for name in ARMS}
    return Result(states, rounds, telemetry.arm_arrays(arms), ahead, later)
