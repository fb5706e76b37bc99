"""The smallest environment that does everything: two slots, two blueprints, 8x8 images of three classes.

One compiled step serves all tests that need an environment.
"""

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from esper_jax.config import Config, GovernorConfig, HostConfig, LifecycleConfig, TrainingConfig
from esper_jax.control import baselines
from esper_jax.data import Dataset, Split
from esper_jax.env.environment import make_env
from esper_jax.types import Action, Op

CONFIG = Config(
    host=HostConfig(n_blocks=2, base_channels=4, pool_layers=2),
    training=TrainingConfig(
        epochs=18, batches_per_epoch=2, batch_size=16, host_lr=0.05, seed_lr=0.05, telemetry_stride=1
    ),
    lifecycle=LifecycleConfig(blueprints=("norm", "conv_light")),
    governor=GovernorConfig(rules="reference", min_history=4, history_window=6, snapshot_epochs=5),
)
SLOTS = 2


@functools.cache
def dataset(train: int = 64, others: int = 48) -> Dataset:
    """Noisy copies of one pattern per class."""
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 256, (3, 8, 8, 1))

    def part(size):
        labels = rng.integers(0, 3, size)
        images = np.clip(patterns[labels] + rng.normal(0, 180, (size, 8, 8, 1)), 0, 255)
        return Split(jnp.asarray(images, jnp.uint8), jnp.asarray(labels, jnp.int32))

    return Dataset(
        train=part(train), validation=part(others), test=part(others), name="tiny", classes=("a", "b", "c"),
        mean=(0.5,), std=(0.35,), augment=False, identity="tiny", source="tests",
    )  # fmt: skip


def with_emitters(fun):
    """Compiled with fusion emitters, as users' programs are: where two programs have to agree bit for bit."""
    options = {"xla_cpu_use_fusion_emitters": True} if jax.__version_info__ < (0, 11) else None
    return jax.jit(fun, compiler_options=options)


@functools.cache
def env():
    return make_env(CONFIG, dataset())


@functools.cache
def step():
    """The compiled `env.step`; a second trace is an error."""
    return with_emitters(chex.assert_max_traces(env().step, n=1))


@functools.cache
def init():
    return jax.jit(env().init)


@functools.cache
def observe():
    return jax.jit(env().observe)


@functools.cache
def _random():
    def act(key, t, obs, busy):
        """Uniform over what is legal; `busy` leaves out WAIT and PRUNE while there is something else to do."""
        grows = obs.masks.op & ~jnp.isin(jnp.arange(len(Op)), jnp.array([Op.WAIT, Op.PRUNE]))
        op = jnp.where(busy & grows.any(), grows, obs.masks.op)
        obs = obs.replace(masks=obs.masks.replace(op=op))
        return baselines.random().act(jax.random.fold_in(key, t), (), obs)[1]

    return jax.jit(act)


class Step(NamedTuple):
    """A transition: the state before it, the key, what was asked for, and what `env.step` returned."""

    before: object
    key: object
    action: Action
    state: object
    obs: object
    reward: object
    done: object
    info: object


def act(op=Op.WAIT, slot=0, **heads) -> Action:
    return jax.tree.map(jnp.int32, Action(op=int(op), slot=slot, **heads))


def born(seed=0):
    return init()(jax.random.key(seed))


def forward(state, key, action=None) -> Step:
    """One step from a state; waits by default."""
    action = act() if action is None else action
    return Step(state, key, action, *step()(key, state, action))


def keys(seed, n=CONFIG.training.epochs):
    return jax.random.split(jax.random.fold_in(jax.random.key(seed), 1), n)


def play(script, *, seed=0, epochs=None) -> list[Step]:
    """An episode from its birth: the first epoch, then one decision of `script` per epoch, then waiting."""
    state, steps = born(seed), []
    actions = [act(), *script]
    for t, key in enumerate(keys(seed)[:epochs]):
        steps.append(forward(state, key, actions[t] if t < len(actions) else None))
        state = steps[-1].state
    return steps


def column(steps, name):
    """A field of `info` over the steps, stacked."""
    return np.stack([np.asarray(getattr(step.info, name)) for step in steps])


@functools.cache
def random_lives(n: int = 64) -> list[list[Step]]:
    """Episodes of random legal actions; in every other one seeds grow without long waits."""
    lives = []
    for seed in range(n):
        state, steps = born(seed), []
        obs = observe()(state)
        for t, key in enumerate(keys(seed)):
            steps.append(forward(state, key, _random()(key, t, obs, seed % 2 == 1)))
            state, obs = steps[-1].state, steps[-1].obs
        lives.append(steps)
    return lives


def equal(one, other) -> bool:
    """Bitwise, all leaves; NaN equals NaN."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)
