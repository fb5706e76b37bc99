"""The learner: its arithmetic on worked numbers, its safeguards, and five problems that it must solve."""

import dataclasses
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import probes
import pytest

from esper_jax.control import ppo
from esper_jax.types import HEADS, Op

CFG, SPACE = probes.CFG, probes.SPACE
T, E = probes.STEPS, probes.N_ENVS
KEY = jax.random.key(0)
gae = jax.jit(ppo.gae)
normalise = jax.jit(ppo.normalise_advantages)
make_batch = jax.jit(partial(ppo.make_batch, cfg=CFG))
loss_and_grad = jax.jit(
    lambda params, batch, coef: jax.value_and_grad(ppo.loss, has_aux=True)(
        params, batch, cfg=CFG, space=SPACE, entropy_coef=coef
    )
)


@pytest.fixture(scope="module")
def learner():
    """Policy outputs scaled up, so that it is far from uniform."""
    learner = probes.init(KEY)
    inner = learner.params["params"]
    heads = {f"head_output_{head}": jax.tree.map(lambda x: 50 * x, inner[f"head_output_{head}"]) for head in HEADS}
    return learner.replace(params={"params": inner | heads})


@pytest.fixture(scope="module")
def rows(learner):
    """A rollout in which all ops occur and rewards differ."""
    masks_of_all_ops = jnp.int32(list(probes.PROBES).index("constant"))
    rows = probes.play(KEY, learner.params, masks_of_all_ops)
    rewards = jax.random.normal(jax.random.key(1), (T, E))
    return rows.replace(reward=rewards)


# ---- advantages


def test_gae_worked_example():
    # gamma .9, lambda .8, r = (1, 2, 3), v = (.5, .6, .7).
    # Truncated, bootstrap .9:
    #   A2 = 3 + .9 * .9 - .7 = 3.11;  A1 = 2 + .63 - .6 + .72 * 3.11 = 4.2692;  A0 = 1 + .54 - .5 + .72 * A1 = 4.113824
    # Terminal:
    #   A2 = 3 - .7 = 2.3;  A1 = 2.03 + .72 * 2.3 = 3.686;  A0 = 1.04 + .72 * 3.686 = 3.69392
    r, v = jnp.array([1.0, 2, 3]), jnp.array([0.5, 0.6, 0.7])
    advantages, returns = gae(r, v, 0.9, jnp.zeros(3, bool), gamma=0.9, lam=0.8)
    np.testing.assert_allclose(advantages, [4.113824, 4.2692, 3.11], rtol=1e-6)
    np.testing.assert_allclose(returns, [4.613824, 4.8692, 3.81], rtol=1e-6)
    # The bootstrap is of no account behind a terminal step.
    advantages, _ = gae(r, v, 0.9, jnp.array([False, False, True]), gamma=0.9, lam=0.8)
    np.testing.assert_allclose(advantages, [3.69392, 3.686, 2.3], rtol=1e-6)


def test_gae_stops_at_a_terminal_inside_the_row():
    r, v = jnp.array([1.0, 2, 3]), jnp.array([0.5, 0.6, 0.7])
    advantages, _ = gae(r, v, 0.9, jnp.array([False, True, False]), gamma=0.9, lam=0.8)
    # A1 = 2 - .6 = 1.4;  A0 = 1 + .54 - .5 + .72 * 1.4 = 2.048; what follows is untouched.
    np.testing.assert_allclose(advantages, [2.048, 1.4, 3.11], rtol=1e-6)


def test_gae_leaves_out_rows_that_are_not_valid():
    nan = jnp.nan
    valid = jnp.array([False, True, True, False, True, False])
    r, v = jnp.array([nan, 1, 2, nan, 3, nan]), jnp.array([nan, 0.5, 0.6, nan, 0.7, nan])
    terminals = jnp.array([True, False, False, True, False, True])
    advantages, returns = gae(r, v, 0.9, terminals, gamma=0.9, lam=0.8, valid=valid)
    np.testing.assert_allclose(advantages, [0, 4.113824, 4.2692, 0, 3.11, 0], rtol=1e-6)
    np.testing.assert_allclose(returns, [0, 4.613824, 4.8692, 0, 3.81, 0], rtol=1e-6)


def test_returns_with_lambda_one_are_discounted_sums():
    rng = np.random.default_rng(0)
    r, v = rng.normal(size=(2, 9)).astype(np.float32)
    _, returns = gae(r, v, 2.0, np.zeros(9, bool), gamma=0.9, lam=1.0)
    expected = [sum(0.9**k * x for k, x in enumerate(r[t:])) + 0.9 ** (9 - t) * 2.0 for t in range(9)]
    np.testing.assert_allclose(returns, expected, rtol=1e-5, atol=1e-5)


def test_discounted_sums_worked_example():
    # gamma .5, r = (1, 2, 3, 4), a terminal at row 1: 1; .5 + 2 = 2.5; then anew 3; 1.5 + 4 = 5.5.
    sums = jax.jit(ppo.discounted_sums)
    terminals = jnp.array([False, True, False, False])
    r = jnp.array([1.0, 2, 3, 4])
    np.testing.assert_array_equal(sums(r, terminals, gamma=0.5), [1, 2.5, 3, 5.5])
    # Without it: .5 * 2.5 + 3 = 4.25; 2.125 + 4 = 6.125. Nothing is looked back at with gamma 0.
    np.testing.assert_array_equal(sums(r, jnp.zeros(4, bool), gamma=0.5), [1, 2.5, 4.25, 6.125])
    np.testing.assert_array_equal(sums(r, jnp.zeros(4, bool), gamma=0.0), r)


def test_normalised_advantages():
    # 1, 3 and 5: mean 3, population variance 8/3, so +- 2 / 1.632993.
    a, valid = jnp.array([1.0, 3, 5, jnp.nan]), jnp.array([True, True, True, False])
    np.testing.assert_allclose(normalise(a, valid, std_floor=0.1), [-1.224745, 0, 1.224745, 0], atol=1e-6)
    # Deviations of .01 are divided by the floor .1.
    got = normalise(jnp.array([0.99, 1.01]), jnp.ones(2, bool), std_floor=0.1)
    np.testing.assert_allclose(got, [-0.1, 0.1], atol=1e-5)
    assert not normalise(a, jnp.zeros(4, bool), std_floor=0.1).any()


def test_explained_variance(rows):
    got = jax.jit(lambda rows: ppo.explained_variance(ppo.make_batch(rows, cfg=CFG), cfg=CFG))
    terminal = rows.replace(terminal=jnp.ones_like(rows.terminal))  # returns are the rewards
    np.testing.assert_allclose(got(terminal.replace(value=rows.reward)), 1.0, atol=1e-6)
    np.testing.assert_allclose(got(terminal.replace(value=jnp.ones((T, E)))), 0.0, atol=1e-5)
    # Returns that do not vary: the errors of variance 1 are set against the floor .1 ** 2.
    errors = jnp.where(jnp.arange(E) % 2 == 0, 1.0, -1.0) * jnp.ones((T, 1))
    flat = terminal.replace(reward=jnp.ones((T, E)), value=1 + errors)
    np.testing.assert_allclose(got(flat), 1 - 1 / 0.01, rtol=1e-4)


@pytest.mark.parametrize("rounds, updates, expected", [(100, 0, 0.05), (100, 50, 0.03), (100, 400, 0.01), (0, 0, 0.01)])
def test_entropy_coefficient_is_annealed(rounds, updates, expected):
    cfg = dataclasses.replace(CFG, entropy_coef=0.05, entropy_coef_final=0.01, anneal_rounds=rounds)
    np.testing.assert_allclose(ppo.entropy_coef(jnp.int32(updates), cfg), expected, rtol=1e-6)


# ---- loss


def test_ratios_are_one_under_the_policy_that_acted(learner, rows):
    _, metrics = loss_and_grad(learner.params, make_batch(rows), 0.0)[0]
    assert metrics["ratio_error"] < 1e-5
    assert metrics["approx_kl"] < 1e-5 and metrics["clip_fraction"] == 0


def test_ratios_are_one_across_a_reset_inside_the_sequence(learner, rows):
    """Two episodes of T rows as one sequence of 2 T, the second begun by a reset."""
    second = probes.play(jax.random.key(7), learner.params, jnp.int32(0))
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), rows, second)
    evaluate = jax.jit(
        lambda batch: ppo.loss(learner.params, batch, cfg=CFG, space=SPACE, entropy_coef=0.0)[1]["ratio_error"]
    )
    assert evaluate(make_batch(both)) < 1e-5
    assert evaluate(make_batch(both.replace(reset=jnp.zeros_like(both.reset)))) > 1e-3


def test_loss_on_worked_numbers(learner, rows):
    """Against the formulas in numpy, with old log-probabilities shifted so that ratios are known."""
    shift = np.random.default_rng(3).uniform(-0.5, 0.5, (T, E))
    batch = make_batch(rows.replace(log_prob=rows.log_prob - shift))
    (total, metrics), _ = loss_and_grad(learner.params, batch, 0.03)
    ratio, advantage = np.exp(shift), np.asarray(batch.advantage)
    policy_loss = -np.minimum(ratio * advantage, np.clip(ratio, 0.8, 1.2) * advantage).mean()
    value_loss = 0.5 * np.square(rows.value - batch.returns).mean()
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    close(metrics["policy_loss"], policy_loss)
    close(metrics["value_loss"], value_loss)
    close(metrics["approx_kl"], (ratio - 1 - shift).mean())
    close(metrics["clip_fraction"], (np.abs(ratio - 1) > 0.2).mean())
    close(metrics["ratio_mean"], ratio.mean())
    close(metrics["ratio_max"], ratio.max())
    assert 0 < metrics["entropy"] < 1 and 0 < metrics["op_entropy"] < 1
    close(total, policy_loss + CFG.value_coef * value_loss - 0.03 * metrics["entropy"])


def test_rows_that_are_not_valid_have_no_influence(learner, rows):
    """The first and last rows and half of the environments are left out: NaN there makes no difference."""
    valid = ((jnp.arange(T) > 0) & (jnp.arange(T) < T - 1))[:, None] & (jnp.arange(E) % 2 == 0)

    def spoil(x):
        filler = jnp.nan if jnp.issubdtype(x.dtype, jnp.floating) else jnp.zeros((), x.dtype)
        return jnp.where(valid.reshape(T, E, *(1,) * (x.ndim - 2)), x, filler)

    spoilt = jax.jit(lambda rows: jax.tree.map(spoil, rows))(rows).replace(reset=rows.reset, valid=valid)
    both = [loss_and_grad(learner.params, make_batch(x), 0.03) for x in (rows.replace(valid=valid), spoilt)]
    chex.assert_tree_all_finite(both)
    chex.assert_trees_all_close(*both, rtol=1e-6)


def only_wait(rows, where):
    op = jnp.where(where[..., None], jnp.arange(len(Op)) == Op.WAIT, rows.masks.op)
    action = rows.action.replace(op=jnp.where(where, Op.WAIT, rows.action.op))
    return rows.replace(masks=rows.masks.replace(op=op), action=action)


def test_forced_rows_teach_the_value_alone(learner, rows):
    forced = only_wait(rows, jnp.ones((T, E), bool))
    (_, metrics), grads = loss_and_grad(learner.params, make_batch(forced), 0.03)
    grads = grads["params"]
    for head in HEADS:
        assert not any(leaf.any() for leaf in jax.tree.leaves(grads[f"head_output_{head}"]))
    assert grads["value_output"]["kernel"].any() and metrics["value_loss"] > 0
    for name in ("policy_loss", "entropy", "approx_kl", "clip_fraction"):
        assert metrics[name] == 0, name
    # The mean of the policy loss is over the other rows.
    first = (jnp.arange(T) == 0)[:, None] & jnp.ones((T, E), bool)
    batch = make_batch(only_wait(rows, first))
    (_, metrics), _ = loss_and_grad(learner.params, batch, 0.03)
    np.testing.assert_allclose(metrics["policy_loss"], -np.mean(batch.advantage[1:]), rtol=1e-3, atol=1e-5)


def test_every_parameter_gets_a_gradient(learner, rows):
    assert {Op.GERMINATE, Op.SET_ALPHA_TARGET} <= set(np.unique(rows.action.op).tolist())
    _, grads = loss_and_grad(learner.params, make_batch(rows), 0.03)
    for path, leaf in jax.tree.leaves_with_path(grads):
        assert np.abs(leaf).max() > 0, jax.tree_util.keystr(path)


# ---- update


def test_update_compiles_once_and_counts(learner, rows):
    """`probes.update`, which the probes train with as well, raises if it is ever traced again."""
    once, metrics = probes.update(KEY, learner, rows)
    twice, _ = probes.update(jax.random.key(1), once, rows)
    assert learner.updates == 0 and once.updates == 1 and twice.updates == 2
    assert metrics["updates_done"] == CFG.epochs * CFG.minibatches and metrics["nonfinite_updates"] == 0
    assert metrics["ratio_error"] < 1e-5
    assert metrics["approx_kl"] > 0 and metrics["ratio_max"] > 1 and metrics["grad_norm"] > 0
    assert metrics["entropy_coef"] == np.float32(CFG.entropy_coef)
    chex.assert_tree_all_finite(metrics)
    # a row's entropy is the mean over its relevant heads, so op's where the op reads no other
    assert metrics["head_entropy"].shape == (8,) and (0 <= metrics["head_entropy"]).all()
    op = HEADS.index("op")
    np.testing.assert_allclose(metrics["head_entropy"][op], metrics["op_entropy"], rtol=0.05)
    assert (metrics["head_choices"] <= metrics["head_choices"][op]).all()
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), learner.params, once.params)
    assert all(jax.tree.leaves(changed))


# Another value of each hyper, far from CFG's.
OTHER = dict(
    learning_rate=3e-3, gamma=0.5, gae_lambda=0.2, clip_ratio=0.01, entropy_coef=0.5, entropy_coef_final=0.5
)  # fmt: skip


@pytest.fixture(scope="module")
def traced_update():
    """`ppo.update` with its hypers as an argument: one program for all of them; those of its `cfg` are others."""
    cfg = dataclasses.replace(CFG, **OTHER)
    fun = lambda learner, rows, hypers: ppo.update(KEY, learner, rows, cfg=cfg, space=SPACE, hypers=hypers)
    return jax.jit(chex.assert_max_traces(fun, n=1))


def test_traced_hypers_do_what_static_ones_do(learner, rows, traced_update):
    expected, expected_metrics = probes.update(KEY, learner, rows)
    after, metrics = traced_update(learner, rows, ppo.Hypers.from_config(CFG))
    chex.assert_trees_all_close((after, metrics), (expected, expected_metrics), rtol=1e-5, atol=1e-6)
    assert jax.tree.structure(after) == jax.tree.structure(expected)


def test_every_hyper_has_its_effect_and_none_compiles_again(learner, rows, traced_update):
    half_way = learner.replace(updates=jnp.int32(CFG.anneal_rounds // 2))  # where both entropy coefficients count
    hypers = ppo.Hypers.from_config(CFG)
    base = traced_update(half_way, rows, hypers)[0].params
    assert set(OTHER) == set(ppo.Hypers.__dataclass_fields__)
    for name, value in OTHER.items():
        changed = traced_update(half_way, rows, hypers.replace(**{name: jnp.float32(value)}))[0].params
        difference = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), changed, base)
        assert max(jax.tree.leaves(difference)) > 1e-5, name


def test_a_grid_of_learning_rates(learner, rows, traced_update):
    """Steps are as long as the rate says: none at 0, and further with each larger one."""
    hypers, moved = ppo.Hypers.from_config(CFG), []
    for rate in (0.0, 1e-4, 1e-3, 1e-2):
        after, metrics = traced_update(learner, rows, hypers.replace(learning_rate=jnp.float32(rate)))
        steps = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), after.params, learner.params)
        moved.append(max(jax.tree.leaves(steps)))
        assert metrics["updates_done"] == CFG.epochs * CFG.minibatches
        # a step of Adam is at most about the rate in each parameter
        assert moved[-1] <= 3 * rate * CFG.epochs * CFG.minibatches
    assert moved[0] == 0 and (np.diff(moved) > 0).all()


def test_ratio_error_tells_of_features_that_were_not_acted_on(learner, rows):
    _, metrics = probes.update(KEY, learner, rows.replace(features=rows.features[..., ::-1]))
    assert metrics["ratio_error"] > 0.01


def test_non_finite_gradients_take_no_step(learner, rows):
    """One environment's reward is NaN: through the normalisation it spoils every minibatch."""
    after, metrics = probes.update(KEY, learner, rows.replace(reward=rows.reward.at[2, 3].set(jnp.nan)))
    chex.assert_trees_all_equal(after.params, learner.params)
    chex.assert_trees_all_equal(after.opt_state, learner.opt_state)
    assert metrics["updates_done"] == 0 and metrics["nonfinite_updates"] == CFG.epochs * CFG.minibatches
    # A NaN among one environment's features spoils the one minibatch of every epoch that holds it.
    after, metrics = probes.update(KEY, learner, rows.replace(features=rows.features.at[2, 3].set(jnp.nan)))
    assert metrics["updates_done"] == CFG.epochs * (CFG.minibatches - 1)
    assert metrics["nonfinite_updates"] == CFG.epochs
    assert after.updates == 1
    del metrics["explained_variance"]
    chex.assert_tree_all_finite((after, metrics))


@pytest.fixture(scope="module")
def stopped(learner, rows):
    """One minibatch an epoch, so that the split over devices makes no difference, and a limit on the divergence."""
    cfg = dataclasses.replace(CFG, minibatches=1, epochs=8, target_kl=0.003)
    uneven = rows.replace(valid=rows.valid & ((jnp.arange(E) < 8) | (jnp.arange(T)[:, None] < 3)))
    return cfg, uneven, jax.jit(partial(ppo.update, cfg=cfg, space=SPACE))(KEY, learner, uneven)


def test_divergence_ends_the_update(stopped):
    cfg, _, (after, metrics) = stopped
    # The first epoch begins at the old policy, so it takes a step; the limit is passed before the last.
    assert 1 <= metrics["updates_done"] < cfg.epochs
    assert after.opt_state[1].count == metrics["updates_done"]
    assert metrics["nonfinite_updates"] == 0 and after.updates == 1


def test_environments_must_divide_into_minibatches(learner, rows):
    cfg = dataclasses.replace(CFG, minibatches=5)
    with pytest.raises(ValueError, match="32 environments cannot be split into 5"):
        jax.eval_shape(partial(ppo.update, cfg=cfg, space=SPACE), KEY, learner, rows)


# ---- problems with a known answer


def test_value_of_a_constant_reward():
    rows = probes.train("constant", rounds=40).last
    expected = (1 - probes.GAMMA ** (T - np.arange(T))) / (1 - probes.GAMMA)
    np.testing.assert_allclose(rows.value, np.tile(expected[:, None], E), atol=0.3)


# Rewards summed over an episode: chance is 2, .5, .5 and about .6.
@pytest.mark.parametrize(
    "name, best", [("observation", T), ("delayed", 1), ("memory", 1), ("masks", T)], ids=lambda x: str(x)
)
def test_solves(name, best):
    result = probes.train(name, rounds=25)
    assert result.last.reward.sum(0).mean() > 0.9 * best
    assert result.illegal == 0
    assert result.metrics["ratio_error"].max() < 1e-4
    if name == "memory":  # between cue and question only WAIT is legal
        assert (result.last.masks.op.sum(-1)[1 : T - 1] == 1).all()
