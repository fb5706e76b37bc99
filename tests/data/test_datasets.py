import sys

import numpy as np
import pytest

from esper_jax import data
from esper_jax.config import DataConfig
from esper_jax.data import digits, shapes


@pytest.fixture
def few_shapes(monkeypatch):
    monkeypatch.setattr(shapes, "TRAIN", 400)
    monkeypatch.setattr(shapes, "TEST", 100)
    shapes.load.cache_clear()
    yield shapes
    shapes.load.cache_clear()


def test_digits_keep_their_channel_and_clip_the_validation_split():
    dataset = data.load(DataConfig(name="digits"))
    # 1797 scans: 599 for the test, of the other 1198 a fifth (239) validates
    assert dataset.test.images.shape == (599, 8, 8, 1)
    assert dataset.validation.images.shape == (239, 8, 8, 1)
    assert dataset.train.images.shape == (959, 8, 8, 1)
    assert dataset.name == "digits" and not dataset.augment and len(dataset.classes) == 10 and len(dataset.mean) == 1
    images = np.asarray(dataset.train.images)
    assert images.min() == 0 and images.max() == 255 and set(np.unique(dataset.train.labels)) == set(range(10))
    smaller = data.load(DataConfig(name="digits", image_size=8, validation_size=100))
    assert len(smaller.validation.labels) == 100


def test_digits_cannot_grow():
    unfit = data.load(DataConfig(name="digits", image_size=16, train_limit=10_000))  # made for photographs
    assert unfit.train.images.shape[1:] == (8, 8, 1)


def test_limits_beyond_the_digits_do_not_apply_to_them():
    few = data.load(DataConfig(name="digits", train_limit=900, test_limit=500))
    assert (len(few.train.labels), len(few.test.labels)) == (900, 500)
    whole = data.load(DataConfig(name="digits", train_limit=960, test_limit=600))
    assert (len(whole.train.labels), len(whole.test.labels)) == (959, 599)


def test_digits_without_scikit_learn_name_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(data.DataError, match="pip install scikit-learn"):
        digits.load()


def test_shapes_are_balanced_the_same_every_time_and_made_once(few_shapes):
    first = shapes.load()
    assert shapes.load() is first
    shapes.load.cache_clear()
    again = shapes.load()
    np.testing.assert_array_equal(first.images, again.images)
    assert first.identity == again.identity and first.identity.startswith("md5:")
    assert first.images.shape == (400, 32, 32, 3) and first.images.dtype == np.uint8
    assert np.bincount(first.labels).tolist() == [40] * 10 and np.bincount(first.test_labels).tolist() == [10] * 10
    assert len(np.unique(first.images.reshape(400, -1), axis=0)) == 400


def test_colours_of_shapes_do_not_give_the_class_away(few_shapes):
    """Nearest class mean of the mean colour, on pictures it has not seen: chance is 10 %, 100 pictures."""
    arrays = shapes.load()
    colour, test_colour = (images.mean((1, 2)) for images in (arrays.images, arrays.test_images))
    means = np.stack([colour[arrays.labels == k].mean(0) for k in range(10)])
    nearest = np.square(test_colour[:, None] - means).sum(-1).argmin(-1)
    assert (nearest == arrays.test_labels).mean() < 0.25


def test_small_shapes_are_drawn_plainer(few_shapes):
    """A figure stands out more: contrast against the ground is larger and the ground itself flatter. Medians over the
    pictures of the range of grey in the middle over that at the border."""

    def stands_out(arrays):
        grey = arrays.images.mean(-1)
        border = np.concatenate([grey[:, 0], grey[:, -1], grey[:, :, 0], grey[:, :, -1]], axis=1)
        return np.median(np.ptp(grey[:, 8:24, 8:24], axis=(1, 2)) / np.ptp(border, axis=1))

    small, full = shapes.load(8), shapes.load()
    assert small.identity != full.identity and shapes.load(16).identity == small.identity
    assert stands_out(small) > 1.5 * stands_out(full)


@pytest.mark.parametrize("size", [None, 8, 16, 32])
def test_shapes_come_in_every_size(few_shapes, size):
    dataset = data.load(DataConfig(name="shapes", image_size=size, validation_size=50, test_limit=30))
    side = size or 32
    assert dataset.train.images.shape == (350, side, side, 3) and dataset.test.images.shape == (30, side, side, 3)
    assert dataset.name == "shapes" and dataset.augment and dataset.source == "generated"
    assert not data.load(DataConfig(name="shapes", validation_size=50, augment=False)).augment


def test_a_limit_beyond_the_shapes_is_refused(few_shapes):
    with pytest.raises(data.DataError, match="train_limit = 351: only 350"):
        data.load(DataConfig(name="shapes", validation_size=50, train_limit=351))
