"""Environments into which faults are put: one compiled program, in which fault, severity and time are arrays.

    base       every seed's environment without a fault, its state kept at every time of `Plan.times`
    continued  from such a state: what is done to it, and `Plan.window` epochs with it

All go through the product's own `env.step`. A fault is put into the state between two epochs, or into the data of the
epochs that follow. A continued environment has the keys of the base one, so that this is its clean twin.

Axis letters: N environments, T epochs of a base environment, W of a continued one, K times.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from esper_jax import data
from esper_jax.config import Config, GovernorConfig
from esper_jax.data import Dataset
from esper_jax.env import governor, transition
from esper_jax.env.environment import EnvState, make_env
from esper_jax.env.reward import RewardWeights
from esper_jax.env.transition import Setting
from esper_jax.run import devices
from esper_jax.run.devices import REPLICATED, SHARDED
from esper_jax.train import over_environments
from esper_jax.types import STYLES, TEMPO_EPOCHS, Action, Array, Op, Stage

SEVERITIES = 4
HARM_EPOCHS = 10  # over which harm is measured


class Plan(NamedTuple):
    """What is played."""

    seeds: int  # paired ones: each of the faults is put into each of them
    clean: int  # base environments, these seeds and more: for the false alarms
    times: tuple[int, ...]  # epochs after which a fault comes
    window: int  # epochs from then on
    all_severities: bool  # of every fault, time and seed; else one, in turn
    snapshot_epochs: int = GovernorConfig().snapshot_epochs  # the governor's

    @property
    def epochs(self) -> int:
        return max(self.times) + self.window


class Kind(NamedTuple):
    """Something that is done to an environment.

    `corrupt(state, severity, key)` changes the state before epoch `at` of the window (and before the next one, if
    `twice`); `share` of the labels are shuffled, and batches made of `repeat` copies, for `lasts` epochs.
    """

    name: str
    severities: tuple[float, ...]
    corrupt: Callable[[EnvState, Array, Array], EnvState] | None = None
    harmless: bool = False  # a confuser: it must not alarm
    at: int = 0  # epoch of the window before which it comes
    onset: int = 0  # first epoch of the window that can show it
    lasts: int = 1  # epochs; only of what is in the data
    again: Callable[[EnvState, Array, Array], EnvState] | None = None  # before the epoch after that
    labels: bool = False  # the severity is the share of the labels that are shuffled
    repeat: bool = False  # the severity is how often each example stands in a batch
    script: str = "wait"
    permanent: bool = False  # no rollback ends it, nor a lower learning rate
    lasting: bool = False  # no rollback ends it
    after_snapshot: bool = False  # `at` and `onset` are those of the epoch after the next snapshot


class Cell(NamedTuple):
    """One continued environment, i32 [N] each."""

    seed: np.ndarray
    kind: np.ndarray  # number in KINDS
    severity: np.ndarray  # 0 to 3
    time: np.ndarray  # number in Plan.times


@struct.dataclass
class FaultyDataset(Dataset):
    """A data set in memory that went bad, or is read in smaller batches."""

    repeat: Array  # i32[] how often each example stands in a batch

    def batch(self, key: Array, indices: Array) -> tuple[Array, Array]:
        """A batch of fewer examples, each of them as often."""
        place = jnp.arange(indices.shape[0], dtype=jnp.int32)
        return super().batch(key, indices[place - place % self.repeat])


# --- what is done to a state -----------------------------------------------------------------------------------------


def _weights(state: EnvState) -> tuple[list[Array], Callable[[list[Array]], EnvState], list[int]]:
    """The host's trained arrays, how to put others in their place, and which of them are kernels."""
    leaves, tree = jax.tree.flatten(state.model.host.params)
    put = lambda new: state.replace(
        model=state.model.replace(host=state.model.host.replace(params=jax.tree.unflatten(tree, new)))
    )
    return leaves, put, [i for i, leaf in enumerate(leaves) if leaf.ndim > 1]


def _in_some_kernel(change: Callable[[Array, Array], Array]) -> Callable:
    """`change(kernel, key)` of one of the host's kernels."""

    def corrupt(state, severity, key):
        leaves, put, kernels = _weights(state)
        which = jax.random.randint(jax.random.fold_in(key, 0), (), 0, len(kernels), jnp.int32)
        new = list(leaves)
        for number, i in enumerate(kernels):
            new[i] = jnp.where(which == number, change(leaves[i], severity, jax.random.fold_in(key, 1)), leaves[i])
        return put(new)

    return corrupt


def _one_weight(value: Callable[[Array, Array], Array]) -> Callable:
    def change(kernel, severity, key):
        place = jax.random.randint(key, (), 0, kernel.size, jnp.int32)
        there = (jnp.arange(kernel.size, dtype=jnp.int32) == place).reshape(kernel.shape)
        return jnp.where(there, value(kernel, severity), kernel)

    return change


def _head(change: Callable[[Array], Array]) -> Callable:
    """`change(kernel)` of a share of the classes (the severity) in the host's read-out."""

    def corrupt(state, severity, key):
        host = state.model.host
        kernel = host.params.kernel
        hit = jax.random.permutation(key, kernel.shape[-1]) < jnp.round(severity * kernel.shape[-1])
        params = host.params.replace(kernel=jnp.where(hit, change(kernel), kernel))
        return state.replace(model=state.model.replace(host=host.replace(params=params)))

    return corrupt


def _momentum(state, severity, key):
    leaves, tree = jax.tree.flatten(state.optimiser.host)
    noise = [
        severity * jax.random.normal(jax.random.fold_in(key, i), leaf.shape, leaf.dtype)
        if jnp.issubdtype(leaf.dtype, jnp.floating)
        else leaf
        for i, leaf in enumerate(leaves)
    ]
    return state.replace(optimiser=state.optimiser.replace(host=jax.tree.unflatten(tree, noise)))


def _learning_rate(state, severity, key):
    return state.replace(lr_scale=state.lr_scale * severity)


def _learning_rate_back(state, severity, key):
    return state.replace(lr_scale=state.lr_scale / severity)


def _batch_norm(state, severity, key):
    leaves, tree = jax.tree.flatten(state.model.host.stats)
    noise = lambda i, leaf: jnp.exp(severity * jax.random.normal(jax.random.fold_in(key, i), leaf.shape, leaf.dtype))
    stats = jax.tree.unflatten(tree, [leaf * noise(i, leaf) for i, leaf in enumerate(leaves)])
    return state.replace(model=state.model.replace(host=state.model.host.replace(stats=stats)))


def _scale_seed(state, severity, key):
    first, *rest = state.model.seeds
    seeds = (first.replace(params=first.params * severity), *rest)
    return state.replace(model=state.model.replace(seeds=seeds))


def _alpha_jump(state, severity, key):
    state = _scale_seed(state, severity, key)
    slots = state.slots
    first = jnp.arange(slots.stage.shape[0]) == 0
    put = lambda value, old: jnp.where(first, value, old).astype(old.dtype)
    alpha = slots.alpha.replace(alpha=put(1.0, slots.alpha.alpha), target=put(1.0, slots.alpha.target))
    return state.replace(slots=slots.replace(stage=put(int(Stage.HOLDING), slots.stage), alpha=alpha))


def _snapshot(state, severity, key):
    """The kept state goes bad; the severity says how: 0 not a number, 1 zeros, 2 the sign, else so many times."""
    bad = lambda leaf: jnp.select(
        [severity == 0, severity == 1, severity == 2], [jnp.full_like(leaf, jnp.nan), 0 * leaf, -leaf], severity * leaf
    )
    host = state.snapshot.model.host
    host = host.replace(params=jax.tree.map(bad, host.params))
    return state.replace(snapshot=state.snapshot.replace(model=state.snapshot.model.replace(host=host)))


def _noise(state, severity, key):
    leaves, put, _ = _weights(state)
    return put(
        [
            leaf + severity * leaf.std() * jax.random.normal(jax.random.fold_in(key, i), leaf.shape, leaf.dtype)
            for i, leaf in enumerate(leaves)
        ]
    )


_nan = _in_some_kernel(
    _one_weight(lambda kernel, severity: jnp.where(jnp.abs(severity) > 1, jnp.inf, jnp.nan) * severity)
)
_scale = _in_some_kernel(lambda kernel, severity, key: kernel * severity)
_flip = _head(lambda kernel: -kernel)
SHARES = (0.25, 0.5, 0.75, 1.0)

KINDS = (
    Kind("clean", (0.0,) * 4, harmless=True),
    Kind("not a number", (1.0, -1.0, 2.0, -2.0), _nan),
    Kind("bit flip", (2.0**8, 2.0**12, 2.0**16, 2.0**20), _in_some_kernel(_one_weight(lambda k, s: k * s))),
    Kind("layer scaled", (4.0, 8.0, 64.0, 512.0), _scale),
    Kind("head sign flipped", SHARES, _flip),
    Kind("head zeroed", SHARES, _head(jnp.zeros_like)),
    Kind("momentum corrupted", (1.0, 10.0, 100.0, 1000.0), _momentum),
    Kind("learning rate once", (4.0, 8.0, 16.0, 64.0), _learning_rate, again=_learning_rate_back),
    Kind("learning rate for ever", (4.0, 8.0, 16.0, 64.0), _learning_rate, lasting=True),
    Kind("labels shuffled once", SHARES, labels=True),
    Kind("labels shuffled for ever", SHARES, labels=True, lasts=10**6, permanent=True),
    Kind("batch-norm statistics", (0.5, 1.0, 2.0, 4.0), _batch_norm),
    Kind("germination scaled", (3.0, 10.0, 30.0, 100.0), _scale_seed, at=1, onset=3, script="blend"),
    Kind("alpha jump", (1.0, 3.0, 10.0, 30.0), _alpha_jump, at=3, onset=3, script="germinate"),
    Kind("snapshot corrupted", (0.0, 1.0, 2.0, 8.0), lambda s, v, k: _flip(_snapshot(s, v, k), jnp.float32(1), k)),
    Kind("after a snapshot", SHARES, _flip, after_snapshot=True),
    Kind("two in a row", SHARES, _flip, again=lambda s, v, k: _scale(_flip(s, v, k), 64 * v, k)),
    Kind("germinate", (0.0, 1.0, 2.0, 3.0), harmless=True, script="germinate"),
    Kind("blend", (0.0, 1.0, 2.0, 3.0), harmless=True, script="blend"),
    Kind("fossilise", (0.0, 1.0, 2.0, 3.0), harmless=True, script="fossilise"),
    Kind("prune", (0.0, 1.0, 2.0, 3.0), harmless=True, script="prune"),
    Kind("learning-rate decay", (0.5, 0.2, 0.1, 0.01), _learning_rate, harmless=True),
    Kind("small batches", (2.0, 4.0, 8.0, 16.0), harmless=True, repeat=True, lasts=10**6),
    Kind("weight noise", (0.01, 0.03, 0.05, 0.1), _noise, harmless=True),
    # what a rollback does to an environment besides: batches in another order
    Kind("another data order", (0.0,) * 4, lambda s, v, k: s.replace(rollbacks=s.rollbacks + 1), harmless=True),
)
NUMBER = {kind.name: number for number, kind in enumerate(KINDS)}


def scripts(cfg: Config, window: int) -> dict[str, Action]:
    """Actions i32[SEVERITIES, W] of each field: which module, and how fast it is blended in, go by the severity."""
    offered = [cfg.lifecycle.catalog.index(name) for name in cfg.lifecycle.offered]

    def table(*steps: tuple[int, Op]) -> Action:
        rows = []
        for severity in range(SEVERITIES):
            ops = np.zeros(window, np.int32)
            for epoch, op in steps:
                ops[epoch] = op
            full = lambda value: np.full(window, value, np.int32)
            rows.append(
                Action(
                    op=ops,
                    slot=full(0),
                    blueprint=full(offered[severity % len(offered)]),
                    style=full(STYLES.index("linear_add")),
                    tempo=full(TEMPO_EPOCHS.index(sorted(TEMPO_EPOCHS)[0 if severity < 2 else 1])),
                    alpha_target=full(2),
                    alpha_speed=full(0),
                    alpha_curve=full(0),
                )
            )
        return jax.tree.map(lambda *leaves: np.stack(leaves), *rows)

    begun = ((0, Op.GERMINATE), (1, Op.ADVANCE))
    blended = (*begun, (3, Op.ADVANCE))
    return {
        "wait": table(),
        "germinate": table(*begun),
        "blend": table(*blended),
        "fossilise": table(*blended, (10, Op.ADVANCE), (11, Op.FOSSILIZE)),
        "prune": table(*blended, (10, Op.PRUNE)),
    }


# --- playing ---------------------------------------------------------------------------------------------------------


@struct.dataclass
class Trace:
    """What is seen of environments, [N, T or W]."""

    loss: Array  # f32 validation
    accuracy: Array
    train_loss: Array
    first_loss: Array
    gradient_norm: Array
    sizes: Array  # f32 [..., L] norms of the host's kernels
    finite: Array  # bool the whole state is
    rise: Array  # f32 expected of the loss, since a seed has left
    accepted: Array
    panic: Array
    given_up: Array
    stage: Array  # i32 of slot 0
    op: Array

    @classmethod
    def of(cls, setting: Setting, before: EnvState, state: EnvState, info: Any) -> Trace:
        """Of a step; where nothing was rolled back, the state is what was judged."""
        seen = governor.vitals(
            state.model, state.optimiser, loss=info.val_loss, accuracy=info.val_accuracy,
            train_loss=info.train_loss, measured=1,
        )  # fmt: skip
        return cls(
            info.val_loss, info.val_accuracy, info.train_loss, info.first_loss, info.gradient_norm, seen.sizes,
            seen.finite, transition.expected_rise(setting, before, state.slots), info.accepted, info.panic,
            info.given_up, info.stage[0], info.op,
        )  # fmt: skip


def make(cfg: Config, plan: Plan, dataset: Dataset | None = None):
    """`base(seeds)` and `continued(states, cells)`, compiled."""
    mesh = devices.make_mesh(cfg.devices)
    dataset = devices.replicate(data.load(cfg.data) if dataset is None else dataset, mesh)
    fields = {name: getattr(dataset, name) for name in dataset.__dataclass_fields__}
    faulty = FaultyDataset(**fields, repeat=jnp.int32(1))
    times = jnp.asarray(plan.times, jnp.int32)
    root = jax.random.key(cfg.seed)
    weights = RewardWeights.from_config(cfg.reward, cfg.ppo.gamma, cfg.lifecycle.min_prune_age)
    actions = scripts(cfg, plan.window)
    script_of = jnp.asarray([list(actions).index(kind.script) for kind in KINDS], jnp.int32)
    table = jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(leaf) for leaf in leaves]), *actions.values())
    strength = jnp.asarray([kind.severities for kind in KINDS], jnp.float32)
    column = lambda name: jnp.asarray([getattr(kind, name) for kind in KINDS])
    at, lasts, labels, repeats, late = map(column, ("at", "lasts", "labels", "repeat", "after_snapshot"))
    nothing = lambda state, severity, key: state
    hit = [kind.corrupt or nothing for kind in KINDS]
    hit_again = [kind.again or nothing for kind in KINDS]

    def keys(seed):
        return jax.random.split(jax.random.fold_in(root, seed), 3)

    def step(dataset, key, state, epoch, action):
        env = make_env(cfg, dataset)
        before = state
        state, _, _, _, info = env.step(jax.random.fold_in(key, epoch), state, action)
        return state, Trace.of(Setting(dataset, weights, cfg), before, state, info)

    def base(dataset, seeds, axis_name):
        def one(seed):
            host_key, step_key, _ = keys(seed)
            state = make_env(cfg, dataset).init(host_key)
            kept = jax.tree.map(lambda leaf: jnp.stack([leaf] * len(plan.times)), state)

            def epoch(carry, t):
                state, kept = carry
                due = times == t
                kept = jax.tree.map(lambda old, new: jnp.where(due.reshape(-1, *[1] * new.ndim), new, old), kept, state)
                state, trace = step(dataset, step_key, state, t, Action())
                return (state, kept), trace

            (_, kept), trace = lax.scan(epoch, (state, kept), jnp.arange(plan.epochs, dtype=jnp.int32))
            return kept, trace

        return over_environments(one, seeds, cfg.env_chunk)

    def continued(dataset, kept, cells, axis_name):
        def one(given):
            state, (seed, kind, severity, time) = given
            _, step_key, fault_key = keys(seed)
            value = strength[kind, severity]
            order = jax.random.permutation(fault_key, dataset.train_size)
            moved = jax.random.uniform(jax.random.fold_in(fault_key, 1), (dataset.train_size,)) < value
            true_labels = dataset.train.labels
            shuffled = jnp.where(moved, true_labels[order], true_labels)

            begins = jnp.where(late[kind], -times[time] % cfg.governor.snapshot_epochs, at[kind])

            def epoch(state, k):
                key = jax.random.fold_in(fault_key, 2)
                state = lax.cond(k == begins, lambda s: lax.switch(kind, hit, s, value, key), lambda s: s, state)
                state = lax.cond(
                    k == begins + 1, lambda s: lax.switch(kind, hit_again, s, value, key), lambda s: s, state
                )
                now = (k >= begins) & (k < begins + lasts[kind])
                used = jnp.where(now & labels[kind], shuffled, true_labels)
                repeat = jnp.where(now & repeats[kind], value, 1).astype(jnp.int32)
                here = dataset.replace(train=dataset.train.replace(labels=used), repeat=repeat)
                action = jax.tree.map(lambda leaf: leaf[script_of[kind], severity, k], table)
                return step(here, step_key, state, times[time] + k, action)

            return lax.scan(epoch, state, jnp.arange(plan.window, dtype=jnp.int32))[1]

        return over_environments(one, (kept, Cell(*cells)), cfg.env_chunk)

    specs = (REPLICATED, SHARDED)
    run_base = devices.over_devices(base, mesh, specs, SHARDED)
    run_cells = devices.over_devices(continued, mesh, (*specs, SHARDED), SHARDED)

    def play_base(seeds: np.ndarray):
        """States at the plan's times [N, K, ...] and traces [N, T]."""
        return _padded(mesh.size, lambda seeds: run_base(faulty, *seeds), (seeds,))

    def play(kept, cells: Cell):
        """Traces [N, W]."""
        states = jax.tree.map(lambda leaf: leaf[cells.seed, cells.time], kept)
        return _padded(mesh.size, lambda given: run_cells(faulty, given[0], tuple(given[1])), (states, tuple(cells)))

    return play_base, play


def _padded(devices_: int, fun, tree):
    """`fun` of [1, N', ...] with N' a multiple of the devices; what comes back is cut to N."""
    n = len(jax.tree.leaves(tree)[0])
    index = np.minimum(np.arange(-(-n // devices_) * devices_), n - 1)
    out = fun(jax.tree.map(lambda leaf: leaf[index][None], tree))
    return jax.tree.map(lambda leaf: leaf[0, :n], jax.device_get(out))


def cells(plan: Plan) -> Cell:
    """What is played from the base environments, in an order that balances severities over times and seeds."""
    rows = [
        (seed, kind, severity, time)
        for kind in range(len(KINDS))
        for time in range(len(plan.times))
        for seed in range(plan.seeds)
        for severity in (range(SEVERITIES) if plan.all_severities else [(seed + time) % SEVERITIES])
    ]
    return Cell(*np.array(rows, np.int32).T)
