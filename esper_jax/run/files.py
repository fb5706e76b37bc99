"""Files that are whole or not there: written beside their place, flushed to the disk, then renamed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any


@contextlib.contextmanager
def whole(path: Path, *, binary: bool = False) -> Iterator[IO]:
    """A file to write that is in the end complete, or else what it was before. An OSError names it."""
    work = path.with_name(path.name + ".tmp")
    try:
        with open(work, "wb") if binary else open(work, "w", encoding="utf-8", newline="") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        work.replace(path)
        sync(path.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            work.unlink()


def write_text(path: Path, text: str) -> None:
    with whole(path) as file:
        file.write(text)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """JSON lines."""
    with whole(path) as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")


def sync(path: Path) -> None:
    """Waits until the content of a file, or the names in a folder, would outlive a loss of power."""
    try:
        number = os.open(path, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
    except OSError:
        if not path.is_dir():  # else a system or a file system that does this to files alone
            raise


def sha256(path: Path) -> str:
    """Of a file's content. Raises OSError."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def sha256s(folder: Path) -> dict[str, str]:
    """Of each file in a folder and below it, by its path there; of none if the folder does not exist."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256(path) for path in paths}


def check_free(*paths: Path) -> None:
    """Raises ValueError where a folder is in the place of a file to write."""
    for path in paths:
        if path.is_dir():
            raise ValueError(f"{path}: is a folder, and must be a file or free; move it away")
