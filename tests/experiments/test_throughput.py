"""The throughput benchmark: what it counts, how it measures, and that its tables come out."""

import dataclasses
import importlib.util
import io
import json
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from esper_jax.config import HostConfig
from esper_jax.env import host_training
from esper_jax.network import model as networks
from esper_jax.types import BLUEPRINTS, Stage
from experiments.throughput import bench, roofline, tables

HOST = HostConfig(n_blocks=2, base_channels=4, pool_layers=2)
IMAGE = {"channels": 3, "classes": 10, "itemsize": 4}


@pytest.fixture(scope="module")
def tiny():
    return bench.make_bench(tables.SIZES["tiny"])


def test_work_of_the_host_counted_by_hand():
    # block 1, 3 -> 4 channels on 8x8: y = 4 * 64 = 256 elements, 2 * 9 * 3 * 256 = 13,824 FLOPs
    # block 2, 4 -> 8 channels on 4x4: y = 8 * 16 = 128 elements, 2 * 9 * 4 * 128 = 9,216; read-out 2 * 8 * 10 = 160
    # elements x + 2y + z: 192 + 512 + 64 = 768 and 64 + 256 + 32 = 352; the read-out reads 8 * 2 * 2 = 32
    forward = roofline.total(roofline.host(HOST, 8, **IMAGE, train=False))
    assert forward == (13_824 + 9_216 + 160, 4 * (768 + 352 + 32))
    # training: block 1 needs no gradient by the images, so 2 products, the others 3;
    # backward adds 2 (y + 2z) + x, and dx but for block 1: 2 * 384 + 192 = 960 and 2 * 192 + 64 + 64 = 512
    train = roofline.total(roofline.host(HOST, 8, **IMAGE, train=True))
    assert train == (2 * 13_824 + 3 * 9_216 + 3 * 160, 4 * (768 + 960 + 352 + 512 + 96))


def test_work_of_the_seeds_counted_by_hand():
    assert roofline.slot_sizes(HOST, 8) == [(4, 4), (8, 2)]
    # conv_light, 4 channels on 4x4: 2 * 9 * 4 * 4 * 16 = 4,608 FLOPs, three times in training; 64 elements five times
    assert roofline.conv_seed(4, 4, depth=1, itemsize=2, train=True) == (3 * 4_608, 2 * 5 * 64)
    assert roofline.conv_seed(4, 4, depth=2, itemsize=4, train=False) == (2 * 4_608, 4 * 2 * 64)


def test_least_time_takes_the_tighter_limit_layer_by_layer():
    layers = [roofline.Work(10, 1), roofline.Work(1, 10)]
    # 10 / 10 against 1 / 5, then 1 / 10 against 10 / 5
    assert roofline.least_seconds(layers, flops_per_s=10, bytes_per_s=5) == pytest.approx(1 + 2)


def test_counts_agree_with_the_compiler(tiny):
    rows = {r.name: r.value for r in tables.roofline_table(tiny)}
    # the compiler counts normalisation and pooling too, but no less than the matrix products
    for kind in ("train", "forward"):
        ratio = rows[f"{kind}_compiler_flops"] / rows[f"{kind}_counted_flops"]
        assert 1 <= ratio < 2
        assert rows[f"{kind}_compiler_bytes"] > rows[f"{kind}_counted_bytes"]
    assert rows["train_gflops"] == pytest.approx(rows["train_images_per_s"] * rows["train_counted_flops"] / 1e9)
    assert rows["train_share_of_roofline"] == pytest.approx(
        rows["train_images_per_s"] / rows["train_roofline_images_per_s"]
    )


def test_runs_alternate_and_the_first_round_does_not_count():
    order = []
    runs = {name: lambda name=name: order.append(name) or float(len(order)) for name in "AB"}
    times = bench.interleaved(runs, repeats=3, seconds=60)
    assert "".join(order) == "ABABABAB"
    np.testing.assert_array_equal(times["A"], [3, 5, 7])  # a float is a run's own measurement
    np.testing.assert_array_equal(times["B"], [4, 6, 8])


def test_long_comparisons_stop_after_the_least_number_of_runs():
    times = bench.interleaved({"A": lambda: time.sleep(0.002)}, repeats=50, seconds=0)
    assert len(times["A"]) == bench.LEAST_RUNS
    assert (times["A"] >= 0.002).all()


def test_row_is_median_and_distance_between_quartiles():
    # quartiles of 1, 2, 3, 4 by linear interpolation: 1.75 and 3.25
    assert bench.row("table", "name", [4, 1, 3, 2], "s") == ("table", "name", 2.5, "s", 4, 1.5)
    assert bench.row("table", "name", 7, "s") == ("table", "name", 7.0, "s", 1, 0.0)


def test_grown_environments_hold_the_seeds_they_were_given(tiny):
    state = bench.grown(
        tiny, [["conv_light", "norm"]] * 2, [[Stage.BLENDING, Stage.DORMANT], [Stage.TRAINING, Stage.FOSSILIZED]]
    )
    light, norm = BLUEPRINTS.index("conv_light"), BLUEPRINTS.index("norm")
    np.testing.assert_array_equal(state.slots.blueprint, [[light, -1], [light, norm]])
    np.testing.assert_array_equal(state.slots.alpha.alpha, [[0.5, 0], [0, 1]])
    live = jax.vmap(networks.live_slots)(state.model, state.slots)
    np.testing.assert_array_equal(live, [[True, False], [False, True]])
    # conv_light at 4 channels: a kernel of 9 * 4 * 4 = 144 within 1/sqrt(36), 4 ones, 4 zeros
    params = np.asarray(state.model.seeds[0].params[0])
    assert 0 < np.abs(params[:144]).max() <= 1 / 6
    np.testing.assert_array_equal(params[144:], [1] * 4 + [0] * 4)


def test_mixture_is_the_same_every_time(tiny):
    first, second = (bench.mixture(tiny, 8).slots for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)
    assert len(np.unique(first.stage)) > 2


def test_bare_host_trains_like_one_whose_slots_are_empty(tiny):
    cfg = tiny.cfg.training
    state = jax.tree.map(lambda leaf: leaf[0], bench.empty(tiny, 1))
    x, labels = bench.fetch_plain(tiny.dataset, jnp.arange(cfg.batch_size))
    step = jax.jit(lambda model, opt, slots: host_training.train_batch(model, opt, slots, x, labels, cfg))
    alone, momentum, no_slots = bench.bare(state)
    assert not alone.seeds and no_slots.stage.size == 0
    model, optimiser = state.model, state.optimiser
    for _ in range(2):
        alone, momentum, _, measured = step(alone, momentum, no_slots)
        model, optimiser, _, metrics = step(model, optimiser, state.slots)
        np.testing.assert_allclose(measured["loss"], metrics["loss"], rtol=1e-6)
        assert measured["correct"] == metrics["correct"]
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    jax.tree.map(close, alone.host, model.host)
    jax.tree.map(close, momentum.host, optimiser.host)


def test_incumbent_without_torch_is_a_row_that_says_so(tiny, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else find(name))
    (only,) = tables.incumbent_table(tiny)
    assert only.value is None and only.n == 0 and only.unit.startswith("not measured")
    screen = io.StringIO()
    shown = tables.show(Console(file=screen, force_terminal=True, width=120), "PyTorch", iter([only]))
    assert shown == [only] and "PyTorch" in screen.getvalue() and "not measured" in screen.getvalue()


def _report(tmp_path, names):
    out = tmp_path / "numbers.json"
    tables.main("tiny", out, names)
    report = json.loads(out.read_text())
    assert set(report) == {"device", "jax", "rows"}
    assert report["jax"] == jax.__version__
    assert report["device"].startswith(f"{jax.device_count()} x CPU") and report["device"].endswith("float32")
    for r in report["rows"]:
        assert set(r) == {"table", "name", "value", "unit", "n", "spread"}
        if r["value"] is not None:
            assert math.isfinite(r["value"]) and r["n"] >= 1
            assert r["value"] >= 0 or r["name"] == "bfloat16_minus_float32"
    return {r["name"]: r for r in report["rows"]}


def test_a_language_model_counts_tokens(tiny, monkeypatch):
    """Times of a second each: E environments x batches x B windows x L tokens of training, W x L of validation."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(bench.Bench, "measure", lambda self, runs: dict.fromkeys(runs, np.ones(1)))
    found = {r.name: r.value for r in tables.text_table(tiny)}
    assert found["width_8_bare_train_tokens_per_s"] == 4 * 2 * 2 * 8
    assert found["width_8_S3_forward_tokens_per_s"] == 2 * 64 * 8
    assert found["width_8_mlp_3_over_bare"] == found["width_8_fused_8_over_forward"] == 1
    assert found["width_8_bare_train_over_torch_eager"] is None


def test_tables_are_printed_and_saved(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tables, "make_bench", lambda size: tiny)  # what it has compiled serves again
    rows = _report(tmp_path, ("growth",))
    assert {"slots_empty_over_bare", "conv_light_1_over_bare", "conv_light_2_over_predicted"} <= set(rows)
    assert rows["slots_empty_over_bare"]["n"] == 1
    # seeds only add work
    assert rows["conv_light_2_predicted"]["value"] > 1
    printed = capsys.readouterr().out
    assert f"jax {jax.__version__}" in printed and "growth  slots_empty_over_bare" in printed


@pytest.mark.slow
def test_all_tables(tmp_path):
    rows = _report(tmp_path, ())
    needed = {"slots_empty_over_bare", "fused_4_over_forward", "outside_host_share"}
    assert needed | {"bare_train_images_per_s", "mixed_env_epochs_per_s"} <= set(rows)
    best = max(r["value"] for name, r in rows.items() if name.startswith("E") and name.endswith("train_images_per_s"))
    assert rows["bare_train_images_per_s"]["value"] == best


def test_bad_options_are_told_before_anything_is_measured(tmp_path):
    with pytest.raises(SystemExit, match="--repeats 0: must be at least 1"):
        tables.main("tiny", repeats=0)
    with pytest.raises(SystemExit, match="missing is not a folder"):
        tables.main("tiny", tmp_path / "missing" / "numbers.json")


def test_presets_measure_what_the_goals_name():
    for name in ("cpu", "gpu"):
        size = tables.SIZES[name]
        assert 3 in size.slot_counts  # fused_8_over_forward
        assert {"conv_light", "conv_heavy"} <= set(size.cfg.lifecycle.blueprints)
        t = size.cfg.training
        assert (t.batches_per_epoch, t.batch_size, size.cfg.data.validation_size, size.image_size) == (
            24,
            512,
            2500,
            32,
        )
        assert dataclasses.replace(size, repeats=1).repeats == 1
    assert max(tables.SIZES["gpu"].populations) == 1024
