"""Layers as plain functions, in the memory layout that is fastest here (part of Esper's Kasmina).

Features inside the network are `[C, H, W, N]`, batch axis last, and a batch is a stack of *tiles* `[T, C, H, W, N]`:
every slice, pool and normalisation step is then a contiguous vector operation, and the slice matrix of one tile fits a
CPU's cache while that of a whole batch does not. A convolution is slices, concat, one matrix product; `lax.conv` with a
kernel per environment lowers to grouped convolution, which is many times slower. On a GPU one tile is the whole batch.

`conv`, `batch_norm` and `group_norm` are the same operations in the public layout: images `[B, H, W, C]`, kernels
`[k, k, C, O]` (HWIO).

Axis letters: T tiles, C channels in, O channels out, H W image, N images in a tile, B images in a batch, G groups.
"""

from __future__ import annotations

import math
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from esper_jax.network.host import Layout
from esper_jax.types import Array

MOST_SHIFTED_PRODUCTS = 32  # per output: the largest convolution that is computed without slices on a CPU
BLOCK_BYTES = 80_000  # of slices for one matrix product on a CPU
BATCH_NORM_EPSILON = 1e-5
BATCH_NORM_MOMENTUM = 0.1  # weight of the new batch in the running statistics
GROUP_NORM_EPSILON = 1e-5
IMAGES = Layout(channel_axis=0, example_axis=3, rank=4)


# --- layout ----------------------------------------------------------------------------------------------------------


def largest_divisor(number: int, most: int) -> int:
    """The largest divisor of `number` that is at most `most`, 1 if there is none."""
    return max(size for size in range(1, max(1, min(number, most)) + 1) if number % size == 0)


def images_per_tile(batch: int, pixels_per_image: int, tile_pixels: int) -> int:
    """Largest divisor of `batch` that keeps a tile within `tile_pixels` and leaves two tiles; the whole batch if
    `tile_pixels` is 0.

    Two, because the compiler dissolves a loop over one tile and then computes the pool's winners anew wherever the
    backward pass needs them: half the speed on a CPU.
    """
    if tile_pixels == 0:
        return batch
    return largest_divisor(batch, min(tile_pixels // pixels_per_image, batch // 2))


def to_tiles(images: Array, tile_pixels: int = 0) -> Array:
    """`[B, H, W, C]` to `[T, C, H, W, N]`, tiles of at most `tile_pixels` pixels (0: one tile)."""
    chex.assert_rank(images, 4)
    b, h, w, c = images.shape
    n = images_per_tile(b, h * w, tile_pixels)
    return images.reshape(b // n, n, h, w, c).transpose(0, 4, 2, 3, 1)


def from_tiles(features: Array) -> Array:
    """`[T, C, H, W, N]` to `[B, H, W, C]`."""
    t, c, h, w, n = features.shape
    return features.transpose(0, 4, 2, 3, 1).reshape(t * n, h, w, c)


# --- initialisation --------------------------------------------------------------------------------------------------


def uniform_fan_in(key: Array, shape: tuple[int, ...], fan_in: int) -> Array:
    """f32 uniform in +-1/sqrt(fan_in), PyTorch's default for convolutions and linear layers."""
    bound = 1 / math.sqrt(fan_in)
    # drawn flat: a draw of several axes takes XLA many times longer to compile
    return jax.random.uniform(key, (math.prod(shape),), jnp.float32, -bound, bound).reshape(shape)


def conv_init(key: Array, size: int, c: int, o: int) -> Array:
    """Kernel `[size, size, c, o]`."""
    return uniform_fan_in(key, (size, size, c, o), size * size * c)


# --- convolution -----------------------------------------------------------------------------------------------------


def _pad_image(x: Array, pad: int) -> Array:
    """Zeros around the image of a tile: `[C, H, W, N]` to `[C, H + 2 pad, W + 2 pad, N]`."""
    return jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))


def _slices(padded: Array, size: int, h: int, w: int) -> Array:
    """`[C, h + size - 1, w + size - 1, N]` to `[size * size * C, h * w * N]`."""
    parts = [padded[:, i : i + h, j : j + w] for i in range(size) for j in range(size)]
    return jnp.concatenate(parts).reshape(size * size * padded.shape[0], -1)


def patches(x: Array, size: int) -> Array:
    """Zero-padded neighbourhoods of a tile: `[C, H, W, N]` to `[size * size * C, H * W * N]`, for an odd `size`."""
    _, h, w, _ = x.shape
    return _slices(_pad_image(x, size // 2), size, h, w)


def _convolve(x: Array, kernel: Array) -> Array:
    """Same-size convolution of one tile, `[C, H, W, N]`, `[k, k, C, O]` to f32 `[O, H, W, N]`, the fastest way here."""
    size = kernel.shape[0]
    if size == 1 or jax.default_backend() != "cpu":
        return _as_product(patches(x, size), kernel, x.shape[1:])
    if kernel[..., 0].size <= MOST_SHIFTED_PRODUCTS:
        return _shifted_sum(x, kernel)
    return _by_blocks(x, kernel)


def _as_product(slices: Array, kernel: Array, shape: tuple[int, ...]) -> Array:
    """`[k * k * C, H * W * N]`, `[k, k, C, O]` to f32 `[O, H, W, N]`."""
    matrix = kernel.reshape(-1, kernel.shape[3]).astype(slices.dtype)
    product = lax.dot_general(matrix, slices, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    return product.reshape(-1, *shape)


def _shifted_sum(x: Array, kernel: Array) -> Array:
    """As a sum of shifted maps, which writes no slices: on a CPU twice as fast as a product at 27 terms per output (the
    first layer of RGB images), slower from 72 on. `[C, H, W, N]`, `[k, k, C, O]` to f32 `[O, H, W, N]`."""
    size, _, c, _ = kernel.shape
    _, h, w, _ = x.shape
    # kept apart from the sum, or the compiler pads anew for every term
    padded = lax.optimization_barrier(_pad_image(x, size // 2)).astype(jnp.float32)
    weights = kernel.astype(x.dtype).astype(jnp.float32)[..., None, None, None]
    places = [(i, j, k) for i in range(size) for j in range(size) for k in range(c)]
    return sum(weights[i, j, k] * padded[k, None, i : i + h, j : j + w] for i, j, k in places)


def _by_blocks(x: Array, kernel: Array) -> Array:
    """As products for a few rows, or a part of a row, of the image at a time, whose slices stay in a core's own cache:
    a quarter faster than one product of a tile on a CPU. `[C, H, W, N]`, `[k, k, C, O]` to f32 `[O, H, W, N]`."""
    size, _, c, o = kernel.shape
    _, h, w, n = x.shape
    most = max(1, BLOCK_BYTES // (size * size * c * n * x.dtype.itemsize))  # positions in the image
    columns = largest_divisor(w, most)
    rows = largest_divisor(h, most // columns)
    if (rows, columns) == (h, w):
        return _as_product(patches(x, size), kernel, x.shape[1:])
    padded, zero = _pad_image(x, size // 2), jnp.int32(0)

    def block(number, out):
        # not // and %, which compile to a dozen operations that see to the signs
        number, across = lax.convert_element_type(number, jnp.int32), jnp.int32(w // columns)
        i, j = lax.div(number, across) * rows, lax.rem(number, across) * columns
        part = lax.dynamic_slice(padded, (zero, i, j, zero), (c, rows + size - 1, columns + size - 1, n))
        product = _as_product(_slices(part, size, rows, columns), kernel, (rows, columns, n))
        return lax.dynamic_update_slice(out, product, (zero, i, j, zero))

    return lax.fori_loop(0, h * w // (rows * columns), block, jnp.zeros((o, h, w, n), jnp.float32))


@jax.custom_vjp
def conv_tile(x: Array, kernel: Array) -> Array:
    """Same-size convolution of one tile, no bias: `[C, H, W, N]`, `[k, k, C, O]` to `[O, H, W, N]`.

    Its backward pass makes the slices again instead of keeping them, and finds the input's gradient by a convolution
    with the flipped kernel.
    """
    return _convolve(x, kernel).astype(x.dtype)


def conv_tile_backward(x: Array, kernel: Array, d_y: Array) -> tuple[Array, Array]:
    """Gradients of `conv_tile` by its input `[C, H, W, N]` and kernel f32 `[k, k, C, O]`, given `d_y [O, H, W, N]`."""
    size, _, _, o = kernel.shape
    contract_last = (((1,), (1,)), ((), ()))
    d_kernel = lax.dot_general(patches(x, size), d_y.reshape(o, -1), contract_last, preferred_element_type=jnp.float32)
    return conv_tile(d_y, kernel[::-1, ::-1].swapaxes(2, 3)), d_kernel.reshape(kernel.shape)


conv_tile.defvjp(
    lambda x, kernel: (conv_tile(x, kernel), (x, kernel)),
    lambda residuals, d_y: conv_tile_backward(*residuals, d_y),
)


def depthwise_tile(x: Array, kernel: Array) -> Array:
    """Per-channel convolution of one tile: `[C, H, W, N]`, `[k, k, C]` to `[C, H, W, N]`."""
    size = kernel.shape[0]
    _, h, w, _ = x.shape
    padded = _pad_image(x, size // 2)
    weight = kernel.astype(x.dtype)[..., None, None, None]
    return sum(padded[:, i : i + h, j : j + w] * weight[i, j] for i in range(size) for j in range(size))


def conv(x: Array, w: Array) -> Array:
    """Same-size convolution without bias: `[B, H, W, C]`, HWIO kernel `[k, k, C, O]` to `[B, H, W, O]`."""
    return from_tiles(conv_tile(to_tiles(x)[0], w)[None])


# --- normalisation ---------------------------------------------------------------------------------------------------


def group_count(c: int) -> int:
    """GroupNorm groups for `c` channels: the first of 32, 16, 8, 4, 2, 1 that divides c and leaves at least 16 channels
    a group, else the first that divides c (slots_and_hosts 2.2)."""
    sizes = (32, 16, 8, 4, 2, 1)
    fits = [g for g in sizes if c % g == 0]
    return next((g for g in fits if c // g >= 16), fits[0])


def group_norm_tile(x: Array, scale: Array, bias: Array) -> Array:
    """GroupNorm of one tile with `group_count(C)` groups; statistics in float32. `[C, H, W, N]`, `[C]`, `[C]`."""
    c, h, w, n = x.shape
    grouped = x.astype(jnp.float32).reshape(group_count(c), -1, h, w, n)
    centred = grouped - grouped.mean((1, 2, 3), keepdims=True)
    inv_std = lax.rsqrt((centred * centred).mean((1, 2, 3), keepdims=True) + GROUP_NORM_EPSILON)
    normalised = (centred * inv_std).reshape(c, h, w, n)
    return (normalised * scale[:, None, None, None] + bias[:, None, None, None]).astype(x.dtype)


def group_norm(x: Array, scale: Array, bias: Array) -> Array:
    """GroupNorm in the public layout: `[B, H, W, C]` with scale and bias `[C]`."""
    return from_tiles(group_norm_tile(to_tiles(x)[0], scale, bias)[None])


def _moments(y: Array) -> tuple[Array, Array]:
    """Mean and biased variance per channel of one tile `[O, H, W, N]`, in float32, two passes over a cached tile."""
    y = y.astype(jnp.float32)
    mean = y.mean((1, 2, 3))
    return mean, jnp.square(y - mean[:, None, None, None]).mean((1, 2, 3))


def _merge_moments(means: Array, variances: Array) -> tuple[Array, Array]:
    """Mean and biased variance of equal-sized tiles together: `[T, O]` to `[O]` (Chan et al. 1979)."""
    mean = means.mean(0)
    return mean, variances.mean(0) + jnp.square(means - mean[None]).mean(0)


def batch_norm(x: Array, scale: Array, bias: Array) -> Array:
    """BatchNorm with the batch's own (biased) statistics, eps 1e-5, in the public layout `[B, H, W, C]`."""
    tile = to_tiles(x)[0]
    mean, variance = _moments(tile)
    return from_tiles(_affine(tile, *_scale_shift(scale, bias, mean, variance))[None])


def running_statistics(mean: Array, var: Array, batch_mean: Array, batch_var: Array, count: int) -> tuple[Array, Array]:
    """Running mean and variance after a batch of `count` values per channel: 0.9 old + 0.1 new, unbiased variance."""
    unbiased = batch_var * (count / max(count - 1, 1))
    blend = lambda old, new: (1 - BATCH_NORM_MOMENTUM) * old + BATCH_NORM_MOMENTUM * new
    return blend(mean, batch_mean), blend(var, unbiased)


def _scale_shift(gamma: Array, beta: Array, mean: Array, var: Array) -> tuple[Array, Array]:
    scale = gamma * lax.rsqrt(var + BATCH_NORM_EPSILON)
    return scale, beta - mean * scale


def _per_channel(v: Array, features: Array) -> Array:
    """`[O]` against a tile `[O, H, W, N]` or tiles `[T, O, H, W, N]`."""
    return jnp.expand_dims(v, (*range(features.ndim - 4), -3, -2, -1))


def _affine(y: Array, scale: Array, shift: Array) -> Array:
    """Per-channel `y * scale + shift` of a tile, in float32 and back."""
    return (y.astype(jnp.float32) * _per_channel(scale, y) + _per_channel(shift, y)).astype(y.dtype)


# --- the host's block: convolution, BatchNorm, ReLU, 2x2 max-pool ----------------------------------------------------


def _sign(scale: Array) -> Array:
    """+1, or -1 where a channel's scale is negative: there the largest normalised value is the smallest of y."""
    return jnp.where(scale < 0, -1.0, jnp.ones_like(scale))


def _pool(y: Array) -> tuple[Array, Array]:
    """Maximum of every 2x2 window of a tile `[O, H, W, N]` and which of its elements that is: `[O, H//2, W//2, N]` and
    i8 0-3 in row-major order, the first of equals (as PyTorch). An odd last row or column belongs to no window."""
    o, h, w, n = y.shape
    windows = y[:, : h // 2 * 2, : w // 2 * 2].reshape(o, h // 2, 2, w // 2, 2, n)
    a, b, c, d = (windows[:, :, i, :, j] for i in (0, 1) for j in (0, 1))
    upper, lower = jnp.maximum(a, b), jnp.maximum(c, d)
    winner = jnp.where(upper >= lower, jnp.where(a >= b, 0, 1), jnp.where(c >= d, 2, 3))
    return jnp.maximum(upper, lower), winner.astype(jnp.int8)


def _unpool(values: Array, winner: Array, shape: tuple[int, ...]) -> Array:
    """The transpose of `_pool`: values at their windows' winners in a tile of the given shape, zero elsewhere."""
    o, h, w, n = shape
    element = np.arange(4, dtype=np.int8).reshape(1, 1, 2, 1, 2, 1)
    full = jnp.where(winner[:, :, None, :, None] == element, values[:, :, None, :, None], 0)
    return jnp.pad(full.reshape(o, h // 2 * 2, w // 2 * 2, n), ((0, 0), (0, h % 2), (0, w % 2), (0, 0)))


def block_eval(x: Array, kernel: Array, gamma: Array, beta: Array, mean: Array, var: Array, *, pool: bool) -> Array:
    """One block on one tile with running statistics: `[C, H, W, N]` to `[O, H//2, W//2, N]` (or unpooled)."""
    scale, shift = _scale_shift(gamma, beta, mean, var)
    y = conv_tile(x, kernel)
    if pool:
        # normalised after the pool: a quarter of the work
        sign = _sign(scale)
        y, scale = _pool(y * _per_channel(sign, y).astype(y.dtype))[0], scale * sign
    return jnp.maximum(_affine(y, scale, shift), 0)


def block_train(x: Array, kernel: Array, gamma: Array, beta: Array, *, pool: bool) -> tuple[Array, Array, Array]:
    """One block on a whole batch of tiles with the batch's own statistics.

    Args: x `[T, C, H, W, N]`, kernel `[k, k, C, O]`, gamma and beta `[O]`.
    Returns: z `[T, O, H//2, W//2, N]` (unpooled without `pool`), batch mean `[O]` and biased variance `[O]`, which
    carry no gradient.

    The backward pass is written by hand: autodiff would keep the slice matrices of the whole batch; here each tile's
    are made again.
    """
    z, mean, variance = _block(x, kernel, gamma, beta, pool)
    return z, lax.stop_gradient(mean), lax.stop_gradient(variance)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _block(x, kernel, gamma, beta, pool):
    return _block_forward(x, kernel, gamma, beta, pool)[0]


def _block_forward(x, kernel, gamma, beta, pool):
    sign = _sign(gamma)

    def convolve(tile):
        y = conv_tile(tile, kernel)
        top, winner = _pool(y * _per_channel(sign, y).astype(y.dtype)) if pool else (None, None)
        return y, top, winner, *_moments(y)

    y, top, winner, means, variances = lax.map(convolve, x)
    mean, variance = _merge_moments(means, variances)
    scale, shift = _scale_shift(gamma, beta, mean, variance)
    # relu and max commute, so what is normalised is only the winners
    z = jnp.maximum(_affine(top, scale * sign, shift) if pool else _affine(y, scale, shift), 0)
    return (z, mean, variance), (x, kernel, gamma, y, top, winner, z, mean, variance)


def _block_backward(pool, residuals, cotangents):
    x, kernel, gamma, y, top, winner, z, mean, variance = residuals
    d_z = cotangents[0]  # the statistics carry no gradient
    t, _, h, w, n = x.shape
    inv_std = lax.rsqrt(variance + BATCH_NORM_EPSILON)
    # the gradient by the normalised map is zero but at the windows' winners, so its sums need only those
    d_top = jnp.where(z > 0, d_z, 0).astype(jnp.float32)
    winners = top * _per_channel(_sign(gamma), y).astype(y.dtype) if pool else y
    standardised = (winners.astype(jnp.float32) - _per_channel(mean, y)) * _per_channel(inv_std, y)
    total = lambda maps: maps.sum((2, 3, 4)).sum(0)  # tile by tile: smaller rounding errors
    d_beta, d_gamma = total(d_top), total(d_top * standardised)
    # BatchNorm: d_y = gamma / std (d - mean(d) - standardised mean(d standardised))
    scale = gamma * inv_std
    constant, slope = scale * d_beta / (t * h * w * n), scale * inv_std * d_gamma / (t * h * w * n)

    def propagate(d_kernel, tile):
        x, y, d_top, winner = tile
        d = d_top * _per_channel(scale, y)
        d = _unpool(d, winner, y.shape) if pool else d
        centred = (y.astype(jnp.float32) - _per_channel(mean, y)) * _per_channel(slope, y) + _per_channel(constant, y)
        d_x, d_kernel_tile = conv_tile_backward(x, kernel, (d - centred).astype(x.dtype))
        return d_kernel + d_kernel_tile, d_x

    d_kernel, d_x = lax.scan(propagate, jnp.zeros(kernel.shape, jnp.float32), (x, y, d_top, winner))
    return d_x, d_kernel, d_gamma, d_beta


_block.defvjp(_block_forward, _block_backward)


# --- read-out --------------------------------------------------------------------------------------------------------


def global_average(x: Array) -> Array:
    """Mean over the image of a tile: `[C, H, W, N]` to f32 `[C, N]`."""
    return IMAGES.average(x)
