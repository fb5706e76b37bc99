"""The numbers of one `smoke` run, pinned: an accidental change of behaviour shows here.

Floating-point sums differ between jax versions, platforms and the vector instructions of a CPU, so there is one number
per combination; an unknown combination is skipped. After an intended change: `python tests/test_frozen.py --renew`.
"""

import functools
import hashlib
import json
import os
import pathlib
import sys

import jax
import numpy as np
import pytest

from esper_jax import make_train, presets

PINNED = pathlib.Path(__file__).with_name("frozen.json")


def combination() -> str:
    """jax version, platform, widest vector extension and cores of this machine (threads split sums)."""
    try:
        flags = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        flags = ""
    vector = next((name for name in ("avx512f", "avx2", "asimd") if name in flags), "other")
    return f"jax {jax.__version__} {jax.default_backend()} {vector}, {os.cpu_count()} cores"


@functools.cache
def digest() -> str:
    """Hash of everything that the rounds and one comparison of the `smoke` preset measure, on one device."""
    cfg = presets.get("smoke").replace(devices=1, **{"data.name": "shapes"})
    train = make_train(cfg)
    key = jax.random.key(cfg.seed)
    run = train.init(key)
    measured = []
    for _ in range(cfg.rounds):
        run, metrics = train.update(key, run)
        measured.append(metrics)
    measured.append(train.compare(key, run, "eager"))
    out = hashlib.sha256()
    for leaf in jax.tree.leaves(measured):
        out.update(np.ascontiguousarray(leaf).tobytes())
    return out.hexdigest()[:16]


def test_smoke_run_is_frozen():
    pinned = json.loads(PINNED.read_text())
    if combination() not in pinned:
        pytest.skip(f"nothing pinned for {combination()}; pin it with: python tests/test_frozen.py --renew")
    assert digest() == pinned[combination()], "the smoke run's numbers changed; if intended, renew them (see above)"


if __name__ == "__main__" and "--renew" in sys.argv:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 4)  # as in conftest.py
    table = json.loads(PINNED.read_text())
    table[combination()] = digest()
    PINNED.write_text(json.dumps(dict(sorted(table.items())), indent=2) + "\n")
    print(combination(), table[combination()])
