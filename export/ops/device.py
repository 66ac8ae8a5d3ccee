"""Runs ONNX Runtime sessions on buffers that lie where they shall run, as torch tensors: nothing is copied on the way.

For `make gpu-check` (gpu_check.py), on CUDA; on the CPU for its tests.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import TensorProto
from torch import Tensor

from actuary import GateFailed
from export.ops.check import CPU, Feeds, open_session
from export.ops.library import Library

_ELEMENTS = {
    torch.float32: TensorProto.FLOAT, torch.float16: TensorProto.FLOAT16, torch.bfloat16: TensorProto.BFLOAT16,
    torch.int64: TensorProto.INT64,
}  # fmt: skip


GUARD, GUARD_VALUE = 64, 77.0  # elements behind an output that no kernel may touch


@dataclass(frozen=True)
class Place:
    """Where sessions run: ONNX Runtime's name for it, and torch's."""

    provider: str
    device: str

    def synchronize(self) -> None:
        """Waits for all that was started, on every stream of the device."""
        if self.device == "cuda":
            torch.cuda.synchronize()


ON_CPU = Place(CPU, "cpu")
ON_CUDA = Place("CUDAExecutionProvider", "cuda")


def _address(tensor: Tensor) -> int:
    """Of its first element; unlike `data_ptr`, of a tensor without elements too, which ONNX Runtime wants."""
    return int(tensor.untyped_storage().data_ptr()) + int(tensor.storage_offset()) * tensor.element_size()


def bound(
    session: onnxruntime.InferenceSession, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]
) -> Callable[[], None]:
    """A run from these contiguous tensors into those, which only starts it where the device can: `synchronize` waits.

    Outputs that are not named go where ONNX Runtime likes, on the device of the first that is.
    """
    binding = session.io_binding()
    for name, tensor in inputs.items():
        binding.bind_input(name, tensor.device.type, 0, _ELEMENTS[tensor.dtype], list(tensor.shape), _address(tensor))
    for name, tensor in outputs.items():
        binding.bind_output(name, tensor.device.type, 0, _ELEMENTS[tensor.dtype], list(tensor.shape), _address(tensor))
    device = next(iter(outputs.values())).device.type
    for output in session.get_outputs():
        if output.name not in outputs:
            binding.bind_output(output.name, device, 0)
    options = onnxruntime.RunOptions()
    options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    keep = (inputs, outputs)  # whose memory is bound

    def run() -> None:
        assert keep
        session.run_with_iobinding(binding, options)

    return run


def run_once(
    model: bytes, feeds: Feeds, shape: tuple[int, ...], type: str, place: Place, fused: Library | None, offset: int = 0
) -> NDArray[Any]:
    """The model's one output `y`, of this shape; bfloat16 as float32. GateFailed where a node ran elsewhere, or wrote
    outside its output.

    Args:
        offset: elements by which x and y stand off what an allocator aligns.
    """
    dtype: torch.dtype = getattr(torch, type)

    def placed(size: int) -> Tensor:
        return torch.full((offset + size + GUARD,), GUARD_VALUE, dtype=dtype, device=place.device)

    def inside(buffer: Tensor, shape: tuple[int, ...]) -> Tensor:
        return buffer[offset:-GUARD].view(shape)

    inputs = {
        name: inside(placed(array.size), array.shape).copy_(torch.from_numpy(array)) for name, array in feeds.items()
    }
    buffer = placed(math.prod(shape))
    y = inside(buffer, shape)
    with tempfile.TemporaryDirectory() as scratch:
        session = open_session(model, fused, place.provider, profile=f"{scratch}/run")
        place.synchronize()  # torch's copies, before another stream reads them
        try:
            bound(session, inputs, {"y": y})()
        except Exception as error:  # onnxruntime raises its own classes, without a public base
            raise GateFailed(f"ONNX Runtime {onnxruntime.__version__} does not run the model: {error}") from error
        place.synchronize()
        elsewhere = {
            f"{operator} on {provider}"
            for operator, provider in providers_that_ran(session)
            if provider != place.provider
        }
    if not bool((buffer[:offset] == GUARD_VALUE).all() & (buffer[-GUARD:] == GUARD_VALUE).all()):
        raise GateFailed(f"the kernel wrote outside its output {shape}")
    if elsewhere:
        raise GateFailed(f"asked for {place.provider}, but {', '.join(sorted(elsewhere))} ran")
    return (y.float() if type == "bfloat16" else y).cpu().numpy()


def providers_that_ran(session: onnxruntime.InferenceSession) -> list[tuple[str, str]]:
    """(operator, provider) of every node that a session with a profile has run; ends the profile."""
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    found = [(e["args"].get("op_name", ""), e["args"].get("provider", "")) for e in events if e.get("cat") == "Node"]
    ran = [(operator, provider) for operator, provider in found if operator and provider]
    assert ran, "the profile names no node"
    return ran
