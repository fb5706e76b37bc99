"""Host, seeds, slots and alpha configurations against the reference's values and gradients (CNN cases)."""

import functools

import golden
import jax
import jax.numpy as jnp
import modules
import numpy as np
import torch_layout as torch

from esper_jax.config import HostConfig
from esper_jax.env import attribution, evaluation, host_training
from esper_jax.network import blend, cnn
from esper_jax.network import model as networks
from esper_jax.network.layers import from_tiles
from esper_jax.network.model import Model
from esper_jax.types import BLUEPRINTS


def _run_host(vars, x, labels, train):
    """Loss, and logits, running statistics and the features after every block."""
    boundaries = {}

    def record(name):
        def slot(tiles):
            boundaries[name] = from_tiles(tiles)
            return tiles

        return slot

    functions = {i: record(name) for i, name in zip(vars.cfg.slot_segments, vars.cfg.slot_names, strict=True)}
    # at most two images in a tile: statistics and gradients span the tiles
    tile_pixels = 2 * x.shape[1] * x.shape[2]
    logits, new = cnn.apply(vars, x, train=train, slots=functions, tile_pixels=tile_pixels)
    return host_training.loss_and_accuracy(logits, labels)[0], (logits, new.stats, boundaries)


@golden.each_case("cnn_host")
def test_host(case):
    given = golden.sub(case, "config")
    fields = ("n_blocks", "base_channels", "pool_layers", "kernel_size")
    cfg = HostConfig(**{name: int(given[name]) for name in fields})
    theirs = golden.sub(case, "param")
    vars = torch.host_vars(theirs | golden.sub(case, "buffer"), cfg)
    x, labels = torch.images(case["x"]), jnp.asarray(case["labels"], jnp.int32)
    after = golden.sub(case, "buffer_after")
    forward = functools.partial(torch.assert_close, absolute=1e-4)
    gradient = functools.partial(torch.assert_close, relative=3e-4)

    def check_forward(when, loss, logits, recorded):
        forward(logits, case[f"{when}/logits"], f"{when}/logits")
        forward(loss, case[f"{when}/loss"], f"{when}/loss")
        boundaries = {name: torch.images(value) for name, value in golden.sub(case, f"{when}/boundary").items()}
        forward(recorded, boundaries, f"{when}/boundary")

    golden.close(cnn.param_count(vars), case["n_params"], "n_params")

    def objective(params, x):
        return _run_host(vars.replace(params=params), x, labels, True)

    run = jax.jit(jax.value_and_grad(objective, argnums=(0, 1), has_aux=True))
    (loss, (logits, stats, recorded)), (grads, grad_x) = run(vars.params, x)
    check_forward("train", loss, logits, recorded)
    forward(stats, torch.host_stats(after, cfg), "buffer_after")
    gradient(grads, torch.host_params(golden.sub(case, "train/grad"), cfg), "train/grad")
    gradient(grad_x, torch.images(case["train/grad_x"]), "train/grad_x")

    evaluate = jax.jit(lambda vars: _run_host(vars, x, labels, False))
    forward(evaluate(vars)[1][0], case["eval_before/logits"], "eval_before/logits")
    loss, (logits, _, recorded) = evaluate(vars.replace(stats=torch.host_stats(after, cfg)))
    check_forward("eval_after", loss, logits, recorded)


@golden.each_case("blueprints_cnn")
def test_blueprint(case):
    modules.check_values_and_gradients(torch.CNN, case, functools.partial(torch.assert_close, absolute=1e-5))


@golden.each_blueprint("cnn")
def test_parameter_counts(case):
    modules.check_parameter_counts(torch.CNN, case)


@functools.cache
def _slot_vjp():
    def run(control, seed, h, g):
        to_tiles = lambda images: images.transpose(3, 1, 2, 0)[None]
        y, pullback = jax.vjp(lambda seed, h: from_tiles(blend.apply_slot(control, seed, to_tiles(h))), seed, h)
        return y, *pullback(g)

    return jax.jit(run)


@golden.each_case("slot_forward", where=lambda case: case["meta/topology"] == 0)
def test_slot(case):
    """Every stage and algorithm under the reference's isolation; the older gate's width is read from its size."""
    meta, given = golden.sub(case, "meta"), golden.sub(case, "seed")
    width, blueprint = int(meta["width"]), torch.CNN.blueprint_of(given)
    columns = (meta["stage"], BLUEPRINTS.index(blueprint), meta["algorithm"], meta["alpha"], meta["isolate_gradients"])
    state = torch.slot_state(*([value] for value in columns))
    seed = torch.CNN.seed_vars(blueprint, given, golden.sub(case, "gate"), width, (blueprint,))
    control = jax.tree.map(lambda leaf: leaf[0], blend.controls(state, seed.kinds))
    hidden = int(meta["gate_hidden"]) or blend.gate_hidden(width)
    assert seed.gate.size == width * hidden + 2 * hidden + 1

    h, g = torch.images(case["h"]), torch.images(case["g"])
    y, grad_seed, grad_h = _slot_vjp()(control, seed, h, g)
    torch.assert_close(y, torch.images(case["y"]), "y", absolute=1e-5)
    torch.assert_close(grad_h, torch.images(case["grad_h"]), "grad_h", relative=3e-4, absolute=5e-5)
    # where the reference has no gate, its parameters get no gradient here
    grads = golden.sub(case, "grad_seed"), golden.sub(case, "grad_gate")
    wanted = torch.CNN.seed_vars(blueprint, *grads, width, (blueprint,))
    ours, theirs = torch.CNN.unpacked(grad_seed, blueprint), torch.CNN.unpacked(wanted, blueprint)
    torch.assert_close(ours, theirs, "grad", relative=3e-4, absolute=5e-5)


# --- host and slots under alpha configurations -----------------------------------------------------------------------

each_cnn = golden.each_case("fused_forward", where=lambda case: case["x"].ndim == 4)


def _fused(case):
    metas = {key.split("/")[1]: golden.sub(case, key.rpartition("/")[0]) for key in case if key.startswith("meta/")}
    host = golden.sub(case, "host")
    cfg = torch.host_config(host, metas)
    used = {name: BLUEPRINTS[int(meta["blueprint"])] for name, meta in metas.items()}
    kinds = tuple(sorted(set(used.values())))
    seeds, columns = [], []
    for name, width in zip(cfg.slot_names, cfg.slot_widths, strict=True):
        given = golden.sub(case, f"seed/{name}"), golden.sub(case, f"gate/{name}")
        seeds.append(torch.CNN.seed_vars(used[name], *given, width, kinds))
        columns.append([metas[name][key] for key in ("stage", "blueprint", "algorithm", "alpha")])
    state = torch.slot_state(*zip(*columns, strict=True), [True] * len(seeds))
    model = Model(torch.host_vars(host, cfg), tuple(seeds))
    return model, state, torch.images(case["x"]), jnp.asarray(case["labels"], jnp.int32)


@functools.cache
def _fused_forward():
    def run(model, state, x, labels, alpha):
        logits = networks.forward(model, state, x, alpha)[0]
        return logits, *host_training.loss_and_accuracy(logits, labels)

    return jax.jit(run)


@each_cnn
def test_configurations(case):
    model, state, x, labels = _fused(case)
    alpha = jnp.asarray(case["alpha"], jnp.float32)
    assert (np.isnan(case["alpha"]) == (case["on"] < 0)).all()
    run = lambda alpha: _fused_forward()(model, state, x, labels, alpha)
    for k, row in enumerate(alpha):
        logits, loss, correct = run(row)
        golden.close(logits, case["logits"][k], f"logits of row {k}", atol=5e-4)
        golden.close(loss, case["loss"][k], f"loss of row {k}", atol=5e-5)
        # exact: the relative part is the rounding of a quotient
        golden.close(100 * int(correct) / len(labels), case["accuracy"][k], f"accuracy of row {k}", rtol=1e-6)
    nothing_overridden = jnp.full(len(model.seeds), jnp.nan)
    golden.close(run(nothing_overridden)[0], case["forward_logits"], "forward_logits", atol=5e-4)


_fused_evaluate = jax.jit(
    lambda *given, tile_pixels: evaluation.evaluate(*given, lambda x: x, tile_pixels=tile_pixels),
    static_argnames="tile_pixels",
)


@each_cnn
def test_evaluation_table(case):
    """The table of `evaluate` holds the file's accuracies; a slot in TRAINING (not overridden there) splits nothing."""
    model, state, x, labels = _fused(case)
    images, height, width, _ = x.shape
    # three tiles, and what is left over in a fourth
    result = _fused_evaluate(model, state, x, labels, tile_pixels=max(images // 3, 1) * height * width)
    overridden = (case["on"] >= 0).all(0)
    for row, pattern in enumerate(attribution.configurations(len(model.seeds))):
        match = (case["on"][:, overridden] == pattern[overridden]).all(1)
        assert match.any()
        expected = case["accuracy"][match]
        golden.close(np.broadcast_to(result.table[row], expected.shape), expected, f"table row {row}", rtol=1e-6)
    golden.close(result.accuracy, case["accuracy"][-1], "accuracy of the model", rtol=1e-6)
    golden.close(result.loss, case["loss"][-1], "loss of the model", atol=5e-5)
