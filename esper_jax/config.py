"""The only configuration type: frozen dataclasses, checked on construction.

Everything here is static: a change recompiles. Numbers that a study sweeps without recompiling (`train.Hypers`) are
read once from here and passed on as traced values.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, get_args, get_origin, get_type_hints

from esper_jax.types import BLUEPRINTS, CNN_BLUEPRINTS, Op


def _require(condition: bool, where: object, name: str, allowed: str) -> None:
    if not condition:
        value = getattr(where, name)
        raise ValueError(f"{type(where).__name__}.{name} = {value!r}: must be {allowed}")


def _require_positive(where: object, *names: str) -> None:
    for name in names:
        _require(getattr(where, name) > 0, where, name, "greater than 0")


def _require_finite(where: object) -> None:
    """No field of numbers holds an infinite one or none."""
    for field_ in dataclasses.fields(where):
        value = getattr(where, field_.name)
        numbers = [v for v in (value if isinstance(value, tuple) else (value,)) if isinstance(v, float)]
        _require(all(map(math.isfinite, numbers)), where, field_.name, "finite")


def _require_choices(where: object) -> None:
    """Every `Literal` field holds one of its choices."""
    for name, annotation in get_type_hints(type(where)).items():
        if get_origin(annotation) is Literal:
            choices = get_args(annotation)
            _require(getattr(where, name) in choices, where, name, "one of " + ", ".join(map(str, choices)))


@dataclass(frozen=True)
class HostConfig:
    """The network that is grown: blocks of convolution, BatchNorm, ReLU and (in the first `pool_layers`) max-pool."""

    n_blocks: int = 3
    """number of blocks; the channels double from one to the next"""
    base_channels: int = 8
    """channels of the first block"""
    pool_layers: int = 3
    """how many of the first blocks end in a 2x2 max-pool"""
    kernel_size: int = 3
    """kernel of the convolutions, odd"""
    slots: tuple[str, ...] = ()
    """boundaries that carry a slot, such as r0c0 r0c2; empty means after every block"""

    def __post_init__(self):
        _require(self.n_blocks >= 2, self, "n_blocks", "at least 2")
        _require_positive(self, "base_channels")
        _require(self.pool_layers >= 0, self, "pool_layers", "at least 0")
        _require(self.kernel_size % 2 == 1 and self.kernel_size > 0, self, "kernel_size", "odd and positive")
        boundaries = [f"r0c{i}" for i in range(self.n_blocks)]
        known = all(slot in boundaries for slot in self.slots) and len(set(self.slots)) == len(self.slots)
        _require(known, self, "slots", f"different boundaries out of {', '.join(boundaries)}")

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels after each block."""
        return tuple(self.base_channels * 2**i for i in range(self.n_blocks))

    @property
    def slot_blocks(self) -> tuple[int, ...]:
        """Index of the block before each slot, in the order of the forward pass."""
        return tuple(sorted(int(slot[3:]) for slot in self.slots)) if self.slots else tuple(range(self.n_blocks))

    @property
    def slot_names(self) -> tuple[str, ...]:
        return tuple(f"r0c{i}" for i in self.slot_blocks)

    @property
    def slot_widths(self) -> tuple[int, ...]:
        return tuple(self.widths[i] for i in self.slot_blocks)


@dataclass(frozen=True)
class DataConfig:
    name: Literal["auto", "cifar10", "shapes", "digits"] = "auto"
    """auto takes CIFAR-10 if it can be had, else digits, and says so"""
    data_dir: str | None = None
    """folder that holds the CIFAR-10 files (official binary or python layout)"""
    image_size: int | None = None
    """downsample the images by averaging to this size: 8, 16 or 32; none keeps them as they are"""
    train_limit: int | None = None
    """use only the first N training images (after the validation split)"""
    validation_size: int = 2500
    """images held out of the training set; controller, reward, governor and gates see only these"""
    test_limit: int | None = None
    """use only the first N report-test images"""
    augment: bool = True
    """random crop (pad 4 pixels of 32) and horizontal flip; never on digits"""

    def __post_init__(self):
        _require_choices(self)
        _require(self.image_size in (None, 8, 16, 32), self, "image_size", "8, 16, 32 or none")
        _require_positive(self, "validation_size")
        for name in ("train_limit", "test_limit"):
            _require(getattr(self, name) is None or getattr(self, name) > 0, self, name, "greater than 0 or none")


@dataclass(frozen=True)
class TrainingConfig:
    """How a host and its seeds are trained. SGD with momentum; lr and decay as in the reference."""

    epochs: int = 25
    """epochs of an episode (T); the first one is part of `reset`, so an episode has T - 1 decisions"""
    batches_per_epoch: int = 24
    batch_size: int = 512
    host_lr: float = 0.01
    seed_lr: float = 0.01
    momentum: float = 0.9
    host_weight_decay: float = 5e-4
    clip_norm: float | None = 1.0
    """largest gradient norm; none switches clipping off"""
    clip_scope: Literal["separate", "joint"] = "separate"
    """separate: host and each seed have a budget of their own; joint: one norm over everything"""
    train_fossilised: bool = True
    """fossilised seeds go on training"""
    telemetry_stride: int = 10
    """gradient statistics are taken at every k-th batch of an epoch"""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """precision of convolutions and features; parameters, statistics and losses stay float32"""
    tile_pixels: int = 32_768
    """images are processed together up to so many pixels, to fit a CPU's cache; 0 takes the whole batch (GPU)"""

    def __post_init__(self):
        _require_choices(self)
        _require_finite(self)
        _require(self.epochs >= 2, self, "epochs", "at least 2")
        _require_positive(self, "batches_per_epoch", "batch_size", "host_lr", "seed_lr", "telemetry_stride")
        _require(0 <= self.momentum < 1, self, "momentum", "in [0, 1)")
        _require(self.host_weight_decay >= 0, self, "host_weight_decay", "at least 0")
        _require(self.clip_norm is None or self.clip_norm > 0, self, "clip_norm", "greater than 0 or none")
        _require(self.tile_pixels >= 0, self, "tile_pixels", "at least 0")


@dataclass(frozen=True)
class LifecycleConfig:
    permissive_gates: bool = True
    """quality gates ask only for what is needed to go on, not for measured improvement"""
    min_training_epochs: int = 1
    """permissive: epochs in TRAINING before BLENDING"""
    strict_min_epochs: int = 3
    """strict: epochs in TRAINING before BLENDING and in BLENDING before HOLDING"""
    strict_min_improvement: float = 0.5
    """strict: percentage points gained in TRAINING before BLENDING"""
    strict_gradient_ratio: float = 0.10
    """strict: seed/host gradient ratio before BLENDING"""
    strict_min_contribution: float = 1.0
    """strict: percentage points contributed before FOSSILIZED"""
    min_prune_age: int = 1
    """epochs a seed must have been measured before it may be pruned"""
    embargo_epochs: int = 5
    max_seeds: int = 0
    """seeds alive or fossilised at one time; 0 is unlimited"""
    sequential: bool = False
    """no germination while another slot is germinated, training or cooling down (the later reference's rule)"""
    isolate_after_training: bool = False
    """the reference's rule for CNN hosts: a seed goes on reading stop_gradient(host) after TRAINING"""
    blueprints: tuple[str, ...] = CNN_BLUEPRINTS
    """seed modules that may be germinated; noop is never offered"""

    def __post_init__(self):
        _require(self.min_prune_age >= 0, self, "min_prune_age", "at least 0")
        _require(self.max_seeds >= 0, self, "max_seeds", "at least 0")
        _require_positive(self, "embargo_epochs")
        known = all(name in BLUEPRINTS for name in self.blueprints) and set(self.blueprints) - {"noop"}
        _require(bool(known), self, "blueprints", f"one or more of {', '.join(BLUEPRINTS[1:])}")


@dataclass(frozen=True)
class GovernorConfig:
    sensitivity: float = 6.0
    """standard deviations above the mean of the accepted losses"""
    multiplier: float = 3.0
    """times the mean of the accepted losses"""
    absolute_threshold: float = 12.0
    """a divergent loss is also above this"""
    death_penalty: float = 10.0
    history_window: int = 20
    min_history: int = 10
    min_panics: int = 3
    """divergent losses in a row before the rollback"""
    snapshot_epochs: int = 5
    """a snapshot is taken at an accepted loss every so many epochs, and after each fossilisation"""

    def __post_init__(self):
        _require_finite(self)
        _require(self.history_window >= self.min_history, self, "history_window", f"at least {self.min_history}")
        _require_positive(self, "min_history", "min_panics", "snapshot_epochs", "multiplier", "sensitivity")


@dataclass(frozen=True)
class TrackerConfig:
    plateau_threshold: float = 0.5
    """percentage points of gain below which an epoch counts as plateau"""
    history_window: int = 10
    stabilization_threshold: float = 0.03
    stabilization_epochs: int = 3
    regression_threshold: float = 0.05

    def __post_init__(self):
        _require(self.history_window >= 5, self, "history_window", "at least 5")
        _require(self.stabilization_epochs >= 0, self, "stabilization_epochs", "at least 0")


@dataclass(frozen=True)
class RewardConfig:
    """Mode and weights of the reward; the weights are traced (`RewardWeights`), so a grid of them compiles once."""

    mode: Literal["paired", "shaped", "simplified", "sparse"] = "paired"
    """paired pays the gain over the twin, the same keys without growth; the others are the reference's"""
    loss_scale: float = 30.0
    """paired: points per nat of validation loss below the twin's"""
    loss_cap: float = 10.0
    """paired: losses above this, and those that are not finite, count as this"""
    price: float = 0.5
    """paired: points that as many blended parameters as the host has cost"""
    harvest: float = 1.0
    """paired: share of the last value that is that of the committed network, which is without what is not kept"""
    attribution: Literal["harmonic", "minimum"] = "harmonic"
    contribution_weight: float = 1.0
    proxy_factor: float = 0.3
    shaping_weight: float = 0.3
    rent_weight: float = 0.5
    max_rent: float = 1.5
    rent_host_floor: float = 200.0
    base_slot_rent_ratio: float = 0.0039
    alpha_shock_coef: float = 0.1958
    max_alpha_shock: float = 1.0
    occupancy_cost: float = 0.01
    free_slots: float = 1.0
    fossil_maintenance_cost: float = 0.002
    germinate_cost: float = 0.02
    fossilize_cost: float = 0.01
    prune_cost: float = 0.005
    set_alpha_target_cost: float = 0.005
    terminal_accuracy_weight: float = 0.05
    fossilize_terminal_scale: float = 3.0
    synergy_weight: float = 0.1
    param_budget: float = 500_000.0
    param_penalty_weight: float = 0.1
    clip: float = 10.0
    """rewards enter PPO clamped to +- this"""

    def __post_init__(self):
        _require_choices(self)
        _require_finite(self)
        _require_positive(self, "rent_host_floor", "param_budget", "clip", "loss_scale", "loss_cap")
        _require(self.price >= 0, self, "price", "at least 0")
        _require(0 <= self.harvest <= 1, self, "harvest", "in [0, 1]")


@dataclass(frozen=True)
class PPOConfig:
    hidden_size: int = 128
    learning_rate: float = 3e-4
    gamma: float = 0.995
    """discount of PPO and of the shaping potential"""
    gae_lambda: float = 0.98
    clip_ratio: float = 0.2
    value_coef: float = 0.5
    entropy_coef: float = 0.05
    entropy_coef_final: float = 0.01
    """reached after `anneal_rounds`, linearly"""
    anneal_rounds: int = 100
    max_grad_norm: float = 0.5
    epochs: int = 4
    minibatches: int = 2
    """environments are split into so many minibatches"""
    advantage_std_floor: float = 0.1
    op_bias: tuple[float, ...] = (1.0, 0.0, 0.0, -3.0, 3.0, 2.0)
    """added to the first policy's logits of wait, germinate, set_alpha_target, prune, fossilize, advance, so that it
    lets seeds live and finishes what it begins, or there would be nothing to learn from; all 0 starts uniform"""
    full_alpha_bias: float = 2.0
    """added to its logits of alpha target 1.0, since only what is blended in full can be kept; 0 starts uniform"""
    target_kl: float | None = None
    """stop the epochs of an update once 1.5x this divergence is passed; none never stops"""

    def __post_init__(self):
        _require_positive(self, "hidden_size", "learning_rate", "clip_ratio", "epochs", "minibatches", "max_grad_norm")
        _require(0 < self.gamma <= 1, self, "gamma", "in (0, 1]")
        _require(0 <= self.gae_lambda <= 1, self, "gae_lambda", "in [0, 1]")
        _require(len(self.op_bias) == len(Op), self, "op_bias", f"{len(Op)} numbers, one per op")
        _require_finite(self)
        for name in ("entropy_coef", "entropy_coef_final", "value_coef", "anneal_rounds"):
            _require(getattr(self, name) >= 0, self, name, "at least 0")
        _require_positive(self, "advantage_std_floor")
        _require(self.target_kl is None or self.target_kl > 0, self, "target_kl", "greater than 0 or none")


@dataclass(frozen=True)
class Config:
    host: HostConfig = field(default_factory=HostConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    lifecycle: LifecycleConfig = field(default_factory=LifecycleConfig)
    governor: GovernorConfig = field(default_factory=GovernorConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    n_envs: int = 16
    """environments of a round (E), for each policy seed"""
    policy_seeds: int = 1
    """policies that are trained side by side (P), from different keys, on the same environments"""
    env_chunk: int = 1
    """environments computed together: 1 on a CPU with 32x32 images, 16-32 with 8x8 ones, many on a GPU"""
    devices: int = 0
    """devices that share the environments; 0 takes all there are (on a CPU: one per core)"""
    rounds: int = 8
    """PPO rounds: E episodes and one update each, for each policy seed"""
    report_envs: int = 16
    """environments per controller in the final comparison"""
    seed: int = 0

    def __post_init__(self):
        _require_positive(self, "n_envs", "policy_seeds", "env_chunk", "report_envs")
        _require(self.devices >= 0, self, "devices", "at least 0")
        _require(self.rounds >= 0, self, "rounds", "at least 0")
        _require(self.n_envs % self.ppo.minibatches == 0, self, "n_envs", "a multiple of ppo.minibatches")

    def replace(self, **changes) -> Config:
        """A copy with changes; dotted names reach inside: `cfg.replace(n_envs=8, **{"training.epochs": 5})`."""
        nested: dict[str, dict] = {}
        flat = {}
        for name, value in changes.items():
            head, _, rest = name.partition(".")
            _known(type(self), head)
            if rest:
                nested.setdefault(head, {})[rest] = value
            else:
                flat[head] = value
        for head, inner in nested.items():
            for name in inner:
                _known(type(getattr(self, head)), name)
            flat[head] = dataclasses.replace(flat.get(head, getattr(self, head)), **inner)
        return dataclasses.replace(self, **flat)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Config:
        """Inverse of `to_json`. Raises ValueError on unknown or missing names and on values of the wrong type."""
        try:
            tree = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"Config.from_json: not JSON: {error}") from None
        return _from_dict(cls, tree, "Config")


def nearest_hint(name: str, names: Iterable[str]) -> str:
    """What an error about an unknown name says next; empty if nothing is near."""
    near = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _known(cls: type, name: str) -> None:
    names = [f.name for f in dataclasses.fields(cls)]
    if name not in names:
        raise ValueError(
            f"{cls.__name__} has no field {name!r}{nearest_hint(name, names)} (fields: {', '.join(names)})"
        )


def _from_dict(cls: type, tree: object, path: str) -> typing.Any:
    if not isinstance(tree, dict):
        raise ValueError(f"{path} = {tree!r}: must be an object with the fields of {cls.__name__}")
    hints = get_type_hints(cls)
    for name in tree:
        _known(cls, name)
    missing = [name for name in hints if name not in tree]
    if missing:
        raise ValueError(f"{path}: missing {', '.join(missing)}")
    return cls(**{name: _value(hints[name], value, f"{path}.{name}") for name, value in tree.items()})


def _value(annotation: typing.Any, value: typing.Any, path: str) -> typing.Any:
    if dataclasses.is_dataclass(annotation):
        return _from_dict(annotation, value, path)
    origin = get_origin(annotation)
    if origin is tuple:
        item = get_args(annotation)[0]
        types_, kind = ((float, int), "numbers") if item is float else ((str,), "strings")
        if not (isinstance(value, list) and all(type(entry) in types_ for entry in value)):
            raise ValueError(f"{path} = {value!r}: must be a list of {kind}")
        return tuple(map(item, value))
    if origin is Literal:
        return value  # the class checks its choices
    allowed = get_args(annotation) if origin in (types.UnionType, typing.Union) else (annotation,)
    if float in allowed and type(value) is int:
        return float(value)
    if type(value) not in allowed:
        names = " or ".join("none" if t is type(None) else t.__name__ for t in allowed)
        raise ValueError(f"{path} = {value!r}: must be {names}")
    return value
