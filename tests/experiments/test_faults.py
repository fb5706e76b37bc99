"""Faults put into training: what each does to a state, who notices, and a whole small report."""

import functools
import json
import math

import jax
import numpy as np
import pytest

from experiments.faults import __main__ as faults
from experiments.faults import detectors, population
from experiments.faults.detectors import NEVER, Share
from experiments.faults.population import KINDS, NUMBER, Cell, Plan

PLAN = Plan(seeds=2, clean=2, times=(1, 4), window=14, all_severities=False)


@functools.cache
def report():
    said = []
    return faults.measure(PLAN, said.append), "\n".join(said)


@pytest.mark.slow
def test_a_small_report():
    found, said = report()
    assert len(found["rows"]) == len(KINDS) * 2 * 2
    json.dumps(found)
    default, reference = (found["detectors"][name][faults.REPORTED] for name in (detectors.DEFAULT, "reference"))
    # what is not a number is seen by everybody, and a clean environment is as it was among the broken ones
    for score in (default, reference):
        assert score["by_kind"]["not a number"] == [2, 2] and score["by_kind"]["clean"] == [0, 2]
    assert found["others_unchanged"] is True
    assert default["recall"]["hits"] > reference["recall"]["hits"]
    assert found["recall"] == default["recall"]["value"] > 0.8 and found["median_delay"] == 0
    assert found["false_alarms_clean"] == 0 and 0 <= found["false_alarms_confusers"] < 0.3
    assert 0 <= found["recovery"] <= 1 and found["bytes"]["two_snapshots"] > found["bytes"]["governor"] > 0
    for name in (*detectors.DETECTORS, *(kind.name for kind in KINDS[1:])):
        assert name in said


@pytest.mark.slow
def test_the_governor_acts_on_what_it_notices():
    """Rows of NaN: without a governor the host is lost, with one it is not."""
    lost = [row for row in report()[0]["rows"] if row["kind"] == "not a number"]
    assert len(lost) == 4
    for row in lost:
        assert row["harmful"] and row["first_panic"] == 0 and not row["given_up"]
        assert row["final_free"] < 15 and row["final_governed"] > 20


def test_every_kind_does_what_it_says():
    """The first severity of each that changes the state, on a newborn environment."""
    cfg = faults.configuration(PLAN)
    state = jax.jit(population.make_env(cfg, population.data.load(cfg.data)).init)(jax.random.key(0))
    ones = tuple(seed.replace(params=1 + seed.params) for seed in state.model.seeds)  # of an empty slot they are 0
    state = state.replace(model=state.model.replace(seeds=ones))
    key = jax.random.key(1)
    changed = lambda kind, severity=0: kind.corrupt(state, np.float32(kind.severities[severity]), key)
    params = lambda state: [np.asarray(leaf) for leaf in jax.tree.leaves(state.model.host.params)]
    for kind in KINDS:
        if kind.corrupt is None:
            assert kind.labels or kind.repeat or kind.script != "wait" or kind.name == "clean"
            continue
        same = jax.tree.map(lambda a, b: np.array_equal(a, b, equal_nan=True), changed(kind), state)
        assert not all(jax.tree.leaves(same)), kind.name
    before, kernel = params(state), np.asarray(state.model.host.params.kernel)
    nan = params(changed(KINDS[NUMBER["not a number"]]))
    assert sum((~np.isfinite(leaf)).sum() for leaf in nan) == 1
    flipped = np.asarray(changed(KINDS[NUMBER["head sign flipped"]], 3).model.host.params.kernel)
    np.testing.assert_array_equal(flipped, -kernel)  # all classes
    half = np.asarray(changed(KINDS[NUMBER["head zeroed"]], 1).model.host.params.kernel)
    assert (half == 0).all(0).sum() == 5  # of ten
    scaled = params(changed(KINDS[NUMBER["layer scaled"]], 1))
    factors = [
        round(float(np.linalg.norm(b) / np.linalg.norm(a)), 3) for a, b in zip(before, scaled, strict=True) if a.any()
    ]
    assert sorted(set(factors)) == [1.0, 8.0] and factors.count(8.0) == 1
    assert changed(KINDS[NUMBER["learning rate for ever"]], 1).lr_scale == 8
    assert not changed(KINDS[NUMBER["snapshot corrupted"]], 2).snapshot.intact


def trace(**columns):
    n, length = next(iter(columns.values())).shape
    zeros = np.zeros((n, length), np.float32)
    fields = dict.fromkeys(population.Trace.__dataclass_fields__, zeros) | {"sizes": np.ones((n, length, 2))}
    return population.Trace(**{**fields, **columns})


def test_harm_is_five_points_of_ten_epochs():
    """A dip of 51 points for one epoch is harm (5.1 on average), one of 49 is not; the twin has 90 throughout."""
    plan = Plan(seeds=1, clean=1, times=(2,), window=12, all_severities=True)
    flip = NUMBER["head sign flipped"]
    cells = Cell(
        *np.array([(0, NUMBER["clean"], 0, 0), (0, flip, 0, 0), (0, NUMBER["clean"], 1, 0), (0, flip, 1, 0)]).T
    )
    accuracy = np.full((4, 12), 90.0)
    accuracy[1, 0], accuracy[3, 0] = 39.0, 41.0
    found = detectors.cases(plan, trace(accuracy=np.full((1, 14), 90.0)), cells, trace(accuracy=accuracy))
    assert found.harmful.tolist() == [False, True, False, False]
    assert found.trace.accuracy[1].tolist() == [90.0, 90.0, 39.0, *[90.0] * 11]
    assert found.length.tolist() == [14] * 4 and found.onset.tolist() == [2] * 4


@pytest.mark.parametrize(
    ("detector", "losses", "when"),
    [
        # five in a row at twice the mean of the last ten: of 9.0, twice 1.0, 1.8, 2.6, 3.4, 4.2
        (detectors._loss_spike, [1.0] * 10 + [9.0, 9.0, 9.0, 9.0, 1.0], NEVER),
        (detectors._loss_spike, [1.0] * 10 + [3.0, 9.0, 30.0, 90.0, 300.0], 14),
        (detectors._loss_spike, [1.0, math.nan], 1),
        (lambda loss: detectors._six_sigma(loss, np.ones_like(loss)), [1.0, 1.2] * 5 + [1.69], NEVER),  # 1.1 + 6 * 0.1
        (lambda loss: detectors._six_sigma(loss, np.ones_like(loss)), [1.0, 1.2] * 5 + [1.71], 10),
        # a step of ln 2 is 0.693 / 0.08 = 8.66 deviations, less a drift of 1.5: above 6 at once
        (detectors._cusum, [1.0] * 10 + [2.0], 10),
        (detectors._cusum, [1.0] * 10 + [1.1] * 10, NEVER),  # 1.19 deviations are less than the drift
    ],
)
def test_rivals(detector, losses, when):
    assert detector(np.array(losses)) == when


def test_share_has_wilson_s_interval():
    """Of 0 of 32: z^2 / (n + z^2) = 3.8415 / 35.8415; of 8 of 10 by the formula of 1927."""
    low, high = Share(0, 32).interval
    assert abs(low) < 1e-12 and abs(high - 0.107180) < 1e-6
    np.testing.assert_allclose(Share(8, 10).interval, (0.490162, 0.943318), atol=1e-6)
    assert math.isnan(Share(0, 0).value) and all(map(math.isnan, Share(0, 0).interval))


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--preset", "tiny"], "--preset tiny: must be one of smoke, quick, full"),
        (["--out", "nowhere/rows.json"], "--out nowhere/rows.json: must be a file in a folder that exists"),
        (["--sede", "1"], "--sede"),
    ],
)
def test_what_cannot_be_is_one_line(argv, said, capsys):
    assert faults.main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and said in line
