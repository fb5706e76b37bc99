"""What became of the seeds of a run, and what each was worth: numbers from the arrays of metrics.npz.

Axis letters: A arms (a learned arm once per policy), R rounds, E environments, T epochs, S slots, K = 2^S on/off
configurations of the slots.
"""

from __future__ import annotations

from enum import IntEnum
from math import factorial
from typing import NamedTuple

import numpy as np

from esper_jax.enums import Op, Stage
from esper_jax.evidence.statistics import Interval, mean_interval
from esper_jax.evidence.tables import metric_of

LIVE = (Stage.GERMINATED, Stage.TRAINING, Stage.BLENDING, Stage.HOLDING, Stage.FOSSILIZED)


class Fate(IntEnum):
    KEPT = 0  # fossilised, and there at the end
    PRUNED = 1
    ROLLED_BACK = 2  # taken out by the governor
    OPEN = 3  # there at the end, but not fossilised


class Lives(NamedTuple):
    """Seeds, one row per germination; i64[N] each, ordered by arm, environment, slot and epoch."""

    arm: np.ndarray
    env: np.ndarray
    slot: np.ndarray
    born: np.ndarray  # first and last epoch, counted from 0, at whose end it was there
    last: np.ndarray
    kind: np.ndarray  # blueprint
    fate: np.ndarray


def lives(stage: np.ndarray, blueprint: np.ndarray, panic: np.ndarray) -> Lives:
    """The seeds that were germinated in episodes; those that a network was born with are not counted.

    Args:
      stage, blueprint: i8[A, E, T, S] at the ends of epochs.
      panic: bool[A, E, T], where the governor rolled back.
    """
    live = np.isin(stage, LIVE).swapaxes(2, 3)  # [A, E, S, T]
    none = np.zeros_like(live[..., :1])
    starts = np.argwhere(live & ~np.concatenate([none, live[..., :-1]], -1))
    ends = np.argwhere(live & ~np.concatenate([live[..., 1:], none], -1))
    arm, env, slot, born = starts.T
    last = ends[:, -1]
    at_end = last == stage.shape[2] - 1
    after = np.minimum(last + 1, stage.shape[2] - 1)
    fate = np.where(panic[arm, env, after], Fate.ROLLED_BACK, Fate.PRUNED)
    fossil = stage[arm, env, last, slot] == Stage.FOSSILIZED
    fate = np.where(at_end, np.where(fossil, Fate.KEPT, Fate.OPEN), fate)
    found = Lives(arm, env, slot, born, last, blueprint[arm, env, last, slot].astype(int), fate)
    return Lives(*(field[born > 0] for field in found))


class Survival(NamedTuple):
    """What became of the seeds of one blueprint under one arm, all of its policies together."""

    arm: str
    blueprint: str
    fates: dict[Fate, int]
    contribution: Interval  # of the metric's unit, better is more, over environments; see `survival`

    @property
    def germinated(self) -> int:
        return sum(self.fates.values())


def survival(metrics: dict[str, np.ndarray]) -> list[Survival]:
    """A row per arm that germinates and blueprint, most often germinated first within an arm.

    A seed's contribution is what the validation loses when it alone is switched off, at the last epoch of its life in
    which that was measured. The interval is over environments, each the mean of its seeds.
    """
    arms, names = metrics["arms/names"], metrics["arms/blueprints"]
    seeds = lives(metrics["arms/stage"], metrics["arms/blueprint"], metrics["arms/panic"])
    worth = _last_contribution(metrics, seeds)
    label, envs = arms[seeds.arm], metrics["arms/stage"].shape[1]
    rows = []
    for arm in dict.fromkeys(arms):
        kinds, counts = np.unique(seeds.kind[label == arm], return_counts=True)
        for kind in kinds[np.argsort(-counts, kind="stable")]:
            here = (label == arm) & (seeds.kind == kind)
            known = here & ~np.isnan(worth)
            n = np.bincount(seeds.env[known], minlength=envs)
            total = np.bincount(seeds.env[known], worth[known], minlength=envs)
            by_env = np.where(n > 0, total / np.maximum(n, 1), np.nan)
            fates = {fate: int((seeds.fate[here] == fate).sum()) for fate in Fate}
            rows.append(Survival(str(arm), str(names[kind]), fates, mean_interval(by_env)))
    return rows


def _last_contribution(metrics: dict[str, np.ndarray], seeds: Lives) -> np.ndarray:
    """f[N] in the metric's unit, NaN where it never was measured."""
    worth = np.full(len(seeds.arm), np.nan)
    if "arms/contribution" not in metrics:
        return worth
    for i, (arm, env, slot, born, last, *_) in enumerate(zip(*seeds, strict=True)):
        samples = metrics["arms/contribution"][arm, env, born : last + 1, slot]
        samples = samples[~np.isnan(samples)]
        worth[i] = samples[-1] if samples.size else np.nan
    return worth * metric_of(metrics).scale


def is_complete(table: np.ndarray, n_slots: int) -> bool:
    """Whether the scores `[..., K]` are of all on/off configurations; with many slots, only of some."""
    return table.shape[-1] == 2**n_slots


def alone(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What is lost when a slot alone is off, and gained when it alone is on, f[..., S] each.

    Args:
      table: `[..., 2 + 2 S]`, of networks with many slots: all on, all off, each off alone, each on alone.
    """
    n = table.shape[-1] // 2 - 1
    return table[..., :1] - table[..., 2 : 2 + n], table[..., 2 + n :] - table[..., 1:2]


def shapley_values(table: np.ndarray) -> np.ndarray:
    """Exact Shapley values (1953), f[..., 2^S] -> f[..., S]: what a slot adds, as a mean over all orders of switching
    slots on.

    Row k of the table has slot j on if bit j of k is set. They sum to the last row minus the first.
    """
    n = table.shape[-1].bit_length() - 1
    rows = np.arange(2**n)
    values = np.zeros((*table.shape[:-1], n))
    for j in range(n):
        for k in rows[(rows >> j) % 2 == 0].tolist():
            size = k.bit_count()
            share = factorial(size) * factorial(n - size - 1) / factorial(n)
            values[..., j] += share * (table[..., k | 1 << j] - table[..., k])
    return values


def interaction_index(table: np.ndarray) -> np.ndarray:
    """Pairwise Shapley interaction index (Grabisch and Roubens, 1999), f[..., 2^S] -> f[..., S, S], diagonal NaN.

    How much more two slots add together than each by itself, `v(ij) - v(i) - v(j) + v(none)`, as a mean over what else
    is on: a set of t of the other slots weighs t! (S - t - 2)! / (S - 1)!.
    """
    n = table.shape[-1].bit_length() - 1
    rows = np.arange(2**n)
    index = np.full((*table.shape[:-1], n, n), np.nan)
    for i in range(n):
        for j in range(i):
            a, b, total = 1 << i, 1 << j, np.zeros(table.shape[:-1])
            for k in rows[(rows & (a | b)) == 0].tolist():
                size = k.bit_count()
                share = factorial(size) * factorial(n - size - 2) / factorial(n - 1)
                total += share * (table[..., k | a | b] - table[..., k | a] - table[..., k | b] + table[..., k])
            index[..., i, j] = index[..., j, i] = total
    return index


def reward_parts(metrics: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """f[R] mean over episodes of each part of the reward, summed over an episode, without those that are always 0.

    They sum to the mean return, see `mean_return`.
    """
    prefix = "rounds/reward_"
    parts = {name.removeprefix(prefix): array for name, array in metrics.items() if name.startswith(prefix)}
    return {name: _of_episodes(array) for name, array in parts.items() if np.nan_to_num(array).any()}


def mean_return(metrics: dict[str, np.ndarray]) -> np.ndarray:
    """f[R]"""
    return _of_episodes(metrics["rounds/reward"])


def _of_episodes(rewards: np.ndarray) -> np.ndarray:
    """f[R, P, E, T] -> f[R]. The first epoch, before any decision, earns nothing."""
    return np.nansum(rewards, axis=-1, dtype=np.float64).mean((1, 2))


def decisions(metrics: dict[str, np.ndarray], arm: str) -> tuple[np.ndarray, dict[tuple[Op, Stage], np.ndarray]]:
    """What an arm asked for: the share of its decisions at each epoch, f[T], NaN before the first one.

    Returns:
      by operation: f[ops, T], which sum to 1.
      by operation and the stage that the slot was in when it was asked for: f[T] each, without those that never are.
      Waiting has no slot.
    """
    here = metrics["arms/names"] == arm
    op, slot, stage = (metrics[f"arms/{name}"][here] for name in ("requested_op", "slot", "stage"))
    decided = metrics["arms/decision_valid"][here]
    n = decided.sum((0, 1))
    share = lambda chosen: np.where(n > 0, (chosen & decided).sum((0, 1)) / np.maximum(n, 1), np.nan)
    empty = np.full_like(stage[:, :, :1], Stage.DORMANT)
    before = np.take_along_axis(np.concatenate([empty, stage[:, :, :-1]], 2), slot[..., None].astype(int), -1)[..., 0]
    by_stage = {
        (kind, at): share((op == kind) & (before == at)) for kind in Op if kind != Op.WAIT for at in Stage
    }  # fmt: skip
    return np.stack([share(op == kind) for kind in Op]), {
        pair: shares for pair, shares in by_stage.items() if np.nan_to_num(shares).any()
    }
