"""Arrays of a run that was never made, for the tests of what is said and drawn of runs."""

import numpy as np

from esper_jax.evidence import tables
from esper_jax.metric import ACCURACY
from esper_jax.types import BLUEPRINTS, Stage

ARMS = ("never", "random", "eager", "policy")


def run_arrays(envs=6, epochs=10, slots=3, rounds=3, policies=2, metric=ACCURACY):
    """Arrays of a run that was never made: `eager` gains 3 points, `policy` 1, `random` nothing.

    `eager` and the first policy keep a seed, at 2.5 and 1.5 times the host's parameters; the other policies prune it.
    """
    rng = np.random.default_rng(0)
    names = (*ARMS, *["policy"] * (policies - 1))
    shape = (len(names), envs, epochs)
    luck = rng.normal(0, 2, (envs, 1))
    gain = np.array([0, 0, 3, *[1] * policies])[:, None, None]
    accuracy = 30 + np.arange(epochs) + luck + gain * np.linspace(0, 1, epochs) + rng.normal(0, 0.3, shape)
    stage = np.full((*shape, slots), Stage.DORMANT, np.int8)
    life = [Stage.GERMINATED, Stage.TRAINING, Stage.BLENDING, Stage.BLENDING, Stage.HOLDING, Stage.FOSSILIZED]
    stage[2, :, 2:8, 0] = life
    stage[2, :, 8:, 0] = Stage.FOSSILIZED
    pruned = [Stage.GERMINATED, Stage.PRUNED, Stage.EMBARGOED, Stage.EMBARGOED, Stage.RESETTING, Stage.DORMANT]
    stage[3, :, 8:, 0] = Stage.FOSSILIZED
    stage[3:, :, 4:, 1] = pruned
    alpha = np.select([stage == Stage.BLENDING, (stage == Stage.HOLDING) | (stage == Stage.FOSSILIZED)], [0.5, 1.0])
    blueprint = np.where((stage > Stage.DORMANT) & (stage <= Stage.FOSSILIZED), 1, -1).astype(np.int8)
    panic = np.zeros(shape, bool)
    panic[2, :, 5] = True
    committed_size = np.ones(shape)
    committed_size[2, :, 7:], committed_size[3, :, 8:] = 2.5, 1.5
    counts = {name: np.zeros(shape[:2], int) for name in ("germinated", "fossilised", "pruned", "rollbacks")}
    counts["germinated"][2:] = 1
    counts["fossilised"][2:4] = 1
    reward = rng.normal(0, 1, (rounds, policies, envs, epochs))
    reward[..., 0] = np.nan
    committed = accuracy[:, :, -1]
    return {
        "arms/names": np.array(names), "arms/policy_seed": np.array([0, 0, 0, *range(policies)]),
        "arms/blueprints": np.array(BLUEPRINTS),
        "arms/val_accuracy": accuracy,
        "arms/test_committed_accuracy": committed, "arms/test_committed_loss": 2 - committed / 50,
        "arms/val_loss": 2 - accuracy / 50, "arms/test_loss": 1 - committed / 50,
        "arms/test_accuracy": committed + 50,  # of what was not kept, and counts for nothing
        "arms/stage": stage, "arms/alpha": alpha, "arms/blueprint": blueprint, "arms/panic": panic,
        "arms/committed_size": committed_size, **{f"arms/{name}": count for name, count in counts.items()},
        **tables.metric_arrays(metric),
        "rounds/reward": reward, "rounds/stage": np.stack([stage[-policies:]] * rounds),
        "learner/entropy": np.linspace(0.9, 0.7, rounds)[:, None] + np.zeros(policies),
    }  # fmt: skip
