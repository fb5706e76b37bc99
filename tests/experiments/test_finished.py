"""Finished runs, opened again by who cannot be sure that it is the same program."""

import io
import json

import finished_run
import pytest
import tiny
import tiny_run

from esper_jax import presets
from esper_jax.run import checkpoint, files, provenance
from esper_jax.run.console import Console
from experiments import finished, whatif

CFG = tiny_run.CONFIG


@pytest.fixture(autouse=True)
def ready(monkeypatch):
    finished_run.ready(monkeypatch, whatif)


@pytest.fixture
def folder(tmp_path):
    return finished_run.write(tmp_path)


def opened(folder, **options):
    """A run, and what was said."""
    console = Console(file=io.StringIO(), quiet=True)
    return finished.open_run(folder, console, **options), console.rich.file.getvalue()


def change(folder, **changes):
    card = json.loads((folder / "run.json").read_text())
    files.write_json(folder / "run.json", card | changes)


@pytest.mark.parametrize("data", ["digits", "shapes"])
def test_data_that_lie_in_no_folder_are_looked_for_in_none(folder, data):
    change(folder, config=presets.get("smoke", data).to_dict())
    with pytest.raises(ValueError, match=f"--data-dir {folder}: {folder} is a run on {data}"):
        opened(folder, data_dir=folder)


def test_a_run_of_the_same_version_is_opened_without_a_word(folder):
    run, said = opened(folder)
    assert tiny.equal(run.run, tiny_run.result().states[-1]) and not said


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"source": {"sha256": 16 * "0123"}}, ["esper_jax's sources 012301230123 then"]),
        ({"versions": {"jax": "0.1"}}, ["jax 0.1 then"]),
        ({"source": None, "versions": None}, ["esper_jax's sources unknown then", "jax unknown then"]),
    ],
)
def test_another_version_is_said(folder, changes, words):
    change(folder, **changes)
    _, said = opened(folder)
    assert len(said.splitlines()) == 1 and f"{folder} was made by another version" in said
    assert all(word in said for word in words)


def test_checkpoints_of_another_version_are_one_line(folder):
    """As before `hypers.sight` was there. With the same version it is no such excuse, nor are damaged files."""
    state = checkpoint._arrays(tiny_run.result().states[-1])
    older = {path: leaf for path, leaf in state.items() if path != "hypers.sight"}
    meta = {"config": provenance.computed(CFG), "data": "tiny"}
    place = checkpoint.save(folder / "checkpoints", CFG.rounds, older, meta)
    reason = r"hypers\.sight is not in the checkpoint"
    with pytest.raises(checkpoint.CheckpointError, match=reason):
        opened(folder)
    change(folder, source={"sha256": "0"})
    version = f"^{folder}: was made by another version, whose checkpoints this one cannot read "
    with pytest.raises(ValueError, match=version + rf"\(.*{reason}\)$"):
        opened(folder)
    (place / checkpoint.FINGERPRINT).write_text("x")
    with pytest.raises(checkpoint.DamageError, match="cannot be read"):
        opened(folder)


def test_the_command_of_a_run_for_other_machines():
    line = "python -m experiments.cifar --out '/a b/c' --data cifar10 --data-dir /somewhere --seed 3"
    assert finished.elsewhere(line) == "python -m experiments.cifar --data cifar10 --data-dir DIR --seed 3"
