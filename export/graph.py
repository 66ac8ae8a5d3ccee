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

Here is the graph over padded prompts [B, T, C]; with a `cache` it works on packed tokens [N, C] (packed_graph.py).
What both are made of is in graph_parts.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx
from onnx import TensorProto, helper

from export import bundle
from export.graph_parts import (
    ORT,
    Flavor,
    Graph,
    add_norm,
    assembled,
    contract,
    feed_forward,
    linear,
    logits,
    probabilities,
    q_apart,
    scaled,
)
from export.packed_graph import packed
from models.decoder import Decoder, Weights

Positions = Literal["last", "all"]


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
    if cache:
        return packed(decoder, flavor)
    g = Graph()
    shared = _shared(g, decoder, flavor, positions)
    x = g.node("Gather", g.weight("embed", decoder.weights["embed"]), bundle.INPUT_IDS)  # [B, T, C]
    if decoder.rope is None:
        x = g.node("Add", x, g.node("Slice", g.weight("position", decoder.weights["position"]), g.ints(0), shared.T))
    delta = ""  # what the next norm adds to x first
    for i in range(decoder.layers):
        at, w = f"blocks.{i}.", decoder.block(i)
        last = positions == "last" and i == decoder.layers - 1
        x, y = add_norm(g, decoder, flavor, "attention_norm", w, x, delta, at)
        if last:
            delta = _attention_of_last(g, decoder, i, y, shared)
            x = g.node("GatherND", x, shared.row, batch_dims=1)  # [B, C]
        elif _grouped_query(decoder, flavor):
            delta = _attention_ort(g, decoder, i, y, shared)
        else:
            delta = _attention(g, decoder, i, y, shared)
        x, y = add_norm(g, decoder, flavor, "ffn_norm", w, x, delta, at)
        delta = feed_forward(g, decoder, i, y, axes=["batch"] if last else ["batch", "time"])
    answer = logits(g, decoder, flavor, x, delta)
    if positions == "all":
        whole = helper.make_tensor_value_info(bundle.LOGITS, TensorProto.FLOAT, ["batch", "time", decoder.vocab_size])
        ids = helper.make_tensor_value_info(bundle.INPUT_IDS, TensorProto.INT64, ["batch", "time"])
        return assembled(g, decoder, flavor, [ids], [whole])
    probabilities(g, answer)
    return assembled(g, decoder, flavor, *contract(decoder, rows="batch"))


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
    at, w = f"blocks.{i}.", scaled(decoder, i)
    heads, kv_heads, D = decoder.heads, decoder.kv_heads, decoder.head_dim
    group = heads // kv_heads
    grouped = [kv_heads] if group == 1 else [kv_heads, group]
    widths = g.ints(heads * D, kv_heads * D, kv_heads * D)
    q, k, v = g.split("Split", linear(g, "qkv", w, x, at), widths, outputs=[at + "q", at + "k", at + "v"], axis=-1)

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
    return linear(g, "out", w, y, at)


def _attention_ort(g: Graph, decoder: Decoder, i: int, x: str, shared: _Shared) -> str:
    """out(attention(x)) of every position, by GroupQueryAttention: [B, T, C] -> [B, T, C]."""
    at, w = f"blocks.{i}.", decoder.block(i)
    heads, kv_heads, D = decoder.heads, decoder.kv_heads, decoder.head_dim
    q, k, v = linear(g, "qkv", w, x, at), "", ""
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
    return linear(g, "out", w, y, at)


def _attention_of_last(g: Graph, decoder: Decoder, i: int, x: str, shared: _Shared) -> str:
    """out(attention(x)) at each prompt's last token alone: [B, T, C] -> [B, C].

    In the last block nothing reads the other positions' answers, so only keys and values are made for them.
    """
    at, w = f"blocks.{i}.", scaled(decoder, i)
    heads, kv_heads, D = decoder.heads, decoder.kv_heads, decoder.head_dim
    w = q_apart(decoder, w)
    q = linear(g, "q", w, g.node("GatherND", x, shared.row, batch_dims=1), at)
    q = _head_norm(g, decoder, "q", w, g.node("Reshape", q, g.ints(0, kv_heads, heads // kv_heads, D)), at)
    widths = g.ints(kv_heads * D, kv_heads * D)
    k, v = g.split("Split", linear(g, "kv", w, x, at), widths, outputs=[at + "k", at + "v"], axis=-1)
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
    return linear(g, "out", w, y, at)
