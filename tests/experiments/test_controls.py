"""Controls of the tiny run, and schedules that are searched for."""

import io
import json

import finished_run
import numpy as np
import pytest
import tiny_run

from esper_jax.enums import BLUEPRINTS, HEADS, PLANNED, Op, Stage
from esper_jax.run import publish, records
from esper_jax.run.console import Console
from esper_jax.train import episodes, round_key
from experiments import controls, finished, schedules

CFG = tiny_run.CONFIG
P, R, T = CFG.policy_seeds, CFG.report_envs, CFG.training.epochs
SLOTS = len(CFG.host.slot_names)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return finished_run.write(tmp_path_factory.mktemp("run"))


@pytest.fixture(autouse=True)
def ready(monkeypatch):
    finished_run.ready(monkeypatch, controls)


def opened(folder):
    return finished.open_run(folder, Console(file=io.StringIO()))


def test_what_a_plan_is_worth(folder):
    """The return of its episodes in environments of the round after the last; an empty plan is its twin's, 0."""
    of = opened(folder)
    plans = np.array([schedules.everywhere(CFG, BLUEPRINTS.index("norm")), np.zeros((SLOTS, 3), int)])
    found = schedules.worth(of, plans, range(1, 4))
    assert found.shape == (2, 3) and not found[1].any()
    who = episodes(CFG, of.train.controllers, [(PLANNED, 0, 2)])
    who.orders.plan[0] = plans[0]
    rows = of.train.play(round_key(of.key, CFG.rounds), of.run, who, False)[1].rollout
    np.testing.assert_allclose(found[0, 1], rows.reward[0].sum(), rtol=1e-6)
    assert (rows.info.stage[0, -1] == Stage.FOSSILIZED).all()


def test_a_search_finds_what_is_best(folder, monkeypatch):
    """Where worth is how near a plan is to a known one, and noise that more environments average out."""
    best = np.array([[BLUEPRINTS.index("norm"), 3, 1], [BLUEPRINTS.index("conv_light"), 2, 2]])
    asked = []

    def near(of, plans, envs):
        asked.append((len(plans), len(envs)))
        kind = (plans[..., 0] == best[:, 0]) * 1.0 - (plans[..., 0] == 0) * 1.0
        away = np.abs(plans[..., 1:] - best[:, 1:]).sum(-1) * (plans[..., 0] > 0)
        noise = np.random.default_rng(envs.start).normal(0, 0.1, (len(plans), len(envs)))
        return (kind - 0.1 * away).sum(-1)[:, None] + noise

    monkeypatch.setattr(schedules, "worth", near)
    found = schedules.oracle(opened(folder))
    assert found.plan.tolist() == best.tolist()
    kinds, starts = len(schedules.kinds(CFG)), T - schedules.AFTER - 1
    singles, pairs = SLOTS * kinds * starts * 3, 17**2
    # all alone in 8 environments, all pairs in 8, a third in 16 more, a ninth in the 40 up to 64
    assert asked == [(singles, 8), (pairs, 8), (pairs // 3, 16), (pairs // 9, 40)]
    assert found.plans == singles + pairs and found.episodes == sum(n * envs for n, envs in asked)
    tuned = schedules.tuned_periodic(opened(folder))
    assert (tuned.plan[:, 0] == tuned.plan[0, 0]).all() and tuned.plan[0, 1] == 1


def test_the_most_frequent_schedule():
    """Three of five are alike; of four that all differ, the one that shares most epochs with the others."""
    a, b, c = np.zeros((3, 4, len(HEADS)), int)
    b, c = b + [[1], [0], [0], [0]], c + [[1], [1], [0], [0]]
    assert np.array_equal(schedules.most_frequent(np.stack([b, a, c, a, a])), a)
    # b agrees with a in 3 epochs and with c in 3, a with c in 2
    assert np.array_equal(schedules.most_frequent(np.stack([a, b, c])), b)


def test_what_was_refused():
    """Of three requests in two episodes one failed; births and waiting are not requests."""
    ops, grow = np.zeros((2, 1, 4), int), int(Op.GERMINATE)
    ops[0, 0, 1:], ops[1, 0, 3] = [grow, 0, grow], grow
    success = np.ones((2, 1, 4), bool)
    success[0, 0, 3] = success[0, 0, 0] = False
    arrays = {"arms/names": np.array(["fixed", "fixed"]), "arms/requested_op": ops, "arms/success": success}
    assert controls.refused(arrays, "fixed") == "33 %"


def test_plans_in_words():
    plan = np.array([[0, 5, 0], [BLUEPRINTS.index("norm"), 4, 2]])
    assert schedules.in_words(plan, CFG) == "slot 1: norm after 4 epochs, blended in over 8"
    assert schedules.in_words(0 * plan, CFG) == "nothing is grown"


def test_a_host_as_wide_as_what_was_kept():
    """Sizes 30, 60, 100 at widths 2, 3, 4: one step at least; 2.6 times 30 (78) is nearer to 60, 2.7 times to 100."""
    at = {1: 10, 2: 30, 3: 60, 4: 100, 5: 200}
    cfg = CFG.replace(**{"host.base_channels": 2})
    params = lambda cfg: at[cfg.host.base_channels]
    width = lambda size: controls.widened(cfg, size, params).host.base_channels
    assert [width(size) for size in (1.0, 1.4, 2.0, 2.6, 2.7)] == [3, 3, 3, 3, 4]


def test_controls_of_a_run(folder, monkeypatch, capsys):
    monkeypatch.setattr(schedules, "MOST_CANDIDATES", 9)
    monkeypatch.setattr(schedules, "SINGLE_ENVS", 1)
    monkeypatch.setattr(schedules, "LAST_ENVS", 3)
    then = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert controls.main([str(folder)]) == 0
    arrays = records.read_arrays(folder / "controls.npz")
    names = [str(name) for name in arrays["arms/names"]]
    rows = {name: np.flatnonzero(arrays["arms/names"] == name) for name in names}
    several = {"policy", "policy_greedy", "random_matched", "static_final", "fixed", "blind"}
    assert {name for name in rows if len(rows[name]) == P} == several
    eager = [name for name in rows if name.startswith("eager_")]  # the rule `eager` of this run grows norms everywhere
    assert sorted(eager) == sorted(f"eager_{name}" for name in CFG.lifecycle.offered if name != "norm")
    assert set(rows) == {"never", "random", "eager", "periodic_tuned", "oracle", "static_wide", *eager} | several

    get = lambda field, name: arrays[f"arms/{field}"][rows[name]]
    for name in ("never", "random", "eager", "policy", "policy_greedy"):  # as the run itself has them, but not compared
        mine = tiny_run.result().metrics["arms/names"] == name
        assert np.array_equal(get("test_loss", name), tiny_run.result().metrics["arms/test_loss"][mine])
    assert np.array_equal(get("committed_size", "static_final")[..., 0], get("committed_size", "policy")[..., -1])
    assert not get("op", "static_final").any() and not get("op", "static_wide").any()
    counts = lambda name: np.stack([(get("requested_op", name)[..., 1:] == op).sum(-1) for op in Op], -1)
    theirs, mine = counts("policy"), counts("random_matched")
    assert (mine[..., 1:] <= theirs[..., 1:]).all()  # waiting apart, which is all that is legal at times
    assert mine[..., 1:].sum() > 0.7 * theirs[..., 1:].sum()  # what is left was not legal any more
    assert (mine[..., Op.GERMINATE] == np.minimum(theirs[..., Op.GERMINATE], mine[..., Op.GERMINATE])).all()
    usual = get("requested_op", "fixed")
    assert (usual == usual[:, :1]).all(), "each policy's schedule is one"
    # one channel wider at least
    size = get("committed_size", "static_wide")
    assert (size == size[0, 0, 0]).all() and size[0, 0, 0] > 1
    assert (get("train_flops", "static_wide") > get("train_flops", "never")).all()

    said = (folder / "controls.txt").read_text()
    assert "what time it is? policy minus blind" in said and said.strip() in capsys.readouterr().out
    page = (folder / "report.html").read_text()
    assert "Does it need to look" in page and "static_final" in page
    facts = json.loads((folder / "controls.json").read_text())
    assert facts["oracle"]["episodes"] > 0 and facts["as_recorded"] is True
    np.testing.assert_allclose(facts["static_wide"]["size"], size[0, 0, 0], rtol=1e-6)
    assert {name: (folder / name).read_bytes() for name in then} == then, "the run's own files stay as they are"


def test_the_blind_learn_beside_nobody(folder):
    """As the run's policies did, but for what they see: other values from the first decision on."""
    of = opened(folder)
    found = controls.blind(of, Console(file=io.StringIO()))
    seeing = of.train.compare(of.key, of.run, ["policy"])["policy"]
    assert found.germinated.shape == seeing.germinated.shape
    assert np.array_equal(found.rollout.features[:, :, 1], seeing.rollout.features[:, :, 1])
    assert not np.isclose(found.rollout.value[:, :, 1], seeing.rollout.value[:, :, 1]).any()


def test_a_report_that_is_made_again_keeps_the_controls_of_the_same_run(folder, tmp_path):
    """And drops those of other policies."""
    metrics, console = records.read_arrays(folder / "metrics.npz"), Console(file=io.StringIO())
    assert publish.controls_of(tmp_path, metrics) is None
    for name in ("controls.npz", "controls.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    card = json.loads((folder / "run.json").read_text())
    publish.write_report(tmp_path, console, card, metrics)
    assert "static_final" in (tmp_path / "report.html").read_text() and (tmp_path / "grown.png").exists()
    assert publish.controls_of(tmp_path, metrics | {"arms/test_loss": metrics["arms/test_loss"] + 1}) is None


def test_a_folder_in_the_place_of_a_file_is_found_before_anything_is_played(folder, monkeypatch, capsys):
    def fail(*_):
        raise AssertionError("played")

    monkeypatch.setattr(controls, "controls", fail)
    blocked = finished_run.write(folder.parent / "blocked")
    (blocked / "controls.txt").mkdir()
    assert controls.main([str(blocked)]) == 2
    assert "controls.txt: is a folder, and must be a file or free" in capsys.readouterr().err


@pytest.mark.parametrize("argv, problem", [([], "run"), (["/nowhere"], "must be the folder of a run")])
def test_bad_input(argv, problem, capsys):
    assert controls.main(argv) == 2
    assert problem in capsys.readouterr().err
