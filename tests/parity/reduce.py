"""Chooses the committed subset of the reference's numbers: `python tests/parity/reduce.py ../shared/golden`.

Writes `tests/parity/golden/`, which `golden.py` reads where the whole set is not at hand. What is left out:

* cases that differ from one that stays by size only, or by a combination of settings that each stay (`CASES`);
* keys that no test reads, later steps of long sequences and further rows of tables (`DROPPED`, `ROWS`);
* most elements of large results (`SAMPLED`): of each array some runs of neighbours and its largest element stay, the
  others become NaN, which `torch_layout.assert_close` passes over;
* images of `fused_forward`, where each is by itself; loss and accuracy follow from the logits of those that stay.

Numbers and names of what stays are the reference's. Storage is lossless: an archive is an xz of the keys and then the
arrays, one after another, and an array of whole sixteenths is kept as int8 under its key and "*16".
"""

import io
import json
import lzma
import pathlib
import re
import sys

import numpy as np

TARGET = pathlib.Path(__file__).resolve().parent / "golden"
CASES = {  # by number; all of them where a file is not named
    # a host of five blocks (1) is one of three (0) that takes 1 MB
    "cnn_host": (0, 2),
    # every blueprint once: small maps of width 32, or width 8 where a kernel has many weights
    "blueprints_cnn": (6, 7, 16, 17, 18, 19, 20, 21),
    # (training, add), (blending, multiply), (holding, gate)
    "slot_forward": (0, 4, 26),
    "fused_forward": (0,),
    # normal; incubator, clipped, sampled at every batch; a fossil without optimiser
    "train_functions": ("common", 0, 3, 8),
    # all scripted lives and a random one
    "lifecycle": range(18),
    # one configuration of three, a window of six, no stabilisation
    "tracker": (1, 4, 5),
    # together every reason; the last has thresholds of its own
    "heuristic": (3, 5, 7, 9, 11),
    # clipped; with absent gradients
    "sgd": (1, 2),
}
DROPPED = {
    "blueprints_cnn": r"meta/(n_params_property|param_estimate)",
    "fused_forward": r"min_argmax_margin",
    "governor": r"kind|seed/(?!verdict).*",
    "heuristic": r"seed/.*",
    "lifecycle": r"meta/(literal_rule|n_epochs)",
    "shapley": r"shapley_std.*|interaction_from_engine",
    "tracker": r"seed/.*",
    "train_functions": r"min_argmax_margin",
}
ROWS = {  # what stays of the first axis of these keys
    # diverging, with NaN, jumping to a random guess, and two sets of thresholds
    "governor": (r".*", [4, 12, 22, 28, 29]),
    "sgd": (r"\w+/(grad|params|momentum)/.*|grad_.*", slice(2)),
    "shapley": (r"(?!on|\w+/).*", slice(5)),
    "reward_components": (r"(in|head|seed)/.*", slice(36)),
}
SAMPLED = {  # results that only `torch_layout.assert_close` compares
    "cnn_host": r"train/grad.*|(train|eval_after)/boundary/.*",
    "blueprints_cnn": r"y|grad_x|grad/.*",
    "slot_forward": r"y|grad_h|grad_seed/.*",
    "train_functions": r"final_cleared/.*",
}
RUN, KEPT = 16, 64  # elements of a run, and about as many of an array in all
BATCHES, REWARDS = 3, 40  # of a normaliser's trace
IMAGES = 2  # of fused_forward


def sample(values: np.ndarray) -> np.ndarray:
    """NaN but for runs spread over the array, and its largest element."""
    if values.size <= KEPT:
        return values
    flat = values.ravel()
    out = np.full_like(flat, np.nan)
    starts = np.linspace(0, flat.size - RUN, KEPT // RUN).astype(int)
    stays = np.concatenate([(starts[:, None] + np.arange(RUN)).ravel(), [np.abs(flat).argmax()]])
    out[stays] = flat[stays]
    return out.reshape(values.shape)


def fewer_images(case: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    labels, logits = case["labels"][:IMAGES], case["logits"][:, :IMAGES].astype(np.float64)
    losses = np.log(np.exp(logits).sum(-1)) - logits[:, np.arange(len(labels)), labels]
    return case | {
        "x": case["x"][:IMAGES], "labels": labels, "logits": case["logits"][:, :IMAGES],
        "forward_logits": case["forward_logits"][:IMAGES],
        "loss": losses.mean(-1), "accuracy": 100 * (logits.argmax(-1) == labels).mean(-1),
    }  # fmt: skip


def fewer_batches(case: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    if "rewards" in case:
        return {key: values[:REWARDS] for key, values in case.items()}
    traces = ("batch_sizes", "mean", "var", "count", "normalized", "denormalized")
    short = {key: values[:BATCHES] if key in traces else values for key, values in case.items()}
    return short | {"batches": case["batches"][: short["batch_sizes"].sum()]}


def reduced(file: str, archive: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    names = list(dict.fromkeys(key.partition("/")[0] for key in archive))
    if file in CASES:
        names = [name if isinstance(name, str) else f"case{name}" for name in CASES[file]]
    matches = lambda table, key: file in table and re.fullmatch(table[file], key)
    long, rows = ROWS.get(file, ("", None))
    out = {}
    for name in names:
        case = {key.partition("/")[2]: archive[key] for key in archive if key.startswith(name + "/")}
        if file == "fused_forward":
            case = fewer_images(case)
        if file == "normalizer":
            case = fewer_batches(case)
        for key, values in case.items():
            if matches(DROPPED, key):
                continue
            values = values[rows] if re.fullmatch(long, key) else values
            out[f"{name}/{key}"] = sample(values) if matches(SAMPLED, key) else values
    return out


def packed(arrays: dict[str, np.ndarray]) -> bytes:
    """What `golden.read` reads."""
    stored = {}
    for key, values in arrays.items():
        sixteenths = values * 16 if values.dtype == np.float32 else np.array(np.nan)
        small = values.size > RUN and np.all(sixteenths == np.rint(sixteenths)) and np.abs(sixteenths).max() < 128
        stored |= {f"{key}*16": sixteenths.astype(np.int8)} if small else {key: values}
    with io.BytesIO() as file:
        for values in (np.array(list(stored)), *stored.values()):
            np.save(file, values)
        xz = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 2, "lp": 2, "pb": 2}
        return lzma.compress(file.getvalue(), filters=[xz])


if __name__ == "__main__":
    source = pathlib.Path(sys.argv[1])
    TARGET.mkdir(exist_ok=True)
    for path in sorted(source.glob("*.npz")):
        if "transformer" not in path.stem:  # has no counterpart here
            with np.load(path, allow_pickle=False) as archive:
                data = packed(reduced(path.stem, dict(archive)))
            (TARGET / f"{path.stem}.npy.xz").write_bytes(data)
            print(f"{path.stem:20s} {len(data):7d}")
    table = json.loads((source / "blueprint_table.json").read_text())["cnn"]["blueprints"]
    counts = {name: {"n_params": row["n_params"]} for name, row in table.items()}
    (TARGET / "blueprint_table.json").write_text(json.dumps({"cnn": {"blueprints": counts}}, indent=1) + "\n")
    print(f"{'all':20s} {sum(path.stat().st_size for path in TARGET.iterdir()):7d}")
