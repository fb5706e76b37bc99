"""Host and slots together: all alpha configurations at once, and evaluation on top of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from esper_jax import presets
from esper_jax.config import HostConfig
from esper_jax.env import attribution, evaluation
from esper_jax.lifecycle import stages
from esper_jax.network import blend, seed_bank
from esper_jax.network import model as networks
from esper_jax.types import BLUEPRINTS, Stage

# A slot is off (None) or (stage, blueprint, algorithm, alpha). GERMINATED and TRAINING are not live: alpha 0.
OFF = None
TRAINING = (Stage.TRAINING, "norm", 1, 0.0)
ADD = (Stage.BLENDING, "norm", 1, 0.4)
MULTIPLY = (Stage.HOLDING, "norm", 2, 1.0)
GATE = (Stage.FOSSILIZED, "norm", 3, 0.8)
NAMES = ("norm",)  # more kinds only take longer to compile here
HOST = HostConfig(n_blocks=3, base_channels=4, pool_layers=2)


@functools.cache
def _forward():
    """The ordinary forward pass under one row of overrides; one program per host."""
    return jax.jit(lambda *given: networks.forward(*given)[0])


def forward(model, state, x, on=None):
    return _forward()(model, state, x, jnp.where(np.ones(len(model.seeds), bool) if on is None else on, jnp.nan, 0.0))


def images(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@functools.cache
def model(cfg=HOST):
    """A host whose running statistics are not the identity, with parameters of any kind in every slot."""
    new = networks.init(jax.random.key(0), cfg, blueprints=NAMES)
    seeds = tuple(
        seed.replace(params=0.3 * images(2, seed.params.size), gate=images(3, seed.gate.size)) for seed in new.seeds
    )
    stats = jax.tree.map(lambda leaf: 0.3 * leaf + 0.1, new.host.stats)
    return networks.Model(new.host.replace(stats=stats), seeds)


def state_of(*slots_given):
    given = [slot or (Stage.DORMANT, None, 0, 0.0) for slot in slots_given]
    stage, blueprint, algorithm, alpha = zip(*given, strict=True)
    numbers = [BLUEPRINTS.index(name) if name else -1 for name in blueprint]
    state = stages.empty(len(given))
    i32 = lambda values: jnp.array([int(value) for value in values], jnp.int32)
    return state.replace(
        stage=i32(stage), blueprint=i32(numbers), algorithm=i32(algorithm),
        alpha=state.alpha.replace(alpha=jnp.array(alpha, jnp.float32)),
    )  # fmt: skip


PATTERNS = [
    (OFF, OFF, OFF),
    (TRAINING, OFF, TRAINING),
    (OFF, ADD, OFF),
    (ADD, TRAINING, GATE),
    (GATE, MULTIPLY, OFF),
    (OFF, GATE, ADD),
    (ADD, MULTIPLY, GATE),
]
COUNT, CLASSES = 11, 10
X = images(4, COUNT, 8, 8, 3)
LABELS = jnp.asarray(np.random.default_rng(6).integers(0, CLASSES - 1, COUNT), jnp.int32)  # class 9 never occurs


@functools.cache
def compiled():
    """Shared prefixes here, and the oracle: the ordinary forward pass vmapped over all 2^3 overrides."""
    on = attribution.configurations(3)

    def both(model, state):
        shared = networks.forward_all_configurations(model, state, X)
        position, count = networks.distinct_configurations(networks.live_slots(model, state))
        alpha = jnp.where(on, jnp.nan, 0.0)
        oracle = jax.vmap(lambda row: networks.forward(model, state, X, row)[0])(alpha)
        return shared[position], count, oracle

    return jax.jit(both)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_all_configurations(pattern):
    """Row k of the 2^3 has slot j on iff bit j is set. A slot in TRAINING or empty is the same on and off."""
    logits, count, oracle = compiled()(model(), state_of(*pattern))
    live = [slot not in (OFF, TRAINING) for slot in pattern]
    assert count == 2 ** sum(live)
    np.testing.assert_allclose(logits, oracle, rtol=0, atol=2e-5)
    np.testing.assert_allclose(logits[-1], forward(model(), state_of(*pattern), X), rtol=0, atol=2e-5)
    for row in range(8):
        for j in range(3):
            differs = bool((jnp.abs(logits[row] - logits[row ^ 2**j]) > 1e-4).any())
            assert differs == live[j]


@pytest.mark.parametrize(
    ("live", "position"),
    [
        ([0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0]),
        ([1, 1, 1], [0, 4, 2, 6, 1, 5, 3, 7]),  # the first slot splits first, so it is the highest bit
        ([0, 1, 0], [0, 0, 1, 1, 0, 0, 1, 1]),  # bit 1 of the row
        ([1, 0, 1], [0, 2, 0, 2, 1, 3, 1, 3]),
    ],
)
def test_distinct_configurations(live, position):
    got, count = networks.distinct_configurations(jnp.array(live, bool))
    np.testing.assert_array_equal(got, position)
    assert count == 2 ** sum(live) == len(set(position))


def test_override_blends_a_training_slot():
    """Without an override its value is h; with one its seed acts, at any alpha."""
    state = state_of(TRAINING, OFF, OFF)
    alphas = [jnp.array([alpha, jnp.nan, jnp.nan]) for alpha in (jnp.nan, 0.0, 0.5)]
    rows = [_forward()(model(), state, X, alpha) for alpha in alphas]
    np.testing.assert_allclose(rows[0], rows[1], rtol=0, atol=1e-6)
    assert (jnp.abs(rows[0] - rows[2]) > 1e-4).any()


def test_init():
    """Empty slots of the largest offered blueprint's size: conv_light 9 C^2 + 2 C at 4, 8 and 16 channels."""
    new = networks.init(jax.random.key(0), HOST, blueprints=("norm", "conv_light"))
    assert [seed.params.shape for seed in new.seeds] == [(152,), (592,), (2336,)]
    assert [seed.gate.shape for seed in new.seeds] == [(blend.gate_size(width),) for width in (4, 8, 16)]
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(new.seeds))
    some = networks.init(jax.random.key(0), HostConfig(n_blocks=3, base_channels=4, slots=("r0c2", "r0c0")))
    assert [seed.width for seed in some.seeds] == [4, 16] and len(some.host.stats) == 3
    heavy = seed_bank.packed_size(some.kinds, 16)
    assert some.seeds[1].params.shape == (heavy,) == (4672,)  # every blueprint fits: conv_heavy 18 C^2 + 4 C


# --- evaluation ------------------------------------------------------------------------------------------------------


def numpy_measures(logits):
    """Accuracies and losses of `[K, N, classes]`, and per-class accuracy of the last row."""
    right = logits.argmax(-1) == LABELS
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, LABELS[None]).mean(-1)
    counts = np.bincount(LABELS, minlength=CLASSES)
    per_class = 100 * np.bincount(LABELS, right[-1], CLASSES) / np.maximum(counts, 1)
    return 100 * right.mean(-1), loss, per_class, counts > 0


@functools.cache
def evaluate(images_per_tile):
    prepare = lambda x: x.astype(jnp.float32) / 2  # evaluation reads the data set's own images
    run = jax.jit(lambda *given: evaluation.evaluate(*given, prepare, tile_pixels=64 * images_per_tile))
    return lambda state: run(model(), state, X * 2, LABELS)


@pytest.mark.parametrize("images_per_tile", [4, 0])  # 11 = 4 + 4 + 3: the last tile is filled up; 0: all at once
def test_evaluate(images_per_tile):
    state = state_of(ADD, OFF, GATE)
    result = evaluate(images_per_tile)(state)
    rows = [forward(model(), state, X, on) for on in attribution.configurations(3)]
    table, loss, per_class, valid = numpy_measures(jnp.stack(rows))
    np.testing.assert_allclose(result.table, table, rtol=1e-5)
    np.testing.assert_allclose(result.accuracy, table[-1], rtol=1e-5)
    np.testing.assert_allclose(result.loss, loss[-1], rtol=1e-5)
    np.testing.assert_allclose(result.per_class, per_class, rtol=1e-5)
    np.testing.assert_array_equal(result.per_class_valid, valid)
    assert not result.per_class_valid[9]
    # committed: only the fossil (slot 2, bit 2) stays on
    np.testing.assert_allclose(result.committed_score, table[4], rtol=1e-5)
    np.testing.assert_allclose(result.committed_loss, loss[4], rtol=1e-5)
    assert len(set(np.round(loss[jnp.array([0, 1, 4, 5])], 3).tolist())) == 4  # no other configuration would do


def test_a_label_is_right_where_it_is_the_first_of_the_largest():
    """A head of zeros says class 0 to everything, and one of NaN nothing."""
    nan = np.nan
    rows = [[0, 0, 0], [0, 0, 0], [1, 3, 3], [1, 3, 3], [1, 3, 2], [nan, nan, nan], [0, nan, 1]]
    labels = jnp.array([0, 1, 1, 2, 1, 0, 2], jnp.int32)
    np.testing.assert_array_equal(evaluation.top_1(jnp.array(rows, jnp.float32), labels), [1, 0, 1, 0, 1, 0, 0])


def test_committed_loss_is_the_loss_where_nothing_or_everything_is_kept():
    """Bit for bit: the last value of an episode must not differ by rounding from the one before."""
    measure = evaluate(4)
    for pattern in ((OFF, TRAINING, OFF), (GATE, OFF, GATE)):
        result = measure(state_of(*pattern))
        assert (
            result.committed_loss == result.loss
            and result.committed_accuracy == result.committed_score == result.accuracy == result.score
        )
    blended = measure(state_of(GATE, OFF, ADD))
    np.testing.assert_allclose(blended.committed_loss, measure(state_of(GATE, OFF, OFF)).loss, rtol=1e-6)
    assert abs(blended.committed_loss - blended.loss) > 1e-3


def test_evaluate_more_slots_than_a_table_holds():
    """Five slots: as it is, all off, each off alone, each on alone; committed beside them."""
    deep = model(presets.host("cifar10_deep"))
    acting = lambda stage: (stage, "norm", 1, 0.9)
    state = state_of(acting(Stage.FOSSILIZED), OFF, acting(Stage.BLENDING), OFF, acting(Stage.HOLDING))
    x, labels = images(7, 48, 32, 32, 3), jnp.full(48, 4, jnp.int32)  # the class that this host likes best
    run = jax.jit(lambda *given: evaluation.evaluate(*given, lambda x: x, tile_pixels=20 * 32 * 32))
    result = run(deep, state, x, labels)
    rows = np.concatenate([attribution.configurations(5), [[True, False, False, False, False]]])
    assert rows.shape == (12 + 1, 5)
    # a slot that is off is an empty one; the network as it is takes no override
    off = lambda row: state.replace(stage=jnp.where(row, state.stage, Stage.DORMANT))
    alone = [run(deep, off(row), x, labels) for row in rows]
    accuracies = np.array([each.accuracy for each in alone])
    assert len(set(accuracies.tolist())) > 3
    np.testing.assert_allclose(np.append(result.table, result.committed_score), accuracies, rtol=1e-5)
    np.testing.assert_allclose(result.accuracy, accuracies[0], rtol=1e-5)
    # the losses directly, of the network as it is and of the fossil alone
    logits = jnp.stack([forward(deep, state, x, on) for on in (np.ones(5, bool), rows[-1])])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels[None]).mean(-1)
    np.testing.assert_allclose([result.loss, result.committed_loss], losses, rtol=1e-5)
    assert abs(losses[0] - losses[1]) > 1e-3
