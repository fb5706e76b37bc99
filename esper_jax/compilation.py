"""Devices and programs of a run, before it starts: compiled at the same time, so that the wait has a name and is short.

Compiled programs are kept in the user's cache directory, so a second start finds them there.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from esper_jax import devices
from esper_jax.config import Config
from esper_jax.train import RunState, Train

# Programs that compile faster than this are not worth a file.
LEAST_SECONDS = 0.3


def cache_folder() -> Path:
    """Where compiled programs are kept: private to the user, since who can write there can run code as them."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "esper_jax" / "xla"


def use_cache(folder: Path) -> None:
    """Turns the persistent compilation cache on, before anything is compiled; off where there is no place for it."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError:
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST_SECONDS)


def spread(cfg: Config) -> Config:
    """The configuration with the most devices that can share its environments evenly, if it does not name a number."""

    def even(n: int) -> bool:
        unit = n * cfg.env_chunk
        minibatches = cfg.n_envs % (n * cfg.ppo.minibatches) == 0
        return cfg.n_envs % unit == 0 and cfg.report_envs % unit == 0 and minibatches

    most = max(filter(even, range(1, jax.device_count() + 1)), default=1)
    return cfg if cfg.devices else cfg.replace(devices=most)


def compile_ahead(
    train: Train, cfg: Config, key: jax.Array, run: RunState, done: Callable[[str, float], None] = lambda *_: None
) -> None:
    """Compiles what `train.update` and `train.compare` will call, each program in its own thread.

    JAX keeps the programs and finds them again when it is called with arguments of the same shapes and placement.
    `done(name, seconds)` is called when a program is ready.
    """
    mesh = devices.make_mesh(cfg.devices)
    key, number = devices.replicate(key, mesh), jnp.int32(0)
    split_over_devices = NamedSharding(mesh, devices.EACH)

    def place(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=split_over_devices, weak_type=leaf.weak_type)

    def episodes(envs: int):
        arguments = train.dataset, run, key, number, jnp.arange(envs)
        return train.rollout.lower(*arguments), jax.tree.map(place, jax.eval_shape(train.rollout, *arguments))

    started = time.perf_counter()
    comparison, (_, states) = episodes(cfg.report_envs)
    programs = {"comparison": comparison, "report": train.report.lower(train.dataset, states)}
    if cfg.rounds:
        programs["rollout"], (rows, _) = episodes(cfg.n_envs)
        programs["learner"] = train.learn.lower(key, run, rows)
        if cfg.n_envs == cfg.report_envs:
            del programs["comparison"]  # the same program
    with ThreadPoolExecutor(len(programs)) as pool:
        waiting = {pool.submit(program.compile): name for name, program in programs.items()}
        for future in as_completed(waiting):
            future.result()
            done(waiting[future], time.perf_counter() - started)
