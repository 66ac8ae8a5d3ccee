"""One bundle, ready to answer: its manifest, its vocabulary and its session.

A variant is only made from a graph that keeps the contract of export/bundle.py and has run once.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actuary import BadInput
from export import bundle, onnx_file
from export.audit import RUNS, Audit, audit, check_file, check_placement
from export.bundle import Manifest
from service.runtime import Runtime
from service.vocabulary import Vocabulary

# Types and ranks that the graph must have.
_INPUTS = {bundle.INPUT_IDS: ("int64", 2), bundle.LENGTHS: ("int64", 1), bundle.TOP_K: ("int64", 1)}
_OUTPUTS = dict.fromkeys(bundle.OUTPUTS, ("float", 2)) | {bundle.TOP_IDS: ("int64", 2)}

WIDE_TOKENS, WIDE_ROUNDS = 128, 5  # of the prompt that is timed on one core and on all, and how often
WIDE_GAIN = 0.85  # of the time on one core: for less, a second session is not worth its memory


@dataclass(frozen=True)
class Row:
    """The next token of one prompt, over the vocabulary V, as the graph computed it."""

    logits: NDArray[np.float32]  # [V]
    softmax: NDArray[np.float32]  # [V]
    sigmoid: NDArray[np.float32]  # [V]
    top_ids: NDArray[np.int64]  # [K], by falling logit, ties by rising id
    mass: NDArray[np.float32]  # [2]: of softmax, of sigmoid
    entropy_bits: NDArray[np.float32]  # [2]


@dataclass(frozen=True, eq=False)
class Variant:
    """One served model."""

    manifest: Manifest
    vocabulary: Vocabulary
    session: Any  # onnxruntime.InferenceSession
    provider: str
    unfused: str  # why its activation runs as standard operators; empty where it runs our kernel
    audit: Audit
    wide_session: Any = None  # the same on all lanes' cores at once; None where that is no faster

    @property
    def name(self) -> str:
        return self.manifest.name

    @property
    def wide(self) -> bool:
        """Whether a batch that is alone is faster on all cores."""
        return self.wide_session is not None

    def run(self, prompts: Sequence[Sequence[int]], top_k: int, wide: bool = False) -> list[Row]:
        """B prompts of 1 to `context` ids each -> B rows, with K = top_k. Blocks; safe from any thread."""
        lengths = np.fromiter(map(len, prompts), np.int64, len(prompts))
        ids = np.zeros((len(prompts), lengths.max()), np.int64)  # [B, T], padded on the right
        for row, prompt in zip(ids, prompts, strict=True):
            row[: len(prompt)] = prompt
        feeds = {bundle.INPUT_IDS: ids, bundle.LENGTHS: lengths, bundle.TOP_K: np.array([top_k])}
        session = self.wide_session if wide else self.session
        return [Row(*arrays) for arrays in zip(*session.run(bundle.OUTPUTS, feeds), strict=True)]


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
    variant = Variant(manifest, tokenizer, session, found.provider, unfused, found)
    _warm_up(variant)
    if runtime.lanes > 1:
        both = dataclasses.replace(variant, wide_session=opened(wide=True))
        return both if _wide_is_faster(both) else variant
    return variant


def _wide_is_faster(variant: Variant) -> bool:
    """Measured in turn, on one prompt of up to WIDE_TOKENS."""
    prompt = [[0] * min(variant.manifest.context, WIDE_TOKENS)]
    taken: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(WIDE_ROUNDS + 1):
        for wide, times in taken.items():
            start = perf_counter()
            variant.run(prompt, 1, wide)
            times.append(perf_counter() - start)
    wide_s, narrow_s = (statistics.median(taken[wide][1:]) for wide in (True, False))  # the first ones warm up
    return wide_s < WIDE_GAIN * narrow_s


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
