"""Configuration: every refusal names field, value and what is allowed; text and back; presets."""

import contextlib
import dataclasses
import json
import math
import re
from functools import partial
from typing import Literal, get_args, get_origin, get_type_hints

import jax.numpy as jnp
import numpy as np
import pytest

from esper_jax import config, presets
from esper_jax.config import (
    Config,
    DataConfig,
    GovernorConfig,
    HostConfig,
    LifecycleConfig,
    PPOConfig,
    RewardConfig,
    TextConfig,
    TextDataConfig,
    TrackerConfig,
    TrainingConfig,
)
from esper_jax.data import shapes
from esper_jax.network import blueprints
from esper_jax.types import BLUEPRINTS, CNN_BLUEPRINTS, ActionSpace

SIZES = [(name, data) for name in ("smoke", "quick", "full") for data in ("digits", "cifar10", "shapes")]
ONCE = r"each once \(in Python also Blueprint objects\)"
REFUSED = [
    (HostConfig, "n_blocks", 1, r"in \[2, 16\]"),
    (HostConfig, "n_blocks", 17, r"in \[2, 16\]"),
    (HostConfig, "base_channels", 2**31, r"in \(0, 1024\]"),
    (HostConfig, "base_channels", 0, r"in \(0, 1024\]"),
    (HostConfig, "pool_layers", -1, r"in \[0, 16\]"),
    (HostConfig, "pool_layers", 4, "at most n_blocks = 3$"),
    (HostConfig, "kernel_size", 2, "odd and positive"),
    (HostConfig, "kernel_size", -3, "odd and positive"),
    (HostConfig, "slots", ("r0c3",), "different boundaries out of r0c0, r0c1, r0c2"),
    (HostConfig, "slots", ("r0c1", "r0c1"), "different boundaries out of r0c0, r0c1, r0c2"),
    (DataConfig, "name", "imagenet", "one of auto, cifar10, shapes, digits"),
    (DataConfig, "image_size", 12, "8, 16, 32 or none"),
    (DataConfig, "data_dir", "", "the name of a folder, or none"),
    (DataConfig, "validation_size", 0, "greater than 0"),
    (DataConfig, "train_limit", 0, "greater than 0 or none"),
    (DataConfig, "test_limit", -5, "greater than 0 or none"),
    (TrainingConfig, "epochs", 1, r"in \[2, 10000\]"),
    (TrainingConfig, "batches_per_epoch", 0, r"in \(0, 10000\]"),
    (TrainingConfig, "batch_size", -1, "greater than 0"),
    (TrainingConfig, "host_lr", 0.0, "greater than 0"),
    (TrainingConfig, "seed_lr", -0.1, "greater than 0"),
    (TrainingConfig, "momentum", 1.0, r"in \[0, 1\)"),
    (TrainingConfig, "momentum", -0.1, r"in \[0, 1\)"),
    (TrainingConfig, "momentum", 1 - 1e-9, r"in \[0, 1\) also as float32$"),
    (TrainingConfig, "host_weight_decay", -1e-4, "at least 0"),
    (TrainingConfig, "clip_norm", 0.0, "greater than 0 or none"),
    (TrainingConfig, "clip_scope", "each", "one of separate, joint"),
    (TrainingConfig, "telemetry_stride", 0, "greater than 0"),
    (TrainingConfig, "compute_dtype", "float16", "one of float32, bfloat16"),
    (TrainingConfig, "tile_pixels", -1, "at least 0"),
    (LifecycleConfig, "min_prune_age", -1, "at least 0"),
    (LifecycleConfig, "max_seeds", -1, "at least 0"),
    (LifecycleConfig, "embargo_epochs", 0, "greater than 0"),
    (LifecycleConfig, "blueprints", (), "one or more of conv_light, attention"),
    (LifecycleConfig, "blueprints", ("noop",), "one or more of conv_light, attention"),
    (LifecycleConfig, "blueprints", ("conv_lite",), "one or more of conv_light, attention"),
    (
        LifecycleConfig,
        "blueprints",
        ("norm", "loro"),
        f"one or more of conv_light, .*, conv_heavy .for text of .*, {ONCE}$",
    ),
    (
        LifecycleConfig,
        "blueprints",
        ("norm", "norm"),
        f"one or more of conv_light, .*, conv_heavy .for text of .*, {ONCE}$",
    ),
    (LifecycleConfig, "sequential", 1, "bool$"),
    (LifecycleConfig, "strict_min_improvement", -101.0, r"in \[-100, 100\]"),
    (LifecycleConfig, "strict_min_contribution", 101.0, r"in \[-100, 100\]"),
    (GovernorConfig, "history_window", 9, "at least 10"),
    (GovernorConfig, "min_panics", 0, "greater than 0"),
    (GovernorConfig, "snapshot_epochs", 0, "greater than 0"),
    (GovernorConfig, "sensitivity", 0.0, "greater than 0"),
    (TrackerConfig, "history_window", 4, r"in \[5, 10000\]"),
    (TrackerConfig, "stabilization_epochs", -1, "at least 0"),
    (TrackerConfig, "plateau_threshold", 101.0, r"in \[-100, 100\]"),
    (RewardConfig, "mode", "dense", "one of paired, shaped, simplified, sparse"),
    (RewardConfig, "attribution", "mean", "one of harmonic, minimum"),
    (RewardConfig, "clip", 0.0, "greater than 0"),
    (RewardConfig, "param_budget", 0.0, "greater than 0"),
    (RewardConfig, "loss_scale", 0.0, "greater than 0"),
    (RewardConfig, "loss_cap", -1.0, "greater than 0"),
    (RewardConfig, "price", -0.5, "at least 0"),
    (RewardConfig, "harvest", 1.5, r"in \[0, 1\]"),
    (RewardConfig, "harvest", -0.5, r"in \[0, 1\]"),
    (PPOConfig, "gamma", 0.0, r"in \(0, 1\]"),
    (PPOConfig, "gamma", 1.01, r"in \(0, 1\]"),
    (PPOConfig, "gae_lambda", -0.1, r"in \[0, 1\]"),
    (PPOConfig, "minibatches", 0, "greater than 0"),
    (PPOConfig, "op_bias", (0.0,) * 5, "6 numbers, one per op"),
    (PPOConfig, "op_bias", (0.0,) * 7, "6 numbers, one per op"),
    (PPOConfig, "op_bias", (0.0,) * 5 + (math.inf,), "finite"),
    (PPOConfig, "op_bias", (math.nan,) + (0.0,) * 5, "finite"),
    (PPOConfig, "full_alpha_bias", math.nan, "finite"),
    (PPOConfig, "entropy_coef", -1.0, "at least 0"),
    (PPOConfig, "anneal_rounds", -5, "at least 0"),
    (PPOConfig, "target_kl", 0.0, "greater than 0 or none"),
    (PPOConfig, "advantage_std_floor", 0.0, "greater than 0"),
    (PPOConfig, "hidden_size", 1, r"in \[2, 4096\]"),  # of which a head would get half
    (PPOConfig, "hidden_size", 2**31 - 1, r"in \[2, 4096\]"),
    (PPOConfig, "learning_rate", 1e-46, "greater than 0 also as float32$"),
    (PPOConfig, "target_kl", 1e-46, "greater than 0 also as float32 or none$"),
    (PPOConfig, "full_alpha_bias", -1e-46, "0, or so large that float32 does not round it to 0$"),
    (PPOConfig, "op_bias", (1e-46,) + (0.0,) * 5, "0, or so large that float32 does not round it to 0$"),
    (PPOConfig, "op_bias", [0.0] * 6, "a tuple of float$"),
    (PPOConfig, "target_kl", math.inf, "finite and greater than 0 or none$"),
    (RewardConfig, "price", math.inf, "finite and at least 0$"),
    (RewardConfig, "price", 1e39, "finite"),  # infinite as float32
    (RewardConfig, "price", 1e-46, "0, or so large that float32 does not round it to 0$"),
    (RewardConfig, "rent_weight", math.nan, "finite"),
    (TrainingConfig, "host_lr", math.inf, "finite"),
    (TrainingConfig, "epochs", 2.5, r"int, in \[2, 10000\]$"),
    (TrainingConfig, "epochs", 8.0, r"int, in \[2, 10000\]$"),
    (TrainingConfig, "epochs", True, r"int, in \[2, 10000\]$"),
    (TrainingConfig, "clip_norm", "none", "float, greater than 0 or none$"),
    (GovernorConfig, "death_penalty", math.nan, "finite"),
    (Config, "n_envs", 0, r"in \(0, 65536\]"),
    (Config, "n_envs", 2147483640, r"in \(0, 65536\]"),
    (Config, "n_envs", 7, r"a multiple of 2 \(ppo.minibatches\)$"),
    (Config, "policy_seeds", 0, r"in \(0, 1024\]"),
    (Config, "env_chunk", 0, "greater than 0"),
    (Config, "report_envs", 0, r"in \(0, 65536\]"),
    (Config, "devices", -1, "at least 0"),
    (Config, "rounds", -1, "at least 0"),
    (Config, "seed", -1, r"in \[0, 4294967295\]"),  # the key of a number is that of its last 32 bits
    (Config, "seed", 2**32, r"in \[0, 4294967295\]"),
    (Config, "host", None, "HostConfig$"),
    (TextConfig, "host", HostConfig(), "TransformerConfig$"),
    (TextDataConfig, "files", ("a.txt",), "given if and only if name is files$"),
    (TextDataConfig, "vocabulary", 256, r"in \[257, 65536\]"),
    (TextDataConfig, "held_out", 0.5, r"in \(0, 0.5\)"),
]


@pytest.mark.parametrize(("cls", "field", "value", "allowed"), REFUSED)
def test_refusals(cls, field, value, allowed):
    with pytest.raises(ValueError, match=f"^{cls.__name__}.{field} = {re.escape(repr(value))}: must be {allowed}"):
        cls(**{field: value})


# --- every field of every class ---

CLASSES = [cls for cls in vars(config).values() if dataclasses.is_dataclass(cls)]
FIELDS = {
    f"{cls.__name__}.{field.name}": (cls, field, get_type_hints(cls)[field.name])
    for cls in CLASSES
    for field in dataclasses.fields(cls)
}
# Fields of numbers that may be negative, and those that may be 0; all others must be positive.
NEGATIVE = {
    "LifecycleConfig.strict_min_improvement", "LifecycleConfig.strict_min_contribution",  # a loss may be good enough
    "TrackerConfig.plateau_threshold", "PPOConfig.op_bias", "PPOConfig.full_alpha_bias",
}  # fmt: skip
ZERO = NEGATIVE | {
    "HostConfig.pool_layers", "TrainingConfig.momentum", "TrainingConfig.host_weight_decay",
    "TrainingConfig.tile_pixels", "LifecycleConfig.min_training_epochs", "LifecycleConfig.strict_min_epochs",
    "LifecycleConfig.strict_gradient_ratio", "LifecycleConfig.min_prune_age", "LifecycleConfig.max_seeds",
    "GovernorConfig.absolute_threshold", "GovernorConfig.death_penalty", "GovernorConfig.accuracy_noise",
    "GovernorConfig.accuracy_loss_rise", "TrackerConfig.stabilization_threshold",
    "TrackerConfig.stabilization_epochs", "TrackerConfig.regression_threshold", "PPOConfig.gae_lambda",
    "PPOConfig.value_coef", "PPOConfig.entropy_coef", "PPOConfig.entropy_coef_final", "PPOConfig.anneal_rounds",
    "Config.devices", "Config.rounds", "Config.seed", "TextConfig.devices", "TextConfig.rounds", "TextConfig.seed",
    "TransformerConfig.dropout",
}  # fmt: skip
ZERO |= {name for name, (cls, _, kind) in FIELDS.items() if cls is RewardConfig and kind is float} - {
    "RewardConfig.loss_scale", "RewardConfig.loss_cap", "RewardConfig.rent_host_floor", "RewardConfig.param_budget",
    "RewardConfig.clip",
}  # fmt: skip
# What has to go with an edge because of a rule on two fields.
BESIDE = {
    "GovernorConfig.history_window": {"min_history": 1},
    "GovernorConfig.min_history": {"history_window": 10_000},
    "HostConfig.n_blocks": {"pool_layers": 2},
    "HostConfig.pool_layers": {"n_blocks": 16},
    "Config.n_envs": {"ppo": PPOConfig(minibatches=1)},
    "TextConfig.n_envs": {"ppo": PPOConfig(minibatches=1)},
    "TransformerConfig.width": {"n_heads": 1},
    "TransformerConfig.n_heads": {"width": 1024},
    "TransformerConfig.n_layers": {"n_segments": 1},
    "TransformerConfig.n_segments": {"n_layers": 1000},
}


def numbers_refused(name, kind):
    """Values that no field of this type takes, or not the field of this name."""
    values = [math.nan, math.inf, -math.inf, True, False, "x", "1", (1,), [1]]
    values += [2.5, 4.0, 2**32] if kind is int else [1e39, -1e39, 10**400]
    values += [] if name in NEGATIVE else [-1, -1e-9]
    return values + ([] if name in ZERO else [0, 0.0])


def refused(name):
    cls, field, annotation = FIELDS[name]
    default = getattr(cls(), field.name)
    if annotation == tuple[float, ...]:
        rows = [(value, *default[1:]) for value in (*numbers_refused(name, float), None)]
        return [*rows, default[:-1], (), 1.0, None, "x", list(default)]
    if get_origin(annotation) is tuple:
        known = ("norm",) if field.name == "blueprints" else ("r0c0",)
        rows = [("x",), (*known, "x"), known * 2, (*known, None), (1,), (True,), (math.nan,)]
        return [*rows, list(known), known[0], "x", None, 0, True, 2.5]
    if get_origin(annotation) is Literal:
        return ["x", "", None, 0, True, math.nan, (default,)]
    kind, optional = (get_args(annotation) or (annotation,))[0], type(None) in get_args(annotation)
    none = [] if optional else [None]
    if kind in (int, float):
        return numbers_refused(name, kind) + none
    if kind is bool:
        return [0, 1, 0.0, "x", "True", math.nan, *none]
    if kind is str:
        return [0, 1, True, 2.5, math.nan, ("x",), *none]
    return [0, True, 2.5, "x", {}, kind, *none]  # a configuration


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_refuses(name):
    cls, field, _ = FIELDS[name]
    assert len(refused(name)) >= 5
    for value in refused(name):
        with pytest.raises(ValueError, match=f"^{re.escape(name)} = {re.escape(repr(value))}: must be "):
            cls(**{field.name: value})


def edges(name):
    """Values at the declared bounds, and the numbers next to those that are excluded."""
    _, field, annotation = FIELDS[name]
    bounds = field.metadata["range"]
    whole = int in (annotation, *get_args(annotation))
    single = lambda edge, towards: float(np.nextafter(np.float32(edge), np.float32(towards)))
    beside = lambda edge, towards: edge + (1 if towards > edge else -1) if whole else single(edge, towards)
    allowed = {edge for edge in (bounds.low, bounds.high) if math.isfinite(edge)}
    allowed |= {beside(bounds.above, math.inf)} if math.isfinite(bounds.above) else set()
    allowed |= {beside(bounds.below, -math.inf)} if math.isfinite(bounds.below) else set()
    if bounds.high == bounds.below == math.inf:
        allowed.add(2**31 - 1 if whole else float(np.finfo(np.float32).max))
    return sorted(allowed)


@pytest.mark.parametrize("name", [name for name in FIELDS if "range" in FIELDS[name][1].metadata])
def test_edges_are_allowed(name):
    cls, field, annotation = FIELDS[name]
    assert len(edges(name)) == 2
    for edge in edges(name):
        value = getattr(cls(**{field.name: edge} | BESIDE.get(name, {})), field.name)
        assert value == edge and type(value) is (get_args(annotation) or (annotation,))[0]


@pytest.mark.parametrize("name", sorted(ZERO - NEGATIVE))
def test_zero_is_allowed(name):
    cls, field, _ = FIELDS[name]
    assert getattr(cls(**{field.name: 0}), field.name) == 0


@pytest.mark.parametrize("name", [name for name in FIELDS if type(None) in get_args(FIELDS[name][2])])
def test_none_is_allowed(name):
    cls, field, _ = FIELDS[name]
    assert getattr(cls(**{field.name: None}), field.name) is None


def test_whole_numbers_do_for_floats():
    """Equal configurations are written alike and compute alike."""
    values = (TrainingConfig(host_lr=1).host_lr, PPOConfig(target_kl=1).target_kl, PPOConfig(op_bias=(1,) * 6).op_bias)
    assert values == (1.0, 1.0, (1.0,) * 6)
    assert type(values[0]) is type(values[1]) is float and {type(value) for value in values[2]} == {float}


def test_numbers_of_numpy_are_numbers():
    cfg = Config(
        n_envs=np.int64(8),
        training=TrainingConfig(host_lr=np.float32(0.5), clip_norm=np.float64(2), seed_lr=np.int32(1)),
        ppo=PPOConfig(op_bias=tuple(np.ones(6, np.float32))),
        data=DataConfig(train_limit=np.uint8(5)),
    )
    plain = Config(
        n_envs=8,
        training=TrainingConfig(host_lr=0.5, clip_norm=2.0, seed_lr=1.0),
        ppo=PPOConfig(op_bias=(1.0,) * 6),
        data=DataConfig(train_limit=5),
    )
    assert cfg == plain and cfg.to_json() == plain.to_json() and hash(cfg) == hash(plain)
    for value in (np.float32(8), np.bool_(True), np.array(8)):
        with pytest.raises(ValueError, match="Config.n_envs = .*: must be int"):
            Config(n_envs=value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"host.n_blocks": 16}, "the host has 412,320,530,258 parameters"),
        ({"host.base_channels": 1024}, "the host with the largest module in every slot has 4"),
        ({"host.kernel_size": 2**31 - 1}, "the host has "),
    ],
)
def test_a_network_is_not_too_large(changes, said):
    with pytest.raises(ValueError, match=rf"HostConfig.base_channels = \d+: must be smaller, or n_blocks = .*: {said}"):
        Config().replace(**changes)


def test_numbers_of_any_sign_where_they_mean_something():
    assert PPOConfig(op_bias=(-3.0, 0.0, 1.0, 2.0, -0.5, 5.0), full_alpha_bias=-2.0).full_alpha_bias == -2.0
    assert HostConfig(kernel_size=1).kernel_size == 1 and DataConfig(image_size=8).image_size == 8


def test_blueprints_of_a_cnn_can_be_offered():
    """All in the CNN's table and no other name of the catalog."""
    offered = []
    for name in BLUEPRINTS[1:]:
        with contextlib.suppress(ValueError):
            cfg = Config(lifecycle=LifecycleConfig(blueprints=("noop", name)))
            offered += cfg.lifecycle.blueprints[1:]
    assert offered == [name for name in blueprints.CNN if name != "noop"]
    with pytest.raises(ValueError, match="must be one or more of"):
        LifecycleConfig(blueprints=("mine",))


def test_a_module_of_ones_own_is_a_value_of_the_configuration():
    mine = blueprints.Blueprint("mine", lambda c: {}, lambda p, x: x)
    cfg = Config(lifecycle=LifecycleConfig(blueprints=("norm", mine, "conv_light")))
    assert cfg.lifecycle.offered == ("norm", "mine", "conv_light")
    assert cfg.lifecycle.catalog == (*BLUEPRINTS, "mine")
    assert cfg.action_space == ActionSpace(3, (*BLUEPRINTS, "mine"), (1, 3, 13))
    assert cfg.action_space.sizes["blueprint"] == 14 and Config().action_space.sizes["blueprint"] == 13
    assert json.loads(cfg.to_json())["lifecycle"]["blueprints"] == ["norm", "mine", "conv_light"]
    # the same functions are the same module, others under its name another
    assert hash(cfg) == hash(cfg.replace(**{"lifecycle.blueprints": ("norm", mine._replace(), "conv_light")}))
    other = mine._replace(forward=lambda p, x: 2 * x)
    assert cfg != cfg.replace(**{"lifecycle.blueprints": ("norm", other, "conv_light")})
    for wrong, match in (
        ((mine, other), r"blueprints = \(Blueprint\('mine'\), Blueprint\('mine'\)\): .*each once"),
        ((mine._replace(name="norm"),), "'norm' is the package's own"),
        ((mine._replace(name="my conv"),), "letters, digits, _ and -"),
        ((mine._replace(name=5),), "letters, digits, _ and -"),
        ((mine, 3), "a tuple of str or Blueprint"),
        (("theirs",), "in Python also Blueprint objects"),
    ):
        with pytest.raises(ValueError, match=match):
            LifecycleConfig(blueprints=wrong)


SPEC = {"a": blueprints.constant((2,), 1.0), "b": blueprints.constant((), 0.0)}


@pytest.mark.parametrize("changes, match", [
    ({"forward": lambda p, x: x[:, ::2]}, r"float32\[8, 6, 4, 2\] into float32\[8, 3, 4, 2\]: must keep"),
    ({"forward": lambda p, x: x.astype(jnp.bfloat16)}, r"float32\[8, 6, 4, 2\] into bfloat16\[8, 6, 4, 2\]: must keep"),
    ({"forward": lambda p, x, kept: x, "stem": lambda p, x: x[:1]}, r"its stem turns"),
    ({"forward": lambda p, x: (x, x)}, "its module turns .* into tuple"),
    ({"forward": None}, "it fails: TypeError"),
    ({"forward": lambda p, x: x @ jnp.ones((3, 3))}, "it fails: TypeError"),
    ({"forward": lambda p, x: x + jnp.zeros((8, 1, 1, 1))}, "at 16 channels of float32 it fails"),
    ({"draw": lambda key, c: {"a": jnp.zeros(2)}, "spec": lambda c: SPEC}, "as its spec says"),
    ({"draw": lambda key, c: {"a": jnp.zeros(2, jnp.int32), "b": jnp.zeros(())}, "spec": lambda c: SPEC}, "int32"),
])  # fmt: skip
def test_a_module_is_tried_at_every_width(changes, match):
    mine = blueprints.Blueprint("mine", lambda c: {}, lambda p, x: x)._replace(**changes)
    with pytest.raises(ValueError, match=f"(?s)blueprint 'mine': .*{match}"):
        Config(lifecycle=LifecycleConfig(blueprints=("norm", mine)))


def test_a_module_is_tried_in_the_dtype_of_the_run():
    mine = blueprints.Blueprint("mine", lambda c: {"a": blueprints.constant((), 1.0)}, lambda p, x: x * p["a"])
    cfg = Config(lifecycle=LifecycleConfig(blueprints=(mine,)))
    with pytest.raises(ValueError, match="of bfloat16 its module turns bfloat16.* into float32"):
        cfg.replace(**{"training.compute_dtype": "bfloat16"})


def test_hosts():
    host = HostConfig(n_blocks=4, base_channels=6, slots=("r0c3", "r0c1"))
    assert host.widths == (6, 12, 24, 48)
    # in the order of the forward pass
    assert (host.slot_segments, host.slot_names, host.slot_widths) == ((1, 3), ("r0c1", "r0c3"), (12, 48))
    assert HostConfig().slot_names == ("r0c0", "r0c1", "r0c2") and HostConfig().slot_widths == (8, 16, 32)


def test_replace_reaches_inside():
    cfg = Config()
    new = cfg.replace(n_envs=8, **{"training.epochs": 5, "training.batch_size": 64, "host.slots": ("r0c1",)})
    assert (new.n_envs, new.training.epochs, new.training.batch_size, new.host.slots) == (8, 5, 64, ("r0c1",))
    assert new.training.host_lr == cfg.training.host_lr and cfg == Config()
    both = cfg.replace(training=TrainingConfig(epochs=9), **{"training.batch_size": 64})
    assert (both.training.epochs, both.training.batch_size) == (9, 64)
    assert cfg.replace() == cfg


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_env": 8}, r"Config has no field 'n_env'; did you mean n_envs\? \(fields: host, data, training"),
        ({"training.epoch": 8}, r"TrainingConfig has no field 'epoch'; did you mean epochs\?"),
        ({"trainin.epochs": 8}, r"Config has no field 'trainin'; did you mean training\?"),
        ({"zzz": 1}, r"Config has no field 'zzz' \(fields"),
        ({"training.epochs": 1}, r"TrainingConfig.epochs = 1: must be in \[2, 10000\]"),
    ],
)
def test_replace_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        Config().replace(**changes)


def test_a_configuration_cannot_be_changed_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().n_envs = 8
    assert hash(Config()) == hash(Config())  # static arguments of compiled functions


# --- text ---


@pytest.mark.parametrize("name", [*SIZES, None])
def test_json_round_trip(name):
    cfg = presets.get(*name) if name else Config().replace(
        seed=7, **{"training.clip_norm": None, "data.data_dir": "/data", "host.slots": ("r0c2",), "ppo.target_kl": 0.02}
    )  # fmt: skip
    again = Config.from_json(cfg.to_json())
    assert again == cfg and type(again.lifecycle.blueprints) is type(again.ppo.op_bias) is tuple
    assert Config.from_json(again.to_json()) == cfg


def test_whole_numbers_become_floats():
    tree = json.loads(Config().to_json())
    tree["training"]["host_lr"] = 1
    value = Config.from_json(json.dumps(tree)).training.host_lr
    assert value == 1.0 and type(value) is float
    tree["ppo"]["op_bias"] = [1, 0, 0.5, -3, 2, 2]
    bias = Config.from_json(json.dumps(tree)).ppo.op_bias
    assert bias == (1.0, 0.0, 0.5, -3.0, 2.0, 2.0) and {type(value) for value in bias} == {float}


def change(path, value):
    """The default configuration as text with one entry replaced, or removed if the value is `...`."""
    tree = json.loads(Config().to_json())
    *outer, last = path.split(".")
    place = tree
    for name in outer:
        place = place[name]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return json.dumps(tree)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "Config.from_json: not JSON: "),
        ("[]", r"Config = \[\]: must be an object with the fields of Config"),
        (change("seed", ...), "Config: missing seed"),
        (change("training.momentum", ...), "Config.training: missing momentum"),
        (change("sed", 1), r"Config has no field 'sed'; did you mean seed\?"),
        (change("training.epoch", 1), r"TrainingConfig has no field 'epoch'; did you mean epochs\?"),
        (change("training", 3), "Config.training = 3: must be an object with the fields of TrainingConfig"),
        (change("training.epochs", "8"), "Config.training.epochs = '8': must be int"),
        (change("training.epochs", 8.0), "Config.training.epochs = 8.0: must be int"),
        (change("training.epochs", True), "Config.training.epochs = True: must be int"),
        (change("training.host_lr", None), "Config.training.host_lr = None: must be float"),
        (change("training.clip_norm", "none"), "Config.training.clip_norm = 'none': must be float or none"),
        (change("lifecycle.sequential", 1), "Config.lifecycle.sequential = 1: must be bool"),
        (change("lifecycle.blueprints", "norm"), "Config.lifecycle.blueprints = 'norm': must be a list of strings"),
        (change("host.slots", [1]), r"Config.host.slots = \[1\]: must be a list of strings"),
        (change("ppo.op_bias", 1.0), "Config.ppo.op_bias = 1.0: must be a list of numbers"),
        (change("ppo.op_bias", ["1"] * 6), r"Config.ppo.op_bias = \['1', .*: must be a list of numbers"),
        (change("ppo.op_bias", [True] * 6), r"Config.ppo.op_bias = \[True, .*: must be a list of numbers"),
        (change("ppo.op_bias", [0, 0, 0]), r"PPOConfig.op_bias = \(0.0, 0.0, 0.0\): must be 6 numbers, one per op"),
        (change("ppo.op_bias", [0] * 5 + [math.inf]), "PPOConfig.op_bias = .*inf.*: must be finite"),
        (change("reward.mode", "dense"), "RewardConfig.mode = 'dense': must be one of paired, shaped"),
        (change("n_envs", 0), r"Config.n_envs = 0: must be in \(0, 65536\]"),
    ],
)
def test_text_that_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        Config.from_json(text)


# --- presets ---


def test_presets():
    assert set(presets.PRESETS) == {"smoke", "quick", "full"}
    for name, data in SIZES:
        cfg = presets.get(name, data)
        assert set(cfg.lifecycle.blueprints) <= set(CNN_BLUEPRINTS) and cfg.n_envs % cfg.env_chunk == 0
        assert cfg.reward.mode == "paired" and cfg.data.name == data
    assert presets.host("cifar10").widths == (8, 16, 32) and presets.host("cifar10_blind").kernel_size == 1


def test_a_preset_has_a_size_for_each_kind_of_data():
    digits, photographs = presets.get("quick", "digits"), presets.get("quick", "cifar10")
    assert presets.get("quick") == digits and digits.data.image_size is None
    assert (photographs.data.image_size, photographs.data.train_limit) == (8, 1600)
    assert photographs.host == digits.host.__class__(n_blocks=2, base_channels=2, pool_layers=1)
    # shapes have the size of the photographs
    assert presets.get("quick", "shapes") == photographs.replace(**{"data.name": "shapes"})
    assert presets.get("full", "digits").host == presets.host("digits")
    assert presets.get("full", "cifar10").host == presets.host("cifar10")


@pytest.mark.parametrize(
    ("look_up", "name", "message"),
    [
        (presets.get, "quik", r"unknown preset 'quik'; did you mean quick\? \(known: smoke, quick, full\)"),
        (partial(presets.get, "quick"), "cifar", r"unknown data set 'cifar'; did you mean cifar10\? \(known: digits"),
        (partial(presets.get, "quick"), "auto", r"unknown data set 'auto' \(known: digits, cifar10, shapes\)"),
        (presets.get, "xyz", r"unknown preset 'xyz' \(known: "),
        (presets.get, None, r"unknown preset None \(known: "),
        (presets.get, ["quick"], r"unknown preset \['quick'\]"),
        (presets.host, "cifar", r"unknown host 'cifar'; did you mean cifar10\? \(known: cifar10, "),
    ],
)
def test_unknown_presets(look_up, name, message):
    with pytest.raises(ValueError, match=message):
        look_up(name)


@pytest.mark.parametrize("name", presets.PRESETS)
def test_presets_ask_for_no_more_than_the_synthetic_data_have(name):
    wanted = presets.get(name, "shapes").data
    assert (wanted.train_limit or 0) + wanted.validation_size <= shapes.TRAIN
    assert (wanted.test_limit or 0) <= shapes.TEST


def test_modules_of_another_host_are_refused():
    """Text's are known names, and nothing that a CNN can grow."""
    with pytest.raises(ValueError, match=r"LifecycleConfig.blueprints = \('norm', 'lora'\): .*conv_heavy, the modules"):
        Config().replace(**{"lifecycle.blueprints": ("norm", "lora")})
