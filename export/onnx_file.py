"""Reads from a model.onnx what an audit needs: versions, nodes, the weights' names and shapes; never the weights.

The serving process has no onnx, so the few fields are read from protobuf's wire format here. A message is a run of
(key, value), key = field number * 8 + wire type: 0 a varint, 1 eight bytes, 2 a length and so many bytes, 5 four
bytes. Everything that is not asked for is skipped, so a gigabyte of weights costs one jump.

Imported by the serving process, so neither torch nor onnx may be imported here.
"""

from __future__ import annotations

import functools
import mmap
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path

from actuary import BadInput

# Field numbers of onnx.proto.
_MODEL_IR, _MODEL_GRAPH, _MODEL_OPSET, _MODEL_FUNCTION = 1, 7, 8, 25
_OPSET_DOMAIN, _OPSET_VERSION = 1, 2
_GRAPH_NODE, _GRAPH_INITIALIZER = 1, 5
_FUNCTION_NAME, _FUNCTION_INPUT, _FUNCTION_NODE, _FUNCTION_DOMAIN = 1, 4, 7, 10
_NODE_INPUT, _NODE_OUTPUT, _NODE_NAME, _NODE_TYPE, _NODE_ATTRIBUTE, _NODE_DOMAIN = 1, 2, 3, 4, 5, 7
_ATTRIBUTE_NAME, _ATTRIBUTE_INT = 1, 3
_TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_NAME = 1, 2, 8
FLOATING = {1, 10, 11, 16}  # TensorProto's float, float16, double, bfloat16
SIZES = {"Shape", "Size"}  # whose answer does not depend on the numbers that they are given


@dataclass(frozen=True)
class Node:
    op_type: str
    name: str
    domain: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    to: int = 0  # Cast's attribute

    def works_on(self, floating: AbstractSet[str]) -> bool:
        """Whether it computes with floating-point numbers or what they became, not with shapes and ids alone."""
        return self.op_type not in SIZES and (self.to in FLOATING or not floating.isdisjoint(self.inputs))


@dataclass(frozen=True)
class Function:
    """What stands in the place of a node where nothing has a kernel for it."""

    inputs: tuple[str, ...]
    nodes: tuple[Node, ...]


@dataclass(frozen=True)
class OnnxFile:
    """A graph without its numbers."""

    ir_version: int
    opsets: dict[str, int]  # domain: version; "" is ONNX's own
    nodes: tuple[Node, ...]  # each after those that it reads
    weights: dict[str, tuple[int, ...]]  # initializer: its shape
    floating: frozenset[str]  # tensors with floating-point numbers in them, or made from some
    inside: dict[str, bool]  # named node of a function that the graph calls: whether it works on floats there

    def works_on_floats(self, node: Node) -> bool:
        return node.works_on(self.floating)


def read(path: Path) -> OnnxFile:
    """BadInput where `path` is not an ONNX model."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _model(_Message(data, 0, len(data)))
    except OSError as error:
        raise BadInput(f"{path} cannot be read ({error.strerror})") from error
    except (ValueError, IndexError) as error:  # an empty file, or lengths and kinds that protobuf does not have
        raise BadInput(f"{path} is no whole ONNX model ({error}); export it again") from error


class _Message:
    """Bytes [start, end) of the file as fields: numbers, and messages or texts within."""

    def __init__(self, data: mmap.mmap, start: int, end: int) -> None:
        self._data, self._start, self._end = data, start, end

    @functools.cached_property
    def _fields(self) -> tuple[dict[int, list[int]], dict[int, list[_Message]]]:
        numbers: dict[int, list[int]] = {}
        inside: dict[int, list[_Message]] = {}
        at = self._start
        while at < self._end:
            key, at = _varint(self._data, at)
            field, kind = key >> 3, key & 7
            if kind == 0:
                value, at = _varint(self._data, at)
                numbers.setdefault(field, []).append(value)
            elif kind == 2:
                length, at = _varint(self._data, at)
                inside.setdefault(field, []).append(_Message(self._data, at, at + length))
                at += length
            elif kind in (1, 5):
                at += 8 if kind == 1 else 4
            else:
                raise ValueError(f"field {field} is of kind {kind}")
        if at > self._end:
            raise ValueError("it ends too early")
        return numbers, inside

    def number(self, field: int) -> int:
        """The last of that field, as protobuf has it; 0 where there is none."""
        return self._fields[0].get(field, [0])[-1]

    def numbers(self, field: int) -> tuple[int, ...]:
        """All of that field, whether each has a key of its own or they are packed under one."""
        found = list(self._fields[0].get(field, ()))
        for packed in self.messages(field):
            at = packed._start
            while at < packed._end:
                value, at = _varint(self._data, at)
                found.append(value)
        return tuple(found)

    def messages(self, field: int) -> list[_Message]:
        return self._fields[1].get(field, [])

    def texts(self, field: int) -> tuple[str, ...]:
        return tuple(m._data[m._start : m._end].decode() for m in self.messages(field))

    def text(self, field: int) -> str:
        return "".join(self.texts(field)[-1:])


def _varint(data: mmap.mmap, at: int) -> tuple[int, int]:
    """The number at `at`, seven bits a byte and the lowest first; and where it ends."""
    value = 0
    for n in range(10):
        byte = data[at + n]
        value |= (byte & 127) << 7 * n
        if byte < 128:
            return value, at + n + 1
    raise ValueError("a number of more than ten bytes")


def _model(model: _Message) -> OnnxFile:
    if not model.messages(_MODEL_GRAPH):
        raise ValueError("it holds no graph")
    graph = model.messages(_MODEL_GRAPH)[0]
    nodes = tuple(map(_node, graph.messages(_GRAPH_NODE)))
    weights = graph.messages(_GRAPH_INITIALIZER)
    floating = _made_of(nodes, {w.text(_TENSOR_NAME) for w in weights if w.number(_TENSOR_TYPE) in FLOATING})
    functions = {
        (f.text(_FUNCTION_DOMAIN), f.text(_FUNCTION_NAME)): Function(
            f.texts(_FUNCTION_INPUT), tuple(map(_node, f.messages(_FUNCTION_NODE)))
        )
        for f in model.messages(_MODEL_FUNCTION)
    }
    return OnnxFile(
        ir_version=model.number(_MODEL_IR),
        opsets={opset.text(_OPSET_DOMAIN): opset.number(_OPSET_VERSION) for opset in model.messages(_MODEL_OPSET)},
        nodes=nodes,
        weights={weight.text(_TENSOR_NAME): weight.numbers(_TENSOR_DIMS) for weight in weights},
        floating=floating,
        inside=_inside(nodes, floating, functions),
    )


def _made_of(nodes: Iterable[Node], floating: AbstractSet[str]) -> frozenset[str]:
    """`floating`, and all that the nodes make of it."""
    found = set(floating)
    for node in nodes:
        if node.works_on(found):
            found.update(filter(None, node.outputs))
    return frozenset(found)


def _inside(
    nodes: Iterable[Node], floating: AbstractSet[str], functions: Mapping[tuple[str, str], Function]
) -> dict[str, bool]:
    """The named nodes in the functions that `nodes` call: whether they work on floats in any of the calls."""
    found: dict[str, bool] = {}
    for node in nodes:
        called = (node.domain, node.op_type)
        if function := functions.get(called):
            given = {name for name, tensor in zip(function.inputs, node.inputs, strict=False) if tensor in floating}
            within = _made_of(function.nodes, given)
            others = {key: other for key, other in functions.items() if key != called}  # none calls itself
            deeper = _inside(function.nodes, within, others)
            for name, works in [*((n.name, n.works_on(within)) for n in function.nodes if n.name), *deeper.items()]:
                found[name] = works or found.get(name, False)
    return found


def _node(node: _Message) -> Node:
    to = [a.number(_ATTRIBUTE_INT) for a in node.messages(_NODE_ATTRIBUTE) if a.text(_ATTRIBUTE_NAME) == "to"]
    return Node(
        op_type=node.text(_NODE_TYPE),
        name=node.text(_NODE_NAME),
        domain=node.text(_NODE_DOMAIN),
        inputs=node.texts(_NODE_INPUT),
        outputs=node.texts(_NODE_OUTPUT),
        to=to[0] if to else 0,
    )
