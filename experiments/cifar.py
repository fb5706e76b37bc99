"""The main job: train a policy that grows networks, then compare it with rules on the same keys.

    python -m experiments.cifar --preset smoke --data shapes

writes a folder with the table, the pictures and everything they were made from; see `--help`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import tyro

from esper_jax import Config, data, presets
from esper_jax.run import job, provenance

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


def parse(argv: list[str]) -> Options:
    """The command line. Raises ValueError for what does not go together; exits with a hint for an unknown option."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)  # options that decide the defaults of others
    for name in ("preset", "data", "data-dir", "resume"):
        early.add_argument(f"--{name}")
    dashed = [re.sub(r"^--[^=]*", lambda name: name[0].replace("_", "-"), word) for word in argv]  # as tyro takes both
    asked, _ = early.parse_known_args(dashed)
    asked.preset = asked.preset if asked.preset in presets.PRESETS else None  # refused below, with its neighbours
    preset = asked.preset or ("quick" if jax.default_backend() == "cpu" else "full")
    if asked.resume:
        card = provenance.read_card(Path(asked.resume))
        preset, cfg = card["preset"], Config.from_json(json.dumps(card["config"]))
    else:
        name = asked.data if asked.data in ("cifar10", "shapes", "digits") else "auto"
        if name == "auto":  # the sizes depend on the data; who only wants to read the help does not wait for a server
            helping = {"-h", "--help"} & set(argv)
            wrong = asked.data not in (None, "auto")  # refused below
            name = "digits" if helping or wrong else data.resolve(job.check_folder(asked.data_dir), announce=_warn)
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


def _warn(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    return job.main(PROGRAM, parse, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
