"""How fast it is: tables of measured numbers, each the median of repeated runs after a warm-up.

    python -m experiments.throughput [--preset cpu|gpu] [--out FILE.json] [--tables growth evaluation ...] [--repeats N]

    population   training and whole environment epochs for E environments, memory, compile time, the best env_chunk
    growth       an epoch of training with seeds, relative to the bare host that has no slots
    evaluation   all on/off configurations of the slots, relative to one forward pass
    learner      everything that is not host training or evaluation, as a share of a round; host I/O
    roofline     FLOPs and bytes counted from the layers against a measured matrix product and copy
    incumbent    the same host in a plain PyTorch loop, where torch is installed
    precision    what hosts learn in bfloat16, minus what the same hosts learn in float32
    text         language models: training against PyTorch, cost of growth, all configurations
    batched      environments in chunks against one at a time: evaluation, training, compile time, memory

What is compared runs alternately (A B A B ...) and a ratio is taken within each pair, so that a machine that slows
down slows both. `spread` is the distance between the quartiles, `n` the number of runs. Images and labels are random
numbers, since nothing here depends on what they show; but for `precision`, which takes the digits, and on a GPU the
synthetic shapes, in the size of CIFAR-10. Everything runs through the functions of the product; the bare host is a
model without slots.

Axis letters: G rows of episodes (policies and twin), E environments, S slots, K on/off configurations, B images of a
batch, T epochs of an episode.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from rich.console import Console
from rich.table import Table

from esper_jax import data, make_train, presets
from esper_jax.config import (
    Config,
    DataConfig,
    HostConfig,
    LifecycleConfig,
    PPOConfig,
    TextConfig,
    TextDataConfig,
    TrainingConfig,
    TransformerConfig,
)
from esper_jax.control.arms import default_controllers
from esper_jax.env import attribution, evaluation, host_training, observation, reward
from esper_jax.evidence.statistics import mean_interval
from esper_jax.lifecycle import masks
from esper_jax.network import cnn, layers
from esper_jax.network import model as networks
from esper_jax.run import checkpoint, compilation, devices, records
from esper_jax.run.devices import REPLICATED, SHARDED
from esper_jax.train import Metrics, over_environments, round_of
from experiments.throughput import roofline
from experiments.throughput.bench import (
    CLASSES,
    Bench,
    Row,
    Size,
    bare,
    bare_train,
    build,
    describe_device,
    empty,
    env_epoch,
    high_water,
    make_bench,
    mixture,
    peaks,
    random_dataset,
    row,
    train_program,
    uniform,
)

PAUSE = 0.3  # seconds after another process has worked, for its threads to go to sleep


_TINY = Config(
    host=HostConfig(n_blocks=2, base_channels=4, pool_layers=2),
    data=DataConfig(validation_size=24),
    training=TrainingConfig(epochs=3, batches_per_epoch=2, batch_size=8, tile_pixels=256),
    lifecycle=LifecycleConfig(blueprints=("norm", "conv_light")),
    ppo=PPOConfig(hidden_size=8, minibatches=1),
    n_envs=4,
    report_envs=4,
)
_FEW_DIGITS = DataConfig("digits", train_limit=64, test_limit=64)


def _learning(cfg: Config) -> Config:
    """32 paired environments: with their twins, one block of episodes."""
    return cfg.replace(policy_seeds=1, n_envs=32, report_envs=32, env_chunk=min(cfg.env_chunk, 32))


def _language_model(width: int, length: int, batch_size: int) -> TextConfig:
    """Three layers, a slot after each."""
    return presets.text("quick").replace(
        host=TransformerConfig(width=width, n_heads=4, n_layers=3, n_segments=3, block_size=length, dropout=0.0),
        data=TextDataConfig(window=length, validation_windows=64),
        **{"training.batch_size": batch_size, "training.clip_norm": 1.0},
    )


SIZES = {
    "cpu": Size(
        cfg=Config(data=DataConfig(), n_envs=8, report_envs=8), image_size=32, train_images=47_500,
        populations=(1, 4, 16, 64), largest_epoch=4, chunks=(1, 4), images_per_run=16_384,
        growth_envs=4, growth_batches=6, evaluation_envs=2, batched=16, slot_counts=(1, 2, 3, 4),
        matrix=1024, copied=2**25,
        text={"width_32": _language_model(32, 64, 16), "width_128": _language_model(128, 64, 16)},
        learning=_learning(presets.get("quick", "digits")), repeats=7, seconds=20,
    ),
    "gpu": Size(
        cfg=presets.get("full", "cifar10").replace(n_envs=64, report_envs=64), image_size=32, train_images=47_500,
        populations=(1, 4, 16, 64, 256, 1024), largest_epoch=1024, chunks=(16, 64, 256), images_per_run=2**21,
        growth_envs=64, growth_batches=24, evaluation_envs=8, batched=64, slot_counts=(1, 2, 3, 4),
        matrix=8192, copied=2**28,
        text={"width_384": _language_model(384, 256, 32)},
        learning=_learning(presets.get("full", "shapes")), repeats=7, seconds=30,
    ),
    # a minute for the tests: its numbers mean nothing
    "tiny": Size(
        cfg=_TINY,
        image_size=8, train_images=64, populations=(1, 4), largest_epoch=4, chunks=(1,), images_per_run=64,
        growth_envs=4, growth_batches=2, evaluation_envs=2, batched=2, slot_counts=(1, 2),
        matrix=64, copied=1024,
        text={"width_8": _language_model(8, 8, 2)},
        learning=_learning(_TINY.replace(data=_FEW_DIGITS)),
        repeats=1, seconds=1,
    ),
}  # fmt: skip


# --- the tables ------------------------------------------------------------------------------------------------------


def population_table(bench: Bench) -> Iterator[Row]:
    """Population scaling."""
    emit = functools.partial(row, "population")
    t = bench.cfg.training
    trained, epochs = [], []
    for envs in bench.size.populations:
        try:
            batches = min(256, max(1, bench.size.images_per_run // (envs * t.batch_size)))
            images = envs * batches * t.batch_size
            fits = sorted({bench.chunk(envs, chunk) for chunk in bench.size.chunks})
            programs = {chunk: bare_train(bench, envs, batches, chunk) for chunk in fits}
            times = bench.measure({chunk: program.bind(*args) for chunk, (program, args) in programs.items()})
            best = min(fits, key=lambda chunk: np.median(times[chunk]))
            trained.append(emit(f"E{envs}_train_images_per_s", images / times[best], "images/s"))
            yield trained[-1]
            yield emit(f"E{envs}_train_best_chunk", best, f"environments, of {fits}")
            yield emit(f"E{envs}_train_compile_s", programs[best][0].seconds, "s")
            yield emit(f"E{envs}_train_memory", programs[best][0].mebibytes, "MiB (program, per device)")
            if envs <= bench.size.largest_epoch:
                program = env_epoch(bench, envs)
                times = bench.measure(
                    {
                        "empty": program.bind(*bench.epoch_args(empty(bench, envs))),
                        "mixed": program.bind(*bench.epoch_args(mixture(bench, envs))),
                    }
                )
                yield emit(f"E{envs}_empty_env_epochs_per_s", envs / times["empty"], "env-epochs/s")
                epochs.append(emit(f"E{envs}_mixed_env_epochs_per_s", envs / times["mixed"], "env-epochs/s"))
                yield epochs[-1]
                yield emit(f"E{envs}_epoch_chunk", bench.chunk(envs), "environments")
                yield emit(f"E{envs}_epoch_compile_s", program.seconds, "s")
                yield emit(f"E{envs}_epoch_memory", program.mebibytes, "MiB (program, per device)")
            yield emit(f"E{envs}_peak_memory", *high_water())
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            yield Row("population", f"E{envs}", None, "not measured: out of memory", 0, None)
            break
    for name, found in (("bare_train_images_per_s", trained), ("mixed_env_epochs_per_s", epochs)):
        if found:
            yield max(found, key=lambda r: r.value)._replace(name=name)


def growth_table(bench: Bench) -> Iterator[Row]:
    """Cost of growth, relative to the bare host."""
    emit = functools.partial(row, "growth")
    cfg, envs = bench.cfg, bench.size.growth_envs
    n_slots = len(cfg.host.slot_names)
    chunk = bench.chunk(envs)
    alone, alone_args = bare_train(bench, envs, bench.size.growth_batches, chunk)
    indices = alone_args[-1]

    args = lambda states: (bench.dataset, states.model, states.optimiser, states.slots, indices)
    states = {"slots_empty": empty(bench, envs)}
    for name, live in (("conv_light", 1), ("conv_light", n_slots), ("conv_heavy", n_slots)):
        if name in cfg.lifecycle.blueprints:
            states[f"{name}_{live}"] = uniform(bench, envs, name, live)
    states["mixture"] = mixture(bench, envs)
    program = train_program(bench, args(states["slots_empty"]), chunk, cfg.training)
    runs = {"bare": alone.bind(*alone_args)} | {name: program.bind(*args(state)) for name, state in states.items()}
    first, *others = states  # the ratio nearest to 1 has a comparison of its own, for more runs
    for names in ([first], others):
        times = bench.measure({name: runs[name] for name in ("bare", *names)})
        for name in names:
            yield emit(f"{name}_over_bare", times[name] / times["bare"], "ratio")
    yield emit("bare_epoch_images_per_s", indices.size / times["bare"], "images/s")
    flops, bandwidth = (np.median(peak) for peak in peaks(bench))
    itemsize = jnp.dtype(cfg.training.compute_dtype).itemsize
    host = roofline.host(cfg.host, bench.size.image_size, channels=3, classes=CLASSES, itemsize=itemsize, train=True)
    places = roofline.slot_sizes(cfg.host, bench.size.image_size)
    for name, depth in (("conv_light", 1), ("conv_heavy", 2)):
        if name in cfg.lifecycle.blueprints:
            seeds = [roofline.conv_seed(w, s, depth=depth, itemsize=itemsize, train=True) for w, s in places]
            least = lambda layers: roofline.least_seconds(layers, flops, bandwidth)
            predicted = least(host + seeds) / least(host)
            measured = times[f"{name}_{n_slots}"] / times["bare"]
            yield emit(f"{name}_{n_slots}_predicted", predicted, "ratio, from counted FLOPs and bytes")
            yield emit(f"{name}_{n_slots}_over_predicted", measured / predicted, "ratio")


def evaluation_table(bench: Bench) -> Iterator[Row]:
    """Fused evaluation of all K = 2^S configurations, its vmapped form and a Python loop, relative to one forward pass.

    The one pass is of the same network with all its seeds, which are `conv_light`.
    """
    for n_slots in bench.size.slot_counts:
        host = bench.cfg.host
        blocks = max(host.n_blocks, n_slots)
        names = tuple(f"r0c{i}" for i in range(n_slots))
        host = dataclasses.replace(host, n_blocks=blocks, pool_layers=blocks, slots=names)
        cfg = bench.cfg.replace(host=host, **{"lifecycle.blueprints": ("conv_light",)})
        yield from _evaluation_rows(dataclasses.replace(bench, cfg=cfg), n_slots)


def evaluator(bench: Bench, chunk: int) -> Callable:
    """Body of a program that evaluates environments on the validation split under all configurations."""
    t = bench.cfg.training

    def body(dataset, models, records, axis_name):
        split = dataset.validation
        how = {"metric": dataset.metric(split), "tile_pixels": t.tile_pixels, "dtype": t.compute_dtype}
        one = lambda env: evaluation.evaluate(*env, split.inputs, split.labels, dataset.prepare, **how)
        return over_environments(one, (models, records), chunk)

    return body


def _evaluation_rows(
    bench: Bench, n_slots: int, table: str = "evaluation", prefix: str = "", blueprint: str = "conv_light"
) -> Iterator[Row]:
    emit = lambda name, *values: row(table, prefix + name, *values)
    dtype, tile_pixels = bench.cfg.training.compute_dtype, bench.cfg.training.tile_pixels
    envs = bench.size.evaluation_envs
    chunk = bench.chunk(envs)
    override = np.where(
        attribution.configurations(n_slots), np.float32(np.nan), np.float32(0)
    )  # f32[K, S], NaN keeps a slot on

    def correct(env, dataset, alpha):
        split = dataset.validation
        x = dataset.prepare(split.inputs)
        logits, _ = networks.forward(*env, x, alpha, tile_pixels=tile_pixels, dtype=dtype)
        return (logits.argmax(-1) == split.labels).sum()

    def forward(dataset, models, records, alpha, axis_name):
        return over_environments(lambda env: correct(env, dataset, alpha), (models, records), chunk)

    def vmapped(dataset, models, records, alphas, axis_name):
        one = lambda env: jax.vmap(lambda alpha: correct(env, dataset, alpha))(alphas)
        return over_environments(one, (models, records), chunk)

    states = uniform(bench, envs, blueprint, n_slots)
    args = (bench.dataset, states.model, states.slots)
    n, specs = bench.n_devices(envs), (REPLICATED, SHARDED, SHARDED)
    plain = build(forward, n, (*specs, REPLICATED), *args, override[-1])
    each = [plain.bind(*args, alpha) for alpha in override]
    runs = {
        "forward": each[-1],
        "fused": build(evaluator(bench, chunk), n, specs, *args).bind(*args),
        "vmapped": build(vmapped, n, (*specs, REPLICATED), *args, override).bind(*args, override),
        "loop": lambda: [jax.block_until_ready(run()) for run in each],
    }
    times = bench.measure(runs)
    labels, what = bench.dataset.validation.labels, "images" if bench.dataset.classes else "tokens"
    yield emit(f"S{n_slots}_forward_{what}_per_s", envs * labels.size / times["forward"], f"{what}/s")
    for name in ("fused", "vmapped", "loop"):
        yield emit(f"{name}_{2**n_slots}_over_forward", times[name] / times["forward"], "ratio")


def batched_table(bench: Bench) -> Iterator[Row]:
    """Environments in chunks against one at a time, for 8x8 images, by what has grown in them: evaluation of all
    configurations, and training.

    `mixed` has random seeds at random stages, `one` grown network in a chunk of empty ones is what a rule for
    batching must not charge to all, `all` have three blending seeds.
    """
    emit = functools.partial(row, "batched")
    chunk, envs = bench.size.batched, bench.size.batched * jax.device_count()
    cfg = bench.cfg.replace(**{"lifecycle.blueprints": ("norm", "conv_light", "attention"), "training.batch_size": 64})
    small = dataclasses.replace(bench, cfg=cfg, dataset=random_dataset(8, 512, 512))
    full, none = uniform(small, envs, "conv_light", len(cfg.host.slot_names)), empty(small, envs)
    lead = lambda leaf, other: jnp.concatenate([leaf[:1], other[1:]])
    populations = {"empty": none, "one": jax.tree.map(lead, full, none), "mixed": mixture(small, envs), "all": full}

    indices = small.indices(envs, bench.size.growth_batches, cfg.training.batch_size)
    for what in ("evaluation", "training"):
        programs, runs = {}, {}
        for size in (1, chunk):
            if what == "evaluation":
                args = lambda states: (small.dataset, states.model, states.slots)
                programs[size] = build(
                    evaluator(small, size), small.n_devices(envs), (REPLICATED, SHARDED, SHARDED), *args(none)
                )
            else:
                args = lambda states: (small.dataset, states.model, states.optimiser, states.slots, indices)
                programs[size] = train_program(small, args(none), size, cfg.training)
            yield emit(f"{what}_compile_chunk_{size}", programs[size].seconds, "s")
            yield emit(f"{what}_memory_chunk_{size}", programs[size].mebibytes, "MiB (on each device)")
            runs |= {(kind, size): programs[size].bind(*args(states)) for kind, states in populations.items()}
        times = bench.measure(runs)
        for kind in populations:
            for size in (1, chunk):
                emit_ms = 1e3 * times[kind, size] / envs * jax.device_count()
                yield emit(f"{what}_{kind}_chunk_{size}", emit_ms, "ms per environment and device")
            yield emit(f"{what}_{kind}_over_one_at_a_time", times[kind, chunk] / times[kind, 1], "ratio")


def text_table(bench: Bench) -> Iterator[Row]:
    """Language models: training relative to an eager PyTorch loop, cost of growth, all configurations of the slots."""
    for name, cfg in bench.size.text.items():
        small = dataclasses.replace(bench, cfg=cfg, dataset=data.load(cfg.data))
        emit = lambda what, *values, name=name: row("text", f"{name}_{what}", *values)
        envs, batches, t, host = bench.size.growth_envs, bench.size.growth_batches, cfg.training, cfg.host
        chunk, n_slots = small.chunk(envs), len(cfg.host.slot_names)
        alone, alone_args = bare_train(small, envs, batches, chunk)
        args = lambda states, alone_args=alone_args: (
            *(alone_args[0], states.model, states.optimiser, states.slots), alone_args[-1],
        )  # fmt: skip
        states = {"slots_empty": empty(small, envs)}
        states |= {f"{kind}_{n_slots}": uniform(small, envs, kind, n_slots) for kind in ("mlp", "attention")}
        program = train_program(small, args(states["slots_empty"]), chunk, t)
        runs = {"bare": alone.bind(*alone_args)} | {kind: program.bind(*args(state)) for kind, state in states.items()}
        tokens = batches * t.batch_size * cfg.data.window
        with contextlib.ExitStack() as stack:
            if importlib.util.find_spec("torch") is not None:
                settings = {
                    "device": "cuda" if jax.default_backend() == "gpu" else "cpu", "threads": devices.usable_cpus(),
                    "vocabulary": small.dataset.outputs, "width": host.width, "heads": host.n_heads,
                    "layers": host.n_layers, "length": cfg.data.window, "batch_size": t.batch_size,
                    "train_batches": batches,
                }  # fmt: skip
                runs["torch"] = functools.partial(stack.enter_context(_processes(settings, 1)), "train")
            times = small.measure(runs)
        ours = envs * tokens / times["bare"]
        yield emit("bare_train_tokens_per_s", ours, "tokens/s")
        if "torch" in times:
            yield emit("bare_train_over_torch_eager", ours * times["torch"] / tokens, "ratio")
        else:
            yield Row("text", f"{name}_bare_train_over_torch_eager", None, "not measured: no torch", 0, None)
        for kind in states:
            yield emit(f"{kind}_over_bare", times[kind] / times["bare"], "ratio")
        yield from _evaluation_rows(small, n_slots, "text", f"{name}_", "mlp")


def learner_table(bench: Bench) -> Iterator[Row]:
    """Learner share: what a round spends outside host training and evaluation, and host I/O.

    `outside_host_share` times a round of the same length whose hosts train on one batch of two tiny images and
    validate on two. Controller, lifecycle, governor, reward, observation, masks and PPO update are all in it, and the
    little host work that is left counts against us. The whole round is the update plus G x E x T environment epochs of
    a random mixture.
    """
    emit = functools.partial(row, "learner")
    cfg, envs = bench.cfg, bench.cfg.n_envs
    horizon, t = cfg.training.epochs, cfg.training
    n_devices = bench.n_devices(envs)
    mesh = devices.make_mesh(n_devices)
    brief = cfg.replace(
        devices=n_devices,
        env_chunk=bench.chunk(envs),
        **{"training.batches_per_epoch": 1, "training.batch_size": 2},
    )
    train = make_train(brief, random_dataset(8, 16, 2), controllers={})
    run = train.init(jax.random.key(0))
    env_key, learn_keys = devices.replicate(train.programs.keys(jax.random.key(5), run.round), mesh)
    who = round_of(brief, train.controllers)
    rollout = lambda: train.programs.rollout(train.dataset, run, env_key, who)
    rows, _ = rollout()
    learn = lambda: train.programs.learn(*devices.on_one((learn_keys, run, train.programs.gather(rows))))
    twin_loss = jnp.broadcast_to(rows.info.val_loss[-1], rows.info.val_loss.shape)
    episodes = devices.split((who.policy, reward.Course.of(rows.info), twin_loss), mesh)
    pay = functools.partial(train.programs.pay, run.hypers, *episodes)
    runs = {"rollout": rollout, "learn": learn, "reward": pay} | _pieces(bench, mixture(bench, who.env.size))

    # batches and augmentation belong to the hosts' training; their share is told all the same
    def feed(dataset, keys, axis_name):
        def one(key):
            batches = data.epoch_batches(key, dataset.train.labels.size, t.batches_per_epoch, t.batch_size)

            def step(total, batch):
                images, labels = data.train_batch(key, dataset, batch)
                return total + images.sum() + labels.sum(), None

            return lax.scan(step, jnp.float32(0), batches)[0]

        return over_environments(one, keys, bench.chunk(sample))

    sample = max(e for e in bench.size.populations if e <= min(bench.size.largest_epoch, envs))
    args = bench.epoch_args(mixture(bench, sample))
    runs["epoch"] = env_epoch(bench, sample).bind(*args)
    runs["feed"] = build(feed, bench.n_devices(sample), (REPLICATED, SHARDED), *args[:2]).bind(*args[:2])

    with tempfile.TemporaryDirectory() as folder:
        log = records.RoundLog(Path(folder) / "rounds")
        new_run, played, learned = learn()

        def write() -> float:
            start = time.perf_counter()
            log.write(0, records.round_arrays(Metrics(played, learned)))
            checkpoint.save(Path(folder) / "checkpoints", 0, new_run, {})
            return time.perf_counter() - start

        times = bench.measure(runs | {"io": write})

    decisions = who.env.size * horizon
    whole = times["epoch"] * decisions / sample + times["learn"]
    share = "share of a round"
    yield emit("round_s", whole, f"s ({who.env.size} episodes x {horizon} epochs)")
    yield emit("outside_host_share", (times["rollout"] + times["learn"]) / whole, share)
    yield emit("ppo_update_share", times["learn"] / whole, share)
    for name in ("observation", "masks", "reward"):
        yield emit(f"{name}_share", times[name] / whole, share)
    yield emit("batches_and_augmentation_share", times["feed"] * decisions / sample / whole, share)
    yield emit("host_io_share", times["io"] / (whole + times["io"]), "share of wall time")


def _pieces(bench: Bench, states) -> dict[str, Callable]:
    """Observation and masks of every decision of a round, each on its own, for states `[environments]`."""
    cfg, horizon = bench.cfg, bench.cfg.training.epochs
    scale = jnp.float32(horizon), jnp.float32(bench.dataset.metric(bench.dataset.validation).span)
    pieces = {
        "observation": lambda s: observation.encode(
            observation.Inputs(s.signals, s.slots, s.last_op, s.last_success, *scale), cfg.action_space
        ),
        "masks": lambda s: masks.legal(s.slots, cfg.lifecycle),
    }
    small = states.replace(model=None, optimiser=None, snapshot=None, governor=None, evaluation=None)
    decisions = jax.tree.map(lambda leaf: jnp.repeat(leaf, horizon, 0), small)
    chunk, n_devices = bench.chunk(cfg.n_envs), bench.n_devices(cfg.n_envs)
    runs = {}
    for name, fun in pieces.items():
        body = lambda xs, axis_name, fun=fun: over_environments(fun, xs, chunk)
        runs[name] = build(body, n_devices, (SHARDED,), decisions).bind(decisions)
    return runs


def roofline_table(bench: Bench) -> Iterator[Row]:
    """Counted work per image against what the compiler counts, and what is achieved against the machine's limits."""
    emit = functools.partial(row, "roofline")
    cfg, t, size = bench.cfg, bench.cfg.training, bench.size.image_size
    itemsize = jnp.dtype(t.compute_dtype).itemsize
    counted = functools.partial(roofline.host, cfg.host, size, channels=3, classes=CLASSES, itemsize=itemsize)
    images = max(1, min(t.batch_size, t.tile_pixels // size**2)) if t.tile_pixels else t.batch_size
    state = jax.tree.map(lambda leaf: leaf[0], empty(bench, 1))
    x, labels = jnp.zeros((images, size, size, 3)), jnp.zeros(images, jnp.int32)
    one_tile = functools.partial(host_training.train_batch, cfg=dataclasses.replace(t, tile_pixels=0))
    forward = lambda host, x: cnn.apply(host, x.astype(t.compute_dtype), train=False)[0]
    # The compiler's analysis takes a loop's body once, so: one tile, and its products not cut into blocks. Before
    # optimisation, which computes cheap operations anew where that saves a pass over memory.
    with mock.patch.object(layers, "BLOCK_BYTES", sys.maxsize):
        train_cost = jax.jit(one_tile).lower(*bare(state), x, labels).cost_analysis()
        forward_cost = jax.jit(forward).lower(state.model.host, x).cost_analysis()
    for name, train, cost in (("train", True, train_cost), ("forward", False, forward_cost)):
        work = roofline.total(counted(train=train))
        yield emit(f"{name}_counted_flops", work.flops, "FLOP/image (matrix products)")
        yield emit(f"{name}_compiler_flops", cost["flops"] / images, "FLOP/image (all operations)")
        yield emit(f"{name}_counted_bytes", work.bytes, "bytes/image (stored features)")
        yield emit(f"{name}_compiler_bytes", cost["bytes accessed"] / images, "bytes/image (every operation's)")

    flops, bandwidth = peaks(bench)
    yield emit("matmul_gflops", flops / 1e9, "GFLOP/s")
    yield emit("copy_gbytes", bandwidth / 1e9, "GB/s")
    envs = bench.size.growth_envs
    program, args = bare_train(bench, envs, bench.size.growth_batches, bench.chunk(envs))
    rate = args[-1].size / bench.measure({"train": program.bind(*args)})["train"]
    work = roofline.total(counted(train=True))
    yield emit("train_images_per_s", rate, "images/s")
    yield emit("train_gflops", rate * work.flops / 1e9, "GFLOP/s")
    yield emit("train_gbytes", rate * work.bytes / 1e9, "GB/s")
    least = roofline.least_seconds(counted(train=True), np.median(flops), np.median(bandwidth))
    yield emit("train_roofline_images_per_s", 1 / least, "images/s")
    yield emit("train_share_of_roofline", rate * least, "share")
    memory_bound = np.median(bandwidth) / work.bytes
    yield emit("train_memory_roofline_images_per_s", memory_bound, "images/s")


def precision_table(bench: Bench) -> Iterator[Row]:
    """Learning in bfloat16: report-test accuracy minus that of the same environments in float32."""
    emit = functools.partial(row, "precision")
    accuracy = {}
    for dtype in ("float32", "bfloat16"):
        cfg = compilation.spread(bench.size.learning.replace(**{"training.compute_dtype": dtype}))
        train = make_train(cfg, controllers={"eager": default_controllers(cfg)["eager"]})
        key = jax.random.key(cfg.seed)
        accuracy[dtype] = np.asarray(train.compare(key, train.init(key), ["eager"])["eager"].test.accuracy[0], float)
        yield emit(
            f"{dtype}_accuracy", accuracy[dtype], f"% on {cfg.data.name}, eager growth, {cfg.training.epochs} epochs"
        )
    difference = mean_interval(accuracy["bfloat16"] - accuracy["float32"])
    unit = "points, mean; spread: half of the 95 % interval"
    half = difference.high - difference.mean
    yield Row("precision", "bfloat16_minus_float32", difference.mean, unit, len(accuracy["float32"]), half)


def incumbent_table(bench: Bench) -> Iterator[Row]:
    """The same work in an eager PyTorch loop; a ratio above 1 means that this project is faster."""
    if importlib.util.find_spec("torch") is None:
        yield Row("incumbent", "incumbent", None, "not measured: torch cannot be imported", 0, None)
        return
    emit = functools.partial(row, "incumbent")
    cfg, size = bench.cfg, bench.size
    t = cfg.training
    backend = "cuda" if jax.default_backend() == "gpu" else "cpu"
    common = {
        "device": backend, "widths": cfg.host.widths, "image_size": size.image_size, "channels": 3,
        "train_images": size.train_images, "validation_images": cfg.data.validation_size, "batch_size": t.batch_size,
        "train_batches": size.growth_batches, "epoch_batches": t.batches_per_epoch, "seeds": True,
    }  # fmt: skip
    envs = size.growth_envs
    alone, alone_args = bare_train(bench, envs, size.growth_batches, bench.chunk(envs))
    epoch_envs = max(e for e in size.populations if e <= size.largest_epoch)
    epoch = env_epoch(bench, epoch_envs)
    states = uniform(bench, epoch_envs, "conv_light", len(cfg.host.slot_names))
    with contextlib.ExitStack() as stack:
        start = lambda settings, count=1: stack.enter_context(_processes(settings, count))
        together = start(common | {"threads": devices.usable_cpus()})
        apart = start(common | {"threads": 1}, 2)
        runs = {"bare": alone.bind(*alone_args), "epoch": epoch.bind(*bench.epoch_args(states))}
        for name, work in (("together", together), ("apart", apart)):
            runs[f"bare_{name}"] = functools.partial(work, "train")
            runs[f"epoch_{name}"] = functools.partial(work, "epoch")
        times = {}
        for what in ("bare", "epoch"):  # one after the other: the short runs are repeated more often than the long ones
            times |= bench.measure({name: run for name, run in runs.items() if name.startswith(what)})
    images = size.growth_batches * t.batch_size
    ours = {"bare": envs * images / times["bare"], "epoch": epoch_envs / times["epoch"]}
    per_run = {"bare": images, "epoch": 1}
    units = {"bare": "images/s", "epoch": "env-epochs/s"}
    labels = {"together": ("torch_eager", 1), "apart": ("two_torch_processes", 2)}
    for what in ("bare", "epoch"):
        name = {"bare": "bare_train", "epoch": f"conv_light_{len(cfg.host.slot_names)}_env_epoch"}[what]
        yield emit(f"{name}_jax", ours[what], units[what])
        for how, (label, count) in labels.items():
            theirs = count * per_run[what] / times[f"{what}_{how}"]
            yield emit(f"{name}_{label}", theirs, units[what])
            yield emit(f"{name}_over_{label}", ours[what] / theirs, "ratio")
    yield from _small_hosts(bench, emit, common)


def _small_hosts(bench: Bench, emit: Callable, common: dict) -> Iterator[Row]:
    """8x8 images of one channel, the host for them, at two batch sizes and the better chunk."""
    envs = max(bench.size.growth_envs, 16 * jax.device_count())
    dataset = random_dataset(8, bench.size.train_images, 2, channels=1)
    small = dataclasses.replace(bench, cfg=bench.cfg.replace(host=presets.host("digits")), dataset=dataset)
    for batch_size in (64, 512):
        t = dataclasses.replace(small.cfg.training, batch_size=batch_size)
        batches = max(1, bench.size.images_per_run // (envs * batch_size))
        chunks = sorted({bench.chunk(envs, chunk) for chunk in (1, 16)})
        runs = {}
        for chunk in chunks:
            program, args = bare_train(small, envs, batches, chunk, t)
            runs[chunk] = program.bind(*args)
        torch_batches = max(1, bench.size.images_per_run // batch_size)
        settings = common | {
            "widths": small.cfg.host.widths, "image_size": 8, "channels": 1, "batch_size": batch_size, "seeds": False,
            "train_batches": torch_batches, "threads": devices.usable_cpus(),
        }  # fmt: skip
        with _processes(settings, 1) as work:
            times = bench.measure(runs | {"torch": functools.partial(work, "train")})
        best = min(chunks, key=lambda chunk: np.median(times[chunk]))
        ours, theirs = envs * batches * batch_size / times[best], torch_batches * batch_size / times["torch"]
        yield emit(f"host_8x8_batch_{batch_size}_jax", ours, f"images/s (chunks of {best})")
        yield emit(f"host_8x8_batch_{batch_size}_torch_eager", theirs, "images/s")
        yield emit(f"host_8x8_batch_{batch_size}_over_torch_eager", ours / theirs, "ratio")


@contextlib.contextmanager
def _processes(settings: dict, count: int) -> Iterator[Callable[[str], float]]:
    """So many PyTorch processes; yields a function that lets all of them do a piece of work and returns the seconds."""
    command = [sys.executable, "-m", "experiments.throughput.torch_loop", json.dumps(settings)]
    root = Path(__file__).resolve().parents[2]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    workers = [subprocess.Popen(command, cwd=root, **pipes) for _ in range(count)]

    def answer(worker):
        line = worker.stdout.readline()
        if not line:
            raise RuntimeError("a process of experiments.throughput.torch_loop ended early; its message is above")
        return line.strip()

    def work(name: str) -> float:
        for worker in workers:
            worker.stdin.write(name + "\n")
            worker.stdin.flush()
        seconds = max(float(answer(worker)) for worker in workers)
        time.sleep(PAUSE)
        return seconds

    try:
        for worker in workers:
            answer(worker)
        yield work
    finally:
        for worker in workers:
            worker.stdin.close()
            worker.stdout.close()
            worker.wait()


TABLES = {
    "population": population_table,
    "growth": growth_table,
    "evaluation": evaluation_table,
    "learner": learner_table,
    "roofline": roofline_table,
    "incumbent": incumbent_table,
    "precision": precision_table,
    "text": text_table,
    "batched": batched_table,
}


# --- output ----------------------------------------------------------------------------------------------------------


def show(console: Console, title: str, rows: Iterable[Row]) -> list[Row]:
    """Prints a table on a terminal, otherwise one line per number as soon as it is there; returns the rows."""
    number = lambda x: "-" if x is None else f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.4g}"
    if not console.is_terminal:
        shown = []
        for r in rows:
            print(f"{r.table}  {r.name}  {number(r.value)}  +-{number(r.spread)}  n={r.n}  {r.unit}", flush=True)
            shown.append(r)
        return shown
    with console.status(f"{title} ..."):
        shown = list(rows)
    table = Table(title=title, title_justify="left")
    for column in ("name", "value", "spread", "n", "unit"):
        table.add_column(column, justify="left" if column in ("name", "unit") else "right")
    for r in shown:
        table.add_row(r.name, number(r.value), number(r.spread), str(r.n), r.unit)
    console.print(table)
    return shown


def main(
    preset: Literal["cpu", "gpu", "tiny"] | None = None,
    out: Path | None = None,
    tables: tuple[
        Literal[
            "population", "growth", "evaluation", "learner", "roofline", "incumbent", "precision", "text", "batched"
        ],
        ...,
    ] = (),
    repeats: int | None = None,
) -> None:
    """Measures how fast this machine trains and evaluates populations of hosts.

    Args:
      preset: how much to measure; by default what fits the device. tiny only shows that the script works.
      out: file for the numbers as JSON.
      tables: which tables, by default all.
      repeats: runs per number, after one that does not count; by default the preset's.
    """
    if repeats is not None and repeats < 1:
        raise SystemExit(f"--repeats {repeats}: must be at least 1")
    if out is not None and not out.absolute().parent.is_dir():
        raise SystemExit(f"--out {out}: {out.absolute().parent} is not a folder")
    preset = preset or ("gpu" if jax.default_backend() == "gpu" else "cpu")
    size = SIZES[preset] if repeats is None else dataclasses.replace(SIZES[preset], repeats=repeats)
    bench = make_bench(size)
    report = {"device": describe_device(size.cfg.training.compute_dtype), "jax": jax.__version__, "rows": []}
    print(f"{report['device']}; jax {jax.__version__}; preset {preset}; up to {size.repeats} runs each", flush=True)
    console = Console()
    for name in tables or TABLES:
        start = time.perf_counter()
        title = TABLES[name].__doc__.splitlines()[0]
        report["rows"] += [r._asdict() for r in show(console, title, TABLES[name](bench))]
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
        if out is not None:
            out.write_text(json.dumps(report, indent=1) + "\n")
