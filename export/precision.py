"""Turns a float32 graph into one of another precision, and says how far that one may be from float64.

`int8`: every product x @ W with a stored W becomes an integer one, quantised when it runs:

    x -> DynamicQuantizeLinear -> uint8, one step for the tensor      } -> MatMulInteger -> int32
    W -> int8, once, one step per output channel, symmetric, +-127    }      -> * step of x * step of W

in the standard operators that ONNX Runtime fuses to one DynamicQuantizeMatMul. Embedding, norms, attention and
activations stay float32. Rounding to a step s is an error of variance s^2 / 12 that is independent of what is
rounded (Widrow, "Statistical theory of quantization", 1996). How such errors add up on their way to the logits
is not assumed: `dithered` is the float32 graph with a random error of that very variance on each x, from the range of
that x, and on each W; what it does to the logits is the noise that rounding would make.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from export.half import rewritten, steps

LEVELS_X, LEVELS_W = 255, 127  # steps over the range of x, with 0 in it; steps from 0 to a channel's largest |W|


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


def _with(model: onnx.ModelProto, nodes: list[onnx.NodeProto], weights: list[onnx.TensorProto]) -> onnx.ModelProto:
    """The model with these nodes, and the stored tensors that they read."""
    read = {name for node in nodes for name in node.input}
    kept = {tensor.name: tensor for tensor in [*model.graph.initializer, *weights] if tensor.name in read}
    return rewritten(model, nodes, kept.values(), TensorProto.FLOAT, model.functions)


def int8(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same with every product by a stored matrix quantised; a tensor that several products read, once."""
    products = {node.name: W for node, W in _products(model)}
    nodes: list[onnx.NodeProto] = []
    weights: list[onnx.TensorProto] = []
    seen: set[str] = set()
    for node in model.graph.node:
        if node.name not in products:
            nodes.append(node)
            continue
        (x, name), at = node.input, node.name
        W, step = quantised(products[node.name])
        weights += [numpy_helper.from_array(W, f"{name}.int8"), numpy_helper.from_array(step, f"{name}.step")]
        if x not in seen:
            seen.add(x)
            nodes.append(
                helper.make_node(
                    "DynamicQuantizeLinear", [x], [f"{x}.uint8", f"{x}.step", f"{x}.zero"], f"DynamicQuantizeLinear_{x}"
                )
            )
        nodes += [
            helper.make_node(
                "MatMulInteger", [f"{x}.uint8", f"{name}.int8", f"{x}.zero"], [f"{at}.int32"], f"{at}.MatMulInteger"
            ),
            helper.make_node("Cast", [f"{at}.int32"], [f"{at}.float"], f"{at}.Cast", to=TensorProto.FLOAT),
            helper.make_node("Mul", [f"{x}.step", f"{name}.step"], [f"{at}.step"], f"{at}.Step"),
            helper.make_node("Mul", [f"{at}.float", f"{at}.step"], list(node.output), f"{at}.Mul"),
        ]
    return _with(model, nodes, weights)


def dithered(model: onnx.ModelProto, rng: np.random.Generator) -> onnx.ModelProto:
    """The same with the errors of `int8` as random ones, in float32."""
    products = {node.name: W for node, W in _products(model)}
    nodes: list[onnx.NodeProto] = []
    zero, levels = (numpy_helper.from_array(np.float32(v), f"dither.{v}") for v in (0, LEVELS_X))
    weights, step = [zero, levels], steps(nodes)
    for node in model.graph.node:
        if node.name not in products:
            nodes.append(node)
            continue
        x, name = node.input
        W = products[node.name]
        noise = quantised(W)[1] * rng.uniform(-0.5, 0.5, W.shape).astype(np.float32)
        weights.append(numpy_helper.from_array(W + noise, f"{name}.dithered"))
        most = step("Max", step("ReduceMax", x, keepdims=0), zero.name)
        least = step("Min", step("ReduceMin", x, keepdims=0), zero.name)
        size = step("Div", step("Sub", most, least), levels.name)
        seed = float(rng.integers(2**24))
        error = step("Mul", size, step("RandomUniformLike", x, low=-0.5, high=0.5, seed=seed))
        step("MatMul", step("Add", x, error), f"{name}.dithered", output=node.output[0])
    return _with(model, nodes, weights)
