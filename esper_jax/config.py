"""The only configuration type: frozen dataclasses, checked on construction.

Everything here is static: a change recompiles. Numbers that a study sweeps without recompiling (`train.Hypers`) are
read once from here and passed on as traced values.
"""

from __future__ import annotations

import abc
import dataclasses
import difflib
import functools
import json
import math
import re
import types
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, get_args, get_origin, get_type_hints

import numpy as np

from esper_jax.enums import BLUEPRINTS, CNN_BLUEPRINTS, catalog
from esper_jax.network import blueprints
from esper_jax.network.blueprints import Blueprint
from esper_jax.types import ActionSpace, Op

# Checkers of types see both; the command line and JSON know names alone.
if TYPE_CHECKING:
    _Modules = tuple[str | Blueprint, ...]
else:
    _Modules = tuple[str, ...]
_MOST_INT = 2**31 - 1  # all that is computed is int32 and float32
_MOST_FLOAT = (2 - 2**-23) * 2.0**127
MOST_BLOCKS, MOST_EPOCHS = 16, 10_000
MOST_PARAMS = 10**8  # of a network with all its seeds, of which a run holds one for each environment that it computes


class Range(NamedTuple):
    """Bounds of the numbers in a field: `low` and `high` may be taken, `above` and `below` may not."""

    low: float = -math.inf
    above: float = -math.inf
    high: float = math.inf
    below: float = math.inf

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high and self.above < value < self.below

    def __str__(self) -> str:
        """How a message says it; empty without bounds."""
        if self == Range():
            return ""
        if self == Range(low=self.low):
            return f"at least {self.low}"
        if self == Range(above=self.above):
            return f"greater than {self.above}"
        least = f"({self.above}" if self.above > self.low else f"[{self.low}"
        most = f"{self.below})" if self.below < self.high else f"{self.high}]"
        return f"in {least}, {most}"


def number(default: Any, **bounds: float) -> Any:
    """A field of a number, or of a tuple of them, with the bounds of a `Range`; the annotation says of which type."""
    return field(default=default, metadata={"range": Range(**bounds)})


def _require(condition: bool, where: object, name: str, allowed: str) -> None:
    if not condition:
        value = getattr(where, name)
        raise ValueError(f"{type(where).__name__}.{name} = {value!r}: must be {allowed}")


_hints: Callable[[type], dict[str, Any]] = functools.cache(get_type_hints)


def _check(where: Any) -> None:
    """Type, finiteness and bounds of every field of a configuration; whole numbers in a field of floats become floats,
    and NumPy's numbers Python's.

    Raises ValueError naming class, field, value and what is allowed. Whatever concerns two fields is the class's own.
    """
    for field_ in dataclasses.fields(where):
        annotation, value = _hints(type(where))[field_.name], getattr(where, field_.name)
        allowed = fault(annotation, value, field_.metadata.get("range", Range()), field_.metadata.get("alternative"))
        _require(allowed is None, where, field_.name, allowed or "")
        if annotation == tuple[float, ...]:
            object.__setattr__(where, field_.name, tuple(map(float, value)))
        elif value is not None and (kind := kinds(annotation)[0]) in (int, float):
            object.__setattr__(where, field_.name, kind(value))


def kinds(annotation: Any) -> tuple[type, ...]:
    """The types of `int` and `int | None`."""
    return get_args(annotation) if get_origin(annotation) in (types.UnionType, typing.Union) else (annotation,)


def fault(annotation: Any, value: Any, bounds: Range, other: type | None = None) -> str | None:
    """What a field must be, if `value` is not that; the entries of a tuple may also be of the `other` type."""
    if get_origin(annotation) is Literal:
        choices = get_args(annotation)
        return None if value in choices else "one of " + ", ".join(map(str, choices))
    several = get_origin(annotation) is tuple
    kind, *none = get_args(annotation)[:1] if several else kinds(annotation)
    if none and value is None:
        return None
    or_none = " or none" if none else ""
    entries = value if several else (value,)
    if not (isinstance(entries, tuple) and all(_is_a(kind, entry) or _is_a(other, entry) for entry in entries)):
        limits = f", {bounds}" if str(bounds) else ""
        names = kind.__name__ + (f" or {other.__name__}" if other else "")
        return f"a tuple of {names}{limits}" if several else f"{kind.__name__}{limits}{or_none}"
    if kind not in (int, float):
        return None
    if kind is float and not all(abs(entry) <= _MOST_FLOAT for entry in entries):  # nor is NaN
        return "finite" + (f" and {bounds}" if str(bounds) else "") + or_none
    if not all(map(bounds.holds, entries)):
        return f"{bounds}{or_none}"
    if kind is float:  # what it is computed with
        rounded = [float(np.float32(entry)) for entry in entries]
        if not all(map(bounds.holds, rounded)):
            return f"{bounds} also as float32{or_none}"
        if any(entry != 0 == single for entry, single in zip(entries, rounded, strict=True)):
            return f"0, or so large that float32 does not round it to 0{or_none}"
    if kind is int and bounds.high == math.inf and any(abs(entry) > _MOST_INT for entry in entries):
        return f"at most {_MOST_INT}{or_none}"
    return None


def _is_a(kind: type | None, value: Any) -> bool:
    """Of the type of a field: True is no number, a whole number does for a float, 2.0 does not for an int."""
    if kind is None:
        return False
    if kind in (int, float):
        numbers = (int, np.integer) if kind is int else (int, float, np.integer, np.floating)
        return isinstance(value, numbers) and not isinstance(value, bool)
    return isinstance(value, kind)


def _require_names(where: object, name: str, known: Iterable[str], allowed: str) -> None:
    """A tuple of known names and of blueprints with other names, each at most once."""
    entries = getattr(where, name)
    strange = {entry for entry in entries if isinstance(entry, str)} - set(known)
    for entry in entries:
        if isinstance(entry, Blueprint):
            own = isinstance(entry.name, str) and re.fullmatch(r"\w[\w-]*", entry.name) is not None
            _require(own, where, name, f"{allowed}; one's own have names of letters, digits, _ and -")
            _require(entry.name not in BLUEPRINTS, where, name, f"{allowed}; {entry.name!r} is the package's own")
    names = [_name(entry) for entry in entries]
    _require(not strange and len(set(names)) == len(names), where, name, allowed)


def _name(entry: str | Blueprint) -> str:
    return entry if isinstance(entry, str) else entry.name


class _Slotted(abc.ABC):
    """What both kinds of hosts say about their slots: by `slots`, and `widths`, the channels after each segment."""

    slots: tuple[str, ...]
    modules: ClassVar[dict[str, Blueprint]]  # the package's for this host, noop first
    sized_by: ClassVar[tuple[str, ...]]  # fields that decide how many parameters it has, the first one most

    @property
    @abc.abstractmethod
    def widths(self) -> tuple[int, ...]: ...

    def _check_slots(self) -> None:
        boundaries = [f"r0c{i}" for i in range(len(self.widths))]
        _require_names(self, "slots", boundaries, f"different boundaries out of {', '.join(boundaries)}")

    @property
    def slot_segments(self) -> tuple[int, ...]:
        """Index of the segment before each slot, in the order of the forward pass."""
        return tuple(sorted(int(slot[3:]) for slot in self.slots)) if self.slots else tuple(range(len(self.widths)))

    @property
    def slot_names(self) -> tuple[str, ...]:
        return tuple(f"r0c{i}" for i in self.slot_segments)

    @property
    def slot_widths(self) -> tuple[int, ...]:
        return tuple(self.widths[i] for i in self.slot_segments)


@dataclass(frozen=True)
class HostConfig(_Slotted):
    """The network that is grown: blocks of convolution, BatchNorm, ReLU and (in the first `pool_layers`) max-pool."""

    modules: ClassVar[dict[str, Blueprint]] = blueprints.CNN
    sized_by: ClassVar[tuple[str, ...]] = ("base_channels", "n_blocks", "kernel_size")
    n_blocks: int = number(3, low=2, high=MOST_BLOCKS)
    """number of blocks; the channels double from one to the next"""
    base_channels: int = number(8, above=0, high=1024)
    """channels of the first block"""
    pool_layers: int = number(3, low=0, high=MOST_BLOCKS)
    """how many of the first blocks end in a 2x2 max-pool; at most all of them"""
    kernel_size: int = 3
    """kernel of the convolutions, odd"""
    slots: tuple[str, ...] = ()
    """boundaries that carry a slot, such as r0c0 r0c2; empty means after every block"""

    def __post_init__(self):
        _check(self)
        _require(self.kernel_size % 2 == 1 and self.kernel_size > 0, self, "kernel_size", "odd and positive")
        _require(self.pool_layers <= self.n_blocks, self, "pool_layers", f"at most n_blocks = {self.n_blocks}")
        self._check_slots()

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels after each block."""
        return tuple(self.base_channels * 2**i for i in range(self.n_blocks))

    def param_count(self, channels: int = 3, classes: int = 10) -> int:
        """Number of trained parameters; exact where an array could not be made."""
        pairs = zip((channels, *self.widths), self.widths, strict=False)
        return sum(self.kernel_size**2 * c * o + 2 * o for c, o in pairs) + (self.widths[-1] + 1) * classes


@dataclass(frozen=True)
class TransformerConfig(_Slotted):
    """The network that is grown: a pre-norm decoder whose read-out is its embedding, cut into equal segments."""

    modules: ClassVar[dict[str, Blueprint]] = blueprints.TRANSFORMER
    sized_by: ClassVar[tuple[str, ...]] = ("width", "n_layers", "block_size")
    width: int = number(384, above=0, high=100_000)
    """channels of the residual stream"""
    n_heads: int = number(6, above=0, high=1024)
    n_layers: int = number(6, above=0, high=1000)
    n_segments: int = number(3, above=0, high=1000)
    """a slot can sit after each"""
    block_size: int = number(256, above=0)
    """longest sequence, in tokens"""
    dropout: float = number(0.1, low=0, below=1)
    gate: Literal["causal", "reference"] = "causal"
    """what a seed's gate is opened by: the mean of the tokens so far; the reference's takes the whole sequence's, by
    which a token learns of the next ones, and losses are lower than any that a language model can have"""
    slots: tuple[str, ...] = ()
    """boundaries that carry a slot, such as r0c0 r0c2; empty means after every segment"""

    def __post_init__(self):
        _check(self)
        _require(self.width % self.n_heads == 0, self, "n_heads", f"a divisor of width = {self.width}")
        _require(self.n_layers % self.n_segments == 0, self, "n_segments", f"a divisor of n_layers = {self.n_layers}")
        self._check_slots()

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels after each segment."""
        return (self.width,) * self.n_segments

    def param_count(self, vocabulary: int = 0) -> int:
        """Number of trained parameters; without a vocabulary, of all but the embedding of the tokens."""
        d = self.width
        return (vocabulary + self.block_size) * d + self.n_layers * (12 * d**2 + 13 * d) + 2 * d


AnyHostConfig = HostConfig | TransformerConfig


@dataclass(frozen=True)
class DataConfig:
    name: Literal["auto", "cifar10", "shapes", "digits"] = "auto"
    """auto takes CIFAR-10 if it can be had, else digits, and says so"""
    data_dir: str | None = None
    """folder that holds the CIFAR-10 files (official binary or python layout)"""
    image_size: int | None = None
    """downsample the images by averaging to this size: 8, 16 or 32; none keeps them as they are"""
    train_limit: int | None = number(None, above=0)
    """use only the first N training images (after the validation split)"""
    validation_size: int = number(2500, above=0)
    """images held out of the training set; controller, reward, governor and gates see only these"""
    test_limit: int | None = number(None, above=0)
    """use only the first N report-test images"""
    augment: bool = True
    """random crop (pad 4 pixels of 32) and horizontal flip; never on digits"""

    def __post_init__(self):
        _check(self)
        _require(self.image_size in (None, 8, 16, 32), self, "image_size", "8, 16, 32 or none")
        _require(self.data_dir != "", self, "data_dir", "the name of a folder, or none")


@dataclass(frozen=True)
class TextDataConfig:
    name: Literal["topics", "files", "tinystories"] = "topics"
    """topics is the help text that comes with Python"""
    files: tuple[str, ...] = ()
    """of UTF-8 text, read one after the other"""
    tokens: Literal["characters", "bpe"] = "characters"
    """one for each character, or byte pairs (needs the extra `text`)"""
    vocabulary: int = number(512, low=257, high=65_536)
    """byte pairs: number of tokens"""
    window: int = number(64, above=0)
    """tokens of a sequence"""
    held_out: float = number(0.1, above=0, below=0.5)
    """share of the text, from its end, for the report test; the same before it for validation"""
    validation_windows: int = number(64, above=0)
    """at most so many are measured every epoch"""
    test_windows: int = number(512, above=0)
    """at most so many are measured at the end"""
    limit: int | None = number(None, above=0)
    """use only the first N characters"""

    def __post_init__(self):
        _check(self)
        _require((self.name == "files") == bool(self.files), self, "files", "given if and only if name is files")


@dataclass(frozen=True)
class TrainingConfig:
    """How a host and its seeds are trained; by default as in the reference."""

    epochs: int = number(25, low=2, high=MOST_EPOCHS)
    """epochs of an episode (T); the first one is part of `reset`, so an episode has T - 1 decisions"""
    batches_per_epoch: int = number(24, above=0, high=10_000)
    batch_size: int = number(512, above=0)
    optimiser: Literal["sgd", "adamw"] = "sgd"
    """sgd has momentum and a decay that enters it; by adamw a new module in a transformer learns in time"""
    host_lr: float = number(0.01, above=0)
    seed_lr: float = number(0.01, above=0)
    momentum: float = number(0.9, low=0, below=1)
    """decay of the mean of the gradients"""
    host_weight_decay: float = number(5e-4, low=0)
    clip_norm: float | None = number(1.0, above=0)
    """largest gradient norm; none switches clipping off"""
    clip_scope: Literal["separate", "joint"] = "separate"
    """separate: host and each seed have a budget of their own; joint: one norm over everything"""
    train_fossilised: bool = True
    """fossilised seeds go on training"""
    telemetry_stride: int = number(10, above=0)
    """gradient statistics are taken at every k-th batch of an epoch"""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """precision of convolutions and features; parameters, statistics and losses stay float32"""
    tile_pixels: int = number(32_768, low=0)
    """images are processed together up to so many pixels, to fit a CPU's cache; 0 takes the whole batch, and 1,024
    examples of an evaluation (GPU)"""

    def __post_init__(self):
        _check(self)


@dataclass(frozen=True)
class LifecycleConfig:
    permissive_gates: bool = True
    """quality gates ask only for what is needed to go on, not for measured improvement"""
    min_training_epochs: int = number(1, low=0)
    """permissive: epochs in TRAINING before BLENDING"""
    strict_min_epochs: int = number(3, low=0)
    """strict: epochs in TRAINING before BLENDING and in BLENDING before HOLDING"""
    strict_min_improvement: float = number(0.5, low=-100, high=100)
    """strict: points of score gained in TRAINING before BLENDING (images: percentage points of accuracy)"""
    strict_gradient_ratio: float = number(0.10, low=0)
    """strict: seed/host gradient ratio before BLENDING"""
    strict_min_contribution: float = number(1.0, low=-100, high=100)
    """strict: points of score contributed before FOSSILIZED"""
    min_prune_age: int = number(1, low=0)
    """epochs a seed must have been measured before it may be pruned"""
    embargo_epochs: int = number(5, above=0)
    max_seeds: int = number(0, low=0)
    """seeds alive or fossilised at one time; 0 is unlimited"""
    sequential: bool = False
    """no germination while another slot is germinated, training or cooling down (the later reference's rule)"""
    isolate_after_training: bool = False
    """the reference's rule for CNN hosts: a seed goes on reading stop_gradient(host) after TRAINING"""
    blueprints: _Modules = field(default=CNN_BLUEPRINTS, metadata={"alternative": Blueprint})
    """seed modules that may be germinated; noop is never offered"""

    def __post_init__(self):
        _check(self)
        text = ", ".join(name for name in BLUEPRINTS[1:] if name not in CNN_BLUEPRINTS)
        allowed = (
            f"one or more of {', '.join(CNN_BLUEPRINTS[1:])} (for text of norm, attention, {text}), each once "
            "(in Python also Blueprint objects)"
        )
        _require_names(self, "blueprints", BLUEPRINTS, allowed)
        _require(bool(self.offered), self, "blueprints", allowed)

    @property
    def offered(self) -> tuple[str, ...]:
        """Names of the modules that may be germinated."""
        return tuple(name for name in map(_name, self.blueprints) if name != "noop")

    @property
    def catalog(self) -> tuple[str, ...]:
        """Names of all modules by the numbers that stand in actions, masks and slots."""
        return catalog(map(_name, self.blueprints))


@dataclass(frozen=True)
class GovernorConfig:
    rules: Literal["robust", "reference", "off"] = "robust"
    """what an epoch is judged by; reference: the reference's three rules; off: nothing is ever rolled back"""
    loss_rise: float = number(0.25, above=0)
    """robust: validation loss above the lowest of the last three, as a share of a uniform guess's"""
    train_loss_rise: float = number(0.1, above=0)
    """robust: training loss above that of the epoch before, as a share of a uniform guess's"""
    accuracy_drop: float = number(12.0, above=0)
    """robust: points below the highest of the last three accuracies, besides what chance does"""
    accuracy_noise: float = number(3.0, low=0)
    """robust: what chance does, in standard deviations of an accuracy measured on so many examples"""
    accuracy_loss_rise: float = number(0.04, low=0)
    """robust: a drop of the accuracy counts if the validation loss rose by this, too"""
    weight_growth: float = number(3.0, above=1)
    """robust: factor by which the norm of one of the host's kernels changes within an epoch"""
    probation: int = number(10, above=0)
    """a panic before so many epochs were accepted since the last one counts as in a row with it"""
    backoff: float = number(0.25, above=0, high=1)
    """robust: what the learning rates are multiplied by from the third panic in a row on, until probation is over"""
    give_up: int = number(5, above=1)
    """robust: panics in a row after which an environment is neither trained nor decided about any more"""
    sensitivity: float = number(6.0, above=0)
    """standard deviations above the mean of the accepted losses"""
    multiplier: float = number(3.0, above=0)
    """times the mean of the accepted losses"""
    absolute_threshold: float = number(12.0, low=0)
    """a divergent loss is also above this"""
    death_penalty: float = number(10.0, low=0)
    history_window: int = number(20, above=0, high=10_000)
    min_history: int = number(10, above=0, high=10_000)
    min_panics: int = number(3, above=0)
    """divergent losses in a row before the rollback"""
    snapshot_epochs: int = number(2, above=0)
    """a snapshot is taken at an accepted epoch every so many, before the first of these at each, and after each
    fossilisation"""

    def __post_init__(self):
        _check(self)
        _require(self.history_window >= self.min_history, self, "history_window", f"at least {self.min_history}")


@dataclass(frozen=True)
class TrackerConfig:
    plateau_threshold: float = number(0.5, low=-100, high=100)
    """points of score gained below which an epoch counts as plateau"""
    history_window: int = number(10, low=5, high=10_000)
    stabilization_threshold: float = number(0.03, low=0)
    stabilization_epochs: int = number(3, low=0)
    regression_threshold: float = number(0.05, low=0)

    def __post_init__(self):
        _check(self)


@dataclass(frozen=True)
class RewardConfig:
    """Mode and weights of the reward; the weights are traced (`RewardWeights`), so a grid of them compiles once."""

    mode: Literal["paired", "shaped", "simplified", "sparse"] = "paired"
    """paired pays the gain over the twin, the same keys without growth; the others are the reference's"""
    loss_scale: float = number(30.0, above=0)
    """paired: points per nat of validation loss below the twin's"""
    loss_cap: float = number(10.0, above=0)
    """paired: losses above this, and those that are not finite, count as this"""
    price: float = number(0.5, low=0)
    """paired: points that as many blended parameters as the host has cost"""
    harvest: float = number(1.0, low=0, high=1)
    """paired: share of the last value that is that of the committed network, which is without what is not kept"""
    attribution: Literal["harmonic", "minimum"] = "harmonic"
    contribution_weight: float = number(1.0, low=0)
    proxy_factor: float = number(0.3, low=0)
    shaping_weight: float = number(0.3, low=0)
    rent_weight: float = number(0.5, low=0)
    max_rent: float = number(1.5, low=0)
    rent_host_floor: float = number(200.0, above=0)
    base_slot_rent_ratio: float = number(0.0039, low=0)
    alpha_shock_coef: float = number(0.1958, low=0)
    max_alpha_shock: float = number(1.0, low=0)
    occupancy_cost: float = number(0.01, low=0)
    free_slots: float = number(1.0, low=0)
    fossil_maintenance_cost: float = number(0.002, low=0)
    germinate_cost: float = number(0.02, low=0)
    fossilize_cost: float = number(0.01, low=0)
    prune_cost: float = number(0.005, low=0)
    set_alpha_target_cost: float = number(0.005, low=0)
    terminal_score_weight: float = number(0.05, low=0)
    fossilize_terminal_scale: float = number(3.0, low=0)
    synergy_weight: float = number(0.1, low=0)
    param_budget: float = number(500_000.0, above=0)
    param_penalty_weight: float = number(0.1, low=0)
    clip: float = number(10.0, above=0)
    """rewards enter PPO clamped to +- this"""

    def __post_init__(self):
        _check(self)


@dataclass(frozen=True)
class PPOConfig:
    hidden_size: int = number(128, low=2, high=4096)
    learning_rate: float = number(3e-4, above=0)
    gamma: float = number(0.995, above=0, high=1)
    """discount of PPO and of the shaping potential"""
    gae_lambda: float = number(0.98, low=0, high=1)
    clip_ratio: float = number(0.2, above=0)
    value_coef: float = number(0.5, low=0)
    entropy_coef: float = number(0.05, low=0)
    entropy_coef_final: float = number(0.01, low=0)
    """reached after `anneal_rounds`, linearly"""
    anneal_rounds: int = number(100, low=0)
    max_grad_norm: float = number(0.5, above=0)
    epochs: int = number(4, above=0, high=1000)
    minibatches: int = number(2, above=0)
    """environments are split into so many minibatches"""
    advantage_std_floor: float = number(0.1, above=0)
    op_bias: tuple[float, ...] = (1.0, 0.0, 0.0, -3.0, 3.0, 2.0)
    """added to the first policy's logits of wait, germinate, set_alpha_target, prune, fossilize, advance, so that it
    lets seeds live and finishes what it begins, or there would be nothing to learn from; all 0 starts uniform"""
    full_alpha_bias: float = 2.0
    """added to its logits of alpha target 1.0, since only what is blended in full can be kept; 0 starts uniform"""
    target_kl: float | None = number(None, above=0)
    """stop the epochs of an update once 1.5x this divergence is passed; none never stops"""

    def __post_init__(self):
        _check(self)
        _require(len(self.op_bias) == len(Op), self, "op_bias", f"{len(Op)} numbers, one per op")


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
    n_envs: int = number(16, above=0, high=2**16)
    """environments of a round (E), for each policy seed"""
    policy_seeds: int = number(1, above=0, high=1024)
    """policies that are trained side by side (P), from different keys, on the same environments"""
    env_chunk: int = number(1, above=0)
    """environments computed together: 1 on a CPU with 32x32 images, 16-32 with 8x8 ones, many on a GPU"""
    devices: int = number(0, low=0)
    """devices that share the environments; 0 takes all there are (on a CPU: one per core)"""
    rounds: int = number(8, low=0)
    """PPO rounds: E episodes and one update each, for each policy seed"""
    report_envs: int = number(16, above=0, high=2**16)
    """environments per controller in the final comparison"""
    seed: int = number(0, low=0, high=2**32 - 1)
    """of the keys that a run is made from"""

    def __post_init__(self):
        _check(self)
        parts = self.ppo.minibatches
        _require(self.n_envs % parts == 0, self, "n_envs", f"a multiple of {parts} (ppo.minibatches)")
        names = tuple(self.host.modules)
        allowed = f"one or more of {', '.join(names[1:])}, the modules for this host"
        _require_names(self.lifecycle, "blueprints", names, allowed)
        self._require_size(self.host.param_count(), "host")
        for module in self.lifecycle.blueprints:
            for width in dict.fromkeys(self.host.slot_widths):
                if isinstance(module, Blueprint):
                    known = self.host.modules["norm"].layout
                    fits = module.layout._replace(causal=known.causal) == known
                    allowed = f"modules whose layout is the host's; that of {module.name!r} is another"
                    _require(fits, self.lifecycle, "blueprints", allowed)
                    module.check(width, self.training.compute_dtype)
        modules = [self.host.modules[m] if isinstance(m, str) else m for m in self.lifecycle.blueprints]
        largest = [max(module.param_count(width) for module in modules) for width in self.host.slot_widths]
        self._require_size(self.host.param_count() + sum(largest), "host with the largest module in every slot")

    def _require_size(self, count: int, what: str) -> None:
        name, *others = self.host.sized_by
        other = " or ".join(f"{field} = {getattr(self.host, field)}" for field in others)
        allowed = f"smaller, or {other}: the {what} has {count:,} parameters, and may have {MOST_PARAMS:,}"
        _require(count <= MOST_PARAMS, self.host, name, allowed)

    @property
    def action_space(self) -> ActionSpace:
        """What there is to choose from in an environment of this configuration."""
        names = self.lifecycle.catalog
        offered = tuple(sorted(map(names.index, self.lifecycle.offered)))
        return ActionSpace(len(self.host.slot_names), names, offered)

    def replace(self, **changes) -> Config:
        """A copy with changes; dotted names reach inside.

        >>> cfg = Config().replace(n_envs=8, **{"training.epochs": 5})
        >>> cfg.n_envs, cfg.training.epochs
        (8, 5)
        """
        nested: dict[str, dict] = {}
        flat = {}
        for name, value in changes.items():
            head, _, rest = name.partition(".")
            _known(type(self), head)
            if rest:
                if not dataclasses.is_dataclass(getattr(self, head)):
                    raise ValueError(f"Config.{head} has no fields: there is no {name}")
                nested.setdefault(head, {})[rest] = value
            else:
                flat[head] = value
        for head, inner in nested.items():
            for name in inner:
                _known(type(getattr(self, head)), name)
            flat[head] = dataclasses.replace(flat.get(head, getattr(self, head)), **inner)
        return dataclasses.replace(self, **flat)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def to_dict(self) -> dict[str, Any]:
        """What `to_json` writes: a module that was given as an object is known by its name alone."""
        # not `asdict`, which would copy what those objects hold
        tree = {name: dict(vars(part)) if dataclasses.is_dataclass(part) else part for name, part in vars(self).items()}
        tree["lifecycle"]["blueprints"] = tuple(map(_name, self.lifecycle.blueprints))
        return tree

    @classmethod
    def from_json(cls, text: str) -> Config:
        """Inverse of `to_json`; `Config` reads a `TextConfig` too, which it knows by its host.

        Raises ValueError on unknown or missing names and on values of the wrong type.
        """
        try:
            tree = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"Config.from_json: not JSON: {error}") from None
        host = tree.get("host") if isinstance(tree, dict) else None
        of_text = isinstance(host, dict) and "block_size" in host
        return _from_dict(TextConfig if cls is Config and of_text else cls, tree, "Config")


@dataclass(frozen=True)
class TextConfig(Config):
    """The same for text: a transformer is grown, and its data are tokens."""

    # other classes than a run of images has: nobody writes to a field of a frozen class, so none gets the wrong one
    host: TransformerConfig = field(default_factory=TransformerConfig)  # type: ignore[assignment]
    data: TextDataConfig = field(default_factory=TextDataConfig)  # type: ignore[assignment]
    lifecycle: LifecycleConfig = field(
        # but for flex_attention, another name of attention
        default_factory=lambda: LifecycleConfig(
            blueprints=tuple(name for name in blueprints.TRANSFORMER if name != "flex_attention")
        )
    )

    def __post_init__(self):
        super().__post_init__()
        longest, window = self.host.block_size, self.data.window
        _require(window <= longest, self.data, "window", f"at most {longest}, the host's block_size")


# What fields that came later have to be for a configuration from before them to mean what it meant; else the default.
AS_BEFORE = {"governor.rules": "reference", "host.gate": "reference"}


def completed(tree: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A configuration of an older version as `to_json` wrote it, with the fields that it lacks, and these by their
    dotted names."""
    host = tree.get("host")
    cls = TextConfig if isinstance(host, dict) and "block_size" in host else Config
    whole, added = dict(tree), dict[str, Any]()
    defaults = json.loads(cls().to_json())
    for part, fields in defaults.items():
        if not isinstance(fields, dict) or not isinstance(tree.get(part), dict):
            continue  # what a configuration never lacked
        lacking = {name: AS_BEFORE.get(f"{part}.{name}", value) for name, value in fields.items()}
        lacking = {name: value for name, value in lacking.items() if name not in tree[part]}
        whole[part] = tree[part] | lacking
        added |= {f"{part}.{name}": value for name, value in lacking.items()}
    return whole, added


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


def _from_dict(cls: type, tree: object, path: str) -> Any:
    if not isinstance(tree, dict):
        raise ValueError(f"{path} = {tree!r}: must be an object with the fields of {cls.__name__}")
    hints = get_type_hints(cls)
    for name in tree:
        _known(cls, name)
    missing = [field_.name for field_ in dataclasses.fields(cls) if field_.name not in tree]
    if missing:
        raise ValueError(f"{path}: missing {', '.join(missing)}")
    return cls(**{name: _value(hints[name], value, f"{path}.{name}") for name, value in tree.items()})


def _value(annotation: Any, value: Any, path: str) -> Any:
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        return _from_dict(annotation, value, path)
    origin = get_origin(annotation)
    if origin is tuple:
        item = get_args(annotation)[0]
        types_, kind = ((float, int), "numbers") if item is float else ((str,), "strings")
        if not (isinstance(value, list) and all(type(entry) in types_ for entry in value)):
            raise ValueError(f"{path} = {value!r}: must be a list of {kind}")
        return tuple(value)
    if origin is Literal:
        return value  # the class checks its choices
    allowed = kinds(annotation)
    if float in allowed and type(value) is int:
        return value  # the class makes it a float
    if type(value) not in allowed:
        names = " or ".join("none" if t is type(None) else t.__name__ for t in allowed)
        raise ValueError(f"{path} = {value!r}: must be {names}")
    return value
