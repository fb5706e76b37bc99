"""Seed modules: sizes, behaviour at birth, that every tensor can learn, and registering new ones."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from learning import check_every_tensor_learns, slot_gradient

from esper_jax.network import blend, blueprints, layers, seed_bank
from esper_jax.network.blueprints import Blueprint

MODULES = tuple(name for name in blueprints.CNN if name != "noop")

# slots_and_hosts 2.3
COUNTS = {
    8: {"norm": 17, "attention": 40, "depthwise": 152, "bottleneck": 720, "conv_small": 80, "conv_light": 592,
        "conv_heavy": 1184},
    16: {"norm": 33, "attention": 144, "depthwise": 432, "bottleneck": 864, "conv_small": 288, "conv_light": 2336,
         "conv_heavy": 4672},
    32: {"norm": 65, "attention": 544, "depthwise": 1376, "bottleneck": 1152, "conv_small": 1088, "conv_light": 9280,
         "conv_heavy": 18_560},
    64: {"norm": 129, "attention": 2112, "depthwise": 4800, "bottleneck": 4480, "conv_small": 4224,
         "conv_light": 36_992, "conv_heavy": 73_984},
    128: {"norm": 257, "attention": 8320, "depthwise": 17_792, "bottleneck": 17_664, "conv_small": 16_640,
          "conv_light": 147_712, "conv_heavy": 295_424},
}  # fmt: skip


@pytest.mark.parametrize("width", COUNTS)
def test_param_count(width):
    assert {name: blueprints.CNN[name].param_count(width) for name in MODULES} == COUNTS[width]
    assert blueprints.CNN["noop"].param_count(width) == 0


def features(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("name", blueprints.CNN)
def test_birth(name):
    """Identity exactly where promised; attention starts at sigmoid(3) = 0.952574 of its input."""
    x = features(0, 2, 5, 3, 8)
    params = blueprints.CNN[name].init(jax.random.key(1), 8)
    assert sum(leaf.size for leaf in params.values()) == blueprints.CNN[name].param_count(8)
    y = jax.jit(blueprints.CNN[name].apply)(params, x)
    assert y.shape == x.shape and y.dtype == x.dtype
    if name in ("noop", "norm", "bottleneck"):
        np.testing.assert_array_equal(y, x)
    elif name == "attention":
        np.testing.assert_allclose(y, 0.952574 * x, rtol=1e-5)
    else:
        assert float(jnp.abs(y - x).max()) > 0.1
        assert (y >= x - 1e-6).all()  # x + relu(.)


WIDTH = 8


@functools.cache
def _slot():
    return slot_gradient(blueprints.CNN, WIDTH, features(2, WIDTH, 4, 4, 6)[None], features(3, WIDTH, 4, 4, 6)[None])


@pytest.mark.parametrize("mode", ["STRAIGHT_THROUGH", "ADD", "MULTIPLY", "GATE"])
@pytest.mark.parametrize("name", MODULES)
def test_every_tensor_learns(name, mode):
    check_every_tensor_learns(_slot(), blueprints.CNN, name, WIDTH, mode)


# --- modules of one's own --------------------------------------------------------------------------------------------

SCALE = Blueprint(
    "scale", lambda c: {"scale": blueprints.constant((c,), 1.0)}, lambda p, x: x * p["scale"][:, None, None, None]
)


class Mixer(nn.Module):
    """x + W2 relu(W1 LN(x)): two dense layers with their own initialisers and nested parameters."""

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        return x + nn.Dense(width)(nn.relu(nn.Dense(2 * width)(nn.LayerNorm()(x))))


MIXER = Blueprint.from_functions(
    "mixer", lambda key, width: Mixer().init(key, jnp.zeros((1, 8, 8, width))), Mixer().apply
)


class Affine(NamedTuple):
    scale: jax.Array
    bias: jax.Array


def test_any_pytree_of_parameters_will_do():
    """2 * 3 + 1, and the sum of eleven numbers, whose names do not sort as they stand."""
    affine = Blueprint.from_functions(
        "affine", lambda key, width: Affine(jnp.float32(2), jnp.float32(1)), lambda p, x: p.scale * x + p.bias
    )
    several = Blueprint.from_functions(
        "several", lambda key, width: [jnp.float32(10**k % 97) for k in range(11)], lambda p, x: x + p[10] - p[2]
    )
    x = jnp.full((1, 2, 2, 4), 3.0)
    for module, expected in ((affine, 7), (several, 3 + 10**10 % 97 - 100 % 97)):
        params = jax.jit(module.init, static_argnums=1)(jax.random.key(0), 4)
        np.testing.assert_array_equal(jax.jit(module.apply)(params, x), jnp.full_like(x, expected))


def test_a_module_of_ones_own_in_a_slot():
    kinds = seed_bank.table(("norm", SCALE), blueprints.CNN)
    assert SCALE.param_count(8) == 8 and int(seed_bank.kind_of(jnp.int32(13), kinds)) == 2
    # a slot with an ordinary module and the new one: 1.0 * x is the identity, 2.0 * x is not
    h = features(5, 8, 2, 2, 3)[None]
    vector = jnp.full(seed_bank.packed_size(kinds, 8), 2.0)
    seed = blend.SeedVars(vector, jnp.zeros(blend.gate_size(8)), 8, kinds)
    control = blend.Controls(jnp.int32(2), jnp.int32(blend.ADD), jnp.float32(1), jnp.array(False))
    np.testing.assert_array_equal(blend.apply_slot(control, seed, h), 2 * h)


def test_a_flax_module_is_a_blueprint():
    """LN 2C, dense C 2C + 2C and 2C C + C: 4 C^2 + 5 C parameters, drawn by flax, the same outputs and gradients."""
    assert MIXER.param_count(8) == 4 * 64 + 5 * 8
    key, x = jax.random.key(3), features(6, 3, 4, 4, 8)
    params = Mixer().init(key, x)
    kinds = seed_bank.table(("norm", MIXER), blueprints.CNN)
    drawn = seed_bank.germinate(key, kinds, 8, jnp.int32(2))
    np.testing.assert_array_equal(drawn, jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(params)]))

    @jax.jit
    def both(vector, params):
        ours, pull = jax.vjp(lambda vector: MIXER.apply(seed_bank.unpack(MIXER, 8, vector), x), vector)
        theirs, pull_theirs = jax.vjp(lambda params: Mixer().apply(params, x), params)
        flat = jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(pull_theirs(2 * theirs))])
        return (ours, pull(2 * ours)[0]), (theirs, flat)

    ours, theirs = both(drawn, params)
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-4, atol=1e-4)
    # a dict that went through a compiled function comes back sorted by name: the parameters are found all the same
    sorted_ = jax.jit(MIXER.init, static_argnums=1)(key, 8)
    np.testing.assert_allclose(jax.jit(MIXER.apply)(sorted_, x), theirs[0], 1e-4, 1e-6)
    # the other kinds of the slot are drawn as they were without it: one tanh and a GroupNorm, then zeros
    norm = seed_bank.germinate(key, kinds, 8, jnp.int32(1))
    np.testing.assert_array_equal(norm, [0, *[1] * 8, *[0] * (len(norm) - 9)])


def test_group_norm_of_single_pixels_is_finite():
    """8 channels are 8 groups; on a 1x1 map a group has one element, so the output is the bias."""
    y = layers.group_norm(features(6, 3, 1, 1, 8), jnp.ones(8), jnp.arange(8.0))
    np.testing.assert_allclose(y[:, 0, 0], np.tile(np.arange(8.0), (3, 1)))
