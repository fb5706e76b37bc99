"""Text as tokens on the device: characters or byte pairs of any files, by default of the help that comes with Python.

A corpus is cut into three contiguous blocks: train, reward validation, report test. No window crosses them. Axis
letters: N tokens, W windows, L tokens of a window, B windows of a batch.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from esper_jax.config import TextDataConfig
from esper_jax.data.pipeline import DataError
from esper_jax.metric import Metric, bits_per_character
from esper_jax.types import Array

MOST_CHARACTERS = 2048  # different ones; a text with more of them wants byte pairs
MOST_STORIES = 20_000_000  # characters of TinyStories, unless a limit says otherwise


@struct.dataclass
class Windows:
    """Consecutive windows of a block, next to each other."""

    inputs: Array  # i32[W, L]
    labels: Array  # i32[W, L] the tokens that follow
    characters_per_token: float = struct.field(pytree_node=False)  # of the labels


@struct.dataclass
class TextDataset:
    """Three blocks of a text on the device, and what a run has to say about them."""

    train: Array  # i32[N]
    validation: Windows  # all that controller, reward, governor and gates see
    test: Windows  # for the final report only
    window: int = struct.field(pytree_node=False)  # L
    name: str = struct.field(pytree_node=False)
    vocabulary: tuple[bytes, ...] = struct.field(pytree_node=False)  # what each token stands for
    identity: str = struct.field(pytree_node=False)  # a hash of text and tokens
    source: str = struct.field(pytree_node=False)

    @property
    def example(self) -> tuple[int, ...]:
        """Shape of one input."""
        return (self.window,)

    @property
    def outputs(self) -> int:
        """Tokens of the vocabulary."""
        return len(self.vocabulary)

    @property
    def prompt(self) -> Array:
        """What a network is to go on with: the first window of the report test, i32[L]."""
        return self.test.inputs[0]

    @property
    def classes(self) -> tuple[str, ...]:
        """There are none: nothing is reported for every token."""
        return ()

    def _tokens(self) -> dict[str, int]:
        return {"train": self.train.size} | {part: getattr(self, part).labels.size for part in ("validation", "test")}

    def facts(self) -> dict[str, Any]:
        """For the run card: how many tokens are in each block, what they are, and what a bigram model makes of them."""
        return {
            "tokens": self._tokens(), "window": self.window, "vocabulary": self.outputs,
            "characters_per_token": self.test.characters_per_token, "bigram_loss": bigram_loss(self, self.test),
        }  # fmt: skip

    def sizes(self) -> str:
        """How many tokens are in each block, for a line."""
        return ", ".join(f"{n} {part}" for part, n in self._tokens().items()) + f" tokens of {self.outputs}"

    def metric(self, split: Windows) -> Metric:
        """What a host is judged by on a split: byte pairs of one may be longer than those of another."""
        return bits_per_character(self.outputs, split.characters_per_token)

    @property
    def train_size(self) -> int:
        """Windows that can be drawn, each from another start."""
        return self.train.shape[0] - self.window

    def order(self, key: Array, batches: int, batch_size: int) -> Array:
        """Where the windows of an epoch start, i32 `[batches, batch_size]`, drawn with replacement."""
        return jax.random.randint(key, (batches, batch_size), 0, self.train_size, jnp.int32)

    def batch(self, key: Array, starts: Array) -> tuple[Array, Array]:
        """Windows that start there and the tokens that follow, i32 `[B, L]` each."""
        del key
        places = starts[:, None] + jnp.arange(self.window + 1, dtype=jnp.int32)[None]
        tokens = self.train[places]
        return tokens[:, :-1], tokens[:, 1:]

    def prepare(self, inputs: Array) -> Array:
        """What the host reads: the tokens."""
        return inputs

    def text(self, tokens: Iterable[int]) -> str:
        """What tokens stand for."""
        return b"".join(self.vocabulary[int(token)] for token in tokens).decode("utf-8", "replace")


class Corpus(NamedTuple):
    """A text before it is cut."""

    text: str
    source: str


def embedded() -> Corpus:
    """The English help on Python's language that `help()` prints, as it comes with this interpreter.

    Raises DataError where the standard library was installed without it.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DataError("Python's help topics (pydoc_data) are not installed: give --text FILE") from error
    return Corpus("\n\n".join(topics[name] for name in sorted(topics)), "pydoc_data.topics")


def read(files: Iterable[str]) -> Corpus:
    """Files of UTF-8, one after the other. Raises DataError naming the file that cannot be read or is no text."""
    parts = []
    for name in files:
        try:
            parts.append(Path(name).expanduser().read_bytes().decode("utf-8-sig"))
        except OSError as error:
            raise DataError(f"--text {shlex.quote(name)}: {error.strerror or error}") from None
        except UnicodeDecodeError as error:
            byte = f"byte 0x{error.object[error.start]:02x} at {error.start}"
            raise DataError(f"--text {name}: must be UTF-8, but has the {byte}") from None
        except RuntimeError as error:  # ~ of somebody without a home
            raise DataError(f"--text {name}: {error}") from None
        if not parts[-1].strip():
            raise DataError(f"--text {name}: is empty; must hold text")
        if "\0" in parts[-1]:
            raise DataError(f"--text {name}: must be UTF-8, but has a zero byte as character {parts[-1].index(chr(0))}")
    return Corpus("\n".join(parts), " ".join(Path(name).name for name in files))


def tinystories(limit: int) -> Corpus:
    """The first stories of TinyStories (Eldan and Li, 2023), up to so many characters, by Hugging Face `datasets`.

    Raises DataError if that is not installed or the stories cannot be had.
    """
    try:
        import datasets
    except ImportError:
        raise DataError("--data tinystories needs an extra: pip install 'esper_jax[text]'") from None
    try:
        stories, size = [], 0
        for row in datasets.load_dataset("roneneldan/TinyStories", split="train", streaming=True):
            stories.append(row["text"])
            size += len(stories[-1]) + 2
            if size >= limit:
                break
    except Exception as error:  # whatever a network makes that library raise
        raise DataError(f"--data tinystories: cannot be had: {type(error).__name__}: {error}") from error
    return Corpus("\n\n".join(stories)[:limit], "huggingface.co/datasets/roneneldan/TinyStories")


class Tokens(NamedTuple):
    """How a text is written in tokens."""

    vocabulary: tuple[bytes, ...]  # UTF-8; a byte pair may hold a part of a character
    encode: Callable[[str], np.ndarray]  # text -> i32[N]


def characters(text: str, source: str = "the text") -> Tokens:
    """A token for each character that occurs. Raises DataError if they are more than `MOST_CHARACTERS`, or only one."""
    points = np.unique(_points(text))
    if len(points) < 2:
        raise DataError(f"--text: {source} has one character alone, {chr(points[0])!r}: must have at least 2")
    if len(points) > MOST_CHARACTERS:
        raise DataError(
            f"TextDataConfig.tokens = 'characters': {source} has {len(points)} different characters: must be at most "
            f"{MOST_CHARACTERS}; --data.tokens bpe takes any"
        )
    encode = lambda text: np.searchsorted(points, _points(text)).astype(np.int32)
    return Tokens(tuple(chr(point).encode("utf-8", "surrogatepass") for point in points), encode)


def _points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def byte_pairs(text: str, size: int, source: str = "the text") -> Tokens:
    """Byte pairs (Sennrich et al., 2016), merged over the bytes of a text until there are `size` tokens.

    Raises DataError if the extra is not installed, or the text is too small for so many.
    """
    try:
        import tokenizers
    except ImportError:
        raise DataError("TextDataConfig.tokens = 'bpe': needs an extra: pip install 'esper_jax[text]'") from None
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    model.train_from_iterator([text], trainer)
    found = model.get_vocab_size()
    if found != size:
        raise DataError(
            f"TextDataConfig.vocabulary = {size}: must be at most {found}, for which {source} has byte pairs"
        )
    byte_of = _bytes_of_letters()
    vocabulary = tuple(bytes(byte_of[letter] for letter in model.id_to_token(token)) for token in range(size))
    return Tokens(vocabulary, lambda text: np.array(model.encode(text).ids, np.int32))


def _bytes_of_letters() -> dict[str, int]:
    """The byte that each letter of the ByteLevel alphabet stands for (Radford et al., 2019): printable ones for
    themselves, the others in their order for the letters from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


def load(cfg: TextDataConfig) -> TextDataset:
    """The text a configuration names, in tokens, cut and on the device.

    Raises DataError (a ValueError) if it cannot be had, is no text, or is too short for its windows.
    """
    if cfg.name == "files":
        corpus = read(cfg.files)
    else:
        corpus = embedded() if cfg.name == "topics" else tinystories(cfg.limit or MOST_STORIES)
    text = corpus.text[: cfg.limit]
    held_out = max(1, round(cfg.held_out * len(text)))
    ends = len(text) - 2 * held_out, len(text) - held_out
    blocks = text[: ends[0]], text[ends[0] : ends[1]], text[ends[1] :]
    if cfg.tokens == "characters":
        tokens = characters(text, corpus.source)
    else:
        tokens = byte_pairs(blocks[0], cfg.vocabulary, corpus.source)
    train, validation, test = (tokens.encode(block) for block in blocks)
    for what, block in (("training", train), ("validation", validation), ("test", test)):
        if len(block) <= cfg.window:
            raise DataError(
                f"TextDataConfig.window = {cfg.window}: the {what} block of {corpus.source} has {len(block)} tokens, "
                f"and must have more than a window (the text has {len(text)} characters, of which a share of "
                f"{cfg.held_out} validates and as much tests)"
            )
    digest = hashlib.md5(train.tobytes() + validation.tobytes() + test.tobytes(), usedforsecurity=False)
    digest.update(b"\0".join(tokens.vocabulary))
    return TextDataset(
        train=jnp.asarray(train),
        validation=windows(validation, tokens, cfg.window, cfg.validation_windows),
        test=windows(test, tokens, cfg.window, cfg.test_windows),
        window=cfg.window,
        name=cfg.name,
        vocabulary=tokens.vocabulary,
        identity=f"md5:{digest.hexdigest()}",
        source=corpus.source,
    )


def windows(block: np.ndarray, tokens: Tokens, size: int, most: int) -> Windows:
    """The first windows of a block, at most `most`, each of `size` tokens and the ones that follow."""
    count = min(most, (len(block) - 1) // size)
    inputs, labels = (block[shift : shift + count * size].reshape(count, size) for shift in (0, 1))
    # characters: bytes but for those that go on with one (10xxxxxx)
    lengths = np.array([sum(byte & 0xC0 != 0x80 for byte in piece) for piece in tokens.vocabulary])
    per_token = float(lengths[labels].sum() / labels.size)
    return Windows(jnp.asarray(inputs), jnp.asarray(labels), per_token)


def bigram_loss(dataset: TextDataset, split: Windows) -> float:
    """Nats per token of a bigram model: counts of the training block plus one for every pair."""
    size = dataset.outputs
    tokens = np.asarray(dataset.train)
    counts = np.bincount(tokens[:-1] * size + tokens[1:], minlength=size * size).reshape(size, size) + 1.0
    log_p = np.log(counts / counts.sum(1, keepdims=True))
    return float(-log_p[np.asarray(split.inputs).ravel(), np.asarray(split.labels).ravel()].mean())
