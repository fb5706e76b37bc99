"""TensorBoard's event files hold the numbers of a run's rounds, and nothing that was not measured."""

import io
import sys

import numpy as np
import pytest
import tiny_run
from tensorboardX.proto import event_pb2

from esper_jax.metric import ACCURACY
from esper_jax.run import job as jobs
from esper_jax.run import records, scalars
from esper_jax.run.console import Console


def events(folder):
    """(step, tag, value) of the event files in a folder: records of length, checksum, bytes, checksum."""
    found = []
    for path in sorted(folder.iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            size = int.from_bytes(data[at : at + 8], "little")
            event = event_pb2.Event.FromString(data[at + 12 : at + 12 + size])
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            at += 12 + size + 4
    return found


def test_numbers_of_a_round():
    arrays = tiny_run.result().rounds[0]
    for p, numbers in enumerate(scalars.of_round(arrays, ACCURACY)):
        assert numbers["episodes/return"] == pytest.approx(np.nansum(arrays["rounds/reward"][p], -1).mean())
        assert numbers["episodes/validation_accuracy"] == pytest.approx(arrays["rounds/val_accuracy"][p, :, -1].mean())
        assert numbers["learner/approx_kl"] == arrays["learner/approx_kl"][p]
        assert all(np.isfinite(value) for value in numbers.values())
        assert numbers["head_entropy/op"] == arrays["learner/head_entropy"][p, -1]
    unmeasured = arrays | {"learner/head_entropy": np.full_like(arrays["learner/head_entropy"], np.nan)}
    assert not any(tag.startswith("head_entropy") for tag in scalars.of_round(unmeasured, ACCURACY)[0])


def test_a_run_that_goes_on_replaces_what_it_does_again(tmp_path):
    """Rounds 1 and 2, then again from round 2 on: the second file says from where on the first one is void."""
    rounds = tiny_run.result().rounds
    with scalars.Writer(tmp_path, 2) as writer:
        for number, arrays in enumerate(rounds, 1):
            writer.write(number, arrays, ACCURACY)
    first = events(tmp_path / "policy_0")
    assert {step for step, *_ in first} == {1, 2}
    with scalars.Writer(tmp_path, 2, done=1) as writer:
        writer.write(2, rounds[1], ACCURACY)
    assert len(events(tmp_path / "policy_0")) > len(first) and len(list(tmp_path.iterdir())) == 2


def test_a_run_that_is_asked_when_it_goes_on_gives_all_its_rounds(tmp_path):
    """Round 1 was done without event files; a second time, they know it already."""
    rounds, states = tiny_run.result().rounds, tiny_run.result().states
    log = records.RoundLog(tmp_path / "checkpoints" / "rounds")
    log.write(0, rounds[0])
    card = {"checkpoint_every": 0, "tensorboard": True}
    job = jobs.Job(
        None, tiny_run.CONFIG, tmp_path, Console(file=io.StringIO()), tiny_run.result().train, tiny_run.KEY(),
        states[1], {}, card,
    )  # fmt: skip
    jobs.learn(job)
    place = tmp_path / "tensorboard" / "policy_1"
    found = events(place)
    for step, arrays in enumerate(rounds, 1):
        numbers = {tag: value for s, tag, value in found if s == step}
        assert numbers == pytest.approx(scalars.of_round(arrays, ACCURACY)[1], rel=1e-6)
    jobs.learn(job)
    again = events(place)
    assert sorted(step for step, *_ in again) == sorted([s for s, *_ in found] + [s for s, *_ in found if s == 2])


def test_without_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ValueError, match=r"--tensorboard: needs the extra: pip install 'esper_jax\[tensorboard\]'"):
        scalars.check()


def test_nothing_is_computed_where_it_is_not_asked_for():
    with scalars.Writer(None, 2) as writer:
        writer.write(1, {}, ACCURACY)


def test_a_writer_of_other_policies_is_an_error(tmp_path):
    with scalars.Writer(tmp_path, 3) as writer, pytest.raises(ValueError, match="zip"):
        writer.write(1, tiny_run.result().rounds[0], ACCURACY)
