"""A run: rounds of E episodes and one PPO update each, and the comparison of controllers (Esper's Simic).

    train = make_train(cfg)
    run = train.init(key)
    run, metrics = train.update(key, run)        # one round; the same key every time, the round number is in `run`
    results = train.compare(key, run, ["never", "eager"])   # episodes of controllers on keys that they all share
    twins, played = train.play(round_key(key, 0), run, who)  # any episodes, see `episodes` and `Orders`

P policies are trained side by side in one program: whatever belongs to one of them has a leading axis P, and policy p
of a run is the one that it would be alone. `run.hypers` too, so a grid of reward weights or learning rates is one run.

This is the only place that maps over environments and over policies. Environment e of round r is a function of
(config, key, r, e) alone, so a run resumes without stored keys, does not depend on how environments are spread over
devices, and shows all its policies the same environments. All controllers, learned or not, go through one compiled
rollout: which one acts in an episode is an argument. So does the *twin* that the reward `paired` compares with: the
same environment under `never`, played beside the policies' episodes.

Keys (`/ x` is `fold_in(x)`, `| a b` a split into a and b):

    key(seed)
      / INIT_STREAM / policy                      parameters of a policy
      / ROUND_STREAM / round   | env learn
          env / environment    | host step act
            host                                  initial parameters of the host
              host / fossils / slot | seed gate   of seeds that it has from birth
            step / epoch       | germination train   (where an episode has another luck: / luck)
              germination / slot | seed gate      parameters of a new seed and its gate
              train / rollbacks  | order augment  batches and their augmentation
            act / policy / epoch                  what a controller draws
          learn / policy                          minibatches of an update
      / COMPARE_STREAM                            env of the comparison, as above

Axis letters: P policies, G rows of episodes (the policies, and the twin if there is one), E environments, T epochs of
an episode, S slots, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from esper_jax import data
from esper_jax.config import Config
from esper_jax.control import baselines, normalizers, policy, ppo
from esper_jax.control.arms import choose, default_controllers
from esper_jax.control.normalizers import RunningStatistics
from esper_jax.enums import BASELINE, GREEDY, HEADS, LEARNED, MATCHED, PLANNED, POLICY, Op, Stage
from esper_jax.env import observation, reward
from esper_jax.env.environment import Grown, StepInfo, make_env
from esper_jax.env.evaluation import Evaluation
from esper_jax.env.reward import RewardComponents, RewardWeights
from esper_jax.run import devices
from esper_jax.run.devices import REPLICATED, SHARDED
from esper_jax.trees import select, strip_weak_type
from esper_jax.types import Action, Array, Controller, Masks, SlotState

# What a run's key is folded with, before the number of the policy, or those of the round and the environment.
INIT_STREAM, ROUND_STREAM, COMPARE_STREAM = range(3)
# What is added to another luck: a key folded with a small number is one of those that it is split into.
LUCK = 2**30


@struct.dataclass
class Hypers:
    """What a study varies without recompiling; of one policy, or of P of them with a leading axis."""

    reward: RewardWeights  # its gamma is not read: the learner's is
    ppo: ppo.Hypers
    sight: Array | float = 1.0  # what observations are multiplied by, but for the time; 0 is blind

    @classmethod
    def from_config(cls, cfg: Config) -> Hypers:
        weights = RewardWeights.from_config(cfg.reward, cfg.ppo.gamma, cfg.lifecycle.min_prune_age)
        return cls(weights, ppo.Hypers.from_config(cfg.ppo))

    @property
    def weights(self) -> RewardWeights:
        """The reward's weights; shaping and learner discount alike."""
        return self.reward.replace(gamma=self.ppo.gamma)


@struct.dataclass
class RunState:
    """Everything that a run carries from round to round; all but `round` have a leading axis P."""

    round: Array  # i32[] rounds done
    hypers: Hypers
    learner: ppo.LearnerState
    observations: RunningStatistics  # [D] of the features; frozen within a round
    returns: RunningStatistics  # [1] of the discounted returns, whose deviation is the unit of the rewards

    def returned(self, then: RunState, policies: np.ndarray) -> RunState:
        """This run, with some of its policies (bool[P]) as they were in an earlier state of it; hypers stay."""
        where = lambda now, before: select(policies.reshape(-1, *[1] * (now.ndim - 1)), before, now)
        names = ("learner", "observations", "returns")
        return self.replace(**{n: jax.tree.map(where, getattr(self, n), getattr(then, n)) for n in names})


@struct.dataclass
class Rollout:
    """Episodes, axes [G, E, T, ...]. Row 0 of T is an episode's birth: its first epoch, before any decision."""

    features: Array  # f32[G, E, T, D] as encoded, not normalised
    masks: Masks
    action: Action
    log_prob: Array  # f32[G, E, T]
    value: Array  # f32[G, E, T]
    reward: Array  # f32[G, E, T]
    terminal: Array  # bool[G, E, T]
    reset: Array  # bool[G, E, T] the controller's memory was cleared before this row
    info: StepInfo


@struct.dataclass
class Metrics:
    """What a round reports."""

    rollout: Rollout  # [P, E, T, ...]
    learner: dict[str, Array]  # [P], see ppo.update; with return_scale, the deviation that rewards are divided by


@struct.dataclass
class Comparison:
    """Episodes of one controller and what the report-test split says about the networks they ended with.

    Axes [P, R, ...] with R = `report_envs`; P is 1 for a rule. Of `play`: [N, ...], an episode each.
    """

    rollout: Rollout
    test: Evaluation | None  # None where only training was asked for
    germinated: Array  # i32[P, R]
    fossilised: Array
    pruned: Array
    rollbacks: Array
    shape: Array  # i32[P, R, S, 2] blueprint and algorithm of what was kept, -1 where nothing was; see `Orders`
    text: Array | None  # i32[P, R, length] what the committed network writes; [P, R, 0] of images


class Programs(NamedTuple):
    """What `Train` is made of: compiled functions, and for `run.compilation` and the benchmark to take apart."""

    rollout: Callable  # (dataset, RunState, key, who: Who [G, E]) -> (Rollout, Grown [G, E])
    pay: Callable  # (Hypers, policies [G, E], Course, twin's losses [G, E, T]) -> RewardComponents
    gather: Callable  # Rollout -> the same on every device
    learn: Callable  # (keys [P], RunState, Rollout of a round) -> (RunState, Rollout of the policies, metrics [P])
    report: Callable  # (dataset, Grown [G, E]) -> (Evaluation, text)
    start: Callable  # (key, Hypers | None) -> RunState, not yet on every device
    keys: Callable  # (key, round number) -> key of its rollout, keys [P] of its updates


class InitRun(Protocol):
    def __call__(self, key: Array, hypers: Hypers | None = None) -> RunState:
        """A run before its first round; `hypers` (by default those of the configuration) of all policies or of each."""


class Update(Protocol):
    def __call__(self, key: Array, run: RunState) -> tuple[RunState, Metrics]:
        """One round."""


class Compare(Protocol):
    def __call__(self, key: Array, run: RunState, controllers: Sequence[str]) -> dict[str, Comparison]:
        """Episodes of controllers on keys that they share."""


class Play(Protocol):
    def __call__(self, key: Array, run: RunState, who: Who, report: bool = True) -> tuple[Comparison, Comparison]:
        """Episodes of one's choice, [N] of everything in `who`, on a key of `round_key` or `report_key`.

        Returns the twins of their environments, in ascending order and once for every luck, and the episodes. Without
        `report` the report-test split stays unseen: what is chosen by such episodes was not chosen by it.
        """


class Train(NamedTuple):
    """Pure functions of a run, see the module's docstring; `programs` is no part of the interface."""

    init: InitRun
    update: Update
    compare: Compare
    play: Play
    controllers: tuple[str, ...]
    dataset: data.Dataset
    programs: Programs


class Orders(NamedTuple):
    """What an episode is told besides who acts in it, i32 with the axes of `Who` in front."""

    shape: np.ndarray  # [S, 2] seeds from birth on, as in `env.init`
    action: np.ndarray  # [T, 8] heads of the actions before each epoch that are played instead; op -1: as controlled
    plan: np.ndarray  # [S, 3] of the controller PLANNED, see `baselines.planned`
    ops: np.ndarray  # [6] of the controller MATCHED, see `baselines.matched`
    luck: np.ndarray  # [T] what the keys of each epoch, of host and controller, are folded with besides; 0: nothing

    @classmethod
    def none(cls, cfg: Config, axes: tuple[int, ...]) -> Orders:
        slots = len(cfg.host.slot_names)
        fill = lambda *shape, value: np.full((*axes, *shape), value, np.int32)
        return cls(
            fill(slots, 2, value=-1), fill(cfg.training.epochs, len(HEADS), value=-1), fill(slots, 3, value=0),
            fill(len(Op), value=0), fill(cfg.training.epochs, value=0),
        )  # fmt: skip


class Who(NamedTuple):
    """Which episodes a rollout plays, i32[G, E] each.

    Arrays of NumPy: of JAX, they would cost a program to fill them and one to split them.
    """

    controller: np.ndarray  # its number in `numbers`
    policy: np.ndarray  # whose parameters and hypers
    env: np.ndarray  # its number
    orders: Orders


def numbers(names: Sequence[str]) -> dict[str, int]:
    """The number of each controller, given those that a run compares."""
    return {name: number for number, name in enumerate((*names, PLANNED, MATCHED))}


def episodes(cfg: Config, names: Sequence[str], who: Sequence[tuple[str, int, int]]) -> Who:
    """Episodes of (controller, policy, environment) without orders, [N] each. Raises ValueError for a name that is
    none of `names`."""
    number = numbers(names)
    for name, *_ in who:
        if name not in number:
            raise ValueError(f"controller {name!r}: must be one of {', '.join(names)}")
    columns = np.array([(number[name], policy, env) for name, policy, env in who], np.int32).reshape(-1, 3).T
    return Who(*map(np.ascontiguousarray, columns), Orders.none(cfg, (len(who),)))


def _round_keys(key: Array, number: Array | int) -> Array:
    return jax.random.split(jax.random.fold_in(jax.random.fold_in(key, ROUND_STREAM), number))


def round_key(key: Array, number: int) -> Array:
    """The key of the environments that a round trains on."""
    return _round_keys(key, number)[0]


def report_key(key: Array) -> Array:
    """The key of the environments that controllers are compared in."""
    return jax.random.fold_in(key, COMPARE_STREAM)


def over_environments(fun: Callable, xs: Any, chunk: int) -> Any:
    """`fun` mapped over the two leading axes [G, E], `chunk` at a time; a fixed chunk makes results independent of
    how many there are. In chunks of more than one, an element's place in its chunk may show in the last bits."""
    shape = jax.tree.leaves(xs)[0].shape[:2]
    flat = jax.tree.map(lambda leaf: leaf.reshape(shape[0] * shape[1], *leaf.shape[2:]), xs)
    out = lax.map(fun, flat) if chunk == 1 else lax.map(fun, flat, batch_size=chunk)
    return jax.tree.map(lambda leaf: leaf.reshape(*shape, *leaf.shape[1:]), out)


def paid(rows: Rollout, components: RewardComponents) -> Rollout:
    """The episodes with another reward."""
    return rows.replace(reward=components.total(), info=rows.info.replace(components=components))


def make_train(
    cfg: Config,
    dataset: data.Dataset | None = None,
    controllers: Mapping[str, Controller] | None = None,
) -> Train:
    """Binds a configuration.

    Args:
      dataset: by default the one that `cfg.data` names.
      controllers: rules to compare the learned policies with, by name; by default `default_controllers(cfg)`. `never`
        is always among them.

    Raises ValueError if environments cannot be spread evenly over the devices, chunks and minibatches.
    """
    mesh = devices.make_mesh(cfg.devices)
    devices.check_divides(mesh, cfg)
    dataset = devices.replicate(data.load(cfg.data) if dataset is None else dataset, mesh)
    rules = dict(default_controllers(cfg) if controllers is None else controllers)
    for name in (*LEARNED, PLANNED, MATCHED):
        if name in rules:
            whose = "the learned policy's" if name in LEARNED else "one that brings its orders along"
            raise ValueError(f"a controller called {name!r} is given: that name is {whose}")
    rules = {BASELINE: baselines.never()} | rules
    space, n_policies, paired = cfg.action_space, cfg.policy_seeds, cfg.reward.mode == "paired"
    n_features = observation.size(space)
    decided = jnp.arange(cfg.training.epochs, dtype=jnp.int32) > 0  # rows that a decision began
    is_time = jnp.asarray(observation.is_time(space))
    names = (*rules, *LEARNED)
    greedy = names.index(GREEDY)

    def rollout(dataset, run: RunState, key, who: Who, axis_name):
        def episode(which: Who):
            number, learner, env_id, orders = which
            params, statistics, hypers = jax.tree.map(
                lambda leaf: leaf[learner], (run.learner.params, run.observations, run.hypers)
            )
            env = make_env(cfg, dataset, hypers.weights)
            look = partial(normalizers.seen, statistics, is_time=is_time, sight=hypers.sight)
            learned = policy.make_controller(space, params, look, deterministic=number == greedy)
            told = baselines.planned(orders.plan, lifecycle=cfg.lifecycle), baselines.matched(orders.ops)
            controller = choose([*rules.values(), learned, *told], number - (number >= greedy).astype(jnp.int32))
            init_key, step_key, act_key = jax.random.split(jax.random.fold_in(key, env_id), 3)
            act_key = jax.random.fold_in(act_key, learner)
            state = env.init(init_key, orders.shape)
            fresh = controller.init(act_key)

            def epoch(carry, t):
                state, obs, memory, reset = carry
                memory = select(reset, fresh, memory)
                luck = orders.luck[t]
                step_now, act_now = (
                    jnp.where(luck == 0, now, jax.random.fold_in(now, LUCK + luck))
                    for now in (jax.random.fold_in(step_key, t), jax.random.fold_in(act_key, t))
                )
                thought, action, extras = controller.act(act_now, memory, obs)
                order = Action(**dict(zip(HEADS, orders.action[t], strict=True)))
                action = select(order.op >= 0, order, action)
                # a newborn environment trains its first epoch before there is anything to decide
                birth = t == 0
                memory, action = select(birth, (memory, Action()), (thought, action))
                new_state, new_obs, earned, _, info = env.step(step_now, state, action)
                terminal = info.discount == 0
                row = Rollout(
                    obs.features, obs.masks, action, extras.log_prob, extras.value, earned, terminal, reset, info
                )
                return (new_state, new_obs, memory, terminal), row

            start = (state, env.observe(state), fresh, jnp.bool_(False))
            (state, *_), rows = lax.scan(epoch, start, jnp.arange(cfg.training.epochs, dtype=jnp.int32))
            return rows, Grown.of(state)

        return over_environments(episode, who, cfg.env_chunk)

    def pay(hypers: Hypers, policies, course: reward.Course, twin_loss, axis_name=None):
        """The reward `paired`; the policies [G, E] say by whose weights."""
        fine = reward.death(cfg.governor.death_penalty, cfg.reward.clip)

        def one(learner, course, twin_loss):
            weights = jax.tree.map(lambda leaf: leaf[learner], hypers.weights)
            return reward.paired(course, twin_loss, weights, fine)

        return jax.vmap(jax.vmap(one))(policies, course, twin_loss)

    def learn_one(key, hypers: Hypers, learner, observations, returns, rows: Rollout):
        """One policy's update from rows [E, T, ...]. A round's rewards count for their own unit."""
        clip = cfg.reward.clip
        # the penalty of a rollback keeps its size whatever the other rewards are like
        fine = rows.info.components.death_penalty
        earned = jnp.where(decided, rows.reward - fine, 0.0)
        sums = jax.vmap(partial(ppo.discounted_sums, gamma=hypers.ppo.gamma))(earned, rows.terminal)
        returns = normalizers.update(returns, sums[:, 1:].reshape(-1, 1))
        scale = jnp.sqrt(returns.var[0] + normalizers.EPS)
        trajectory = ppo.Trajectory(
            features=normalizers.seen(observations, rows.features, is_time, hypers.sight),
            masks=rows.masks,
            action=rows.action,
            log_prob=rows.log_prob,
            value=rows.value,
            reward=fine + jnp.clip(earned / scale, -clip, clip),
            terminal=rows.terminal,
            valid=jnp.broadcast_to(decided, rows.reward.shape),
            reset=rows.reset,
        )
        trajectory = jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), trajectory)
        learner, metrics = ppo.update(key, learner, trajectory, cfg=cfg.ppo, space=space, hypers=hypers.ppo)
        seen = rows.features[:, 1:].reshape(-1, n_features)
        observations = normalizers.update(observations, seen)
        return learner, observations, returns, metrics | {"return_scale": scale}

    def learn(keys, run: RunState, rows: Rollout):
        played = jax.tree.map(lambda leaf: leaf[:n_policies], rows)
        if paired:
            policies = jnp.broadcast_to(jnp.arange(n_policies, dtype=jnp.int32)[:, None], played.reward.shape[:2])
            twin = rows.info.val_loss[n_policies], rows.info.accepted[n_policies]
            twin_loss = jnp.broadcast_to(jax.vmap(reward.last_accepted)(*twin), played.reward.shape)
            played = paid(played, pay(run.hypers, policies, reward.Course.of(played.info), twin_loss))
        each = (keys, run.hypers, run.learner, run.observations, run.returns, played)
        learner, observations, returns, metrics = lax.map(lambda x: learn_one(*x), each)
        return RunState(run.round + 1, run.hypers, learner, observations, returns), played, metrics

    def report(dataset, grown, axis_name):
        env = make_env(cfg, dataset)
        return over_environments(lambda grown: (env.report(grown), env.write(grown)), grown, cfg.env_chunk)

    def each_policy(key):
        return jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(n_policies, dtype=jnp.int32))

    def start(key, hypers: Hypers | None = None):
        def one(key):
            learner = ppo.init_learner(key, cfg.ppo, space, n_features)
            return learner, normalizers.init(n_features), normalizers.init(1)

        def spread(path, leaf):
            if jnp.shape(leaf) not in ((), (n_policies,)):
                name = jax.tree_util.keystr(path)
                raise ValueError(f"hypers{name} has the shape {jnp.shape(leaf)}: must be () or ({n_policies},)")
            return jnp.broadcast_to(jnp.asarray(leaf, jnp.float32), (n_policies,))

        hypers = Hypers.from_config(cfg) if hypers is None else hypers
        hypers = jax.tree_util.tree_map_with_path(spread, hypers)
        policies = lax.map(one, each_policy(jax.random.fold_in(key, INIT_STREAM)))
        return strip_weak_type(RunState(jnp.int32(0), hypers, *policies))

    def keys(key, number):
        env_key, learn_key = _round_keys(key, number)
        return env_key, each_policy(learn_key)

    programs = Programs(
        rollout=devices.over_devices(rollout, mesh, (*[REPLICATED] * 3, SHARDED), SHARDED),
        pay=devices.over_devices(pay, mesh, (REPLICATED, SHARDED, SHARDED, SHARDED), SHARDED),
        gather=devices.gathered(mesh),
        learn=jax.jit(learn),
        report=devices.over_devices(report, mesh, (REPLICATED, SHARDED), SHARDED),
        start=jax.jit(start),
        keys=jax.jit(keys),
    )
    return bind(cfg, dataset, names, programs)


def bind(cfg: Config, dataset: data.Dataset, names: tuple[str, ...], programs: Programs) -> Train:
    """What users call, on top of the programs of a run: functions of `make_train`, or what was compiled from them.

    Args:
      names: of the controllers, in the order of their numbers.
    """
    rollout, pay, gather, learn, _, start, keys = programs
    mesh = devices.make_mesh(cfg.devices)
    paired, everyone = cfg.reward.mode == "paired", round_of(cfg, names)

    def placed(who: Who) -> Who:
        return devices.split(who, mesh) if devices.several() else who

    def init(key: Array, hypers: Hypers | None = None) -> RunState:
        # those of another run lie on all devices, and drawing parameters there never came to an end (jax 0.10 on CPUs)
        hypers = hypers if hypers is None else devices.fetch(hypers)
        return devices.replicate(start(key, hypers), mesh)

    def update(key: Array, run: RunState) -> tuple[RunState, Metrics]:
        env_key, learn_keys = devices.replicate(keys(devices.replicate(key, mesh), run.round), mesh)
        rows, _ = rollout(dataset, run, env_key, placed(everyone))
        # one device learns from all episodes, so that the number of devices changes nothing, not a bit
        run, rows, metrics = learn(*devices.on_one((learn_keys, run, gather(rows))))
        return devices.replicate(run, mesh), Metrics(rows, metrics)

    def play(key: Array, run: RunState, who: Who, report: bool = True) -> tuple[Comparison, Comparison]:
        births, twin = np.unique(np.column_stack([who.env, who.orders.luck]), axis=0, return_inverse=True)
        twins = episodes(cfg, names, [(BASELINE, 0, env) for env in births[:, 0]])
        twins = twins._replace(orders=twins.orders._replace(luck=births[:, 1:]))
        return play_beside(key, run, twins, who, twin.ravel(), report)

    def play_beside(
        key: Array, run: RunState, twins: Who, who: Who, twin: np.ndarray, report: bool
    ) -> tuple[Comparison, Comparison]:
        """Twins, and episodes of which each has one of them, by its number i[N].

        They are played in blocks of the size of a round, which is compiled already; what the last block has too many is
        dropped. A rule is paid by the hypers of the policy that `who` names.
        """
        env_key = devices.replicate(key, mesh)
        n_twins, twin = len(twins.env), np.concatenate([np.arange(len(twins.env)), twin])
        who = jax.tree.map(lambda *parts: np.concatenate(parts), twins, who)
        shape, size, count = everyone.env.shape, everyone.env.size, len(who.env)
        results = []
        for first in range(0, count, size):
            rest = np.arange(first, first + size)
            rest = np.where(rest < count, rest, 0)  # `never` costs least
            block = jax.tree.map(lambda column, rest=rest: column[rest].reshape(*shape, *column.shape[1:]), who)
            rows, grown = rollout(dataset, run, env_key, placed(block))
            counts = (grown.germinated, grown.fossilised, grown.pruned, grown.rollbacks)
            test, text = programs.report(dataset, grown) if report else (None, None)
            result = devices.fetch(Comparison(rows, test, *counts, grown.slots, text))
            result = result.replace(shape=shape_of(result.shape))
            result = jax.tree.map(lambda leaf: leaf.reshape(size, *leaf.shape[2:]), result)
            results.append((block.policy, twin[rest].reshape(shape), result))
        together = jax.tree.map(lambda *parts: np.concatenate(parts), *(result for *_, result in results))
        if paired:
            info = together.rollout.info
            losses = np.asarray(jax.vmap(reward.last_accepted)(info.val_loss[:n_twins], info.accepted[:n_twins]))
            flat = [pay_block(run, policies, result.rollout, losses[of]) for policies, of, result in results]
            together = together.replace(rollout=jax.tree.map(lambda *parts: np.concatenate(parts), *flat))
        cut = lambda begin, end: jax.tree.map(lambda leaf: leaf[begin:end], together)
        return cut(0, n_twins), cut(n_twins, count)

    def compare(key: Array, run: RunState, controllers: Sequence[str]) -> dict[str, Comparison]:
        """Episodes of controllers in environments 0 to R - 1, a learned one with each policy in all of them. A rule is
        paid by the hypers of policy 0."""
        envs = np.arange(cfg.report_envs)
        others = [name for name in dict.fromkeys(controllers) if name != BASELINE]
        rows = {name: cfg.policy_seeds if name in LEARNED else 1 for name in others}
        who = [(name, p, e) for name in others for p in range(rows[name]) for e in envs]
        twins = episodes(cfg, names, [(BASELINE, 0, e) for e in envs])
        twins, played = play_beside(
            report_key(key), run, twins, episodes(cfg, names, who), np.tile(envs, sum(rows.values())), True
        )
        found = {BASELINE: jax.tree.map(lambda leaf: leaf[None], twins)} | by_arm(played, rows, len(envs))
        return {name: found[name] for name in controllers}

    def pay_block(run: RunState, policies: np.ndarray, rows: Rollout, twin_loss: np.ndarray) -> Rollout:
        course = jax.tree.map(lambda leaf: leaf.reshape(*policies.shape, -1), reward.Course.of(rows.info))
        components = pay(run.hypers, *devices.split((policies, course, twin_loss), mesh))
        return paid(rows, jax.tree.map(lambda leaf: leaf.reshape(rows.reward.shape), devices.fetch(components)))

    return Train(init, update, compare, play, names, dataset, programs)


def by_arm(played: Comparison, rows: Mapping[str, int], envs: int) -> dict[str, Comparison]:
    """Episodes [N] one arm after the other as [P, R] of each, given how many rows each has."""
    found, end = {}, 0
    for name, count in rows.items():
        mine, end = slice(end, end + count * envs), end + count * envs
        split = lambda leaf, mine=mine, count=count: leaf[mine].reshape(count, envs, *leaf.shape[1:])
        found[name] = jax.tree.map(split, played)
    return found


def shape_of(slots: SlotState) -> np.ndarray:
    """i32[..., S, 2]: blueprint and algorithm of the fossilised seeds, -1 where there is none."""
    both = np.stack([slots.blueprint, slots.algorithm], axis=-1)
    return np.where(np.asarray(slots.stage)[..., None] == Stage.FOSSILIZED, both, -1)


def round_of(cfg: Config, names: tuple[str, ...]) -> Who:
    """The episodes of a round: a row of E environments for each policy, and one for their twin."""
    rows = [(POLICY, p) for p in range(cfg.policy_seeds)] + [(BASELINE, 0)] * (cfg.reward.mode == "paired")
    who = episodes(cfg, names, [(name, p, env) for name, p in rows for env in range(cfg.n_envs)])
    return jax.tree.map(lambda column: column.reshape(len(rows), cfg.n_envs, *column.shape[1:]), who)
