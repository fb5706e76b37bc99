"""Checkpoints: what comes back is what was saved, or one error that says why not."""

import errno
import json
import logging
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
import tiny_run

from esper_jax.run import checkpoint, records
from esper_jax.run.checkpoint import CheckpointError

META = {"config": {"lr": 0.1, "names": ["a", "b"]}, "data": "tiny"}


class Pair(NamedTuple):
    first: object
    second: object


def state(scale=1.0):
    params = {"w": jnp.arange(6.0).reshape(2, 3) * scale, "b": jnp.zeros(3, jnp.bfloat16)}
    return Pair(
        first={"params": params, "optimiser": optax.adam(1e-3).init(params), "round": jnp.int32(7)},
        second=(jnp.array([True, False]), jnp.array([np.nan, np.inf, -0.0], jnp.float32), jnp.zeros((0, 4))),
    )


@pytest.fixture
def folder(tmp_path):
    checkpoint.save(tmp_path, 3, state(), META)
    return tmp_path


def test_comes_back_bit_for_bit(folder):
    restored, step = checkpoint.restore(folder, jax.tree.map(jnp.zeros_like, state()), META)
    assert step == 3
    assert jax.tree.structure(restored) == jax.tree.structure(state())
    assert tiny.equal(restored, state())
    assert [leaf.dtype for leaf in jax.tree.leaves(restored)] == [leaf.dtype for leaf in jax.tree.leaves(state())]


def test_template_may_be_shapes_only(folder):
    restored, _ = checkpoint.restore(folder, jax.eval_shape(state), META)
    assert tiny.equal(restored, state())


def test_leaves_are_placed_like_the_template(folder):
    mesh = jax.make_mesh((2,), ("env",), axis_types=(jax.sharding.AxisType.Auto,))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    restored, _ = checkpoint.restore(folder, jax.device_put(state(), everywhere), META)
    assert all(leaf.sharding == everywhere for leaf in jax.tree.leaves(restored))


def test_keeps_the_newest(tmp_path):
    for step in (1, 2, 10, 11):
        checkpoint.save(tmp_path, step, state(step), META)
    assert checkpoint.steps(tmp_path) == [10, 11]
    assert tiny.equal(checkpoint.restore(tmp_path, state(), META)[0], state(11))
    assert tiny.equal(checkpoint.restore(tmp_path, state(), META, step=10)[0], state(10))


def test_saving_a_step_again_replaces_it(folder):
    checkpoint.save(folder, 3, state(2), META)
    assert tiny.equal(checkpoint.restore(folder, state(), META)[0], state(2))


def test_an_unfinished_checkpoint_does_not_count(folder):
    """Orbax's own name for one that a process left when it died; the next save clears it away."""
    half = folder / "step_00000004.orbax-checkpoint-tmp"
    shutil.copytree(folder / "step_00000003", half)
    (half / checkpoint.FINGERPRINT).unlink()
    assert checkpoint.steps(folder) == [3]
    checkpoint.save(folder, 5, state(), META)
    assert checkpoint.steps(folder) == [3, 5] and not half.exists()


def test_the_best_stay_beside_the_newest(tmp_path):
    """Of scores 1, 9, 5, 7, none, 2 the steps 2 and 4 are best and 5 and 6 newest; a second manager, as after a resume,
    knows the scores of the first."""
    with checkpoint.Checkpoints(tmp_path, META) as checkpoints:
        for step, score in enumerate((1.0, 9.0, 5.0, 7.0, None), start=1):
            checkpoints.save(step, state(step), score=score)
    assert checkpoint.steps(tmp_path) == [2, 4, 5]
    checkpoint.save(tmp_path, 6, state(6), META, score=2.0)
    assert checkpoint.steps(tmp_path) == [2, 4, 5, 6]
    checkpoint.save(tmp_path, 7, state(7), META, score=np.nan)
    assert checkpoint.steps(tmp_path) == [2, 4, 6, 7]


def test_the_best_that_is_whole_is_found(tmp_path):
    """In any folder, before a step; what is damaged, of something else, or without a score is passed over."""
    disk, memory = tmp_path / "disk", tmp_path / "memory"
    for folder, step, score in ((disk, 1, 3.0), (disk, 2, 9.0), (memory, 3, 5.0), (memory, 4, None), (memory, 5, 7.0)):
        checkpoint.save(folder, step, state(step), META, score=score)
    best = lambda before: checkpoint.restore_best([disk, memory], state(), META, before=before)
    for before, expected in ((6, 2), (2, 1), (1, None)):
        found = best(before)
        assert found is None if expected is None else found[1] == expected and tiny.equal(found[0], state(expected))
    empty(disk / "step_00000002", checkpoint.FINGERPRINT)
    assert best(6)[1] == 5 and best(5)[1] == 3
    flip(memory / "step_00000003", "state")
    assert best(5)[1] == 1
    assert checkpoint.restore_best([disk, memory], state(), {**META, "data": "other"}, before=6) is None


def test_what_is_computed_meanwhile_is_not_what_is_saved(tmp_path):
    """A save is of the state as it was, also where the next step takes over its buffers."""
    step = jax.jit(lambda w: w + 1, donate_argnums=0)
    w = jnp.zeros(500_000)
    with checkpoint.Checkpoints(tmp_path, META) as checkpoints:
        for number in range(1, 4):
            checkpoints.save(number, {"w": w})
            w = step(w)
        checkpoints.wait()
        for number in (2, 3):
            found = checkpoint.restore(tmp_path, {"w": w}, META, step=number)[0]["w"]
            np.testing.assert_array_equal(found, number - 1)


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/shm")
def test_works_in_memory_backed_storage(tmp_path_factory):
    place = Path("/dev/shm") / tmp_path_factory.mktemp("esper").name
    try:
        checkpoint.save(place, 1, state(), META)
        assert tiny.equal(checkpoint.restore(place, state(), META)[0], state())
    finally:
        shutil.rmtree(place)


def changed(name, shape=None, dtype=None):
    """A template that differs from the state in one parameter; without a shape it is left out."""
    template = jax.eval_shape(state)
    params = template.first["params"]
    params.pop(name, None)
    if shape is not None:
        params[name] = jax.ShapeDtypeStruct(shape, dtype)
    return template


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (changed("w", (3, 2), jnp.float32), r"first\.params\.w\.shape is \[2, 3\] .* but \[3, 2\] here"),
        (changed("w", (2, 3), jnp.float16), r"first\.params\.w\.dtype is 'float32' .* but 'float16' here"),
        (changed("w"), r"first\.params\.w is in the checkpoint but not"),
        (changed("extra", (), jnp.float32), r"first\.params\.extra is not in the checkpoint"),
    ],
)
def test_another_tree_is_one_error_that_names_the_leaf(folder, template, said):
    with pytest.raises(CheckpointError, match=said):
        checkpoint.restore(folder, template, META)


@pytest.mark.parametrize(
    ("meta", "said"),
    [
        ({**META, "data": "other"}, "data is 'tiny' in the checkpoint but 'other' here"),
        ({**META, "config": {"lr": 0.2, "names": ("a", "b")}}, r"config\.lr is 0\.1 .* but 0\.2 here"),
        ({"data": "tiny"}, "config is in the checkpoint but not"),
    ],
)
def test_another_configuration_is_one_error_that_names_the_field(folder, meta, said):
    with pytest.raises(CheckpointError, match=said):
        checkpoint.restore(folder, state(), meta)


def test_missing_checkpoints_are_named(folder, tmp_path):
    with pytest.raises(CheckpointError, match="step 9 is not there .steps there: 3"):
        checkpoint.restore(folder, state(), META, step=9)
    with pytest.raises(CheckpointError, match="a checkpoint is not there .steps there: none"):
        checkpoint.restore(tmp_path / "nowhere", state(), META)


def test_damage_is_found(folder):
    place = folder / "step_00000003"
    data = max((place / "state").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else -1)
    content = data.read_bytes()
    for damaged in (content[:-1], content[:-1] + bytes([content[-1] ^ 1]), None):
        data.unlink() if damaged is None else data.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=f"{data.name}: is damaged"):
            checkpoint.restore(folder, state(), META)
    data.write_bytes(content)
    assert tiny.equal(checkpoint.restore(folder, state(), META)[0], state())

    stored = json.loads((place / checkpoint.FINGERPRINT).read_text())
    stored["leaves"]["first.params.w"]["sha256"] = "0" * 64
    (place / checkpoint.FINGERPRINT).write_text(json.dumps(stored))
    with pytest.raises(CheckpointError, match=r"first\.params\.w is not what was saved"):
        checkpoint.restore(folder, state(), META)
    text = json.dumps(stored)
    leaf = json.dumps(stored["leaves"]["first.params.w"])
    changed = (text.replace(leaf, "{}"), text.replace(leaf, "[]"), *(json.dumps(stored | {k: []}) for k in stored))
    for wrong in ("{", "[]", "5", "{}", *changed):
        (place / checkpoint.FINGERPRINT).write_text(wrong)
        with pytest.raises(CheckpointError, match="fingerprint.json: cannot be read"):
            checkpoint.restore(folder, state(), META)
    (place / checkpoint.FINGERPRINT).write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match="fingerprint.json: cannot be read"):
        checkpoint.restore(folder, state(), META)


def empty(place, name):
    (place / name).write_bytes(b"")


def flip(place, name):
    path = max((place / "state").rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda place: empty(place, checkpoint.FINGERPRINT),
        lambda place: (place / checkpoint.FINGERPRINT).write_text("[]"),
        lambda place: (place / checkpoint.FINGERPRINT).write_text(
            '{"leaves": {}, "files": {}, "meta": {}, "about": 3}'
        ),
        lambda place: (place / checkpoint.FINGERPRINT).write_bytes(b"\xff\xfe"),
        lambda place: shutil.copy(place.with_name("step_00000003") / checkpoint.FINGERPRINT, place),
        lambda place: (place / checkpoint.FINGERPRINT).unlink(),
        lambda place: flip(place, "state"),
        lambda place: shutil.rmtree(place / "state"),
        lambda place: (place / "state" / "new").write_text("x"),
        lambda place: (place / "metrics" / "metrics").write_text("{"),
        lambda place: (place / "metrics" / "metrics").write_text('{"score": "x"}'),
        lambda place: shutil.rmtree(place / "metrics"),
        lambda place: (place.parent / "rounds" / "000003.npz").write_bytes(b""),
        lambda place: (place.parent / "rounds" / "000003.npz").unlink(),
        lambda place: shutil.copy(place.parent / "rounds" / "000002.npz", place.parent / "rounds" / "000003.npz"),
    ],
)
def test_an_older_checkpoint_takes_the_place_of_a_damaged_one(tmp_path, damage):
    """Whatever happens to the newest one or to its round: it is kept aside, and the run goes on from the one before."""
    log = records.RoundLog(tmp_path / "rounds")
    for number in range(4):
        log.write(number, {"x": np.full(3, number)})
        checkpoint.save(tmp_path, number + 1, state(number), META, beside=log.known, score=1.0)
    hashes = lambda: records.RoundLog.hashes(tmp_path / "rounds")
    restored, step, damaged = checkpoint.resume([tmp_path], state(), META, hashes())
    assert step == 4 and not damaged and tiny.equal(restored, state(3))
    damage(tmp_path / "step_00000004")
    restored, step, damaged = checkpoint.resume([tmp_path], state(), META, hashes())
    assert step == 3 and tiny.equal(restored, state(2)) and checkpoint.steps(tmp_path)[-2:] == [3, 4]
    (line,) = checkpoint.set_aside(damaged)
    assert line.startswith("step_00000004 is damaged (") and "kept as damaged_step_00000004, and" in line
    assert (tmp_path / "damaged_step_00000004").is_dir() and checkpoint.steps(tmp_path)[-1] == 3
    # the run does that round again, and a second accident finds the name taken
    log = records.RoundLog(tmp_path / "rounds", step)
    log.write(3, {"x": np.full(3, 3)})
    checkpoint.save(tmp_path, 4, state(3), META, beside=log.known)
    empty(tmp_path / "step_00000004", checkpoint.FINGERPRINT)
    *_, damaged = checkpoint.resume([tmp_path], state(), META, hashes())
    assert "kept as damaged_step_00000004-2" in checkpoint.set_aside(damaged)[0]
    assert (tmp_path / "damaged_step_00000004-2").is_dir()


def test_where_nothing_is_whole_nothing_is_changed(tmp_path):
    for number in (3, 4):
        checkpoint.save(tmp_path, number, state(), META)
        empty(tmp_path / f"step_{number:08d}", checkpoint.FINGERPRINT)
    with pytest.raises(CheckpointError, match="step_00000004/.*cannot be read.*; no other checkpoint is whole"):
        checkpoint.resume([tmp_path], state(), META, {})
    assert checkpoint.steps(tmp_path) == [3, 4]


def test_a_checkpoint_of_something_else_is_no_damage(folder):
    """It is refused, however old the next one is."""
    checkpoint.save(folder, 4, state(2), META)
    with pytest.raises(CheckpointError, match="'other' here$"):
        checkpoint.resume([folder], state(), {**META, "data": "other"}, {})
    assert checkpoint.steps(folder) == [3, 4]


def test_what_a_checkpoint_is_about(folder):
    assert checkpoint.about(folder) is None
    checkpoint.save(folder, 4, state(), META, about={"preset": "smoke"})
    checkpoint.save(folder, 5, state(), META, about={"preset": "quick"})
    empty(folder / "step_00000005", checkpoint.FINGERPRINT)
    assert checkpoint.about(folder) == {"preset": "smoke"}


def test_only_what_the_run_wrote_is_deleted(tmp_path):
    for name in ("000000.npz", "000001.npz", "000002.npz", "000001.npz.tmp", "notes.txt", "12.npz"):
        (tmp_path / name).write_text("x")
    (tmp_path / "000007.npz").mkdir()
    records.RoundLog(tmp_path, 1)
    assert {path.name for path in tmp_path.iterdir()} == {"000000.npz", "notes.txt", "12.npz", "000007.npz"}


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (
            ValueError("RESOURCE_EXHAUSTED: Error writing 'd': No space left on device [os_error_code='28']"),
            errno.ENOSPC,
        ),
        (RuntimeError("Failed to write"), errno.EIO),
        (PermissionError(errno.EACCES, "Permission denied", "elsewhere"), errno.EACCES),
    ],
)
def test_a_checkpoint_that_cannot_be_written_is_one_error(folder, monkeypatch, error, number):
    import orbax.checkpoint as ocp

    def full(*args, **kwargs):
        (folder / "step_00000004.orbax-checkpoint-tmp").mkdir()
        logging.getLogger("absl").error("no space")
        raise error

    said, before = [], sys.unraisablehook
    listener = logging.Handler()
    listener.emit = said.append
    logging.getLogger("absl").addHandler(listener)
    for method in ("save", "wait_until_finished"):  # at once, or in Orbax's thread
        with monkeypatch.context() as patch, pytest.raises(OSError) as caught:
            patch.setattr(ocp.CheckpointManager, method, full)
            checkpoint.save(folder, 4, state(), META)
        assert (caught.value.errno, caught.value.filename) == (number, str(folder)) and not said
        assert [path.name for path in folder.iterdir()] == ["step_00000003"]
    logging.getLogger("absl").removeHandler(listener)
    assert not logging.getLogger("absl").filters and sys.unraisablehook is before
    assert tiny.equal(checkpoint.restore(folder, state(), META)[0], state())


def test_an_older_one_that_is_damaged_is_set_aside_too(tmp_path):
    """Orbax's manager reads the scores of all of them: nothing may stop it, also if the newest is whole."""
    for number in (1, 2):
        checkpoint.save(tmp_path, number, state(number), META, score=float(number))
    (tmp_path / "step_00000001" / "metrics" / "metrics").write_text("{")
    _, step, damaged = checkpoint.resume([tmp_path], state(), META, {})
    assert step == 2
    (line,) = checkpoint.set_aside(damaged)
    assert line.startswith("step_00000001 is damaged (")
    checkpoint.save(tmp_path, 3, state(3), META)
    assert checkpoint.steps(tmp_path) == [2, 3]


def test_the_newest_of_several_folders_is_gone_on_from(tmp_path):
    disk, memory = tmp_path / "disk", tmp_path / "memory"
    for folder, number in ((disk, 1), (memory, 2), (disk, 3)):
        checkpoint.save(folder, number, state(number), META)
    restored, step, _ = checkpoint.resume([memory, disk], state(), META, {})
    assert step == 3 and tiny.equal(restored, state(3))
    shutil.rmtree(disk)
    assert checkpoint.resume([disk, memory], state(), META, {})[1] == 2


def test_a_checkpoint_outlives_a_loss_of_power(tmp_path, monkeypatch):
    """When it gets its name, each of its files is on the disk, and afterwards the name is, too."""
    synced = []
    monkeypatch.setattr(checkpoint.files, "sync", lambda path: synced.append(path.relative_to(tmp_path).as_posix()))
    checkpoint.save(tmp_path, 1, state(), META, score=1.0)
    half = "step_00000001.orbax-checkpoint-tmp"
    at = next(i for i, path in enumerate(synced) if path == half)  # the folder, once the fingerprint is in it
    mine = {path.relative_to(tmp_path / "step_00000001").as_posix() for path in (tmp_path / "step_00000001").rglob("*")}
    late = {path for path in mine if path.endswith("commit_success.txt")}  # empty, and nobody reads it
    assert {path.removeprefix(f"{half}/") for path in synced[:at]} >= mine - late - {checkpoint.FINGERPRINT}
    assert synced[-1] == "." and synced.index(".", at) > at


def test_what_is_no_trouble_with_files_is_not_called_that(folder):
    """Orbax knows no arrays of text; nor is a folder made where a file is, and nothing stays silenced after that."""
    hook = sys.unraisablehook
    with pytest.raises(Exception) as caught:
        checkpoint.save(folder, 4, {"x": np.array(["a"])}, META)
    assert not isinstance(caught.value, OSError)
    (folder / "file").write_text("x")
    with pytest.raises(OSError, match="exists|directory"):
        checkpoint.save(folder / "file", 4, state(), META)
    assert not logging.getLogger("absl").filters and sys.unraisablehook is hook
    assert checkpoint.steps(folder) == [3] and not list(folder.glob("*tmp*"))


def test_two_at_once_are_both_silent_until_they_are_closed(tmp_path):
    hook, log = sys.unraisablehook, logging.getLogger("absl")
    first, second = (checkpoint.Checkpoints(tmp_path / name, META) for name in "ab")
    for each in (first, second):
        each.save(1, state())
    first.close()
    assert log.filters and sys.unraisablehook is not hook
    second.close()
    assert not log.filters and sys.unraisablehook is hook
    assert checkpoint.steps(tmp_path / "a") == checkpoint.steps(tmp_path / "b") == [1]


def test_a_run_has_its_own_place_in_memory(tmp_path, monkeypatch):
    """Whatever its folder is called; a copy has another one. Nothing there is taken that is not a folder of one's own,
    and nothing is deleted but checkpoints."""
    monkeypatch.setattr(checkpoint, "MEMORY", tmp_path / "memory")
    run = tmp_path / "run"
    run.mkdir()
    with pytest.raises(ValueError, match="--memory-checkpoints: there is no memory-backed storage here"):
        checkpoint.memory_of(run)
    checkpoint.MEMORY.mkdir()
    place = checkpoint.memory_of(run)
    assert place.parent == checkpoint.MEMORY and not place.exists()
    shutil.copytree(run, tmp_path / "copy")
    assert checkpoint.memory_of(run.rename(tmp_path / "moved")) == place != checkpoint.memory_of(tmp_path / "copy")
    for step in (1, 2):
        checkpoint.save(place, step, state(step), META, score=float(step))
    assert place.stat().st_mode & 0o777 == 0o700
    (place / "mine").write_text("x")
    (tmp_path / "disk").mkdir()
    checkpoint.move(place, tmp_path / "disk")
    assert [path.name for path in place.iterdir()] == ["mine"]
    assert tiny.equal(checkpoint.resume([tmp_path / "disk"], state(), META, {})[0], state(2))
    assert checkpoint.restore_best([tmp_path / "disk"], state(), META, before=2)[1] == 1
    (place / "mine").unlink()
    checkpoint.forget(place)
    assert not place.exists()
    for make in (lambda: place.symlink_to(tmp_path), lambda: place.write_text("x")):
        make()
        with pytest.raises(ValueError, match="must be a folder of one's own; remove it"):
            checkpoint.memory_of(tmp_path / "moved")
        place.unlink()


def test_keys_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="key is a PRNG key"):
        checkpoint.save(tmp_path, 1, {"key": jax.random.key(0)}, {})


def test_a_resumed_run_ends_with_the_same_numbers(tmp_path):
    whole = tiny_run.result()
    log = records.RoundLog(tmp_path / "rounds")
    log.write(0, whole.rounds[0])
    checkpoint.save(tmp_path, 1, whole.states[1], META)
    log.write(1, whole.rounds[0])  # of a round that was not checkpointed: wrong, and to be done again

    run, done = checkpoint.restore(tmp_path, whole.states[0], META)
    log = records.RoundLog(tmp_path / "rounds", done)
    run, metrics = tiny_run.train().update(tiny_run.KEY(), run)
    log.write(done, records.round_arrays(metrics))
    assert tiny.equal(run, whole.states[2])
    resumed = log.stacked()
    for name, array in resumed.items():
        expected = np.stack([arrays[name] for arrays in whole.rounds])
        np.testing.assert_array_equal(array, expected, err_msg=name)
