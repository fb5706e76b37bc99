"""The reference's other normalisers: of rewards, of values, and with an exponential mean.

This system divides rewards by the deviation of discounted returns (`ppo.discounted_sums`) and does not scale values.
"""

import jax
import jax.numpy as jnp
from flax import struct

from esper_jax.control.normalizers import CLIP, EPS, RunningStatistics, update
from esper_jax.trees import select
from esper_jax.types import Array

REWARD_EPS = 1e-8  # smallest standard deviation that a reward is divided by
VALUE_MOMENTUM = 0.99
VALUE_WARMUP = 32  # returns seen before values are scaled


def exponential_update(state: RunningStatistics, batch: Array, *, momentum: float) -> RunningStatistics:
    """An exponential mean over batches f32[N, D] that keeps `momentum` of the old statistics, whatever their size."""
    mean = jnp.mean(batch, axis=0)
    var = jnp.mean(jnp.square(batch - mean[None]), axis=0)
    take, delta = 1 - momentum, mean - state.mean
    return RunningStatistics(
        mean=state.mean + take * delta,
        var=momentum * state.var + take * var + momentum * take * jnp.square(delta),
        count=state.count + batch.shape[0],
    )


@struct.dataclass
class RewardStatistics:
    """Running mean and sum of squared deviations of a stream of rewards (Welford, 1962)."""

    mean: Array  # f32[]
    m2: Array  # f32[]
    count: Array  # i32[] integer, since a float32 stops counting at 2^24


def reward_init() -> RewardStatistics:
    return RewardStatistics(jnp.float32(0), jnp.float32(0), jnp.int32(0))


def reward_normalise(state: RewardStatistics, reward: Array) -> Array:
    """Rewards over their running sample deviation, clamped to +-10; any shape.

    The mean stays in, since it is what the agent lives on. Before two rewards were seen they are only clamped.
    """
    std = jnp.sqrt(state.m2 / jnp.maximum(state.count - 1, 1).astype(jnp.float32))
    scaled = jnp.where(state.count < 2, reward, reward / jnp.maximum(std, REWARD_EPS))
    return jnp.clip(scaled, -CLIP, CLIP)


def reward_update_and_normalise(state: RewardStatistics, rewards: Array) -> tuple[RewardStatistics, Array]:
    """Take in rewards f32[N] one after the other and normalise each by the statistics that include it.

    The order is the given one and matters: environments within an epoch, then epochs.
    """

    def step(state: RewardStatistics, reward: Array) -> tuple[RewardStatistics, Array]:
        count = state.count + 1
        delta = reward - state.mean
        mean = state.mean + delta / count.astype(jnp.float32)
        state = RewardStatistics(mean=mean, m2=state.m2 + delta * (reward - mean), count=count)
        return state, reward_normalise(state, reward)

    return jax.lax.scan(step, state, rewards)


def value_init() -> RunningStatistics:
    """Statistics of returns, D = (): nothing seen yet."""
    return RunningStatistics(jnp.float32(0), jnp.float32(1), jnp.float32(0))


def value_update(state: RunningStatistics, returns: Array) -> RunningStatistics:
    """Take in returns f32[N]: each weighs alike until 32 were seen, an exponential mean over batches from then on."""
    first = update(state, returns)
    later = exponential_update(state, returns, momentum=VALUE_MOMENTUM)
    return select(state.count < VALUE_WARMUP, first, later)


def _value_scale(state: RunningStatistics) -> Array:
    return jnp.where(state.count < VALUE_WARMUP, 1.0, jnp.sqrt(state.var + EPS))


def value_normalise(state: RunningStatistics, x: Array) -> Array:
    """Returns over their deviation, mean left in; unchanged until 32 were seen. Any shape."""
    return x / _value_scale(state)


def value_denormalise(state: RunningStatistics, x: Array) -> Array:
    """Inverse of `value_normalise` under the same state."""
    return x * _value_scale(state)
