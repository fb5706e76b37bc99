"""Growth in a language model: a policy grows transformers on text and is compared with rules on the same keys.

    python -m experiments.text --preset smoke --text FILE

Without a file it takes the help text that comes with Python. It writes the same folder as `experiments.cifar`, with a
table in bits per character.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from esper_jax import presets
from esper_jax.config import TextConfig
from esper_jax.run import command, compilation, devices, job, options, provenance

PROGRAM = "python -m experiments.text"


@dataclass(frozen=True)
class Options(job.JobOptions):
    """Trains a policy that grows language models, then compares it with rules on the same keys: same hosts, same
    batches.

    smoke takes about a minute on two cores, quick a few minutes, full is for a GPU. Every number of a preset can be
    changed; the defaults below are those of the preset that is asked for.
    """

    text: tuple[str, ...] = ()
    """files of UTF-8 text, read one after the other; none takes `--data`"""
    data: Literal["topics", "tinystories"] = "topics"
    """topics is the help text that comes with Python; tinystories needs the extra `text` and a network"""
    config: Annotated[TextConfig, tyro.conf.arg(name="")] = field(default_factory=TextConfig)


def parse(argv: list[str]) -> Options:
    """The command line. Raises ValueError for what cannot be; prints the help and exits if that is asked for."""
    asked = options.check(argv, Options)
    word = lambda name: asked[name][0] if name in asked else None
    resume = word("--resume")
    card = provenance.read_card(Path(resume)) if resume is not None else None
    then = job.config_of(card, TextConfig, resume)
    devices.use_cpus(int(word("--devices") or 0) or (then.devices if then else 0))
    backend = devices.backend()
    preset = card["preset"] if card else word("--preset") or ("quick" if backend == "cpu" else "full")
    for name in ("--data.name", "--data.files"):
        if name in asked:
            raise ValueError(f"{name}: give --text FILE... or --data instead")
    files = tuple(asked.get("--text", ()))
    if "--text" in asked and not files:
        raise ValueError("--text: must be followed by one or more files")
    if files and "--data" in asked:
        raise ValueError("--text and --data: give one of them")
    named = {"data.name": "files", "data.files": files} if files else {"data.name": word("--data") or "topics"}
    cfg = (then or presets.text(preset)).replace(**({} if then and not files and "--data" not in asked else named))
    chosen = options.cli(Options, argv, prog=PROGRAM, default=Options(preset=preset, config=cfg))
    if card is not None:
        job.check_resumed(chosen, then, card)
    job.check(compilation.spread(chosen.config), chosen.script)
    return chosen


def main(argv: list[str] | None = None) -> int:
    return job.main(PROGRAM, Options, parse, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    command.leave(main())
