"""Proximal policy optimisation (Schulman et al., 2017) of the recurrent policy (part of Esper's Simic).

One ratio per decision: the joint probability of the heads its op reads. Environments are split into minibatches, whole
sequences are unrolled from the zero state with the resets of the rollout.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from esper_jax.config import PPOConfig
from esper_jax.control import policy
from esper_jax.trees import select
from esper_jax.types import HEADS, Action, ActionSpace, Array, Masks, Op

LOG_RATIO_LIMIT = 20.0  # exp of it is still far from the largest float32
KL_STOP_FACTOR = 1.5


@struct.dataclass
class Trajectory:
    """A rollout: T rows of E environments, axes [T, E, ...].

    A row is one decision and the transition that it began. Rows that are not valid (an episode's birth epoch, padding)
    may hold anything, NaN included, except that `reset` is obeyed there too.
    """

    features: Array  # f32[T, E, D] the normalised ones that the policy acted on
    masks: Masks  # bool[T, E, ...]
    action: Action  # i32[T, E]
    log_prob: Array  # f32[T, E] joint over the relevant heads, as sampled
    value: Array  # f32[T, E] as predicted at the decision
    reward: Array  # f32[T, E] on the scale of the values
    terminal: Array  # bool[T, E] nothing after this transition counts for it
    valid: Array  # bool[T, E]
    reset: Array  # bool[T, E] the recurrent state was zeroed before this row


@struct.dataclass
class Batch:
    """A trajectory and what is derived from it before the first step; axes [T, E]."""

    trajectory: Trajectory
    advantage: Array  # f32[T, E] normalised, 0 where not valid
    returns: Array  # f32[T, E] targets of the value, 0 where not valid


@struct.dataclass
class Hypers:
    """What a study varies without recompiling, f32[] each and traced; the rest of `PPOConfig` is static."""

    learning_rate: Array
    gamma: Array
    gae_lambda: Array
    clip_ratio: Array
    entropy_coef: Array
    entropy_coef_final: Array

    @classmethod
    def from_config(cls, cfg: PPOConfig) -> Hypers:
        return cls(**{name: jnp.float32(getattr(cfg, name)) for name in cls.__dataclass_fields__})


@struct.dataclass
class LearnerState:
    """What an update changes."""

    params: Any
    opt_state: Any
    updates: Array  # i32[] calls of `update` so far


def optimiser(cfg: PPOConfig) -> optax.GradientTransformation:
    """Adam (eps 1e-5) behind a clip of the global gradient norm; its steps are yet to be scaled by -learning_rate."""
    return optax.chain(optax.clip_by_global_norm(cfg.max_grad_norm), optax.scale_by_adam(eps=1e-5))


def init_learner(key: Array, cfg: PPOConfig, space: ActionSpace, n_features: int) -> LearnerState:
    """Fresh policy and optimiser for D = `n_features`."""
    params = policy.init(key, space, n_features, cfg.hidden_size, cfg.op_bias, cfg.full_alpha_bias)
    return LearnerState(params=params, opt_state=optimiser(cfg).init(params), updates=jnp.int32(0))


def entropy_coef(updates: Array, cfg: PPOConfig, hypers: Hypers | None = None) -> Array:
    """Entropy coefficient after so many updates: linear to `entropy_coef_final` over `anneal_rounds`; f32[]."""
    first, final = (hypers or cfg).entropy_coef, (hypers or cfg).entropy_coef_final
    progress = (
        jnp.minimum(updates.astype(jnp.float32) / cfg.anneal_rounds, 1.0) if cfg.anneal_rounds > 0 else jnp.float32(1)
    )
    return first + progress * (final - first)


def gae(
    rewards: Array,
    values: Array,
    bootstrap: Array,
    terminals: Array,
    *,
    gamma: Array | float,
    lam: Array | float,
    valid: Array | None = None,
) -> tuple[Array, Array]:
    """Generalised advantage estimation (Schulman et al., 2016) along one environment.

    Args:
      rewards: f32[T].
      values: f32[T], V(s_t).
      bootstrap: f32[], V of the state after the last valid row if the episode was truncated there, 0 to ignore what
        follows. It has no effect behind a terminal row.
      terminals: bool[T], no value flows back from beyond this transition.
      valid: bool[T], rows that are left out may stand anywhere and hold anything; None means all are valid.

    Returns:
      advantages and returns (advantage + value), each f32[T], 0 in rows that are not valid.
    """
    valid = jnp.ones_like(terminals) if valid is None else valid
    rewards, values = jnp.where(valid, rewards, 0.0), jnp.where(valid, values, 0.0)

    def body(after: tuple[Array, Array], row: tuple[Array, ...]) -> tuple[tuple[Array, Array], Array]:
        next_value, next_advantage = after
        reward, value, terminal, counts = row
        discount = gamma * (1.0 - terminal.astype(values.dtype))
        advantage = reward + discount * (next_value + lam * next_advantage) - value
        here = (jnp.where(counts, value, next_value), jnp.where(counts, advantage, next_advantage))
        return here, jnp.where(counts, advantage, 0.0)

    start = (jnp.asarray(bootstrap, values.dtype), jnp.zeros((), values.dtype))
    _, advantages = jax.lax.scan(body, start, (rewards, values, terminals, valid), reverse=True)
    return advantages, advantages + values


def discounted_sums(rewards: Array, terminals: Array, *, gamma: Array | float) -> Array:
    """What has been earned so far, older rewards discounted: `sum_k gamma^k r_(t-k)` since the last terminal; f32[T].

    Its deviation is the unit in which rewards are given to a learner (as `VecNormalize` of Stable-Baselines does): that
    of single rewards says little about returns.
    """

    def step(total: Array, row: tuple[Array, Array]) -> tuple[Array, Array]:
        reward, terminal = row
        total = gamma * total + reward
        return jnp.where(terminal, 0.0, total), total

    return jax.lax.scan(step, jnp.float32(0), (rewards, terminals))[1]


def _mean(x: Array, where: Array) -> Array:
    """Mean over the chosen entries, 0 without any."""
    count = jnp.sum(where, dtype=jnp.float32)
    return jnp.sum(jnp.where(where, x.astype(jnp.float32), 0.0)) / jnp.where(count > 0, count, 1.0)


def _moments(x: Array, where: Array) -> tuple[Array, Array]:
    """Mean and population variance over the chosen entries."""
    mean = _mean(x, where)
    return mean, _mean(jnp.square(x - mean), where)


def normalise_advantages(advantages: Array, valid: Array, *, std_floor: float) -> Array:
    """`(a - mean) / max(std, std_floor)` over the valid entries; 0 elsewhere. Any shape.

    The floor keeps a batch in which nothing happened from turning rounding noise into unit advantages.
    """
    mean, var = _moments(advantages, valid)
    return jnp.where(valid, (advantages - mean) / jnp.maximum(jnp.sqrt(var), std_floor), 0.0)


def make_batch(
    trajectory: Trajectory,
    bootstrap: Array | None = None,
    *,
    cfg: PPOConfig,
    hypers: Hypers | None = None,
) -> Batch:
    """Advantages and returns of a trajectory; `bootstrap` f32[E] as in `gae`, None for episodes that all ended."""
    rows, gamma, lam = trajectory, (hypers or cfg).gamma, (hypers or cfg).gae_lambda
    bootstrap = jnp.zeros(rows.reward.shape[1], jnp.float32) if bootstrap is None else bootstrap

    def one(reward: Array, value: Array, last: Array, terminal: Array, valid: Array) -> tuple[Array, Array]:
        return gae(reward, value, last, terminal, gamma=gamma, lam=lam, valid=valid)

    over_envs = jax.vmap(one, in_axes=(1, 1, 0, 1, 1), out_axes=1)
    advantages, returns = over_envs(rows.reward, rows.value, bootstrap, rows.terminal, rows.valid)
    advantages = normalise_advantages(advantages, rows.valid, std_floor=cfg.advantage_std_floor)
    return Batch(trajectory=rows, advantage=advantages, returns=returns)


def explained_variance(batch: Batch, *, cfg: PPOConfig) -> Array:
    """`1 - var(returns - values) / var(returns)` of the rollout's values; f32[], at most 1.

    The denominator is not taken below `advantage_std_floor` squared, so returns that hardly differ give no huge number.
    """
    rows = batch.trajectory
    error = batch.returns - jnp.where(rows.valid, rows.value, 0.0)
    _, residual = _moments(error, rows.valid)
    _, total = _moments(batch.returns, rows.valid)
    return 1.0 - residual / jnp.maximum(total, cfg.advantage_std_floor**2)


def _replay(space: ActionSpace, params: Any, rows: Trajectory) -> tuple[policy.Evaluation, Array]:
    """The decisions of ONE environment, rows [T, ...], under these parameters: evaluations and values f32[T]."""
    # Zeros where not valid: a NaN there would reach the gradient through the branch that `where` drops.
    features = jnp.where(rows.valid[:, None], rows.features, 0.0)
    carry = policy.initial_carry(policy.hidden_size(params))
    logits, values = policy.unroll(space, params, carry, features, rows.reset, rows.valid)
    return jax.vmap(policy.evaluate)(logits, rows.masks, rows.action), values


def loss(
    params: Any,
    batch: Batch,
    *,
    cfg: PPOConfig,
    space: ActionSpace,
    entropy_coef: Array | float,
    hypers: Hypers | None = None,
) -> tuple[Array, dict[str, Array]]:
    """Clipped surrogate + `value_coef` * half squared error of the value - `entropy_coef` * entropy.

    Policy and entropy are means over the valid rows in which anything but WAIT was legal, the value's error over all
    valid rows. The entropy of a row is the mean over its relevant heads, each over the log of its number of choices.

    Returns:
      the loss f32[], and f32[] metrics: loss, policy_loss, value_loss, entropy, op_entropy, approx_kl, clip_fraction,
      ratio_mean, ratio_max, ratio_error (largest |r - 1|); and f32[8] by head, where it had more than one legal choice:
      head_entropy, a sum, and head_choices, of how many. approx_kl is the mean of (r - 1) - log r, which is never
      negative (Schulman, 2020).
    """
    rows, clip_ratio = batch.trajectory, (hypers or cfg).clip_ratio
    evaluation, values = jax.vmap(lambda env: _replay(space, params, env), in_axes=1, out_axes=1)(rows)
    decided = rows.valid & jnp.delete(rows.masks.op, int(Op.WAIT), axis=-1).any(-1)

    chosen = jax.vmap(jax.vmap(policy.had_choice))(rows.masks, rows.action) & decided[..., None]
    log_ratio = jnp.where(decided, evaluation.log_prob - rows.log_prob, 0.0)
    log_ratio = jnp.clip(log_ratio, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    ratio = jnp.exp(log_ratio)
    clipped = jnp.clip(ratio, 1.0 - clip_ratio, 1.0 + clip_ratio)
    surrogate = jnp.minimum(ratio * batch.advantage, clipped * batch.advantage)

    policy_loss = -_mean(surrogate, decided)
    value_loss = 0.5 * _mean(jnp.square(values - batch.returns), rows.valid)
    entropy = _mean(evaluation.entropy, decided)
    total = policy_loss + cfg.value_coef * value_loss - entropy_coef * entropy
    metrics = {
        "loss": total,
        "policy_loss": policy_loss,
        "value_loss": value_loss,
        "entropy": entropy,
        "op_entropy": _mean(evaluation.head_entropy[..., HEADS.index("op")], decided),
        "head_entropy": jnp.where(chosen, evaluation.head_entropy, 0.0).sum((0, 1)),
        "head_choices": chosen.sum((0, 1), dtype=jnp.float32),
        "approx_kl": _mean(ratio - 1.0 - log_ratio, decided),
        "clip_fraction": _mean(jnp.abs(ratio - 1.0) > clip_ratio, decided),
        "ratio_mean": _mean(ratio, decided),
        "ratio_max": jnp.max(ratio),
        "ratio_error": jnp.max(jnp.abs(ratio - 1.0)),
    }
    return total, metrics


def update(
    key: Array,
    learner: LearnerState,
    trajectory: Trajectory,
    bootstrap: Array | None = None,
    *,
    cfg: PPOConfig,
    space: ActionSpace,
    hypers: Hypers | None = None,
) -> tuple[LearnerState, dict[str, Array]]:
    """`cfg.epochs` passes over `cfg.minibatches` minibatches of environments, drawn anew in each pass.

    A minibatch whose loss or gradient is not finite takes no step. With `cfg.target_kl`, the first minibatch whose
    approx_kl exceeds 1.5 times the target ends the update without a step of its own.

    Args:
      bootstrap: f32[E], see `make_batch`.
      hypers: by default those of `cfg`.

    Returns:
      the learner, and the metrics of `loss` averaged over the minibatches that were reached and finite (ratio_max is
      their largest), with grad_norm (before clipping), entropy_coef, explained_variance (before the update),
      updates_done and nonfinite_updates (i32[]). head_entropy is f32[8], the mean over the rows in which a head had a
      choice, and means nothing where head_choices is 0. ratio_error is that of the first minibatch alone: more than
      rounding there means that the policy acted on other features, masks or states than those that are stored.

    Raises:
      ValueError: if the environments cannot be split evenly into minibatches.
    """
    n_envs = trajectory.reward.shape[1]
    if n_envs % cfg.minibatches:
        raise ValueError(f"{n_envs} environments cannot be split into {cfg.minibatches} equal minibatches")
    hypers = Hypers.from_config(cfg) if hypers is None else hypers
    batch = make_batch(trajectory, bootstrap, cfg=cfg, hypers=hypers)
    coef = entropy_coef(learner.updates, cfg, hypers)
    transform = optimiser(cfg)
    objective = partial(loss, cfg=cfg, space=space, entropy_coef=coef, hypers=hypers)
    gradient = jax.grad(objective, has_aux=True)

    def minibatch_step(state: tuple[Any, Any, Array], envs: Array) -> tuple[tuple[Any, Any, Array], dict[str, Array]]:
        params, opt_state, stopped = state
        reached = ~stopped
        part = jax.tree.map(lambda x: jnp.take(x, envs, axis=1), batch)
        grads, metrics = gradient(params, part)
        metrics["grad_norm"] = optax.tree.norm(grads)
        finite = jnp.isfinite(metrics["grad_norm"]) & jnp.isfinite(metrics["loss"])
        if cfg.target_kl is not None:
            stopped |= metrics["approx_kl"] > KL_STOP_FACTOR * cfg.target_kl
        taken = finite & ~stopped
        with jax.numpy_dtype_promotion("standard"):  # Adam raises Python's floats to an integer count
            changes, new_opt_state = transform.update(grads, opt_state, params)
        changes = jax.tree.map(lambda change: -hypers.learning_rate * change, changes)
        params = select(taken, optax.apply_updates(params, changes), params)
        opt_state = select(taken, new_opt_state, opt_state)
        flags = {"counts": reached & finite, "taken": taken, "nonfinite": reached & ~finite}
        return (params, opt_state, stopped), metrics | flags

    shuffles = jax.vmap(lambda k: jax.random.permutation(k, n_envs))(jax.random.split(key, cfg.epochs))
    minibatches = shuffles.reshape(cfg.epochs * cfg.minibatches, n_envs // cfg.minibatches)
    start = (learner.params, learner.opt_state, jnp.bool_(False))
    (params, opt_state, _), history = jax.lax.scan(minibatch_step, start, minibatches)

    counts, taken, nonfinite = (history.pop(name) for name in ("counts", "taken", "nonfinite"))
    by_head = [jnp.where(counts[:, None], history.pop(name), 0.0).sum(0) for name in ("head_entropy", "head_choices")]
    metrics = {name: _mean(x, counts) for name, x in history.items()}
    metrics |= {
        "head_entropy": by_head[0] / jnp.maximum(by_head[1], 1.0),
        "head_choices": by_head[1],
        "ratio_max": jnp.max(jnp.where(counts, history["ratio_max"], 0.0)),
        "ratio_error": jnp.where(counts[0], history["ratio_error"][0], 0.0),
        "entropy_coef": coef,
        "explained_variance": explained_variance(batch, cfg=cfg),
        "updates_done": jnp.sum(taken, dtype=jnp.int32),
        "nonfinite_updates": jnp.sum(nonfinite, dtype=jnp.int32),
    }
    return LearnerState(params=params, opt_state=opt_state, updates=learner.updates + 1), metrics
