"""The files of a run: nothing measured is nowhere 0, and the same run writes the same bytes."""

import csv
import errno
import json
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_run

from esper_jax.enums import LEARNED
from esper_jax.run import files, records
from esper_jax.types import Op, Stage

P, E, T, S = tiny_run.CONFIG.policy_seeds, tiny_run.CONFIG.n_envs, tiny_run.CONFIG.training.epochs, 2
ROWS = tiny_run.ROWS
HOST = 375  # parameters: convolutions 36 + 288, BatchNorm 8 + 16, the last layer 27


def metrics():
    rounds = tiny_run.result().rounds
    stacked = {name: np.stack([arrays[name] for arrays in rounds]) for name in rounds[0]}
    return stacked | tiny_run.result().metrics


def arm(name, field, policy=0):
    return metrics()[f"arms/{field}"][ROWS.index(name) + policy]


def test_shapes_and_dtypes():
    arrays, arms = metrics(), len(ROWS)
    assert arrays["rounds/reward"].shape == (tiny_run.CONFIG.rounds, P, E, T)
    assert arrays["rounds/stage"].shape == (tiny_run.CONFIG.rounds, P, E, T, S)
    assert arrays["learner/entropy"].shape == arrays["learner/return_scale"].shape == (tiny_run.CONFIG.rounds, P)
    assert arrays["arms/alpha"].shape == (arms, E, T, S)
    assert arrays["arms/test_table"].shape == (arms, E, 4)
    # a rule has one row, a learned arm one for each of the two policies
    assert list(arrays["arms/names"]) == list(ROWS) and arrays["arms/policy_seed"].tolist() == [0, 0, 0, 0, 1, 0, 1]
    assert arrays["arms/stage"].dtype == np.int8 and arrays["arms/params"].dtype == np.int32
    assert not any(array.dtype == object for array in arrays.values())


def test_what_was_not_measured_is_nan_under_its_mask():
    arrays = metrics()
    for prefix in ("rounds/", "arms/"):
        decided = arrays[prefix + "decision_valid"]
        assert not decided[..., 0].any() and decided[..., 1:].all()
        for name in ("reward", "reward_terminal"):
            np.testing.assert_array_equal(np.isnan(arrays[prefix + name]), ~decided)
        predicts = decided.copy()
        if prefix == "arms/":  # a rule predicts no value
            predicts[[row not in ("policy", "policy_greedy") for row in tiny_run.ROWS]] = False
        np.testing.assert_array_equal(np.isnan(arrays[prefix + "value"]), ~predicts)
        for name in ("contribution", "shapley", "interaction"):
            valid = arrays[f"{prefix}{name}_valid"]
            np.testing.assert_array_equal(np.isnan(arrays[prefix + name]), ~valid)
        np.testing.assert_array_equal(np.isnan(arrays[prefix + "gradient_ratio"]), ~arrays[prefix + "gradient_valid"])
    assert arrays["arms/contribution_valid"].any() and not arm("never", "contribution_valid").any()


def test_reward_is_the_sum_of_its_components():
    arrays = metrics()
    names = [name for name in arrays if name.startswith("arms/reward_")]
    assert len(names) == 16
    total = sum(arrays[name].astype(np.float64) for name in names)
    np.testing.assert_allclose(total[..., 1:], arrays["arms/reward"][..., 1:], rtol=1e-5, atol=1e-5)


def test_same_arrays_give_same_bytes(tmp_path):
    for name in ("a", "b"):
        records.write_arrays(tmp_path / name, metrics())
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with np.load(tmp_path / "a") as file:
        for name, array in metrics().items():
            np.testing.assert_array_equal(file[name], array)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_round_log_goes_on_where_the_checkpoint_is(tmp_path):
    log = records.RoundLog(tmp_path / "rounds")
    assert log.stacked() == {}
    for number in range(3):
        log.write(number, {"x": np.float32(number)})
    (tmp_path / "rounds" / "000003.npz.tmp").write_text("cut off")
    log = records.RoundLog(tmp_path / "rounds", done=2)
    np.testing.assert_array_equal(log.stacked()["x"], [0, 1])
    records.RoundLog.check(tmp_path / "rounds", 2)
    with pytest.raises(ValueError, match="000002.npz: is missing; put it back, or start the run again"):
        records.RoundLog.check(tmp_path / "rounds", 3)


def test_a_damaged_round_is_named(tmp_path):
    log = records.RoundLog(tmp_path)
    for number in range(2):
        log.write(number, {"x": np.arange(100, dtype=np.float32)})
    path = tmp_path / "000001.npz"
    content = path.read_bytes()
    middle = len(content) // 2
    for damaged in (b"", b"text", content[:-5], content[:middle] + b"\0\0\0" + content[middle + 3 :]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="000001.npz: is damaged"):
            records.RoundLog.check(tmp_path, 2)
    log.write(1, {"y": np.arange(100)})
    with pytest.raises(ValueError, match="000001.npz: is not of this run; put it back"):
        records.RoundLog.check(tmp_path, 2)


WRITERS = {
    "arrays": lambda path: records.write_arrays(path, {"x": np.zeros(3)}),
    "json": lambda path: files.write_json(path, {"x": 1}),
    "text": lambda path: files.write_text(path, "x"),
    "csv": lambda path: records.write_csv(path, [{"x": 1}], ("x",)),
    "lines": lambda path: files.write_lines(path, [{"x": 1}]),
}


@pytest.mark.parametrize("write", WRITERS)
def test_a_file_is_complete_or_what_it_was(tmp_path, monkeypatch, write):
    path = tmp_path / "file"

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    for before in (None, b"before"):
        if before:
            path.write_bytes(before)
        with monkeypatch.context() as patch, pytest.raises(OSError, match=f"No space left on device: '{path}'"):
            patch.setattr(files.os, "fsync", full)
            WRITERS[write](path)
        assert [file.read_bytes() for file in tmp_path.iterdir()] == [before] * bool(before)
    WRITERS[write](path)
    assert path.read_bytes() not in (b"", b"before")


def test_outcomes(tmp_path):
    rows = records.outcomes(metrics())
    expected = [(name, p) for name in tiny_run.ARMS for p in range(P if name in LEARNED else 1)]
    assert [(row["arm"], row["policy_seed"], row["env"]) for row in rows] == [
        (*arm_and_policy, env) for arm_and_policy in expected for env in range(E)
    ]
    for row in rows:
        value = lambda field, row=row: arm(row["arm"], field, row["policy_seed"])[row["env"]]
        assert (row["test_accuracy"], row["test_accuracy_final"]) == (
            value("test_committed_accuracy"),
            value("test_accuracy"),
        )
        assert (row["test_loss"], row["test_loss_final"]) == (value("test_committed_loss"), value("test_loss"))
        assert row["return"] == pytest.approx(value("reward")[1:].sum(), abs=1e-4)
        # relative to the bare host: what was kept, and what there is at the end
        assert row["params"] == value("committed_size")[-1] and row["params_final"] == value("params")[-1] / HOST
    still = [row for row in rows if row["arm"] == "never"]
    assert all(row["params"] == row["params_final"] == 1 and row["germinated"] == row["return"] == 0 for row in still)
    grown = [row for row in rows if row["arm"] == "eager"]
    assert all(row["params_final"] > 1 and row["germinated"] > 0 for row in grown)
    assert all((row["params"] > 1) == (row["fossilised"] > 0) for row in rows)

    rows[0]["test_loss"] = float("nan")
    records.write_csv(tmp_path / "outcomes.csv", rows, records.OUTCOMES)
    with open(tmp_path / "outcomes.csv") as file:
        read = list(csv.DictReader(file))
    assert read[0]["test_loss"] == "" and float(read[1]["test_loss"]) == pytest.approx(rows[1]["test_loss"], rel=1e-5)
    assert float(read[0]["germinated"]) == 0


def test_lifecycle_rows_replay_every_stage(tmp_path):
    rows = list(records.lifecycle(metrics()))
    files.write_lines(tmp_path / "lifecycle.jsonl", rows)
    assert [json.loads(line) for line in (tmp_path / "lifecycle.jsonl").read_text().splitlines()] == rows
    stage = metrics()["arms/stage"]
    replayed = np.full(stage.shape, Stage.DORMANT)
    for row in rows:
        a = ROWS.index(row["arm"]) + row["policy_seed"]
        place = (a, row["env"], slice(row["epoch"] - 1, None), row["slot"])
        assert replayed[place][0] == Stage[row["from"]]
        replayed[place] = Stage[row["to"]]
    np.testing.assert_array_equal(replayed, stage)


def test_lifecycle_rows_say_why():
    rows = list(records.lifecycle(metrics()))
    assert {row["arm"] for row in rows} >= {"eager", "random"} and "never" not in {row["arm"] for row in rows}
    born = [row for row in rows if row["cause"] == "germinate" and row["success"]]
    assert len(born) == metrics()["arms/germinated"].sum()
    assert all((row["to"], row["blueprint"] is None) == ("GERMINATED", False) for row in born)
    gated = [row for row in rows if row["gate_level"] is not None]
    assert gated and {row["op"] for row in gated} <= {"advance", "fossilize"}
    assert all(row["success"] == row["gate_passed"] for row in gated)
    asked = (metrics()["arms/requested_op"] != Op.WAIT) & metrics()["arms/decision_valid"]
    assert sum(row["op"] is not None for row in rows) == asked.sum()


def test_a_rollback_is_the_governors():
    arrays = {name: array.copy() for name, array in metrics().items()}
    a = ROWS.index("eager")
    moved = np.argwhere(np.diff(arrays["arms/stage"][a].astype(int), axis=1))
    e, t, s = moved[0] + (0, 1, 0)
    arrays["arms/panic"][a, e, t] = True
    arrays["arms/panic_reason"][a, e, t] = 1
    place = {"arm": "eager", "policy_seed": 0, "env": e, "epoch": t + 1, "slot": s}
    here = [row for row in records.lifecycle(arrays) if place.items() <= row.items()]
    assert [(row["cause"], row["panic"]) for row in here] == [("governor", "non_finite")]


def test_executed_work():
    """Two epochs, two slots: the host twice at 10, one seed of 3 in both epochs, one of 5 in the second only; a seed
    that has just germinated is not computed yet."""
    acts, waits = int(Stage.TRAINING), int(Stage.GERMINATED)
    info = SimpleNamespace(
        stage=np.array([[[acts, waits], [Stage.FOSSILIZED, Stage.BLENDING]]]), blueprint=np.array([[[1, 2], [1, 2]]])
    )
    seeds = np.array([[0.0, 3.0, 4.0], [0.0, 6.0, 5.0]])
    assert records.train_flops(info, 10.0, seeds).tolist() == [2 * 10 + 3 + 3 + 5]
