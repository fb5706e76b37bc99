"""A second start: programs come from the cache, do the same, and are never those of something else."""

import os
import stat
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
import tiny_run

from esper_jax import compilation, make_train, telemetry
from esper_jax.control import baselines
from esper_jax.startup_cache import StartupCache, cache_folder

FACTS = {"source": "abc", "devices": 2}
PROGRAMS = ("rollout", "pay", "learn", "report", "keys")


@pytest.fixture
def said():
    return []


@pytest.fixture
def cache(tmp_path, said):
    return StartupCache(tmp_path / "cache", said.append)


def start(train, cache):
    with tiny_run.unoptimised():
        return compilation.compile_ahead(train, tiny_run.CONFIG, tiny_run.KEY(), cache=cache)


def test_a_second_start_traces_nothing_and_gives_the_same_numbers():
    first, key = tiny_run.result(), tiny_run.KEY()
    untraceable = tiny_run.train()._replace(**dict.fromkeys(PROGRAMS), start=None, init=None)
    again = start(untraceable, tiny_run.cache())
    with tiny_run.unoptimised():
        compilation.first_run(tiny_run.train(), tiny_run.CONFIG, key, tiny_run.cache())
        state = compilation.first_run(untraceable, tiny_run.CONFIG, key, tiny_run.cache())
    assert tiny.equal(state, first.states[0])
    for number in range(tiny_run.CONFIG.rounds):
        state, metrics = again.update(key, state)
        assert tiny.equal(state, first.states[number + 1])
        for name, array in telemetry.round_arrays(metrics).items():
            np.testing.assert_array_equal(array, first.rounds[number][name], err_msg=name)
    arms = telemetry.arm_arrays(again.compare(key, state, tiny_run.ARMS))
    for name, array in arms.items():
        np.testing.assert_array_equal(array, first.metrics[name], err_msg=name)


def test_a_program_that_cannot_be_loaded_is_compiled_anew(said):
    first, kept = tiny_run.result(), tiny_run.cache()
    cache = StartupCache(kept.folder, said.append)
    with tiny_run.unoptimised():
        facts = compilation.program_facts(tiny_run.train(), tiny_run.CONFIG, None)
    assert cache.has("keys", facts)
    cache.put("keys", facts, (b"no program", None, None))
    untraceable = tiny_run.train()._replace(**dict.fromkeys(PROGRAMS[:-1]))
    again = start(untraceable, cache)
    assert len(said) == 1 and "keys-" in said[0] and "made anew" in said[0]
    assert tiny.equal(again.update(tiny_run.KEY(), first.states[0])[0], first.states[1])
    said.clear()
    start(untraceable._replace(keys=None), cache)
    assert not said, "it was replaced"


def test_whatever_decides_a_program_decides_its_file(monkeypatch, cache):
    cfg, dataset = tiny_run.CONFIG, tiny.dataset()
    facts = lambda cfg=cfg, dataset=dataset, rules=(), script=None: compilation.program_facts(
        make_train(cfg, dataset, dict.fromkeys(rules, baselines.never())), cfg, script
    )
    path = lambda *args, **kwargs: cache.path("learn", facts(*args, **kwargs))
    assert path() == path() == path(cfg.replace(rounds=7, report_envs=4))
    paths = {
        path(),
        path(cfg.replace(**{"training.host_lr": 0.5})),
        path(cfg.replace(n_envs=4)),
        path(cfg.replace(devices=2)),
        path(cfg.replace(policy_seeds=3)),
        path(cfg.replace(**{"reward.mode": "shaped"})),
        path(dataset=dataset.replace(augment=not dataset.augment)),
        path(dataset=dataset.replace(mean=(0.25,) * len(dataset.mean))),
        path(dataset=dataset.replace(test=jax.tree.map(lambda leaf: leaf[:-1], dataset.test))),
        path(rules=("other",)),
        path(rules=("script",)),
        path(rules=("script",), script="3: wait"),
    }
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=")
    paths.add(path())
    with tiny_run.unoptimised():
        paths.add(path())
    monkeypatch.setattr(compilation, "source", lambda: "edited")
    paths.add(path())
    monkeypatch.setattr(compilation, "processor", lambda: ["another"])
    paths.add(path())
    assert len(paths) == 16


def test_every_source_file_counts(tmp_path):
    (tmp_path / "inner").mkdir()
    file = tmp_path / "inner" / "a.py"
    file.write_text("x = 1\n")
    hashes = [compilation.source(tmp_path)]
    file.write_text("x = 2\n")
    hashes.append(compilation.source(tmp_path))
    file.rename(tmp_path / "inner" / "b.py")
    hashes.append(compilation.source(tmp_path))
    (tmp_path / "inner" / "notes.txt").write_text("no program")
    assert len(set(hashes)) == 3 and compilation.source(tmp_path) == hashes[-1]


def test_values_come_back(cache, said):
    assert cache.get("x", FACTS) is None and not cache.has("x", FACTS)
    cache.put("x", FACTS, np.arange(3))
    assert cache.has("x", FACTS) and cache.get("x", FACTS).tolist() == [0, 1, 2]
    assert cache.get("x", FACTS | {"devices": 3}) is None and cache.get("y", FACTS) is None
    assert not said and [path.name[:2] for path in cache.folder.iterdir()] == ["x-"], "nothing half-written is left"


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b[:-1] + bytes([b[-1] ^ 1]), lambda b: b""])
def test_a_damaged_file_is_ignored_and_replaced(cache, said, damage):
    cache.put("x", FACTS, "value")
    path = cache.path("x", FACTS)
    path.write_bytes(damage(path.read_bytes()))
    assert cache.get("x", FACTS) is None and len(said) == 1 and str(path) in said[0]
    cache.put("x", FACTS, "value")
    assert cache.get("x", FACTS) == "value" and len(said) == 1


def test_only_a_private_folder_is_used(tmp_path, monkeypatch, said):
    folder = tmp_path / "cache"
    cache = StartupCache(folder, said.append)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    cache.put("x", FACTS, "value")
    assert stat.S_IMODE(cache.path("x", FACTS).stat().st_mode) == 0o600
    folder.chmod(0o750)
    for open_folder in (True, False):
        if not open_folder:
            folder.chmod(0o700)
            monkeypatch.setattr(os, "getuid", lambda: 12_345)
        refused = StartupCache(folder, said.append)
        assert refused.get("x", FACTS) is None and not refused.has("x", FACTS)
        refused.put("y", FACTS, "value")
        assert len(said) == 1 and "is not the user's alone" in said.pop()
    assert len(list(folder.iterdir())) == 1


def test_no_place_is_no_error(tmp_path, said):
    (tmp_path / "file").write_text("")
    cache = StartupCache(tmp_path / "file" / "cache", said.append)
    cache.put("x", FACTS, "value")
    assert cache.get("x", FACTS) is None and len(said) == 1


def test_what_was_not_used_for_longest_goes_first(cache, monkeypatch):
    monkeypatch.setattr("esper_jax.startup_cache.MOST_BYTES", 2500)
    for number, name in enumerate("abc"):
        cache.put(name, FACTS, bytes(1000))
        os.utime(cache.path(name, FACTS), (number, number))
        if name == "b":
            assert cache.get("a", FACTS)
    assert [cache.has(name, FACTS) for name in "abc"] == [True, False, True]


def test_the_folder_is_where_the_user_says(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/esper_jax/startup")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache/esper_jax/startup"
