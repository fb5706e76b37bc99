"""The transformer host and its modules: sizes, what a newborn predicts, causality, dropout, and that all can learn."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from learning import check_every_tensor_learns, slot_gradient

from esper_jax.config import TransformerConfig
from esper_jax.lifecycle import stages
from esper_jax.network import blend, blueprints, sequences, transformer
from esper_jax.network import model as networks
from esper_jax.network.blueprints import Blueprint
from esper_jax.types import BLUEPRINTS, AlphaAlgorithm, Stage

CFG = TransformerConfig(width=16, n_heads=2, n_layers=4, n_segments=2, block_size=12, dropout=0.0)
V, L = 29, 10
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, V, (6, L)), jnp.int32)
MODULES = tuple(name for name in blueprints.TRANSFORMER if name != "noop")


@functools.cache
def host(**changes):
    cfg = TransformerConfig(**{**vars(CFG), **changes})
    return jax.jit(lambda key: transformer.init(key, cfg, vocabulary=V))(jax.random.key(0))


@functools.partial(jax.jit, static_argnames=("train", "tile_pixels"))
def logits_of(host, x, key=None, *, train=False, tile_pixels=0):
    return transformer.apply(host, x, train=train, tile_pixels=tile_pixels, key=key)[0]


def test_sizes_are_those_of_the_reference():
    # V d + block d + L (12 d^2 + 13 d) + 2 d, the tied embedding once: 30,044,544 of the defaults with GPT-2's tokens
    shape = jax.eval_shape(lambda key: transformer.init(key, TransformerConfig(), vocabulary=50_257), jax.random.key(0))
    assert transformer.param_count(shape) == 30_044_544
    assert transformer.param_count(host()) == V * 16 + 12 * 16 + 4 * (12 * 256 + 13 * 16) + 32
    assert CFG.slot_segments == (0, 1) and CFG.slot_names == ("r0c0", "r0c1") and CFG.slot_widths == (16, 16)
    assert TransformerConfig(slots=("r0c2", "r0c0")).slot_segments == (0, 2)


def test_a_newborn_guesses_uniformly():
    """Within 5 % of ln V, for embeddings of deviation 0.02; the reference's of 1 would say 284 nats of its default."""
    cfg = TransformerConfig(width=128, n_heads=4, n_layers=2, n_segments=1, block_size=64, dropout=0.0)
    vars = transformer.init(jax.random.key(1), cfg, vocabulary=256)
    x = jnp.asarray(np.random.default_rng(1).integers(0, 256, (4, 65)), jnp.int32)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits_of(vars, x[:, :-1]), x[:, 1:]).mean()
    assert abs(loss / math.log(256) - 1) < 0.05
    for table in (vars.params.tokens, vars.params.positions):
        np.testing.assert_allclose(table.std(), 0.02, rtol=0.05)
    # linear layers: uniform +-1/sqrt(fan in), which has a deviation of 1/sqrt(3 fan in)
    layers = vars.params.layers
    for (kernel, bias), fan_in in ((layers.qkv, 128), (layers.mlp_in, 128), (layers.mlp_out, 512)):
        assert abs(kernel).max() <= fan_in**-0.5 and abs(bias).max() <= fan_in**-0.5
        np.testing.assert_allclose(kernel.std(), (3 * fan_in) ** -0.5, rtol=0.05)
    assert not np.array_equal(layers.qkv[0][0], layers.qkv[0][1])  # every layer is drawn by itself


def test_no_token_sees_the_next_ones():
    """Another token at place 6 changes the logits there and behind, and none before."""
    other = TOKENS.at[:, 6].set((TOKENS[:, 6] + 1) % V)
    moved = np.abs(logits_of(host(), other) - logits_of(host(), TOKENS)).max((0, 2)) > 0
    assert moved.tolist() == [False] * 6 + [True] * 4


@functools.cache
def forward():
    return jax.jit(lambda model, state, x: networks.forward(model, state, x)[0])


@pytest.mark.parametrize("algorithm", list(AlphaAlgorithm)[1:], ids=lambda algorithm: algorithm.name)
@pytest.mark.parametrize("stage", [Stage.BLENDING, Stage.FOSSILIZED], ids=lambda stage: stage.name)
@pytest.mark.parametrize("name", MODULES)
def test_no_token_sees_the_next_ones_through_a_seed(name, stage, algorithm):
    """Whatever sits in a slot, and however it is blended: the reference's gate would let them all be seen."""
    new = networks.init(jax.random.key(0), CFG, blueprints=MODULES, example=(L,), outputs=V)
    filled = [jnp.asarray(np.random.default_rng(s).normal(0, 0.3, seed.params.shape), jnp.float32)
              for s, seed in enumerate(new.seeds)]  # fmt: skip
    gates = [blend.gate_init(jax.random.key(s), CFG.width) for s in range(len(new.seeds))]
    model = new.replace(
        seeds=tuple(seed.replace(params=p, gate=g) for seed, p, g in zip(new.seeds, filled, gates, strict=True))
    )
    state, both = stages.empty(2), lambda value: jnp.full(2, int(value), jnp.int32)
    state = state.replace(
        stage=both(stage), blueprint=both(BLUEPRINTS.index(name)), algorithm=both(algorithm),
        has_gate=both(algorithm == AlphaAlgorithm.GATE) == 1, alpha=state.alpha.replace(alpha=jnp.full(2, 0.8)),
    )  # fmt: skip
    logits = lambda x: forward()(model, state, x)
    other = TOKENS.at[:, 6].set((TOKENS[:, 6] + 1) % V)
    moved = np.abs(logits(other) - logits(TOKENS)).max((0, 2)) > 0
    assert moved.tolist() == [False] * 6 + [True] * 4
    assert (logits(TOKENS) != logits_of(new.host, TOKENS)).any()  # the seeds are there


def test_a_causal_gate_is_opened_by_the_mean_of_the_tokens_so_far():
    """Place 2 of a sequence has the gate that the reference's whole-sequence rule gives the first three tokens."""
    x = jnp.asarray(np.random.default_rng(3).normal(size=(4, L, 16)), jnp.float32)
    gate = blend.gate_init(jax.random.key(1), 16)
    causal = blend.gate_value(gate, x, sequences.SEQUENCES._replace(causal=True)).reshape(4, L)
    np.testing.assert_allclose(causal[:, 2], blend.gate_value(gate, x[:, :3], sequences.SEQUENCES), rtol=1e-5)
    np.testing.assert_allclose(causal[:, -1], blend.gate_value(gate, x, sequences.SEQUENCES), rtol=1e-5)
    reference = TransformerConfig(**{**vars(CFG), "gate": "reference"})
    assert [networks.kinds(cfg)[1].layout.causal for cfg in (CFG, reference)] == [True, False]


def test_tiles_change_nothing():
    """6 sequences of 10 tokens in tiles of 2, 3 and all; in training too."""
    whole = logits_of(host(), TOKENS)
    for tile_pixels in (20, 35):
        np.testing.assert_allclose(logits_of(host(), TOKENS, tile_pixels=tile_pixels), whole, rtol=0, atol=1e-6)
        trained = logits_of(host(), TOKENS, train=True, tile_pixels=tile_pixels)
        np.testing.assert_allclose(trained, whole, rtol=0, atol=1e-6)


def test_dropout_is_by_key_and_in_training_alone():
    vars = host(dropout=0.5)
    one, same, other = (logits_of(vars, TOKENS, jax.random.key(k), train=True) for k in (1, 1, 2))
    without = logits_of(vars, TOKENS)
    np.testing.assert_array_equal(one, same)
    assert (one != other).any() and (one != without).any()
    np.testing.assert_array_equal(logits_of(vars, TOKENS, jax.random.key(1)), without)
    np.testing.assert_array_equal(without, logits_of(host(), TOKENS))
    # about half is 0, the rest twice as large: the mean stays
    x = sequences.dropout(jax.random.key(0), jnp.ones(10_000), 0.5)
    assert set(np.unique(x)) == {0.0, 2.0} and abs(x.mean() - 1) < 0.05


def test_attention_with_dropout_of_nothing_is_the_library_s():
    """The product with its own weights, which dropout needs, against `dot_product_attention`."""
    rng = np.random.default_rng(2)
    x, qkv, bias = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((3, 7, 8), (8, 24), (24,)))
    tiny = sequences.causal_attention(x, qkv, bias, 2, rate=1e-9, key=jax.random.key(0))
    np.testing.assert_allclose(tiny, sequences.causal_attention(x, qkv, bias, 2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_heads": 3}, "TransformerConfig.n_heads = 3: must be a divisor of width = 16"),
        ({"n_segments": 3}, "TransformerConfig.n_segments = 3: must be a divisor of n_layers = 4"),
        ({"dropout": 1.0}, r"TransformerConfig.dropout = 1.0: must be in \[0, 1\)"),
        (
            {"slots": ("r0c2",)},
            r"TransformerConfig.slots = \('r0c2',\): must be different boundaries out of r0c0, r0c1",
        ),
    ],
)
def test_what_cannot_be_built_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**{**vars(CFG), **changes})


def test_what_cannot_be_read_is_refused():
    with pytest.raises(ValueError, match="TransformerConfig.block_size = 12: must be at least 13, the sequences'"):
        logits_of(host(), jnp.zeros((1, 13), jnp.int32))
    with pytest.raises(ValueError, match="block_size = 12: must be at least 13"):
        networks.check(CFG, (13,))
    with pytest.raises(ValueError, match="attention at width 6: must be a multiple of its 4 heads"):
        blueprints.TRANSFORMER["attention"].spec(6)


# --- modules ---------------------------------------------------------------------------------------------------------

# slots_and_hosts 2.4, at d = 384
COUNTS = {
    "norm": 769, "lora": 6144, "lora_large": 24_576, "attention": 591_360, "flex_attention": 591_360,
    "mlp_small": 590_976, "mlp": 1_181_568,
}  # fmt: skip


def test_param_count():
    assert {name: blueprints.TRANSFORMER[name].param_count(384) for name in MODULES} == COUNTS


WIDTH = 16


def features(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("name", blueprints.TRANSFORMER)
def test_all_are_the_identity_at_birth(name):
    module, x = blueprints.TRANSFORMER[name], features(0, 2, 5, WIDTH)
    np.testing.assert_array_equal(module.apply(module.init(jax.random.key(1), WIDTH), x), x)
    module.check(WIDTH, "bfloat16")


@functools.cache
def _slot():
    return slot_gradient(blueprints.TRANSFORMER, WIDTH, features(2, 6, 5, WIDTH)[None], features(3, 6, 5, WIDTH)[None])


@pytest.mark.parametrize("mode", ["STRAIGHT_THROUGH", "ADD", "MULTIPLY", "GATE"])
@pytest.mark.parametrize("name", MODULES)
def test_every_tensor_learns(name, mode):
    check_every_tensor_learns(_slot(), blueprints.TRANSFORMER, name, WIDTH, mode)


def test_a_module_of_one_s_own():
    """x (1 + w) on `[B, L, d]`, in a host that holds it in its first slot."""
    own = Blueprint.from_functions(
        "scale", lambda key, d: {"w": jnp.full(d, 0.5)}, lambda p, x: x * (1 + p["w"]), sequences.SEQUENCES
    )
    own.check(WIDTH)
    new = networks.init(jax.random.key(0), CFG, blueprints=("norm", own), example=(L,), outputs=V)
    assert new.kinds[2] == own._replace(layout=own.layout._replace(causal=True))
    assert new.seeds[0].params.shape == (33,)  # norm: 2 * 16 + 1
    np.testing.assert_allclose(own.apply(own.init(jax.random.key(0), WIDTH), jnp.ones((2, 3, WIDTH))), 1.5)
