"""Intervals, what they allow one to claim, and what a reader gets to see."""

import base64
import io
import re

import numpy as np
import pytest
import tiny_run
from scipy import stats

from esper_jax import plots, report
from esper_jax.console import Console, round_note, text_table
from esper_jax.statistics import mean_interval, signed, verdict
from esper_jax.types import Stage

PNG = b"\x89PNG\r\n\x1a\n"
ARMS = ("never", "random", "eager", "policy")


def run_arrays(envs=6, epochs=10, slots=3, rounds=3):
    """Arrays of a run that was never made: `eager` gains 3 points, `policy` 1, `random` nothing."""
    rng = np.random.default_rng(0)
    shape = (len(ARMS), envs, epochs)
    luck = rng.normal(0, 2, (envs, 1))
    gain = np.array([0, 0, 3, 1])[:, None, None]
    accuracy = 30 + np.arange(epochs) + luck + gain * np.linspace(0, 1, epochs) + rng.normal(0, 0.3, shape)
    stage = np.full((*shape, slots), Stage.DORMANT, np.int8)
    life = [Stage.GERMINATED, Stage.TRAINING, Stage.BLENDING, Stage.BLENDING, Stage.HOLDING, Stage.FOSSILIZED]
    stage[2, :, 2:8, 0] = life
    stage[2, :, 8:, 0] = Stage.FOSSILIZED
    pruned = [Stage.GERMINATED, Stage.PRUNED, Stage.EMBARGOED, Stage.EMBARGOED, Stage.RESETTING, Stage.DORMANT]
    stage[3, :, 4:, 1] = pruned
    alpha = np.select([stage == Stage.BLENDING, (stage == Stage.HOLDING) | (stage == Stage.FOSSILIZED)], [0.5, 1.0])
    blueprint = np.where((stage > Stage.DORMANT) & (stage <= Stage.FOSSILIZED), 1, -1).astype(np.int8)
    panic = np.zeros(shape, bool)
    panic[2, :, 5] = True
    params = np.full(shape, 1000)
    params[2, :, 2:] = 2500
    counts = {name: np.zeros(shape[:2], int) for name in ("germinated", "fossilised", "pruned", "rollbacks")}
    counts["germinated"][2:] = 1
    reward = rng.normal(0, 1, (rounds, envs, epochs))
    reward[:, :, 0] = np.nan
    return {
        "arms/names": np.array(ARMS),
        "arms/val_accuracy": accuracy,
        "arms/test_accuracy": accuracy[:, :, -1],
        "arms/stage": stage, "arms/alpha": alpha, "arms/blueprint": blueprint, "arms/panic": panic,
        "arms/params": params, **{f"arms/{name}": count for name, count in counts.items()},
        "rounds/reward": reward, "rounds/val_accuracy": accuracy[:rounds],
        "learner/entropy": np.linspace(0.9, 0.7, rounds),
    }  # fmt: skip


def test_interval_is_students():
    samples = np.random.default_rng(1).normal(3, 2, 9)
    low, high = stats.t.interval(0.95, 8, samples.mean(), stats.sem(samples))
    got = mean_interval(samples)
    np.testing.assert_allclose([got.mean, got.low, got.high, got.n], [samples.mean(), low, high, 9])
    many = mean_interval(np.stack([samples, samples + 1], axis=1))
    np.testing.assert_allclose(many.low, [low, low + 1])


def test_interval_covers_as_often_as_it_says():
    samples = np.random.default_rng(2).normal(0, 1, (8, 4000))
    interval = mean_interval(samples)
    assert 0.94 < ((interval.low < 0) & (interval.high > 0)).mean() < 0.96


def test_few_samples_have_no_interval():
    one, none, gap = mean_interval([2.0]), mean_interval([np.nan]), mean_interval([1.0, np.nan, 3.0])
    assert one.mean == 2 and np.isnan(one.low) and one.n == 1 and not one.excludes_zero
    assert np.isnan(none.mean) and none.n == 0
    assert gap.mean == 2 and gap.n == 2
    assert signed(none.mean) == "-" and signed(-1.0) == "-1.00" and signed(0.5, 1) == "+0.5"


def test_verdict_claims_what_the_intervals_show():
    arrays = run_arrays()
    claim = report.sentence(arrays, "cifar10")
    assert len(re.findall(r"\.(?!\d)", claim)) == 1 and claim.endswith(".")  # one sentence
    assert re.search(r"better than never: eager \(\+3\.\d\d \[.*\]\), policy \(\+1\.", claim)
    assert "nothing may be claimed about random against never" in claim
    assert re.search(r"the policy is better than random", claim) and re.search(r"the policy is worse than eager", claim)
    assert "6 environments per arm" in claim and "one training seed" in claim and "CIFAR-10" not in claim
    assert "nothing may be claimed about CIFAR-10" in report.sentence(arrays, "shapes")


def test_verdict_without_enough_environments_claims_nothing():
    accuracy = {"never": np.array([1.0]), "eager": np.array([5.0]), "policy": np.array([9.0])}
    claim = verdict(accuracy, policy="policy", baseline="never", data="cifar10", metric="accuracy")
    assert "better" not in claim and "nothing may be claimed about eager, policy against never" in claim


def test_table():
    rows = {row[0]: dict(zip(report.COLUMNS, row, strict=True)) for row in report.table(run_arrays())}
    assert list(rows) == list(ARMS)
    assert rows["never"]["minus never"] == "-" and rows["never"]["params"] == "x1.00"
    assert rows["eager"]["minus never"].endswith("*") and rows["eager"]["params"] == "x2.50"
    assert not rows["random"]["minus never"].endswith("*")
    assert rows["policy"]["seeds"] == "1.0" and rows["policy"]["kept"] == "0.0"
    text = text_table(report.COLUMNS, report.table(run_arrays())).splitlines()
    assert max(map(len, text)) <= 79
    assert len(text) == 5 and text[0].startswith("arm") and len({line.rindex(" ") for line in text[1:]}) == 1


def test_table_of_one_environment_has_no_intervals():
    row = report.table(run_arrays(envs=1))[2]
    assert "±" not in row[1] + row[2] and "nan" not in " ".join(row)


@pytest.mark.parametrize("draw", [plots.curves, plots.seeds, plots.learning])
@pytest.mark.parametrize("envs", [1, 6])
def test_pictures(tmp_path, draw, envs):
    caption = draw(tmp_path / "x.png", run_arrays(envs=envs), "shapes")
    assert (tmp_path / "x.png").read_bytes().startswith(PNG) and len(caption) > 20


def test_pictures_of_a_real_run(tmp_path):
    for draw in (plots.curves, plots.seeds):
        draw(tmp_path / "x.png", tiny_run.result().metrics, "tiny")


def test_page_is_self_contained_and_escaped(tmp_path):
    (tmp_path / "a.png").write_bytes(PNG + b"picture")
    card = {"data": {"name": "shapes"}, "command": "--out '<b>&'"}
    rows = report.table(run_arrays())
    page = report.page("a <title>", rows, "x < y.", {tmp_path / "a.png": "a & b"}, card)
    assert base64.b64encode(PNG + b"picture").decode() in page
    assert not re.search(r"(src|href)=\"(?!data:)", page) and "http" not in page and "<script" not in page
    for text in ("a &lt;title&gt;", "x &lt; y.", "a &amp; b", "&lt;b&gt;&amp;", "shapes, not CIFAR-10", *rows[2][:2]):
        assert text in page
    assert "not CIFAR-10" not in report.page("t", rows, "c", {}, {"data": {"name": "cifar10"}})


def test_piped_output_is_plain_lines():
    out = io.StringIO()
    console = Console(file=out)
    with console.step("data", "shapes") as said:
        said.append("done [100%]")
    with console.bar("round", 4, done=2) as advance:
        advance("acc=1.0")
        advance("acc=2.0")
    console.table(("arm", "x"), [["never", "1"]])
    lines = out.getvalue().splitlines()
    assert "\x1b" not in out.getvalue()
    assert lines[0] == "  data      shapes ..." and re.fullmatch(r"  data      \d\.\d s  done \[100%\]", lines[1])
    assert re.fullmatch(r"  round 3/4  t=\d+s  left=\d+s  acc=1.0", lines[2]) and lines[3].startswith("  round 4/4")
    assert set(console.durations) == {"data", "round"}


def test_quiet_keeps_warnings_and_results():
    out = io.StringIO()
    console = Console(quiet=True, file=out)
    console.say("nothing")
    with console.bar("round", 1) as advance:
        advance("acc=1.0")
    console.say("WARNING", always=True)
    console.table(("arm", "x"), [["never", "1"]])
    assert out.getvalue().splitlines() == ["WARNING", "arm    x", "never  1"]


def test_round_note_has_the_numbers():
    note = round_note(tiny_run.result().rounds[0])
    assert re.fullmatch(r"acc=\d+\.\d  return=-?\d+\.\d\d  kept=\d\.\d  kl=-?\d\.\d+  entropy=\d\.\d\d( .*)?", note)


def test_every_stage_can_be_drawn():
    assert set(plots.STAGE_COLOURS) == set(Stage) - {Stage.UNKNOWN, Stage.DORMANT}
