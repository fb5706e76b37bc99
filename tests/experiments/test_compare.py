"""Runs that differ by their seed, pooled, and others side by side."""

import json
import re
import shutil

import numpy as np
import pytest
import tiny
import tiny_run

from esper_jax.evidence import tables
from esper_jax.evidence.statistics import Interval, crossed_interval, mean_interval
from esper_jax.metric import ACCURACY, bits_per_character
from esper_jax.run import checkpoint, files, provenance, records
from experiments import compare


@pytest.fixture
def runs(tmp_path):
    """The tiny run under three seeds: what was kept is better by 1 and 4 points in the second and third."""
    folders = []
    for seed, more in ((0, 0.0), (1, 1.0), (2, 4.0)):
        folder = tmp_path / f"seed{seed}"
        folder.mkdir()
        rounds = tiny_run.result().rounds
        metrics = tiny_run.result().metrics | {name: np.stack([r[name] for r in rounds]) for name in rounds[0]}
        learned = ~np.isin(metrics["arms/names"], ["never"])
        kept = metrics["arms/test_committed_accuracy"]
        metrics["arms/test_committed_accuracy"] = kept + np.float32(more) * learned[:, None]
        records.write_arrays(folder / "metrics.npz", metrics)
        cfg = tiny_run.CONFIG.replace(seed=seed)
        card = {"status": "complete", "preset": "smoke", "command": "x", **provenance.run_card(cfg, tiny.dataset())}
        files.write_json(folder / "run.json", card)
        folders.append(folder)
    return folders


def test_means_are_over_runs(runs, capsys):
    """Gains of g, g + 1 and g + 4: mean g + 5/3, standard error sqrt(13/3)/sqrt(3), t(2) = 4.303."""
    assert compare.main(list(map(str, runs))) == 0
    out = capsys.readouterr().out
    kept = tables.values(tiny_run.result().metrics)
    gain = float(np.mean(kept["policy"] - kept["never"]))
    row = next(line.split() for line in out.splitlines() if line.startswith("policy "))
    assert float(row[1]) == pytest.approx(gain + 5 / 3, abs=0.006)
    assert float(row[3].rstrip("*")) == pytest.approx(4.303 * (13 / 3 / 3) ** 0.5, abs=0.006)
    assert [float(cell) for cell in row[-3:]] == pytest.approx([gain, gain + 1, gain + 4], abs=0.006)
    assert "Student's t over 3 runs of preset smoke on tiny" in out
    never = next(line.split() for line in out.splitlines() if line.startswith("never"))
    assert never == ["never", "-", "x1.00", "-", "-", "-"]


def change(folder, **changes):
    card = json.loads((folder / "run.json").read_text())
    files.write_json(folder / "run.json", card | changes)


def other_rounds(folder):
    change(folder, config=tiny_run.CONFIG.replace(seed=1, rounds=3).to_dict())


def other_metric(folder):
    arrays = records.read_arrays(folder / "metrics.npz")
    records.write_arrays(folder / "metrics.npz", arrays | tables.metric_arrays(bits_per_character(64)))


def other_arms(folder):
    arrays = records.read_arrays(folder / "metrics.npz")
    arrays["arms/names"] = np.where(arrays["arms/names"] == "eager", "keen", arrays["arms/names"])
    records.write_arrays(folder / "metrics.npz", arrays)


def lose_card(folder):
    """Of a run with checkpoints, which know what it was."""
    path = folder / "run.json"
    about = json.loads(path.read_text()) | {"status": "running"}
    checkpoint.save(folder / "checkpoints", 1, {"x": np.zeros(1)}, {}, about=about)
    path.unlink()


def lose_arms(folder):
    arrays = records.read_arrays(folder / "metrics.npz")
    records.write_arrays(folder / "metrics.npz", arrays | {"arms/names": arrays["arms/names"][1:]})


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda f: change(f, status="running"), "its status is 'running': must be complete"),
        (lambda f: shutil.copy(f.with_name("seed0") / "run.json", f / "run.json"), "has the seed 0, as .*seed0 has"),
        (lambda f: (f / "metrics.npz").write_bytes(b"x"), "metrics.npz: is damaged"),
        (lambda f: records.write_arrays(f / "metrics.npz", {"x": np.zeros(2)}), "metrics.npz: must be the arrays of a"),
        (lambda f: (f / "run.json").unlink(), "must be the folder of a run"),
        (lose_card, "run.json: is missing or damaged: put it back"),
        (lose_arms, "metrics.npz: must be the arrays of a run: boolean index did not match"),
        (lambda f: records.write_arrays(f / "metrics.npz", {"x": np.zeros(2)}), "arrays of a run: no 'metric/"),
    ],
)
def test_what_is_no_run_is_refused(runs, capsys, spoil, said):
    spoil(runs[1])
    with pytest.raises(ValueError, match=said):
        compare.grouped([compare.read(folder) for folder in runs])
    assert compare.main(list(map(str, runs))) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")


@pytest.mark.parametrize(
    ("spoil", "field", "values"),
    [
        (other_rounds, "rounds", ["2", "3"]),
        (lambda f: change(f, data={"identity": "md5:0", "name": "x"}), "data", ["tiny .*", "x .*"]),
        (other_arms, "arms", ["never random eager .*", "never random keen .*"]),
        (other_metric, "metric", ["accuracy", "bits per character"]),
    ],
)
def test_runs_that_differ_by_more_than_their_seed_are_not_pooled(runs, capsys, spoil, field, values):
    spoil(runs[1])
    groups = compare.grouped([compare.read(folder) for folder in runs])
    assert [[run.folder for run in group] for group in groups] == [[runs[0], runs[2]], [runs[1]]]
    found = compare.differing(groups)
    assert list(found) == [field]
    for value, wanted in zip(found[field], values, strict=True):
        assert re.fullmatch(wanted, value)
    assert compare.main(list(map(str, runs))) == 0
    out = capsys.readouterr().out
    assert "Student's t over 2 runs of preset" in out and "one run of preset smoke" in out
    if field == "rounds":
        assert "A: rounds = 2\n" in out and "B: rounds = 3\n" in out


def test_what_was_not_measured_is_a_dash(runs, capsys):
    """Sizes and seeds kept of the rule `eager` in no environment of any run, and of `random` in some."""
    for folder in runs:
        arrays = records.read_arrays(folder / "metrics.npz")
        eager, random = (arrays["arms/names"] == name for name in ("eager", "random"))
        arrays["arms/fossilised"] = arrays["arms/fossilised"].astype(float)
        size, kept = arrays["arms/committed_size"], arrays["arms/fossilised"]
        size[eager], kept[eager] = np.nan, np.nan
        size[random], kept[random] = 1.25, 2
        size[random, 0], kept[random, 0] = np.nan, np.nan
        records.write_arrays(folder / "metrics.npz", arrays)
    cells = {row[0]: row for row in tables.table(arrays)}
    assert cells["eager"][-2:] == ["-", "-"] and cells["random"][-2:] == ["x1.25", "2.0"]
    assert compare.main(list(map(str, runs))) == 0
    sizes = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert "x1.25" in sizes["random"] and "nan" not in sizes["eager"]
    _, rows = compare.rows([compare.read(folder) for folder in runs])
    assert {row[0]: row[2] for row in rows}["eager"] == "-"


def test_one_run_has_its_own_interval(runs):
    other_rounds(runs[1])
    _, (alone,) = compare.grouped([compare.read(folder) for folder in runs])
    kept = tables.values(records.read_arrays(runs[1] / "metrics.npz"))
    assert compare.pooled([alone])["policy"] == crossed_interval(kept["policy"] - kept["never"])


def test_a_star_is_for_what_is_beyond_chance_among_all_arms():
    """Three gains of 9.9, 10, 10.1 are beyond chance, and so are the other arm's, until it is one of many."""
    interval = lambda values: mean_interval(np.array(values))
    run = lambda seed, gains: compare.Finished(
        None, {"config": {"seed": seed}}, {a: Interval(g, *[np.nan] * 2, 4) for a, g in gains.items()},
        dict.fromkeys(gains, 1.0), {}, ACCURACY,
    )  # fmt: skip
    unsure = (2.0, 3.0, 4.0)  # mean 3, standard error 0.577, t = 5.2, p = 0.035
    assert 0.03 < interval(unsure).p < 0.04
    alone = [run(i, {"never": 0.0, "a": v}) for i, v in enumerate(unsure)]
    assert compare.rows(alone)[1][1][1].endswith("*")
    # as one of two, of which the other one is surer, it still is; as one of three it is not: 2 p > 0.05
    sure = (9.9, 10.0, 10.1)
    three = [
        run(i, {"never": 0.0, "a": v, "b": w, "c": x})
        for i, (v, w, x) in enumerate(zip(unsure, sure, (-1.0, 0.0, 1.0), strict=True))
    ]
    cells = {row[0]: row[1] for row in compare.rows(three)[1]}
    assert cells["b"].endswith("*") and not cells["a"].endswith("*") and not cells["c"].endswith("*")


def test_page(runs, tmp_path):
    other_rounds(runs[1])
    file = tmp_path / "page.html"
    assert compare.main([*map(str, runs), "--page", str(file)]) == 0
    page = file.read_text()
    assert len(page) < 3_000_000 and "http" not in page and "src=" not in page and "<script" not in page
    headings = re.findall("<h[23]>(.*)</h[23]>", page)
    assert headings == [
        "A: rounds = 2", "B: rounds = 3", "Gains", "Learning", "In what the groups differ", "Runs",
    ]  # fmt: skip
    assert page.count("<svg") == 1 + 3  # one metric; return, seeds kept and validation by round
    assert all(str(folder) in page for folder in runs)
    assert "<tr><td>rounds</td><td>2</td><td>3</td></tr>" in page
    ids = re.findall(r' id="([^"]*)"', page)
    assert len(ids) == len(set(ids))


def test_a_page_that_cannot_be_written_is_one_line(runs, tmp_path, capsys):
    assert compare.main([*map(str, runs), "--page", str(tmp_path / "no" / "page.html")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "page.html" in line and "No such file" in line


def test_one_run_is_no_experiment(runs, capsys):
    assert compare.main([str(runs[0])]) == 2 and compare.main([]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "must be the folders of two runs or more" in first and "no folder" in second
