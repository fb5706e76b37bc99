"""Heuristic: the reference's worked examples and the edge of every rule, then as a controller."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esper_jax.control import heuristic as H
from esper_jax.control.heuristic import HeuristicConfig, Reason
from esper_jax.env import tracker
from esper_jax.lifecycle import stages
from esper_jax.types import BLUEPRINTS, Action, AlphaMode, Observation, Op, Stage

CFG = HeuristicConfig()
decide = jax.jit(H.decide, static_argnames="cfg")
EMPTY = tracker.init(tracker.TrackerConfig()).latest


def signals(epoch=10, plateau=3, stabilized=True, available=1):
    return EMPTY.replace(
        epoch=jnp.int32(epoch),
        plateau_epochs=jnp.int32(plateau),
        host_stabilized=jnp.bool_(stabilized),
        available_slots=jnp.int32(available),
    )


def seed(
    stage, epochs=0, gained=0.0, total=0.0, contribution=None, blueprint="conv_light", alpha=1.0, target=1.0, mode=0
):
    """One slot; gains are relative to an accuracy of 0, which keeps them exact."""
    slots = stages.empty(1)
    f = lambda value: jnp.array([value], jnp.float32)
    return slots.replace(
        stage=jnp.array([int(stage)], jnp.int32),
        epochs_in_stage=jnp.array([epochs], jnp.int32),
        blueprint=jnp.array([BLUEPRINTS.index(blueprint)], jnp.int32),
        alpha=slots.alpha.replace(alpha=f(alpha), target=f(target), mode=jnp.array([int(mode)], jnp.int32)),
        metrics=slots.metrics.replace(
            stage_start_score=f(-gained),
            initial_score=f(-total),
            contribution=f(0.0 if contribution is None else contribution),
            contribution_valid=jnp.array([contribution is not None]),
        ),
    )


def slots_of(*seeds):
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *seeds)


def empty(n_slots=1):
    return stages.empty(n_slots)


def one(slots, now=None, state=None, cfg=CFG):
    return decide(state if state is not None else H.init(cfg), now if now is not None else signals(), slots, cfg)


def expect(decision, op, reason, slot=0, blueprint="noop", confidence=1.0):
    assert (Op(int(decision.op)), Reason(int(decision.reason))) == (op, reason)
    assert decision.slot == slot and BLUEPRINTS[int(decision.blueprint)] == blueprint
    np.testing.assert_allclose(decision.confidence, confidence, rtol=1e-6)


def test_worked_example():
    state = H.init(CFG)
    state, d = one(empty(), signals(4, 3), state)
    expect(d, Op.WAIT, Reason.TOO_EARLY)
    state, d = one(empty(), signals(5, 2), state)
    expect(d, Op.WAIT, Reason.NOTHING_TO_DO)
    state, d = one(empty(), signals(6, 3), state)
    expect(d, Op.GERMINATE, Reason.PLATEAU, blueprint="conv_light", confidence=0.6)
    assert state.rotation_index == 1 and state.germinations == 1
    state, d = one(seed(Stage.GERMINATED), signals(7), state)
    expect(d, Op.ADVANCE, Reason.TO_TRAINING)
    state, d = one(seed(Stage.TRAINING, 5, -2.0), signals(8), state)
    expect(d, Op.ADVANCE, Reason.TO_BLENDING)
    state, d = one(seed(Stage.TRAINING, 5, -2.0001), signals(9), state)
    expect(d, Op.PRUNE, Reason.FAILING_TRAINING)
    assert state.last_prune_epoch == 9
    for epoch, penalty in ((10, 1.0), (11, 0.5), (12, 0.25), (13, 0.125)):
        state, d = one(empty(), signals(epoch, 6), state)
        expect(d, Op.WAIT, Reason.EMBARGO)
        np.testing.assert_allclose(state.penalty, [penalty, 0, 0, 0, 0])
    state, d = one(empty(), signals(14, 6), state)  # 0.0625 is forgotten
    expect(d, Op.GERMINATE, Reason.PLATEAU, blueprint="conv_heavy")
    assert state.rotation_index == 2 and state.germinations == 2 and not state.penalty.any()


@pytest.mark.parametrize(
    ("now", "reason"),
    [
        (signals(4, 0, stabilized=False, available=0), Reason.NOT_STABILIZED),
        (signals(4, 9, available=0), Reason.TOO_EARLY),
        (signals(5, 9, available=0), Reason.NO_FREE_SLOT),
        (signals(5, 2), Reason.NOTHING_TO_DO),
        (signals(5, 3), Reason.PLATEAU),
    ],
)
def test_order_of_the_germination_rules(now, reason):
    assert one(empty(), now)[1].reason == reason
    embargoed = H.init(CFG).replace(last_prune_epoch=now.epoch - 4)
    assert one(empty(), now, embargoed)[1].reason == Reason.EMBARGO
    over = H.init(CFG).replace(last_prune_epoch=now.epoch - 5)
    assert one(empty(), now, over)[1].reason == reason


@pytest.mark.parametrize("stage", [Stage.TRAINING, Stage.BLENDING])
@pytest.mark.parametrize(("epochs", "gained", "prunes"), [(5, -2.5, True), (4, -2.5, False), (5, -2.0, False)])
def test_a_failing_seed(stage, epochs, gained, prunes):
    _, decision = one(seed(stage, epochs, gained))
    assert (decision.op == Op.PRUNE) == prunes


@pytest.mark.parametrize(
    ("alpha", "target", "mode", "advances"),
    [
        (1.0, 1.0, AlphaMode.HOLD, True),
        (1.0, 1.0, AlphaMode.UP, False),
        (0.9, 1.0, AlphaMode.HOLD, False),
        (0.7, 0.7, AlphaMode.HOLD, False),  # a seed blended to a partial target waits for ever
    ],
)
def test_blending_advances_once_alpha_holds_at_one(alpha, target, mode, advances):
    _, decision = one(seed(Stage.BLENDING, 4, alpha=alpha, target=target, mode=mode))
    expected = (Op.ADVANCE, Reason.TO_HOLDING) if advances else (Op.WAIT, Reason.RAMPING)
    expect(decision, *expected)


@pytest.mark.parametrize(
    ("contribution", "total", "op", "reason", "confidence"),
    [
        (0.6, 1.0, Op.FOSSILIZE, Reason.CONTRIBUTES, 0.12),
        (0.5, 1.0, Op.PRUNE, Reason.USELESS, 1),
        (0.5, -0.1, Op.PRUNE, Reason.RANSOM, 1),
        (0.1, -0.1, Op.PRUNE, Reason.USELESS, 1),
        (0.7, -0.1, Op.PRUNE, Reason.RANSOM, 1),
        (0.7, 0.0, Op.FOSSILIZE, Reason.CONTRIBUTES, 0.14),
        (None, 0.6, Op.WAIT, Reason.NO_CONTRIBUTION, 1),
        (None, 0.5, Op.WAIT, Reason.NO_CONTRIBUTION, 1),
        (10, 5, Op.FOSSILIZE, Reason.CONTRIBUTES, 1),
        (-1, 3, Op.PRUNE, Reason.USELESS, 1),
    ],
)
def test_holding(contribution, total, op, reason, confidence):
    state, decision = one(seed(Stage.HOLDING, 1, 0, total, contribution, blueprint="norm"), signals(20))
    expect(decision, op, reason, confidence=confidence)
    assert state.last_prune_epoch == (20 if op == Op.PRUNE else -100)
    assert state.penalty.tolist() == [0, 0, 0, 2 if op == Op.PRUNE else 0, 0]


def test_the_first_seed_with_a_rule_decides():
    slots = slots_of(
        seed(Stage.FOSSILIZED), seed(Stage.EMBARGOED), seed(Stage.TRAINING), seed(Stage.HOLDING, 1, 0, 1, 5)
    )
    expect(one(slots)[1], Op.ADVANCE, Reason.TO_BLENDING, slot=2)
    germinated = slots_of(seed(Stage.FOSSILIZED), seed(Stage.PRUNED), seed(Stage.DORMANT), seed(Stage.DORMANT))
    expect(one(germinated)[1], Op.GERMINATE, Reason.PLATEAU, slot=2, blueprint="conv_light", confidence=0.6)
    expect(one(slots_of(seed(Stage.UNKNOWN), seed(Stage.FOSSILIZED)))[1], Op.WAIT, Reason.FELL_THROUGH)


def test_penalties_decay_once_per_epoch():
    state = H.init(CFG).replace(penalty=jnp.full(5, 4.0))
    for epoch, penalty in ((3, 2), (3, 2), (2, 2), (4, 1)):
        state, _ = one(empty(), signals(epoch), state)
        assert state.penalty.tolist() == [penalty] * 5


def test_penalised_blueprints_are_skipped():
    cfg = HeuristicConfig(penalty_decay=1.0)
    state = H.init(cfg).replace(penalty=jnp.array([3.0, 3.5, 2.9, 0, 0]))
    germinated = []
    for _ in range(4):
        state, decision = one(empty(), None, state, cfg)
        germinated.append((BLUEPRINTS[int(decision.blueprint)], int(state.rotation_index)))
    assert germinated == [("attention", 3), ("norm", 4), ("depthwise", 5), ("attention", 8)]


def test_when_all_are_penalised_they_take_turns():
    cfg = HeuristicConfig(penalty_decay=1.0)
    state = H.init(cfg).replace(penalty=jnp.array([4.0, 4, 4, 3, 4]))
    germinated = []
    for _ in range(6):
        state, decision = one(empty(), None, state, cfg)
        germinated.append(BLUEPRINTS[int(decision.blueprint)])
    assert germinated == ["norm", "attention", "conv_heavy", "conv_light", "depthwise", "norm"]
    assert state.rotation_index == 6


def test_a_blueprint_outside_the_rotation_has_no_penalty():
    state, decision = one(seed(Stage.HOLDING, 1, 0, 1, -1, blueprint="conv_small"))
    assert decision.op == Op.PRUNE and not state.penalty.any()


@pytest.mark.parametrize("rotation", [(), ("conv_light", "noop"), ("conv_lite",), ("lora",)])
def test_rotation_must_be_available(rotation):
    with pytest.raises(ValueError, match=r"HeuristicConfig.rotation = .* conv_heavy"):
        HeuristicConfig(rotation=rotation)
    HeuristicConfig(rotation=("lora",), available=("lora", "mlp"))


def test_controller():
    controller = H.make_controller()
    act = jax.jit(controller.act)
    carry = controller.init(jax.random.key(0))
    observe = lambda slots, now: Observation(features=jnp.zeros(1), masks=None, signals=now, slots=slots)
    slots = slots_of(seed(Stage.FOSSILIZED), empty())

    carry, action, extras = act(jax.random.key(1), carry, observe(slots, signals(6)))
    germinate = Action(op=jnp.int32(Op.GERMINATE), slot=jnp.int32(1), blueprint=jnp.int32(1))
    chex.assert_trees_all_equal(action, germinate)  # sigmoid_add, 5 epochs, to alpha 1
    assert extras.log_prob == 0 and carry.germinations == 1
    failing = slots_of(seed(Stage.FOSSILIZED), seed(Stage.TRAINING, 5, -3.0))
    carry, action, _ = act(jax.random.key(1), carry, observe(failing, signals(7)))
    chex.assert_trees_all_equal(action, Action(op=jnp.int32(Op.PRUNE), slot=jnp.int32(1)))  # at once
    waiting = slots_of(seed(Stage.FOSSILIZED), seed(Stage.HOLDING))
    _, action, _ = act(jax.random.key(1), carry, observe(waiting, signals(8)))
    chex.assert_trees_all_equal(action, Action())  # what it looked at is no part of a WAIT
    chex.assert_trees_all_equal_shapes_and_dtypes(carry, controller.init(jax.random.key(0)))
