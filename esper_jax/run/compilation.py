"""Devices and programs of a run, before it starts: compiled in the order in which they are needed.

The first round needs the rollout alone. What comes after it is traced meanwhile and compiled while the first round is
played, one program at a time: the compiler takes most of the memory of a short run.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import functools
import gc
import hashlib
import os
import platform
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import jax
from jax.sharding import NamedSharding

from esper_jax.config import Config
from esper_jax.env.reward import Course
from esper_jax.run import command, devices
from esper_jax.train import Train, bind, round_of

MOST_CACHE_BYTES = 2**30
T = TypeVar("T")


def spread(cfg: Config) -> Config:
    """The configuration with the most devices that can share its environments evenly, if it does not name a number."""

    if cfg.devices:
        return cfg
    if devices.several():  # none may be idle: an uneven split is refused
        return cfg.replace(devices=jax.device_count())
    even = lambda n: cfg.n_envs % (n * cfg.env_chunk) == 0
    return cfg.replace(devices=max(filter(even, range(1, jax.device_count() + 1)), default=1))


def cache_folder() -> Path | None:
    """Where compiled programs are kept: in `$XDG_CACHE_HOME`, else `~/.cache`, apart for every make of processor.

    JAX finds a program by what was lowered, and so never a stale one, but does not ask for which CPU it was compiled.
    None for a user without a home.
    """
    try:
        named = os.environ.get("XDG_CACHE_HOME", "")
        base = named if os.path.isabs(named) else Path.home() / ".cache"  # the specification ignores relative ones
    except RuntimeError:  # neither $HOME nor an entry in the list of users
        return None
    make = hashlib.sha256("\n".join(_processor()).encode()).hexdigest()[:12]
    return Path(base) / "esper_jax" / "programs" / make


def _processor() -> list[str]:
    """What tells processors apart that need other machine code; the computer's name where the system does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = ("model name", "cpu family", "model", "stepping", "flags", "CPU part", "Features")
    facts = sorted({line for line in lines if line.split(":")[0].strip() in named})
    return [platform.machine(), *(facts or [platform.processor(), platform.node()])]


def keep_programs(folder: Path | None) -> str | None:
    """Keeps compiled programs for the next start (JAX's own persistent cache), the latest used if there are many.

    A folder that the user set (`JAX_COMPILATION_CACHE_DIR`) stays. Returns a line that says why nothing is kept, if so.
    """
    named = jax.config.jax_compilation_cache_dir
    place = named or (folder and str(folder))
    problem = "there is no home folder" if place is None else None
    if place is not None and "://" not in place:  # else it is storage that JAX knows how to reach
        try:
            Path(place).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=place):
                pass
        except OSError as error:
            problem = f"{place}: {error.strerror or error}"
    if problem:
        jax.config.update("jax_compilation_cache_dir", None)
        return f"compiled programs are not kept for the next start: {problem}"
    if named is None:
        jax.config.update("jax_compilation_cache_dir", place)
        jax.config.update("jax_compilation_cache_max_size", MOST_CACHE_BYTES)
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    return None


def prepare() -> None:
    """What a command that plays episodes does first. Programs that another one compiled are found again."""
    command.use_plain_streams()
    spare_the_collector()
    # the call stack of every instruction is a fifth of a kept program
    jax.config.update("jax_include_full_tracebacks_in_locations", False)
    if lost := keep_programs(cache_folder()):
        command.say(f"warning: {lost}")


def background(work: dict[str, Callable[[], Any]]) -> dict[str, Future]:
    """Functions without arguments, called one after the other beside the caller, and what they will return.

    In a daemon thread: the interpreter waits at its end for those of an executor, and so would whoever interrupts it.
    """
    futures = {name: Future() for name in work}
    waiting = collections.deque((futures[name], function) for name, function in work.items())

    def call_all() -> None:
        while waiting:  # what was returned is kept by the caller alone
            future, function = waiting.popleft()
            try:
                future.set_result(function())
            except BaseException as error:  # raised again where the result is asked for
                future.set_exception(error)

    threading.Thread(target=call_all, daemon=True).start()
    return futures


def run_template(train: Train, cfg: Config, key: jax.Array) -> Any:
    """Shapes and placement of a run's state, without computing it."""
    return _placed(
        jax.eval_shape(train.programs.start, key), NamedSharding(devices.make_mesh(cfg.devices), devices.REPLICATED)
    )


def compile_ahead(
    train: Train, cfg: Config, key: jax.Array, done: Callable[[str, float], None] = lambda *_: None
) -> Train:
    """The same run, with its rollout compiled and the other programs on their way.

    Whoever needs one of those waits until it is ready, and gets the error if it could not be compiled. Raises
    MemoryError for a program that does not fit into a device.

    Args:
      done: called as `done(name, seconds)` when a program is ready.
    """
    mesh = devices.make_mesh(cfg.devices)
    on_each, split_over_devices = NamedSharding(mesh, devices.REPLICATED), NamedSharding(mesh, devices.SHARDED)
    started = time.perf_counter()
    run = run_template(train, cfg, key)
    keys = _placed(jax.eval_shape(train.programs.keys, key, run.round), on_each)
    whole_key = _placed(jax.eval_shape(lambda: key), on_each)
    everyone = round_of(cfg, train.controllers)
    if devices.several():
        everyone = _placed(jax.eval_shape(lambda: everyone), split_over_devices)
    episodes = (train.dataset, run, keys[0], everyone)
    results = functools.cache(lambda: _placed(jax.eval_shape(train.programs.rollout, *episodes), split_over_devices))
    lower = {  # in the order in which a run needs them
        "keys": lambda: jax.jit(train.programs.keys, out_shardings=on_each).lower(whole_key, run.round),
        "rollout": lambda: train.programs.rollout.lower(*episodes),
    }
    if cfg.rounds:
        lower["gather"] = lambda: train.programs.gather.lower(results()[0])
        lower["learn"] = lambda: train.programs.learn.lower(*_placed((keys[1], run, results()[0]), devices.alone(mesh)))
    lower["report"] = lambda: train.programs.report.lower(train.dataset, results()[1])
    if cfg.reward.mode == "paired":
        policies = jax.ShapeDtypeStruct(everyone.policy.shape, everyone.policy.dtype, sharding=split_over_devices)
        course = lambda: Course.of(results()[0].info)
        lower["pay"] = lambda: train.programs.pay.lower(run.hypers, policies, course(), course().val_loss)

    # Tracing holds Python's lock and compiling does not: the two go side by side, each one at a time.
    lowered = background({name: functools.partial(without_garbage, function) for name, function in lower.items()})

    def program(name: str) -> Callable:
        compiled = lowered.pop(name).result().compile()
        return_memory()
        devices.check_memory(program_bytes(compiled), name)
        done(name, time.perf_counter() - started)
        return compiled

    programs = background({name: functools.partial(program, name) for name in lower})
    # where memory is the devices' own, what does not fit is found out before the first round
    for name in ("rollout",) if devices.device_memory() is None else tuple(lower):
        programs[name].result()

    def call(name: str) -> Callable:
        return lambda *args: programs[name].result()(*args)

    compiled = {name: call(name) for name in ("rollout", "pay", "gather", "learn", "report", "keys")}
    return bind(cfg, train.dataset, train.controllers, train.programs._replace(**compiled))


def program_bytes(compiled: Any) -> int:
    """What a compiled program needs on each device; 0 if the compiler does not say."""
    needs = compiled.memory_analysis()
    if needs is None:
        return 0
    whole = needs.argument_size_in_bytes + needs.output_size_in_bytes + needs.temp_size_in_bytes
    return whole - needs.alias_size_in_bytes


def spare_the_collector() -> None:
    """Tracing makes millions of objects and hardly any garbage in cycles; looking for it took a sixth of its time."""
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)


def without_garbage(lower: Callable[[], T]) -> T:
    """What is lowered, once the garbage of tracing is gone: compiling it takes most of the memory of a run."""
    lowered = lower()
    gc.collect()
    return lowered


def return_memory() -> None:
    """Gives back to the system what the compiler freed, a gigabyte after a rollout; glibc would keep it for the run."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _placed(tree: Any, sharding: NamedSharding) -> Any:
    def place(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding, weak_type=leaf.weak_type)

    return jax.tree.map(place, tree)
