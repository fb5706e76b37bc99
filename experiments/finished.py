"""A finished run, opened again: what it was, the program that made it, and its state at any round.

A run is a function of its configuration, data and keys, so what no checkpoint holds is computed again.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from esper_jax import Config, data, make_train
from esper_jax.config import TextConfig
from esper_jax.control.arms import controllers
from esper_jax.run import checkpoint, compilation, devices, provenance, records
from esper_jax.run.console import Console, round_note
from esper_jax.run.job import RETURN_AFTER
from esper_jax.train import RunState, Train

DATA_IN_FOLDERS = ("auto", "cifar10")  # the others are made or installed


class Finished(NamedTuple):
    """A run that is complete."""

    folder: Path
    card: dict[str, Any]  # run.json
    cfg: Config
    dataset: data.AnyDataset
    train: Train
    key: jax.Array
    run: RunState  # after the last round


def open_run(folder: Path, console: Console, data_dir: Path | None = None, text: Sequence[str] = ()) -> Finished:
    """Reads a run, finds its data, and restores its last state.

    Args:
      data_dir: folder that holds the data of images, if not where the run found them.
      text: files of the run's text, if they were moved.

    Raises ValueError and OSError for what is no finished run, or one whose data are others here.
    """
    card = provenance.read_finished(folder)
    cfg = Config.from_json(json.dumps(card["config"]))
    if data_dir and cfg.data.name not in DATA_IN_FOLDERS or text and not isinstance(cfg, TextConfig):
        option = "--data-dir" if data_dir else "--text"
        raise ValueError(f"{option} {data_dir or ' '.join(text)}: {folder} is a run on {cfg.data.name}")
    cfg = cfg.replace(**{"data.data_dir": str(data_dir)}) if data_dir else cfg
    cfg = cfg.replace(**{"data.files": tuple(text)}) if text else cfg
    if other := made_otherwise(card):
        line = f"{folder} was made by another version ({other}): its numbers may be others now"
        console.say(line, style="bold red", always=True)
    devices.use_cpus(cfg.devices)
    devices.backend()
    dataset = data.load(cfg.data, announce=console.say)
    if not provenance.same_data(dataset.identity, card["data"]["identity"]):
        raise ValueError(f"{folder}: its data are {card['data']['identity']}, what is found here {dataset.identity}")
    train, key = make_train(cfg, dataset, controllers(cfg, card["script"])), jax.random.key(cfg.seed)
    return state_at(Finished(folder, card, cfg, dataset, train, key, None), cfg.rounds, console)


def state_at(finished: Finished, number: int, console: Console) -> Finished:
    """The run as it was before round `number`, from 0 on; after the last one if that is the number of rounds.

    From the newest checkpoint that is no later, and by playing the rounds since then again. Raises ValueError if that
    cannot be done.
    """
    folder, card, cfg, dataset, train, key, _ = finished
    kept = folder / "checkpoints"
    known = [step for step in checkpoint.steps(kept) if step <= number]
    if known:
        meta = {"config": provenance.computed(cfg, card["added"]), "data": provenance.digest(dataset.identity)}
        try:
            run, done = checkpoint.restore(kept, compilation.run_template(train, cfg, key), meta, step=known[-1])
        except checkpoint.DamageError:
            raise
        except checkpoint.CheckpointError as error:
            if not made_otherwise(card):
                raise
            what = "was made by another version, whose checkpoints this one cannot read"
            raise ValueError(f"{folder}: {what} ({error})") from None
    else:
        run, done = train.init(key), 0
    if done < number:
        with console.step("learn", f"rounds {done} to {number - 1}, which no checkpoint holds"):
            check_no_return(finished.folder, done, number)
            for _ in range(done, number):
                run, _ = train.update(key, run)
    return finished._replace(run=run)


def made_otherwise(card: dict[str, Any]) -> str:
    """What made a run and is not what runs now, by its run card: sources or JAX; empty if both are the same."""
    facts = {
        "esper_jax's sources": ((card.get("source") or {}).get("sha256"), provenance.source()["sha256"]),
        "jax": ((card.get("versions") or {}).get("jax"), provenance.versions()["jax"]),
    }
    differs = {name: pair for name, pair in facts.items() if pair[0] != pair[1]}
    return "; ".join(f"{name} {str(a or 'unknown')[:12]} then, {b[:12]} now" for name, (a, b) in differs.items())


def learn(train: Train, key: jax.Array, run: RunState, rounds: int, console: Console, name: str = "round") -> RunState:
    """A run after so many rounds more, of which a person sees the numbers and nothing is kept."""
    metric = train.dataset.metric(train.dataset.validation)
    with console.bar(name, rounds) as advance:
        for _ in range(rounds):
            run, metrics = train.update(key, run)
            advance(round_note(records.round_arrays(metrics), metric))
    return run


def check_no_return(folder: Path, first: int, last: int) -> None:
    """Raises ValueError if a policy returned to an earlier state of itself in a round from `first` to before `last`:
    the run does not say to which."""
    arrays = records.read_arrays(folder / "metrics.npz")
    idle = records.dead({name: array for name, array in arrays.items() if name.startswith("learner/")})
    for number in range(max(first, RETURN_AFTER), last):
        if idle[number - RETURN_AFTER : number].all(0).any():
            what = f"a policy returned to an earlier state of itself before round {number}"
            raise ValueError(f"{folder}: {what}, which cannot be played again")


def made_by(card: dict[str, Any], policies: int, seconds: float, then: str = "") -> str:
    """How somebody else gets the numbers of a run, and of a command that came after it.

    Args:
      policies: that are compared in each environment.
      seconds: that it took.
    """
    cfg, device, found = card["config"], card["device"], card["data"]
    lines = [
        f"{policies} policies x {cfg['report_envs']} environments with the same keys; {found['name']} "
        f"({found['identity'][:16]}), {device['precision']}, {device['kind']} x{device['used']}, jax "
        f"{card['versions']['jax']}; in {seconds:,.0f} s by",
        elsewhere(card["command"]),
        *filter(None, [then]),
    ]
    return "\n  ".join(lines)


def elsewhere(line: str) -> str:
    """A run's command for other machines: without where its files went, and with a name for where its data were."""
    words, kept = shlex.split(line), []
    for word, before in zip(words, ["", *words], strict=False):
        if "--out" not in (word, before):
            kept.append("DIR" if before == "--data-dir" else shlex.quote(word))
    return " ".join(kept)
