"""What a start leaves behind so that the next one is quick: compiled programs and generated data, in the user's cache.

    cache = StartupCache(cache_folder(), say)
    value = cache.get("learn", facts)        # None if there is none for just these facts
    cache.put("learn", facts, value)

The files are pickles and machine code, so who can write them can run code as the user: they are read only from a folder
that belongs to the user and that nobody else can enter. Nothing here ever stops a run: a file or a folder that cannot
be used is named in one line, and the value is made anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

# All files together; beyond it those go that were not used for longest.
MOST_BYTES = 2**30
_DIGEST = hashlib.sha256().digest_size


def cache_folder() -> Path:
    """Where the files are kept: `$XDG_CACHE_HOME`, else `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "esper_jax" / "startup"


class StartupCache:
    """Values by name and by the facts they follow from; facts are what JSON can hold."""

    def __init__(self, folder: Path, say: Callable[[str], None] = print):
        """Makes the folder if need be. `say` receives a line about whatever cannot be used."""
        self.folder, self.say = folder, say
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self.usable = _private(folder)
        except OSError as error:
            self.usable = False
            say(f"programs are not kept for the next start: {error}")
        else:
            if not self.usable:
                say(f"programs are not kept for the next start: {folder} is not the user's alone (chmod 700 {folder})")

    def path(self, name: str, facts: Any) -> Path:
        """The file of a value: any difference in the facts is another file."""
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        return self.folder / f"{name}-{digest}"

    def has(self, name: str, facts: Any) -> bool:
        return self.usable and self.path(name, facts).exists()

    def get(self, name: str, facts: Any) -> Any | None:
        """The value that was put there, or None."""
        path = self.path(name, facts)
        if not self.has(name, facts):
            return None
        try:
            content = path.read_bytes()
            if hashlib.sha256(content[_DIGEST:]).digest() != content[:_DIGEST]:
                raise ValueError("damaged")
            value = pickle.loads(memoryview(content)[_DIGEST:])
            os.utime(path)  # used just now
            return value
        except Exception as error:  # a pickle may raise nearly anything
            self.refuse(name, facts, error)
            return None

    def refuse(self, name: str, facts: Any, error: Exception) -> None:
        """Says that a value is of no use; the next `put` replaces it."""
        self.say(f"{self.path(name, facts)}: ignored and made anew ({type(error).__name__}: {error})".split("\n")[0])

    def put(self, name: str, facts: Any, value: Any) -> None:
        """Writes a value; whoever reads finds all of it or none."""
        if not self.usable:
            return
        try:
            content = pickle.dumps(value)
            with tempfile.NamedTemporaryFile(dir=self.folder, prefix=".", delete=False) as file:
                file.write(hashlib.sha256(content).digest())
                file.write(content)
            os.replace(file.name, self.path(name, facts))
            self._drop_oldest()
        except OSError as error:
            self.say(f"{name} is not kept for the next start: {error}")

    def _drop_oldest(self) -> None:
        files = sorted(((path.stat().st_mtime, path) for path in self.folder.iterdir()), reverse=True)
        total = 0
        for _, path in files:
            total += path.stat().st_size
            if total > MOST_BYTES:
                path.unlink(missing_ok=True)


def _private(folder: Path) -> bool:
    """Whether a folder belongs to the user and is closed to everybody else, as far as the system can tell."""
    status = folder.stat()
    return not hasattr(os, "getuid") or (status.st_uid == os.getuid() and not status.st_mode & 0o077)
