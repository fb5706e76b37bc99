"""The main job: train a policy that grows networks, then compare it with rules on the same keys.

    python -m experiments.cifar --preset smoke --data shapes

writes a folder with the table, the pictures and everything they were made from; see `--help`.
"""

from __future__ import annotations

import collections
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from esper_jax import Config, data, presets
from esper_jax.run import command, devices, job, provenance

PROGRAM = "python -m experiments.cifar"


@dataclass(frozen=True)
class Options(job.JobOptions):
    """Trains a policy that grows networks, then compares it with rules on the same keys: same hosts, same batches.

    smoke takes about a minute on two cores, quick a few minutes, full is for a GPU. Every number of a preset can be
    changed; the defaults below are those of the preset and the data that are asked for.
    """

    data: Literal["auto", "cifar10", "shapes", "digits"] = "auto"
    """auto takes CIFAR-10 if it can be had, else the digits, and says so"""
    data_dir: Path | None = None
    """folder that holds the CIFAR-10 files; none looks in $ESPER_DATA and the user's cache, then downloads"""


@dataclass(frozen=True)
class Early:
    """The options that decide the defaults of the others."""

    preset: str | None = None
    data: str | None = None
    data_dir: str | None = None
    resume: str | None = None
    devices: int = 0


def parse(argv: list[str]) -> Options:
    """The command line. Raises ValueError for what does not go together; exits with a hint for an unknown option."""
    check_given_once(argv)
    early = [word for word in argv if word not in ("-h", "--help")]
    asked, _ = tyro.cli(Early, args=early, prog=PROGRAM, add_help=False, return_unknown_args=True)
    card = provenance.read_card(Path(asked.resume)) if asked.resume else None
    then = Config.from_json(json.dumps(card["config"])) if card else None
    devices.use_cpus(asked.devices or (then.devices if then else 0))
    known = asked.preset if asked.preset in presets.PRESETS else None  # another is refused below, with its neighbours
    backend = devices.backend()
    preset = known or ("quick" if backend == "cpu" else "full")
    if card:
        preset, cfg = card["preset"], then
        place = cfg.data.data_dir
        if place and not data.named_folder("--data-dir", place).is_dir():  # moved since: looked for as if not named
            cfg = cfg.replace(**{"data.data_dir": None})
    else:
        name = asked.data if asked.data in ("cifar10", "shapes", "digits") else "auto"
        if name == "auto":  # the sizes depend on the data; who only wants to read the help does not wait for a server
            wrong = asked.data not in (None, "auto")  # refused below
            look = len(early) == len(argv) and not wrong
            name = data.resolve(job.check_folder(asked.data_dir), announce=command.say) if look else "digits"
        cfg = presets.get(preset, name)
    if asked.resume and asked.data not in (None, cfg.data.name):
        raise ValueError(f"--data {asked.data} and --resume: {asked.resume} is a run on {cfg.data.name}")
    if asked.data_dir:
        cfg = cfg.replace(**{"data.data_dir": asked.data_dir})
    options = tyro.cli(Options, args=argv, prog=PROGRAM, default=Options(preset=preset, data=cfg.data.name, config=cfg))
    for name, instead in (("name", "--data"), ("data_dir", "--data-dir")):
        if (value := getattr(options.config.data, name)) != getattr(cfg.data, name):
            raise ValueError(f"--data.{name.replace('_', '-')} {value}: give {instead} {value}, which sizes follow")
    if options.checkpoint_every < 0:
        raise ValueError(f"--checkpoint-every = {options.checkpoint_every}: must be at least 0")
    if options.resume and options.out:
        raise ValueError("--out and --resume: give one of them; a resumed run goes on in its own folder")
    if options.resume and options.preset != preset:
        raise ValueError(f"--preset {options.preset} and --resume: {options.resume} is a run of preset {preset}")
    if options.resume and provenance.computed(options.config) != provenance.computed(cfg):
        then, now = (json.dumps(provenance.computed(c), indent=0).splitlines() for c in (cfg, options.config))
        changed = [line.strip(", ") for line, before in zip(now, then, strict=False) if line != before]
        allowed = ", ".join(provenance.NOT_COMPUTED)
        raise ValueError(f"--resume {options.resume}: {changed[0]}: only {allowed} may differ from then")
    return options


def check_given_once(argv: list[str]) -> None:
    """Raises ValueError for an option that is given twice, in whichever of its spellings."""
    names = [word.split("=")[0].replace("_", "-") for word in argv if word.startswith("--")]
    twice = [name for name, count in collections.Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"{twice[0]}: is given {names.count(twice[0])} times; must be given once")


def main(argv: list[str] | None = None) -> int:
    return job.main(PROGRAM, parse, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    command.leave(main())
