"""The reference's trainer functions and optimisers against the one training and evaluation path of this project."""

import functools

import golden
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch_layout as torch

from esper_jax.config import HostConfig, TrainingConfig
from esper_jax.env import evaluation, training
from esper_jax.lifecycle import stages
from esper_jax.network import cnn
from esper_jax.network.morphogenetic import Model
from esper_jax.types import Stage

HOST = HostConfig(base_channels=4, slots=("r0c1",))
WIDTH, NAMES, CONV_LIGHT = 8, ("conv_light",), 1
INCUBATOR = 1
# An absent gate is a zero vector of the size of the file's gates (hidden width 2), so that all cases share a program.
NO_GATE = {"gate.0.weight": (2, WIDTH), "gate.0.bias": (2,), "gate.2.weight": (1, 2), "gate.2.bias": (1,)}
NO_SEED = {"enhance.conv.weight": (8, 8, 3, 3), "enhance.gn.weight": (8,), "enhance.gn.bias": (8,)}


def _model(case, when):
    """Host and slot at `start`, `final` or `final_cleared`; zeros for what is not there."""
    parts = {"seed": golden.sub(case, f"{when}/seed"), "gate": golden.sub(case, f"{when}/gate")}
    for part, shapes in (("seed", NO_SEED), ("gate", NO_GATE)):
        parts[part] = parts[part] or {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    seed = torch.seed_vars("conv_light", parts["seed"], parts["gate"], WIDTH, NAMES)
    return Model(torch.host_vars(golden.sub(case, f"{when}/host"), HOST), (seed,))


def _state(meta):
    if meta["stage"] == 0:
        return stages.empty(1)
    return torch.slot_state([meta["stage"]], [CONV_LIGHT], [meta["algorithm"]], [meta["alpha"]], [True])


@functools.cache
def _common():
    given = golden.cases("train_functions")["common"]
    assert (given["config/base_channels"], given["config/n_blocks"], given["config/slot_block"]) == (4, 3, 1)
    images = {key: jnp.asarray(given[key].swapaxes(-3, -2).swapaxes(-2, -1)) for key in ("train_x", "val_x")}
    labels = {key: jnp.asarray(given[key], jnp.int32) for key in ("train_y", "val_y")}
    return images | labels | {key: given[key] for key in ("val_batch_sizes", "metric_train_batches")}


def _config(meta) -> TrainingConfig:
    clip = None if np.isnan(meta["max_grad_norm"]) else float(meta["max_grad_norm"])
    # the file's fossilised seeds have no optimiser; to others the flag says nothing
    assert meta["stage"] != Stage.FOSSILIZED or not meta["has_seed_optimizer"]
    return TrainingConfig(
        batch_size=16, clip_norm=clip, clip_scope="joint", train_fossilised=False,
        telemetry_stride=int(meta["telemetry_stride"]), tile_pixels=0,
    )  # fmt: skip


@functools.cache
def _epoch(cfg):
    def run(model, state, batches):
        fetch = lambda batch: batch
        model, _, metrics = training.train_epoch(model, training.init(model, cfg), state, batches, fetch, cfg)
        return model, metrics, training.record_gradients(state, metrics, cnn.param_count(model.host)).metrics

    return jax.jit(run)


is_cnn = lambda case: "start/host/classifier.weight" in case


@golden.each_case("train_functions", where=is_cnn)
def test_train(case):
    """Normal, incubator and blended training: one function; the lifecycle record says which it is."""
    meta, common = golden.sub(case, "meta"), _common()
    start = _model(case, "start")
    model, metrics, recorded = _epoch(_config(meta))(start, _state(meta), (common["train_x"], common["train_y"]))
    # nobody clears a fossil's gradients there; `cleared` is the same run with them cleared at every batch
    cleared = any(key.startswith("final_cleared") for key in case)
    torch.assert_close(model, _model(case, "final_cleared" if cleared else "final"), relative=0, absolute=1e-5)
    clipped_pile = "clip_norm_before_cleared" in case
    same = 2 if clipped_pile else 4  # the pile enters the second update, which the third loss sees
    np.testing.assert_allclose(metrics.batch_losses[:same], case["train_loss_per_batch"][:same], rtol=0, atol=5e-5)
    np.testing.assert_allclose(metrics.loss, metrics.batch_losses.mean(), rtol=1e-6)
    norms = case["clip_norm_before_cleared" if clipped_pile else "clip_norm_before"]
    if norms.size:
        np.testing.assert_allclose(metrics.clip_norms, norms, rtol=1e-4)
    if meta["function"] == INCUBATOR:
        ratio, norm_average, seed_params, host_params = case["telemetry"]
        assert (seed_params, host_params) == (9 * 8 * 8 + 2 * 8, cnn.param_count(model.host))
        np.testing.assert_allclose(recorded.gradient_ratio[0], ratio, rtol=1e-4)
        if meta["telemetry_stride"] == 10:  # one sample, which enters the reference's mean from 0 with weight 0.1
            np.testing.assert_allclose(0.1 * recorded.gradient_norm[0], norm_average, rtol=1e-4)


@functools.cache
def _evaluate():
    return jax.jit(lambda *given: evaluation.evaluate(*given, lambda x: x, tile_pixels=16 * 32 * 32))


@golden.each_case("train_functions", where=is_cnn)
def test_metrics(case):
    """Validation and training metrics, per-class accuracy and the attribution of the one slot, of the trained model."""
    common, state, model = _common(), _state(golden.sub(case, "meta")), _model(case, "final")
    sizes = common["val_batch_sizes"]
    evaluate = lambda state, x, y: _evaluate()(model, state, x, y)
    # The reference averages the means of its batches, 16, 16 and 7 images; `evaluate` weights every image the same. So
    # its loss is compared batch by batch, and ours must be their weighted mean.
    edges = np.cumsum([0, *sizes])
    batches = [(common["val_x"][a:b], common["val_y"][a:b]) for a, b in zip(edges, edges[1:], strict=False)]
    batch_losses = lambda state: np.array([evaluate(state, *batch).loss for batch in batches])
    val_loss, val_accuracy, train_loss, train_accuracy = case["metrics"]

    whole = evaluate(state, common["val_x"], common["val_y"])
    own_losses = batch_losses(state)
    np.testing.assert_allclose(own_losses.mean(), val_loss, rtol=0, atol=5e-5)
    np.testing.assert_allclose(whole.loss, own_losses @ sizes / sizes.sum(), rtol=1e-5)
    np.testing.assert_allclose(whole.accuracy, val_accuracy, rtol=1e-5)
    np.testing.assert_allclose(whole.per_class, case["per_class"], rtol=1e-5)
    np.testing.assert_array_equal(whole.per_class_valid, np.bincount(common["val_y"], minlength=10) > 0)

    train = [evaluate(state, x, y) for x, y in zip(common["train_x"], common["train_y"], strict=True)]
    first_ten = [train[k] for k in common["metric_train_batches"][:10]]
    np.testing.assert_allclose(np.mean([result.loss for result in first_ten]), train_loss, rtol=0, atol=5e-5)
    np.testing.assert_allclose(np.mean([result.accuracy for result in first_ten]), train_accuracy, rtol=1e-5)

    if "attribution" in case:
        on, off, difference, on_loss, off_loss = case["attribution"]
        np.testing.assert_allclose(whole.table, [off, on], rtol=1e-5)
        np.testing.assert_allclose(whole.table[1] - whole.table[0], difference, rtol=1e-4)
        np.testing.assert_allclose(own_losses.mean(), on_loss, rtol=0, atol=5e-5)
        np.testing.assert_allclose(batch_losses(stages.empty(1)).mean(), off_loss, rtol=0, atol=5e-5)


@pytest.mark.parametrize("group", ["host", "seed"])
@golden.each_case("sgd")
def test_sgd(case, group):
    """Six steps of either optimiser; an absent gradient holds parameter and momentum, as in `train_batch`."""
    limit = None if np.isnan(case["config/max_grad_norm"]) else float(case["config/max_grad_norm"])
    cfg = TrainingConfig(clip_norm=limit)
    assert (cfg.host_lr, cfg.seed_lr, cfg.momentum) == (case["config/lr"],) * 2 + (case["config/momentum"],)
    assert (cfg.host_weight_decay, 0) == (case["config/host_weight_decay"], case["config/seed_weight_decay"])
    optimiser = {"host": training.host_optimiser, "seed": training.seed_optimiser}[group](cfg)
    column = ["host", "seed"].index(group)
    names = ("conv", "bias", "lin")

    params = {name: jnp.asarray(case[f"{group}/start/{name}"]) for name in names}
    state = optimiser.init(params)
    for step in range(6):
        present = dict(zip(names, case["grad_present"][step, column].astype(bool), strict=True))
        grads = {name: jnp.where(present[name], case[f"{group}/grad/{name}"][step], 0) for name in names}
        norm = optax.tree.norm(grads)
        np.testing.assert_allclose(norm, case["grad_norm_before_clip"][step, column], rtol=1e-5)
        factor = training.clip_factor(norm, limit)
        clipped = {name: factor * g for name, g in grads.items()}
        updates, new_state = optimiser.update(clipped, state, params)
        new_params = optax.apply_updates(params, updates)

        def hold(path, new, old, present=present):
            return new if present[path[-1].key] else old

        params = jax.tree_util.tree_map_with_path(hold, new_params, params)
        state = jax.tree_util.tree_map_with_path(hold, new_state, state)
        momentum = optax.tree.get(state, "trace")
        for name in names:
            np.testing.assert_allclose(params[name], case[f"{group}/params/{name}"][step], rtol=0, atol=1e-5)
            np.testing.assert_allclose(momentum[name], case[f"{group}/momentum/{name}"][step], rtol=0, atol=1e-5)


# --- intended differences --------------------------------------------------------------------------------------------

SLOT_STAGES = [Stage.TRAINING, Stage.BLENDING, Stage.FOSSILIZED]


@functools.cache
def _batch():
    """Our own defaults: separate clipping, fossilised seeds train, nothing isolated after TRAINING."""
    cfg = TrainingConfig(batch_size=16, tile_pixels=0)
    run = lambda model, momentum, state, x, y: training.train_batch(model, momentum, state, x, y, cfg)
    return jax.jit(run), cfg


def _one_batch(state, momentum=0.0):
    case = golden.cases("train_functions")["case5"]
    (run, cfg), common = _batch(), _common()
    model = _model(case, "start")
    start = jax.tree.map(lambda leaf: jnp.full_like(leaf, momentum), training.init(model, cfg))
    return model, start, run(model, start, state, common["train_x"][0], common["train_y"][0])


def _blending(stage=Stage.BLENDING, **alpha):
    state = torch.slot_state([stage], [CONV_LIGHT], [1], [0.5], [False])
    return state.replace(
        alpha=state.alpha.replace(**{name: jnp.full(1, value, jnp.int32) for name, value in alpha.items()})
    )


needs_file = pytest.mark.skipif(
    not golden.cases("train_functions"), reason=f"no train_functions.npz in {golden.FOLDER}"
)


@needs_file
@pytest.mark.parametrize("stage", SLOT_STAGES)
def test_seeds_train_in_every_stage(stage):
    """A fossil too; host and seed are clipped each to norm 1.0, so a first step is lr * g * min(1, 1 / |g|)."""
    model, _, (new, momentum, grads, metrics) = _one_batch(_blending(stage))
    seed_norm, host_norm = optax.tree.norm(grads.seeds), optax.tree.norm(grads.host)
    assert float(host_norm) > 1  # or the budgets could not be told apart
    np.testing.assert_allclose(metrics["norm"], jnp.hypot(seed_norm, host_norm), rtol=1e-5)
    step = 0.01 * grads.seeds[0].params * min(1, 1 / float(seed_norm))
    np.testing.assert_allclose(new.seeds[0].params, model.seeds[0].params - step, rtol=0, atol=1e-6)
    kernel, g = model.host.params.kernel, grads.host.kernel / host_norm
    np.testing.assert_allclose(new.host.params.kernel, kernel - 0.01 * (g + 5e-4 * kernel), rtol=0, atol=1e-6)


@needs_file
def test_a_seed_that_is_blended_out_is_held():
    """Parameters and momentum stay bitwise; the host goes on training through it."""
    model, start, (new, momentum, grads, _) = _one_batch(_blending(mode=2), momentum=0.5)
    jax.tree.map(np.testing.assert_array_equal, (new.seeds, momentum.seeds), (model.seeds, start.seeds))
    assert (grads.host.blocks[0].kernel != 0).all()
    _, _, (moved, *_) = _one_batch(_blending(mode=1), momentum=0.5)
    assert (moved.seeds[0].params != model.seeds[0].params).all()


@needs_file
def test_isolation_changes_what_is_upstream_only():
    """After TRAINING the seed's input carries gradient here; `isolate_after_training` is the reference's rule."""
    joint = _one_batch(_blending())[2][2].host
    isolated = _one_batch(_blending().replace(isolate=jnp.ones(1, bool)))[2][2].host
    assert (joint.blocks[1].kernel != isolated.blocks[1].kernel).any()
    # the block behind the slot and the read-out see the same features and gradients
    jax.tree.map(np.testing.assert_array_equal, (joint.blocks[2], joint.kernel), (isolated.blocks[2], isolated.kernel))
