"""Who feeds whom in a graph, and which of its nodes belong to which part of the model: told by the weights they read.

    blocks.0.attention_norm, qkv (q, kv), q_norm, k_norm, out | ffn_norm, up, learned, down | ... | norm, head

Called by `actuary inspect`, which draws a block of the graph as it was loaded and says where its time goes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal

from export import bundle
from export.onnx_file import OnnxFile

# How ONNX Runtime names what it put in the place of one.
_INLINED_PRODUCT = re.compile(rf"_inlfunc_(?:{'|'.join(bundle.PRODUCTS)})_")

Part = Literal["up", "activation", "down", "attention", "head", "other"]


def plain(name: str) -> str:
    """A weight's own name: ONNX Runtime puts a word before it where a cast was moved into it."""
    return re.sub(r"^(?:FusedBack_|InsertedPrecisionFreeCast_)+", "", name)


class Wiring:
    """Nodes by their index."""

    def __init__(self, graph: OnnxFile) -> None:
        self.nodes, self.weights = graph.nodes, {name: plain(name) for name in graph.weights}
        self.makers = {name: i for i, node in enumerate(graph.nodes) for name in node.outputs if name}
        self.before = [{self.makers[name] for name in node.inputs if name in self.makers} for node in graph.nodes]
        self.after: list[set[int]] = [set() for _ in graph.nodes]
        for i, makers in enumerate(self.before):
            for maker in makers:
                self.after[maker].add(i)

    def reading(self, *prefixes: str) -> set[int]:
        """Nodes that read a weight whose name begins so, and are no activation of ours."""
        return {
            i
            for i, node in enumerate(self.nodes)
            if (node.domain != bundle.DOMAIN or node.op_type in bundle.STRUCTURAL)
            and any(self.weights.get(name, "").startswith(prefixes) for name in node.inputs)
        }

    def behind(self, start: Iterable[int]) -> set[int]:
        return self._reached(start, self.after)

    def between(self, start: Iterable[int], end: Iterable[int]) -> set[int]:
        """Nodes on a way from `start` to `end`, without those two."""
        start, end = set(start), set(end)
        return (self.behind(start) & self._reached(end, self.before)) - start - end

    def meeting(self, start: set[int], end: set[int]) -> tuple[int, str]:
        """The node from `start` to `end` where another tensor is added first, and that tensor."""
        for i in start:
            if self.nodes[i].op_type == "Int8LinearAdd":  # adds its last input itself
                return i, self.nodes[i].inputs[-1]
        behind = self.behind(start) | start
        on_the_way = (self.between(start, end) | end) - start
        for i in sorted(on_the_way, key=lambda i: len(self._reached([i], self.before))):
            for name in self.nodes[i].inputs:
                if name in self.makers and self.makers[name] not in behind:
                    return i, name
        raise KeyError

    def parts(self, layers: int) -> list[Part] | None:
        """The part of each node; None where no weights have the names of ours.

        A norm, and the sum before it, are of no part where they stand alone; where a product took them in, of that
        product's. What quantises a product's input, or brings its sums back to floats, is the product's too.
        """
        found: dict[int, Part] = {}
        for block in range(layers):
            at = f"blocks.{block}."
            norm1, norm2, up = (self.reading(f"{at}{role}.") for role in ("attention_norm", "ffn_norm", "up"))
            end = self.reading(f"blocks.{block + 1}.attention_norm.") or self.reading("norm.")
            qkv = self.reading(*(f"{at}{role}." for role in ("qkv", "q", "kv", "q_norm", "k_norm")))
            # A norm that adds may take the bias of the product before it too.
            out, down = self.reading(f"{at}out.") - norm2, self.reading(f"{at}down.") - end
            if not (up and down and qkv and out):
                return None
            found |= dict.fromkeys(self.between(norm1 | qkv, out) | qkv | out, "attention")
            inner = self.between(up, down)
            found |= dict.fromkeys(self.between(norm2, up) | self.between(up, up) | up, "up")
            found |= dict.fromkeys((i for i in inner - found.keys() if self._of_product(i)), "down")
            found |= dict.fromkeys(inner - found.keys(), "activation")
            found |= dict.fromkeys(down, "down")
            self._go_on(found, out, "attention", norm2)
            self._go_on(found, down, "down", end)
        if not (head := self.reading("head.")):
            return None
        found |= dict.fromkeys(self.between(self.reading("norm."), head) | head | self.behind(head), "head")
        return [found.get(i, "other") for i in range(len(self.nodes))]

    def _of_product(self, i: int) -> bool:
        """Whether it is one of the operators that an int8 product of ours became."""
        return any(_INLINED_PRODUCT.match(name) for name in self.nodes[i].outputs)

    def _go_on(self, found: dict[int, Part], start: set[int], part: Part, norm: set[int]) -> None:
        """What reads nothing but what comes of `start`: up to the norm, or to where another tensor meets it."""
        mine = set(start)
        for i in sorted(self.behind(start) - norm):
            if self.before[i] <= mine and i not in found:
                mine.add(i)
                found[i] = part

    @staticmethod
    def _reached(start: Iterable[int], edges: list[set[int]]) -> set[int]:
        seen: set[int] = set()
        todo = list(start)
        while todo:
            new = edges[todo.pop()] - seen
            seen |= new
            todo += new
        return seen
