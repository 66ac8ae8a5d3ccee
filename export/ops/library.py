"""The fused-operator library as those who run it see it: is it there, does it fit, register it on a session.

`actuary ops build` (export/ops/build.py) fills a folder:

    libactuary_ops.so   the operators of domain ai.actuary
    library.json        what they are and what they were made of: a `Library`, but for its path

Imported by the serving process, so neither torch nor onnx may be imported here.
"""

from __future__ import annotations

import ctypes
import datetime
import hashlib
import json
import platform
import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from actuary import BadInput

OPS_VERSION = 2  # of the operators' contract: names, inputs, types
ORT_API = 24  # of ONNX Runtime's C interface that the library asks for (1.24 and newer have it)
BINARY, RECORD = "libactuary_ops.so", "library.json"
DEFAULT_FOLDER = Path("artifacts/ops")
REMEDY = "build it with: actuary ops build"


class Library(BaseModel):
    """A built library that was found whole and of this machine's kind."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    path: Path = Field(exclude=True)  # of the binary
    ops_version: int
    ort_api: int
    system: str  # sys.platform
    machine: str  # "x86_64"
    activations: dict[str, str]  # name: digest of its steps (export/ops/trace.py)
    isas: list[str]  # instruction sets with loops of their own, best first
    vector_math: str  # where exp and its like come from inside a vector loop
    cuda: list[str]  # architectures with kernels of their own, "90"; empty: no CUDA half
    compiler: str
    nvcc: str
    inputs: str  # sha256 of all that it was made of
    sha256: str  # of the binary
    built: datetime.datetime

    def why_not(self, activation: str, digest: str, cuda: bool) -> str:
        """Why this library does not serve a graph with that activation; empty where it does.

        Args:
            digest: of the formula that the graph was exported with; empty where the bundle does not say.
            cuda: whether the session's nodes go to CUDA.
        """
        if activation not in self.activations:
            return (
                f"the library has no {activation!r}: what looks at the hidden axis, or is outside the compiler's "
                f"vocabulary, never fuses; else {REMEDY}"
            )
        if not digest:
            return "the bundle does not say which formula it was exported with; export it again"
        if self.activations[activation] != digest:
            return f"the library's formula of {activation!r} is not the bundle's; {REMEDY}, and export again"
        if cuda and not self.cuda:
            return (
                f"the library has no CUDA kernels, and its CPU kernels would pull work off the device; {REMEDY} --cuda"
            )
        return ""

    def fits(self, activation: str, digest: str, cuda: bool) -> bool:
        """Whether a graph with that activation may have it: either it has the same formula, or none, and its other
        operators alone run."""
        return self.activations.get(activation, digest) == digest and (bool(self.cuda) or not cuda)


def find(folder: Path) -> Library | None:
    """The library in `folder`; None where none was ever built.

    BadInput where it is damaged, of another version of the operators or of ONNX Runtime's interface, or of another
    kind of machine: each says what to do.
    """
    binary, record = folder / BINARY, folder / RECORD
    try:
        if not (record.exists() or binary.exists()):
            return None
        read = json.loads(record.read_bytes())
        library = Library.model_validate({**read, "path": binary} if isinstance(read, dict) else read)
        found = hashlib.sha256(binary.read_bytes()).hexdigest()
    except PermissionError as error:
        raise BadInput(
            f"cannot read the fused operators in {folder}: {error.strerror}; make it readable, or name another folder"
        ) from error
    except (OSError, ValueError) as error:
        raise BadInput(
            f"the fused operators in {folder} are damaged ({_reason(error)}); {REMEDY} --out {folder}"
        ) from error
    wrong = [
        f"{what} {has!r}, where this is {needs!r}"
        for what, has, needs in (
            ("for the system", library.system, sys.platform),
            ("for the processor", library.machine, platform.machine()),
            ("of version", library.ops_version, OPS_VERSION),
            ("for ONNX Runtime's interface", library.ort_api, ORT_API),
            ("with the sha256", found[:12], library.sha256[:12]),
        )
        if has != needs
    ]
    if wrong:
        raise BadInput(f"the fused operators in {folder} are {wrong[0]}; {REMEDY} --out {folder}")
    return library


def _reason(error: OSError | ValueError) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return ": ".join([RECORD, *map(str, first["loc"]), first["msg"]])
    return (error.strerror if isinstance(error, OSError) else "") or str(error)


def register(options: Any, library: Library, cuda: bool = False) -> None:
    """Give a session's options the fused operators; BadInput where ONNX Runtime does not take them.

    Args:
        options: an onnxruntime.SessionOptions on which they were not registered before.
        cuda: whether the session's nodes go to CUDA: without those that have CPU kernels alone.
    """
    try:
        _loaded(library).actuary_ops_structural(int(not cuda))
        options.register_custom_ops_library(str(library.path.resolve()))
    except Exception as error:  # onnxruntime raises its own classes, without a public base
        raise BadInput(f"ONNX Runtime does not load {library.path}: {error}; {REMEDY}") from error


def running_isa(library: Library) -> str:
    """The instruction set whose loops run in this process: "x86-64-v4"."""
    name: bytes = _loaded(library).actuary_ops_isa()
    return name.decode()


def use_isa(library: Library, isa: str) -> None:
    """Run another instruction set's loops in this process, for tests and benchmarks; BadInput where it cannot."""
    if _loaded(library).actuary_ops_use_isa(isa.encode()) != 0:
        raise BadInput(f"cannot run {isa!r} here; the library has {', '.join(library.isas)}")


def loaded_inputs(library: Library) -> str:
    """What the binary itself says it was made of; equal to `library.inputs`."""
    inputs: bytes = _loaded(library).actuary_ops_inputs()
    return inputs.decode()


def _loaded(library: Library) -> ctypes.CDLL:
    """The binary, in the copy that ONNX Runtime runs in this process."""
    handle = ctypes.CDLL(str(library.path.resolve()))
    handle.actuary_ops_isa.restype = handle.actuary_ops_inputs.restype = ctypes.c_char_p
    handle.actuary_ops_use_isa.argtypes = [ctypes.c_char_p]
    handle.actuary_ops_structural.argtypes, handle.actuary_ops_structural.restype = [ctypes.c_int], None
    return handle
