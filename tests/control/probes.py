"""Probe environments: problems whose solution is known, each of which asks for one ability of the learner.

All have the same shapes (D features, S slots, T decisions), so one compiled training program serves them all. They go
through the same policy, sampling, `gae` and `update` as everything else.
"""

from functools import partial
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import struct

from esper_jax.config import PPOConfig
from esper_jax.control import policy, ppo
from esper_jax.types import HEAD_SIZES, Action, ActionSpace, Array, Masks, Observation, Op

N_FEATURES, N_SLOTS, STEPS, N_ENVS = 5, 2, 6, 32
SPACE = ActionSpace(N_SLOTS)
GAMMA = 0.9
GOOD_BLUEPRINT = 3
CFG = PPOConfig(
    hidden_size=32, learning_rate=5e-3, gamma=GAMMA, gae_lambda=0.95, anneal_rounds=40,
    entropy_coef=0.02, entropy_coef_final=0.0, max_grad_norm=1.0,
    op_bias=(0.0,) * len(Op), full_alpha_bias=0.0,  # a uniform start: what chance gets is known
)  # fmt: skip


@struct.dataclass
class ProbeState:
    t: Array  # i32[]
    cue: Array  # f32[] -1 or +1, constant over an episode
    first_op: Array  # i32[] the op taken at t = 0


class Probe(NamedTuple):
    shows_cue: object  # t -> bool[], the cue is among the features
    ops: object  # t -> bool[6]
    slots: object  # t -> bool[6, S]
    reward: object  # (state, action) -> f32[]


def _only(*ops):
    return jnp.array([op in ops for op in Op])


def _anywhere(t):
    return jnp.ones((len(Op), N_SLOTS), bool)


def _wanted(cue):
    return jnp.where(cue > 0, Op.GERMINATE, Op.WAIT)


def _alternating_slot(t):
    """A germination may go to slot t mod 2 only, every other op to the other slot only."""
    here = jnp.arange(N_SLOTS) == t % 2
    return jnp.where(_only(Op.GERMINATE)[:, None], here, ~here)


def _masked_reward(state, action):
    """Illegal FOSSILIZE would pay most; of what is legal, germinating one blueprint does."""
    germinates = action.op == Op.GERMINATE
    good = jnp.where(action.blueprint == GOOD_BLUEPRINT, 1.0, 0.2)
    return jnp.where(action.op == Op.FOSSILIZE, 10.0, jnp.where(germinates, good, 0.0))


PROBES = {
    # The value of step t is the known (1 - gamma^(T - t)) / (1 - gamma), whatever is done.
    "constant": Probe(
        lambda t: t < 0, lambda t: _only(*Op), _anywhere, lambda state, action: jnp.float32(1)
    ),
    # The op must match what is seen now.
    "observation": Probe(
        lambda t: t >= 0, lambda t: _only(Op.WAIT, Op.GERMINATE, Op.PRUNE), _anywhere,
        lambda state, action: jnp.float32(action.op == _wanted(state.cue)),
    ),
    # Only the first op counts, and pays at the end: credit across five steps of noise.
    "delayed": Probe(
        lambda t: t < 0, lambda t: _only(Op.WAIT, Op.ADVANCE), _anywhere,
        lambda state, action: jnp.float32((state.t == STEPS - 1) & (state.first_op == Op.ADVANCE)),
    ),
    # The cue is seen at t = 0 and asked for at the end; in between nothing but WAIT is legal.
    "memory": Probe(
        lambda t: t == 0, lambda t: _only(Op.WAIT, Op.GERMINATE) & ((t == STEPS - 1) | _only(Op.WAIT)), _anywhere,
        lambda state, action: jnp.float32((state.t == STEPS - 1) & (action.op == _wanted(state.cue))),
    ),
    "masks": Probe(
        lambda t: t < 0, lambda t: _only(Op.WAIT, Op.GERMINATE, Op.ADVANCE), _alternating_slot, _masked_reward
    ),
}  # fmt: skip


def make_env(probe: Array):
    """(reset, step) of probe number `probe` (i32[]), for one environment."""

    def pick(member, *args):
        return jax.lax.switch(probe, [getattr(p, member) for p in PROBES.values()], *args)

    def observe(state):
        t = state.t
        shown = pick("shows_cue", t)
        last = t == STEPS - 1
        features = jnp.stack([jnp.where(shown, state.cue, 0.0), shown, last, t / STEPS, t % 2]).astype(jnp.float32)
        always = {head: jnp.ones(size, bool) for head, size in HEAD_SIZES.items()}
        masks = Masks(**always | {"op": pick("ops", t)}, slot=jnp.ones(N_SLOTS, bool), slot_by_op=pick("slots", t))
        return Observation(features=features, masks=masks, signals=None, slots=None)

    def reset(key):
        cue = jax.random.rademacher(key, (), jnp.float32)
        state = ProbeState(t=jnp.int32(0), cue=cue, first_op=jnp.int32(Op.WAIT))
        return state, observe(state)

    def step(key, state, action):
        state = state.replace(first_op=jnp.where(state.t == 0, action.op, state.first_op))
        reward = pick("reward", state, action)
        done = state.t == STEPS - 1
        state = state.replace(t=state.t + 1)
        return state, observe(state), reward, done

    return reset, step


def rollout(key: Array, params, probe: Array) -> ppo.Trajectory:
    """One episode in each of N_ENVS environments; axes [T, E]."""
    reset, step = make_env(probe)
    controller = policy.make_controller(SPACE, params, lambda features: features)

    def episode(key):
        reset_key, init_key, key = jax.random.split(key, 3)
        state, observation = reset(reset_key)

        def body(loop, key):
            state, observation, carry = loop
            act_key, step_key = jax.random.split(key)
            carry, action, extras = controller.act(act_key, carry, observation)
            new_state, new_observation, reward, done = step(step_key, state, action)
            row = ppo.Trajectory(
                features=observation.features, masks=observation.masks, action=action, log_prob=extras.log_prob,
                value=extras.value, reward=reward, terminal=done, valid=jnp.bool_(True), reset=state.t == 0,
            )  # fmt: skip
            return (new_state, new_observation, carry), row

        start = (state, observation, controller.init(init_key))
        return jax.lax.scan(body, start, jax.random.split(key, STEPS))[1]

    return jax.vmap(episode, out_axes=1)(jax.random.split(key, N_ENVS))


class Result(NamedTuple):
    """What a training on one probe came to."""

    learner: ppo.LearnerState
    metrics: dict  # metrics of `update` in each round, [rounds]
    illegal: Array  # i32[] illegal decisions in all rounds
    last: ppo.Trajectory  # of the last policy


init = jax.jit(partial(ppo.init_learner, cfg=CFG, space=SPACE, n_features=N_FEATURES))
play = jax.jit(rollout)
count_illegal = jax.jit(lambda rows: jnp.sum(~jax.vmap(jax.vmap(is_legal))(rows.masks, rows.action)))


@jax.jit
@chex.assert_max_traces(n=1)
def update(key: Array, learner: ppo.LearnerState, rows: ppo.Trajectory):
    """The learner's update under CFG: compiled once for whatever is done with it."""
    return ppo.update(key, learner, rows, cfg=CFG, space=SPACE)


def train(name: str, *, rounds: int, seed: int = 0) -> Result:
    """So many rounds of rollout and update on one probe."""
    key = jax.random.key(seed)
    probe = jnp.int32(list(PROBES).index(name))
    learner = init(jax.random.fold_in(key, rounds))
    history, illegal = [], 0
    for i in range(rounds):
        play_key, update_key = jax.random.split(jax.random.fold_in(key, i))
        rows = play(play_key, learner.params, probe)
        learner, metrics = update(update_key, learner, rows)
        history.append(metrics)
        illegal += count_illegal(rows)
    metrics = jax.tree.map(lambda *x: jnp.stack(x), *history)
    return Result(learner, metrics, illegal, play(jax.random.fold_in(key, rounds + 1), learner.params, probe))


def is_legal(masks: Masks, action: Action) -> Array:
    """bool[]: a head that the op reads holds a legal choice."""
    relevant = jnp.asarray(policy.RELEVANCE)[action.op]
    slot = masks.slot_by_op[action.op]
    rows = [slot if head == "slot" else getattr(masks, head) for head in policy.HEADS]
    legal = jnp.stack([row[getattr(action, head)] for head, row in zip(policy.HEADS, rows, strict=True)])
    return jnp.all(legal | ~relevant)
