"""What a number came from: versions, device, data and source of a run, for its run card."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax

from esper_jax.config import Config, completed
from esper_jax.data import AnyDataset
from esper_jax.presets import PRESETS
from esper_jax.run import checkpoint

PACKAGE = Path(__file__).parent.parent
PACKAGES = ("esper_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
# What makes JAX compute on a GPU, where it is installed.
PLUGINS = tuple(f"jax-cuda{version}-{part}" for version in (12, 13) for part in ("plugin", "pjrt"))
# How long a run goes on and where: the configuration that may differ between a run and its continuation.
NOT_COMPUTED = ("rounds", "report_envs", "devices")


def versions() -> dict[str, str | None]:
    """Versions of what computes; None for a package without metadata (a source tree that was not installed)."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    for plugin in PLUGINS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[plugin] = importlib.metadata.version(plugin)
    return found


def device(cfg: Config) -> dict[str, Any]:
    first = jax.devices()[0]
    return {
        "backend": first.platform,
        "kind": first.device_kind,
        "available": jax.device_count(),
        "used": cfg.devices or jax.device_count(),
        "precision": cfg.training.compute_dtype,
    }


def data(dataset: AnyDataset) -> dict[str, Any]:
    """Which data, as a hash too, and how much of them."""
    return {"name": dataset.name, "source": dataset.source, "identity": dataset.identity, **dataset.facts()}


def digest(identity: str) -> str:
    """The hash in an identity of data, without what is claimed about them."""
    return identity.split(" ")[0]


def same_data(identity: str, other: str) -> bool:
    """Whether data are equal, wherever and in whatever layout they lie."""
    return digest(identity) == digest(other)


def computed(cfg: Config, added: Iterable[str] = ()) -> dict[str, Any]:
    """What decides the numbers of a round. Where the data lie does not: their identity is compared beside this.

    Args:
      added: dotted names of fields that a run from before them does not have in its checkpoints.
    """
    fields = {name: value for name, value in cfg.to_dict().items() if name not in NOT_COMPUTED}
    places = ("data_dir", "files")
    fields |= {"data": {name: value for name, value in fields["data"].items() if name not in places}}
    for part, _, name in (dotted.partition(".") for dotted in added):
        fields[part] = {field: value for field, value in fields[part].items() if field != name}
    return fields


def read_card(folder: Path) -> dict[str, Any]:
    """The run card of a run's folder; where the file is missing or damaged, that of the newest checkpoint, with
    `rebuilt`. Raises ValueError naming the file if there is none."""
    try:
        return _read_card(folder)
    except ValueError:
        kept = checkpoint.about(folder / "checkpoints")
        if kept is None:
            raise
        return _checked_card(kept, folder / "run.json") | {"rebuilt": True}


def read_finished(folder: Path) -> dict[str, Any]:
    """The run card of a run that is complete. Raises ValueError for another."""
    card = read_card(folder)
    if card.get("rebuilt"):
        raise ValueError(f"{folder / 'run.json'}: is missing or damaged: put it back, or go on with --resume")
    if card["status"] != "complete":
        raise ValueError(f"{folder}: its status is {card['status']!r}: must be complete (go on with --resume)")
    return card


def _read_card(folder: Path) -> dict[str, Any]:
    path = folder / "run.json"
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{folder}: must be the folder of a run, with its run.json ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: must be the run.json of a run: {error}") from None
    return _checked_card(given, path)


def _checked_card(given: Any, path: Path) -> dict[str, Any]:
    try:
        card = {
            "script": None, "status": "running", "added": [], "memory_checkpoints": False, "checkpoint_every": 1,
            "tensorboard": False, "meant": None,
        } | given  # fmt: skip
        if isinstance(card["config"], dict):
            card["config"], added = completed(card["config"])
            card["new"] = {name: value for name, value in added.items() if name not in card["added"]}
            card["added"] = sorted({*card["added"], *added})
        Config.from_json(json.dumps(card["config"]))
        for name, allowed, fine in (
            ("preset", f"one of {', '.join(PRESETS)}", card["preset"] in list(PRESETS)),
            ("status", "a word", isinstance(card["status"], str)),
            ("script", "a text or null", isinstance(card["script"], str | None)),
            ("data", "an object", isinstance(card["data"], dict)),
            ("memory_checkpoints", "true or false", isinstance(card["memory_checkpoints"], bool)),
            ("tensorboard", "true or false", isinstance(card["tensorboard"], bool)),
            ("meant", "a text or null", isinstance(card["meant"], str | None)),
            ("checkpoint_every", "a whole number from 0 on", _is_count(card["checkpoint_every"])),
            ("added", "a list of texts", all(isinstance(name, str) for name in card["added"])),
        ):
            if not fine:
                raise ValueError(f"{name} = {card[name]!r}: must be {allowed}")
        if not isinstance(card["data"]["identity"], str):
            raise ValueError(f"data.identity = {card['data']['identity']!r}: must be a text")
        return card
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{path}: must be the run.json of a run: {reason}") from None


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def run_card(cfg: Config, dataset: AnyDataset) -> dict[str, Any]:
    """Everything that somebody else needs to get the same numbers."""
    return {
        "seed": cfg.seed,
        "data": data(dataset),
        "device": device(cfg),
        "versions": versions(),
        "source": source(),
        "config_hash": hashlib.sha256(cfg.to_json().encode()).hexdigest()[:16],
        "config": cfg.to_dict(),
    }


def source() -> dict[str, Any]:
    """Which program: a hash of the package's files, and where they lie in a git checkout its commit, too."""
    return {"sha256": source_hash(PACKAGE)} | (git(PACKAGE) or {})


def source_hash(package: Path) -> str:
    """SHA-256 of the names and contents of the source files in a folder."""
    total = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        content = path.read_bytes()
        total.update(f"{path.relative_to(package).as_posix()}\n{len(content)}\n".encode() + content)
    return total.hexdigest()


def git(package: Path) -> dict[str, Any] | None:
    """Commit of a package's source tree, and whether files differ from it; None if git does not know the package.

    A checkout around a package is not its own if the package was only installed there.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

    def ask(*arguments: str) -> str | None:
        command = ["git", "-C", str(package), *arguments]
        try:
            answer = subprocess.run(command, capture_output=True, text=True, timeout=5, env=environment)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return answer.stdout.strip() if answer.returncode == 0 else None

    if ask("ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    commit = ask("rev-parse", "HEAD")
    if not commit:
        return None
    return {"commit": commit, "changed": bool(ask("status", "--porcelain", "--untracked-files=no"))}
