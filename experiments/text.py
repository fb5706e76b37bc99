"""Growth in a language model: a policy grows transformers on text and is compared with rules on the same keys.

    python -m experiments.text --preset smoke --text FILE

Without a file it takes the help text that comes with Python. It writes the same folder as `experiments.cifar`, with a
table in bits per character, and `samples.txt`: what the networks write.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from esper_jax import presets
from esper_jax.config import TextConfig
from esper_jax.run import command, compilation, job, options

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
    asked = job.asked(argv, Options, TextConfig)
    words, preset, then = asked.words, asked.preset, asked.then
    for name in ("--data.name", "--data.files"):
        if name in words:
            raise ValueError(f"{name}: give --text FILE... or --data instead")
    files = tuple(words.get("--text", ()))
    if "--text" in words and not files:
        raise ValueError("--text: must be followed by one or more files")
    if files and "--data" in words:
        raise ValueError("--text and --data: give one of them")
    named = {"data.name": "files", "data.files": files} if files else {"data.name": asked.word("--data") or "topics"}
    cfg = (then or presets.text(preset)).replace(**({} if then and not files and "--data" not in words else named))
    chosen = options.cli(Options, argv, prog=PROGRAM, default=Options(preset=preset, config=cfg))
    if asked.card is not None:
        job.check_resumed(chosen, then, asked.card)
    job.check(compilation.spread(chosen.config), chosen.script)
    return chosen


def main(argv: list[str] | None = None) -> int:
    return job.main(PROGRAM, Options, parse, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    command.leave(main())
