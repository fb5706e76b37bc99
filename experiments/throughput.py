"""How fast it is: six tables of measured numbers, each the median of repeated runs after a warm-up.

    python -m experiments.throughput [--preset cpu|gpu] [--out FILE.json] [--tables growth evaluation ...] [--repeats N]

    population   training and whole environment epochs for E environments, memory, compile time, the best env_chunk
    growth       an epoch of training with seeds, relative to the bare host that has no slots
    evaluation   all on/off configurations of the slots, relative to one forward pass
    learner      everything that is not host training or evaluation, as a share of a round; host I/O
    roofline     FLOPs and bytes counted from the layers against a measured matrix product and copy
    incumbent    the same host in a plain PyTorch loop, where torch is installed

What is compared runs alternately (A B A B ...) and a ratio is taken within each pair, so that a machine that slows down
slows both. `spread` is the distance between the quartiles, `n` the number of runs. Images and labels are random numbers:
nothing here depends on what they show. Everything runs through the functions of the product; only the host without
slots, which the product does not have, is put together here from its parts.

Axis letters: E environments, S slots, K on/off configurations, B images of a batch, T epochs of an episode.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import json
import math
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax import lax
from jax.sharding import NamedSharding
from rich.console import Console
from rich.table import Table

from esper_jax import checkpoint, data, devices, make_env, make_train, presets, telemetry
from esper_jax.config import Config, DataConfig, HostConfig, LifecycleConfig, PPOConfig, TrainingConfig
from esper_jax.devices import EACH, SAME
from esper_jax.env import evaluation, observation, reward, training
from esper_jax.lifecycle import masks
from esper_jax.network import cnn, morphogenetic, seed_bank, slots
from esper_jax.train import Metrics
from esper_jax.types import BLUEPRINTS, Action, AlphaAlgorithm, AlphaMode, Stage
from experiments import roofline

CLASSES = 10
LEAST_RUNS = 3  # of a comparison that takes long
PAUSE = 0.3  # seconds after another process has worked, for its threads to go to sleep
MIXTURE = (Stage.DORMANT, Stage.TRAINING, Stage.BLENDING, Stage.HOLDING, Stage.FOSSILIZED)


class Row(NamedTuple):
    table: str
    name: str
    value: float | None  # None: could not be measured, `unit` says why
    unit: str
    n: int
    spread: float | None


@dataclasses.dataclass(frozen=True)
class Size:
    """What a preset measures."""

    cfg: Config  # its n_envs is that of the learner table
    image_size: int
    train_images: int
    populations: tuple[int, ...]  # E, ascending: memory is a high-water mark
    largest_epoch: int  # whole environment epochs up to this E
    chunks: tuple[int, ...]  # values of env_chunk to try
    images_per_run: int  # trained in one measurement, at least
    growth_envs: int
    growth_batches: int
    slot_counts: tuple[int, ...]  # S of the evaluation table
    matrix: int  # side of the measured matrix product
    copied: int  # elements of the measured copy
    repeats: int
    seconds: float  # a comparison that takes longer stops after LEAST_RUNS runs


SIZES = {
    "cpu": Size(
        cfg=Config(data=DataConfig(), n_envs=8, report_envs=8), image_size=32, train_images=47_500,
        populations=(1, 4, 16, 64), largest_epoch=4, chunks=(1, 4), images_per_run=16_384,
        growth_envs=4, growth_batches=6, slot_counts=(1, 2, 3, 4), matrix=1024, copied=2**25, repeats=7, seconds=20,
    ),
    "gpu": Size(
        cfg=presets.get("full").replace(n_envs=64, report_envs=64), image_size=32, train_images=47_500,
        populations=(1, 4, 16, 64, 256, 1024), largest_epoch=1024, chunks=(16, 64, 256), images_per_run=2**21,
        growth_envs=64, growth_batches=24, slot_counts=(1, 2, 3, 4), matrix=8192, copied=2**28, repeats=7, seconds=30,
    ),
    # a minute for the tests: its numbers mean nothing
    "tiny": Size(
        cfg=Config(
            host=HostConfig(n_blocks=2, base_channels=4, pool_layers=2), data=DataConfig(validation_size=24),
            training=TrainingConfig(epochs=3, batches_per_epoch=2, batch_size=8, tile_pixels=256),
            lifecycle=LifecycleConfig(blueprints=("norm", "conv_light")), ppo=PPOConfig(hidden_size=8, minibatches=1),
            n_envs=4, report_envs=4,
        ),
        image_size=8, train_images=64, populations=(1, 4), largest_epoch=4, chunks=(1,), images_per_run=64,
        growth_envs=4, growth_batches=2, slot_counts=(1, 2), matrix=64, copied=1024, repeats=1, seconds=1,
    ),
}  # fmt: skip


# --- measuring -------------------------------------------------------------------------------------------------------


def interleaved(runs: dict[str, Callable[[], Any]], repeats: int, seconds: float) -> dict[str, np.ndarray]:
    """Seconds of each run in rounds A B ... A B ..., after one round that does not count.

    A run that returns a float has measured itself.
    """
    times = {name: [] for name in runs}
    began = math.inf
    for k in range(repeats + 1):
        if k > LEAST_RUNS and time.perf_counter() - began > seconds:
            break
        for name, run in runs.items():
            start = time.perf_counter()
            result = run()
            if not isinstance(result, float):
                jax.block_until_ready(result)
                result = time.perf_counter() - start
            if k > 0:
                times[name].append(result)
        began = min(began, time.perf_counter())
    return {name: np.array(column) for name, column in times.items()}


def row(table: str, name: str, values: Any, unit: str) -> Row:
    """Median and distance between the quartiles."""
    values = np.atleast_1d(np.asarray(values, float))
    low, middle, high = np.percentile(values, [25, 50, 75])
    return Row(table, name, float(middle), unit, len(values), float(high - low))


class Program(NamedTuple):
    """A function compiled ahead of time for some devices; `bind` puts its arguments where they belong."""

    compiled: Any
    mesh: Any
    in_specs: tuple
    seconds: float  # to compile

    def bind(self, *args) -> Callable[[], Any]:
        place = lambda arg, spec: jax.device_put(arg, NamedSharding(self.mesh, spec))
        args = tuple(place(arg, spec) for arg, spec in zip(args, self.in_specs, strict=True))
        return lambda: self.compiled(*args)

    @property
    def mebibytes(self) -> float:
        """Arguments, results and scratch space on one device, by the compiler's own account."""
        m = self.compiled.memory_analysis()
        return (m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes) / 2**20


def build(body: Callable, n_devices: int, in_specs: tuple, *args) -> Program:
    """`body(*args, axis_name=)` over so many devices; its results have a leading axis of environments."""
    mesh = devices.make_mesh(n_devices)
    place = lambda arg, spec: jax.device_put(arg, NamedSharding(mesh, spec))
    args = tuple(place(arg, spec) for arg, spec in zip(args, in_specs, strict=True))
    function = devices.over_devices(body, mesh, in_specs, EACH)
    start = time.perf_counter()
    compiled = function.lower(*args).compile()
    return Program(compiled, mesh, in_specs, time.perf_counter() - start)


def high_water() -> tuple[float, str]:
    """Most memory used so far, and whose."""
    stats = jax.devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"] / 2**20, "MiB (device, high-water mark)"
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, "MiB (process, high-water mark)"


def describe_device(precision: str) -> str:
    """How many devices of what kind, and the precision of the features."""
    device = jax.devices()[0]
    kind = device.device_kind
    if device.platform == "cpu":
        with contextlib.suppress(OSError, StopIteration):
            lines = Path("/proc/cpuinfo").read_text().splitlines()
            kind = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
        kind = f"CPU core, {kind or platform.processor()}"
    return f"{jax.device_count()} x {kind}, {precision}"


# --- what is measured ------------------------------------------------------------------------------------------------


def over_environments(fun: Callable, xs: Any, chunk: int) -> Any:
    """As `train.py` maps environments."""
    return lax.map(fun, xs) if chunk == 1 else lax.map(fun, xs, batch_size=chunk)


def random_dataset(size: int, train: int, validation: int, channels: int = 3) -> data.Dataset:
    """Random pixels and labels."""
    rng = np.random.default_rng(0)

    def split(n):
        images = rng.integers(0, 256, (n, size, size, channels), np.uint8)
        return data.Split(jnp.asarray(images), jnp.asarray(rng.integers(0, CLASSES, n), jnp.int32))

    return data.Dataset(
        train=split(train), validation=split(validation), test=split(1), name="random",
        classes=tuple(map(str, range(CLASSES))), mean=(0.5,) * channels, std=(0.25,) * channels, augment=True,
        identity="random", source="random",
    )  # fmt: skip


def bare_batch(host, momentum, x, labels, cfg: TrainingConfig):
    """`training.train_batch` of a host that has no slots at all: same loss, clipping and optimiser."""

    def objective(params):
        x_cast = x.astype(cfg.compute_dtype)
        logits, new = cnn.apply(host.replace(params=params), x_cast, train=True, tile_pixels=cfg.tile_pixels)
        loss, correct = training.loss_and_accuracy(logits, labels)
        return loss, (new.stats, correct)

    (loss, (stats, correct)), grads = jax.value_and_grad(objective, has_aux=True)(host.params)
    factor = training.clip_factor(optax.tree.norm(grads), cfg.clip_norm)
    grads = jax.tree.map(lambda g: g * factor, grads)
    updates, momentum = training.host_optimiser(cfg).update(grads, momentum, host.params)
    return host.replace(params=optax.apply_updates(host.params, updates), stats=stats), momentum, (loss, correct)


def fetch_plain(dataset: data.Dataset, indices):
    """A training batch as the product makes it, not augmented."""
    return data.train_batch(jax.random.key(0), dataset.replace(augment=False), indices)


class Bench:
    """What the tables share: data, environments, and programs that are expensive to compile."""

    def __init__(self, size: Size):
        self.size, self.cfg = size, size.cfg
        self.dataset = random_dataset(size.image_size, size.train_images, size.cfg.data.validation_size)
        self.rows: list[Row] = []

    def measure(self, runs: dict[str, Callable[[], Any]]) -> dict[str, np.ndarray]:
        return interleaved(runs, self.size.repeats, self.size.seconds)

    def n_devices(self, envs: int) -> int:
        return math.gcd(envs, jax.device_count())

    def chunk(self, envs: int, chunk: int | None = None) -> int:
        """A chunk that fits the environments of one device."""
        here = envs // self.n_devices(envs)
        return math.gcd(here, chunk or self.cfg.env_chunk)

    def indices(self, envs: int, batches: int, batch_size: int):
        rng = np.random.default_rng(1)
        return jnp.asarray(rng.integers(0, self.size.train_images, (envs, batches, batch_size)), jnp.int32)

    @functools.cache  # noqa: B019  one Bench per process
    def newborn(self, host: HostConfig):
        """One environment after its first epoch, without having trained it."""
        env = make_env(self.cfg.replace(host=host), self.dataset)
        return jax.jit(env.init)(jax.random.key(0)).replace(epoch=jnp.int32(1))

    def population(self, envs: int, blueprints=None, stages=None, host: HostConfig | None = None):
        """E environments with the given seeds.

        `blueprints` (names) and `stages` are `[E, S]`; none leaves all slots empty.
        """
        host = host or self.cfg.host
        state = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (envs, *leaf.shape)), self.newborn(host))
        if blueprints is None:
            return state
        stage = np.asarray(stages, np.int32)
        here = stage != Stage.DORMANT
        kind = np.where(here, np.vectorize(BLUEPRINTS.index)(blueprints), -1).astype(np.int32)
        alpha = np.select([stage == Stage.BLENDING, here & (stage > Stage.BLENDING)], [0.5, 1.0], 0.0)
        record = state.slots
        ramp = record.alpha.replace(
            alpha=jnp.asarray(alpha, jnp.float32),
            start=jnp.zeros(stage.shape),
            target=jnp.ones(stage.shape),
            mode=jnp.where(stage == Stage.BLENDING, AlphaMode.UP, AlphaMode.HOLD).astype(jnp.int32),
            steps_total=jnp.full(stage.shape, 8, jnp.int32),
            steps_done=jnp.full(stage.shape, 4, jnp.int32),
        )
        record = record.replace(
            stage=jnp.asarray(stage),
            blueprint=jnp.asarray(kind),
            algorithm=jnp.where(here, AlphaAlgorithm.ADD, AlphaAlgorithm.NONE).astype(jnp.int32),
            epochs_total=jnp.where(here, 5, 0).astype(jnp.int32),
            alpha=ramp,
        )
        names = state.model.blueprints
        grown = [
            seed.replace(params=_germinate(seed_bank.table(names), seed.width, seed_bank.kind_of(kind[:, s], names)))
            for s, seed in enumerate(state.model.seeds)
        ]
        return state.replace(slots=record, model=state.model.replace(seeds=tuple(grown)))

    def uniform(self, envs: int, blueprint: str, live: int, host: HostConfig | None = None):
        """Environments with the same seed, blending, in the first `live` slots."""
        n_slots = len((host or self.cfg.host).slot_names)
        stages = [[Stage.BLENDING if s < live else Stage.DORMANT for s in range(n_slots)]] * envs
        return self.population(envs, [[blueprint] * n_slots] * envs, stages, host)

    def mixture(self, envs: int):
        """Environments with a random blueprint at a random stage, or none, in every slot."""
        rng = np.random.default_rng(2)
        offered = [name for name in self.cfg.lifecycle.blueprints if name != "noop"]
        shape = (envs, len(self.cfg.host.slot_names))
        return self.population(envs, rng.choice(offered, shape), rng.choice(MIXTURE, shape))

    def bare_train(self, envs: int, batches: int, chunk: int, cfg: TrainingConfig, state=None, dataset=None):
        """Training of hosts without slots; returns the program and its arguments."""
        state = self.population(envs) if state is None else state

        def body(dataset, hosts, momenta, indices, axis_name):
            def one(env):
                def step(carry, batch):
                    *carry, measured = bare_batch(*carry, *fetch_plain(dataset, batch), cfg)
                    return tuple(carry), measured

                host, momentum, indices = env
                return lax.scan(step, (host, momentum), indices)

            return over_environments(one, (hosts, momenta, indices), chunk)

        dataset = self.dataset if dataset is None else dataset
        args = (dataset, state.model.host, state.optimiser.host, self.indices(envs, batches, cfg.batch_size))
        return build(body, self.n_devices(envs), (SAME, EACH, EACH, EACH), *args), args

    @functools.cache  # noqa: B019
    def env_epoch(self, envs: int) -> Program:
        """Whole environment epochs: training, evaluation of all configurations, governor, reward, observation."""
        chunk = self.chunk(envs)

        def body(dataset, keys, states, axis_name):
            env = make_env(self.cfg, dataset)
            return over_environments(lambda one: env.step(*one, Action()), (keys, states), chunk)

        return build(body, self.n_devices(envs), (SAME, EACH, EACH), *self.epoch_args(self.population(envs)))

    def epoch_args(self, states) -> tuple:
        envs = states.epoch.shape[0]
        return self.dataset, jax.random.split(jax.random.key(3), envs), states

    @functools.cache  # noqa: B019
    def peaks(self) -> tuple[np.ndarray, np.ndarray]:
        """FLOP/s of a matrix product and bytes/s of a scaled copy, on all devices at once, run by run."""
        n = jax.device_count()
        dtype = jnp.dtype(self.cfg.training.compute_dtype)
        side, copied = self.size.matrix, self.size.copied
        each = lambda fun: lambda x, axis_name: lax.map(fun, x)
        product = build(each(lambda a: a @ a), n, (EACH,), jnp.ones((n, side, side), dtype))
        copy = build(each(lambda a: a * 2), n, (EACH,), jnp.ones((n, copied), dtype))
        runs = {
            "product": product.bind(jnp.ones((n, side, side), dtype)),
            "copy": copy.bind(jnp.ones((n, copied), dtype)),
        }
        times = self.measure(runs)
        return n * 2 * side**3 / times["product"], n * 2 * copied * dtype.itemsize / times["copy"]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _germinate(kinds, width: int, numbers):
    keys = jax.random.split(jax.random.key(4), numbers.shape[0])
    return jax.vmap(lambda key, number: seed_bank.germinate(key, kinds, width, number))(keys, numbers)


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
            programs = {chunk: bench.bare_train(envs, batches, chunk, t) for chunk in fits}
            times = bench.measure({chunk: program.bind(*args) for chunk, (program, args) in programs.items()})
            best = min(fits, key=lambda chunk: np.median(times[chunk]))
            trained.append(emit(f"E{envs}_train_images_per_s", images / times[best], "images/s"))
            yield trained[-1]
            yield emit(f"E{envs}_train_best_chunk", best, f"environments, of {fits}")
            yield emit(f"E{envs}_train_compile_s", programs[best][0].seconds, "s")
            yield emit(f"E{envs}_train_memory", programs[best][0].mebibytes, "MiB (program, per device)")
            del programs
            if envs <= bench.size.largest_epoch:
                program = bench.env_epoch(envs)
                times = bench.measure(
                    {
                        "empty": program.bind(*bench.epoch_args(bench.population(envs))),
                        "mixed": program.bind(*bench.epoch_args(bench.mixture(envs))),
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
    bare, bare_args = bench.bare_train(envs, bench.size.growth_batches, chunk, cfg.training)
    indices = bare_args[-1]

    def body(dataset, models, optimisers, records, indices, axis_name):
        fetch = functools.partial(fetch_plain, dataset)
        one = lambda env: training.train_epoch(*env, fetch, cfg.training)
        return over_environments(one, (models, optimisers, records, indices), chunk)

    args = lambda states: (bench.dataset, states.model, states.optimiser, states.slots, indices)
    states = {"slots_empty": bench.population(envs)}
    for name, live in (("conv_light", 1), ("conv_light", n_slots), ("conv_heavy", n_slots)):
        if name in cfg.lifecycle.blueprints:
            states[f"{name}_{live}"] = bench.uniform(envs, name, live)
    states["mixture"] = bench.mixture(envs)
    program = build(body, bench.n_devices(envs), (SAME, *[EACH] * 4), *args(states["slots_empty"]))
    runs = {"bare": bare.bind(*bare_args)} | {name: program.bind(*args(state)) for name, state in states.items()}
    times = bench.measure(runs)

    images = indices.size
    yield emit("bare_epoch_images_per_s", images / times["bare"], "images/s")
    for name in states:
        yield emit(f"{name}_over_bare", times[name] / times["bare"], "ratio")
    flops, bandwidth = (np.median(peak) for peak in bench.peaks())
    itemsize = jnp.dtype(cfg.training.compute_dtype).itemsize
    host = roofline.host(
        cfg.host, bench.size.image_size, channels=3, classes=CLASSES, itemsize=itemsize, train=True
    )
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
    """Fused evaluation of all K = 2^S configurations, its vmapped form and a Python loop, relative to one forward pass."""
    emit = functools.partial(row, "evaluation")
    cfg = bench.cfg.replace(**{"lifecycle.blueprints": ("conv_light",)})
    tile_pixels = cfg.training.tile_pixels
    prepare = lambda dataset, images: data.normalise(dataset, images).astype(cfg.training.compute_dtype)
    for n_slots in bench.size.slot_counts:
        blocks = max(cfg.host.n_blocks, n_slots)
        names = tuple(f"r0c{i}" for i in range(n_slots))
        host = dataclasses.replace(cfg.host, n_blocks=blocks, pool_layers=blocks, slots=names)
        envs = jax.device_count() if cfg.env_chunk == 1 else cfg.env_chunk
        chunk = bench.chunk(envs, cfg.env_chunk)
        inner = Bench.__new__(Bench)  # the same data, other slots
        inner.size, inner.cfg, inner.dataset = bench.size, cfg, bench.dataset
        states = inner.uniform(envs, "conv_light", n_slots, host)
        patterns = (np.arange(2**n_slots)[:, None] >> np.arange(n_slots)) % 2 == 1
        override = np.where(patterns, np.float32(np.nan), np.float32(0))

        def accuracy(model, record, dataset, alpha):
            split = dataset.validation
            x = prepare(dataset, split.images)
            logits, _ = morphogenetic.forward(model, record, x, alpha, tile_pixels=tile_pixels)
            return (logits.argmax(-1) == split.labels).sum()

        def fused(dataset, models, records, chunk=chunk, axis_name=None):
            def one(env):
                split = dataset.validation
                ready = functools.partial(prepare, dataset)
                return evaluation.evaluate(*env, split.images, split.labels, ready, tile_pixels=tile_pixels)

            return over_environments(one, (models, records), chunk)

        def forward(dataset, models, records, alpha, chunk=chunk, axis_name=None):
            return over_environments(lambda env: accuracy(*env, dataset, alpha), (models, records), chunk)

        def vmapped(dataset, models, records, alphas, chunk=chunk, axis_name=None):
            one = lambda env: jax.vmap(lambda alpha: accuracy(*env, dataset, alpha))(alphas)
            return over_environments(one, (models, records), chunk)

        args = (bench.dataset, states.model, states.slots)
        n, specs = bench.n_devices(envs), (SAME, EACH, EACH)
        plain = build(forward, n, (*specs, SAME), *args, override[-1])
        each = [plain.bind(*args, alpha) for alpha in override]
        runs = {
            "forward": each[-1],
            "fused": build(fused, n, specs, *args).bind(*args),
            "vmapped": build(vmapped, n, (*specs, SAME), *args, override).bind(*args, override),
            "loop": lambda each=each: [jax.block_until_ready(run()) for run in each],
        }
        times = bench.measure(runs)
        k = 2**n_slots
        images = envs * bench.dataset.validation.labels.size
        yield emit(f"S{n_slots}_forward_images_per_s", images / times["forward"], "images/s")
        for name in ("fused", "vmapped", "loop"):
            yield emit(f"{name}_{k}_over_forward", times[name] / times["forward"], "ratio")


def learner_table(bench: Bench) -> Iterator[Row]:
    """What a round spends outside host training and evaluation.

    Measured as a round of the same length whose hosts train on one batch of two tiny images and validate on two: all that
    is left is outside, and that little host work still counts against us. Controller, lifecycle, governor, reward,
    observation, masks and PPO update are in it.
    """
    emit = functools.partial(row, "learner")
    cfg, envs = bench.cfg, bench.cfg.n_envs
    horizon = cfg.training.epochs
    n_devices = jax.device_count()
    idle = cfg.replace(devices=n_devices, **{"training.batches_per_epoch": 1, "training.batch_size": 2})
    idle = idle.replace(env_chunk=bench.chunk(envs))
    train = make_train(idle, random_dataset(8, 16, 2), controllers={})
    mesh = devices.make_mesh(n_devices)
    run = train.init(jax.random.key(0))
    key = devices.replicate(jax.random.key(5), mesh)
    rollout = lambda: train.rollout(train.dataset, run, key, jnp.int32(0), jnp.arange(envs))
    rows, states = rollout()
    learn = lambda: train.learn(key, run, rows)

    # one number per decision, so that the compiler can leave nothing out
    decisions = envs * horizon
    chunk = bench.chunk(envs)
    weights = reward.RewardWeights.from_config(cfg.reward, cfg.ppo.gamma, cfg.lifecycle.min_prune_age)
    inputs = _reward_inputs(len(cfg.host.slot_names))
    pieces = {
        "observation": lambda s: observation.encode(
            observation.Inputs(s.signals, s.slots, s.last_op, s.last_success, jnp.float32(horizon))
        ),
        "masks": lambda s: masks.legal(s.slots, cfg.lifecycle),
        "reward": lambda s: reward.reward(
            inputs.replace(val_accuracy=s.improvement), weights, cfg.reward.mode, cfg.reward.attribution
        ),
    }
    repeat = lambda leaf: jnp.repeat(leaf, horizon, 0)
    small = states.replace(model=None, optimiser=None, kept=None, governor=None, evaluation=None)
    small = jax.tree.map(repeat, small)
    runs = {"rollout": rollout, "learn": learn}
    for name, fun in pieces.items():
        body = lambda xs, axis_name, fun=fun: over_environments(fun, xs, chunk)
        runs[name] = build(body, n_devices, (EACH,), small).bind(small)

    # the feed of the hosts belongs to their training; its share is told all the same
    t = cfg.training

    def feed(dataset, keys, axis_name):
        def one(key):
            batches = data.epoch_batches(key, dataset.train.labels.size, t.batches_per_epoch, t.batch_size)

            def step(total, batch):
                images, labels = data.train_batch(key, dataset, batch)
                return total + images.sum() + labels.sum(), None

            return lax.scan(step, jnp.float32(0), batches)[0]

        return over_environments(one, keys, bench.chunk(measured_envs))

    measured_envs = max(e for e in bench.size.populations if e <= min(bench.size.largest_epoch, envs))
    states = bench.mixture(measured_envs)
    args = bench.epoch_args(states)
    runs["epoch"] = bench.env_epoch(measured_envs).bind(*args)
    runs["feed"] = build(feed, bench.n_devices(measured_envs), (SAME, EACH), *args[:2]).bind(*args[:2])

    with tempfile.TemporaryDirectory() as folder:
        log = telemetry.RoundLog(Path(folder) / "rounds")
        new_run, learned = learn()

        def write():
            start = time.perf_counter()
            log.write(0, telemetry.round_arrays(Metrics(rows, learned)))
            checkpoint.save(Path(folder) / "checkpoints", 0, new_run, {})
            return time.perf_counter() - start

        runs["io"] = write
        times = bench.measure(runs)

    hosts = times["epoch"] * decisions / measured_envs
    whole = hosts + times["learn"]
    yield emit("round_s", whole, f"s ({envs} environments x {horizon} epochs, random mixture of seeds)")
    yield emit("outside_host_share", (times["rollout"] + times["learn"]) / whole, "share of a round")
    yield emit("ppo_update_share", times["learn"] / whole, "share of a round")
    for name in pieces:
        yield emit(f"{name}_share", times[name] / whole, "share of a round")
    yield emit("batches_and_augmentation_share", times["feed"] * decisions / measured_envs / whole, "share of a round")
    yield emit("host_io_share", times["io"] / (whole + times["io"]), "share of wall time")


def _reward_inputs(n_slots: int) -> reward.RewardInputs:
    """Something to reward, of the right types."""
    flags = {"succeeded", "has_seed", "terminal"}
    counts = {"requested_op", "stage", "epochs_in_stage", "seed_age", "contributing_fossils", "slot"}
    counts |= {"slot_stage", "slot_epochs_in_stage"}
    per_slot = {*reward.SEED_FIELDS, "slot_stage", "slot_epochs_in_stage", "slot_alpha", "slot_params"}
    per_slot |= {"previous_alpha", "previous_params"}

    def value(name):
        dtype = bool if name in flags or name.endswith("_valid") else jnp.int32 if name in counts else jnp.float32
        return jnp.ones(n_slots if name in per_slot else (), dtype)

    return reward.RewardInputs(**{f.name: value(f.name) for f in dataclasses.fields(reward.RewardInputs)})


def roofline_table(bench: Bench) -> Iterator[Row]:
    """Counted work per image against what the compiler counts, and what is achieved against the machine's limits."""
    emit = functools.partial(row, "roofline")
    cfg, t, size = bench.cfg, bench.cfg.training, bench.size.image_size
    itemsize = jnp.dtype(t.compute_dtype).itemsize
    counted = functools.partial(
        roofline.host, cfg.host, size, channels=3, classes=CLASSES, itemsize=itemsize
    )
    # one tile and no loop: the compiler's analysis takes a loop's body once
    images = max(1, min(t.batch_size, t.tile_pixels // size**2)) if t.tile_pixels else t.batch_size
    state = bench.newborn(cfg.host)
    x, labels = jnp.zeros((images, size, size, 3)), jnp.zeros(images, jnp.int32)
    one_tile = jax.jit(functools.partial(bare_batch, cfg=dataclasses.replace(t, tile_pixels=0)))
    train_cost = one_tile.lower(state.model.host, state.optimiser.host, x, labels).compile().cost_analysis()
    forward = jax.jit(lambda host, x: cnn.apply(host, x.astype(t.compute_dtype), train=False)[0])
    forward_cost = forward.lower(state.model.host, x).compile().cost_analysis()
    for name, train, cost in (("train", True, train_cost), ("forward", False, forward_cost)):
        work = roofline.total(counted(train=train))
        yield emit(f"{name}_counted_flops", work.flops, "FLOP/image (matrix products)")
        yield emit(f"{name}_compiler_flops", cost["flops"] / images, "FLOP/image (all operations)")
        yield emit(f"{name}_counted_bytes", work.bytes, "bytes/image (stored features)")
        yield emit(f"{name}_compiler_bytes", cost["bytes accessed"] / images, "bytes/image (every operation's)")

    flops, bandwidth = bench.peaks()
    yield emit("matmul_gflops", flops / 1e9, "GFLOP/s")
    yield emit("copy_gbytes", bandwidth / 1e9, "GB/s")
    envs = bench.size.growth_envs
    program, args = bench.bare_train(envs, bench.size.growth_batches, bench.chunk(envs), t)
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


def incumbent_table(bench: Bench) -> Iterator[Row]:
    """The same work in an eager PyTorch loop; a ratio above 1 means that this project is faster."""
    if importlib.util.find_spec("torch") is None:
        yield Row("incumbent", "incumbent", None, "not measured: torch cannot be imported", 0, None)
        return
    emit = functools.partial(row, "incumbent")
    cfg, size = bench.cfg, bench.size
    t = cfg.training
    platform_ = "cuda" if jax.default_backend() == "gpu" else "cpu"
    common = {
        "device": platform_, "widths": cfg.host.widths, "image_size": size.image_size, "channels": 3,
        "train_images": size.train_images, "validation_images": cfg.data.validation_size, "batch_size": t.batch_size,
        "train_batches": size.growth_batches, "epoch_batches": t.batches_per_epoch, "seeds": True,
    }  # fmt: skip
    envs = size.growth_envs
    bare, bare_args = bench.bare_train(envs, size.growth_batches, bench.chunk(envs), t)
    epoch_envs = max(e for e in size.populations if e <= size.largest_epoch)
    epoch = bench.env_epoch(epoch_envs)
    states = bench.uniform(epoch_envs, "conv_light", len(cfg.host.slot_names))
    with contextlib.ExitStack() as stack:
        start = lambda settings, count=1: stack.enter_context(_processes(settings, count))
        together = start(common | {"threads": os.cpu_count()})
        apart = start(common | {"threads": 1}, 2)
        runs = {"bare": bare.bind(*bare_args), "epoch": epoch.bind(*bench.epoch_args(states))}
        for name, work in (("together", together), ("apart", apart)):
            runs[f"bare_{name}"] = functools.partial(work, "train")
            runs[f"epoch_{name}"] = functools.partial(work, "epoch")
        times = bench.measure(runs)
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
    cfg = bench.cfg.replace(host=presets.host("digits"))
    envs = max(bench.size.growth_envs, 16 * jax.device_count())
    dataset = random_dataset(8, bench.size.train_images, 2, channels=1)
    inner = Bench.__new__(Bench)
    inner.size, inner.cfg, inner.dataset = bench.size, cfg, dataset
    state = inner.population(envs)
    for batch_size in (64, 512):
        t = dataclasses.replace(cfg.training, batch_size=batch_size)
        batches = max(1, bench.size.images_per_run // (envs * batch_size))
        chunks = sorted({bench.chunk(envs, chunk) for chunk in (1, 16)})
        runs = {}
        for chunk in chunks:
            program, args = inner.bare_train(envs, batches, chunk, t, state, dataset)
            runs[chunk] = program.bind(*args)
        torch_batches = max(1, bench.size.images_per_run // batch_size)
        settings = common | {
            "widths": cfg.host.widths, "image_size": 8, "channels": 1, "batch_size": batch_size, "seeds": False,
            "train_batches": torch_batches, "threads": os.cpu_count(),
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
    command = [sys.executable, "-m", "experiments.incumbent", json.dumps(settings)]
    root = Path(__file__).resolve().parents[1]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    workers = [subprocess.Popen(command, cwd=root, **pipes) for _ in range(count)]

    def answer(worker):
        line = worker.stdout.readline()
        if not line:
            raise RuntimeError("a process of experiments.incumbent ended early; its message is above")
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
}


# --- output ----------------------------------------------------------------------------------------------------------


def show(console: Console, name: str, rows: list[Row]) -> None:
    """A table on a terminal, otherwise one line per number."""
    number = lambda x: "-" if x is None else f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.4g}"
    if not console.is_terminal:
        for r in rows:
            print(f"{r.table}  {r.name}  {number(r.value)}  +-{number(r.spread)}  n={r.n}  {r.unit}", flush=True)
        return
    table = Table(title=TABLES[name].__doc__.splitlines()[0], title_justify="left")
    for column in ("name", "value", "spread", "n", "unit"):
        table.add_column(column, justify="left" if column in ("name", "unit") else "right")
    for r in rows:
        table.add_row(r.name, number(r.value), number(r.spread), str(r.n), r.unit)
    console.print(table)


def main(
    preset: Literal["cpu", "gpu", "tiny"] | None = None,
    out: Path | None = None,
    tables: tuple[Literal["population", "growth", "evaluation", "learner", "roofline", "incumbent"], ...] = (),
    repeats: int | None = None,
) -> None:
    """Measures how fast this machine trains and evaluates populations of hosts.

    Args:
      preset: how much to measure; by default what fits the device. tiny only shows that the script works.
      out: file for the numbers as JSON.
      tables: which tables, by default all.
      repeats: runs per number, after one that does not count; by default the preset's.
    """
    preset = preset or ("gpu" if jax.default_backend() == "gpu" else "cpu")
    size = SIZES[preset] if repeats is None else dataclasses.replace(SIZES[preset], repeats=repeats)
    bench = Bench(size)
    device = describe_device(size.cfg.training.compute_dtype)
    console = Console()
    print(f"{device}; jax {jax.__version__}; preset {preset}; medians of up to {size.repeats} runs", flush=True)
    for name in tables or TABLES:
        start = time.perf_counter()
        rows = list(TABLES[name](bench))
        show(console, name, rows)
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
        bench.rows += rows
    if out is not None:
        report = {"device": device, "jax": jax.__version__, "rows": [r._asdict() for r in bench.rows]}
        out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    # on a CPU a device per core, before the first use of a device
    jax.config.update("jax_num_cpu_devices", os.cpu_count() or 1)
    tyro.cli(main)
