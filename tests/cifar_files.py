"""Small files in the two layouts of CIFAR-10."""

import io
import pickle
import struct

import numpy as np

from esper_jax.data import cifar10

N = 6  # records in each file


class Python2Pickler(pickle._Pickler):
    """Writes strings as Python 2 did, like the official files."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_string(self, text):
        text = text if isinstance(text, bytes) else text.encode("latin1")
        self.write(pickle.BINSTRING + struct.pack("<i", len(text)) + text)
        self.memoize(text)

    dispatch[str] = dispatch[bytes] = save_string


def official_pickle(value):
    stream = io.BytesIO()
    Python2Pickler(stream, protocol=2).dump(value)
    return stream.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def make_records(n_files=6):
    rng = np.random.default_rng(0)
    records = rng.integers(0, 256, (n_files, N, 3073)).astype(np.uint8)
    records[..., 0] %= 10
    return records


def write_binary(folder, records, names=cifar10.BINARY_FILES):
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in zip(names, records, strict=True):
        part.tofile(folder / name)


def python_files(records, dump=official_pickle):
    batches = [{"batch_label": "b", "labels": part[:, 0].tolist(), "data": part[:, 1:]} for part in records]
    return {name: dump(batch) for name, batch in zip(cifar10.PYTHON_FILES, batches, strict=True)}


def write_python(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
