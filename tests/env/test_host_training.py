"""The batch step and the epoch: which gradients count, what is clipped together, who moves, what is reported."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from esper_jax.config import TrainingConfig
from esper_jax.env import host_training
from esper_jax.lifecycle import stages
from esper_jax.network import cnn
from esper_jax.network import model as networks
from esper_jax.network.blend import SeedVars
from esper_jax.types import BLUEPRINTS, AlphaAlgorithm, AlphaMode, Stage

S = Stage
LIGHT, NORM = BLUEPRINTS.index("conv_light"), BLUEPRINTS.index("norm")
# A limit that every gradient here exceeds.
CLIPPED = TrainingConfig(batch_size=16, clip_norm=0.03, tile_pixels=0)
JOINT = dataclasses.replace(CLIPPED, clip_scope="joint")
FREE = dataclasses.replace(CLIPPED, clip_norm=None, train_fossilised=False)
HALF = dataclasses.replace(FREE, compute_dtype="bfloat16")


@functools.cache
def batch(cfg):
    """The compiled batch step; it returns (model, momentum, gradients, metrics)."""
    return jax.jit(lambda *args: host_training.train_batch(*args, cfg))


@functools.cache
def model():
    """A host with seeds in both slots, and momentum everywhere."""
    kinds = tiny.CONFIG.lifecycle.blueprints
    made = networks.init(jax.random.key(0), tiny.CONFIG.host, blueprints=kinds, example=(8, 8, 1), outputs=3)
    draw = lambda k, leaf: 0.2 * jax.random.normal(jax.random.key(k), leaf.shape)
    seeds = tuple(s.replace(params=draw(k, s.params), gate=draw(k + 2, s.gate)) for k, s in enumerate(made.seeds))
    made = made.replace(seeds=seeds)
    momentum = jax.tree.map(
        lambda leaf: leaf if leaf.dtype != jnp.float32 else leaf + 0.01, host_training.init(made, CLIPPED)
    )
    return made, momentum


@functools.cache
def images():
    split = tiny.dataset().train
    x = (split.images[:16].astype(jnp.float32) / 255 - 0.5) / 0.35
    return x, split.labels[:16]


def slots(stage, *, alpha=0.5, mode=AlphaMode.HOLD):
    """conv_light in slot 0 in the given stage, norm in slot 1 in BLENDING at 0.5."""
    record = stages.empty(2)
    stage = jnp.array([stage, S.BLENDING], jnp.int32)
    ramp = record.alpha.replace(
        alpha=jnp.array([alpha, 0.5], jnp.float32), mode=jnp.array([mode, AlphaMode.HOLD], jnp.int32)
    )
    return record.replace(
        stage=stage, blueprint=jnp.array([LIGHT, NORM], jnp.int32), alpha=ramp,
        algorithm=jnp.full(2, AlphaAlgorithm.ADD, jnp.int32),
    )  # fmt: skip


def run(cfg, record):
    made, momentum = model()
    return batch(cfg)(made, momentum, record, *images())


def norm(tree):
    return math.sqrt(sum(float((np.asarray(leaf, np.float64) ** 2).sum()) for leaf in jax.tree.leaves(tree)))


def close(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-7), found, expected)


@pytest.mark.parametrize("cfg", [CLIPPED, JOINT, FREE], ids=["separate", "joint", "unlimited"])
def test_clipping_and_the_step(cfg):
    """PyTorch's arithmetic by hand: factor min(1, limit / (norm + 1e-6)); momentum 0.9 m + g (+ decay); step 0.01."""
    made, momentum = model()
    new, new_momentum, grads, metrics = run(cfg, slots(S.TRAINING, alpha=0.0))
    host_norm, seed_norms = norm(grads.host), [norm(g) for g in grads.seeds]
    total = math.sqrt(host_norm**2 + sum(n**2 for n in seed_norms))
    assert min(host_norm, *seed_norms) > 0.03  # the limit bites everywhere
    np.testing.assert_allclose([metrics["norm"], metrics["host_norm"]], [total, host_norm], rtol=1e-5)

    def factor(own):
        if cfg.clip_norm is None:
            return 1.0
        return min(1, 0.03 / ((total if cfg.clip_scope == "joint" else own) + 1e-6))

    step = lambda p, g, own, decay: jax.tree.map(
        lambda p, g: p - 0.01 * (0.9 * 0.01 + g * factor(own) + decay * p), p, g
    )
    close(new.host.params, step(made.host.params, grads.host, host_norm, 5e-4))
    for s in range(2):
        close(new.seeds[s], step(made.seeds[s], grads.seeds[s], seed_norms[s], 0.0))
    # the momentum is what the step was made of
    velocity = next(leaf for leaf in jax.tree.leaves(new_momentum.seeds[0]) if leaf.shape == new.seeds[0].params.shape)
    close(new.seeds[0].params, made.seeds[0].params - 0.01 * velocity)
    # no gate here: it has a zero gradient and moves by its momentum alone
    assert not np.asarray(grads.seeds[0].gate).any()


@pytest.mark.parametrize(
    ("cfg", "record", "moves"),
    [
        (CLIPPED, dict(stage=S.DORMANT), False),
        (CLIPPED, dict(stage=S.GERMINATED, alpha=0.0), False),
        (CLIPPED, dict(stage=S.TRAINING, alpha=0.0), True),
        (CLIPPED, dict(stage=S.BLENDING), True),
        (CLIPPED, dict(stage=S.BLENDING, mode=AlphaMode.UP), True),
        (CLIPPED, dict(stage=S.BLENDING, mode=AlphaMode.DOWN), False),  # being blended out: frozen
        (CLIPPED, dict(stage=S.HOLDING, alpha=1.0), True),
        (CLIPPED, dict(stage=S.FOSSILIZED, alpha=1.0), True),
        (FREE, dict(stage=S.FOSSILIZED, alpha=1.0), False),  # train_fossilised=False
        (CLIPPED, dict(stage=S.EMBARGOED, alpha=0.0), False),
    ],
    ids=lambda value: getattr(value.get("stage"), "name", None) if isinstance(value, dict) else None,
)
def test_who_moves(cfg, record, moves):
    """Without a gradient, parameters and momentum are both held: a zero gradient would let the momentum move it."""
    made, momentum = model()
    new, new_momentum, grads, metrics = run(cfg, slots(**record))
    held = tiny.equal(new.seeds[0], made.seeds[0]) and tiny.equal(new_momentum.seeds[0], momentum.seeds[0])
    assert held == (not moves)
    # the other seed and the host go their way
    assert not tiny.equal(new.seeds[1], made.seeds[1]) and not tiny.equal(new.host.params, made.host.params)
    acting = S.TRAINING <= record["stage"] <= S.FOSSILIZED and record.get("mode") != AlphaMode.DOWN
    assert host_training.seeds_with_gradient(slots(**record)).tolist() == [acting, True]
    counted = [norm(grads.host), norm(grads.seeds[1])] + ([norm(grads.seeds[0])] if acting else [])
    np.testing.assert_allclose(metrics["norm"], math.sqrt(sum(n**2 for n in counted)), rtol=1e-5)


def test_a_frozen_seed_still_passes_gradients_to_the_host():
    """Blended out from 0.5, it is part of the function: the host's gradient is that of the moving seed's network."""
    *_, frozen, _ = run(CLIPPED, slots(S.BLENDING, mode=AlphaMode.DOWN))
    *_, moving, _ = run(CLIPPED, slots(S.BLENDING))
    assert tiny.equal(frozen.host, moving.host) and norm(frozen.host.blocks[0]) > 0


def test_bfloat16_stays_close():
    """8 bits of mantissa: 2^-9 per rounding, and of 16 images a few units on the other side of a ReLU or a pool."""
    full, half = (run(cfg, slots(S.BLENDING)) for cfg in (FREE, HALF))
    np.testing.assert_allclose(half[3]["loss"], full[3]["loss"], rtol=0.02)
    for one, other in ((half[2].host, full[2].host), (half[2].seeds, full[2].seeds)):
        difference = jax.tree.map(lambda a, b: a - b, one, other)
        assert norm(difference) < 0.2 * norm(other)
    assert {leaf.dtype for leaf in jax.tree.leaves(half[:3])} <= {jnp.dtype("float32"), jnp.dtype("int32")}
    assert half[3]["loss"].dtype == jnp.float32 and not tiny.equal(half[2], full[2])


# --- an epoch ---


@functools.cache
def epoch(stride):
    cfg = dataclasses.replace(CLIPPED, telemetry_stride=stride)
    return jax.jit(lambda *args: host_training.train_epoch(*args, lambda entry: entry, cfg))


@pytest.mark.parametrize(("stride", "last"), [(2, 4), (3, 3)])
def test_an_epoch_is_its_batches(stride, last):
    """Five batches; gradients are sampled at 0, 2, 4 or at 0, 3, and the last sample is reported."""
    made, momentum = model()
    x, labels = images()
    xs = jnp.stack([jnp.roll(x, k, 0) * (1 + 0.1 * k) for k in range(5)])
    ys = jnp.stack([jnp.roll(labels, k) for k in range(5)])
    record = slots(S.BLENDING)
    found, found_momentum, report = epoch(stride)(made, momentum, record, (xs, ys))
    losses, correct, norms = [], 0, []
    for k in range(5):
        made, momentum, grads, metrics = batch(CLIPPED)(made, momentum, record, xs[k], ys[k])
        losses.append(metrics["loss"])
        norms.append(metrics["norm"])
        correct += int(metrics["correct"])
        if k == last:
            close(report.seed_gradients, grads.seeds)
            np.testing.assert_allclose(report.host_norm, metrics["host_norm"], rtol=1e-5)
        elif k > 0:
            assert abs(float(metrics["host_norm"] / report.host_norm) - 1) > 1e-4
    close((found, found_momentum), (made, momentum))
    np.testing.assert_allclose(report.batch_losses, losses, rtol=1e-5)
    np.testing.assert_allclose(report.clip_norms, norms, rtol=1e-5)
    np.testing.assert_allclose([report.loss, report.accuracy], [np.mean(losses), 100 * correct / 80], rtol=1e-5)


def test_loss_and_accuracy():
    """Of two images, with logits (0, ln 3) and (0, 0): -ln(3/4) and ln 2; a tie goes to the first class."""
    logits = jnp.array([[0.0, math.log(3)], [0.0, 0.0]])
    loss, correct = host_training.loss_and_accuracy(logits, jnp.array([1, 1]))
    np.testing.assert_allclose(loss, (math.log(4 / 3) + math.log(2)) / 2, rtol=1e-6)
    assert correct == 1


def test_clip_factor():
    np.testing.assert_allclose(host_training.clip_factor(jnp.float32(4.0), 1.0), 1 / 4.000001, rtol=1e-6)
    assert (
        host_training.clip_factor(jnp.float32(0.5), 1.0) == 1 and host_training.clip_factor(jnp.float32(1e9), None) == 1
    )


# --- momentum ---


def test_reset_momentum():
    """A new seed takes its gate along; a new gate leaves its seed; everything goes at a rollback."""
    _, state = model()
    yes, no = jnp.array([True, False]), jnp.zeros(2, bool)
    parts = lambda state: [[bool(np.asarray(leaf).any()) for leaf in jax.tree.leaves(seed)] for seed in state.seeds]
    assert parts(state) == [[True, True]] * 2
    assert parts(host_training.reset_momentum(state, yes, no)) == [[False, False], [True, True]]
    assert parts(host_training.reset_momentum(state, no, yes)) == [[True, False], [True, True]]
    assert tiny.equal(host_training.reset_momentum(state, no, no), state)
    assert not norm(host_training.reset_momentum(state, no, no, everything=True))
    assert tiny.equal(host_training.reset_momentum(state, yes, yes).host, state.host)


def test_a_seed_without_gradient_keeps_its_adam_state_and_a_new_one_begins_with_none():
    cfg = dataclasses.replace(FREE, optimiser="adamw")
    made, _ = model()
    begun = host_training.init(made, cfg)
    _, state, *_ = batch(cfg)(made, begun, slots(S.GERMINATED), *images())  # only slot 1 takes part
    count = lambda state, s: [int(leaf) for leaf in jax.tree.leaves(state.seeds[s]) if leaf.dtype == jnp.int32]
    assert tiny.equal(state.seeds[0], begun.seeds[0]) and (count(state, 0), count(state, 1)) == ([0], [1])
    reset = host_training.reset_momentum(state, jnp.array([False, True]), jnp.zeros(2, bool))
    assert tiny.equal(reset.seeds[1], begun.seeds[1]) and tiny.equal(reset.host, state.host)


@pytest.mark.parametrize(
    ("name", "host", "seed"),
    [
        # m = 0.5 (+ decay), then 0.9 m + 0.5. host: 0.5 + 0.1 = 0.6 -> 0.94; 0.54 + 0.5 + 0.094 = 1.134 -> 0.8266.
        # seed: 0.5 -> 0.9; 0.95 -> 0.71
        ("sgd", [0.94, 0.8266], [0.9, 0.71]),
        # a constant gradient over the root of its mean square is 1. host: 1 + 0.1 p: 1 - 0.11 = 0.89;
        # 0.89 - 0.1 x 1.089 = 0.7811. seed: 0.2 less each time
        ("adamw", [0.89, 0.7811], [0.8, 0.6]),
    ],
)
def test_the_optimisers_are_pytorch_s(name, host, seed):
    """Two steps from p = 1 with g = 0.5."""
    cfg = TrainingConfig(optimiser=name, host_lr=0.1, seed_lr=0.2, host_weight_decay=0.1)
    for optimiser, expected in ((host_training.host_optimiser(cfg), host), (host_training.seed_optimiser(cfg), seed)):
        p = jnp.float32(1)
        state = optimiser.init(p)
        for value in expected:
            updates, state = optimiser.update(jnp.float32(0.5), state, p)
            p = optax.apply_updates(p, updates)
            np.testing.assert_allclose(p, value, rtol=1e-6)


# --- gradient telemetry ---

HEAVY = BLUEPRINTS.index("conv_heavy")  # at 4 channels: tensors of 144, 4, 4, 144, 4, 4 elements, 304 in all
N_HEAVY = 304
record_gradients = jax.jit(host_training.record_gradients, static_argnums=2)


def sample(seed, *, host_norm=2.0, gate=0.0):
    """Telemetry of one slot of 4 channels whose gradient is `seed`, f32[304]."""
    grads = SeedVars(
        jnp.asarray(seed, jnp.float32),
        jnp.full(49, gate, jnp.float32),
        4,
        networks.kinds(tiny.CONFIG.host, ("conv_heavy",)),
    )
    none = jnp.zeros(1)
    return host_training.EpochMetrics(jnp.float32(0), jnp.float32(0), none, none, jnp.float32(host_norm), (grads,))


def heavy(stage=S.TRAINING, has_gate=False):
    record = stages.empty(1)
    return record.replace(
        stage=jnp.array([stage], jnp.int32), blueprint=jnp.array([HEAVY], jnp.int32), has_gate=jnp.array([has_gate])
    )


def by_tensor(*norms):
    """A gradient whose tensors have these norms."""
    sizes = (144, 4, 4, 144, 4, 4)
    return np.concatenate([np.full(n, value / math.sqrt(n)) for n, value in zip(sizes, norms, strict=True)])


def test_gate_size_of_these_tests():
    assert sample(np.zeros(N_HEAVY)).seed_gradients[0].gate.shape == (4 * 8 + 8 + 8 + 1,)


def test_ratio_worked_example():
    """|g_h| = 2 over 100,000 elements, 0.1 over 1,000: 0.5. Then an exponential mean: 0.9 * 0.5 + 0.1 * 1 = 0.55."""
    per_element = 0.1 / math.sqrt(1000)
    one = record_gradients(heavy(), sample(np.full(N_HEAVY, per_element)), 100_000)
    np.testing.assert_allclose(one.metrics.gradient_ratio, 0.5, rtol=1e-5)
    np.testing.assert_allclose(one.metrics.gradient_norm, per_element * math.sqrt(N_HEAVY), rtol=1e-5)
    assert one.metrics.gradient_valid[0] and not one.metrics.previous_gradient_valid[0]
    two = record_gradients(one, sample(np.full(N_HEAVY, 2 * per_element)), 100_000)
    np.testing.assert_allclose(two.metrics.gradient_ratio, 0.55, rtol=1e-5)
    assert two.metrics.previous_gradient_valid[0]
    # at most 10
    huge = record_gradients(heavy(), sample(np.full(N_HEAVY, 1e3 * per_element)), 100_000)
    np.testing.assert_allclose(huge.metrics.gradient_ratio, 10)


@pytest.mark.parametrize(
    ("norms", "health", "vanishing", "exploding"),
    [
        ([1, 1, 1, 1, 1, 1], 1.0, False, False),
        # two of six vanish and one explodes: 1 - 0.5 * 2/6 - 0.8 * 1/6
        ([1, 0, 1, 0.9e-7, 1, 10.1], 0.7, True, True),
        ([1, 1.1e-7, 1, 1, 1, 9.9], 1.0, False, False),  # just within both limits
        ([0] * 6, 0.5, True, False),
        ([11] * 6, 0.2, False, True),
        ([1, 1, 1, 1, 1, math.inf], 0.0, False, True),
        ([1, 1, 1, 1, 1, math.nan], 0.0, False, True),
    ],
)
def test_health(norms, health, vanishing, exploding):
    m = record_gradients(heavy(), sample(by_tensor(*norms)), 100_000).metrics
    np.testing.assert_allclose(m.gradient_health, health, rtol=1e-5, atol=1e-7)
    assert (m.gradient_vanishing[0], m.gradient_exploding[0]) == (vanishing, exploding)
    assert np.isfinite(m.gradient_ratio).all() and np.isfinite(m.gradient_norm).all()


def test_a_gate_counts_as_one_more_tensor():
    """One of seven vanishes: 1 - 0.5 / 7. Norm: six tensors of 1 and a gate of 49 * 0.01 = 0.7^2: sqrt(6.49)."""
    m = record_gradients(heavy(has_gate=True), sample(by_tensor(1, 1, 1, 1, 1, 0), gate=0.1), 100_000).metrics
    np.testing.assert_allclose(m.gradient_health, 1 - 0.5 / 7, rtol=1e-5)
    np.testing.assert_allclose(m.gradient_norm, math.sqrt(5 + 0.49), rtol=1e-5)
    # without a gate what lies in its vector is not looked at
    m = record_gradients(heavy(), sample(by_tensor(1, 1, 1, 1, 1, 1), gate=0.1), 100_000).metrics
    np.testing.assert_allclose([m.gradient_norm[0], m.gradient_health[0]], [math.sqrt(6), 1], rtol=1e-5)


@pytest.mark.parametrize(("host", "seed"), [(0.9e-8, 1.0), (2.0, 0.9e-8), (math.nan, 1.0), (math.inf, 1.0), (2.0, 0.0)])
def test_gradients_too_short_to_compare_give_no_ratio(host, seed):
    m = record_gradients(heavy(), sample(np.full(N_HEAVY, seed / math.sqrt(N_HEAVY)), host_norm=host), 1000).metrics
    assert m.gradient_ratio[0] == 0


@pytest.mark.parametrize("stage", [S.DORMANT, S.GERMINATED, S.PRUNED])
def test_seeds_that_were_not_trained_are_not_measured(stage):
    record = heavy(stage)
    assert tiny.equal(record_gradients(record, sample(np.ones(N_HEAVY)), 1000), record)


def test_health_remembers_the_one_before():
    first = record_gradients(heavy(), sample(by_tensor(1, 1, 1, 0, 0, 0)), 1000)
    m = record_gradients(first, sample(by_tensor(1, 1, 1, 1, 1, 1)), 1000).metrics
    np.testing.assert_allclose([m.previous_gradient_health[0], m.gradient_health[0]], [0.75, 1.0])


def test_the_host_s_parameters_are_counted():
    assert cnn.param_count(model()[0].host) == sum(leaf.size for leaf in jax.tree.leaves(model()[0].host.params))
