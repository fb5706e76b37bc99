"""What the layers must compute and move per image, counted by hand, and how long a machine needs for that at least.

FLOPs are those of convolutions and dense layers, 2 per multiply-add: what a measured matrix product can be compared
with. Bytes are what a layer has to read and write if everything inside it (slices, normalised maps) stays in a cache:
its stored inputs and outputs, once for each time that it needs them. Weights are left out: a batch shares them.
"""

from __future__ import annotations

from typing import NamedTuple

from esper_jax.config import HostConfig
from esper_jax.network import cnn


class Work(NamedTuple):
    """Of one layer, per image."""

    flops: float
    bytes: float


def host(cfg: HostConfig, size: int, *, channels: int, classes: int, itemsize: int, train: bool) -> list[Work]:
    """The blocks and the read-out of a host on `size` x `size` images of `channels` channels; no slots."""
    layers = []
    c = channels
    for i, o in enumerate(cfg.widths):
        pixels = size * size
        size = size // 2 if cnn.pooled(cfg, i) else size
        x, y, z = c * pixels, o * pixels, o * size * size  # elements in, after the convolution, out
        product = 2 * cfg.kernel_size**2 * c * y
        first = i == 0  # nobody asks for the gradient by the images
        # forward: the convolution reads x and writes y, normalisation and pool read y and write z
        flops, elements = product, x + 2 * y + z
        if train:
            flops += product * (1 if first else 2)
            # backward, two passes: sums for BatchNorm over (y, z, dz); then (x, y, z, dz), which writes dx
            elements += 2 * (y + 2 * z) + x + (0 if first else x)
        layers.append(Work(flops, itemsize * elements))
        c = o
    dense = 2 * c * classes
    features = c * size * size
    layers.append(Work(dense * (3 if train else 1), itemsize * features * (3 if train else 1)))
    return layers


def conv_seed(width: int, size: int, *, depth: int, itemsize: int, train: bool) -> Work:
    """A live `conv_light` (depth 1) or `conv_heavy` (depth 2) on features of `width` channels, `size` x `size`."""
    pixels = size * size
    product = depth * 2 * 9 * width * width * pixels
    # reads the features and writes the mixed ones; backward reads features and gradient and writes a gradient
    elements = width * pixels * (5 if train else 2)
    return Work(product * (3 if train else 1), itemsize * elements)


def slot_sizes(cfg: HostConfig, size: int) -> list[tuple[int, int]]:
    """(channels, image size) of the features at every slot."""
    sizes = []
    for i in range(cfg.n_blocks):
        size = size // 2 if cnn.pooled(cfg, i) else size
        sizes.append(size)
    return [(cfg.widths[i], sizes[i]) for i in cfg.slot_segments]


def total(layers: list[Work]) -> Work:
    return Work(sum(layer.flops for layer in layers), sum(layer.bytes for layer in layers))


def least_seconds(layers: list[Work], flops_per_s: float, bytes_per_s: float) -> float:
    """Time per image if every layer ran at the faster-exhausted of the two measured limits."""
    return sum(max(layer.flops / flops_per_s, layer.bytes / bytes_per_s) for layer in layers)
