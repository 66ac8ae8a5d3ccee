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
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from export import bundle
from export.ops.onnx_function import onnx_function
from export.ops.trace import trace
from models.activations import Activation
from models.gpt import NORM_EPS, ActuaryConfig, rope_tables

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

    def rms_norm(self, x: str, gain: str) -> str:
        """x / sqrt(mean(x^2) + eps) * gain [C] over the last axis, in the form that ONNX Runtime fuses."""
        square = self.node("Pow", x, self.scalar(2.0))
        mean = self.node("ReduceMean", square, self.ints(-1), keepdims=1)
        root = self.node("Sqrt", self.node("Add", mean, self.scalar(NORM_EPS)))
        return self.node("Mul", self.node("Div", x, root), gain)

    def linear(self, x: str, name: str, weight: NDArray[Any]) -> str:
        """x @ weight^T for a torch weight [out, in], stored transposed as MatMul wants it."""
        return self.node("MatMul", x, self.weight(name, weight.T))


Weights = Mapping[str, NDArray[np.float32]]


def build(config: ActuaryConfig, activation: Activation, weights: Weights) -> onnx.ModelProto:
    """The whole model; `weights` by their names in the checkpoint."""
    g = Graph()
    positions = _positions(g, config)
    # Norm and lookup commute: the table is normed once, here, in float64.
    x = g.node("Gather", g.weight("embed", _normed(weights["embed.weight"])), bundle.INPUT_IDS)  # [B, T, C]
    for i in range(config.layers):
        block = {
            name.removeprefix(f"blocks.{i}."): array
            for name, array in weights.items()
            if name.startswith(f"blocks.{i}.")
        }
        x = _attention(g, config, f"blocks.{i}.", block, x, positions)
        if i == config.layers - 1:
            last = g.node("Unsqueeze", g.node("Sub", bundle.LENGTHS, g.ints(1)), g.ints(1))  # [B, 1]
            x = g.node("GatherND", x, last, batch_dims=1)  # [B, C]
        x = _feed_forward(
            g, config, activation, f"blocks.{i}.", block, x, rows="batch" if i == config.layers - 1 else None
        )
    x = g.rms_norm(x, g.weight("norm.weight", weights["norm.weight"]))
    # The head has its own, transposed copy of the embedding, so that it can be quantised on its own.
    product = g.linear(x, "head.weight", weights["embed.weight"])
    logits = g.node("Add", product, g.weight("head.bias", weights["head_bias"]), output=bundle.LOGITS)
    _probabilities(g, logits)
    return _model(g, config, activation)


def _normed(table: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows [V, C] over their root mean square."""
    exact = table.astype(np.float64)
    return np.asarray(exact / np.sqrt((exact**2).mean(-1, keepdims=True) + NORM_EPS), dtype=np.float32)


def _positions(g: Graph, config: ActuaryConfig) -> tuple[str, str, str]:
    """RoPE's cos and sin [T, head_dim / 2] and the causal bias [T, T], shared by all blocks."""
    T = g.node("Shape", bundle.INPUT_IDS, start=1, end=2)  # [1]
    cos, sin = (table.float().numpy() for table in rope_tables(config.context, config.dim // config.heads))
    tables = [
        g.node("Slice", g.weight(name, table), g.ints(0), T, g.ints(0))
        for name, table in (("rope.cos", cos), ("rope.sin", sin))
    ]
    zero, one = (g.weight(f"int_{value}", np.array(value, dtype=np.int64)) for value in (0, 1))
    order = g.node("Range", zero, g.node("Squeeze", T), one)
    later = g.node("Greater", g.node("Unsqueeze", order, g.ints(0)), g.node("Unsqueeze", order, g.ints(1)))
    return tables[0], tables[1], g.node("Where", later, g.scalar(-math.inf), g.scalar(0.0))


def _attention(g: Graph, config: ActuaryConfig, at: str, w: Weights, x: str, positions: tuple[str, str, str]) -> str:
    """x + out(attention(norm(x))): [B, T, C] -> [B, T, C]."""
    cos, sin, bias = positions
    heads, head_dim = config.heads, config.dim // config.heads
    qkv = g.linear(
        g.rms_norm(x, g.weight(at + "attention_norm", w["attention_norm.weight"])),
        at + "qkv",
        w["attention.qkv.weight"],
    )
    q, k, v = g.split("Split", qkv, outputs=[at + "q", at + "k", at + "v"], axis=-1, num_outputs=3)

    def rotated(y: str, gain: NDArray[np.float32], name: str) -> str:
        """QK-norm, then RoPE: [B, T, C] -> [B, heads, T, head_dim]."""
        y = g.node("Reshape", y, g.ints(0, 0, heads, head_dim))
        y = g.node("Transpose", g.rms_norm(y, g.weight(at + name, gain)), perm=[0, 2, 1, 3])
        a, b = g.split("Split", y, outputs=[at + name + "_first", at + name + "_second"], axis=-1, num_outputs=2)
        first = g.node("Sub", g.node("Mul", a, cos), g.node("Mul", b, sin))
        second = g.node("Add", g.node("Mul", b, cos), g.node("Mul", a, sin))
        return g.node("Concat", first, second, axis=-1)

    # The 1 / sqrt(head_dim) of the scores rides on q's gain.
    q = rotated(q, w["attention.q_norm.weight"] * np.float32(head_dim**-0.5), "q_norm")
    k = g.node("Transpose", rotated(k, w["attention.k_norm.weight"], "k_norm"), perm=[0, 1, 3, 2])
    v = g.node("Transpose", g.node("Reshape", v, g.ints(0, 0, heads, head_dim)), perm=[0, 2, 1, 3])
    scores = g.node("Add", g.node("MatMul", q, k), bias)  # [B, heads, T, T]
    y = g.node("MatMul", g.node("Softmax", scores, axis=-1), v)
    y = g.node("Reshape", g.node("Transpose", y, perm=[0, 2, 1, 3]), g.ints(0, 0, config.dim))
    return g.node("Add", x, g.linear(y, at + "out", w["attention.out.weight"]))


def _feed_forward(
    g: Graph, config: ActuaryConfig, activation: Activation, at: str, w: Weights, x: str, rows: str | None
) -> str:
    """x + down(activation(up(norm(x)))): [..., C] -> [..., C]."""
    up = g.linear(g.rms_norm(x, g.weight(at + "ffn_norm", w["ffn_norm.weight"])), at + "up", w["ffn.up.weight"])
    learned = [g.weight(f"{at}learned.{name}", w[f"ffn.learned.{name}"]) for name in activation.learned]
    hidden = g.node(activation.name, up, *learned, domain=bundle.DOMAIN, output=at + "hidden")
    shape = [rows, config.hidden] if rows else ["batch", "time", config.hidden]
    g.value_info.append(helper.make_tensor_value_info(hidden, TensorProto.FLOAT, shape))
    return g.node("Add", x, g.linear(hidden, at + "down", w["ffn.down.weight"]))


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


def _model(g: Graph, config: ActuaryConfig, activation: Activation) -> onnx.ModelProto:
    V = config.vocab_size
    ids = TensorProto.INT64
    inputs = [
        helper.make_tensor_value_info(bundle.INPUT_IDS, ids, ["batch", "time"]),
        helper.make_tensor_value_info(bundle.LENGTHS, ids, ["batch"]),
        helper.make_tensor_value_info(bundle.TOP_K, ids, [1]),
    ]
    rows = [(bundle.LOGITS, V), (bundle.SOFTMAX, V), (bundle.SIGMOID, V), (bundle.MASS, 2), (bundle.ENTROPY_BITS, 2)]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", width]) for name, width in rows]
    outputs.append(helper.make_tensor_value_info(bundle.TOP_IDS, ids, ["batch", "top"]))
    graph = helper.make_graph(
        g.nodes, config.name, inputs, outputs, list(g.initializers.values()), value_info=g.value_info
    )
    return helper.make_model(
        graph,
        functions=[onnx_function(activation.name, trace(activation))],
        opset_imports=[helper.make_opsetid("", bundle.OPSET), helper.make_opsetid(bundle.DOMAIN, 1)],
        ir_version=IR_VERSION,
        producer_name="actuary",
    )
