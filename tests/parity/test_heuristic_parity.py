"""Heuristic against the reference: whole sequences of decisions and the memory after each.

Followed is `head`; `seed` germinates without a free slot and takes the host's gain for a missing contribution.
"""

import functools

import golden
import jax
import jax.numpy as jnp
import numpy as np

from esper_jax.config import TrackerConfig
from esper_jax.control import heuristic as H
from esper_jax.env import tracker
from esper_jax.lifecycle import stages
from esper_jax.types import BLUEPRINTS, AlphaMode, Op, Stage

CONFIG = {
    "plateau_epochs": "plateau_epochs_to_germinate",
    "min_epochs": "min_epochs_before_germinate",
    "prune_patience": "prune_after_epochs_without_improvement",
    "prune_drop": "prune_if_accuracy_drops_by",
    "min_contribution": "min_improvement_to_fossilize",
    "embargo_epochs": "embargo_epochs_after_prune",
    "penalty_on_prune": "blueprint_penalty_on_prune",
    "penalty_decay": "blueprint_penalty_decay",
    "penalty_threshold": "blueprint_penalty_threshold",
    "ransom_contribution": "ransomware_contribution_threshold",
    "ransom_improvement": "ransomware_improvement_threshold",
}


def config(case):
    of = golden.sub(case, "config")
    rotation = tuple(BLUEPRINTS[i] for i in of["rotation"])
    return H.HeuristicConfig(
        rotation=rotation, available=rotation, **{ours: float(of[theirs]) for ours, theirs in CONFIG.items()}
    )


def inputs(case):
    """Signals and slots with a leading epoch axis."""
    given = golden.sub(case, "in")
    f = lambda name: jnp.asarray(np.nan_to_num(given[name]), jnp.float32)
    i = lambda name: jnp.asarray(given[name], jnp.int32)
    epochs, n_slots = given["stage"].shape
    repeat = lambda tree: jax.tree.map(lambda a: jnp.broadcast_to(a, (epochs, *a.shape)), tree)
    signals = repeat(tracker.init(TrackerConfig()).latest).replace(
        epoch=i("epoch"),
        plateau_epochs=i("plateau_epochs"),
        host_stabilized=i("host_stabilized") == 1,
        available_slots=i("available_slots"),
    )
    # A record labelled DORMANT is a seed in no useful stage there; here DORMANT is the empty slot.
    stage = given["stage"]
    stage = np.where(stage < 0, Stage.DORMANT, np.where(stage == Stage.DORMANT, Stage.UNKNOWN, stage))
    slots = repeat(stages.empty(n_slots))
    slots = slots.replace(
        stage=jnp.asarray(stage, jnp.int32),
        epochs_in_stage=i("epochs_in_stage"),
        blueprint=i("blueprint"),
        alpha=slots.alpha.replace(
            alpha=f("alpha"), target=f("alpha_target"), mode=jnp.maximum(i("alpha_mode"), AlphaMode.HOLD)
        ),
        # Improvements over an accuracy of 0, so that they are not rounded a second time.
        metrics=slots.metrics.replace(
            stage_start_score=-f("improvement_stage"),
            initial_score=-f("improvement_total"),
            contribution=f("contribution"),
            contribution_valid=jnp.asarray(np.isfinite(given["contribution"])),
        ),
    )
    return signals, slots


@functools.partial(jax.jit, static_argnames="cfg")
def run(cfg, signals, slots):
    """Every decision and the memory after it."""

    def step(state, x):
        state, decision = H.decide(state, *x, cfg)
        return state, (decision, state)

    return jax.lax.scan(step, H.init(cfg), (signals, slots))[1]


@golden.each_case("heuristic")
def test_sequence(case):
    cfg, (signals, slots) = config(case), inputs(case)
    decision, state = jax.tree.map(np.asarray, run(cfg, signals, slots))
    expected = golden.sub(case, "head")
    for name in ("op", "reason"):
        golden.close(getattr(decision, name), expected[name], name)
    for name in ("rotation_index", "last_prune_epoch", "germinations"):
        golden.close(getattr(state, name), expected[name], name)
    golden.close(decision.confidence, expected["confidence"], "confidence", rtol=1e-5)
    golden.close(state.penalty, expected["penalty"], "penalty", rtol=1e-5)

    germinates = decision.op == Op.GERMINATE
    golden.close(decision.blueprint[germinates], expected["blueprint"][germinates], "blueprint")
    targeted = expected["target_slot"] >= 0
    golden.close(decision.slot[targeted], expected["target_slot"][targeted], "target_slot")
    first_empty = np.argmax(np.asarray(slots.stage) == Stage.DORMANT, axis=1)
    np.testing.assert_array_equal(decision.slot[germinates], first_empty[germinates])
