"""As many CPU devices as the process may use CPUs."""

import os

import jax
import pytest

from esper_jax.run import devices

V2, V1 = "sys/fs/cgroup/cpu.max", "sys/fs/cgroup/cpu"


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({}, 8),
        ({V2: "max 100000"}, 8),
        ({V2: "150000 100000"}, 2),
        ({V2: "10000 100000"}, 1),
        ({V2: "nonsense"}, 8),
        ({V2: "1600000 100000"}, 8),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "300000 100000"}, 3),
        ({f"{V1}/cpu.cfs_quota_us": "250000", f"{V1}/cpu.cfs_period_us": "100000"}, 3),
        ({f"{V1}/cpu.cfs_quota_us": "-1", f"{V1}/cpu.cfs_period_us": "100000"}, 8),
    ],
)
def test_cpus_are_those_that_may_be_used(tmp_path, monkeypatch, files, cpus):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    assert devices.usable_cpus(tmp_path) == cpus
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    assert devices.usable_cpus(tmp_path) == 1


def test_a_message_says_which_devices_there_are(monkeypatch):
    for there, said in (
        (3, "at most 3, the devices there are"),
        (devices.MOST_CPU_DEVICES, "at most 256, the most that"),
    ):
        monkeypatch.setattr(jax, "device_count", lambda there=there: there)
        with pytest.raises(ValueError, match=f"Config.devices = 1000: must be {said}"):
            devices.make_mesh(1000)


def test_more_devices_than_cpus_are_made_if_asked_for(monkeypatch):
    made = []
    monkeypatch.setattr(jax.config, "update", lambda name, value: made.append((name, value)))
    monkeypatch.setattr(devices, "usable_cpus", lambda: 4)
    monkeypatch.delenv("JAX_NUM_CPU_DEVICES", raising=False)
    for asked in (0, 2, 6, 10**9):
        devices.use_cpus(asked)
    assert made == [("jax_num_cpu_devices", n) for n in (4, 4, 6, devices.MOST_CPU_DEVICES)]
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "3")  # JAX itself reads it
    devices.use_cpus(6)
    assert len(made) == 4
