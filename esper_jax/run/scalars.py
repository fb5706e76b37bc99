"""The numbers of a run's rounds as TensorBoard's event files, for those who look there."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import TracebackType

import numpy as np

from esper_jax.enums import HEADS, Stage
from esper_jax.metric import Metric


def check() -> None:
    """Raises ValueError where event files cannot be written."""
    try:
        importlib.import_module("tensorboardX")
    except ImportError as error:
        raise ValueError(f"--tensorboard: needs the extra: pip install 'esper_jax[tensorboard]' ({error})") from None


def of_round(arrays: dict[str, np.ndarray], metric: Metric) -> list[dict[str, float]]:
    """Of each policy the numbers of a round by their tags, from the arrays of `records.round_arrays`; what was not
    measured is left out."""
    reached = metric.value(arrays["rounds/val_accuracy"][..., -1], arrays["rounds/val_loss"][..., -1])
    by_policy = {
        "episodes/return": np.nansum(arrays["rounds/reward"], axis=-1).mean(-1),
        f"episodes/validation_{metric.name.replace(' ', '_')}": reached.mean(-1),
        "episodes/seeds_kept": (arrays["rounds/stage"][..., -1, :] == Stage.FOSSILIZED).sum(-1).mean(-1),
        "episodes/parameters": arrays["rounds/committed_size"][..., -1].mean(-1),
        "episodes/rollbacks": arrays["rounds/panic"].sum(-1).mean(-1),
    }
    for name, values in arrays.items():
        group, _, field = name.partition("/")
        if group == "learner" and values.ndim == 1:
            by_policy[name] = values
        elif name == "learner/head_entropy":
            by_policy |= {f"head_entropy/{head}": values[:, i] for i, head in enumerate(HEADS)}
    policies = len(arrays["rounds/reward"])
    return [{tag: float(v[p]) for tag, v in by_policy.items() if np.isfinite(v[p])} for p in range(policies)]


class Writer:
    """Event files in a folder for each policy; a step is a round, counted from 1. Where there is no folder it writes
    nothing.

    Args:
      done: rounds that are kept of what a stopped run wrote.
    """

    def __init__(self, folder: Path | None, policies: int, done: int = 0):
        self.writers = []
        if folder is not None:
            from tensorboardX import SummaryWriter

            purge = {"purge_step": done + 1} if done else {}
            named = {"filename_suffix": f".{done}"}  # else two parts that begin in one second would share a file
            self.writers = [SummaryWriter(str(folder / f"policy_{p}"), **purge, **named) for p in range(policies)]

    def __enter__(self) -> Writer:
        return self

    def write(self, number: int, arrays: dict[str, np.ndarray], metric: Metric) -> None:
        by_policy = of_round(arrays, metric) if self.writers else []
        for writer, numbers in zip(self.writers, by_policy, strict=True):
            for tag, value in numbers.items():
                writer.add_scalar(tag, value, number)
            writer.flush()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for writer in self.writers:
            writer.close()
