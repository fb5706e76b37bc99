"""Layers against library pieces (`lax.conv`, `lax.reduce_window`, autodiff), numpy formulas and worked numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from esper_jax.network import layers

EPSILON = 1e-5


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def library_conv(x, kernel, groups=1):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=groups)


def library_block(x, kernel, gamma, beta, pool):
    """Images `[B, H, W, C]`: convolution, BatchNorm, ReLU, pool, for autodiff."""
    y = library_conv(x, kernel)
    mean, variance = y.mean((0, 1, 2)), y.var((0, 1, 2))
    z = jax.nn.relu((y - mean) * lax.rsqrt(variance + EPSILON) * gamma + beta)
    if pool:
        z = lax.reduce_window(z, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    return z, mean, variance


# --- layout ----------------------------------------------------------------------------------------------------------


def test_tiles_hold_the_images_in_order():
    x = normal(0, 6, 4, 3, 2)
    tiles = layers.to_tiles(x, tile_pixels=2 * 4 * 3)
    assert tiles.shape == (3, 2, 4, 3, 2)
    np.testing.assert_array_equal(tiles[1, :, :, :, 0].transpose(1, 2, 0), x[2])
    np.testing.assert_array_equal(layers.from_tiles(tiles), x)
    assert layers.to_tiles(x).shape == (1, 2, 4, 3, 6)


@pytest.mark.parametrize(
    ("batch", "pixels", "budget", "expected"),
    [
        (512, 1024, 32_768, 32),  # 32 images of 32x32 pixels fill the budget, and 32 divides 512
        (60, 1024, 32_768, 30),  # 32 do not divide 60, 30 do
        (7, 1024, 3000, 1),  # 2 would fit, but 7 is prime
        (6, 1024, 10, 1),  # never fewer than one image
        (512, 64, 0, 512),  # no budget: one tile
    ],
)
def test_images_per_tile(batch, pixels, budget, expected):
    assert layers.images_per_tile(batch, pixels, budget) == expected


# --- convolution -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 5])
def test_conv(size):
    x, kernel, g = normal(1, 3, 7, 6, 2), normal(2, size, size, 2, 4), normal(3, 3, 7, 6, 4)
    run = lambda fun: jax.jit(lambda *args: (fun(*args), *jax.vjp(fun, *args)[1](g)))(x, kernel)
    for ours, theirs in zip(run(layers.conv), run(library_conv), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * np.abs(theirs).max())


def test_depthwise():
    x, kernel = normal(1, 2, 5, 6, 3), normal(2, 3, 3, 3)
    ours = layers.depthwise_tile(x.transpose(3, 1, 2, 0), kernel).transpose(3, 1, 2, 0)
    theirs = library_conv(x, kernel[:, :, None], groups=3)  # [3, 3, 1, C]
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_conv_init_range():
    kernel = layers.conv_init(jax.random.key(0), 3, 4, 50)
    bound = 1 / 6  # 1 / sqrt(3 * 3 * 4)
    assert kernel.shape == (3, 3, 4, 50)
    assert 0.99 * bound < float(jnp.abs(kernel).max()) <= bound
    np.testing.assert_allclose(kernel.std(), bound / np.sqrt(3), rtol=0.05)


# --- normalisation ---------------------------------------------------------------------------------------------------


def test_group_count():
    expected = {
        1: 1, 2: 2, 3: 1, 4: 4, 8: 8, 12: 4, 16: 1, 17: 1, 24: 1, 32: 2, 48: 2, 64: 4, 80: 4, 96: 4, 112: 4,
        128: 8, 256: 16, 384: 16, 512: 32,
    }  # fmt: skip
    assert {c: layers.group_count(c) for c in expected} == expected


@pytest.mark.parametrize("channels", [4, 12, 32])  # 4 groups of one channel, 4 of three, 2 of sixteen
def test_group_norm(channels):
    x, scale, bias = 3 * normal(4, 2, 3, 5, channels) + 1, normal(5, channels), normal(6, channels)
    groups = layers.group_count(channels)
    grouped = np.asarray(x, np.float64).reshape(2, 15, groups, channels // groups)
    mean, variance = grouped.mean((1, 3), keepdims=True), grouped.var((1, 3), keepdims=True)
    expected = ((grouped - mean) / np.sqrt(variance + EPSILON)).reshape(x.shape) * scale + bias
    np.testing.assert_allclose(layers.group_norm(x, scale, bias), expected, rtol=1e-5, atol=1e-5)


def test_batch_norm():
    x, scale, bias = 3 * normal(4, 5, 3, 2, 4) + 1, normal(5, 4), normal(6, 4)
    exact = np.asarray(x, np.float64)
    expected = (exact - exact.mean((0, 1, 2))) / np.sqrt(exact.var((0, 1, 2)) + EPSILON) * scale + bias
    np.testing.assert_allclose(layers.batch_norm(x, scale, bias), expected, rtol=1e-5, atol=1e-5)


def test_running_statistics():
    """0.9 old + 0.1 new, the variance unbiased: 0.9 * 2 + 0.1 * 3 * 4/3 = 2.2. One value has no unbiased variance."""
    one, two, three, five = (jnp.full(1, value) for value in (1.0, 2.0, 3.0, 5.0))
    mean, variance = layers.running_statistics(one, two, five, three, 4)
    np.testing.assert_allclose([mean[0], variance[0]], [1.4, 2.2], rtol=1e-6)
    assert jnp.isfinite(layers.running_statistics(one, two, five, three, 1)[1]).all()


# --- the block -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("height", "width", "size", "pool", "images_per_tile"),
    [
        (7, 5, 3, True, 6),  # odd sizes: the last row and column belong to no window
        (6, 8, 3, True, 2),  # three tiles: the statistics span them
        (6, 6, 1, True, 3),
        (5, 7, 1, False, 2),
    ],
)
def test_block_train(height, width, size, pool, images_per_tile):
    x = normal(7, 6, height, width, 3)
    x = x.at[:, :, : width // 2].set(0)  # whole windows of equal values: their first element gets the gradient
    kernel, beta = normal(8, size, size, 3, 4), normal(10, 4)
    gamma = jnp.array([1.3, -0.7, 0.4, -1.1])  # under a negative scale the window's smallest value wins
    cotangent = normal(11, 6, *(n // 2 if pool else n for n in (height, width)), 4)

    def ours(x, *params):
        tiles = layers.to_tiles(x, images_per_tile * height * width)
        z, mean, variance = layers.block_train(tiles, *params, pool=pool)
        return layers.from_tiles(z), (mean, variance)

    def theirs(x, *params):
        z, mean, variance = library_block(x, *params, pool)
        return z, (mean, variance)

    def run(block):
        def both(*args):
            z, pullback, statistics = jax.vjp(block, *args, has_aux=True)
            return z, statistics, pullback(cotangent)

        return jax.jit(both)(x, kernel, gamma, beta)

    def compare(a, b):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(1, float(jnp.abs(b).max())))

    jax.tree.map(compare, run(ours), run(theirs))


def test_block_ties_go_to_the_first():
    """One channel, 1x1 kernel 1, constant image 2: y = 2, variance 0, so 1/std = 1/sqrt(1e-5) = 316.23. The window's
    gradient 1 goes to its first element; BatchNorm takes off the mean 1/4: 316.23 * (0.75, -0.25, -0.25, -0.25)."""
    x, one = jnp.full((1, 1, 4, 4, 1), 2.0), jnp.ones(1)
    loss = lambda x: layers.block_train(x, jnp.ones((1, 1, 1, 1)), one, one, pool=True)[0].sum()
    expected = np.tile(np.array([[0.75, -0.25], [-0.25, -0.25]]), (2, 2)) / np.sqrt(EPSILON)
    np.testing.assert_allclose(jax.grad(loss)(x)[0, 0, :, :, 0], expected, rtol=1e-5)


def test_statistics_carry_no_gradient():
    x, params = normal(7, 1, 2, 4, 4, 3), (normal(8, 3, 3, 2, 2), jnp.ones(2), jnp.zeros(2))
    loss = lambda x: sum(s.sum() for s in layers.block_train(x, *params, pool=False)[1:])
    np.testing.assert_array_equal(jax.jit(jax.grad(loss))(x), 0)


def test_block_eval():
    """Worked: y = 3, (3 - 1)/sqrt(4 + 1e-5) * 2 + 0.5 = 2.5; a second channel is negative and cut off."""
    x = jnp.ones((1, 3, 3, 1))
    kernel = jnp.array([3.0, -3.0]).reshape(1, 1, 1, 2)
    pair = lambda value: jnp.full(2, value)
    z = layers.block_eval(x, kernel, pair(2.0), pair(0.5), pair(1.0), pair(4.0), pool=True)
    assert z.shape == (2, 1, 1, 1)
    np.testing.assert_allclose(z.ravel(), [2.5, 0], rtol=1e-5)


def test_bfloat16_flow():
    """Features and their gradient keep the dtype of x; statistics and parameter gradients are float32."""
    x = normal(12, 2, 3, 6, 6, 4)
    params = normal(13, 3, 3, 3, 4), jnp.array([1.0, -0.5, 0.7, 1.2]), normal(14, 4)

    @jax.jit
    def run(x, *params):
        z, pullback, statistics = jax.vjp(
            lambda *args: (lambda z, *s: (z, s))(*layers.block_train(*args, pool=False)), x, *params, has_aux=True
        )
        return z, statistics, pullback(jnp.ones_like(z))

    half, full = run(x.astype(jnp.bfloat16), *params), run(x, *params)
    z, (mean, variance), (d_x, *d_params) = half
    assert z.dtype == d_x.dtype == jnp.bfloat16
    assert all(leaf.dtype == jnp.float32 for leaf in (mean, variance, *d_params))
    for a, b in zip((z, mean, variance), (full[0], *full[1]), strict=True):
        # bfloat16 has 8 bits of mantissa: 0.4 % a rounding, a few roundings in a row
        np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=0, atol=0.02 * float(jnp.abs(b).max()))
    scale, bias = jnp.ones(3), jnp.zeros(3)
    assert layers.group_norm_tile(x[0].astype(jnp.bfloat16), scale, bias).dtype == jnp.bfloat16
    assert layers.global_average(x[0].astype(jnp.bfloat16)).dtype == jnp.float32
