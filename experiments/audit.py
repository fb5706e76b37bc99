"""Does a reward rank controllers by what they achieve? The audit of a finished run.

    python -m experiments.audit RUN

plays the comparison of a run once more under every reward mode: the same controllers, policies and environments, so the
same episodes but for rounding. For each mode it prints Spearman's correlation of an episode's return with its gain
(report-test score of what was kept, minus the bare host's in the same environment), and eta squared, the share of
the returns' variance that lies between controllers: what a learner can use at most.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, get_args, get_type_hints

import numpy as np
import tyro

from esper_jax import make_train
from esper_jax.config import RewardConfig
from esper_jax.control.arms import controllers
from esper_jax.enums import BASELINE
from esper_jax.evidence.statistics import eta_squared, rank_correlation, signed
from esper_jax.evidence.tables import text_table
from esper_jax.run import command, files, options
from esper_jax.run.compilation import prepare
from esper_jax.run.console import Console
from esper_jax.train import Comparison
from experiments.finished import Finished, open_run

PROGRAM = "python -m experiments.audit"
MODES = get_args(get_type_hints(RewardConfig)["mode"])
COLUMNS = ("reward", "rank correlation with gain", "eta squared", "mean return of each arm")


def scores(arms: dict[str, np.ndarray], gain: dict[str, np.ndarray]) -> tuple[float, float]:
    """Rank correlation with the gain over all episodes, and eta squared between the arms; f[N] returns and gains."""
    together = lambda values: np.concatenate(list(values.values()))
    return rank_correlation(together(arms), together(gain)), eta_squared(list(arms.values()))


def returns(arms: dict[str, Comparison]) -> dict[str, np.ndarray]:
    """f[P R] sum of the rewards of each episode; the birth, before any decision, pays nothing."""
    return {name: np.asarray(result.rollout.reward[..., 1:].sum(-1)).ravel() for name, result in arms.items()}


def gains(arms: dict[str, Comparison]) -> dict[str, np.ndarray]:
    """f[P R] report-test score of what each episode kept, minus that of the bare host."""
    base = arms[BASELINE].test.committed_score
    return {name: np.asarray(result.test.committed_score - base).ravel() for name, result in arms.items()}


def replay(finished: Finished, mode: str) -> dict[str, Comparison]:
    """The comparison of a run under another reward mode."""
    cfg = finished.cfg.replace(**{"reward.mode": mode})
    train = make_train(cfg, finished.dataset, controllers(cfg, finished.card["script"]))
    return train.compare(finished.key, finished.run, train.controllers)


def audit(folder: Path, console: Console, data_dir: Path | None = None, text: tuple[str, ...] = ()) -> list[list[str]]:
    """The rows of the table, a mode each. Raises ValueError and OSError for what is no finished run."""
    finished = open_run(folder, console, data_dir, text)
    rows = []
    for mode in MODES:
        with console.step(mode, "compiled and played"):
            arms = replay(finished, mode)
        earned = returns(arms)
        correlation, share = scores(earned, gains(arms))
        means = "  ".join(f"{name} {values.mean():.2f}" for name, values in earned.items())
        rows.append([mode, signed(correlation), f"{share:.2f}", means])
    return rows


def main(argv: list[str] | None = None) -> int:
    prepare()

    def chosen(
        run: Annotated[Path, tyro.conf.Positional], data_dir: Path | None = None, text: tuple[str, ...] = ()
    ) -> tuple[Path, Path | None, tuple[str, ...]]:
        """Plays the comparison of a finished run under every reward mode: does the return rank by what is achieved?

        Takes about a minute per mode on two cores, most of it to compile.

        Args:
          run: folder of the run.
          data_dir: folder that holds the CIFAR-10 files; none looks where the run did.
          text: files of the run's text, if they were moved.
        """
        return run, data_dir, text

    def work() -> None:
        console = Console()
        folder, *places = options.cli(chosen, sys.argv[1:] if argv is None else argv, prog=PROGRAM)
        table = text_table(COLUMNS, audit(folder, console, *places))
        console.say(table, always=True)
        files.write_text(folder / "audit.txt", table + "\n")

    return command.ended(work)


if __name__ == "__main__":
    command.leave(main())
