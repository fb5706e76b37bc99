"""Training of a host and its seeds: the one batch step and the one epoch of the project (Esper's Tolaria).

A batch without seeds is the reference's normal step, one with a seed in TRAINING its incubator step, one with a seed
further on its blended step: the lifecycle record decides, the code is the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import lax

from esper_jax.config import TrainingConfig
from esper_jax.lifecycle import stages
from esper_jax.network import model as networks
from esper_jax.network import seed_bank
from esper_jax.network.blend import SeedVars
from esper_jax.network.model import Model
from esper_jax.trees import select
from esper_jax.types import Array, SlotState, Stage

CLIP_EPSILON = 1e-6
VANISHING_NORM, EXPLODING_NORM = 1e-7, 10.0  # per parameter tensor
NORM_FLOOR = 1e-8  # gradients shorter than this give no ratio
MAX_GRADIENT_RATIO = 10.0
GRADIENT_EMA = 0.9
SECOND_MOMENT = 0.95  # Adam's decay of the squared gradients, as usual for language models


@struct.dataclass
class OptimiserState:
    """Moments of the gradients, of the host and of every seed."""

    host: Any
    seeds: tuple[Any, ...]


@struct.dataclass
class Gradients:
    """Gradients of one batch, before clipping."""

    host: Any
    seeds: tuple[SeedVars, ...]


@struct.dataclass
class EpochMetrics:
    """What an epoch of training reports."""

    loss: Array  # f32[] mean over the batches
    accuracy: Array  # f32[] percentage points
    batch_losses: Array  # f32[batches]
    clip_norms: Array  # f32[batches] norm of all gradients together, before clipping
    host_norm: Array  # f32[] gradient norm of the host at the last sampled batch
    seed_gradients: tuple[SeedVars, ...]  # of the last sampled batch


def host_optimiser(cfg: TrainingConfig) -> optax.GradientTransformation:
    """SGD with momentum and L2 decay that enters the momentum, as PyTorch's; or AdamW (Loshchilov and Hutter, 2019)."""
    if cfg.optimiser == "adamw":
        return optax.adamw(cfg.host_lr, b1=cfg.momentum, b2=SECOND_MOMENT, weight_decay=cfg.host_weight_decay)
    sgd = optax.sgd(cfg.host_lr, momentum=cfg.momentum)
    return optax.chain(optax.add_decayed_weights(cfg.host_weight_decay), sgd)


def seed_optimiser(cfg: TrainingConfig) -> optax.GradientTransformation:
    """The same without decay."""
    if cfg.optimiser == "adamw":
        return optax.adam(cfg.seed_lr, b1=cfg.momentum, b2=SECOND_MOMENT)
    return optax.sgd(cfg.seed_lr, momentum=cfg.momentum)


def init(model: Model, cfg: TrainingConfig) -> OptimiserState:
    """Moments of the gradients, zero everywhere."""
    seeds = tuple(seed_optimiser(cfg).init(seed) for seed in model.seeds)
    return OptimiserState(host_optimiser(cfg).init(model.host.params), seeds)


def reset_momentum(
    state: OptimiserState, seeds: Array, gates: Array, everything: Array | bool = False
) -> OptimiserState:
    """Moments zero for the seeds in `seeds` and the gates in `gates` (bool[S]; a seed's includes its gate's), or for
    everything.

    By AdamW a gate that comes later shares its seed's count of steps: its first moments are not corrected for their
    start at zero, so that its first steps are shorter than a new seed's.
    """

    def reset(s, leaf_path, leaf):
        is_gate = any(getattr(entry, "name", None) == "gate" for entry in leaf_path)
        where = everything | seeds[s] | (gates[s] if is_gate else False)
        return jnp.where(where, jnp.zeros_like(leaf), leaf)

    new = tuple(
        jax.tree_util.tree_map_with_path(lambda path, leaf, s=s: reset(s, path, leaf), seed)
        for s, seed in enumerate(state.seeds)
    )
    return OptimiserState(jax.tree.map(lambda leaf: jnp.where(everything, jnp.zeros_like(leaf), leaf), state.host), new)


def clip_factor(norm: Array, limit: float | None) -> Array:
    """min(1, limit / (norm + 1e-6)), PyTorch's; 1 without a limit."""
    return jnp.float32(1) if limit is None else jnp.minimum(1.0, limit / (norm + CLIP_EPSILON))


def seeds_with_gradient(state: SlotState) -> Array:
    """bool[S]: seeds that take part in the forward pass and are not being blended out."""
    acting = stages.is_active(state.stage) & (state.stage != Stage.GERMINATED)
    return acting & ~stages.frozen(state)


def loss_and_accuracy(logits: Array, labels: Array) -> tuple[Array, Array]:
    """Mean cross-entropy, and how many arg-maxima are right, of `[B, ..., outputs]` and i32 `[B, ...]`."""
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return loss, (logits.argmax(-1) == labels).sum(dtype=jnp.int32)


def train_batch(
    model: Model,
    optimiser: OptimiserState,
    state: SlotState,
    x: Array,
    labels: Array,
    cfg: TrainingConfig,
    key: Array | None = None,
    *,
    lr_scale: Array | float = 1.0,
) -> tuple[Model, OptimiserState, Gradients, dict[str, Array]]:
    """One step of the optimiser for host and seeds, from one backward pass of their common loss.

    Args: x `[B, H, W, C]` normalised images and labels i32 `[B]`, or tokens and the next ones, i32 `[B, L]`; `key` of
      the host's dropout; `lr_scale` f32[] what both learning rates are multiplied by.
    Returns: model, momentum, the unclipped gradients, and `loss`, `correct`, `norm` (of all gradients together).
    """
    chex.assert_equal_shape_prefix([x, labels], labels.ndim)

    def objective(trained):
        host, seeds = trained
        with_params = Model(model.host.replace(params=host), seeds)
        how = {"tile_pixels": cfg.tile_pixels, "dtype": cfg.compute_dtype, "key": key}
        logits, new = networks.forward(with_params, state, x, train=True, **how)
        loss, correct = loss_and_accuracy(logits, labels)
        return loss, (new.host.stats, correct)

    trained = (model.host.params, model.seeds)
    (loss, (stats, correct)), (host_grads, seed_grads) = jax.value_and_grad(objective, has_aux=True)(trained)

    has_gradient = seeds_with_gradient(state)
    host_norm = optax.tree.norm(host_grads)
    seed_norms = [jnp.where(has_gradient[s], optax.tree.norm(g), 0.0) for s, g in enumerate(seed_grads)]
    norm = jnp.sqrt(host_norm**2 + sum(n**2 for n in seed_norms))
    joint = cfg.clip_scope == "joint"
    scale = lambda tree, own: jax.tree.map(lambda g: g * clip_factor(norm if joint else own, cfg.clip_norm), tree)

    # what an optimiser returns is proportional to its learning rate
    move = lambda params, updates: optax.apply_updates(params, jax.tree.map(lambda u: lr_scale * u, updates))
    updates, host_momentum = host_optimiser(cfg).update(scale(host_grads, host_norm), optimiser.host, model.host.params)
    host = model.host.replace(params=move(model.host.params, updates), stats=stats)

    steps = has_gradient if cfg.train_fossilised else has_gradient & (state.stage != Stage.FOSSILIZED)
    seeds, seed_momenta = [], []
    for s, (seed, grads, momentum) in enumerate(zip(model.seeds, seed_grads, optimiser.seeds, strict=True)):
        updates, new_momentum = seed_optimiser(cfg).update(scale(grads, seed_norms[s]), momentum, seed)
        # no gradient is not a zero gradient: parameters and momentum are held
        seeds.append(select(steps[s], move(seed, updates), seed))
        seed_momenta.append(select(steps[s], new_momentum, momentum))
    metrics = {"loss": loss, "correct": correct, "norm": norm, "host_norm": host_norm}
    optimiser = OptimiserState(host_momentum, tuple(seed_momenta))
    return Model(host, tuple(seeds)), optimiser, Gradients(host_grads, seed_grads), metrics


def train_epoch(
    model: Model,
    optimiser: OptimiserState,
    state: SlotState,
    batches: Any,
    fetch: Callable[[Any], tuple[Array, ...]],
    cfg: TrainingConfig,
    *,
    lr_scale: Array | float = 1.0,
) -> tuple[Model, OptimiserState, EpochMetrics]:
    """A scan of `train_batch`.

    `batches` is a pytree with a leading batch-number axis; `fetch` turns one entry into inputs and labels, and a key if
    the host drops out (for arrays of inputs and labels, the identity). Gradients are sampled at batches 0, k, 2k, ...;
    the last sample is reported.
    """
    zeros = jax.tree.map(jnp.zeros_like, model.seeds)

    def step(carry, entry):
        model, optimiser, sample = carry
        k, batch = entry
        x, labels, *key = fetch(batch)
        model, optimiser, grads, metrics = train_batch(model, optimiser, state, x, labels, cfg, *key, lr_scale=lr_scale)
        sampled = k % cfg.telemetry_stride == 0
        new = (metrics["host_norm"], grads.seeds)
        sample = select(sampled, new, sample)
        return (model, optimiser, sample), (metrics["loss"], metrics["correct"], metrics["norm"], labels.size)

    count = jax.tree.leaves(batches)[0].shape[0]
    carry = (model, optimiser, (jnp.float32(0), zeros))
    (model, optimiser, sample), (losses, correct, norms, sizes) = lax.scan(
        step, carry, (jnp.arange(count, dtype=jnp.int32), batches)
    )
    right, seen = (counts.sum(dtype=jnp.int32).astype(jnp.float32) for counts in (correct, sizes))
    accuracy = 100.0 * right / seen
    return model, optimiser, EpochMetrics(losses.mean(), accuracy, losses, norms, *sample)


def record_gradients(state: SlotState, metrics: EpochMetrics, host_params: int) -> SlotState:
    """Gradient telemetry of the seeds that were trained, from the epoch's last sample (rewards_and_telemetry 3.2, 3.4).

    ratio = (|g_s| / sqrt(n_s)) / (|g_h| / sqrt(n_h)), at most 10, then an exponential mean that starts with the first
    sample. health = 1 - 0.5 (share of vanishing tensors) - 0.8 (share of exploding ones), 0 if not finite.
    """
    m = state.metrics
    measured = seeds_with_gradient(state)
    columns = [
        _seed_statistics(grads, state.blueprint[s], state.has_gate[s]) for s, grads in enumerate(metrics.seed_gradients)
    ]
    norm, elements, health, vanishing, exploding = (jnp.stack(column) for column in zip(*columns, strict=True))
    per_element = norm / jnp.sqrt(jnp.maximum(elements, 1).astype(jnp.float32))
    host_per_element = metrics.host_norm / math.sqrt(host_params)
    usable = (norm >= NORM_FLOOR) & (metrics.host_norm >= NORM_FLOOR) & jnp.isfinite(norm / metrics.host_norm)
    ratio = jnp.where(usable, per_element / jnp.where(usable, host_per_element, 1), 0)
    ratio = jnp.minimum(ratio, MAX_GRADIENT_RATIO)
    smoothed = jnp.where(m.gradient_valid, GRADIENT_EMA * m.gradient_ratio + (1 - GRADIENT_EMA) * ratio, ratio)
    put = lambda new, old: jnp.where(measured, new, old)
    return state.replace(
        metrics=m.replace(
            gradient_norm=put(jnp.nan_to_num(norm, posinf=jnp.finfo(jnp.float32).max), m.gradient_norm),
            gradient_ratio=put(smoothed, m.gradient_ratio),
            previous_gradient_health=put(m.gradient_health, m.previous_gradient_health),
            previous_gradient_valid=put(m.gradient_valid, m.previous_gradient_valid),
            gradient_health=put(health, m.gradient_health),
            gradient_valid=m.gradient_valid | measured,
            gradient_vanishing=put(vanishing, m.gradient_vanishing),
            gradient_exploding=put(exploding, m.gradient_exploding),
        )
    )


def _seed_statistics(grads: SeedVars, blueprint: Array, has_gate: Array) -> tuple[Array, ...]:
    """Norm, number of elements, health, any vanishing, any exploding, of one seed's gradient with its gate's."""
    kind = seed_bank.kind_of(blueprint, grads.kinds)
    ids, tensors = seed_bank.tensor_ids(grads.kinds, grads.width, kind)
    member = ids[:, None] == jnp.arange(tensors, dtype=jnp.int32)[None]
    squares = jnp.where(member, jnp.square(grads.params)[:, None], 0).sum(0)
    present = member.any(0)
    squares = jnp.append(squares, jnp.where(has_gate, jnp.sum(jnp.square(grads.gate)), 0))
    present = jnp.append(present, has_gate)
    norms = jnp.sqrt(squares)
    norm = jnp.sqrt(squares.sum())
    elements = member.sum(dtype=jnp.int32) + jnp.where(has_gate, grads.gate.size, 0)
    vanishing = present & (norms < VANISHING_NORM)
    exploding = present & ((norms > EXPLODING_NORM) | ~jnp.isfinite(norms))
    share = lambda flags: flags.sum(dtype=jnp.float32) / jnp.maximum(present.sum(dtype=jnp.float32), 1)
    health = jnp.clip(1 - 0.5 * share(vanishing) - 0.8 * share(exploding), 0, 1)
    return norm, elements, jnp.where(jnp.isfinite(norm), health, 0), vanishing.any(), exploding.any()
