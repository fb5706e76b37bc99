"""Intervals, what they allow one to claim, and what a reader gets to see."""

import base64
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import tiny_run
from scipy import stats

from esper_jax.evidence import figures, report, tables
from esper_jax.evidence.statistics import crossed_interval, mean_interval, signed, verdict
from esper_jax.evidence.tables import text_table
from esper_jax.metric import ACCURACY, bits_per_character
from esper_jax.run.console import Console, round_note
from esper_jax.types import BLUEPRINTS, Stage

PNG = b"\x89PNG\r\n\x1a\n"
ARMS = ("never", "random", "eager", "policy")


def run_arrays(envs=6, epochs=10, slots=3, rounds=3, policies=2, metric=ACCURACY):
    """Arrays of a run that was never made: `eager` gains 3 points, `policy` 1, `random` nothing.

    `eager` and the first policy keep a seed, at 2.5 and 1.5 times the host's parameters; the other policies prune it.
    """
    rng = np.random.default_rng(0)
    names = (*ARMS, *["policy"] * (policies - 1))
    shape = (len(names), envs, epochs)
    luck = rng.normal(0, 2, (envs, 1))
    gain = np.array([0, 0, 3, *[1] * policies])[:, None, None]
    accuracy = 30 + np.arange(epochs) + luck + gain * np.linspace(0, 1, epochs) + rng.normal(0, 0.3, shape)
    stage = np.full((*shape, slots), Stage.DORMANT, np.int8)
    life = [Stage.GERMINATED, Stage.TRAINING, Stage.BLENDING, Stage.BLENDING, Stage.HOLDING, Stage.FOSSILIZED]
    stage[2, :, 2:8, 0] = life
    stage[2, :, 8:, 0] = Stage.FOSSILIZED
    pruned = [Stage.GERMINATED, Stage.PRUNED, Stage.EMBARGOED, Stage.EMBARGOED, Stage.RESETTING, Stage.DORMANT]
    stage[3, :, 8:, 0] = Stage.FOSSILIZED
    stage[3:, :, 4:, 1] = pruned
    alpha = np.select([stage == Stage.BLENDING, (stage == Stage.HOLDING) | (stage == Stage.FOSSILIZED)], [0.5, 1.0])
    blueprint = np.where((stage > Stage.DORMANT) & (stage <= Stage.FOSSILIZED), 1, -1).astype(np.int8)
    panic = np.zeros(shape, bool)
    panic[2, :, 5] = True
    committed_size = np.ones(shape)
    committed_size[2, :, 7:], committed_size[3, :, 8:] = 2.5, 1.5
    counts = {name: np.zeros(shape[:2], int) for name in ("germinated", "fossilised", "pruned", "rollbacks")}
    counts["germinated"][2:] = 1
    counts["fossilised"][2:4] = 1
    reward = rng.normal(0, 1, (rounds, policies, envs, epochs))
    reward[..., 0] = np.nan
    committed = accuracy[:, :, -1]
    return {
        "arms/names": np.array(names), "arms/policy_seed": np.array([0, 0, 0, *range(policies)]),
        "arms/blueprints": np.array(BLUEPRINTS),
        "arms/val_accuracy": accuracy,
        "arms/test_committed_accuracy": committed, "arms/test_committed_loss": 2 - committed / 50,
        "arms/val_loss": 2 - accuracy / 50, "arms/test_loss": 1 - committed / 50,
        "arms/test_accuracy": committed + 50,  # of what was not kept, and counts for nothing
        "arms/stage": stage, "arms/alpha": alpha, "arms/blueprint": blueprint, "arms/panic": panic,
        "arms/committed_size": committed_size, **{f"arms/{name}": count for name, count in counts.items()},
        **tables.metric_arrays(metric),
        "rounds/reward": reward, "rounds/stage": np.stack([stage[-policies:]] * rounds),
        "learner/entropy": np.linspace(0.9, 0.7, rounds)[:, None] + np.zeros(policies),
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


def test_one_policy_has_the_interval_over_environments():
    samples = np.random.default_rng(3).normal(1, 2, (1, 7))
    assert crossed_interval(samples) == mean_interval(samples[0])
    assert crossed_interval(np.array([[1.0], [3.0]]))[:1] == (2.0,)  # one environment: a mean and no more
    assert np.isnan(crossed_interval(np.array([[1.0], [3.0]])).low) and np.isnan(crossed_interval([[np.nan]]).mean)


def test_interval_of_policies_and_environments_by_hand():
    """Mean 3; of policies 1.5 and 4.5, of environments 2 and 4: mean squares 9 and 4, of the rest 4 x 0.5^2 = 1."""
    got = crossed_interval(np.array([[1.0, 2.0], [3.0, 6.0]]))
    # variances (9 - 1) / 4 and 4 / 4, each with one degree of freedom
    half = np.sqrt(2 + 1) * stats.t.ppf(0.975, 1)
    np.testing.assert_allclose(got, (3, 3 - half, 3 + half, 2))
    # policies that differ by less than the rest does add nothing to the interval over environments
    samples = np.array([[1.0, 5.0], [2.0, 4.0]])
    np.testing.assert_allclose(crossed_interval(samples), mean_interval(samples.mean(0)))
    # an environment that one policy was not measured in is left out
    gap = crossed_interval(np.array([[1.0, 2.0, 50.0], [3.0, 6.0, np.nan]]))
    np.testing.assert_allclose(gap, crossed_interval(np.array([[1.0, 2.0], [3.0, 6.0]])))
    flat = crossed_interval(np.zeros((3, 4)))
    assert flat == (0, 0, 0, 4) and not flat.excludes_zero


@pytest.mark.parametrize(
    ("policies", "deviations", "most"),
    [(3, (1.0, 1.0, 1.0), 0.98), (4, (0.5, 2.0, 1.0), 0.98), (3, (0.0, 1.0, 1.0), 1.0)],
)
def test_interval_covers_other_policies_and_environments(policies, deviations, most):
    """Effects of policy, of environment and of both; without one of the policy it may cover more often."""
    rng, envs, repetitions = np.random.default_rng(4), 32, 2000
    shapes = ((policies, 1), (1, envs), (policies, envs))
    effects = [rng.normal(0, d, (repetitions, *shape)) for d, shape in zip(deviations, shapes, strict=True)]
    intervals = [crossed_interval(samples) for samples in sum(effects)]
    assert 0.93 < np.mean([low < 0 < high for _, low, high, _ in intervals]) < most


def test_verdict_claims_what_the_intervals_show():
    arrays = run_arrays()
    claim = tables.sentence(arrays, "cifar10")
    assert len(re.findall(r"\.(?!\d)", claim)) == 1 and claim.endswith(".")  # one sentence
    assert re.search(r"better than never: eager \(\+3\.\d\d \[.*\]\), policy \(\+1\.", claim)
    assert "nothing may be claimed about random against never" in claim
    assert re.search(r"; policy is better than random", claim) and re.search(r"; policy is worse than eager", claim)
    assert "by report-test accuracy of what was kept of 6 environments per arm" in claim and "CIFAR-10" not in claim
    assert "nothing may be claimed about CIFAR-10" in tables.sentence(arrays, "shapes", meant="CIFAR-10")


def test_verdict_of_a_metric_of_which_less_is_better():
    """3 points are 0.06 nats here, and 0.087 bits a character."""
    arrays = run_arrays(metric=bits_per_character(64))
    claim = tables.sentence(arrays, "topics")
    assert re.search(r"better than never: eager \(-0\.08\d \[-0\.0.*\]\), policy \(-0\.0", claim)
    assert re.search(r"; policy is better than random", claim) and re.search(r"; policy is worse than eager", claim)
    assert "by report-test bits per character of what was kept" in claim
    columns, (never, _, eager, _) = tables.columns(arrays), tables.table(arrays)
    assert columns[1:4] == ("test bits", "minus never", "final bits")
    bits = arrays["arms/test_committed_loss"][0].mean() / np.log(2)
    assert never[1] == f"{bits:.3f}" and re.fullmatch(r"-0\.08\d ± 0\.0\d\d\*", eager[2])
    assert any("bits per character, lower is better" in note for note in tables.notes(arrays))


def test_verdict_on_training_needs_several_policies():
    alone, two = (tables.sentence(run_arrays(policies=n), "cifar10") for n in (1, 2))
    said = "one policy was trained, so nothing may be claimed about how training varies"
    assert said in alone and "trained from" not in alone
    assert "and 2 policies trained from different seeds" in two and "one policy" not in two


def verdict_of(gain, sizes, noise=0.1):
    """Of two policies that gain so much over `eager`; parameters are those of the two."""
    rng = np.random.default_rng(5)
    never, sample = rng.normal(30, 2, (1, 8)), lambda policies: rng.normal(0, noise, (policies, 8))
    accuracy = {"never": never, "eager": never + 5 + sample(1), "policy": never + 5 + gain + sample(2)}
    size = dict(zip(("never", "eager", "policy"), ([[1.0]], *([[n]] for n in sizes)), strict=True))
    options = {"learned": ("policy", "policy_greedy"), "baseline": "never", "data": "cifar10", "metric": ACCURACY}
    return verdict(accuracy, {arm: np.array(n) for arm, n in size.items()}, **options)


@pytest.mark.parametrize(
    ("gain", "sizes", "noise", "said"),
    [
        (1, (3.0, 1.5), 0.1, r"; policy is better than eager \(\+[01]\.\d\d \[\+0\.\d\d, \+1\.\d\d\]\)\."),
        # adds 0.5 of the host, and eager 2
        (-1, (3.0, 1.5), 0.1, r"; policy is not worse by more than 2 points than eager \(-[01]\.\d\d \[-1\.\d\d, "
         r"-0\.\d\d\]\) with 0\.25 times the parameters that it adds\."),
        (0, (3.0, 1.9), 0.1, r"; policy is not worse by more than 2 points than eager .* with 0\.45 times"),
        (-1, (3.0, 2.0), 0.1, r"; policy is worse than eager \("),
        (0, (3.0, 2.0), 0.1, r"; nothing may be claimed about policy against eager\."),
        (-3, (3.0, 1.5), 0.1, r"; policy is worse than eager \("),
        (0, (3.0, 1.5), 9.0, r"; nothing may be claimed about policy against eager\."),
        (0, (1.0, 1.0), 0.1, r"; nothing may be claimed about policy against eager\."),  # eager kept nothing
    ],
)  # fmt: skip
def test_verdict_on_a_policy_against_a_rule(gain, sizes, noise, said):
    assert re.search(said, verdict_of(gain, sizes, noise))


def test_verdict_without_enough_environments_claims_nothing():
    accuracy = {"never": np.array([[1.0]]), "eager": np.array([[5.0]]), "policy": np.array([[9.0]])}
    size = dict.fromkeys(accuracy, np.array([[1.0]])) | {"eager": np.array([[9.0]])}
    claim = verdict(accuracy, size, learned=("policy",), baseline="never", data="cifar10", metric=ACCURACY)
    assert not re.search("better|worse", claim) and "nothing may be claimed about eager, policy against never" in claim
    assert "nothing may be claimed about policy against eager" in claim


def test_table():
    columns = tables.columns(run_arrays())
    rows = {row[0]: dict(zip(columns, row, strict=True)) for row in tables.table(run_arrays())}
    assert list(rows) == list(ARMS)
    assert rows["never"]["minus never"] == "-" and rows["never"]["params"] == "x1.00"
    assert rows["eager"]["minus never"].endswith("*") and rows["eager"]["params"] == "x2.50"
    assert not rows["random"]["minus never"].endswith("*")
    # of the two policies one keeps a seed, at half the host's parameters
    assert rows["policy"]["kept"] == "0.5" and rows["policy"]["params"] == "x1.25"
    arrays = run_arrays()
    for arm, row in rows.items():
        here = arrays["arms/names"] == arm
        assert (
            row["test %"] == f"{arrays['arms/test_committed_accuracy'][here].mean():.2f}"
        )  # what was kept comes first
        assert row["final %"] == f"{arrays['arms/test_accuracy'][here].mean():.2f}"
    assert columns.index("test %") < columns.index("final %")
    # 3 points are 0.06 nats here
    assert rows["eager"]["minus never"].startswith("+3.") and rows["eager"]["loss - never"].startswith("-0.06 ±")
    text = text_table(columns, tables.table(run_arrays())).splitlines()
    assert max(map(len, text)) <= 79
    assert len(text) == 5 and text[0].startswith("arm") and len({line.rindex(" ") for line in text[1:]}) == 1


def test_samples_of_the_bare_and_the_learned_networks():
    arrays = run_arrays(metric=bits_per_character(64))
    arrays["arms/text"] = np.arange(5)[:, None, None] + np.zeros((5, 6, 2), int)  # arm a writes "aa"
    arrays["arms/test_committed_loss"][:, 0] = np.log(2)  # a bit
    never, first, second = tables.samples(arrays, "Once", lambda tokens: "".join(map(str, tokens))).split("--- ")[1:]
    assert never == "never: 1.000 bits, 0 seeds kept\n\n00\n\n"
    assert first == "policy 0: 1.000 bits, 1 seed kept\n\n33\n\n" and second.startswith("policy 1: 1.000 bits, 0 seeds")


def test_notes_of_a_language_model_tell_its_other_numbers():
    arrays = run_arrays(metric=bits_per_character(64))
    arrays["arms/test_committed_loss"][0] = np.log(8)
    arrays["arms/test_committed_accuracy"][0] = 40
    # ln 8 = 2.08 nats, the perplexity of a choice among eight
    assert "never: 2.08 nats, perplexity 8.0, 40.0 % of the tokens right." in tables.notes(arrays)[-1]
    assert not any("perplexity" in note for note in tables.notes(run_arrays()))


def test_table_of_one_environment_has_no_intervals():
    for row in tables.table(run_arrays(envs=1)):
        assert not re.search(r"±|\*|nan", " ".join(row))


@pytest.mark.parametrize("draw", [figures.grown, figures.curves, figures.seeds, figures.learning])
@pytest.mark.parametrize(("envs", "policies"), [(1, 2), (6, 1), (6, 3)])
def test_pictures(tmp_path, draw, envs, policies):
    caption = draw(tmp_path / "x.png", run_arrays(envs=envs, policies=policies), "shapes")
    assert (tmp_path / "x.png").read_bytes().startswith(PNG) and len(caption) > 20


def test_pictures_are_the_same_whatever_the_users_settings(tmp_path):
    draw = lambda name: figures.learning(tmp_path / name, run_arrays(), "shapes") and (tmp_path / name).read_bytes()
    first = draw("a.png")
    mine = {"figure.facecolor": "red", "font.size": 30, "savefig.format": "svg", "savefig.bbox": "tight"}
    with matplotlib.rc_context(mine):
        assert draw("b.png") == first
        assert matplotlib.rcParams["font.size"] == 30


def test_a_picture_that_fails_leaves_no_file(tmp_path):
    with pytest.raises(KeyError):
        figures.curves(tmp_path / "x.png", {}, "shapes")
    (tmp_path / "y.png").mkdir()  # what it is written to cannot get its name
    with pytest.raises(OSError):
        figures.curves(tmp_path / "y.png", run_arrays(), "shapes")
    assert [path.name for path in tmp_path.iterdir()] == ["y.png"]


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "nonsense"])
def test_an_unknown_backend_in_the_environment_does_not_matter(tmp_path, backend):
    code = "import os; from esper_jax.evidence import figures; print(os.environ['MPLBACKEND'])"
    env = os.environ | {"MPLBACKEND": backend, "MPLCONFIGDIR": str(tmp_path)}
    root = Path(__file__).parent.parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=env, text=True, capture_output=True)
    assert (done.returncode, done.stdout) == (0, f"{backend}\n"), done.stderr


def test_a_run_that_kept_nothing_can_be_drawn(tmp_path):
    arrays = run_arrays()
    arrays["arms/stage"][:] = Stage.DORMANT
    figures.grown(tmp_path / "x.png", arrays, "shapes")
    assert (tmp_path / "x.png").read_bytes().startswith(PNG)


def test_pictures_of_a_real_run(tmp_path):
    for draw in (figures.grown, figures.curves, figures.seeds):
        draw(tmp_path / "x.png", tiny_run.result().metrics, "tiny")


def test_page_is_self_contained_and_escaped(tmp_path):
    (tmp_path / "a.png").write_bytes(PNG + b"picture")
    card = {"data": {"name": "shapes"}, "command": "--out '<b>&'"}
    arrays = run_arrays()
    columns, rows, notes = tables.columns(arrays), tables.table(arrays), tables.notes(arrays)
    pictures = {tmp_path / "a.png": "a & b"}
    page = report.page("a <title>", columns, rows, notes, "x < y.", pictures, card, "CIFAR-10")
    assert base64.b64encode(PNG + b"picture").decode() in page
    assert not re.search(r"(src|href)=\"(?!data:)", page) and "http" not in page and "<script" not in page
    for text in ("a &lt;title&gt;", "x &lt; y.", "a &amp; b", "&lt;b&gt;&amp;", "shapes, not CIFAR-10", *rows[2][:2]):
        assert text in page
    assert "not CIFAR-10" not in report.page("t", columns, rows, notes, "c", {}, card)


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
    number = r"-?\d+\.\d\d"  # a return for each of the two policies
    said = rf"acc=\d+\.\d  return={number} {number}  kept=\d\.\d  kl=-?\d\.\d+  entropy=\d\.\d\d( .*)?"
    assert re.fullmatch(said, note)


def test_every_stage_can_be_drawn():
    assert set(figures.STAGE_COLOURS) == set(Stage) - {Stage.UNKNOWN, Stage.DORMANT}
