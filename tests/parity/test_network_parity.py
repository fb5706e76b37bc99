"""Host, seeds, slots and alpha configurations against the reference's values and gradients (CNN cases)."""

import functools
import json

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_layout as torch

from esper_jax.config import HostConfig
from esper_jax.env import evaluation, training
from esper_jax.network import blueprints, cnn, morphogenetic, slots
from esper_jax.network.layers import from_tiles
from esper_jax.network.morphogenetic import Model
from esper_jax.types import BLUEPRINTS


def _run_host(vars, x, labels, train):
    """Loss, and logits, running statistics and the features after every block."""
    boundaries = {}

    def record(name):
        def slot(tiles):
            boundaries[name] = from_tiles(tiles)
            return tiles

        return slot

    functions = {i: record(name) for i, name in zip(vars.cfg.slot_blocks, vars.cfg.slot_names, strict=True)}
    # six images in three tiles: statistics and gradients span them
    tile_pixels = 2 * x.shape[1] * x.shape[2]
    logits, new = cnn.apply(vars, x, train=train, slots=functions, tile_pixels=tile_pixels)
    return training.loss_and_accuracy(logits, labels)[0], (logits, new.stats, boundaries)


@golden.each_case("cnn_host")
def test_host(case):
    given = golden.sub(case, "config")
    fields = ("n_blocks", "base_channels", "pool_layers", "kernel_size")
    cfg = HostConfig(**{name: int(given[name]) for name in fields})
    theirs = golden.sub(case, "param")
    vars = torch.host_vars(theirs | golden.sub(case, "buffer"), cfg)
    x, labels = torch.images(case["x"]), jnp.asarray(case["labels"], jnp.int32)
    after = golden.sub(case, "buffer_after")
    boundaries = lambda when: {
        name: torch.images(value) for name, value in golden.sub(case, f"{when}/boundary").items()
    }

    assert cnn.param_count(vars) == case["n_params"]

    def objective(params, x):
        return _run_host(vars.replace(params=params), x, labels, True)

    run = jax.jit(jax.value_and_grad(objective, argnums=(0, 1), has_aux=True))
    (loss, (logits, stats, recorded)), (grads, grad_x) = run(vars.params, x)
    torch.assert_close(logits, case["train/logits"], relative=0, absolute=1e-4)
    torch.assert_close(loss, case["train/loss"], relative=0, absolute=1e-5)
    torch.assert_close(stats, torch.host_stats(after, cfg), relative=1e-5, absolute=1e-6)
    torch.assert_close(recorded, boundaries("train"), relative=0, absolute=1e-4)
    torch.assert_close(grads, torch.host_params(golden.sub(case, "train/grad"), cfg), relative=3e-4)
    torch.assert_close(grad_x, torch.images(case["train/grad_x"]), relative=3e-4)

    evaluate = jax.jit(lambda vars: _run_host(vars, x, labels, False))
    torch.assert_close(evaluate(vars)[1][0], case["eval_before/logits"], relative=0, absolute=1e-4)
    loss, (logits, _, recorded) = evaluate(vars.replace(stats=torch.host_stats(after, cfg)))
    torch.assert_close(logits, case["eval_after/logits"], relative=0, absolute=1e-4)
    torch.assert_close(loss, case["eval_after/loss"], relative=0, absolute=1e-5)
    torch.assert_close(recorded, boundaries("eval_after"), relative=0, absolute=1e-4)


@golden.each_case("blueprints_cnn")
def test_blueprint(case):
    name, width = BLUEPRINTS[int(case["meta/blueprint"])], int(case["meta/width"])
    blueprint = blueprints.CNN[name]
    params = torch.seed_params(name, golden.sub(case, "param"))
    assert blueprint.param_count(width) == case["meta/n_params"]
    assert {key: p.shape for key, p in blueprint.spec(width).items()} == {key: p.shape for key, p in params.items()}

    x, g = torch.images(case["x"]), torch.images(case["g"])

    @jax.jit
    def run(params, x, g):
        y, pullback = jax.vjp(blueprint.apply, params, x)
        return y, *pullback(g)

    y, grads, grad_x = run(params, x, g)
    torch.assert_close(y, torch.images(case["y"]), relative=2e-6, absolute=1e-5)
    torch.assert_close(grads, torch.seed_params(name, golden.sub(case, "grad")), relative=2e-5)
    torch.assert_close(grad_x, torch.images(case["grad_x"]), relative=2e-5)


def test_parameter_counts():
    """All widths that the reference's table lists."""
    path = golden.FOLDER / "blueprint_table.json"
    if not path.is_file():
        pytest.skip(f"no {path}")
    table = json.loads(path.read_text())["cnn"]["blueprints"]
    assert set(table) <= set(blueprints.CNN)
    for name, row in table.items():
        ours = {width: blueprints.CNN[name].param_count(int(width)) for width in row["n_params"]}
        assert ours == row["n_params"], name


@functools.cache
def _slot_vjp():
    def run(control, seed, h, g):
        to_tiles = lambda images: images.transpose(3, 1, 2, 0)[None]
        y, pullback = jax.vjp(lambda seed, h: from_tiles(slots.apply_slot(control, seed, to_tiles(h))), seed, h)
        return y, *pullback(g)

    return jax.jit(run)


@golden.each_case("slot_forward", where=lambda case: case["meta/topology"] == 0)
def test_slot(case):
    """Every stage and algorithm under the reference's isolation; the older gate's width is read from its size."""
    meta = golden.sub(case, "meta")
    width, names = int(meta["width"]), ("conv_light",)
    state = torch.slot_state(
        [meta["stage"]], [1], [meta["algorithm"]], [meta["alpha"]], [meta["isolate_gradients"]]
    )  # 1 is conv_light
    control = jax.tree.map(lambda leaf: leaf[0], slots.controls(state, names))
    seed = torch.seed_vars("conv_light", golden.sub(case, "seed"), golden.sub(case, "gate"), width, names)
    hidden = int(meta["gate_hidden"]) or slots.gate_hidden(width)
    assert seed.gate.size == width * hidden + 2 * hidden + 1

    h, g = torch.images(case["h"]), torch.images(case["g"])
    y, grad_seed, grad_h = _slot_vjp()(control, seed, h, g)
    torch.assert_close(y, torch.images(case["y"]), relative=0, absolute=1e-5)
    torch.assert_close(grad_h, torch.images(case["grad_h"]), relative=3e-4)
    # where the reference has no gate, its parameters get no gradient here
    wanted = torch.seed_vars("conv_light", golden.sub(case, "grad_seed"), golden.sub(case, "grad_gate"), width, names)
    torch.assert_close(grad_seed, wanted, relative=3e-4)


# --- host and slots under alpha configurations -----------------------------------------------------------------------

FUSED_HOST = HostConfig()
FUSED_BLUEPRINTS = ("conv_light", "depthwise", "bottleneck")


def _fused(case):
    host = torch.host_vars(golden.sub(case, "host"), FUSED_HOST)
    seeds, columns = [], []
    for name, width in zip(FUSED_HOST.slot_names, FUSED_HOST.slot_widths, strict=True):
        meta = golden.sub(case, f"meta/{name}")
        blueprint = BLUEPRINTS[int(meta["blueprint"])]
        given = golden.sub(case, f"seed/{name}"), golden.sub(case, f"gate/{name}")
        seeds.append(torch.seed_vars(blueprint, *given, width, FUSED_BLUEPRINTS))
        columns.append([meta[key] for key in ("stage", "blueprint", "algorithm", "alpha")])
    state = torch.slot_state(*zip(*columns, strict=True), [True] * 3)
    return Model(host, tuple(seeds)), state, torch.images(case["x"]), jnp.asarray(case["labels"], jnp.int32)


@functools.cache
def _fused_forward():
    def run(model, state, x, labels, alpha):
        one = lambda alpha: morphogenetic.forward(model, state, x, alpha)[0]
        logits = jax.lax.map(one, alpha)
        return logits, *jax.lax.map(lambda row: training.loss_and_accuracy(row, labels), logits)

    return jax.jit(run)


@golden.each_case("fused_forward", where=lambda case: case["x"].ndim == 4)
def test_configurations(case):
    model, state, x, labels = _fused(case)
    alpha = jnp.asarray(np.where(case["on"] < 0, np.nan, case["alpha"]), jnp.float32)
    assert (np.isnan(case["alpha"]) == (case["on"] < 0)).all()
    count = len(alpha)
    # the last row stands for the ordinary forward pass; both cases share one program of nine rows
    alpha = jnp.concatenate([alpha, jnp.full((9 - count, 3), jnp.nan)])
    logits, loss, correct = _fused_forward()(model, state, x, labels, alpha)
    torch.assert_close(logits[:count], case["logits"], relative=0, absolute=5e-4)
    torch.assert_close(logits[-1], case["forward_logits"], relative=0, absolute=5e-4)
    np.testing.assert_allclose(loss[:count], case["loss"], rtol=0, atol=5e-5)
    np.testing.assert_array_equal(100 * correct[:count] / len(labels), case["accuracy"])


@functools.cache
def _fused_evaluate():
    # 5 images a tile: 16 images fill three tiles and one image of the fourth
    run = lambda *given: evaluation.evaluate(*given, lambda x: x, tile_pixels=5 * 32 * 32)
    return jax.jit(run)


@golden.each_case("fused_forward", where=lambda case: case["x"].ndim == 4)
def test_evaluation_table(case):
    """The table of `evaluate` holds the file's accuracies; a slot in TRAINING (not overridden there) splits nothing."""
    model, state, x, labels = _fused(case)
    result = _fused_evaluate()(model, state, x, labels)
    overridden = (case["on"] >= 0).all(0)
    assert overridden.sum() == np.log2(len(case["on"]))
    for row in range(8):
        pattern = (row >> np.arange(3)) & 1
        match = (case["on"][:, overridden] == pattern[overridden]).all(1)
        np.testing.assert_allclose(result.table[row], case["accuracy"][match], rtol=1e-6)
    np.testing.assert_allclose(result.accuracy, case["accuracy"][-1], rtol=1e-6)
    np.testing.assert_allclose(result.loss, case["loss"][-1], rtol=0, atol=5e-5)
