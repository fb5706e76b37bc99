"""Governor against the reference: every verdict, counter and statistic of long loss sequences with rollbacks.

Followed is `head`, where the counter holds real divergences only; the verdicts of `seed` are the same.
"""

import functools

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esper_jax.config import GovernorConfig
from esper_jax.env import governor as G

PARAMETERS = ("sensitivity", "multiplier", "absolute_threshold", "death_penalty")


@functools.partial(jax.jit, static_argnames="cfg")
def run(cfg, losses, random_guess_loss):
    """One sequence with a rollback at every panic; statistics before and after each check."""

    def step(state, loss):
        before = G.statistics(state, cfg)
        state, verdict = G.check(state, loss, cfg=cfg, random_guess_loss=random_guess_loss)
        after = G.select(verdict.panic, G.after_rollback(state), state)
        return after, (verdict, state, before, G.statistics(state, cfg), after)

    return jax.lax.scan(step, G.init(cfg), losses)[1]


def close(actual, expected):
    """1e-5 relative, where the reference has a number; the history may hold very different magnitudes."""
    there = np.isfinite(expected)
    np.testing.assert_allclose(np.asarray(actual, np.float64)[there], expected[there], rtol=1e-5, atol=1e-6)


@golden.each_case("governor")
@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_sequences(case):
    for i, losses in enumerate(case["loss"]):
        cfg = GovernorConfig(
            history_window=int(case["param/history_window"][i]),
            min_panics=int(case["param/min_panics"][i]),
            **{name: float(case[f"param/{name}"][i]) for name in PARAMETERS},
        )
        assert -cfg.death_penalty == case["param/punishment"][i]
        guess = float(case["param/random_guess_loss"][i])
        out = jax.tree.map(np.asarray, run(cfg, jnp.asarray(losses, jnp.float32), guess))
        verdict, state, before, after, rolled_back = out
        expected = {key: values[i] for key, values in golden.sub(case, "head").items()}

        np.testing.assert_array_equal(verdict.panic, expected["verdict"])
        np.testing.assert_array_equal(verdict.panic, case["seed/verdict"][i])
        np.testing.assert_array_equal(verdict.reason, expected["reason"])
        np.testing.assert_array_equal(verdict.consecutive, expected["consecutive"])
        np.testing.assert_array_equal(state.pending, expected["pending"])
        np.testing.assert_array_equal(rolled_back.consecutive, expected["consecutive_after_rollback"])
        np.testing.assert_array_equal(verdict.accepted, expected["reason"] == 0)
        np.testing.assert_array_equal(before.count, expected["n_before"])
        np.testing.assert_array_equal(after.count, expected["n_after"])
        close(before.mean, expected["mean_before"])
        close(before.std, expected["std_before"])
        close(verdict.threshold, expected["threshold_before"])
        close(cfg.multiplier * before.mean, expected["multiplier_threshold_before"])
        close(after.mean, expected["mean_after"])
        close(after.threshold, expected["threshold_after"])
        panics = verdict.panic
        close(verdict.threshold[panics], expected["report_threshold"][panics])
        np.testing.assert_allclose(state.panic_loss[panics], expected["report_loss"][panics], rtol=1e-6)
