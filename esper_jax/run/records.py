"""The files of a run: what compiled programs return, as arrays and rows (Esper's Nissa).

    metrics.npz      rounds/<field> [R, P, E, T, ...], learner/<metric> [R, P] (head_entropy [R, P, 8]: by head),
                     arms/<field> [A, E, T, ...], arms/names [A], arms/policy_seed [A],
                     arms/blueprints [N] (names by number), arms/train_flops [A, E] of an episode,
                     arms/shape [A, E, S, 2] (blueprint and algorithm of what was kept, -1 where nothing was),
                     arms/text [A, E, tokens] (what networks of text wrote)
    lifecycle.jsonl  one row per stage transition or op of the comparison's episodes (rounds are in metrics.npz)
    outcomes.csv     one row per (arm, policy, environment) of the comparison

What was not measured is NaN in arrays with a `<field>_valid` array beside them, null in JSON, empty in CSV: never 0.
Nothing here holds a time, so the same run writes the same bytes. The host loop calls this between compiled calls.

Axis letters: R rounds, P policies, A arms (a learned arm counts once per policy), E environments, T epochs, S slots,
K alpha configurations.
"""

from __future__ import annotations

import csv
import dataclasses
import os
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from esper_jax.enums import LEARNED
from esper_jax.env.state import StepInfo
from esper_jax.evidence.tables import metric_arrays
from esper_jax.metric import Metric
from esper_jax.run.files import sha256, whole
from esper_jax.train import Comparison, Metrics, Rollout
from esper_jax.types import Op, PanicReason, Stage

# The mask that says which entries of a field were measured; a field not listed always is.
_MASK = {
    "contribution": "contribution_valid",
    "shapley": "shapley_valid",
    "interaction": "interaction_valid",
    "gradient_ratio": "gradient_valid",
    "gradient_health": "gradient_valid",
    "reward": "decision_valid",
    "gate_passed": "gate_valid",
}
# Fields that only a decision has; the first epoch of an episode comes before any.
_OF_DECISIONS = ("requested_op", "op", "slot", "legal", "success", "gate_level", "gate_passed", "reward", "value")


def rollout_arrays(rollout: Rollout) -> dict[str, np.ndarray]:
    """What episodes did, field by field `[P, E, T, ...]`; small integers as i8, unmeasured floats as NaN."""
    info = jax.device_get(rollout.info)
    fields = {f.name: getattr(info, f.name) for f in dataclasses.fields(info)}
    components = fields.pop("components")
    fields |= {f"reward_{f.name}": getattr(components, f.name) for f in dataclasses.fields(components)}
    fields |= {"reward": jax.device_get(rollout.reward), "value": jax.device_get(rollout.value)}
    del fields["per_class"], fields["episode_over"]
    arrays = {name: np.asarray(field) for name, field in fields.items()}
    decisions = np.zeros(arrays["reward"].shape, bool)
    decisions[..., 1:] = True
    arrays |= {"decision_valid": decisions, "gate_valid": decisions & (arrays["gate_level"] >= 0)}
    return {name: _clean(name, array, arrays) for name, array in arrays.items()}


def _clean(name: str, array: np.ndarray, arrays: dict[str, np.ndarray]) -> np.ndarray:
    if np.issubdtype(array.dtype, np.integer):
        return array if name == "params" else array.astype(np.int8)
    mask = "decision_valid" if name in _OF_DECISIONS or name.startswith("reward_") else None
    mask = _MASK.get(name, mask)
    if mask is None or array.dtype == bool:
        return array
    return np.where(arrays[mask], array, np.float32(np.nan))


def round_arrays(metrics: Metrics) -> dict[str, np.ndarray]:
    """A round's arrays under the names that they have in metrics.npz, without the leading R."""
    rows = {f"rounds/{name}": array for name, array in rollout_arrays(metrics.rollout).items()}
    learner = {name: np.asarray(value) for name, value in jax.device_get(metrics.learner).items()}
    if "head_entropy" in learner:
        chosen = learner.pop("head_choices") > 0
        learner["head_entropy"] = np.where(chosen, learner["head_entropy"], np.float32(np.nan))
    return rows | {f"learner/{name}": value for name, value in learner.items()}


def dead(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """bool[P]: policies that took no step in a round, since no minibatch of it was finite."""
    return (arrays["learner/updates_done"] == 0) & (arrays["learner/nonfinite_updates"] > 0)


def reached(arrays: dict[str, np.ndarray]) -> tuple[np.float32, np.float32]:
    """Accuracy and loss on reward-validation that a round's environments ended with, means of all."""
    return arrays["rounds/val_accuracy"][..., -1].mean(), arrays["rounds/val_loss"][..., -1].mean()


def arm_arrays(
    arms: dict[str, Comparison], blueprints: Sequence[str], metric: Metric, host_flops: float, seed_flops: np.ndarray
) -> dict[str, np.ndarray]:
    """The comparison's arrays with a leading A, in the order of `arms/names`, and what its report is about.

    Args:
      blueprints: names by number.
      metric: of the report-test split.
      host_flops, seed_flops: of training for one epoch, see `estimate.Work`.
    """
    per_arm: list[dict[str, np.ndarray]] = []
    names: list[str] = []
    policies: list[int] = []
    for name, result in arms.items():
        test = jax.device_get(result.test)
        counts = {name: getattr(result, name) for name in ("germinated", "fossilised", "pruned", "rollbacks")}
        arrays = rollout_arrays(result.rollout) | jax.device_get(counts)
        arrays |= {"shape": result.shape.astype(np.int8)}
        arrays |= {"train_flops": train_flops(result.rollout.info, host_flops, seed_flops)}
        arrays |= {"text": result.text} if result.text is not None and result.text.size else {}
        arrays |= {f"test_{f.name}": getattr(test, f.name) for f in dataclasses.fields(test)}
        if name not in LEARNED:  # a rule predicts nothing
            arrays["value"] = np.full_like(arrays["value"], np.nan)
        arrays["test_per_class"] = np.where(test.per_class_valid, test.per_class, np.float32(np.nan))
        per_arm.append(arrays)
        names += [name] * len(test.accuracy)
        policies += range(len(test.accuracy))
    joined = {f"arms/{name}": np.concatenate([arrays[name] for arrays in per_arm]) for name in per_arm[0]}
    labels = {"names": names, "policy_seed": policies, "blueprints": blueprints}
    return {f"arms/{name}": np.array(values) for name, values in labels.items()} | joined | metric_arrays(metric)


_ACTS = (Stage.TRAINING, Stage.BLENDING, Stage.HOLDING, Stage.FOSSILIZED)  # where a seed is computed (`network.blend`)


def train_flops(info: StepInfo, host_flops: float, seed_flops: np.ndarray) -> np.ndarray:
    """f[...] FLOP of training in episodes [..., T]: of the host in every epoch, and of the seeds that act in it."""
    slots = np.arange(seed_flops.shape[0])
    seeds = np.where(np.isin(info.stage, _ACTS), seed_flops[slots, np.maximum(info.blueprint, 0)], 0.0)
    return host_flops * info.stage.shape[-2] + seeds.sum((-2, -1))


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """An .npz; equal arrays give equal bytes."""
    with whole(path, binary=True) as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]  # taken for `allow_pickle`


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """What `write_arrays` wrote. Raises ValueError naming the file if it is not there or damaged."""
    try:
        with open(path, "rb") as raw, np.load(raw) as file:
            return {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise ValueError(f"{path}: is missing") from None
    # whatever NumPy and zipfile make of bytes that nobody wrote
    except (OSError, ValueError, TypeError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: is damaged") from error


_ROUND = re.compile(r"(\d{6})\.npz(\.tmp)?")


class RoundLog:
    """A file per round, so that a run that was killed keeps the rounds it had done."""

    def __init__(self, folder: Path, done: int = 0, *, reader: bool = False):
        """Goes on after `done` rounds, whose hashes are then `known`; what a killed run wrote beyond them is dropped,
        since it will be done again. Files with other names are somebody else's. A `reader` writes and drops nothing."""
        self.folder, self.reader = folder, reader
        self.known: dict[str, str] = {}
        if reader:
            return
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():
            match = _ROUND.fullmatch(path.name)
            if match and path.is_file() and (match[2] or int(match[1]) >= done):
                path.unlink()
        self.known = self.hashes(folder)

    @staticmethod
    def set_aside(folder: Path, done: int, into: Path) -> None:
        """Moves the rounds after the first `done` ones to another folder, in place of what is there."""
        for path in sorted(folder.iterdir()):
            if (match := _ROUND.fullmatch(path.name)) and path.is_file() and int(match[1]) >= done:
                into.mkdir(exist_ok=True)
                path.replace(into / path.name)

    @staticmethod
    def check(folder: Path, done: int) -> None:
        """Raises ValueError naming the first of `done` rounds that is missing, damaged or not like the others."""
        first = None
        for number in range(done):
            path = RoundLog._path(folder, number)
            try:
                facts = {name: (array.shape, array.dtype) for name, array in read_arrays(path).items()}
                if facts != (first := first or facts):
                    raise ValueError(f"{path}: is not of this run")
            except ValueError as error:
                raise ValueError(f"{error}; put it back, or start the run again in another folder") from error

    @staticmethod
    def hashes(folder: Path) -> dict[str, str]:
        """SHA-256 of the files of rounds that are there, by their names."""
        names = sorted(os.listdir(folder)) if folder.is_dir() else []
        rounds = (folder / name for name in names if (match := _ROUND.fullmatch(name)) and not match[2])
        return {path.name: sha256(path) for path in rounds if path.is_file()}

    @staticmethod
    def _path(folder: Path, number: int) -> Path:
        return folder / f"{number:06d}.npz"

    def write(self, number: int, arrays: dict[str, np.ndarray]) -> None:
        if self.reader:
            return
        path = self._path(self.folder, number)
        write_arrays(path, arrays)
        self.known[path.name] = sha256(path)

    def arrays(self, number: int) -> dict[str, np.ndarray]:
        """Of a round that is done."""
        return read_arrays(self._path(self.folder, number))

    def stacked(self) -> dict[str, np.ndarray]:
        """Everything so far, see `read`."""
        return self.read(self.folder)

    @staticmethod
    def read(folder: Path) -> dict[str, np.ndarray]:
        """The rounds in a folder with a leading R; empty before the first one."""
        rounds = [read_arrays(path) for path in sorted(folder.glob("*.npz")) if _ROUND.fullmatch(path.name)]
        return {name: np.stack([arrays[name] for arrays in rounds]) for name in rounds[0]} if rounds else {}


OUTCOMES = (
    "arm", "policy_seed", "env", "test_accuracy", "test_accuracy_final", "test_loss", "test_loss_final", "params",
    "params_final", "val_accuracy", "germinated", "fossilised", "pruned", "rollbacks", "return",
)  # fmt: skip


def outcomes(metrics: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """One row per (arm, policy, environment) from the arrays of metrics.npz, with the columns `OUTCOMES`.

    Accuracy, loss and parameters (relative to the bare host) are those of the committed network, `*_final` those of the
    network as it was at the end. `policy_seed` counts the policies of a learned arm; a rule has one row, number 0.
    """
    arms = {name.removeprefix("arms/"): array for name, array in metrics.items() if name.startswith("arms/")}
    rows = []
    for a, arm in enumerate(arms["names"]):
        for e in range(arms["test_accuracy"].shape[1]):
            host = arms["params"][a, e, 0]  # before the first decision there is nothing else
            row = {
                "arm": str(arm),
                "policy_seed": int(arms["policy_seed"][a]),
                "env": e,
                "test_accuracy": arms["test_committed_accuracy"][a, e],
                "test_accuracy_final": arms["test_accuracy"][a, e],
                "test_loss": arms["test_committed_loss"][a, e],
                "test_loss_final": arms["test_loss"][a, e],
                "params": arms["committed_size"][a, e, -1],
                "params_final": arms["params"][a, e, -1] / host,
                "val_accuracy": arms["val_accuracy"][a, e, -1],
                "return": np.nansum(arms["reward"][a, e]),
            }
            row |= {name: arms[name][a, e] for name in ("germinated", "fossilised", "pruned", "rollbacks")}
            rows.append({name: row[name].item() if hasattr(row[name], "item") else row[name] for name in OUTCOMES})
    return rows


def write_csv(path: Path, rows: Iterable[dict[str, Any]], columns: tuple[str, ...]) -> None:
    with whole(path) as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({name: _cell(row[name]) for name in columns})


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:.6g}" if np.isfinite(value) else ""
    return value


def lifecycle(metrics: dict[str, np.ndarray]) -> Iterator[dict[str, Any]]:
    """What happened to the slots of the comparison's episodes, from the arrays of metrics.npz.

    One row per slot whose stage changed in an epoch, and one per op that was asked for without changing its slot's
    stage (refused, failed at its gate, or a new alpha target). `cause` is the op, `tick` (by itself) or `governor`. An
    op and a tick in one epoch can move a slot through two stages: `from` and `to` are those at the ends of epochs.
    """
    arms = {name.removeprefix("arms/"): array for name, array in metrics.items() if name.startswith("arms/")}
    stage = arms["stage"]
    before = np.concatenate([np.full_like(stage[:, :, :1], Stage.DORMANT), stage[:, :, :-1]], axis=2)
    asked = (arms["requested_op"] != Op.WAIT) & arms["decision_valid"]
    slots = np.arange(stage.shape[-1])
    target = asked[..., None] & (arms["slot"][..., None] == slots)
    moved = stage != before
    for a, e, t, s in np.argwhere(moved | target).tolist():
        at = {name: arms[name][a, e, t] for name in _ROW_FIELDS}
        op, mine = Op(at["requested_op"]).name.lower(), bool(target[a, e, t, s])
        if moved[a, e, t, s] and at["panic"]:
            cause = "governor"
        else:
            cause = op if mine and (at["success"] or not moved[a, e, t, s]) else "tick"
        gated = mine and at["gate_level"] >= 0
        kind = max(at["blueprint"][s], arms["blueprint"][a, e, max(t - 1, 0), s])  # also of a seed that has just left
        yield {
            "arm": str(arms["names"][a]),
            "policy_seed": int(arms["policy_seed"][a]),
            "env": e,
            "epoch": t + 1,
            "slot": s,
            "from": Stage(before[a, e, t, s]).name,
            "to": Stage(stage[a, e, t, s]).name,
            "cause": cause,
            "op": op if mine else None,
            "success": bool(at["success"]) if mine else None,
            "gate_level": int(at["gate_level"]) if gated else None,
            "gate_passed": bool(at["gate_passed"]) if gated else None,
            "panic": PanicReason(at["panic_reason"]).name.lower() if at["panic"] else None,
            "blueprint": str(arms["blueprints"][kind]) if kind >= 0 else None,
            "alpha": round(float(at["alpha"][s]), 6),
        }


_ROW_FIELDS = (
    "requested_op", "success", "gate_level", "gate_passed", "panic", "panic_reason", "blueprint", "alpha",
)  # fmt: skip
