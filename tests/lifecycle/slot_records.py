"""Records of slots for the tests: one slot per case, so a whole table of cases is one call."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from esper_jax.config import LifecycleConfig
from esper_jax.lifecycle import masks, operations, stages
from esper_jax.types import Action, SlotState

PERMISSIVE = LifecycleConfig()
STRICT = LifecycleConfig(permissive_gates=False)

tick = jax.jit(stages.tick, static_argnums=1)
gate = jax.jit(stages.gate, static_argnums=1)
execute = jax.jit(operations.execute, static_argnums=3)
legal = jax.jit(masks.legal, static_argnums=1)
record_score = jax.jit(stages.record_score)
record_contribution = jax.jit(stages.record_contribution)


def make(stage, *, alpha=None, metrics=None, **fields) -> SlotState:
    """Empty records with the given fields; every argument is a list over slots or one value for all."""
    n = len(stage)
    put = lambda record, values: record.replace(
        **{name: jnp.broadcast_to(jnp.asarray(v, getattr(record, name).dtype), (n,)) for name, v in values.items()}
    )
    slots = put(stages.empty(n), {"stage": stage, **fields})
    return slots.replace(alpha=put(slots.alpha, alpha or {}), metrics=put(slots.metrics, metrics or {}))


def request(op, slot=0, **heads) -> operations.Request:
    """The request behind an action, with some of its fields replaced by plain values."""
    indices = {name: heads.pop(name) for name in tuple(heads) if name in Action.__dataclass_fields__}
    action = jax.tree.map(jnp.int32, Action(op=int(op), slot=slot, **indices))
    return operations.decode(action).replace(**{name: jnp.asarray(value) for name, value in heads.items()})


@functools.partial(jax.jit, static_argnames="cfg")
def epoch(slots, action, accuracy=50.0, contribution=0.0, cfg=PERMISSIVE):
    """One step of an environment without its network: execute, tick, and measure."""
    slots, outcome = operations.execute(slots, operations.decode(action), accuracy, cfg)
    slots = stages.tick(slots, cfg)
    measured = stages.is_active(slots.stage) & (slots.alpha.alpha > 0)
    slots = stages.record_contribution(slots, jnp.full(slots.stage.shape, contribution), measured)
    return stages.record_score(slots, accuracy), outcome


def act(op, slot=0, **heads) -> Action:
    return jax.tree.map(jnp.int32, Action(op=int(op), slot=slot, **heads))


def equal(one, other) -> bool:
    """Bitwise, all leaves."""
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


def differing(one, other) -> np.ndarray:
    """bool[S]: slots of which some field differs."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return np.any([np.asarray(a) != np.asarray(b) for a, b in pairs], axis=0)
