"""Tracker: the reference's worked example by hand, the latch, histories, peek, non-finite epochs, the summary seed."""

import chex
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from esper_jax.config import TrackerConfig
from esper_jax.env import tracker as T
from esper_jax.lifecycle import stages
from esper_jax.types import Stage

CFG = TrackerConfig()
LOSSES = (2.30, 2.00, 1.95, 1.91, 1.90, 1.99, 1.97, 1.96, 1.955, 1.95)
ACCURACIES = (12, 25, 30, 31, 31.2, 31.1, 31.7, 31.9, 32.0, 32.1)


_update = jax.jit(T.update, static_argnames="cfg")
peek = jax.jit(T.peek)


def update(state, **values):
    return _update(state, cfg=CFG, **values)


def given_values(epoch, loss, accuracy, slots=2):
    """Training numbers are the validation's plus a constant, so that they can be told apart."""
    return dict(
        epoch=jnp.asarray(epoch, jnp.int32),
        train_loss=jnp.asarray(loss, jnp.float32) + 1,
        train_score=jnp.asarray(accuracy, jnp.float32) + 2,
        val_loss=jnp.asarray(loss, jnp.float32),
        val_score=jnp.asarray(accuracy, jnp.float32),
        available_slots=jnp.asarray(slots, jnp.int32),
    )


def _run(losses, accuracies, cfg):
    def step(state, x):
        state, signals = T.update(state, cfg=cfg, **given_values(*x))
        return state, (signals, state)

    return jax.lax.scan(step, T.init(cfg), (jnp.arange(1, losses.size + 1), losses, accuracies))


_run = jax.jit(_run, static_argnums=2)


def run(losses, accuracies=None, cfg=CFG):
    accuracies = accuracies if accuracies is not None else [50.0] * len(losses)
    return _run(jnp.asarray(losses, jnp.float32), jnp.asarray(accuracies, jnp.float32), cfg)


def test_worked_example():
    last, (signals, state) = run(LOSSES, ACCURACIES)
    loss_delta = [np.inf, 0.3, 0.05, 0.04, 0.01, -0.09, 0.02, 0.01, 0.005, 0.005]
    np.testing.assert_allclose(signals.loss_delta, loss_delta, atol=1e-6)
    np.testing.assert_allclose(signals.score_delta, [12, 13, 5, 1, 0.2, -0.1, 0.6, 0.2, 0.1, 0.1], atol=1e-5)
    assert signals.plateau_epochs.tolist() == [0, 0, 0, 0, 1, 2, 0, 1, 2, 3]
    assert state.stable_epochs.tolist() == [0, 0, 1, 2, 3, 3, 3, 3, 3, 3]
    assert signals.host_stabilized.tolist() == [False] * 4 + [True] * 6
    np.testing.assert_allclose(signals.best_val_score, np.maximum.accumulate(np.float32(ACCURACIES)))
    np.testing.assert_allclose(signals.best_val_loss, np.minimum.accumulate(np.float32(LOSSES)))
    np.testing.assert_allclose(signals.train_loss, np.float32(LOSSES) + 1)
    np.testing.assert_allclose(signals.train_score, np.float32(ACCURACIES) + 2)
    assert signals.epoch.tolist() == list(range(1, 11)) and (signals.available_slots == 2).all()
    chex.assert_trees_all_equal(last.latest, jax.tree.map(lambda a: a[-1], signals))


def test_ordinary_noise_counts_as_stable():
    _, (signals, state) = run([2.0, 1.99, 2.00, 1.99, 1.985])
    assert state.stable_epochs.tolist() == [0, 1, 2, 3, 3]
    assert signals.host_stabilized.tolist() == [False, False, False, True, True]


@pytest.mark.parametrize(
    ("losses", "stable"),
    [
        # powers of two make the relative changes exact; the config below has the edges 1/16 and -1/8
        ([2.0, 1.875], 0),  # +1/16: not below the upper edge
        ([2.0, 1.876], 1),
        ([2.0, 2.25], 0),  # -1/8
        ([2.0, 2.249], 1),
        ([0.0, 1.0], 0),  # no relative change of zero
        ([1e-8, 1e-8], 0),  # nor of next to nothing
    ],
)
def test_edges_of_stability(losses, stable):
    cfg = TrackerConfig(stabilization_threshold=1 / 16, regression_threshold=1 / 8)
    last, _ = run(losses, cfg=cfg)
    assert last.stable_epochs == stable


def test_count_is_kept_while_the_loss_is_zero():
    last, (_, state) = run([1.0, 1.0, 0.0, 0.0])
    assert state.stable_epochs.tolist() == [0, 1, 0, 0]  # the drop from 1 to 0 is no stability; then nothing changes
    last, _ = run([1.0, 1.0, 1.0])
    last = last.replace(latest=last.latest.replace(val_loss=jnp.float32(0)))
    after, _ = update(last, **given_values(4, 0.0, 50))
    assert after.stable_epochs == 2


def test_latch_without_a_wait():
    _, (signals, _) = run([2.0, 5.0], cfg=TrackerConfig(stabilization_epochs=0))
    assert signals.host_stabilized.all() and T.init(TrackerConfig(stabilization_epochs=0)).stabilized
    assert not T.init(CFG).stabilized


def test_plateau_edge_is_strict_and_a_regression_counts():
    _, (signals, _) = run([1.0] * 4, [10.0, 10.5, 10.75, 5.0])
    assert signals.plateau_epochs.tolist() == [0, 0, 1, 2]


def test_histories_are_oldest_first_and_right_aligned():
    _, (signals, _) = run(LOSSES, ACCURACIES)
    assert signals.history_valid[0].tolist() == [False] * 4 + [True]
    assert signals.history_valid[2].tolist() == [False] * 2 + [True] * 3
    np.testing.assert_allclose(signals.loss_history[2, 2:], np.float32(LOSSES[:3]))
    np.testing.assert_allclose(signals.loss_history[-1], np.float32(LOSSES[-5:]))
    np.testing.assert_allclose(signals.score_history[-1], np.float32(ACCURACIES[-5:]))
    assert (signals.loss_history[0, :4] == 0).all()


def test_best_loss_is_of_the_window():
    cfg = TrackerConfig(history_window=5)
    _, (signals, _) = run([1.0, 2, 3, 4, 5, 6], cfg=cfg)
    assert signals.best_val_loss.tolist() == [1, 1, 1, 1, 1, 2]


def test_peek_changes_nothing():
    state, (signals, _) = run(LOSSES, ACCURACIES)
    now = jax.tree.map(lambda a: a[-1], signals)
    same = peek(state, **given_values(10, LOSSES[-1], ACCURACIES[-1]))
    chex.assert_trees_all_equal(same, now.replace(loss_delta=jnp.float32(0), score_delta=jnp.float32(0)))
    other = peek(state, **given_values(11, 1.5, 40.0, slots=1))
    np.testing.assert_allclose(other.loss_delta, 1.95 - 1.5, rtol=1e-5)
    assert (other.best_val_loss, other.best_val_score, other.plateau_epochs) == (1.5, 40, 3)
    assert other.epoch == 11 and other.available_slots == 1
    chex.assert_trees_all_equal(other.loss_history, now.loss_history)  # the value peeked at is not in it
    empty = peek(T.init(CFG), **given_values(1, 2.3, 12))
    assert np.isinf(empty.loss_delta) and empty.score_delta == 12 and not empty.history_valid.any()
    assert empty.best_val_loss == np.float32(2.3)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_non_finite_validation_leaves_the_tracker_alone(bad):
    before, (signals, _) = run(LOSSES, ACCURACIES)
    after, seen = update(before, **given_values(11, bad, 10.0, slots=3))
    chex.assert_trees_all_equal(after, before)
    latest = jax.tree.map(lambda a: a[-1], signals)
    chex.assert_trees_all_equal(seen, latest.replace(epoch=jnp.int32(11), available_slots=jnp.int32(3)))
    peeked = peek(before, **given_values(11, bad, 10.0))
    assert peeked.val_loss == latest.val_loss and peeked.loss_delta == 0
    chex.assert_tree_all_finite(peeked)


def test_a_non_finite_first_epoch_leaves_nothing():
    after, seen = update(T.init(CFG), **given_values(1, np.nan, np.nan))
    chex.assert_trees_all_equal(after, T.init(CFG))
    assert not seen.history_valid.any()
    chex.assert_tree_all_finite(seen.replace(loss_delta=jnp.float32(0)))
    _, seen = update(after, **given_values(2, 2.0, 20.0))
    assert np.isinf(seen.loss_delta) and seen.plateau_epochs == 0


def test_a_non_finite_training_loss_alone_is_passed_over():
    values = given_values(2, 2.0, 20.0) | dict(train_loss=jnp.float32(np.inf))
    state, _ = update(T.init(CFG), **given_values(1, 3.0, 10.0))
    state, seen = update(state, **values)
    assert seen.train_loss == 4 and seen.train_score == 22 and seen.val_loss == 2 and state.count == 2


@settings(deadline=None, max_examples=20)
@given(
    st.lists(st.sampled_from([0.0, 0.1, 1.0, 1.01, 2.0, 30.0, float("nan")]), min_size=12, max_size=12),
    st.lists(st.floats(0, 100, width=32), min_size=12, max_size=12),
)
def test_invariants(losses, accuracies):
    _, (signals, state) = run(losses, accuracies)
    latch = np.asarray(signals.host_stabilized)
    assert (latch[1:] >= latch[:-1]).all() and not latch[: CFG.stabilization_epochs].any()
    assert (np.diff(signals.best_val_score) >= 0).all()
    assert (signals.plateau_epochs <= signals.epoch).all() and (signals.history_valid.sum(1) <= state.count).all()
    chex.assert_tree_all_finite(signals.replace(loss_delta=jnp.zeros(12)))


def test_one_bad_environment_leaves_the_others():
    losses = jnp.tile(jnp.asarray(LOSSES, jnp.float32), (3, 1))
    accuracies = jnp.tile(jnp.asarray(ACCURACIES, jnp.float32), (3, 1))
    population = jax.vmap(lambda a, b: _run(a, b, CFG))
    healthy, sick = population(losses, accuracies), population(losses.at[1, 4].set(jnp.nan), accuracies)
    others = lambda tree: jax.tree.map(lambda a: a[jnp.array([0, 2])], tree)
    chex.assert_trees_all_equal(others(healthy), others(sick))


def slots_with(stage, alpha, contribution):
    slots = stages.empty(len(stage))
    contribution = np.asarray(contribution, float)
    metrics = slots.metrics.replace(
        contribution=jnp.asarray(np.nan_to_num(contribution), jnp.float32),
        contribution_valid=jnp.asarray(~np.isnan(contribution)),
        current_score=jnp.arange(len(stage)) + 1.0,
    )
    slots = slots.replace(stage=jnp.array([int(s) for s in stage], jnp.int32), metrics=metrics)
    epochs = jnp.arange(len(stage), dtype=jnp.int32) + 10
    return slots.replace(epochs_in_stage=epochs, alpha=slots.alpha.replace(alpha=jnp.asarray(alpha, jnp.float32)))


@pytest.mark.parametrize(
    ("stage", "alpha", "contribution", "chosen"),
    [
        ((Stage.TRAINING, Stage.FOSSILIZED, Stage.HOLDING), (0, 1, 1), (0, 0, 0), 1),  # stage
        ((Stage.BLENDING, Stage.BLENDING, Stage.TRAINING), (0.2, 0.6, 1), (0, 0, 0), 1),  # alpha
        ((Stage.HOLDING, Stage.HOLDING, Stage.HOLDING), (1, 1, 1), (2, -1, np.nan), 1),  # lowest contribution
        ((Stage.HOLDING, Stage.HOLDING, Stage.HOLDING), (1, 1, 1), (np.nan, 9, np.nan), 1),  # any measured one
        ((Stage.HOLDING, Stage.HOLDING, Stage.DORMANT), (1, 1, 0), (np.nan, np.nan, 0), 1),  # later slot
        ((Stage.EMBARGOED, Stage.GERMINATED, Stage.PRUNED), (1, 0, 1), (0, 0, 0), 1),  # cooling slots hold no seed
    ],
)
def test_summary_seed(stage, alpha, contribution, chosen):
    seed = jax.jit(T.summary_seed)(slots_with(stage, alpha, contribution))
    assert seed.stage == stage[chosen] and seed.epochs_in_stage == 10 + chosen and seed.improvement == chosen + 1
    np.testing.assert_allclose(seed.alpha, alpha[chosen])


def test_summary_without_seeds_is_zero():
    seed = T.summary_seed(slots_with((Stage.DORMANT, Stage.RESETTING), (1, 1), (1, 1)))
    assert jax.tree.leaves(seed) == [0, 0, 0, 0]
