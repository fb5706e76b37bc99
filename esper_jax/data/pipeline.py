"""What a data set is, how it is split, and how batches are made of it on the device.

Axis letters: N images, B images of a batch, H, W, C height, width, channels. Images stay uint8 until they are
normalised; everything random takes a key.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from esper_jax.config import DataConfig
from esper_jax.metric import ACCURACY, Metric
from esper_jax.types import Array

SPLIT_SEED = 0  # of the one permutation that decides which images validate, whatever the seed of a run


class DataError(ValueError):
    """Data that are wrong, too few, or not to be had; the message names the file or the number."""


@struct.dataclass
class Split:
    images: Array  # u8[N, H, W, C]
    labels: Array  # i32[N]

    @property
    def inputs(self) -> Array:
        """The images."""
        return self.images


@struct.dataclass
class Dataset:
    """Images in three disjoint splits on the device, and what a run has to say about them.

    What an environment asks of any data is in its properties and methods; `text.TextDataset` has the same.
    """

    train: Split
    validation: Split  # all that controller, reward, governor and gates see
    test: Split  # for the final report only
    name: str = struct.field(pytree_node=False)
    classes: tuple[str, ...] = struct.field(pytree_node=False)
    mean: tuple[float, ...] = struct.field(pytree_node=False)  # per channel, of images scaled to [0, 1]
    std: tuple[float, ...] = struct.field(pytree_node=False)
    augment: bool = struct.field(pytree_node=False)
    identity: str = struct.field(pytree_node=False)  # a hash of the data before they were split
    source: str = struct.field(pytree_node=False)  # where they came from

    @property
    def example(self) -> tuple[int, ...]:
        """Shape of one input, (H, W, C)."""
        return self.train.images.shape[1:]

    @property
    def outputs(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def prompt(self) -> None:
        """There is none: a network of images writes nothing."""

    def facts(self) -> dict[str, Any]:
        """For the run card: how many images are in each split, and what they are."""
        images = {part: len(getattr(self, part).labels) for part in ("train", "validation", "test")}
        return {
            "images": images, "shape": list(self.example), "classes": list(self.classes), "augmented": self.augment,
        }  # fmt: skip

    def sizes(self) -> str:
        """How many images are in each split, for a line."""
        return ", ".join(f"{n} {part}" for part, n in self.facts()["images"].items())

    def metric(self, split: Split) -> Metric:
        """What a host is judged by on a split."""
        del split
        return ACCURACY

    @property
    def train_size(self) -> int:
        """Images that can be drawn."""
        return self.train.labels.shape[0]

    def order(self, key: Array, batches: int, batch_size: int) -> Array:
        """Indices of an epoch, i32 `[batches, batch_size]`; see `epoch_batches`."""
        return epoch_batches(key, self.train_size, batches, batch_size)

    def batch(self, key: Array, indices: Array) -> tuple[Array, Array]:
        """A batch of an epoch; see `train_batch`."""
        return train_batch(key, self, indices)

    def prepare(self, inputs: Array) -> Array:
        """What the host reads; see `normalise`."""
        return normalise(self, inputs)


class Arrays(NamedTuple):
    """A data set on the host, before it is split."""

    images: np.ndarray  # u8[N, H, W, C]
    labels: np.ndarray  # [N]
    test_images: np.ndarray
    test_labels: np.ndarray
    classes: tuple[str, ...]
    identity: str
    source: str


def downsample(images: np.ndarray, size: int) -> np.ndarray:
    """Average square cells of u8 images `[N, H, W, C]`, rounded to nearest: u8 `[N, size, size, C]`.

    Raises DataError if `size` does not divide the image.
    """
    height, width = images.shape[1:3]
    if height == size:
        return images
    if height % size:
        raise DataError(f"DataConfig.image_size = {size}: cannot be averaged from images of {height}x{width} pixels")
    cell = height // size
    parts = np.array_split(images, -(-len(images) // 500))  # small enough for a cache: several times faster
    return np.concatenate([_average_cells(part, cell) for part in parts])


def _average_cells(images: np.ndarray, cell: int) -> np.ndarray:
    rows = sum(images[:, i::cell].astype(np.uint16) for i in range(cell))
    total = sum(rows[:, :, j::cell] for j in range(cell))
    return ((total + cell * cell // 2) // (cell * cell)).astype(np.uint8)


def channel_moments(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of u8 images scaled to [0, 1]."""
    levels = np.arange(256) / 255
    means, stds = [], []
    for channel in np.moveaxis(images, -1, 0):
        share = np.bincount(channel.ravel(), minlength=256) / channel.size
        means.append(float(share @ levels))
        stds.append(float(np.sqrt(share @ (levels - means[-1]) ** 2)))
    return tuple(means), tuple(stds)


def split(
    arrays: Arrays,
    cfg: DataConfig,
    *,
    name: str,
    augment: bool,
    moments: tuple[tuple[float, ...], tuple[float, ...]] | None = None,
) -> Dataset:
    """Cut a data set into its three splits, downsample it and put it on the device.

    The training images are shuffled by one fixed permutation; the last `cfg.validation_size` of them validate, the
    first `cfg.train_limit` of the others train. `moments` None takes mean and deviation from the training split.
    Raises DataError if a limit asks for more images than there are.
    """
    total, tests = len(arrays.labels), len(arrays.test_labels)
    rest = total - cfg.validation_size
    if rest < 1:
        raise DataError(
            f"DataConfig.validation_size = {cfg.validation_size}: {name} has {total} training images here, "
            "and at least one must be left to train on"
        )
    held_out = f"{name} has {total} training images, {cfg.validation_size} of which validate"
    _check_limit("train_limit", cfg.train_limit, rest, held_out)
    _check_limit("test_limit", cfg.test_limit, tests, f"{name} has {tests} test images")
    order = np.random.default_rng(SPLIT_SEED).permutation(total)
    chosen = {"train": order[:rest][: cfg.train_limit], "validation": order[rest:]}
    size = cfg.image_size or arrays.images.shape[1]
    images = {part: downsample(arrays.images[rows], size) for part, rows in chosen.items()}
    images["test"] = downsample(arrays.test_images[: cfg.test_limit], size)
    labels = {part: arrays.labels[rows] for part, rows in chosen.items()}
    labels["test"] = arrays.test_labels[: cfg.test_limit]
    mean, std = moments or channel_moments(images["train"])
    return Dataset(
        **{part: Split(jnp.asarray(images[part]), jnp.asarray(labels[part], jnp.int32)) for part in images},
        name=name, classes=arrays.classes, mean=mean, std=std, augment=augment,
        identity=arrays.identity, source=arrays.source,
    )  # fmt: skip


def _check_limit(field: str, limit: int | None, available: int, why: str) -> None:
    if limit is not None and limit > available:
        raise DataError(f"DataConfig.{field} = {limit}: only {available} images are available ({why})")


def epoch_batches(key: Array, size: int, batches: int, batch_size: int) -> Array:
    """Indices i32 `[batches, batch_size]` of an epoch: the head of a random permutation of `range(size)`.

    An epoch that needs more images than there are goes on with further permutations, so that no image is drawn k + 1
    times before every image has been drawn k times. Raises ValueError if a number is below 1.
    """
    if min(size, batches, batch_size) < 1:
        raise ValueError(f"epoch_batches({size=}, {batches=}, {batch_size=}): each must be at least 1")
    passes = -(-batches * batch_size // size)
    orders = jax.vmap(lambda k: jax.random.permutation(k, size))(jax.random.split(key, passes))
    return orders.reshape(-1)[: batches * batch_size].reshape(batches, batch_size).astype(jnp.int32)


def normalise(dataset: Dataset, images: Array) -> Array:
    """`(images / 255 - mean) / std` per channel: u8 `[..., C]` to f32 of the same shape."""
    mean, std = np.asarray(dataset.mean), np.asarray(dataset.std)
    scale, shift = (1 / (255 * std)).astype(np.float32), (-mean / std).astype(np.float32)
    per_channel = (1,) * (images.ndim - 1) + (-1,)
    return images.astype(jnp.float32) * scale.reshape(per_channel) + shift.reshape(per_channel)


def augment(key: Array, images: Array) -> Array:
    """Flip each image left to right with probability 1/2, pad it with H/8 black pixels, cut a random HxW window.

    u8 `[B, H, W, C]` to the same shape. The reference crops before it flips: the same distribution.
    """
    batch, height, width, _ = images.shape
    pad = height // 8
    flip_key, offset_key = jax.random.split(key)
    flip = jax.random.bernoulli(flip_key, shape=(batch, 1))
    offsets = jax.random.randint(offset_key, (batch, 2), 0, 2 * pad + 1, jnp.int32)
    padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    # one gather of pixels: slices per image, then transposed by the network, are three times slower on a CPU
    rows = offsets[:, :1] + jnp.arange(height, dtype=jnp.int32)[None]
    columns = offsets[:, 1:] + jnp.arange(width, dtype=jnp.int32)[None]
    columns = jnp.where(flip, padded.shape[2] - 1 - columns, columns)
    return padded[jnp.arange(batch, dtype=jnp.int32)[:, None, None], rows[:, :, None], columns[:, None, :]]


def train_batch(key: Array, dataset: Dataset, indices: Array) -> tuple[Array, Array]:
    """Training images i32 `[B]`, augmented if the data set says so: normalised f32 `[B, H, W, C]`, labels i32 `[B]`."""
    images = dataset.train.images[indices]
    if dataset.augment:
        images = augment(key, images)
    return normalise(dataset, images), dataset.train.labels[indices]
