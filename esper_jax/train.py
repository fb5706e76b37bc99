"""A run: rounds of E episodes and one PPO update each, and the comparison of controllers (Esper's Simic).

    train = make_train(cfg)
    run = train.init(key)
    run, metrics = train.update(key, run)        # one round; the same key every time, the round number is in `run`
    result = train.compare(key, run, "eager")    # episodes of one controller on keys that all controllers share

This is the only place that maps over environments. Environment e of round r is a function of (config, key, r, e)
alone, so a run resumes without stored keys and does not depend on how environments are spread over devices. All
controllers, learned or not, go through one compiled rollout: which one acts is an argument.

Axis letters: E environments, T epochs of an episode, S slots, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from esper_jax import data, devices
from esper_jax.config import Config
from esper_jax.control import baselines, heuristic, normalizers, policy, ppo
from esper_jax.control.normalizers import RunningStatistics
from esper_jax.devices import EACH, SAME
from esper_jax.env import observation
from esper_jax.env.environment import StepInfo, make_env
from esper_jax.env.evaluation import Evaluation
from esper_jax.network.blueprints import CNN
from esper_jax.trees import select, strong
from esper_jax.types import Action, Array, Controller, Masks

POLICY = "policy"
# What a run's key is folded with, before the round number and the environment's.
INIT_STREAM, ROUND_STREAM, COMPARE_STREAM = range(3)


@struct.dataclass
class RunState:
    """Everything that a run carries from round to round."""

    round: Array  # i32[] rounds done
    learner: ppo.LearnerState
    observations: RunningStatistics  # [D] of the features; frozen within a round
    rewards: RunningStatistics  # [1] of the rewards


@struct.dataclass
class Rollout:
    """Episodes of E environments, axes [E, T, ...]. Row 0 is an episode's birth: its first epoch, before any
    decision."""

    features: Array  # f32[E, T, D] as encoded, not normalised
    masks: Masks
    action: Action
    log_prob: Array  # f32[E, T]
    value: Array  # f32[E, T]
    reward: Array  # f32[E, T]
    terminal: Array  # bool[E, T]
    reset: Array  # bool[E, T] the controller's memory was cleared before this row
    info: StepInfo


@struct.dataclass
class Metrics:
    """What a round reports."""

    rollout: Rollout
    learner: dict[str, Array]  # see ppo.update


@struct.dataclass
class Comparison:
    """Episodes of one controller and what the report-test split says about the networks they ended with."""

    rollout: Rollout
    test: Evaluation  # leading axis E
    germinated: Array  # i32[E]
    fossilised: Array  # i32[E]
    pruned: Array  # i32[E]
    rollbacks: Array  # i32[E]


class Train(NamedTuple):
    """Pure functions of a run; see the module's docstring."""

    init: Callable  # key -> RunState
    update: Callable  # (key, RunState) -> (RunState, Metrics)
    compare: Callable  # (key, RunState, controller name) -> Comparison
    controllers: tuple[str, ...]
    dataset: data.Dataset
    rollout: Callable  # (dataset, RunState, key, controller number, environment numbers) -> (Rollout, EnvState)
    learn: Callable  # (key, RunState, Rollout) -> (RunState, metrics)
    report: Callable  # (dataset, EnvState) -> Evaluation
    start: Callable  # key -> RunState, not yet on every device
    keys: Callable  # (key, round number) -> keys of its rollout and of its update


def default_controllers(cfg: Config) -> dict[str, Controller]:
    """The rules that a learned policy has to beat, with the blueprints that the configuration offers."""
    offered = [name for name in cfg.lifecycle.blueprints if name != "noop"]
    largest = max(offered, key=lambda name: CNN[name].param_count(cfg.host.widths[-1]))
    rotation = tuple(name for name in heuristic.HeuristicConfig().rotation if name in offered)
    return {
        "never": baselines.never(),
        "random": baselines.random(),
        "eager": baselines.eager(largest, lifecycle=cfg.lifecycle),
        "periodic": baselines.periodic(
            blueprint="conv_light" if "conv_light" in offered else largest, lifecycle=cfg.lifecycle
        ),
        "heuristic": heuristic.make_controller(
            heuristic.HeuristicConfig(rotation=rotation or (largest,), available=tuple(offered))
        ),
    }


def choose(controllers: list[Controller], number: Array) -> Controller:
    """One controller out of a list, by a traced number: `lax.switch` over their `act`s, with all their carries."""

    def init(key):
        return tuple(controller.init(key) for controller in controllers)

    def act(key, carries, obs):
        def branch(i):
            def run():
                carry, action, extras = controllers[i].act(key, carries[i], obs)
                return (*carries[:i], carry, *carries[i + 1 :]), action, extras

            return run

        return lax.switch(number, [branch(i) for i in range(len(controllers))])

    return Controller(init, act)


def over_environments(fun: Callable, xs: Any, chunk: int) -> Any:
    """`fun` mapped over the leading axis, `chunk` at a time; a fixed chunk makes results independent of E."""
    return lax.map(fun, xs) if chunk == 1 else lax.map(fun, xs, batch_size=chunk)


def make_train(
    cfg: Config,
    dataset: data.Dataset | None = None,
    controllers: Mapping[str, Controller] | None = None,
) -> Train:
    """Binds a configuration.

    Args:
      dataset: by default the one that `cfg.data` names.
      controllers: rules to compare the learned policy with, by name; by default `default_controllers(cfg)`.

    Raises ValueError if environments cannot be spread evenly over the devices, chunks and minibatches.
    """
    mesh = devices.make_mesh(cfg.devices)
    devices.check_divides(mesh, "n_envs", cfg.n_envs, "env_chunk", cfg.env_chunk)
    devices.check_divides(mesh, "n_envs", cfg.n_envs, "ppo.minibatches", cfg.ppo.minibatches)
    devices.check_divides(mesh, "report_envs", cfg.report_envs, "env_chunk", cfg.env_chunk)
    dataset = devices.replicate(data.load(cfg.data) if dataset is None else dataset, mesh)
    rules = dict(default_controllers(cfg) if controllers is None else controllers)
    if POLICY in rules:
        raise ValueError(f"a controller called {POLICY!r} is given: that name is the learned policy's")
    names = (*rules, POLICY)
    n_slots = len(cfg.host.slot_names)
    n_features = observation.size(n_slots)

    def rollout(dataset, run: RunState, key, number, env_ids, axis_name):
        env = make_env(cfg, dataset)
        learned = policy.make_controller(run.learner.params, partial(normalizers.normalise, run.observations))
        controller = choose([*rules.values(), learned], number)

        def episode(env_id):
            env_key = jax.random.fold_in(key, env_id)
            init_key, step_key, act_key = jax.random.split(env_key, 3)
            state = env.init(init_key)
            fresh = controller.init(act_key)

            def epoch(carry, t):
                state, obs, memory, reset = carry
                memory = select(reset, fresh, memory)
                thought, action, extras = controller.act(jax.random.fold_in(act_key, t), memory, obs)
                # a newborn environment trains its first epoch before there is anything to decide
                birth = t == 0
                memory, action = select(birth, (memory, Action()), (thought, action))
                new_state, new_obs, reward, done, info = env.step(jax.random.fold_in(step_key, t), state, action)
                row = Rollout(obs.features, obs.masks, action, extras.log_prob, extras.value, reward, done, reset, info)
                return (new_state, new_obs, memory, done), row

            start = (state, env.observe(state), fresh, jnp.bool_(False))
            (state, *_), rows = lax.scan(epoch, start, jnp.arange(cfg.training.epochs))
            return rows, state

        return over_environments(episode, env_ids, cfg.env_chunk)

    def learn(key, run: RunState, rows: Rollout, axis_name):
        scale = jnp.sqrt(run.rewards.var[0] + normalizers.EPS)
        clip = cfg.reward.clip
        # the penalty of a rollback keeps its size whatever the other rewards are like
        reward = jnp.where(rows.info.panic, rows.reward, jnp.clip(rows.reward / scale, -clip, clip))
        valid = jnp.broadcast_to(jnp.arange(cfg.training.epochs) > 0, reward.shape)
        trajectory = ppo.Trajectory(
            features=normalizers.normalise(run.observations, rows.features),
            masks=rows.masks,
            action=rows.action,
            log_prob=rows.log_prob,
            value=rows.value,
            reward=reward,
            terminal=rows.terminal,
            valid=valid,
            reset=rows.reset,
        )
        trajectory = jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), trajectory)
        learner, metrics = ppo.update(key, run.learner, trajectory, cfg=cfg.ppo, axis_name=axis_name)
        seen = rows.features[:, 1:].reshape(-1, n_features)
        paid = jnp.where(rows.info.panic, jnp.clip(rows.reward, -clip, clip), rows.reward)[:, 1:].reshape(-1, 1)
        return RunState(
            round=run.round + 1,
            learner=learner,
            observations=normalizers.update(run.observations, seen, axis_name=axis_name),
            rewards=normalizers.update(run.rewards, paid, axis_name=axis_name),
        ), metrics

    def report(dataset, states, axis_name):
        return over_environments(make_env(cfg, dataset).report, states, cfg.env_chunk)

    def start(key):
        learner = ppo.init_learner(jax.random.fold_in(key, INIT_STREAM), cfg.ppo, n_features, n_slots)
        return strong(RunState(jnp.int32(0), learner, normalizers.init(n_features), normalizers.init(1)))

    def keys(key, number):
        round_key = jax.random.fold_in(jax.random.fold_in(key, ROUND_STREAM), number)
        return tuple(jax.random.split(round_key))

    rollout = devices.over_devices(rollout, mesh, (SAME, SAME, SAME, SAME, EACH), EACH)
    learn = devices.over_devices(learn, mesh, (SAME, SAME, EACH), SAME)
    report = devices.over_devices(report, mesh, (SAME, EACH), EACH)
    return bind(cfg, dataset, names, rollout=rollout, learn=learn, report=report, start=jax.jit(start), keys=keys)


def bind(
    cfg: Config,
    dataset: data.Dataset,
    names: tuple[str, ...],
    *,
    rollout: Callable,
    learn: Callable,
    report: Callable,
    start: Callable,
    keys: Callable,
) -> Train:
    """What users call, on top of the programs of a run: functions of `make_train`, or what was compiled from them.

    Args:
      names: of the controllers, in the order of their numbers.
      rollout, learn, report, start, keys: see `Train`.
    """
    mesh = devices.make_mesh(cfg.devices)

    def env_ids(n: int) -> np.ndarray:
        return np.arange(n, dtype=np.int32)  # not of JAX, which would compile a program to fill it and one to split it

    def init(key: Array) -> RunState:
        return devices.replicate(start(key), mesh)

    def update(key: Array, run: RunState) -> tuple[RunState, Metrics]:
        env_key, learn_key = keys(key, run.round)
        number = jnp.int32(names.index(POLICY))
        rows, _ = rollout(dataset, run, devices.replicate(env_key, mesh), number, env_ids(cfg.n_envs))
        run, metrics = learn(learn_key, run, rows)
        return run, Metrics(rows, metrics)

    def compare(key: Array, run: RunState, controller: str) -> Comparison:
        if controller not in names:
            raise ValueError(f"controller {controller!r}: must be one of {', '.join(names)}")
        # placed like the key of a round, or the rollout would be compiled a second time
        env_key = devices.replicate(jax.random.fold_in(key, COMPARE_STREAM), mesh)
        number = jnp.int32(names.index(controller))
        rows, states = rollout(dataset, run, env_key, number, env_ids(cfg.report_envs))
        test = report(dataset, states)
        return Comparison(rows, test, states.germinated, states.fossilised, states.pruned, states.rollbacks)

    return Train(init, update, compare, names, dataset, rollout, learn, report, start, keys)
