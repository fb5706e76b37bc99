"""The reference's arrays in our layout: NCHW to NHWC, OIHW to HWIO, linear `[out, in]` to `[in, out]`, and names.

Gradients have the layout of what they belong to, so one conversion serves both.
"""

from collections.abc import Callable
from typing import NamedTuple

import golden
import jax
import jax.numpy as jnp
import numpy as np

from esper_jax.config import HostConfig, TransformerConfig
from esper_jax.lifecycle import stages
from esper_jax.network import blend, blueprints, seed_bank, transformer
from esper_jax.network.cnn import Block, HostParams, HostVars, Statistics

_norm = {"scale": "gn.weight", "bias": "gn.bias"}
_below = lambda prefix, names: {ours: f"{prefix}.{theirs}" for ours, theirs in names.items()}
_heavy = lambda i: {
    f"{ours}_{i}": f"enhance.{i}.{theirs}" for ours, theirs in ({"conv": "conv.weight"} | _norm).items()
}
_CNN_NAMES = {
    "noop": {},
    "conv_light": _below("enhance", {"conv": "conv.weight"} | _norm),
    "attention": {"squeeze": "fc.0.weight", "excite": "fc.2.weight", "bias": "fc.2.bias"},
    "norm": {"strength": "scale", "scale": "norm.weight", "bias": "norm.bias"},
    "depthwise": {"depthwise": "depthwise.weight", "pointwise": "pointwise.weight"} | _norm,
    "bottleneck": {"down": "down.weight", "conv": "conv.weight", "up": "up.weight"} | _norm,
    "conv_small": {"conv": "conv.weight"} | _norm,
    "conv_heavy": _heavy(0) | _heavy(1),
}
_low_rank = {"down": "down.weight", "up": "up.weight"}
_attention = {"qkv": "qkv.weight", "qkv_bias": "qkv.bias", "out": "proj.weight", "out_bias": "proj.bias"}
_mlp = {"in": "fc1.weight", "in_bias": "fc1.bias", "out": "fc2.weight", "out_bias": "fc2.bias"}
_TRANSFORMER_NAMES = {
    "noop": {},
    "norm": _CNN_NAMES["norm"],
    "lora": _low_rank,
    "lora_large": _low_rank,
    "attention": _attention,
    "flex_attention": _attention,
    "mlp_small": _mlp,
    "mlp": _mlp,
}


class Topology(NamedTuple):
    """The modules for one kind of host, and the reference's names of their parameters by ours."""

    modules: dict[str, blueprints.Blueprint]
    names: dict[str, dict[str, str]]
    features: Callable[[np.ndarray], jax.Array]  # the reference's in our public layout

    def seed_params(self, blueprint: str, given: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """Parameters (or their gradients) of one seed, in our order."""
        assert set(given) == set(self.names[blueprint].values())
        return {ours: tensor(ours, given[theirs]) for ours, theirs in self.names[blueprint].items()}

    def blueprint_of(self, given: dict[str, np.ndarray]) -> str:
        """The first whose parameters have these names."""
        return next(key for key, names in self.names.items() if set(names.values()) == set(given))

    def seed_vars(self, blueprint: str, seed: dict, gate: dict, width: int, names: tuple[str, ...]) -> blend.SeedVars:
        """One slot that can hold the named kinds, with a seed of the reference in it."""
        kinds = seed_bank.table(names, self.modules)
        params = seed_bank.pack(self.seed_params(blueprint, seed), seed_bank.packed_size(kinds, width))
        return blend.SeedVars(params, packed_gate(gate, blend.gate_size(width)), width, kinds)

    def unpacked(self, vars: blend.SeedVars, blueprint: str) -> dict[str, dict[str, jax.Array]]:
        """The arrays in both vectors of a slot, so that each is compared by its own size."""
        hidden = (vars.gate.size - 1) // (vars.width + 2)
        gate = jnp.split(vars.gate, np.cumsum([vars.width * hidden, hidden, hidden]))
        return {
            "seed": seed_bank.unpack(self.modules[blueprint], vars.width, vars.params),
            "gate": dict(zip(("W1", "b1", "W2", "b2"), gate, strict=True)),
        }


def images(x: np.ndarray) -> jax.Array:
    """NCHW to NHWC."""
    return jnp.asarray(x.transpose(0, 2, 3, 1))


CNN = Topology(blueprints.CNN, _CNN_NAMES, images)
TRANSFORMER = Topology(blueprints.TRANSFORMER, _TRANSFORMER_NAMES, jnp.asarray)


def tensor(name: str, value: np.ndarray) -> jax.Array:
    """One parameter; `name` is ours."""
    if name == "depthwise":  # [C, 1, k, k] to [k, k, C]
        value = value[:, 0].transpose(1, 2, 0)
    elif value.ndim == 4:
        value = value.transpose(2, 3, 1, 0)
    elif value.ndim == 2:
        value = value.T
    elif name == "strength":  # a number in an array of one
        value = value[0]
    return jnp.asarray(value)


def host_config(given: dict[str, np.ndarray], slots=()) -> HostConfig:
    """Shape of the CNN host with these parameters. Where it pools they do not say: like the presets, in every block
    unless its kernels are 1x1."""
    n_blocks = sum(name.endswith(".conv.weight") for name in given)
    base_channels, _, kernel_size, _ = given["blocks.0.conv.weight"].shape
    pool_layers = 0 if kernel_size == 1 else n_blocks
    return HostConfig(n_blocks, base_channels, pool_layers, kernel_size, tuple(slots))


def host_params(given: dict[str, np.ndarray], cfg: HostConfig) -> HostParams:
    """Parameters (or their gradients) of a CNN host."""
    names = ("conv.weight", "bn.weight", "bn.bias")
    blocks = tuple(Block(*(tensor("", given[f"blocks.{i}.{n}"]) for n in names)) for i in range(cfg.n_blocks))
    return HostParams(blocks, tensor("", given["classifier.weight"]), jnp.asarray(given["classifier.bias"]))


def host_stats(given: dict[str, np.ndarray], cfg: HostConfig) -> tuple[Statistics, ...]:
    """Running statistics of a CNN host."""
    get = lambda i, name: jnp.asarray(given[f"blocks.{i}.bn.running_{name}"])
    return tuple(Statistics(get(i, "mean"), get(i, "var")) for i in range(cfg.n_blocks))


def host_vars(given: dict[str, np.ndarray], cfg: HostConfig) -> HostVars:
    return HostVars(host_params(given, cfg), host_stats(given, cfg), cfg)


def packed_gate(given: dict[str, np.ndarray], absent_size: int) -> jax.Array:
    """Parameters (or their gradients) of a gate network, W1 [C, m], b1, W2 [m], b2; zeros where there is none."""
    if not given:
        return jnp.zeros(absent_size)
    flat = [given["gate.0.weight"].T, given["gate.0.bias"], given["gate.2.weight"], given["gate.2.bias"]]
    return jnp.concatenate([jnp.ravel(jnp.asarray(leaf)) for leaf in flat])


def transformer_config(given: dict[str, np.ndarray]) -> TransformerConfig:
    """Of a case's `config`; its vocabulary is the embedding's."""
    names = {
        "width": "n_embd",
        "n_heads": "n_head",
        "n_layers": "n_layer",
        "n_segments": "num_segments",
        "block_size": "block_size",
    }
    return TransformerConfig(**{ours: int(given[theirs]) for ours, theirs in names.items()}, dropout=0.0)


def transformer_params(given: dict[str, np.ndarray], cfg: TransformerConfig) -> transformer.HostParams:
    """Parameters (or their gradients) of a transformer host; layers are stacked."""
    pair = lambda name: tuple(tensor("", given[f"{name}.{kind}"]) for kind in ("weight", "bias"))
    names = ("ln1", "attn.c_attn", "attn.c_proj", "ln2", "mlp.c_fc", "mlp.c_proj")
    layers = [transformer.Layer(*(pair(f"layers.{i}.{name}") for name in names)) for i in range(cfg.n_layers)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    tokens, positions = (jnp.asarray(given[f"{name}_emb.weight"]) for name in ("tok", "pos"))
    return transformer.HostParams(tokens, positions, stacked, pair("ln_f"))


def slot_state(stage, blueprint, algorithm, alpha, isolate):
    """Lifecycle record; every argument has one entry per slot."""
    n = len(stage)
    state = stages.empty(n)
    integers = lambda value: jnp.asarray(np.array(value, np.int32))
    return state.replace(
        stage=integers(stage), blueprint=integers(blueprint), algorithm=integers(algorithm),
        isolate=jnp.asarray(np.array(isolate, bool)), has_gate=integers(algorithm) == 3,
        alpha=state.alpha.replace(alpha=jnp.asarray(np.array(alpha, np.float32))),
    )  # fmt: skip


def assert_close(ours, theirs, what: str, *, relative: float = 0.0, absolute: float = 0.0) -> None:
    """Every leaf within `absolute`, or `relative` times the largest element of the reference's leaf if that is more.

    Elements that the reduced set of numbers does not keep are passed over.
    """
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    paths = jax.tree_util.tree_flatten_with_path(theirs)[0]
    for (path, wanted), got in zip(paths, jax.tree.leaves(ours), strict=True):
        wanted = np.asarray(wanted)
        if golden.REDUCED:
            kept = ~np.isnan(wanted)
            assert kept.any() or not wanted.size, f"{what}: nothing is kept"
            wanted, got = wanted[kept], np.asarray(got)[kept]
        limit = max(absolute, relative * float(np.abs(wanted).max(initial=0)))
        golden.close(got, wanted, what + jax.tree_util.keystr(path), atol=limit)
