"""The folder of a run: a name that no other run has, and one process at a time at work in it."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # not a Unix: nothing keeps two processes apart
    fcntl = None  # type: ignore[assignment]  # a module or nothing: no type says that

LOCK = "lock"


@contextlib.contextmanager
def new(path: Path, *, named: bool) -> Iterator[Path]:
    """A new folder, locked, or an empty one; removed at the end if nothing was written there.

    Args:
      named: whether somebody chose this name: it is then taken or refused. Otherwise the next free one of `path`,
        `path-2`, `path-3`, ... is taken, also if others do the same at this moment.
    """
    made = [parent for parent in reversed(path.parents) if not os.path.exists(parent)]  # nor if it could not be
    for number in itertools.count(1):
        folder = path if number == 1 else path.with_name(f"{path.name}-{number}")
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            if named and folder.is_dir():
                _check_empty(folder)
                break
            folder.mkdir()
            made.append(folder)
            break
        except OSError as error:
            if not os.path.exists(folder) or named:
                raise _refusal(folder, error) from error
    try:
        with locked(folder):
            if named:  # somebody may have been faster
                _check_empty(folder)
            yield folder
    finally:
        for place in reversed(made):
            with contextlib.suppress(OSError):  # not empty: a run lives there
                place.rmdir()


def _check_empty(folder: Path) -> None:
    if any(path.name != LOCK for path in folder.iterdir()):
        raise FileExistsError(f"--out {folder}: is not empty; choose another folder, or go on with --resume {folder}")


def _refusal(folder: Path, error: OSError) -> OSError:
    """An error that says what --out should be; one that says so itself is left as it is."""
    if error.errno is None:
        return error
    return OSError(f"--out {folder}: must be a folder that is empty or can be made ({error.strerror})")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other processes out of a folder. Raises BlockingIOError, with the number of the process that is in it.

    The file in the folder names the process; the lock on that file is the system's, which ends with its owner however
    that one dies.
    """
    path = folder / LOCK
    with contextlib.ExitStack() as stack:
        while True:
            try:
                file = stack.enter_context(open(path, "a+"))
            except OSError as error:
                raise OSError(f"{folder}: must be a folder that can be written to ({error.strerror})") from error
            if not _lock(file):
                file.seek(0)
                owner = file.read().strip() or "another"
                raise BlockingIOError(f"{folder}: process {owner} is at work in this run; wait until it has ended")
            if _is_at(file, path):
                break  # else its owner has removed it since it was opened
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                path.unlink()


def _lock(file: IO[str]) -> bool:
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # a file system that knows no locks
            pass
    return True


def _is_at(file: IO[str], path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    return False
