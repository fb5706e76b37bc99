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

# Examples that are evaluated at a time where a tile is as large as it can be. All of a split's at once would take the
# memory of features of up to eight configurations of every environment of a chunk, 39 GB for 64 of them and 10,000
# images; a GPU is busy with much less.
LARGEST_TILE = 1_024


@struct.dataclass
class Evaluation:
    """Over all images, or over all tokens. Accuracies are percentage points, losses mean cross-entropies in nats."""

    loss: Array  # f32[] of the network as it is
    accuracy: Array  # f32[]
    score: Array  # f32[] see `metric.Metric`
    table: Array  # f32[K] score under each of attribution.configurations(S)
    losses: Array  # f32[K] loss under each of them
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
    n = tile_pixels // model.host.positions(inputs.shape) if tile_pixels else LARGEST_TILE
    n = max(1, min(size, n))
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
        forward = lambda x, *read: networks.forward_all_configurations(model, state, x, *read, dtype=dtype)
    else:
        on = jnp.concatenate([jnp.asarray(attribution.configurations(n_slots)), fossil[None]])
        main, rows = 0, on.shape[0]
        kept, position = rows - 1, jnp.arange(rows - 1, dtype=jnp.int32)
        forward = lambda x, read, *operands: _forward_listed(
            model, state, x, lambda logits: read(logits, *operands), on, live, dtype
        )

    cross_entropy = optax.softmax_cross_entropy_with_integer_labels  # in nats

    def read(logits, label, weight):
        return jnp.stack([top_1(logits, label), cross_entropy(logits, label)]) * weight[None]

    def step(sums, entry):
        rows_of_tile, weight = entry
        label = labels[rows_of_tile]
        weight = jnp.expand_dims(weight, tuple(range(1, label.ndim)))  # of an example, for each of its labels
        x = prepare(inputs[rows_of_tile])
        correct, nats = forward(x, read, label, weight).swapaxes(0, 1)  # each [rows, n, ...]
        new = [each.sum(tuple(range(1, each.ndim))) for each in (correct, nats)]
        if classes:
            member = jax.nn.one_hot(label, classes, dtype=jnp.float32) * weight[:, None]
            new += [correct[main] @ member, member.sum(0)]
        return jax.tree.map(jnp.add, sums, new), None

    zeros = [jnp.zeros(length, jnp.float32) for length in (rows, rows) + (classes, classes) * bool(classes)]
    (correct, nats, *by_class), _ = lax.scan(step, zeros, (index, weights))
    accuracy, loss = 100.0 * correct / labels.size, nats / labels.size
    scores = metric.score(accuracy, loss)
    of_class, in_class = by_class or (jnp.zeros(0, jnp.float32),) * 2
    return Evaluation(
        loss=loss[main],
        accuracy=accuracy[main],
        score=scores[main],
        table=scores[position],
        losses=loss[position],
        committed_loss=loss[kept],
        committed_accuracy=accuracy[kept],
        committed_score=scores[kept],
        per_class=100.0 * of_class / jnp.maximum(in_class, 1),
        per_class_valid=in_class > 0,
    )


def top_1(logits: Array, labels: Array) -> Array:
    """1 where the label is the first of the largest of the `[..., outputs]`, else 0: f32 of the labels' shape.

    As `argmax` would say, which compilers do not vectorise. A row with NaN is wrong.
    """
    places = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    before = places < labels[..., None]
    picked = jnp.take_along_axis(logits, labels[..., None], axis=-1)
    return jnp.where(before, logits < picked, logits <= picked).all(-1).astype(jnp.float32)


def _forward_listed(
    model: Model, state: SlotState, x: Array, read: Callable[[Array], Array], on: Array, live: Array, dtype: str
) -> Array:
    """What `read` makes of the logits under a list of on/off patterns bool[K, S], one after the other: `[K, ...]`.

    Patterns that differ in slots that are not live are the same network, which runs once.
    """
    off = live[None] & ~on
    first = jnp.argmax((off[:, None] == off[None]).all(-1), axis=1)  # i32[K] the first pattern that is the same

    def one(pattern):
        override = jnp.where(pattern, 0.0, jnp.nan)
        return read(networks.forward(model, state, x, override, dtype=dtype)[0])

    def step(out, k):
        return out.at[k].set(lax.cond(first[k] == k, lambda: one(off[k]), lambda: out[first[k]])), None

    shape = jax.eval_shape(one, off[0])
    out = jnp.zeros((on.shape[0], *shape.shape), shape.dtype)
    return lax.scan(step, out, jnp.arange(on.shape[0]))[0]
