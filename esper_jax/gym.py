"""The environment with gymnax's signature, for learners that were written for it.

    env = esper_jax.make("digits-2slot")
    obs, state = env.reset(key, env.default_params)
    obs, state, reward, done, info = env.step(key, state, action, env.default_params)

The reward `paired` is paid without a twin here: the fall of the own loss; no decision changes the twin's part of it.

One number is one decision: WAIT, or what is done to which slot (`GrowthEnv.actions`); what a gymnax learner cannot say
(how long a ramp takes, the style of a blend) keeps its canonical value, or is given with a table of one's own. A
decision that is not legal is a WAIT; `info["legal"]` masks the next one. An episode has T steps; in the first of them
the host is trained before there is anything to decide, so that the automatic reset costs nothing.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from esper_jax import data, presets
from esper_jax.config import Config
from esper_jax.data import Dataset
from esper_jax.enums import ALPHA_TARGETS, HEADS, Op
from esper_jax.env import transition
from esper_jax.env.environment import Env, EnvState, make_env
from esper_jax.env.reward import RewardWeights
from esper_jax.lifecycle import masks
from esper_jax.trees import select
from esper_jax.types import Action, Array


class Discrete(NamedTuple):
    """The numbers 0 to n - 1."""

    n: int
    shape: tuple[int, ...] = ()
    dtype: Any = jnp.int32

    def sample(self, key: Array) -> Array:
        return jax.random.randint(key, self.shape, 0, self.n, self.dtype)

    def contains(self, x: Array) -> Array:
        return (x >= 0) & (x < self.n)


class Box(NamedTuple):
    """Arrays of one shape between two numbers."""

    low: float
    high: float
    shape: tuple[int, ...]
    dtype: Any = jnp.float32

    def sample(self, key: Array) -> Array:
        """Uniform; standard normal where there are no bounds."""
        if np.isfinite([self.low, self.high]).all():
            return jax.random.uniform(key, self.shape, self.dtype, self.low, self.high)
        return jax.random.normal(key, self.shape, self.dtype)

    def contains(self, x: Array) -> Array:
        return ((x >= self.low) & (x <= self.high)).all()


@struct.dataclass
class EnvParams:
    """What a study varies; the weights are traced, so a grid of them compiles once."""

    weights: RewardWeights
    max_steps_in_episode: int = struct.field(pytree_node=False)  # T, for learners that ask; fixed by the configuration


def decisions(cfg: Config) -> tuple[Action, ...]:
    """WAIT, then for each slot: germinate each offered blueprint, advance, fossilize, prune, each alpha target."""
    space = cfg.action_space
    table = [Action()]
    for slot in range(space.n_slots):
        on = Action(slot=jnp.int32(slot))
        table += [on.replace(op=jnp.int32(Op.GERMINATE), blueprint=jnp.int32(b)) for b in space.offered]
        table += [on.replace(op=jnp.int32(op)) for op in (Op.ADVANCE, Op.FOSSILIZE, Op.PRUNE)]
        table += [
            on.replace(op=jnp.int32(Op.SET_ALPHA_TARGET), alpha_target=jnp.int32(k)) for k in range(len(ALPHA_TARGETS))
        ]
    return tuple(table)


class GrowthEnv:
    """One environment; every function is pure and can be mapped, jitted and scanned."""

    def __init__(self, cfg: Config, dataset: Dataset, actions: Sequence[Action] | None = None):
        """Raises ValueError as `make_env` does, and if `actions` is empty."""
        self.cfg, self.dataset = cfg, dataset
        self.actions = tuple(decisions(cfg) if actions is None else actions)
        if not self.actions:
            raise ValueError("actions = (): must be one or more decisions")
        self._table = jax.tree.map(lambda *leaves: jnp.stack(leaves), *self.actions)
        self._features = make_env(cfg, dataset).n_features

    @property
    def name(self) -> str:
        return f"{self.dataset.name}-{len(self.cfg.host.slot_names)}slot"

    @property
    def default_params(self) -> EnvParams:
        weights = RewardWeights.from_config(self.cfg.reward, self.cfg.ppo.gamma, self.cfg.lifecycle.min_prune_age)
        return EnvParams(weights, self.cfg.training.epochs)

    @property
    def num_actions(self) -> int:
        return len(self.actions)

    def action_space(self, params: EnvParams | None = None) -> Any:
        """`Discrete`; gymnax's own where it is imported, since learners ask for the class."""
        return getattr(_gymnax_spaces(), "Discrete", Discrete)(self.num_actions)

    def observation_space(self, params: EnvParams | None = None) -> Any:
        """`Box` (or gymnax's) of features as `observation.encode` makes them, not normalised."""
        return getattr(_gymnax_spaces(), "Box", Box)(-np.inf, np.inf, (self._features,))

    def reset(self, key: Array, params: EnvParams | None = None) -> tuple[Array, EnvState]:
        """Observation f32[D] of a newborn, whose first epoch the first step trains."""
        env = self._env(params)
        state = env.init(key)
        return env.observe(state).features, state

    def step(
        self, key: Array, state: EnvState, action: Array, params: EnvParams | None = None
    ) -> tuple[Array, EnvState, Array, Array, dict[str, Any]]:
        """Observation, state, reward f32[], done bool[], info; at the end of an episode those of the next newborn."""
        step_key, reset_key = jax.random.split(key)
        obs, ended, reward, done, info = self.step_env(step_key, state, action, params)
        fresh_obs, fresh = self.reset(reset_key, params)
        obs, state = select(done, (fresh_obs, fresh), (obs, ended))
        return obs, state, reward, done, info | {"legal": self.legal(state)}

    def step_env(
        self, key: Array, state: EnvState, action: Array, params: EnvParams | None = None
    ) -> tuple[Array, EnvState, Array, Array, dict[str, Any]]:
        """A step without the automatic reset."""
        env = self._env(params)
        chosen = jax.tree.map(lambda column: column[action], self._table)
        state, obs, reward, done, info = env.step(key, state, chosen)
        said = {name: getattr(info, name) for name in ("val_accuracy", "val_loss", "committed_accuracy", "panic")}
        return obs.features, state, reward, done, said | {"discount": info.discount, "legal": self.legal(state)}

    def _env(self, params: EnvParams | None) -> Env:
        params = self.default_params if params is None else params
        if params.max_steps_in_episode != self.cfg.training.epochs:
            raise ValueError(
                f"max_steps_in_episode = {params.max_steps_in_episode}: must be training.epochs = "
                f"{self.cfg.training.epochs}, on which the environment depends"
            )
        return make_env(self.cfg, self.dataset, params.weights)

    def legal(self, state: EnvState) -> Array:
        """bool[A]: which decisions would be carried out."""
        setting = transition.Setting(self.dataset, self.default_params.weights, self.cfg)
        return jax.vmap(lambda action: masks.permits(transition.legal_actions(setting, state), action))(self._table)

    def describe(self, action: int) -> str:
        """A decision in words."""
        heads = {head: int(getattr(self.actions[action], head)) for head in HEADS}
        op = Op(heads["op"])
        what = {
            Op.GERMINATE: f" {self.cfg.lifecycle.catalog[heads['blueprint']]}",
            Op.SET_ALPHA_TARGET: f" {ALPHA_TARGETS[heads['alpha_target']]}",
        }.get(op, "")
        slot = "" if op == Op.WAIT else f" {self.cfg.host.slot_names[heads['slot']]}"
        return f"{op.name.lower()}{what}{slot}"


def _gymnax_spaces() -> Any:
    return sys.modules.get("gymnax.environments.spaces")


def make(name: str, **overrides: Any) -> GrowthEnv:
    """The environment of that name: `digits-2slot`, `cifar10-3slot`, `shapes-2slot`, ...

    The size is that of the preset `quick`, whose host gets a block for each slot.

    Args:
      overrides: of the configuration, with `__` or `.` (in a dict) between the parts of a name:
        `make("digits-2slot", training__epochs=10, **{"reward.price": 0.1})`.

    Raises ValueError for a name or a field that does not exist, and for other data than the name says.
    """
    match = re.fullmatch(r"(digits|cifar10|shapes)-(\d+)slot", str(name))
    if match is None:
        raise ValueError(f"env = {name!r}: must be {{digits,cifar10,shapes}}-Nslot, such as digits-2slot")
    source, slots = match[1], int(match[2])
    cfg = presets.get("quick", source).replace(**{"host.n_blocks": slots})
    cfg = cfg.replace(**{field.replace("__", "."): value for field, value in overrides.items()})
    if cfg.data.name != source:
        raise ValueError(f"DataConfig.name = {cfg.data.name!r}: must be {source!r}, as in {name!r}")
    return GrowthEnv(cfg, data.load(cfg.data))
