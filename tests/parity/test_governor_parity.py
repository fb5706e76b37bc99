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


def close(actual, expected, what):
    """Where the reference has a number. The absolute part: deviations of losses of one size cancel in float32."""
    there = np.isfinite(expected)
    golden.close(np.asarray(actual)[there], expected[there], what, rtol=1e-5, atol=1e-6)


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

        panics = verdict.panic
        exact = {
            "verdict": panics,
            "reason": verdict.reason,
            "consecutive": verdict.consecutive,
            "pending": state.pending,
            "consecutive_after_rollback": rolled_back.consecutive,
            "n_before": before.count,
            "n_after": after.count,
        }
        for name, actual in exact.items():
            golden.close(actual, expected[name], name)
        golden.close(panics, case["seed/verdict"][i], "seed/verdict")
        np.testing.assert_array_equal(verdict.accepted, expected["reason"] == 0)
        statistics = {
            "mean_before": before.mean,
            "std_before": before.std,
            "threshold_before": verdict.threshold,
            "multiplier_threshold_before": cfg.multiplier * before.mean,
            "mean_after": after.mean,
            "threshold_after": after.threshold,
        }
        for name, actual in statistics.items():
            close(actual, expected[name], name)
        close(verdict.threshold[panics], expected["report_threshold"][panics], "report_threshold")
        golden.close(state.panic_loss[panics], expected["report_loss"][panics], "report_loss", rtol=1e-6)
