"""How far arithmetic may stray from an Expression's exact value: a running error bound, element by element.

First-order forward error analysis (Higham, Accuracy and Stability, section 3.3): a step y = f(a, b)
computed in floating point carries |df/da| * error(a) + |df/db| * error(b) + what f itself adds. The
slopes come from autograd in float64, so a new activation brings its own bound. Used by the parity gate
and by the tests of every derived form.

Three arithmetics: ONNX Runtime's operators one by one in float32 (FLOAT32) and in float16 (FLOAT16), and our kernels,
which are float32 throughout (KERNEL); `rounded_to` is what their 16-bit forms add.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from export.ops import fallback
from export.ops.trace import HIDDEN_AXIS, MEANING, Expression, Ref

UNIT = 2.0**-24  # unit roundoff of float32
TINY = 2.0**-126  # below this a runtime may flush to zero

# What an operation adds, in units of roundoff: (relative to its result, absolute). Arithmetic rounds
# once; a constant rounds once more where it is not exact. The rest are MLAS's polynomials as seen at
# onnxruntime 1.31.1: sigmoid, tanh and erf hold an absolute accuracy (1.3, 3.1 and 1.0 units seen), not a
# relative one in their tails; composed forms (expm1, log1p) add up their parts.
_ADDS: dict[str, tuple[float, float]] = {
    "exp": (4, 0), "log": (4, 4), "sqrt": (1, 0), "rsqrt": (3, 0), "sin": (4, 4), "cos": (4, 4), "atan": (4, 0),
    "sigmoid": (2, 4), "tanh": (4, 6), "erf": (2, 4), "softplus": (6, 6), "expm1": (12, 0), "log1p": (8, 4),
    "softmax": (8, 1), "pow": (4, 0),
    "neg": (0, 0), "abs": (0, 0), "relu": (0, 0), "where": (0, 0), "maximum": (0, 0), "minimum": (0, 0),
    "ge": (0, 0), "gt": (0, 0), "le": (0, 0), "lt": (0, 0),
}  # fmt: skip
# The kernels' vector functions promise 4 units in the last place, at most 8 of roundoff: glibc's manual says so of
# libmvec, CUDA promises 2, and ours (native/vector_math.h) are measured. Seen over one float32 in 397, on AVX-512, AVX2
# and SSE2: exp 3.3, tanh 5.4, erf 5.9, expm1 3.3, log 5.7, log1p 3.3, sin 2.8, cos 2.7, atan 3.1, pow 1.1. sigmoid, as
# 1 / (1 + exp(-x)), carries exp's and rounds twice; softplus, log1p(exp(x)), carries at most exp's and has log1p's;
# rsqrt rounds the root and the quotient.
_KERNEL_ADDS = _ADDS | {
    **dict.fromkeys(("exp", "expm1", "log", "log1p", "sin", "cos", "atan", "erf", "tanh", "pow"), (8.0, 0.0)),
    "sigmoid": (10, 0), "softplus": (16, 0), "rsqrt": (2, 0),
}  # fmt: skip
_ROUNDS_ONCE = (1.0, 0.0)


@dataclass(frozen=True)
class Arithmetic:
    """A floating-point type and the functions computed in it.

    Args:
        unit: unit roundoff.
        tiny: added to every step, since a runtime may flush what is smaller to zero.
        constants: the type that constants are rounded to.
        adds: operation -> what it adds, in units: (relative to its result, absolute).
    """

    unit: float
    tiny: float
    constants: torch.dtype
    adds: Mapping[str, tuple[float, float]]


FLOAT32 = Arithmetic(UNIT, TINY, torch.float32, _ADDS)
KERNEL = Arithmetic(UNIT, 2 * TINY, torch.float32, _KERNEL_ADDS)  # exp is 0 below 1.7e-38 (native/vector_math.h)
# Of each 16-bit type: roundoff, subnormals' spacing, largest value.
SIXTEEN_BITS = {
    "float16": (2.0**-11, 2.0**-24, 65504.0),
    "bfloat16": (2.0**-8, 2.0**-133, (2 - 2.0**-7) * 2.0**127),
}
HALF_UNIT, HALF_STEP, HALF_MAX = SIXTEEN_BITS["float16"]
FLOAT16 = Arithmetic(HALF_UNIT, HALF_STEP, torch.float16, _ADDS)


def rounded_to(type: str, value: Tensor, bound: Tensor) -> Tensor:
    """The bound after one more rounding, of a float32 within `bound` of `value` to a 16-bit type."""
    unit, step, _ = SIXTEEN_BITS[type]
    return bound + unit * (value.abs() + bound) + step / 2


def value_and_bound(
    expression: Expression,
    tensors: dict[str, Tensor],
    arithmetic: Arithmetic = FLOAT32,
    bias_added: bool = False,
) -> tuple[Tensor, Tensor]:
    """The exact value and the error bound at the given inputs.

    Args:
        tensors: every tensor argument [..., H] and learned scalar [1], in float64.
        bias_added: the tensor arguments are exact sums, which the arithmetic had to round.
    Returns: both [..., H], in float64. The bound is infinite or NaN where the value overflows.
    """
    unit = arithmetic.unit
    if expression.outside:
        return fallback.value_and_bound(expression, tensors, unit)
    values: dict[str, Tensor] = dict(tensors)
    errors: dict[str, Tensor] = {
        name: unit * tensor.abs() if bias_added and name in expression.tensors else torch.zeros_like(tensor)
        for name, tensor in tensors.items()
    }
    shape = sum(tensors.values(), torch.zeros(1)).shape

    def value(ref: Ref) -> Tensor:
        return values[ref] if isinstance(ref, str) else torch.tensor(ref, dtype=torch.float64)

    def error(ref: Ref) -> Tensor:
        if isinstance(ref, str):
            return errors[ref]
        return (torch.tensor(ref, dtype=arithmetic.constants).double() - ref).abs()  # the constant's own rounding

    for step in expression.steps:
        function = MEANING[step.operation]
        if step.operation in HIDDEN_AXIS:
            values[step.name], carried = _over_hidden(
                step.operation, value(step.arguments[0]), error(step.arguments[0]), unit
            )
        else:
            operands = [value(ref).expand(shape).detach() for ref in step.arguments]
            leaves = [a.clone().requires_grad_() if a.is_floating_point() else a for a in operands]
            result = function(*leaves)
            values[step.name] = result.detach()
            carried = torch.zeros(shape, dtype=torch.float64)
            if result.is_floating_point():
                floats = [(leaf, ref) for leaf, ref in zip(leaves, step.arguments, strict=True) if leaf.requires_grad]
                slopes = torch.autograd.grad(result.sum(), [leaf for leaf, _ in floats], allow_unused=True)
                for slope, (_, ref) in zip(slopes, floats, strict=True):
                    if slope is not None:
                        moved = error(ref) > 0  # an exact argument carries nothing, however steep: no 0 * inf
                        carried = carried + torch.where(moved, slope.abs() * error(ref), torch.zeros(()).double())
        relative, absolute = arithmetic.adds.get(step.operation, _ROUNDS_ONCE)
        size = values[step.name].double().abs()
        errors[step.name] = carried + unit * (relative * size + absolute) + arithmetic.tiny
    return value(expression.result).expand(shape), error(expression.result).expand(shape)


def _over_hidden(operation: str, x: Tensor, error: Tensor, unit: float) -> tuple[Tensor, Tensor]:
    """Value and carried error of an operation over the last axis of [..., H]."""
    H = x.shape[-1]
    if operation == "softmax":
        y = torch.softmax(x, dim=-1)
        return y, y * (error + (y * error).sum(-1, keepdim=True))  # |dy_i| <= y_i (|dx_i| + sum_j y_j |dx_j|)
    y = x.sum(-1, keepdim=True)
    carried = error.sum(-1, keepdim=True) + unit * H * x.abs().sum(-1, keepdim=True)  # H - 1 rounded additions
    return (y, carried) if operation == "sum" else (y / H, carried / H)
