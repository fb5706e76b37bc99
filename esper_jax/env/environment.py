"""One environment: a host that trains, one epoch and one decision per step (Esper's Simic and Tolaria).

    state, obs = env.reset(key)
    state, obs, reward, done, info = env.step(key, state, action)

Everything is a pure function of (config, dataset, key, actions). `reset` is a step from a newborn state in which only
WAIT is legal, so the first epoch is trained and measured by the same code as all others. The key given to `step`
decides the data order, the augmentation and a new seed's parameters, never the controller's choice: two controllers
that get the same keys see the same host and the same batches.

`done` is True at epoch T alone. After a rollback (`info.panic`) the episode goes on from the restored state, but the
learner may not look across it: `info.discount` is 0 there, as it is at epoch T.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from esper_jax.config import Config
from esper_jax.data import AnyDataset
from esper_jax.env import attribution, generation, observation, transition
from esper_jax.env.evaluation import Evaluation
from esper_jax.env.reward import RewardWeights
from esper_jax.env.state import EnvState, Grown, StepInfo
from esper_jax.env.transition import Change, Setting
from esper_jax.lifecycle import stages
from esper_jax.network import model as networks
from esper_jax.types import Action, Array, Observation, Op, Stage

__all__ = ["Env", "EnvState", "Grown", "StepInfo", "make_env"]


class Init(Protocol):
    def __call__(self, key: Array, shape: Array | None = None) -> EnvState:
        """A newborn: no epoch is trained yet. With `shape`, i32[S, 2], it has fossilised seeds from birth on, by
        blueprint and algorithm, -1 for none; what is drawn for the host is the same."""


class Reset(Protocol):
    def __call__(self, key: Array) -> tuple[EnvState, Observation]:
        """The first epoch is done."""


class Step(Protocol):
    def __call__(
        self, key: Array, state: EnvState, action: Action
    ) -> tuple[EnvState, Observation, Array, Array, StepInfo]:
        """State, observation, reward f32[], done bool[], info."""


class Observe(Protocol):
    def __call__(self, state: EnvState) -> Observation: ...


class Report(Protocol):
    def __call__(self, grown: Grown) -> Evaluation:
        """On the report-test split."""


class Write(Protocol):
    def __call__(self, grown: Grown) -> Array:
        """What the committed network writes after the data's prompt, i32[length]; i32[0] of images."""


class Env(NamedTuple):
    """Pure functions of one environment; `vmap` or `lax.map` them over many."""

    init: Init
    reset: Reset
    step: Step
    observe: Observe
    report: Report
    write: Write
    n_slots: int
    n_features: int


def make_env(cfg: Config, dataset: AnyDataset, weights: RewardWeights | None = None) -> Env:
    """Binds the static configuration; `dataset` and `weights` (by default those of `cfg.reward`) may be traced.

    Raises ValueError if the images are too small for the host or the training split smaller than a batch.
    """
    networks.check(cfg.host, dataset.example)
    if dataset.train_size < cfg.training.batch_size:
        raise ValueError(
            f"TrainingConfig.batch_size = {cfg.training.batch_size}: must be at most {dataset.train_size}, "
            "what there is to draw from"
        )
    if weights is None:
        weights = RewardWeights.from_config(cfg.reward, cfg.ppo.gamma, cfg.lifecycle.min_prune_age)
    setting = Setting(dataset, weights, cfg)
    horizon, space = cfg.training.epochs, cfg.action_space

    def init(key: Array, shape: Array | None = None) -> EnvState:
        state = transition.newborn(setting, key)
        if shape is None:
            return state
        return transition.with_fossils(setting, jax.random.fold_in(key, transition.FOSSILS), state, shape)

    def observe(state: EnvState) -> Observation:
        scale = jnp.float32(horizon), jnp.float32(setting.metric.span)
        inputs = observation.Inputs(state.signals, state.slots, state.last_op, state.last_success, *scale)
        legal = transition.legal_actions(setting, state)
        return Observation(observation.encode(inputs, space), legal, state.signals, state.slots)

    def step(key: Array, state: EnvState, action: Action):
        action = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.int32), action)
        germination_key, train_key = jax.random.split(key)
        before = state
        state, outcome = transition.act(setting, germination_key, state, action)
        acted = state.slots
        state, metrics = transition.train(setting, train_key, state)
        live = networks.live_slots(state.model, state.slots)
        measured = transition.measure(setting, state.model, state.slots, dataset.validation)
        found = attribution.attribute(measured.table, setting.configurations, live)
        sizes = transition.relative_sizes(setting, state)
        fossilised = outcome.op == Op.FOSSILIZE
        state, verdict = transition.apply_verdict(setting, before, state, measured, metrics, fossilised)
        state = transition.record(setting, state, measured, found, metrics, verdict)
        change = Change(action, outcome, found, verdict)
        components, contributing = transition.transition_reward(setting, before, state, change)
        pruned = (acted.stage == Stage.PRUNED) & (before.slots.stage != Stage.PRUNED)
        pruned |= (acted.stage == Stage.EMBARGOED) & stages.is_active(before.slots.stage)
        state = state.replace(
            last_op=jnp.clip(action.op, 0, len(Op) - 1),
            last_success=outcome.success,
            germinated=state.germinated + outcome.germinated.any().astype(jnp.int32),
            fossilised=state.fossilised + fossilised.astype(jnp.int32),
            contributing_fossils=state.contributing_fossils + contributing.astype(jnp.int32),
            pruned=state.pruned + pruned.sum(dtype=jnp.int32),
        )
        info = transition.describe(setting, state, change, measured, metrics, sizes, components)
        if cfg.reward.mode == "paired":
            info = info.replace(components=transition.own_progress(setting, before, info))
        return state, observe(state), info.components.total(), info.episode_over, info

    def reset(key: Array) -> tuple[EnvState, Observation]:
        host_key, step_key = jax.random.split(key)
        state, obs, *_ = step(step_key, init(host_key), Action())
        return state, obs

    def report(grown: Grown) -> Evaluation:
        return transition.measure(setting, grown.model, grown.slots, dataset.test)

    def write(grown: Grown) -> Array:
        if dataset.prompt is None:
            return jnp.zeros(0, jnp.int32)
        return generation.write(grown.model, grown.slots, dataset.prompt, dtype=cfg.training.compute_dtype)

    return Env(init, reset, step, observe, report, write, setting.n_slots, observation.size(space))
