"""The batched path, as it is compiled: what chunks of environments cost whatever has grown in them. A guard."""

import functools

import jax
import numpy as np
import pytest
import tiny

from esper_jax import make_env
from esper_jax.env import evaluation
from esper_jax.env.environment import Grown
from esper_jax.network import seed_bank
from esper_jax.run import compilation, estimate

CHUNK = 16


@functools.cache
def reports(chunk):
    """The traced report of environments, `chunk` at a time."""
    env = make_env(tiny.CONFIG, tiny.dataset())
    one = jax.eval_shape(lambda key: Grown.of(env.init(key)), jax.random.key(0))
    many = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((chunk, *leaf.shape), leaf.dtype), one)
    return jax.jit(jax.vmap(env.report)).trace(many) if chunk > 1 else jax.jit(env.report).trace(one)


def fixed(traced):
    """Operations that are always there; a loop over what has grown counts once."""
    return estimate.flops(traced.jaxpr.jaxpr, min)


@pytest.mark.parametrize("block", [1, 8])
def test_a_chunk_of_empty_networks_costs_what_they_cost_one_by_one(monkeypatch, block):
    """One forward of each, and for each loop of seeds or configurations one block, which is not run for them."""
    monkeypatch.setitem(seed_bank.BLOCKS, "cpu", block)
    reports.cache_clear()
    alone, together = fixed(reports(1)), fixed(reports(CHUNK))
    assert CHUNK * alone <= together <= (CHUNK + 2.5 * block) * alone
    reports.cache_clear()


def test_what_is_compiled_stays_small():
    """Loops, branches and scratch space of the batched report of two slots and three kinds of seeds. A body for every
    size that a group can have, as there once was, would be four times as many."""
    compiled = reports(CHUNK).lower().compile()
    text = compiled.as_text()
    # of tiles; of rows before each of two blocks and the read-out; of two kinds in each of two slots, and what
    # reductions, sorts and convolutions become
    assert text.count(" while(") <= 12 and text.count(" conditional(") <= 4
    alone = compilation.program_bytes(reports(1).lower().compile())
    assert compilation.program_bytes(compiled) <= 1.3 * CHUNK * alone


def test_the_largest_tile_of_an_evaluation(monkeypatch):
    """Without a limit in pixels, a split is cut into tiles of at most so many examples; the numbers are the same."""
    env_of = lambda: make_env(tiny.CONFIG.replace(**{"training.tile_pixels": 0}), tiny.dataset())
    state = Grown.of(env_of().init(jax.random.key(0)))
    whole = jax.jit(env_of().report)
    monkeypatch.setattr(evaluation, "LARGEST_TILE", 5)
    cut = jax.jit(env_of().report)
    a, b = whole(state), cut(state)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), a, b)
    assert a.accuracy == b.accuracy and a.loss != 0
