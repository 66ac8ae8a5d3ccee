"""Writes a checkpoint's ONNX graph node by node: no tracing, so every node is one that was meant.

                 input_ids [B, T]      lengths [B]      top_k [1]
                        |                  |               |
                      Gather norm(embed)   |               |
                        |                  |               |
    L times:   x -> RMSNorm -> qkv -> QK-norm, RoPE -> softmax(q k^T + causal) v -> out -> + x
               x -> RMSNorm -> up -> ai.actuary::ACTIVATION -> down -> + x
                        |                  |               |
               (in the last block the row at lengths - 1 alone goes on, from before the FFN)
                        |                                  |
                     RMSNorm -> embed^T + bias -> logits [B, V] -> softmax, sigmoid, top ids, mass, entropy

Standard operators of opset 20 only, and one node of our own domain per block whose meaning travels in the
file as a function (export/ops/onnx_function.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from export import bundle
from export.ops.onnx_function import onnx_function
from export.ops.trace import trace
from models.decoder import Decoder, Weights

IR_VERSION = 10  # the newest that every runtime with opset 20 reads


class Graph:
    """Nodes and initializers under construction; every method returns the name of a tensor."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}
        self.value_info: list[onnx.ValueInfoProto] = []

    def node(self, operator: str, *inputs: str, output: str = "", domain: str = "", **attributes: Any) -> str:
        return self.split(
            operator, *inputs, outputs=[output or f"{operator}_{len(self.nodes)}"], domain=domain, **attributes
        )[0]

    def split(
        self, operator: str, *inputs: str, outputs: Sequence[str], domain: str = "", **attributes: Any
    ) -> list[str]:
        """A node of several outputs."""
        name = f"{operator}_{len(self.nodes)}"
        self.nodes.append(
            helper.make_node(operator, list(inputs), list(outputs), name=name, domain=domain, **attributes)
        )
        return list(outputs)

    def weight(self, name: str, array: NDArray[Any]) -> str:
        self.initializers[name] = numpy_helper.from_array(np.ascontiguousarray(array), name)
        return name

    def ints(self, *values: int) -> str:
        """An int64 constant [n], shared between its users."""
        return self.weight("ints_" + "_".join(map(str, values)), np.array(values, dtype=np.int64))

    def scalar(self, value: float) -> str:
        return self.weight(f"float_{value!r}", np.array(value, dtype=np.float32))

    def rms_norm(self, x: str, gain: str, eps: float) -> str:
        """x / sqrt(mean(x^2) + eps) * gain [C] over the last axis, in the form that ONNX Runtime fuses."""
        square = self.node("Pow", x, self.scalar(2.0))
        mean = self.node("ReduceMean", square, self.ints(-1), keepdims=1)
        root = self.node("Sqrt", self.node("Add", mean, self.scalar(eps)))
        return self.node("Mul", self.node("Div", x, root), gain)


Positions = Literal["last", "all"]


def build(decoder: Decoder, positions: Positions = "last") -> onnx.ModelProto:
    """The whole model.

    Args:
        positions: `last` is the bundle's contract (export/bundle.py); `all` gives logits [B, T, V] of every
            position and nothing else, which is what measuring bits per byte takes.
    """
    g = Graph()
    shared = _positions(g, decoder)
    x = g.node("Gather", g.weight("embed", decoder.weights["embed"]), bundle.INPUT_IDS)  # [B, T, C]
    if decoder.rope is None:
        x = g.node("Add", x, g.node("Slice", g.weight("position", decoder.weights["position"]), g.ints(0), shared.T))
    for i in range(decoder.layers):
        x = _attention(g, decoder, i, x, shared)
        last = positions == "last" and i == decoder.layers - 1
        if last:
            row = g.node("Unsqueeze", g.node("Sub", bundle.LENGTHS, g.ints(1)), g.ints(1))  # [B, 1]
            x = g.node("GatherND", x, row, batch_dims=1)  # [B, C]
        x = _feed_forward(g, decoder, i, x, axes=["batch"] if last else ["batch", "time"])
    x = _norm(g, decoder, "norm", decoder.weights, x)
    # The head has a transposed table of its own, also where it is the embedding's, so that it can be quantised alone.
    logits = _linear(g, "head", decoder.weights, x, output=bundle.LOGITS)
    if positions == "last":
        _probabilities(g, logits)
    return _model(g, decoder, positions)


@dataclass(frozen=True)
class _Shared:
    """What all blocks read: the length [1], RoPE's cos and sin [T, D / 2] or "", and the causal bias [T, T]."""

    T: str
    cos: str
    sin: str
    bias: str


def _positions(g: Graph, decoder: Decoder) -> _Shared:
    T = g.node("Shape", bundle.INPUT_IDS, start=1, end=2)  # [1]
    cos, sin = (
        (
            g.node("Slice", g.weight(name, table), g.ints(0), T, g.ints(0))
            for name, table in zip(("rope.cos", "rope.sin"), decoder.rope, strict=True)
        )
        if decoder.rope
        else ("", "")
    )
    zero, one = (g.weight(f"int_{value}", np.array(value, dtype=np.int64)) for value in (0, 1))
    order = g.node("Range", zero, g.node("Squeeze", T), one)
    later = g.node("Greater", g.node("Unsqueeze", order, g.ints(0)), g.node("Unsqueeze", order, g.ints(1)))
    return _Shared(T, cos, sin, g.node("Where", later, g.scalar(-math.inf), g.scalar(0.0)))


def _norm(g: Graph, decoder: Decoder, name: str, weights: Weights, x: str, at: str = "") -> str:
    """The decoder's norm of x over the last axis, with the gain [C] and bias [C] called `name`."""
    gain = g.weight(f"{at}{name}.weight", weights[f"{name}.weight"])
    if decoder.norm == "rms":
        return g.rms_norm(x, gain, decoder.norm_eps)
    bias = g.weight(f"{at}{name}.bias", weights[f"{name}.bias"])
    return g.node("LayerNormalization", x, gain, bias, axis=-1, epsilon=decoder.norm_eps)


def _linear(g: Graph, name: str, weights: Weights, x: str, at: str = "", output: str = "") -> str:
    """x @ weight^T (+ bias) for the torch weight [out, in] called `name`, stored transposed as MatMul wants it."""
    bias = weights.get(f"{name}.bias")
    product = g.node(
        "MatMul",
        x,
        g.weight(f"{at}{name}.weight", weights[f"{name}.weight"].T),
        output="" if bias is not None else output,
    )
    return product if bias is None else g.node("Add", product, g.weight(f"{at}{name}.bias", bias), output=output)


def _attention(g: Graph, decoder: Decoder, i: int, x: str, shared: _Shared) -> str:
    """x + out(attention(norm(x))): [B, T, C] -> [B, T, C].

    Query heads stand in groups [B, kv_heads, group, T, D], so that each group's one key and value head is
    broadcast and never copied; where every query head has its own, the group's axis is left out.
    """
    at, w = f"blocks.{i}.", decoder.block(i)
    heads, kv_heads, D = decoder.heads, decoder.kv_heads, decoder.head_dim
    group = heads // kv_heads
    grouped = [kv_heads] if group == 1 else [kv_heads, group]
    scale = np.float32(decoder.score_scales[i])
    # The scores' scale rides on q: on its gain where it is normed, else on the rows that make it.
    if "q_norm.weight" in w:
        w = {**w, "q_norm.weight": w["q_norm.weight"] * scale}
    else:
        rows = np.ones(((heads + 2 * kv_heads) * D, 1), dtype=np.float32)
        rows[: heads * D] = scale
        w = {**w, "qkv.weight": w["qkv.weight"] * rows}
        if "qkv.bias" in w:
            w["qkv.bias"] = w["qkv.bias"] * rows[:, 0]
    qkv = _linear(g, "qkv", w, _norm(g, decoder, "attention_norm", w, x, at), at)
    widths = g.ints(heads * D, kv_heads * D, kv_heads * D)
    q, k, v = g.split("Split", qkv, widths, outputs=[at + "q", at + "k", at + "v"], axis=-1)

    def turned(y: str, which: str, shape: list[int]) -> str:
        """QK-norm and RoPE, where there are: [B, T, n D] -> [B, *shape, T, D]."""
        y = g.node("Reshape", y, g.ints(0, 0, *shape, D))
        if f"{which}_norm.weight" in w:
            y = g.rms_norm(y, g.weight(f"{at}{which}_norm.weight", w[f"{which}_norm.weight"]), decoder.norm_eps)
        n = len(shape)
        y = g.node("Transpose", y, perm=[0, *range(2, 2 + n), 1, 2 + n])
        if decoder.rope is None:
            return y
        a, b = g.split("Split", y, outputs=[f"{at}{which}.first", f"{at}{which}.second"], axis=-1, num_outputs=2)
        first = g.node("Sub", g.node("Mul", a, shared.cos), g.node("Mul", b, shared.sin))
        second = g.node("Add", g.node("Mul", b, shared.cos), g.node("Mul", a, shared.sin))
        return g.node("Concat", first, second, axis=-1)

    alone = [kv_heads] if group == 1 else [kv_heads, 1]
    last = len(alone) + 2
    q = turned(q, "q", grouped)
    k = g.node("Transpose", turned(k, "k", alone), perm=[*range(last - 1), last, last - 1])  # [..., D, T]
    v = g.node("Reshape", v, g.ints(0, 0, *alone, D))
    v = g.node("Transpose", v, perm=[0, *range(2, last), 1, last])
    scores = g.node("Add", g.node("MatMul", q, k), shared.bias)  # [B, kv_heads, (group,) T, T]
    y = g.node("MatMul", g.node("Softmax", scores, axis=-1), v)
    y = g.node("Transpose", y, perm=[0, last - 1, *range(1, last - 1), last])
    y = g.node("Reshape", y, g.ints(0, 0, heads * D))
    return g.node("Add", x, _linear(g, "out", w, y, at))


def _feed_forward(g: Graph, decoder: Decoder, i: int, x: str, axes: list[str]) -> str:
    """x + down(activation(up(norm(x)))): [..., C] -> [..., C]."""
    at, w, activation = f"blocks.{i}.", decoder.block(i), decoder.activation
    up = _linear(g, "up", w, _norm(g, decoder, "ffn_norm", w, x, at), at)
    learned = [g.weight(f"{at}learned.{name}", w[f"learned.{name}"]) for name in activation.learned]
    hidden = g.node(activation.name, up, *learned, domain=bundle.DOMAIN, output=at + "hidden")
    # Without its shape, the product that follows would not become a Gemm.
    g.value_info.append(helper.make_tensor_value_info(hidden, TensorProto.FLOAT, [*axes, decoder.hidden]))
    return g.node("Add", x, _linear(g, "down", w, hidden, at))


def _probabilities(g: Graph, logits: str) -> None:
    """Everything that is read off the logits [B, V], in forms that hold at any magnitude.

    sigmoid is exp(-softplus(-l)): ONNX Runtime's own Sigmoid is right to 1e-7 absolute only, which over
    a vocabulary of 50,000 unlikely tokens would be wrong by 0.005 in mass.
    """
    log_softmax = g.node("LogSoftmax", logits, axis=-1)
    log_sigmoid = g.node("Neg", g.node("Softplus", g.node("Neg", logits)))
    g.node("Exp", log_softmax, output=bundle.SOFTMAX)
    g.node("Exp", log_sigmoid, output=bundle.SIGMOID)
    g.split("TopK", logits, bundle.TOP_K, outputs=["top_logits", bundle.TOP_IDS], axis=-1, largest=1, sorted=1)

    def entropy_bits(log_probability: str) -> str:
        """-sum p log2 p; p = 0 counts nothing, since log p stays finite."""
        nats = g.node(
            "ReduceSum", g.node("Mul", g.node("Exp", log_probability), log_probability), g.ints(-1), keepdims=1
        )
        return g.node("Mul", nats, g.scalar(-1 / math.log(2)))

    masses = [g.node("ReduceSum", p, g.ints(-1), keepdims=1) for p in (bundle.SOFTMAX, bundle.SIGMOID)]
    g.node("Concat", *masses, axis=-1, output=bundle.MASS)
    entropies = [entropy_bits(log_softmax), entropy_bits(g.node("LogSoftmax", log_sigmoid, axis=-1))]
    g.node("Concat", *entropies, axis=-1, output=bundle.ENTROPY_BITS)


def _model(g: Graph, decoder: Decoder, positions: Positions) -> onnx.ModelProto:
    V, ids, floats = decoder.vocab_size, TensorProto.INT64, TensorProto.FLOAT
    inputs = [helper.make_tensor_value_info(bundle.INPUT_IDS, ids, ["batch", "time"])]
    if positions == "all":
        outputs = [helper.make_tensor_value_info(bundle.LOGITS, floats, ["batch", "time", V])]
    else:
        inputs += [
            helper.make_tensor_value_info(bundle.LENGTHS, ids, ["batch"]),
            helper.make_tensor_value_info(bundle.TOP_K, ids, [1]),
        ]
        widths = {bundle.LOGITS: V, bundle.SOFTMAX: V, bundle.SIGMOID: V, bundle.MASS: 2, bundle.ENTROPY_BITS: 2}
        outputs = [helper.make_tensor_value_info(name, floats, ["batch", width]) for name, width in widths.items()]
        outputs.append(helper.make_tensor_value_info(bundle.TOP_IDS, ids, ["batch", "top"]))
    graph = helper.make_graph(
        g.nodes, decoder.name, inputs, outputs, list(g.initializers.values()), value_info=g.value_info
    )
    activation = decoder.activation
    return helper.make_model(
        graph,
        functions=[onnx_function(activation.name, trace(activation))],
        opset_imports=[helper.make_opsetid("", bundle.OPSET), helper.make_opsetid(bundle.DOMAIN, 1)],
        ir_version=IR_VERSION,
        producer_name="actuary",
    )
