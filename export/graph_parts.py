"""What both graphs of a model are made of: one under construction, the layers that work on any rows, its ends.

    padded  export/graph.py         [B, T, C], attention in standard operators or ONNX Runtime's
    packed  export/packed_graph.py  [N, C], attention with a cache, an operator of ours

A layer takes the name of a tensor [..., C], appends its nodes, and returns the name of its result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from export import bundle
from export.ops.onnx_function import onnx_function, operator_name
from export.ops.trace import trace
from models.decoder import Decoder, Weights

IR_VERSION = 10  # the newest that every runtime with opset 20 reads
Flavor = Literal["ort", "portable"]
ORT = "com.microsoft"  # ONNX Runtime's own operators
# An operator of ONNX's that is the whole activation, and no slower than our kernel (docs/log.md, fused operators).
STANDARD = {"relu": "Relu"}


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
        self.initializers[name] = numpy_helper.from_array(np.asarray(array, order="C"), name)
        return name

    def ints(self, *values: int) -> str:
        """An int64 constant [n], shared between its users."""
        return self.weight("ints_" + "_".join(map(str, values)), np.array(values, dtype=np.int64))

    def scalar(self, value: float) -> str:
        return self.weight(f"float_{value!r}", np.array(value, dtype=np.float32))

    def floats(self, tensor: str, *shape: str | int) -> None:
        """Tell the shape of an operator's result that nobody else can: without it, what follows is not fused."""
        self.value_info.append(helper.make_tensor_value_info(tensor, TensorProto.FLOAT, shape))

    def rms_norm(self, x: str, gain: str, eps: float) -> str:
        """x / sqrt(mean(x^2) + eps) * gain [C] over the last axis, in the form that ONNX Runtime fuses."""
        square = self.node("Pow", x, self.scalar(2.0))
        mean = self.node("ReduceMean", square, self.ints(-1), keepdims=1)
        root = self.node("Sqrt", self.node("Add", mean, self.scalar(eps)))
        return self.node("Mul", self.node("Div", x, root), gain)


def _norm(g: Graph, decoder: Decoder, name: str, weights: Weights, x: str, at: str = "") -> str:
    """The decoder's norm of x over the last axis, with the gain [C] and bias [C] called `name`."""
    gain = g.weight(f"{at}{name}.weight", weights[f"{name}.weight"])
    if decoder.norm == "rms":
        return g.rms_norm(x, gain, decoder.norm_eps)
    bias = g.weight(f"{at}{name}.bias", weights[f"{name}.bias"])
    return g.node("LayerNormalization", x, gain, bias, axis=-1, epsilon=decoder.norm_eps)


def add_norm(
    g: Graph, decoder: Decoder, flavor: Flavor, name: str, weights: Weights, x: str, delta: str, at: str = ""
) -> tuple[str, str]:
    """(x + delta, its norm); x itself where delta is ""."""
    if not delta:
        return x, _norm(g, decoder, name, weights, x, at)
    if flavor == "portable":
        x = g.node("Add", x, delta)
        return x, _norm(g, decoder, name, weights, x, at)
    kinds = ["weight"] if decoder.norm == "rms" else ["weight", "bias"]
    scales = [g.weight(f"{at}{name}.{kind}", weights[f"{name}.{kind}"]) for kind in kinds]
    operator = "SkipSimplifiedLayerNormalization" if decoder.norm == "rms" else "SkipLayerNormalization"
    outputs = [f"{at}{name}", "", "", f"{at}{name}.sum"]
    g.split(operator, x, delta, *scales, outputs=outputs, domain=ORT, epsilon=decoder.norm_eps)
    return outputs[3], outputs[0]


def linear(g: Graph, name: str, weights: Weights, x: str, at: str = "", output: str = "") -> str:
    """x @ weight^T (+ bias) for the torch weight [out, in] called `name`, stored transposed as MatMul wants it."""
    bias = weights.get(f"{name}.bias")
    product = g.node(
        "MatMul",
        x,
        g.weight(f"{at}{name}.weight", weights[f"{name}.weight"].T),
        output="" if bias is not None else output,
    )
    return product if bias is None else g.node("Add", product, g.weight(f"{at}{name}.bias", bias), output=output)


def logits(g: Graph, decoder: Decoder, flavor: Flavor, x: str, delta: str) -> str:
    """The head has a table of its own, also where it is the embedding's, so that it can be quantised alone."""
    _, x = add_norm(g, decoder, flavor, "norm", decoder.weights, x, delta)
    return linear(g, "head", decoder.weights, x, output=bundle.LOGITS)


def scaled(decoder: Decoder, i: int) -> dict[str, NDArray[np.float32]]:
    """Block i's weights with the scores' scale on q: on its gain where it is normed, else on the rows that make it."""
    w, scale = dict(decoder.block(i)), np.float32(decoder.score_scales[i])
    if "q_norm.weight" in w:
        w["q_norm.weight"] = w["q_norm.weight"] * scale
        return w
    rows = np.ones((w["qkv.weight"].shape[0], 1), dtype=np.float32)
    rows[: decoder.heads * decoder.head_dim] = scale
    w["qkv.weight"] = w["qkv.weight"] * rows
    if "qkv.bias" in w:
        w["qkv.bias"] = w["qkv.bias"] * rows[:, 0]
    return w


def q_apart(decoder: Decoder, w: dict[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
    """The weights with q and kv instead of qkv."""
    for kind in ("weight", "bias"):
        if f"qkv.{kind}" in w:
            w[f"q.{kind}"], w[f"kv.{kind}"] = np.split(w.pop(f"qkv.{kind}"), [decoder.heads * decoder.head_dim])
    return w


def feed_forward(g: Graph, decoder: Decoder, i: int, x: str, axes: list[str]) -> str:
    """down(activation(up(x))): [..., C] -> [..., C]."""
    at, w, activation = f"blocks.{i}.", dict(decoder.block(i)), decoder.activation
    biased, bias = _biased(decoder), []
    if biased:  # the operator adds the bias itself: one pass over the hidden units less
        bias = [g.weight(f"{at}up.bias", w.pop("up.bias"))]
    up = linear(g, "up", w, x, at)
    learned = [g.weight(f"{at}learned.{name}", w[f"learned.{name}"]) for name in activation.learned]
    if standard := _standard(decoder):
        hidden = g.node(standard, up, output=at + "hidden")
    else:
        operator = operator_name(activation.name, biased)
        hidden = g.node(operator, up, *bias, *learned, domain=bundle.DOMAIN, output=at + "hidden")
    g.floats(hidden, *axes, decoder.hidden)
    return linear(g, "down", w, hidden, at)


def _biased(decoder: Decoder) -> bool:
    """Whether the activation's operator adds the bias of `up`."""
    return "up.bias" in decoder.block(0) and trace(decoder.activation).elementwise


def _standard(decoder: Decoder) -> str:
    """The operator of ONNX's own that stands in the place of ours; "" where ours does."""
    return "" if _biased(decoder) else STANDARD.get(decoder.activation.name, "")


def probabilities(g: Graph, logits: str) -> None:
    """Everything that is read off the logits [B, V], in forms that hold at any magnitude.

    log sigmoid(l) is min(l, 0) - log(1 + exp(-|l|)). ONNX Runtime's own Sigmoid is right to 1e-7 absolute only, which
    over a vocabulary of 50,000 unlikely tokens would be wrong by 0.005 in mass, and its Softplus takes 11 ns a token.
    """
    log_softmax = g.node("LogSoftmax", logits, axis=-1)
    rest = g.node("Exp", g.node("Neg", g.node("Abs", logits)))  # in (0, 1]
    log_sigmoid = g.node("Sub", g.node("Min", logits, g.scalar(0.0)), g.node("Log", g.node("Add", rest, g.scalar(1.0))))
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


Values = list[onnx.ValueInfoProto]


def contract(decoder: Decoder, rows: str) -> tuple[Values, Values]:
    """The inputs and outputs that every bundle has (export/bundle.py); its answers' first axis is called `rows`."""
    V, ids, floats = decoder.vocab_size, TensorProto.INT64, TensorProto.FLOAT
    inputs = [
        helper.make_tensor_value_info(bundle.INPUT_IDS, ids, ["batch", "time"]),
        helper.make_tensor_value_info(bundle.LENGTHS, ids, ["batch"]),
        helper.make_tensor_value_info(bundle.TOP_K, ids, [1]),
    ]
    widths = {bundle.LOGITS: V, bundle.SOFTMAX: V, bundle.SIGMOID: V, bundle.MASS: 2, bundle.ENTROPY_BITS: 2}
    outputs = [helper.make_tensor_value_info(name, floats, [rows, width]) for name, width in widths.items()]
    outputs.append(helper.make_tensor_value_info(bundle.TOP_IDS, ids, [rows, "top"]))
    return inputs, outputs


def assembled(
    g: Graph,
    decoder: Decoder,
    flavor: Flavor,
    inputs: Values,
    outputs: Values,
    operators: Sequence[onnx.FunctionProto] = (),
) -> onnx.ModelProto:
    """The finished model: with the activation's function, and those of our other `operators`. `g` is empty after it."""
    activation = decoder.activation
    functions = [] if _standard(decoder) else [onnx_function(activation.name, trace(activation), _biased(decoder))]
    graph = helper.make_graph(g.nodes, decoder.name, inputs, outputs, value_info=g.value_info)
    model = helper.make_model(
        graph,
        functions=[*functions, *operators],
        opset_imports=[
            helper.make_opsetid(domain, version)
            for domain, version in {"": bundle.OPSET, bundle.DOMAIN: 1, **({ORT: 1} if flavor == "ort" else {})}.items()
        ],
        ir_version=IR_VERSION,
        producer_name="actuary",
    )
    # Moved one at a time, since protobuf copies what it is given: all at once, twice, is 1.3 GB at 124M parameters.
    while g.initializers:
        model.graph.initializer.append(g.initializers.pop(next(iter(g.initializers))))
    return model
