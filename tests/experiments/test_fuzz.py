"""Whatever is wrong with what a person gives a command, it ends in success or in one line, and leaves everything as it
was: options, run cards, checkpoints, files of rounds, data, texts and scripts, changed at random.

`--plan` goes the way of a run as far as nothing is written.
"""

import contextlib
import hashlib
import io
import json
import os
import shutil
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest
from cifar_files import make_records, python_files, write_binary, write_python
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from esper_jax.run import checkpoint, compilation, devices, job, options, provenance, records
from experiments import cifar, text

few = settings(
    max_examples=int(os.environ.get("ESPER_FUZZ", 12)),
    derandomize="ESPER_FUZZ" not in os.environ,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)
DIGITS = ("--preset", "smoke", "--data", "digits", "--lifecycle.blueprints", "norm", "--devices", "1")
LOOKED_FOR = {"--data", "--data-dir", "--data.name", "--data.data-dir", "--resume", "--plan", "--out", "--script"}


@pytest.fixture(autouse=True, scope="module")
def command_in_this_process():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compilation, "keep_programs", lambda folder: None)
        patch.setattr(devices, "use_cpus", lambda asked: None)
        before = jax.config.jax_include_full_tracebacks_in_locations
        yield
        jax.config.update("jax_include_full_tracebacks_in_locations", before)


@contextlib.contextmanager
def folder():
    """A new one, in which the command works."""
    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
        yield Path(name)


def tree(place):
    """Every path below a folder, with the hash of what is there."""
    content = lambda path: hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
    return {path.relative_to(place).as_posix(): content(path) for path in sorted(place.rglob("*"))}


def check(main, argv, place, named):
    """Calls a command; what must hold whatever it was given. Returns its one line, if it refused, which has to name
    what is wrong."""
    before, out, err = tree(place), io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([*argv, "--plan", "--quiet"])
    lines = err.getvalue().splitlines()
    assert code in (0, 2), (code, lines)
    assert len(lines) == (code == 2) and all(line.startswith("error: ") for line in lines), lines
    assert "Traceback" not in out.getvalue() + err.getvalue()
    assert tree(place) == before
    assert all(named in line for line in lines), lines
    return lines[0] if lines else None


WORDS = st.one_of(
    st.integers().map(str),
    st.sampled_from([0, 1, 2, 3, 7, 2**31 - 1, 2**31, 2**63, 2**64, -1]).map(str),
    st.floats().map(repr),
    st.sampled_from(
        ["", "none", "None", "true", "norm", "1e400", "1e-46", "0x10", "1_000", "１", "-", "--", "=", "nan"]
    ),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=6),
)


@few
@given(st.data())
def test_options(data):
    names = sorted(set(options.table(cifar.Options)) - LOOKED_FOR)
    words = []
    for name in data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=3)):
        words += [name, *data.draw(st.lists(WORDS, max_size=2))]
    with folder() as place:
        check(cifar.main, [*DIGITS, *words], place, "--")


def run_folder(place):
    """A run of two rounds, as far as files are concerned."""
    card_of = provenance.run_card
    chosen = cifar.parse([*DIGITS, "--rounds", "3"])
    cfg = chosen.config.replace(devices=1)
    dataset = job.data.load(cfg.data)
    train, key = job.make_train(cfg, dataset), jax.random.key(cfg.seed)
    card = {"status": "running", "command": "x", "preset": "smoke", "arms": [], "script": None, "added": []}
    card |= card_of(cfg, dataset) | {"parts": []}
    meta = {"config": provenance.computed(cfg), "data": provenance.digest(dataset.identity)}
    log, state = records.RoundLog(place / "checkpoints" / "rounds"), train.init(key)
    with checkpoint.Checkpoints(place / "checkpoints", meta) as checkpoints:
        for number in range(2):
            zeros = np.full(2, number, np.int32)
            log.write(number, {"learner/updates_done": zeros + 1, "learner/nonfinite_updates": zeros})
            state = state.replace(round=state.round + 1)
            checkpoints.save(number + 1, state, score=float(number), about=card, beside=log.known)
    (place / "run.json").write_text(json.dumps(card, indent=1))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    place = tmp_path_factory.mktemp("whole") / "run"
    place.mkdir()
    run_folder(place)
    with contextlib.chdir(place.parent):
        assert check(cifar.main, ["--resume", "run"], place.parent, "run") is None
    return place


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)


def places(value, path=()):
    """Every path into a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in items:
        yield from places(inner, (*path, name))


def changed(data, value):
    """A JSON value with one of its parts replaced, or dropped."""
    path = data.draw(st.sampled_from(list(places(value))))
    if not path:
        return data.draw(JSON)
    value = json.loads(json.dumps(value))
    inner = value
    for name in path[:-1]:
        inner = inner[name]
    if data.draw(st.booleans()):
        inner[path[-1]] = data.draw(JSON)
    else:
        del inner[path[-1]]
    return value


@few
@given(st.data())
def test_run_cards(whole, data):
    card = json.loads((whole / "run.json").read_text())
    with folder() as place:
        shutil.copytree(whole, place / "run")
        if data.draw(st.booleans()):  # without it the card would be rebuilt
            shutil.rmtree(place / "run" / "checkpoints")
        (place / "run" / "run.json").write_text(json.dumps(changed(data, card)))
        check(cifar.main, ["--resume", "run"], place, "run")


@few
@given(st.data())
def test_files_of_a_run(whole, data):
    with folder() as place:
        shutil.copytree(whole, place / "run")
        for _ in range(data.draw(st.integers(1, 3))):
            damage(data, place / "run")
        check(cifar.main, ["--resume", "run"], place, "run")


def damage(data, place):
    """Does something to one of the files below a folder, or to a folder."""
    paths = sorted(path for path in place.rglob("*"))
    assume(paths)
    path = data.draw(st.sampled_from(paths))
    other = data.draw(st.sampled_from(paths))
    kinds = ["remove", "replace", "swap"] + ["cut", "flip", "append", "json"] * path.is_file()
    kind = data.draw(st.sampled_from(kinds))
    if kind in ("remove", "replace"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        if kind == "replace":  # of a file by a folder, and of a folder by a file
            path.write_text("x") if data.draw(st.booleans()) else path.mkdir()
    elif kind == "swap":
        if other.is_file() and path.is_file():
            shutil.copy(other, path) if other != path else None
    else:
        content = path.read_bytes()
        at = data.draw(st.integers(0, max(0, len(content) - 1)))
        if kind == "json":
            with contextlib.suppress(ValueError):
                path.write_text(json.dumps(changed(data, json.loads(content))))
        elif kind == "cut":
            path.write_bytes(content[:at])
        elif kind == "flip":
            path.write_bytes(
                content[:at]
                + bytes([content[at] ^ 1 << data.draw(st.integers(0, 7))] if content else [])
                + content[at + 1 :]
            )
        else:
            path.write_bytes(content + data.draw(st.binary(max_size=8)))


@few
@given(st.data())
def test_pictures(data):
    made = make_records()
    with folder() as place:
        if data.draw(st.booleans()):
            write_binary(place / "pictures", made)
        else:
            write_python(place / "pictures", python_files(made))
        for _ in range(data.draw(st.integers(1, 2))):
            damage(data, place / "pictures")
        shape = ["--data.validation-size", "5", "--training.batch-size", "8"]
        shape += ["--data.train-limit", "16", "--data.test-limit", "4"]
        words = ["--preset", "smoke", "--data", "cifar10", "--data-dir", "pictures", *DIGITS[4:], *shape]
        check(cifar.main, words, place, "pictures")


@few
@given(st.binary(max_size=40), st.integers(0, 60), st.sampled_from(["characters", "bpe"]))
def test_texts(content, times, tokens):
    with folder() as place:
        (place / "story").write_bytes(content * times)
        sizes = ["--data.tokens", tokens, "--data.window", "8", "--devices", "1", "--lifecycle.blueprints", "norm"]
        check(text.main, ["--preset", "smoke", "--text", "story", *sizes], place, "story")


LINES = st.lists(
    st.one_of(
        st.sampled_from(["0:", "3:", "-1:", "99999999999999999999:", ":", "wait", "germinate", "prune", "fossilize"]),
        st.sampled_from(
            ["slot=0", "slot=9", "slot=", "slot=r0c0", "blueprint=norm", "blueprint=x", "=", "#", "\n", "\n"]
        ),
        st.text(max_size=4),
    ),
    max_size=12,
)


@few
@given(LINES)
def test_scripts(words):
    with folder() as place:
        (place / "script").write_bytes(" ".join(words).encode("utf-8", "surrogatepass"))
        check(cifar.main, [*DIGITS, "--script", "script"], place, "script")
