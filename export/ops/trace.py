"""Turns a record's torch expression into an `Expression`: a short list of named elementwise steps.

Tracing is torch.fx's; what stands here is the vocabulary: which torch functions we can express, and
under what one name. The printers beside this file (formula.py, onnx_function.py) each hold one row per name. What the
vocabulary lacks is named in `outside`: such an expression is exported as standard operators (fallback.py), never fused.
"""

from __future__ import annotations

import functools
import hashlib
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor

from actuary import BadInput
from models.activations import Activation

Ref = str | float  # an argument's or a step's name, or a constant

# torch function -> our name for it, where its arguments are tensors and constants in the same order.
_SAME_ARGUMENTS: dict[Any, str] = {
    function: name
    for name, functions in {
        "add": (operator.add, torch.add),
        "sub": (operator.sub, torch.sub),
        "mul": (operator.mul, torch.mul),
        "div": (operator.truediv, torch.div),
        "neg": (operator.neg, torch.neg),
        "pow": (operator.pow, torch.pow),
        "abs": (operator.abs, torch.abs),
        "exp": (torch.exp,),
        "expm1": (torch.expm1,),
        "log": (torch.log,),
        "log1p": (torch.log1p,),
        "sqrt": (torch.sqrt,),
        "rsqrt": (torch.rsqrt,),
        "sin": (torch.sin,),
        "cos": (torch.cos,),
        "atan": (torch.atan,),
        "erf": (torch.erf,),
        "tanh": (torch.tanh, F.tanh),
        "sigmoid": (torch.sigmoid, F.sigmoid),
        "softplus": (F.softplus,),
        "relu": (torch.relu, F.relu),
        "where": (torch.where,),
        "maximum": (torch.maximum, torch.max),
        "minimum": (torch.minimum, torch.min),
        "ge": (operator.ge, torch.ge),
        "gt": (operator.gt, torch.gt),
        "le": (operator.le, torch.le),
        "lt": (operator.lt, torch.lt),
    }.items()
    for function in functions
}
# Over the hidden axis: these need a whole row, so they are never part of a fused elementwise kernel.
_OVER_HIDDEN: dict[Any, str] = {torch.softmax: "softmax", F.softmax: "softmax", torch.mean: "mean", torch.sum: "sum"}
_CONSTANT = {torch.ones_like: 1.0, torch.zeros_like: 0.0}
_CLAMP = (torch.clamp, torch.clip)
_BINARY = ("add", "sub", "mul", "div", "pow", "maximum", "minimum", "ge", "gt", "le", "lt")
_ARITY = {name: 3 if name == "where" else 2 if name in _BINARY else 1 for name in _SAME_ARGUMENTS.values()}

HIDDEN_AXIS = frozenset(_OVER_HIDDEN.values())
VOCABULARY = frozenset(_SAME_ARGUMENTS.values()) | HIDDEN_AXIS
# Our name -> the torch function that means it, for evaluating an Expression step by step.
MEANING: dict[str, Any] = {name: function for function, name in reversed((_SAME_ARGUMENTS | _OVER_HIDDEN).items())}


@dataclass(frozen=True)
class Step:
    """`name = operation(*arguments)`, over tensors [..., H] and constants."""

    name: str
    operation: str
    arguments: tuple[Ref, ...]


@dataclass(frozen=True)
class Expression:
    """An activation as steps in order.

    Args:
        tensors: names of the tensor arguments: ("x",) or ("gate", "up").
        learned: names of the learned scalars.
        steps: each uses arguments, constants, and steps before it.
        result: what the activation returns.
        alone: whether each output element depends on its own input elements only.
        outside: what the vocabulary lacks, "cumsum()"; then steps and result serve the formula alone.
        torch: the expression itself.
    """

    tensors: tuple[str, ...]
    learned: tuple[str, ...]
    steps: tuple[Step, ...]
    result: Ref
    alone: bool
    outside: str
    torch: Callable[..., Tensor]

    @property
    def elementwise(self) -> bool:
        """Whether it can be fused: what it does to each element alone is known."""
        return self.alone and not self.outside

    @property
    def digest(self) -> str:
        """12 hex digits of the steps and every constant in them: a kernel serves a graph where theirs are the same."""
        text = repr((self.tensors, self.learned, self.steps, self.result))
        return hashlib.sha256(text.encode()).hexdigest()[:12]


class _Outside(Exception):
    """Something that the vocabulary lacks; its text names it."""


class _Reader:
    """Walks the traced graph once, giving each node a Ref."""

    def __init__(self, record: Activation) -> None:
        self.record = record
        self.refs: dict[torch.fx.Node, Ref] = {}
        self.steps: list[Step] = []
        self.outside = ""  # the first thing that the vocabulary lacks

    def ref(self, value: Any) -> Ref:
        if isinstance(value, torch.fx.Node):
            return self.refs[value]
        if isinstance(value, (bool, int, float)):
            return float(value)
        raise _Outside(f"the argument {value!r}")

    def emit(self, operation: str, *arguments: Ref) -> Ref:
        if operation in ("mul", "div") and arguments[1] == 1.0:
            return arguments[0]  # exact in every float type
        if operation == "mul" and arguments[0] == 1.0:
            return arguments[1]
        name = f"{operation}_{len(self.steps)}"
        while name in self.record.learned:
            name += "_"
        self.steps.append(Step(name, operation, arguments))
        return name

    def call(self, node: torch.fx.Node) -> Ref:
        target, kwargs = node.target, dict(node.kwargs)
        if target is getattr:
            raise _Outside(f"the attribute {node.args[1]}")
        if target in _CONSTANT:
            return _CONSTANT[target]
        if target in _CLAMP:
            low, high = (*node.args[1:], None, None)[:2]
            low, high = kwargs.pop("min", low), kwargs.pop("max", high)
            result = self.ref(node.args[0])
            if low is not None:
                result = self.emit("relu", result) if low == 0 else self.emit("maximum", result, self.ref(low))
            if high is not None:
                result = self.emit("minimum", result, self.ref(high))
            return result
        if target in _OVER_HIDDEN:
            _, axis, keeps = (*node.args, None, None)[:3]
            axis = kwargs.pop("dim", axis)
            keeps = kwargs.pop("keepdim", keeps) or _OVER_HIDDEN[target] == "softmax"
            if axis not in (-1, (-1,)) or not keeps or kwargs:
                raise _Outside(f"{_OVER_HIDDEN[target]} over dim={axis}, keepdim={keeps} (only dim=-1, keepdim=True)")
            return self.emit(_OVER_HIDDEN[target], self.ref(node.args[0]))
        if target in (torch.max, torch.min) and len(node.args) == 1:
            raise _Outside(f"{target.__name__}() of one tensor, which looks at all of it")
        if target not in _SAME_ARGUMENTS:
            raise _Outside(f"{getattr(target, '__name__', target)}()")
        name = _SAME_ARGUMENTS[target]
        given = [*kwargs, *map(repr, node.args[_ARITY[name] :])]
        if given or len(node.args) < _ARITY[name]:
            raise _Outside(f"{getattr(target, '__name__', target)}() with {', '.join(given) or 'too few arguments'}")
        if target in (torch.max, torch.min) and not isinstance(node.args[1], torch.fx.Node):
            raise _Outside(f"{target.__name__}() over a dimension; torch.clamp compares with a number")
        return self.emit(name, *(self.ref(value) for value in node.args))

    def text(self, value: Any) -> str:
        return str(self.refs[value]) if isinstance(value, torch.fx.Node) else repr(value)

    def shown(self, node: torch.fx.Node) -> Ref:
        """A step for the formula's sake, its arguments as they are written."""
        if node.target is getattr:
            return self.emit(str(node.args[1]), self.text(node.args[0]))
        arguments = [*map(self.text, node.args), *(f"{key}={self.text(value)}" for key, value in node.kwargs.items())]
        return self.emit(str(getattr(node.target, "__name__", node.target)), *arguments)

    def read_node(self, node: torch.fx.Node) -> Ref:
        """What the node computes; where the vocabulary lacks it, that is noted, and it is kept as it is written."""
        before = len(self.steps)
        try:
            if node.op == "call_method" and hasattr(torch, str(node.target)):
                node.op, node.target = "call_function", getattr(torch, str(node.target))
            if node.op != "call_function":
                raise _Outside(f"{node.op} {node.target}")
            return self.call(node)
        except _Outside as lacking:
            self.outside = self.outside or str(lacking)
            del self.steps[before:]
            return self.shown(node)

    def read(self) -> Expression:
        tensors, learned = ("gate", "up") if self.record.gated else ("x",), tuple(self.record.learned)
        result: Ref = f"{self.record.name}({', '.join((*tensors, *learned))})"
        nodes: list[torch.fx.Node] = []
        try:
            nodes = list(torch.fx.symbolic_trace(self.record.expression).graph.nodes)
        except torch.fx.proxy.TraceError:
            self.outside = "control flow that depends on values"
        except Exception as error:  # the expression is anybody's code
            self.outside = f"something that cannot be traced ({error})"
        for node in nodes:
            if node.op == "placeholder":
                self.refs[node] = str(node.target)
            elif node.op == "output":
                result = self.text(node.args[0]) if self.outside else self.ref(node.args[0])
            else:
                self.refs[node] = self.read_node(node)
        alone = not any(step.operation in HIDDEN_AXIS for step in self.steps)
        if self.outside:
            alone = _alone(self.record)
        either = self.outside and self.record.kind in ("gated", "learned")
        if not either and alone == (self.record.kind == "hidden_axis"):
            says = "looks at each element alone" if alone else "looks at the whole hidden axis"
            raise BadInput(
                f"activation {self.record.name!r} is registered as {self.record.kind!r}, but {says}; mend its kind"
            )
        steps = tuple(self.steps)
        return Expression(tensors, learned, steps, result, alone, self.outside, self.record.expression)


def _alone(record: Activation) -> bool:
    """Whether each element is looked at alone, asked of the expression's values; BadInput where rows are not."""
    generator = torch.Generator().manual_seed(0)
    rows, first, last = torch.randn(3, 2 if record.gated else 1, 6, 8, generator=generator, dtype=torch.float64)
    learned = [torch.tensor([start], dtype=torch.float64) for start in record.learned.values()]
    first[..., 0], last[..., -1] = rows[..., 0], rows[..., -1]  # all other columns differ
    given = (rows, rows[:, :1], rows.reshape(-1, 2, 3, 8), first, last)
    try:
        results = [record.expression(*tensors, *learned) for tensors in given]
        shapes = [tuple(result.shape) for result in results]
    except Exception as error:  # the expression is anybody's code
        raise BadInput(f"activation {record.name!r} cannot be computed: {error}; mend its expression") from error
    same = functools.partial(torch.allclose, rtol=1e-9, atol=1e-12, equal_nan=True)
    y, row, folded, first, last = results
    if shapes != [tuple(tensors.shape[1:]) for tensors in given] or not (
        same(y[:1], row) and same(y, folded.reshape(6, 8))
    ):
        raise BadInput(
            f"activation {record.name!r} does not turn each row [H] into a row [H] by itself; an activation keeps the "
            "shape, and may look along the last axis alone"
        )
    return bool(same(y[:, 0], first[:, 0]) and same(y[:, -1], last[:, -1]))


@functools.cache
def trace(record: Activation) -> Expression:
    """The record's expression as steps; what cannot be said so is named in its `outside`."""
    return _Reader(record).read()
