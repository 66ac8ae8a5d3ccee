"""Writes a checkpoint's ONNX graph with a cache: the padding is dropped at the door, so that everything between works
on N packed tokens, and attention is an operator of ours (export/attention.py) that also reads the keys and values of
each prompt's earlier tokens. Called by graph.build, where the picture of a block stands.

    input_ids [B, T], lengths [B] -> ids [N] -> ... x [N, C] -> rows [B + E, C] -> ... -> logits [B + E, V]

The inputs that it has besides have a default, no cache and no rows: who knows nothing of them need not feed them.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper

from export import attention, bundle
from export.graph_parts import (
    Flavor,
    Graph,
    Values,
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
from models.decoder import Decoder

_GAINS = ("q_norm.weight", "k_norm.weight")


def packed(decoder: Decoder, flavor: Flavor) -> onnx.ModelProto:
    """The whole model, with the inputs and the output of bundle.CACHE."""
    g = Graph()
    heads, kv_heads, D = decoder.heads, decoder.kv_heads, decoder.head_dim
    normed = any(name.endswith(_GAINS) for name in decoder.weights)  # whether q and k are
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
        at, w = f"blocks.{i}.", scaled(decoder, i)
        last = i == decoder.layers - 1
        x, y = add_norm(g, decoder, flavor, "attention_norm", w, x, delta, at)
        # All blocks norm, or none; where a reading lost one of them, the gate finds it.
        gains = [g.weight(f"{at}{key}", w.get(key, np.ones(D, np.float32))) for key in _GAINS if normed]
        if last:
            w = q_apart(decoder, w)
            x, of_asked = (g.node("Gather", rows, asked) for rows in (x, y))
            operator, first = attention.OF_ROWS, [linear(g, "q", w, of_asked, at), linear(g, "kv", w, y, at), asked]
        else:
            operator, first = attention.PACKED, [linear(g, "qkv", w, y, at)]
        y, new = g.split(
            operator, *first, *read, *gains, outputs=[at + "attended", at + "present"], domain=bundle.DOMAIN,
            heads=heads, kv_heads=kv_heads, layer=i, eps=decoder.norm_eps,
        )  # fmt: skip
        present.append(new)
        g.floats(y, "asked" if last else "tokens", heads * D)
        x, y = add_norm(g, decoder, flavor, "ffn_norm", w, x, linear(g, "out", w, y, at), at)
        delta = feed_forward(g, decoder, i, y, axes=["asked" if last else "tokens"])
    g.node("Concat", *present, axis=0, output=bundle.PRESENT)
    probabilities(g, logits(g, decoder, flavor, x, delta))
    inputs, outputs = contract(decoder, rows="asked")
    outputs.append(
        helper.make_tensor_value_info(bundle.PRESENT, TensorProto.FLOAT, [decoder.layers, "tokens", 2 * kv_heads * D])
    )
    functions = attention.functions(heads, kv_heads, D, decoder.rope is not None, normed)
    return assembled(g, decoder, flavor, [*inputs, *_cache_inputs(g, decoder)], outputs, functions)


def _cache_inputs(g: Graph, decoder: Decoder) -> Values:
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
