"""Text in tokens: what a corpus is cut into, what windows hold, and which texts are refused."""

import math

import jax
import numpy as np
import pytest

from esper_jax import data
from esper_jax.config import TextDataConfig
from esper_jax.data import text
from esper_jax.data.pipeline import DataError


def files(tmp_path, *contents):
    paths = [tmp_path / f"{number}.txt" for number in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return tuple(map(str, paths))


def config(names, **changes):
    return TextDataConfig(name="files", files=names, **{"window": 4, **changes})


def test_blocks_are_contiguous_and_windows_do_not_cross_them(tmp_path):
    """100 characters: 80 train, 10 validate and 10 test; of 10 tokens two windows of 4 have a token that follows."""
    written = "".join(chr(ord("a") + k % 26) for k in range(100))
    found = data.load(config(files(tmp_path, written)))
    assert found.text(range(26)) == "abcdefghijklmnopqrstuvwxyz" and found.outputs == 26
    assert found.text(found.train) == written[:80]
    for split, start in ((found.validation, 80), (found.test, 90)):
        assert split.inputs.shape == split.labels.shape == (2, 4) and split.characters_per_token == 1
        assert found.text(split.inputs.ravel()) == written[start : start + 8]
        assert found.text(split.labels.ravel()) == written[start + 1 : start + 9]
    few = data.load(config(files(tmp_path, written), validation_windows=1))
    assert few.validation.inputs.shape == (1, 4) and few.test.inputs.shape == (2, 4)
    # several files are one text
    joined = data.load(config(files(tmp_path, written[:50], written[50:])))
    assert joined.text(joined.train[:60]) == f"{written[:50]}\n{written[50:59]}"


def test_batches_are_windows_of_the_training_block_by_key(tmp_path):
    found = data.load(config(files(tmp_path, "".join(chr(97 + k % 26) for k in range(200)))))
    starts = found.order(jax.random.key(0), 50, 8)
    assert starts.shape == (50, 8) and starts.min() >= 0 and starts.max() == found.train_size - 1 == 160 - 4 - 1
    x, y = found.batch(jax.random.key(1), starts[0])
    for row, start in enumerate(starts[0].tolist()):
        np.testing.assert_array_equal(x[row], found.train[start : start + 4])
        np.testing.assert_array_equal(y[row], found.train[start + 1 : start + 5])
    assert (starts == found.order(jax.random.key(0), 50, 8)).all()
    assert (starts != found.order(jax.random.key(1), 50, 8)).any()


def test_the_help_of_python_is_a_text():
    found = data.load(TextDataConfig())
    assert found.train.size > 300_000 and 90 < found.outputs < 200 and found.source == "pydoc_data.topics"
    assert found.identity == data.load(TextDataConfig()).identity
    assert found.identity != data.load(TextDataConfig(limit=100_000)).identity
    # a bigram knows more than a uniform guess, and less than twice the truth of English
    bits = text.bigram_loss(found, found.test) / math.log(2)
    assert 2 < bits < math.log2(found.outputs) - 2


def test_bigram_loss_by_hand(tmp_path):
    """Train "abababab", test "baba": a follows b 3 times and b follows a 4 times, plus one for every pair."""
    found = data.load(config(files(tmp_path, "abababab" + "ab" + "ba"), held_out=1 / 6, window=1))
    # the one window of the test block: b, then a: (3 + 1) / (3 + 2)
    assert found.text(found.test.inputs.ravel()) == "b"
    np.testing.assert_allclose(text.bigram_loss(found, found.test), -math.log(4 / 5))


@pytest.mark.parametrize(
    ("content", "changes", "said"),
    [
        (b"abc\xff" * 50, {}, "--text {file}: must be UTF-8, but has the byte 0xff at 3"),
        ("  \n ", {}, "--text {file}: is empty; must hold text"),
        (
            "abc" * 10,
            {},
            "TextDataConfig.window = 4: the validation block of 0.txt has 3 tokens, and must have more than a window",
        ),
        (
            "".join(map(chr, range(0x4E00, 0x4E00 + 3000))),
            {},
            " has 3000 different characters: must be at most 2048; --data.tokens bpe takes any",
        ),
    ],
)
def test_a_text_that_will_not_do_is_named(tmp_path, content, changes, said):
    names = files(tmp_path, content)
    with pytest.raises(DataError) as error:
        data.load(config(names, **changes))
    assert said.format(file=names[0]) in str(error.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(DataError, match=r"--text .*nowhere.txt: No such file"):
        data.load(config((str(tmp_path / "nowhere.txt"),)))
    with pytest.raises(DataError, match="--text .*: Is a directory"):
        data.load(config((str(tmp_path),)))


def test_byte_pairs(tmp_path):
    """270 tokens: every byte and 14 merges; what they stand for is the text again."""
    pytest.importorskip("tokenizers")
    written = "the cat sat on the mat, and the hat on the cat. " * 60
    found = data.load(config(files(tmp_path, written), tokens="bpe", vocabulary=270, window=8))
    assert found.outputs == 270 and found.text(found.train) == written[: round(0.8 * len(written))]
    assert found.train.size < 0.5 * len(written) and found.test.characters_per_token > 2
    with pytest.raises(DataError, match="TextDataConfig.vocabulary = 5000: must be at most "):
        data.load(config(files(tmp_path, written), tokens="bpe", vocabulary=5000))


@pytest.mark.parametrize(
    "line",
    ["\u732b\u5728\u57ab\u5b50\u4e0a\u3002", "\u0393\u03b1\u03c4\u03b1 \u03ba\u03b1\u03b9 ", "naive cafe\u0301 "],
)
@pytest.mark.parametrize("size", [257, 300])
def test_characters_of_byte_pairs_are_counted_once(tmp_path, line, size):
    """A character whose bytes lie in several tokens is one; else bits per character are too low by that factor."""
    pytest.importorskip("tokenizers")
    whole_text = "".join(np.random.default_rng(0).choice(list(line), 3000))
    found = data.load(config(files(tmp_path, whole_text), tokens="bpe", vocabulary=size, window=8))
    labels = np.asarray(found.test.labels)
    whole = b"".join(found.vocabulary[token] for token in labels.ravel())
    starts = sum(byte & 0xC0 != 0x80 for byte in whole)
    np.testing.assert_allclose(found.test.characters_per_token, starts / labels.size, rtol=1e-12)
    written = found.text(found.train)
    assert written == whole_text[: len(written)] and len(written) == 2400
    # of the whole training block, where no character is cut: what the text says
    pieces = sum(sum(byte & 0xC0 != 0x80 for byte in found.vocabulary[t]) for t in np.asarray(found.train))
    assert pieces == len(written)


def test_one_character_alone_or_zero_bytes_are_no_text(tmp_path):
    with pytest.raises(DataError, match="one character alone, 'a'"):
        data.load(config(files(tmp_path, "a" * 500)))
    with pytest.raises(DataError, match="a zero byte as character 1"):
        data.load(config(files(tmp_path, "h\0e\0" * 500)))
    marked = tmp_path / "marked.txt"
    marked.write_bytes(b"\xef\xbb\xbf" + b"some words " * 60)
    assert "\ufeff" not in data.load(config((str(marked),))).text(range(8))
