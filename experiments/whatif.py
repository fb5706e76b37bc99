"""What if the policy had done something else? Every legal action at a moment of training, played to its end.

    python -m experiments.whatif RUN --env I --epoch T [--round R] [--policy P] [--lucks K]
    python -m experiments.whatif RUN --moments M

A run is a function of its keys, so any moment of it can be had again: the episode of policy P in environment I of round
R, before epoch T. There each legal action is played once with each of K lucks: other batches, other draws of the policy
and another new seed from that epoch on, the same for all actions (common random numbers). After the action the policy
goes on by itself.

The *return* of an episode is what the critic was trained to predict: the discounted rewards from the moment on, up to
a rollback. An action's *true advantage* is its return minus that of episodes in which the policy decides itself, with
the same lucks. The *critic's advantage* is r + gamma V(s') - V(s), mean over the lucks. Both are in units of reward:
what the learner sees, clipped and a rollback's fine included, times the deviation that it divides rewards by. The r and
s' of a luck are in its return, too, so the two are correlated across lucks: one by half of them, one by the other half.

Axis letters: N episodes, T epochs, A actions of a moment, K lucks, M moments.
"""

from __future__ import annotations

import itertools
import sys
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from esper_jax.config import Config, number
from esper_jax.control import normalizers, policy
from esper_jax.enums import (
    ALPHA_CURVES,
    ALPHA_SPEED_EPOCHS,
    ALPHA_TARGETS,
    HEADS,
    POLICY,
    RELEVANT_HEADS,
    STYLES,
    TEMPO_EPOCHS,
    Op,
)
from esper_jax.env import observation
from esper_jax.evidence.statistics import Interval, mean_interval, rank_correlation, signed
from esper_jax.evidence.tables import text_table
from esper_jax.run import command, compilation, estimate, files, folder, options, provenance, records
from esper_jax.run.compilation import prepare
from esper_jax.run.console import Console
from esper_jax.train import Rollout, episodes, round_key
from esper_jax.types import Action, Masks
from experiments.finished import Finished, open_run, state_at

PROGRAM = "python -m experiments.whatif"
MOST_ACTIONS = 12  # of each of many moments
NO_ORDER = np.full(len(HEADS), -1, np.int32)
_OP = HEADS.index("op")


class Moment(NamedTuple):
    """Before an epoch, from 1 on, of a policy's episode in an environment."""

    policy: int
    env: int
    epoch: int


class Judgement(NamedTuple):
    """Actions at a moment, and what became of them. Numbers are in units of reward."""

    moment: Moment
    actions: np.ndarray  # i32[A, 8] in the order of HEADS
    returns: np.ndarray  # f[A, K]
    own: np.ndarray  # f[K] returns where the policy decides itself
    expected: np.ndarray  # f[A, K] the critic's advantages, by luck
    value: float  # what the critic expects at the moment

    @property
    def advantages(self) -> np.ndarray:
        """f[A, K] true ones, by luck."""
        return self.returns - self.own

    @property
    def critic(self) -> np.ndarray:
        """f[A] the critic's advantages."""
        return self.expected.mean(1)

    @property
    def correlation(self) -> float:
        """Of the critic's advantages by the even lucks with the true ones by the odd, by rank, and the reverse: their
        mean. NaN of one luck."""
        return (self._across(self.expected, 0) + self._across(self.expected, 1)) / 2

    @property
    def agreement(self) -> float:
        """The same of the true ones by the even lucks with those by the odd: what noise leaves for a critic to reach,
        were it to see half of the lucks. NaN of one luck."""
        return self._across(self.advantages, 0)

    def _across(self, advantages: np.ndarray, first: int) -> float:
        """Rank correlation of advantages f[A, K] by every second luck from the first on with true ones by the rest."""
        if advantages.shape[1] < 2:
            return float("nan")
        return rank_correlation(advantages[:, first::2].mean(1), self.advantages[:, 1 - first :: 2].mean(1))


def legal_actions(masks: Masks) -> np.ndarray:
    """i32[A, 8]: each legal action once, waiting first; heads that its op does not read are canonical. The masks are
    those of one observation."""
    canonical, found = Action(), []
    for op in map(Op, np.flatnonzero(masks.op)):
        choices = []
        for head in HEADS:
            if head == "op":
                choices.append([int(op)])
            elif head not in RELEVANT_HEADS[op]:
                choices.append([int(getattr(canonical, head))])
            else:
                mask = masks.slot_by_op[op] if head == "slot" else getattr(masks, head)
                choices.append(np.flatnonzero(mask).tolist())
        found += itertools.product(*choices)
    return np.array(found, np.int32)


def in_words(action: np.ndarray, cfg: Config) -> str:
    """As in a line of a script.

    >>> in_words(np.array([1, 3, 2, 1, 2, 0, 0, Op.GERMINATE]), Config())
    'germinate slot=1 blueprint=norm style=sigmoid_add tempo=5 alpha_target=1.0'
    """
    names: dict[str, Sequence[Any]] = {
        "slot": range(len(cfg.host.slot_names)), "blueprint": cfg.lifecycle.catalog, "style": STYLES,
        "tempo": TEMPO_EPOCHS, "alpha_target": ALPHA_TARGETS, "alpha_speed": ALPHA_SPEED_EPOCHS,
        "alpha_curve": [curve.name.lower() for curve in ALPHA_CURVES],
    }  # fmt: skip
    op, indices = Op(action[_OP]), dict(zip(HEADS, action.tolist(), strict=True))
    return " ".join([op.name.lower(), *(f"{head}={names[head][indices[head]]}" for head in RELEVANT_HEADS[op])])


def play(
    opened: Finished, round_number: int, moments: Sequence[Moment], actions: np.ndarray, lucks: Sequence[int]
) -> Rollout:
    """Episodes [N] in the environments of a round that are the run's own up to a moment each.

    Args:
      opened: the run as it was before that round.
      actions: i32[N, 8] what is done at the moment; `NO_ORDER`: what the policy decides.
      lucks: from the moment on; 0 is the run's own.
    """
    who = episodes(opened.cfg, opened.train.controllers, [(POLICY, moment.policy, moment.env) for moment in moments])
    for n, moment in enumerate(moments):
        who.orders.action[n, moment.epoch] = actions[n]
        who.orders.luck[n, moment.epoch :] = lucks[n]
    return opened.train.play(round_key(opened.key, round_number), opened.run, who, report=False)[1].rollout


def judged(opened: Finished, policies: np.ndarray, rows: Rollout) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns, the critic's values and its advantages at each decision of episodes, f64[N, T] each; the birth has none,
    and its numbers mean nothing. The unit is that of the rewards by which the critic learned last."""
    scale = np.sqrt(np.asarray(opened.run.returns.var, np.float64)[policies] + normalizers.EPS)  # [N, 1]
    gamma = np.asarray(opened.run.hypers.ppo.gamma, np.float64)[policies, None]
    fine = np.asarray(rows.info.components.death_penalty, np.float64)
    clip = opened.cfg.reward.clip
    reward = scale * (fine + np.clip((rows.reward - fine) / scale, -clip, clip))
    value, ahead = scale * rows.value, gamma * ~rows.terminal
    returns = np.zeros_like(reward)
    after = np.zeros_like(scale)
    for t in reversed(range(reward.shape[1])):
        after = reward[:, t : t + 1] + ahead[:, t : t + 1] * after
        returns[:, t : t + 1] = after
    later = np.concatenate([value[:, 1:], np.zeros_like(scale)], axis=1)
    return returns, value, reward + ahead * later - value


def judge(
    opened: Finished, round_number: int, moments: Sequence[Moment], actions: Sequence[np.ndarray], lucks: Sequence[int]
) -> list[Judgement]:
    """Plays actions i32[A, 8] at each moment of a round, with each of some lucks, all in one call."""
    asked = [np.concatenate([some, NO_ORDER[None]]) for some in actions]
    each = [
        (moment, action, luck) for moment, some in zip(moments, asked, strict=True) for action in some for luck in lucks
    ]
    rows = play(opened, round_number, [m for m, *_ in each], np.array([a for _, a, _ in each]), [k for *_, k in each])
    at = np.arange(len(each)), np.array([moment.epoch for moment, *_ in each])
    policies = np.array([moment.policy for moment, *_ in each])
    returns, value, critic = (array[at] for array in judged(opened, policies, rows))
    found, end = [], 0
    for moment, some in zip(moments, asked, strict=True):
        mine, end = slice(end, end + len(some) * len(lucks)), end + len(some) * len(lucks)
        by_luck = lambda array, mine=mine, some=some: array[mine].reshape(len(some), len(lucks))
        earned = by_luck(returns)
        expected = by_luck(critic)[:-1]
        found.append(Judgement(moment, some[:-1], earned[:-1], earned[-1], expected, float(value[mine][0])))
    return found


def probabilities(opened: Finished, moment: Moment, episode: Rollout, actions: np.ndarray) -> np.ndarray:
    """f[A]: how likely the policy was to choose each action at a moment of an episode [T]."""
    run, space = opened.run, opened.cfg.action_space
    params, statistics, sight = jax.tree.map(
        lambda leaf: leaf[moment.policy], (run.learner.params, run.observations, run.hypers.sight)
    )
    features = normalizers.seen(statistics, jnp.asarray(episode.features), observation.is_time(space), sight)
    masks = jax.tree.map(lambda leaf: jnp.asarray(leaf[moment.epoch]), episode.masks)
    so_far = slice(1, moment.epoch + 1)  # no decision is made at birth

    @jax.jit
    def likely(actions: Action) -> jax.Array:
        start = policy.initial_carry(policy.hidden_size(params))
        logits, _ = policy.unroll(space, params, start, features[so_far], jnp.asarray(episode.reset[so_far]))
        last = {head: leaf[-1] for head, leaf in logits.items()}
        return jnp.exp(jax.vmap(lambda action: policy.evaluate(last, masks, action).log_prob)(actions))

    return np.asarray(likely(Action(**dict(zip(HEADS, jnp.asarray(actions).T, strict=True)))))


def as_recorded(opened: Finished, round_number: int, moments: Sequence[Moment], rows: Rollout) -> str:
    """A line on how episodes [N] of a round without orders compare to what the run recorded."""
    if round_number == opened.cfg.rounds:
        return f"round {round_number} was not trained on: the last policy in new environments"
    arrays = records.read_arrays(opened.folder / "metrics.npz")
    policies, envs = (np.array([getattr(moment, name) for moment in moments]) for name in ("policy", "env"))
    now = records.rollout_arrays(rows)
    then = {name: arrays[f"rounds/{name}"][round_number, policies, envs] for name in now if f"rounds/{name}" in arrays}
    if all(now[name].tobytes() == then[name].tobytes() for name in then):
        return f"round {round_number}: as recorded, bit by bit"
    apart = np.abs(np.nan_to_num(now["reward"]) - np.nan_to_num(then["reward"])).max()
    other = [name for name in ("requested_op", "slot") if not np.array_equal(now[name], then[name], equal_nan=True)]
    decisions = "other decisions" if other else "the same decisions"
    why = "another machine or version, or another place in a chunk, rounds otherwise"
    return f"round {round_number}: not the recorded bits: {decisions}, rewards differ by at most {apart:.1g} ({why})"


def announce(opened: Finished, console: Console, moments: Sequence[Moment], played: int, lucks: int) -> None:
    """Says how many episodes are played, and about how long that takes. A replay was played just now."""
    cfg = opened.cfg
    twins = lucks * len({(moment.env, moment.epoch) for moment in moments})
    size, _ = estimate.episodes(cfg, 0)
    blocks = -(-(played + twins) // size)
    seconds = blocks * console.durations["replay"]
    console.say(f"  {played} episodes and {twins} twins, in {blocks} blocks of {size}: about {seconds:.0f} s")


def half(interval: Interval) -> str:
    """What stands behind a ±."""
    return "-" if np.isnan(interval.half) else f"{interval.half:.2f}"


def check_range(name: str, value: int, first: int, last: int, why: str = "") -> None:
    """Raises ValueError naming the option."""
    if not first <= value <= last:
        raise ValueError(f"--{name} {value}: must be from {first} to {last}{why}")


def check_moment(cfg: Config, given: dict[str, int | None]) -> None:
    """Raises ValueError for a number of policy, env or epoch, where it is given, that the run does not have."""
    born = "; the first epoch, 0, comes before any decision"
    for name, first, last, why in (
        ("policy", 0, cfg.policy_seeds - 1, ""),
        ("env", 0, cfg.n_envs - 1, ""),
        ("epoch", 1, cfg.training.epochs - 1, born),
    ):
        if (value := given[name]) is not None:
            check_range(name, value, first, last, why)


COLUMNS = (
    "rank", "action", *(head for head in HEADS if head != "op"), "probability", "advantage", "low", "high", "critic",
    "taken",
)  # fmt: skip


def table(found: Judgement, likely: np.ndarray, taken: int, cfg: Config) -> list[dict[str, Any]]:
    """A row for each action, the best first, with the columns `COLUMNS`; `taken` is the number of the run's own."""
    rows, true = [], found.advantages.mean(1)
    for a in np.argsort(-true, kind="stable").tolist():
        word, *values = in_words(found.actions[a], cfg).split()
        interval = mean_interval(found.advantages[a])
        read = dict(value.split("=", 1) for value in values)
        row = {head: read.get(head, "") for head in HEADS if head != "op"}
        row |= {"action": word, "probability": float(likely[a]), "critic": float(found.critic[a]), "taken": a == taken}
        row |= {"advantage": interval.mean, "low": interval.low, "high": interval.high}
        rows.append(row | {"rank": 1 + int((true > true[a]).sum())})
    return rows


def shown(rows: list[dict[str, Any]]) -> str:
    """The ten best, the five worst, and the one that the run took."""
    columns = ("action", "rank", "true advantage", "critic's", "probability", "")
    cells = []
    for place, row in enumerate(rows):
        if place < 10 or place >= len(rows) - 5 or row["taken"]:
            words = " ".join([row["action"], *(f"{head}={row[head]}" for head in HEADS if row.get(head))])
            interval = Interval(row["advantage"], row["low"], row["high"], 0)
            mark = "taken" if row["taken"] else ""
            true = f"{signed(interval.mean)} ± {half(interval)}"
            cells.append([words, str(row["rank"]), true, signed(row["critic"]), f"{row['probability']:.2g}", mark])
    return text_table(columns, cells)


def sentence(found: Judgement, taken: int, gain: Interval | None, lucks: int, cfg: Config) -> str:
    """What a person may take home; `gain` is that of the best action over the one taken, with other lucks."""
    true = found.advantages.mean(1)
    best, rank = int(true.argmax()), 1 + int((true > true[taken]).sum())
    words = lambda a: in_words(found.actions[a], cfg)
    parts = [f"The action taken, {words(taken)}, ranks {rank} of {len(true)}"]
    if gain is not None:
        more = f"{abs(gain.mean):.2f} ± {half(gain)} {'more' if gain.mean >= 0 else 'less'}"
        parts.append(f"the best, {words(best)}, gains {more} with {lucks} other lucks, by which it was not chosen")
    parts.append(f"by half of the lucks, the critic's ranking correlates {signed(found.correlation)} with the truth by "
                 f"the other half, and the truth {signed(found.agreement)}")  # fmt: skip
    return "; ".join(parts) + "."


def one_moment(opened: Finished, console: Console, round_number: int, moment: Moment, lucks: int, path: Path) -> None:
    """All legal actions at a moment: a table, a sentence, a picture.

    Args:
      path: of the files to write, without their suffixes.
    """
    cfg = opened.cfg
    place = f"round {round_number}, environment {moment.env}, epoch {moment.epoch}, policy {moment.policy}"
    with console.step("replay", place) as said:
        rows = play(opened, round_number, [moment], NO_ORDER[None], [0])
        said.append(as_recorded(opened, round_number, [moment], rows))
    episode = jax.tree.map(lambda leaf: leaf[0], rows)
    actions = legal_actions(jax.tree.map(lambda leaf: leaf[moment.epoch], episode.masks))
    if len(actions) == 1:
        raise ValueError(f"--epoch {moment.epoch}: only waiting is legal then in environment {moment.env}")
    did = np.array([getattr(episode.action, head)[moment.epoch] for head in HEADS])
    (taken,) = np.flatnonzero((actions == did).all(1)).tolist()
    announce(opened, console, [moment], (len(actions) + 1) * lucks, lucks)
    with console.step("actions", f"{len(actions)} legal ones, {lucks} lucks"):
        (found,) = judge(opened, round_number, [moment], [actions], range(1, lucks + 1))
    true, gain = found.advantages.mean(1), None
    if true[taken] < true.max():
        best = int(true.argmax())
        with console.step("best", "and the one taken, with other lucks"):
            # the best of many by noisy means is not as good as it looks, so it is judged again
            (again,) = judge(opened, round_number, [moment], [actions[[best, taken]]], range(lucks + 1, 2 * lucks + 1))
        gain = mean_interval(again.returns[0] - again.returns[1])
    likely = probabilities(opened, moment, episode, actions)
    results = table(found, likely, taken, cfg)
    console.say(shown(results), always=True)
    own = mean_interval(found.own)
    console.say(f"± 95 %, Student's t over {lucks} lucks, in units of reward. The critic expects "
                f"{signed(found.value)} from here, and the policy gets {signed(own.mean)} ± {half(own)}.",
                always=True)  # fmt: skip
    said = sentence(found, taken, gain, lucks, cfg)
    console.say(f"\n{said}\n", always=True)
    records.write_csv(Path(f"{path}.csv"), results, COLUMNS)
    draw_moment(Path(f"{path}.png"), found, taken, cfg, f"What if: {place}")
    console.say(f"wrote {path}.csv and .png", always=True)


MANY_COLUMNS = (
    "policy", "env", "epoch", "action", "advantage", "low", "high", "critic", "return", "value"
)  # fmt: skip


def many_moments(
    opened: Finished,
    console: Console,
    round_number: int,
    given: dict[str, int | None],
    count: int,
    lucks: int,
    path: Path,
) -> None:
    """Some actions at each of many moments of a round, drawn at random: is the critic right?"""
    cfg = opened.cfg
    # a moment of each episode, before which nothing is asked of it
    everyone = [Moment(p, e, 1) for p in range(cfg.policy_seeds) for e in range(cfg.n_envs)]
    with console.step("replay", f"round {round_number}, all its episodes") as said:
        rows = play(opened, round_number, everyone, np.repeat(NO_ORDER[None], len(everyone), 0), [0] * len(everyone))
        said.append(as_recorded(opened, round_number, everyone, rows))
    choice = np.delete(rows.masks.op, int(Op.WAIT), axis=-1).any(-1)
    every = [(n, everyone[n]._replace(epoch=t)) for n, t in np.argwhere(choice).tolist() if t > 0]
    there = [(n, m) for n, m in every if all(value in (None, getattr(m, key)) for key, value in given.items())]
    if count > len(there):
        raise ValueError(f"--moments {count}: there are {len(there)} at which more than waiting is legal")
    draw = np.random.default_rng([cfg.seed, round_number])
    moments, actions = [], []
    for n, moment in (there[i] for i in sorted(draw.choice(len(there), count, replace=False).tolist())):
        legal = legal_actions(jax.tree.map(lambda leaf, n=n, t=moment.epoch: leaf[n, t], rows.masks))
        moments.append(moment)
        actions.append(legal[np.sort(draw.choice(len(legal), min(len(legal), MOST_ACTIONS), replace=False))])
    played = sum(len(some) + 1 for some in actions) * lucks
    announce(opened, console, moments, played, lucks)
    with console.step("moments", f"{count} moments, at most {MOST_ACTIONS} actions each, {lucks} lucks"):
        found = judge(opened, round_number, moments, actions, range(1, lucks + 1))
    console.say("\n".join(summary(found, lucks)), always=True)
    records.write_csv(Path(f"{path}.csv"), list(many_rows(found, cfg)), MANY_COLUMNS)
    draw_moments(Path(f"{path}.png"), found, f"Critic and truth: {count} moments of round {round_number}")
    console.say(f"wrote {path}.csv and .png", always=True)


def many_rows(found: Sequence[Judgement], cfg: Config) -> Iterable[dict[str, Any]]:
    for each in found:
        for a, action in enumerate(each.actions):
            interval = mean_interval(each.advantages[a])
            yield {
                **each.moment._asdict(), "action": in_words(action, cfg), "advantage": interval.mean,
                "low": interval.low, "high": interval.high, "critic": float(each.critic[a]),
                "return": float(each.own.mean()), "value": each.value,
            }  # fmt: skip


def summary(found: Sequence[Judgement], lucks: int) -> list[str]:
    """What many moments say of a critic, as lines. Correlations of moments are averaged as they are, and the interval
    is cut off at -1 and 1: Fisher's z has no mean where some are -1 or 1, as those of two actions always are."""
    value, truth = np.array([each.value for each in found]), np.array([each.own.mean() for each in found])
    error = mean_interval(value - truth)
    by_moment = lambda name: mean_interval(np.array([getattr(each, name) for each in found]))
    cut = lambda mean: mean._replace(low=float(np.clip(mean.low, -1, 1)), high=float(np.clip(mean.high, -1, 1)))
    ranks = [cut(by_moment(name)) for name in ("correlation", "agreement")]
    values = rank_interval(rank_correlation(value, truth), len(found))
    cells = [
        ["V(s) with the return, over moments", *_cells(values)],
        ["V(s) minus the return, in units of reward", *_cells(error)],
        ["advantages of a moment: the critic's by half of the lucks with true ones by the others", *_cells(ranks[0])],
        ["advantages of a moment: true ones by half of the lucks with true ones by the others", *_cells(ranks[1])],
    ]
    note = f"Rank correlations (Spearman) but for the second row; 95 % intervals over moments; {lucks} lucks. A moment "
    note += "at which all actions return the same has no correlation. The last row is what noise leaves to be found."
    return [text_table(("", "mean", "interval", "moments"), cells), note]


def _cells(interval: Interval) -> list[str]:
    return [signed(interval.mean), f"[{signed(interval.low)}, {signed(interval.high)}]", str(interval.n)]


def rank_interval(correlation: float, n: int) -> Interval:
    """A rank correlation of n pairs with its 95 % interval, by Fisher's z with the variance (1 + r^2 / 2) / (n - 3) of
    Bonett and Wright (2000); no interval of fewer than four pairs."""
    if n < 4 or np.isnan(correlation):
        return Interval(correlation, float("nan"), float("nan"), n)
    z = np.arctanh(np.clip(correlation, -1 + 1e-12, 1 - 1e-12))
    around = 1.959964 * np.sqrt((1 + correlation**2 / 2) / (n - 3))
    return Interval(correlation, float(np.tanh(z - around)), float(np.tanh(z + around)), n)


def _dots(axes: Any, critic: np.ndarray, advantages: np.ndarray, ops: np.ndarray) -> None:
    """True advantages f[N, K] against the critic's f[N], marked by op, with a line on which both are equal."""
    from esper_jax.evidence import canvas

    interval = mean_interval(advantages, axis=1)
    bars = np.asarray(interval.high) - interval.mean
    for op in map(Op, np.unique(ops)):
        mine = ops == op
        style = {"color": canvas.COLOURS[op], "label": op.name.lower()}
        axes.errorbar(
            critic[mine], np.asarray(interval.mean)[mine], bars[mine], fmt=canvas.MARKERS[op], markersize=4,
            elinewidth=0.6, alpha=0.6, **style,
        )  # fmt: skip
    axes.axline((0, 0), slope=1, color=canvas.INK, linewidth=0.8, linestyle=":", label="equal")
    axes.set_xlabel("critic's advantage (reward)")
    axes.set_ylabel("true advantage (reward), 95 % over lucks")
    canvas.plain_axes(axes)


def draw_moment(path: Path, found: Judgement, taken: int, cfg: Config, title: str) -> None:
    """True and critic's advantages of the actions at a moment."""
    from esper_jax.evidence import canvas  # matplotlib takes a third of a second

    truth = found.advantages.mean(1)

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        _dots(axes, found.critic, found.advantages, found.actions[:, _OP])
        marked = {"best": int(truth.argmax()), "taken": taken, "worst": int(truth.argmin())}
        for (label, a), shape in zip(marked.items(), "*oX", strict=True):
            axes.plot(
                found.critic[a], truth[a], shape, markersize=11, markerfacecolor="none", color=canvas.INK,
                label=textwrap.fill(f"{label}: {in_words(found.actions[a], cfg)}", 62, subsequent_indent="    "),
            )  # fmt: skip
        axes.axhline(0, color=canvas.INK, linewidth=0.8)
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower left", fontsize=8, markerscale=0.8)
        axes.set_title(f"rank correlation {signed(found.correlation)}")

    canvas.png(path, [canvas.Panel(draw, title, height=6.0)], title, 1)


def draw_moments(path: Path, found: Sequence[Judgement], title: str) -> None:
    """Values against returns, and advantages, of many moments."""
    from esper_jax.evidence import canvas

    def values(figure: Any) -> None:
        axes = figure.subplots()
        interval = mean_interval(np.stack([each.own for each in found]), axis=1)
        axes.errorbar(
            [each.value for each in found], interval.mean, np.asarray(interval.high) - interval.mean, fmt="o",
            color=canvas.COLOURS[0], elinewidth=0.6, alpha=0.7,
        )  # fmt: skip
        axes.axline((0, 0), slope=1, color=canvas.INK, linewidth=0.8, linestyle=":", label="equal")
        axes.set_xlabel("V(s) of the critic (reward)")
        axes.set_ylabel("return (reward), 95 % over lucks")
        figure.legend(loc="outside lower left")
        canvas.plain_axes(axes)

    def advantages(figure: Any) -> None:
        axes = figure.subplots()
        together = lambda name: np.concatenate([getattr(each, name) for each in found])
        _dots(axes, together("critic"), together("advantages"), together("actions")[:, _OP])
        figure.legend(loc="outside lower left", ncols=3)

    panels = [canvas.Panel(values, "Values", 4.5), canvas.Panel(advantages, "Advantages", 4.5)]
    canvas.png(path, panels, title, 2)


@dataclass(frozen=True)
class Options:
    """Plays every legal action at a moment of a finished run: what if its policy had done something else?

    With --moments, some actions at many moments: is the critic right?
    """

    run: Annotated[Path, tyro.conf.Positional]
    """folder of the run"""
    round: int | None = None
    """whose environments, and the policy as it was before it, from 0 on; by default the number of rounds: the last
    policy in environments that it was not trained in"""
    env: int | None = None
    """which environment of the round, from 0 on; with --moments, none is any"""
    epoch: int | None = None
    """which epoch the decision begins, from 1 on; with --moments, none is any"""
    policy: int | None = None
    """which of the run's policies, by default 0; with --moments, none is any"""
    lucks: int = number(4, low=2)
    """with how many random numbers each action is played"""
    moments: int | None = number(None, low=1)
    """how many moments are drawn at random instead"""
    data_dir: Path | None = None
    """folder that holds the CIFAR-10 files; none looks where the run did"""
    text: tuple[str, ...] = ()
    """files of the run's text, if they were moved"""


def answer(chosen: Options, console: Console) -> None:
    """Raises ValueError and OSError for what is no finished run, or a moment that it does not have."""
    given = {name: getattr(chosen, name) for name in Moment._fields}
    if chosen.moments is None:
        given["policy"] = given["policy"] or 0
        for name in ("env", "epoch"):
            if given[name] is None:
                raise ValueError(f"--{name}: must be given, or --moments")
    opened = open_run(chosen.run, console, chosen.data_dir, chosen.text)
    cfg = opened.cfg
    round_number = cfg.rounds if chosen.round is None else chosen.round
    check_range("round", round_number, 0, cfg.rounds)
    check_moment(cfg, given)
    moment = None if chosen.moments is not None else Moment(**given)
    name = "moments" if moment is None else f"{moment.env}-{moment.epoch}-{moment.policy}"
    path = opened.folder / f"whatif-{round_number}-{name}"
    files.check_free(Path(f"{path}.csv"), Path(f"{path}.png"))
    if round_number < cfg.rounds:
        opened = state_at(opened, round_number, console)
    with console.step("compile", "what plays episodes"):  # no rounds: none are learned from
        train = compilation.compile_ahead(opened.train, cfg.replace(rounds=0), opened.key)
        opened = opened._replace(train=train)
    if moment is not None:
        one_moment(opened, console, round_number, moment, chosen.lucks, path)
    else:
        many_moments(opened, console, round_number, given, chosen.moments, chosen.lucks, path)


def main(argv: list[str] | None = None) -> int:
    prepare()

    def work() -> None:
        words = sys.argv[1:] if argv is None else argv
        options.check(list(itertools.dropwhile(lambda word: not word.startswith("--"), words)), Options)
        chosen = options.cli(Options, words, prog=PROGRAM)
        provenance.read_finished(chosen.run)  # a lock is laid into the folders of runs alone
        with folder.locked(chosen.run):  # and one that cannot be written to is found out before anything is played
            answer(chosen, Console())

    return command.ended(work)


if __name__ == "__main__":
    command.leave(main())
