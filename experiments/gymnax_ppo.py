"""PPO as it is written for gymnax environments, on growth: an example to start from, not the main job.

    python -m experiments.gymnax_ppo [--env digits-2slot] [--updates 20] [--seed 0]

A feed-forward policy over the flat list of decisions, one environment after the other (`lax.map`, which compiles and
runs faster than `vmap` on a CPU), everything in one scan over updates. The policy of the main job has a memory and
decides head by head (`esper_jax.control.policy`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax import lax

import esper_jax
from esper_jax.config import number
from esper_jax.gym import GrowthEnv
from esper_jax.run import command, options

PROGRAM = "python -m experiments.gymnax_ppo"


class Transition(NamedTuple):
    """One step of all environments; axes [T, E]."""

    obs: jax.Array
    legal: jax.Array
    action: jax.Array
    log_prob: jax.Array
    value: jax.Array
    reward: jax.Array
    done: jax.Array
    accuracy: jax.Array  # of validation, percentage points


class ActorCritic(nn.Module):
    """Logits of the decisions and the value of an observation."""

    decisions: int

    @nn.compact
    def __call__(self, obs, legal):
        hidden = nn.LayerNorm()(obs)
        actor, critic = (nn.tanh(nn.Dense(64)(hidden)) for _ in range(2))
        logits = nn.Dense(self.decisions, kernel_init=nn.initializers.orthogonal(0.01))(actor)
        return jnp.where(legal, logits, -1e9), nn.Dense(1)(critic)[..., 0]


def make_train(
    env: GrowthEnv,
    *,
    envs: int = 8,
    updates: int = 20,
    passes: int = 4,
    learning_rate: float = 1e-3,
    gamma: float = 0.995,
    gae_lambda: float = 0.98,
    clip: float = 0.2,
    entropy: float = 0.02,
) -> Callable[[jax.Array], dict[str, jax.Array]]:
    """`train(key)`: f32[updates] of the mean return of an episode and the validation accuracy at its end."""
    params, steps = env.default_params, env.default_params.max_steps_in_episode
    network = ActorCritic(env.num_actions)
    optimiser = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(learning_rate, eps=1e-5))

    def act(weights, carry, key):
        obs, state, legal = carry
        act_key, step_key = jax.random.split(key)
        logits, value = network.apply(weights, obs, legal)
        action = jax.random.categorical(act_key, logits)
        log_prob = jnp.take_along_axis(jax.nn.log_softmax(logits), action[:, None], 1)[:, 0]
        one = lambda given: env.step(*given, params)
        new_obs, new_state, reward, done, info = lax.map(one, (jax.random.split(step_key, envs), state, action))
        row = Transition(obs, legal, action, log_prob, value, reward, done, info["val_accuracy"])
        return (new_obs, new_state, info["legal"]), row

    def advantages(rows: Transition):
        def back(after, row):
            next_value, advantage = after
            delta = row.reward + gamma * next_value * (1 - row.done) - row.value
            advantage = delta + gamma * gae_lambda * (1 - row.done) * advantage
            return (row.value, advantage), advantage

        zeros = jnp.zeros(envs)  # the last step ends every episode: nothing follows
        return lax.scan(back, (zeros, zeros), rows, reverse=True)[1]

    def loss(weights, rows: Transition, advantage):
        logits, value = network.apply(weights, rows.obs, rows.legal)
        log_probs = jax.nn.log_softmax(logits)
        log_prob = jnp.take_along_axis(log_probs, rows.action[..., None], -1)[..., 0]
        ratio = jnp.exp(log_prob - rows.log_prob)
        normalised = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        surrogate = jnp.minimum(ratio * normalised, jnp.clip(ratio, 1 - clip, 1 + clip) * normalised)
        spread = -jnp.where(rows.legal, jnp.exp(log_probs) * log_probs, 0).sum(-1)
        error = jnp.square(value - (advantage + rows.value))
        return -surrogate.mean() + 0.5 * error.mean() - entropy * spread.mean()

    def train(key):
        init_key, reset_key, key = jax.random.split(key, 3)
        obs, state = lax.map(lambda k: env.reset(k, params), jax.random.split(reset_key, envs))
        legal = lax.map(env.legal, state)
        weights = network.init(init_key, obs, legal)

        def update(carry, key):
            weights, opt_state, episodes = carry
            episodes, rows = lax.scan(lambda c, k: act(weights, c, k), episodes, jax.random.split(key, steps))
            advantage = advantages(rows)

            def one_pass(learned, _):
                weights, opt_state = learned
                gradient = jax.grad(loss)(weights, rows, advantage)
                change, opt_state = optimiser.update(gradient, opt_state, weights)
                return (optax.apply_updates(weights, change), opt_state), None

            (weights, opt_state), _ = lax.scan(one_pass, (weights, opt_state), length=passes)
            said = {"return": rows.reward.sum(0).mean(), "accuracy": rows.accuracy[-1].mean()}
            return (weights, opt_state, episodes), said

        start = (weights, optimiser.init(weights), (obs, state, legal))
        return lax.scan(update, start, jax.random.split(key, updates))[1]

    return train


@dataclass(frozen=True)
class Options:
    """Trains a feed-forward policy with PPO and prints the return of an episode and the accuracy at its end."""

    env: str = "digits-2slot"
    """name of the environment, see `esper_jax.make`"""
    updates: int = number(20, above=0)
    """of eight episodes each"""
    seed: int = number(0, low=0, high=2**32 - 1)
    """of everything"""


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    try:
        with command.refusing(ValueError):
            options.check(argv, Options)
            chosen = options.cli(Options, argv, prog=PROGRAM)
            env = esper_jax.make(chosen.env)
    except command.Refusal as refusal:
        return command.refused(refusal)
    said = jax.jit(make_train(env, updates=chosen.updates))(jax.random.key(chosen.seed))
    for update, (earned, accuracy) in enumerate(zip(said["return"], said["accuracy"], strict=True), start=1):
        print(f"update {update}/{chosen.updates}  return={earned:.2f}  accuracy={accuracy:.1f}")
    return 0


if __name__ == "__main__":
    command.leave(main())
