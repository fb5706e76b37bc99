"""The mesh over environments, and what devices exchange: the only file that knows how many devices there are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXIS = "env"
SHARDED = PartitionSpec(None, AXIS)  # the second axis, environments, is split over the devices; the first is policies
REPLICATED = PartitionSpec()  # every device holds all of it


def make_mesh(devices: int) -> Mesh:
    """A mesh of one axis over so many devices, 0 for all there are. Raises ValueError if there are fewer."""
    available = jax.device_count()
    if devices > available:
        raise ValueError(f"Config.devices = {devices}: must be at most {available}, the devices there are")
    return jax.make_mesh((devices or available,), (AXIS,), axis_types=(AxisType.Auto,))


def check_divides(mesh: Mesh, name: str, environments: int, part: str, size: int) -> None:
    """Raises ValueError unless every device gets the same number of environments, a multiple of the `part`'s size."""
    if environments % (mesh.size * size):
        raise ValueError(
            f"Config.{name} = {environments}: must be a multiple of {mesh.size * size} ({mesh.size} devices times "
            f"{part} = {size})"
        )


def over_devices(body: Callable, mesh: Mesh, in_specs: Any, out_specs: Any) -> Callable:
    """`body(..., axis_name=)` compiled for the mesh: each device runs it on its share of the environments.

    On one device `axis_name` is None and the program has no collective in it. Otherwise it is `shard_map` without
    replication checks: those would make the gradient of a replicated argument arrive summed over the devices, and a
    `pmean` of it then too large by their number, silently. So gradients are averaged explicitly and never taken through
    a collective.
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


def mean_over_devices(tree: Any, axis_name: str | None) -> Any:
    """Mean of every leaf over the devices of a mapped axis; the tree itself when there is none (`axis_name` None)."""
    return tree if axis_name is None else jax.lax.pmean(tree, axis_name)
