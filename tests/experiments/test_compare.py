"""Runs that differ by their seed, pooled."""

import json
import shutil

import numpy as np
import pytest
import tiny
import tiny_run

from esper_jax.evidence import tables
from esper_jax.run import files, provenance, records
from experiments import compare


@pytest.fixture
def runs(tmp_path):
    """The tiny run under three seeds: what was kept is better by 1 and 4 points in the second and third."""
    folders = []
    for seed, more in ((0, 0.0), (1, 1.0), (2, 4.0)):
        folder = tmp_path / f"seed{seed}"
        folder.mkdir()
        metrics = dict(tiny_run.result().metrics)
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


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda f: change(f, status="running"), "its status is 'running': must be complete"),
        (lambda f: shutil.copy(f.with_name("seed0") / "run.json", f / "run.json"), "has the seed 0, as .*seed0 has"),
        (lambda f: change(f, data={"identity": "md5:0", "name": "x"}), "is a run on other data than .*seed0"),
        (
            lambda f: change(f, config=tiny_run.CONFIG.replace(seed=1, rounds=3).to_dict()),
            "rounds = 3, but 2 in .*seed0: must be the same",
        ),
        (lambda f: (f / "metrics.npz").write_bytes(b"x"), "metrics.npz: is damaged"),
        (lambda f: records.write_arrays(f / "metrics.npz", {"x": np.zeros(2)}), "metrics.npz: must be the arrays of a"),
        (lambda f: (f / "run.json").unlink(), "must be the folder of a run"),
    ],
)
def test_what_cannot_be_pooled_is_refused(runs, capsys, spoil, said):
    spoil(runs[1])
    with pytest.raises(ValueError, match=said):
        compare.check([compare.read(folder) for folder in runs])
    assert compare.main(list(map(str, runs))) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")


def test_one_run_is_no_experiment(runs, capsys):
    assert compare.main([str(runs[0])]) == 2 and compare.main([]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "must be the folders of two runs or more" in first and "no folder" in second
