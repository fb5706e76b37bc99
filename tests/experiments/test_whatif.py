"""What the policy might have done instead, on the tiny run."""

import csv
import doctest
import io
import json
import shutil
from types import SimpleNamespace

import finished_run
import jax
import numpy as np
import pytest
import tiny
import tiny_run

from esper_jax.control import normalizers
from esper_jax.control.baselines import parse_script
from esper_jax.enums import HEADS, Op
from esper_jax.run import files, records
from esper_jax.run.console import Console
from esper_jax.run.folder import LOCK, locked
from esper_jax.train import episodes, round_key
from esper_jax.types import Masks
from experiments import finished, whatif
from experiments.whatif import NO_ORDER, Judgement, Moment

CFG = tiny_run.CONFIG
E, P, T = CFG.n_envs, CFG.policy_seeds, CFG.training.epochs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return finished_run.write(tmp_path_factory.mktemp("run"))


@pytest.fixture(autouse=True)
def ready(monkeypatch):
    finished_run.ready(monkeypatch, whatif)


def opened(folder, number):
    console = Console(file=io.StringIO())
    return finished.state_at(finished.open_run(folder, console), number, console)


def test_a_run_as_it_was_before_any_round(folder):
    """The last state is restored, an earlier one learned again from the start, since no checkpoint holds it."""
    for number, state in enumerate(tiny_run.result().states):
        assert tiny.equal(opened(folder, number).run, state)


def test_what_nobody_can_replay_is_refused(folder, tmp_path):
    """Policy 1 took no step in rounds 0 and 1, and so returned before round 2 to what no array says."""
    idle = np.array([[0, 1], [0, 1], [0, 0]])
    records.write_arrays(
        tmp_path / "metrics.npz", {"learner/updates_done": 1 - idle, "learner/nonfinite_updates": 2 * idle}
    )
    finished.check_no_return(tmp_path, 0, 2)
    with pytest.raises(ValueError, match="a policy returned to an earlier state of itself before round 2"):
        finished.check_no_return(tmp_path, 0, 3)


def test_what_was_done_done_again_is_what_was_recorded(folder):
    """Bitwise, in round 1: without orders, and with the action that was taken as an order at some moment."""
    run, moments = opened(folder, 1), [Moment(p, e, 1 + (p + e) % (T - 1)) for p in range(P) for e in range(E)]
    rows = whatif.play(run, 1, moments, np.repeat(NO_ORDER[None], P * E, 0), [0] * (P * E))
    assert whatif.as_recorded(run, 1, moments, rows) == "round 1: as recorded, bit by bit"
    epochs = [moment.epoch for moment in moments]
    taken = np.stack([np.asarray(getattr(rows.action, head))[range(P * E), epochs] for head in HEADS], axis=-1)
    assert tiny.equal(whatif.play(run, 1, moments, taken, [0] * (P * E)).info, rows.info)
    taken[:, HEADS.index("op")] = Op.FOSSILIZE
    other = whatif.play(run, 1, moments, taken, [0] * (P * E))
    assert "not the recorded bits: other decisions, rewards differ by at most" in whatif.as_recorded(
        run, 1, moments, other
    )


def test_true_advantages_are_differences_of_returns(folder):
    """From two calls of `play` by hand: an action at a moment, and the policy's own, both with luck 2."""
    run, number, moment, luck = opened(folder, 1), 1, Moment(1, 3, 4), 2
    action = np.zeros(len(HEADS), np.int32)  # prune or not, it is asked for
    action[HEADS.index("op")] = Op.PRUNE
    (found,) = whatif.judge(run, number, [moment], [np.stack([action, action])], [1, luck])

    def sums(order):
        who = episodes(CFG, run.train.controllers, [("policy", moment.policy, moment.env)])
        who.orders.luck[0, moment.epoch :] = luck
        if order is not None:
            who.orders.action[0, moment.epoch] = order
        rows = run.train.play(round_key(run.key, number), run.run, who, False)[1].rollout
        scale = float(np.sqrt(run.run.returns.var[moment.policy, 0] + normalizers.EPS))
        total, factor = 0.0, 1.0
        for t in range(moment.epoch, T):
            fine = float(rows.info.components.death_penalty[0, t])
            earned = (float(rows.reward[0, t]) - fine) / scale
            total += factor * scale * (fine + min(max(earned, -CFG.reward.clip), CFG.reward.clip))
            factor *= CFG.ppo.gamma * (not rows.terminal[0, t])
        t, value = moment.epoch, scale * rows.value[0]
        return total, scale * float(rows.reward[0, t]) / scale + CFG.ppo.gamma * value[t + 1] - value[t], value[t]

    (earned, expected, value), (own, *_) = sums(action), sums(None)
    assert found.advantages[0, 1] == pytest.approx(earned - own, abs=1e-5) and found.value == pytest.approx(value)
    assert np.array_equal(found.returns[0], found.returns[1]) and len(set(found.own)) == 2
    (alone,) = whatif.judge(run, number, [moment], [action[None]], [luck])
    assert alone.critic == pytest.approx([expected], abs=1e-5) and np.isnan(alone.agreement)


def judgement(expected, returns):
    actions = np.zeros((len(returns), len(HEADS)), np.int32)
    return Judgement(Moment(0, 0, 1), actions, np.array(returns), np.zeros(2), np.array(expected), 0.0)


def test_a_critic_is_not_praised_for_the_noise_that_it_shares_with_the_truth():
    """Of four actions with two lucks. What a critic saw by luck 0 correlates with what came by luck 1:
    1 - 6 x (1 + 1 + 1 + 1) / (4 x 15) = 0.6, and it is all that it knew. A critic without luck is right by luck 0 and
    0.6 by luck 1: 0.8."""
    returns = np.array([[1.0, 2], [2, 1], [3, 4], [4, 3]])
    found = judgement(returns, returns)
    assert found.correlation == pytest.approx(0.6) == found.agreement
    assert judgement(returns[:, [0, 0]], returns).correlation == pytest.approx(0.8)
    assert found.critic.tolist() == [1.5, 1.5, 3.5, 3.5]


def test_no_correlation_is_beyond_one():
    """Correlations of 1, 1 and 0.6: mean 0.867, deviation 0.231, t(2) = 4.303: 0.867 -+ 0.574."""
    alike, noisy = np.array([[1.0, 1], [2, 2], [3, 3], [4, 4]]), np.array([[1.0, 2], [2, 1], [3, 4], [4, 3]])
    table, _ = whatif.summary([judgement(each, each) for each in (alike, alike, noisy)], 2)
    for line in table.splitlines()[-2:]:
        assert line.split()[-4:] == ["+0.87", "[+0.29,", "+1.00]", "3"]


def test_the_learners_rewards_by_hand():
    """Deviation 2, discount 1/2, clip 10. A reward of 30 counts as 2 x 10, a fine of 3 as 2 x 3 whatever the deviation;
    nothing is looked for behind it. Returns: 20 + (1 + (-6) / 2) / 2 = 19; 1 - 3 = -2; -6; 4."""
    cfg = CFG.replace(**{"reward.clip": 10.0})
    run = SimpleNamespace(
        returns=SimpleNamespace(var=np.array([[4 - normalizers.EPS]])),
        hypers=SimpleNamespace(ppo=SimpleNamespace(gamma=np.array([0.5]))),
    )
    fine = np.array([[0.0, 0, -3, 0]])
    rows = SimpleNamespace(
        info=SimpleNamespace(components=SimpleNamespace(death_penalty=fine)),
        reward=np.array([[30.0, 1, -3, 4]]), value=np.array([[1.0, 2, 3, 4]]),
        terminal=np.array([[False, False, True, True]]),
    )  # fmt: skip
    returns, value, critic = whatif.judged(SimpleNamespace(run=run, cfg=cfg), np.array([0]), rows)
    assert returns == pytest.approx(np.array([[19.0, -2, -6, 4]])) and value.tolist() == [[2, 4, 6, 8]]
    # r + V(s') / 2 - V(s): 20 + 2 - 2, 1 + 3 - 4, -6 - 6, 4 - 8
    assert critic == pytest.approx(np.array([[20.0, 0, -12, -4]]))


def test_every_legal_action_once(folder):
    """Of a newborn: to wait, or 2 slots x 2 blueprints x 4 styles x 3 tempos x 3 targets = 144 germinations. The policy
    chooses one of them with probability 1, the one it chose with the probability that it recorded."""
    run, moment = opened(folder, 2), Moment(0, 2, 1)
    rows = whatif.play(run, 2, [moment], NO_ORDER[None], [0])
    episode = jax.tree.map(lambda leaf: leaf[0], rows)
    actions = whatif.legal_actions(jax.tree.map(lambda leaf: leaf[1], episode.masks))
    assert len(actions) == 145 == len(np.unique(actions, axis=0)) and not actions[0, HEADS.index("op")]
    assert not doctest.testmod(whatif).failed
    for action in actions:
        line = whatif.in_words(action, CFG)
        (read,) = parse_script(f"0: {line}", CFG.lifecycle, slots=2)
        assert [int(getattr(read, head)) for head in HEADS] == action.tolist()
    likely = whatif.probabilities(run, moment, episode, actions)
    (taken,) = np.flatnonzero((actions == [getattr(episode.action, head)[1] for head in HEADS]).all(1))
    assert likely.sum() == pytest.approx(1, abs=1e-5)
    assert likely[taken] == pytest.approx(np.exp(episode.log_prob[1]), rel=1e-5)


def test_probabilities_know_what_came_before(folder):
    """At every later decision of an episode, from the recurrent state that it had then."""
    run = opened(folder, 2)
    rows = jax.tree.map(lambda leaf: leaf[0], whatif.play(run, 2, [Moment(1, 5, 1)], NO_ORDER[None], [0]))
    for t in range(1, T):
        did = np.array([[getattr(rows.action, head)[t] for head in HEADS]])
        likely = whatif.probabilities(run, Moment(1, 5, t), rows, did)
        assert likely == pytest.approx([np.exp(rows.log_prob[t])], rel=1e-4)


def test_legal_actions_of_older_seeds():
    """Slot 0 may get a target: 4 styles x 3 targets x 4 speeds x 3 curves = 144, or be pruned: 4 x 3 = 12, or kept, and
    slot 1 go on; and to wait: 159."""
    every = lambda n: np.ones(n, bool)
    by_op = np.zeros((6, 2), bool)
    by_op[[Op.SET_ALPHA_TARGET, Op.PRUNE, Op.FOSSILIZE], 0] = by_op[Op.ADVANCE, 1] = by_op[Op.WAIT] = True
    masks = Masks(
        op=by_op.any(1), slot=every(2), slot_by_op=by_op, blueprint=every(13), style=every(4), tempo=every(3),
        alpha_target=every(3), alpha_speed=every(4), alpha_curve=every(3),
    )  # fmt: skip
    ops = whatif.legal_actions(masks)[:, HEADS.index("op")]
    assert np.bincount(ops).tolist() == [1, 0, 144, 12, 1, 1]


def test_a_moment_from_the_command_line(folder, capsys):
    assert whatif.main([str(folder), "--round", "1", "--env", "2", "--epoch", "1", "--lucks", "2"]) == 0
    out = capsys.readouterr().out
    # (145 actions + 1) x 2 lucks and 2 twins in blocks of (2 policies + twin) x 8
    assert "292 episodes and 2 twins, in 13 blocks of 24" in out and "round 1: as recorded, bit by bit" in out
    (said,) = [line for line in out.splitlines() if line.startswith("The action taken, ")]
    with open(folder / "whatif-1-2-1-0.csv") as file:
        rows = list(csv.DictReader(file))
    (taken,) = [row for row in rows if row["taken"] == "True"]
    assert len(rows) == 145 and f"ranks {taken['rank']} of 145" in said and taken["action"] in said
    values = [float(row["advantage"]) for row in rows]
    assert values == sorted(values, reverse=True)
    assert sum(float(row["probability"]) for row in rows) == pytest.approx(1, abs=1e-3)
    assert (folder / "whatif-1-2-1-0.png").read_bytes().startswith(b"\x89PNG")


def test_many_moments_from_the_command_line(folder, capsys):
    options = ["--moments", "5", "--lucks", "2", "--policy", "1"]
    assert whatif.main([str(folder), *options]) == 0
    out = capsys.readouterr().out
    with open(folder / "whatif-2-moments.csv") as file:
        rows = list(csv.DictReader(file))
    moment = lambda row: (row["policy"], row["env"], row["epoch"])
    moments = set(map(moment, rows))
    assert len(moments) == 5 and {policy for policy, *_ in moments} == {"1"} and len(rows) <= 5 * 12
    errors = {m: float(row["value"]) - float(row["return"]) for m, row in zip(map(moment, rows), rows, strict=True)}
    (line,) = [line for line in out.splitlines() if line.startswith("V(s) minus the return")]
    assert float(line.split("reward")[1].split()[0]) == pytest.approx(np.mean(list(errors.values())), abs=0.006)
    assert (folder / "whatif-2-moments.png").read_bytes().startswith(b"\x89PNG")
    before = (folder / "whatif-2-moments.csv").read_bytes()
    assert whatif.main([str(folder), *options]) == 0 and (folder / "whatif-2-moments.csv").read_bytes() == before


def test_the_interval_of_a_rank_correlation():
    """0 of 103 pairs: tanh(1.96 / 10) = 0.1935; of 0.8 of 12: 1.0986 -+ 1.96 sqrt(1.32 / 9) = 0.348 to 1.849."""
    assert whatif.rank_interval(0.0, 103)[1:4] == pytest.approx((-0.1935, 0.1935, 103), abs=1e-4)
    z = np.arctanh([*whatif.rank_interval(0.8, 12)[1:3]])
    assert z == pytest.approx([1.0986 - 0.7506, 1.0986 + 0.7506], abs=1e-3)
    assert np.isnan(whatif.rank_interval(0.5, 3).low)


MOMENT = ["--env", "0", "--epoch", "1"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([*MOMENT, "--round", "3"], "--round 3: must be from 0 to 2"),
        (["--env", "8", "--epoch", "1"], "--env 8: must be from 0 to 7"),
        (
            ["--env", "0", "--epoch", "0"],
            "--epoch 0: must be from 1 to 11; the first epoch, 0, comes before any decision",
        ),
        (["--env", "0", "--epoch", "12"], "--epoch 12: must be from 1 to 11"),
        ([*MOMENT, "--policy", "-1"], "--policy -1: must be from 0 to 1"),
        ([*MOMENT, "--lucks", "1"], "--lucks 1: must be at least 2"),
        (["--env", "0"], "--epoch: must be given, or --moments"),
        (["--epoch", "1"], "--env: must be given, or --moments"),
        ([*MOMENT, "--rounds", "1"], "--rounds: must be an option that --help names; did you mean --round?"),
        (["--moments", "0"], "--moments 0: must be at least 1 or none"),
        (
            ["--moments", "9", "--env", "1", "--epoch", "1"],
            "--moments 9: there are 2 at which more than waiting is legal",
        ),
        ([*MOMENT, "--text", "y"], "--text y: "),
        ([*MOMENT[:3], "soon"], "--epoch soon: must be int or none"),
    ],
)
def test_what_cannot_be_asked_is_one_line(folder, capsys, options, said):
    assert whatif.main([str(folder), *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and said in line


def test_only_a_finished_run_is_asked(folder, tmp_path, capsys):
    assert whatif.main([str(tmp_path / "none"), *MOMENT]) == 2
    card = json.loads((folder / "run.json").read_text()) | {"status": "running"}
    files.write_json(tmp_path / "run.json", card)
    assert whatif.main([str(tmp_path), *MOMENT]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "must be the folder of a run" in first and "its status is 'running': must be complete" in second


def nothing_may_be_played(*args, **kwargs):
    raise AssertionError("an episode was played")


def test_files_that_cannot_be_written_are_found_out_first(folder, tmp_path, monkeypatch, capsys):
    """A folder has the place of the lock, as in a folder that is read-only, or of a file; another process is at work in
    the run."""
    monkeypatch.setattr(whatif, "play", nothing_may_be_played)
    run = tmp_path / "run"
    shutil.copytree(folder, run)
    (run / LOCK).mkdir()
    assert whatif.main([str(run), *MOMENT]) == 2
    (run / LOCK).rmdir()
    (run / "whatif-2-0-1-0.png").mkdir(exist_ok=True)
    assert whatif.main([str(run), *MOMENT]) == 2
    (run / "whatif-2-moments.csv").unlink(missing_ok=True)
    (run / "whatif-2-moments.csv").mkdir()
    assert whatif.main([str(run), "--moments", "2"]) == 2
    with locked(run):
        assert whatif.main([str(run), *MOMENT]) == 2
    said = capsys.readouterr().err.splitlines()
    what = ("must be a folder that can be written to", "-2-0-1-0.png: is a folder", "-2-moments.csv: is a folder")
    for line, words in zip(said, [*what, "is at work in this run"], strict=True):
        assert line.startswith("error: ") and words in line
    assert not (run / LOCK).exists()


def test_a_moment_without_a_choice_is_one_line(folder, capsys, monkeypatch):
    """As if there were no slots."""
    wait = np.zeros((1, len(HEADS)), np.int32)
    monkeypatch.setattr(whatif, "legal_actions", lambda masks: wait)
    assert whatif.main([str(folder), *MOMENT]) == 2
    assert "--epoch 1: only waiting is legal then in environment 0" in capsys.readouterr().err
