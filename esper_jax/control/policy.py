"""The learned controller (Esper's Tamiyo): a recurrent actor-critic over masked, op-first action heads.

Linear -> LayerNorm -> ReLU -> LSTM -> LayerNorm, then a two-layer head for every part of an action and for V(s). The op
is drawn first, the slot from those legal for it, then the other parts, whose logits depend on the slot: what is good in
one slot need not be in another. A head that the op does not read is set to its canonical value (`types.Action()`) and
carries neither log-probability nor entropy. H is the hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct

from esper_jax.types import (
    ALPHA_TARGETS,
    HEADS,
    RELEVANT_HEADS,
    Action,
    ActionSpace,
    Array,
    Controller,
    Extras,
    Masks,
    Observation,
    Op,
)

ILLEGAL_LOGIT = -1e4  # finite, so that a row without a legal choice yields numbers and not NaN
FORGET_BIAS = 2.0  # one bias vector; the reference has two with 1.0 each
NORM_EPS = 1e-5
PRECISION = "highest"  # a GPU's faster products of fewer bits would make the ratio of old and new policy noisy
# RELEVANCE[op, i]: op reads head HEADS[i]; every op reads the op head.
RELEVANCE = np.array([[head == "op" or head in RELEVANT_HEADS[op] for head in HEADS] for op in Op])
_OP, _SLOT = HEADS.index("op"), HEADS.index("slot")
_FIRST = ("op", "slot")  # what the logits of the other heads are given


class Carry(NamedTuple):
    """State of the LSTM."""

    cell: Array  # f32[H]
    hidden: Array  # f32[H]


@struct.dataclass
class PolicyOutput:
    """What the network says about one observation."""

    # unmasked; of op and slot f32[choices], of every other head f32[S, choices], by slot; choices as in the masks
    logits: dict[str, Array]
    value: Array  # f32[] V(s)


@struct.dataclass
class Evaluation:
    """How likely a decision was, per head in the order of `types.HEADS`; zeros where the op does not read the head."""

    head_log_prob: Array  # f32[8]
    head_entropy: Array  # f32[8] in [0, 1]
    relevant: Array  # bool[8]

    @property
    def log_prob(self) -> Array:
        """Joint log-probability of the relevant heads; f32[]."""
        return jnp.sum(self.head_log_prob, axis=-1)

    @property
    def entropy(self) -> Array:
        """Normalised entropy averaged over the relevant heads; f32[] in [0, 1]."""
        return jnp.sum(self.head_entropy, axis=-1) / jnp.sum(self.relevant, axis=-1, dtype=jnp.float32)


def _forget_bias(key: Array, shape: tuple[int, ...], dtype=jnp.float32) -> Array:
    """Zeros but for the forget gate, the second of i, f, g, o."""
    del key
    return jnp.zeros(shape, dtype).at[shape[0] // 4 : shape[0] // 2].set(FORGET_BIAS)


def _orthogonal_blocks(gain: float, blocks: int) -> Callable[..., Array]:
    """Initialiser of so many matrices side by side, each orthogonal by itself."""

    def init(key: Array, shape: tuple[int, int], dtype=jnp.float32) -> Array:
        one = nn.initializers.orthogonal(gain)
        each = jax.vmap(lambda k: one(k, (shape[0], shape[1] // blocks), dtype))(jax.random.split(key, blocks))
        return jnp.concatenate(each, axis=1)

    return init


def _dense(size: int, gain: float = np.sqrt(2)) -> nn.Dense:
    return nn.Dense(size, kernel_init=nn.initializers.orthogonal(gain), precision=PRECISION)


class _Network(nn.Module):
    """Cut before and after the recurrence, so that only the recurrence itself is scanned over time."""

    space: ActionSpace
    hidden: int

    def setup(self):
        self.encoder = _dense(self.hidden)
        self.encoder_norm = nn.LayerNorm(epsilon=NORM_EPS)
        self.gates = nn.Dense(
            4 * self.hidden, kernel_init=nn.initializers.orthogonal(), bias_init=_forget_bias, precision=PRECISION
        )
        self.recurrent = self.param(
            "recurrent", nn.initializers.orthogonal(), (self.hidden, 4 * self.hidden), jnp.float32
        )
        self.output_norm = nn.LayerNorm(epsilon=NORM_EPS)
        sizes = {head: self._shape(head)[-1] * (1 if head in _FIRST else self.space.n_slots) for head in HEADS}
        # The hidden layers of all heads are one matrix product: the same network, with fewer and larger pieces.
        heads = len(HEADS) + 1
        self.head_hidden = nn.Dense(heads * (self.hidden // 2), kernel_init=_orthogonal_blocks(np.sqrt(2), heads))
        self.head_output = {head: _dense(sizes[head], 0.01) for head in HEADS}
        self.value_output = _dense(1, 1.0)

    def _shape(self, head: str) -> tuple[int, ...]:
        """Of a head's logits, which are those of its mask: what is not offered is never drawn, and learns nothing."""
        size = self.space.sizes[head]
        return (size,) if head in _FIRST else (self.space.n_slots, size)

    def encode(self, features: Array) -> Array:
        """f32[..., D] -> what the input adds to the four gates, f32[..., 4H]."""
        return self.gates(nn.relu(self.encoder_norm(self.encoder(features))))

    def recur(self, carry: Carry, gates: Array) -> tuple[Carry, Array]:
        """One LSTM step from f32[4H]; gates in the order i, f, g, o."""
        i, f, g, o = jnp.split(gates + jnp.dot(carry.hidden, self.recurrent, precision=PRECISION), 4, axis=-1)
        cell = nn.sigmoid(f) * carry.cell + nn.sigmoid(i) * jnp.tanh(g)
        hidden = nn.sigmoid(o) * jnp.tanh(cell)
        return Carry(cell, hidden), hidden

    def decode(self, hidden: Array) -> PolicyOutput:
        """f32[..., H] -> logits and values with the same leading axes."""
        z = nn.relu(self.head_hidden(self.output_norm(hidden)))
        *actors, critic = jnp.split(z, len(HEADS) + 1, axis=-1)
        logits = {
            head: self.head_output[head](part).reshape(*part.shape[:-1], *self._shape(head))
            for head, part in zip(HEADS, actors, strict=True)
        }
        return PolicyOutput(logits, self.value_output(critic)[..., 0])

    def __call__(self, carry: Carry, features: Array) -> tuple[Carry, PolicyOutput]:
        carry, hidden = self.recur(carry, self.encode(features))
        return carry, self.decode(hidden)


def hidden_size(params: dict) -> int:
    """H of these parameters."""
    return params["params"]["recurrent"].shape[-2]


def init(
    key: Array,
    space: ActionSpace,
    n_features: int,
    hidden: int,
    op_bias: Sequence[float] = (0.0,) * len(Op),
    full_alpha_bias: float = 0.0,
) -> dict:
    """Fresh parameters for D = `n_features`, H = `hidden`.

    Orthogonal matrices: gain sqrt(2), but 1 in the LSTM and the value output and 0.01 in the outputs of the actor, so
    the first policy is almost uniform but for `op_bias`, the biases of the ops' logits, and `full_alpha_bias`, that of
    alpha target 1. Other biases are 0, that of the forget gate 2.
    """
    params = _Network(space, hidden).init(key, initial_carry(hidden), jnp.zeros(n_features, jnp.float32))
    full = [full_alpha_bias * (target == 1.0) for target in ALPHA_TARGETS]
    inner = dict(params["params"])
    for head, bias in (("op", op_bias), ("alpha_target", space.n_slots * full)):
        inner[f"head_output_{head}"] = inner[f"head_output_{head}"] | {"bias": jnp.asarray(bias, jnp.float32)}
    return {**params, "params": inner}


def initial_carry(hidden: int) -> Carry:
    """The state an episode begins with: zeros f32[H]."""
    return Carry(jnp.zeros(hidden, jnp.float32), jnp.zeros(hidden, jnp.float32))


def reset_carry(carry: Carry, reset: Array) -> Carry:
    """The initial state where `reset` (bool[]), else the carry."""
    return jax.tree.map(lambda x: jnp.where(reset, 0.0, x), carry)


def step(space: ActionSpace, params: dict, carry: Carry, features: Array) -> tuple[Carry, PolicyOutput]:
    """One decision's worth of network: features f32[D], normalised."""
    return _Network(space, hidden_size(params)).apply(params, carry, features)


def unroll(
    space: ActionSpace, params: dict, carry: Carry, features: Array, resets: Array, valid: Array | None = None
) -> tuple[dict[str, Array], Array]:
    """The network along a sequence.

    Args:
      carry: state before the first row.
      features: f32[T, D].
      resets: bool[T], the state returns to zero *before* row t: transition t - 1 was terminal.
      valid: bool[T], rows at which the controller acted; the others leave the state as it is. None means all.

    Returns:
      logits per head, with a leading T, and values f32[T].
    """
    network = _Network(space, hidden_size(params))
    valid = jnp.ones_like(resets) if valid is None else valid

    def body(carry: Carry, row: tuple[Array, Array, Array]) -> tuple[Carry, Array]:
        gates, reset, acted = row
        carry = reset_carry(carry, reset)
        after, hidden = network.apply(params, carry, gates, method="recur")
        return jax.tree.map(lambda new, old: jnp.where(acted, new, old), after, carry), hidden

    gates = network.apply(params, features, method="encode")
    _, hidden = jax.lax.scan(body, carry, (gates, resets, valid))
    out = network.apply(params, hidden, method="decode")
    return out.logits, out.value


def _given(logits: dict[str, Array], slot: Array) -> dict[str, Array]:
    """Every head's logits f32[choices] once the slot is known."""
    return {head: row if head in _FIRST else row[slot] for head, row in logits.items()}


def _table(rows: dict[str, Array]) -> Array:
    """A row per head in the order of HEADS, filled up with zeros (False) to the longest; [8, N]."""
    size = max(row.shape[-1] for row in rows.values())
    return jnp.stack([jnp.pad(rows[head], (0, size - rows[head].shape[-1])) for head in HEADS])


def _mask_table(masks: Masks, op: Array) -> Array:
    """What is legal for every head once the op is known, bool[8, N]."""
    return _table({head: masks.slot_by_op[op] if head == "slot" else getattr(masks, head) for head in HEADS})


def _masked(logits: Array, mask: Array) -> Array:
    return jnp.where(mask, logits.astype(jnp.float32), ILLEGAL_LOGIT)


def masked_entropy(logits: Array, mask: Array) -> Array:
    """Entropy of masked categoricals [..., N] over the log of their number of legal choices; f32[...] in [0, 1].

    Exactly 0 when fewer than two choices are legal.
    """
    log_p = jax.nn.log_softmax(_masked(logits, mask))
    entropy = -jnp.sum(jnp.where(mask, jnp.exp(log_p) * log_p, 0.0), axis=-1)
    legal = jnp.sum(mask, axis=-1, dtype=jnp.float32)
    return jnp.where(legal > 1, entropy / jnp.log(jnp.maximum(legal, 2)), 0.0)


def sample(
    key: Array, logits: dict[str, Array], masks: Masks, *, deterministic: Array | bool = False
) -> tuple[Action, Array]:
    """Draw a decision: op, then slot given op, then the other heads.

    `deterministic` (bool[]) takes every head's likeliest legal choice, the first of equals, whatever the key.

    Returns:
      the action, its irrelevant heads canonical, and the joint log-probability f32[] of the relevant ones.
    """
    scores = _table(_given(logits, jnp.int32(0)))
    # Gumbel-max: the largest of noisy logits is a draw from the categorical
    noise = jnp.where(deterministic, 0.0, jax.random.gumbel(key, scores.shape, jnp.float32))
    noisy = scores + noise
    op = jnp.argmax(_masked(noisy[_OP, : len(Op)], masks.op))
    by_op = masks.slot_by_op[op]
    slot = jnp.argmax(_masked(noisy[_SLOT, : by_op.shape[0]], by_op))
    scores = _table(_given(logits, slot)) + noise
    choices = jnp.argmax(_masked(scores, _mask_table(masks, op)), axis=-1)
    canonical = jnp.stack([getattr(Action(), head) for head in HEADS])
    choices = jnp.where(jnp.asarray(RELEVANCE)[op], choices, canonical).astype(jnp.int32)
    action = Action(**dict(zip(HEADS, choices, strict=True)))
    return action, evaluate(logits, masks, action).log_prob


def evaluate(logits: dict[str, Array], masks: Masks, action: Action) -> Evaluation:
    """Log-probabilities and normalised entropies of one decision under these logits."""
    relevant = jnp.asarray(RELEVANCE)[action.op]
    table, mask = _table(_given(logits, action.slot)), _mask_table(masks, action.op)
    choices = jnp.stack([getattr(action, head) for head in HEADS])
    log_p = jax.nn.log_softmax(_masked(table, mask))
    log_p = jnp.take_along_axis(log_p, choices[:, None], axis=-1)[:, 0]
    entropy = masked_entropy(table, mask)
    return Evaluation(jnp.where(relevant, log_p, 0.0), jnp.where(relevant, entropy, 0.0), relevant)


def had_choice(masks: Masks, action: Action) -> Array:
    """bool[8]: the heads that the op reads and that had more than one legal choice, in the order of `types.HEADS`."""
    return jnp.asarray(RELEVANCE)[action.op] & (_mask_table(masks, action.op).sum(-1) > 1)


def make_controller(
    space: ActionSpace, params: dict, normalise: Callable[[Array], Array], *, deterministic: Array | bool = False
) -> Controller:
    """The policy as a controller; its carry is the LSTM state, to be reset (`reset_carry`) after a terminal step.

    Args:
      normalise: f32[D] -> f32[D]; what it returns is what a learner must store as the features acted on.
      deterministic: bool[], take the likeliest action instead of drawing one.
    """

    def start(key: Array) -> Carry:
        del key
        return initial_carry(hidden_size(params))

    def act(key: Array, carry: Carry, observation: Observation) -> tuple[Carry, Action, Extras]:
        carry, out = step(space, params, carry, normalise(observation.features))
        action, log_prob = sample(key, out.logits, observation.masks, deterministic=deterministic)
        return carry, action, Extras(log_prob=log_prob, value=out.value)

    return Controller(init=start, act=act)
