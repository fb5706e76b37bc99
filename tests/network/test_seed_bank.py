"""Packed parameters, germination, and the switch that must equal `lax.switch` without running absent branches."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from esper_jax.network import blueprints, seed_bank
from esper_jax.types import BLUEPRINTS

WIDTH = 8
NAMES = ("norm", "conv_light", "attention")
KINDS = seed_bank.table(NAMES, blueprints.CNN)


# --- packed parameters -----------------------------------------------------------------------------------------------


def test_table_and_kinds():
    """Number 0 is noop, also where it is named; a blueprint that a slot cannot hold counts as none."""
    assert seed_bank.table(("norm", "noop", "conv_light"), blueprints.CNN) == tuple(
        blueprints.CNN[name] for name in ("noop", "norm", "conv_light")
    )
    given = jnp.array([-1, *(BLUEPRINTS.index(name) for name in ("noop", "attention", "norm", "conv_light", "mlp"))])
    np.testing.assert_array_equal(seed_bank.kind_of(given, KINDS), [0, 0, 3, 1, 2, 0])
    np.testing.assert_array_equal(seed_bank.param_counts(KINDS, WIDTH), [0, 17, 592, 40])
    assert seed_bank.packed_size(KINDS, WIDTH) == 592


@pytest.mark.parametrize("name", blueprints.CNN)
def test_pack_unpack(name):
    """Parameters lie one after the other in the order of the spec; what follows is zero."""
    blueprint = blueprints.CNN[name]
    size = blueprint.param_count(WIDTH)
    params = {key: jnp.full(p.shape, i + 1.0) for i, (key, p) in enumerate(blueprint.spec(WIDTH).items())}
    vector = seed_bank.pack(params, 1200)
    assert vector.shape == (1200,)
    np.testing.assert_array_equal(vector[size:], 0)
    assert (np.diff(vector[:size]) >= 0).all()
    again = seed_bank.unpack(blueprint, WIDTH, vector)
    assert list(again) == list(params)
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_germinate():
    """Every tensor is drawn in its range (or constant), all kinds by one function; the rest of the vector is zero."""
    kinds = seed_bank.table(tuple(blueprints.CNN), blueprints.CNN)
    draw = jax.jit(lambda key, kind: seed_bank.germinate(key, kinds, 16, kind))
    for number, blueprint in enumerate(kinds):
        vector = draw(jax.random.key(number), jnp.int32(number))
        assert vector.shape == (4672,)  # conv_heavy: 18 * 256 + 4 * 16
        np.testing.assert_array_equal(vector[blueprint.param_count(16) :], 0)
        params = seed_bank.unpack(blueprint, 16, vector)
        for name, initial in blueprint.spec(16).items():
            leaf = np.asarray(params[name])
            if initial.low == initial.high:
                np.testing.assert_array_equal(leaf, np.float32(initial.low))
                continue
            assert leaf.min() >= initial.low and leaf.max() <= initial.high
            # a uniform draw has the standard deviation (high - low) / sqrt(12), within 5 standard errors of n draws
            spread = (initial.high - initial.low) / np.sqrt(12)
            np.testing.assert_allclose(leaf.std(), spread, rtol=3 / np.sqrt(leaf.size))
            assert abs(leaf.mean()) < 5 * spread / np.sqrt(leaf.size)
    assert (draw(jax.random.key(0), jnp.int32(1)) != draw(jax.random.key(1), jnp.int32(1))).any()


@pytest.mark.parametrize("kind", range(4))
def test_tensor_ids(kind):
    """norm: strength, 8 scales, 8 biases; the rest belongs to the number after the last."""
    ids, tensors = seed_bank.tensor_ids(KINDS, WIDTH, jnp.int32(kind))
    assert tensors == 3
    sizes = [p.size for p in KINDS[kind].spec(WIDTH).values()]
    expected = np.repeat(np.arange(len(sizes)), sizes)
    np.testing.assert_array_equal(ids, np.append(expected, np.full(592 - len(expected), 3)))


# --- dispatch --------------------------------------------------------------------------------------------------------

BRANCHES = [lambda a, x: x, lambda a, x: a * jnp.sin(x), lambda a, x: x * x + a, lambda a, x: x / (1 + a * a)]
ours = seed_bank.switch(BRANCHES)
# the backward pass reads x among what was kept, not among the operands
differentiable = seed_bank.differentiable_switch(
    BRANCHES,
    [lambda a, x, branch=branch: (branch(a, x), x) for branch in BRANCHES],
    [lambda g, x, a, _, branch=branch: jax.vjp(branch, a, x)[1](g) for branch in BRANCHES],
    fixed=0,
)
library = lambda index, *args: lax.switch(index, BRANCHES, *args)


def _loss(run):
    return lambda index, a, x: jnp.sum(jnp.cos(run(index, a, x)))


@pytest.fixture(scope="module", params=[1, 4])
def compiled(request):
    """Values and gradients of ten elements, under `vmap` here, one or four in a block, and one at a time by the
    library."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(seed_bank.BLOCKS, "cpu", request.param)
        yield _compiled()


def _compiled():
    values = jax.vmap(ours)
    gradient = lambda run: jax.value_and_grad(_loss(run), argnums=(1, 2))
    return {
        "values": jax.jit(values),
        "expected_values": jax.jit(lambda *args: lax.map(lambda one: library(*one), args)),
        "gradients": jax.jit(jax.vmap(gradient(differentiable))),
        "expected_gradients": jax.jit(lambda *args: lax.map(lambda one: gradient(library)(*one), args)),
    }


@pytest.mark.parametrize(
    "index",
    [
        [0, 1, 2, 3, 0, 1, 2, 3, 0, 1],
        [2] * 10,  # one branch takes everybody
        [3, 0, 0, 0, 0, 0, 0, 0, 0, 3],  # 2 and 8 of 10, two branches absent
        [1, 3, 3, 1, 3, 3, 3, 1, 3, 1],  # a whole block of four, and one and a half
    ],
)
def test_switch_batched(compiled, index):
    rng = np.random.default_rng(0)
    args = (
        jnp.array(index),
        jnp.asarray(rng.normal(size=10), jnp.float32),
        jnp.asarray(rng.normal(size=(10, 5)), jnp.float32),
    )
    for name in ("values", "gradients"):
        got, wanted = compiled[name](*args), compiled[f"expected_{name}"](*args)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), got, wanted)


@pytest.mark.parametrize("index", range(4))
def test_switch_unbatched(index):
    args = jnp.int32(index), jnp.float32(0.7), jnp.array([-1.0, 0.2, 3.0])
    np.testing.assert_allclose(ours(*args), library(*args), rtol=1e-6)
    both = [jax.grad(_loss(run), argnums=(1, 2))(*args) for run in (differentiable, library)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), *both)


def test_unbatched_index_and_operands_are_spread():
    """vmap over x alone: index and a are the same for all."""
    x = jnp.arange(6.0).reshape(3, 2)
    got = jax.vmap(ours, (None, None, 0))(jnp.int32(2), jnp.float32(0.5), x)
    np.testing.assert_array_equal(got, x * x + 0.5)


@pytest.mark.parametrize(("block", "runs_of_2"), [(1, 6), (4, 8), (8, 8)])
def test_absent_branches_do_not_run(monkeypatch, block, runs_of_2):
    """Callbacks count the runs of each branch: the first one for all 8, the third for its 6 elements in whole blocks
    (of four: two of them), and the others not at all."""
    monkeypatch.setitem(seed_bank.BLOCKS, "cpu", block)
    runs = collections.Counter()

    def counting(number):
        def count(x):
            runs[number] += 1
            return x

        def branch(x):
            return jax.pure_callback(count, jax.ShapeDtypeStruct((), jnp.float32), x, vmap_method="sequential") + number

        return branch

    run = jax.jit(jax.vmap(seed_bank.switch([counting(number) for number in range(4)])))
    out = run(jnp.array([2, 0, 2, 2, 0, 2, 2, 2]), jnp.zeros(8))
    np.testing.assert_array_equal(out, [2, 0, 2, 2, 0, 2, 2, 2])
    assert runs == {0: 8, 2: runs_of_2}


def test_a_gpu_computes_several_at_a_time(monkeypatch):
    """Loops of blocks are as long as they have to be: 6 elements are one block of 8, or six of one."""
    lengths = []
    monkeypatch.setitem(seed_bank.BLOCKS, "cpu", 1)
    body = lambda rows: lengths.append(rows.shape[0]) or jnp.ones(rows.shape[0])
    for backend, block in (("cpu", 1), ("gpu", 8), ("tpu", 8)):
        monkeypatch.setattr(seed_bank.jax, "default_backend", lambda backend=backend: backend)
        out = seed_bank.in_blocks(body, jnp.zeros(20), jnp.arange(20)[::-1], jnp.int32(3), jnp.int32(6))
        # from the end: the fourth last to the ninth last
        np.testing.assert_array_equal(np.flatnonzero(out), range(11, 17))
        assert set(lengths) == {block}
        lengths.clear()
