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
from esper_jax.env import evaluation, host_training
from esper_jax.lifecycle import stages
from esper_jax.network import blueprints, cnn, seed_bank
from esper_jax.network import model as networks
from esper_jax.network.model import Model
from esper_jax.types import BLUEPRINTS, Stage

INCUBATOR = 1
METRIC_BATCHES = 10  # the reference's training metrics look at so many of the batches that they are offered

is_cnn = lambda case: "start/host/classifier.weight" in case


@functools.cache
def _common():
    """What the CNN cases share: data, their configuration, and zeros of the shape of the first seed and gate.

    The zeros stand in where a case has no seed or no gate, so that all cases share a program.
    """
    given = golden.cases("train_functions")["common"]
    images = {key: jnp.asarray(given[key].swapaxes(-3, -2).swapaxes(-2, -1)) for key in ("train_x", "val_x")}
    labels = {key: jnp.asarray(given[key], jnp.int32) for key in ("train_y", "val_y")}
    absent = {}
    for part in ("seed", "gate"):
        found = (golden.sub(case, f"start/{part}") for case in golden.cases("train_functions").values() if is_cnn(case))
        absent[part] = {name: np.zeros_like(value) for name, value in next(filter(None, found), {}).items()}
    return given | images | labels | {"absent": absent}


def _seed(case, when):
    """Parameters of seed and gate, zeros for what is not there, and the seed's blueprint."""
    seed, gate = (golden.sub(case, f"{when}/{part}") or _common()["absent"][part] for part in ("seed", "gate"))
    return seed, gate, torch.CNN.blueprint_of(seed)


def _model(case, when):
    """Host and slot at `start`, `final` or `final_cleared`."""
    host = golden.sub(case, f"{when}/host")
    cfg = torch.host_config(host, [f"r0c{_common()['config/slot_block']}"])
    seed, gate, blueprint = _seed(case, when)
    return Model(
        torch.host_vars(host, cfg), (torch.CNN.seed_vars(blueprint, seed, gate, cfg.slot_widths[0], (blueprint,)),)
    )


def _state(case):
    meta = golden.sub(case, "meta")
    if meta["stage"] < Stage.GERMINATED:
        return stages.empty(1)
    blueprint = BLUEPRINTS.index(_seed(case, "start")[2])
    return torch.slot_state([meta["stage"]], [blueprint], [meta["algorithm"]], [meta["alpha"]], [True])


def _config(meta) -> TrainingConfig:
    common = _common()
    of = lambda name: float(common[f"config/{name}"])
    clip = None if np.isnan(meta["max_grad_norm"]) else float(meta["max_grad_norm"])
    return TrainingConfig(
        batch_size=common["train_y"].shape[1], host_lr=of("lr"), seed_lr=of("lr"), momentum=of("momentum"),
        host_weight_decay=of("host_weight_decay"), clip_norm=clip, clip_scope="joint",
        # to seeds that are no fossils the flag says nothing
        train_fossilised=bool(meta["stage"] == Stage.FOSSILIZED and meta["has_seed_optimizer"]),
        telemetry_stride=int(meta["telemetry_stride"]), tile_pixels=0,
    )  # fmt: skip


@functools.cache
def _epoch(cfg):
    def run(model, state, batches):
        fetch = lambda batch: batch
        model, _, metrics = host_training.train_epoch(model, host_training.init(model, cfg), state, batches, fetch, cfg)
        return model, metrics, host_training.record_gradients(state, metrics, cnn.param_count(model.host)).metrics

    return jax.jit(run)


@golden.each_case("train_functions", where=is_cnn)
def test_train(case):
    """Normal, incubator and blended training: one function; the lifecycle record says which it is."""
    meta, common = golden.sub(case, "meta"), _common()
    batches = common["train_x"], common["train_y"]
    model, metrics, recorded = _epoch(_config(meta))(_model(case, "start"), _state(case), batches)
    # nobody clears a fossil's gradients there; `cleared` is the same run with them cleared at every batch
    final = "final_cleared" if any(key.startswith("final_cleared") for key in case) else "final"
    torch.assert_close(model, _model(case, final), final, absolute=1e-5)
    clipped_pile = "clip_norm_before_cleared" in case
    same = slice(2 if clipped_pile else None)  # the pile enters the second update, which the third loss sees
    golden.close(metrics.batch_losses[same], case["train_loss_per_batch"][same], "train_loss_per_batch", atol=5e-5)
    np.testing.assert_allclose(metrics.loss, metrics.batch_losses.mean(), rtol=1e-6)
    norms = case["clip_norm_before_cleared" if clipped_pile else "clip_norm_before"]
    if norms.size:
        golden.close(metrics.clip_norms, norms, "clip_norm_before", atol=5e-5)
    if meta["function"] == INCUBATOR:
        ratio, norm_average, seed_params, host_params = case["telemetry"]
        width, blueprint = model.seeds[0].width, _seed(case, "start")[2]
        golden.close(blueprints.CNN[blueprint].param_count(width), seed_params, "seed parameters")
        golden.close(cnn.param_count(model.host), host_params, "host parameters")
        golden.close(recorded.gradient_ratio[0], ratio, "gradient ratio", atol=5e-5)
        # of a single sample, which enters the reference's mean from 0 with weight 0.1
        if meta["telemetry_stride"] >= len(common["train_y"]):
            golden.close(0.1 * recorded.gradient_norm[0], norm_average, "gradient norm average", atol=5e-5)


_evaluate = jax.jit(
    lambda *given, tile_pixels: evaluation.evaluate(*given, lambda x: x, tile_pixels=tile_pixels),
    static_argnames="tile_pixels",
)


@golden.each_case("train_functions", where=is_cnn)
def test_metrics(case):
    """Validation and training metrics, per-class accuracy and the attribution of the one slot, of the trained model."""
    common, state, model = _common(), _state(case), _model(case, "final")
    _, batch_size, height, width, _ = common["train_x"].shape
    sizes = common["val_batch_sizes"]
    close = functools.partial(golden.close, atol=5e-5)
    evaluate = lambda state, x, y: _evaluate(model, state, x, y, tile_pixels=batch_size * height * width)
    # The reference averages the means of its batches, of which the last is shorter; `evaluate` weights every image the
    # same. So its loss is compared batch by batch, and ours must be their weighted mean.
    edges = np.cumsum([0, *sizes])
    batches = [(common["val_x"][a:b], common["val_y"][a:b]) for a, b in zip(edges, edges[1:], strict=False)]
    batch_losses = lambda state: np.array([evaluate(state, *batch).loss for batch in batches])
    val_loss, val_accuracy, train_loss, train_accuracy = case["metrics"]

    whole = evaluate(state, common["val_x"], common["val_y"])
    own_losses = batch_losses(state)
    close(own_losses.mean(), val_loss, "validation loss")
    np.testing.assert_allclose(whole.loss, own_losses @ sizes / sizes.sum(), rtol=1e-5)
    close(whole.accuracy, val_accuracy, "validation accuracy")
    close(whole.per_class, case["per_class"], "per_class")
    np.testing.assert_array_equal(
        whole.per_class_valid, np.bincount(common["val_y"], minlength=len(case["per_class"])) > 0
    )

    train = [evaluate(state, x, y) for x, y in zip(common["train_x"], common["train_y"], strict=True)]
    looked_at = [train[k] for k in common["metric_train_batches"][:METRIC_BATCHES]]
    close(np.mean([result.loss for result in looked_at]), train_loss, "training loss")
    close(np.mean([result.accuracy for result in looked_at]), train_accuracy, "training accuracy")

    if "attribution" in case:
        on, off, difference, on_loss, off_loss = case["attribution"]
        close(whole.table, [off, on], "accuracy with the slot off and on")
        close(whole.table[1] - whole.table[0], difference, "attribution")
        close(own_losses.mean(), on_loss, "loss with the slot on")
        close(batch_losses(stages.empty(1)).mean(), off_loss, "loss with the slot off")


@pytest.mark.parametrize("group", ["host", "seed"])
@golden.each_case("sgd")
def test_sgd(case, group):
    """Every step of either optimiser; an absent gradient holds parameter and momentum, as in `train_batch`."""
    of = golden.sub(case, "config")
    limit = None if np.isnan(of["max_grad_norm"]) else float(of["max_grad_norm"])
    lr, momentum, decay = float(of["lr"]), float(of["momentum"]), float(of["host_weight_decay"])
    assert of["seed_weight_decay"] == 0  # a seed has none here
    cfg = TrainingConfig(host_lr=lr, seed_lr=lr, momentum=momentum, host_weight_decay=decay, clip_norm=limit)
    optimiser = {"host": host_training.host_optimiser, "seed": host_training.seed_optimiser}[group](cfg)
    present_in_steps = case["grad_present"][:, ["host", "seed"].index(group)].astype(bool)

    params = {name: jnp.asarray(value) for name, value in golden.sub(case, f"{group}/start").items()}
    names = list(params)
    state = optimiser.init(params)
    for step, flags in enumerate(present_in_steps):
        present = dict(zip(names, flags, strict=True))
        grads = {name: jnp.where(present[name], case[f"{group}/grad/{name}"][step], 0) for name in names}
        norm = optax.tree.norm(grads)
        expected = case["grad_norm_before_clip"][step, ["host", "seed"].index(group)]
        golden.close(norm, expected, f"{group} norm", atol=1e-5)
        factor = host_training.clip_factor(norm, limit)
        clipped = {name: factor * g for name, g in grads.items()}
        updates, new_state = optimiser.update(clipped, state, params)
        new_params = optax.apply_updates(params, updates)

        def hold(path, new, old, present=present):
            return new if present[path[-1].key] else old

        params = jax.tree_util.tree_map_with_path(hold, new_params, params)
        state = jax.tree_util.tree_map_with_path(hold, new_state, state)
        trace = optax.tree.get(state, "trace")
        for name in names:
            golden.close(params[name], case[f"{group}/params/{name}"][step], f"{group} {name}", atol=1e-5)
            golden.close(trace[name], case[f"{group}/momentum/{name}"][step], f"{group} {name} momentum", atol=1e-5)


# --- intended differences --------------------------------------------------------------------------------------------

HOST, BLUEPRINT = HostConfig(base_channels=4, slots=("r0c1",)), "conv_light"
BATCH, IMAGE_SIZE, CLASSES = 16, 8, 10
CLIP = 0.1  # below every gradient norm here
SLOT_STAGES = [Stage.TRAINING, Stage.BLENDING, Stage.FOSSILIZED]


@functools.cache
def _batch():
    """A model, images and labels, and one step on them under our own defaults: separate clipping, fossilised seeds
    train, nothing isolated after TRAINING."""

    def draw(key):
        host_key, seed_key, x_key, y_key = jax.random.split(key, 4)
        model = networks.init(host_key, HOST, blueprints=(BLUEPRINT,), outputs=CLASSES)
        seed = model.seeds[0]
        drawn = blueprints.CNN[BLUEPRINT].init(seed_key, seed.width)
        model = model.replace(seeds=(seed.replace(params=seed_bank.pack(drawn, seed.params.size)),))
        x = jax.random.normal(x_key, (BATCH, IMAGE_SIZE, IMAGE_SIZE, 3))
        return model, x, jax.random.randint(y_key, (BATCH,), 0, CLASSES)

    cfg = TrainingConfig(batch_size=BATCH, clip_norm=CLIP, tile_pixels=0)
    run = lambda model, momentum, state, x, y: host_training.train_batch(model, momentum, state, x, y, cfg)
    return *jax.jit(draw)(jax.random.key(0)), jax.jit(run), cfg


def _one_batch(state, momentum=0.0):
    model, x, labels, run, cfg = _batch()
    start = jax.tree.map(lambda leaf: jnp.full_like(leaf, momentum), host_training.init(model, cfg))
    return model, start, run(model, start, state, x, labels)


def _blending(stage=Stage.BLENDING, **alpha):
    state = torch.slot_state([stage], [BLUEPRINTS.index(BLUEPRINT)], [1], [0.5], [False])
    return state.replace(
        alpha=state.alpha.replace(**{name: jnp.full(1, value, jnp.int32) for name, value in alpha.items()})
    )


@pytest.mark.parametrize("stage", SLOT_STAGES)
def test_seeds_train_in_every_stage(stage):
    """A fossil too; host and seed are clipped each to norm c, so a first step is lr * g * min(1, c / |g|)."""
    model, _, (new, momentum, grads, metrics) = _one_batch(_blending(stage))
    seed_norm, host_norm = optax.tree.norm(grads.seeds), optax.tree.norm(grads.host)
    assert min(seed_norm, host_norm) > CLIP  # or the budgets could not be told apart
    np.testing.assert_allclose(metrics["norm"], jnp.hypot(seed_norm, host_norm), rtol=1e-5)
    step = 0.01 * grads.seeds[0].params * CLIP / seed_norm
    np.testing.assert_allclose(new.seeds[0].params, model.seeds[0].params - step, rtol=0, atol=1e-6)
    kernel, g = model.host.params.kernel, grads.host.kernel * CLIP / host_norm
    np.testing.assert_allclose(new.host.params.kernel, kernel - 0.01 * (g + 5e-4 * kernel), rtol=0, atol=1e-6)


def test_a_seed_that_is_blended_out_is_held():
    """Parameters and momentum stay bitwise; the host goes on training through it."""
    model, start, (new, momentum, grads, _) = _one_batch(_blending(mode=2), momentum=0.5)
    jax.tree.map(np.testing.assert_array_equal, (new.seeds, momentum.seeds), (model.seeds, start.seeds))
    assert (grads.host.blocks[0].kernel != 0).all()
    _, _, (moved, *_) = _one_batch(_blending(mode=1), momentum=0.5)
    assert (moved.seeds[0].params != model.seeds[0].params).all()


def test_isolation_changes_what_is_upstream_only():
    """After TRAINING the seed's input carries gradient here; `isolate_after_training` is the reference's rule."""
    joint = _one_batch(_blending())[2][2].host
    isolated = _one_batch(_blending().replace(isolate=jnp.ones(1, bool)))[2][2].host
    assert (joint.blocks[1].kernel != isolated.blocks[1].kernel).any()
    # the block behind the slot and the read-out see the same features and gradients
    jax.tree.map(np.testing.assert_array_equal, (joint.blocks[2], joint.kernel), (isolated.blocks[2], isolated.kernel))
