"""How a slot changes features and where its gradients go (slots_and_hosts 4.4-5.2)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esper_jax.lifecycle import stages
from esper_jax.network import blend, blueprints, layers, seed_bank
from esper_jax.types import BLUEPRINTS, AlphaAlgorithm, Stage

WIDTH, NAME = 8, "conv_light"
SHAPE = (2, WIDTH, 5, 3, 4)  # two tiles of four images
CONV_LIGHT = blueprints.CNN[NAME]
KINDS = seed_bank.table((NAME,), blueprints.CNN)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


H, G = normal(0, *SHAPE), normal(1, *SHAPE)
SEED = blend.SeedVars(
    0.3 * normal(2, seed_bank.packed_size(KINDS, WIDTH)),
    normal(3, blend.gate_size(WIDTH)),
    WIDTH,
    KINDS,
)


def control(mode, alpha, isolate, kind=1):
    return blend.Controls(jnp.int32(kind), jnp.int32(mode), jnp.float32(alpha), jnp.array(isolate))


@functools.cache
def compiled():
    def run(control, seed, h, g):
        y, pullback = jax.vjp(lambda seed, h: blend.apply_slot(control, seed, h), seed, h)
        return y, *pullback(g)

    return jax.jit(run)


@functools.cache
def pieces():
    """Seed output and gate value of all tiles, and their pullbacks: ds -> (params, h), dgate -> (gate, h)."""

    def run(h, ds, dgate):
        def seed(params, h):
            unpacked = seed_bank.unpack(CONV_LIGHT, WIDTH, params)
            return jax.vmap(lambda tile: CONV_LIGHT.after_stem(unpacked, tile, CONV_LIGHT.stem_of(unpacked, tile)))(h)

        def gate(gate, h):
            return jax.vmap(lambda tile: blend.gate_value(gate, tile, layers.IMAGES))(h)

        s, pull_seed = jax.vjp(seed, SEED.params, h)
        e, pull_gate = jax.vjp(gate, SEED.gate, h)
        return s, e, pull_seed(ds), pull_gate(dgate)

    return jax.jit(run)


def expected(mode, alpha, isolate):
    """Value and gradients by the table of slots_and_hosts 5.2, from the seed's and the gate's own derivatives."""
    s, gate, *_ = pieces()(H, G, jnp.zeros((2, 4)))
    e = alpha * gate[:, None, None, None, :]
    t = jnp.tanh(s - H)
    value, direct, d_s = {
        blend.STRAIGHT_THROUGH: (H, G, G),
        blend.ADD: (H + alpha * (s - H), (1 - alpha) * G, alpha * G),
        blend.MULTIPLY: (H * (1 + alpha * t), (1 + alpha * t) * G, alpha * H * (1 - t * t) * G),
        blend.GATE: (H + e * (s - H), (1 - e) * G, e * G),
    }[mode]
    d_gate_value = alpha * ((s - H) * G).sum((1, 2, 3)) if mode == blend.GATE else jnp.zeros((2, 4))
    _, _, (d_params, through_seed), (d_gate, through_gate) = pieces()(H, d_s, d_gate_value)
    indirect = through_seed + through_gate - (d_s if mode == blend.MULTIPLY else 0)  # MULTIPLY reads s - x
    return value, (d_params, d_gate), direct if isolate else direct + indirect


@pytest.mark.parametrize("isolate", [True, False])
@pytest.mark.parametrize(
    ("mode", "alpha"),
    [("STRAIGHT_THROUGH", 0.0), ("ADD", 0.3), ("ADD", 1.0), ("MULTIPLY", 0.6), ("GATE", 0.3), ("GATE", 1.0)],
)
def test_values_and_gradients(mode, alpha, isolate):
    """All rows of the table; that a straight-through slot is always isolated is the business of `controls`."""
    mode = getattr(blend, mode)
    y, grad_seed, grad_h = compiled()(control(mode, alpha, isolate), SEED, H, G)
    value, (d_params, d_gate), d_h = expected(mode, alpha, isolate)
    for got, wanted in ((y, value), (grad_seed.params, d_params), (grad_seed.gate, d_gate), (grad_h, d_h)):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5 * max(1, float(jnp.abs(wanted).max())))


def test_straight_through_is_exact():
    """Bitwise h forward, bitwise g backward; the seed need not even be finite."""
    y, grad_seed, grad_h = compiled()(control(blend.STRAIGHT_THROUGH, 0, True), SEED, H, G)
    np.testing.assert_array_equal(y, H)
    np.testing.assert_array_equal(grad_h, G)
    np.testing.assert_array_equal(grad_seed.gate, 0)
    broken = SEED.replace(params=jnp.full_like(SEED.params, jnp.nan))
    np.testing.assert_array_equal(compiled()(control(blend.STRAIGHT_THROUGH, 0, True), broken, H, G)[0], H)
    # a blended seed is not protected: its NaN must be seen
    assert jnp.isnan(compiled()(control(blend.ADD, 0.5, True), broken, H, G)[0]).any()


@pytest.mark.parametrize("mode", [blend.ADD, blend.MULTIPLY, blend.GATE])
def test_alpha_zero_is_exactly_the_host(mode):
    np.testing.assert_array_equal(compiled()(control(mode, 0, False), SEED, H, G)[0], H)


def test_add_at_alpha_one_is_exactly_the_seed():
    """And, isolated, nothing upstream gets any gradient."""
    s, *_ = pieces()(H, G, jnp.zeros((2, 4)))
    h = s + 3  # any host: only the seed's output of x = H may remain
    blended = blend.blend(jnp.int32(blend.ADD), h[0], s[0], H[0], jnp.float32(1), SEED.gate, layers.IMAGES)
    np.testing.assert_array_equal(blended, s[0])
    np.testing.assert_array_equal(compiled()(control(blend.ADD, 1, True), SEED, H, G)[2], 0)


def test_multiply_bounds():
    """|y - h| <= alpha |h|, since |tanh| <= 1."""
    loud = SEED.replace(params=10 * SEED.params)
    y = compiled()(control(blend.MULTIPLY, 0.7, False), loud, H, G)[0]
    assert (jnp.abs(y - H) <= 0.7 * jnp.abs(H) + 1e-6).all()
    assert float((jnp.abs(y - H) / jnp.abs(H)).max()) > 0.69


def test_isolation_leaves_exactly_half():
    """loss = sum(y), ADD, alpha 0.5: the host's own share 1 - 0.5 is all that an isolated slot lets upstream."""
    ones = jnp.ones(SHAPE)
    isolated = compiled()(control(blend.ADD, 0.5, True), SEED, H, ones)
    joint = compiled()(control(blend.ADD, 0.5, False), SEED, H, ones)
    np.testing.assert_array_equal(isolated[2], 0.5)
    assert (joint[2] != 0.5).any()
    # value and seed gradients do not depend on it
    np.testing.assert_array_equal(isolated[0], joint[0])
    jax.tree.map(np.testing.assert_array_equal, isolated[1], joint[1])


def test_empty_slot():
    y, grad_seed, grad_h = compiled()(control(blend.ADD, 1, False, kind=0), SEED, H, G)
    np.testing.assert_array_equal(y, H)
    np.testing.assert_array_equal(grad_h, G)
    jax.tree.map(lambda leaf: np.testing.assert_array_equal(leaf, 0), grad_seed)


def test_seeds_in_a_batch_of_environments():
    """Under vmap, environments with an empty slot, a straight-through seed and two blending ones, as one at a time."""
    batch = [(blend.ADD, 0.5, False, 0), (blend.STRAIGHT_THROUGH, 0, True, 1), (blend.ADD, 0.4, False, 1),
             (blend.GATE, 0.8, True, 1)]  # fmt: skip
    rows = [control(*row) for row in batch]
    together = jax.jit(jax.vmap(lambda c, h: blend.apply_slot(c, SEED, h)))
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)
    y = together(stacked, jnp.stack([H * (i + 1) for i in range(4)]))
    for i, row in enumerate(rows):
        alone = compiled()(row, SEED, H * (i + 1), G)[0]
        np.testing.assert_allclose(y[i], alone, rtol=0, atol=1e-5 * float(jnp.abs(alone).max()))


# --- controls --------------------------------------------------------------------------------------------------------


def _record(stage, algorithm=AlphaAlgorithm.ADD, alpha=0.0, isolate=False, blueprint=NAME):
    record = stages.empty(1)
    one = lambda value, dtype=jnp.int32: jnp.full(1, value, dtype)
    return record.replace(
        stage=one(stage), blueprint=one(BLUEPRINTS.index(blueprint)), algorithm=one(algorithm),
        isolate=one(isolate, bool), alpha=record.alpha.replace(alpha=one(alpha, jnp.float32)),
    )  # fmt: skip


@pytest.mark.parametrize("stage", [stage for stage in Stage if stage != Stage.UNKNOWN])
def test_which_stages_act(stage):
    acts = blend.controls(_record(stage, alpha=0.5), KINDS).kind[0] == 1
    assert acts == (stage in (Stage.TRAINING, Stage.BLENDING, Stage.HOLDING, Stage.FOSSILIZED))


def test_controls_of_training_and_blending():
    one = lambda *args, **kwargs: jax.tree.map(lambda leaf: leaf[0].item(), blend.controls(*args, **kwargs))
    training = one(_record(Stage.TRAINING, AlphaAlgorithm.GATE), KINDS)
    assert (training.mode, training.alpha, training.isolate) == (blend.STRAIGHT_THROUGH, 0, True)
    # an override blends, also in TRAINING and also at 0
    forced = one(_record(Stage.TRAINING, AlphaAlgorithm.GATE), KINDS, jnp.zeros(1))
    assert (forced.mode, forced.alpha, forced.isolate) == (blend.GATE, 0, False)
    kept = one(_record(Stage.BLENDING, AlphaAlgorithm.MULTIPLY, 0.25), KINDS, jnp.array([jnp.nan]))
    assert (kept.mode, kept.alpha, kept.isolate) == (blend.MULTIPLY, 0.25, False)
    isolated = one(_record(Stage.HOLDING, AlphaAlgorithm.ADD, 1.0, isolate=True), KINDS)
    assert (isolated.mode, isolated.alpha, isolated.isolate) == (blend.ADD, 1, True)
    # a seed of a kind that this run never offers does nothing
    assert one(_record(Stage.BLENDING, alpha=0.5, blueprint="norm"), KINDS).kind == 0


# --- gate ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "hidden", "size"), [(8, 8, 81), (32, 8, 273), (64, 16, 1057)])
def test_gate_size(width, hidden, size):
    """C m + m + m + 1 with m = max(8, C // 4)."""
    assert blend.gate_hidden(width) == hidden
    gate = blend.gate_init(jax.random.key(0), width)
    assert gate.shape == (blend.gate_size(width),) == (size,)
    assert float(jnp.abs(gate[: width * hidden]).max()) <= width**-0.5
    assert float(jnp.abs(gate[-hidden - 1 :]).max()) <= hidden**-0.5


def test_gate_value():
    """Two channels of means 1 and 3, hidden width 1: relu(2*1 - 1*3 + 2) = 1, sigmoid(1.5*1 - 1) = 0.62246."""
    gate = jnp.array([2.0, -1.0, 2.0, 1.5, -1.0])
    x = jnp.stack([jnp.ones((2, 2, 3)), jnp.full((2, 2, 3), 3.0)])
    np.testing.assert_allclose(blend.gate_value(gate, x, layers.IMAGES), np.full(3, 0.622459), rtol=1e-5)
