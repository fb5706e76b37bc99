"""What the tables of `experiments.throughput` share: how to measure, and what is measured.

Axis letters: E environments, S slots, B images of a batch.
"""

from __future__ import annotations

import contextlib
import functools
import math
import platform
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding

from esper_jax import data, make_env
from esper_jax.config import Config, TextConfig, TrainingConfig
from esper_jax.env import host_training
from esper_jax.network import model as networks
from esper_jax.network import seed_bank
from esper_jax.network.blueprints import Blueprint
from esper_jax.run import compilation, devices
from esper_jax.run.devices import REPLICATED, SHARDED
from esper_jax.train import over_environments
from esper_jax.types import BLUEPRINTS, Action, AlphaAlgorithm, AlphaMode, SlotState, Stage

CLASSES = 10
COPIES = 16  # in one run of the measured copy
LEAST_RUNS = 3  # of a comparison that takes long
MIXTURE = (Stage.DORMANT, Stage.TRAINING, Stage.BLENDING, Stage.HOLDING, Stage.FOSSILIZED)


# --- how to measure --------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    table: str
    name: str
    value: float | None  # None: could not be measured, `unit` says why
    unit: str
    n: int
    spread: float | None


def row(table: str, name: str, values: Any, unit: str) -> Row:
    """Median and distance between the quartiles."""
    values = np.atleast_1d(np.asarray(values, float))
    low, middle, high = np.percentile(values, [25, 50, 75])
    return Row(table, name, float(middle), unit, len(values), float(high - low))


def interleaved(runs: dict[Any, Callable[[], Any]], repeats: int, seconds: float) -> dict[Any, np.ndarray]:
    """Seconds of each run in rounds A B ... A B ..., after one round that does not count.

    Stops early after LEAST_RUNS rounds if they took longer than `seconds`. A run that returns a float has measured
    itself.
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


class Program(NamedTuple):
    """A function compiled ahead of time for some devices."""

    compiled: Any
    mesh: Any
    in_specs: tuple
    seconds: float  # to compile

    def bind(self, *args) -> Callable[[], Any]:
        """A run with these arguments, which are put where they belong now."""
        args = _place(args, self.mesh, self.in_specs)
        return lambda: self.compiled(*args)

    @property
    def mebibytes(self) -> float:
        """Arguments, results and scratch space on one device, by the compiler's own account."""
        return compilation.program_bytes(self.compiled) / 2**20


def build(body: Callable, n_devices: int, in_specs: tuple, *args) -> Program:
    """`body(*args, axis_name=)` compiled over so many devices.

    What is split over them is given with a leading axis E and gets to the body, and comes back, as one row: [1, E].
    """
    mesh = devices.make_mesh(n_devices)
    args = _place(args, mesh, in_specs)
    function = devices.over_devices(body, mesh, in_specs, SHARDED)
    start = time.perf_counter()
    compiled = function.lower(*args).compile()
    return Program(compiled, mesh, in_specs, time.perf_counter() - start)


def _place(args: tuple, mesh, in_specs: tuple) -> tuple:
    row = lambda arg, spec: jax.tree.map(lambda leaf: leaf[None], arg) if spec == SHARDED else arg
    put = lambda arg, spec: jax.device_put(row(arg, spec), NamedSharding(mesh, spec))
    return tuple(map(put, args, in_specs))


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
        name = platform.processor()
        with contextlib.suppress(OSError, StopIteration):
            lines = Path("/proc/cpuinfo").read_text().splitlines()
            name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
        kind = f"CPU core ({name or platform.machine()})"
    return f"{jax.device_count()} x {kind}, {precision}"


# --- what is measured ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
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
    evaluation_envs: int
    batched: int  # environments in a chunk of the batched table
    slot_counts: tuple[int, ...]  # S of the evaluation table
    matrix: int  # side of the measured matrix product
    copied: int  # elements of the measured copy
    text: dict[str, TextConfig]  # what the table of language models measures
    learning: Config  # whose final accuracies two precisions are compared by
    repeats: int
    seconds: float  # a comparison that takes longer stops after LEAST_RUNS runs


@dataclass(frozen=True, eq=False)
class Bench:
    """What to measure it on."""

    size: Size
    cfg: Config
    dataset: data.AnyDataset

    def measure(self, runs: dict[Any, Callable[[], Any]]) -> dict[Any, np.ndarray]:
        return interleaved(runs, self.size.repeats, self.size.seconds)

    def n_devices(self, envs: int) -> int:
        """As many as divide the environments."""
        return math.gcd(envs, jax.device_count())

    def chunk(self, envs: int, chunk: int | None = None) -> int:
        """The nearest chunk that divides the environments of one device."""
        return math.gcd(envs // self.n_devices(envs), chunk or self.cfg.env_chunk)

    def indices(self, envs: int, batches: int, batch_size: int) -> jax.Array:
        """Which images to train on, or where windows of text start."""
        shape = (envs, batches, batch_size)
        return jnp.asarray(np.random.default_rng(1).integers(0, self.dataset.train_size, shape), jnp.int32)

    def epoch_args(self, states) -> tuple:
        """Arguments of an `env_epoch`."""
        return self.dataset, jax.random.split(jax.random.key(3), states.epoch.shape[0]), states


def make_bench(size: Size) -> Bench:
    dataset = random_dataset(size.image_size, size.train_images, size.cfg.data.validation_size)
    return Bench(size, size.cfg, dataset)


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


def fetch_plain(dataset: data.AnyDataset, indices: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A training batch as the product makes it, not augmented."""
    plain = dataset.replace(augment=False) if isinstance(dataset, data.Dataset) else dataset
    return plain.batch(jax.random.key(0), indices)


# --- populations -----------------------------------------------------------------------------------------------------


@functools.cache
def _newborn(bench: Bench):
    env = make_env(bench.cfg, bench.dataset)
    return jax.jit(env.init)(jax.random.key(0)).replace(epoch=jnp.int32(1))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _germinate(kinds: tuple[Blueprint, ...], width: int, blueprints: jax.Array) -> jax.Array:
    keys = jax.random.split(jax.random.key(4), blueprints.shape[0])
    fresh = functools.partial(seed_bank.germinate, kinds=kinds, width=width)
    return jax.vmap(lambda key, kind: fresh(key, kind=kind))(keys, seed_bank.kind_of(blueprints, kinds))


def empty(bench: Bench, envs: int):
    """E environments after their first epoch, all slots empty."""
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (envs, *leaf.shape)), _newborn(bench))


def grown(bench: Bench, blueprints: Any, stages: Any):
    """Environments with seeds of these blueprints (names `[E, S]`) in these stages (`[E, S]`, DORMANT for none)."""
    stage = np.asarray(stages, np.int32)
    state = empty(bench, len(stage))
    here = stage != Stage.DORMANT
    blending = stage == Stage.BLENDING
    kind = jnp.asarray(np.where(here, np.vectorize(BLUEPRINTS.index)(blueprints), -1), jnp.int32)
    alpha = np.select([blending, here & (stage > Stage.BLENDING)], [0.5, 1.0], 0.0)
    integers = lambda values: jnp.asarray(np.broadcast_to(values, stage.shape), jnp.int32)
    record = state.slots
    ramp = record.alpha.replace(
        alpha=jnp.asarray(alpha, jnp.float32),
        target=jnp.ones(stage.shape),
        mode=integers(np.where(blending, AlphaMode.UP, AlphaMode.HOLD)),
        steps_total=integers(8),
        steps_done=integers(4),
    )
    record = record.replace(
        stage=integers(stage),
        blueprint=kind,
        algorithm=integers(np.where(here, AlphaAlgorithm.ADD, AlphaAlgorithm.NONE)),
        epochs_total=integers(np.where(here, 5, 0)),
        alpha=ramp,
    )
    seeds = [
        seed.replace(params=_germinate(seed.kinds, seed.width, kind[:, s])) for s, seed in enumerate(state.model.seeds)
    ]
    return state.replace(slots=record, model=state.model.replace(seeds=tuple(seeds)))


def uniform(bench: Bench, envs: int, blueprint: str, live: int):
    """Environments with the same seed, blending, in the first `live` slots."""
    n_slots = len(bench.cfg.host.slot_names)
    stages = [Stage.BLENDING] * live + [Stage.DORMANT] * (n_slots - live)
    return grown(bench, [[blueprint] * n_slots] * envs, [stages] * envs)


def mixture(bench: Bench, envs: int):
    """Environments with a random blueprint at a random stage, or none, in every slot."""
    rng = np.random.default_rng(2)
    offered = bench.cfg.lifecycle.offered
    shape = (envs, len(bench.cfg.host.slot_names))
    return grown(bench, rng.choice(offered, shape), rng.choice(MIXTURE, shape))


# --- programs --------------------------------------------------------------------------------------------------------


def train_program(bench: Bench, args: tuple, chunk: int, cfg: TrainingConfig) -> Program:
    """An epoch of training; `args` are a dataset, then models, momenta, slot records and indices of E environments."""

    def body(dataset, models, optimisers, records, indices, axis_name):
        fetch = functools.partial(fetch_plain, dataset)
        one = lambda env: host_training.train_epoch(*env, fetch, cfg)
        return over_environments(one, (models, optimisers, records, indices), chunk)

    return build(body, bench.n_devices(args[-1].shape[0]), (REPLICATED, *[SHARDED] * 4), *args)


def bare(state) -> tuple[networks.Model, host_training.OptimiserState, SlotState]:
    """Model, momentum and slot records of environments without their slots, for `training.train_batch` and `_epoch`."""
    no_slots = jax.tree.map(lambda leaf: leaf[..., :0], state.slots)
    return state.model.replace(seeds=()), state.optimiser.replace(seeds=()), no_slots


@functools.cache
def bare_train(bench: Bench, envs: int, batches: int, chunk: int, cfg: TrainingConfig | None = None):
    """Training of hosts without slots; returns the program and its arguments."""
    cfg = cfg or bench.cfg.training
    args = (bench.dataset, *bare(empty(bench, envs)), bench.indices(envs, batches, cfg.batch_size))
    return train_program(bench, args, chunk, cfg), args


@functools.cache
def env_epoch(bench: Bench, envs: int) -> Program:
    """Whole environment epochs: training, evaluation of all configurations, governor, reward, observation."""
    chunk = bench.chunk(envs)

    def body(dataset, keys, states, axis_name):
        env = make_env(bench.cfg, dataset)
        return over_environments(lambda one: env.step(*one, Action()), (keys, states), chunk)

    return build(body, bench.n_devices(envs), (REPLICATED, SHARDED, SHARDED), *bench.epoch_args(empty(bench, envs)))


@functools.cache
def peaks(bench: Bench) -> tuple[np.ndarray, np.ndarray]:
    """FLOP/s of a matrix product and bytes/s of a scaled copy, on all devices at once, run by run."""
    n = jax.device_count()
    dtype = jnp.dtype(bench.cfg.training.compute_dtype)
    side, copied = bench.size.matrix, bench.size.copied
    matrices, vectors = jnp.ones((n, side, side), dtype), jnp.ones((n, copied), dtype)
    product = build(lambda x, axis_name: lax.map(lambda a: a @ a, x[0])[None], n, (SHARDED,), matrices)
    # several times over, so that fresh memory, which the system hands out page by page, is not what is measured
    again = lambda _, x: x * 0.5
    copy = build(lambda x, axis_name: lax.fori_loop(0, COPIES, again, x), n, (SHARDED,), vectors)
    times = bench.measure({"product": product.bind(matrices), "copy": copy.bind(vectors)})
    return n * 2 * side**3 / times["product"], n * COPIES * 2 * copied * dtype.itemsize / times["copy"]
