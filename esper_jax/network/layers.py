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
from jax import lax

from esper_jax.types import Array

BATCH_NORM_EPSILON = 1e-5
BATCH_NORM_MOMENTUM = 0.1  # weight of the new batch in the running statistics
GROUP_NORM_EPSILON = 1e-5


# --- layout ----------------------------------------------------------------------------------------------------------


def images_per_tile(batch: int, pixels_per_image: int, tile_pixels: int) -> int:
    """Largest divisor of `batch` that keeps a tile within `tile_pixels`; the whole batch if `tile_pixels` is 0."""
    if tile_pixels == 0:
        return batch
    most = max(1, min(batch, tile_pixels // pixels_per_image))
    return max(size for size in range(1, most + 1) if batch % size == 0)


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


def patches(x: Array, size: int) -> Array:
    """Zero-padded neighbourhoods of a tile: `[C, H, W, N]` to `[size * size * C, H * W * N]`, for an odd `size`."""
    c, h, w, n = x.shape
    if size == 1:
        return x.reshape(c, h * w * n)
    pad = size // 2
    padded = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    parts = [padded[:, i : i + h, j : j + w] for i in range(size) for j in range(size)]
    return jnp.concatenate(parts).reshape(size * size * c, h * w * n)


@jax.custom_vjp
def conv_tile(x: Array, kernel: Array) -> Array:
    """Same-size convolution of one tile, no bias: `[C, H, W, N]`, `[k, k, C, O]` to `[O, H, W, N]`.

    Its backward pass makes the slices again instead of keeping them, and finds the input's gradient by a convolution
    with the flipped kernel.
    """
    size, _, c, o = kernel.shape
    product = lax.dot_general(
        kernel.reshape(size * size * c, o).astype(x.dtype),
        patches(x, size),
        (((0,), (0,)), ((), ())),
        preferred_element_type=jnp.float32,
    )
    return product.reshape(o, *x.shape[1:]).astype(x.dtype)


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
    pad = size // 2
    padded = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
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
    return mean, variances.mean(0) + jnp.square(means - mean).mean(0)


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


def _affine(y: Array, scale: Array, shift: Array) -> Array:
    """Per-channel `y * scale + shift` of a tile, in float32 and back."""
    return (y.astype(jnp.float32) * scale[:, None, None, None] + shift[:, None, None, None]).astype(y.dtype)


# --- the host's block: convolution, BatchNorm, ReLU, 2x2 max-pool ----------------------------------------------------


def _corners(y: Array) -> list[Array]:
    """The four elements of every 2x2 window of a tile `[O, H, W, N]`, in row-major order, each `[O, H//2, W//2, N]`.
    An odd last row or column belongs to no window."""
    o, h, w, n = y.shape
    windows = y[:, : h // 2 * 2, : w // 2 * 2].reshape(o, h // 2, 2, w // 2, 2, n)
    return [windows[:, :, i, :, j] for i in (0, 1) for j in (0, 1)]


def _activate(y: Array, scale: Array, shift: Array, pool: bool) -> Array:
    """relu(max_pool(y * scale + shift)) of a tile; relu and max commute."""
    normalised = _affine(y, scale, shift)
    if pool:
        a, b, c, d = _corners(normalised)
        normalised = jnp.maximum(jnp.maximum(a, b), jnp.maximum(c, d))
    return jnp.maximum(normalised, 0)


def block_eval(x: Array, kernel: Array, gamma: Array, beta: Array, mean: Array, var: Array, *, pool: bool) -> Array:
    """One block on one tile with running statistics: `[C, H, W, N]` to `[O, H//2, W//2, N]` (or unpooled)."""
    return _activate(conv_tile(x, kernel), *_scale_shift(gamma, beta, mean, var), pool)


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
    def convolve(tile):
        y = conv_tile(tile, kernel)
        return y, *_moments(y)

    y, means, variances = lax.map(convolve, x)
    mean, variance = _merge_moments(means, variances)
    z = jax.vmap(_activate, (0, None, None, None))(y, *_scale_shift(gamma, beta, mean, variance), pool)
    return (z, mean, variance), (x, kernel, gamma, y, z, mean, variance)


def _winners(y: Array, gradient: Array) -> Array:
    """Sends the gradient of each window to its largest element in `y` (the first of equals, as PyTorch does); zero
    elsewhere. `y [O, H, W, N]`, `gradient [O, H//2, W//2, N]` to `[O, H, W, N]`.

    The winner is read off stored values: a recomputed y * scale + shift need not equal the forward's bit for bit, and a
    comparison with the pooled value would then lose gradients silently.
    """
    o, h, w, n = y.shape
    a, b, c, d = _corners(y)
    top = jnp.maximum(jnp.maximum(a, b), jnp.maximum(c, d))
    is_a = a == top
    is_b = (b == top) & ~is_a
    is_c = (c == top) & ~is_a & ~is_b
    is_d = ~(is_a | is_b | is_c)
    routed = [jnp.where(mine, gradient, 0) for mine in (is_a, is_b, is_c, is_d)]
    rows = [jnp.stack(pair, 3) for pair in (routed[:2], routed[2:])]  # [O, H//2, W//2, 2, N]
    full = jnp.stack(rows, 2).reshape(o, h // 2 * 2, w // 2 * 2, n)
    return jnp.pad(full, ((0, 0), (0, h % 2), (0, w % 2), (0, 0)))


def _block_backward(pool, residuals, cotangents):
    x, kernel, gamma, y, z, mean, variance = residuals
    d_z = cotangents[0]  # the statistics carry no gradient
    size, _, c, o = kernel.shape
    t, _, h, w, n = x.shape
    count = t * h * w * n
    per_channel = lambda v: v[:, None, None, None]
    inv_std = lax.rsqrt(variance + BATCH_NORM_EPSILON)
    # with a negative scale the largest normalised value is the smallest y
    sign = jnp.where(gamma < 0, -1.0, 1.0)

    def reaching(y, z, d_z):
        """Gradient of the loss by the normalised map, and the standardised map."""
        d = jnp.where(z > 0, d_z, 0).astype(jnp.float32)
        y = y.astype(jnp.float32)
        if pool:
            d = _winners(y * per_channel(sign), d)
        return d, (y - per_channel(mean)) * per_channel(inv_std)

    def reduce(sums, tile):
        d, standardised = reaching(*tile)
        return (sums[0] + d.sum((1, 2, 3)), sums[1] + (d * standardised).sum((1, 2, 3))), None

    (d_beta, d_gamma), _ = lax.scan(reduce, (jnp.zeros(o), jnp.zeros(o)), (y, z, d_z))

    def propagate(d_kernel, tile):
        x, *rest = tile
        d, standardised = reaching(*rest)
        centred = d - per_channel(d_beta / count) - standardised * per_channel(d_gamma / count)
        d_y = (per_channel(gamma * inv_std) * centred).astype(x.dtype)
        d_x, d_kernel_tile = conv_tile_backward(x, kernel, d_y)
        return d_kernel + d_kernel_tile, d_x

    d_kernel, d_x = lax.scan(propagate, jnp.zeros(kernel.shape), (x, y, z, d_z))
    return d_x, d_kernel, d_gamma, d_beta


_block.defvjp(_block_forward, _block_backward)


# --- read-out --------------------------------------------------------------------------------------------------------


def global_average(x: Array) -> Array:
    """Mean over the image of a tile: `[C, H, W, N]` to f32 `[C, N]`."""
    return x.astype(jnp.float32).mean((1, 2))
