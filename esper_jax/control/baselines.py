"""Controllers that learn nothing: what a learned policy has to beat.

`never` trains a static host, `random` acts uniformly among what is legal, `matched` as often as somebody else, `eager`
grows as much as it can, `periodic` on a fixed schedule, `planned` by a plan, `script` replays a list. All have the type
`Controller` and, but for a script, ask only for what the masks allow.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from esper_jax.config import MOST_BLOCKS, MOST_EPOCHS, LifecycleConfig
from esper_jax.lifecycle import stages
from esper_jax.types import (
    ALPHA_CURVES,
    ALPHA_SPEED_EPOCHS,
    ALPHA_TARGETS,
    HEAD_SIZES,
    HEADS,
    RELEVANT_HEADS,
    STYLES,
    TEMPO_EPOCHS,
    Action,
    Array,
    Controller,
    Extras,
    Observation,
    Op,
)

_RELEVANT = {head: np.array([head in RELEVANT_HEADS[op] for op in Op]) for head in HEADS if head != "op"}


def never() -> Controller:
    """Always WAIT: the host alone."""
    return Controller(init=lambda key: (), act=lambda key, carry, obs: (carry, Action(), Extras()))


def random() -> Controller:
    """Uniform over the legal ops, then over the slots legal for the op, then over each relevant head's legal values."""

    def act(key: Array, carry: tuple, obs: Observation) -> tuple[tuple, Action, Extras]:
        return carry, _drawn(key, obs, obs.masks.op.astype(jnp.float32)), Extras()

    return Controller(init=lambda key: (), act=act)


def matched(ops: Array) -> Controller:
    """As `random`, but does each op as often as somebody else did, as far as that is legal.

    Args:
      ops: i32[6] how often each op is to be carried out. One is drawn from those that are left, without putting it
        back, among those that are legal now; where none is, it waits.
    """

    def act(key: Array, left: Array, obs: Observation) -> tuple[Array, Action, Extras]:
        weights = jnp.where(obs.masks.op, left, 0).astype(jnp.float32)
        wait = (jnp.arange(len(Op)) == Op.WAIT) & (weights.sum() == 0)
        action = _drawn(key, obs, jnp.where(wait, 1.0, weights))
        return jnp.maximum(left.at[action.op].add(-1), 0), action, Extras()

    return Controller(init=lambda key: ops, act=act)


def _drawn(key: Array, obs: Observation, op_weights: Array) -> Action:
    """An op in proportion to f32[6], and uniformly what else the op reads, from what is legal."""
    keys = dict(zip(HEADS, jax.random.split(key, len(HEADS)), strict=True))
    draw = lambda head, weights: jax.random.categorical(keys[head], jnp.log(weights)).astype(jnp.int32)
    op = draw("op", op_weights)
    canonical = Action()
    chosen = {}
    for head, relevant in _RELEVANT.items():
        mask = obs.masks.slot_by_op[op] if head == "slot" else getattr(obs.masks, head)
        drawn = draw(head, mask.astype(jnp.float32))
        chosen[head] = jnp.where(jnp.asarray(relevant)[op], drawn, getattr(canonical, head))
    return Action(op=op, **chosen)


def eager(
    blueprint: str | Sequence[str] = "conv_heavy", *, lifecycle: LifecycleConfig = LifecycleConfig()
) -> Controller:
    """Grows everywhere at once: a seed in every empty slot, taken to fossilisation as fast as the gates allow.

    One op per epoch; first what starts a seed, then what finishes one. Blends by linear ADD, fast, to alpha 1; never
    prunes. `blueprint` is one for all slots or one per slot; `lifecycle` is the environment's, whose gates decide when
    a seed is ready.

    Raises:
      ValueError: if `blueprint` is noop or not one of `lifecycle.blueprints`.
    """
    germination = _germination(blueprint, lifecycle)

    def act(key: Array, carry: tuple, obs: Observation) -> tuple[tuple, Action, Extras]:
        del key
        return carry, _nurse(obs, germination, True, lifecycle, germinate_first=True), Extras()

    return Controller(init=lambda key: (), act=act)


def periodic(
    period: int = 6, blueprint: str = "conv_light", *, lifecycle: LifecycleConfig = LifecycleConfig()
) -> Controller:
    """Germinates in the first empty slot once in every block of `period` epochs, the first of which starts at epoch 1.

    Seeds are nursed as by `eager`, and that comes first: a germination waits for an epoch without other work.

    Raises:
      ValueError: if `period` is no whole number from 1, or `blueprint` noop or not one of
        `lifecycle.blueprints`.
    """
    if not isinstance(period, (int, np.integer)) or period < 1:
        raise ValueError(f"periodic: period = {period!r}: must be a whole number, at least 1")
    germination = _germination(blueprint, lifecycle)

    def act(key: Array, last_block: Array, obs: Observation) -> tuple[Array, Action, Extras]:
        del key
        block = (obs.signals.epoch - 1) // period
        action = _nurse(obs, germination, block > last_block, lifecycle)
        return jnp.where(action.op == Op.GERMINATE, block, last_block), action, Extras()

    return Controller(init=lambda key: jnp.int32(-1), act=act)


def planned(plan: Array, *, lifecycle: LifecycleConfig = LifecycleConfig()) -> Controller:
    """Grows by a plan: in each slot one kind of seed, from an epoch on, blended in at a tempo, and kept.

    Seeds are nursed as by `eager`; a slot that is emptied by the governor is filled again.

    Args:
      plan: i32[S, 3] of each slot the blueprint's number (0 or less for a slot that stays empty), the epochs that have
        to be trained before it germinates, and the index of the tempo.
    """

    def act(key: Array, carry: tuple, obs: Observation) -> tuple[tuple, Action, Extras]:
        del key
        blueprint, start, tempo = plan[:, 0], plan[:, 1], plan[:, 2]
        germination = _germination_of(jnp.maximum(blueprint, 0), tempo)
        due = (blueprint > 0) & (obs.signals.epoch >= start)
        return carry, _nurse(obs, germination, due, lifecycle, germinate_first=True), Extras()

    return Controller(init=lambda key: (), act=act)


def _germination(blueprint: str | Sequence[str], lifecycle: LifecycleConfig) -> Action:
    """Germination of one blueprint, or of one per slot: then `blueprint` is i32[S]."""
    offered, names = lifecycle.offered, lifecycle.catalog
    for name in [blueprint] if isinstance(blueprint, str) else blueprint:
        if name not in offered:
            raise ValueError(f"blueprint = {name!r}: must be one of {', '.join(offered)}")
    index = names.index(blueprint) if isinstance(blueprint, str) else [names.index(b) for b in blueprint]
    return _germination_of(jnp.asarray(index, jnp.int32), jnp.int32(TEMPO_EPOCHS.index(min(TEMPO_EPOCHS))))


def _germination_of(blueprint: Array, tempo: Array) -> Action:
    """By linear ADD to alpha 1; blueprint and tempo are i32[] or i32[S]."""
    return Action(
        op=jnp.int32(Op.GERMINATE),
        blueprint=blueprint,
        style=jnp.int32(STYLES.index("linear_add")),
        tempo=tempo,
        alpha_target=jnp.int32(ALPHA_TARGETS.index(1.0)),
    )


def _nurse(
    obs: Observation,
    germination: Action,
    may_germinate: Array | bool,
    cfg: LifecycleConfig,
    germinate_first: bool = False,
) -> Action:
    """The first legal of: fossilise a seed, advance one, germinate (or germinate before the others); lowest slot first,
    no gate that will fail."""
    masks = obs.masks
    ready = stages.gate(obs.slots, cfg).passed
    offered = masks.blueprint[germination.blueprint]
    for head in ("style", "tempo", "alpha_target"):
        offered &= getattr(masks, head)[getattr(germination, head)]
    if germination.blueprint.ndim and germination.blueprint.shape != ready.shape:
        given = germination.blueprint.size
        raise ValueError(f"{given} blueprints for {ready.size} slots: must be one, or one per slot")
    where = masks.slot_by_op[Op.GERMINATE] & offered & may_germinate
    mine = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, where.shape)[jnp.argmax(where)], germination)
    start = (mine, where)
    finish = (
        (Action(op=jnp.int32(Op.ADVANCE)), masks.slot_by_op[Op.ADVANCE] & ready),
        (Action(op=jnp.int32(Op.FOSSILIZE)), masks.slot_by_op[Op.FOSSILIZE] & ready),
    )
    requests = (*finish, start) if germinate_first else (start, *finish)  # a later one overrides
    action = Action()
    for request, where in requests:
        request = request.replace(slot=jnp.argmax(where).astype(jnp.int32))
        wanted = where.any() & masks.op[request.op]
        action = jax.tree.map(lambda new, old, wanted=wanted: jnp.where(wanted, new, old), request, action)
    return action


def script(actions: Sequence[Action], lifecycle: LifecycleConfig = LifecycleConfig()) -> Controller:
    """Replays `actions`, the first at the first decision, then waits.

    Raises:
      ValueError: if an index is out of its head's range; for the slot, once the number of slots is known.
    """
    sizes = HEAD_SIZES | {"blueprint": len(lifecycle.catalog)}
    for step, action in enumerate(actions):
        for head in HEADS:
            index, size = int(getattr(action, head)), sizes.get(head)
            least = 1 if head == "blueprint" and int(action.op) == Op.GERMINATE else 0  # noop is never germinated
            if index < least or (size is not None and index >= size):
                allowed = f"{least} or more" if size is None else f"{least} to {size - 1}"
                raise ValueError(f"script: step {step}: {head} = {index}: must be {allowed}")
    table = jax.tree.map(lambda *leaves: np.array(leaves, np.int32), *actions, Action())

    def act(key: Array, step: Array, obs: Observation) -> tuple[Array, Action, Extras]:
        del key
        _require_slots(table.slot, obs.masks.slot.shape[0])
        return step + 1, jax.tree.map(lambda a: jnp.asarray(a)[jnp.minimum(step, len(actions))], table), Extras()

    return Controller(init=lambda key: jnp.int32(0), act=act)


def _require_slots(scripted: np.ndarray, n_slots: int) -> None:
    for step, slot in enumerate(scripted):
        if slot >= n_slots:
            raise ValueError(f"script: step {step}: slot = {slot}: must be 0 to {n_slots - 1}")


def _words(lifecycle: LifecycleConfig, slots: int) -> dict[str, dict[str, int]]:
    """Words of a script file for the indices of each head."""
    tables = {
        "slot": range(slots),
        "style": STYLES,
        "tempo": TEMPO_EPOCHS,
        "alpha_target": ALPHA_TARGETS,
        "alpha_speed": ALPHA_SPEED_EPOCHS,
        "alpha_curve": [curve.name.lower() for curve in ALPHA_CURVES],
        "op": [op.name.lower() for op in Op],
    }
    words = {head: {str(value): index for index, value in enumerate(values)} for head, values in tables.items()}
    return words | {"blueprint": {name: lifecycle.catalog.index(name) for name in lifecycle.offered}}


def parse_script(
    text: str,
    lifecycle: LifecycleConfig = LifecycleConfig(),
    *,
    slots: int = MOST_BLOCKS,
    decisions: int = MOST_EPOCHS - 1,
) -> list[Action]:
    """Actions from lines such as `3: germinate slot=0 blueprint=conv_light style=linear_add tempo=3`.

    The number is the decision, counted from 0; decisions without a line wait. The op is followed by the fields that it
    reads, in names or epochs: `slot` is required, for germinate `blueprint` too, the others default to those of
    `Action()`. `#` starts a comment. `slots` and `decisions` say how many there are of each.

    >>> [Op(int(action.op)).name for action in parse_script("1: germinate slot=0 blueprint=norm")]
    ['WAIT', 'GERMINATE']

    Raises:
      ValueError: naming line, field, value and what is allowed.
    """
    given: dict[int, Action] = {}
    words = _words(lifecycle, slots)
    for number, line in enumerate(text.splitlines(), start=1):
        line = line.partition("#")[0].strip()
        if line:
            decision, action = _parse_line(number, line, words, decisions)
            if decision in given:
                raise _script_error(number, "decision", decision, "a number that no other line has")
            given[decision] = action
    wait = Action()
    return [given.get(t, wait) for t in range(max(given, default=-1) + 1)]


def _script_error(line: int, field: str, value: object, allowed: str) -> ValueError:
    return ValueError(f"script line {line}: {field} = {str(value)!r}: must be {allowed}")


def _parse_line(number: int, line: str, words: dict[str, dict[str, int]], decisions: int) -> tuple[int, Action]:
    decision, colon, rest = (part.strip() for part in line.partition(":"))
    # so many digits as there can be are few enough to be read
    if not (colon and decision.isdecimal() and len(decision) < 20 and int(decision) < decisions):
        raise _script_error(number, "decision", decision, f"a number from 0 to {decisions - 1}, followed by a colon")
    name, *pairs = rest.split() or [""]
    op = Op(_parse_word(number, "op", name, words))
    given = {}
    for pair in pairs:
        head, _, word = pair.partition("=")
        if head not in RELEVANT_HEADS[op]:
            known = ", ".join(RELEVANT_HEADS[op]) or "no field"
            raise _script_error(number, head, word, f"left out: {name} has {known}")
        if head in given:
            raise _script_error(number, head, word, "left out: it is given already")
        given[head] = _parse_word(number, head, word, words)
    for head in ("slot", "blueprint"):
        if head in RELEVANT_HEADS[op] and head not in given:
            raise _script_error(number, head, "", f"given for {name}")
    return int(decision), Action(op=jnp.int32(op)).replace(**{head: jnp.int32(i) for head, i in given.items()})


def _parse_word(number: int, head: str, word: str, words: dict[str, dict[str, int]]) -> int:
    if word not in words[head]:
        raise _script_error(number, head, word, f"one of {', '.join(words[head])}")
    return words[head][word]
