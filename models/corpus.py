"""Text on disk -> token ids: the corpus, its byte-level BPE, and the yardsticks that any model must beat.

The default corpus is on every machine: the sources of the running interpreter's standard library. It
differs between Python versions, so its sha256 stands beside every figure. Tokenizer and ids are
cached by that hash.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
import sysconfig
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from actuary import BadInput
from models.files import new_folder, write_atomically

log = logging.getLogger(__name__)

CACHE = Path("artifacts/corpus")
SMALLEST_VOCAB = 257  # every byte, and the end of text
END_OF_TEXT = "<|endoftext|>"  # id 0; stands before every document
HELD_OUT_SHARE = 20  # one document in this many
# Not prose about Python: fixtures, generated tables, vendored packages.
_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "pydoc_data", "encodings", "__pycache__"}
_LEFT_OUT_PREFIX = "_sysconfigdata"


@dataclass(frozen=True)
class Ids:
    """Token ids of both parts, and the bytes that they stand for."""

    train: NDArray[np.int32]  # [N]
    held_out: NDArray[np.int32]  # [M], beginning with the end-of-text id, so that every token has one before it
    train_bytes: int
    held_out_bytes: int

    @property
    def bytes_per_token(self) -> float:
        return self.train_bytes / len(self.train)

    def frequency(self, vocab_size: int) -> NDArray[np.float64]:
        """Unigram probabilities [V] on the training part, half a count added so that none is zero."""
        counts = np.bincount(self.train, minlength=vocab_size) + 0.5
        return counts / counts.sum()


@dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order, split into a training and a held-out part."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]
    sha256: str
    cache: Path

    @classmethod
    def read(cls, paths: Sequence[Path] = (), cache: Path = CACHE) -> Corpus:
        """The corpus of the files and folders named, or of the standard library where none are."""
        named = _named_files(paths) if paths else _standard_library()
        documents: dict[str, str] = {}
        unreadable: list[Path] = []
        for name, path in sorted(named.items()):
            try:
                text = path.read_bytes().decode("utf-8")
            except OSError as error:
                raise BadInput(f"corpus file {path} cannot be read: {error.strerror}") from error
            except UnicodeDecodeError:
                if path in paths:
                    raise BadInput(f"corpus file {path} is not UTF-8 text; convert it or leave it out") from None
                unreadable.append(path)
                continue
            if text.strip():
                documents[name] = text
        if unreadable:
            log.warning("left out %d files that are not UTF-8 text, the first: %s", len(unreadable), unreadable[0])
        if not documents:
            raise BadInput(f"no text in {', '.join(map(str, paths))}; name files or folders that hold UTF-8 text")
        digest = hashlib.sha256()
        for name, text in documents.items():
            digest.update(f"{name}\0{len(text)}\0{text}".encode())
        train, held_out = _split(documents)
        return cls(tuple(train), tuple(held_out), digest.hexdigest(), cache)

    @property
    def train_bytes(self) -> int:
        return sum(len(text.encode()) for text in self.train)

    @property
    def held_out_bytes(self) -> int:
        return sum(len(text.encode()) for text in self.held_out)

    @functools.lru_cache(maxsize=2)  # noqa: B019  (a corpus lives as long as the program)
    def _cached(self, vocab_size: int) -> Path:
        """The folder that holds the tokenizer and ids, made where it is not there."""
        if vocab_size < SMALLEST_VOCAB:
            raise BadInput(
                f"vocab {vocab_size} is too small: a byte-level vocabulary has at least {SMALLEST_VOCAB} entries"
            )
        folder = self.cache / f"{self.sha256[:16]}-v{vocab_size}"
        if not (folder / "bytes.json").is_file():
            log.info("training a byte-level BPE of %d entries on %.1f MB", vocab_size, self.train_bytes / 1e6)
            with new_folder(folder) as partial:
                tokenizer = _train_bpe(self.train, vocab_size)
                for name, texts in (("train", self.train), ("held_out", self.held_out)):
                    np.save(partial / f"{name}.npy", _encode(tokenizer, texts))
                tokenizer.save(str(partial / "tokenizer.json"))
                sizes = {"train": self.train_bytes, "held_out": self.held_out_bytes}
                write_atomically(partial / "bytes.json", json.dumps(sizes))
        return folder

    def tokenizer(self, vocab_size: int) -> Tokenizer:
        """Byte-level BPE of at most `vocab_size` entries, trained on the training part."""
        return Tokenizer.from_file(str(self._cached(vocab_size) / "tokenizer.json"))

    def ids(self, vocab_size: int) -> Ids:
        folder = self._cached(vocab_size)
        sizes = json.loads((folder / "bytes.json").read_text())
        return Ids(np.load(folder / "train.npy"), np.load(folder / "held_out.npy"), sizes["train"], sizes["held_out"])

    def yardsticks(self, vocab_size: int) -> dict[str, float]:
        """Held-out bits per byte of what needs no network: unigram and bigram over the same tokens, and zlib -9."""
        path = self._cached(vocab_size) / "yardsticks.json"
        if not path.is_file():
            ids = self.ids(vocab_size)
            figures = {
                "unigram": _unigram_nats(ids, vocab_size) / math.log(2) / ids.held_out_bytes,
                "bigram": _bigram_nats(ids, vocab_size) / math.log(2) / ids.held_out_bytes,
                "zlib": 8 * len(zlib.compress("".join(self.held_out).encode(), 9)) / ids.held_out_bytes,
            }
            write_atomically(path, json.dumps(figures))
        figures = json.loads(path.read_text())
        return {name: float(value) for name, value in figures.items()}


def padded_tokenizer(tokenizer: Tokenizer, vocab_size: int) -> Tokenizer:
    """The tokenizer grown to exactly `vocab_size` by entries that no text has, where a corpus did not fill it."""
    missing = vocab_size - tokenizer.get_vocab_size()
    if missing > 0:
        tokenizer.add_special_tokens([f"<|unused{i}|>" for i in range(missing)])
    return tokenizer


def _standard_library() -> dict[str, Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    return {
        str(path.relative_to(root)): path
        for path in root.rglob("*.py")
        if not _LEFT_OUT.intersection(path.relative_to(root).parts[:-1]) and not path.name.startswith(_LEFT_OUT_PREFIX)
    }


def _named_files(paths: Iterable[Path]) -> dict[str, Path]:
    paths = list(dict.fromkeys(paths))
    names = [path.name for path in paths]
    files: dict[str, Path] = {}
    for path in paths:
        label = path.name if names.count(path.name) == 1 else str(path)  # a/src and b/src are two folders
        if path.is_dir():
            inside = (p for p in path.rglob("*") if p.is_file())
            files |= {
                f"{label}/{p.relative_to(path)}": p
                for p in inside
                if not any(part.startswith(".") or part == "__pycache__" for part in p.relative_to(path).parts)
            }
        elif path.is_file():
            files[label] = path
        else:
            raise BadInput(f"corpus path {path} does not exist")
    return files


def _split(documents: dict[str, str]) -> tuple[list[str], list[str]]:
    """By hash of the name, so that a document stays on its side when others come and go. Where that
    leaves a lopsided split (few documents), the last twentieth of each document is held out instead."""
    held = {name for name in documents if int(hashlib.sha256(name.encode()).hexdigest(), 16) % HELD_OUT_SHARE == 0}
    share = sum(len(documents[name]) for name in held) / sum(map(len, documents.values()))
    if 0.02 <= share <= 0.2:
        return [t for n, t in documents.items() if n not in held], [t for n, t in documents.items() if n in held]
    cuts = {name: len(text) - max(1, len(text) // HELD_OUT_SHARE) for name, text in documents.items()}
    return [t[: cuts[n]] for n, t in documents.items()], [t[cuts[n] :] for n, t in documents.items()]


def _train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # any text can be encoded, whatever the corpus held
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return padded_tokenizer(tokenizer, vocab_size)


def _encode(tokenizer: Tokenizer, texts: Sequence[str]) -> NDArray[np.int32]:
    end = tokenizer.token_to_id(END_OF_TEXT)
    encoded = tokenizer.encode_batch(list(texts), add_special_tokens=False)
    return np.concatenate([np.array([end, *encoding.ids], dtype=np.int32) for encoding in encoded])


def _unigram_nats(ids: Ids, vocab_size: int) -> float:
    return float(-np.log(ids.frequency(vocab_size))[ids.held_out[1:]].sum())


def _bigram_nats(ids: Ids, vocab_size: int, weight: float = 160.0) -> float:
    """-sum log p(b | a), with p(b | a) = (count(a, b) + weight * p(b)) / (count(a) + weight): the unigram as prior
    worth `weight` counts (of 20, 80, 160, 320 and 640 the strongest on the default corpus: 2.053 bits
    per byte, 2.080 at both ends)."""

    def pairs(tokens: NDArray[np.int32]) -> NDArray[np.int64]:
        return tokens[:-1].astype(np.int64) * vocab_size + tokens[1:]

    seen, counts = np.unique(pairs(ids.train), return_counts=True)
    asked = pairs(ids.held_out)
    at = np.minimum(np.searchsorted(seen, asked), len(seen) - 1)
    together = np.where(seen[at] == asked, counts[at], 0)
    before = np.bincount(ids.train, minlength=vocab_size)[ids.held_out[:-1]]
    prior = ids.frequency(vocab_size)[ids.held_out[1:]]
    return float(-np.log((together + weight * prior) / (before + weight)).sum())
