"""Turns a float32 graph into one of float16 or bfloat16, and makes the graphs that the gate holds it to.

`half`: what is stored, and what goes from node to node, takes the half type. Three things stay float32:

    head -> Cast -> logits -> all that is read off them         the bundle's outputs are float32
    x -> Cast -> x / sqrt(mean(x^2) + eps) -> Cast -> * gain    x^2 overflows float16 from |x| = 256 on
    x -> Cast -> body of ai.actuary::NAME -> Cast               as the fused kernels compute it

ONNX Runtime's own operators sum in float32 inside (norms, softmax, attention, products), and a norm with its two
casts becomes one of them, so that few casts run on a device.

Rounding to a half type is an error of at most u |x| (u = 2^-11, 2^-8) that depends on x in all its digits, as good as
random. How such errors add up on their way to the logits is not assumed: `dithered` is the float32 graph in which
each stored tensor and each value that `half` narrows gets the error that its rounding makes there, times a random
number of mean 0 and variance 1. What that does to the logits is the noise that a half type makes.

`emulated` is a half graph for runtimes without kernels for its type: each node in float32, its outputs rounded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from actuary import BadInput
from export import bundle

HalfName = Literal["fp16", "bf16"]


@dataclass(frozen=True)
class Half:
    """A half type: its number in ONNX, its numpy type, its name, its largest value."""

    element: int
    dtype: Any
    called: str
    largest: float


HALVES = MappingProxyType(
    {
        "fp16": Half(TensorProto.FLOAT16, np.float16, "float16", 65504.0),
        "bf16": Half(TensorProto.BFLOAT16, ml_dtypes.bfloat16, "bfloat16", (2 - 2.0**-7) * 2.0**127),
    }
)
_ELEMENTS = {half.element for half in HALVES.values()}
# The runtime sees other prompts than the gate: a value this close to the largest is refused too.
HEADROOM = 2
# These move values and round none.
_VIEWS = {"Gather", "GatherND", "Reshape", "Transpose", "Split", "Concat", "Slice", "Squeeze", "Unsqueeze", "Expand",
          "Identity", "Where"}  # fmt: skip
_NO_FLOATS = {"Shape", "Size", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Equal", "Range"}


@dataclass(frozen=True)
class _Plan:
    """What a half graph narrows: nodes that stay float32 by name, and the values between nodes that do not."""

    wide: set[str]
    narrow: set[str]


def _plan(model: onnx.ModelProto) -> _Plan:
    """Of a float32 graph. A square opens a norm and the quotient closes it; behind the logits nothing is narrow."""
    floats = {tensor.name for tensor in model.graph.initializer if tensor.data_type == TensorProto.FLOAT}
    open_, wide, narrow = {bundle.LOGITS}, set[str](), set[str]()
    for node in model.graph.node:
        outputs = {name for name in node.output if name}
        if node.op_type in _NO_FLOATS or not floats.intersection(node.input):
            continue
        floats |= outputs
        if node.op_type != "Pow" and not open_.intersection(node.input):
            narrow |= outputs
            continue
        wide.add(node.name)
        if node.op_type == "Div":
            narrow |= outputs
        else:
            open_ |= outputs
    return _Plan(wide, narrow)


def half(model: onnx.ModelProto, name: HalfName) -> onnx.ModelProto:
    """The same in a half type; BadInput where a weight does not fit it."""
    kind, plan = HALVES[name], _plan(model)
    stored = {tensor.name for tensor in model.graph.initializer if tensor.data_type == TensorProto.FLOAT}
    kept = {name for node in model.graph.node if node.name in plan.wide for name in node.input if name in stored}
    halved = {name for node in model.graph.node if node.name not in plan.wide for name in node.input if name in stored}
    nodes: list[onnx.NodeProto] = []
    cast: set[str] = set()

    def to(element: int, x: str, y: str) -> str:
        if y not in cast:
            cast.add(y)
            nodes.append(helper.make_node("Cast", [x], [y], f"Cast_{y}", to=element))
        return y

    for node in model.graph.node:
        copy = onnx.NodeProto.FromString(node.SerializeToString())
        del copy.input[:], copy.output[:]
        after: list[tuple[int, str, str]] = []
        if node.name in plan.wide:
            narrow = plan.narrow - {bundle.LOGITS}
            copy.input.extend(to(TensorProto.FLOAT, x, f"{x}.float32") if x in narrow else x for x in node.input)
            copy.output.extend(f"{y}.float32" if y in narrow else y for y in node.output)
            after = [(kind.element, f"{y}.float32", y) for y in node.output if y in narrow]
        else:
            copy.input.extend(f"{x}.half" if x in halved & kept else x for x in node.input)
            copy.output.extend(f"{y}.half" if y == bundle.LOGITS else y for y in node.output)
            after = [(TensorProto.FLOAT, f"{y}.half", y) for y in node.output if y == bundle.LOGITS]
        nodes.append(copy)
        for element, x, y in after:
            to(element, x, y)

    def tensors() -> Iterable[onnx.TensorProto]:
        for tensor in model.graph.initializer:
            if tensor.name not in halved or tensor.name in kept:
                yield tensor
            if tensor.name in halved:
                label = f"{tensor.name}.half" if tensor.name in kept else tensor.name
                yield numpy_helper.from_array(_narrowed(numpy_helper.to_array(tensor), kind, tensor.name), label)

    return rewritten(model, nodes, tensors(), kind.element, [_in_float32(function) for function in model.functions])


def _narrowed(array: NDArray[np.float32], kind: Half, name: str) -> NDArray[Any]:
    finite = np.abs(array[np.isfinite(array)])
    if finite.size and finite.max() > kind.largest:
        raise _too_large(kind, f"the weight {name}", float(finite.max()))
    return np.asarray(array.astype(kind.dtype))


def _too_large(kind: Half, what: str, value: float) -> BadInput:
    other = "bf16 or fp32" if kind is HALVES["fp16"] else "fp32"
    return BadInput(
        f"{what} holds {value:.4g}, and {kind.called} ends at {kind.largest:.5g}; export it with --precision {other}"
    )


def _in_float32(function: onnx.FunctionProto) -> onnx.FunctionProto:
    """The same for arguments of any float type, its arithmetic in float32."""
    inputs, (output,) = list(function.input), function.output
    names = {name: f"float32.{name}" for name in (*inputs, output)}
    nodes = [helper.make_node("Cast", [name], [names[name]], to=TensorProto.FLOAT) for name in inputs]
    for node in function.node:
        copy = onnx.NodeProto.FromString(node.SerializeToString())
        del copy.input[:], copy.output[:]
        copy.input.extend(names.get(name, name) for name in node.input)
        copy.output.extend(names.get(name, name) for name in node.output)
        nodes.append(copy)
    nodes.append(helper.make_node("CastLike", [names[output], inputs[0]], [output]))
    return helper.make_function(function.domain, function.name, inputs, [output], nodes, function.opset_import)


def rewritten(
    model: onnx.ModelProto,
    nodes: list[onnx.NodeProto],
    tensors: Iterable[onnx.TensorProto],
    element: int,
    functions: Iterable[onnx.FunctionProto],
    outputs: list[onnx.ValueInfoProto] | None = None,
) -> onnx.ModelProto:
    """The model with these parts; what its value_info says of floats, it says of `element`."""
    g = model.graph
    infos = [onnx.ValueInfoProto.FromString(info.SerializeToString()) for info in g.value_info]
    for info in infos:
        if info.type.tensor_type.elem_type in (TensorProto.FLOAT, *_ELEMENTS):
            info.type.tensor_type.elem_type = element
    made = helper.make_model(
        helper.make_graph(nodes, g.name, g.input, g.output if outputs is None else outputs, value_info=infos),
        functions=functions,
        opset_imports=model.opset_import,
        ir_version=model.ir_version,
        producer_name=model.producer_name,
    )
    for tensor in tensors:  # one at a time: see export/graph_parts.py
        made.graph.initializer.append(tensor)
    return made


Step = Callable[..., str]


def steps(nodes: list[onnx.NodeProto]) -> Step:
    """`step(operator, *inputs, output="", **attributes)` appends a node and returns its output's name."""

    def step(operator: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        nodes.append(helper.make_node(operator, list(inputs), [output or f"step.{len(nodes)}"], **attributes))
        return str(nodes[-1].output[0])

    return step


def emulated(model: onnx.ModelProto) -> onnx.ModelProto:
    """A half graph as one of float32 that rounds what the half one stores: each node between casts."""
    nodes: list[onnx.NodeProto] = []
    step = steps(nodes)
    narrow = {tensor.name: tensor.data_type for tensor in model.graph.initializer if tensor.data_type in _ELEMENTS}

    def rounded(x: str, element: int, output: str) -> None:
        narrow[output] = element
        step("Cast", step("Cast", x, to=element), output=output, to=TensorProto.FLOAT)

    for node in model.graph.node:
        elements = [narrow[name] for name in node.input if name in narrow]
        if node.op_type == "Cast":
            to = helper.get_node_attr_value(node, "to")
            if to in _ELEMENTS:
                rounded(node.input[0], to, node.output[0])
                continue
            if elements and to == TensorProto.FLOAT:
                step("Identity", node.input[0], output=node.output[0])
                continue
        if not elements or node.op_type in _NO_FLOATS | _VIEWS:
            nodes.append(node)
            if elements and node.op_type in _VIEWS:
                narrow |= dict.fromkeys(filter(None, node.output), elements[0])
            continue
        copy = onnx.NodeProto.FromString(node.SerializeToString())
        del copy.output[:]
        copy.output.extend(f"{y}.exact" if y else "" for y in node.output)
        nodes.append(copy)
        for y in filter(None, node.output):
            rounded(f"{y}.exact", elements[0], y)
    tensors = (
        numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name)
        if tensor.data_type in _ELEMENTS
        else tensor
        for tensor in model.graph.initializer
    )
    return rewritten(model, nodes, tensors, TensorProto.FLOAT, model.functions)


def dithered(model: onnx.ModelProto, rng: np.random.Generator, name: HalfName) -> onnx.ModelProto:
    """The float32 graph `model` with the errors of `half` as random ones, in float32."""
    kind, plan = HALVES[name], _plan(model)
    reach = math.sqrt(3)  # a uniform number from -reach to reach has variance 1
    nodes: list[onnx.NodeProto] = []
    step = steps(nodes)
    masks, zero = _masks(model), numpy_helper.from_array(np.float32(0), "dither.zero")
    for node in model.graph.node:
        if node.op_type in _VIEWS or not plan.narrow.intersection(node.output):
            nodes.append(node)
            continue
        copy = onnx.NodeProto.FromString(node.SerializeToString())
        del copy.output[:]
        copy.output.extend(f"{y}.exact" if y else "" for y in node.output)
        nodes.append(copy)
        for y in filter(None, node.output):
            x = f"{y}.exact"
            error = step("Sub", step("Cast", step("Cast", x, to=kind.element), to=TensorProto.FLOAT), x)
            if masks.intersection(node.input):  # where it is -inf, exactly
                error = step("Where", step("IsInf", x), zero.name, error)
            share = step("RandomUniformLike", x, low=-reach, high=reach, seed=float(rng.integers(2**24)))
            step("Add", x, step("Mul", error, share), output=y)
    halved = {name for node in model.graph.node if node.name not in plan.wide for name in node.input}

    def tensors() -> Iterable[onnx.TensorProto]:
        yield zero
        for tensor in model.graph.initializer:
            if tensor.name not in halved or tensor.data_type != TensorProto.FLOAT:
                yield tensor
                continue
            W = numpy_helper.to_array(tensor)
            finite = np.where(np.isfinite(W), W, 0)
            error = finite.astype(kind.dtype).astype(np.float32) - finite
            share = rng.uniform(-reach, reach, W.shape)
            yield numpy_helper.from_array(W + (error * share).astype(np.float32), tensor.name)

    return rewritten(model, nodes, tensors(), TensorProto.FLOAT, model.functions)


def ranged(model: onnx.ModelProto) -> tuple[onnx.ModelProto, dict[str, str]]:
    """The float32 graph with the largest |value| of what `half` narrows as its outputs, and what each is called: the
    weight that made it, or its node."""
    narrow = _plan(model).narrow
    nodes, called = list(model.graph.node), dict[str, str]()
    step = steps(nodes)
    stored = {tensor.name for tensor in model.graph.initializer}
    masks = _masks(model)
    zero = numpy_helper.from_array(np.float32(0), "ranged.zero")
    for node in model.graph.node:
        if node.op_type in _VIEWS:
            continue
        for y in narrow.intersection(node.output):
            x = step("Where", step("IsInf", y), zero.name, y) if masks.intersection(node.input) else y
            largest = step("ReduceMax", step("Abs", x), keepdims=0)
            weight = next((name for name in node.input if name in stored), "")
            called[largest] = f"{y} (of {weight})" if weight else y
    outputs = [helper.make_tensor_value_info(largest, TensorProto.FLOAT, []) for largest in called]
    tensors = [*model.graph.initializer, zero]
    return rewritten(model, nodes, tensors, TensorProto.FLOAT, model.functions, outputs), called


def _masks(model: onnx.ModelProto) -> set[str]:
    """What is added to scores: 0 or -inf, both exact."""
    return {y for node in model.graph.node if node.op_type == "Where" for y in node.output}


def check_range(values: dict[str, float], name: HalfName) -> None:
    """BadInput where a value that `ranged` saw leaves no headroom in the half type."""
    kind = HALVES[name]
    what, largest = max(values.items(), key=lambda item: item[1] if item[1] == item[1] else math.inf)
    if not largest * HEADROOM <= kind.largest:
        raise _too_large(kind, f"the tensor {what}", largest)
