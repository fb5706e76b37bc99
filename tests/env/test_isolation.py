"""A population of environments: what breaks in one of them never reaches another."""

import jax
import jax.numpy as jnp
import numpy as np
import tiny

from esper_jax.config import HostConfig, LifecycleConfig
from esper_jax.env.environment import make_env
from esper_jax.network.blueprints import Blueprint
from esper_jax.types import BLUEPRINTS, Op, Stage

# x (1 + w), a module of one's own. Nothing in it is summed over: a matrix product is rounded otherwise in a group of
# another size, and when one environment loses its seed, the groups of others are smaller.
SCALE = Blueprint.from_functions(
    "scale", lambda key, width: {"w": 0.1 * jax.random.normal(key, (width,))}, lambda p, x: x * (1 + p["w"])
)


def mapped():
    """A smaller environment, four of which run as two chunks of two: vmap inside, a loop outside."""
    cfg = tiny.CONFIG.replace(
        host=HostConfig(n_blocks=2, base_channels=4, pool_layers=2, slots=("r0c0",)),
        lifecycle=LifecycleConfig(blueprints=("norm", SCALE)),
    )
    env = make_env(cfg, tiny.dataset())
    init = jax.jit(jax.vmap(env.init))
    step = lambda args: env.step(*args)
    return init, jax.jit(lambda *args: jax.lax.map(step, args, batch_size=2))


def test_a_nan_in_one_environment_leaves_the_others_bitwise_alone():
    """Environment 1 of 4: its neighbour in the vmapped pair and the other pair do not notice."""
    init, step = mapped()
    keys = jax.random.split(jax.random.key(5), 4)
    everyone = lambda *args, **heads: jax.tree.map(lambda leaf: jnp.full(4, leaf), tiny.act(*args, **heads))
    rows = lambda tree, which: jax.tree.map(lambda leaf: np.asarray(leaf)[which], tree)
    zero = lambda tree: not any(leaf.any() for leaf in jax.tree.leaves(tree))
    others = np.array([0, 2, 3])

    good = step(keys, init(keys), everyone())[0]
    norm, own = BLUEPRINTS.index("norm"), len(BLUEPRINTS)
    germinate = everyone(Op.GERMINATE, 0).replace(blueprint=jnp.array([norm, norm, own, norm]))
    good = step(keys, good, germinate)[0]
    assert (
        good.slots.blueprint[:, 0].tolist() == [norm, norm, own, norm]
        and (np.abs(good.model.seeds[0].params).sum(1) > 0).all()
    )
    host = good.model.host
    spoil = lambda tree: jax.tree.map(lambda leaf: leaf.at[1].set(jnp.nan), tree)
    bad_host = host.replace(params=spoil(host.params), stats=spoil(host.stats))
    bad = good.replace(model=good.model.replace(host=bad_host))

    expected, found = (step(keys, state, everyone(Op.ADVANCE)) for state in (good, bad))
    assert tiny.equal(rows(expected, others), rows(found, others))
    state, _, reward, done, info = found
    assert info.panic.tolist() == (info.discount == 0).tolist() == [False, True, False, False] and reward[1] == -10
    assert not done.any()
    assert state.slots.stage[:, 0].tolist() == [Stage.TRAINING, Stage.PRUNED, Stage.TRAINING, Stage.TRAINING]
    assert zero(rows(state.optimiser, 1)) and not zero(rows(state.optimiser, 0))
    assert tiny.equal(rows(state.model.host, 1), rows(state.snapshot.model.host, 1))

    # all four go on
    expected, found = step(keys, expected[0], everyone()), step(keys, state, everyone())
    assert tiny.equal(rows(expected, others), rows(found, others))
    assert not found[4].panic.any() and np.isfinite(found[4].val_loss).all()
