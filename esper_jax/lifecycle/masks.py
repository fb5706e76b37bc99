"""What is legal: one predicate for the masks a controller sees and for the execution of what it asks for
(control_and_governor 6)."""

from __future__ import annotations

import jax.numpy as jnp

from esper_jax.config import LifecycleConfig
from esper_jax.lifecycle import stages
from esper_jax.types import (
    HEAD_SIZES,
    RELEVANT_HEADS,
    STYLES,
    Action,
    AlphaMode,
    Array,
    Masks,
    Op,
    SlotState,
    Stage,
)


def legal_slots(slots: SlotState, cfg: LifecycleConfig) -> Array:
    """bool[6, S]: op o may be executed on slot s. Gates are not looked at: an ADVANCE that will fail its gate is legal.

    WAIT is legal everywhere; an illegal op that is asked for all the same changes nothing.
    """
    stage = slots.stage
    holds = slots.alpha.mode == AlphaMode.HOLD
    full = (stages.seed_count(stage) >= cfg.max_seeds) if cfg.max_seeds > 0 else jnp.bool_(False)
    may_germinate = (stage == Stage.DORMANT) & ~full
    if cfg.sequential:
        developing = stages.is_in(stage, (Stage.GERMINATED, Stage.TRAINING, *stages.COOLDOWN))
        may_germinate &= ~developing.any()
    prunable = stages.is_in(stage, (Stage.GERMINATED, Stage.TRAINING, Stage.BLENDING, Stage.HOLDING))
    rows = {
        Op.WAIT: jnp.ones_like(holds),
        Op.GERMINATE: may_germinate,
        Op.SET_ALPHA_TARGET: stages.is_in(stage, (Stage.BLENDING, Stage.HOLDING)) & holds,
        Op.PRUNE: prunable & holds & (slots.epochs_total >= cfg.min_prune_age),
        Op.FOSSILIZE: stage == Stage.HOLDING,
        Op.ADVANCE: stages.is_in(stage, (Stage.GERMINATED, Stage.TRAINING, Stage.BLENDING)),
    }
    return jnp.stack([rows[op] for op in Op])


def legal(slots: SlotState, cfg: LifecycleConfig, allowed: Array | bool = True) -> Masks:
    """Masks of all heads.

    `slot_by_op` narrows the slot once the op is known, so nothing illegal can be sampled. Style and alpha target are
    open when some slot can use them, otherwise pinned to their canonical value. With `allowed` False (bool[]) only
    WAIT is.
    """
    by_op = legal_slots(slots, cfg)
    by_op &= (jnp.arange(len(Op)) == Op.WAIT)[:, None] | allowed
    op = by_op.any(1)
    blends = op[Op.GERMINATE] | op[Op.SET_ALPHA_TARGET]
    always = lambda head: jnp.ones(HEAD_SIZES[head], bool)
    return Masks(
        op=op,
        slot=jnp.ones_like(by_op[0]),
        slot_by_op=by_op,
        blueprint=jnp.array([name in cfg.offered for name in cfg.catalog]),
        style=(jnp.arange(len(STYLES)) == 2) | blends,
        tempo=always("tempo"),
        alpha_target=(jnp.arange(HEAD_SIZES["alpha_target"]) == 2) | blends,
        alpha_speed=always("alpha_speed"),
        alpha_curve=always("alpha_curve"),
    )


def permits(masks: Masks, action: Action) -> Array:
    """bool[]: every head that the action's op reads is in range and allowed by `masks`."""

    def allowed(mask, index):
        in_range = (index >= 0) & (index < mask.shape[-1])
        return in_range & mask[jnp.clip(index, 0, mask.shape[-1] - 1)]

    op = jnp.clip(action.op, 0, len(Op) - 1)
    permitted = allowed(masks.op, action.op)
    for candidate, heads in RELEVANT_HEADS.items():
        for head in heads:
            mask = masks.slot_by_op[candidate] if head == "slot" else getattr(masks, head)
            permitted &= (op != candidate) | allowed(mask, getattr(action, head))
    return permitted
