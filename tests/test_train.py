"""Rounds on a tiny configuration: reproducible, independent of population and devices, compiled once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from esper_jax import devices
from esper_jax.config import PPOConfig
from esper_jax.control import baselines
from esper_jax.devices import EACH, SAME
from esper_jax.train import make_train
from esper_jax.types import Op

T, E = 4, 8
# One minibatch: how environments are put together into several depends on the number of devices.
CFG = tiny.CONFIG.replace(
    n_envs=E, report_envs=E, ppo=PPOConfig(hidden_size=8, epochs=2, minibatches=1, anneal_rounds=4),
    **{"training.epochs": T},
)  # fmt: skip
COLLECTIVES = ("all-reduce", "all-gather", "collective-permute", "all-to-all", "reduce-scatter")


@pytest.fixture(autouse=True, scope="module")
def unoptimised():
    """Programs are compiled without optimisation, in half the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@functools.cache
def train(n_devices):
    rules = {"never": baselines.never(), "random": baselines.random(), "eager": baselines.eager("norm")}
    return make_train(CFG.replace(devices=n_devices), tiny.dataset(), rules)


def rounds(n, *, n_devices=1, seed=0):
    """Run states and metrics of the first rounds."""
    key = jax.random.key(seed)
    out = [(train(n_devices).init(key), None)]
    for _ in range(n):
        out.append(train(n_devices).update(key, out[-1][0]))
    return out


@functools.cache
def two_rounds(n_devices):
    return rounds(2, n_devices=n_devices)


def rollout(ids, controller="policy", *, n_devices=1, seed=3):
    t = train(n_devices)
    run = two_rounds(n_devices)[1][0]
    key = devices.replicate(jax.random.key(seed), devices.make_mesh(n_devices))
    return jax.device_get(t.rollout(t.dataset, run, key, jnp.int32(t.controllers.index(controller)), np.int32(ids)))


def equal(one, other):
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.array_equal(a, b, equal_nan=True) for a, b in pairs)


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
    assert rows.reward.shape == (E, T) and rows.features.shape[:2] == (E, T)
    assert (rows.action.op[:, 0] == Op.WAIT).all() and rows.terminal[:, -1].all() and not rows.terminal[:, :-1].any()
    assert not rows.reset.any() and not rows.info.panic.any()
    assert rows.value[:, 1:].any() and (rows.log_prob[:, 1:] < 0).any()
    assert (rows.info.legal | (rows.action.op == Op.WAIT)).all()


def test_the_policy_is_unchanged_when_the_first_update_starts():
    for _, metrics in two_rounds(1)[1:]:
        assert metrics.learner["ratio_error"] < 1e-5
    # and it changes: normalisers too, whose statistics are those of E episodes without their births
    (before, _), (after, _) = two_rounds(1)[:2]
    assert not equal(before.learner.params, after.learner.params)
    assert not equal(before.observations, after.observations) and not equal(before.rewards, after.rewards)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(two_rounds(1)[2][0].learner.params))


def test_an_environment_does_not_depend_on_its_place():
    """Bitwise: the same environments at other places, beside others."""
    rows, states = rollout(np.arange(8))
    order = np.array([7, 30, 2, 12, 0, 25, 31, 5])
    shuffled, shuffled_states = rollout(order)
    known = np.flatnonzero(order < 8)
    assert len(known) == 4 and len(np.unique(np.asarray(shuffled.info.val_loss[:, 0]))) == 8
    for one, other in ((shuffled, rows), (shuffled_states, states)):
        assert equal(jax.tree.map(lambda leaf: leaf[known], one), jax.tree.map(lambda leaf: leaf[order[known]], other))


def test_controllers_are_compared_on_the_same_births():
    t, (run, _) = train(1), two_rounds(1)[1]
    results = {name: jax.device_get(t.compare(jax.random.key(0), run, name)) for name in t.controllers}
    assert t.controllers == ("never", "random", "eager", "policy")
    birth = lambda result: jax.tree.map(lambda leaf: leaf[:, 0], (result.rollout.info, result.rollout.features))
    for result in results.values():
        assert equal(birth(result), birth(results["never"]))
        assert result.test.table.shape == (E, 4) and ((result.test.accuracy >= 0) & (result.test.accuracy <= 100)).all()
    assert not results["never"].germinated.any() and not np.asarray(results["never"].rollout.action.op).any()
    # eager: a seed in each of the two slots, then the first to training
    assert (results["eager"].germinated == 2).all()
    assert results["eager"].rollout.action.op[0].tolist() == [Op.WAIT, Op.GERMINATE, Op.GERMINATE, Op.ADVANCE]
    # a seed that only germinates leaves the host alone: the same test accuracy as without one
    assert equal(results["eager"].rollout.info.val_loss[:, :3], results["never"].rollout.info.val_loss[:, :3])
    # episodes of a comparison are not those of a round
    assert not equal(birth(results["policy"])[0].val_loss, two_rounds(1)[1][1].rollout.info.val_loss[:, 0])


def test_an_unknown_controller_is_refused():
    with pytest.raises(ValueError, match="controller 'greedy': must be one of never, random, eager, policy"):
        train(1).compare(jax.random.key(0), two_rounds(1)[0][0], "greedy")
    with pytest.raises(ValueError, match="'policy' is given: that name is the learned policy's"):
        make_train(CFG.replace(devices=1), tiny.dataset(), {"policy": baselines.never()})


@pytest.mark.parametrize("n_devices", [1, 4])
def test_a_run_compiles_once(n_devices):
    """Later rounds, and every controller, go through the programs of the first round."""
    t, (run, _) = train(n_devices), two_rounds(n_devices)[2]
    sizes = lambda: (t.rollout._cache_size(), t.learn._cache_size())
    assert sizes() == (1, 1)
    run, _ = t.update(jax.random.key(0), run)
    if n_devices == 1:
        for name in ("never", "policy"):
            t.compare(jax.random.key(0), run, name)
        assert t.report._cache_size() == 1
    assert sizes() == (1, 1)


def test_four_devices_do_what_one_does():
    (_, (one, one_metrics), _), (_, (four, four_metrics), _) = two_rounds(1), two_rounds(4)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
    # an environment is the same program on any device; only the learner's sums are taken in another order
    jax.tree.map(close, one_metrics.rollout, four_metrics.rollout)
    assert equal(one_metrics.rollout.action, four_metrics.rollout.action)
    jax.tree.map(close, one.learner.params, four.learner.params)
    jax.tree.map(close, one.observations, four.observations)
    jax.tree.map(close, one.rewards, four.rewards)


def test_replicas_of_the_learner_stay_bitwise_equal():
    run, _ = two_rounds(4)[2]
    for leaf in jax.tree.leaves(run):
        shards = [np.asarray(shard.data).tobytes() for shard in leaf.addressable_shards]
        assert len(shards) == 4 and len(set(shards)) == 1


def test_only_the_learner_communicates():
    t, (run, metrics) = train(4), two_rounds(4)[1]
    mesh = devices.make_mesh(4)
    key = devices.replicate(jax.random.key(0), mesh)
    rollout = t.rollout.lower(t.dataset, run, key, jnp.int32(0), jnp.arange(E)).compile().as_text()
    learn = t.learn.lower(key, run, metrics.rollout).compile().as_text()
    assert not [name for name in COLLECTIVES if name in rollout] and "all-reduce" in learn


def test_uneven_populations_are_refused():
    message = r"Config.n_envs = 6: must be a multiple of 4 \(4 devices times env_chunk = 1\)"
    with pytest.raises(ValueError, match=message):
        make_train(CFG.replace(n_envs=6, devices=4), tiny.dataset(), {})
    with pytest.raises(
        ValueError, match=r"Config.report_envs = 12: must be a multiple of 8 \(4 devices times env_chunk"
    ):
        make_train(CFG.replace(report_envs=12, devices=4, env_chunk=2), tiny.dataset(), {})
    with pytest.raises(ValueError, match=r"Config.devices = 5: must be at most 4, the devices there are"):
        make_train(CFG.replace(devices=5), tiny.dataset(), {})


# --- devices ---


def body(weights, xs, axis_name):
    """A step of gradient descent on the mean of squares over all devices, and what stays on each."""
    loss = lambda w: ((xs @ w - 1.0) ** 2).mean()
    grads = devices.mean_over_devices(jax.grad(loss)(weights), axis_name)
    return weights - 0.1 * grads, jnp.tanh(xs @ weights)


def test_shard_map_is_pmap():
    """The same body under both: bitwise the same numbers."""
    mesh = devices.make_mesh(4)
    weights, xs = jax.random.normal(jax.random.key(0), (3,)), jax.random.normal(jax.random.key(1), (8, 3))
    mapped = devices.over_devices(body, mesh, (SAME, EACH), (SAME, EACH))
    new, out = mapped(weights, xs)
    pmapped = jax.pmap(lambda w, x: body(w, x, "env"), axis_name="env", in_axes=(None, 0))
    p_new, p_out = pmapped(weights, xs.reshape(4, 2, 3))
    assert all(np.array_equal(new, p_new[k]) for k in range(4)) and np.array_equal(out, p_out.reshape(8))
    # one device: no axis, no collective, the same mathematics
    alone = devices.over_devices(body, devices.make_mesh(1), (SAME, EACH), (SAME, EACH))
    np.testing.assert_allclose(alone(weights, xs)[0], new, rtol=1e-6)
    assert not any(name in alone.lower(weights, xs).compile().as_text() for name in COLLECTIVES)


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [1, 4])
def test_an_environment_does_not_depend_on_the_population(chunk):
    """Bitwise: 8 environments and the same 8 among 32, and beside others in their chunk."""
    t = make_train(CFG.replace(devices=1, env_chunk=chunk), tiny.dataset(), {})
    run = t.init(jax.random.key(0))
    play = lambda ids: jax.device_get(t.rollout(t.dataset, run, jax.random.key(3), jnp.int32(0), np.int32(ids)))
    few, many = play(np.arange(8)), play(np.arange(32))
    assert equal(few, jax.tree.map(lambda leaf: leaf[:8], many))
    order = np.array([7, 30, 2, 12, 0, 25, 31, 5])
    assert equal(play(order), jax.tree.map(lambda leaf: leaf[order], many))
