"""Properties that hold for any input: lifecycles under any requests, ramps, rules of the governor, shares of credit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_jax.config import GovernorConfig, LifecycleConfig
from esper_jax.env import attribution, governor
from esper_jax.lifecycle import alpha, masks, operations, stages
from esper_jax.trees import select
from esper_jax.types import HEAD_SIZES, Action, AlphaCurve, AlphaMode, Op, PanicReason, Stage

settings.register_profile("few", max_examples=25, derandomize=True, deadline=None)
few = settings.get_profile("few")

SLOTS, EPOCHS = 3, 48
CONFIGS = {
    "permissive": LifecycleConfig(),
    "strict": LifecycleConfig(permissive_gates=False, max_seeds=2, sequential=True, min_prune_age=3),
}


@functools.cache
def lives(cfg):
    """A scan over any actions, legal or not: (before, permitted, outcome, executed, ticked) of each epoch."""

    def epoch(slots, entry):
        action, accuracy, contribution = entry
        legal = masks.legal(slots, cfg)
        permitted = masks.permits(legal, action)
        request = operations.decode(action)
        request = request.replace(op=jnp.where(permitted, action.op, Op.WAIT))
        after, outcome = operations.execute(slots, request, accuracy, cfg)
        ticked = stages.tick(after, cfg)
        measured = stages.is_active(ticked.stage) & (ticked.alpha.alpha > 0)
        end = stages.record_score(stages.record_contribution(ticked, contribution, measured), accuracy)
        m = end.metrics
        end = end.replace(
            metrics=m.replace(gradient_valid=stages.is_active(end.stage), gradient_ratio=m.gradient_ratio + 0.1)
        )
        return end, (slots, legal, permitted, outcome, after, ticked, end)

    return jax.jit(lambda entries: jax.lax.scan(epoch, stages.empty(SLOTS), entries)[1])


def entries(seed, grows):
    """Requests of any kind, half of them out of place; `grows` asks more often for what takes a seed further."""
    rng = np.random.default_rng(seed)
    weights = np.array([1, 3, 1, 1, 3, 6]) if grows else np.ones(6)
    op = rng.choice(6, EPOCHS, p=weights / weights.sum())
    heads = {name: rng.integers(0, size, EPOCHS) for name, size in HEAD_SIZES.items() if name != "op"}
    heads["slot"] = rng.integers(0, SLOTS + 1, EPOCHS) if not grows else rng.integers(0, 2, EPOCHS)  # one is not there
    action = Action(op=op, **heads)
    action = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.int32), action)
    contribution = rng.normal(1, 3, (EPOCHS, SLOTS))
    return action, jnp.asarray(rng.uniform(0, 100, EPOCHS), jnp.float32), jnp.asarray(contribution, jnp.float32)


@few
@given(seed=st.integers(0, 2**31), grows=st.booleans(), name=st.sampled_from(sorted(CONFIGS)))
def test_any_requests(seed, grows, name):
    """Only transitions of the table; counters count; masks and execution agree; a refusal changes nothing."""
    action, *rest = entries(seed, grows)
    out = jax.tree.map(np.asarray, lives(CONFIGS[name])((action, *rest)))
    before, legal, permitted, outcome, after, ticked, end = out
    op, slot = np.asarray(action.op), np.asarray(action.slot)

    def check_transitions(old, new):
        moved = old != new
        assert np.asarray(stages.can_transition(jnp.asarray(old[moved]), jnp.asarray(new[moved]))).all()

    check_transitions(before.stage, after.stage)
    # one tick is one transition at the most, except that a slot in its first tick of cooldown was pruned in this epoch
    check_transitions(after.stage, ticked.stage)
    np.testing.assert_array_equal(ticked.stage, end.stage)

    # masks and execution: what is permitted is legal, what is not permitted leaves every bit as it was
    np.testing.assert_array_equal(outcome.legal, np.where(permitted, True, outcome.op == Op.WAIT))
    in_range = slot < SLOTS
    own = np.where(in_range, legal.slot_by_op[np.arange(EPOCHS), op, np.minimum(slot, SLOTS - 1)], op == Op.WAIT)
    assert (own | ~permitted).all()
    refused = ~permitted | ~outcome.success | (op == Op.WAIT)
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        same = old == new
        assert same[refused].all()
        others = np.arange(SLOTS) != slot[:, None]
        assert same[others].all()

    # counters: entering a stage restarts one; an epoch adds one to a seed's
    entered = after.stage != before.stage
    assert (after.epochs_in_stage[entered] == 0).all()
    seed_there = np.isin(end.stage, [int(s) for s in stages.ACTIVE])
    np.testing.assert_array_equal(end.epochs_total, ticked.epochs_total + seed_there)
    for counter in (end.epochs_in_stage, end.epochs_total, end.previous_epochs_in_stage, end.metrics.contribution_age):
        assert (counter >= 0).all()
    assert (end.epochs_in_stage <= end.epochs_total).all()

    # alpha
    a = end.alpha
    assert ((a.alpha >= 0) & (a.alpha <= 1)).all() and ((a.steps_done >= 0) & (a.steps_done <= a.steps_total)).all()
    blended = np.isin(end.stage, [Stage.BLENDING, Stage.HOLDING, Stage.FOSSILIZED])
    assert not a.alpha[~blended].any() and (a.alpha[np.isin(end.stage, [Stage.HOLDING, Stage.FOSSILIZED])] == 1).all()
    assert (end.stage[a.mode != AlphaMode.HOLD] == Stage.BLENDING).all()
    up, down = before.alpha.mode == AlphaMode.UP, before.alpha.mode == AlphaMode.DOWN
    assert (a.alpha[up] >= before.alpha.alpha[up]).all() and (a.alpha[down] <= before.alpha.alpha[down]).all()

    # an empty slot is the empty record
    fresh = jax.tree.map(lambda leaf: np.asarray(leaf)[0], stages.empty(1))
    emptied = ticked.stage == Stage.DORMANT
    cleared = emptied & (before.stage != Stage.DORMANT)
    for leaf, default in zip(jax.tree.leaves(ticked), jax.tree.leaves(fresh), strict=True):
        assert (leaf[cleared] == default).all()

    # limits
    cfg = CONFIGS[name]
    if cfg.max_seeds:
        assert (np.isin(end.stage, [int(s) for s in stages.ACTIVE]).sum(1) <= cfg.max_seeds).all()
    pruned = outcome.success & (outcome.op == Op.PRUNE)
    assert (before.epochs_total[pruned, slot[pruned]] >= cfg.min_prune_age).all()


def test_the_random_requests_visit_everything():
    out = [lives(CONFIGS["permissive"])(entries(seed, seed % 2 == 0)) for seed in range(16)]
    visited = {int(s) for rows in out for s in np.unique(rows[4].stage)} | {
        int(s) for r in out for s in np.unique(r[6].stage)
    }
    assert visited == {int(s) for s in Stage if s != Stage.UNKNOWN}
    carried_out = {int(op) for rows in out for op in np.unique(rows[3].op)}
    assert carried_out == {int(op) for op in Op}


N_RAMPS = 64


@jax.jit
def ramps(begin, target, steps, curve, steepness):
    everywhere = jnp.ones(N_RAMPS, bool)
    state = alpha.retarget(alpha.init(N_RAMPS).replace(alpha=begin), everywhere, target, steps, curve, steepness)

    def tick(state, _):
        after, reached = alpha.tick(state, everywhere)
        return after, (after.alpha, after.mode, reached)

    return jax.lax.scan(tick, state, length=20)[1]


@few
@given(seed=st.integers(0, 2**31))
def test_ramps_are_monotone_bounded_and_land_exactly(seed):
    rng = np.random.default_rng(seed)
    f32 = lambda *args: rng.uniform(*args, N_RAMPS).astype(np.float32)
    begin, target, steepness = f32(0, 1), f32(0, 1), (10 ** f32(-2, 4)).astype(np.float32)
    steps = rng.integers(1, 20, N_RAMPS, dtype=np.int32)
    curve = rng.choice([int(c) for c in AlphaCurve], N_RAMPS).astype(np.int32)
    values, mode, reached = jax.tree.map(np.asarray, ramps(begin, target, steps, curve, steepness))
    path = np.concatenate([begin[None], values])
    low, high = np.minimum(begin, target), np.maximum(begin, target)
    assert ((path >= low) & (path <= high)).all()
    # each way is one way, up to the rounding of the curves
    assert (np.diff(path, axis=0) * np.sign(target - begin) >= -1e-6).all()
    landed = np.arange(1, 21)[:, None] >= steps
    assert (values[landed] == np.broadcast_to(target, values.shape)[landed]).all()
    np.testing.assert_array_equal(mode == AlphaMode.HOLD, landed)
    np.testing.assert_array_equal(reached, np.arange(1, 21)[:, None] == steps)


GOVERNOR = GovernorConfig()


@functools.cache
def judged():
    def one(state, loss):
        after, verdict = governor.check(state, loss, cfg=GOVERNOR, random_guess_loss=np.log(10))
        restored = governor.after_rollback(after)
        return select(verdict.panic, restored, after), (after, verdict)

    return jax.jit(lambda losses: jax.lax.scan(one, governor.init(GOVERNOR), losses)[1])


@few
@given(seed=st.integers(0, 2**31), scale=st.floats(0.1, 1e3), bad=st.sampled_from([np.nan, np.inf, -np.inf]))
def test_the_governor_on_a_random_trace(seed, scale, bad):
    """Never on losses that stay within the absolute threshold and above the band of guessing; always on a bad one."""
    rng = np.random.default_rng(seed)
    losses = rng.uniform(2.5, 12.0, 60).astype(np.float32)  # ln 10 * 1.065 = 2.452 is the band's upper edge
    _, verdict = judged()(losses)
    assert not verdict.panic.any() and verdict.accepted.all()
    # any size, with bad ones among them: those panic, and never enter the history
    losses = (losses * np.float32(scale)).astype(np.float32)
    where = rng.random(60) < 0.2
    states, verdict = judged()(np.where(where, np.float32(bad), losses))
    assert np.asarray(verdict.panic)[where].all() and not np.asarray(verdict.accepted)[where].any()
    assert np.isfinite(states.history).all() and (states.count <= GOVERNOR.history_window).all()
    late = np.asarray(verdict.panic) & (np.asarray(verdict.reason) == PanicReason.DIVERGENCE)
    assert (np.asarray(verdict.consecutive)[late] >= GOVERNOR.min_panics).all()


@functools.cache
def shares(n):
    return jax.jit(jax.vmap(attribution.shapley))


@few
@given(seed=st.integers(0, 2**31), n=st.integers(1, 4))
def test_shapley_axioms(seed, n):
    """Efficiency, null player, symmetry under renaming, linearity."""
    rng = np.random.default_rng(seed)
    tables = rng.uniform(0, 100, (2, 2**n)).astype(np.float32)
    rows = np.arange(2**n)
    without_first = tables[:, rows & ~1]  # slot 0 changes nothing
    order = rng.permutation(n)
    renamed_row = sum(((rows >> j) & 1) << order[j] for j in range(n))  # slot j is called order[j]
    renamed = np.empty_like(tables)
    renamed[:, renamed_row] = tables
    mixed = 0.25 * tables[:1] + 0.75 * tables[1:]
    found = np.asarray(shares(n)(np.concatenate([tables, without_first, renamed, mixed])))
    np.testing.assert_allclose(found[:2].sum(1), tables[:, -1] - tables[:, 0], atol=1e-4)
    np.testing.assert_allclose(found[2:4, 0], 0, atol=1e-4)
    np.testing.assert_allclose(found[4:6][:, order], found[:2], atol=1e-4)
    np.testing.assert_allclose(found[6], 0.25 * found[0] + 0.75 * found[1], atol=1e-4)
