"""Evaluation: the one way in which accuracies are measured (Esper's Tolaria and Simic).

One pass over a split measures the network under all on/off configurations of its slots, plus loss and per-class
accuracy of the network as it is. Validation during an episode and the report test at its end are the same function.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax import lax

from esper_jax.env import attribution
from esper_jax.metric import ACCURACY, Metric
from esper_jax.network import model as networks
from esper_jax.network.model import Model
from esper_jax.types import Array, SlotState, Stage


@struct.dataclass
class Evaluation:
    """Over all images, or over all tokens. Accuracies are percentage points, losses mean cross-entropies in nats."""

    loss: Array  # f32[] of the network as it is
    accuracy: Array  # f32[]
    score: Array  # f32[] see `metric.Metric`
    table: Array  # f32[K] score under each of attribution.configurations(S)
    committed_loss: Array  # f32[] with everything off that is not fossilised
    committed_accuracy: Array  # f32[]
    committed_score: Array  # f32[]
    per_class: Array  # f32[classes] of the network as it is; f32[0] of text
    per_class_valid: Array  # bool[classes] the class occurs in the images


def evaluate(
    model: Model,
    state: SlotState,
    inputs: Array,
    labels: Array,
    prepare: Callable[[Array], Array],
    *,
    metric: Metric = ACCURACY,
    tile_pixels: int,
    dtype: str = "float32",
) -> Evaluation:
    """Measures the network with running statistics.

    Args:
      inputs: `[N, ...]`, images or sequences of any dtype that `prepare` turns into the network's, tile by tile.
      labels: i32 `[N]`, or i32 `[N, L]` of sequences, every token of which counts alike; these have no classes.
      metric: of the scores.
    """
    n_slots, size = state.stage.shape[0], inputs.shape[0]
    classes = model.host.n_outputs if labels.ndim == 1 else 0
    n = size
    if tile_pixels:
        n = max(1, min(size, tile_pixels // model.host.positions(inputs.shape)))
    tiles = -(-size // n)
    # the last tile is filled up with copies of the last example, which weigh nothing
    index = np.arange(tiles * n).reshape(tiles, n)
    weights = jnp.asarray(index < size, jnp.float32)
    index = jnp.asarray(np.minimum(index, size - 1), jnp.int32)

    live, fossil = networks.live_slots(model, state), state.stage == Stage.FOSSILIZED
    if n_slots <= attribution.MAX_TABLE_SLOTS:
        position, count = networks.distinct_configurations(live)
        main, kept = count - 1, attribution.committed(position, fossil)
        rows = 2**n_slots
        measure = lambda x: networks.forward_all_configurations(model, state, x, dtype=dtype)
    else:
        on = jnp.concatenate([jnp.asarray(attribution.configurations(n_slots)), fossil[None]])
        main, rows = 0, on.shape[0]
        kept, position = rows - 1, jnp.arange(rows - 1, dtype=jnp.int32)
        measure = lambda x: _forward_listed(model, state, x, on, live, dtype)
    counted = metric.per_nat is None  # then scores are of accuracies, else of losses

    def step(sums, entry):
        rows_of_tile, weight = entry
        label = labels[rows_of_tile]
        logits = measure(prepare(inputs[rows_of_tile]))  # [rows, n, ..., outputs]
        weight = jnp.expand_dims(weight, tuple(range(1, label.ndim)))  # of an example, for each of its labels
        right = lambda logits, label, weight: (logits.argmax(-1) == label).astype(jnp.float32) * weight
        loss = lambda logits, label, weight: _cross_entropy(logits, label) * weight
        # the scores need all rows, the other number two
        of_all = lambda fun: fun(logits, label[None], weight[None]).sum(tuple(range(1, 1 + label.ndim)))
        of_two = lambda fun: jnp.stack([fun(logits[row], label, weight).sum() for row in (main, kept)])
        new = (of_all(right), of_two(loss)) if counted else (of_two(right), of_all(loss))
        if classes:
            member = jax.nn.one_hot(label, classes, dtype=jnp.float32) * weight[:, None]
            new = (*new, right(logits[main], label, weight) @ member, member.sum(0))
        return jax.tree.map(jnp.add, sums, new), None

    sizes = ((rows, 2) if counted else (2, rows)) + (classes, classes) * bool(classes)
    zeros = tuple(jnp.zeros(length, jnp.float32) for length in sizes)
    (correct, nats, *by_class), _ = lax.scan(step, zeros, (index, weights))
    accuracy, loss = 100.0 * correct / labels.size, nats / labels.size
    scores = metric.score(accuracy, loss)  # of all rows
    two = jnp.stack([jnp.asarray(row, jnp.int32) for row in (main, kept)])
    accuracy, loss = (accuracy[two], loss) if counted else (accuracy, loss[two])
    of_class, in_class = by_class or (jnp.zeros(0, jnp.float32),) * 2
    return Evaluation(
        loss=loss[0],
        accuracy=accuracy[0],
        score=scores[main],
        table=scores[position],
        committed_loss=loss[1],
        committed_accuracy=accuracy[1],
        committed_score=scores[kept],
        per_class=100.0 * of_class / jnp.maximum(in_class, 1),
        per_class_valid=in_class > 0,
    )


def _cross_entropy(logits: Array, labels: Array) -> Array:
    """In nats, of `[..., outputs]` and i32 labels of a shape that spreads over the rest."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.broadcast_to(labels, logits.shape[:-1]))


def _forward_listed(model: Model, state: SlotState, x: Array, on: Array, live: Array, dtype: str) -> Array:
    """Logits under a list of on/off patterns bool[K, S], one after the other, `f32[K, N, classes]`."""

    def one(pattern):
        override = jnp.where(live & ~pattern, 0.0, jnp.nan)
        return networks.forward(model, state, x, override, dtype=dtype)[0]

    return lax.map(one, on)
