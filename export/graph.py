"""Writes a checkpoint's ONNX graph node by node: no tracing, so every node is one that was meant.

                 input_ids [B, T]      lengths [B]      top_k [1]
                        |                  |               |
                      Gather norm(embed)   |               |
                        |                  |               |
    L times:   x -> norm -> qkv -> QK-norm, RoPE -> softmax(q k^T + causal) v -> out -> + x
               x -> norm -> up -> ai.actuary::ACTIVATION -> down -> + x
                        |                  |               |
               (in the last block the row at lengths - 1 alone asks: q, out and the FFN see one row a prompt)
                        |                                  |
                      norm -> embed^T + bias -> logits [B, V] -> softmax, sigmoid, top ids, mass, entropy

Two flavours. `portable`: standard operators of opset 20, and one node of our own domain per block whose meaning
travels in the file as a function (export/ops/onnx_function.py), but for those of STANDARD. `ort`: the same with ONNX
Runtime's own operators, each `+ x -> norm` one Skip(Simplified)LayerNormalization and attention, without a cache, one
GroupQueryAttention (from the split of qkv to before `out`). What each gains is in docs/log.md.

With a `cache` the padding is dropped at the door, so that everything between works on N packed tokens, and attention
is an operator of ours (export/attention.py) that also reads the keys and values of each prompt's earlier tokens:

    input_ids [B, T], lengths [B] -> ids [N] -> ... x [N, C] -> rows [B + E, C] -> ... -> logits [B + E, V]

The inputs that it has besides have a default, no cache and no rows: who knows nothing of them need not feed them.
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

from export import attention, bundle
from export.ops.onnx_function import onnx_function, operator_name
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


Positions = Literal["last", "all"]
Flavor = Literal["ort", "portable"]
ORT = "com.microsoft"  # ONNX Runtime's own operators
# An operator of ONNX's that is the whole activation, and no slower than our kernel (docs/log.md, fused operators).
STANDARD = {"relu": "Relu"}


def build(
    decoder: Decoder, flavor: Flavor = "ort", positions: Positions = "last", cache: bool = False
) -> onnx.ModelProto:
    """The whole model.

    Args:
        flavor: `ort` takes ONNX Runtime's own operators where they are faster; `portable` takes none.
        positions: `last` is the bundle's contract (export/bundle.py); `all` gives logits [B, T, V] of every
            position and nothing else, which is what measuring bits per byte takes.
        cache: with the inputs and the output of bundle.CACHE; of `last` alone.
    """
    g = Graph()
    if cache:
        return _cached(g, decoder, flavor)
    shared = _shared(g, decoder, flavor, positions)
    x = g.node("Gather", g.weight("embed", decoder.weights["embed"]), bundle.INPUT_IDS)  # [B, T, C]
    if decoder.rope is None:
        x = g.node("Add", x, g.node("Slice", g.weight("position", decoder.weights["position"]), g.ints(0), shared.T))
    delta = ""  # what the next norm adds to x first
    for i in range(decoder.layers):
        at, w = f"blocks.{i}.", decoder.block(i)
        last = positions == "last" and i == decoder.layers - 1
        x, y = _add_norm(g, decoder, flavor, "attention_norm", w, x, delta, at)
        if last:
            delta = _attention_of_last(g, decoder, i, y, shared)
            x = g.node("GatherND", x, shared.row, batch_dims=1)  # [B, C]
        elif _grouped_query(decoder, flavor):
            delta = _attention_ort(g, decoder, i, y, shared)
        else:
            delta = _attention(g, decoder, i, y, shared)
        x, y = _add_norm(g, decoder, flavor, "ffn_norm", w, x, delta, at)
        delta = _feed_forward(g, decoder, i, y, axes=["batch"] if last else ["batch", "time"])
    logits = _logits(g, decoder, flavor, x, delta)
    if positions == "last":
        _probabilities(g, logits)
    return _model(g, decoder, flavor, positions)


def _logits(g: Graph, decoder: Decoder, flavor: Flavor, x: str, delta: str) -> str:
    """The head has a table of its own, also where it is the embedding's, so that it can be quantised alone."""
    _, x = _add_norm(g, decoder, flavor, "norm", decoder.weights, x, delta)
    return _linear(g, "head", decoder.weights, x, output=bundle.LOGITS)


def _cached(g: Graph, decoder: Decoder, flavor: Flavor) -> onnx.ModelProto:
    """The whole model over packed tokens, with a cache."""
    heads, kv_heads, D = decoder.heads, decoder.kv_heads, decoder.head_dim
    zero, one = (g.weight(f"int_{value}", np.array(value, dtype=np.int64)) for value in (0, 1))
    time = g.node("Range", zero, g.node("Squeeze", g.node("Shape", bundle.INPUT_IDS, start=1, end=2)), one)
    inside = g.node("Less", time, g.node("Unsqueeze", bundle.LENGTHS, g.ints(1)))  # [B, T]
    counted = g.node("Reshape", inside, g.ints(-1))
    x = g.node("Gather", g.weight("embed", decoder.weights["embed"]), g.node("Compress", bundle.INPUT_IDS, counted))
    if decoder.rope is None:
        later = g.node("Add", time, g.node("Unsqueeze", bundle.PAST_LENGTHS, g.ints(1)))
        at = g.node("Compress", g.node("Where", inside, later, zero), counted)
        x = g.node("Add", x, g.node("Gather", g.weight("position", decoder.weights["position"]), at))
    asked = g.node("Concat", g.node("Sub", g.node("CumSum", bundle.LENGTHS, zero), one), bundle.ROWS, axis=0)  # [B + E]
    read = [bundle.LENGTHS, bundle.PAST, bundle.PAST_SLOTS, bundle.PAST_LENGTHS]
    if decoder.rope:
        read += [g.weight(name, t) for name, t in zip(("rope.cos", "rope.sin"), decoder.rope, strict=True)]
    present, delta = [], ""  # what the next norm adds to x first
    for i in range(decoder.layers):
        at, w = f"blocks.{i}.", _scaled(decoder, i)
        last = i == decoder.layers - 1
        x, y = _add_norm(g, decoder, flavor, "attention_norm", w, x, delta, at)
        # All blocks norm, or none; where a reading lost one of them, the gate finds it.
        gains = [g.weight(f"{at}{key}", w.get(key, np.ones(D, np.float32))) for key in _GAINS if _normed(decoder)]
        if last:
            w = _q_apart(decoder, w)
            x, of_asked = (g.node("Gather", rows, asked) for rows in (x, y))
            operator, first = attention.OF_ROWS, [_linear(g, "q", w, of_asked, at), _linear(g, "kv", w, y, at), asked]
        else:
            operator, first = attention.PACKED, [_linear(g, "qkv", w, y, at)]
        y, new = g.split(
            operator, *first, *read, *gains, outputs=[at + "attended", at + "present"], domain=bundle.DOMAIN,
            heads=heads, kv_heads=kv_heads, layer=i, eps=decoder.norm_eps,
        )  # fmt: skip
        present.append(new)
        g.floats(y, "asked" if last else "tokens", heads * D)
        x, y = _add_norm(g, decoder, flavor, "ffn_norm", w, x, _linear(g, "out", w, y, at), at)
        delta = _feed_forward(g, decoder, i, y, axes=["asked" if last else "tokens"])
    g.node("Concat", *present, axis=0, output=bundle.PRESENT)
    _probabilities(g, _logits(g, decoder, flavor, x, delta))
    return _model(g, decoder, flavor, "last", cache=True)


_GAINS = ("q_norm.weight", "k_norm.weight")


def _normed(decoder: Decoder) -> bool:
    """Whether q and k are normed."""
    return any(name.endswith(_GAINS) for name in decoder.weights)


def _q_apart(decoder: Decoder, w: dict[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
    """The weights with q and kv instead of qkv."""
    for kind in ("weight", "bias"):
        if f"qkv.{kind}" in w:
            w[f"q.{kind}"], w[f"kv.{kind}"] = np.split(w.pop(f"qkv.{kind}"), [decoder.heads * decoder.head_dim])
    return w


@dataclass(frozen=True)
class _Shared:
    """What all blocks read; "" where nothing does."""

    T: str  # [1]
    cos: str  # [T, D / 2]; [context, D / 2] where GroupQueryAttention turns
    sin: str
    bias: str  # [T, T]: 0 up to each position, -inf after it
    row: str  # [B, 1]: lengths - 1
    padding: str  # [B, 1, 1, T]: 0 up to each prompt's last token, -inf after it
    ends: str  # int32 [B]: T - 1
    total: str  # int32: T


def _grouped_query(decoder: Decoder, flavor: Flavor) -> bool:
    """Whether attention is one GroupQueryAttention node: it takes heads of a multiple of 16 channels alone."""
    return flavor == "ort" and decoder.head_dim % 16 == 0


def _shared(g: Graph, decoder: Decoder, flavor: Flavor, positions: Positions) -> _Shared:
    one_node = _grouped_query(decoder, flavor)
    T = g.node("Shape", bundle.INPUT_IDS, start=1, end=2)  # [1]
    blocks = decoder.layers - (positions == "last")  # those that attend from every position
    cos = sin = bias = row = padding = ends = total = ""
    if decoder.rope:
        cos, sin = (g.weight(name, t) for name, t in zip(("rope.cos", "rope.sin"), decoder.rope, strict=True))
        if not one_node:
            cos, sin = (g.node("Slice", table, g.ints(0), T, g.ints(0)) for table in (cos, sin))
    zero, one = (g.weight(f"int_{value}", np.array(value, dtype=np.int64)) for value in (0, 1))

    def minus_infinity(where: str) -> str:
        return g.node("Where", where, g.scalar(-math.inf), g.scalar(0.0))

    if positions == "last" or (blocks and not one_node):
        order = g.node("Range", zero, g.node("Squeeze", T), one)
    if blocks and not one_node:
        later = g.node("Greater", g.node("Unsqueeze", order, g.ints(0)), g.node("Unsqueeze", order, g.ints(1)))
        bias = minus_infinity(later)
    if positions == "last":
        row = g.node("Unsqueeze", g.node("Sub", bundle.LENGTHS, one), g.ints(1))
        padding = minus_infinity(g.node("Greater", order, g.node("Unsqueeze", row, g.ints(1, 2))))
    if blocks and one_node:
        total = g.node("Cast", g.node("Squeeze", T), to=TensorProto.INT32)
        B = g.node("Shape", bundle.INPUT_IDS, start=0, end=1)
        ends = g.node("Expand", g.node("Sub", total, g.weight("int32_1", np.array(1, dtype=np.int32))), B)
    return _Shared(T, cos, sin, bias, row, padding, ends, total)


def _norm(g: Graph, decoder: Decoder, name: str, weights: Weights, x: str, at: str = "") -> str:
    """The decoder's norm of x over the last axis, with the gain [C] and bias [C] called `name`."""
    gain = g.weight(f"{at}{name}.weight", weights[f"{name}.weight"])
    if decoder.norm == "rms":
        return g.rms_norm(x, gain, decoder.norm_eps)
    bias = g.weight(f"{at}{name}.bias", weights[f"{name}.bias"])
    return g.node("LayerNormalization", x, gain, bias, axis=-1, epsilon=decoder.norm_eps)


def _add_norm(
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


def _scaled(decoder: Decoder, i: int) -> dict[str, NDArray[np.float32]]:
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


def _head_norm(g: Graph, decoder: Decoder, which: str, w: Weights, y: str, at: str) -> str:
    """QK-norm of y [..., D], where there is one."""
    if f"{which}_norm.weight" not in w:
        return y
    return g.rms_norm(y, g.weight(f"{at}{which}_norm.weight", w[f"{which}_norm.weight"]), decoder.norm_eps)


def _turn(g: Graph, y: str, cos: str, sin: str, name: str) -> str:
    """RoPE: channel i of y [..., D] with channel i + D / 2, by cos and sin that broadcast to [..., D / 2]."""
    a, b = g.split("Split", y, outputs=[f"{name}.first", f"{name}.second"], axis=-1, num_outputs=2)
    first = g.node("Sub", g.node("Mul", a, cos), g.node("Mul", b, sin))
    second = g.node("Add", g.node("Mul", b, cos), g.node("Mul", a, sin))
    return g.node("Concat", first, second, axis=-1)


def _attention(g: Graph, decoder: Decoder, i: int, x: str, shared: _Shared) -> str:
    """out(attention(x)) of every position, in standard operators: [B, T, C] -> [B, T, C].

    Query heads stand in groups [B, kv_heads, group, T, D], so that each group's one key and value head is
    broadcast and never copied; where every query head has its own, the group's axis is left out.
    """
    at, w = f"blocks.{i}.", _scaled(decoder, i)
    heads, kv_heads, D = decoder.heads, decoder.kv_heads, decoder.head_dim
    group = heads // kv_heads
    grouped = [kv_heads] if group == 1 else [kv_heads, group]
    widths = g.ints(heads * D, kv_heads * D, kv_heads * D)
    q, k, v = g.split("Split", _linear(g, "qkv", w, x, at), widths, outputs=[at + "q", at + "k", at + "v"], axis=-1)

    def turned(y: str, which: str, shape: list[int]) -> str:
        """QK-norm and RoPE, where there are: [B, T, n D] -> [B, *shape, T, D]."""
        y = _head_norm(g, decoder, which, w, g.node("Reshape", y, g.ints(0, 0, *shape, D)), at)
        n = len(shape)
        y = g.node("Transpose", y, perm=[0, *range(2, 2 + n), 1, 2 + n])
        return _turn(g, y, shared.cos, shared.sin, at + which) if decoder.rope else y

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
    return _linear(g, "out", w, y, at)


def _attention_ort(g: Graph, decoder: Decoder, i: int, x: str, shared: _Shared) -> str:
    """out(attention(x)) of every position, by GroupQueryAttention: [B, T, C] -> [B, T, C]."""
    at, w = f"blocks.{i}.", decoder.block(i)
    heads, kv_heads, D = decoder.heads, decoder.kv_heads, decoder.head_dim
    q, k, v = _linear(g, "qkv", w, x, at), "", ""
    if "q_norm.weight" in w:
        widths = g.ints(heads * D, kv_heads * D, kv_heads * D)
        q, k, v = g.split("Split", q, widths, outputs=[at + "q", at + "k", at + "v"], axis=-1)

        def normed(y: str, which: str, n: int) -> str:
            y = g.node("Reshape", y, g.ints(0, 0, n, D))
            return g.node("Reshape", _head_norm(g, decoder, which, w, y, at), g.ints(0, 0, n * D))

        q, k = normed(q, "q", heads), normed(k, "k", kv_heads)
    y, *_ = g.split(
        "GroupQueryAttention", q, k, v, "", "", shared.ends, shared.total, shared.cos, shared.sin,
        outputs=[at + "attended", at + "keys", at + "values"], domain=ORT,
        num_heads=heads, kv_num_heads=kv_heads, do_rotary=int(decoder.rope is not None),
        scale=decoder.score_scales[i],
    )  # fmt: skip
    return _linear(g, "out", w, y, at)


def _attention_of_last(g: Graph, decoder: Decoder, i: int, x: str, shared: _Shared) -> str:
    """out(attention(x)) at each prompt's last token alone: [B, T, C] -> [B, C].

    In the last block nothing reads the other positions' answers, so only keys and values are made for them.
    """
    at, w = f"blocks.{i}.", _scaled(decoder, i)
    heads, kv_heads, D = decoder.heads, decoder.kv_heads, decoder.head_dim
    w = _q_apart(decoder, w)
    q = _linear(g, "q", w, g.node("GatherND", x, shared.row, batch_dims=1), at)
    q = _head_norm(g, decoder, "q", w, g.node("Reshape", q, g.ints(0, kv_heads, heads // kv_heads, D)), at)
    widths = g.ints(kv_heads * D, kv_heads * D)
    k, v = g.split("Split", _linear(g, "kv", w, x, at), widths, outputs=[at + "k", at + "v"], axis=-1)
    k = _head_norm(g, decoder, "k", w, g.node("Reshape", k, g.ints(0, 0, kv_heads, D)), at)
    k = g.node("Transpose", k, perm=[0, 2, 1, 3])  # [B, kv_heads, T, D]
    if decoder.rope:
        rows = g.node("Unsqueeze", shared.row, g.ints(1))  # [B, 1, 1]
        cos, sin = (g.node("Gather", name, rows) for name in ("rope.cos", "rope.sin"))  # [B, 1, 1, D / 2]
        q = _turn(g, q, cos, sin, at + "q")
        cos, sin = (g.node("Slice", name, g.ints(0), shared.T, g.ints(0)) for name in ("rope.cos", "rope.sin"))
        k = _turn(g, k, cos, sin, at + "k")
    v = g.node("Transpose", g.node("Reshape", v, g.ints(0, 0, kv_heads, D)), perm=[0, 2, 1, 3])
    scores = g.node("MatMul", q, g.node("Transpose", k, perm=[0, 1, 3, 2]))  # [B, kv_heads, group, T]
    weights = g.node("Softmax", g.node("Add", scores, shared.padding), axis=-1)
    y = g.node("Reshape", g.node("MatMul", weights, v), g.ints(0, heads * D))
    return _linear(g, "out", w, y, at)


def _feed_forward(g: Graph, decoder: Decoder, i: int, x: str, axes: list[str]) -> str:
    """down(activation(up(x))): [..., C] -> [..., C]."""
    at, w, activation = f"blocks.{i}.", dict(decoder.block(i)), decoder.activation
    biased, bias = _biased(decoder), []
    if biased:  # the operator adds the bias itself: one pass over the hidden units less
        bias = [g.weight(f"{at}up.bias", w.pop("up.bias"))]
    up = _linear(g, "up", w, x, at)
    learned = [g.weight(f"{at}learned.{name}", w[f"learned.{name}"]) for name in activation.learned]
    if standard := _standard(decoder):
        hidden = g.node(standard, up, output=at + "hidden")
    else:
        operator = operator_name(activation.name, biased)
        hidden = g.node(operator, up, *bias, *learned, domain=bundle.DOMAIN, output=at + "hidden")
    g.floats(hidden, *axes, decoder.hidden)
    return _linear(g, "down", w, hidden, at)


def _biased(decoder: Decoder) -> bool:
    """Whether the activation's operator adds the bias of `up`."""
    return "up.bias" in decoder.block(0) and trace(decoder.activation).elementwise


def _standard(decoder: Decoder) -> str:
    """The operator of ONNX's own that stands in the place of ours; "" where ours does."""
    return "" if _biased(decoder) else STANDARD.get(decoder.activation.name, "")


def _probabilities(g: Graph, logits: str) -> None:
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


def _cache_inputs(g: Graph, decoder: Decoder) -> list[onnx.ValueInfoProto]:
    """Each with an initializer of its name, which makes feeding it optional."""
    width = 2 * decoder.kv_heads * decoder.head_dim
    g.weight(bundle.PAST, np.zeros((decoder.layers, 0, width), dtype=np.float32))
    g.weight(bundle.PAST_SLOTS, np.zeros((1, 0), dtype=np.int64))
    g.weight(bundle.PAST_LENGTHS, np.zeros(1, dtype=np.int64))
    g.weight(bundle.ROWS, np.zeros(0, dtype=np.int64))
    past = helper.make_tensor_value_info(bundle.PAST, TensorProto.FLOAT, [decoder.layers, "slots", width])
    shapes: dict[str, list[str]] = {
        bundle.PAST_SLOTS: ["cached_batch", "past"], bundle.PAST_LENGTHS: ["cached_batch"], bundle.ROWS: ["rows"],
    }  # fmt: skip
    return [past] + [helper.make_tensor_value_info(name, TensorProto.INT64, shape) for name, shape in shapes.items()]


def _model(g: Graph, decoder: Decoder, flavor: Flavor, positions: Positions, cache: bool = False) -> onnx.ModelProto:
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
        rows = "asked" if cache else "batch"
        outputs = [helper.make_tensor_value_info(name, floats, [rows, width]) for name, width in widths.items()]
        outputs.append(helper.make_tensor_value_info(bundle.TOP_IDS, ids, [rows, "top"]))
    functions = (
        []
        if _standard(decoder)
        else [onnx_function(decoder.activation.name, trace(decoder.activation), _biased(decoder))]
    )
    if cache:
        inputs += _cache_inputs(g, decoder)
        width = 2 * decoder.kv_heads * decoder.head_dim
        outputs.append(helper.make_tensor_value_info(bundle.PRESENT, floats, [decoder.layers, "tokens", width]))
        functions += attention.functions(
            decoder.heads, decoder.kv_heads, decoder.head_dim, decoder.rope is not None, _normed(decoder)
        )
    graph = helper.make_graph(g.nodes, decoder.name, inputs, outputs, value_info=g.value_info)
    model = helper.make_model(
        graph,
        functions=functions,
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
