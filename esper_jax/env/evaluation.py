"""Evaluation: the one way in which accuracies are measured (Esper's Tolaria and Simic).

One pass over a split measures the network under all on/off configurations of its slots, plus loss and per-class
accuracy of the network as it is. Validation during an episode and the report test at its end are the same function.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax import lax

from esper_jax.env import attribution
from esper_jax.network import layers
from esper_jax.network import model as networks
from esper_jax.network.model import Model
from esper_jax.types import Array, SlotState, Stage


@struct.dataclass
class Evaluation:
    """Accuracies are percentage points over all images."""

    loss: Array  # f32[] mean cross-entropy of the network as it is
    accuracy: Array  # f32[] of the network as it is
    table: Array  # f32[K] under each of attribution.configurations(S)
    committed: Array  # f32[] with everything off that is not fossilised
    committed_loss: Array  # f32[] mean cross-entropy of that network
    per_class: Array  # f32[classes] of the network as it is
    per_class_valid: Array  # bool[classes] the class occurs in the images


def evaluate(model: Model, state: SlotState, images: Array, labels: Array, prepare, *, tile_pixels: int) -> Evaluation:
    """Measures the network with running statistics.

    Args:
      images: `[N, H, W, C]`, any dtype that `prepare` turns into the network's input, tile by tile.
      labels: i32 `[N]`.
    """
    total, height, width, _ = images.shape
    n_slots = state.stage.shape[0]
    classes = model.host.params.bias.shape[0]
    n = total if tile_pixels == 0 else max(1, min(total, tile_pixels // (height * width)))
    tiles = -(-total // n)
    # the last tile is filled up with copies of the last image, which weigh nothing
    index = np.arange(tiles * n).reshape(tiles, n)
    weights = jnp.asarray(index < total, jnp.float32)
    index = jnp.asarray(np.minimum(index, total - 1), jnp.int32)

    live, fossil = networks.live_slots(model, state), state.stage == Stage.FOSSILIZED
    if n_slots <= attribution.MAX_TABLE_SLOTS:
        position, count = networks.distinct_configurations(live)
        main, kept = count - 1, attribution.committed(position, fossil)
        rows = 2**n_slots
        measure = lambda tile: networks.forward_all_configurations(model, state, tile)
    else:
        on = jnp.concatenate([jnp.asarray(attribution.configurations(n_slots)), fossil[None]])
        main, rows = 0, on.shape[0]
        kept = rows - 1
        measure = lambda tile: _forward_listed(model, state, tile, on, live)

    def step(sums, entry):
        rows_of_tile, weight = entry
        label = labels[rows_of_tile]
        logits = measure(layers.to_tiles(prepare(images[rows_of_tile]))[0])  # [rows, n, classes]
        right = (logits.argmax(-1) == label[None]).astype(jnp.float32) * weight[None]
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels
        loss = jnp.stack([(cross_entropy(logits[row], label) * weight).sum() for row in (main, kept)])
        member = jax.nn.one_hot(label, classes, dtype=jnp.float32) * weight[:, None]
        new = (right.sum(1), loss, right[main] @ member, member.sum(0))
        return jax.tree.map(jnp.add, sums, new), None

    zeros = tuple(jnp.zeros(size, jnp.float32) for size in (rows, 2, classes, classes))
    (correct, loss, class_correct, class_total), _ = lax.scan(step, zeros, (index, weights))
    accuracies = 100.0 * correct / total
    if n_slots <= attribution.MAX_TABLE_SLOTS:
        table = accuracies[position]
        committed = attribution.committed(table, fossil)
    else:
        table, committed = accuracies[:-1], accuracies[-1]
    return Evaluation(
        loss=loss[0] / total,
        accuracy=accuracies[main],
        table=table,
        committed=committed,
        committed_loss=loss[1] / total,
        per_class=100.0 * class_correct / jnp.maximum(class_total, 1),
        per_class_valid=class_total > 0,
    )


def _forward_listed(model: Model, state: SlotState, tile: Array, on: Array, live: Array) -> Array:
    """Logits under a list of on/off patterns bool[K, S], one after the other, `f32[K, N, classes]`."""
    x = layers.from_tiles(tile[None])

    def one(pattern):
        override = jnp.where(live & ~pattern, 0.0, jnp.nan)
        return networks.forward(model, state, x, override)[0]

    return lax.map(one, on)
