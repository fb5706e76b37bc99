"""Configuration: every refusal names field, value and what is allowed; text and back; presets."""

import dataclasses
import json
import math
from functools import partial

import pytest

from esper_jax import presets
from esper_jax.config import (
    Config,
    DataConfig,
    GovernorConfig,
    HostConfig,
    LifecycleConfig,
    PPOConfig,
    RewardConfig,
    TrackerConfig,
    TrainingConfig,
)
from esper_jax.data import shapes
from esper_jax.types import CNN_BLUEPRINTS

SIZES = [(name, data) for name in ("smoke", "quick", "full") for data in ("digits", "cifar10", "shapes")]
REFUSED = [
    (HostConfig, "n_blocks", 1, "at least 2"),
    (HostConfig, "base_channels", 0, "greater than 0"),
    (HostConfig, "pool_layers", -1, "at least 0"),
    (HostConfig, "kernel_size", 2, "odd and positive"),
    (HostConfig, "kernel_size", -3, "odd and positive"),
    (HostConfig, "slots", ("r0c3",), "different boundaries out of r0c0, r0c1, r0c2"),
    (HostConfig, "slots", ("r0c1", "r0c1"), "different boundaries out of r0c0, r0c1, r0c2"),
    (DataConfig, "name", "imagenet", "one of auto, cifar10, shapes, digits"),
    (DataConfig, "image_size", 12, "8, 16, 32 or none"),
    (DataConfig, "validation_size", 0, "greater than 0"),
    (DataConfig, "train_limit", 0, "greater than 0 or none"),
    (DataConfig, "test_limit", -5, "greater than 0 or none"),
    (TrainingConfig, "epochs", 1, "at least 2"),
    (TrainingConfig, "batches_per_epoch", 0, "greater than 0"),
    (TrainingConfig, "batch_size", -1, "greater than 0"),
    (TrainingConfig, "host_lr", 0.0, "greater than 0"),
    (TrainingConfig, "seed_lr", -0.1, "greater than 0"),
    (TrainingConfig, "momentum", 1.0, r"in \[0, 1\)"),
    (TrainingConfig, "momentum", -0.1, r"in \[0, 1\)"),
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
    (GovernorConfig, "history_window", 9, "at least 10"),
    (GovernorConfig, "min_panics", 0, "greater than 0"),
    (GovernorConfig, "snapshot_epochs", 0, "greater than 0"),
    (GovernorConfig, "sensitivity", 0.0, "greater than 0"),
    (TrackerConfig, "history_window", 4, "at least 5"),
    (TrackerConfig, "stabilization_epochs", -1, "at least 0"),
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
    (RewardConfig, "price", math.inf, "finite"),
    (RewardConfig, "rent_weight", math.nan, "finite"),
    (TrainingConfig, "host_lr", math.inf, "finite"),
    (GovernorConfig, "death_penalty", math.nan, "finite"),
    (Config, "n_envs", 0, "greater than 0"),
    (Config, "n_envs", 7, "a multiple of ppo.minibatches"),
    (Config, "policy_seeds", 0, "greater than 0"),
    (Config, "env_chunk", 0, "greater than 0"),
    (Config, "report_envs", 0, "greater than 0"),
    (Config, "devices", -1, "at least 0"),
    (Config, "rounds", -1, "at least 0"),
]


@pytest.mark.parametrize(("cls", "field", "value", "allowed"), REFUSED)
def test_refusals(cls, field, value, allowed):
    shown = repr(value).replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(ValueError, match=f"^{cls.__name__}.{field} = {shown}: must be {allowed}"):
        cls(**{field: value})


def test_edges_are_allowed():
    TrainingConfig(epochs=2, momentum=0.0, clip_norm=None, host_weight_decay=0.0, tile_pixels=0)
    GovernorConfig(history_window=10, min_history=10)
    RewardConfig(price=0.0, harvest=0.0)
    PPOConfig(gamma=1.0, gae_lambda=0.0, op_bias=(0.0,) * 6, full_alpha_bias=0.0)
    LifecycleConfig(min_prune_age=0, max_seeds=0, blueprints=("noop", "norm"))
    Config(rounds=0, devices=0)


def test_hosts():
    host = HostConfig(n_blocks=4, base_channels=6, slots=("r0c3", "r0c1"))
    assert host.widths == (6, 12, 24, 48)
    # in the order of the forward pass
    assert (host.slot_blocks, host.slot_names, host.slot_widths) == ((1, 3), ("r0c1", "r0c3"), (12, 48))
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
        ({"training.epochs": 1}, "TrainingConfig.epochs = 1: must be at least 2"),
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
        (change("n_envs", 0), "Config.n_envs = 0: must be greater than 0"),
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
