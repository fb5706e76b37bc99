"""Programs are compiled before they are needed; a second start finds them, and never those of something else."""

import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import jax
import pytest
import tiny
import tiny_run

from esper_jax.run import compilation, records

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.slow
def test_programs_compiled_ahead_give_the_same_numbers():
    """Those of the same run whose programs are compiled when they are called."""
    first, key = tiny_run.result(), tiny_run.KEY()
    state, metrics = tiny_run.train().update(key, tiny_run.train().init(key))
    assert tiny.equal(state, first.states[1])
    assert tiny.equal(records.round_arrays(metrics), first.rounds[0])


def test_an_error_in_a_later_program_reaches_who_needs_it():
    class Broken(ValueError):
        pass

    def lower(*args):
        raise Broken

    whole, fake = tiny_run.train(), lambda: None
    fake.lower = lower
    whole = whole._replace(programs=whole.programs._replace(learn=fake))
    compiled = compilation.compile_ahead(whole, tiny_run.CONFIG, tiny_run.KEY())
    with pytest.raises(Broken):
        compiled.update(tiny_run.KEY(), tiny_run.result().states[0])


def test_background_work_may_be_taken_before_it_is_done():
    begin = threading.Event()
    done = compilation.background({"a": lambda: begin.wait(9), "b": lambda: 2})
    first, second = done.pop("a"), done.pop("b")
    begin.set()
    assert (first.result(9), second.result(9)) == (True, 2)


def test_background_work_goes_on_after_an_error():
    done = compilation.background({"a": lambda: 1, "b": lambda: 1 / 0, "c": lambda: 3})
    assert (done["a"].result(9), done["c"].result(9)) == (1, 3)
    with pytest.raises(ZeroDivisionError):
        done["b"].result(9)


def test_the_cache_is_the_users_and_the_processors(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    folder = compilation.cache_folder()
    assert folder.parent == Path("/somewhere/esper_jax/programs")
    monkeypatch.setattr(compilation, "_processor", lambda: ["another"])
    assert compilation.cache_folder().parent == folder.parent and compilation.cache_folder() != folder
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert compilation.cache_folder().parent == Path.home() / ".cache/esper_jax/programs"


SECOND_START = textwrap.dedent("""
    import sys
    import jax
    import jax.numpy as jnp
    from pathlib import Path
    from esper_jax.run import compilation
    from esper_jax.network import blueprints

    compilation.keep_programs(Path(sys.argv[1]))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    hits = []
    jax.monitoring.register_event_listener(lambda event, **_: hits.append(event.endswith("/cache_hits")))
    scale = float(sys.argv[2])
    mine = blueprints.Blueprint("mine", lambda c: {}, lambda p, x: scale * x)
    x = jnp.ones((2, 2, 2, 1))
    out = jax.jit(lambda x: mine.apply({}, x))(x)
    print(float(out[0, 0, 0, 0]), sum(hits) > 0)
""")


def test_a_second_start_finds_its_programs_and_no_stale_one(tmp_path):
    """A blueprint of the same name with another forward pass is another program."""

    def start(scale):
        command = [sys.executable, "-W", "error", "-c", SECOND_START, str(tmp_path), scale]
        out = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=True).stdout.split()
        return float(out[0]), out[1] == "True", len([p for p in tmp_path.iterdir() if p.name.endswith("-cache")])

    value, _, kept = start("2")
    assert (value, kept > 0) == (2, True)
    assert start("2") == (2, True, kept), "everything was found"
    assert start("3")[0] == 3


@pytest.fixture
def cache_settings():
    before = {name: getattr(jax.config, name) for name in (
        "jax_compilation_cache_dir", "jax_compilation_cache_max_size", "jax_persistent_cache_min_compile_time_secs",
    )}  # fmt: skip
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_a_cache_that_the_user_named_stays(cache_settings, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    assert compilation.keep_programs(Path("/elsewhere")) is None
    assert jax.config.jax_compilation_cache_dir == str(tmp_path)


@pytest.mark.parametrize("named", [False, True])
def test_without_a_cache_the_run_goes_on(cache_settings, tmp_path, named):
    (tmp_path / "file").touch()
    place = tmp_path / "file" / "programs"
    jax.config.update("jax_compilation_cache_dir", str(place) if named else None)
    said = compilation.keep_programs(tmp_path if named else place)
    assert said == f"compiled programs are not kept for the next start: {place}: Not a directory"
    assert jax.config.jax_compilation_cache_dir is None


def test_who_has_no_home_keeps_no_programs(cache_settings, monkeypatch):
    def no_home():
        raise RuntimeError("no home")

    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert compilation.keep_programs(compilation.cache_folder()).endswith("there is no home folder")
    assert jax.config.jax_compilation_cache_dir is None
