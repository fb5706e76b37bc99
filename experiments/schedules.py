"""Schedules of growth that know nothing of a policy, found on the keys that policies are trained on.

A plan is i32[S, 3]: of each slot the seed's kind, the epochs trained before it germinates, and its tempo, as
`baselines.planned` carries them out. What a plan is worth is what a policy would be paid for it, the return of its
episodes; the report-test split is never looked at. Axis letters: N plans, E environments, S slots.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from esper_jax.config import Config
from esper_jax.enums import PLANNED, TEMPO_EPOCHS
from esper_jax.train import episodes, round_key
from experiments.finished import Finished

AFTER = 6  # epochs that the fastest seed needs from its germination until it is kept
SINGLE_ENVS = 8  # environments in which every plan of one seed is played, and every candidate at first
MOST_CANDIDATES = 289  # plans of several seeds: for two slots the 16 best of each, and none
KEEP, LAST_ENVS = 3, 64  # one in so many candidates stays, in so many times the environments; enough to choose the last
MOST_SLOTS = 3  # that are searched together


class Found(NamedTuple):
    """The best plan of a search."""

    plan: np.ndarray  # i32[S, 3]
    worth: float  # mean return in the last environments that it was played in
    plans: int  # that were tried
    episodes: int  # that were played for it


def worth(of: Finished, plans: np.ndarray, envs: range) -> np.ndarray:
    """f[N, E]: returns of plans i32[N, S, 3], in environments of the round after the last."""
    who = episodes(of.cfg, of.train.controllers, [(PLANNED, 0, env) for _ in plans for env in envs])
    who = who._replace(orders=who.orders._replace(plan=np.repeat(plans, len(envs), axis=0).astype(np.int32)))
    _, played = of.train.play(round_key(of.key, of.cfg.rounds), of.run, who, report=False)
    return np.asarray(played.rollout.reward[:, 1:].sum(1)).reshape(len(plans), len(envs))


def kinds(cfg: Config) -> list[int]:
    """Of what may be germinated."""
    return [cfg.lifecycle.catalog.index(name) for name in cfg.lifecycle.offered]


def everywhere(cfg: Config, kind: int, period: int = 0) -> np.ndarray:
    """One kind in every slot: all at once, or the next slot so many epochs after the one before it."""
    return np.array([(kind, 1 + slot * period, 0) for slot in range(len(cfg.host.slot_names))])


def tuned_periodic(of: Finished) -> Found:
    """The best kind and period for growing slot after slot, in the environments of one round."""
    slots, epochs = len(of.cfg.host.slot_names), of.cfg.training.epochs
    periods = [p for p in (1, 2, 3, 4, 6, 8, 10, 12, 16, 24) if (slots - 1) * p + AFTER < epochs]
    plans = np.array([everywhere(of.cfg, kind, p) for kind in kinds(of.cfg) for p in periods or [1]])
    found = worth(of, plans, range(of.cfg.n_envs)).mean(1)
    return Found(plans[found.argmax()], float(found.max()), len(plans), len(plans) * of.cfg.n_envs)


def oracle(of: Finished, say: Callable[[str], None] = lambda line: None) -> Found:
    """The best plan: exhaustive for one seed, successive halving (Jamieson and Talwalkar, 2016) for up to three.

    Every slot x kind x start x tempo is played alone. The best of each slot, and an empty one, are combined, and the
    better third of the combinations is played in three times the environments, until few are left. So a pair whose
    parts are poor alone is not found: what is found is a lower bound of what is possible.
    """
    cfg, slots = of.cfg, len(of.cfg.host.slot_names)
    starts = range(1, max(2, cfg.training.epochs - AFTER))
    single = [(k, start, tempo) for k in kinds(cfg) for start in starts for tempo in range(len(TEMPO_EPOCHS))]
    plans = np.zeros((slots, len(single), slots, 3), int)
    plans[range(slots), :, range(slots)] = single
    say(f"  {slots * len(single)} plans of one seed x {SINGLE_ENVS} environments")
    alone = worth(of, plans.reshape(-1, slots, 3), range(SINGLE_ENVS)).mean(1).reshape(slots, len(single))
    tried, played = alone.size, alone.size * SINGLE_ENVS

    together = np.argsort(-alone.max(1), kind="stable")[:MOST_SLOTS]
    most = int(MOST_CANDIDATES ** (1 / len(together)) + 1e-9) - 1
    best = {s: [(0, 0, 0), *(single[i] for i in np.argsort(-alone[s], kind="stable")[:most])] for s in together}
    choices = [best[s] if s in best else [(0, 0, 0)] for s in range(slots)]
    candidates = np.array(list(itertools.product(*choices)))
    envs, values = SINGLE_ENVS, np.zeros((len(candidates), 0))
    tried += len(candidates)
    while True:
        fresh = range(values.shape[1], envs)
        say(f"  {len(candidates)} plans of up to {len(together)} seeds x {len(fresh)} more environments")
        values = np.concatenate([values, worth(of, candidates, fresh)], axis=1)
        played += len(candidates) * len(fresh)
        order = np.argsort(-values.mean(1), kind="stable")
        if envs >= LAST_ENVS or len(candidates) == 1:
            return Found(candidates[order[0]], float(values[order[0]].mean()), tried, played)
        order = order[: max(1, len(candidates) // KEEP)]
        candidates, values, envs = candidates[order], values[order], min(envs * KEEP, LAST_ENVS)


def most_frequent(actions: np.ndarray) -> np.ndarray:
    """The sequence of actions i32[T, 8] that most of i32[N, T, 8] are; of equally frequent ones, or where all differ,
    the one that agrees with the others in most epochs."""
    same = (actions[:, None] == actions[None]).all(-1)  # [N, N, T]
    return actions[max(range(len(actions)), key=lambda n: (same[n].all(-1).sum(), same[n].mean()))]


def in_words(plan: np.ndarray, cfg: Config) -> str:
    """Such as "slot 0: conv_light after 3 epochs, blended in over 5"."""
    parts = [
        f"slot {slot}: {cfg.lifecycle.catalog[kind]} after {start} epochs, blended in over {TEMPO_EPOCHS[tempo]}"
        for slot, (kind, start, tempo) in enumerate(plan)
        if kind > 0
    ]
    return "; ".join(parts) or "nothing is grown"
