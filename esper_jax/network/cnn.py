"""The convolutional host (part of Esper's Kasmina): blocks of convolution, BatchNorm, ReLU, max-pool; global average
pool; linear read-out. A slot can sit after each block, behind its pool (slots_and_hosts 1.2)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from esper_jax.config import HostConfig
from esper_jax.network import layers
from esper_jax.types import Array

# A slot as the host sees it: features of all tiles [T, C, H, W, N] to features of the same shape.
SlotFunction = Callable[[Array], Array]


@struct.dataclass
class Block:
    kernel: Array  # f32[k, k, C, O]
    gamma: Array  # f32[O]
    beta: Array  # f32[O]


@struct.dataclass
class Statistics:
    """Running statistics of one BatchNorm."""

    mean: Array  # f32[O]
    var: Array  # f32[O]


@struct.dataclass
class HostParams:
    blocks: tuple[Block, ...]
    kernel: Array  # f32[C, classes] of the read-out
    bias: Array  # f32[classes]


@struct.dataclass
class HostVars:
    """Everything a host is: what is trained, and what is only tracked."""

    params: HostParams
    stats: tuple[Statistics, ...]
    cfg: HostConfig = struct.field(pytree_node=False)


def init(key: Array, cfg: HostConfig, *, channels: int = 3, classes: int = 10) -> HostVars:
    """A new host for images of `channels` channels, initialised as PyTorch does (uniform +-1/sqrt(fan_in))."""
    *block_keys, kernel_key, bias_key = jax.random.split(key, cfg.n_blocks + 2)
    widths = (channels, *cfg.widths)
    blocks = tuple(
        Block(layers.conv_init(k, cfg.kernel_size, c, o), jnp.ones(o, jnp.float32), jnp.zeros(o, jnp.float32))
        for k, c, o in zip(block_keys, widths, widths[1:], strict=False)
    )
    kernel = layers.uniform_fan_in(kernel_key, (widths[-1], classes), widths[-1])
    bias = layers.uniform_fan_in(bias_key, (classes,), widths[-1])
    stats = tuple(Statistics(jnp.zeros(o, jnp.float32), jnp.ones(o, jnp.float32)) for o in cfg.widths)
    return HostVars(HostParams(blocks, kernel, bias), stats, cfg)


def param_count(vars: HostVars) -> int:
    """Number of trained parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(vars.params))


def pooled(cfg: HostConfig, block: int) -> bool:
    """Whether a block ends in a max-pool."""
    return block < cfg.pool_layers


def check_image_size(cfg: HostConfig, size: int) -> None:
    """Raises ValueError if a pooled map of a `size` x `size` image would vanish."""
    pools = cfg.pool_layers
    if size >> pools == 0:
        raise ValueError(f"HostConfig.pool_layers = {pools}: {pools} pools leave nothing of {size}x{size}")


def train_features(vars: HostVars, tiles: Array, slots: Mapping[int, SlotFunction]) -> tuple[Array, HostVars]:
    """All blocks on a batch of tiles, with batch statistics; `slots[i]` is applied after block i."""
    stats = []
    for i, (block, old) in enumerate(zip(vars.params.blocks, vars.stats, strict=True)):
        t, _, h, w, n = tiles.shape
        pool = pooled(vars.cfg, i)
        tiles, mean, var = layers.block_train(tiles, block.kernel, block.gamma, block.beta, pool=pool)
        stats.append(Statistics(*layers.running_statistics(old.mean, old.var, mean, var, t * h * w * n)))
        if i in slots:
            tiles = slots[i](tiles)
    return tiles, vars.replace(stats=tuple(stats))


def eval_block(vars: HostVars, i: int, tile: Array) -> Array:
    """Block i on one tile `[C, H, W, N]`, with running statistics."""
    block, stats = vars.params.blocks[i], vars.stats[i]
    pool = pooled(vars.cfg, i)
    return layers.block_eval(tile, block.kernel, block.gamma, block.beta, stats.mean, stats.var, pool=pool)


def read_out(vars: HostVars, tile: Array) -> Array:
    """Logits of one tile after the last block: `[C, H, W, N]` to f32 `[N, classes]`."""
    return layers.global_average(tile).T @ vars.params.kernel + vars.params.bias[None]


def apply(
    vars: HostVars, x: Array, *, train: bool, slots: Mapping[int, SlotFunction] | None = None, tile_pixels: int = 0
) -> tuple[Array, HostVars]:
    """The host on images `[B, H, W, C]`.

    Args:
      train: use and track the batch's statistics; otherwise the running ones.
      slots: `{block: function}` applied to the features `[T, C, H, W, N]` after that block.
      tile_pixels: size of the tiles (see `layers`).
    Returns: logits f32 `[B, classes]` and the variables with new running statistics (unchanged without `train`).
    """
    slots = slots or {}
    tiles = layers.to_tiles(x, tile_pixels)
    if train:
        tiles, vars = train_features(vars, tiles, slots)
    else:
        for i in range(vars.cfg.n_blocks):
            tiles = lax.map(lambda one, i=i: eval_block(vars, i, one), tiles)
            if i in slots:
                tiles = slots[i](tiles)
    logits = lax.map(lambda one: read_out(vars, one), tiles)
    return logits.reshape(-1, logits.shape[-1]), vars
