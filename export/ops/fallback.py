"""What the compiler's vocabulary lacks, as standard operators: torch.onnx's own export of that one expression.

Its nodes become the body of the function `ai.actuary::NAME` (onnx_function.py), so that the graph around it stays the
same. Nothing is known of such operators: they are never fused, and their error is measured instead of derived.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import logging
import re
import warnings
from collections.abc import Iterator

import numpy as np
import onnx
import onnx.inliner
import torch
from torch import Tensor

from actuary import BadInput
from export.bundle import OPSET
from export.ops.trace import Expression

UNIT = 2.0**-24  # unit roundoff of float32
SAFETY, NEIGHBOURS = 8, 8


def flat(name: str) -> str:
    """The rows [N, H] of a tensor argument, or of the result `y`."""
    return f"{name}.flat"


@functools.cache
def standard_operators(name: str, expression: Expression) -> tuple[list[onnx.NodeProto], list[onnx.OperatorSetIdProto]]:
    """Nodes from `flat` of each tensor argument and `learned.NAME` to `flat("y")`, and the operator sets they are of.

    BadInput names the operator that torch.onnx does not know either.
    """
    if importlib.util.find_spec("onnxscript") is None:
        raise BadInput(
            f"activation {name!r} uses {expression.outside}, outside the compiler's vocabulary; torch.onnx exports it, "
            "which needs the package onnxscript: install it with pip install -e '.[train]' in Actuary's folder"
        )
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    tensors = [torch.linspace(-2, 2, 24).reshape(3, 8) for _ in expression.tensors]
    learned = [torch.ones(1) for _ in expression.learned]
    try:
        with _silence():
            program = torch.onnx.export(
                _Module(expression),
                (*tensors, *learned),
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=((*(free for _ in tensors), *({} for _ in learned)),),
                input_names=[*map(flat, expression.tensors), *(f"learned.{key}" for key in expression.learned)],
                output_names=[flat("y")],
                verbose=False,
            )
        assert program is not None
        model = onnx.inliner.inline_local_functions(program.model_proto)
    except Exception as error:  # torch raises its own classes, and what any expression provokes
        raise BadInput(
            f"activation {name!r} uses {expression.outside}, outside the compiler's vocabulary, and torch.onnx cannot "
            f"export it either: {_reason(error)}; rewrite its expression in other functions of torch"
        ) from error
    if OPSET not in [opset.version for opset in model.opset_import if not opset.domain]:
        raise BadInput(f"torch.onnx exports activation {name!r} for another opset than {OPSET}; rewrite its expression")
    constants = [
        onnx.helper.make_node("Constant", [], [tensor.name], value=tensor) for tensor in model.graph.initializer
    ]
    return [*constants, *model.graph.node], list(model.opset_import)


class _Module(torch.nn.Module):
    def __init__(self, expression: Expression) -> None:
        super().__init__()
        self.expression = expression.torch

    def forward(self, *arguments: Tensor) -> Tensor:
        return self.expression(*arguments)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """torch.onnx tells what it does and what is not installed, on every way out there is."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        said = io.StringIO()
        with warnings.catch_warnings(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _reason(error: Exception) -> str:
    """The operator that torch.onnx has nothing for, else the end of what it says."""
    if operator := re.search(r"OpOverload\(op='([\w.]+)'", str(error)):
        return f"it has no ONNX form of {operator[1]}"
    cause = error.__cause__ or error
    return f"{type(cause).__name__}: {str(cause).strip().splitlines()[0]}"


def value_and_bound(expression: Expression, tensors: dict[str, Tensor], unit: float) -> tuple[Tensor, Tensor]:
    """The exact value and an error bound, both [..., H] in float64, where no step's error is known.

    Each input is moved by up to two units of roundoff, NEIGHBOURS times. What the move does to the exact value is what
    a backward stable algorithm may err; how far torch's float32 is from its float64 there is what this expression's own
    intermediate values make one err. ONNX Runtime's sigmoid, tanh and erf are right to a unit absolutely, not in their
    tails (error_bound.py), and may be multiplied by an input: a unit of the largest that the element looks at. The
    bound is SAFETY = 8 times the largest of these, and of a unit of the value: another order of summation or another
    polynomial stays within, a constant that is off in its fifth digit does not.
    """
    arguments = [tensors[name] for name in (*expression.tensors, *expression.learned)]
    exact = expression.torch(*arguments)
    looked_at = torch.stack([torch.broadcast_to(tensors[name].abs(), exact.shape) for name in expression.tensors])
    largest = looked_at.amax(0) if expression.alone else looked_at.amax((0, -1))[..., None]
    worst = unit * torch.maximum(exact.abs(), largest.clamp(min=1))
    generator = torch.Generator().manual_seed(0)
    for _ in range(NEIGHBOURS):
        moved = [
            (x * (1 + 2 * unit * (2 * torch.rand(x.shape, generator=generator, dtype=x.dtype) - 1))).float()
            for x in arguments
        ]
        near = expression.torch(*(x.double() for x in moved))
        single = (expression.torch(*moved).double() - near).abs() * (unit / UNIT)
        worst = torch.maximum(worst, torch.maximum(single, (near - exact).abs()))
    return exact, SAFETY * worst + float(np.finfo(np.float32).tiny)
