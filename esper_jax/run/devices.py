"""The mesh over environments, and what devices and processes exchange: the only file that knows how many there are.

A run of several processes is one program: each of them has the same configuration and data, holds its devices' share of
the environments, and sees the results of all; the first one alone writes and talks. What is exchanged is exchanged from
the main thread.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from esper_jax.config import Config
from esper_jax.run import command

T = TypeVar("T")
AXIS = "env"
SHARDED = PartitionSpec(None, AXIS)  # the second axis, environments, is split over the devices; the first is policies
REPLICATED = PartitionSpec()  # every device holds all of it

MOST_CPU_DEVICES = 256  # that are made because somebody asks for them


def usable_cpus(root: Path = Path("/")) -> int:
    """CPUs that this process may use: those of its affinity, or as many as the quota of its control group pays for."""
    affinity = getattr(os, "sched_getaffinity", None)
    cpus = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, min([cpus, *map(math.ceil, _quotas(root))]))


def _groups(root: Path) -> set[Path]:
    """Folders of the control groups of version 2 that this process is in."""
    base = root / "sys/fs/cgroup"
    groups = {base}
    with contextlib.suppress(OSError):
        lines = (root / "proc/self/cgroup").read_text().splitlines()
        own = [base / line.removeprefix("0::/") for line in lines if line.startswith("0::/")]
        groups.update(own, *(group.parents for group in own))
    return groups


def _quotas(root: Path) -> list[float]:
    """CPUs that control groups allow, where one limits them: version 2, then version 1."""
    found, base = [], root / "sys/fs/cgroup"
    for group in _groups(root):
        with contextlib.suppress(OSError, ValueError):  # not there, or "max 100000"
            quota, period = map(int, (group / "cpu.max").read_text().split())
            found.append(quota / period)
    for controller in ("cpu", "cpu,cpuacct"):
        with contextlib.suppress(OSError, ValueError):
            quota = int((base / controller / "cpu.cfs_quota_us").read_text())
            period = int((base / controller / "cpu.cfs_period_us").read_text())
            if quota > 0:  # -1: no limit
                found.append(quota / period)
    return found


def host_memory(root: Path = Path("/")) -> int | None:
    """Bytes of memory that this machine has, or as many as its control group allows; None where nobody says."""
    found = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = (root / "proc/meminfo").read_text().splitlines()
        found += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemTotal:")]
    for group in _groups(root):
        with contextlib.suppress(OSError, ValueError):  # not there, or "max"
            found.append(int((group / "memory.max").read_text()))
    with contextlib.suppress(OSError, ValueError):
        found.append(int((root / "sys/fs/cgroup/memory/memory.limit_in_bytes").read_text()))
    return min(found, default=None)


def device_memory() -> int | None:
    """Bytes of memory that a device of its own memory has for JAX; None of a CPU."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit")


class TooLarge(MemoryError):
    """What does not fit into a device."""


def check_memory(need: int, what: str) -> None:
    """Raises TooLarge if a device has its own memory, and less than so many bytes."""
    there = device_memory()
    if there is not None and need > there:
        raise TooLarge(f"{what} needs {size(need)} on each device, which has {size(there)}")


def size(n: float) -> str:
    """
    >>> size(1.6e12), size(2_300_000), size(12)
    ('1.6 TB', '2.3 MB', '0.0 MB')
    """
    for factor, unit in ((1e12, "TB"), (1e9, "GB")):
        if n >= factor:
            return f"{n / factor:,.1f} {unit}"
    return f"{n / 1e6:.1f} MB"


def use_cpus(asked: int = 0) -> None:
    """One CPU device per usable CPU, or `asked` if that is more; to be called before anything touches a device.

    Of no consequence on a GPU, once devices exist, or if the environment says how many (`JAX_NUM_CPU_DEVICES`).
    """
    if not os.environ.get("JAX_NUM_CPU_DEVICES"):
        with contextlib.suppress(RuntimeError):  # devices exist
            jax.config.update("jax_num_cpu_devices", max(usable_cpus(), min(asked, MOST_CPU_DEVICES)))


HEARTBEAT_SECONDS = 30  # after which the others end when a process is gone


def join(coordinator: str | None = None, n_processes: int | None = None, process: int | None = None) -> None:
    """Makes this process one of several that share a run; to be called before anything asks for a device.

    Without arguments JAX finds out from a cluster (SLURM, Open MPI, Kubernetes, TPU) what they are. Raises ValueError.
    """
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    with contextlib.suppress(AttributeError):  # it would take SIGTERM from the run
        jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator, n_processes, process, initialization_timeout=60,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS, shutdown_timeout_seconds=HEARTBEAT_SECONDS,
        )  # fmt: skip
    except Exception as error:  # of every kind
        reason = command.line(error)[:300]
        raise ValueError(f"--distributed: the processes of the run cannot find each other ({reason})") from error


def joined() -> bool:
    return jax.distributed.is_initialized()


def leave_together() -> None:
    """Waits for the other processes, so that none ends as long as one needs it."""
    if joined():
        with contextlib.suppress(Exception):  # one is gone
            jax.distributed.shutdown()


def first() -> bool:
    """Whether this process is the one that writes files and talks."""
    return jax.process_index() == 0


def several() -> bool:
    """Whether other processes share the run; asks for no device where none does."""
    return joined() and jax.process_count() > 1


MOST_BYTES = 4096  # of a text that processes exchange


def each_says(text: str) -> list[str]:
    """What each process says; all have to call this at the same time."""
    if not several():
        return [text]
    own = text.encode()[:MOST_BYTES]
    said = multihost_utils.process_allgather(np.frombuffer(own.ljust(MOST_BYTES, b"\0"), np.uint8))
    return [row.tobytes().rstrip(b"\0").decode(errors="replace") for row in said]


class AllRefuse(ValueError):
    """What one process of a run refused, in all of them."""


def all_or_none(work: Callable[[], T]) -> T:
    """What `work` returns; where it refuses in one process (ValueError, OSError), all raise AllRefuse with its line."""
    result, error = None, None
    try:
        result = work()
    except (ValueError, OSError) as raised:
        if not several():
            raise
        error = raised
    said = each_says("" if error is None else f"!{error}")
    for number, line in enumerate(said):
        if line:
            agreed = isinstance(error, AllRefuse) or all(other == line for other in said)
            raise AllRefuse(line[1:] if agreed else f"process {number}: {line[1:]}") from error
    return result  # type: ignore[return-value]


def of_first(work: Callable[[], str]) -> str:
    """What `work` returns in the first process, which alone calls it; where it refuses, all do."""
    result = all_or_none(lambda: work() if first() else "")
    return each_says(result)[0]


def any_says(yes: bool) -> bool:
    """Whether any process says yes."""
    return "yes" in each_says("yes" if yes else "no")


def check_same(name: str, value: str) -> None:
    """Raises ValueError in all processes unless they have the same of something."""
    digests = each_says(hashlib.sha256(value.encode()).hexdigest())
    if other := [number for number, digest in enumerate(digests) if digest != digests[0]]:
        raise ValueError(f"process {other[0]} has another {name} than process 0: all must have the same")


def backend() -> str:
    """Platform of the devices. Raises ValueError if JAX finds none, or not those that were asked for."""
    try:
        return jax.default_backend()
    except Exception as error:  # an AssertionError without a word among others
        asked = jax.config.jax_platforms or "unset"  # type: ignore[attr-defined]  # JAX makes these at run time
        reason = f" ({error})" if str(error) else ""
        raise ValueError(
            f"JAX_PLATFORMS = {asked}: must name a platform that JAX finds here, such as cpu{reason}"
        ) from error


def make_mesh(devices: int) -> Mesh:
    """A mesh of one axis over so many devices, 0 for all there are. Raises ValueError if there are fewer."""
    available = jax.device_count()
    if devices > available:
        made = backend() == "cpu" and available == MOST_CPU_DEVICES
        there = "the most that are made of CPUs" if made else "the devices there are"
        raise ValueError(f"Config.devices = {devices}: must be at most {available}, {there}")
    return jax.make_mesh((devices or available,), (AXIS,), axis_types=(AxisType.Auto,))


def check_divides(mesh: Mesh, cfg: Config) -> None:
    """Raises ValueError unless every device gets the same number of environments, in whole chunks."""
    least, name = mesh.size * cfg.env_chunk, type(cfg).__name__
    if several() and mesh.size != jax.device_count():
        allowed = f"{jax.device_count()}, all that the {jax.process_count()} processes have"
        raise ValueError(f"{name}.devices = {cfg.devices}: must be {allowed}")
    if cfg.n_envs % least:
        devices = f"{mesh.size} devices times env_chunk = {cfg.env_chunk}"
        raise ValueError(f"{name}.n_envs = {cfg.n_envs}: must be a multiple of {least} ({devices})")


def over_devices(body: Callable, mesh: Mesh, in_specs: Any, out_specs: Any) -> Callable:
    """`body(..., axis_name=)` compiled for the mesh: each device runs it on its share of the environments.

    On one device `axis_name` is None and the program has no collective in it. Otherwise it is `shard_map` without
    replication checks: those would make the gradient of a replicated argument arrive summed over the devices.
    """
    if mesh.size == 1:
        return jax.jit(lambda *args: body(*args, axis_name=None))
    mapped = jax.shard_map(
        lambda *args: body(*args, axis_name=AXIS), mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )
    # stated, since the compiler may call the same placement by another name, and what comes back would not fit
    placed = lambda spec: NamedSharding(mesh, spec)
    is_spec = lambda leaf: isinstance(leaf, PartitionSpec)
    return jax.jit(mapped, out_shardings=jax.tree.map(placed, out_specs, is_leaf=is_spec))


def replicate(tree: Any, mesh: Mesh) -> Any:
    """The tree, which every process holds, on every device."""
    return _placed(tree, NamedSharding(mesh, REPLICATED))


def split(tree: Any, mesh: Mesh) -> Any:
    """Arrays [P, E, ...], which every process holds, with each device's share of the environments on it."""
    return _placed(tree, NamedSharding(mesh, SHARDED))


def _placed(tree: Any, sharding: NamedSharding) -> Any:
    return jax.tree.map(lambda leaf: put(leaf, sharding), tree) if several() else jax.device_put(tree, sharding)


def put(leaf: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    """An array that every process holds, where the sharding says, without asking the others whether it is the same."""
    if sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return leaf
    if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(put(jax.random.key_data(leaf), sharding))
    leaf = np.asarray(leaf)
    return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])


def fetch(tree: Any) -> Any:
    """The whole tree as arrays of NumPy in every process; all have to call this at the same time."""
    if not several():
        return jax.device_get(tree)
    here = lambda leaf: not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated
    whole = lambda leaf: leaf if here(leaf) else multihost_utils.process_allgather(leaf, tiled=True)
    return jax.device_get(jax.tree.map(whole, tree))


def gathered(mesh: Mesh) -> Callable:
    """A compiled function that puts all of a tree, however it is split, on every device."""
    return jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, REPLICATED))


def alone(mesh: Mesh) -> SingleDeviceSharding:
    """Placement on the first device of this process alone."""
    return SingleDeviceSharding(mesh.local_devices[0])


def on_one(tree: Any) -> Any:
    """A tree that is on every device, on the first one of this process alone; what is only traced lies nowhere."""
    here = lambda leaf: leaf if isinstance(leaf, jax.core.Tracer) else leaf.addressable_data(0)
    return jax.tree.map(here, tree)
