"""esper_jax: reinforcement learning of growth in neural networks.

The names below are imported when they are first used: `esper_jax.evidence` reads finished runs without JAX.
"""

from __future__ import annotations

import importlib

_HOMES = {
    "Config": "esper_jax.config",
    "make": "esper_jax.gym",
    "make_env": "esper_jax.env.environment",
    "make_train": "esper_jax.train",
}

__all__ = ["Config", "make", "make_env", "make_train", "presets"]


def __getattr__(name: str):
    if name == "presets":
        return importlib.import_module("esper_jax.presets")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'esper_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
