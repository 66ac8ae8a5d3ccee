"""Prints an Expression as an ONNX function of our domain: the operator's meaning, which travels in the file.

A runtime that has a kernel for `ai.actuary::NAME` runs that; any other inlines this body. The body
holds for every float type: constants are cast to the input's.

    x, bias --Add--> x                        (`biased_NAME`)
    packed [..., 2H] --Split--> gate, up      (gated forms)
    x [..., H] | gate, up [..., H], learned scalars [1] --steps--> y [..., H]

Where the expression is outside the compiler's vocabulary, torch.onnx's nodes stand for the steps (fallback.py).
"""

from __future__ import annotations

from collections.abc import Callable

import onnx
from onnx import helper

from export.bundle import DOMAIN, OPSET
from export.ops import fallback
from export.ops.trace import Expression, Ref
from models.activations import BIASED

# Operations that ONNX has under one name with the same arguments.
_OPERATORS = {
    "add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "neg": "Neg", "pow": "Pow", "abs": "Abs",
    "exp": "Exp", "log": "Log", "sqrt": "Sqrt", "sin": "Sin", "cos": "Cos", "atan": "Atan", "erf": "Erf",
    "tanh": "Tanh", "sigmoid": "Sigmoid", "softplus": "Softplus", "relu": "Relu", "where": "Where",
    "maximum": "Max", "minimum": "Min",
    "ge": "GreaterOrEqual", "gt": "Greater", "le": "LessOrEqual", "lt": "Less",
}  # fmt: skip


class _Body:
    """Collects nodes; every method returns the name of what it computed."""

    def __init__(self, like: str) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.like = like  # constants take this tensor's type
        self.constants: dict[float, str] = {}

    def node(self, operator: str, *inputs: str, output: str = "", **attributes: object) -> str:
        output = output or f"t.{len(self.nodes)}"  # no argument of a Python function can be called so
        self.nodes.append(helper.make_node(operator, list(inputs), [output], **attributes))
        return output

    def constant(self, value: float) -> str:
        if value not in self.constants:
            raw = self.node("Constant", value_float=value)
            self.constants[value] = self.node("CastLike", raw, self.like)
        return self.constants[value]

    def expm1(self, x: str) -> str:
        """tanh(x/2) * (e^x + 1), which keeps its digits near 0 where e^x - 1 loses them."""
        half = self.node("Mul", x, self.constant(0.5))
        return self.node("Mul", self.node("Tanh", half), self.node("Add", self.node("Exp", x), self.constant(1.0)))

    def log1p(self, x: str) -> str:
        """log(w) * x / (w - 1) with w = 1 + x (Kahan); x itself where w rounds to 1, w where it is infinite."""
        w = self.node("Add", x, self.constant(1.0))
        d = self.node("Sub", w, self.constant(1.0))
        kahan = self.node("Mul", self.node("Log", w), self.node("Div", x, d))
        finite = self.node("Where", self.node("Equal", d, x), self.node("Log", w), kahan)
        return self.node("Where", self.node("Equal", d, self.constant(0.0)), x, finite)

    def rsqrt(self, x: str) -> str:
        return self.node("Reciprocal", self.node("Sqrt", x))

    def softmax(self, x: str) -> str:
        return self.node("Softmax", x, axis=-1)

    def over_hidden(self, operator: str, x: str) -> str:
        axes = self.node("Constant", value_ints=[-1])
        return self.node(operator, x, axes, keepdims=1)


_COMPOSED: dict[str, Callable[[_Body, str], str]] = {
    "expm1": _Body.expm1,
    "log1p": _Body.log1p,
    "rsqrt": _Body.rsqrt,
    "softmax": _Body.softmax,
    "mean": lambda body, x: body.over_hidden("ReduceMean", x),
    "sum": lambda body, x: body.over_hidden("ReduceSum", x),
}


def operator_name(name: str, biased: bool) -> str:
    """What the operator of activation `name` is called in our domain."""
    return f"{BIASED}{name}" if biased else name


def onnx_function(name: str, expression: Expression, biased: bool = False) -> onnx.FunctionProto:
    """The function `ai.actuary::NAME` or, biased, `ai.actuary::biased_NAME`.

    Its inputs are `x` (packed [..., 2H] when gated, else [..., H]), when biased `bias` ([2H] or [H], added to x first),
    and the learned scalars, each [1]; its output is `y` [..., H].
    """
    names = {name: f"learned.{name}" for name in expression.learned} | {name: name for name in expression.tensors}
    body = _Body(like="x")
    x = body.node("Add", "x", "bias") if biased else "x"
    if len(expression.tensors) == 2:
        body.nodes.append(helper.make_node("Split", [x], list(expression.tensors), axis=-1, num_outputs=2))
    else:
        names[expression.tensors[0]] = x

    def operand(ref: Ref) -> str:
        return names[ref] if isinstance(ref, str) else body.constant(ref)

    opsets = [helper.make_opsetid("", OPSET)]
    for step in () if expression.outside else expression.steps:
        inputs = [operand(argument) for argument in step.arguments]
        if step.operation in _COMPOSED:
            names[step.name] = _COMPOSED[step.operation](body, *inputs)
        else:
            names[step.name] = body.node(_OPERATORS[step.operation], *inputs)
    if expression.outside:  # torch.onnx's own nodes, of rows [N, H] whatever the axes before
        first = names[expression.tensors[0]]
        rows = body.node("Concat", body.node("Constant", value_ints=[-1]), body.node("Shape", first, start=-1), axis=0)
        for tensor in expression.tensors:
            body.node("Reshape", names[tensor], rows, output=fallback.flat(tensor))
        nodes, opsets = fallback.standard_operators(name, expression)
        body.nodes += nodes
        body.node("Reshape", fallback.flat("y"), body.node("Shape", first), output="y")
    else:
        body.node("Identity", operand(expression.result), output="y")
    return helper.make_function(
        DOMAIN,
        operator_name(name, biased),
        ["x", *(["bias"] if biased else []), *(names[key] for key in expression.learned)],
        ["y"],
        body.nodes,
        opsets,
    )
