"""Rounds on a tiny configuration: reproducible, independent of population, policies and devices, compiled once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_run

from esper_jax import make_env
from esper_jax.control import baselines
from esper_jax.enums import BASELINE, HEADS, LEARNED
from esper_jax.env import observation
from esper_jax.env.reward import Course
from esper_jax.run import devices
from esper_jax.run.devices import REPLICATED, SHARDED
from esper_jax.train import Hypers, Orders, Who, bind, episodes, make_train, report_key, round_key, round_of
from esper_jax.types import BLUEPRINTS, Action, AlphaAlgorithm, Op, Stage

CFG, RULES, train = tiny_run.CONFIG, tiny_run.RULES, tiny_run.train
P, T, E = CFG.policy_seeds, CFG.training.epochs, CFG.n_envs
COLLECTIVES = ("all-reduce", "all-gather", "collective-permute", "all-to-all", "reduce-scatter")


def rounds(n, *, n_devices=1, seed=0):
    """Run states and metrics of the first rounds."""
    key = jax.random.key(seed)
    out = [(train(n_devices).init(key), None)]
    for number in range(n):
        with tiny_run.compilations() as compiled:
            out.append(train(n_devices).update(key, out[-1][0]))
        assert not (number and compiled), "something was compiled again"
    return out


@functools.cache
def two_rounds(n_devices):
    return rounds(2, n_devices=n_devices)


@functools.cache
def comparison():
    """All controllers, after the first round."""
    t = train(1)
    return t.compare(jax.random.key(0), two_rounds(1)[1][0], t.controllers)


def everyone():
    """The episodes of a round: rows of the two policies and of the twin."""
    return round_of(CFG, train(1).controllers)


def rollout(who, *, n_devices=1, seed=3):
    t = train(n_devices)
    run = two_rounds(n_devices)[1][0]
    key = devices.replicate(jax.random.key(seed), devices.make_mesh(n_devices))
    return t.programs.rollout(t.dataset, run, key, who)


def equal(one, other):
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.array_equal(a, b, equal_nan=True) for a, b in pairs)


def part(tree, *index):
    return jax.tree.map(lambda leaf: np.asarray(leaf)[index], tree)


def of_policy(run, p):
    return part(run.replace(round=np.zeros(len(run.returns.var))), p)


def test_the_same_seed_gives_the_same_rounds():
    again = rounds(2)
    for (run, metrics), (other_run, other_metrics) in zip(two_rounds(1), again, strict=True):
        assert tiny.equal(run, other_run) and tiny.equal(metrics, other_metrics)
    other = rounds(1, seed=1)
    assert not equal(other[1][1].rollout.reward, two_rounds(1)[1][1].rollout.reward)
    # the second round has other environments than the first
    assert not equal(two_rounds(1)[1][1].rollout.info.val_loss, two_rounds(1)[2][1].rollout.info.val_loss)
    assert [int(run.round) for run, _ in again] == [0, 1, 2]


def test_rows_of_an_episode():
    """Row 0 is the birth: WAIT, whoever acts; the last row is terminal; values are those of the policy."""
    rows = two_rounds(1)[1][1].rollout
    assert rows.reward.shape == (P, E, T) and rows.features.shape[:3] == (P, E, T)
    assert (rows.action.op[..., 0] == Op.WAIT).all() and rows.terminal[..., -1].all()
    assert not rows.terminal[..., :-1].any() and not rows.reset.any() and not rows.info.panic.any()
    for p in range(P):
        assert rows.value[p, :, 1:].any() and (rows.log_prob[p, :, 1:] < 0).any()
    assert (rows.info.legal | (rows.action.op == Op.WAIT)).all()


def test_the_policy_is_unchanged_when_the_first_update_starts():
    for _, metrics in two_rounds(1)[1:]:
        assert metrics.learner["ratio_error"].shape == (P,) and (metrics.learner["ratio_error"] < 1e-5).all()
    # and it changes: normalisers too, whose statistics are those of E episodes without their births
    (before, _), (after, _) = two_rounds(1)[:2]
    for p in range(P):
        for field in ("learner", "observations", "returns"):
            assert not equal(part(getattr(before, field), p), part(getattr(after, field), p))
    assert equal(before.hypers, after.hypers)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(two_rounds(1)[2][0].learner.params))


def test_an_episode_does_not_depend_on_its_place():
    """Bitwise: the same controllers, policies and environments at other places, beside others."""
    who, places = everyone(), (P + 1) * E
    flat = lambda tree: jax.tree.map(lambda leaf: np.asarray(leaf).reshape(places, *leaf.shape[2:]), tree)
    order = np.random.default_rng(0).permutation(places)
    new = order % 2 == 1  # these get environments that the other rollout has not
    shuffled = jax.tree.map(lambda column: column.reshape(P + 1, E, *column.shape[1:]), part(flat(who), order))
    shuffled = shuffled._replace(env=shuffled.env + E * new.reshape(P + 1, E).astype(np.int32))
    before, after = flat(rollout(who)), flat(rollout(shuffled))
    births = np.asarray(after[0].info.val_loss[:, 0])
    assert len(np.unique(births)) == len(np.unique(shuffled.env)) == 2 * (E // 2)  # even ones, and odd ones plus E
    assert equal(part(after, ~new), part(before, order[~new]))
    assert not np.isin(births[new], before[0].info.val_loss[:, 0]).any()


def test_controllers_are_compared_on_the_same_births():
    t, results = train(1), comparison()
    assert t.controllers == ("never", "random", "eager", "policy", "policy_greedy") == tuple(results)
    birth = lambda result, p=0: part((result.rollout.info, result.rollout.features), p, slice(None), 0)
    for name, result in results.items():
        policies = P if name in LEARNED else 1
        assert result.test.table.shape == (policies, E, 4) and result.germinated.shape == (policies, E)
        assert all(equal(birth(result, p), birth(results["never"])) for p in range(policies))
        assert ((result.test.accuracy >= 0) & (result.test.accuracy <= 100)).all()
    assert not results["never"].germinated.any() and not np.asarray(results["never"].rollout.action.op).any()
    # eager: a seed in each of the two slots, then the first to training
    assert (results["eager"].germinated == 2).all()
    assert results["eager"].rollout.action.op[0, 0, :4].tolist() == [Op.WAIT, Op.GERMINATE, Op.GERMINATE, Op.ADVANCE]
    # a seed that only germinates leaves the host alone: the same test accuracy as without one
    losses = {name: results[name].rollout.info.val_loss for name in ("eager", "never")}
    assert equal(losses["eager"][..., :3], losses["never"][..., :3])
    # policies act by chance on keys of their own, greedily without any, and differ
    for one, other in (("policy", "policy"), ("policy", "policy_greedy")):
        assert not equal(part(results[one].rollout.action, 0), part(results[other].rollout.action, 1))
    # episodes of a comparison are not those of a round
    assert not equal(birth(results["policy"])[0].val_loss, two_rounds(1)[1][1].rollout.info.val_loss[0, :, 0])


def test_an_arm_does_not_depend_on_who_else_is_compared():
    """Bitwise: neither on the other arms, whose episodes share its blocks, nor on how many environments there are."""
    t, run = train(1), two_rounds(1)[1][0]
    for cfg, names in ((CFG, ["policy_greedy", "random"]), (CFG.replace(report_envs=3), t.controllers)):
        some = bind(cfg.replace(devices=1), t.dataset, t.controllers, t.programs)
        for name, result in some.compare(jax.random.key(0), run, names).items():
            assert tiny.equal(result, part(comparison()[name], slice(None), slice(cfg.report_envs))), name


# --- what is paid ---


def test_nothing_is_paid_until_a_seed_is_blended_in():
    """Bitwise 0 until then, in every episode; `never` always."""
    assert not np.asarray(comparison()["never"].rollout.reward).view(np.int32).any()
    grown = 0
    for rows in (two_rounds(1)[1][1].rollout, *(result.rollout for result in comparison().values())):
        live = np.maximum.accumulate(np.asarray(rows.info.alpha).max(-1) > 0, axis=-1)
        assert not np.asarray(rows.reward)[~live].view(np.int32).any()
        grown += np.count_nonzero(np.asarray(rows.reward)[live])
    assert grown > 0


def worth(info, twin, scale=30.0, price=0.5, harvest=1.0):
    """The last value by hand, in points; f[R] of one row of the comparison."""
    last = part(info, slice(None), -1)
    value = lambda loss, size: scale * (twin[:, -1] - loss) - price * (size - 1.0)
    kept, whole = value(last.committed_loss, last.committed_size), value(last.val_loss, last.blended_size)
    return harvest * kept + (1 - harvest) * whole


def test_returns_are_the_last_value():
    results = comparison()
    twin = np.float64(results["never"].rollout.info.val_loss[0])
    for result in results.values():
        rows = result.rollout
        assert not rows.info.panic.any() and rows.info.accepted.all() and (rows.info.val_loss < 10).all()
        for p, reward in enumerate(np.float64(rows.reward)):
            np.testing.assert_allclose(reward.sum(-1), worth(part(rows.info, p), twin), atol=1e-4)
            total = sum(np.float64(leaf[p]) for leaf in jax.tree.leaves(rows.info.components))
            np.testing.assert_allclose(total, reward, atol=1e-5)
    eager = results["eager"]
    assert (eager.fossilised > 0).all() and (eager.rollout.info.committed_size[..., -1] > 1).all()


# --- policies side by side ---


def test_policies_share_their_environments():
    """The births of a round are the same, what follows is not, and no policy is another one."""
    rows = two_rounds(1)[1][1].rollout
    births = part((rows.info, rows.features), slice(None), slice(None), 0)
    assert equal(part(births, 0), part(births, 1))
    assert not equal(rows.action.op[0], rows.action.op[1])
    for run, _ in two_rounds(1):
        assert not equal(part(run.learner.params, 0), part(run.learner.params, 1))


def test_a_policy_does_not_depend_on_the_others():
    """Bitwise: its start and its keys without them, its round beside another one."""
    t, key = train(1), jax.random.key(0)
    alone = make_train(CFG.replace(devices=1, policy_seeds=1), tiny.dataset(), {})
    assert tiny.equal(of_policy(alone.init(key), 0), of_policy(two_rounds(1)[0][0], 0))
    env_key, learn_keys = map(jax.random.key_data, t.programs.keys(key, 3))
    env_key_alone, learn_keys_alone = map(jax.random.key_data, alone.programs.keys(key, 3))
    assert learn_keys.shape[0] == P and not equal(learn_keys[0], learn_keys[1])
    assert equal(env_key, env_key_alone) and equal(learn_keys[:1], learn_keys_alone)

    run, (after, metrics) = two_rounds(1)[0][0], two_rounds(1)[1]
    halved = lambda leaf: np.concatenate([np.asarray(leaf)[:1], np.asarray(leaf)[1:] * 0.5])
    changed = run.replace(learner=run.learner.replace(params=jax.tree.map(halved, run.learner.params)))
    beside, beside_metrics = t.update(key, devices.replicate(changed, devices.make_mesh(1)))
    assert tiny.equal(of_policy(beside, 0), of_policy(after, 0))
    assert tiny.equal(part(beside_metrics, 0), part(metrics, 0))
    assert not equal(beside_metrics.rollout.value[1], metrics.rollout.value[1])


def test_a_grid_of_hypers_is_one_run():
    """Policy 1 with a price, a share of the harvest and a step of its own; policy 0 as it was, bitwise."""
    t, key = train(1), jax.random.key(0)
    hypers = two_rounds(1)[0][0].hypers
    assert hypers.ppo.learning_rate.shape == (P,)
    grid = hypers.replace(
        ppo=hypers.ppo.replace(learning_rate=jnp.float32([CFG.ppo.learning_rate, 0.01])),
        reward=hypers.reward.replace(price=jnp.float32([0.5, 4.0]), harvest=jnp.float32([1.0, 0.25])),
    )
    comparison()
    start = t.init(key, grid)
    with tiny_run.compilations() as compiled:
        run, metrics = t.update(key, start)
        results = t.compare(key, run, ["never", "eager", "policy"])
    assert not compiled, "something was compiled again"
    (before, _), (default, default_metrics) = two_rounds(1)[:2]
    assert tiny.equal(start.replace(hypers=hypers), before)
    assert tiny.equal(of_policy(run, 0), of_policy(default, 0))
    # the same episodes, paid and learned from otherwise
    assert equal(metrics.rollout.info.val_loss, default_metrics.rollout.info.val_loss)
    assert not equal(metrics.rollout.reward[1], default_metrics.rollout.reward[1])
    assert not equal(part(run.learner.params, 1), part(default.learner.params, 1))
    twin = np.float64(results["never"].rollout.info.val_loss[0])
    for name, p, weights in (("policy", 0, {}), ("policy", 1, {"price": 4.0, "harvest": 0.25}), ("eager", 0, {})):
        rows = part(results[name].rollout, p)
        np.testing.assert_allclose(np.float64(rows.reward).sum(-1), worth(rows.info, twin, **weights), atol=1e-4)


def play(who, *, report=False):
    """Episodes of the first round's environments, after that round."""
    key, run = jax.random.key(0), two_rounds(1)[1][0]
    return train(1).play(round_key(key, 0), run, who, report)


def test_episodes_of_choice_are_those_of_a_round():
    """The policies in the first round's environments, before they learned: nothing but who plays is asked anew."""
    who = episodes(CFG, train(1).controllers, [("policy", p, e) for p in range(P) for e in range(E)])
    key, run = jax.random.key(0), two_rounds(1)[0][0]
    twins, played = train(1).play(round_key(key, 0), run, who, False)
    then = two_rounds(1)[1][1].rollout
    apart = lambda tree: jax.tree.map(lambda leaf: leaf.reshape(P, E, *leaf.shape[1:]), tree)
    assert equal(apart(played.rollout), then) and played.test is None
    assert np.array_equal(twins.rollout.info.val_loss[:, 0], then.info.val_loss[0, :, 0])


def test_orders_are_played_instead_of_what_a_controller_asks_for():
    """One action at one epoch; before it nothing differs, and elsewhere the controller decides."""
    who = episodes(CFG, train(1).controllers, [("never", 0, e) for e in range(E)])
    germinate = Action(op=np.int32(Op.GERMINATE), slot=np.int32(1), blueprint=np.int32(BLUEPRINTS.index("conv_light")))
    who.orders.action[0, 2] = [getattr(germinate, head) for head in HEADS]
    who.orders.action[1, 0] = who.orders.action[0, 2]  # an episode's birth, before which there is no decision
    twins, played = play(who)
    info = played.rollout.info
    assert info.requested_op[0].tolist() == [0, 0, Op.GERMINATE, *[0] * (T - 3)] and not info.requested_op[1:].any()
    assert (info.stage[0, 2:, 1] == Stage.GERMINATED).all() and played.germinated.tolist() == [1] + [0] * (E - 1)
    assert equal(part(played.rollout.info, slice(1, None)), part(twins.rollout.info, slice(1, None)))
    assert equal(info.val_loss[0, :2], twins.rollout.info.val_loss[0, :2])


def test_luck_changes_what_comes_after_a_moment():
    """From epoch 3 on other batches and other draws, for the twin, too; before it nothing differs."""
    who = episodes(CFG, train(1).controllers, [("policy", 0, 0)] * 3)
    who.orders.luck[1:, 3:] = [[1], [2]]
    twins, played = play(who)
    losses = played.rollout.info.val_loss
    assert (losses[:, :3] == losses[0, :3]).all() and len(np.unique(losses[:, 3])) == 3
    assert (
        len(twins.germinated) == 3 and (twins.rollout.info.val_loss[:, :3] == twins.rollout.info.val_loss[0, :3]).all()
    )
    # until something is blended in, an episode is its twin, if that has the same luck
    dark = played.rollout.info.blended_size == 1
    assert equal(losses[:, 3][dark[:, :4].all(1)], twins.rollout.info.val_loss[:, 3][dark[:, :4].all(1)])
    assert not played.rollout.reward[dark.cumprod(1).astype(bool)].any()


def test_what_was_kept_can_be_there_from_the_first_epoch():
    """A network of another's final shape: its size from birth, its host's parameters and batches the same."""
    eager, twins = comparison()["eager"], comparison()["never"]
    shape = eager.shape[0]
    assert (shape[..., 0] >= 0).any()  # something was kept
    assert np.array_equal(shape[..., 0] >= 0, eager.rollout.info.stage[0, :, -1] == Stage.FOSSILIZED)
    who = episodes(CFG, train(1).controllers, [("never", 0, e) for e in range(len(shape))])
    who = who._replace(orders=who.orders._replace(shape=shape))
    _, static = train(1).play(report_key(jax.random.key(0)), two_rounds(1)[1][0], who)
    info = static.rollout.info
    size = eager.rollout.info.committed_size[0, :, -1]
    assert np.array_equal(info.committed_size, np.repeat(size[:, None], T, axis=1))
    assert np.array_equal(static.shape, shape) and np.array_equal(static.fossilised, (shape[..., 0] >= 0).sum(-1))
    here = info.stage == Stage.FOSSILIZED
    assert np.array_equal(here, np.repeat((shape[:, None, :, 0] >= 0), T, axis=1)) and (info.alpha == here).all()
    assert not np.array_equal(info.val_loss, twins.rollout.info.val_loss[0])


def test_a_newborn_with_fossils_has_the_same_host():
    env = make_env(CFG, tiny.dataset())
    kind = BLUEPRINTS.index("conv_light")
    shape = jnp.int32([[-1, -1], [kind, AlphaAlgorithm.GATE]])
    bare, grown = env.init(jax.random.key(0)), env.init(jax.random.key(0), shape)
    assert equal(bare.model.host, grown.model.host) and equal(grown.snapshot.model, grown.model)
    assert not np.any(grown.model.seeds[0].params) and np.any(grown.model.seeds[1].params)
    assert np.any(grown.model.seeds[1].gate) and grown.slots.has_gate.tolist() == [False, True]
    assert equal(env.init(jax.random.key(0), jnp.full((2, 2), -1)), bare)


def test_a_plan_is_carried_out():
    """Slot 1 germinates at the first decision, slot 0 once three epochs are trained."""
    kinds = [BLUEPRINTS.index(name) for name in ("conv_light", "norm")]
    who = episodes(CFG, train(1).controllers, [("planned", 0, e) for e in range(E)])
    who.orders.plan[:] = [[kinds[0], 3, 0], [kinds[1], 0, 0]]
    info = play(who)[1].rollout.info
    germinations = np.argwhere(info.op == Op.GERMINATE)
    assert germinations[:2].tolist() == [[0, 1], [0, 3]] and info.slot[0, [1, 3]].tolist() == [1, 0]
    assert (info.blueprint[:, -1] == kinds).all()
    who.orders.plan[:] = 0
    assert not play(who)[1].rollout.info.op.any()


def test_as_often_as_somebody_else():
    """Three germinations are left and two slots: the third waits for a slot that nobody empties."""
    who = episodes(CFG, train(1).controllers, [("matched", 0, e) for e in range(E)])
    who.orders.ops[:, [Op.GERMINATE, Op.WAIT]] = [3, 1]
    info = play(who)[1].rollout.info
    assert ((info.op == Op.GERMINATE).sum(1) == 2).all() and ((info.op == Op.WAIT).sum(1) == T - 2).all()


def test_the_blind_see_the_time():
    """Their actions are the same whatever else they look at; they learn as others do."""
    key, t = jax.random.key(0), train(1)
    blind = t.init(key, Hypers.from_config(CFG).replace(sight=jnp.float32([0, 1])))
    run, metrics = t.update(key, blind)
    assert equal(part(metrics.rollout, 1), part(two_rounds(1)[1][1].rollout, 1))  # the other one sees
    params = lambda state: part(state.learner.params, 0)
    assert not equal(params(run), params(blind)) and not equal(params(run), params(two_rounds(1)[1][0]))
    encoder = np.asarray(
        run.learner.params["params"]["encoder"]["kernel"][0] - blind.learner.params["params"]["encoder"]["kernel"][0]
    )
    time = observation.is_time(CFG.action_space)
    assert time.sum() == 1 and encoder[time].any() and not encoder[~time].any()


def test_hypers_of_a_run_on_several_devices_begin_another():
    t, run = train(4), two_rounds(4)[0][0]
    assert tiny.equal(t.init(jax.random.key(0), run.hypers), run)


def test_a_controller_that_is_named_twice_is_compared_once():
    run = two_rounds(1)[1][0]
    twice = train(1).compare(jax.random.key(0), run, ["eager", "eager", "never", "policy"])
    assert list(twice) == ["eager", "never", "policy"] and all(equal(twice[name], comparison()[name]) for name in twice)


def test_an_unknown_controller_is_refused():
    with pytest.raises(ValueError, match="controller 'greedy': must be one of never, random, eager, policy, policy_gr"):
        train(1).compare(jax.random.key(0), two_rounds(1)[0][0], ["greedy"])
    for name in LEARNED:
        with pytest.raises(ValueError, match=f"'{name}' is given: that name is the learned policy's"):
            make_train(CFG.replace(devices=1), tiny.dataset(), {name: baselines.never()})
    assert make_train(CFG.replace(devices=1), tiny.dataset(), {}).controllers == (BASELINE, *LEARNED)


@pytest.mark.parametrize("n_devices", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_a_run_compiles_once(n_devices):
    """Later rounds, and every controller, go through the programs of the first round."""
    t, (run, _), key = train(n_devices), two_rounds(n_devices)[2], jax.random.key(0)
    if n_devices == 1:
        comparison()
    with tiny_run.compilations() as compiled:
        run, _ = t.update(key, run)
        if n_devices == 1:
            for names in (["never"], ["policy", "random"], t.controllers):
                t.compare(key, run, names)
    assert not compiled, "something was compiled again"


@pytest.mark.parametrize("n_devices", [4, pytest.param(2, marks=pytest.mark.slow)])
def test_the_number_of_devices_changes_nothing(n_devices):
    """Bitwise: what was played and what was learned from it, in minibatches of environments of several devices."""
    assert CFG.ppo.minibatches == 2
    for (one, one_metrics), (several, metrics) in zip(two_rounds(1)[1:], two_rounds(n_devices)[1:], strict=True):
        assert tiny.equal(one, several) and tiny.equal(one_metrics, metrics)


def test_replicas_of_the_learner_stay_bitwise_equal():
    run, _ = two_rounds(4)[2]
    for leaf in jax.tree.leaves(run):
        shards = [np.asarray(shard.data).tobytes() for shard in leaf.addressable_shards]
        assert len(shards) == 4 and len(set(shards)) == 1


def test_devices_communicate_only_to_gather_what_is_learned_from():
    t, (run, _) = train(4), two_rounds(4)[1]
    mesh, who = devices.make_mesh(4), everyone()
    key, learn_keys = devices.replicate(t.programs.keys(jax.random.key(0), 0), mesh)
    rows, _ = rollout(who, n_devices=4)
    course = Course.of(rows.info)
    programs = {
        "rollout": t.programs.rollout.lower(t.dataset, run, key, who),
        "pay": t.programs.pay.lower(run.hypers, devices.split(who.policy, mesh), course, course.val_loss),
        "gather": t.programs.gather.lower(rows),
        "learn": t.programs.learn.lower(*devices.on_one((learn_keys, run, t.programs.gather(rows)))),
    }
    texts = {name: lowered.compile().as_text() for name, lowered in programs.items()}
    assert not [name for name in COLLECTIVES if name in texts["rollout"] + texts["pay"] + texts["learn"]]
    assert [name for name in COLLECTIVES if name in texts["gather"]] == ["all-gather"]


def test_uneven_populations_are_refused():
    message = r"Config.n_envs = 6: must be a multiple of 4 \(4 devices times env_chunk = 1\)"
    with pytest.raises(ValueError, match=message):
        make_train(CFG.replace(n_envs=6, devices=4), tiny.dataset(), {})
    message = r"Config.n_envs = 12: must be a multiple of 8 \(4 devices times env_chunk = 2\)"
    with pytest.raises(ValueError, match=message):
        make_train(CFG.replace(n_envs=12, devices=4, env_chunk=2), tiny.dataset(), {})
    with pytest.raises(ValueError, match=r"Config.devices = 5: must be at most 4, the devices there are"):
        make_train(CFG.replace(devices=5), tiny.dataset(), {})


# --- devices ---


def body(weights, xs, axis_name):
    """A step of gradient descent on the mean of squares over all devices, and what stays on each."""
    loss = lambda w: ((xs @ w - 1.0) ** 2).mean()
    grads = jax.grad(loss)(weights)
    grads = grads if axis_name is None else jax.lax.pmean(grads, axis_name)
    return weights - 0.1 * grads, jnp.tanh(xs @ weights)


def test_shard_map_is_pmap():
    """The same body under both: bitwise the same numbers."""
    mesh = devices.make_mesh(4)
    weights, xs = jax.random.normal(jax.random.key(0), (3,)), jax.random.normal(jax.random.key(1), (2, 8, 3))
    mapped = devices.over_devices(body, mesh, (REPLICATED, SHARDED), (REPLICATED, SHARDED))
    new, out = mapped(weights, xs)
    pmapped = jax.pmap(lambda w, x: body(w, x, "env"), axis_name="env", in_axes=(None, 1), out_axes=(0, 1))
    p_new, p_out = pmapped(weights, xs.reshape(2, 4, 2, 3))  # two policies, on each device two of their environments
    assert all(np.array_equal(new, p_new[k]) for k in range(4)) and np.array_equal(out, p_out.reshape(2, 8))
    # one device: no axis, no collective, the same mathematics
    alone = devices.over_devices(body, devices.make_mesh(1), (REPLICATED, SHARDED), (REPLICATED, SHARDED))
    np.testing.assert_allclose(alone(weights, xs)[0], new, rtol=1e-6)
    assert not any(name in alone.lower(weights, xs).compile().as_text() for name in COLLECTIVES)


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [1, 4])
def test_an_environment_does_not_depend_on_the_population(chunk):
    """Bitwise: 8 environments and the same 8 among 32, and beside others in their chunk."""
    # four epochs: once seeds are blended in, a chunk of 4 rounds differently at its different places
    t = make_train(CFG.replace(devices=1, env_chunk=chunk, **{"training.epochs": 4}), tiny.dataset(), {})
    run = t.init(jax.random.key(0))

    def play(envs):
        numbers = np.int32(envs)[None]
        orders = Orders.none(CFG.replace(**{"training.epochs": 4}), numbers.shape)
        who = Who(np.full_like(numbers, t.controllers.index("policy")), numbers % P, numbers, orders)
        return jax.device_get(t.programs.rollout(t.dataset, run, jax.random.key(3), who))

    few, many = play(np.arange(8)), play(np.arange(32))
    assert equal(few, part(many, slice(None), slice(8)))
    order = np.array([7, 30, 2, 12, 0, 25, 31, 5])
    assert equal(play(order), part(many, slice(None), order))


@pytest.mark.slow
def test_a_policy_alone_is_the_same_policy():
    """Bitwise: two rounds of policy 0 without the other, as users compile them."""
    assert tiny_run.as_users_compile(policy_alone, optimised=False) == [(True, True)] * 2


def policy_alone():
    t = make_train(CFG.replace(devices=1, policy_seeds=1), tiny.dataset(), RULES())
    run, same = t.init(jax.random.key(0)), []
    for after, metrics in two_rounds(1)[1:]:
        run, alone = t.update(jax.random.key(0), run)
        same.append((tiny.equal(part(alone, 0), part(metrics, 0)), tiny.equal(of_policy(run, 0), of_policy(after, 0))))
    return same
