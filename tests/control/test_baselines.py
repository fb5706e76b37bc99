"""Baselines on the real lifecycle (without a network): what they ask for is always legal and does what they promise."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esper_jax.config import LifecycleConfig, TrackerConfig
from esper_jax.control import baselines as B
from esper_jax.env import tracker
from esper_jax.lifecycle import masks, operations, stages
from esper_jax.types import BLUEPRINTS, HEADS, RELEVANT_HEADS, Action, Observation, Op, Stage

PERMISSIVE = LifecycleConfig()


@functools.partial(jax.jit, static_argnames="cfg")
def observe(slots, epoch, cfg=PERMISSIVE):
    signals = tracker.init(TrackerConfig()).latest.replace(epoch=jnp.asarray(epoch, jnp.int32))
    return Observation(features=jnp.zeros(1), masks=masks.legal(slots, cfg), signals=signals, slots=slots)


@jax.jit
def advance_epoch(slots, action):
    """One epoch of three slots; every seed with some alpha is measured to contribute a point."""
    slots, outcome = operations.execute(slots, operations.decode(action), jnp.float32(50), PERMISSIVE)
    slots = stages.record_score(stages.tick(slots, PERMISSIVE), jnp.float32(50))
    slots = stages.record_contribution(slots, jnp.ones(3), slots.alpha.alpha > 0)
    return slots, outcome


def play(controller, *, epochs=25):
    """Observation, action and outcome of every decision, and the slots after it."""
    slots = stages.empty(3)
    act, memory, steps = jax.jit(controller.act), controller.init(jax.random.key(0)), []
    for epoch, key in enumerate(jax.random.split(jax.random.key(1), epochs - 1), start=1):
        obs = observe(slots, epoch)
        memory, action, _ = act(key, memory, obs)
        slots, outcome = advance_epoch(slots, action)
        steps.append((obs, action, outcome, slots))
    return jax.tree.map(lambda *leaves: np.stack(leaves), *jax.device_get(steps))


def names(action):
    return [Op(op).name for op in action.op.tolist()]


def legal(obs, action):
    """bool[T]: the op, its slot and its other relevant heads are within the masks."""
    steps = np.arange(len(action.op))
    ok = obs.masks.op[steps, action.op] & obs.masks.slot_by_op[steps, action.op, action.slot]
    for head in set(HEADS) - {"op", "slot"}:
        relevant = np.array([head in RELEVANT_HEADS[op] for op in Op])[action.op]
        ok &= ~relevant | getattr(obs.masks, head)[steps, getattr(action, head)]
    return ok


def test_never():
    _, action, _, slots = play(B.never())
    assert set(names(action)) == {"WAIT"} and (slots.stage == Stage.DORMANT).all()


def test_random_is_legal_and_leaves_the_other_heads_canonical():
    obs, action, outcome, _ = play(B.random(), epochs=151)
    assert legal(obs, action).all() and outcome.legal.all()
    assert set(names(action)) == {op.name for op in Op}
    canonical = Action()
    for head in set(HEADS) - {"op"}:
        relevant = np.array([head in RELEVANT_HEADS[op] for op in Op])[action.op]
        assert (getattr(action, head)[~relevant] == int(getattr(canonical, head))).all()
    assert "noop" not in {BLUEPRINTS[i] for i in action.blueprint[action.op == Op.GERMINATE]}


def test_random_is_uniform():
    # slots: TRAINING (young: no prune), and two empty ones; WAIT, GERMINATE and ADVANCE are legal
    slots = stages.empty(3)
    slots = slots.replace(stage=slots.stage.at[0].set(Stage.TRAINING))
    obs = observe(slots, 1)
    only = jnp.array([name in ("norm", "conv_heavy") for name in BLUEPRINTS])
    obs = obs.replace(masks=obs.masks.replace(blueprint=only))
    n = 6000
    draw = jax.vmap(lambda key: B.random().act(key, (), obs)[1])
    action = jax.tree.map(np.asarray, jax.jit(draw)(jax.random.split(jax.random.key(0), n)))
    counts = lambda values, size: np.bincount(values, minlength=size) / len(values)
    # deviations of 5 sigma: sqrt(2/9 / 6000) * 5 = 0.03 for thirds, sqrt(1/4 / 2000) * 5 = 0.056 for halves
    np.testing.assert_allclose(counts(action.op, 6), [1 / 3, 1 / 3, 0, 0, 0, 1 / 3], atol=0.031)
    germinate = action.op == Op.GERMINATE
    np.testing.assert_allclose(counts(action.slot[germinate], 3), [0, 0.5, 0.5], atol=0.056)
    assert (action.slot[action.op == Op.ADVANCE] == 0).all()
    np.testing.assert_allclose(counts(action.blueprint[germinate], 13)[[3, 7]], [0.5, 0.5], atol=0.056)
    np.testing.assert_allclose(counts(action.style[germinate], 4), [0.25] * 4, atol=0.05)


def test_eager_fills_every_slot():
    obs, action, outcome, slots = play(B.eager())
    assert legal(obs, action).all() and outcome.success.all()
    # First a G(erminate) in every slot. A seed then takes A(dvance) and, after an epoch of training, A; its ramp has
    # three ticks, the first in the epoch of that A, so the third A comes three decisions later, and then F(ossilize).
    # Between slot 0's second and third A there is room for two of slot 1; slot 2 waits until both are done.
    assert "".join(name[0] for name in names(action)).rstrip("W") == "GGGAAAAAFAFAAWWAF"
    assert action.slot[:17].tolist() == [0, 1, 2, 0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 0, 0, 2, 2]
    assert (slots.stage[-1] == Stage.FOSSILIZED).all()
    germinate = action.op == Op.GERMINATE
    assert (action.blueprint[germinate] == BLUEPRINTS.index("conv_heavy")).all()
    assert (action.style[germinate] == 0).all() and (action.tempo[germinate] == 0).all()
    assert slots.ramp_epochs[-1].tolist() == [3, 3, 3] and slots.alpha.alpha[-1].tolist() == [1, 1, 1]


def test_eager_with_a_blueprint_for_each_slot():
    kinds = ["norm", "conv_heavy", "conv_light"]
    obs, action, outcome, slots = play(B.eager(kinds))
    assert legal(obs, action).all() and outcome.success.all()
    # the same decisions as with one for all, but for what is grown where
    _, one, *_ = play(B.eager())
    for head in set(HEADS) - {"blueprint"}:
        np.testing.assert_array_equal(getattr(action, head), getattr(one, head), err_msg=head)
    assert (slots.stage[-1] == Stage.FOSSILIZED).all()
    assert [BLUEPRINTS[i] for i in slots.blueprint[-1]] == kinds
    # a blueprint that is masked leaves its own slot empty and no other
    obs = observe(stages.empty(3), 1)
    act = jax.jit(lambda masks: B.eager(kinds).act(None, (), obs.replace(masks=masks))[1])
    without = obs.masks.replace(blueprint=obs.masks.blueprint.at[BLUEPRINTS.index("norm")].set(False))
    got = act(without)
    assert (int(got.op), int(got.slot), BLUEPRINTS[int(got.blueprint)]) == (Op.GERMINATE, 1, "conv_heavy")
    nothing = without.replace(blueprint=jnp.arange(13) == BLUEPRINTS.index("norm"))
    assert (int(act(nothing).slot), BLUEPRINTS[int(act(nothing).blueprint)]) == (0, "norm")


def test_eager_does_not_ask_for_what_a_gate_or_a_limit_refuses():
    # The second seed has trained for an epoch: enough for permissive gates; strict ones want three, and gradients.
    slots = stages.empty(3)
    slots = slots.replace(
        stage=jnp.array([Stage.TRAINING, Stage.TRAINING, Stage.DORMANT], jnp.int32),
        epochs_in_stage=jnp.array([0, 1, 0], jnp.int32),
    )
    ask = lambda cfg: B.eager(lifecycle=cfg).act(None, (), observe(slots, 5, cfg))[1]
    asked = lambda cfg: (lambda action: (int(action.op), int(action.slot)))(jax.jit(ask, static_argnums=0)(cfg))
    assert asked(PERMISSIVE) == (Op.GERMINATE, 2)  # an empty slot comes first
    assert asked(LifecycleConfig(max_seeds=2)) == (Op.ADVANCE, 1)
    assert asked(LifecycleConfig(permissive_gates=False)) == (Op.GERMINATE, 2)
    assert asked(LifecycleConfig(permissive_gates=False, max_seeds=2)) == (Op.WAIT, 0)


def test_eager_does_not_ask_for_what_is_masked():
    obs = observe(stages.empty(3), 1)
    act = jax.jit(lambda masks: B.eager("norm").act(None, (), obs.replace(masks=masks))[1].op)
    without = lambda head, index: obs.masks.replace(**{head: getattr(obs.masks, head).at[index].set(False)})
    assert act(obs.masks) == Op.GERMINATE
    for head, index in (("blueprint", 3), ("style", 0), ("tempo", 0), ("alpha_target", 2), ("op", Op.GERMINATE)):
        assert act(without(head, index)) == Op.WAIT
    assert act(without("blueprint", 1)) == Op.GERMINATE


def test_periodic():
    obs, action, outcome, slots = play(B.periodic(6, "norm"))
    assert legal(obs, action).all() and outcome.success.all()
    # the blocks start at epochs 1, 7, 13 and 19; at 7 the first seed is fossilised, at 13 and 14 the second is finished
    assert np.arange(1, 25)[action.op == Op.GERMINATE].tolist() == [1, 8, 15]
    assert (slots.stage[-1] == Stage.FOSSILIZED).all() and (slots.blueprint[-1] == BLUEPRINTS.index("norm")).all()


def test_periodic_does_not_make_up_for_a_missed_block():
    # one slot is free from epoch 9 on only: blocks of 4 that it misses are lost
    carry, epochs = jnp.int32(-1), []
    controller = B.periodic(4)
    act = jax.jit(controller.act)
    full = stages.empty(3)
    full = full.replace(stage=jnp.full(3, Stage.FOSSILIZED, jnp.int32))
    for epoch in range(1, 17):
        carry, action, _ = act(None, carry, observe(full if epoch < 9 else stages.empty(3), epoch))
        epochs += [epoch] if action.op == Op.GERMINATE else []
    assert epochs == [9, 13]


@pytest.mark.parametrize("make", [B.eager, lambda name: B.eager(["norm", name]), lambda name: B.periodic(6, name)])
@pytest.mark.parametrize("name", ["noop", "conv_huge", "lora"])
def test_blueprint_must_be_on_offer(make, name):
    with pytest.raises(ValueError, match=f"blueprint = '{name}': must be one of conv_light"):
        make(name)


@pytest.mark.parametrize("period", [0, -1, 2.5, 3.0, "3", None])
def test_a_period_is_a_whole_number(period):
    with pytest.raises(ValueError, match=f"period = {period!r}: must be a whole number, at least 1"):
        B.periodic(period)
    B.periodic(np.int64(3))


# --- scripts ---

TEXT = """
# grow one seed and keep it
0: germinate slot=1 blueprint=conv_light style=linear_add tempo=3
1: advance slot=1   # GERMINATED -> TRAINING
2: advance slot=1

5: advance slot=1
6: fossilize slot=1
"""


def test_script_from_text():
    actions = B.parse_script(TEXT)
    assert [Op(int(a.op)).name for a in actions] == [
        "GERMINATE", "ADVANCE", "ADVANCE", "WAIT", "WAIT", "ADVANCE", "FOSSILIZE",
    ]  # fmt: skip
    as_int = lambda a: jax.tree.map(int, a)
    assert as_int(actions[0]) == as_int(Action(op=1, slot=1, blueprint=1, style=0, tempo=0))
    assert as_int(actions[3]) == as_int(Action())
    _, action, outcome, slots = play(B.script(actions), epochs=12)
    assert names(action) == [Op(int(a.op)).name for a in actions] + ["WAIT"] * 4
    assert outcome.success.all() and slots.stage[-1].tolist() == [Stage.DORMANT, Stage.FOSSILIZED, Stage.DORMANT]


def test_every_field_can_be_written():
    (action,) = B.parse_script(
        "0: set_alpha_target slot=2 style=gated_gate alpha_target=0.7 alpha_speed=8 alpha_curve=cosine"
    )
    expected = Action(op=2, slot=2, style=3, alpha_target=1, alpha_speed=3, alpha_curve=1)
    assert jax.tree.map(int, action) == jax.tree.map(int, expected)
    assert [int(a.op) for a in B.parse_script("1: prune slot=0\n0: wait")] == [0, 3]
    assert B.parse_script(" \n# nothing\n") == []


def test_empty_script_waits():
    assert set(names(play(B.script([]), epochs=4)[1])) == {"WAIT"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "0: wait\n1: germinate slot=0 blueprint=conv_lite",
            "line 2: blueprint = 'conv_lite': must be one of conv_light",
        ),
        ("0: germinate slot=0 blueprint=noop", "line 1: blueprint = 'noop': must be one of conv_light"),
        ("0: germinate slot=0", "line 1: blueprint = '': must be given for germinate"),
        ("0: advance", "line 1: slot = '': must be given for advance"),
        ("0: advance slot=-1", "line 1: slot = '-1': must be one of 0, 1, 2$"),
        ("0: wait\n1: advance slot=3", "line 2: slot = '3': must be one of 0, 1, 2$"),
        ("0: advance slot=99999999999999", "line 1: slot = '99999999999999': must be one of 0, 1, 2$"),
        ("0: advance slot=0 tempo=3", "line 1: tempo = '3': must be left out: advance has slot$"),
        ("0: wait slot=0", "line 1: slot = '0': must be left out: wait has no field$"),
        ("0: advance slot=0 slot=1", "line 1: slot = '1': must be left out: it is given already$"),
        ("0: germinate slot=0 blueprint=norm tempo=4", "line 1: tempo = '4': must be one of 3, 5, 8"),
        ("0: grow slot=0", "line 1: op = 'grow': must be one of wait, germinate"),
        ("0:", "line 1: op = '': must be one of wait"),
        ("advance slot=0", "line 1: decision = 'advance slot=0': must be a number"),
        ("5", "line 1: decision = '5': must be a number from 0 to 9, followed by a colon"),
        ("9: wait\n10: wait", "line 2: decision = '10': must be a number from 0 to 9, followed"),
        ("999999999999: wait", "line 1: decision = '999999999999': must be a number from 0 to 9, followed"),
        (f"{'9' * 5000}: wait", "line 1: decision = '9+': must be a number from 0 to 9, followed"),
        ("0: wait\n0: wait", "line 2: decision = '0': must be a number that no other line has"),
    ],
)
def test_errors_of_a_script_text(text, message):
    with pytest.raises(ValueError, match=f"script {message}"):
        B.parse_script(text, slots=3, decisions=10)


def test_a_script_is_as_long_as_an_episode_can_be():
    assert len(B.parse_script("9998: wait")) == 9999
    with pytest.raises(ValueError, match="decision = '9999': must be a number from 0 to 9998"):
        B.parse_script("9999: wait")


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (Action(op=6), "step 1: op = 6: must be 0 to 5"),
        (Action(op=5, slot=-1), "step 1: slot = -1: must be 0 or more"),
        (Action(op=1, blueprint=13), "step 1: blueprint = 13: must be 1 to 12"),
        (Action(op=1, blueprint=0), "step 1: blueprint = 0: must be 1 to 12"),
        (Action(tempo=3), "step 1: tempo = 3: must be 0 to 2"),
    ],
)
def test_errors_of_a_script(action, message):
    with pytest.raises(ValueError, match=f"script: {message}"):
        B.script([Action(), action])


def test_a_slot_that_is_not_there():
    with pytest.raises(ValueError, match="script: step 1: slot = 3: must be 0 to 2"):
        play(B.script([Action(), Action(op=5, slot=3)]), epochs=2)
