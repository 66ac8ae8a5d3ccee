"""One bundle, ready to answer: its manifest, its vocabulary and its session.

A variant is only made from a graph that keeps the contract of export/bundle.py and has run once.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actuary import BadInput
from export import bundle, onnx_file
from export.audit import CPU, RUNS, Audit, audit, check_file, check_placement
from export.bundle import Manifest
from service.runtime import Runtime
from service.vocabulary import Vocabulary

# Types and ranks that the graph must have.
_INPUTS = {bundle.INPUT_IDS: ("int64", 2), bundle.LENGTHS: ("int64", 1), bundle.TOP_K: ("int64", 1)}
_OUTPUTS = dict.fromkeys(bundle.OUTPUTS, ("float", 2)) | {bundle.TOP_IDS: ("int64", 2)}
# And those that it must have besides, where it has a cache.
_CACHE_INPUTS = {
    bundle.PAST: ("float", 3),
    bundle.PAST_SLOTS: ("int64", 2),
    bundle.PAST_LENGTHS: ("int64", 1),
    bundle.ROWS: ("int64", 1),
}
_CACHE_OUTPUTS = {bundle.PRESENT: ("float", 3)}

WIDE_TOKENS = (1, 16, 64)  # of the prompts that are timed on one core and on all
WIDE_ROUNDS, WIDE_S = 7, 0.1  # how often at least, and for how long
WIDE_MOST_S = 1.0  # where that leaves doubt: another process that starts beside this one is busy for as long
PAUSE_S = 0.002  # before each: between two requests the cores sleep, and waking them is part of a run
WIDE_GAIN = 0.9  # of the time on one core: for less, a second session is not worth its memory
ROW_BYTES = 3 * 4  # for each token of the vocabulary: logit, softmax, sigmoid


@dataclass(frozen=True)
class Row:
    """The next token of one prompt, over the vocabulary V, as the graph computed it."""

    logits: NDArray[np.float32]  # [V]
    softmax: NDArray[np.float32]  # [V]
    sigmoid: NDArray[np.float32]  # [V]
    top_ids: NDArray[np.int64]  # [K], by falling logit, ties by rising id
    mass: NDArray[np.float32]  # [2]: of softmax, of sigmoid
    entropy_bits: NDArray[np.float32]  # [2]


@dataclass(frozen=True)
class Rows:
    """The same after R consecutive tokens of one sequence."""

    logits: NDArray[np.float32]  # [R, V]
    softmax: NDArray[np.float32]  # [R, V]
    sigmoid: NDArray[np.float32]  # [R, V]
    top_ids: NDArray[np.int64]  # [R, K]
    mass: NDArray[np.float32]  # [R, 2]
    entropy_bits: NDArray[np.float32]  # [R, 2]

    @property
    def last(self) -> Row:
        return Row(
            self.logits[-1], self.softmax[-1], self.sigmoid[-1], self.top_ids[-1], self.mass[-1], self.entropy_bits[-1]
        )

    def top(self, top_k: int) -> Rows:
        """With no more than so many `top_ids`."""
        return dataclasses.replace(self, top_ids=self.top_ids[:, :top_k])


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens of one sequence that are computed in one batch, after those that the pool has."""

    ids: Sequence[int]
    past: NDArray[np.int64]  # slots of the tokens before them
    slots: NDArray[np.int64]  # where to store theirs; empty: nowhere
    rows: int  # so many rows are asked: those after the last tokens


@dataclass(frozen=True, eq=False)
class Variant:
    """One served model."""

    manifest: Manifest
    vocabulary: Vocabulary
    session: Any  # onnxruntime.InferenceSession
    provider: str
    unfused: str  # why its activation runs as standard operators; empty where it runs our kernel
    audit: Audit
    file_bytes: int  # of the graph with its weights
    wide_session: Any = None  # the same on all lanes' cores at once; None where that is never faster
    wide_at: tuple[int, ...] = ()  # of WIDE_TOKENS, those for which it is faster

    @property
    def name(self) -> str:
        return self.manifest.name

    @property
    def context(self) -> int:
        return self.manifest.context

    @property
    def row_bytes(self) -> int:
        """Memory of one row."""
        return ROW_BYTES * self.manifest.vocab_size

    @functools.cached_property
    def _past(self) -> Any:
        """The graph's input for its pool; None where it has none."""
        return next((value for value in self.session.get_overridable_initializers() if value.name == bundle.PAST), None)

    @functools.cached_property
    def cached(self) -> bool:
        """Whether the graph computes packed tokens after those of a pool, and gives several rows of a prompt."""
        return self._past is not None

    @property
    def pads(self) -> bool:
        """Whether memory goes by the longest prompt of a batch: attention has no kernel that takes them as they are."""
        return self.audit.attention != "fused"

    @property
    def pool_shape(self) -> tuple[int, int] | None:
        """L and W of its pool [L, S, W]; None where it has none, or would have to be copied to a device each time."""
        return (self._past.shape[0], self._past.shape[2]) if self.cached and self.provider == CPU else None

    def faster_wide(self, tokens: int) -> bool:
        """Whether a batch of so many tokens, where it is alone, is faster on all cores."""
        return max(size for size in WIDE_TOKENS if size <= tokens) in self.wide_at

    def tokens_of(self, piece: Piece) -> int:
        """Tokens that a piece costs."""
        if self.cached:
            return len(piece.ids)
        return sum(range(len(piece.ids) - piece.rows + 1, len(piece.ids) + 1))

    def run(self, prompts: Sequence[Sequence[int]], top_k: int, wide: bool = False) -> list[Row]:
        """B prompts of 1 to `context` ids each -> B rows, with K = top_k. Blocks; safe from any thread."""
        nowhere = np.empty(0, np.int64)
        pieces = [Piece(ids, nowhere, nowhere, 1) for ids in prompts]
        return [rows.last for rows in self.compute(pieces, top_k, None, wide) if len(rows.logits)]

    def compute(
        self, pieces: Sequence[Piece], top_k: int, pool: NDArray[np.float32] | None = None, wide: bool = False
    ) -> list[Rows]:
        """The rows of each piece, with K = top_k; of its tokens, keys and values go to their slots of the pool.

        Blocks; safe from any thread, as long as no two write the same slots.
        """
        session = self.wide_session if wide else self.session
        if not self.cached:
            return _as_prompts(session, pieces, top_k)
        feeds = _feeds([piece.ids for piece in pieces], top_k)
        if longest := max(piece.past.size for piece in pieces):
            feeds[bundle.PAST] = pool
            feeds[bundle.PAST_LENGTHS] = np.array([piece.past.size for piece in pieces])
            feeds[bundle.PAST_SLOTS] = past = np.zeros((len(pieces), longest), np.int64)  # slot 0 is nobody's
            for slots, piece in zip(past, pieces, strict=True):
                slots[: piece.past.size] = piece.past
        # The graph gives each piece's last row by itself; where more are asked, that one is asked with them, so that
        # they stand together and need not be copied.
        ends = np.cumsum([len(piece.ids) for piece in pieces])
        several = [np.arange(end - piece.rows, end) for piece, end in zip(pieces, ends, strict=True) if piece.rows > 1]
        if several:
            feeds[bundle.ROWS] = np.concatenate(several)
        stored = any(piece.slots.size for piece in pieces)
        found = session.run([*bundle.OUTPUTS, bundle.PRESENT] if stored else bundle.OUTPUTS, feeds)
        if stored:
            assert pool is not None
            _store(pool, found.pop(), pieces, ends)
        rows, next_of_several = [], len(pieces)
        for at, piece in enumerate(pieces):
            start = at if piece.rows < 2 else next_of_several
            next_of_several += piece.rows if piece.rows > 1 else 0
            rows.append(Rows(*(array[start : start + piece.rows] for array in found)))
        return rows


def _feeds(prompts: Sequence[Sequence[int]], top_k: int) -> dict[str, Any]:
    """The inputs that every graph has."""
    lengths = np.fromiter(map(len, prompts), np.int64, len(prompts))
    ids = np.zeros((len(prompts), lengths.max()), np.int64)  # [B, T], padded on the right
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    return {bundle.INPUT_IDS: ids, bundle.LENGTHS: lengths, bundle.TOP_K: np.array([top_k])}


def _as_prompts(session: Any, pieces: Sequence[Piece], top_k: int) -> list[Rows]:
    """For a graph without a cache, which gives one row a prompt: every row asked is a prompt of its own."""
    ends = [(piece.ids, end) for piece in pieces for end in range(len(piece.ids) - piece.rows, len(piece.ids))]
    found = session.run(bundle.OUTPUTS, _feeds([ids[: end + 1] for ids, end in ends], top_k))
    starts = np.cumsum([0, *(piece.rows for piece in pieces)])
    return [Rows(*(array[start:end] for array in found)) for start, end in itertools.pairwise(starts)]


def _store(
    pool: NDArray[np.float32], present: NDArray[np.float32], pieces: Sequence[Piece], ends: NDArray[np.int64]
) -> None:
    """present [L, N, W] into its slots. One copy: 36 us for 64 tokens at L = 6, W = 768, 25 where slots are in line."""
    slots = np.concatenate([piece.slots for piece in pieces])
    if slots.size < present.shape[1]:  # some are stored nowhere
        kept = [np.arange(end - piece.slots.size, end) for piece, end in zip(pieces, ends, strict=True)]
        present = present[:, np.concatenate(kept)]
    first, last = int(slots[0]), int(slots[-1])
    if last - first == slots.size - 1 and (slots[1:] > slots[:-1]).all():
        pool[:, first : last + 1] = present
    else:
        pool[:, slots] = present


def open_variant(folder: Path, runtime: Runtime, vocabulary: Callable[[Path, str], Vocabulary]) -> Variant:
    """The bundle in `folder`, verified, opened and run once; BadInput or the cause where it is not good.

    Args:
        vocabulary: gives the Vocabulary of a tokenizer.json, by its path and sha256.
    """
    manifest = bundle.read_bundle(folder)
    tokenizer = vocabulary(folder / bundle.TOKENIZER, manifest.files[bundle.TOKENIZER])
    if tokenizer.size > manifest.vocab_size:
        raise BadInput(
            f"{bundle.TOKENIZER} has ids up to {tokenizer.size - 1}, the model's vocabulary has "
            f"{manifest.vocab_size}; export it again with its own tokenizer"
        )
    file = onnx_file.read(folder / bundle.MODEL)
    check_file(file, manifest.opset)

    def opened(wide: bool) -> Any:
        return runtime.open(folder / bundle.MODEL, manifest.activation_info, manifest.precision, wide)

    session = opened(wide=False)
    found = _audited(session, file, manifest, runtime)
    _check_signature("input", _INPUTS, session.get_inputs())
    _check_signature("output", _OUTPUTS, session.get_outputs())
    unfused = _unfused(found, runtime.unfused(manifest.activation_info, manifest.precision))
    file_bytes = sum((folder / name).stat().st_size for name in manifest.files if name != bundle.TOKENIZER)
    variant = Variant(manifest, tokenizer, session, found.provider, unfused, found, file_bytes)
    if variant.cached:
        _check_signature("input", _CACHE_INPUTS, session.get_overridable_initializers())
        _check_signature("output", _CACHE_OUTPUTS, session.get_outputs())
    _warm_up(variant)
    if runtime.lanes == 1:
        return variant
    shape = manifest.layers, manifest.dim, manifest.vocab_size, manifest.context, manifest.precision
    if runtime.wide_at.get(shape) == ():
        return variant
    both = dataclasses.replace(variant, wide_session=opened(wide=True))
    if shape not in runtime.wide_at:
        runtime.wide_at[shape] = _where_wide_is_faster(both)
    faster = runtime.wide_at[shape]
    return dataclasses.replace(both, wide_at=faster) if faster else variant


def _where_wide_is_faster(variant: Variant) -> tuple[int, ...]:
    """Of WIDE_TOKENS. Where it does not pay for the longest, it does not for the others, and they need not be timed."""
    sizes = [tokens for tokens in reversed(WIDE_TOKENS) if tokens <= variant.context]
    return tuple(itertools.takewhile(lambda tokens: _wide_is_faster(variant, tokens), sizes))


def _wide_is_faster(variant: Variant, tokens: int) -> bool:
    """Measured in turn, on one prompt; by the lower quartile of each, once the best says the same.

    Not by the best alone: for 16 tokens of 14M parameters in int8 the best wide run took .8 of a narrow one, the median
    1.6. A worker that is woken on the core of the one that spins for it runs when that one's slice, of 3 ms, is over.
    But where others are busy the quartile is at fault: for 64 tokens 1.6 to 1.9 beside tests, .7 when they were over.
    """
    prompt = [[0] * tokens]
    taken: dict[bool, list[float]] = {True: [], False: []}
    began = perf_counter()
    while True:
        for wide, times in taken.items():
            sleep(PAUSE_S)
            start = perf_counter()
            variant.run(prompt, 1, wide)
            times.append(perf_counter() - start)
        passed = perf_counter() - began
        if len(taken[True]) >= WIDE_ROUNDS and passed >= WIDE_S:
            best, quartile = (
                np.percentile(taken[True], of) < WIDE_GAIN * np.percentile(taken[False], of) for of in (0, 25)
            )
            if best == quartile or passed >= WIDE_MOST_S:
                return bool(quartile)


def _audited(session: Any, file: onnx_file.OnnxFile, manifest: Manifest, runtime: Runtime) -> Audit:
    """Where its nodes went; BadInput where CUDA was asked for by name and part of the work would run elsewhere."""
    found = audit(session, file, manifest.precision)
    if runtime.strict:
        check_placement(found)
    if why := runtime.why_cpu(manifest.precision):
        return found.model_copy(update={"notes": (*found.notes, f"on the CPU: {why}")})
    return found


def _unfused(found: Audit, reason: str) -> str:
    """Why the activation runs as standard operators; empty where it runs our kernel."""
    if found.activation == "fused":
        return ""
    if found.activation == "standard":
        return RUNS["standard"]
    return reason or "the library has no kernel for the types of this graph"


def _check_signature(what: str, expected: dict[str, tuple[str, int]], found: Sequence[Any]) -> None:
    has = {value.name: value for value in found}
    for name, (element, rank) in expected.items():
        if name not in has:
            raise BadInput(f"the graph has no {what} {name!r}, only {', '.join(has)}; export it again")
        value = has[name]
        if value.type != f"tensor({element})" or len(value.shape) != rank:
            raise BadInput(
                f"the graph's {what} {name!r} is {value.type} of {len(value.shape)} dimensions; "
                f"it must be tensor({element}) of {rank}: export it again"
            )


def _warm_up(variant: Variant) -> None:
    """The longest prompt with the last id, then two of different lengths; refuses what they show."""
    vocab_size, context = variant.manifest.vocab_size, variant.manifest.context
    last = vocab_size - 1
    for prompts in ([[last] * context], [[last], [0] * min(2, context)]):
        rows = variant.run(prompts, top_k=1)
        if len(rows) != len(prompts):
            raise BadInput(f"the graph gives {len(rows)} rows for {len(prompts)} prompts; export it again")
        for row in rows:
            if not row.logits.shape == row.softmax.shape == row.sigmoid.shape == (vocab_size,):
                raise BadInput(
                    f"the graph gives {row.logits.shape[0]} logits, the manifest says vocab_size "
                    f"{vocab_size}; export it again"
                )
            if not (np.isfinite(row.logits).all() and np.isfinite(row.entropy_bits).all()):
                raise BadInput("the graph gives numbers that are not finite; train or export it again")
