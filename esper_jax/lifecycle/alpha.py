"""The alpha controller: a ramp from one alpha to another, one tick per epoch (slots_and_hosts 4.2).

All functions are elementwise over the slots of an `AlphaState` (leaves `[S]`).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from esper_jax.trees import select
from esper_jax.types import AlphaCurve, AlphaMode, AlphaState, Array

DEFAULT_STEEPNESS = 12.0
MIN_STEEPNESS = 0.1
TOLERANCE = 1e-6  # alphas closer than this are equal


def init(n_slots: int) -> AlphaState:
    """Controllers at rest at alpha 0."""
    zeros, count = jnp.zeros(n_slots, jnp.float32), jnp.zeros(n_slots, jnp.int32)
    curve = jnp.full(n_slots, AlphaCurve.LINEAR, jnp.int32)
    steepness = jnp.full(n_slots, DEFAULT_STEEPNESS, jnp.float32)
    return AlphaState(zeros, zeros, zeros, count, curve, steepness, count, count)


def curve(kind: Array, t: Array, steepness: Array | float = DEFAULT_STEEPNESS) -> Array:
    """Progress in [0, 1] of a ramp at time `t` (clipped to [0, 1]); `kind` is an AlphaCurve.

    linear t; cosine (1 - cos(pi t)) / 2; sigmoid the logistic function of slope `steepness`, rescaled to end in 0 and
    1.
    """
    t = jnp.clip(t, 0, 1)
    k = jnp.maximum(steepness, MIN_STEEPNESS)
    cosine = jnp.sin(jnp.pi * t / 2) ** 2  # equals (1 - cos(pi t)) / 2 without its cancellation near 0
    low, high = jax.nn.sigmoid(-k / 2), jax.nn.sigmoid(k / 2)
    sigmoid = (jax.nn.sigmoid(k * (t - 0.5)) - low) / (high - low)
    return jnp.where(kind == AlphaCurve.COSINE, cosine, jnp.where(kind == AlphaCurve.SIGMOID, sigmoid, t))


def retarget(
    state: AlphaState,
    where: Array,
    target: Array,
    steps: Array,
    curve: Array,
    steepness: Array | float = DEFAULT_STEEPNESS,
) -> AlphaState:
    """Starts a ramp to `target` over `steps` ticks for the slots in `where` (bool[S]) that hold; others are unchanged.

    Zero steps, or a target equal to the present alpha, is there at once, with no ramp left to report.
    """
    where = where & (state.mode == AlphaMode.HOLD)
    target = jnp.clip(target, 0, 1)
    at_once = (steps <= 0) | (target == state.alpha)
    direction = jnp.where(target > state.alpha, AlphaMode.UP, AlphaMode.DOWN)
    new = AlphaState(
        alpha=jnp.where(at_once, target, state.alpha),
        start=state.alpha,
        target=target,
        mode=jnp.where(at_once, AlphaMode.HOLD, direction),
        curve=curve,
        steepness=jnp.maximum(steepness, MIN_STEEPNESS),
        steps_total=jnp.where(at_once, 0, steps),
        steps_done=0,
    )
    return select(where, new, state)


def tick(state: AlphaState, where: Array) -> tuple[AlphaState, Array]:
    """One epoch of the ramps in `where` (bool[S]). Returns the state and bool[S]: the target was reached by this
    tick."""
    moving = where & (state.mode != AlphaMode.HOLD) & (state.steps_total > 0)
    done = state.steps_done + moving.astype(jnp.int32)
    reached = moving & (done >= state.steps_total)
    time = done.astype(jnp.float32) / jnp.maximum(state.steps_total, 1).astype(jnp.float32)
    progress = curve(state.curve, time, state.steepness)
    between = state.start + (state.target - state.start) * progress
    low, high = jnp.minimum(state.start, state.target), jnp.maximum(state.start, state.target)
    alpha = jnp.where(reached, state.target, jnp.where(moving, jnp.clip(between, low, high), state.alpha))
    mode = jnp.where(reached, AlphaMode.HOLD, state.mode)
    return state.replace(alpha=alpha, mode=mode, steps_done=done), reached


def place(state: AlphaState, where: Array, alpha: float) -> AlphaState:
    """Sets the slots in `where` to rest at `alpha`; their step counters keep what they last showed."""
    put = lambda value, old: jnp.where(where, value, old)
    return state.replace(
        alpha=put(alpha, state.alpha),
        start=put(alpha, state.start),
        target=put(alpha, state.target),
        mode=put(AlphaMode.HOLD, state.mode),
        steps_done=put(state.steps_total, state.steps_done),
    )


def at_full_target(state: AlphaState) -> Array:
    """bool[S]: holds at alpha 1, the condition for HOLDING (gate G3)."""
    full = state.target >= 1 - TOLERANCE
    return full & (state.mode == AlphaMode.HOLD) & (jnp.abs(state.alpha - state.target) <= TOLERANCE)
