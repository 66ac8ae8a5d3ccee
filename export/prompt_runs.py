"""Runs a model of the bundle's contract over prompts: a session, what it is fed, in which batches.

    prompts [T_i] of several lengths -> padded batches of at most BATCH_TOKENS -> logits [prompts, V]

Called by the parity gate's comparisons (export/parity.py).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from export import bundle
from export.ops.check import open_session

# The weights of a larger model lie in a file beside it, and it goes to ONNX Runtime so: protobuf cannot hold 2 GiB.
IN_MEMORY_BYTES = 1_800_000_000
BATCH_TOKENS = 2048  # of a padded batch: at 124M parameters one of 12 x 1,024 takes 1.3 GB
Run = Callable[..., list[NDArray[Any]]]


def run_of_model(model: onnx.ModelProto) -> Run:
    """A CPU session of a model in memory."""
    if model.ByteSize() <= IN_MEMORY_BYTES:
        return run_of(open_session(model.SerializeToString()))
    with tempfile.TemporaryDirectory(prefix="actuary-parity-") as scratch:
        path = Path(scratch) / bundle.MODEL
        onnx.save_model(model, path, save_as_external_data=True, location=f"{bundle.MODEL}.data")
        onnx.load_external_data_for_model(model, scratch)  # saving took it out of the model
        return run_of(open_session(str(path)))


def run_of(session: onnxruntime.InferenceSession) -> Run:
    return lambda outputs, feeds: list(session.run(outputs, feeds))


def cuda_session(model_path: str) -> onnxruntime.InferenceSession | None:
    """A session of the file on CUDA; None where there is no device or ONNX Runtime does not run on it."""
    provider = "CUDAExecutionProvider"
    if not Path("/proc/driver/nvidia/version").exists() or provider not in onnxruntime.get_available_providers():
        return None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    onnxruntime.preload_dlls()
    session = onnxruntime.InferenceSession(model_path, options, providers=[provider, "CPUExecutionProvider"])
    return session if provider in session.get_providers() else None


def alone_and_together(run: Run, prompts: list[NDArray[np.int64]]) -> NDArray[np.float64]:
    """Logits [2 * prompts, V]: of each prompt alone, then of all in padded batches."""
    feeds = [feed(batch) for batch in [*([prompt] for prompt in prompts), *in_batches(prompts)]]
    return np.concatenate([run([bundle.LOGITS], each)[0] for each in feeds]).astype(np.float64)


def in_batches(prompts: list[NDArray[np.int64]]) -> list[list[NDArray[np.int64]]]:
    """The prompts in their order, in batches of at most BATCH_TOKENS with their padding, or of one prompt."""
    batches: list[list[NDArray[np.int64]]] = [[]]
    for prompt in prompts:
        grown = [*batches[-1], prompt]
        if batches[-1] and len(grown) * max(map(len, grown)) > BATCH_TOKENS:
            batches.append([prompt])
        else:
            batches[-1] = grown
    return batches


def feed(prompts: list[NDArray[np.int64]], top_k: int = 0) -> dict[str, NDArray[Any]]:
    ids = np.zeros((len(prompts), max(map(len, prompts))), dtype=np.int64)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    return {bundle.INPUT_IDS: ids, bundle.LENGTHS: np.array([len(p) for p in prompts]), bundle.TOP_K: np.array([top_k])}
