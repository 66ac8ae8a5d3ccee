"""Turns a float32 graph into one of another precision, and says how far that one may be from float64.

`int8`: every product x @ W with a stored W becomes an integer one, quantised when it runs, with its bias:

    x -> each row to uint8, one step for the row                      } -> ai.actuary::Int8Linear
    W -> int8, once, one step per output channel, symmetric, +-127    }

one kernel where the fused operators are built, else standard operators (export/ops/int8_function.py). Embedding,
norms, attention and activations stay float32. A row is a token, so what stands beside a prompt in its batch does not
change its answer. Rounding to a step s is an error of variance s^2 / 12 that is independent of what is
rounded (Widrow, "Statistical theory of quantization", 1996). How such errors add up on their way to the logits
is not assumed: `dithered` is the float32 graph with a random error of that very variance on each x, from the range of
that row of x, and on each W; what it does to the logits is the noise that rounding would make.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from actuary import BadInput
from export.bundle import DOMAIN
from export.half import rewritten, steps
from export.int8_fusion import fused
from export.ops.int8_function import DEPTH, FORMS, INT8_LINEAR, LEVELS, MOST_ROWS, int8_function, panels

LEVELS_W = 127  # steps from 0 to a channel's largest |W|


def quantised(W: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """W [K, N] as int8 [K, N] and the step of each channel [N]."""
    largest = np.abs(W).max(axis=0)
    step = np.where(largest > 0, largest / np.float32(LEVELS_W), np.float32(1)).astype(np.float32)
    return np.rint(W / step).astype(np.int8), step


def _products(model: onnx.ModelProto) -> Iterator[tuple[onnx.NodeProto, NDArray[np.float32]]]:
    """Every MatMul by a stored matrix, and the matrix."""
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "MatMul" and not node.domain and node.input[1] in stored:
            yield node, numpy_helper.to_array(stored[node.input[1]])


def _with(
    model: onnx.ModelProto,
    nodes: list[onnx.NodeProto],
    weights: list[onnx.TensorProto],
    functions: Sequence[onnx.FunctionProto] = (),
) -> onnx.ModelProto:
    """The model with these nodes, the stored tensors that they read, and these functions besides its own."""
    read = {name for node in nodes for name in node.input}
    kept = {tensor.name: tensor for tensor in [*model.graph.initializer, *weights] if tensor.name in read}
    return rewritten(model, nodes, kept.values(), TensorProto.FLOAT, [*model.functions, *functions])


def int8(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same with every product by a stored matrix quantised, and the bias that alone reads it added there."""
    products, biases = {node.name: W for node, W in _products(model)}, _biases(model)
    within = {add.name for add in biases.values()}
    nodes: list[onnx.NodeProto] = []
    weights: list[onnx.TensorProto] = []
    padded: set[str] = set()
    for node in model.graph.node:
        if node.name in within:
            continue
        if node.name not in products:
            nodes.append(node)
            continue
        x, name = node.input
        W, step = quantised(products[node.name])
        if len(W) > MOST_ROWS:
            raise BadInput(f"{name} has {len(W)} rows, and int8's sums hold {MOST_ROWS}; use --precision fp32")
        N, rest = W.shape[1], -W.shape[0] % DEPTH
        if rest:
            W = np.pad(W, ((0, rest), (0, 0)))
            x = _padded(x, rest, nodes, weights, padded)
        if add := biases.get(node.name):
            bias, output = add.input[1], add.output[0]
        else:
            bias, output = f"zeros_{N}", node.output[0]
            weights.append(numpy_helper.from_array(np.zeros(N, dtype=np.float32), bias))
        stored = {"int8": panels(W), "step": step, "sums": W.sum(axis=0, dtype=np.int32)}
        weights += [numpy_helper.from_array(array, f"{name}.{kind}") for kind, array in stored.items()]
        inputs = [x, *(f"{name}.{kind}" for kind in stored), bias]
        nodes.append(helper.make_node(INT8_LINEAR, inputs, [output], node.name, domain=DOMAIN))
    nodes, more = fused(nodes)
    used = {node.op_type for node in nodes if node.domain == DOMAIN}
    functions = [int8_function(name) for name in FORMS if name in used]
    return _with(model, nodes, [*weights, *more], functions)


def _biases(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    """By the name of a product, the Add of a stored vector that alone reads it."""
    stored = {tensor.name for tensor in model.graph.initializer if len(tensor.dims) == 1}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    found = {}
    for product, _ in _products(model):
        adds = readers.get(product.output[0], [])
        if len(adds) == 1 and adds[0].op_type == "Add" and adds[0].input[1] in stored:
            found[product.name] = adds[0]
    return found


def _padded(x: str, rest: int, nodes: list[onnx.NodeProto], weights: list[onnx.TensorProto], padded: set[str]) -> str:
    """x with `rest` zeros at the end of each row, which no row's range or product sees."""
    if x not in padded:
        padded.add(x)
        for kind, value in {"pads": [0, rest], "axes": [-1]}.items():
            weights.append(numpy_helper.from_array(np.array(value, dtype=np.int64), f"{x}.{kind}"))
        nodes.append(helper.make_node("Pad", [x, f"{x}.pads", "", f"{x}.axes"], [f"{x}.padded"], f"Pad_{x}"))
    return f"{x}.padded"


def dithered(model: onnx.ModelProto, rng: np.random.Generator) -> onnx.ModelProto:
    """The same with the errors of `int8` as random ones, in float32."""
    products = {node.name: W for node, W in _products(model)}
    nodes: list[onnx.NodeProto] = []
    zero, levels = (numpy_helper.from_array(np.float32(v), f"dither.{v}") for v in (0, LEVELS))
    last = numpy_helper.from_array(np.array([-1]), "dither.last")
    weights, step = [zero, levels, last], steps(nodes)
    for node in model.graph.node:
        if node.name not in products:
            nodes.append(node)
            continue
        x, name = node.input
        W = products[node.name]
        noise = quantised(W)[1] * rng.uniform(-0.5, 0.5, W.shape).astype(np.float32)
        weights.append(numpy_helper.from_array(W + noise, f"{name}.dithered"))
        most = step("Max", step("ReduceMax", x, last.name), zero.name)
        least = step("Min", step("ReduceMin", x, last.name), zero.name)
        size = step("Div", step("Sub", most, least), levels.name)
        seed = float(rng.integers(2**24))
        error = step("Mul", size, step("RandomUniformLike", x, low=-0.5, high=0.5, seed=seed))
        step("MatMul", step("Add", x, error), f"{name}.dithered", output=node.output[0])
    return _with(model, nodes, weights)
