"""Stages: transitions, gates at their thresholds, cooldown, what is recorded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import slot_records as R

from esper_jax.config import LifecycleConfig
from esper_jax.lifecycle import stages
from esper_jax.types import (
    NUM_STAGES,
    STAGE_ONE_HOT_INDEX,
    AlphaAlgorithm,
    AlphaCurve,
    AlphaMode,
    Op,
    Stage,
)

S = Stage


def test_enums_are_the_reference_s():
    assert [(s.name, s.value) for s in Stage] == [
        ("UNKNOWN", 0), ("DORMANT", 1), ("GERMINATED", 2), ("TRAINING", 3), ("BLENDING", 4), ("HOLDING", 6),
        ("FOSSILIZED", 7), ("PRUNED", 8), ("EMBARGOED", 9), ("RESETTING", 10),
    ]  # fmt: skip
    assert [o.name for o in Op] == ["WAIT", "GERMINATE", "SET_ALPHA_TARGET", "PRUNE", "FOSSILIZE", "ADVANCE"]
    assert [int(o) for o in Op] == [0, 1, 2, 3, 4, 5]
    assert [(a.name, a.value) for a in AlphaMode] == [("HOLD", 0), ("UP", 1), ("DOWN", 2)]
    assert [(a.name, a.value) for a in AlphaCurve] == [("LINEAR", 1), ("COSINE", 2), ("SIGMOID", 3)]
    assert [(a.name, a.value) for a in AlphaAlgorithm][1:] == [("ADD", 1), ("MULTIPLY", 2), ("GATE", 3)]
    assert NUM_STAGES == len(Stage) == 10
    assert [STAGE_ONE_HOT_INDEX[s] for s in Stage] == list(range(10)) and STAGE_ONE_HOT_INDEX[5] == -1


def test_transition_table():
    legal = {
        (0, 1), (1, 2), (2, 3), (2, 8), (3, 4), (3, 8), (4, 6), (4, 8), (6, 7), (6, 4), (6, 8),
        (8, 9), (9, 10), (10, 1),
    }  # fmt: skip
    values = np.arange(-2, 14)  # 5 is retired; -2, -1, 11, 12, 13 were never stages
    source, target = np.meshgrid(values, values, indexing="ij")
    found = np.asarray(stages.can_transition(jnp.asarray(source), jnp.asarray(target)))
    assert set(zip(source[found].tolist(), target[found].tolist(), strict=True)) == legal


def test_predicates():
    values = jnp.arange(11)
    active = np.flatnonzero(stages.is_active(values)).tolist()
    assert active == [S.GERMINATED, S.TRAINING, S.BLENDING, S.HOLDING, S.FOSSILIZED]
    assert stages.seed_count(values) == 5
    assert np.flatnonzero(stages.is_in(values, stages.COOLDOWN)).tolist() == [S.PRUNED, S.EMBARGOED, S.RESETTING]


# Gates. A table per gate: fields of the record, then whether it passes (strict, permissive), then its score.


def check_gate(source, level, rows):
    for cfg, column in ((R.STRICT, 1), (R.PERMISSIVE, 2)):
        slots = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *[R.make([source], **row[0]) for row in rows])
        found = R.gate(slots, cfg)
        assert found.level.tolist() == [level] * len(rows)
        assert found.passed.tolist() == [row[column] for row in rows]
        np.testing.assert_allclose(found.score, [row[3] for row in rows], atol=3e-6)


def test_gate_to_training():
    check_gate(S.GERMINATED, 1, [({}, True, True, 1.0), ({"metrics": {"current_score": -3.0}}, True, True, 1.0)])


def test_gate_to_blending():
    """Strict: 0.5 points gained in the stage, 3 epochs, a ratio of 0.10, all measured; permissive: 1 epoch."""

    def row(gained=0.5, epochs=3, ratio=0.10, measured=True):
        gains = {"current_score": 40 + gained, "stage_start_score": 40.0}
        return {"epochs_in_stage": epochs, "metrics": gains | {"gradient_ratio": ratio, "gradient_valid": measured}}

    check_gate(S.TRAINING, 2, [
        (row(), True, True, 0.1),
        (row(gained=0.49), False, True, 0.098),
        (row(gained=0.51), True, True, 0.102),
        (row(epochs=2), False, True, 0.1),
        (row(epochs=4), True, True, 0.1),
        (row(epochs=1), False, True, 0.1),
        (row(epochs=0), False, False, 0.1),
        (row(ratio=0.0999), False, True, 0.1),
        (row(ratio=0.1001), True, True, 0.1),
        (row(measured=False), False, True, 0.1),
        (row(gained=5.0), True, True, 1.0),
        (row(gained=7.5), True, True, 1.0),
        (row(gained=-2.5), False, True, 0.0),
    ])  # fmt: skip


def test_gate_to_holding():
    """Alpha rests at a target of 1, within 1e-6; strict also asks for 3 epochs."""

    def row(alpha=1.0, target=1.0, mode=AlphaMode.HOLD, epochs=3):
        return {"epochs_in_stage": epochs, "alpha": {"alpha": alpha, "target": target, "mode": mode}}

    check_gate(S.BLENDING, 3, [
        (row(), True, True, 1.0),
        (row(epochs=2), False, True, 1.0),
        (row(epochs=4), True, True, 1.0),
        (row(epochs=0), False, True, 1.0),
        (row(alpha=1 - 0.8e-6), True, True, 1.0),
        (row(alpha=1 - 2e-6), False, False, 1.0),
        (row(alpha=0.7, target=0.7), False, False, 0.7),
        (row(alpha=0.9, mode=AlphaMode.UP), False, False, 0.9),
        (row(mode=AlphaMode.DOWN, target=0.0), False, False, 1.0),
    ])  # fmt: skip


def test_gate_to_fossilized():
    """A measured contribution, 0 included; strict, of at least 1 point."""

    def row(contribution, measured=True):
        return {"metrics": {"contribution": contribution, "contribution_valid": measured}}

    check_gate(S.HOLDING, 5, [
        (row(1.0), True, True, 0.1),
        (row(0.999), False, True, 0.0999),
        (row(1.001), True, True, 0.1001),
        (row(0.0), False, True, 0.0),
        (row(-4.0), False, True, 0.0),
        (row(10.0), True, True, 1.0),
        (row(25.0), True, True, 1.0),
        (row(25.0, measured=False), False, False, 0.0),  # what is not measured is not looked at
    ])  # fmt: skip


def test_no_gate_elsewhere():
    rest = [S.UNKNOWN, S.DORMANT, S.FOSSILIZED, S.PRUNED, S.EMBARGOED, S.RESETTING]
    found = R.gate(R.make(rest), R.PERMISSIVE)
    assert found.level.tolist() == [-1] * 6 and not found.passed.any() and not found.score.any()


def test_thresholds_are_the_configuration_s():
    cfg = LifecycleConfig(min_training_epochs=4)
    slots = R.make([S.TRAINING, S.TRAINING], epochs_in_stage=[3, 4])
    assert R.gate(slots, cfg).passed.tolist() == [False, True]


# What happens by itself.


def test_cooldown_takes_seven_ticks():
    slots = R.make([S.BLENDING], epochs_in_stage=4, epochs_total=9, blueprint=3)
    slots = jax.jit(stages.prune_now)(slots, jnp.ones(1, bool))
    assert slots.stage[0] == S.PRUNED and slots.blueprint[0] == 3  # the record stays for the cooldown
    seen = []
    for _ in range(7):
        slots = R.tick(slots, R.PERMISSIVE)
        seen.append((int(slots.stage[0]), int(slots.epochs_in_stage[0])))
    # entering restarts the counter; five ticks of embargo, the fifth of which moves on; one of resetting
    assert seen == [(9, 0), (9, 1), (9, 2), (9, 3), (9, 4), (10, 0), (1, 0)]
    assert R.equal(slots, stages.empty(1))


@pytest.mark.parametrize("embargo", [1, 3])
def test_embargo_is_the_configuration_s(embargo):
    cfg, slots, ticks = LifecycleConfig(embargo_epochs=embargo), R.make([S.PRUNED]), 0
    while slots.stage[0] != S.DORMANT:
        slots, ticks = R.tick(slots, cfg), ticks + 1
    assert ticks == embargo + 2


def test_holding_and_the_other_stages_do_not_change_by_themselves():
    """Only ramps and cooldowns pass by themselves: no timeout, no automatic fossilisation or prune."""
    contribution = [5.0, 0.0, -5.0, 0.0] * 5
    stage = sum(([s] * 4 for s in (S.HOLDING, S.DORMANT, S.GERMINATED, S.TRAINING, S.FOSSILIZED)), [])
    measured = [True, True, True, False] * 5
    alphas = [1.0 if s in (S.HOLDING, S.FOSSILIZED) else 0.0 for s in stage]
    slots = R.make(
        stage, alpha={"alpha": alphas, "target": alphas},
        metrics={"contribution": contribution, "contribution_valid": measured},
    )  # fmt: skip
    ticks = jax.jit(
        lambda slots, cfg: jax.lax.fori_loop(0, 200, lambda _, s: stages.tick(s, cfg), slots), static_argnums=1
    )
    for cfg in (R.PERMISSIVE, R.STRICT):
        assert R.equal(ticks(slots, cfg), slots)
    # nor does a seed whose blend is complete go on to HOLDING
    complete = R.make([S.BLENDING], alpha={"alpha": 1.0, "target": 1.0})
    assert R.equal(ticks(complete, R.PERMISSIVE), complete)


def test_ramps_tick_in_blending_alone():
    ramp = {"mode": AlphaMode.UP, "target": 1.0, "steps_total": 4, "steps_done": 0}
    slots = R.make([S.BLENDING, S.HOLDING, S.TRAINING, S.FOSSILIZED], alpha=ramp)
    assert R.tick(slots, R.PERMISSIVE).alpha.alpha.tolist() == [0.25, 0, 0, 0]


def test_prune_now_leaves_fossils_and_slots_without_a_seed():
    every = [s for s in Stage]
    slots = R.make(every, has_gate=True, isolate=True, alpha={"alpha": 0.5, "curve": 2, "steps_total": 3})
    after = jax.jit(stages.prune_now)(slots, jnp.ones(10, bool))
    prunable = [s in (S.GERMINATED, S.TRAINING, S.BLENDING, S.HOLDING) for s in every]
    assert ((after.stage == S.PRUNED) & (slots.stage != S.PRUNED)).tolist() == prunable
    changed = np.array(prunable)
    assert R.differing(after, slots).tolist() == prunable
    assert not after.alpha.alpha[changed].any() and not after.alpha.steps_total[changed].any()
    assert not after.has_gate[changed].any() and not after.isolate[changed].any()


# What is recorded.


def test_record_score():
    """An empty slot, a seed just germinated, and one that is two epochs old."""
    slots = R.make([S.DORMANT, S.GERMINATED, S.TRAINING], epochs_total=[0, 0, 2], epochs_in_stage=[0, 0, 1],
                   metrics={"initial_score": [0, 0, 30.0], "best_score": [0, 0, 50.0],
                            "stage_start_score": [0, 0, 31.0], "current_score": [0, 0, 31.0]})  # fmt: skip
    after = R.record_score(slots, 40.0)
    m = after.metrics
    assert after.epochs_total.tolist() == [0, 1, 3] and after.epochs_in_stage.tolist() == [0, 1, 2]
    assert m.initial_score.tolist() == [0, 40, 30] and m.stage_start_score.tolist() == [0, 40, 31]
    assert m.current_score.tolist() == [0, 40, 40] and m.best_score.tolist() == [0, 40, 50]
    assert stages.improvement_in_stage(after).tolist() == [0, 0, 9]
    assert stages.total_improvement(after).tolist() == [0, 0, 10]
    again = R.record_score(after, 38.0).metrics
    assert again.initial_score.tolist() == [0, 40, 30] and again.best_score.tolist() == [0, 40, 50]
    # cooldown has no seed to record
    cooling = R.make(list(stages.COOLDOWN))
    assert R.equal(R.record_score(cooling, 40.0), cooling)


def test_entering_a_stage():
    slots = R.make([S.TRAINING] * 2, epochs_in_stage=[4, 5], previous_stage=S.GERMINATED, previous_epochs_in_stage=1,
                   metrics={"current_score": 44.0, "stage_start_score": 40.0})  # fmt: skip
    after = stages.enter(slots, jnp.array([True, False]), S.BLENDING)
    assert after.stage.tolist() == [S.BLENDING, S.TRAINING]
    assert after.previous_stage.tolist() == [S.TRAINING, S.GERMINATED]
    assert after.previous_epochs_in_stage.tolist() == [4, 1] and after.epochs_in_stage.tolist() == [0, 5]
    assert after.metrics.stage_start_score.tolist() == [44, 40]


def test_contribution_velocity():
    slots = R.make([S.BLENDING])
    yes, no = jnp.ones(1, bool), jnp.zeros(1, bool)
    # contributions 1, 2, (nothing), 4: velocity 0, 0.3 (2 - 1), the same, 0.7 * 0.3 + 0.3 (4 - 2) = 0.81
    seen = []
    for value, measured in ((1.0, yes), (2.0, yes), (99.0, no), (4.0, yes)):
        slots = R.record_contribution(slots, jnp.array([value]), measured)
        m = slots.metrics
        seen.append((float(m.contribution[0]), float(m.contribution_velocity[0]), int(m.contribution_age[0])))
    np.testing.assert_allclose(seen, [(1, 0, 0), (2, 0.3, 0), (2, 0.3, 1), (4, 0.81, 0)], rtol=1e-6)
    never = R.record_contribution(R.make([S.BLENDING]), jnp.array([3.0]), no).metrics
    assert not never.contribution_valid[0] and never.contribution_age[0] == 0
