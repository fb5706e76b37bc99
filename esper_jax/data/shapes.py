"""A procedural stand-in for CIFAR-10: ten classes of 32x32 colour pictures, told apart by geometry alone.

Colours, brightness, position, size and rotation say nothing about the class; the background is textured, and parts of
other figures lie about. So that a network has something to grow for, the noise leaves a larger network well ahead of
a small one. Pictures that will be averaged to 8x8 or 16x16 are drawn plainer, or nothing could be learned from them.
"""

from __future__ import annotations

import functools
import hashlib
from typing import NamedTuple

import numpy as np

from esper_jax.data.pipeline import Arrays

CLASSES = ("disc", "ring", "square", "triangle", "cross", "rows", "columns", "diagonals", "checker", "pair")
TRAIN, TEST = 12_000, 2_500
SIZE = 32
SEED = 20_240
CHUNK = 500  # images drawn together: their float maps fit a cache

# Units: pixels, radians, and grey levels of 0-255.
STRIPE_TILT = 0.3  # the striped classes are rotated by at most this
GROUND = (70.0, 185.0)


class Difficulty(NamedTuple):
    """What makes the figures hard to tell apart."""

    radius: tuple[float, float]
    centre: float  # largest distance of the figure from the middle, per axis
    contrast: tuple[float, float]  # figure minus ground
    texture: float  # of the smooth background pattern
    noise: float  # of each pixel and channel
    distractors: int


FULL_SIZE = Difficulty((5.0, 10.0), 5.0, (32.0, 95.0), 28.0, 18.0, 3)
SMALL_SIZE = Difficulty((8.0, 13.0), 3.0, (60.0, 120.0), 10.0, 10.0, 0)


def _uniform(rng: np.random.Generator, low: float, high: float, *shape: int) -> np.ndarray:
    return rng.uniform(low, high, shape).astype(np.float32)


def _edge(distance: np.ndarray) -> np.ndarray:
    """Coverage of a pixel at a signed distance (negative inside) from an edge, in pixels."""
    return np.clip(0.5 - distance, 0, 1)


def _box(x: np.ndarray, y: np.ndarray, half_x, half_y) -> np.ndarray:
    return np.maximum(np.abs(x) - half_x, np.abs(y) - half_y)


def _waves(t: np.ndarray, period: np.ndarray) -> np.ndarray:
    """Signed distance to the stripes of a grating along t."""
    return np.abs((t / period) % 1 - 0.5) * period - period / 4


def _figure(kind: int, x: np.ndarray, y: np.ndarray, r: np.ndarray, shape: np.ndarray) -> np.ndarray:
    """Coverage f32 `[n, H, W]` of a figure of radius r `[n, 1, 1]`; `shape` in [0, 1] varies its proportions."""
    rho = np.sqrt(x * x + y * y)
    match CLASSES[kind]:
        case "disc":
            return _edge(rho - 0.9 * r)
        case "ring":
            return _edge(np.abs(rho - 0.8 * r) - (0.14 + 0.1 * shape) * r)
        case "square":
            return _edge(_box(x, y, 0.8 * r, 0.8 * r))
        case "triangle":
            slope = np.sqrt(np.float32(3)) / 2
            return _edge(np.maximum(np.maximum(slope * x + y / 2, -slope * x + y / 2), -y) - 0.58 * r)
        case "cross":
            arm = (0.22 + 0.1 * shape) * r
            return _edge(np.minimum(_box(x, y, r, arm), _box(x, y, arm, r)))
        case "rows" | "columns" | "diagonals":
            return _edge(rho - r) * _edge(_waves(y, (0.55 + 0.25 * shape) * r))
        case "checker":
            period = (0.7 + 0.3 * shape) * r
            parity = np.sin(2 * np.pi * x / period) * np.sin(2 * np.pi * y / period)
            return _edge(rho - r) * np.clip(0.5 + 1.5 * parity, 0, 1)
        case "pair":
            return _edge(np.sqrt((np.abs(x) - 0.55 * r) ** 2 + y * y) - (0.36 + 0.1 * shape) * r)
    raise AssertionError(kind)


def _rotation(kind: int, angle: np.ndarray, side: np.ndarray) -> np.ndarray:
    """Free for most figures; the three gratings are only tilted around their own direction. angle, side in [-1, 1]."""
    base = {"rows": 0.0, "columns": np.pi / 2, "diagonals": np.pi / 4}.get(CLASSES[kind])
    if base is None:
        return angle * np.float32(np.pi)
    return np.where(side < 0, -1, 1).astype(np.float32) * np.float32(base) + angle * np.float32(STRIPE_TILT)


def _smooth(rng: np.random.Generator, n: int, cells: int) -> np.ndarray:
    """A random pattern f32 `[n, H, W, 3]`: values in [-1, 1] at a coarse grid, interpolated linearly."""
    grid = _uniform(rng, -1, 1, n, 3, cells + 1, cells + 1)
    at = np.arange(SIZE, dtype=np.float32) * cells / SIZE
    weights = np.maximum(0, 1 - np.abs(at[:, None] - np.arange(cells + 1))).astype(np.float32)  # [H, cells + 1]
    return (weights @ grid @ weights.T).transpose(0, 2, 3, 1)


def _draw(rng: np.random.Generator, kind: int, n: int, hard: Difficulty) -> np.ndarray:
    """n pictures u8 `[n, H, W, 3]` of one class."""
    rows, columns = np.mgrid[:SIZE, :SIZE].astype(np.float32) - (SIZE - 1) / 2
    ground = _uniform(rng, *GROUND, n, 1, 1, 3)
    picture = ground + hard.texture * (_smooth(rng, n, 3) + 0.7 * _smooth(rng, n, 8))
    for _ in range(hard.distractors):  # short bars
        centre, turn = _uniform(rng, -16, 16, 2, n, 1, 1), _uniform(rng, -np.pi, np.pi, n, 1, 1)
        x, y = columns - centre[0], rows - centre[1]
        x, y = np.cos(turn) * x + np.sin(turn) * y, np.cos(turn) * y - np.sin(turn) * x
        bar = _edge(_box(x, y, _uniform(rng, 1, 4, n, 1, 1), _uniform(rng, 0.6, 1.4, n, 1, 1)))
        picture += bar[..., None] * _uniform(rng, -hard.contrast[1], hard.contrast[1], n, 1, 1, 3)
    centre = _uniform(rng, -hard.centre, hard.centre, 2, n, 1, 1)
    turn = _rotation(kind, _uniform(rng, -1, 1, n, 1, 1), _uniform(rng, -1, 1, n, 1, 1))
    x, y = columns - centre[0], rows - centre[1]
    x, y = np.cos(turn) * x + np.sin(turn) * y, np.cos(turn) * y - np.sin(turn) * x
    cover = _figure(kind, x, y, _uniform(rng, *hard.radius, n, 1, 1), _uniform(rng, 0, 1, n, 1, 1))
    sign = np.where(_uniform(rng, -1, 1, n, 1, 1, 1) < 0, -1, 1)
    colour = sign * _uniform(rng, *hard.contrast, n, 1, 1, 1) + _uniform(rng, -25, 25, n, 1, 1, 3)
    picture += cover[..., None] * colour
    picture += rng.integers(-127, 128, picture.shape, np.int8) * np.float32(hard.noise * np.sqrt(3) / 127)
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


@functools.cache
def load(size: int = SIZE) -> Arrays:
    """12,000 training and 2,500 test pictures u8 `[N, 32, 32, 3]`: the same in every run, classes equally frequent.

    Args:
      size: that the pictures will be averaged to, which decides how plain they are.
    """
    hard = FULL_SIZE if size == SIZE else SMALL_SIZE
    rng = np.random.default_rng(SEED)
    per_class = (TRAIN + TEST) // len(CLASSES)
    images = np.empty((per_class, len(CLASSES), SIZE, SIZE, 3), np.uint8)
    for kind in range(len(CLASSES)):
        for start in range(0, per_class, CHUNK):
            count = min(CHUNK, per_class - start)
            images[start : start + count, kind] = _draw(rng, kind, count, hard)
    pictures = images.reshape(-1, SIZE, SIZE, 3)
    labels = np.tile(np.arange(len(CLASSES)), per_class)
    digest = hashlib.md5(pictures.data, usedforsecurity=False).hexdigest()
    return Arrays(
        pictures[:TRAIN], labels[:TRAIN], pictures[TRAIN:], labels[TRAIN:],
        classes=CLASSES, identity=f"md5:{digest}", source="generated",
    )  # fmt: skip
