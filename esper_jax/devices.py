"""The mesh, and what devices exchange: the only file that knows how many devices there are."""

from __future__ import annotations

from typing import Any

import jax


def mean_over_devices(tree: Any, axis_name: str | None) -> Any:
    """Mean of every leaf over the devices of a mapped axis; the tree itself when there is none (`axis_name` None)."""
    return tree if axis_name is None else jax.lax.pmean(tree, axis_name)
