"""The robust rules: each at its threshold, panics in a row, damage of a snapshot, what a removed seed is worth."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_governor import BAD, GOOD, model

from esper_jax.config import GovernorConfig
from esper_jax.env import governor as G
from esper_jax.types import PanicReason

CFG = GovernorConfig()
GUESS = math.log(10)
HEALTHY = {"loss": 1.0, "accuracy": 60.0, "train_loss": 1.0, "sizes": (2.0, 3.0), "finite": True}
EXAMPLES = 400  # an accuracy of 60 % then has a deviation of 100 sqrt(0.6 * 0.4 / 400) = 2.449 points


@jax.jit
def _step(state, row, rise):
    state = G.restated(state, rise)
    return G.judge(state, row, cfg=CFG, random_guess_loss=GUESS)


def vitals(**changes):
    f32 = lambda value: jnp.asarray(value, jnp.float32)
    given = HEALTHY | changes  # and `rise`, which is not seen
    accuracy = f32(given["accuracy"])
    return G.Vitals(
        f32(given["loss"]), accuracy, G.accuracy_std(accuracy, EXAMPLES), f32(given["train_loss"]),
        f32(given["sizes"]), jnp.bool_(given["finite"]),
    )  # fmt: skip


def course(*epochs, start=None):
    """Verdicts, and the last state."""
    state, verdicts = G.init(CFG, 2) if start is None else start, []
    for changes in epochs:
        rise = jnp.float32(changes.get("rise", 0.0))
        state, verdict = _step(state, vitals(**changes), rise)
        verdicts.append(verdict)
    return verdicts, state


def test_chance():
    np.testing.assert_allclose(G.accuracy_std(jnp.float32(60), EXAMPLES), 2.449490, rtol=1e-6)
    # nobody's accuracy is certain: at 100 % as at 99 %, sqrt(0.01 * 0.99 / 400) = 0.4975 %
    np.testing.assert_allclose(G.accuracy_std(jnp.float32(100), EXAMPLES), 0.4974937, rtol=1e-6)


# In units of a uniform guess, 2.302585 nats: 0.25 are 0.57565, 0.1 are 0.23026, 0.04 are 0.09210. An accuracy may drop
# by 12 points and three deviations: from 60 % to 40.6 % (deviation 2.4554) are 19.4 of 19.366 points, to 40.7 % 19.3.
@pytest.mark.parametrize(
    ("changes", "alarms"),
    [
        ({"loss": 1.575}, False),
        ({"loss": 1.576}, True),
        ({"train_loss": 1.230}, False),
        ({"train_loss": 1.231}, True),
        ({"accuracy": 40.6, "loss": 1.093}, True),
        ({"accuracy": 40.7, "loss": 1.093}, False),
        ({"accuracy": 40.6, "loss": 1.092}, False),  # the loss does not confirm it
        ({"accuracy": 0.0, "loss": 0.9}, False),
        ({"sizes": (6.01, 3.0)}, True),
        ({"sizes": (2.0, 8.99)}, False),
        ({"sizes": (0.66, 3.0)}, True),
        ({"finite": False}, True),
        ({"loss": math.nan}, True),
        ({"train_loss": math.inf}, True),
        ({"loss": 0.1, "accuracy": 99.0, "train_loss": 0.1}, False),
    ],
)
def test_each_rule_at_its_threshold(changes, alarms):
    """The epoch before is one of three that are compared with; an alarm panics at once."""
    verdicts, state = course({"loss": 1.2, "accuracy": 50}, {}, changes)
    assert [bool(v.panic) for v in verdicts] == [False, False, alarms]
    assert bool(verdicts[-1].accepted) != alarms
    seen = vitals(**changes)
    broken = not (seen.finite and jnp.isfinite(seen.loss) and jnp.isfinite(seen.train_loss))
    expected = PanicReason.NONE if not alarms else PanicReason.NON_FINITE if broken else PanicReason.DIVERGENCE
    assert verdicts[-1].reason == expected
    # what was not accepted is not compared with
    assert state.recent.losses[-1] == (1.0 if alarms else jnp.float32(changes.get("loss", 1.0)))


def test_the_first_epoch_is_compared_with_nothing():
    for changes, alarms in (({"loss": 50.0, "train_loss": 50.0, "accuracy": 0.0}, False), ({"finite": False}, True)):
        (verdict,), _ = course(changes)
        assert bool(verdict.panic) == alarms


def test_the_lowest_of_three_losses_counts():
    """After a slow rise of 0.13 of a guess per epoch the third one is above: 0.26 of a guess over the lowest."""
    slow = [{"loss": 1.0 + 0.13 * GUESS * k} for k in range(3)]
    verdicts, _ = course(*slow)
    assert [bool(v.panic) for v in verdicts] == [False, False, True]


def test_a_seed_that_leaves_is_expected_to_be_missed():
    """It was worth 0.8 nats: a loss that high is no alarm, nor is the accuracy; 0.58 above that is one."""
    missed = {"rise": 0.8, "loss": 1.8, "train_loss": 1.8, "accuracy": 20.0}
    assert not course({}, missed)[0][-1].panic
    assert course({}, {**missed, "rise": 0.0})[0][-1].panic
    assert course({}, {**missed, "loss": 2.38})[0][-1].panic
    # and from then on the new level counts
    assert course({}, missed, {"loss": 2.38, "train_loss": 1.8, "accuracy": 20.0})[0][-1].panic


BROKEN = {"finite": False}


def test_panics_in_a_row_end_in_giving_up():
    """Five of them, each before ten epochs were accepted since the last; then nothing panics any more."""
    verdicts, state = course({}, *[BROKEN] * 5, BROKEN)
    assert [bool(v.panic) for v in verdicts] == [False, *[True] * 5, False]
    assert state.given_up and not verdicts[-1].accepted
    # nine accepted epochs between two panics do not end a row, ten do
    _, near = course({}, BROKEN, *[{}] * 9, BROKEN)
    _, far = course({}, BROKEN, *[{}] * 10, BROKEN)
    assert (near.in_a_row, far.in_a_row) == (2, 1) and not near.given_up


def test_the_reference_s_rules_and_none():
    """A loss of 1.5 after 1.0 is nothing to the reference, which waits for a history of ten and a loss of twelve."""
    for rules, panics in (("reference", [False, False, True]), ("off", [False, False, False])):
        cfg = replace(CFG, rules=rules)
        state = G.init(cfg, 2)
        found = []
        for loss in (1.0, 1.5, math.nan):
            state, verdict = G.judge(state, vitals(loss=loss), cfg=cfg, random_guess_loss=GUESS)
            found.append((bool(verdict.panic), bool(verdict.accepted)))
        assert [panic for panic, _ in found] == panics
        assert [accepted for _, accepted in found] == [True, True, False]  # what is not finite is never compared with


# --- damage of a snapshot --------------------------------------------------------------------------------------------


def test_any_changed_bit_and_any_two_signs_show():
    whole = model(1.0)
    kept = G.snapshot(whole, GOOD)
    assert kept.intact
    kernel = np.full((2, 3), 1.0, np.float32)
    for bit in range(32):
        bits = kernel.view(np.uint32).copy()
        bits[1, 2] ^= np.uint32(1 << bit)
        damaged = whole.replace(host={**whole.host, "kernel": jnp.asarray(bits.view(np.float32))})
        assert not kept.replace(model=damaged).intact
    signs = jnp.asarray(kernel).at[0, 0].multiply(-1).at[1, 1].multiply(-1)
    assert not kept.replace(model=whole.replace(host={**whole.host, "kernel": signs})).intact
    moved = whole.replace(host={**whole.host, "kernel": jnp.asarray(kernel).at[0, 0].set(2.0)})
    swapped = whole.replace(host={**whole.host, "kernel": jnp.asarray(kernel).at[0, 1].set(2.0)})
    assert not G.snapshot(moved, GOOD).replace(model=swapped).intact


def test_which_snapshot_is_gone_back_to():
    newest, older = G.snapshot(model(2.0), GOOD), G.snapshot(model(1.0), GOOD)
    bad = lambda snapshot: snapshot.replace(model=model(jnp.nan))
    chosen = lambda *given: float(G.best_snapshot(*given).model.host["kernel"][0, 0])
    assert chosen(newest, older, jnp.int32(1)) == 2
    assert chosen(newest, older, jnp.int32(2)) == 1  # the last rollback was in vain
    assert chosen(bad(newest), older, jnp.int32(1)) == 1
    assert chosen(newest, bad(older), jnp.int32(2)) == 2


def test_a_fossil_that_is_admitted_does_not_hide_damage():
    kept = G.snapshot(model(1.0), GOOD)
    fossils = BAD.replace(stage=jnp.full_like(BAD.stage, int(GOOD.stage[0])))
    assert G.admit_fossils(kept, model(2.0), fossils).intact
    assert not G.admit_fossils(kept.replace(model=model(3.0)), model(2.0), fossils).intact
