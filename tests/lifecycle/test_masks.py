"""Masks: the legality table, limits on germination, and `permits`, the same predicate for a whole action."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import slot_records as R

from esper_jax.config import LifecycleConfig
from esper_jax.lifecycle import masks, stages
from esper_jax.types import BLUEPRINTS, HEAD_SIZES, RELEVANT_HEADS, Action, AlphaMode, Op, Stage

S = Stage
permits = jax.jit(masks.permits)


def test_legality_table():
    pairs = [(stage, mode, age) for stage in Stage for mode in AlphaMode for age in (0, 1)]
    stage, mode, age = (list(column) for column in zip(*pairs, strict=True))
    found = R.legal(R.make(stage, epochs_total=age, alpha={"mode": mode}), R.PERMISSIVE)
    for s, (stage, mode, age) in enumerate(pairs):
        rests = mode == AlphaMode.HOLD
        expected = {Op.WAIT}
        expected |= {Op.GERMINATE} if stage == S.DORMANT else set()
        expected |= {Op.ADVANCE} if stage in (S.GERMINATED, S.TRAINING, S.BLENDING) else set()
        expected |= {Op.FOSSILIZE} if stage == S.HOLDING else set()
        expected |= {Op.SET_ALPHA_TARGET} if stage in (S.BLENDING, S.HOLDING) and rests else set()
        prunable = stage in (S.GERMINATED, S.TRAINING, S.BLENDING, S.HOLDING)
        expected |= {Op.PRUNE} if prunable and rests and age >= 1 else set()
        assert {op for op in Op if found.slot_by_op[op, s]} == expected, (stage, mode, age)
    np.testing.assert_array_equal(found.op, np.asarray(found.slot_by_op).any(1))


def test_gates_are_not_in_the_masks():
    """An ADVANCE that its gate will refuse is legal: what a gate measures is not what is allowed."""
    found = R.legal(R.make([S.TRAINING, S.BLENDING, S.HOLDING]), R.STRICT)
    assert found.slot_by_op[Op.ADVANCE].tolist() == [True, True, False]
    assert found.slot_by_op[Op.FOSSILIZE].tolist() == [False, False, True]


@pytest.mark.parametrize(
    ("others", "limit", "may"),
    [
        ((), 1, True),
        ((S.TRAINING,), 1, False),
        ((S.FOSSILIZED,), 1, False),  # fossils count
        ((S.PRUNED,), 1, True),  # cooldown does not
        ((S.FOSSILIZED, S.GERMINATED), 2, False),
        ((S.FOSSILIZED, S.GERMINATED), 3, True),
        ((S.FOSSILIZED, S.GERMINATED, S.HOLDING), 0, True),  # 0 is unlimited
    ],
)
def test_limit_of_seeds(others, limit, may):
    stage = [S.DORMANT, *others, *[S.UNKNOWN] * (3 - len(others))]
    found = R.legal(R.make(stage), LifecycleConfig(max_seeds=limit))
    assert found.slot_by_op[Op.GERMINATE].tolist() == [may, False, False, False]


@pytest.mark.parametrize("other", list(Stage))
def test_sequential_development(other):
    developing = other in (S.GERMINATED, S.TRAINING, S.PRUNED, S.EMBARGOED, S.RESETTING)
    found = R.legal(R.make([S.DORMANT, other]), LifecycleConfig(sequential=True))
    assert found.slot_by_op[Op.GERMINATE, 0] == (not developing)
    assert R.legal(R.make([S.DORMANT, other]), R.PERMISSIVE).slot_by_op[Op.GERMINATE, 0]


def test_heads():
    cfg = LifecycleConfig(blueprints=("noop", "norm", "conv_heavy"))
    found = R.legal(stages.empty(1), cfg)
    assert [BLUEPRINTS[i] for i in np.flatnonzero(found.blueprint)] == ["norm", "conv_heavy"]  # noop is never offered
    assert found.style.all() and found.alpha_target.all()
    # nothing can be germinated or retargeted: pinned to sigmoid_add and to 1.0
    pinned = R.legal(R.make([S.TRAINING]), cfg)
    assert pinned.style.tolist() == [False, False, True, False] and pinned.alpha_target.tolist() == [False, False, True]
    # a blend at rest can use them again
    assert R.legal(R.make([S.BLENDING]), cfg).style.all()
    for each in (found, pinned):
        assert each.tempo.all() and each.alpha_speed.all() and each.alpha_curve.all() and each.slot.all()
    sizes = {head: getattr(found, head).shape[0] for head in HEAD_SIZES}
    assert sizes == {
        "blueprint": 13, "style": 4, "tempo": 3, "alpha_target": 3, "alpha_speed": 4, "alpha_curve": 3, "op": 6,
    }  # fmt: skip


def test_where_nothing_is_allowed_waiting_is():
    every = R.make([s for s in Stage])
    found = R.legal(every, R.PERMISSIVE, False)
    assert found.op.tolist() == [True] + [False] * 5 and not found.slot_by_op[1:].any()
    assert permits(found, Action()) and not permits(found, R.act(Op.GERMINATE, slot=1))


def test_permits_looks_at_the_relevant_heads_alone():
    found = R.legal(R.make([S.DORMANT, S.HOLDING]), LifecycleConfig(blueprints=("norm",)))
    good = {
        Op.WAIT: {},
        Op.GERMINATE: {"slot": 0, "blueprint": 3},
        Op.SET_ALPHA_TARGET: {"slot": 1},
        Op.FOSSILIZE: {"slot": 1},
    }
    for op, heads in good.items():
        assert permits(found, R.act(op, **heads))
        for head, size in {**HEAD_SIZES, "slot": 2}.items():
            if head == "op":
                continue
            for bad in (-1, size):
                spoilt = R.act(op, **{**heads, head: bad})
                assert permits(found, spoilt) == (head not in RELEVANT_HEADS[op]), (op.name, head, bad)
    assert not permits(found, R.act(Op.GERMINATE, slot=1, blueprint=3))  # that slot is taken
    assert not permits(found, R.act(Op.GERMINATE, slot=0, blueprint=1))  # not offered
    assert not permits(found, R.act(Op.PRUNE, slot=1))  # the seed has not been measured yet
    assert not permits(found, R.act(Op.ADVANCE, slot=1))
    for op in (-1, 6):
        assert not permits(found, Action(op=jnp.int32(op)))
