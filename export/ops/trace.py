"""Turns a record's torch expression into an `Expression`: a short list of named elementwise steps.

Tracing is torch.fx's; what stands here is the vocabulary: which torch functions we can express, and
under what one name. The printers beside this file (formula.py, onnx_function.py) each hold one row per name.
"""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F

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
    """

    tensors: tuple[str, ...]
    learned: tuple[str, ...]
    steps: tuple[Step, ...]
    result: Ref

    @property
    def elementwise(self) -> bool:
        """Whether each output element depends on its own input elements only, so that it can be fused."""
        return not any(step.operation in HIDDEN_AXIS for step in self.steps)


class _Reader:
    """Walks the traced graph once, giving each node a Ref."""

    def __init__(self, record: Activation) -> None:
        self.record = record
        self.refs: dict[torch.fx.Node, Ref] = {}
        self.steps: list[Step] = []

    def fail(self, what: str) -> BadInput:
        allowed = ", ".join(sorted(VOCABULARY | {"clamp", "ones_like", "zeros_like"}))
        return BadInput(
            f"activation {self.record.name!r} uses {what}, which cannot be exported; allowed: {allowed}; "
            "rewrite its expression in those"
        )

    def ref(self, value: Any) -> Ref:
        if isinstance(value, torch.fx.Node):
            return self.refs[value]
        if isinstance(value, (bool, int, float)):
            return float(value)
        raise self.fail(f"the argument {value!r}")

    def emit(self, operation: str, *arguments: Ref) -> Ref:
        if operation in ("mul", "div") and arguments[1] == 1.0:
            return arguments[0]  # exact in every float type
        if operation == "mul" and arguments[0] == 1.0:
            return arguments[1]
        name = f"{operation}_{len(self.steps)}"
        if name in self.record.learned:
            name += "_"
        self.steps.append(Step(name, operation, arguments))
        return name

    def call(self, node: torch.fx.Node) -> Ref:
        target, kwargs = node.target, dict(node.kwargs)
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
                raise self.fail(f"{_OVER_HIDDEN[target]} over dim={axis}, keepdim={keeps} (only dim=-1, keepdim=True)")
            return self.emit(_OVER_HIDDEN[target], self.ref(node.args[0]))
        if target in (torch.max, torch.min) and len(node.args) == 1:
            raise self.fail(f"{target.__name__}() of one tensor, which looks at all of it")
        if target not in _SAME_ARGUMENTS:
            raise self.fail(f"{getattr(target, '__name__', target)}()")
        name = _SAME_ARGUMENTS[target]
        given = [*kwargs, *map(repr, node.args[_ARITY[name] :])]
        if given or len(node.args) < _ARITY[name]:
            raise self.fail(f"{getattr(target, '__name__', target)}() with {', '.join(given) or 'too few arguments'}")
        if target in (torch.max, torch.min) and not isinstance(node.args[1], torch.fx.Node):
            raise self.fail(f"{target.__name__}() over a dimension; torch.clamp compares with a number")
        return self.emit(name, *(self.ref(value) for value in node.args))

    def read(self) -> Expression:
        try:
            graph = torch.fx.symbolic_trace(self.record.expression).graph
        except torch.fx.proxy.TraceError as error:
            raise self.fail("control flow that depends on values (torch.where is allowed)") from error
        except Exception as error:  # the expression is anybody's code
            raise self.fail(f"something that cannot be traced ({error})") from error
        for node in graph.nodes:
            if node.op == "placeholder":
                self.refs[node] = str(node.target)
            elif node.op == "call_function":
                self.refs[node] = self.call(node)
            elif node.op == "call_method" and hasattr(torch, str(node.target)):
                node.target = getattr(torch, str(node.target))
                self.refs[node] = self.call(node)
            elif node.op == "output":
                result = self.ref(node.args[0])
            else:
                raise self.fail(f"{node.op} {node.target}")
        learned = tuple(self.record.learned)
        tensors = ("gate", "up") if self.record.gated else ("x",)
        expression = Expression(tensors, learned, tuple(self.steps), result)
        if expression.elementwise == (self.record.kind == "hidden_axis"):
            says = "looks at each element alone" if expression.elementwise else "looks at the whole hidden axis"
            raise BadInput(
                f"activation {self.record.name!r} is registered as {self.record.kind!r}, but {says}; mend its kind"
            )
        return expression


@functools.cache
def trace(record: Activation) -> Expression:
    """The record's expression as steps; BadInput names what we cannot express."""
    return _Reader(record).read()
