"""The seed modules: one table row each (part of Esper's Kasmina; formulas in slots_and_hosts 2.3).

A seed reads the host's features at its slot and returns features of the same shape. No BatchNorm, no dropout, no bias in
convolutions. `forward` works on one tile `[C, H, W, N]` (see `layers`); `apply` is the same in the public layout
`[B, H, W, C]`. To add a module from outside, write `init(key, width) -> dict` and `forward(params, x)` and `register` it.

Initial values differ from the reference where its choice could never learn (a zero convolution before ReLU(GroupNorm)
has zero gradient for ever) or exploded (a zero projection before a GroupNorm has a first gradient 316 times too large):
`conv_small` starts from the default init, `bottleneck` from a zero GroupNorm scale.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp

from esper_jax.network import layers
from esper_jax.types import BLUEPRINTS, HEAD_SIZES, Array

Params = dict[str, Array]


class Blueprint(NamedTuple):
    """A kind of seed."""

    init: Callable[[Array, int], Params]  # (key, width) -> parameters
    forward: Callable[[Params, Array], Array]  # (parameters, [C, H, W, N]) -> [C, H, W, N]

    def apply(self, params: Params, x: Array) -> Array:
        """The module on features `[B, H, W, C]`."""
        return layers.from_tiles(self.forward(params, layers.to_tiles(x)[0])[None])

    def shapes(self, width: int) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter, in the order in which they are packed."""
        return _shapes(self.init, width)

    def param_count(self, width: int) -> int:
        """Number of parameters at `width` channels."""
        return sum(_size(shape) for shape in self.shapes(width).values())


@cache
def _shapes(init: Callable, width: int) -> dict[str, tuple[int, ...]]:
    tree = jax.eval_shape(lambda key: init(key, width), jax.random.key(0))
    return {name: leaf.shape for name, leaf in tree.items()}


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for extent in shape:
        size *= extent
    return size


def _norm_params(c: int, scale: float = 1.0) -> Params:
    return {"scale": jnp.full(c, scale), "bias": jnp.zeros(c)}


def _noop_init(key: Array, c: int) -> Params:
    return {}


def _noop(p: Params, x: Array) -> Array:
    return x


def _norm_init(key: Array, c: int) -> Params:
    return {"strength": jnp.zeros(()), **_norm_params(c)}


def _norm(p: Params, x: Array) -> Array:
    """x + tanh(s) (GN(x) - x); 2C + 1 parameters."""
    return x + jnp.tanh(p["strength"]).astype(x.dtype) * (layers.group_norm_tile(x, p["scale"], p["bias"]) - x)


def _attention_init(key: Array, c: int) -> Params:
    squeeze = max(1, c // 4)
    return {
        "squeeze": layers.uniform_fan_in(key, (c, squeeze), c),
        "excite": jnp.zeros((squeeze, c)),
        "bias": jnp.full(c, 3.0),
    }


def _attention(p: Params, x: Array) -> Array:
    """Squeeze-and-excite: x sigmoid(W2 relu(W1 mean(x)) + b); 2 C max(1, C//4) + C parameters."""
    squeezed = jax.nn.relu(p["squeeze"].T @ layers.global_average(x))
    gain = jax.nn.sigmoid(p["excite"].T @ squeezed + p["bias"][:, None])
    return x * gain[:, None, None, :].astype(x.dtype)


def _depthwise_init(key: Array, c: int) -> Params:
    depth_key, point_key = jax.random.split(key)
    depthwise = layers.uniform_fan_in(depth_key, (3, 3, c), 9)
    return {"depthwise": depthwise, "pointwise": layers.conv_init(point_key, 1, c, c), **_norm_params(c)}


def _depthwise(p: Params, x: Array) -> Array:
    """x + relu(GN(PW(DW3(x)))); C^2 + 11C parameters."""
    y = layers.conv_tile(layers.depthwise_tile(x, p["depthwise"]), p["pointwise"])
    return x + jax.nn.relu(layers.group_norm_tile(y, p["scale"], p["bias"]))


def _bottleneck_init(key: Array, c: int) -> Params:
    inner = max(8, c // 4)
    down, conv, up = jax.random.split(key, 3)
    return {
        "down": layers.conv_init(down, 1, c, inner),
        "conv": layers.conv_init(conv, 3, inner, inner),
        "up": layers.conv_init(up, 1, inner, c),
        **_norm_params(c, scale=0.0),
    }


def _bottleneck(p: Params, x: Array) -> Array:
    """x + GN(U relu(C3 relu(D x))), inner width b = max(8, C//4); 2Cb + 9b^2 + 2C parameters."""
    y = jax.nn.relu(layers.conv_tile(x, p["down"]))
    y = jax.nn.relu(layers.conv_tile(y, p["conv"]))
    return x + layers.group_norm_tile(layers.conv_tile(y, p["up"]), p["scale"], p["bias"])


def _conv_init(size: int) -> Callable[[Array, int], Params]:
    return lambda key, c: {"conv": layers.conv_init(key, size, c, c), **_norm_params(c)}


def _conv(p: Params, x: Array) -> Array:
    """x + relu(GN(conv(x))); conv_small (1x1) has C^2 + 2C parameters, conv_light (3x3) 9C^2 + 2C."""
    return x + jax.nn.relu(layers.group_norm_tile(layers.conv_tile(x, p["conv"]), p["scale"], p["bias"]))


def _conv_heavy_init(key: Array, c: int) -> Params:
    first, second = (_conv_init(3)(k, c) for k in jax.random.split(key))
    return {f"{name}_{i}": value for i, half in enumerate((first, second)) for name, value in half.items()}


def _conv_heavy(p: Params, x: Array) -> Array:
    """x + B(B(x)), B = relu(GN(conv3(.))); 18C^2 + 4C parameters."""
    y = x
    for i in (0, 1):
        y = layers.conv_tile(y, p[f"conv_{i}"])
        y = jax.nn.relu(layers.group_norm_tile(y, p[f"scale_{i}"], p[f"bias_{i}"]))
    return x + y


# The reference sets a seed's last layer to zero when it is germinated under MULTIPLY. For these modules that zero would sit
# before a ReLU or a sigmoid and never learn (or, in bottleneck, adds nothing to the zero scale), and the blend is the
# identity at alpha 0 anyway: nothing is set.
CNN: dict[str, Blueprint] = {
    "noop": Blueprint(_noop_init, _noop),
    "conv_light": Blueprint(_conv_init(3), _conv),
    "attention": Blueprint(_attention_init, _attention),
    "norm": Blueprint(_norm_init, _norm),
    "depthwise": Blueprint(_depthwise_init, _depthwise),
    "bottleneck": Blueprint(_bottleneck_init, _bottleneck),
    "conv_small": Blueprint(_conv_init(1), _conv),
    "conv_heavy": Blueprint(_conv_heavy_init, _conv_heavy),
}


def register(name: str, blueprint: Blueprint) -> None:
    """Adds a module to the table and to the action space, behind the existing ones.

    It is offered to controllers once its name is in `LifecycleConfig.blueprints`. Raises ValueError if the name is taken
    or the module changes the shape of its input.
    """
    if name in BLUEPRINTS:
        raise ValueError(f"blueprint {name!r} exists already (known: {', '.join(BLUEPRINTS)})")
    x = jax.ShapeDtypeStruct((8, 6, 4, 2), jnp.float32)
    y = jax.eval_shape(lambda key, x: blueprint.forward(blueprint.init(key, 8), x), jax.random.key(0), x)
    if y.shape != x.shape or y.dtype != x.dtype:
        raise ValueError(f"blueprint {name!r} turns features {x.shape} into {y.shape}: must keep shape and dtype")
    BLUEPRINTS.append(name)
    CNN[name] = blueprint
    HEAD_SIZES["blueprint"] = len(BLUEPRINTS)
