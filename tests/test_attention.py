"""The cache's attention: its kernel and its function against float64, and a model in parts against the same in one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from actuary import GateFailed
from export import attention, bundle
from export.graph import build
from export.graph_parts import IR_VERSION
from export.ops import library
from export.ops.check import open_session
from export.parity_cache import check_cache
from export.parity_float32 import model_bound
from export.prompt_runs import feed

UNIT = 2.0**-24
EPS = 1e-6
LAYERS, LAYER = 3, 1  # of the pool; the one that is read
Feeds = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Shape:
    heads: int
    kv_heads: int
    D: int
    rope: bool = True
    normed: bool = True
    context: int = 80

    @property
    def width(self) -> int:
        return 2 * self.kv_heads * self.D


SHAPES = {
    "ours": Shape(2, 2, 64),
    "groups": Shape(6, 2, 32),
    "one key head": Shape(8, 1, 16),
    "wide": Shape(2, 1, 128),
    "no whole vectors": Shape(3, 3, 20),
    "two channels": Shape(2, 2, 2),
    "llama": Shape(4, 2, 48, normed=False),
    "gpt2": Shape(4, 4, 24, rope=False, normed=False),
    "odd": Shape(2, 2, 3, rope=False, normed=False),
}


def one_node(shape: Shape, of_rows: bool) -> bytes:
    """A model of the operator alone, with its meaning."""
    rope, gains = (attention.ROPE if shape.rope else ()), (attention.GAINS if shape.normed else ())
    names = [*(("q", "kv", "asked") if of_rows else ("qkv",)), *attention.SHARED, *rope, *gains]
    integers = {"asked", "lengths", "past_slots", "past_lengths"}
    node = helper.make_node(
        attention.OF_ROWS if of_rows else attention.PACKED, names, ["y", "present"], domain=bundle.DOMAIN,
        heads=shape.heads, kv_heads=shape.kv_heads, layer=LAYER, eps=EPS,
    )  # fmt: skip
    values = [
        helper.make_tensor_value_info(n, TensorProto.INT64 if n in integers else TensorProto.FLOAT, None) for n in names
    ]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("y", "present")]
    model = helper.make_model(
        helper.make_graph([node], "attention", values, outputs),
        functions=attention.functions(shape.heads, shape.kv_heads, shape.D, shape.rope, shape.normed),
        opset_imports=[helper.make_opsetid("", bundle.OPSET), helper.make_opsetid(bundle.DOMAIN, 1)],
        ir_version=IR_VERSION,
    )
    return bytes(model.SerializeToString())


def packed_feeds(shape: Shape, lengths: list[int], past_lengths: list[int], rng: np.random.Generator) -> Feeds:
    """Random numbers; the pool's slots in any order, past_slots padded with one that is nobody's."""
    N, slots = sum(lengths), sum(past_lengths) + 5
    order = rng.permutation(slots)
    past_slots, used = np.full((len(lengths), max(past_lengths)), order[-1]), 0
    for row, length in zip(past_slots, past_lengths, strict=True):
        row[:length], used = order[used : used + length], used + length
    feeds: Feeds = {
        "qkv": rng.normal(size=(N, (shape.heads + 2 * shape.kv_heads) * shape.D)).astype(np.float32),
        "lengths": np.array(lengths),
        "past": rng.normal(size=(LAYERS, slots, shape.width)).astype(np.float32),
        "past_slots": past_slots.astype(np.int64),
        "past_lengths": np.array(past_lengths),
    }
    feeds["qkv"][:, : shape.heads * shape.D] *= 2 / shape.D**0.5
    if shape.rope:
        angles = np.outer(np.arange(shape.context), 0.7 ** np.arange(shape.D // 2))
        feeds |= {"cos": np.cos(angles).astype(np.float32), "sin": np.sin(angles).astype(np.float32)}
    if shape.normed:
        gain = 3 / shape.D**0.25
        feeds |= {name: (gain * rng.uniform(0.5, 1.5, shape.D)).astype(np.float32) for name in attention.GAINS}
    return feeds


def of_rows_feeds(shape: Shape, feeds: Feeds, asked: NDArray[np.int64]) -> Feeds:
    q, kv = np.split(feeds["qkv"], [shape.heads * shape.D], axis=1)
    rest = {name: array for name, array in feeds.items() if name != "qkv"}
    return {"q": q[asked], "kv": np.ascontiguousarray(kv), "asked": asked, **rest}


def exact(shape: Shape, feeds: Feeds) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(y, present) in float64, a token and a head at a time: the definition."""
    D, group = shape.D, shape.heads // shape.kv_heads
    rows = feeds["qkv"].astype(np.float64).reshape(-1, shape.heads + 2 * shape.kv_heads, D)
    past = feeds["past"][LAYER].astype(np.float64).reshape(-1, 2, shape.kv_heads, D)

    def turned(x: NDArray[np.float64], gain: str, position: int) -> NDArray[np.float64]:
        if shape.normed:
            x = x / np.sqrt((x**2).mean() + EPS) * feeds[gain]
        if not shape.rope:
            return x
        cos, sin = (feeds[name][position].astype(np.float64) for name in attention.ROPE)
        a, b = x[: D // 2], x[D // 2 :]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin])

    y = np.zeros((len(rows), shape.heads, D))
    present = np.zeros((len(rows), 2, shape.kv_heads, D))
    n = 0
    for length, earlier, slots in zip(feeds["lengths"], feeds["past_lengths"], feeds["past_slots"], strict=True):
        known = [*past[slots[:earlier]]]
        for position in range(earlier, earlier + length):
            for h in range(shape.kv_heads):
                present[n, 0, h] = turned(rows[n, shape.heads + h], "k_gain", position)
                present[n, 1, h] = rows[n, shape.heads + shape.kv_heads + h]
            known.append(present[n])
            for h in range(shape.heads):
                q = turned(rows[n, h], "q_gain", position)
                scores = np.array([kv[0, h // group] @ q for kv in known])
                weights = np.exp(scores - scores.max())
                y[n, h] = weights @ np.array([kv[1, h // group] for kv in known]) / weights.sum()
            n += 1
    return y.reshape(n, -1), present.reshape(1, n, -1)


def tolerance(shape: Shape, feeds: Feeds) -> float:
    """A score sums D products of normed rows, with relative error sqrt(D) u in the usual case (Higham & Mary 2019), and
    moves its weight by as much; weights add up over `context` keys. |q| |k| bounds a score, the largest |v| the sum."""
    largest = float(np.abs(feeds["qkv"]).max())
    score = 9 * 2.25 * shape.D**0.5 if shape.normed else 4 * shape.D**0.5
    return 4 * UNIT * (shape.D**0.5 * score + shape.context**0.5) * largest


ISAS = pytest.mark.parametrize("isa", ["x86-64-v4", "x86-64-v3", "x86-64", None], indirect=True)  # None: the function
BATCHES = (
    ([1], [0]), ([33], [0]), ([2, 1, 40], [0, 0, 0]), ([1, 1, 1], [30, 0, 7]), ([5, 3, 1, 17], [11, 0, 70, 63]),
)  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@ISAS
def test_kernel_and_function_give_what_is_defined(fused, shape, isa):
    rng = np.random.default_rng(0)
    packed, of_rows = (open_session(one_node(shape, r), fused if isa else None) for r in (False, True))
    for lengths, past_lengths in BATCHES:
        feeds = packed_feeds(shape, lengths, past_lengths, rng)
        y, present = exact(shape, feeds)
        asked = rng.integers(0, sum(lengths), size=7)
        allowed = tolerance(shape, feeds)
        for got, want in (
            (packed.run(None, feeds), (y, present)),
            (of_rows.run(None, of_rows_feeds(shape, feeds, asked)), (y[asked], present)),
        ):
            for found, wanted in zip(got, want, strict=True):
                np.testing.assert_allclose(found, wanted, rtol=0, atol=allowed)


@ISAS
@pytest.mark.parametrize("length", [3, 6])  # a row at a time, and four
def test_what_a_token_does_not_see_never_counts(fused, isa, length: int):
    """Scores of -1e32: each token still answers with the mean of the values up to it."""
    shape = Shape(2, 2, 8, rope=False, normed=False)
    feeds = packed_feeds(shape, [length], [0], np.random.default_rng(0))
    feeds["qkv"] = np.repeat(np.array([[1e16, -1e16, 0]], np.float32), 16, axis=-1).repeat(length, axis=0)
    feeds["qkv"][:, 32:] = np.arange(1, length + 1)[:, None]
    y, _ = open_session(one_node(shape, False), fused if isa else None).run(None, feeds)
    np.testing.assert_allclose(y, np.repeat(np.arange(2, length + 2)[:, None] / 2, 16, axis=1), rtol=1e-6)


@pytest.mark.parametrize("isa", ["x86-64-v4", None], indirect=True)
def test_a_prompt_that_is_not_finite_is_so_alone(fused, isa):
    shape, lengths = SHAPES["ours"], [3, 6, 2]
    feeds = packed_feeds(shape, lengths, [0, 0, 0], np.random.default_rng(0))
    feeds["qkv"][4, -1] = np.nan  # a value of the second prompt's
    y, _ = open_session(one_node(shape, False), fused if isa else None).run(None, feeds)
    finite = np.isfinite(y).all(axis=1)
    assert finite[[0, 1, 2, 9, 10]].all()
    assert not finite[4:9].any()


def test_a_prompt_in_a_batch_is_the_same_to_the_last_bit_as_alone(fused):
    shape, rng = SHAPES["ours"], np.random.default_rng(1)
    session = open_session(one_node(shape, False), fused)
    lengths, past_lengths = [1, 9, 30, 2], [25, 0, 40, 3]
    feeds = packed_feeds(shape, lengths, past_lengths, rng)
    together, _ = session.run(None, feeds)
    start = 0
    for b, length in enumerate(lengths):
        own = {name: feeds[name][b : b + 1] for name in ("lengths", "past_slots", "past_lengths")}
        alone, _ = session.run(None, feeds | own | {"qkv": feeds["qkv"][start : start + length]})
        np.testing.assert_array_equal(alone, together[start : start + length])
        start += length


def test_nothing_is_computed_of_no_prompt(fused):
    shape = SHAPES["ours"]
    feeds = packed_feeds(shape, [1], [0], np.random.default_rng(0))
    nothing = {"qkv": feeds["qkv"][:0], "lengths": np.zeros(1, np.int64)}
    y, present = open_session(one_node(shape, False), fused).run(None, feeds | nothing)
    assert y.shape == (0, 128)
    assert present.shape == (1, 0, 256)


BAD = {
    "a slot past the pool": ({"past_slots": np.array([[99, 0]])}, "past_slots holds 99; past has 7 slots"),
    "a negative slot": ({"past_slots": np.array([[-1, 0]])}, "past_slots holds -1"),
    "more past than slots": ({"past_lengths": np.array([3])}, "4 tokens after 3; .* past_slots holds 2"),
    "fewer tokens": ({"lengths": np.array([3])}, "the lengths add up to 3, and there are 4 tokens"),
    "more tokens": ({"lengths": np.array([5])}, "prompt 0 has 5 tokens after 2; all have 4"),
    "a negative length": ({"lengths": np.array([-1])}, "prompt 0 has -1 tokens"),
    "past the context": ({"cos": np.zeros((5, 32), np.float32), "sin": np.zeros((5, 32), np.float32)}, "the context 5"),
    "another width": ({"past": np.zeros((2, 7, 100), np.float32)}, r"past has shape \[2, 7, 100\]; .* 256\]"),
    "no such layer": ({"past": np.zeros((1, 7, 256), np.float32)}, r"past has shape .*\[more than 1, slots"),
    "a row that is not there": ({"asked": np.array([4])}, "asked holds 4; there are 4 tokens"),
}


@pytest.mark.parametrize(("change", "words"), BAD.values(), ids=BAD.keys())
def test_what_points_outside_is_refused(fused, change, words):
    shape = SHAPES["ours"]
    feeds = packed_feeds(shape, [4], [2], np.random.default_rng(0))
    of_rows = "asked" in change
    if of_rows:
        feeds = of_rows_feeds(shape, feeds, np.array([0]))
    with pytest.raises(Exception, match=words):
        open_session(one_node(shape, of_rows), fused).run(None, feeds | change)


def test_a_session_on_cuda_would_not_get_it(fused):
    """It has a CPU kernel alone, which would pull the work off the device: there its function runs."""
    model = one_node(SHAPES["ours"], False)
    for cuda, kept in ((True, False), (False, True)):
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        library.register(options, fused, cuda)
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        nodes = [node for part in session.get_provider_graph_assignment_info() for node in part.get_nodes()]
        assert (attention.PACKED in {node.op_type for node in nodes}) == kept


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_a_graph_with_a_cache_gives_what_torch_gives(fused, tiny_checkpoint, activation):
    """Whole, in parts, at every row; fused, inlined, and in ONNX's reference."""
    torch = pytest.importorskip("torch")
    checkpoint = tiny_checkpoint(activation)
    model = build(checkpoint.decoder, cache=True)
    rng = np.random.default_rng(2)
    prompts = [rng.integers(0, 300, size=length) for length in (32, 1, 7)]
    with torch.no_grad():
        every = [checkpoint.model.double()(torch.from_numpy(p)[None]).logits[0].numpy() for p in prompts]
    checkpoint.model.float()
    bound = model_bound(checkpoint.decoder)
    runs = {
        "fused": open_session(model.SerializeToString(), fused).run,
        "inlined": open_session(model.SerializeToString()).run,
        "reference": ReferenceEvaluator(build(checkpoint.decoder, "portable", cache=True)).run,
    }
    rows = {bundle.ROWS: np.arange(40)}
    defaults = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer if t.name in bundle.CACHE}
    for name, run in runs.items():
        # The reference does not know that an initializer is an input's default.
        given = {**defaults, **rows} if name == "reference" else rows
        (logits,) = run([bundle.LOGITS], feed(prompts) | given)
        want = np.concatenate([*(p[-1:] for p in every), *every])
        scale = np.abs(want).max(axis=-1, keepdims=True)
        assert (np.abs(logits - want) / scale).max() <= bound, name
    check_cache(checkpoint.decoder, runs["fused"], 0, bound)


def test_the_gate_sees_a_cache_that_reads_another_layer(fused, tiny_checkpoint):
    decoder = tiny_checkpoint("gelu").decoder
    model = build(decoder, cache=True)
    for node in model.graph.node:
        if node.op_type == attention.OF_ROWS:
            (layer,) = (a for a in node.attribute if a.name == "layer")
            layer.i = 0
    bound = model_bound(decoder)
    with pytest.raises(GateFailed, match=r"of them .* cached, the logits differ from those without"):
        check_cache(decoder, open_session(model.SerializeToString()).run, 0, bound)
    check_cache(decoder, open_session(build(decoder, cache=True).SerializeToString(), fused).run, 0, bound)
