"""The host: sizes, initial values, shapes of images, running statistics, slot positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from esper_jax import presets
from esper_jax.config import HostConfig
from esper_jax.network import cnn

TINY = HostConfig(n_blocks=2, base_channels=4, pool_layers=1)


def images(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


# 3 blocks: 216 + 16, 1152 + 32, 4608 + 64, read-out 330; likewise for the others
@pytest.mark.parametrize(("name", "count"), [("cifar10", 6418), ("cifar10_deep", 99_922), ("cifar10_blind", 2986)])
def test_param_count(name, count):
    assert cnn.param_count(jax.eval_shape(lambda key: cnn.init(key, presets.host(name)), jax.random.key(0))) == count


def test_init():
    """Kernels and read-out uniform in +-1/sqrt(fan_in), BatchNorm the identity; another key, another host."""
    vars = cnn.init(jax.random.key(0), HostConfig())
    for block, c in zip(vars.params.blocks, (3, 8, 16), strict=True):
        bound = (9 * c) ** -0.5
        assert 0.9 * bound < float(jnp.abs(block.kernel).max()) <= bound
        assert (block.gamma == 1).all() and (block.beta == 0).all()
    for leaf in (vars.params.kernel, vars.params.bias):
        assert 0 < float(jnp.abs(leaf).max()) <= 32**-0.5
    assert all((s.mean == 0).all() and (s.var == 1).all() for s in vars.stats)
    other = cnn.init(jax.random.key(1), HostConfig())
    assert (other.params.kernel != vars.params.kernel).any()


def _library_eval(vars, x):
    """Images `[B, H, W, C]` with running statistics, from library pieces."""
    for i, (block, stats) in enumerate(zip(vars.params.blocks, vars.stats, strict=True)):
        x = lax.conv_general_dilated(x, block.kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        x = jax.nn.relu((x - stats.mean) / jnp.sqrt(stats.var + 1e-5) * block.gamma + block.beta)
        if i < vars.cfg.pool_layers:
            x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    return x.mean((1, 2)) @ vars.params.kernel + vars.params.bias


@pytest.mark.parametrize("shape", [(8, 8), (10, 7)])
def test_image_shapes(shape):
    """Also images that are not square; training moves the statistics, evaluation does not."""
    vars = cnn.init(jax.random.key(0), TINY, channels=2, classes=5)
    x = images(1, 6, *shape, 2)
    logits, trained = jax.jit(lambda vars, x: cnn.apply(vars, x, train=True))(vars, x)
    assert logits.shape == (6, 5) and logits.dtype == jnp.float32
    assert all((new.mean != old.mean).all() for new, old in zip(trained.stats, vars.stats, strict=True))
    jax.tree.map(np.testing.assert_array_equal, trained.params, vars.params)
    evaluate = jax.jit(lambda vars, x: cnn.apply(vars, x, train=False))
    logits, same = evaluate(trained, x)
    np.testing.assert_allclose(logits, jax.jit(_library_eval)(trained, x), rtol=0, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, same, trained)


def test_tiles_change_nothing():
    """Two images a tile: logits, statistics and gradients of the whole batch."""
    vars, x = cnn.init(jax.random.key(0), TINY), images(2, 6, 8, 8, 3)

    def run(tile_pixels):
        def objective(params):
            logits, new = cnn.apply(vars.replace(params=params), x, train=True, tile_pixels=tile_pixels)
            return jnp.square(logits).sum(), (logits, new.stats)

        return jax.jit(jax.value_and_grad(objective, has_aux=True))(vars.params)

    compare = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(1, float(jnp.abs(b).max())))
    jax.tree.map(compare, run(2 * 64), run(0))


def test_slot_functions_sit_behind_the_pool():
    """A slot at r0c0 sees the pooled map [T, C, H, W, N], and what it returns goes on."""
    vars, seen = cnn.init(jax.random.key(0), TINY), []

    def zero(tiles):
        seen.append(tiles.shape)
        return jnp.zeros_like(tiles)

    logits, _ = cnn.apply(vars, images(3, 4, 8, 8, 3), train=False, slots={0: zero})
    assert seen == [(1, 4, 4, 4, 4)]
    # zeros in, beta = 0 and mean = 0: nothing but the read-out's bias is left
    np.testing.assert_allclose(logits, np.tile(vars.params.bias, (4, 1)), atol=1e-6)


def test_check_image_size():
    cnn.check_image_size(presets.host("cifar10_deep"), 32)  # 32 -> 1
    cnn.check_image_size(presets.host("cifar10_blind"), 1)
    with pytest.raises(ValueError, match="HostConfig.pool_layers = 5: 5 pools leave nothing of 16x16"):
        cnn.check_image_size(presets.host("cifar10_deep"), 16)


@pytest.mark.parametrize("name", presets.HOSTS)
def test_parameters_are_counted_before_there_are_any(name):
    host = presets.host(name)
    for channels, classes in ((3, 10), (1, 4)):
        made = jax.eval_shape(lambda c=channels, n=classes: cnn.init(jax.random.key(0), host, channels=c, classes=n))
        assert host.param_count(channels, classes) == cnn.param_count(made)
