import contextlib
import hashlib
import http.server
import io
import pickle
import tarfile
import threading

import numpy as np
import pooch
import pytest
from cifar_files import N, make_records, official_pickle, python_files, write_binary, write_python

from esper_jax import data
from esper_jax.config import DataConfig
from esper_jax.data import cifar10
from esper_jax.data.cifar10 import BINARY_FOLDER, PYTHON_FOLDER, Archive


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """An empty user cache, no $ESPER_DATA, no proxy."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("ESPER_DATA", raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return tmp_path / "xdg" / "esper_jax"


NOWHERE = Archive("cifar-10-python.tar.gz", (), 1, "")


def small(**changes):
    return DataConfig(**({"name": "cifar10", "validation_size": 5} | changes))


# Files on disk


@pytest.mark.parametrize("parent", [False, True])
@pytest.mark.parametrize("layout", ["binary", "python"])
def test_both_layouts_give_the_same_pictures(tmp_path, layout, parent):
    records = make_records()
    folder = tmp_path / "d" / (BINARY_FOLDER if layout == "binary" else PYTHON_FOLDER)
    if layout == "binary":
        write_binary(folder, records)
    else:
        write_python(folder, python_files(records))
    arrays = cifar10.load(str(folder.parent if parent else folder), archive=NOWHERE)
    flat = records[:5].reshape(-1, 3073)
    np.testing.assert_array_equal(arrays.labels, flat[:, 0])
    # record byte 1 + 1024 c + 32 y + x is channel c of pixel (y, x)
    assert arrays.images[7, 3, 5, 2] == flat[7, 1 + 2048 + 3 * 32 + 5]
    np.testing.assert_array_equal(arrays.test_images[:, 0, 0, 0], records[5][:, 1])
    # the identity is that of the binary records in either layout, and claims nothing
    digest = hashlib.md5(records.tobytes()).hexdigest()
    assert arrays.identity == f"md5:{digest} (not verified to be the official CIFAR-10)"
    assert arrays.source == str(folder)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_pickles_of_python_3_are_read_too(tmp_path, protocol):
    records = make_records()
    write_python(tmp_path, python_files(records, lambda batch: pickle.dumps(batch, protocol)))
    np.testing.assert_array_equal(cifar10.read(tmp_path).test_labels, records[5][:, 0])


def test_files_with_the_official_checksums_are_called_official(tmp_path, monkeypatch):
    files = python_files(make_records())
    write_python(tmp_path, files)
    sums = tuple(pooch.file_hash(str(tmp_path / name), alg="md5") for name in cifar10.PYTHON_FILES)
    monkeypatch.setattr(cifar10, "OFFICIAL_MD5", sums)
    assert cifar10.read(tmp_path).identity.endswith("(the official CIFAR-10)")
    (tmp_path / "data_batch_5").unlink()  # a part of the official data is not the official data
    assert cifar10.read(tmp_path).identity.endswith("(not verified to be the official CIFAR-10)")


def test_a_pickle_cannot_run_code(tmp_path):
    files = python_files(make_records())
    files["data_batch_2"] = b"cos\nsystem\n(S'echo no'\ntR."
    write_python(tmp_path, files)
    with pytest.raises(data.DataError, match="data_batch_2.*os.system"):
        cifar10.read(tmp_path)


def dtype_with(state):
    """A pickle of one batch whose labels have the dtype int64 with this state."""

    class Dtype:
        def __reduce__(self):
            return np.dtype, ("i8", False, True), state

    class Labels:
        def __reduce__(self):
            make, arguments, (version, shape, _, order, content) = np.zeros(1, np.int64).__reduce__()
            return make, arguments, (version, shape, Dtype(), order, content)

    return pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": Labels()}, 2)


def test_a_pickle_cannot_alter_a_dtype(tmp_path):
    """An array of 8-byte integers whose dtype says that they are objects makes NumPy follow them as addresses."""
    files = python_files(make_records())
    whole = (3, "<", None, None, None, -1, -1, 0)
    write_python(tmp_path, {name: dtype_with(whole) for name in files})
    assert cifar10.read(tmp_path).labels.tolist() == [0] * 5
    for state in (
        (3, "|", None, None, None, -1, -1, 63),  # its flags: object, counted, in need of a start
        (3, "<", None, ("a",), {"a": (np.dtype("u1"), 0)}, 8, 1, 16),
        (3, "<", None, None, None, 4096, -1, 0),
        (3, "<", (np.dtype("u1"), (8,)), None, None, -1, -1, 0),
        (3, "O", None, None, None, -1, -1, 0),
        (),
    ):
        write_python(tmp_path, files | {"data_batch_2": dtype_with(state)})
        with pytest.raises(data.DataError, match="data_batch_2.* is no batch file of CIFAR-10"):
            cifar10.read(tmp_path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"cnumpy\ndtype\n(S'O8'\nI0\nI1\ntR(I3\nS'|'\nNNNI-1\nI-1\nI0\ntb.", "the dtype b'O8'"),
        (pickle.dumps({"data": np.array([None])}, 4), "the dtype"),
        (pickle.dumps({"data": np.zeros(2, "u1,u1")}, 2), "the dtype"),
        (b"c_codecs\nencode\n(S'x'\nS'y'\ndb.", "the state of a function"),
        (b")" + b"\x85" * 2_000_000 + b"}\x8c\x01a\x86.", "more tuples"),  # hashing it would exhaust the stack
        (b"}r\xff\xff\xff\x7f.", "numbers more objects"),  # 32 GB of memory
        (pickle.dumps({"data": 1}, 4)[:-1], "no batch file"),
        (
            b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"
            b"(I1\n(I-1\ntcnumpy\ndtype\n(S'u1'\nI0\nI1\ntRI00\nS'x'\ntb.",
            "1 bytes with the shape",
        ),
    ],
)
def test_a_crafted_pickle_is_refused(tmp_path, content, said):
    write_python(tmp_path, python_files(make_records()) | {"data_batch_2": content})
    with pytest.raises(data.DataError, match=f"data_batch_2.*{said}"):
        cifar10.read(tmp_path)


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize(
    "unusual",
    [
        lambda labels, pixels: {"data": np.asfortranarray(pixels), "labels": labels.tolist()},
        lambda labels, pixels: {"data": pixels[::-1][::-1], "labels": tuple(labels.tolist())},
        lambda labels, pixels: {"data": pixels, "labels": labels.astype(np.int64)},
        lambda labels, pixels: {"data": pixels, "labels": labels.astype(">i4")},
        lambda labels, pixels: {"data": pixels, "labels": list(labels.astype(np.int64))},
        lambda labels, pixels: {b"data": pixels, b"labels": labels, "batch_label": b"", 1: None},
    ],
)
def test_unusual_files_with_the_same_pictures_are_the_same_data(tmp_path, unusual, protocol):
    records = make_records()
    batches = [unusual(part[:, 0], part[:, 1:]) for part in records]
    files = {name: pickle.dumps(batch, protocol) for name, batch in zip(cifar10.PYTHON_FILES, batches, strict=True)}
    write_python(tmp_path, files)
    assert cifar10.read(tmp_path).identity.startswith(f"md5:{hashlib.md5(records).hexdigest()} ")


def test_fewer_files_are_legal_a_gap_is_not(tmp_path):
    write_binary(tmp_path, make_records())
    for name in ("data_batch_5.bin", "data_batch_4.bin"):
        (tmp_path / name).unlink()
    assert len(cifar10.read(tmp_path).labels) == 3 * N
    (tmp_path / "data_batch_2.bin").unlink()
    with pytest.raises(data.DataError, match="data_batch_2.bin is missing"):
        cifar10.read(tmp_path)


@pytest.mark.parametrize("name", ["data_batch_1.bin", "test_batch.bin"])
def test_the_first_batch_and_the_test_batch_are_needed(tmp_path, name):
    write_binary(tmp_path, make_records())
    for other in cifar10.BINARY_FILES[1:5]:
        (tmp_path / other).unlink()
    (tmp_path / name).unlink()
    with pytest.raises(data.DataError, match=f"{name} is missing"):
        cifar10.load(str(tmp_path), archive=NOWHERE)


@pytest.mark.parametrize("size", [0, 3072, 3073 * 2 + 1, 3073 * 10_001])
def test_a_file_of_the_wrong_size_is_named_with_what_is_expected(tmp_path, size):
    write_binary(tmp_path, make_records())
    (tmp_path / "data_batch_3.bin").write_bytes(bytes(size))
    with pytest.raises(data.DataError, match=rf"data_batch_3.bin has {size:,} bytes: expected 30,730,000.*3,073"):
        data.load(small(name="auto", data_dir=str(tmp_path)), archive=NOWHERE)  # wrong files never fall through
    with pytest.raises(data.DataError, match="data_batch_3.bin"):
        data.resolve(str(tmp_path), archive=NOWHERE)


def test_a_wrong_label_is_named(tmp_path):
    records = make_records()
    records[1, 4, 0] = 10
    write_binary(tmp_path / "b", records)
    write_python(tmp_path / "p", python_files(records))
    for folder in ("b", "p"):
        with pytest.raises(data.DataError, match="data_batch_2.*label of record 4"):
            cifar10.read(tmp_path / folder)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "no batch file"),
        (official_pickle({"labels": [1], "data": np.zeros((1, 3072), np.uint8)})[:-1000], "no batch file"),
        (official_pickle({"labels": [1]}), "KeyError"),
        (official_pickle([1, 2]), "no batch file"),
        (official_pickle({"labels": [1], "data": np.zeros((1, 3071), np.uint8)}), r"uint8\[n, 3072\]"),
        (official_pickle({"labels": [1], "data": np.zeros((1, 3072), np.int8)}), r"int8\[1, 3072\]"),
        (official_pickle({"labels": [1, 2], "data": np.zeros((1, 3072), np.uint8)}), "as many integer labels"),
        (official_pickle({"labels": [-246], "data": np.zeros((1, 3072), np.uint8)}), "label of record 0"),
        (official_pickle({"labels": [], "data": np.zeros((0, 3072), np.uint8)}), "1 to 10,000"),
    ],
)
def test_a_damaged_pickle_is_named(tmp_path, content, message):
    write_python(tmp_path, python_files(make_records()) | {"data_batch_4": content})
    with pytest.raises(data.DataError, match=f"data_batch_4.*{message}"):
        cifar10.read(tmp_path)


# Where the files are looked for


def test_the_folder_given_comes_before_the_environment_and_that_before_the_cache(tmp_path, home, monkeypatch):
    said = []
    for place in (tmp_path / "given", tmp_path / "env", home):
        write_binary(place / BINARY_FOLDER, make_records())
    monkeypatch.setenv("ESPER_DATA", str(tmp_path / "env"))
    load = lambda folder: cifar10.load(folder, announce=said.append, archive=NOWHERE).source
    assert load(str(tmp_path / "given")) == str(tmp_path / "given" / BINARY_FOLDER)
    assert load(None) == str(tmp_path / "env" / BINARY_FOLDER)
    monkeypatch.delenv("ESPER_DATA")
    assert load(None) == str(home / BINARY_FOLDER) and not said


def test_what_cannot_be_had_says_where_it_was_looked_for_and_how_to_give_it(home):
    with pytest.raises(data.DataError) as caught:
        data.load(small(), archive=NOWHERE)
    message = str(caught.value)
    for part in ("--data-dir", str(home), "$ESPER_DATA", "--data digits"):
        assert part in message
    assert "\n" not in message and not home.exists()


@pytest.mark.parametrize("variable", [False, True])
@pytest.mark.parametrize(
    ("files", "said"),
    [
        (None, "it does not exist"),
        ([], "it is empty"),
        (["a", "b"], "it holds a, b"),
        (list("abcdefg"), "it holds a, b, c, d, e and 2 more"),
        (["train", "test", "meta"], "it holds meta, test, train, which is CIFAR-100"),
        (["cifar-100-python/train"], "it holds cifar-100-python, which is CIFAR-100"),
        (["cifar-100-binary.tar.gz"], "it holds cifar-100-binary.tar.gz, which is CIFAR-100"),
    ],
)
def test_a_folder_that_is_named_is_taken_or_refused(tmp_path, home, monkeypatch, files, said, variable):
    write_binary(home / BINARY_FOLDER, make_records())  # where it would be found without
    place = tmp_path / "given"
    if files is not None:
        place.mkdir()
    for name in files or ():
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).touch()
    if variable:
        monkeypatch.setenv("ESPER_DATA", str(place))
    label, given = ("$ESPER_DATA", None) if variable else ("--data-dir", str(place))
    for load in (
        lambda: data.load(small(name="auto", data_dir=given), archive=NOWHERE),
        lambda: data.load(small(data_dir=given), archive=NOWHERE),
        lambda: data.resolve(given, archive=NOWHERE),
    ):
        with pytest.raises(data.DataError) as caught:
            load()
        assert str(caught.value) == f"{label} {place}: must be a folder that holds the CIFAR-10 files; {said}"


def test_the_folder_of_nobody_is_refused():
    with pytest.raises(data.DataError, match="--data-dir ~nobody_at_all/x: must be a folder that exists"):
        data.resolve("~nobody_at_all/x", archive=NOWHERE)


def test_who_has_no_home_is_told(monkeypatch):
    def no_home(name):
        raise RuntimeError("no home")

    monkeypatch.setattr(pooch, "os_cache", no_home)
    with pytest.raises(data.DataError, match="there is no home folder to download it to"):
        cifar10.load(None, archive=NOWHERE)
    assert data.resolve(None, announce=lambda line: None, archive=NOWHERE) == "digits"


@pytest.mark.parametrize("folder", ["x", f"x/{PYTHON_FOLDER}"])
def test_files_one_folder_deeper_are_found_once(tmp_path, folder):
    write_python(tmp_path / folder, python_files(make_records()))
    assert data.resolve(str(tmp_path), archive=NOWHERE) == "cifar10"
    assert cifar10.load(str(tmp_path), archive=NOWHERE).source == str(tmp_path / folder)
    write_binary(tmp_path / "y", make_records())
    with pytest.raises(data.DataError, match=f"must hold the CIFAR-10 files once; they are in {folder}, y"):
        cifar10.load(str(tmp_path), archive=NOWHERE)


@pytest.mark.parametrize("deeper", [False, True])
@pytest.mark.parametrize("layout", ["python", "binary"])
def test_an_archive_need_not_be_unpacked(tmp_path, layout, deeper):
    records = make_records()
    binary = {f"./{BINARY_FOLDER}/{n}": part.tobytes() for n, part in zip(cifar10.BINARY_FILES, records, strict=True)}
    place = tmp_path / "given"
    archive = (place / "x" if deeper else place) / f"cifar-10-{layout}.tar.gz"
    archive.parent.mkdir(parents=True)
    content = make_archive((FILES if layout == "python" else binary) | {"../outside": b"x", "data_batch_1": b"x"})
    archive.write_bytes(content)
    arrays = cifar10.load(str(place), archive=NOWHERE)
    assert arrays.source == str(archive) and arrays.identity.startswith(f"md5:{hashlib.md5(records).hexdigest()} ")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [archive]
    archive.write_bytes(content[: len(content) // 2])
    with pytest.raises(data.DataError, match=f"{archive.name}.*(damaged|missing)"):
        cifar10.load(str(place), archive=NOWHERE)
    archive.write_bytes(make_archive({"other": b"x"}))
    with pytest.raises(data.DataError, match="none of its files is in it"):
        cifar10.load(str(place), archive=NOWHERE)
    archive.write_bytes(b"junk")
    with pytest.raises(data.DataError, match="is no archive of CIFAR-10"):
        cifar10.load(str(place), archive=NOWHERE)


def test_auto_falls_back_to_digits_in_one_loud_line():
    said = []
    dataset = data.load(small(name="auto", image_size=8), announce=said.append, archive=NOWHERE)
    assert dataset.name == "digits" and dataset.source == "scikit-learn" and not dataset.augment
    assert data.resolve(None, announce=said.append, archive=NOWHERE) == "digits"
    assert len(said) == 2 and said[0] == said[1]
    assert "digits" in said[0] and "NOT CIFAR-10" in said[0] and "\n" not in said[0]


def test_auto_takes_cifar10_where_it_is(tmp_path):
    write_binary(tmp_path, make_records())
    said = []
    dataset = data.load(small(name="auto", data_dir=str(tmp_path), image_size=8), announce=said.append, archive=NOWHERE)
    assert dataset.name == "cifar10" and dataset.classes[0] == "airplane" and dataset.mean == (0.4914, 0.4822, 0.4465)
    assert dataset.train.images.shape == (5 * N - 5, 8, 8, 3)
    assert data.resolve(str(tmp_path), announce=said.append, archive=NOWHERE) == "cifar10" and not said


# Download, from a server of our own


def make_archive(files):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return stream.getvalue()


@contextlib.contextmanager
def serve(routes):
    """A server on 127.0.0.1. `routes`: path -> (bytes, options); options: `ranges`, `stop_at`. Yields url, requests."""
    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(200 if self.path in routes else 404)
            self.end_headers()

        def do_GET(self):
            asked = self.headers.get("Range")
            requests.append((self.path, asked))
            if self.path not in routes:
                self.send_error(404)
                return
            body, options = routes[self.path]
            start = 0
            if asked and "ranges" in options:
                start = int(asked.removeprefix("bytes=").removesuffix("-"))
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
            else:
                self.send_response(200)
            if "no_length" not in options:
                self.send_header("Content-Length", str(len(body) - start))
            self.end_headers()
            self.wfile.write(body[start : options.get("stop_at")])

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


RECORDS = make_records()
FILES = {f"{PYTHON_FOLDER}/{name}": content for name, content in python_files(RECORDS).items()}
BODY = make_archive(FILES | {f"{PYTHON_FOLDER}/readme.html": b"x", "../outside": b"x"})
MD5 = hashlib.md5(BODY).hexdigest()
NAME = "cifar-10-python.tar.gz"


def archive_at(*urls):
    return Archive(NAME, urls, len(BODY), MD5)


def names(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_a_download_is_checked_unpacked_and_found_again(home):
    said = []
    with serve({"/a": (BODY, {})}) as (url, requests):
        archive = archive_at(f"{url}/a")
        arrays = cifar10.load(None, announce=said.append, archive=archive)
        np.testing.assert_array_equal(arrays.test_labels, RECORDS[5][:, 0])
        assert arrays.source == str(home / PYTHON_FOLDER) and len(said) == 1 and f"{url}/a" in said[0]
        cifar10.load(None, announce=said.append, archive=archive)
    assert requests == [("/a", None)] and len(said) == 1  # once is enough
    assert names(home) == [PYTHON_FOLDER]
    assert names(home / PYTHON_FOLDER) == sorted(cifar10.PYTHON_FILES) and not (home.parent / "outside").exists()


def test_a_broken_off_download_is_resumed(home):
    half = len(BODY) // 2
    with serve({"/a": (BODY, {"stop_at": half}), "/b": (BODY, {"ranges": True})}) as (url, requests):
        with pytest.raises(data.DataError, match=f"broke off after {half:,} of {len(BODY):,} bytes"):
            cifar10.download(archive_at(f"{url}/a"), home, announce=lambda _: None)
        assert names(home) == [f"{NAME}.part"] and (home / f"{NAME}.part").stat().st_size == half
        cifar10.download(archive_at(f"{url}/b"), home, announce=lambda _: None)
    assert requests == [("/a", None), ("/b", f"bytes={half}-")]
    assert names(home) == [PYTHON_FOLDER]


def test_a_server_that_cannot_resume_starts_over(home):
    home.mkdir(parents=True)
    (home / f"{NAME}.part").write_bytes(BODY[:100])
    with serve({"/a": (BODY, {"no_length": True})}) as (url, _):
        folder = cifar10.download(archive_at(f"{url}/a"), home, announce=lambda _: None)
    assert len(cifar10.read(folder).labels) == 5 * N


def test_a_bad_older_part_costs_one_more_try(home):
    home.mkdir(parents=True)
    (home / f"{NAME}.part").write_bytes(b"junk" * 10)
    with serve({"/a": (BODY, {"ranges": True})}) as (url, requests):
        cifar10.download(archive_at(f"{url}/a"), home, announce=lambda _: None)
    assert requests == [("/a", "bytes=40-"), ("/a", None)]
    assert names(home) == [PYTHON_FOLDER]


def test_a_mirror_with_a_wrong_file_is_passed_over(home):
    wrong = bytes(len(BODY))
    routes = {"/wrong": (wrong, {}), "/short": (BODY[:-5], {}), "/long": (BODY + b"x", {"no_length": True})}
    with serve(routes | {"/good": (BODY, {})}) as (url, requests):
        urls = [f"{url}{path}" for path in ("/missing", "/wrong", "/short", "/long", "/good")]
        cifar10.download(archive_at(*urls), home, announce=lambda _: None)
    assert [path for path, _ in requests] == ["/missing", "/wrong", "/short", "/long", "/good"]
    assert names(home) == [PYTHON_FOLDER]


def test_when_all_mirrors_fail_each_is_told_and_nothing_stays(home):
    with serve({"/wrong": (bytes(len(BODY)), {}), "/short": (BODY[:-5], {})}) as (url, _):
        with pytest.raises(data.DataError) as caught:
            archive = archive_at(f"{url}/missing", f"{url}/wrong", f"{url}/short")
            cifar10.download(archive, home, announce=lambda _: None)
    for part in ("404", "wrong MD5", f"offers {len(BODY) - 5:,} bytes, expected {len(BODY):,}"):
        assert part in str(caught.value)
    assert names(home) == []


def test_an_archive_without_a_batch_file_leaves_nothing_half_unpacked(home):
    body = make_archive({name: content for name, content in FILES.items() if "batch_3" not in name})
    with serve({"/a": (body, {})}) as (url, _):
        archive = Archive(NAME, (f"{url}/a",), len(body), hashlib.md5(body).hexdigest())
        with pytest.raises(data.DataError, match="data_batch_3"):
            cifar10.download(archive, home, announce=lambda _: None)
    assert PYTHON_FOLDER not in names(home) and not [name for name in names(home) if name.startswith(".")]


def test_no_network_is_told_quickly_and_leaves_no_cache(home):
    with serve({}) as (url, _):
        pass  # nothing listens there any more
    said = []
    with pytest.raises(data.DataError, match="127.0.0.1.*refused"):
        cifar10.load(None, announce=said.append, patience=2.0, archive=archive_at(f"{url}/a"))
    assert not said and not home.exists()
