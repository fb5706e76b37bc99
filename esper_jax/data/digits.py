"""Real handwritten digits: the 1797 8x8 scans that come with scikit-learn."""

from __future__ import annotations

import hashlib

import numpy as np

from esper_jax.data.pipeline import Arrays, DataError

TEST_SHARE = 3  # one image in three
ORDER_SEED = 0


def load() -> Arrays:
    """1198 training and 599 test images u8 `[N, 8, 8, 1]`, in a fixed random order (the original groups writers).

    Raises DataError if scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("the digits need scikit-learn: pip install scikit-learn") from error
    scans, labels = load_digits(return_X_y=True)
    images = np.rint(scans * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)  # scans hold 0 ... 16
    digest = hashlib.md5(images.tobytes() + labels.astype(np.uint8).tobytes(), usedforsecurity=False).hexdigest()
    order = np.random.default_rng(ORDER_SEED).permutation(len(labels))
    train, test = np.split(order, [len(order) - len(order) // TEST_SHARE])
    return Arrays(
        images[train], labels[train], images[test], labels[test],
        classes=tuple("0123456789"), identity=f"md5:{digest}", source="scikit-learn",
    )  # fmt: skip
