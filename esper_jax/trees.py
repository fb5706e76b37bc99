"""Two things that are done to whole trees of arrays everywhere."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from esper_jax.types import Array


def select(where: Array | bool, new: Any, old: Any) -> Any:
    """`new` where `where` (bool[] for all, or broadcast against every leaf), else `old`, leaf by leaf."""
    return jax.tree.map(lambda a, b: jnp.where(where, a, b), new, old)


def strip_weak_type(tree: Any) -> Any:
    """The same arrays with strong types, as compiled functions return them: a state that starts with weakly typed
    leaves would be compiled for a second time when it comes back."""
    return jax.tree.map(lambda leaf: jax.lax.convert_element_type(leaf, leaf.dtype), tree)
