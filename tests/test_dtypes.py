"""JAX's stricter ways change nothing: 64-bit numbers switched on, no implicit promotion of dtypes, none of ranks.

Everything is only traced. Shapes and dtypes of all that comes out have to be those of JAX's defaults. (Not with all
three at once: NumPy's functions make indices of 64 bits then, which promote by themselves.)
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
import pytest
import tiny
import tiny_run

from esper_jax import make_train
from esper_jax.control import heuristic, normalizers, policy
from esper_jax.control.arms import default_controllers
from esper_jax.env.environment import make_env
from esper_jax.lifecycle import stages
from esper_jax.types import Action, ActionSpace


@contextlib.contextmanager
def no_promotion():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


MODES = {"64 bits": functools.partial(jax.enable_x64, True), "no promotion": no_promotion}


def environment(changes=(), augment=False):
    """Reset, a step from there, and the report."""
    env = make_env(tiny.CONFIG.replace(**dict(changes)), tiny.dataset().replace(augment=augment))
    born = jax.eval_shape(env.reset, jax.random.key(0))
    stepped = jax.eval_shape(env.step, jax.random.key(0), born[0], jax.eval_shape(Action))
    return born, stepped, jax.eval_shape(env.report, born[0])


def rules():
    """What every rule asks for at the first decision."""
    env, key = make_env(tiny.CONFIG, tiny.dataset()), jax.random.key(0)
    _, obs = jax.eval_shape(env.reset, key)
    decide = lambda rule: jax.eval_shape(lambda obs: rule.act(key, rule.init(key), obs), obs)
    config = heuristic.HeuristicConfig()
    heuristics = jax.eval_shape(lambda o: heuristic.decide(heuristic.init(config), o.signals, o.slots, config), obs)
    return {name: decide(rule) for name, rule in default_controllers(tiny.CONFIG).items()}, heuristics


def statistics():
    """Running statistics of features [8, 3] and of returns [8]."""
    rows, line = jnp.ones((8, 3), jnp.float32), jnp.ones(8, jnp.float32)
    features = normalizers.update(normalizers.init(3), rows)
    return features, normalizers.normalise(features, rows), normalizers.update(normalizers.init(1), line[:, None])


def training(**changes):
    """A run's start and one round."""
    train, key = make_train(tiny_run.CONFIG.replace(**changes), tiny.dataset()), jax.random.key(0)
    run = jax.eval_shape(train.init, key)
    return run, jax.eval_shape(train.update, key, run)


KINDS = ("conv_heavy", "depthwise", "bottleneck", "attention")
STRICT = {"lifecycle.permissive_gates": False, "lifecycle.sequential": True, "lifecycle.max_seeds": 1}
# more slots than have a table of all configurations, and one kind of seed of each make
LARGE = {"host.n_blocks": 5, "host.base_channels": 2, "lifecycle.blueprints": KINDS}
PROGRAMS = {
    "slots": lambda: jax.eval_shape(lambda: stages.empty(3)),
    "policy": lambda: jax.eval_shape(lambda key: policy.init(key, ActionSpace(2), 7, 8), jax.random.key(0)),
    "statistics": lambda: jax.eval_shape(statistics),
    "environment": environment,
    "shaped": lambda: environment({"reward.mode": "shaped"} | STRICT, augment=True),
    "simplified": lambda: environment({"reward.mode": "simplified", "training.compute_dtype": "bfloat16"}),
    "sparse": lambda: environment(
        {"reward.mode": "sparse", "training.tile_pixels": 0, "training.clip_norm": None} | LARGE
    ),
    "rules": rules,
    # environments in chunks, so that seeds are dispatched by groups
    "training": lambda: training(env_chunk=2, devices=1, **{"ppo.target_kl": 0.1}),
}


def signature(tree):
    """Shape and dtype of every leaf, by its path."""
    return {jax.tree_util.keystr(path): (x.shape, x.dtype) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


# a round's programs take long to trace
@pytest.mark.parametrize("program", [pytest.param(p, marks=[pytest.mark.slow] * (p == "training")) for p in PROGRAMS])
def test_same_dtypes(program):
    usual = signature(PROGRAMS[program]())
    for name, mode in MODES.items():
        with mode():
            assert signature(PROGRAMS[program]()) == usual, name
    dtypes = {str(dtype) for _, dtype in usual.values()}
    assert dtypes <= {"float32", "int32", "bool", "key<fry>"}, dtypes
