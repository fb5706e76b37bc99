"""Ramps: the reference's progress tables, and what may and may not start one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esper_jax.lifecycle import alpha
from esper_jax.types import AlphaCurve, AlphaMode

tick = jax.jit(alpha.tick)
retarget = jax.jit(alpha.retarget)

LINEAR, COSINE, SIGMOID = AlphaCurve
# ticks, curve, steepness, alpha after each tick of a ramp from 0 to 1
TABLE = [
    (3, LINEAR, 12, [1 / 3, 2 / 3, 1]),
    (3, COSINE, 12, [0.25, 0.75, 1]),
    (3, SIGMOID, 12, [0.117310, 0.882690, 1]),
    (5, LINEAR, 12, [0.2, 0.4, 0.6, 0.8, 1]),
    (5, COSINE, 12, [0.095492, 0.345492, 0.654508, 0.904508, 1]),
    (5, SIGMOID, 12, [0.024244, 0.230141, 0.769859, 0.975756, 1]),
    (5, SIGMOID, 6, [0.104320, 0.339080, 0.660920, 0.895680, 1]),
    (5, SIGMOID, 24, [0.000740, 0.083168, 0.916832, 0.999260, 1]),
    (8, COSINE, 12, [0.038060, 0.146447, 0.308658, 0.5, 0.691342, 0.853553, 0.961940, 1]),
    (8, SIGMOID, 12, [0.008557, 0.045177, 0.180847, 0.5, 0.819153, 0.954823, 0.991443, 1]),
]
N = len(TABLE)
EVERYWHERE = jnp.ones(N, bool)
STEPS, CURVES, STEEPNESS, _ = (list(column) for column in zip(*TABLE, strict=True))


def full(value):
    return jnp.full(N, value, jnp.float32)


def start(begin, target, steps=STEPS):
    state = alpha.init(N).replace(alpha=full(begin))
    i32 = lambda values: jnp.asarray(values, jnp.int32)
    return retarget(state, EVERYWHERE, full(target), i32(steps), i32(CURVES), full(1.0) * jnp.asarray(STEEPNESS))


@pytest.mark.parametrize(("begin", "target"), [(0.0, 1.0), (1.0, 0.0), (0.3, 0.7)])
def test_progress_tables(begin, target):
    state = start(begin, target)
    direction = AlphaMode.UP if target > begin else AlphaMode.DOWN
    for k in range(9):
        for row, (steps, _, _, progress) in enumerate(TABLE):
            p = 0 if k == 0 else progress[min(k, steps) - 1]
            # the table has six digits; on top of that float32
            np.testing.assert_allclose(state.alpha[row], begin + (target - begin) * p, atol=1.2e-6)
            assert state.mode[row] == (direction if k < steps else AlphaMode.HOLD)
            assert state.steps_done[row] == min(k, steps) and state.steps_total[row] == steps
        state, reached = tick(state, EVERYWHERE)
        assert reached.tolist() == [k + 1 == steps for steps in STEPS]
    assert (state.alpha == jnp.float32(target)).all()  # exactly


def test_nothing_moves_where_it_should_not():
    state = start(0.0, 1.0)
    some = jnp.arange(N) < 4
    after, reached = tick(state, some)
    assert ((after.alpha > 0) == some).all() and (after.steps_done == some).all() and not reached.any()
    resting = alpha.init(N).replace(alpha=full(0.4))
    after, reached = tick(resting, EVERYWHERE)
    assert jax.tree.all(jax.tree.map(np.array_equal, after, resting)) and not reached.any()


def test_a_ramp_cannot_be_replaced_while_it_runs():
    state, _ = tick(start(0.0, 1.0), EVERYWHERE)
    refused = start_again = retarget(state, EVERYWHERE, full(0.5), full(3).astype(jnp.int32), jnp.asarray(CURVES))
    assert jax.tree.all(jax.tree.map(np.array_equal, refused, state))
    for _ in range(8):
        state, _ = tick(state, EVERYWHERE)
    start_again = retarget(state, EVERYWHERE, full(0.5), full(3).astype(jnp.int32), jnp.asarray(CURVES))
    assert (start_again.mode == AlphaMode.DOWN).all() and (start_again.start == 1).all()


@pytest.mark.parametrize(("begin", "target", "steps"), [(0.2, 0.9, 0), (0.7, 0.7, 5), (0.2, 0.9, -1)])
def test_there_at_once(begin, target, steps):
    state = start(begin, target, steps=[steps] * N)
    assert (state.alpha == jnp.float32(target)).all() and (state.mode == AlphaMode.HOLD).all()
    assert (state.steps_total == 0).all() and (state.steps_done == 0).all()  # no ramp is left to report
    assert not tick(state, EVERYWHERE)[1].any()


def test_targets_are_clipped():
    assert (start(0.5, 1.7).target == 1).all() and (start(0.5, -0.2).target == 0).all()


def test_steepness():
    t = jnp.linspace(0, 1, 11)
    curve = jax.jit(lambda k: alpha.curve(jnp.int32(SIGMOID), t, k))
    # a step at 1/2, without overflow
    np.testing.assert_allclose(curve(1e4), [0] * 5 + [0.5] + [1] * 5, atol=1e-6)
    # below the floor of 0.1 the curve stays what it is at the floor, nearly linear
    np.testing.assert_array_equal(curve(0.0), curve(0.1))
    np.testing.assert_allclose(curve(-3.0), t, atol=1e-3)
    np.testing.assert_array_equal(curve(12.0), alpha.curve(jnp.int32(SIGMOID), t))
    # time outside of [0, 1] is clipped
    np.testing.assert_array_equal(alpha.curve(jnp.int32(COSINE), jnp.array([-1.0, 2.0])), [0, 1])


def test_place_and_at_full_target():
    state, _ = tick(start(0.0, 1.0), EVERYWHERE)
    placed = alpha.place(state, jnp.arange(N) == 2, 1.0)
    assert alpha.at_full_target(placed).tolist() == [k == 2 for k in range(N)]
    assert placed.steps_done[2] == placed.steps_total[2] == 3 and placed.steps_done[3] == 1
    # gate G3's tolerance is 1e-6, in target and in alpha
    edge = alpha.init(4).replace(
        target=jnp.array([1 - 0.8e-6, 1 - 2e-6, 1, 1]), alpha=jnp.array([1 - 0.8e-6, 1 - 2e-6, 1 - 0.8e-6, 1 - 2e-6])
    )
    assert alpha.at_full_target(edge).tolist() == [True, False, True, False]
    moving = edge.replace(mode=jnp.full(4, AlphaMode.UP, jnp.int32))
    assert not alpha.at_full_target(moving).any()
