"""The convolutional host (part of Esper's Kasmina): blocks of convolution, BatchNorm, ReLU, max-pool; global average
pool; linear read-out. A slot can sit after each block, behind its pool (slots_and_hosts 1.2)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from esper_jax.config import HostConfig
from esper_jax.network import layers
from esper_jax.network.host import apply, param_count
from esper_jax.types import Array

__all__ = ["Block", "HostParams", "HostVars", "Statistics", "apply", "check_image_size", "init", "param_count"]


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

    @property
    def n_segments(self) -> int:
        """A block each."""
        return self.cfg.n_blocks

    @property
    def n_outputs(self) -> int:
        return self.params.bias.shape[0]

    def positions(self, shape: tuple[int, ...]) -> int:
        """Pixels of an image of `[B, H, W, C]`."""
        return shape[1] * shape[2]

    def embed(self, x: Array, *, dtype: str, tile_pixels: int, key: Array | None = None) -> Array:
        """Images `[B, H, W, C]` as tiles `[T, C, H, W, N]`."""
        return layers.to_tiles(x.astype(dtype), tile_pixels)

    def train_segment(self, i: int, tiles: Array, key: Array | None) -> tuple[Array, HostVars]:
        """Block i with the batch's statistics."""
        t, _, h, w, n = tiles.shape
        block, old = self.params.blocks[i], self.stats[i]
        tiles, mean, var = layers.block_train(tiles, block.kernel, block.gamma, block.beta, pool=pooled(self.cfg, i))
        new = Statistics(*layers.running_statistics(old.mean, old.var, mean, var, t * h * w * n))
        return tiles, self.replace(stats=(*self.stats[:i], new, *self.stats[i + 1 :]))

    def eval_segment(self, i: int, tile: Array) -> Array:
        """Block i on one tile `[C, H, W, N]`, with running statistics."""
        block, stats = self.params.blocks[i], self.stats[i]
        pool = pooled(self.cfg, i)
        return layers.block_eval(tile, block.kernel, block.gamma, block.beta, stats.mean, stats.var, pool=pool)

    def read_out(self, tile: Array) -> Array:
        """Logits of one tile after the last block: `[C, H, W, N]` to f32 `[N, classes]`."""
        # of float32 also where a GPU has a faster product of fewer bits
        logits = jnp.dot(layers.global_average(tile).T, self.params.kernel, precision="highest")
        return logits + self.params.bias[None]


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


def pooled(cfg: HostConfig, block: int) -> bool:
    """Whether a block ends in a max-pool."""
    return block < cfg.pool_layers


def check_image_size(cfg: HostConfig, size: int) -> None:
    """Raises ValueError if a pooled map of a `size` x `size` image would vanish."""
    pools = cfg.pool_layers
    if size >> pools == 0:
        raise ValueError(f"HostConfig.pool_layers = {pools}: {pools} pools leave nothing of {size}x{size}")
