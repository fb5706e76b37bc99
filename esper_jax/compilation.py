"""Devices and programs of a run, before it starts: compiled at the same time, so that the wait has a name and is short.

Tracing, lowering and compiling take most of a short run, so compiled programs can be kept (`StartupCache`): a second
start neither traces nor compiles. A kept program is found by the facts that decide it, and by nothing less.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable
from jax.sharding import Mesh, NamedSharding

from esper_jax import devices, provenance
from esper_jax.config import Config
from esper_jax.env.reward import Course
from esper_jax.network.blueprints import CNN
from esper_jax.startup_cache import StartupCache
from esper_jax.train import RunState, Train, bind, round_of


def spread(cfg: Config) -> Config:
    """The configuration with the most devices that can share its environments evenly, if it does not name a number."""

    def even(n: int) -> bool:
        return cfg.n_envs % (n * cfg.env_chunk) == 0 and cfg.n_envs % (n * cfg.ppo.minibatches) == 0

    most = max(filter(even, range(1, jax.device_count() + 1)), default=1)
    return cfg if cfg.devices else cfg.replace(devices=most)


def source(root: Path = Path(__file__).parent) -> str:
    """SHA-256 of every source file in a folder, by default of this package."""
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def processor() -> list[str]:
    """What tells processors apart that need other machine code; the computer's name where the system does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = ("model name", "cpu family", "model", "stepping", "flags", "CPU part", "Features")
    facts = sorted({line for line in lines if line.split(":")[0].strip() in named})
    return [platform.machine(), str(os.cpu_count()), *(facts or [platform.processor(), platform.node()])]


def program_facts(train: Train, cfg: Config, controllers: Any) -> dict[str, Any]:
    """Everything that decides the programs of a run, as JSON.

    Args:
      controllers: what stands for the source of the rules of `train`, beside the source of this package: JSON.
    """
    leaves, structure = jax.tree.flatten(train.dataset)
    client = jax.devices()[0].client
    flags = sorted((name, value) for name, value in os.environ.items() if name.startswith(("XLA_", "JAX_", "LIBTPU_")))
    return {
        "source": source(),
        "versions": provenance.versions(),
        "config": provenance.computed(cfg),
        "devices": cfg.devices,
        "controllers": [list(train.controllers), controllers],
        "blueprints": list(CNN),
        # shapes and placement, and what the data set holds besides arrays: moments, classes, augmentation
        "data": [str(structure), [[str(jax.typeof(leaf)), str(leaf.sharding)] for leaf in leaves]],
        "backend": [client.platform, client.platform_version, [str(device) for device in jax.devices()]],
        "kinds": [device.device_kind for device in jax.devices()],
        "processor": processor(),
        "flags": [flags, sorted((name, str(value)) for name, value in jax.config.values.items())],
    }


def run_template(train: Train, cfg: Config, key: jax.Array) -> Any:
    """Shapes and placement of a run's state, without computing it."""
    return _placed(jax.eval_shape(train.start, key), NamedSharding(devices.make_mesh(cfg.devices), devices.SAME))


def first_run(train: Train, cfg: Config, key: jax.Array, cache: StartupCache) -> RunState:
    """`train.init(key)` of the run's own key, which follows from its seed, from the cache if it is there.

    The state is kept and not its program, which calls LAPACK: JAX tells XLA where that is when it lowers such a program
    and not when it loads one, which would then call a null pointer.
    """
    facts = program_facts(train, cfg, None)
    run = cache.get("run", facts)
    if run is None:
        run = jax.device_get(train.init(key))
        cache.put("run", facts, run)
    return devices.replicate(run, devices.make_mesh(cfg.devices))


def compile_ahead(
    train: Train,
    cfg: Config,
    key: jax.Array,
    done: Callable[[str, float], None] = lambda *_: None,
    cache: StartupCache | None = None,
    controllers: Any = None,
) -> Train:
    """The same run with its programs compiled, each in its own thread.

    Args:
      done: called as `done(name, seconds)` when a program is ready.
      cache: where programs are looked for, and kept. Only for who knows where all rules of `train` come from.
      controllers: what stands for their source, see `program_facts`.
    """
    mesh = devices.make_mesh(cfg.devices)
    on_each, split_over_devices = NamedSharding(mesh, devices.SAME), NamedSharding(mesh, devices.EACH)
    facts = program_facts(train, cfg, controllers) if cache else None
    started = time.perf_counter()

    # traced only for what is not in the cache
    run = functools.cache(lambda: run_template(train, cfg, key))
    keys = functools.cache(lambda: _placed(jax.eval_shape(train.keys, key, run().round), on_each))
    everyone = round_of(cfg, train.controllers)
    episodes = lambda: (train.dataset, run(), keys()[0], everyone)
    results = functools.cache(lambda: _placed(jax.eval_shape(train.rollout, *episodes()), split_over_devices))
    split = lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=split_over_devices)
    lower = {  # in the order in which a run needs them
        "keys": lambda: jax.jit(train.keys, out_shardings=on_each).lower(key, run().round),
        "rollout": lambda: train.rollout.lower(*episodes()),
    }
    if cfg.reward.mode == "paired":
        policies = split(everyone.policy)
        course = lambda: Course.of(results()[0].info)
        lower["pay"] = lambda: train.pay.lower(run().hypers, policies, course(), course().val_loss)
    if cfg.rounds:
        lower["learn"] = lambda: train.learn.lower(keys()[1], run(), results()[0])
    lower["report"] = lambda: train.report.lower(train.dataset, results()[1])

    turn = threading.Lock()  # loading and tracing are no faster at the same time, and the first program is needed first

    def program(name: str) -> Callable:
        with turn:
            compiled = _load(cache, name, facts, mesh) if cache else None
            lowered = None if compiled else lower[name]()
        if lowered:
            compiled = lowered.compile()
            if cache:
                _keep(cache, name, facts, compiled)
        done(name, time.perf_counter() - started)
        return compiled

    pool = ThreadPoolExecutor(len(lower))
    programs = {name: pool.submit(program, name) for name in lower}
    pool.shutdown(wait=False)
    for name, loading in programs.items():
        # what is only to be loaded and not needed yet can come while the first episodes are computed
        if name in ("keys", "rollout") or not cfg.rounds or not (cache and cache.has(name, facts)):
            loading.result()

    def call(name: str) -> Callable:
        return lambda *args: programs[name].result()(*args)

    compiled = {name: call(name) for name in ("rollout", "pay", "learn", "report", "keys")}
    return bind(cfg, train.dataset, train.controllers, start=train.start, **compiled)


def _placed(tree: Any, sharding: NamedSharding) -> Any:
    def place(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding, weak_type=leaf.weak_type)

    return jax.tree.map(place, tree)


def _keep(cache: StartupCache, name: str, facts: dict[str, Any], compiled: jax.stages.Compiled) -> None:
    """Puts a program into the cache, before its first run: after it XLA cannot serialise it any more."""
    try:
        cache.put(name, facts, serialize_executable.serialize(compiled))
    except Exception as error:  # of many kinds, from the compiler's own library
        cache.say(f"{name} is not kept for the next start: {type(error).__name__}: {error}".split("\n")[0])


def _load(cache: StartupCache, name: str, facts: dict[str, Any], mesh: Mesh) -> Callable | None:
    """A program from the cache; None if it has none that can be used."""
    kept = cache.get(name, facts)
    if kept is None:
        return None
    try:
        return serialize_executable.deserialize_and_load(*kept, execution_devices=list(mesh.devices.flat))
    except Exception as error:  # of many kinds, from the compiler's own library
        cache.refuse(name, facts, error)
        return None
