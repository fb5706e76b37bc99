"""Checkpoints on disk or in memory-backed storage: the only file that imports Orbax (Esper's Simic).

    with Checkpoints(folder, {"config": ...}) as checkpoints:
        checkpoints.save(step, state, score=...)  # returns at once; the files are written beside what comes next
    state, step = restore(folder, template, {"config": ...})

Orbax's manager writes `step_00000012/`, gives it that name once it is complete, and drops the ones that are neither
new nor good; a process may die at any moment. Beside Orbax's files lies our `fingerprint.json`: path, shape, dtype and
SHA-256 of every leaf, the SHA-256 of every file, and the facts that have to be the same when the state is used again.
Any difference is one `CheckpointError` that names the first path and both values; nothing is ever restored in part.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import logging
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from esper_jax.run import devices, files

FINGERPRINT = "fingerprint.json"
MEMORY = Path("/dev/shm")  # Linux's file system in memory
_NAME = re.compile(r"step_(\d{8})")
_HALF = ".orbax-checkpoint-tmp"  # in the name of what Orbax has not completed
_CANNOT_WRITE = re.compile(r"os_error_code|[Ww]rit|PERMISSION_DENIED|NOT_FOUND|UNAVAILABLE")
_FACTS = {"shape", "dtype", "sha256"}


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, or of something else; the message names the first difference."""


class DamageError(CheckpointError):
    """A checkpoint that is not what was written."""


def named(step: int) -> str:
    return f"step_{step:08d}"


class Checkpoints:
    """A run's checkpoints in a folder, written by Orbax's manager while the run goes on.

    The newest `keep` stay, and the `best` of those with the highest scores.

    Args:
      meta: what JSON can hold and `restore` has to be given again, such as the configuration.
    """

    def __init__(self, folder: str | Path, meta: dict[str, Any], *, keep: int = 2, best: int = 2):
        self.folder, self._meta, self._keep, self._best = Path(folder).absolute(), _plain(meta), keep, best
        self._orbax: Any = None
        self._unsealed: Callable[[], None] | None = None

    def save(
        self,
        step: int,
        state: Any,
        *,
        score: float | None = None,
        about: dict[str, Any] | None = None,
        beside: dict[str, str] | None = None,
    ) -> None:
        """Begins to write a state, once the one before is written.

        Args:
          state: any tree of arrays but typed PRNG keys (raises CheckpointError): a run derives its keys from its seed.
          score: the higher, the longer it is kept; without one, or if it is not finite, only as long as it is new.
          about: what else is to be found with it, see `about`.
          beside: SHA-256 of files that it counts with, by name, see `resume`.

        Raises OSError naming the folder if this one, or the one before, cannot be written, such as on a full disk;
        what was there stays.
        """
        arrays = _arrays(jax.device_get(_checked(state)))
        score = float(score) if score is not None and math.isfinite(score) else None
        extra = {"about": _plain(about or {}), "beside": dict(beside or {}), "score": score}
        with self._writing():
            import orbax.checkpoint as ocp  # slow to import: not before a checkpoint is asked for

            self._open()
            self.wait()
            if step in self._orbax.all_steps():
                self._orbax.delete(step)
            self._unsealed = functools.partial(_seal, self.folder, step, arrays, self._meta, extra)
            self._orbax.save(
                step,
                args=ocp.args.Composite(state=ocp.args.StandardSave(_storable(arrays))),
                metrics=None if score is None else {"score": score},
                force=True,
            )

    def wait(self) -> None:
        """Until all is written. Raises OSError as `save` does."""
        if self._orbax is not None:
            with self._writing():
                self._orbax.wait_until_finished()
                files.sync(self.folder)
                self._unsealed = None  # it holds a state

    def close(self) -> None:
        """Waits. Raises OSError as `save` does."""
        try:
            self.wait()
        finally:
            self._forget()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind, error, trace) -> None:
        with contextlib.suppress(OSError) if error is not None else contextlib.nullcontext():
            self.close()

    def _open(self) -> None:
        if self._orbax is not None:
            return
        import orbax.checkpoint as ocp
        from orbax.checkpoint import checkpoint_managers as policies

        score = lambda metrics: metrics["score"]
        best = policies.BestN(get_metric_fn=score, n=self._best, keep_checkpoints_without_metrics=False)
        options = ocp.CheckpointManagerOptions(
            step_prefix="step",
            step_format_fixed_length=8,
            best_fn=score,
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(self._keep), best]),
            async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
            cleanup_tmp_directories=True,
            create=False,
            multiprocessing_options=_by_itself(ocp),
        )
        self.folder.mkdir(mode=0o700 if self.folder.parent == MEMORY else 0o777, parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            stack.enter_context(_one_voice())
            self._orbax = ocp.CheckpointManager(self.folder, options=options, item_names=("state",))
            self._quiet = stack.pop_all()

    def _seal(self) -> None:
        if self._unsealed is not None:
            self._unsealed()

    def _forget(self) -> None:
        orbax, self._orbax, self._unsealed = self._orbax, None, None
        if orbax is not None:
            with self._quiet, contextlib.suppress(Exception):  # what went wrong has been raised
                orbax.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Makes one OSError of what Orbax raises where it cannot write, and leaves nothing half-written."""
        try:
            yield
        except Exception as error:  # TensorStore has a ValueError for everything, Orbax wraps it in its own
            time.sleep(0.3)  # the other writers of this checkpoint find out that nobody waits for them
            self._forget()
            for half in self.folder.glob(f"step_*{_HALF}*"):
                shutil.rmtree(half, ignore_errors=True)
            cause, full = _os_error(error), "No space left" in str(error) or "RESOURCE_EXHAUSTED" in str(error)
            if not (cause or full or _CANNOT_WRITE.search(str(error))):
                raise
            number = errno.ENOSPC if full else (cause and cause.errno) or errno.EIO
            reason = os.strerror(number) if full else (cause and cause.strerror) or str(error)
            raise OSError(number, reason, str(self.folder)) from error


@contextlib.contextmanager
def _one_voice() -> Iterator[None]:
    """Orbax logs with tracebacks, and its threads cry out, about what is raised here in one line."""
    silence, log = lambda record: False, logging.getLogger("absl")
    log.addFilter(silence)
    hook = _hooks[0] if _hooks else sys.unraisablehook
    _hooks.append(hook)
    sys.unraisablehook = lambda seen: None if "Event loop is closed" in str(seen.exc_value) else hook(seen)
    try:
        yield
    finally:
        log.removeFilter(silence)
        if len(_hooks) == 1:
            sys.unraisablehook = hook
        _hooks.pop()


_hooks: list[Callable[[Any], Any]] = []  # what the first open manager found, once for each that is open


def _by_itself(ocp: Any) -> Any:
    """What tells Orbax that this process waits for no other one."""
    if not devices.several():
        return ocp.options.MultiprocessingOptions()
    mine = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=mine, active_processes={mine}, barrier_sync_key_prefix=f"process{mine}"
    )


def _os_error(error: BaseException | None) -> OSError | None:
    """The system's own error behind one that wraps it."""
    while error is not None and not (isinstance(error, OSError) and error.errno):
        error = error.__cause__ or error.__context__
    return error


def _seal(folder: Path, step: int, arrays: dict[str, np.ndarray], meta: dict[str, Any], extra: dict[str, Any]) -> None:
    """Lays the fingerprint into a checkpoint that Orbax has written and not named yet; in a thread of Orbax's."""
    place = next(folder.glob(f"{named(step)}{_HALF}*"), folder / named(step))
    for path in sorted(place.rglob("*")):
        files.sync(path)
    leaves = {path: _facts(leaf) for path, leaf in arrays.items()}
    known = {"step": step, "meta": meta, "leaves": leaves, "files": files.sha256s(place / "state")}
    files.write_json(place / FINGERPRINT, known | extra)


def save(folder: str | Path, step: int, state: Any, meta: dict[str, Any], **extra: Any) -> Path:
    """Writes one state and waits for it; arguments and errors are those of `Checkpoints`. Returns its folder."""
    with Checkpoints(folder, meta) as checkpoints:
        checkpoints.save(step, state, **extra)
    return Path(folder).absolute() / named(step)


def resume(
    folders: Sequence[str | Path], template: Any, meta: dict[str, Any], beside: dict[str, str]
) -> tuple[Any, int, list[tuple[Path, str]]]:
    """The newest checkpoint in some folders that is whole, its step, and those that are not, with what is wrong.

    Args:
      beside: SHA-256 of the files that checkpoints count with, as they are now.

    Raises CheckpointError if none is whole, or one is whole and of something else.
    """
    damaged: list[tuple[Path, str]] = []
    whole: tuple[Any, int] | None = None
    for step, place in sorted(_found(folders), reverse=True):
        try:
            known = _fingerprint(place)
            for file, digest in known["beside"].items():
                if beside.get(file) != digest:
                    what = "is not what was written" if file in beside else "is missing"
                    raise DamageError(f"the round file {file}, which {place.name} counts with, {what}")
            if whole is None:
                whole = _restore(place, template, meta), step
            else:  # it may be needed yet, and Orbax's manager trusts what it finds
                _check_files(place)
                _compare(place, "", known["meta"], _plain(meta))
        except DamageError as error:
            damaged.append((place, str(error)))
    if whole is not None:
        return *whole, damaged
    if damaged:
        why = f"{damaged[0][1]}; no other checkpoint is whole"
        raise CheckpointError(f"{why}: put back what it was, or start the run again in another folder")
    raise CheckpointError(f"{Path(folders[0]).absolute()}: a checkpoint is not there (steps there: none)")


def restore_best(
    folders: Sequence[str | Path], template: Any, meta: dict[str, Any], *, before: int
) -> tuple[Any, int] | None:
    """The state with the highest score among those in some folders before a step, and its step; None if there is none
    that is whole. Nothing may be written there meanwhile."""
    scored: list[tuple[float, int, Path]] = []
    for step, place in _found(folders):
        with contextlib.suppress(CheckpointError):
            if step < before and (score := _fingerprint(place)["score"]) is not None:
                scored.append((score, step, place))
    for _, step, place in sorted(scored, reverse=True):
        with contextlib.suppress(CheckpointError):
            return _restore(place, template, meta), step
    return None


def _found(folders: Sequence[str | Path]) -> list[tuple[int, Path]]:
    """Steps and places of the complete checkpoints in some folders."""
    places = [Path(folder).absolute() for folder in folders]
    return [(step, place / named(step)) for place in places for step in steps(place)]


def set_aside(damaged: list[tuple[Path, str]]) -> list[str]:
    """Renames damaged checkpoints to `damaged_...`: a line about each."""
    said = []
    for place, why in damaged:
        aside = place.rename(_free(place.with_name(f"damaged_{place.name}")))
        said.append(f"{place.name} is damaged ({why}): kept as {aside.name}, and another one is gone on from")
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
            return _fingerprint(Path(folder) / named(step))["about"] or None
    return None


def memory_of(run: Path) -> Path:
    """The folder in memory-backed storage that belongs to the folder of a run, by whatever name, and to no copy of it.

    Raises ValueError if there is no such storage, or something else has that name.
    """
    if not os.access(MEMORY, os.W_OK | os.X_OK):
        raise ValueError(f"--memory-checkpoints: there is no memory-backed storage here ({MEMORY})")
    facts = run.stat()
    place = MEMORY / f"esper_jax-{facts.st_dev:x}-{facts.st_ino:x}"
    if os.path.lexists(place) and (place.is_symlink() or not place.is_dir() or place.stat().st_uid != os.getuid()):
        raise ValueError(f"--memory-checkpoints: {place}: must be a folder of one's own; remove it")
    return place


def move(source: Path, target: Path) -> None:
    """Moves all checkpoints from one folder to another, and removes the first one if nothing else is in it."""
    for step in steps(source):
        final = target / named(step)
        if not final.exists():
            half = target / f"{named(step)}{_HALF}"
            shutil.rmtree(half, ignore_errors=True)
            shutil.copytree(source / named(step), half)
            for path in sorted(half.rglob("*")):
                files.sync(path)
            half.rename(final)
            files.sync(target)
    forget(source)


def forget(folder: Path) -> None:
    """Deletes the checkpoints in a folder, and the folder if nothing else is in it."""
    for step in steps(folder):
        shutil.rmtree(folder / named(step), ignore_errors=True)
    for half in folder.glob(f"step_*{_HALF}*"):
        shutil.rmtree(half, ignore_errors=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


def steps(folder: str | Path) -> list[int]:
    """Steps of the complete checkpoints in a folder, oldest first."""
    there = os.listdir(folder) if os.path.isdir(folder) else []
    return sorted(int(match[1]) for each in there if (match := _NAME.fullmatch(each)))


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
        return _restore(folder / named(step), template, meta), step
    return _restore(folder / named(known[-1]), template, meta), known[-1]


def _restore(place: Path, template: Any, meta: dict[str, Any]) -> Any:
    known = _fingerprint(place)
    recorded = known["leaves"]
    _compare(place, "", known["meta"], _plain(meta))
    wanted = _leaves(template)
    shapes = {path: {"shape": list(leaf.shape), "dtype": str(leaf.dtype)} for path, leaf in wanted.items()}
    _compare(place, "", {path: {"shape": f["shape"], "dtype": f["dtype"]} for path, f in recorded.items()}, shapes)
    _check_files(place)

    blank = {path: np.zeros(leaf.shape, leaf.dtype) for path, leaf in wanted.items()}
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer(multiprocessing_options=_by_itself(ocp)) as checkpointer:
        read = checkpointer.restore(place / "state", _storable(blank))
    leaves = []
    for number, (path, like) in enumerate(wanted.items()):
        leaf = np.asarray(read.get(_key(number), blank[path]))
        if _facts(leaf) != recorded[path]:
            raise DamageError(f"{place}: {path} is not what was saved: its content has changed")
        sharding = getattr(like, "sharding", None)
        leaves.append(devices.put(leaf, sharding) if sharding is not None else jax.numpy.asarray(leaf))
    return jax.tree.unflatten(jax.tree.structure(template), leaves)


def _check_files(place: Path) -> None:
    """Raises DamageError unless a checkpoint's files are those that were written: Orbax itself reads a damaged folder
    in part, or never comes back, and its manager fails at a score that is no number."""
    known = _fingerprint(place)
    then, now = known["files"], files.sha256s(place / "state")
    for file in [*then, *now]:
        if then.get(file) != now.get(file):
            raise DamageError(f"{place / 'state' / file}: is damaged, missing, or does not belong here")
    metrics = place / "metrics" / "metrics"
    try:
        score = json.loads(metrics.read_text(encoding="utf-8")) if metrics.parent.exists() else None
    except (OSError, ValueError, RecursionError):
        score = "damaged"
    if score != (None if known["score"] is None else {"score": known["score"]}):
        raise DamageError(f"{metrics}: is damaged, missing, or does not belong here")


def _fingerprint(place: Path) -> dict[str, Any]:
    """What `_seal` wrote: leaves, files, meta, about, beside, score. Raises DamageError."""
    path = place / FINGERPRINT
    try:
        known = {"about": {}, "beside": {}, "score": None} | json.loads(path.read_text(encoding="utf-8"))
        if named(known.setdefault("step", int(_NAME.fullmatch(place.name)[1]))) != place.name:
            raise ValueError(f"it is that of step {known['step']}")
        fine = all(isinstance(known[part], dict) for part in ("leaves", "files", "meta", "about", "beside"))
        if not (fine and all(set(leaf) == _FACTS for leaf in known["leaves"].values())):
            raise ValueError("it is not what was written")
        if not isinstance(known["score"], float | None):
            raise ValueError("its score is not a number")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamageError(f"{path}: cannot be read: {error}") from None
    return known


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
