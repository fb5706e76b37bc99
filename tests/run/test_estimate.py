"""What a run will ask for: operations counted from what was traced, bytes from shapes, and what cannot fit refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from jax import lax

from esper_jax import data, presets
from esper_jax.config import Config
from esper_jax.run import compilation, devices, estimate

GB = 10**9


def count(function, *args, pick=min):
    return estimate.flops(jax.make_jaxpr(function)(*args).jaxpr, pick)


def test_operations_are_counted():
    a, b = jnp.ones((3, 5, 7)), jnp.ones((3, 7, 2))
    assert count(lambda a, b: jax.nn.relu(a @ b) + 1, a, b) == 2 * 3 * 5 * 7 * 2
    # 2 images of 4x4, 3 channels, 6 filters of 3x3: each of 2 * 4 * 4 * 6 outputs is a sum of 27 products
    x, kernel = jnp.ones((2, 4, 4, 3)), jnp.ones((3, 3, 3, 6))
    convolve = lambda x, k: lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    assert count(convolve, x, kernel) == 2 * (2 * 4 * 4 * 6) * 27
    # two groups: half of the channels each
    grouped = lambda x, k: lax.conv_general_dilated(
        x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=3
    )
    assert count(grouped, x, jnp.ones((3, 3, 1, 6))) == 2 * (2 * 4 * 4 * 6) * 9


def test_scans_count_as_often_as_they_run_and_of_a_choice_one_branch():
    m = jnp.ones((4, 4))
    product = 2 * 4**3
    scan = lambda m: lax.scan(lambda c, _: (c @ m, None), m, None, length=6)[0]
    assert count(scan, m) == 6 * product
    assert count(lambda m: lax.map(lambda r: m @ m, jnp.arange(5)), m) == 5 * product
    choice = lambda i, m: lax.switch(i, [lambda m: m, lambda m: m @ m, lambda m: m @ m @ m], m)
    assert [count(choice, 0, m, pick=pick) for pick in (min, max)] == [0, 2 * product]
    assert count(jax.jit(jax.vmap(lambda v: m @ v)), m) == product  # inside of a compiled function


def test_the_tiny_run_takes_what_it_takes():
    """Bytes of the arrays that a round is written as, and of those on the device, are the real ones."""
    result, cfg = tiny_run.result(), tiny_run.CONFIG
    template = compilation.run_template(tiny_run.train(), cfg, tiny_run.KEY())
    found = estimate.of(tiny_run.train(), cfg, template, tiny_run.KEY())
    written = sum(array.nbytes for name, array in result.rounds[0].items() if name.startswith("rounds/"))
    # 7 rows of arms in 8 environments are played in blocks of 3 rows: 3 blocks
    rows = jax.eval_shape(tiny_run.train().programs.rollout, *episodes(template))
    assert found.host_bytes == 2 * 2 * written + 2 * 3 * estimate.nbytes(rows[0])
    device = estimate.nbytes(rows) + estimate.nbytes((tiny_run.train().dataset, result.states[0]))
    assert found.device_bytes == device
    again = estimate.of(tiny_run.train(), cfg, template, tiny_run.KEY(), done=1)
    assert again.flops / found.flops == pytest.approx(4 / 5)  # of 2 rounds and 3 blocks
    assert found.seconds == found.flops / estimate.CPU_FLOPS
    assert str(found).startswith("rollouts a second or two, memory ") and " MB of results" in str(found)


def episodes(template):
    train = tiny_run.train()
    key = jax.eval_shape(train.programs.keys, tiny_run.KEY(), template.round)[0]
    return train.dataset, template, key, compilation.round_of(tiny_run.CONFIG, train.controllers)


def test_what_cannot_fit_is_refused(monkeypatch):
    template = compilation.run_template(tiny_run.train(), tiny_run.CONFIG, tiny_run.KEY())
    many = tiny_run.CONFIG.replace(rounds=10**6)
    monkeypatch.setattr(devices, "host_memory", lambda: 1 * GB)
    with pytest.raises(
        ValueError, match=r"all rounds and of the comparison would take [\d.]+ GB, .* has 1.0 GB: fewer"
    ):
        estimate.of(tiny_run.train(), many, template, tiny_run.KEY())
    monkeypatch.setattr(devices, "host_memory", lambda: None)  # nobody knows
    estimate.of(tiny_run.train(), many, template, tiny_run.KEY())

    # 65,536 environments, 2 rows, 25 epochs, of more than 4 bytes of features
    monkeypatch.setattr(devices, "host_memory", lambda: 65_536 * 2 * 25 * 4)
    with pytest.raises(ValueError, match="the episodes of a round would take"):
        estimate.check_counts(Config().replace(n_envs=65_536), 5)
    with pytest.raises(ValueError, match="the episodes of the comparison would take"):
        estimate.check_counts(Config().replace(report_envs=65_536), 5)
    estimate.check_counts(Config(), 5)


def test_a_program_that_does_not_fit_into_a_device_is_refused(monkeypatch):
    """A program's arguments, results and temporaries; on a CPU nothing is known of its memory."""
    program = jax.jit(lambda x: (x @ x.T).sum(1)).lower(jnp.ones((1000, 10))).compile()
    # 10,000 and 1,000 numbers, and the product of 1,000,000 unless it is fused away
    assert 44_000 <= compilation.program_bytes(program) <= 44_000 + 3 * 4_000_000
    devices.check_memory(10 * GB, "rollout")
    monkeypatch.setattr(devices, "device_memory", lambda: 40 * GB)
    devices.check_memory(39 * GB, "rollout")
    with pytest.raises(MemoryError, match="rollout needs 157.0 GB on each device, which has 40.0 GB"):
        devices.check_memory(157 * GB, "rollout")
    monkeypatch.setattr(devices, "device_memory", lambda: 1000)
    with pytest.raises(MemoryError, match="(keys|rollout) needs .* on each device, which has 0.0 MB"):
        compilation.compile_ahead(tiny_run.train(), tiny_run.CONFIG, tiny_run.KEY())


@pytest.mark.parametrize(
    ("files", "bytes_"),
    [
        ({}, None),
        ({"proc/meminfo": "MemFree: 3 kB\nMemTotal:       2000 kB\n"}, 2_048_000),
        ({"proc/meminfo": "MemTotal: 2000 kB\n", "sys/fs/cgroup/memory.max": "max\n"}, 2_048_000),
        ({"proc/meminfo": "MemTotal: 2000 kB\n", "sys/fs/cgroup/memory.max": "1000\n"}, 1000),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/memory.max": "500"}, 500),
        ({"sys/fs/cgroup/memory/memory.limit_in_bytes": "700"}, 700),
        ({"proc/meminfo": "nonsense"}, None),
    ],
)
def test_memory_is_what_may_be_used(tmp_path, files, bytes_):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    assert devices.host_memory(tmp_path) == bytes_


def products(cfg, channels):
    """Of the convolutions and the read-out, per image: 2 p k k c d for k x k from c to d channels at p positions."""
    side, total = cfg.data.image_size or (8 if cfg.data.name == "digits" else 32), 0
    for block, width in enumerate(cfg.host.widths):
        total += 2 * side**2 * cfg.host.kernel_size**2 * channels * width
        side, channels = side // 2 if block < cfg.host.pool_layers else side, width
    return total + 2 * channels * 10


@pytest.mark.parametrize(
    "preset, name, channels", [("smoke", "digits", 1), ("full", "digits", 1), ("full", "shapes", 3)]
)
def test_work_of_training(preset, name, channels):
    """XLA counts what lies beyond a border less, and adds what norms, activations and pooling take."""
    cfg = presets.get(preset, name)
    images = cfg.training.batch_size * cfg.training.batches_per_epoch
    host, seeds = estimate.work(cfg, data.load(cfg.data))
    assert 0.9 * products(cfg, channels) < host / (3 * images) < 1.3 * products(cfg, channels)
    names = cfg.lifecycle.catalog
    assert seeds.shape == (len(cfg.host.slot_names), len(names))
    of = lambda kind: seeds[:, names.index(kind)]
    assert (0 < of("norm")).all() and (of("norm") < of("conv_light")).all()
    if preset == "full":
        assert (of("conv_small") < of("conv_light")).all() and (of("conv_light") < of("conv_heavy")).all()
    else:  # conv_light: 3x3 at 4x4 with 2 channels and at 2x2 with 4
        light = 2 * 9 * np.array([16 * 2 * 2, 4 * 4 * 4])
        assert (0.5 * light < of("conv_light") / (3 * images)).all() and (
            of("conv_light") / (3 * images) < 1.5 * light
        ).all()
        assert not of("conv_heavy").any()  # not offered


def test_work_of_text():
    cfg = presets.text("smoke")
    host, seeds = estimate.work(cfg, data.load(cfg.data))
    wide, narrow = (seeds[0, cfg.lifecycle.catalog.index(name)] for name in ("mlp", "lora"))
    assert host > wide > narrow > 0
