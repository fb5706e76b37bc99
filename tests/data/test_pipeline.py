import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_jax.config import DataConfig
from esper_jax.data import pipeline as P


def make_arrays(total=60, tests=20, size=16):
    """Image i is filled with the value i, so that it tells its own index; test images count down from 255."""
    fill = lambda values: np.broadcast_to(values.astype(np.uint8)[:, None, None, None], (len(values), size, size, 3))
    train, test = np.arange(total), 255 - np.arange(tests)
    return P.Arrays(fill(train), train % 10, fill(test), test % 10, tuple("0123456789"), "md5:0", "here")


def make_dataset(images, *, augment=False, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)):
    part = P.Split(jnp.asarray(images), jnp.arange(len(images), dtype=jnp.int32))
    return P.Dataset(
        part, part, part, name="n", classes=(), mean=mean, std=std, augment=augment, identity="", source=""
    )


def cut(cfg, arrays=None):
    return P.split(arrays or make_arrays(), cfg, name="toy", augment=True, moments=((0.5,) * 3, (0.25,) * 3))


def values(part):
    return np.asarray(part.images[:, 0, 0, 0]).tolist()


def test_splits_are_disjoint_complete_and_the_same_every_time():
    first, again = (cut(DataConfig(validation_size=15)) for _ in range(2))
    chex.assert_trees_all_equal(first, again)
    train, validation = values(first.train), values(first.validation)
    assert len(train) == 45 and len(validation) == 15 and sorted(train + validation) == list(range(60))
    assert values(first.test) == [255 - i for i in range(20)]
    assert first.train.labels.tolist() == [i % 10 for i in train]
    chex.assert_type([first.train.images, first.train.labels], [jnp.uint8, jnp.int32])
    assert (first.name, first.identity, first.source, first.augment) == ("toy", "md5:0", "here", True)


def test_limits_cut_the_heads_and_leave_the_validation_images_alone():
    whole = cut(DataConfig(validation_size=15))
    part = cut(DataConfig(validation_size=15, train_limit=7, test_limit=4))
    assert values(part.train) == values(whole.train)[:7] and values(part.test) == values(whole.test)[:4]
    chex.assert_trees_all_equal(part.validation, whole.validation)


@pytest.mark.parametrize(
    "changes, field, number",
    [
        ({"validation_size": 15, "train_limit": 46}, "train_limit", "45"),
        ({"validation_size": 15, "test_limit": 21}, "test_limit", "20"),
        ({"validation_size": 60}, "validation_size", "60"),
        ({"validation_size": 15, "image_size": 32}, "image_size", "16x16"),
    ],
)
def test_asking_for_more_than_there_is_names_the_field_and_what_there_is(changes, field, number):
    with pytest.raises(P.DataError, match=f"DataConfig.{field} = .*{number}"):
        cut(DataConfig(**changes))


def test_downsample_averages_square_cells_and_rounds_halves_up():
    image = np.array([[0, 1, 10, 20], [1, 0, 30, 41], [255, 255, 0, 0], [255, 255, 0, 3]], np.uint8)[None, ..., None]
    # sums 2, 101; 1020, 3 over 4: .5 -> 1, 25.25 -> 25, 255, .75 -> 1
    np.testing.assert_array_equal(P.downsample(image, 2)[0, ..., 0], [[1, 25], [255, 1]])
    assert P.downsample(image, 4) is image


@given(cell=st.sampled_from([1, 2, 4]), seed=st.integers(0, 1000))
@settings(max_examples=15, deadline=None)
def test_downsample_is_the_rounded_mean(cell, seed):
    images = np.random.default_rng(seed).integers(0, 256, (3, 8, 8, 2), np.uint8)
    mean = images.reshape(3, 8 // cell, cell, 8 // cell, cell, 2).astype(float).mean((2, 4))
    np.testing.assert_array_equal(P.downsample(images, 8 // cell), np.floor(mean + 0.5))


def test_channel_moments_are_those_of_the_scaled_images():
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), np.uint8)
    mean, std = P.channel_moments(images)
    np.testing.assert_allclose(mean, (images / 255).mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(std, (images / 255).std((0, 1, 2)), rtol=1e-12)


def test_moments_come_from_the_training_split_unless_they_are_given():
    arrays = make_arrays()
    own = P.split(arrays, DataConfig(validation_size=15), name="toy", augment=False)
    train = np.array(values(own.train)) / 255
    np.testing.assert_allclose(own.mean, [train.mean()] * 3, rtol=1e-12)
    np.testing.assert_allclose(own.std, [train.std()] * 3, rtol=1e-12)
    assert cut(DataConfig(validation_size=15)).mean == (0.5,) * 3


def test_normalise_scales_to_one_then_standardises_each_channel():
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    images = np.array([[[[0, 128, 255]]]], np.uint8)
    out = P.normalise(make_dataset(images, mean=mean, std=std), jnp.asarray(images))
    np.testing.assert_allclose(out, (images / 255 - mean) / std, rtol=1e-5)
    assert out.dtype == jnp.float32


# fewer than an epoch, exactly one, one and a bit, several passes, single images
@pytest.mark.parametrize("size, batches, batch_size", [(20, 3, 4), (12, 3, 4), (11, 3, 4), (5, 3, 6), (1, 2, 2)])
def test_an_epoch_uses_every_image_before_it_repeats_one(size, batches, batch_size):
    indices = jax.jit(P.epoch_batches, static_argnums=(1, 2, 3))(jax.random.key(size), size, batches, batch_size)
    chex.assert_shape(indices, (batches, batch_size))
    chex.assert_type(indices, jnp.int32)
    drawn = np.asarray(indices).reshape(-1)
    for start in range(0, len(drawn), size):  # each pass is a piece of a permutation
        piece = drawn[start : start + size]
        assert len(set(piece.tolist())) == len(piece) and 0 <= piece.min() and piece.max() < size


def test_epochs_are_decided_by_the_key_under_jit_and_vmap():
    draw = jax.jit(lambda key: P.epoch_batches(key, 50, 3, 10))
    keys = jax.random.split(jax.random.key(0), 2)
    both = jax.vmap(draw)(keys)
    chex.assert_trees_all_equal(both[0], draw(keys[0]))
    assert (both[0] != both[1]).any()
    two_passes = np.asarray(P.epoch_batches(keys[0], 6, 2, 6))
    assert (two_passes[0] != two_passes[1]).any()  # the second permutation is another one


@pytest.mark.parametrize("numbers", [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_an_epoch_of_nothing_is_refused(numbers):
    with pytest.raises(ValueError, match="at least 1"):
        P.epoch_batches(jax.random.key(0), *numbers)


@pytest.mark.parametrize("size, pad", [(8, 1), (16, 2), (32, 4)])
def test_augmentation_is_a_flip_and_a_shift_within_black_padding(size, pad):
    rng = np.random.default_rng(size)
    images = rng.integers(1, 256, (200, size, size, 3), np.uint8)
    out = np.asarray(jax.jit(P.augment)(jax.random.key(1), jnp.asarray(images)))
    assert out.dtype == np.uint8
    seen = np.zeros((2, 2 * pad + 1, 2 * pad + 1), int)
    for image, got in zip(images, out, strict=True):
        windows = [
            (flip, i, j)
            for flip in (0, 1)
            for padded in [np.pad(image[:, ::-1] if flip else image, ((pad, pad), (pad, pad), (0, 0)))]
            for i in range(2 * pad + 1)
            for j in range(2 * pad + 1)
            if (padded[i : i + size, j : j + size] == got).all()
        ]
        assert len(windows) == 1
        seen[windows[0]] += 1
    assert 70 < seen[1].sum() < 130  # of 200 flips at 1/2: 4 standard deviations
    assert (seen.sum((0, 2)) > 0).all() and (seen.sum((0, 1)) > 0).all()  # every row and column offset occurs


def test_train_batch_gathers_normalises_and_keeps_the_labels():
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8)
    dataset = make_dataset(images, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    x, labels = jax.jit(P.train_batch)(jax.random.key(0), dataset, jnp.array([4, 0, 4]))
    np.testing.assert_allclose(x, (images[[4, 0, 4]] / 255 - dataset.mean) / dataset.std, rtol=1e-4, atol=1e-6)
    assert labels.tolist() == [4, 0, 4]


def test_padding_is_black_before_normalising():
    white = make_dataset(np.full((1, 8, 8, 3), 255, np.uint8), augment=True, mean=(0.5,) * 3, std=(0.25,) * 3)
    x, _ = jax.jit(P.train_batch)(jax.random.key(0), white, jnp.zeros(64, jnp.int32))
    assert set(np.unique(np.round(x, 5)).tolist()) == {-2.0, 2.0}  # (0 - .5) / .25 and (1 - .5) / .25


def test_train_batch_maps_over_environments_and_differs_between_them():
    images = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), np.uint8)
    dataset, keys = make_dataset(images, augment=True), jax.random.split(jax.random.key(0), 2)
    indices = jnp.array([[0, 1, 2], [0, 1, 2]])
    x, labels = jax.jit(jax.vmap(P.train_batch, (0, None, 0)))(keys, dataset, indices)
    chex.assert_shape([x, labels], [(2, 3, 16, 16, 3), (2, 3)])
    chex.assert_trees_all_close(x[1], jax.jit(P.train_batch)(keys[1], dataset, indices[1])[0], rtol=1e-6)
    assert (x[0] != x[1]).any()
