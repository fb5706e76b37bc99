"""Data sets as device arrays: CIFAR-10, and two that need no network (`digits`, `shapes`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from esper_jax.config import DataConfig, TextDataConfig
from esper_jax.data import cifar10, digits, shapes, text
from esper_jax.data.cifar10 import named_folder
from esper_jax.data.pipeline import DataError, Dataset, Split, epoch_batches, normalise, split, train_batch
from esper_jax.data.text import TextDataset

__all__ = [
    "AnyDataset", "DataError", "Dataset", "Split", "TextDataset", "epoch_batches", "load", "named_folder", "normalise",
    "resolve", "train_batch",
]  # fmt: skip

AnyDataset = Dataset | TextDataset

# Seconds that servers have to answer: when CIFAR-10 was asked for, and when it would only be nice to have.
PATIENCE, AUTO_PATIENCE = 10.0, 3.0


def resolve(
    data_dir: str | None,
    *,
    announce: Callable[[str], None] = print,
    archive: cifar10.Archive = cifar10.OFFICIAL,
) -> str:
    """What `auto` stands for here: `cifar10` if its files are there or can be fetched, else `digits`; `announce` then
    receives one line that says so.

    Raises DataError if files are there but wrong.
    """
    try:
        cifar10.load(data_dir, announce=announce, patience=AUTO_PATIENCE, archive=archive)
    except cifar10.DataNotFoundError as error:
        announce(f"WARNING: THIS RUN USES THE SMALL DATA SET 'digits', NOT CIFAR-10: {error}")
        return "digits"
    return "cifar10"


def load(
    cfg: DataConfig | TextDataConfig,
    *,
    announce: Callable[[str], None] = print,
    archive: cifar10.Archive = cifar10.OFFICIAL,
) -> Any:
    """The data set a configuration names, split and on the device.

    `auto` is CIFAR-10, or `digits` if that cannot be had; `announce` then receives one line that says so. The digits
    are few and small: they keep their one channel and 8x8 pixels, are never augmented, give at most a fifth of their
    training images to validation, and limits beyond what there is do not apply to them.

    Raises DataError (a ValueError) if the data cannot be had, are wrong, or are fewer than the limits ask for.
    """
    if isinstance(cfg, TextDataConfig):
        return text.load(cfg)
    name = resolve(cfg.data_dir, announce=announce, archive=archive) if cfg.name == "auto" else cfg.name
    if name == "digits":
        arrays = digits.load()
        validation = min(cfg.validation_size, len(arrays.labels) // 5)
        at_most = lambda limit, available: None if limit is None else min(limit, available)
        cfg = dataclasses.replace(
            cfg,
            image_size=None,
            validation_size=validation,
            train_limit=at_most(cfg.train_limit, len(arrays.labels) - validation),
            test_limit=at_most(cfg.test_limit, len(arrays.test_labels)),
        )
        return split(arrays, cfg, name="digits", augment=False)
    if name == "cifar10":
        arrays = cifar10.load(cfg.data_dir, announce=announce, patience=PATIENCE, archive=archive)
        return split(arrays, cfg, name="cifar10", augment=cfg.augment, moments=cifar10.MOMENTS)
    return split(shapes.load(cfg.image_size or shapes.SIZE), cfg, name="shapes", augment=cfg.augment)
