"""Governor: the reference's worked examples, boundaries, independence of environments, rollback on a small model."""

from typing import Any

import chex
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from hypothesis import given, settings

from esper_jax.config import GovernorConfig
from esper_jax.env import governor as G
from esper_jax.lifecycle import stages
from esper_jax.types import AlphaMode, PanicReason, Stage

CFG = GovernorConfig()
LN10 = float(np.log(10))


@jax.jit
def _step(state, loss, rolls_back, random_guess_loss):
    """One check, followed by a rollback's bookkeeping where it panics and `rolls_back`."""
    state, verdict = G.check(state, loss, cfg=CFG, random_guess_loss=random_guess_loss)
    stats = G.statistics(state, CFG)
    after = G.select(verdict.panic & rolls_back, G.after_rollback(state), state)
    return after, (verdict, state, stats)


@jax.jit
def _trace(losses, rolls_back, random_guess_loss):
    return jax.lax.scan(lambda s, loss: _step(s, loss, rolls_back, random_guess_loss), G.init(CFG), losses)


def trace(losses, *, rolls_back=True, random_guess_loss=LN10):
    """Verdicts and states along a sequence, padded to 24 losses so that one program serves all."""
    padded = jnp.asarray(list(losses) + [1.0] * (24 - len(losses)), jnp.float32)
    _, out = _trace(padded, rolls_back, random_guess_loss)
    return jax.tree.map(lambda a: np.asarray(a)[: len(losses)], out)


def test_gradual_learning_then_divergence():  # example A
    losses = [2.30, 2.10, 1.90, 1.80, 1.70, 1.60, 1.55, 1.50, 1.45, 1.40, 13.0, 14.0, 15.0, 1.38]
    verdict, state, stats = trace(losses)
    assert verdict.panic.tolist() == [False] * 12 + [True, False]
    assert verdict.accepted.tolist() == [True] * 10 + [False] * 3 + [True]
    assert verdict.consecutive.tolist() == [0] * 10 + [1, 2, 3, 0]
    assert state.count.tolist() == list(range(1, 11)) + [10, 10, 10, 11]
    assert verdict.reason[10:].tolist() == [PanicReason.DIVERGENCE] * 3 + [PanicReason.NONE]
    # mean 17.3 / 10; the mean square is 3.0715, so the variance is 3.0715 - 1.73^2 = 0.0786
    np.testing.assert_allclose(stats.mean[9:13], 1.73, rtol=1e-6)
    np.testing.assert_allclose(stats.std[9:13], np.sqrt(0.0786), rtol=1e-5)
    np.testing.assert_allclose(verdict.threshold[10:14], 3.412141, rtol=1e-6)
    assert state.panic_loss[10:].tolist() == [13, 14, 15, 0]
    assert state.pending[10:].tolist() == [True, True, True, False]


def test_recovery_ends_the_run():  # example B
    verdict, state, _ = trace([1.0] * 10 + [13, 13, 1, 13, 13, 13, 13])
    assert verdict.consecutive[10:].tolist() == [1, 2, 0, 1, 2, 3, 1]  # the last one comes after a rollback
    assert verdict.panic[10:].tolist() == [False] * 5 + [True, False]
    assert verdict.threshold[15] == 1 and state.count[15] == 11
    assert state.panic_loss[12] == 0 and state.reason[12] == PanicReason.NONE


def test_band_of_random_guessing():  # example C: the band around ln 10 is (2.152917, 2.452253)
    losses = [0.8] * 10 + [2.16, 2.1529, 2.1530, 2.302585, 2.45, 2.4523]
    verdict, state, _ = trace(losses, rolls_back=False)
    assert verdict.panic[10:].tolist() == [True, False, True, True, True, False]
    assert verdict.accepted[10:].tolist() == [False, True, False, False, False, True]
    assert verdict.reason[10:].tolist() == [2, 0, 2, 2, 2, 0]
    assert verdict.consecutive.tolist() == [0] * 16  # a lobotomy is no part of a run of divergences
    assert state.count[-1] == 12


def test_non_finite_before_the_history_is_long_enough():  # example D
    verdict, state, _ = trace([1.0, 1.1, np.nan, 1.05])
    assert verdict.panic.tolist() == [False, False, True, False]
    assert verdict.reason.tolist() == [0, 0, PanicReason.NON_FINITE, 0]
    assert np.isnan(state.panic_loss[2])
    # mean 1.05, deviation 0.05, six of them above the mean
    np.testing.assert_allclose(verdict.threshold, [0, 1, 1.35, 1.35], rtol=1e-6)
    assert state.count.tolist() == [1, 2, 2, 3]


def test_only_accepted_losses_may_be_snapshot():  # example E: divergence at epochs 14 to 16, cadence 5
    losses = [1.0] * 13 + [27, 28, 29]
    verdict, _, _ = trace(losses)
    assert verdict.panic.tolist() == [False] * 15 + [True]
    taken = [epoch for epoch, accepted in enumerate(verdict.accepted, 1) if accepted and epoch % 5 == 0]
    assert taken == [5, 10]


@pytest.mark.parametrize("loss", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("before", [0, 12])
def test_every_non_finite_loss_panics_at_once(loss, before):
    verdict, state, stats = trace([1.0] * before + [loss])
    assert verdict.panic[-1] and not verdict.accepted[-1] and verdict.reason[-1] == PanicReason.NON_FINITE
    assert state.count[-1] == before and verdict.consecutive[-1] == 0
    assert np.isfinite(stats.mean).all() and np.isfinite(verdict.threshold).all()


@pytest.mark.parametrize(
    ("history", "edge"),
    [
        ([1.0] * 10, 12.0),  # std 0, three times the mean 3: the absolute threshold decides
        ([5.0] * 10, 15.0),  # three times the mean
        # mean 4, std 2: both edges 16 and 12; with the losses 2 and 6 six deviations decide
        ([2.0, 6.0] * 5, 16.0),
    ],
)
def test_thresholds_are_strict(history, edge):
    up = float(np.nextafter(np.float32(edge), np.float32(np.inf)))
    for loss, fires in ((edge, False), (up, True)):
        verdict, _, _ = trace([*history, loss], random_guess_loss=1e-3)
        assert verdict.reason[-1] == (PanicReason.DIVERGENCE if fires else PanicReason.NONE)
        assert verdict.accepted[-1] == (not fires)


def test_lobotomy_needs_a_history_below_its_threshold():
    # R = 10: the mean must be below 6 and the loss inside (9.35, 10.65); all of them exact in float32
    lobotomy = lambda mean, loss: trace([mean] * 10 + [loss], random_guess_loss=10.0)[0].reason[-1] == 2
    assert lobotomy(5.75, 10.0) and lobotomy(5.75, 9.5) and lobotomy(5.75, 10.5)
    assert not lobotomy(6.0, 10.0) and not lobotomy(5.75, 9.25) and not lobotomy(5.75, 10.75)
    assert trace([0.5] * 9 + [10.0], random_guess_loss=10.0)[0].accepted.all()  # warm-up


def test_order_of_reasons():
    # inside the band and above every threshold: both rules apply, lobotomy is named
    state = G.init(CFG).replace(history=jnp.full(20, 0.5), count=jnp.int32(20))
    on = G.fired(G.statistics(state, CFG), jnp.float32(14.0), cfg=CFG, random_guess_loss=14.0)
    assert jax.tree.map(bool, on) == {"non_finite": False, "lobotomy": True, "divergence": True}
    _, verdict = G.check(state, jnp.float32(14.0), cfg=CFG, random_guess_loss=14.0)
    assert verdict.reason == PanicReason.LOBOTOMY and verdict.panic


def test_another_detector_can_take_a_name():
    twice = lambda stats, loss, cfg, _: stats.ready & (loss > 2 * stats.mean)
    table = {**G.DETECTORS, "divergence": twice}
    state = G.init(CFG).replace(history=jnp.ones(20), count=jnp.int32(20))
    for consecutive in (1, 2, 3):
        state, verdict = G.check(state, jnp.float32(3.5), cfg=CFG, random_guess_loss=LN10, detectors=table)
        assert verdict.consecutive == consecutive and verdict.panic == (consecutive == 3)
    fired = G.fired(
        G.statistics(state, CFG),
        jnp.float32(3.5),
        cfg=CFG,
        random_guess_loss=LN10,
        detectors={"a": twice, **G.DETECTORS},
    )
    assert fired["a"] and not fired["divergence"]


def test_huge_accepted_losses_do_not_overflow_the_deviation():
    # four of 1e30, six of 0: mean 4e29, variance 1e60 * 0.4 * 0.6, deviation 4.9e29
    _, _, stats = trace([1e30] * 4 + [0.0] * 6)
    np.testing.assert_allclose(stats.mean[-1], 4e29, rtol=1e-5)
    np.testing.assert_allclose(stats.std[-1], np.sqrt(0.24) * 1e30, rtol=1e-5)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.floats(0, 9, width=32), min_size=24, max_size=24))
def test_ordinary_losses_never_panic(losses):
    verdict, _, _ = trace(losses, random_guess_loss=1e9)
    assert not verdict.panic.any() and not verdict.consecutive.any()


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.sampled_from([0.5, 1.0, 2.3, 11.0, 13.0, 40.0, float("nan"), float("inf")]), min_size=24, max_size=24)
)
def test_invariants(losses):
    verdict, state, stats = trace(losses)
    assert (state.count == np.minimum(np.cumsum(verdict.accepted), CFG.history_window)).all()
    assert (verdict.accepted == (verdict.reason == PanicReason.NONE)).all()
    assert (verdict.panic <= ~verdict.accepted).all()
    assert (verdict.consecutive <= CFG.min_panics).all()
    chex.assert_tree_all_finite((state.history, stats, verdict))


def test_window_forgets_the_oldest():
    cfg = GovernorConfig(history_window=10)
    state = G.init(cfg)
    for loss in range(12):
        state, _ = G.check(state, jnp.float32(loss), cfg=cfg, random_guess_loss=1e9)
    assert state.history.tolist() == list(range(2, 12)) and state.count == 10


def test_window_shorter_than_the_least_history_is_rejected():
    with pytest.raises(ValueError, match="history_window"):
        GovernorConfig(history_window=9)


def test_environments_are_independent():
    losses = jnp.tile(jnp.linspace(2.3, 1.0, 16)[None], (3, 1))
    broken = losses.at[1, 7].set(jnp.nan).at[1, 12:].set(30.0)
    run = jax.jit(jax.vmap(lambda row: jax.lax.scan(lambda s, x: _step(s, x, True, LN10), G.init(CFG), row)))
    healthy, sick = run(losses), run(broken)
    others = lambda tree: jax.tree.map(lambda a: a[jnp.array([0, 2])], tree)
    chex.assert_trees_all_equal(others(healthy), others(sick))
    assert sick[1][0].panic[1].tolist() == [False] * 7 + [True] + [False] * 6 + [True, False]


# --- snapshot and rollback ---


@struct.dataclass
class Model:
    host: Any
    seeds: tuple


def model(value, n_slots=5):
    """Host with parameters and BatchNorm statistics, seeds of different widths, all filled with one value."""
    host = {"kernel": jnp.full((2, 3), value), "batch_norm": {"mean": jnp.full(3, value)}}
    return Model(host, tuple({"w": jnp.full(s + 1, value), "gate": jnp.full((), value)} for s in range(n_slots)))


def slots_in(*stage):
    slots = stages.empty(len(stage))
    stage = jnp.array([int(s) for s in stage], jnp.int32)
    alive = stages.is_active(stage)
    return slots.replace(
        stage=stage,
        blueprint=jnp.where(alive, 1, -1),
        epochs_total=jnp.where(alive, 4, 0),
        epochs_in_stage=jnp.full_like(stage, 2),
        has_gate=stage == Stage.BLENDING,
        alpha=slots.alpha.replace(
            alpha=jnp.where(stage == Stage.FOSSILIZED, 1.0, jnp.where(stage == Stage.BLENDING, 0.4, 0.0)),
            target=jnp.where(alive, 1.0, 0.0),
            mode=jnp.where(stage == Stage.BLENDING, AlphaMode.UP, AlphaMode.HOLD).astype(jnp.int32),
            steps_total=jnp.where(stage == Stage.BLENDING, 5, 0),
        ),
    )


GOOD = slots_in(Stage.FOSSILIZED, Stage.TRAINING, Stage.DORMANT, Stage.DORMANT, Stage.EMBARGOED)
BAD = slots_in(Stage.FOSSILIZED, Stage.BLENDING, Stage.GERMINATED, Stage.DORMANT, Stage.DORMANT)


def test_rollback():
    kept = G.snapshot(model(1.0), GOOD)
    assert kept.fossil.tolist() == [True, False, False, False, False]
    broken = BAD.replace(metrics=BAD.metrics.replace(current_score=jnp.full(5, 3.0)))
    restored, slots = G.rollback(kept, model(jnp.nan), broken)

    chex.assert_trees_all_equal(restored.host, model(1.0).host)
    chex.assert_trees_all_equal(restored.seeds[0], model(1.0).seeds[0])  # the fossil
    chex.assert_trees_all_equal(restored.seeds[1:3], model(0.0).seeds[1:3])  # the pruned, cleared
    chex.assert_trees_all_equal(restored.seeds[3:], model(jnp.nan).seeds[3:])  # nobody's
    # the record of a seed that was training when the snapshot was taken does not come back to life
    expected = [Stage.FOSSILIZED, Stage.PRUNED, Stage.PRUNED, Stage.DORMANT, Stage.DORMANT]
    assert slots.stage.tolist() == expected
    pick = lambda s, tree: jax.tree.map(lambda a: a[s], tree)
    chex.assert_trees_all_equal(pick(0, slots), pick(0, GOOD))
    chex.assert_trees_all_equal(pick(jnp.array([3, 4]), slots), pick(jnp.array([3, 4]), broken))
    assert slots.alpha.alpha.tolist() == [1, 0, 0, 0, 0] and slots.alpha.target.tolist() == [1, 0, 0, 0, 0]
    assert (slots.alpha.mode == AlphaMode.HOLD).all() and not slots.has_gate.any()


def test_cooling_slots_go_on_cooling():
    cooling = slots_in(Stage.PRUNED, Stage.EMBARGOED, Stage.RESETTING)
    kept = G.snapshot(model(1.0, 3), slots_in(Stage.TRAINING, Stage.DORMANT, Stage.HOLDING))
    restored, slots = G.rollback(kept, model(2.0, 3), cooling)
    chex.assert_trees_all_equal(slots, cooling)
    chex.assert_trees_all_equal(restored.seeds, model(2.0, 3).seeds)


def test_without_panic_nothing_changes():
    kept = G.snapshot(model(1.0), GOOD)
    chex.assert_trees_all_equal(G.rollback(kept, model(2.0), BAD, jnp.bool_(False)), (model(2.0), BAD))


def test_rollback_of_one_environment_leaves_the_others():
    stack = lambda *trees: jax.tree.map(lambda *a: jnp.stack(a), *trees)
    kept = jax.vmap(G.snapshot)(stack(model(1.0), model(1.0)), stack(GOOD, GOOD))
    now, slots = stack(model(2.0), model(jnp.nan)), stack(BAD, BAD)
    restored, after = jax.jit(jax.vmap(G.rollback))(kept, now, slots, jnp.array([False, True]))
    first, second = (lambda tree: jax.tree.map(lambda a: a[0], tree)), (lambda tree: jax.tree.map(lambda a: a[1], tree))
    chex.assert_trees_all_equal(first((restored, after)), (model(2.0), BAD))
    chex.assert_trees_all_equal(second(restored).host, model(1.0).host)


def test_a_new_fossil_survives_a_rollback_to_an_older_snapshot():
    kept = G.snapshot(model(1.0), GOOD)
    fossilised = slots_in(Stage.FOSSILIZED, Stage.FOSSILIZED, Stage.BLENDING, Stage.DORMANT, Stage.DORMANT)
    kept = G.admit_fossils(kept, model(2.0), fossilised)
    assert kept.fossil.tolist() == [True, True, False, False, False]
    restored, slots = G.rollback(kept, model(jnp.nan), fossilised)
    chex.assert_trees_all_equal(restored.host, model(1.0).host)
    chex.assert_trees_all_equal(restored.seeds[0], model(1.0).seeds[0])  # as it was in the snapshot
    chex.assert_trees_all_equal(restored.seeds[1], model(2.0).seeds[1])  # as it was when fossilised
    assert slots.stage[:3].tolist() == [Stage.FOSSILIZED, Stage.FOSSILIZED, Stage.PRUNED]


def test_a_fossil_unknown_to_the_snapshot_is_left_alone():
    kept = G.snapshot(model(1.0), GOOD)
    fossilised = GOOD.replace(stage=GOOD.stage.at[1].set(Stage.FOSSILIZED))
    restored, slots = G.rollback(kept, model(2.0), fossilised)
    assert slots.stage[1] == Stage.FOSSILIZED
    chex.assert_trees_all_equal(restored.seeds[1], model(2.0).seeds[1])
