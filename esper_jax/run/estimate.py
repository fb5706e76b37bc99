"""What a run will ask for, before anything is compiled: bytes, work, and on CPUs time; what cannot fit is refused."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import numpy as np

from esper_jax.config import Config
from esper_jax.data import AnyDataset
from esper_jax.enums import LEARNED
from esper_jax.env import observation
from esper_jax.network import model as networks
from esper_jax.network import seed_bank
from esper_jax.network.host import Host
from esper_jax.run import devices, records
from esper_jax.train import Metrics, Rollout, Train, round_of

# FLOP/s of convolutions and matrix products that a CPU core reaches in a rollout: 12, 17 and 27 billion in the preset
# `quick` on CIFAR-10, digits and text (two cores of an AMD EPYC of family 26). Other makes differ as much again.
CPU_FLOPS = 17e9
DOUBT = 2.0  # the factor by which a time may be shorter or longer
LESS = "fewer or smaller --rounds, --n-envs, --policy-seeds, --training.epochs, --report-envs or --env-chunk need less"


class Estimate(NamedTuple):
    flops: float  # of all rollouts, the middle between empty and full slots
    device_bytes: int  # on each device; what is computed with comes on top
    host_bytes: int  # the arrays of all rounds and of the comparison
    seconds: float | None  # on CPUs

    def __str__(self) -> str:
        time = "" if self.seconds is None else f"rollouts {span(self.seconds / DOUBT, self.seconds * DOUBT)}, "
        memory = f"{devices.size(self.device_bytes)} on each device and {devices.size(self.host_bytes)} of results"
        return f"{time}memory {memory}"


def check_counts(cfg: Config, n_rules: int) -> None:
    """Raises ValueError where the features alone of a round's or the comparison's episodes cannot fit.

    To be called before anything is made for them.
    """
    least = cfg.training.epochs * 4 * observation.size(cfg.action_space)  # f32[T, D]
    of_round, of_comparison = episodes(cfg, n_rules)
    _check(of_round * least, "the episodes of a round")
    _check(of_comparison * least, "the episodes of the comparison")


def episodes(cfg: Config, n_rules: int) -> tuple[int, int]:
    """How many are played in a round, twins included, and in the comparison with so many rules."""
    rows, arms = cfg.policy_seeds + (cfg.reward.mode == "paired"), n_rules + len(LEARNED) * cfg.policy_seeds
    return rows * cfg.n_envs, arms * cfg.report_envs


def of(train: Train, cfg: Config, run: Any, key: jax.Array, done: int = 0) -> Estimate:
    """Traces a rollout, which compiling it afterwards needs not do again.

    Args:
      run: shapes of its state.
      done: rounds that will not be played again.

    Raises ValueError if it cannot fit into the machine's memory, and TooLarge into a device's.
    """
    n_devices = cfg.devices or jax.device_count()
    everyone = round_of(cfg, train.controllers)
    env_key = jax.eval_shape(train.programs.keys, key, run.round)[0]
    traced = train.programs.rollout.trace(train.dataset, run, env_key, everyone)
    rows, grown = traced.out_info
    of_round, of_comparison = episodes(cfg, len(train.controllers) - len(LEARNED))
    blocks = math.ceil(of_comparison / of_round)
    least, most = (flops(traced.jaxpr.jaxpr, pick) * n_devices for pick in (min, max))
    total = (least + most) / 2 * (cfg.rounds - done + blocks)
    per_device = nbytes((rows, grown)) // n_devices + nbytes((train.dataset, run))
    kept = _kept_bytes(rows)
    # all rounds are read, then stacked; the comparison's blocks are joined, then cut into arms
    host = 2 * kept * cfg.rounds * cfg.n_envs * cfg.policy_seeds + 2 * blocks * nbytes(rows)
    cpu = devices.backend() == "cpu"
    _check(host + per_device * n_devices * cpu, "the arrays of all rounds and of the comparison")
    devices.check_memory(per_device, "a round")
    return Estimate(total, per_device, host, total / CPU_FLOPS / n_devices if cpu else None)


def _check(need: int, what: str) -> None:
    there = devices.host_memory()
    if there is not None and need > there:
        raise ValueError(f"{what} would take {devices.size(need)}, and this machine has {devices.size(there)}: {LESS}")


def _kept_bytes(rows: Rollout) -> int:
    """Of one episode of a round, as it is written: from the arrays of one that is one epoch long."""
    epochs = rows.reward.shape[2]
    one = jax.tree.map(lambda leaf: np.zeros((1, 1, 1, *leaf.shape[3:]), leaf.dtype), rows)
    return epochs * sum(array.nbytes for array in records.round_arrays(Metrics(one, {})).values())


def nbytes(tree: Any) -> int:
    """Of arrays or their shapes; a PRNG key counts as its words."""
    key_bytes = lambda leaf: leaf.dtype.itemsize * math.prod(leaf.shape)
    return sum(key_bytes(leaf) for leaf in jax.tree.leaves(tree))


def flops(jaxpr: Any, pick: Any) -> float:
    """2 per multiply-add of the convolutions and matrix products in a traced function.

    A scan counts as often as it runs, a loop without a known end once, and of a choice the branch that `pick`, min or
    max, takes.
    """
    total = 0.0
    for eqn in jaxpr.eqns:
        shapes, name = [v.aval.shape for v in eqn.invars if hasattr(v.aval, "shape")], eqn.primitive.name
        if name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shapes[0][i] for i in contracted)
        elif name == "conv_general_dilated":
            outputs = shapes[1][eqn.params["dimension_numbers"].rhs_spec[0]]
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shapes[1]) / outputs
        else:
            values = [x for v in eqn.params.values() for x in (v if isinstance(v, tuple | list) else [v])]
            inner = [getattr(value, "jaxpr", value) for value in values]
            counts = [flops(each, pick) for each in inner if hasattr(each, "eqns")]
            if counts:
                total += pick(counts) if name == "cond" else eqn.params.get("length", 1) * sum(counts)
    return total


FEW = 2  # examples that work is counted on: of many, convolutions are loops over blocks, which XLA counts once


class Work(NamedTuple):
    """FLOP of training for one epoch: of the host, and of each seed that acts."""

    host: float
    seeds: np.ndarray  # f[S, N] by slot and number in the catalog; 0 for what is not offered


def bare_host(cfg: Config, dataset: AnyDataset) -> Host:
    """The host of a configuration for these data, as shapes."""
    shape = {"example": dataset.example, "outputs": dataset.outputs, "blueprints": ()}
    return jax.eval_shape(lambda: networks.init(jax.random.key(0), cfg.host, **shape)).host


def work(cfg: Config, dataset: AnyDataset) -> Work:
    """As XLA counts what is lowered for a few examples, additions of bias and norm included; backwards twice as much as
    forwards (Kaplan et al., 2020)."""
    host, names = bare_host(cfg, dataset), cfg.lifecycle.catalog
    blueprints = seed_bank.table(cfg.lifecycle.blueprints, cfg.host.modules)[1:]
    one = dataset.validation.inputs
    batch = jax.ShapeDtypeStruct((FEW, *one.shape[1:]), one.dtype)
    batch = jax.eval_shape(dataset.prepare, batch)
    embed = lambda host, x: host.embed(x, dtype=cfg.training.compute_dtype, tile_pixels=0)
    count = lambda fun, *args: jax.jit(fun).lower(*args).cost_analysis().get("flops", 0.0)
    tile, total = jax.eval_shape(lambda *args: embed(*args)[0], host, batch), count(embed, host, batch)
    seeds = np.zeros((len(cfg.host.slot_names), len(names)))
    for segment in range(host.n_segments):
        run = lambda host, tile, i=segment: host.eval_segment(i, tile)
        total += count(run, host, tile)
        tile = jax.eval_shape(run, host, tile)
        if segment in cfg.host.slot_segments:
            slot = cfg.host.slot_segments.index(segment)
            for blueprint in blueprints:
                width = blueprint.layout.width(tile)
                params = jax.eval_shape(lambda b=blueprint, w=width: b.init(jax.random.key(0), w))
                run = lambda params, tile, b=blueprint: b.after_stem(params, tile, b.stem_of(params, tile))
                seeds[slot, names.index(blueprint.name)] = count(run, params, tile)
    total += count(lambda host, tile: host.read_out(tile), host, tile)
    epoch = 3.0 * cfg.training.batches_per_epoch * cfg.training.batch_size / FEW
    return Work(epoch * total, epoch * seeds)


def span(least: float, most: float) -> str:
    """Two times in seconds, in the unit of the longer one.

    >>> span(50, 200), span(5, 20), span(90_000, 180_000)
    ('0.8 to 3.3 min', '5 to 20 s', '1.0 to 2.1 days')
    """
    for per, unit in ((86_400, "days"), (3_600, "hours"), (60, "min")):
        if most >= 2 * per:
            return f"{least / per:,.1f} to {most / per:,.1f} {unit}"
    return f"{least:.0f} to {most:.0f} s" if most >= 2 else "a second or two"
