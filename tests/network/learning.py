"""What every seed module has to do, whatever its host: learn from birth."""

import jax
import jax.numpy as jnp
import numpy as np

from esper_jax.network import blend, seed_bank

ALPHA, STEP = 0.3, 0.01


def slot_gradient(modules, width, h, target):
    """A newborn by (key, kind), and by (seed, kind, mode) a slot's gradient under a quadratic loss, for
    all of these modules.

    Args:
      modules: the package's for one host, by name.
      h, target: features of all tiles.
    """
    kinds = seed_bank.table(tuple(modules), modules)

    def loss(seed, kind, mode):
        control = blend.Controls(kind, mode, jnp.float32(ALPHA), jnp.array(True))
        return jnp.square(blend.apply_slot(control, seed, h) - target).mean()

    def born(key, kind):
        gate = blend.gate_init(key, width)
        return blend.SeedVars(seed_bank.germinate(key, kinds, width, kind), gate, width, kinds)

    return jax.jit(born), jax.jit(jax.grad(loss))


def check_every_tensor_learns(slot, modules, name, width, mode):
    """Two SGD steps from birth give every parameter tensor, and the gate's, a non-zero gradient, whatever the style: in
    TRAINING all styles are straight-through, and further on each has its own operator."""
    (born, gradient), mode = slot, getattr(blend, mode)
    kind = jnp.int32(list(modules).index(name))  # noop is the first
    seed = born(jax.random.key(4), kind)
    unpack = lambda vector: seed_bank.unpack(modules[name], width, vector)
    moved = {key: 0.0 for key in unpack(seed.params)}
    gate_moved = 0.0
    for _ in range(2):
        grads = gradient(seed, kind, jnp.int32(mode))
        for key, leaf in unpack(grads.params).items():
            moved[key] = max(moved[key], float(jnp.abs(leaf).max()))
        gate_moved = max(gate_moved, float(jnp.abs(grads.gate).max()))
        seed = jax.tree.map(lambda p, g: p - STEP * g, seed, grads)
    assert all(value > 0 for value in moved.values()), moved
    # an identity (norm, bottleneck) leaves the gate nothing to weigh until it has moved
    assert (gate_moved > 0) == (mode == blend.GATE)
    np.testing.assert_array_equal(grads.params[modules[name].param_count(width) :], 0)
