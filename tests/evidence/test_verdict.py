"""Tables and sentences: what the intervals allow one to claim."""

import re
import time

import numpy as np
import pytest
from made_run import ARMS, run_arrays

from esper_jax.evidence import tables, verdict
from esper_jax.evidence.controls import CONTROLS, is_rule, same_policies
from esper_jax.evidence.tables import text_table
from esper_jax.metric import ACCURACY, bits_per_character


def test_verdict_claims_what_the_intervals_show():
    arrays = run_arrays()
    claim = tables.sentence(arrays, "cifar10")
    told = tables.headline(arrays, "cifar10")
    assert claim.startswith(f"{told} On cifar10, by ") and claim.endswith(".")
    sentences = lambda text: len(re.findall(r"\.(?!\d)", text))
    assert (sentences(told), sentences(claim)) == (2, 3)
    assert re.search(r"better than never: eager \(\+3\.\d\d \[.*\]\), policy \(\+1\.", claim)
    assert "nothing may be claimed about random against never" in claim
    assert re.search(r"; policy is better than random", claim) and re.search(r"; policy is worse than eager", claim)
    assert "by report-test accuracy of what was kept of 6 environments per arm" in claim and "CIFAR-10" not in claim
    assert "Nothing may be claimed about CIFAR-10" in tables.sentence(arrays, "shapes", meant="CIFAR-10")


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
    said = "One policy was trained, so nothing may be claimed about how training varies"
    assert said in alone and "trained from" not in alone
    assert "and 2 policies trained from different seeds" in two and "One policy" not in two


def verdict_of(gain, sizes, noise=0.1):
    """Of two policies that gain so much over `eager`; parameters are those of the two."""
    rng = np.random.default_rng(5)
    never, sample = rng.normal(30, 2, (1, 8)), lambda policies: rng.normal(0, noise, (policies, 8))
    accuracy = {"never": never, "eager": never + 5 + sample(1), "policy": never + 5 + gain + sample(2)}
    size = dict(zip(("never", "eager", "policy"), ([[1.0]], *([[n]] for n in sizes)), strict=True))
    return verdict.details(accuracy, {arm: np.array(n) for arm, n in size.items()}, data="cifar10", metric=ACCURACY)


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
    claim = verdict.details(accuracy, size, data="cifar10", metric=ACCURACY)
    assert not re.search("better|worse", claim) and "nothing may be claimed about eager, policy against never" in claim
    assert "nothing may be claimed about policy against eager" in claim
    assert verdict.headline(accuracy, size, data="cifar10", metric=ACCURACY) == (
        "On cifar10, no gain of learned growth may be claimed: +8.0 points of accuracy at 1.00x the parameters; "
        "the best rule (eager) gained 4.0 at 9.00x. The difference to the rule, +4.0, may be chance. One policy was "
        "trained, so nothing may be claimed about how training varies."
    )


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


def arms_of(metric=ACCURACY, envs=8, noise=0.1, policies=2, **gains):
    """Values and sizes of arms that gain so much over `never`, on average exactly; every arm that grows doubles the
    host. Learned arms and those of their episodes have a row per policy."""
    rng = np.random.default_rng(17)
    never = rng.normal(30, 2, (1, envs)) if metric.higher_is_better else rng.normal(3, 0.2, (1, envs))
    values = {"never": never}
    for arm, gain in gains.items():
        many = arm in ("policy", "policy_greedy", "blind") or arm in CONTROLS and CONTROLS[arm].replayed
        sample = rng.normal(0, noise, (policies if many else 1, envs))
        values[arm] = never + gain + sample - sample.mean()
    return values, {arm: np.full((1, 1), 2.0 - (arm == "never")) for arm in values}


def headline_of(metric=ACCURACY, **options):
    return verdict.headline(*arms_of(metric, **options), data="digits", metric=metric)


@pytest.mark.parametrize(
    ("gains", "said"),
    [
        ({"policy": 5, "random": 0, "eager": 2},
         r"On digits, learned growth gained 5\.0 ± 0\.\d points of accuracy at 2\.00x the parameters; the best rule "
         r"\(eager\) gained 2\.0 ± 0\.\d at 2\.00x\. The difference to the rule, \+3\.0 \[2\.\d, 3\.\d\], is beyond "
         r"chance\."),
        ({"policy": 5, "eager": 7},
         r".* \(eager\) gained 7\.0 .*\. The difference to the rule, -2\.0 \[-2\.\d, -1\.\d\], is beyond chance, "
         r"in favour of the rule\."),
        ({"policy": 5, "eager": 5}, r".* The difference to the rule, -?\+?0\.0 \[-0\.\d, 0\.\d\], may be chance\."),
        ({"policy": 0, "eager": -1},
         r"On digits, no gain of learned growth may be claimed: [+-]0\.0 ± 0\.\d points of accuracy at 2\.00x the "
         r"parameters; the best rule \(eager\) lost 1\.0 ± 0\.\d at 2\.00x\. The difference to the rule, \+1\.0 .*, is "
         r"beyond chance\."),
        ({"policy": -3, "eager": 2}, r"On digits, learned growth lost 3\.0 ± .*, in favour of the rule\."),
        # neither the yardstick nor what is made of the policies is a rule
        ({"policy": 5, "eager": 2, "oracle": 9, "fixed": 8, "blind": 8, "static_wide": 8, "periodic_tuned": 3},
         r".* the best rule \(periodic_tuned\) gained 3\.0 .*"),
        ({"policy": 5}, r"On digits, learned growth gained 5\.0 ± 0\.\d points of accuracy at 2\.00x the parameters\."),
    ],
)  # fmt: skip
def test_headline(gains, said):
    assert re.fullmatch(said, headline_of(**gains)), headline_of(**gains)


def test_headline_of_a_metric_of_which_less_is_better():
    bits = bits_per_character(64)
    said = headline_of(bits, noise=0.01, policy=-0.054, eager=-0.03, heuristic=0.02)
    assert re.fullmatch(
        r"On digits, learned growth lowered bits per character by 0\.054 ± 0\.0\d\d at 2\.00x the parameters; "
        r"the best rule \(eager\) lowered it by 0\.030 ± 0\.0\d\d at 2\.00x\. "
        r"The difference to the rule, \+0\.024 \[0\.0\d\d, 0\.0\d\d\], is beyond chance\.",
        said,
    )
    said = headline_of(bits, noise=0.01, policy=0.0, heuristic=0.02)
    assert re.match(
        r".*claimed: [+-]0\.000 ± 0\.0\d\d bits per character \(lower is better\) at .* raised it by 0\.020", said
    )


def crowd(rules=8):
    """One arm that is ahead so little that it may well be one of many: of an interval that just excludes 0."""
    values, size = arms_of(policies=1, envs=16, noise=1.0, policy=0, **{f"rule_{k}": 0 for k in range(rules)})
    sample = values["policy"] - values["never"]
    half = verdict.gains(values)["policy"].interval.half
    return {**values, "policy": values["never"] + sample + 1.1 * half}, size


def test_what_is_claimed_is_corrected_for_the_number_of_comparisons():
    values, size = crowd()
    found = verdict.gains(values)
    claim = found["policy"]
    # eight other arms that show nothing: the smallest of nine p-values is multiplied by nine
    assert claim.interval.excludes_zero and not claim.certain and claim.family == 9
    np.testing.assert_allclose(claim.p, 9 * claim.interval.p)
    alone = verdict.gains({arm: values[arm] for arm in ("never", "policy")})["policy"]
    assert alone.certain and alone.interval == claim.interval
    assert "nothing may be claimed about policy" in verdict.details(values, size, data="x", metric=ACCURACY)
    assert "better than never: policy (" in verdict.details(
        {arm: values[arm] for arm in ("never", "policy")}, size, data="x", metric=ACCURACY
    )
    told = verdict.headline(values, size, data="x", metric=ACCURACY)
    assert re.match(
        r"On x, no gain of learned growth may be claimed: .* the parameters, as one of 9 comparisons; ", told
    )
    # an arm that was not measured is no comparison
    values["rule_0"] = np.full((1, 16), np.nan)
    assert verdict.gains(values)["policy"].family == 8 and not verdict.gains(values)["rule_0"].certain


def test_star_is_corrected():
    """The same nine arms as a run."""
    values, _ = crowd()
    names = list(values)
    accuracy = np.concatenate([values[name] for name in names])
    arrays = {
        "arms/names": np.array(names), "arms/committed_size": np.ones((*accuracy.shape, 1)),
        "arms/fossilised": np.zeros(accuracy.shape, int), **tables.metric_arrays(ACCURACY),
        **{f"arms/{of}_accuracy": accuracy for of in ("test", "test_committed")},
        **{f"arms/{of}_loss": accuracy for of in ("test", "test_committed")},
    }  # fmt: skip
    assert not any("*" in cell for row in tables.table(arrays) for cell in row)
    two = {name: array[[names.index("never"), names.index("policy")]] if name.startswith("arms/") else array
           for name, array in arrays.items()}  # fmt: skip
    assert tables.table(two)[1][2].endswith("*")
    note = " ".join(tables.notes(arrays))
    assert "corrected for the number of arms (Holm; controls by themselves); intervals are not" in note


def test_policies_of_the_same_run_are_compared_row_by_row():
    """Two policies that differ by 20 points, and what is made of each, a point lower."""
    values, _ = arms_of(policy=5, fixed=4, blind=4)
    for arm in ("policy", "fixed", "blind"):
        values[arm] = values[arm] + np.array([[-10.0], [10.0]])
    found = verdict.against_all(values, "policy")
    assert found["fixed"].better(ACCURACY) and not found["blind"].certain
    assert same_policies("policy", "policy_greedy") and not same_policies("policy", "blind")
    assert [arm for arm in ("never", "eager", "eager_norm", "policy", *CONTROLS) if is_rule(arm)] == [
        "eager", "eager_norm", "periodic_tuned",
    ]  # fmt: skip


def test_answers_of_the_controls():
    gains = {
        "policy": 5, "policy_greedy": 6, "random": 1, "eager": 2, "eager_norm": 3, "static_final": 3, "static_wide": 5,
        "blind": 6, "fixed": 2, "random_matched": 1, "periodic_tuned": 4, "oracle": 9,
    }  # fmt: skip
    values, size = arms_of(**gains)
    said = dict(verdict.answers(values, size, ACCURACY))
    number = r"\[[+-]\d\.\d\d, [+-]\d\.\d\d\] points: "
    for question, answer in (
        (
            "Does growing matter, or only the final shape?",
            rf"policy minus static_final \+2\.00 {number}growing matters",
        ),
        (
            "Is it only the number of parameters?",
            rf"policy minus static_wide .* {number}cannot be told apart \(it has x2\.00 the parameters, and policy "
            r"x2\.00\)",
        ),
        (
            "Does it need to look, beyond what is legal and what time it is?",
            rf"policy minus blind -1\.00 {number}it is better without looking",
        ),
        ("Does it adapt?", rf"policy_greedy minus fixed \+4\.00 {number}it adapts, and that pays"),
        ("Is it more than doing as much at random?", rf"policy minus random_matched \+4\.00 {number}it is"),
        ("Does it beat a tuned rule?", rf"policy minus periodic_tuned \+1\.00 {number}it does"),
        ("Does it beat growing the best module at once?", rf"policy minus eager_norm \+2\.00 {number}it does"),
        # (5 - 1) / (9 - 1)
        (
            "How much is left to gain?",
            r"policy closed 50 % \[\d\d, \d\d\] of the gap between random and the best schedule .* lower bound .*",
        ),
    ):
        assert re.fullmatch(answer, said.pop(question)), question
    assert not said
    values["oracle"] = values["random"]
    assert "not known: oracle is not better than random" in verdict.answers(values, size, ACCURACY)[-1][1]
    values["blind"] = np.full((2, 8), np.nan)
    assert (
        "Does it need to look, beyond what is legal and what time it is?",
        "policy minus blind -: not measured",
    ) in verdict.answers(values, size, ACCURACY)


def test_answers_only_to_what_was_asked():
    assert tables.answers(run_arrays()) == []
    values, size = arms_of(bits_per_character(64), noise=0.001, policy=-0.05, static_final=-0.02)
    ((question, answer),) = verdict.answers(values, size, bits_per_character(64))
    assert re.fullmatch(r"policy minus static_final -0\.030 \[-0\.03\d, -0\.02\d\] bits: growing matters", answer)
    # eight rules and eight controls that show nothing: a question is one of those about controls alone
    crowded, size = crowd()
    crowded |= {f"eager_{k}": crowded[f"rule_{k}"] for k in range(7)} | {"static_final": crowded["never"]}
    size |= dict.fromkeys(crowded, size["never"])
    answer = dict(verdict.answers(crowded, size, ACCURACY))["Does growing matter, or only the final shape?"]
    assert answer.endswith("cannot be told apart, as one of 8 comparisons")
    alone = {arm: crowded[arm] for arm in ("never", "policy", "static_final")}
    ((_, answer),) = verdict.answers(alone, size, ACCURACY)
    assert answer.endswith("growing matters")


def test_controls_change_nothing_of_what_a_run_claims():
    values, size = arms_of(policy=2, random=0, eager=1.9, periodic=0.1, noise=0.5)
    more = values | {f"eager_{k}": values["random"] for k in range(20)} | {"blind": values["policy"]}
    for of in (verdict.gains, lambda arms: verdict.against_all(arms, "policy")):
        before, after = of(values), of(more)
        assert {arm: after[arm] for arm in before} == before


def test_frontier():
    arrays = run_arrays()
    points = tables.frontier(arrays)
    assert list(points) == list(ARMS) and np.isnan(points["eager"].flops)
    assert points["never"][:2] == (1, pytest.approx(np.nan, nan_ok=True)) and points["never"].gain.mean == 0
    assert points["eager"].size == 2.5 and points["policy"].size == 1.25 and points["eager"].gain.low > 2
    arrays["arms/train_flops"] = np.full((5, 6), 100.0) * np.array([1, 1, 3, 2, 4])[:, None]
    assert [point.flops for point in tables.frontier(arrays).values()] == [1, 1, 3, 3]  # of the policies (2 + 4) / 2
    bits = tables.frontier(run_arrays(metric=bits_per_character(64)))
    assert 0.05 < bits["eager"].gain.low < bits["eager"].gain.mean  # more is better


def test_robust_numbers():
    columns, rows = tables.robust(run_arrays())
    assert columns == ("arm", "interquartile mean - never", "better than never")
    said = {row[0]: row[1:] for row in rows}
    assert list(said) == ["random", "eager", "policy"]
    assert re.fullmatch(r"\+[23]\.\d\d ± 0\.\d\d", said["eager"][0]) and said["eager"][1] == "100 %"
    assert re.fullmatch(r"\d\d %( \[\d+, \d+\])?", said["random"][1])
    bits = dict(zip(ARMS[1:], tables.robust(run_arrays(metric=bits_per_character(64)))[1], strict=True))
    assert bits["eager"][1].startswith("-0.08") and bits["eager"][2] == "100 %"


def test_many_arms_take_no_time():
    arms = {f"rule_{k}": k for k in range(4)} | dict.fromkeys(CONTROLS, 4)
    values, size = arms_of(envs=64, policies=4, random=0, policy=5, policy_greedy=5, **arms)
    start = time.perf_counter()
    verdict.headline(values, size, data="x", metric=ACCURACY)
    verdict.details(values, size, data="x", metric=ACCURACY)
    verdict.answers(values, size, ACCURACY)
    assert len(values) == 15 and time.perf_counter() - start < 2  # a thirtieth of it on one core


def test_headline_names_a_control_that_is_better():
    values, size = arms_of(policy=5, eager=2, static_wide=9, static_final=5)
    said = verdict.headline(values, size, data="digits", metric=ACCURACY)
    assert re.search(
        r"is beyond chance\. A wider host is better: static_wide gained 9\.\d ± \d\.\d at \d\.\d\dx\.$", said
    )
    values["static_wide"] = values["eager"]
    assert "static" not in verdict.headline(values, size, data="digits", metric=ACCURACY)
