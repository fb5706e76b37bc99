"""Operations: the reference's timelines, and what each of them does to a record of every stage."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import slot_records as R

from esper_jax.config import LifecycleConfig
from esper_jax.lifecycle import operations, stages
from esper_jax.types import (
    ALPHA_SPEED_EPOCHS,
    ALPHA_TARGETS,
    BLUEPRINTS,
    STYLES,
    TEMPO_EPOCHS,
    AlphaAlgorithm,
    AlphaCurve,
    AlphaMode,
    Op,
    Stage,
)

S = Stage
FAST, GATED = 0, STYLES.index("gated_gate")


def play(actions, slots=None, **given):
    """Stage, alpha and outcome after each epoch of one slot."""
    slots, rows = stages.empty(1) if slots is None else slots, []
    for action in actions:
        slots, outcome = R.epoch(slots, action, **given)
        rows.append((S(int(slots.stage[0])).name, float(slots.alpha.alpha[0]), bool(outcome.success)))
    return slots, rows


def test_the_heads_are_the_reference_s():
    assert BLUEPRINTS == (
        "noop", "conv_light", "attention", "norm", "depthwise", "bottleneck", "conv_small", "conv_heavy",
        "lora", "lora_large", "mlp_small", "mlp", "flex_attention",
    )  # fmt: skip
    assert STYLES == ("linear_add", "linear_multiply", "sigmoid_add", "gated_gate")
    assert (TEMPO_EPOCHS, ALPHA_TARGETS, ALPHA_SPEED_EPOCHS) == ((3, 5, 8), (0.5, 0.7, 1.0), (0, 3, 5, 8))
    decoded = [R.request(Op.GERMINATE, style=style) for style in range(4)]
    A, C = AlphaAlgorithm, AlphaCurve
    assert [r.algorithm for r in decoded] == [A.ADD, A.MULTIPLY, A.ADD, A.GATE]
    assert [r.ramp_curve for r in decoded] == [C.LINEAR, C.LINEAR, C.SIGMOID, C.LINEAR]
    r = R.request(Op.PRUNE, slot=2, tempo=2, alpha_target=1, alpha_speed=3, alpha_curve=1)
    assert (r.slot, r.ramp_epochs, r.steps, r.curve) == (2, 8, 8, C.COSINE) and r.target == jnp.float32(0.7)


def test_the_shortest_life():
    """Six epochs from germination to fossilisation; the ramp of three ticks starts in the epoch of its ADVANCE."""
    actions = [R.act(Op.GERMINATE, style=0, tempo=FAST, blueprint=1), *[R.act(Op.ADVANCE)] * 2]
    actions += [R.act(Op.WAIT)] * 2 + [R.act(Op.ADVANCE), R.act(Op.FOSSILIZE), R.act(Op.WAIT)]
    slots, rows = play(actions)
    assert [row[0] for row in rows] == [
        "GERMINATED", "TRAINING", "BLENDING", "BLENDING", "BLENDING", "HOLDING", "FOSSILIZED", "FOSSILIZED",
    ]  # fmt: skip
    np.testing.assert_allclose([row[1] for row in rows], [0, 0, 1 / 3, 2 / 3, 1, 1, 1, 1], rtol=1e-6)
    assert all(row[2] for row in rows)
    assert slots.epochs_total[0] == 8 and slots.epochs_in_stage[0] == 2 and slots.previous_stage[0] == S.HOLDING
    assert slots.blueprint[0] == 1 and slots.ramp_epochs[0] == 3


def test_nothing_goes_faster_than_its_gate():
    """ADVANCE in every epoch: the first two that ask a gate too early are refused and change nothing."""
    slots, rows = play([R.act(Op.GERMINATE, tempo=FAST, style=0), *[R.act(Op.ADVANCE)] * 6])
    assert [row[0] for row in rows] == ["GERMINATED", "TRAINING"] + ["BLENDING"] * 3 + ["HOLDING"] * 2
    # G2 holds after one epoch; G3 at alpha 1/3 and 2/3 fails; ADVANCE never fossilises
    assert [row[2] for row in rows] == [True, True, True, False, False, True, False]


def test_instant_prune():
    """Pruned at e: EMBARGOED at the end of e, RESETTING at e + 5, empty at e + 6, next germination at e + 7."""
    slots, _ = play([R.act(Op.GERMINATE), R.act(Op.ADVANCE)])
    germinate = R.act(Op.GERMINATE, blueprint=2)
    slots, rows = play([R.act(Op.PRUNE), *[germinate] * 8], slots)
    # The tick of the same epoch sees the stage that the action left: PRUNED passes at once.
    assert [row[0] for row in rows] == ["EMBARGOED"] * 5 + ["RESETTING", "DORMANT", "GERMINATED", "GERMINATED"]
    assert [row[2] for row in rows] == [True] + [False] * 6 + [True, False]
    assert slots.blueprint[0] == 2 and slots.epochs_total[0] == 2


def test_scheduled_prune():
    """Three steps from alpha 1 at e: 2/3, 1/3, PRUNED at e + 2, EMBARGOED e + 3, RESETTING e + 8, empty e + 9."""
    slots = R.make([S.HOLDING], epochs_total=9, alpha={"alpha": 1.0, "target": 1.0})
    slots, rows = play([R.act(Op.PRUNE, alpha_speed=1), *[R.act(Op.GERMINATE)] * 10], slots)
    assert [row[0] for row in rows] == (
        ["BLENDING"] * 2 + ["PRUNED"] + ["EMBARGOED"] * 5 + ["RESETTING", "DORMANT", "GERMINATED"]
    )
    np.testing.assert_allclose([row[1] for row in rows], [2 / 3, 1 / 3] + [0] * 9, rtol=1e-6)
    assert [row[2] for row in rows] == [True] + [False] * 9 + [True]


def test_scheduled_prune_of_two_ticks():
    slots = R.make([S.BLENDING], epochs_total=3, alpha={"alpha": 0.6, "target": 0.6})
    slots, outcome = R.execute(slots, R.request(Op.PRUNE, steps=2), 50.0, R.PERMISSIVE)
    assert outcome.success and stages.frozen(slots)[0] and slots.alpha.alpha[0] == jnp.float32(0.6)
    once = R.tick(slots, R.PERMISSIVE)
    assert once.stage[0] == S.BLENDING and once.alpha.mode[0] == AlphaMode.DOWN
    np.testing.assert_allclose(once.alpha.alpha[0], 0.3, rtol=1e-6)
    twice = R.tick(once, R.PERMISSIVE)
    assert twice.stage[0] == S.PRUNED and twice.alpha.alpha[0] == 0 and not stages.frozen(twice)[0]
    for _ in range(7):
        assert not R.legal(twice, R.PERMISSIVE).op[Op.GERMINATE]
        twice = R.tick(twice, R.PERMISSIVE)
    assert R.legal(twice, R.PERMISSIVE).op[Op.GERMINATE]


@pytest.mark.parametrize(
    ("stage", "alpha", "steps", "expected"),
    [
        (S.GERMINATED, 0.0, 3, S.PRUNED),  # nothing is blended: at once, whatever the speed
        (S.TRAINING, 0.0, 8, S.PRUNED),
        (S.BLENDING, 0.0, 3, S.PRUNED),
        (S.BLENDING, 0.5, 0, S.PRUNED),
        (S.BLENDING, 0.5, 3, S.BLENDING),
        (S.HOLDING, 1.0, 5, S.BLENDING),
        (S.HOLDING, 1.0, 0, S.PRUNED),
    ],
)
def test_prune_by_stage_and_speed(stage, alpha, steps, expected):
    slots = R.make([stage], epochs_total=1, has_gate=True, alpha={"alpha": alpha, "target": alpha})
    after, outcome = R.execute(slots, R.request(Op.PRUNE, steps=steps), 50.0, R.PERMISSIVE)
    assert outcome.success and after.stage[0] == expected
    assert after.has_gate[0] == (expected == S.BLENDING)  # the gate goes with the seed
    assert (after.alpha.alpha[0] == 0) == (expected == S.PRUNED)


@pytest.mark.parametrize("least", [0, 1, 5])
def test_prune_age(least):
    ages = [0, 1, 4, 5, 6]
    slots = R.make([S.TRAINING] * 5, epochs_total=ages)
    cfg = LifecycleConfig(min_prune_age=least)
    pruned = [bool(R.execute(slots, R.request(Op.PRUNE, slot=s), 50.0, cfg)[1].success) for s in range(5)]
    assert pruned == [age >= least for age in ages]
    assert R.legal(slots, cfg).slot_by_op[Op.PRUNE].tolist() == pruned


def test_germination_starts_from_a_clean_record():
    slots, outcome = R.execute(
        stages.empty(2),
        R.request(Op.GERMINATE, slot=1, blueprint=5, style=GATED, tempo=2, alpha_target=0),
        61.5,
        R.STRICT,
    )
    fresh = stages.empty(2)
    assert outcome.germinated.tolist() == [False, True] and not outcome.gate_created.any()
    assert slots.stage.tolist() == [S.DORMANT, S.GERMINATED] and slots.previous_stage[1] == S.DORMANT
    assert slots.blueprint[1] == 5 and slots.algorithm[1] == AlphaAlgorithm.GATE and slots.ramp_epochs[1] == 8
    assert slots.ramp_curve[1] == AlphaCurve.LINEAR and slots.ramp_target[1] == 0.5
    assert slots.metrics.germination_score.tolist() == [0, 61.5]
    assert R.equal(slots.alpha, fresh.alpha) and not slots.has_gate.any()


# SET_ALPHA_TARGET


def grid(modes=tuple(AlphaMode)):
    """A slot for every stage and mode."""
    pairs = [(stage, mode) for stage in Stage for mode in modes]
    stage, mode = zip(*pairs, strict=True)
    alphas = [1.0 if s in (S.HOLDING, S.FOSSILIZED) else 0.5 if s == S.BLENDING else 0.0 for s in stage]
    ramp = {"alpha": alphas, "target": alphas, "mode": list(mode), "steps_total": 4}
    return pairs, R.make(list(stage), epochs_total=9, algorithm=AlphaAlgorithm.ADD, alpha=ramp)


@pytest.mark.parametrize("target", ALPHA_TARGETS)
def test_set_alpha_target_legality(target):
    """Stage x mode x target: in BLENDING and HOLDING, and only at rest."""
    pairs, slots = grid()
    for s, (stage, mode) in enumerate(pairs):
        request = R.request(Op.SET_ALPHA_TARGET, slot=s, target=jnp.float32(target), steps=3)
        after, outcome = R.execute(slots, request, 50.0, R.PERMISSIVE)
        legal = stage in (S.BLENDING, S.HOLDING) and mode == AlphaMode.HOLD
        assert outcome.success == outcome.legal == legal
        assert R.differing(after, slots).tolist() == [legal and i == s for i in range(len(pairs))]
        if legal:
            # HOLDING is left for a partial target; BLENDING at 0.5 goes up, or stays when it is there already
            partial = target < 1
            assert after.stage[s] == (S.BLENDING if partial or stage == S.BLENDING else S.HOLDING)
            now = 0.5 if stage == S.BLENDING else 1.0
            expected = AlphaMode.HOLD if target == now else AlphaMode.UP if target > now else AlphaMode.DOWN
            assert after.alpha.mode[s] == expected and after.alpha.target[s] == jnp.float32(target)
            # a retarget to the present alpha leaves no ramp that nothing would tick
            assert after.alpha.steps_total[s] == (0 if target == now else 3)


def test_a_down_ramp_freezes_and_the_end_of_it_does_not_prune():
    slots = R.make([S.HOLDING], epochs_total=9, alpha={"alpha": 1.0, "target": 1.0})
    slots, rows = play([R.act(Op.SET_ALPHA_TARGET, alpha_target=0, alpha_speed=1), *[R.act(Op.WAIT)] * 3], slots)
    np.testing.assert_allclose([row[1] for row in rows], [5 / 6, 4 / 6, 0.5, 0.5], rtol=1e-6)
    assert {row[0] for row in rows} == {"BLENDING"} and not stages.frozen(slots)[0]
    # a blend that rests at a part of 1 goes to HOLDING only after it was sent there
    slots, rows = play([R.act(Op.ADVANCE), R.act(Op.SET_ALPHA_TARGET), R.act(Op.ADVANCE)], slots)
    assert [row[0] for row in rows] == ["BLENDING", "BLENDING", "HOLDING"]
    assert [row[2] for row in rows] == [False, True, True]


def test_a_change_of_algorithm_creates_and_drops_the_gate():
    A = AlphaAlgorithm
    slots = R.make([S.BLENDING] * 3, algorithm=[A.ADD, A.GATE, A.GATE], has_gate=[False, True, True],
                   alpha={"alpha": 0.5, "target": 0.5})  # fmt: skip
    run = lambda slot, algorithm: R.execute(
        slots, R.request(Op.SET_ALPHA_TARGET, slot=slot, algorithm=jnp.int32(algorithm)), 50.0, R.PERMISSIVE
    )
    after, outcome = run(0, A.GATE)
    assert after.algorithm[0] == A.GATE and after.has_gate[0] and outcome.gate_created.tolist() == [True, False, False]
    after, outcome = run(1, A.MULTIPLY)
    assert after.algorithm[1] == A.MULTIPLY and not after.has_gate[1] and not outcome.gate_created.any()
    after, outcome = run(2, A.GATE)  # the gate that is there stays
    assert after.has_gate[2] and not outcome.gate_created.any()
    after, outcome = run(1, A.NONE)  # none given: nothing changes
    assert after.algorithm[1] == A.GATE and after.has_gate[1]


def test_the_gate_of_a_gated_seed_lives_from_blending_on():
    actions = [R.act(Op.GERMINATE, style=GATED, tempo=FAST), R.act(Op.ADVANCE), R.act(Op.ADVANCE)]
    slots, created = stages.empty(1), []
    for action in actions:
        slots, outcome = R.epoch(slots, action)
        created.append(bool(outcome.gate_created[0]))
    assert created == [False, False, True] and slots.has_gate[0] and slots.algorithm[0] == AlphaAlgorithm.GATE


@pytest.mark.parametrize("isolate_after", [False, True])
def test_isolation(isolate_after):
    """A seed in TRAINING is isolated; from BLENDING on only by the option."""
    cfg = LifecycleConfig(isolate_after_training=isolate_after)
    slots, seen = stages.empty(1), []
    ops = [Op.GERMINATE, Op.ADVANCE, Op.ADVANCE, Op.WAIT, Op.WAIT, Op.PRUNE]
    for op in ops:
        slots, _ = R.epoch(slots, R.act(op, tempo=FAST), cfg=cfg)
        seen.append(bool(slots.isolate[0]))
    assert seen == [False, True, *[isolate_after] * 3, False] and slots.stage[0] == S.EMBARGOED


# Refusals


@pytest.mark.parametrize("cfg", [R.PERMISSIVE, R.STRICT], ids=["permissive", "strict"])
def test_what_is_illegal_or_gate_failed_changes_nothing(cfg):
    """Every op on every stage and mode; nothing was measured, so the gates of TRAINING (strict) and HOLDING fail."""
    pairs, slots = grid()
    ops, where = (x.ravel() for x in np.meshgrid(list(Op), range(len(pairs)), indexing="ij"))
    run = lambda op, s: operations.execute(slots, R.request(Op.WAIT).replace(op=op, slot=s), 50.0, cfg)
    after, outcome = jax.jit(jax.vmap(run))(jnp.asarray(ops, jnp.int32), jnp.asarray(where, jnp.int32))
    legal = np.asarray(R.legal(slots, cfg).slot_by_op)[ops, where]
    np.testing.assert_array_equal(outcome.legal, legal)
    gate = R.gate(slots, cfg)
    gated = np.isin(ops, [Op.ADVANCE, Op.FOSSILIZE])
    success = legal & (np.asarray(gate.passed)[where] | ~gated)
    np.testing.assert_array_equal(outcome.success, success)
    np.testing.assert_array_equal(outcome.op, np.where(success, ops, Op.WAIT))
    np.testing.assert_array_equal(outcome.gate_level, np.where(legal & gated, np.asarray(gate.level)[where], -1))
    leaves = zip(jax.tree.leaves(after), jax.tree.leaves(slots), strict=True)
    changed = np.any([np.asarray(a) != np.asarray(b) for a, b in leaves], axis=0)  # [cases, slots]
    # only the addressed slot ever changes, and if the request was refused or is WAIT, none
    expected = (success & (ops != Op.WAIT))[:, None] & (where[:, None] == np.arange(len(pairs)))
    np.testing.assert_array_equal(changed, expected)
    assert success.sum() > 0 and (~success).sum() > 0


@pytest.mark.parametrize("slot", [-1, 3])
def test_a_slot_that_is_not_there(slot):
    slots = stages.empty(3)
    after, outcome = R.execute(slots, R.request(Op.GERMINATE, slot=slot), 50.0, R.PERMISSIVE)
    assert not outcome.legal and not outcome.success and outcome.op == Op.WAIT and R.equal(after, slots)


def test_an_advance_never_fossilises():
    slots = R.make([S.HOLDING], alpha={"alpha": 1.0, "target": 1.0}, metrics={"contribution_valid": True})
    after, outcome = R.execute(slots, R.request(Op.ADVANCE), 50.0, R.PERMISSIVE)
    assert not outcome.legal and R.equal(after, slots)
    after, outcome = R.execute(slots, R.request(Op.FOSSILIZE), 50.0, R.PERMISSIVE)
    assert outcome.success and outcome.gate_level == 5 and outcome.gate_passed and after.stage[0] == S.FOSSILIZED
