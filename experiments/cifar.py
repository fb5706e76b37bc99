"""The main job: train a policy that grows networks, then compare it with rules on the same keys.

    python -m experiments.cifar --preset smoke --data shapes

writes a folder with the table, the pictures and everything they were made from; see `--help`.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from esper_jax import Config, data, presets
from esper_jax.run import command, compilation, job, options

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

    def meant(self, dataset: data.AnyDataset) -> str | None:
        return None if dataset.name == "cifar10" else "CIFAR-10"

    def check_data(self) -> None:
        check_folder(self.config.data.data_dir)


def check_folder(data_dir: str | None) -> str | None:
    """The folder, or a ValueError if it is not there."""
    if data_dir is not None and not (data_dir and os.path.isdir(data.named_folder("--data-dir", data_dir))):
        raise ValueError(
            f"--data-dir {shlex.quote(data_dir)}: must be a folder that exists and holds the CIFAR-10 files"
        )
    return data_dir


def parse(argv: list[str]) -> Options:
    """The command line. Raises ValueError for what cannot be; prints the help and exits if that is asked for."""
    asked = job.asked(argv, Options, Config)
    preset, then, folder = asked.preset, asked.then, asked.word("--data-dir")

    def sized(name: str) -> Config:
        cfg = then or presets.get(preset, name)
        place = folder if folder is not None else cfg.data.data_dir
        if then and folder is None and place and not os.path.isdir(data.named_folder("--data-dir", place)):
            place = None  # moved since: looked for as if not named
        return cfg.replace(**{"data.data_dir": place})

    def read(name: str, cfg: Config) -> Options:
        return options.cli(Options, argv, prog=PROGRAM, default=Options(preset=preset, data=name, config=cfg))

    name = then.data.name if then else asked.word("--data") or "auto"
    cfg = sized("digits" if name == "auto" else name)
    chosen = read(name, cfg)
    check(chosen, cfg, asked.card)
    if name == "auto":  # the sizes depend on the data; a server is asked once nothing else can be wrong
        job.check(compilation.spread(chosen.config), chosen.script)
        name = data.resolve(check_folder(folder), announce=command.say)
        chosen = dataclasses.replace(read(name, sized(name)), data=name)
    return chosen


def check(chosen: Options, cfg: Config, card: dict | None) -> None:
    """Raises ValueError for options that do not go together; `cfg` is what the configuration was without them."""
    for name, instead in options.INSTEAD.items():
        field = name.removeprefix("--data.").replace("-", "_")
        if (value := getattr(chosen.config.data, field)) != getattr(cfg.data, field):
            raise ValueError(f"{name} {value}: give {instead} {value}, which sizes follow")
    if card is not None:
        if chosen.data != cfg.data.name:
            raise ValueError(f"--data {chosen.data} and --resume: {chosen.resume} is a run on {cfg.data.name}")
        job.check_resumed(chosen, cfg, card)


def main(argv: list[str] | None = None) -> int:
    return job.main(PROGRAM, Options, parse, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    command.leave(main())
