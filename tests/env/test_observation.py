"""The observation vector: its table, hand-worked values, declared ranges, and what was never measured."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from esper_jax.env import observation
from esper_jax.lifecycle import stages
from esper_jax.types import NUM_STAGES, AlphaMode, Op, Signals, Stage

SLOTS = ("r0c0", "r0c1")
SPACE = tiny.CONFIG.action_space
ROWS = observation.rows(SLOTS, SPACE)
NAMES = [name for name, _, _ in ROWS]
encode = jax.jit(functools.partial(observation.encode, space=SPACE))


def inputs(slots=None, *, last_op=Op.WAIT, last_success=True, epochs=20, **signals):
    f32, history = jnp.float32, jnp.zeros(5)
    values = {
        "epoch": jnp.int32(1), "train_loss": f32(1), "train_score": f32(40), "val_loss": f32(1),
        "val_score": f32(50), "loss_delta": f32(jnp.inf), "score_delta": f32(50), "plateau_epochs": jnp.int32(0),
        "host_stabilized": jnp.bool_(False), "best_val_score": f32(50), "best_val_loss": f32(1),
        "loss_history": history, "score_history": history, "history_valid": jnp.zeros(5, bool),
        "available_slots": jnp.int32(2),
    }  # fmt: skip
    values |= {name: jnp.asarray(value, values[name].dtype) for name, value in signals.items()}
    slots = stages.empty(2) if slots is None else slots
    return observation.Inputs(
        Signals(**values), slots, jnp.int32(last_op), jnp.bool_(last_success), f32(epochs), f32(100)
    )


def changed(tree, **fields):
    """Slots' records with some fields of slot 0 replaced."""
    return tree.replace(**{name: getattr(tree, name).at[0].set(value) for name, value in fields.items()})


def seed(stage=Stage.BLENDING, alpha=None, metrics=None, **fields):
    slots = changed(stages.empty(2), stage=stage, **fields)
    return slots.replace(alpha=changed(slots.alpha, **(alpha or {})), metrics=changed(slots.metrics, **(metrics or {})))


def values(given):
    """The vector as `{name: number}`."""
    return dict(zip(NAMES, np.asarray(encode(given)).tolist(), strict=True))


def check(given, expected):
    found = values(given)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-7, err_msg=name)


def test_the_table_is_the_vector():
    assert len(NAMES) == len(set(NAMES)) == observation.size(SPACE) == encode(inputs()).shape[0]
    one, two, three = (observation.size(SPACE._replace(n_slots=n)) for n in (1, 2, 3))
    assert three - two == two - one
    assert all(low < high for _, low, high in ROWS)
    assert encode(inputs()).dtype == jnp.float32
    # 14 global features of 4 + 3 * 5 + 6 + 6 elements, then 29 of each slot
    assert NAMES[0] == "epoch" and NAMES[4:9] == [f"loss_history[{k}]" for k in range(5)]
    assert sum("." not in name for name in NAMES) == 31 and [n.split(".")[0] for n in NAMES[31:]] == sorted(
        name.split(".")[0] for name in NAMES[31:]
    )


def test_global_features():
    # symlog(x) / 7: ln(1 + e^2 - 1) / 7 = 2 / 7, ln 2 / 7 = 0.0990210
    given = inputs(
        seed(Stage.TRAINING), epoch=5, val_loss=np.e**2 - 1, val_score=62.5, train_score=75, plateau_epochs=4,
        host_stabilized=True, loss_history=[9, 9, 9, 1, 0], score_history=[7, 7, 7, 20, 40],
        history_valid=[False, False, False, True, True], last_op=Op.PRUNE, last_success=False,
    )  # fmt: skip
    check(given, {
        "epoch": 0.25, "val_loss": 2 / 7, "val_score": 0.625, "train_score": 0.75, "plateau": 0.4,
        "host_stabilized": 1, "loss_history[0]": 0, "loss_history[2]": 0, "loss_history[3]": 0.0990210,
        "loss_history[4]": 0, "score_history[2]": 0, "score_history[3]": 0.2, "score_history[4]": 0.4,
        "history_valid[2]": 0, "history_valid[3]": 1, "slots_training": 0.5, "slots_blending": 0, "slots_held": 0,
        "last_success": 0, "last_op[3]": 1, "last_op[0]": 0,
    })  # fmt: skip


def test_a_blending_seed():
    slots = seed(
        Stage.BLENDING, blueprint=3, algorithm=2, ramp_epochs=8, ramp_target=0.7, epochs_in_stage=4, epochs_total=30,
        alpha={"alpha": 0.35, "start": 0.0, "target": 0.7, "mode": AlphaMode.UP, "steps_total": 8, "steps_done": 4},
        metrics={
            "contribution": 2.5, "contribution_valid": True, "contribution_velocity": -1.0, "contribution_age": 2,
            "interaction_sum": -3.0, "interaction_valid": True, "boost_received": 1.0, "gradient_norm": np.e**0.7 - 1,
            "gradient_ratio": 0.5, "gradient_health": 0.82, "gradient_valid": True, "previous_gradient_health": 0.9,
            "previous_gradient_valid": True, "gradient_vanishing": True,
        },
    )  # fmt: skip
    expected = {
        "occupied": 1, "alpha": 0.35, "alpha_target": 0.7, "alpha_mode[1]": 1, "alpha_mode[0]": 0, "algorithm[1]": 1,
        "alpha_steps_total": 0.4, "alpha_steps_done": 0.2, "alpha_velocity": 0.7 / 8, "ramp_epochs": 8 / 12,
        "ramp_target": 0.7, "contribution": 0.25, "contribution_valid": 1, "contribution_freshness": 0.995**2,
        "contribution_velocity": -0.1, "interaction": -0.3, "boost": 0.2, "interaction_valid": 1,
        "gradient_norm": 0.1, "gradient_ratio": 0.05, "gradient_health": 0.82, "gradient_valid": 1,
        "previous_gradient_health": 0.9, "previous_gradient_valid": 1, "gradient_vanishing": 1,
        "gradient_exploding": 0, "epochs_in_stage": 0.2, "age": 1,  # 30 epochs of an episode of 20: capped
    }  # fmt: skip
    check(inputs(slots), {f"r0c0.{name}": value for name, value in expected.items()} | {"slots_blending": 0.5})
    found = values(inputs(slots))
    assert [k for k in range(len(SPACE.blueprints)) if found[f"r0c0.blueprint[{k}]"]] == [3]
    assert found["r0c1.occupied"] == 0


@pytest.mark.parametrize("stage", list(Stage))
def test_stage_one_hot(stage):
    """Ten entries in the order of the stages, without a gap for the retired 5."""
    found = values(inputs(seed(stage)))
    assert [k for k in range(NUM_STAGES) if found[f"r0c0.stage[{k}]"]] == [list(Stage).index(stage)]
    assert found["r0c0.occupied"] == (stage != Stage.DORMANT)
    assert found["slots_held"] == 0.5 * (stage in (Stage.HOLDING, Stage.FOSSILIZED))


def test_an_empty_slot_is_zero_but_for_its_stage():
    found = values(inputs())
    shown = {name for name in NAMES if name.startswith("r0c1.") and found[name]}
    assert shown == {f"r0c1.stage[{list(Stage).index(Stage.DORMANT)}]", "r0c1.alpha_mode[0]"}


def test_what_was_not_measured_is_zero_whatever_lies_there():
    measured = ("contribution", "interaction_sum", "boost_received", "gradient_norm", "gradient_ratio",
                "gradient_health", "previous_gradient_health")  # fmt: skip
    for junk in (jnp.nan, jnp.inf, 7.0):
        given = inputs(seed(metrics=dict.fromkeys(measured, junk)), loss_history=[junk] * 5, score_history=[junk] * 5)
        np.testing.assert_array_equal(encode(given), encode(inputs(seed())))


@functools.cache
def bounds():
    low, high = np.array([row[1] for row in ROWS]), np.array([row[2] for row in ROWS])
    return low, high


@pytest.mark.parametrize("size", [1e-6, 1e3, 1e9, -1e9])
def test_no_measurement_leaves_the_range(size):
    """Numbers of any size where a number can have any size."""
    metrics = dict.fromkeys(
        ("contribution", "contribution_velocity", "interaction_sum", "boost_received", "gradient_ratio"), size
    )
    flags = dict.fromkeys(("contribution_valid", "interaction_valid", "gradient_valid"), True)
    metrics |= flags | {"gradient_norm": abs(size), "boost_received": abs(size), "gradient_ratio": abs(size)}
    slots = seed(metrics=metrics, epochs_in_stage=1000, epochs_total=1000, ramp_epochs=1000, blueprint=12)
    given = inputs(slots, val_loss=size, plateau_epochs=1000, loss_history=[size] * 5, history_valid=[True] * 5)
    found, (low, high) = np.asarray(encode(given)), bounds()
    assert np.isfinite(found).all() and (found >= low).all() and (found <= high).all()


def test_random_lives_stay_in_the_declared_ranges():
    low, high = bounds()
    found = np.stack([np.asarray(step.obs.features) for steps in tiny.random_lives() for step in steps])
    assert found.shape[1] == tiny.env().n_features == len(ROWS)
    assert np.isfinite(found).all()
    outside = (found < low - 1e-6) | (found > high + 1e-6)
    assert not outside.any(), sorted({NAMES[k] for k in np.nonzero(outside)[1]})
    # not a constant among those that these lives can move (here two blueprints, no regression of the tracker's latch)
    still = {NAMES[k] for k in np.flatnonzero(found.std(0) == 0)}
    moving = {"val_loss", "val_score", "r0c0.alpha", "r0c1.contribution", "r0c0.gradient_ratio", "r0c0.interaction"}
    assert not still & moving and len(still) < len(NAMES) / 3


def test_the_environment_shows_what_happened():
    steps = tiny.random_lives()[1]
    for step in steps[1:]:
        found = dict(zip(NAMES, np.asarray(step.obs.features).tolist(), strict=True))
        assert found[f"last_op[{int(step.action.op)}]"] == 1 and found["last_success"] == step.info.success
        np.testing.assert_allclose(found["val_score"] * 100, step.info.val_accuracy, rtol=1e-5)
        np.testing.assert_allclose(found["epoch"], step.state.epoch / tiny.CONFIG.training.epochs, rtol=1e-6)
        np.testing.assert_allclose(found["r0c0.alpha"], step.info.alpha[0], rtol=1e-6)
