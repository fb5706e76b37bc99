"""Data sets as device arrays: CIFAR-10, and two that need no network (`digits`, `shapes`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from esper_jax.config import DataConfig
from esper_jax.data import cifar10, digits, shapes
from esper_jax.data.pipeline import DataError, Dataset, Split, epoch_batches, normalise, split, train_batch

__all__ = ["DataError", "Dataset", "Split", "epoch_batches", "load", "normalise", "train_batch"]

# Seconds that servers have to answer: when CIFAR-10 was asked for, and when it would only be nice to have.
PATIENCE, AUTO_PATIENCE = 10.0, 3.0


def load(
    cfg: DataConfig, *, announce: Callable[[str], None] = print, archive: cifar10.Archive = cifar10.OFFICIAL
) -> Dataset:
    """The data set a configuration names, split and on the device.

    `auto` is CIFAR-10, or `shapes` if that cannot be had; `announce` then receives one line that says so. The digits
    keep their one channel, are never augmented, and give at most a fifth of their training images to validation.

    Raises DataError (a ValueError) if the data cannot be had, are wrong, or are fewer than the limits ask for.
    """
    if cfg.name == "digits":
        arrays = digits.load()
        cfg = dataclasses.replace(cfg, validation_size=min(cfg.validation_size, len(arrays.labels) // 5))
        return split(arrays, cfg, name="digits", augment=False)
    if cfg.name != "shapes":
        patience = AUTO_PATIENCE if cfg.name == "auto" else PATIENCE
        try:
            arrays = cifar10.load(cfg.data_dir, announce=announce, patience=patience, archive=archive)
            return split(arrays, cfg, name="cifar10", augment=cfg.augment, moments=cifar10.MOMENTS)
        except cifar10.DataNotFoundError as error:
            if cfg.name == "cifar10":
                raise
            announce(f"WARNING: THIS RUN USES THE SYNTHETIC DATA SET 'shapes', NOT CIFAR-10: {error}")
    return split(shapes.load(), cfg, name="shapes", augment=cfg.augment)
