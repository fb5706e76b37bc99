"""Running statistics that bring observations and returns to unit scale."""

from __future__ import annotations

import jax.numpy as jnp
from flax import struct

from esper_jax.types import Array

EPS = 1e-4  # added to the variance
CLIP = 10.0  # normalised values lie in +- this
INITIAL_COUNT = 1e-4  # weight of the initial mean 0 and variance 1


@struct.dataclass
class RunningStatistics:
    """Mean and population variance of everything seen."""

    mean: Array  # f32[D]
    var: Array  # f32[D]
    count: Array  # f32[] rows seen


def init(size: int) -> RunningStatistics:
    """Mean 0 and variance 1 for D = `size` features, with next to no weight."""
    return RunningStatistics(jnp.zeros(size, jnp.float32), jnp.ones(size, jnp.float32), jnp.float32(INITIAL_COUNT))


def update(state: RunningStatistics, batch: Array) -> RunningStatistics:
    """Take in a batch f32[N, D]; every row ever seen weighs alike (Chan, Golub and LeVeque, 1979).

    A row with an entry that is not finite counts for nothing: it would make the statistics so for ever.
    """
    finite = jnp.isfinite(batch).reshape(batch.shape[0], -1).all(1)
    counted = jnp.expand_dims(finite, tuple(range(1, batch.ndim)))
    share = jnp.mean(finite.astype(jnp.float32))
    divisor = jnp.where(share > 0, share, 1)
    average = lambda x: jnp.mean(jnp.where(counted, x, 0), axis=0) / divisor
    mean = average(batch)
    var = average(jnp.square(batch - mean[None]))
    rows = share * batch.shape[0]
    count = state.count + rows
    keep, take = state.count / count, rows / count
    delta = mean - state.mean
    return RunningStatistics(
        mean=state.mean + take * delta,
        var=keep * state.var + take * var + keep * take * jnp.square(delta),
        count=count,
    )


def normalise(state: RunningStatistics, x: Array) -> Array:
    """`(x - mean) / sqrt(var + 1e-4)` clamped to +-10; f32[..., D]."""
    along = (1,) * (x.ndim - 1) + (-1,)
    return jnp.clip((x - state.mean.reshape(along)) / jnp.sqrt(state.var + EPS).reshape(along), -CLIP, CLIP)


def seen(state: RunningStatistics, x: Array, is_time: Array, sight: Array | float) -> Array:
    """What a policy gets to see of features f32[..., D]: normalised, and multiplied by `sight` (f32[]) but for the time
    (`is_time`, bool[D])."""
    shown = jnp.where(is_time, 1.0, sight).reshape((1,) * (x.ndim - 1) + (-1,))
    return shown * normalise(state, x)
