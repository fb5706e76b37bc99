"""One environment through `env.step`: what a scripted life, random lives and broken networks do to its numbers."""

import functools
import itertools
import math
import operator
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from esper_jax.config import HostConfig
from esper_jax.data import normalise
from esper_jax.env import reward
from esper_jax.env.environment import Grown, make_env
from esper_jax.lifecycle import stages
from esper_jax.network import cnn
from esper_jax.network import model as networks
from esper_jax.types import BLUEPRINTS, STYLES, Action, AlphaMode, Op, PanicReason, Stage

S = Stage
LIGHT, NORM = BLUEPRINTS.index("conv_light"), BLUEPRINTS.index("norm")
LINEAR_ADD, FAST = STYLES.index("linear_add"), 0
GERMINATE = tiny.act(Op.GERMINATE, 0, blueprint=LIGHT, style=LINEAR_ADD, tempo=FAST)
ADVANCE, FOSSILIZE, WAIT = tiny.act(Op.ADVANCE), tiny.act(Op.FOSSILIZE), tiny.act()
TO_BLENDING = [GERMINATE, ADVANCE, ADVANCE]
TO_HOLDING = [*TO_BLENDING, WAIT, WAIT, ADVANCE]
T = tiny.CONFIG.training.epochs


def column(steps, name):
    """A field of `info`, or of what is in it, over the steps."""
    read = operator.attrgetter(name)
    return np.stack([np.asarray(read(step.info)) for step in steps])


@functools.cache
def _shaped_step():
    cfg = tiny.CONFIG.replace(**{"reward.mode": "shaped"})
    return tiny.with_emitters(chex.assert_max_traces(make_env(cfg, tiny.dataset()).step, n=1))


def shaped(steps):
    """The same transitions under the reference's reward."""
    return [tiny.Step(*step[:3], *_shaped_step()(step.key, step.before, step.action)) for step in steps]


@functools.cache
def shaped_lives():
    return [shaped(steps) for steps in (life(), *tiny.random_lives()[:8])]


@functools.cache
def waits():
    return tiny.play([])


@functools.cache
def life():
    return tiny.play([*TO_HOLDING, FOSSILIZE])


def zero(tree):
    return all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(tree))


# --- a scripted life ---


def test_a_life_shows_in_what_is_measured():
    steps = life()
    stage, alpha, table = column(steps, "stage"), column(steps, "alpha"), column(steps, "table")
    names = [S(s).name for s in stage[:9, 0].tolist()]
    assert names == [
        "DORMANT", "GERMINATED", "TRAINING", "BLENDING", "BLENDING", "BLENDING", "HOLDING", "FOSSILIZED", "FOSSILIZED",
    ]  # fmt: skip
    np.testing.assert_allclose(alpha[:8, 0], [0, 0, 0, 1 / 3, 2 / 3, 1, 1, 1], rtol=1e-6)
    assert (stage[:, 1] == S.DORMANT).all() and not alpha[:, 1].any()
    assert column(steps, "gate_level").tolist()[:8] == [-1, -1, 1, 2, -1, -1, 3, 5]
    assert column(steps, "success").all() and column(steps, "legal").all() and not column(steps, "panic").any()
    # row k of the table has slot j on iff bit j of k is set; slot 1 is empty
    live = np.arange(T) >= 3
    np.testing.assert_array_equal(table[:, :2], table[:, 2:])
    np.testing.assert_array_equal(table[:, 3], column(steps, "val_accuracy"))
    np.testing.assert_array_equal(column(steps, "contribution_valid"), np.stack([live, np.zeros(T, bool)], 1))
    np.testing.assert_allclose(column(steps, "contribution")[:, 0], table[:, 1] - table[:, 0])
    assert column(steps, "contribution")[3:, 0].any() and not column(steps, "contribution")[:3].any()
    # of one live seed alone the Shapley value is the contribution, and there is no pair
    np.testing.assert_allclose(column(steps, "shapley"), column(steps, "contribution"), rtol=1e-6)
    assert not column(steps, "interaction_valid").any()
    # committed accuracy is that with everything off until the seed is fossilised
    fossil = np.arange(T) >= 7
    np.testing.assert_array_equal(column(steps, "committed_accuracy"), table[np.arange(T), fossil.astype(int)])
    # conv_light at 4 channels: a 3x3 convolution and a GroupNorm, 9 * 16 + 8 = 152 parameters
    host = cnn.param_count(steps[0].state.model.host)
    np.testing.assert_array_equal(column(steps, "params"), host + 152 * (stage[:, 0] != S.DORMANT))
    assert column(steps, "blueprint")[:, 0].tolist() == [-1] + [LIGHT] * (T - 1)
    assert column(steps, "gradient_valid")[:, 0].tolist() == [False] * 2 + [True] * (T - 2)
    end = steps[-1].state
    assert (end.germinated, end.fossilised, end.pruned, end.rollbacks, end.epoch) == (1, 1, 0, 0, T)
    assert end.slots.epochs_total.tolist() == [T - 1, 0]


def test_two_seeds_at_once():
    other = [a.replace(slot=jnp.int32(1)) for a in TO_BLENDING]
    steps = tiny.play([*TO_BLENDING, *other, WAIT])
    info = steps[6].info
    v = np.asarray(info.table)
    assert info.stage.tolist() == [S.BLENDING, S.BLENDING] and info.interaction_valid.all()
    np.testing.assert_allclose(info.contribution, [v[3] - v[2], v[3] - v[1]])
    pair = v[3] - v[1] - v[2] + v[0]
    np.testing.assert_allclose(info.interaction, [pair, pair], atol=1e-5)
    # half of what it brings alone, half of what it brings on top of the other
    np.testing.assert_allclose(
        info.shapley, [(v[1] - v[0] + v[3] - v[2]) / 2, (v[2] - v[0] + v[3] - v[1]) / 2], atol=1e-5
    )


@functools.cache
def _validation_loss():
    """Loss and accuracy of a model on the validation split, with the alphas of its slots replaced (NaN: kept)."""

    def measure(model, state, override):
        split = tiny.dataset().validation
        logits, _ = networks.forward(model, state, normalise(tiny.dataset(), split.images), override)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, split.labels).mean()
        return loss, 100 * (logits.argmax(-1) == split.labels).mean()

    return tiny.with_emitters(measure)


KEPT = jnp.full(tiny.SLOTS, jnp.nan)


def test_straight_through_training_leaves_the_host_alone():
    """Bitwise the run without a seed, while the seed learns what it will be blended in for."""
    steps, without = tiny.play([GERMINATE, ADVANCE]), waits()
    assert column(steps, "stage")[2:, 0].tolist() == [S.TRAINING] * (T - 2)
    for name in ("train_loss", "train_accuracy", "val_loss", "val_accuracy", "table", "per_class"):
        np.testing.assert_array_equal(column(steps, name), column(without, name), err_msg=name)
    for one, other in zip(steps, without, strict=True):
        assert tiny.equal(one.state.model.host, other.state.model.host)
        assert tiny.equal(one.state.optimiser.host, other.state.optimiser.host)
    seed = [np.asarray(step.state.model.seeds[0].params) for step in steps]
    assert (seed[2] != seed[1]).any() and (seed[-1] != seed[2]).any()
    assert not seed[0].any() and not np.asarray(steps[-1].state.model.seeds[1].params).any()
    assert (column(steps, "gradient_ratio")[2:, 0] > 0).all()
    # after four epochs a little of the seed is better than none: it has moved to where the host's loss falls. (How far
    # along nobody tells it before it is blended in, so in full it may overshoot.)
    young = steps[5].state
    off, on = (_validation_loss()(young.model, young.slots, jnp.array([alpha, jnp.nan]))[0] for alpha in (0.0, 0.1))
    assert on < off == steps[5].info.val_loss


def test_a_seed_does_not_move_before_it_trains():
    steps = tiny.play([GERMINATE])
    born = steps[1].state.model.seeds[0]
    assert np.asarray(born.params).any()
    assert tiny.equal(steps[-1].state.model.seeds[0], born) and zero(steps[-1].state.optimiser.seeds)


def test_the_controller_s_choice_decides_no_random_number():
    """Germination in the other slot, of another kind: the same batches and the same host."""
    steps = tiny.play([tiny.act(Op.GERMINATE, 1, blueprint=NORM)], epochs=4)
    np.testing.assert_array_equal(column(steps, "train_loss"), column(waits()[:4], "train_loss"))


def test_blending_moves_the_numbers():
    blended, without = column(life(), "val_loss"), column(waits(), "val_loss")
    np.testing.assert_array_equal(blended[:3], without[:3])
    assert (blended[3:] != without[3:]).all()


def test_pruning_a_seed_in_training_leaves_no_trace():
    steps = tiny.play([GERMINATE, ADVANCE, WAIT, tiny.act(Op.PRUNE)])
    # the tick of the same epoch takes PRUNED to EMBARGOED; 5 epochs of that, 1 of RESETTING, then empty
    assert column(steps, "stage")[4:, 0].tolist() == [S.EMBARGOED] * 5 + [S.RESETTING] + [S.DORMANT] * 8
    for name in ("train_loss", "val_loss", "val_accuracy", "table"):
        np.testing.assert_array_equal(column(steps, name), column(waits(), name), err_msg=name)
    end = steps[-1].state
    assert tiny.equal(end.slots, stages.empty(2)) and end.pruned == 1 and end.germinated == 1
    assert steps[-1].info.params == cnn.param_count(end.model.host)


@pytest.mark.parametrize(("speed", "ramp"), [(0, []), (1, [2 / 3, 1 / 3])], ids=["instant", "scheduled"])
def test_pruning_a_blended_seed(speed, ramp):
    """Alpha goes to 0, at once or by thirds; meanwhile the seed is frozen; then all of the table is the host's."""
    steps = tiny.play([*TO_HOLDING, tiny.act(Op.PRUNE, alpha_speed=speed)])
    first, gone = 7, 7 + len(ramp)
    alpha, stage = column(steps, "alpha")[:, 0], column(steps, "stage")[:, 0]
    np.testing.assert_allclose(alpha[first - 1 :], [1, *ramp, *[0] * (T - gone)], rtol=1e-6)
    assert stage[first : gone + 1].tolist() == ([S.BLENDING] * 2 + [S.PRUNED] if ramp else [S.EMBARGOED])
    table, accuracy = column(steps, "table"), column(steps, "val_accuracy")
    np.testing.assert_array_equal(table[gone:], np.broadcast_to(accuracy[gone:, None], (T - gone, 4)))
    before = steps[first - 1].state
    for step in steps[first:gone]:
        assert step.state.slots.alpha.mode[0] == AlphaMode.DOWN
        assert tiny.equal(step.state.model.seeds, before.model.seeds)
        assert tiny.equal(step.state.optimiser.seeds, before.optimiser.seeds)
    # the accuracy without the seed is that of the same weights with the slot switched off
    state = steps[gone].state
    loss, off = _validation_loss()(state.model, state.slots, jnp.array([0.0, jnp.nan]))
    np.testing.assert_allclose([loss, off], [steps[gone].info.val_loss, accuracy[gone]], rtol=1e-5)
    assert steps[-1].state.pruned == 1 and steps[-1].state.rollbacks == 0


def test_the_measured_loss_is_the_network_s_and_reaches_the_governor():
    for step in (life()[4], life()[-1], waits()[3]):
        state = step.state
        loss, accuracy = _validation_loss()(state.model, state.slots, KEPT)
        np.testing.assert_allclose([loss, accuracy], [step.info.val_loss, step.info.val_accuracy], rtol=1e-5)
        assert step.info.accepted and state.governor.history[-1] == step.info.val_loss
        assert state.signals.val_loss == step.info.val_loss and state.evaluation.loss == step.info.val_loss


def test_the_end_of_an_episode():
    steps = life()
    done = [bool(step.done) for step in steps]
    assert done == [False] * (T - 1) + [True] == column(steps, "episode_over").tolist()
    assert [float(step.info.discount) for step in steps] == [1] * (T - 1) + [0]
    steps = shaped_lives()[0]
    last = steps[-1].info
    np.testing.assert_allclose(last.components.terminal, 0.05 * last.val_accuracy, rtol=1e-6)
    assert all(step.info.components.terminal == 0 for step in steps[:-1])
    report = jax.eval_shape(tiny.env().report, Grown.of(steps[-1].state))
    assert report.table.shape == (4,) and report.per_class.shape == (3,)


# --- reward ---


@functools.cache
def host_params():
    return cnn.param_count(tiny.born().model.host)


def test_committed_loss_and_sizes():
    """What is blended in counts from its first alpha above 0, what is kept from its fossilisation."""
    steps = life()
    committed, loss = column(steps, "committed_loss"), column(steps, "val_loss")
    fossil, live = np.arange(T) >= 7, np.arange(T) >= 3
    np.testing.assert_array_equal(committed[fossil | ~live], loss[fossil | ~live])
    for step in steps[3:7]:
        off, _ = _validation_loss()(step.state.model, step.state.slots, jnp.array([0.0, jnp.nan]))
        np.testing.assert_allclose(step.info.committed_loss, off, rtol=1e-5)
        assert step.info.committed_loss != step.info.val_loss
    grown = 1 + 152 / host_params()  # conv_light at 4 channels
    np.testing.assert_allclose(column(steps, "blended_size"), np.where(live, grown, 1), rtol=1e-6)
    np.testing.assert_allclose(column(steps, "committed_size"), np.where(fossil, grown, 1), rtol=1e-6)
    assert (column(steps, "blended_size")[:3] == 1).all() and (column(steps, "committed_size")[:7] == 1).all()


def test_paired_pays_the_fall_of_the_own_loss():
    """Each transition: 30 times the fall of the loss since the last epoch, minus half of the growth in hosts; the last
    makes the value that of what is kept, here all there is. Nothing comes before the first loss but guessing, ln 3."""
    for steps in (waits(), life()):
        loss = np.append(np.float32(np.log(3)), column(steps, "val_loss"))
        size = np.append(np.float32(1), column(steps, "blended_size"))
        expected = -30 * np.diff(loss) - 0.5 * np.diff(size)
        np.testing.assert_allclose([float(step.reward) for step in steps], expected, atol=1e-4)
        np.testing.assert_allclose(column(steps, "components.gain"), -30 * np.diff(loss), atol=1e-4)
        assert not column(steps, "components.harvest").any() and not column(steps, "components.shaping").any()
    # a seed that is blended but not kept: the last transition takes its value back
    steps = tiny.play(TO_BLENDING)
    assert steps[-1].info.stage[0] == S.BLENDING and steps[-1].info.blended_size > 1
    first, last = steps[0].info, steps[-1].info
    kept = 30 * (first.val_loss - last.committed_loss)
    np.testing.assert_allclose(sum(float(step.reward) for step in steps[1:]), kept, atol=1e-3)
    live = -30 * last.val_loss - 0.5 * (last.blended_size - 1)
    np.testing.assert_allclose(last.components.harvest, -30 * last.committed_loss - live, atol=1e-4)


def test_the_course_of_an_episode_is_what_paired_reads():
    """Against its twin: 0 bitwise until the seed is blended in, then what is gained and paid for; the seed is kept."""
    weights = reward.RewardWeights.from_config(tiny.CONFIG.reward, tiny.CONFIG.ppo.gamma)
    fine = reward.death(tiny.CONFIG.governor.death_penalty, tiny.CONFIG.reward.clip)
    infos = lambda steps: jax.tree.map(lambda *leaves: jnp.stack(leaves), *[step.info for step in steps])
    pay = jax.jit(lambda info, twin: reward.paired(reward.Course.of(info), twin, weights, fine))
    twin = column(waits(), "val_loss")
    train, keep = pay(infos(tiny.play([GERMINATE, ADVANCE])), twin), pay(infos(life()), twin)
    for paid, zeros in ((train, T), (pay(infos(waits()), twin), T), (keep, 3)):
        assert not any(leaf[:zeros].any() for leaf in jax.tree.leaves(jax.device_get(paid)))
    assert (np.asarray(keep.gain[3:]) != 0).all()
    last = life()[-1].info
    expected = 30 * (twin[-1] - last.val_loss) - 0.5 * 152 / host_params()
    np.testing.assert_allclose(np.sum(keep.total()), expected, atol=1e-3)


def test_the_mode_of_the_reward_changes_nothing_else():
    """States, observations and measurements are those of `paired` bit for bit."""
    paired = (life(), *tiny.random_lives()[:8])
    for one, other in zip(itertools.chain(*paired), itertools.chain(*shaped_lives()), strict=True):
        same = lambda step: (step.state, step.obs, step.done, step.info.replace(components=None))
        assert tiny.equal(same(one), same(other))


def test_the_reference_s_reward_pays_none_of_paired_and_the_other_way_round():
    theirs = ("attribution", "shaping", "compute_rent", "action_cost", "terminal")
    ours = ("gain", "size", "harvest")
    paid = lambda steps, names: any(column(steps, f"components.{name}").any() for name in names)
    for paired, reference in zip((life(), *tiny.random_lives()[:8]), shaped_lives(), strict=True):
        assert paid(paired, ours) and paid(reference, theirs)
        assert not paid(paired, theirs) and not paid(reference, ours)


def test_components_are_the_reward():
    for step in itertools.chain(life(), *tiny.random_lives()[:8], *shaped_lives()):
        parts = [float(leaf) for leaf in jax.tree.leaves(step.info.components)]
        np.testing.assert_allclose(step.reward, math.fsum(parts), atol=2e-6)


@pytest.mark.parametrize("start", [0, 3, 6])
def test_shaping_telescopes(start):
    """From any state, the discounted shaping of the rest of an episode is -0.3 times that state's potential."""
    gamma = tiny.CONFIG.ppo.gamma
    for steps in shaped_lives():
        state = steps[start].state
        phi = float(reward.potential(state.slots.stage, state.slots.epochs_in_stage))
        paid = [float(step.info.components.shaping) for step in steps[start + 1 :]]
        total = math.fsum(gamma**t * f for t, f in enumerate(paid))
        np.testing.assert_allclose(total, -0.3 * phi, atol=2e-5)


def test_a_seed_of_this_life_has_a_potential():
    """HOLDING in its first measured epoch: 5.5 + 0.3 * 1."""
    state = life()[6].state
    np.testing.assert_allclose(reward.potential(state.slots.stage, state.slots.epochs_in_stage), 5.8, rtol=1e-6)


# --- random lives ---


def finite(entry):
    path, leaf = entry
    # the one number that is infinite by definition: the gain of an episode's first epoch
    first_gain = jax.tree_util.keystr(path).endswith("loss_delta")
    return leaf.dtype != jnp.float32 or first_gain or np.isfinite(leaf).all()


def test_random_lives_stay_in_bounds():
    """64 environments, 1,088 decisions: no NaN, no illegal state, what was sampled is legal, every stage is visited."""
    fresh = jax.tree.map(lambda leaf: np.asarray(leaf)[0], stages.empty(1))
    seen, ops = set(), set()
    for steps in tiny.random_lives():
        for step in steps:
            state, info = step.state, step.info
            for tree in (state, step.obs, step.reward, info):
                assert all(map(finite, jax.tree_util.tree_leaves_with_path(tree)))
            assert info.legal and info.accepted
            gated = info.gate_level >= 0
            assert info.success == (info.gate_passed or not gated)
            assert info.op == (step.action.op if info.success else Op.WAIT)
            s = jax.tree.map(np.asarray, state.slots)
            assert np.isin(s.stage, [int(x) for x in Stage if x != S.UNKNOWN]).all()
            assert ((s.alpha.alpha >= 0) & (s.alpha.alpha <= 1)).all()
            assert ((s.alpha.steps_done >= 0) & (s.alpha.steps_done <= s.alpha.steps_total)).all()
            counters = (s.epochs_in_stage, s.previous_epochs_in_stage, s.epochs_total, s.metrics.contribution_age)
            assert all((c >= 0).all() for c in counters) and (s.epochs_in_stage <= s.epochs_total).all()
            off = ~np.isin(s.stage, [S.BLENDING, S.HOLDING, S.FOSSILIZED])
            assert not s.alpha.alpha[off].any() and not s.has_gate[off].any()
            assert (s.alpha.alpha[np.isin(s.stage, [S.HOLDING, S.FOSSILIZED])] == 1).all()
            for k in np.flatnonzero(s.stage == S.DORMANT):
                assert tiny.equal(jax.tree.map(lambda leaf, k=k: leaf[k], s), fresh)
            accuracies = np.asarray([info.val_accuracy, *info.table, info.committed_accuracy])
            assert ((accuracies >= 0) & (accuracies <= 100.001)).all()
            seen |= set(s.stage.tolist())
            ops |= {int(info.op)}
    assert seen == {int(x) for x in Stage if x != S.UNKNOWN} and ops == {int(op) for op in Op}


def test_a_newborn_can_only_wait():
    masks = tiny.observe()(tiny.born()).masks
    assert masks.op.tolist() == [True] + [False] * 5


@pytest.mark.parametrize("life_number", range(4))
def test_what_the_masks_forbid_is_refused_and_changes_nothing(life_number):
    """Bitwise the step that waits, but for the record of the refusal and the price of having asked."""
    steps = tiny.random_lives()[life_number]
    rng = np.random.default_rng(life_number)
    for t in rng.choice(np.arange(3, T), 4, replace=False):
        before, key = steps[t].before, steps[t].key
        by_op = np.asarray(steps[t - 1].obs.masks.slot_by_op)
        op, slot = rng.permutation(np.argwhere(~by_op))[0]
        refused = tiny.forward(before, key, tiny.act(op, slot, blueprint=NORM))
        waited = tiny.forward(before, key)
        assert not refused.info.legal and not refused.info.success
        assert refused.info.op == Op.WAIT and refused.info.requested_op == op
        record = {"last_op": jnp.int32(Op.WAIT), "last_success": jnp.bool_(True)}
        assert refused.state.last_op == op and not refused.state.last_success
        assert tiny.equal(refused.state.replace(**record), waited.state)
        assert refused.reward == waited.reward
        # the reference's reward charges for having asked
        refused, waited = shaped([refused, waited])
        cost = refused.info.components.action_cost
        assert (cost < 0) == (op != Op.ADVANCE)
        np.testing.assert_allclose(refused.reward, waited.reward + cost, atol=1e-5)


@pytest.mark.parametrize(
    "action",
    [
        tiny.act(6),
        tiny.act(-1),
        tiny.act(Op.GERMINATE, 2, blueprint=NORM),
        tiny.act(Op.GERMINATE, -1, blueprint=NORM),
        tiny.act(Op.GERMINATE, 0, blueprint=0),  # noop
        tiny.act(Op.GERMINATE, 0, blueprint=BLUEPRINTS.index("attention")),  # not on offer
        tiny.act(Op.GERMINATE, 0, blueprint=99),
        tiny.act(Op.GERMINATE, 0, blueprint=NORM, tempo=3),
    ],
)
def test_indices_out_of_range_are_refused(action):
    before, key = waits()[2].state, tiny.keys(0)[3]
    refused, waited = tiny.forward(before, key, action), tiny.forward(before, key)
    assert not refused.info.legal and 0 <= refused.state.last_op <= 5
    assert tiny.equal(refused.state.slots, waited.state.slots) and tiny.equal(refused.state.model, waited.state.model)


def test_the_same_seed_gives_the_same_life():
    for number in (0, 3):
        steps = tiny.random_lives()[number]
        state = tiny.born(number)
        for step in steps:
            again = tiny.forward(state, step.key, step.action)
            assert tiny.equal(again[3:], step[3:])
            state = again.state
    assert not tiny.equal(tiny.random_lives()[0][3].state.model, tiny.random_lives()[2][3].state.model)


# --- the governor ---


def poisoned(state, value=jnp.nan):
    """The state with its host's parameters replaced."""
    host = state.model.host
    params = jax.tree.map(lambda leaf: jnp.full_like(leaf, value), host.params)
    return state.replace(model=state.model.replace(host=host.replace(params=params)))


def check_panic(step, kept, reason):
    assert step.info.panic and step.info.panic_reason == reason and not step.info.accepted
    assert step.info.discount == 0 and not step.done, "the episode goes on"
    assert step.reward == -10 and step.info.components.death_penalty == -10
    assert zero(step.state.optimiser)
    assert tiny.equal(step.state.model.host, kept.model.host)
    assert np.isfinite(step.obs.features).all() and step.state.rollbacks == step.before.rollbacks + 1
    # what the policy sees and is paid for is the last accepted measurement
    assert tiny.equal(step.state.evaluation, step.before.evaluation)


def test_non_finite_host_is_rolled_back_and_goes_on():
    before = life()[5].state  # epoch 6, a seed in BLENDING; the snapshot is of epoch 5
    assert before.snapshot.slots.stage[0] == S.BLENDING and before.epoch == 6
    step = tiny.forward(poisoned(before), tiny.keys(0)[6])
    check_panic(step, before.snapshot, PanicReason.NON_FINITE)
    assert not np.isfinite(step.info.val_loss)
    chex.assert_trees_all_equal(shaped([step])[0].info.components, step.info.components)  # in every mode
    # the seed that was not fossilised is gone, into cooldown; nobody pruned it
    assert step.state.slots.stage[0] == S.PRUNED and zero(step.state.model.seeds) and step.state.pruned == 0
    after = tiny.forward(step.state, tiny.keys(0)[7])
    assert after.info.accepted and after.info.discount == 1 and np.isfinite(after.info.val_loss) and after.reward > -10
    assert after.info.stage[0] == S.EMBARGOED
    # the history goes on without the bad loss
    assert after.state.governor.history[-2] == before.governor.history[-1]


def test_a_fossil_comes_back():
    steps = life()
    before = steps[8].state  # fossilised at epoch 8
    assert before.snapshot.fossil.tolist() == [True, False]
    seeds = tuple(seed.replace(params=jnp.full_like(seed.params, jnp.nan)) for seed in before.model.seeds)
    step = tiny.forward(before.replace(model=before.model.replace(seeds=seeds)), tiny.keys(0)[9])
    check_panic(step, before.snapshot, PanicReason.NON_FINITE)
    assert step.info.stage[0] == S.FOSSILIZED and tiny.equal(step.state.model.seeds[0], before.snapshot.model.seeds[0])
    assert np.isfinite(step.state.model.seeds[0].params).all()


def test_divergence_panics_at_the_third_loss_in_a_row():
    """Above 12 (the absolute threshold), three times the mean and the statistical one: the read-out times 10,000."""
    state, steps = waits()[7].state, []
    params = state.model.host.params
    broken = params.replace(kernel=params.kernel * 1e4)
    kept = state.snapshot
    for t in range(8, 12):
        # broken anew in every epoch, whatever training makes of it
        if t < 11:
            state = state.replace(model=state.model.replace(host=state.model.host.replace(params=broken)))
        steps.append(tiny.forward(state, tiny.keys(0)[t]))
        state = steps[-1].state
    assert [bool(s.info.panic) for s in steps] == [False, False, True, False]
    assert [bool(s.info.accepted) for s in steps] == [False, False, False, True]
    assert [int(s.info.panic_reason) for s in steps] == [PanicReason.DIVERGENCE] * 3 + [PanicReason.NONE]
    assert all(s.info.val_loss > 12 for s in steps[:3]) and steps[3].info.val_loss < 2
    check_panic(steps[2], kept, PanicReason.DIVERGENCE)
    assert [int(s.state.signals.epoch) for s in steps] == [9, 10, 11, 12]
    assert tiny.equal(steps[1].state.evaluation, waits()[7].state.evaluation)
    # what is not accepted is worth what the last accepted epoch was, also to the one that follows the rollback
    assert [float(s.reward) for s in steps[:3]] == [0, 0, -10]
    fall = waits()[7].info.val_loss - steps[3].info.val_loss
    np.testing.assert_allclose(steps[3].reward, 30 * fall, atol=1e-4)


def test_a_host_that_forgot_everything_is_a_lobotomy():
    """A zero network guesses: its loss is ln 3 = 1.0986 and its weights get no gradient; losses of 0.3 came before."""
    state = waits()[7].state
    state = state.replace(governor=state.governor.replace(history=jnp.full(6, 0.3, jnp.float32)))
    step = tiny.forward(poisoned(state, 0.0), tiny.keys(0)[8])
    np.testing.assert_allclose(step.info.val_loss, math.log(3), rtol=0.065)
    check_panic(step, state.snapshot, PanicReason.LOBOTOMY)


def test_a_rollback_changes_the_data_that_follow():
    state, key = waits()[4].state, tiny.keys(0)[5]
    same = tiny.forward(state, key)
    other = tiny.forward(state.replace(rollbacks=jnp.int32(1)), key)
    assert same.info.train_loss == waits()[5].info.train_loss != other.info.train_loss


def test_snapshots_are_taken_on_the_cadence_and_at_a_fossilisation():
    snapshot = lambda steps, t: steps[t].state.snapshot
    taken = lambda steps: [t + 1 for t in range(1, T) if not tiny.equal(snapshot(steps, t), snapshot(steps, t - 1))]
    assert taken(waits()) == [5, 10, 15]
    assert taken(life()) == [5, 8, 10, 15]  # fossilised in the eighth epoch
    assert tiny.equal(life()[7].state.snapshot.model, life()[7].state.model)


# --- contract ---


def test_init_reset_and_step_return_one_type_of_state():
    """So `env.step` is compiled once, whatever the state came from (its second trace is an error in these tests)."""
    env, key = tiny.env(), jax.random.key(0)
    abstract = lambda tree: [(leaf.shape, leaf.dtype, leaf.weak_type) for leaf in jax.tree.leaves(tree)]
    born = jax.eval_shape(env.init, key)
    reset, obs = jax.eval_shape(env.reset, key)
    state, new_obs, *_ = jax.eval_shape(env.step, key, born, tiny.act())
    assert jax.tree.structure(born) == jax.tree.structure(reset) == jax.tree.structure(state)
    assert abstract(born) == abstract(reset) == abstract(state)
    assert abstract(obs) == abstract(new_obs) == abstract(jax.eval_shape(env.observe, born))
    assert obs.features.shape == (env.n_features,) and env.n_slots == 2


def test_reset_is_the_first_epoch_of_a_newborn():
    """The two halves of its key make the host and the first step, in which only WAIT is legal."""

    def by_hand(key):
        host_key, step_key = jax.random.split(key)
        return env.step(step_key, env.init(host_key), Action())[:2]

    env, key = tiny.env(), jax.random.key(0)
    program = lambda fun: re.sub("0x[0-9a-f]+", "", str(jax.make_jaxpr(fun)(key)))
    assert program(env.reset) == program(by_hand)


def test_what_cannot_be_built_is_refused():
    with pytest.raises(
        ValueError, match=r"TrainingConfig.batch_size = 65: must be at most 64, what there is to draw from"
    ):
        make_env(tiny.CONFIG.replace(**{"training.batch_size": 65}), tiny.dataset())
    with pytest.raises(ValueError, match="pool_layers = 5"):
        make_env(tiny.CONFIG.replace(host=HostConfig(n_blocks=5, pool_layers=5)), tiny.dataset())
