"""The mesh over environments, and what devices exchange: the only file that knows how many devices there are."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from esper_jax.config import Config

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
    """The tree on every device."""
    return jax.device_put(tree, NamedSharding(mesh, REPLICATED))


def split(tree: Any, mesh: Mesh) -> Any:
    """Arrays [P, E, ...] with each device's share of the environments on it."""
    return jax.device_put(tree, NamedSharding(mesh, SHARDED))


def gathered(mesh: Mesh) -> Callable:
    """A compiled function that puts all of a tree, however it is split, on every device."""
    return jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, REPLICATED))


def alone(mesh: Mesh) -> SingleDeviceSharding:
    """Placement on the first device of this process alone."""
    return SingleDeviceSharding(mesh.local_devices[0])


def on_one(tree: Any) -> Any:
    """A tree that is on every device, on the first one of this process alone."""
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)
