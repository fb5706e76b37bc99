"""Tracker against the reference: `update` and `peek` along whole sequences, and the summary seed.

Followed is `head`, which differs from `seed` in the rule of stability.
"""

import functools

import golden
import jax
import jax.numpy as jnp
import numpy as np

from esper_jax.config import TrackerConfig
from esper_jax.env import tracker as T
from esper_jax.lifecycle import stages
from esper_jax.types import Stage

EXACT = ("plateau_epochs", "host_stabilized")
CLOSE = ("loss_delta", "accuracy_delta", "best_val_accuracy", "best_val_loss")
OURS = {
    "train_accuracy": "train_score", "val_accuracy": "val_score", "accuracy_delta": "score_delta",
    "best_val_accuracy": "best_val_score", "accuracy_history": "score_history",
}  # fmt: skip


def config(case):
    of = golden.sub(case, "config")
    whole = ("history_window", "stabilization_epochs")
    return TrackerConfig(**{name: int(value) if name in whole else float(value) for name, value in of.items()})


@functools.partial(jax.jit, static_argnames="cfg")
def run(cfg, inputs):
    """Signals of `peek` just before every `update`, those of the update, and the state after it."""

    def step(state, x):
        epoch, values = x
        values = dict(epoch=epoch, available_slots=jnp.int32(1), **values)
        peeked = T.peek(state, **values)
        state, signals = T.update(state, cfg=cfg, **values)
        return state, (peeked, signals, state)

    return jax.lax.scan(step, T.init(cfg), (jnp.arange(1, inputs["val_loss"].shape[0] + 1), inputs))[1]


def close(actual, expected, what):
    """1e-5 relative; the absolute part is that of a difference of accuracies up to 100 in float32."""
    golden.close(actual, expected, what, rtol=1e-5, atol=1e-5)


def history(actual, valid, expected, what):
    np.testing.assert_array_equal(valid, np.isfinite(expected))
    close(np.where(valid, actual, np.nan), expected, what)


@golden.each_case("tracker")
def test_sequences(case):
    given = golden.sub(case, "in")
    inputs = {OURS.get(name, name): jnp.asarray(values) for name, values in given.items() if "/" not in name}
    peeked, signals, state = jax.tree.map(np.asarray, run(config(case), inputs))
    expected = golden.sub(case, "head")
    for name in EXACT:
        golden.close(getattr(signals, name), expected[name], name)
        golden.close(getattr(peeked, name), expected[f"peek_{name}"], f"peek_{name}")
    for name in CLOSE:
        ours = OURS.get(name, name)
        close(getattr(signals, ours), expected[name], name)
        close(getattr(peeked, ours), expected[f"peek_{name}"], f"peek_{name}")
    golden.close(state.stable_epochs, expected["stable_count"], "stable_count")
    golden.close(signals.history_valid.sum(1), expected["history_length"], "history_length")
    for name in ("loss_history", "accuracy_history"):
        ours = OURS.get(name, name)
        history(getattr(signals, ours), signals.history_valid, expected[name], name)
        history(getattr(peeked, ours)[1:], peeked.history_valid[1:], expected[name][:-1], f"peek_{name}")


@golden.each_case("tracker", lambda case: "in/seeds/stage" in case)
def test_summary_seed(case):
    seeds, expected = golden.sub(case, "in/seeds"), golden.sub(case, "head")
    numbers = lambda name: jnp.asarray(np.nan_to_num(seeds[name]), jnp.float32)
    present = jnp.asarray(seeds["stage"] >= 0)

    def one(stage, epochs, alpha, contribution, measured, improvement):
        slots = stages.empty(stage.shape[0])
        metrics = slots.metrics.replace(
            contribution=contribution, contribution_valid=measured, current_score=improvement
        )
        ramps = slots.alpha.replace(alpha=alpha)
        return T.summary_seed(slots.replace(stage=stage, epochs_in_stage=epochs, alpha=ramps, metrics=metrics))

    actual = jax.jit(jax.vmap(one))(
        jnp.where(present, jnp.asarray(seeds["stage"], jnp.int32), Stage.DORMANT),
        jnp.asarray(seeds["epochs_in_stage"], jnp.int32),
        numbers("alpha"),
        numbers("contribution"),
        jnp.asarray(np.isfinite(seeds["contribution"])),
        numbers("improvement"),
    )
    golden.close(actual.stage, expected["seed_stage"], "seed_stage")
    golden.close(actual.epochs_in_stage, expected["seed_epochs_in_stage"], "seed_epochs_in_stage")
    close(actual.alpha, expected["seed_alpha"], "seed_alpha")
    close(actual.improvement, expected["seed_improvement"], "seed_improvement")
