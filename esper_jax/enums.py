"""Enums, and the names and values behind indices: what also those who only read finished runs need (no JAX here).

Enum values are the reference system's.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum

# Arms of a comparison: the bare host, the learned policy as it acts by chance, and by its likeliest action.
BASELINE, POLICY, GREEDY = "never", "policy", "policy_greedy"
LEARNED = (POLICY, GREEDY)
# Controllers whose orders an episode brings along (`train.Orders`); no run compares them by itself.
PLANNED, MATCHED = "planned", "matched"


class Stage(IntEnum):
    """Life of a slot. DORMANT is the empty slot; 5 was retired by the reference and is never valid."""

    UNKNOWN = 0
    DORMANT = 1
    GERMINATED = 2
    TRAINING = 3
    BLENDING = 4
    HOLDING = 6
    FOSSILIZED = 7
    PRUNED = 8
    EMBARGOED = 9
    RESETTING = 10


# Position of each stage in a one-hot vector; the retired 5 leaves no gap. Indexed by the stage value; -1 is invalid.
STAGE_ONE_HOT_INDEX = (0, 1, 2, 3, 4, -1, 5, 6, 7, 8, 9)
NUM_STAGES = 10


class Op(IntEnum):
    """What a controller can ask for, once per epoch."""

    WAIT = 0
    GERMINATE = 1
    SET_ALPHA_TARGET = 2
    PRUNE = 3
    FOSSILIZE = 4
    ADVANCE = 5


class AlphaMode(IntEnum):
    HOLD = 0
    UP = 1
    DOWN = 2


class AlphaCurve(IntEnum):
    LINEAR = 1
    COSINE = 2
    SIGMOID = 3


class AlphaAlgorithm(IntEnum):
    """How a seed's output is mixed into the host's features; NONE marks an empty slot."""

    NONE = 0
    ADD = 1
    MULTIPLY = 2
    GATE = 3


class PanicReason(IntEnum):
    NONE = 0
    NON_FINITE = 1
    LOBOTOMY = 2
    DIVERGENCE = 3


# The modules that come with the package, by number; the first eight are for CNNs, the others for transformers.
BLUEPRINTS = (
    "noop", "conv_light", "attention", "norm", "depthwise", "bottleneck", "conv_small", "conv_heavy",
    "lora", "lora_large", "mlp_small", "mlp", "flex_attention",
)  # fmt: skip
CNN_BLUEPRINTS = BLUEPRINTS[:8]
# Values behind the indices of the other action heads.
STYLES = ("linear_add", "linear_multiply", "sigmoid_add", "gated_gate")
STYLE_ALGORITHM = (AlphaAlgorithm.ADD, AlphaAlgorithm.MULTIPLY, AlphaAlgorithm.ADD, AlphaAlgorithm.GATE)
STYLE_CURVE = (AlphaCurve.LINEAR, AlphaCurve.LINEAR, AlphaCurve.SIGMOID, AlphaCurve.LINEAR)
TEMPO_EPOCHS = (3, 5, 8)
ALPHA_TARGETS = (0.5, 0.7, 1.0)
ALPHA_SPEED_EPOCHS = (0, 3, 5, 8)
ALPHA_CURVES = (AlphaCurve.LINEAR, AlphaCurve.COSINE, AlphaCurve.SIGMOID)

# Name and size of every action head but `slot`, whose size is S, without modules of one's own (`types.ActionSpace`
# knows those). The order is the reference's.
HEADS = ("slot", "blueprint", "style", "tempo", "alpha_target", "alpha_speed", "alpha_curve", "op")
HEAD_SIZES = {
    "blueprint": len(BLUEPRINTS), "style": len(STYLES), "tempo": len(TEMPO_EPOCHS),
    "alpha_target": len(ALPHA_TARGETS), "alpha_speed": len(ALPHA_SPEED_EPOCHS), "alpha_curve": len(ALPHA_CURVES),
    "op": len(Op),
}  # fmt: skip


def catalog(names: Iterable[str]) -> tuple[str, ...]:
    """Names of the blueprints by number: those of the package, then whatever else is among `names`, in that order.

    >>> catalog(["norm", "mine"])[3], catalog(["norm", "mine"])[13]
    ('norm', 'mine')
    """
    return (*BLUEPRINTS, *(name for name in names if name not in BLUEPRINTS))


# Which heads an op reads besides `op` itself; the others are set to CANONICAL and earn no credit.
RELEVANT_HEADS = {
    Op.WAIT: (),
    Op.GERMINATE: ("slot", "blueprint", "style", "tempo", "alpha_target"),
    Op.SET_ALPHA_TARGET: ("slot", "style", "alpha_target", "alpha_speed", "alpha_curve"),
    Op.PRUNE: ("slot", "alpha_speed", "alpha_curve"),
    Op.FOSSILIZE: ("slot",),
    Op.ADVANCE: ("slot",),
}
