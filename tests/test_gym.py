"""The environment with gymnax's signature: what a learner written for it relies on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import esper_jax
from esper_jax.enums import Op, Stage
from esper_jax.gym import Box, Discrete, GrowthEnv
from experiments import gymnax_ppo

T = 4


@functools.cache
def env():
    return GrowthEnv(
        tiny.CONFIG.replace(**{"training.epochs": T, "lifecycle.blueprints": ("norm", "attention")}), tiny.dataset()
    )


@functools.cache
def episode():
    """Two episodes and a step, of decisions that are drawn among the legal ones."""

    def step(carry, key):
        obs, state = carry
        before = env().legal(state)
        action = jax.random.categorical(key, jnp.where(before, 0.0, -jnp.inf))
        obs, state, reward, done, info = env().step(key, state, action, env().default_params)
        return (obs, state), (obs, state, action, before, reward, done, info)

    start = jax.jit(env().reset)(jax.random.key(0), env().default_params)
    return start, jax.jit(lambda s, k: jax.lax.scan(step, s, k))(start, jax.random.split(jax.random.key(1), 2 * T + 1))[
        1
    ]


def test_signature_and_spaces():
    start, (obs, state, action, _, reward, done, info) = episode()
    space = env().observation_space(env().default_params)
    assert isinstance(space, Box) and start[0].shape == space.shape == obs.shape[1:] and space.contains(obs[0])
    actions = env().action_space()
    assert (
        isinstance(actions, Discrete)
        and actions.n == env().num_actions
        and actions.contains(actions.sample(jax.random.key(0)))
    )
    assert reward.shape == done.shape == action.shape == (2 * T + 1,) and done.dtype == bool
    assert info["legal"].shape == (2 * T + 1, actions.n)
    assert env().default_params.max_steps_in_episode == T


def test_an_episode_ends_after_t_epochs_and_the_next_begins_newborn():
    _, (obs, state, action, legal, reward, done, info) = episode()
    assert done.tolist() == [False, False, False, True] * 2 + [False]
    assert state.epoch.tolist() == [1, 2, 3, 0, 1, 2, 3, 0, 1]
    assert (state.slots.stage[T - 1] == Stage.DORMANT).all() and not state.germinated[T - 1]
    # a newborn can only wait, and its first epoch pays the fall of the loss like every other
    assert action[0] == action[T] == 0 and legal[0].sum() == legal[T].sum() == 1
    first, second = (jax.tree.map(lambda leaf, t=t: leaf[t], state.model.host.params) for t in (T - 1, 2 * T - 1))
    assert not tiny.equal(first, second), "every episode has a host of its own"


def test_what_is_legal_is_carried_out():
    """In particular germination: one decision for each slot and each blueprint that is offered."""
    table = [env().describe(a) for a in range(env().num_actions)]
    offered = [name for name in env().cfg.lifecycle.blueprints if name != "noop"]
    slots = env().cfg.host.slot_names
    assert table[0] == "wait" and len(set(table)) == len(table) == 1 + len(slots) * (len(offered) + 3 + 3)
    assert f"germinate {offered[-1]} {slots[-1]}" in table
    _, (_, state, action, legal, *_) = episode()
    ops = np.array([int(a.op) for a in env().actions])[np.asarray(action)]
    assert np.take_along_axis(np.asarray(legal), np.asarray(action)[:, None], 1).all() and (ops != Op.WAIT).any()
    went_on = np.asarray(state.epoch) > 0  # at the end of an episode the state is the next one's
    np.testing.assert_array_equal(np.asarray(state.last_op)[went_on], ops[went_on])


def test_names():
    made = esper_jax.make("digits-3slot", training__epochs=7, **{"reward.price": 0.25})
    assert made.name == "digits-3slot" and made.cfg.training.epochs == 7
    assert made.default_params.weights.price == 0.25 and made.default_params.max_steps_in_episode == 7
    with pytest.raises(ValueError, match=r"'digits': must be \{digits,cifar10,shapes\}-Nslot"):
        esper_jax.make("digits")
    with pytest.raises(ValueError, match=r"env = None: must be \{digits"):
        esper_jax.make(None)
    with pytest.raises(ValueError, match="DataConfig.name = 'shapes': must be 'digits', as in 'digits-2slot'"):
        esper_jax.make("digits-2slot", data__name="shapes")
    with pytest.raises(ValueError, match="trainin"):
        esper_jax.make("digits-2slot", trainin__epochs=7)
    with pytest.raises(ValueError, match="Config.seed has no fields: there is no seed.x"):
        esper_jax.make("digits-2slot", seed__x=1)
    with pytest.raises(ValueError, match="must be one or more decisions"):
        GrowthEnv(env().cfg, env().dataset, actions=())
    longer = env().default_params.replace(max_steps_in_episode=99)
    with pytest.raises(ValueError, match=f"max_steps_in_episode = 99: must be training.epochs = {T}"):
        env().reset(jax.random.key(0), longer)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("--env digits", "env = 'digits': must be {digits,cifar10,shapes}-Nslot, such as digits-2slot"),
        ("--env digits-99slot", "HostConfig.n_blocks = 99: must be in [2, 16]"),
        ("--seed 99999999999999999999", "--seed 99999999999999999999: must be in [0, 4294967295]"),
        ("--updates 0", "--updates 0: must be greater than 0"),
        ("--update 1", "--update: must be an option that --help names; did you mean --updates?"),
    ],
)
def test_the_example_refuses_in_one_line(capsys, argv, said):
    assert gymnax_ppo.main(argv.split()) == 2
    assert capsys.readouterr().err == f"error: {said}\n"


def test_the_example_trains_on_it():
    """Two updates: a number of each, finite and in its range."""
    said = jax.jit(gymnax_ppo.make_train(env(), envs=2, updates=2, passes=1))(jax.random.key(0))
    assert said["return"].shape == said["accuracy"].shape == (2,)
    assert np.isfinite(said["return"]).all() and (0 <= said["accuracy"]).all() and (said["accuracy"] <= 100).all()
