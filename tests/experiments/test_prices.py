"""Policies that pay other prices for parameters: the tiny run's program, a policy a price."""

import json
import shlex

import numpy as np
import pytest
import tiny
import tiny_run

from esper_jax.evidence import tables
from esper_jax.run import compilation, records
from esper_jax.train import Comparison
from experiments import prices

CFG = tiny_run.CONFIG
RULES = ["never", "random", "eager"]
TWO = ["--prices", "0", "5", "--policies", "1"]


@pytest.fixture
def started(monkeypatch):
    """Data, configuration and programs are there already; what runs begin with."""
    started, train = [], tiny_run.result().train

    def init(key, hypers=None):
        started.append(train.init(key, hypers))
        return started[-1]

    assert CFG.reward.mode == "paired"
    monkeypatch.setattr(prices.presets, "get", lambda preset, data: CFG)
    monkeypatch.setattr(prices.data, "load", lambda cfg, announce: tiny.dataset())
    monkeypatch.setattr(prices, "make_train", lambda *_: train._replace(init=init))
    monkeypatch.setattr(compilation, "compile_ahead", lambda train, *_: train)
    monkeypatch.setattr(prices, "prepare", lambda: None)
    return started


def test_policies_of_a_price_are_an_arm():
    """Six policies at three prices: rows 0 and 1, 2 and 3, 4 and 5; rules as they are."""
    rows = lambda n: Comparison(None, None, *(k + np.arange(n)[:, None] for k in (0, 10, 20, 30, 40)), None)
    arms = {"never": rows(1), "policy": rows(6)}
    found = prices.by_price(arms, (0.0, 0.2, 5.0))
    assert list(found) == ["never", "price 0", "price 0.2", "price 5"] and found["never"] is arms["never"]
    assert [found[name].germinated.tolist() for name in list(found)[1:]] == [[[0], [1]], [[2], [3]], [[4], [5]]]
    assert found["price 0.2"].shape.tolist() == [[42], [43]]


def test_each_policy_pays_its_price(started, tmp_path, capsys):
    out = tmp_path / "prices"
    assert prices.main([*TWO, "--out", str(out)]) == 0
    (run,) = started
    assert run.hypers.reward.price.tolist() == [0, 5]
    arrays = records.read_arrays(out / "prices.npz")
    assert arrays["arms/names"].tolist() == [*RULES, "price 0", "price 5"]
    assert {path.name for path in out.iterdir()} == {"prices.npz", "prices.json", "prices.txt", "prices.png"}
    assert (out / "prices.png").read_bytes().startswith(b"\x89PNG")

    # the same policies by hand, each a row of its own arm; only the second one pays for parameters
    train = tiny_run.result().train
    for _ in range(CFG.rounds):
        run, _ = train.update(tiny_run.KEY(), run)
    policy = train.compare(tiny_run.KEY(), run, ["policy"])["policy"]
    np.testing.assert_array_equal(arrays["arms/reward"][3:, :, 1:], policy.rollout.reward[:, :, 1:])
    assert [np.nan_to_num(paid).any() for paid in arrays["arms/reward_size"][3:]] == [False, True]

    said = (out / "prices.txt").read_text()
    assert "Prices of parameters: quick on tiny, seed 0, 1 policies a price" in said
    for row in tables.table(arrays):
        assert any(line.split() == " ".join(row).split() for line in said.splitlines())
    card = json.loads((out / "prices.json").read_text())
    assert card["prices"] == [0, 5] and "price" not in card["config"]["reward"]
    assert f"wrote {out}/" in capsys.readouterr().out


def test_the_command_gives_the_same_options_again():
    asked = ["--prices", "0", "1e-05", "--data-dir", "my data", "--seed", "3", "--report-envs", "4"]
    chosen = prices.options.cli(prices.Options, asked, prog="x")
    program, words = prices.command_line(chosen).split("prices ", 1)
    assert program == "python -m experiments."
    assert prices.options.cli(prices.Options, shlex.split(words), prog="x") == chosen


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--prices", "1", "1.0000001"], "--prices 1.0 1.0000001: must be finite numbers, at least 0, that differ"),
        (["--prices", "0", "-0.0"], "--prices 0.0 -0.0: must be"),
        (["--prices", "1", "-1"], "--prices 1.0 -1.0: must be"),
        (["--prices", "nan"], "--prices nan: must be"),
        (["--prices", "much"], "--prices much: must be"),
        (["--prices"], "--prices : must be"),
        (["--policies", "0"], "--policies 0: must be greater than 0"),
        (["--report-envs", "0"], "--report-envs 0: must be greater than 0 or none"),
        (["--data", "text"], "--data text: must be one of cifar10, shapes, digits"),
        (["--price", "1"], "--price: must be an option that --help names; did you mean --prices?"),
    ],
)
def test_bad_input_is_one_line(started, tmp_path, monkeypatch, capsys, given, said):
    monkeypatch.chdir(tmp_path)
    assert prices.main(given) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {said}")
    assert not started and not list(tmp_path.iterdir()), "nothing was begun, and no folder stays"


def test_a_folder_with_other_files_is_left_alone(started, tmp_path, capsys):
    (tmp_path / "mine").write_text("x")
    assert prices.main([*TWO, "--out", str(tmp_path)]) == 2
    assert "is not empty" in capsys.readouterr().err and [path.name for path in tmp_path.iterdir()] == ["mine"]
