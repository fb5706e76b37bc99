"""The seed modules: one table row each (part of Esper's Kasmina; formulas in slots_and_hosts 2.3).

A seed reads the host's features at its slot and returns features of the same shape. No BatchNorm, no dropout, no bias
in convolutions. A row has a `spec`, which says how many parameters of what shape and initial range a module has at a
width, and a `forward` on one tile `[C, H, W, N]` (see `layers`); its costly first part may be told apart as `stem`.
A module of one's own is a `Blueprint` among `LifecycleConfig.blueprints`; `Blueprint.from_functions` makes one of any
`init` and `apply` on `[B, H, W, C]`.

Every parameter starts uniform in a range (PyTorch's default for layers) or constant, so that all kinds of seeds are
drawn by one random call. Initial values differ from the reference where its choice could never learn (a zero
convolution before ReLU(GroupNorm) has zero gradient for ever) or exploded (a zero projection before a GroupNorm has a
first gradient 316 times too large): `conv_small` starts from the default init, `bottleneck` from a zero GroupNorm
scale.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from esper_jax.network import layers, sequences
from esper_jax.network.host import Layout
from esper_jax.types import Array

Params = dict[str, Array]


class Initial(NamedTuple):
    """Shape of a parameter and the range in which it starts."""

    shape: tuple[int, ...]
    low: float
    high: float

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def uniform(shape: tuple[int, ...], fan_in: int) -> Initial:
    """Uniform in +-1/sqrt(fan_in), PyTorch's default for convolutions and linear layers."""
    bound = 1 / math.sqrt(fan_in)
    return Initial(shape, -bound, bound)


def constant(shape: tuple[int, ...], value: float) -> Initial:
    return Initial(shape, value, value)


class Blueprint(NamedTuple):
    """A kind of seed. Two are the same if their functions are the same objects."""

    name: str
    spec: Callable[[int], dict[str, Initial]]  # width -> parameters, in the order in which they are packed
    forward: Callable[..., Array]  # (parameters, x) -> y, both a tile; with a stem (parameters, x, stem's) -> y
    stem: Callable[[Params, Array], Array] | None = None  # (parameters, x) -> a tile, kept for the backward pass
    draw: Callable[[Array, int], Params] | None = None  # (key, width) -> parameters that no range describes
    layout: Layout = layers.IMAGES  # of the tiles

    def __repr__(self) -> str:
        """Short: a message about a configuration shows it, and the addresses of functions tell nobody anything."""
        return f"Blueprint({self.name!r})"

    @classmethod
    def from_functions(
        cls,
        name: str,
        init: Callable[[Array, int], Any],
        apply: Callable[[Any, Array], Array],
        layout: Layout = layers.IMAGES,
    ) -> Blueprint:
        """A module whose features lie as everywhere in the field.

        Args:
          init: `(key, width) -> params`, any pytree of f32 arrays.
          apply: `(params, x) -> y`, both `[B, H, W, C]` (for text `[B, L, C]`); called with a tile of a batch at a
            time, so that it may not depend on other examples. `y` is cast to the dtype of `x`.
          layout: of the host that it is for: `layers.IMAGES` or `sequences.SEQUENCES`. In a language model `apply` must
            be causal, too: what it gives a token may not depend on later ones.

        A module of flax, for which `x` has to have some size when it is initialised:

        >>> from flax import linen as nn
        >>> init = lambda key, width: nn.Conv(width, (3, 3)).init(key, jnp.zeros((1, 8, 8, width)))
        >>> apply = lambda params, x: nn.Conv(x.shape[-1], (3, 3)).apply(params, x)
        >>> Blueprint.from_functions("conv", init, apply).param_count(8)  # 9 * 8 * 8 and a bias
        584
        """

        @functools.cache
        def shapes(width: int) -> Any:
            return jax.eval_shape(lambda: init(jax.random.key(0), width))

        def named(params: Any) -> Params:
            return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}

        def spec(width: int) -> dict[str, Initial]:
            return {path: Initial(leaf.shape, 0, 0) for path, leaf in named(shapes(width)).items()}

        def forward(params: Params, x: Array) -> Array:
            tree = shapes(layout.width(x))
            leaves = [params[path] for path in named(tree)]  # by name: JAX sorts the entries of a dict
            y = apply(jax.tree.unflatten(jax.tree.structure(tree), leaves), layout.from_tile(x))
            return layout.to_tile(y.astype(x.dtype))

        return cls(name, spec, forward, draw=lambda key, width: named(init(key, width)), layout=layout)

    def check(self, width: int = 8, dtype: str = "float32") -> None:
        """Tries the module on features of that many channels.

        Raises ValueError if it fails on them or changes their shape or dtype, or if its parameters are not those that
        its `spec` says, all f32.
        """
        x = jax.ShapeDtypeStruct(self.layout.example(width), dtype)
        said = f"blueprint {self.name!r}: at {width} channels of {dtype} "
        facts = lambda y: f"{getattr(y, 'dtype', type(y).__name__)}{list(getattr(y, 'shape', []))}"
        try:
            params = jax.eval_shape(lambda: self.init(jax.random.key(0), width))
            wanted = {name: f"float32{list(initial.shape)}" for name, initial in self.spec(width).items()}
            stem = jax.eval_shape(self.stem_of, params, x)
            y = jax.eval_shape(self.after_stem, params, x, stem)
        except Exception as error:  # whatever somebody else's code raises
            raise ValueError(f"{said}it fails: {type(error).__name__}: {error}") from error
        found = {name: facts(leaf) for name, leaf in params.items()}
        if found != wanted:
            raise ValueError(f"{said}its parameters are {found}: must be {wanted}, as its spec says")
        for part, out in (("stem", stem), ("module", y)):
            if facts(out) != facts(x):
                raise ValueError(f"{said}its {part} turns {facts(x)} into {facts(out)}: must keep shape and dtype")

    def stem_of(self, params: Params, x: Array) -> Array:
        """What is kept of a tile for the backward pass; zeros for a module that keeps nothing."""
        return jnp.zeros_like(x) if self.stem is None else self.stem(params, x)

    def after_stem(self, params: Params, x: Array, stem: Array) -> Array:
        """The module on a tile of which the stem is known."""
        return self.forward(params, x) if self.stem is None else self.forward(params, x, stem)

    def init(self, key: Array, width: int) -> Params:
        """Fresh parameters for `width` channels, f32."""
        spec = self.spec(width)
        if self.draw is not None:
            drawn = self.draw(key, width)
            return {name: drawn[name] for name in spec} if drawn.keys() == spec.keys() else drawn
        keys = jax.random.split(key, max(len(spec), 1))
        return {
            name: jax.random.uniform(k, p.shape, jnp.float32, p.low, p.high)
            if p.low < p.high
            else jnp.full(p.shape, p.low, jnp.float32)
            for k, (name, p) in zip(keys, spec.items(), strict=False)
        }

    def apply(self, params: Params, x: Array) -> Array:
        """The module on features `[B, H, W, C]`, or `[B, L, C]` of text."""
        tile = self.layout.to_tile(x)
        return self.layout.from_tile(self.after_stem(params, tile, self.stem_of(params, tile)))

    def param_count(self, width: int) -> int:
        """Number of parameters at `width` channels."""
        return sum(p.size for p in self.spec(width).values())


def _noop(p: Params, x: Array) -> Array:
    return x


def _group_norm_spec(c: int, scale: float = 1.0) -> dict[str, Initial]:
    return {"scale": constant((c,), scale), "bias": constant((c,), 0.0)}


def _conv(size: int, c: int, o: int) -> Initial:
    return uniform((size, size, c, o), size * size * c)


def _norm_spec(c: int) -> dict[str, Initial]:
    return {"strength": constant((), 0.0), **_group_norm_spec(c)}


def _norm(p: Params, x: Array) -> Array:
    """x + tanh(s) (GN(x) - x); 2C + 1 parameters."""
    return x + jnp.tanh(p["strength"]).astype(x.dtype) * (layers.group_norm_tile(x, p["scale"], p["bias"]) - x)


def _attention_spec(c: int) -> dict[str, Initial]:
    squeeze = max(1, c // 4)
    return {
        "squeeze": uniform((c, squeeze), c),
        "excite": constant((squeeze, c), 0.0),
        "bias": constant((c,), 3.0),
    }


def _attention(p: Params, x: Array) -> Array:
    """Squeeze-and-excite: x sigmoid(W2 relu(W1 mean(x)) + b); 2 C max(1, C//4) + C parameters."""
    squeezed = jax.nn.relu(p["squeeze"].T @ layers.global_average(x))
    gain = jax.nn.sigmoid(p["excite"].T @ squeezed + p["bias"][:, None])
    return x * gain[:, None, None, :].astype(x.dtype)


def _depthwise_spec(c: int) -> dict[str, Initial]:
    return {"depthwise": uniform((3, 3, c), 9), "pointwise": _conv(1, c, c), **_group_norm_spec(c)}


def _separable(p: Params, x: Array) -> Array:
    """PW(DW3(x))."""
    return layers.conv_tile(layers.depthwise_tile(x, p["depthwise"]), p["pointwise"])


def _bottleneck_spec(c: int) -> dict[str, Initial]:
    inner = max(8, c // 4)
    convolutions = {"down": _conv(1, c, inner), "conv": _conv(3, inner, inner), "up": _conv(1, inner, c)}
    return {**convolutions, **_group_norm_spec(c, scale=0.0)}


def _narrow(p: Params, x: Array) -> Array:
    """U relu(C3 relu(D x)), inner width b = max(8, C//4)."""
    y = jax.nn.relu(layers.conv_tile(x, p["down"]))
    y = jax.nn.relu(layers.conv_tile(y, p["conv"]))
    return layers.conv_tile(y, p["up"])


def _bottleneck(p: Params, x: Array, narrow: Array) -> Array:
    """x + GN(U relu(C3 relu(D x))); 2Cb + 9b^2 + 2C parameters."""
    return x + layers.group_norm_tile(narrow, p["scale"], p["bias"])


def _convolution(p: Params, x: Array) -> Array:
    return layers.conv_tile(x, p["conv"])


def _residual(p: Params, x: Array, y: Array) -> Array:
    """x + relu(GN(y)), y = conv(x) or PW(DW3(x)).

    conv_small (1x1) has C^2 + 2C parameters, conv_light (3x3) 9C^2 + 2C, depthwise C^2 + 11C.
    """
    return x + jax.nn.relu(layers.group_norm_tile(y, p["scale"], p["bias"]))


def _conv_heavy_spec(c: int) -> dict[str, Initial]:
    half = {"conv": _conv(3, c, c), **_group_norm_spec(c)}
    return {f"{name}_{i}": initial for i in (0, 1) for name, initial in half.items()}


def _first_convolution(p: Params, x: Array) -> Array:
    return layers.conv_tile(x, p["conv_0"])


def _conv_heavy(p: Params, x: Array, y: Array) -> Array:
    """x + B(B(x)), B = relu(GN(conv3(.))), y = the first conv3(x); 18C^2 + 4C parameters."""
    y = jax.nn.relu(layers.group_norm_tile(y, p["scale_0"], p["bias_0"]))
    y = layers.conv_tile(y, p["conv_1"])
    return x + jax.nn.relu(layers.group_norm_tile(y, p["scale_1"], p["bias_1"]))


# The reference sets a seed's last layer to zero when it is germinated under MULTIPLY. For these modules that zero
# would sit before a ReLU or a sigmoid and never learn (or, in bottleneck, adds nothing to the zero scale), and the
# blend is the identity at alpha 0 anyway: nothing is set.
CNN: dict[str, Blueprint] = {
    blueprint.name: blueprint
    for blueprint in (
        Blueprint("noop", lambda c: {}, _noop),
        Blueprint("conv_light", lambda c: {"conv": _conv(3, c, c), **_group_norm_spec(c)}, _residual, _convolution),
        Blueprint("attention", _attention_spec, _attention),
        Blueprint("norm", _norm_spec, _norm),
        Blueprint("depthwise", _depthwise_spec, _residual, _separable),
        Blueprint("bottleneck", _bottleneck_spec, _bottleneck, _narrow),
        Blueprint("conv_small", lambda c: {"conv": _conv(1, c, c), **_group_norm_spec(c)}, _residual, _convolution),
        Blueprint("conv_heavy", _conv_heavy_spec, _conv_heavy, _first_convolution),
    )
}


# --- for transformers (slots_and_hosts 2.4); x is the residual stream `[N, L, d]`, not normalised ---------------------

ATTENTION_HEADS = 4


def _layer_norm(p: Params, x: Array) -> Array:
    """x + tanh(s) (LN(x) - x); 2d + 1 parameters."""
    return x + jnp.tanh(p["strength"]).astype(x.dtype) * (sequences.layer_norm(x, p["scale"], p["bias"]) - x)


def _low_rank_spec(rank: int) -> Callable[[int], dict[str, Initial]]:
    return lambda d: {"down": uniform((d, rank), d), "up": constant((rank, d), 0.0)}


def _low_rank(p: Params, x: Array) -> Array:
    """x + U(D(x)) of rank r; 2 r d parameters."""
    return x + sequences.linear(sequences.linear(x, p["down"]), p["up"])


def _self_attention_spec(d: int) -> dict[str, Initial]:
    if d % ATTENTION_HEADS:
        raise ValueError(f"attention at width {d}: must be a multiple of its {ATTENTION_HEADS} heads")
    projection = {"out": constant((d, d), 0.0), "out_bias": constant((d,), 0.0)}
    return {"qkv": uniform((d, 3 * d), d), "qkv_bias": uniform((3 * d,), d), **projection}


def _self_attention(p: Params, x: Array) -> Array:
    """x + P(causal attention(x)) with 4 heads; 4d^2 + 4d parameters."""
    heads = sequences.causal_attention(x, p["qkv"], p["qkv_bias"], ATTENTION_HEADS)
    return x + sequences.linear(heads, p["out"], p["out_bias"])


def _mlp_spec(expansion: int) -> Callable[[int], dict[str, Initial]]:
    def spec(d: int) -> dict[str, Initial]:
        inner = expansion * d
        into = {"in": uniform((d, inner), d), "in_bias": uniform((inner,), d)}
        return {**into, "out": constant((inner, d), 0.0), "out_bias": constant((d,), 0.0)}

    return spec


def _mlp(p: Params, x: Array) -> Array:
    """x + F2(gelu(F1(x))) with e d inner channels; 2 e d^2 + (e + 1) d parameters."""
    inner = sequences.gelu(sequences.linear(x, p["in"], p["in_bias"]))
    return x + sequences.linear(inner, p["out"], p["out_bias"])


TRANSFORMER: dict[str, Blueprint] = {
    name: Blueprint(name, spec, forward, layout=sequences.SEQUENCES)
    for name, spec, forward in (
        ("noop", lambda d: {}, _noop),
        ("norm", _norm_spec, _layer_norm),
        ("lora", _low_rank_spec(8), _low_rank),
        ("lora_large", _low_rank_spec(32), _low_rank),
        ("attention", _self_attention_spec, _self_attention),
        # the reference's other kernel for the same mathematics
        ("flex_attention", _self_attention_spec, _self_attention),
        ("mlp_small", _mlp_spec(2), _mlp),
        ("mlp", _mlp_spec(4), _mlp),
    )
}
