"""Takes the norms and sums of an int8 graph into the products beside them: one pass over a row of tokens less for each.

    x, delta = product -> Skip(Simplified)LayerNormalization -> norm, x + delta      norm -> product
    becomes
    x -> product + x -> x + delta                     x + delta -> norm and product

where the norm alone reads delta, and products alone, or the last row's choice before one, read the norm.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

from export.ops.int8_function import INT8_LINEAR, INT8_LINEAR_ADD, LAYER_NORM_INT8_LINEAR, RMS_NORM_INT8_LINEAR

_NORMS = {
    "SkipSimplifiedLayerNormalization": RMS_NORM_INT8_LINEAR,
    "SkipLayerNormalization": LAYER_NORM_INT8_LINEAR,
}


class _Nodes:
    """Who makes and who reads each tensor."""

    def __init__(self, nodes: list[onnx.NodeProto]) -> None:
        self.makers = {name: node for node in nodes for name in node.output if name}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in nodes:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)

    def products(self, norm: str) -> list[onnx.NodeProto]:
        """The products that read it, those behind a choice of rows too; none where something else reads it."""
        found: list[onnx.NodeProto] = []
        for reader in self.readers.get(norm, []):
            if reader.op_type in ("Gather", "GatherND") and reader.input[0] == norm:
                behind = self.products(reader.output[0])
                if not behind:
                    return []
                found += behind
            elif reader.op_type == INT8_LINEAR and reader.input[0] == norm:
                found.append(reader)
            else:
                return []
        return found


def fused(nodes: list[onnx.NodeProto]) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """The nodes of an int8 graph so changed, in an order that runs, and the tensors that they read besides."""
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    graph, tensors = _Nodes(copies), dict[str, onnx.TensorProto]()
    moved: dict[str, onnx.NodeProto] = {}  # by the name of the norm in whose place it stands: x may be made late
    for node in copies:
        if node.op_type not in _NORMS or len(node.output) < 4:
            continue
        x, delta, *scales = node.input
        norm, total = node.output[0], node.output[3]
        product, readers = graph.makers.get(delta), graph.products(norm)
        if product is None or product.op_type != INT8_LINEAR or len(graph.readers[delta]) != 1 or not readers:
            continue
        product.op_type = INT8_LINEAR_ADD
        product.input.append(x)
        product.output[0] = total
        epsilon = helper.get_node_attr_value(node, "epsilon")
        name = f"epsilon_{epsilon!r}"
        tensors[name] = numpy_helper.from_array(np.array([epsilon], dtype=np.float32), name)
        for reader in readers:
            reader.op_type = _NORMS[node.op_type]
            reader.input.extend([scales[0], name, *scales[1:]])
        for reader in graph.readers[norm]:
            reader.input[0] = total
        moved[node.name] = product
    late = {product.name for product in moved.values()}
    return [moved.get(node.name, node) for node in copies if node.name not in late], list(tensors.values())
