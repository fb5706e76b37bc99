"""Checkpoints on disk or in memory-backed storage: the only file that imports Orbax (Esper's Simic).

    save(folder, step, state, {"config": ...})
    state, step = restore(folder, template, {"config": ...})

A folder holds `step_00000012/` with Orbax's files in `state/` and our `fingerprint.json` beside them: path, shape,
dtype and SHA-256 of every leaf, the SHA-256 of every file, and the facts that have to be the same when the state is
used again. Any difference is one `CheckpointError` that names the first path and both values; nothing is ever restored
in part. A checkpoint gets its name only once it is complete, so a process may die at any moment.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

FINGERPRINT = "fingerprint.json"
_NAME = re.compile(r"step_(\d{8})")
_FACTS = {"shape", "dtype", "sha256"}


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, or of something else; the message names the first difference."""


class DamageError(CheckpointError):
    """A checkpoint that is not what was written."""


def save(
    folder: str | Path,
    step: int,
    state: Any,
    meta: dict[str, Any],
    *,
    keep: int = 2,
    about: dict[str, Any] | None = None,
    beside: dict[str, str | None] | None = None,
) -> Path:
    """Writes a state, then drops all but the newest `keep` checkpoints. Returns the checkpoint's folder.

    Args:
      state: any tree of arrays but typed PRNG keys (raises CheckpointError): a run derives its keys from its seed.
      meta: what JSON can hold and `restore` has to be given again, such as the configuration.
      about: what else is to be found with it, see `about`.
      beside: SHA-256 of files that it counts with, by name, see `resume`.

    Raises OSError naming `folder` if it cannot be written, such as on a full disk; what was there stays.
    """
    arrays = _arrays(jax.device_get(_checked(state)))
    with _writing(folder):
        extra = {"about": _plain(about or {}), "beside": beside or {}}
        return _save(Path(folder).absolute(), step, arrays, _plain(meta), keep, extra)


@contextlib.contextmanager
def _writing(folder: str | Path) -> Iterator[None]:
    """Makes one OSError of whatever Orbax raises that cannot write; what it would log of each thread says no more."""
    log = logging.getLogger("absl")
    before = log.disabled, sys.unraisablehook
    log.disabled, sys.unraisablehook = True, lambda unraisable: None
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(folder)) from error
    except Exception as error:  # TensorStore has a ValueError for everything, Orbax wraps it in its own
        full = "No space left" in str(error) or "RESOURCE_EXHAUSTED" in str(error)
        number = errno.ENOSPC if full else errno.EIO
        time.sleep(0.3)  # its other writers find out that nobody waits for them
        raise OSError(number, os.strerror(number) if full else str(error), str(folder)) from error
    finally:
        log.disabled, sys.unraisablehook = before


def _save(
    folder: Path, step: int, arrays: dict[str, np.ndarray], meta: dict[str, Any], keep: int, extra: dict[str, Any]
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    final, work = folder / f"step_{step:08d}", folder / f".writing_{step:08d}"
    for leftover in folder.glob(".writing_*"):
        shutil.rmtree(leftover)
    try:
        work.mkdir()
        if _storable(arrays):
            with _orbax() as checkpointer:
                checkpointer.save(work / "state", _storable(arrays))
                checkpointer.wait_until_finished()
        leaves = {path: _facts(leaf) for path, leaf in arrays.items()}
        fingerprint = {"meta": meta, "leaves": leaves, "files": _files(work / "state")} | extra
        with open(work / FINGERPRINT, "w") as file:
            json.dump(fingerprint, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    if final.exists():
        _drop(final)
    work.rename(final)
    _sync(folder)
    for old in steps(folder)[:-keep]:
        _drop(folder / f"step_{old:08d}")
    return final


def _sync(folder: Path) -> None:
    """Names of files outlive a loss of power once their folder is on the disk."""
    with contextlib.suppress(OSError, AttributeError):  # a system whose folders cannot be opened
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def resume(
    folder: str | Path,
    template: Any,
    meta: dict[str, Any],
    hashes: Callable[[dict[str, Any]], dict[str, str | None]],
) -> tuple[Any, int, list[tuple[Path, str]]]:
    """The newest checkpoint that is whole, its step, and each newer one that is not, with what is wrong with it.

    Args:
      hashes: SHA-256 of the files that a checkpoint counts with as they are now, given what `save` knew of them.

    Raises CheckpointError if none is whole, or the newest whole one is of something else.
    """
    folder = Path(folder).absolute()
    damaged: list[tuple[Path, str]] = []
    for step in reversed(steps(folder)):
        place = folder / f"step_{step:08d}"
        try:
            _, _, _, extra = _fingerprint(place / FINGERPRINT)
            now = hashes(extra["beside"])
            for name, digest in extra["beside"].items():
                if now.get(name) != digest:
                    what = "is missing" if now.get(name) is None else "is not what was written"
                    raise DamageError(f"{name}, which {place.name} counts with, {what}")
            state = _restore(place, template, meta)
        except DamageError as error:
            damaged.append((place, str(error)))
            continue
        return state, step, damaged
    if damaged:
        raise CheckpointError(f"{damaged[0][1]}; no older checkpoint is whole: start the run again in another folder")
    raise CheckpointError(f"{folder}: a checkpoint is not there (steps there: none)")


def set_aside(damaged: list[tuple[Path, str]]) -> list[str]:
    """Renames damaged checkpoints to `damaged_...`: a line about each."""
    said = []
    for place, why in damaged:
        aside = place.rename(_free(place.with_name(f"damaged_{place.name}")))
        said.append(f"{place.name} is damaged ({why}): kept as {aside.name}, and an older one is gone on from")
    return said


def _free(path: Path) -> Path:
    """The path, or with a number behind it."""
    number = 1
    while (free := path if number == 1 else path.with_name(f"{path.name}-{number}")).exists():
        number += 1
    return free


def about(folder: str | Path) -> dict[str, Any] | None:
    """What the newest readable checkpoint was saved `about`; None if there is none."""
    for step in reversed(steps(folder)):
        with contextlib.suppress(CheckpointError):
            return _fingerprint(Path(folder) / f"step_{step:08d}" / FINGERPRINT)[3]["about"] or None
    return None


def _drop(checkpoint: Path) -> None:
    """Deletes a checkpoint, which loses its name first: half of one must not be taken for a whole one."""
    doomed = checkpoint.rename(checkpoint.with_name(f".writing_{checkpoint.name}"))
    shutil.rmtree(doomed)


def steps(folder: str | Path) -> list[int]:
    """Steps of the complete checkpoints in a folder, oldest first."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return sorted(int(match[1]) for name in names if (match := _NAME.fullmatch(name)))


def restore(folder: str | Path, template: Any, meta: dict[str, Any], *, step: int | None = None) -> tuple[Any, int]:
    """Reads a state back: by default the newest one, whatever it counts with beside it (see `resume`).

    Args:
      template: a tree of arrays or `jax.ShapeDtypeStruct`s; leaves are put where its leaves are (`sharding`), if they
        are anywhere.
      meta: must equal what the state was saved with.

    Raises CheckpointError at the first difference in step, meta, path, shape, dtype or content.
    """
    folder = Path(folder).absolute()
    known = steps(folder)
    if not known or (step is not None and step not in known):
        wanted = "a checkpoint" if step is None else f"step {step}"
        raise CheckpointError(f"{folder}: {wanted} is not there (steps there: {', '.join(map(str, known)) or 'none'})")
    if step is not None:
        return _restore(folder / f"step_{step:08d}", template, meta), step
    return _restore(folder / f"step_{known[-1]:08d}", template, meta), known[-1]


def _restore(place: Path, template: Any, meta: dict[str, Any]) -> Any:
    recorded, files, then, _ = _fingerprint(place / FINGERPRINT)
    _compare(place, "", then, _plain(meta))
    wanted = _leaves(template)
    shapes = {path: {"shape": list(leaf.shape), "dtype": str(leaf.dtype)} for path, leaf in wanted.items()}
    _compare(place, "", {path: {"shape": f["shape"], "dtype": f["dtype"]} for path, f in recorded.items()}, shapes)

    present = _files(place / "state")
    for name in [*files, *present]:  # Orbax itself reads a damaged folder in part, or never comes back
        if files.get(name) != present.get(name):
            raise DamageError(f"{place / 'state' / name}: is damaged, missing, or does not belong here")

    blank = {path: np.zeros(leaf.shape, leaf.dtype) for path, leaf in wanted.items()}
    with _orbax() as checkpointer:
        read = checkpointer.restore(place / "state", _storable(blank)) if present else {}
    leaves = []
    for number, (path, like) in enumerate(wanted.items()):
        leaf = np.asarray(read.get(_key(number), blank[path]))
        if _facts(leaf) != recorded[path]:
            raise DamageError(f"{place}: {path} is not what was saved: its content has changed")
        sharding = getattr(like, "sharding", None)
        leaves.append(jax.device_put(leaf, sharding) if sharding is not None else jax.numpy.asarray(leaf))
    return jax.tree.unflatten(jax.tree.structure(template), leaves)


def _fingerprint(path: Path) -> tuple[dict[str, Any], dict[str, str], Any, dict[str, Any]]:
    """Leaves, files and meta as `save` wrote them, and `about` and `beside`. Raises DamageError."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        leaves, files, meta = (stored[name] for name in ("leaves", "files", "meta"))
        if not (
            isinstance(files, dict) and isinstance(meta, dict) and all(set(leaf) == _FACTS for leaf in leaves.values())
        ):
            raise ValueError("it is not what was written")
        extra = {name: stored.get(name, {}) for name in ("about", "beside")}
        if not all(isinstance(value, dict) for value in extra.values()):
            raise ValueError("it is not what was written")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamageError(f"{path}: cannot be read: {error}") from None
    return leaves, files, meta, extra


def _orbax():
    import orbax.checkpoint  # slow to import: not before a checkpoint is asked for

    return orbax.checkpoint.StandardCheckpointer()


def _key(number: int) -> str:
    return f"{number:05d}"


def _storable(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Numbered leaves, so that no tree type or path has to be known to Orbax; it refuses arrays without elements."""
    return {_key(number): leaf for number, leaf in enumerate(arrays.values()) if leaf.size}


def _leaves(tree: Any) -> dict[str, Any]:
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in flat}


def _arrays(tree: Any) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in _leaves(tree).items()}


def _checked(state: Any) -> Any:
    for path, leaf in _leaves(state).items():
        if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise CheckpointError(f"{path} is a PRNG key: a run is a function of its seed, so keys are never stored")
    return state


def _facts(leaf: np.ndarray) -> dict[str, Any]:
    digest = hashlib.sha256(np.ascontiguousarray(leaf).tobytes()).hexdigest()
    return {"shape": list(leaf.shape), "dtype": str(leaf.dtype), "sha256": digest}


def _files(folder: Path) -> dict[str, str]:
    """SHA-256 of each file in a folder; none if it does not exist."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def _plain(meta: dict[str, Any]) -> dict[str, Any]:
    """As JSON gives it back, so that a tuple equals the list that it becomes."""
    return json.loads(json.dumps(meta))


def _compare(place: Path, path: str, stored: Any, given: Any) -> None:
    """Raises CheckpointError at the first difference of two JSON values."""
    if isinstance(stored, dict) and isinstance(given, dict):
        for name in [*stored, *(name for name in given if name not in stored)]:
            inner = f"{path}.{name}" if path else name
            if name not in given:
                raise CheckpointError(f"{place}: {inner} is in the checkpoint but not in what it is restored into")
            if name not in stored:
                raise CheckpointError(f"{place}: {inner} is not in the checkpoint")
            _compare(place, inner, stored[name], given[name])
    elif stored != given:
        raise CheckpointError(f"{place}: {path} is {stored!r} in the checkpoint but {given!r} here")
