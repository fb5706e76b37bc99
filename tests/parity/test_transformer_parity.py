"""The transformer host, its seeds, slots, alpha configurations and training against the reference's values."""

import functools

import golden
import jax
import jax.numpy as jnp
import modules
import numpy as np
import torch_layout as torch

from esper_jax.config import TrainingConfig
from esper_jax.env import attribution, evaluation, host_training
from esper_jax.lifecycle import stages
from esper_jax.metric import perplexity
from esper_jax.network import blend, transformer
from esper_jax.network import model as networks
from esper_jax.network.model import Model
from esper_jax.types import BLUEPRINTS

is_text = lambda case: "start/host/tok_emb.weight" in case
integers = lambda values: jnp.asarray(values, jnp.int32)


def host_vars(case, params):
    cfg = torch.transformer_config(golden.sub(case, "config"))
    return transformer.HostVars(torch.transformer_params(params, cfg), cfg)


def config_of(given, segments: int, heads: int = 4):
    """Shape of the host with these parameters; the number of heads they do not say."""
    block_size, width = given["pos_emb.weight"].shape
    n_layers = sum(name.endswith("ln1.weight") for name in given)
    return torch.TransformerConfig(width, heads, n_layers, segments, block_size, dropout=0.0)


@golden.each_case("transformer_host")
def test_host(case):
    vars, tokens, labels = (
        host_vars(case, golden.sub(case, "param")),
        integers(case["tokens"]),
        integers(case["labels"]),
    )
    vocabulary, boundaries = int(case["config/vocab_size"]), {}
    assert vars.n_outputs == vocabulary
    # a parameter that is tied counts once
    assert transformer.param_count(vars) == sum(value.size for value in golden.sub(case, "param").values())

    def record(name):
        def slot(tiles):
            boundaries[name] = tiles.reshape(-1, *tiles.shape[2:])
            return tiles

        return slot

    def run(params, train, tile_pixels):
        functions = {i: record(name) for i, name in zip(vars.cfg.slot_segments, vars.cfg.slot_names, strict=True)}
        logits, _ = transformer.apply(
            vars.replace(params=params), tokens, train=train, slots=functions, tile_pixels=tile_pixels
        )
        return host_training.loss_and_accuracy(logits, labels)[0], (logits, dict(boundaries))

    # one sequence in a tile: gradients span the tiles
    for train, tile_pixels in ((True, tokens.shape[1]), (False, 0)):
        compiled = jax.jit(
            jax.value_and_grad(functools.partial(run, train=train, tile_pixels=tile_pixels), has_aux=True)
        )
        (loss, (logits, found)), grads = compiled(vars.params)
        golden.close(logits, case["logits"], "logits", atol=1e-5 + 1e-6 * np.abs(case["logits"]).max())
        golden.close(loss, case["loss"], "loss", atol=1e-5)
        wanted = {name: jnp.asarray(value) for name, value in golden.sub(case, "boundary").items()}
        torch.assert_close(found, wanted, "boundary", absolute=1e-5)
        theirs = torch.transformer_params(golden.sub(case, "grad"), vars.cfg)
        torch.assert_close(grads, theirs, "grad", relative=2e-5)


@golden.each_case("blueprints_transformer")
def test_blueprint(case):
    modules.check_values_and_gradients(torch.TRANSFORMER, case, functools.partial(golden.close, atol=1e-5, rtol=1e-6))


@golden.each_blueprint("transformer")
def test_parameter_counts(case):
    modules.check_parameter_counts(torch.TRANSFORMER, case)


@jax.jit
def _slot_vjp(control, seed, h, g):
    y, pullback = jax.vjp(lambda seed, h: blend.apply_slot(control, seed, h[None])[0], seed, h)
    return y, *pullback(g)


@golden.each_case("slot_forward", where=lambda case: case["meta/topology"] == 1)
def test_slot(case):
    """Every stage and algorithm under the reference's isolation."""
    meta, given = golden.sub(case, "meta"), golden.sub(case, "seed")
    width, blueprint = int(meta["width"]), torch.TRANSFORMER.blueprint_of(given)
    columns = (meta["stage"], BLUEPRINTS.index(blueprint), meta["algorithm"], meta["alpha"], meta["isolate_gradients"])
    state = torch.slot_state(*([value] for value in columns))
    seed = torch.TRANSFORMER.seed_vars(blueprint, given, golden.sub(case, "gate"), width, (blueprint,))
    control = jax.tree.map(lambda leaf: leaf[0], blend.controls(state, seed.kinds))
    y, grad_seed, grad_h = _slot_vjp(control, seed, jnp.asarray(case["h"]), jnp.asarray(case["g"]))
    golden.close(y, case["y"], "y", atol=1e-5)
    torch.assert_close(grad_h, jnp.asarray(case["grad_h"]), "grad_h", relative=3e-4, absolute=5e-5)
    grads = golden.sub(case, "grad_seed"), golden.sub(case, "grad_gate")
    wanted = torch.TRANSFORMER.seed_vars(blueprint, *grads, width, (blueprint,))
    ours, theirs = (torch.TRANSFORMER.unpacked(vars, blueprint) for vars in (grad_seed, wanted))
    torch.assert_close(ours, theirs, "grad", relative=3e-4, absolute=5e-5)


@golden.each_case("fused_forward", where=lambda case: case["x"].ndim == 2)
def test_configurations(case):
    """Every row under overrides, and the table that evaluation measures of shared prefixes."""
    metas = {key.split("/")[1]: golden.sub(case, key.rpartition("/")[0]) for key in case if key.startswith("meta/")}
    host = golden.sub(case, "host")
    cfg = config_of(host, len(metas))
    used = {name: BLUEPRINTS[int(meta["blueprint"])] for name, meta in metas.items()}
    kinds, seeds, columns = tuple(sorted(set(used.values()))), [], []
    for name in cfg.slot_names:
        given = golden.sub(case, f"seed/{name}"), golden.sub(case, f"gate/{name}")
        seeds.append(torch.TRANSFORMER.seed_vars(used[name], *given, cfg.width, kinds))
        columns.append([metas[name][key] for key in ("stage", "blueprint", "algorithm", "alpha")])
    state = torch.slot_state(*zip(*columns, strict=True), [False] * len(seeds))
    model = Model(transformer.HostVars(torch.transformer_params(host, cfg), cfg=cfg), tuple(seeds))
    x, labels = integers(case["x"]), integers(case["labels"])

    run = jax.jit(lambda alpha: networks.forward(model, state, x, alpha)[0])
    for k, row in enumerate(jnp.asarray(case["alpha"], jnp.float32)):
        logits = run(row)
        golden.close(logits, case["logits"][k], f"logits of row {k}", atol=5e-4)
        loss, correct = host_training.loss_and_accuracy(logits, labels)
        golden.close(loss, case["loss"][k], f"loss of row {k}", atol=5e-5)
        golden.close(100 * int(correct) / labels.size, case["accuracy"][k], f"accuracy of row {k}", rtol=1e-6)
    golden.close(run(jnp.full(len(seeds), jnp.nan)), case["forward_logits"], "forward_logits", atol=5e-4)

    # three sequences in a tile, and one that is left over
    measure = jax.jit(lambda: evaluation.evaluate(model, state, x, labels, lambda x: x, tile_pixels=3 * x.shape[1]))
    result = measure()
    for row, pattern in enumerate(attribution.configurations(len(seeds))):
        (match,) = np.flatnonzero((case["on"] == pattern).all(1))
        golden.close(result.table[row], case["accuracy"][match], f"table row {row}", rtol=1e-6)
    golden.close(result.loss, case["loss"][-1], "loss of the model", atol=5e-5)


@golden.each_case("train_functions", where=is_text)
def test_train(case):
    """Normal training of a language model, its validation before and after, and the perplexity."""
    common, clip = golden.cases("train_functions")["common"], float(case["meta/max_grad_norm"])
    of = lambda name: float(common[f"config/{name}"])
    cfg = TrainingConfig(
        host_lr=of("lr"), seed_lr=of("lr"), momentum=of("momentum"), host_weight_decay=of("host_weight_decay"),
        clip_norm=None if np.isnan(clip) else clip, clip_scope="joint", telemetry_stride=1, tile_pixels=0,
    )  # fmt: skip
    given = golden.sub(case, "start/host")
    shape = torch.transformer_config(golden.sub(case, "config")) if "config/n_head" in case else config_of(given, 1)
    empty = networks.init(jax.random.key(0), shape, blueprints=("norm",), example=(16,), outputs=53).seeds
    of_host = lambda params: Model(transformer.HostVars(torch.transformer_params(params, shape), cfg=shape), empty)
    batches = tuple(integers(case[f"train_{name}"]) for name in "xy")
    joined = lambda values: integers(values.reshape(-1, values.shape[-1]))  # batches of equal size, one after the other
    validation = tuple(joined(case[f"val_{name}"]) for name in "xy")
    start, state = of_host(given), stages.empty(1)

    @jax.jit
    def train(model):
        return host_training.train_epoch(model, host_training.init(model, cfg), state, batches, lambda b: b, cfg)

    measure = jax.jit(lambda model: evaluation.evaluate(model, state, *validation, lambda x: x, tile_pixels=0))
    model, _, metrics = train(start)
    torch.assert_close(model, of_host(golden.sub(case, "final/host")), "final", absolute=1e-5)
    golden.close(metrics.batch_losses, case["train_loss_per_batch"], "train_loss_per_batch", atol=5e-5)
    for when, trained, wanted in (("before", start, case["metrics_before"]), ("after", model, case["metrics"])):
        result = measure(trained)
        golden.close(result.loss, wanted[0], f"validation loss {when}", atol=5e-5)
        golden.close(result.accuracy, wanted[1], f"validation accuracy {when}", rtol=1e-6)
        expected = case[f"metrics{'_before' * (when == 'before')}_perplexity"]
        golden.close(perplexity(float(result.loss)), expected, f"perplexity {when}", rtol=5e-5)
