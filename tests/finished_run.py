"""The tiny run as a finished run in a folder, and opened again without data or programs that are not there already."""

import numpy as np
import tiny
import tiny_run

from esper_jax.run import checkpoint, compilation, files, provenance, records
from experiments import finished

CFG = tiny_run.CONFIG


def write(folder):
    """With its last checkpoint alone."""
    folder.mkdir(exist_ok=True)
    result = tiny_run.result()
    rounds = {name: np.stack([arrays[name] for arrays in result.rounds]) for name in result.rounds[0]}
    records.write_arrays(folder / "metrics.npz", rounds | result.metrics)
    meta = {"config": provenance.computed(CFG), "data": "tiny"}
    checkpoint.save(folder / "checkpoints", CFG.rounds, result.states[-1], meta)
    card = {
        "status": "complete",
        "preset": "smoke",
        "command": "made",
        "seconds": {"total": 1.0},
        **provenance.run_card(CFG, tiny.dataset()),
    }
    files.write_json(folder / "run.json", card)
    return folder


def ready(monkeypatch, experiment):
    """For a test of an experiment, a module that opens runs."""
    monkeypatch.setattr(finished.data, "load", lambda cfg, announce: tiny.dataset())
    monkeypatch.setattr(finished, "controllers", lambda cfg, script: tiny_run.RULES())
    monkeypatch.setattr(finished, "make_train", lambda *_: tiny_run.result().train)
    monkeypatch.setattr(compilation, "compile_ahead", lambda train, *_: train)
    monkeypatch.setattr(experiment, "prepare", lambda: None)
