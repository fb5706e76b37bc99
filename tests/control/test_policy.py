"""The recurrent policy: network, masked heads, sampling order."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esper_jax.control import policy
from esper_jax.types import (
    ALPHA_TARGETS,
    HEAD_SIZES,
    HEADS,
    RELEVANT_HEADS,
    Action,
    ActionSpace,
    Extras,
    Masks,
    Observation,
    Op,
)

D, S, H, T = 7, 3, 8, 6
SPACE = ActionSpace(S)
BY_SLOT = [head for head in HEADS if head not in ("op", "slot")]  # whose logits depend on the slot
init = jax.jit(lambda key: policy.init(key, SPACE, D, H))
step = jax.jit(partial(policy.step, SPACE))
unroll = jax.jit(partial(policy.unroll, SPACE))
entropy_and_grad = jax.jit(jax.value_and_grad(policy.masked_entropy))
evaluate = jax.jit(policy.evaluate)


@pytest.fixture(scope="module")
def params():
    """Every parameter away from its special initial value, so that each one matters."""
    leaves, tree = jax.tree.flatten(init(jax.random.key(0)))
    rng = np.random.default_rng(0)
    return tree.unflatten([x + rng.normal(0, 0.3, x.shape).astype(np.float32) for x in leaves])


def random_logits(rng, scale=1.0):
    sizes = HEAD_SIZES | {"slot": S}
    shape = lambda head: (S, sizes[head]) if head in BY_SLOT else (sizes[head],)
    return {head: jnp.asarray(rng.normal(0, scale, shape(head)), jnp.float32) for head in HEADS}


def all_legal():
    heads = {head: jnp.ones(size, bool) for head, size in HEAD_SIZES.items()}
    return Masks(**heads, slot=jnp.ones(S, bool), slot_by_op=jnp.ones((len(Op), S), bool))


def forward_in_numpy(params, features):
    """The network written out once more, row by row; returns logits and values."""
    p = jax.tree.map(np.float64, params["params"])
    dense = lambda x, name: x @ p[name]["kernel"] + p[name]["bias"]
    relu = lambda x: np.maximum(x, 0)
    sigmoid = lambda x: 1 / (1 + np.exp(-x))

    def norm(x, name):
        scaled = (x - x.mean()) / np.sqrt(x.var() + 1e-5)
        return scaled * p[name]["scale"] + p[name]["bias"]

    cell, hidden, out = np.zeros(H), np.zeros(H), []
    for x in features:
        gates = dense(relu(norm(dense(x, "encoder"), "encoder_norm")), "gates") + hidden @ p["recurrent"]
        i, f, g, o = np.split(gates, 4)
        cell = sigmoid(f) * cell + sigmoid(i) * np.tanh(g)
        hidden = sigmoid(o) * np.tanh(cell)
        parts = np.split(relu(dense(norm(hidden, "output_norm"), "head_hidden")), 9)
        logits = {head: dense(parts[i], f"head_output_{head}") for i, head in enumerate(HEADS)}
        logits |= {head: logits[head].reshape(S, -1) for head in BY_SLOT}
        out.append((logits, dense(parts[8], "value_output")[0]))
    return {head: np.stack([row[0][head] for row in out]) for head in HEADS}, np.array([row[1] for row in out])


def test_sizes_are_those_of_the_reference():
    # The reference has 128 D + 209640 with 3 slots and two LSTM biases of 4 * 128 where one does: 209128.
    # Here 13 blueprints, 4 styles, 3 tempos, 3 targets, 4 speeds and 3 curves have a row of 64 + 1 for each slot.
    shapes = jax.eval_shape(lambda key: policy.init(key, ActionSpace(3), 218, 128), jax.random.key(0))
    extra = 2 * 65 * (13 + 4 + 3 + 3 + 4 + 3)
    assert sum(x.size for x in jax.tree.leaves(shapes)) == 128 * 218 + 209128 + extra


def test_initialisation():
    p = init(jax.random.key(1))["params"]

    def singular_values(kernel, expected):
        np.testing.assert_allclose(np.linalg.svd(kernel, compute_uv=False), expected, rtol=1e-5)

    singular_values(p["encoder"]["kernel"], np.sqrt(2))
    singular_values(p["gates"]["kernel"], 1)
    singular_values(p["recurrent"], 1)
    for block in np.split(p["head_hidden"]["kernel"], 9, axis=1):
        singular_values(block, np.sqrt(2))
    for head in HEADS:
        singular_values(p[f"head_output_{head}"]["kernel"], 0.01)
    singular_values(p["value_output"]["kernel"], 1)
    # Gates i, f, g, o; the forget gate is the second.
    np.testing.assert_array_equal(p["gates"]["bias"], np.repeat([0, 2, 0, 0], H))
    for name in ("encoder", "head_hidden", "value_output", *(f"head_output_{head}" for head in HEADS)):
        assert not p[name]["bias"].any()


def test_the_first_policy_is_uniform_but_for_its_biases():
    """Ops are `softmax(op_bias)`, alpha target 1 has e^2 times the odds of the others in every slot, the rest is equal.

    Outputs of gain .01 move a logit by some hundredths, whatever is seen."""
    op_bias, full = (1.0, 0.0, 0.5, -3.0, 3.0, 2.0), 2.0
    biased = jax.jit(lambda key: policy.init(key, SPACE, D, H, op_bias, full))(jax.random.key(3))
    x = jnp.asarray(np.random.default_rng(4).normal(size=(5, D)), jnp.float32)
    once = lambda params, x: policy.step(SPACE, params, policy.initial_carry(H), x)[1].logits
    see = jax.jit(jax.vmap(once, (None, 0)))
    flat = {
        head: np.zeros((S, HEAD_SIZES[head]) if head in BY_SLOT else (HEAD_SIZES | {"slot": S})[head]) for head in HEADS
    }
    close = partial(np.testing.assert_allclose, atol=0.06)
    for params, expected in (
        (init(jax.random.key(3)), flat),
        (biased, flat | {"op": op_bias, "alpha_target": np.tile([full * (a == 1.0) for a in ALPHA_TARGETS], (S, 1))}),
    ):
        logits = see(params, x)
        for head in HEADS:
            close(logits[head], np.broadcast_to(expected[head], logits[head].shape), err_msg=head)
            assert logits[head].std(0).max() > 1e-6  # yet it depends on what is seen
    # and nothing but the two biases differs
    same = jax.tree.map(lambda a, b: bool((a == b).all()), biased["params"], init(jax.random.key(3))["params"])
    differ = {jax.tree_util.keystr(path) for path, equal in jax.tree.leaves_with_path(same) if not equal}
    assert differ == {"['head_output_op']['bias']", "['head_output_alpha_target']['bias']"}


def test_network_against_numpy(params):
    features = np.random.default_rng(1).normal(size=(T, D)).astype(np.float32)
    resets = jnp.zeros(T, bool)
    logits, values = unroll(params, policy.initial_carry(H), features, resets)
    expected_logits, expected_values = forward_in_numpy(params, features)
    chex.assert_trees_all_close(logits, expected_logits, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(values, expected_values, rtol=1e-4, atol=1e-5)


def test_unroll_is_repeated_steps_with_resets_before_the_row(params):
    features = np.random.default_rng(2).normal(size=(T, D)).astype(np.float32)
    resets = np.array([False, False, True, False, False, True])
    start = policy.Carry(jnp.full(H, 0.5), jnp.full(H, -0.2))  # as left by earlier rows
    logits, values = unroll(params, start, features, resets)
    carry, outputs = start, []
    for x, reset in zip(features, resets, strict=True):
        carry, out = step(params, policy.initial_carry(H) if reset else carry, x)
        outputs.append(out)
    rows = jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)
    chex.assert_trees_all_close(logits, rows.logits, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(values, rows.value, rtol=1e-5, atol=1e-6)
    # What came before a reset is forgotten, what came before a row without one is not.
    other, _ = unroll(params, policy.initial_carry(H), features, resets)
    assert np.abs(other["op"][:2] - logits["op"][:2]).max() > 1e-3
    np.testing.assert_array_equal(other["op"][2:], logits["op"][2:])


def test_rows_without_a_decision_leave_the_state(params):
    features = np.random.default_rng(3).normal(size=(T, D)).astype(np.float32)
    valid = np.array([False, True, True, False, True, True])
    _, values = unroll(params, policy.initial_carry(H), features, np.zeros(T, bool), valid)
    _, expected = unroll(params, policy.initial_carry(H), features[valid], np.zeros(4, bool))
    np.testing.assert_allclose(values[valid], expected, rtol=1e-5, atol=1e-6)


def test_masked_log_prob_and_entropy_of_the_worked_example():
    # Logits (1, 2, 3), the second illegal: p = (e, e^3) / (e + e^3) = (.119203, .880797);
    # entropy .365334, over ln 2: .527065.
    logits, mask = jnp.array([1.0, 2.0, 3.0]), jnp.array([True, False, True])
    np.testing.assert_allclose(policy.masked_entropy(logits, mask), 0.527065, atol=1e-6)
    masks = all_legal().replace(slot_by_op=jnp.tile(mask, (len(Op), 1)))
    out = dict(random_logits(np.random.default_rng(0)), slot=logits)
    for slot, p in ((0, 0.119203), (1, 0.0), (2, 0.880797)):
        got = evaluate(out, masks, Action(op=jnp.int32(Op.ADVANCE), slot=jnp.int32(slot)))
        np.testing.assert_allclose(np.exp(got.head_log_prob[HEADS.index("slot")]), p, atol=1e-6)


@pytest.mark.parametrize(
    "mask, expected", [((1, 1, 0, 1), 1.0), ((0, 1, 0, 0), 0.0), ((0, 0, 0, 0), 0.0)], ids=["uniform", "one", "none"]
)
def test_entropy_at_its_limits(mask, expected):
    mask = jnp.array(mask, bool)
    value, grad = entropy_and_grad(jnp.full(4, 3.0), mask)
    np.testing.assert_allclose(value, expected, atol=1e-6)
    assert np.isfinite(grad).all()
    if expected == 0:
        assert value == 0


@pytest.fixture(scope="module")
def draws():
    """4096 decisions from the same logits and masks, WAIT and every other op legal on one or two slots each."""
    logits = random_logits(np.random.default_rng(5), 0.5)
    logits["blueprint"] *= 3  # slots differ by more than draws do by chance
    by_op = jnp.array([[1, 1, 1], [0, 1, 1], [1, 0, 1], [0, 0, 1], [1, 1, 0], [1, 0, 0]], bool)
    masks = all_legal().replace(
        slot_by_op=by_op, blueprint=jnp.arange(13) % 3 == 1, tempo=jnp.array([True, False, True])
    )
    keys = jax.random.split(jax.random.key(6), 4096)
    actions, log_probs = jax.jit(jax.vmap(lambda key: policy.sample(key, logits, masks)))(keys)
    return jax.tree.map(np.asarray, (logits, masks, actions, log_probs))


def test_only_legal_choices_are_drawn_and_the_rest_is_canonical(draws):
    _, masks, actions, _ = draws
    canonical = Action()
    assert set(np.unique(actions.op)) == set(range(len(Op)))
    for op in Op:
        chosen = np.asarray(actions.op) == op
        for head in HEADS[:-1]:
            values = np.unique(np.asarray(getattr(actions, head))[chosen])
            if head in RELEVANT_HEADS[op]:
                mask = masks.slot_by_op[op] if head == "slot" else getattr(masks, head)
                # Every legal choice turns up, and nothing else.
                np.testing.assert_array_equal(values, np.flatnonzero(mask), err_msg=f"{op.name} {head}")
            else:
                np.testing.assert_array_equal(values, [getattr(canonical, head)], err_msg=f"{op.name} {head}")


def test_draws_follow_the_probabilities(draws):
    logits, masks, actions, _ = draws
    p_op = np.asarray(jax.nn.softmax(logits["op"]))
    # Five standard deviations of a share of 4096 draws are at most 5 * sqrt(.25 / 4096) = .039.
    np.testing.assert_allclose(np.bincount(actions.op, minlength=6) / 4096, p_op, atol=0.039)
    germinated = np.asarray(actions.op) == Op.GERMINATE
    legal = np.flatnonzero(masks.blueprint)
    for slot in (1, 2):  # those of the slot that was drawn before
        here = germinated & (actions.slot == slot)
        p = np.exp(logits["blueprint"][slot][legal])
        share = np.bincount(actions.blueprint[here], minlength=13)[legal] / here.sum()
        np.testing.assert_allclose(share, p / p.sum(), atol=2.5 / np.sqrt(here.sum()))
    assert np.abs(np.diff(jax.nn.softmax(logits["blueprint"][1:, legal]), axis=0)).max() > 0.2  # unlike in the other


def test_log_prob_is_the_sum_over_relevant_heads(draws):
    logits, masks, actions, log_probs = draws
    got = jax.jit(jax.vmap(policy.evaluate, in_axes=(None, None, 0)))(logits, masks, actions)
    entropy, got = np.asarray(got.entropy), jax.tree.map(np.asarray, got)
    np.testing.assert_allclose(got.log_prob, log_probs, rtol=1e-6)
    for op in Op:
        chosen = np.flatnonzero(np.asarray(actions.op) == op)
        relevant = np.array([head in (*RELEVANT_HEADS[op], "op") for head in HEADS])
        np.testing.assert_array_equal(got.relevant[chosen], np.tile(relevant, (len(chosen), 1)))
        assert not got.head_log_prob[chosen][:, ~relevant].any()
        assert not got.head_entropy[chosen][:, ~relevant].any()
        total = np.zeros(len(chosen))
        for head in np.array(HEADS)[relevant]:
            mask = masks.slot_by_op[op] if head == "slot" else getattr(masks, head)
            row = logits[head][actions.slot[chosen]] if head in BY_SLOT else logits[head][None]
            p = np.where(mask, np.exp(row), 1e-30)  # no log of 0
            log_p = np.broadcast_to(np.log(p / p.sum(-1, keepdims=True)), (len(chosen), p.shape[-1]))
            total += log_p[np.arange(len(chosen)), getattr(actions, head)[chosen]]
        np.testing.assert_allclose(got.log_prob[chosen], total, rtol=1e-4, atol=1e-5)
    # WAIT reads the op head alone, so its entropy is that head's; it is not thinned out by the seven others.
    wait = np.flatnonzero(np.asarray(actions.op) == Op.WAIT)[0]
    np.testing.assert_allclose(entropy[wait], policy.masked_entropy(logits["op"], masks.op), rtol=1e-6)


def test_what_is_good_in_one_slot_need_not_be_in_another():
    """The likeliest blueprint is 3 + slot, the target slot: `sample` takes them, and `evaluate` gives the same
    probability for every slot, of which the other slots' logits are no part."""
    logits = random_logits(np.random.default_rng(11))
    logits["blueprint"] = logits["blueprint"].at[jnp.arange(S), 3 + jnp.arange(S)].set(5.0)
    logits["alpha_target"] = logits["alpha_target"].at[jnp.arange(S), jnp.arange(S)].set(5.0)

    def both(slot, op, logits):
        here = jnp.arange(S) == slot
        masks = all_legal().replace(op=jnp.arange(len(Op)) == op, slot_by_op=jnp.tile(here, (len(Op), 1)))
        action, log_prob = policy.sample(jax.random.key(0), logits, masks, deterministic=True)
        return action, log_prob, policy.evaluate(logits, masks, action).log_prob

    play = jax.jit(jax.vmap(jax.vmap(both, (0, None, None)), (None, 0, None)))
    slots, ops = jnp.arange(S), jnp.array([Op.GERMINATE, Op.SET_ALPHA_TARGET])
    action, log_prob, evaluated = play(slots, ops, logits)
    np.testing.assert_array_equal(action.slot, np.tile(slots, (2, 1)))
    np.testing.assert_array_equal(action.blueprint[0], 3 + slots)
    np.testing.assert_array_equal(action.alpha_target[1], slots)
    np.testing.assert_allclose(log_prob, evaluated, rtol=1e-6)
    assert len(set(np.round(log_prob, 4).ravel().tolist())) == 2 * S
    # the logits of slot 0 mean nothing elsewhere
    other = {head: x.at[0].add(jnp.arange(x.shape[-1])) if head in BY_SLOT else x for head, x in logits.items()}
    _, changed, _ = play(slots, ops, other)
    np.testing.assert_array_equal(changed[:, 1:], log_prob[:, 1:])
    assert (changed[:, 0] != log_prob[:, 0]).all()


def test_whether_to_draw_may_be_traced():
    """One program for both; True is the choice and False the draw of the static argument."""
    logits, masks = random_logits(np.random.default_rng(12)), all_legal()
    traced = chex.assert_max_traces(lambda key, d: policy.sample(key, logits, masks, deterministic=d), n=1)
    program = jax.jit(jax.vmap(traced, (0, None)))
    keys = jax.random.split(jax.random.key(2), 16)
    drawn, chosen = (program(keys, jnp.bool_(d)) for d in (False, True))
    expected = jax.jit(jax.vmap(lambda key: policy.sample(key, logits, masks)))(keys)
    chex.assert_trees_all_equal(drawn, expected)
    expected = jax.jit(lambda key: policy.sample(key, logits, masks, deterministic=True))(keys[0])
    chex.assert_trees_all_equal(chosen, jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (16,)), expected))
    assert len(set(drawn[0].op.tolist())) > 1


def test_deterministic_takes_the_first_of_the_likeliest_legal_choices():
    logits = {head: jnp.zeros_like(x) for head, x in random_logits(np.random.default_rng(0)).items()}
    choose = jax.jit(partial(policy.sample, deterministic=True))
    logits["op"] = jnp.array([0.0, 2.0, 1.0, 3.0, 0.0, 2.0])  # PRUNE is likeliest, but illegal
    masks = all_legal().replace(op=jnp.array([1, 1, 1, 0, 1, 1], bool), blueprint=jnp.arange(13) >= 4)
    for seed in range(3):
        action, _ = choose(jax.random.key(seed), logits, masks)
        assert action.op == Op.GERMINATE and action.blueprint == 4 and action.slot == 0


def test_a_row_without_any_legal_choice_stays_finite():
    logits = random_logits(np.random.default_rng(8))
    masks = jax.tree.map(jnp.zeros_like, all_legal())
    action = Action(op=jnp.int32(Op.GERMINATE))

    def total(logits):
        out = policy.evaluate(logits, masks, action)
        return out.log_prob + out.entropy

    value, grads = jax.jit(jax.value_and_grad(total))(logits)
    chex.assert_tree_all_finite((value, grads))


def test_controller(params):
    """One decision of four environments: the parts of `act` are `normalise`, `step` and `sample`."""
    controller = policy.make_controller(SPACE, params, lambda features: features / 2)
    x = jnp.asarray(np.random.default_rng(9).normal(size=(4, D)), jnp.float32)
    keys = jax.random.split(jax.random.key(1), 4)

    def by_controller(key, x):
        carry = controller.init(key)
        return controller.act(key, carry, Observation(x, all_legal(), None, None))

    def by_hand(key, x):
        carry, out = policy.step(SPACE, params, policy.initial_carry(H), x / 2)
        action, log_prob = policy.sample(key, out.logits, all_legal())
        return carry, action, Extras(log_prob, out.value)

    actual, expected = (jax.jit(jax.vmap(act))(keys, x) for act in (by_controller, by_hand))
    chex.assert_trees_all_close(actual, expected, rtol=1e-6)
    chex.assert_tree_shape_prefix(actual, (4,))
    assert all(leaf.dtype == jnp.int32 for leaf in jax.tree.leaves(actual[1]))
