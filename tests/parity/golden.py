"""The reference's own numbers: `$ESPER_GOLDEN`, else `../shared/golden` beside the checkout, else the part of them in
`golden/`, which `reduce` chose.

A test asks for a file's cases with `@golden.each_case("gae")` and receives one dict of arrays per case, whose keys
are those of the file without the leading `caseN/`. Without a file the test is skipped and says so. Sizes, names and
numbers of cases are the file's: a test reads them off its case. `close` compares and remembers the error for `report`.
"""

import io
import json
import lzma
import os
import pathlib
from functools import cache
from typing import NamedTuple

import numpy as np
import pytest

_committed = pathlib.Path(__file__).resolve().parent / "golden"
_whole = pathlib.Path(__file__).resolve().parents[2].parent / "shared" / "golden"
FOLDER = pathlib.Path(os.environ.get("ESPER_GOLDEN") or (_whole if _whole.is_dir() else _committed))
REDUCED = FOLDER.resolve() == _committed  # of large results, elements that are not kept are NaN there


class Case(dict):
    """The arrays of one case by key, and where they are from."""

    def __init__(self, file: str, name: str):
        super().__init__()
        self.file, self.name = file, name


def read(file: str) -> dict[str, np.ndarray]:
    """The arrays of an archive by key, whole or as `reduce` packed it; empty when it is not there."""
    whole, packed = FOLDER / f"{file}.npz", FOLDER / f"{file}.npy.xz"
    if whole.is_file():
        with np.load(whole, allow_pickle=False) as archive:
            return dict(archive)
    if not packed.is_file():
        return {}
    with io.BytesIO(lzma.decompress(packed.read_bytes())) as stream:
        arrays = {str(key): np.load(stream) for key in np.load(stream)}
    sixteenths = lambda key, values: (
        (key[:-3], values.astype(np.float32) / 16) if key.endswith("*16") else (key, values)
    )
    return dict(sixteenths(key, values) for key, values in arrays.items())


@cache
def cases(file: str) -> dict[str, Case]:
    """The cases of one archive by name, and "common" where cases share something; empty when it is not there."""
    out: dict[str, Case] = {}
    for key, values in read(file).items():
        name, _, rest = key.partition("/")
        out.setdefault(name, Case(file, name))[rest] = values
    # by number
    return dict(sorted(out.items(), key=lambda item: (len(item[0]), item[0])))


def _parametrise(found: dict[str, Case], reason: str):
    if not found:
        return pytest.mark.parametrize("case", [pytest.param(None, marks=pytest.mark.skip(reason=reason))])
    return pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in found.items()])


def each_case(file: str, where=lambda case: True):
    """Parametrise a test's `case` argument over the cases of a file that satisfy `where`; skipped without any."""
    found = {name: case for name, case in cases(file).items() if where(case)}
    return _parametrise(found, f"no such case in {file}.npz" if cases(file) else f"no {file}.npz in {FOLDER}")


def each_blueprint(topology: str):
    """The same over the blueprints of a topology in the small table."""
    path, found = FOLDER / "blueprint_table.json", {}
    if path.is_file():
        for name, row in json.loads(path.read_text())[topology]["blueprints"].items():
            found[name] = Case(path.stem, f"{topology} {name}")
            found[name].update(row)
    return _parametrise(found, f"no {path.name} in {FOLDER}")


def sub(case: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The entries below a prefix, without it: `sub(case, "param")["blocks.0.conv.weight"]`."""
    return {key[len(prefix) + 1 :]: value for key, value in case.items() if key.startswith(prefix + "/")}


# --- comparison ------------------------------------------------------------------------------------------------------


class Error(NamedTuple):
    """The element of a comparison that came nearest to its tolerance."""

    share: float  # of the tolerance
    error: float
    tolerance: float
    what: str


compared_case: Case | None = None  # of the test that is running; conftest sets it
_errors: dict[tuple[str, str], Error] = {}  # the largest share of every case


def close(actual, expected, what: str, *, rtol: float = 0.0, atol: float = 0.0) -> None:
    """Every element within `atol + rtol |expected|`, equal without either; NaN and infinities at the same places."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    if compared_case is not None:
        _remember(actual, expected, what, rtol, atol)
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=atol, err_msg=what)


def _remember(actual, expected, what, rtol, atol):
    with np.errstate(invalid="ignore", over="ignore"):
        error = np.nan_to_num(np.abs(actual - expected), nan=0.0, posinf=np.inf).ravel()
        tolerance = np.broadcast_to(atol + rtol * np.abs(expected), np.shape(actual - expected)).ravel()
        share = np.divide(error, tolerance, out=np.where(error > 0, np.inf, 0.0), where=tolerance > 0)
    if error.size == 0:
        return
    worst = np.argmax(share)
    new = Error(share[worst], error[worst], tolerance[worst], what)
    key = (compared_case.file, compared_case.name)
    _errors[key] = max(_errors.get(key, new), new)


def report() -> str:
    """The largest error of every case in the folder, relative to its tolerance, as a table; 0 of 0 is exact."""
    files = sorted(path.name.partition(".")[0] for path in FOLDER.glob("*.np*"))
    names = [(file, name) for file in files for name in cases(file) if name != "common"]
    names += [key for key in _errors if key not in names]
    lines = ["| file | case | error | tolerance | share | of |", "|---|---|---|---|---|---|"]
    for file, name in names:
        row = "- | - | - | not compared"
        if (file, name) in _errors:
            share, error, tolerance, what = _errors[file, name]
            row = f"{error:.1e} | {tolerance:.1e} | {share:.3f} | {what}"
        lines.append(f"| {file} | {name} | {row} |")
    return "\n".join(lines) + "\n"
