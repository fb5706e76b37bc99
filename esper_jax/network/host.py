"""What a host is to everything else: the interface that `cnn` and `transformer` implement.

A host is cut into segments; a slot can sit after each. The features of a batch are a stack of *tiles* `[T, ...]`,
pieces of the batch that are computed one after the other to fit a cache. What a tile looks like inside is the host's
own business: a `Layout` says it to what sits in a slot.

Axis letters: B examples of a batch (images, or sequences), T tiles, N examples in a tile, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from esper_jax.types import Array

# A slot as the host sees it: features of all tiles [T, ...] to features of the same shape.
SlotFunction = Callable[[Array], Array]


class Layout(NamedTuple):
    """Where channels and examples lie in a tile; the other axes are positions (pixels, or places in a sequence)."""

    channel_axis: int
    example_axis: int
    rank: int
    causal: bool = False  # a position may know of those before it and of itself alone

    @property
    def _positions(self) -> tuple[int, ...]:
        return tuple(axis for axis in range(self.rank) if axis not in (self.channel_axis, self.example_axis))

    def width(self, tile: Array) -> int:
        """C of a tile."""
        return tile.shape[self.channel_axis]

    def average(self, tile: Array) -> Array:
        """Mean over the positions of every example: f32 `[C, N]`; if causal, at each over those so far: `[C, N L]`."""
        tile = tile.astype(jnp.float32)
        if self.causal:
            (axis,) = self._positions
            count = jnp.arange(1, tile.shape[axis] + 1, dtype=jnp.float32)
            so_far = jnp.cumsum(tile, axis) / jnp.expand_dims(count, [a for a in range(self.rank) if a != axis])
            return jnp.moveaxis(so_far, self.channel_axis, 0).reshape(self.width(tile), -1)
        mean = tile.mean(self._positions)
        return mean if self.channel_axis < self.example_axis else mean.T

    def spread(self, values: Array, tile: Array) -> Array:
        """Numbers f32, one for each column of `average`, shaped so that they spread over the tile."""
        if self.causal:
            places = [size for axis, size in enumerate(tile.shape) if axis != self.channel_axis]
            return jnp.expand_dims(values.reshape(places), self.channel_axis)
        return jnp.expand_dims(values, tuple(axis for axis in range(self.rank) if axis != self.example_axis))

    def from_tile(self, tile: Array) -> Array:
        """A tile with its axes as everywhere in the field: `[N, positions ..., C]`."""
        return tile.transpose(self.example_axis, *self._positions, self.channel_axis)

    def to_tile(self, x: Array) -> Array:
        """Inverse of `from_tile`."""
        axes = (self.example_axis, *self._positions, self.channel_axis)
        return x.transpose(*(axes.index(axis) for axis in range(self.rank)))

    def example(self, width: int) -> tuple[int, ...]:
        """Shape of some small tile."""
        sizes = {self.channel_axis: width, self.example_axis: 2, **dict(zip(self._positions, (6, 4), strict=False))}
        return tuple(sizes[axis] for axis in range(self.rank))


class Host(Protocol):
    """Everything a host is: what is trained, and what is only tracked."""

    params: Any  # what is trained, f32
    stats: Any  # what training tracks besides
    cfg: Any  # its configuration, static: `slot_segments` says after which segments there is a slot

    @property
    def n_segments(self) -> int: ...

    @property
    def n_outputs(self) -> int:
        """Classes, or tokens of the vocabulary."""

    def positions(self, shape: tuple[int, ...]) -> int:
        """Of one example, given the shape of a batch."""

    def embed(self, x: Array, *, dtype: str, tile_pixels: int, key: Array | None = None) -> Array:
        """A batch `[B, ...]` as tiles of at most so many pixels or tokens (0: one tile), before the first segment.

        `key` says that this is training; a host without dropout does not read it.
        """

    def train_segment(self: H, i: int, tiles: Array, key: Array | None) -> tuple[Array, H]:
        """Segment i on a batch, and the host with what training tracks."""

    def eval_segment(self, i: int, tile: Array) -> Array:
        """Segment i on one tile."""

    def read_out(self, tile: Array) -> Array:
        """Logits of one tile behind the last segment: f32 `[N, ..., outputs]`."""


H = TypeVar("H", bound=Host)


def apply(
    host: H,
    x: Array,
    *,
    train: bool,
    slots: Mapping[int, SlotFunction] | None = None,
    tile_pixels: int = 0,
    dtype: str = "float32",
    key: Array | None = None,
) -> tuple[Array, H]:
    """The host on a batch.

    Args:
      x: images `[B, H, W, C]` or tokens i32 `[B, L]`.
      train: as in training: a CNN uses and tracks the batch's statistics, a transformer drops out by `key`.
      slots: `{segment: function}` applied to the features `[T, ...]` behind that segment.
      tile_pixels: largest size of a tile, in pixels or tokens; 0 takes the whole batch.
      dtype: of the features.
      key: of the dropout; none is needed without.
    Returns: logits f32 `[B, ..., outputs]` and the host with new statistics (unchanged without `train`).
    """
    slots = slots or {}
    tiles = host.embed(x, dtype=dtype, tile_pixels=tile_pixels, key=key if train else None)
    for i in range(host.n_segments):
        if train:
            tiles, host = host.train_segment(i, tiles, key)
        else:
            tiles = lax.map(lambda tile, i=i, host=host: host.eval_segment(i, tile), tiles)
        if i in slots:
            tiles = slots[i](tiles)
    logits = lax.map(host.read_out, tiles)
    return logits.reshape(-1, *logits.shape[2:]), host


def param_count(host: Host) -> int:
    """Number of trained parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(host.params))
