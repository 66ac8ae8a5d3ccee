"""What the tests of the fused operators share: running a model with them, a copy of their library, the program."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnxruntime
from conftest import ACTUARY, HANG_S

from export.ops import library
from export.ops.trace import trace
from models.activations import registry

FUSED = [name for name, record in registry().items() if trace(record).elementwise]


def run(model: bytes, feeds: dict, fused=None, threads: int = 1) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    if fused:
        library.register(options, fused)
    (y,) = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"]).run(None, feeds)
    return y


def copied(fused, folder: Path, **changes) -> Path:
    """The library in a folder of its own, its record changed."""
    folder.mkdir()
    shutil.copy(fused.path, folder)
    record = {**fused.model_dump(mode="json"), **changes}
    (folder / library.RECORD).write_text(json.dumps(record))
    return folder


def actuary(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*ACTUARY, *arguments], env={**os.environ, **environment}, capture_output=True, text=True, timeout=HANG_S
    )
