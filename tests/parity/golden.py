"""The reference's own numbers: `$ESPER_GOLDEN`, else `../shared/golden` beside the checkout.

A test asks for a file's cases with `@golden.each_case("gae")` and receives one dict of arrays per case, whose keys
are those of the file without the leading `caseN/`. Without a folder the test is skipped and says so.
"""

import os
import pathlib
from functools import cache

import numpy as np
import pytest

_default = pathlib.Path(__file__).resolve().parents[2].parent / "shared" / "golden"
FOLDER = pathlib.Path(os.environ.get("ESPER_GOLDEN") or _default)


@cache
def cases(name: str) -> dict[str, dict[str, np.ndarray]]:
    """`{case name: {key: array}}` of one file; empty when the file is not there."""
    path = FOLDER / f"{name}.npz"
    if not path.is_file():
        return {}
    out: dict[str, dict[str, np.ndarray]] = {}
    with np.load(path, allow_pickle=False) as archive:
        for key in archive.files:
            case, _, rest = key.partition("/")
            out.setdefault(case, {})[rest] = archive[key]
    # by number; "common", which is no case, comes last
    return dict(sorted(out.items(), key=lambda item: (len(item[0]), item[0])))


def each_case(name: str, where=lambda case: True):
    """Parametrise a test's `case` argument over the cases of a file that satisfy `where`."""
    found = {key: case for key, case in cases(name).items() if where(case)}
    if not found:
        reason = f"no {name}.npz in {FOLDER}" if not cases(name) else f"no such case in {name}.npz"
        return pytest.mark.parametrize("case", [pytest.param(None, marks=pytest.mark.skip(reason=reason))])
    return pytest.mark.parametrize("case", [pytest.param(case, id=key) for key, case in found.items()])


def sub(case: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The entries below a prefix, without it: `sub(case, "param")["blocks.0.conv.weight"]`."""
    return {key[len(prefix) + 1 :]: value for key, value in case.items() if key.startswith(prefix + "/")}
