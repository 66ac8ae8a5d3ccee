"""Int8Linear and its forms: the kernel on each instruction set, the function that travels in the file, and float64,
held together; and what becomes of a graph."""

from __future__ import annotations

import platform
from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from test_precision import other_family

from export import bundle
from export.bundle import DOMAIN, OPSET
from export.graph import build
from export.graph_parts import IR_VERSION
from export.ops import library
from export.ops.int8_function import (
    DEPTH,
    FORMS,
    INT8_LINEAR,
    INT8_LINEAR_ADD,
    LAYER_NORM_INT8_LINEAR,
    LEVELS,
    PANEL,
    RMS_NORM_INT8_LINEAR,
    TINY,
    int8_function,
    panels,
)
from export.parity_float32 import model_bound
from export.parity_rounded import check_int8
from export.precision import int8, quantised
from export.prompt_runs import feed

ISAS = ["x86-64-v4", "x86-64-v3", "x86-64"] if platform.machine() == "x86_64" else [platform.machine()]
# (shape of x but for K, K, N): odd sizes, a panel and one column more, one row, a vocabulary, rows for two threads.
SHAPES = [
    ((1,), 4, 1),
    ((), 8, 3),
    ((3,), 8, 5),
    ((7,), 20, 64),
    ((5, 7), 68, 65),
    ((1,), 384, 1152),
    ((33,), 64, 130),
    ((2, 3, 2), 12, 127),
    ((201,), 384, 192),
    ((2,), 8, 50257),
    ((9,), 1364, 96),
]
FEEDS = ("weights", "step", "sums", "bias")


def stored(W: np.ndarray, bias: np.ndarray) -> dict[str, np.ndarray]:
    q, step = quantised(W)
    return dict(zip(FEEDS, (panels(q), step, q.sum(axis=0, dtype=np.int32), bias), strict=True))


def opened(
    tensors: dict[str, np.ndarray],
    fused: library.Library | None = None,
    function: bool = True,
    threads: int = 1,
    form: str = INT8_LINEAR,
) -> onnxruntime.InferenceSession:
    """A model of the operator alone; `tensors` lie in it in the order of its inputs, x is fed."""
    graph = helper.make_graph(
        [helper.make_node(form, ["x", *tensors], ["y"], domain=DOMAIN)],
        "int8",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in tensors.items()],
    )
    model = helper.make_model(
        graph,
        functions=[int8_function(form)] if function else [],
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)],
        ir_version=IR_VERSION,
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    if fused:
        library.register(options, fused)
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(session: onnxruntime.InferenceSession, x: np.ndarray) -> np.ndarray:
    return session.run(None, {"x": x})[0]


def rows(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Rows of many sizes, among them of zeros, of one value, of one sign, the smallest and the largest."""
    x = rng.normal(size=shape) * 10 ** rng.uniform(-3, 3, size=(*shape[:-1], 1))
    flat = x.reshape(-1, shape[-1]).astype(np.float32)
    special = [0.0, -0.0, 3.5, -2.25, 1e-38, -1e-42, 1e35]
    for i, value in enumerate(special[: len(flat) // 2]):
        flat[i] = value
    flat[-1, : shape[-1] // 2] *= 100  # a range far from even
    return flat.reshape(shape)


def has_exact_products() -> bool:
    """Whether ONNX Runtime's MatMulInteger is exact here: without VNNI its sums of two products saturate."""
    text = '<ir_version: 10, opset_import: ["": 20]> g (uint8[1,2] a, int8[2,1] b) => (int32[1,1] y) '
    model = onnx.parser.parse_model(text + "{ y = MatMulInteger (a, b) }").SerializeToString()
    feeds = {"a": np.array([[255, 255]], np.uint8), "b": np.array([[127], [127]], np.int8)}
    (y,) = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, feeds)
    return bool(y[0, 0] == 2 * 255 * 127)


def by_hand(
    x: np.ndarray, tensors: dict[str, np.ndarray], W: np.ndarray, on_border: float = 1e-4
) -> tuple[np.ndarray, np.ndarray]:
    """What the steps say in float64, and how far float32's may be from it: each of its last four roundings at the size
    of its operand, and a number within `on_border` steps of the border between two on either side of it."""
    q, step = quantised(W)
    x = x.astype(np.float64)
    least, largest = (f(x, axis=-1, keepdims=True) for f in (np.min, np.max))
    of_row = np.maximum((np.maximum(largest, 0) - np.minimum(least, 0)) / LEVELS, TINY)
    zero = np.rint(-np.minimum(least, 0) / of_row)
    scaled = x / of_row
    whole = np.minimum(np.rint(scaled) + zero, LEVELS) - zero
    border = np.abs(np.abs(scaled - np.rint(scaled)) - 0.5) < on_border
    product = whole @ q * step * of_row
    flips = (
        (border | (np.abs(zero + np.minimum(least, 0) / of_row) > 0.5 - on_border))
        @ np.abs(q).astype(np.float64)
        * step
        * of_row
    )
    return product + tensors["bias"], 1e-6 * (np.abs(product) + np.abs(tensors["bias"])) + flips


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize(("shape", "K", "N"), SHAPES, ids=str)
def test_kernel_and_function_give_the_same_numbers(fused, isa, shape, K, N):
    rng = np.random.default_rng(K + N)
    W, x = rng.normal(size=(K, N)).astype(np.float32), rows(rng, *shape, K)
    tensors = stored(W, rng.normal(size=N).astype(np.float32))
    tensors["weights"].reshape(-1, DEPTH)[:1] = [127, -127, 127, -127]  # the largest, where a sum of 16 bits would end
    tensors["sums"] = numpy_sums(tensors["weights"], N)
    one, two = (run(opened(tensors, fused, threads=threads), x) for threads in (1, 2))
    assert one.shape == (*shape, N)
    np.testing.assert_array_equal(one, two)
    if has_exact_products():
        np.testing.assert_array_equal(one, run(opened(tensors), x))


def numpy_sums(weights: np.ndarray, N: int) -> np.ndarray:
    return weights.sum(axis=(1, 3), dtype=np.int32).reshape(-1)[:N]


@pytest.mark.parametrize(("shape", "K", "N"), SHAPES, ids=str)
def test_the_kernel_computes_what_its_steps_say(fused, shape, K, N):
    rng = np.random.default_rng(K + N + 1)
    W, x = rng.normal(size=(K, N)).astype(np.float32), rows(rng, *shape, K)
    tensors = stored(W, rng.normal(size=N).astype(np.float32))
    got = run(opened(tensors, fused, function=False), x)
    wanted, allowed = by_hand(x, tensors, W)
    assert (np.abs(got - wanted) <= allowed).all()
    # And that is x @ W within half a step for each number of x, a little more where zero was rounded, and of W.
    q, step = quantised(W)
    exact = x.astype(np.float64) @ W + tensors["bias"]
    of_row = np.maximum((np.maximum(x.max(-1), 0) - np.minimum(x.min(-1), 0).astype(np.float64)) / LEVELS, TINY)
    of_x = 1.01 * of_row[..., None] * np.abs(q * step).sum(axis=0)
    of_W = np.abs(x).sum(axis=-1, keepdims=True, dtype=np.float64) * step / 2
    assert (np.abs(got - exact) <= of_x + of_W + 1e-5 * np.abs(exact)).all()


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize(("shape", "K", "N"), SHAPES, ids=str)
def test_a_residual_is_added_to_the_last_bit(fused, isa, shape, K, N):
    rng = np.random.default_rng(K + N)
    W, x = rng.normal(size=(K, N)).astype(np.float32), rows(rng, *shape, K)
    tensors = stored(W, rng.normal(size=N).astype(np.float32))
    residual = rng.normal(size=(*shape, N)).astype(np.float32)
    plain = run(opened(tensors, fused), x)
    for library_, threads in ((fused, 1), (fused, 2), (None, 1)):
        if library_ or has_exact_products():
            session = opened({**tensors, "residual": residual}, library_, threads=threads, form=INT8_LINEAR_ADD)
            np.testing.assert_array_equal(run(session, x), plain + residual)


def normed(x: np.ndarray, gain: np.ndarray, epsilon: float, shift: np.ndarray | None) -> np.ndarray:
    x = x.astype(np.float64)
    if shift is not None:
        x = x - x.mean(axis=-1, keepdims=True)
    y = x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + epsilon) * gain
    return y if shift is None else y + shift


@pytest.mark.parametrize("isa", [*ISAS, None], indirect=True)
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize(("shape", "K", "N"), [(s, K, N) for s, K, N in SHAPES if K > 8], ids=str)
def test_a_norm_of_x_is_that_of_float64(fused, isa, centred, shape, K, N):
    """Kernel and function sum in orders of their own: both stand to the same bound."""
    rng = np.random.default_rng(K + N)
    W = rng.normal(size=(K, N)).astype(np.float32)
    x = (rng.normal(size=(*shape, K)) * 10 ** rng.uniform(-1, 3, size=(*shape, 1)) + 0.5).astype(np.float32)
    tensors = stored(W, rng.normal(size=N).astype(np.float32))
    gain, shift = (rng.normal(size=K).astype(np.float32) for _ in range(2))
    scales = {"gain": gain, "epsilon": np.array([0.1], np.float32), **({"shift": shift} if centred else {})}
    form = LAYER_NORM_INT8_LINEAR if centred else RMS_NORM_INT8_LINEAR
    # A mean of K numbers and a root: some 1e-6 of 255 steps.
    wanted, allowed = by_hand(normed(x, gain, 0.1, scales.get("shift")), tensors, W, on_border=1e-3)
    sessions = [opened(tensors | scales, fused if isa else None, threads=n, form=form) for n in (1, 2)]
    one, two = (run(session, x) for session in sessions)
    np.testing.assert_array_equal(one, two)
    assert (np.abs(one - wanted) <= allowed + 1e-5 * np.abs(wanted).max(axis=-1, keepdims=True)).all()


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("isa", ISAS, indirect=True)
def test_a_row_does_not_see_the_others(fused, isa, fuse):
    """Alone, among others, among others a thousand times as large, and beside NaN: the same bits."""
    rng = np.random.default_rng(5)
    W = rng.normal(size=(96, 80)).astype(np.float32)
    session = opened(stored(W, np.zeros(80, np.float32)), fused if fuse else None, threads=2)
    x = rng.normal(size=(70, 96)).astype(np.float32)
    together = run(session, x)
    for i in (0, 1, 33, 69):
        np.testing.assert_array_equal(run(session, x[i : i + 1])[0], together[i])
    mixed = x.copy()
    mixed[::2] *= 1000
    mixed[4, 7] = np.nan
    np.testing.assert_array_equal(run(session, mixed)[1::2], together[1::2])


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("isa", ISAS, indirect=True)
def test_a_row_with_what_is_no_number_in_it_comes_out_as_nan(fused, isa, fuse):
    rng = np.random.default_rng(6)
    W = rng.normal(size=(20, 33)).astype(np.float32)
    x = rng.normal(size=(8, 20)).astype(np.float32)
    for row, column, value in ((1, 0, np.nan), (2, 19, np.nan), (3, 7, np.inf), (4, 19, -np.inf)):
        x[row, column] = value
    x[5, 3], x[5, 4] = np.inf, -np.inf
    got = run(opened(stored(W, np.ones(33, np.float32)), fused if fuse else None), x)
    assert np.isnan(got[1:6]).all()
    assert np.isfinite(got[[0, 6, 7]]).all()


@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16), (3, 0)], ids=str)
def test_nothing_in_nothing_out(fused, shape):
    """The kernel alone: ONNX Runtime's reductions of an empty tensor keep its shape (1.31.1)."""
    tensors = stored(np.ones((shape[-1], 7), np.float32), np.full(7, 2.5, np.float32)) if shape[-1] else None
    if tensors is None:  # no weights: the bias remains
        tensors = dict(zip(FEEDS, (np.zeros((1, 0, 64, 4), np.int8), np.ones(7, np.float32),
                                   np.zeros(7, np.int32), np.full(7, 2.5, np.float32)), strict=True))  # fmt: skip
    got = run(opened(tensors, fused, function=False), np.zeros(shape, np.float32))
    assert got.shape == (*shape[:-1], 7)
    assert (got == 2.5).all()


def test_panels_by_hand():
    """Four rows of a column side by side, 64 columns together, zeros past the last."""
    W = np.arange(8 * 65).reshape(8, 65) % 128
    got = panels(W.astype(np.int8))
    assert got.shape == (2, 2, PANEL, DEPTH)
    assert got[0, 0, 3].tolist() == W[:4, 3].tolist()
    assert got[0, 1, 63].tolist() == W[4:, 63].tolist()
    assert got[1, 1, 0].tolist() == W[4:, 64].tolist()
    assert not got[1, :, 1:].any()


GOOD = {"weights": (1, 2, 64, 4), "step": (5,), "sums": (5,), "bias": (5,)}
TYPES = {"weights": np.int8, "sums": np.int32}


@pytest.mark.parametrize(
    ("form", "more", "says"),
    [
        (INT8_LINEAR_ADD, {"residual": (2, 4)}, r"Add: residual has shape \[2, 4\]; it must be \[2, 5\], as y"),
        (INT8_LINEAR_ADD, {"residual": (5,)}, r"residual has shape \[5\]; it must be \[2, 5\], as y"),
        (RMS_NORM_INT8_LINEAR, {"gain": (7,), "epsilon": (1,)}, r"gain has shape \[7\]; it must be \[8\]"),
        (RMS_NORM_INT8_LINEAR, {"gain": (8,), "epsilon": ()}, r"epsilon has shape \[\]; it must be \[1\]"),
        (
            LAYER_NORM_INT8_LINEAR,
            {"gain": (8,), "epsilon": (1,), "shift": (5,)},
            r"LayerNormInt8Linear: shift has shape \[5\]; it must be \[8\]",
        ),
    ],
)
def test_a_wrong_shape_of_what_a_form_adds_is_named(fused, form, more, says):
    tensors = {name: np.zeros(shape, TYPES.get(name, np.float32)) for name, shape in {**GOOD, **more}.items()}
    with pytest.raises(Exception, match=says):
        run(opened(tensors, fused, function=False, form=form), np.zeros((2, 8), np.float32))


@pytest.mark.parametrize(
    ("change", "x", "says"),
    [
        ({}, (2, 12), r"weights have shape \[1, 2, 64, 4\]; for x \[2, 12\] and N = 5 it must be \[1, K / 4, 64, 4\]"),
        ({"weights": (2, 2, 64, 4)}, (2, 8), r"weights have shape \[2, 2, 64, 4\]"),
        ({"weights": (1, 2, 32, 8)}, (2, 8), r"weights have shape \[1, 2, 32, 8\]"),
        ({"step": (1, 5)}, (2, 8), r"step has shape \[1, 5\]; it must be \[N\]"),
        ({"sums": (4,)}, (2, 8), r"sums has shape \[4\]; it must be \[5\]"),
        ({"bias": (2, 5)}, (2, 8), r"bias has shape \[2, 5\]; it must be \[5\]"),
        ({}, (), "x has 0 dimensions; it must have 1 to 16, the last of them K"),
    ],
)
def test_a_wrong_shape_is_an_error_that_names_it(fused, change, x, says):
    tensors = {name: np.zeros(shape, TYPES.get(name, np.float32)) for name, shape in {**GOOD, **change}.items()}
    with pytest.raises(Exception, match=says):
        run(opened(tensors, fused, function=False), np.zeros(x, np.float32))


def products(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type == INT8_LINEAR]


def small(*lines: str, K: int, biases: int = 2) -> onnx.ModelProto:
    """A float32 graph of x [B, K] with stored W0 and W1 [K, 6] and b0, b1 [6]."""
    text = f'<ir_version: 10, opset_import: ["": 20]> g (float[B, {K}] x) => (float[B, 6] y) {{ {" ".join(lines)} }}'
    model = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    arrays = {f"W{i}": rng.normal(size=(K, 6)) for i in range(2)} | {f"b{i}": rng.normal(size=6) for i in range(biases)}
    model.graph.initializer.extend(numpy_helper.from_array(a.astype(np.float32), n) for n, a in arrays.items())
    for i, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}_{i}"
    model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    return model


def test_a_bias_that_alone_reads_a_product_is_added_within():
    model = int8(small("p = MatMul (x, W0) q = Add (p, b0) r = MatMul (x, W1) s = Add (r, b1) y = Mul (q, s)", K=8))
    assert [node.op_type for node in model.graph.node] == [INT8_LINEAR, INT8_LINEAR, "Mul"]
    assert [node.input[4] for node in products(model)] == ["b0", "b1"]


@pytest.mark.parametrize(
    "lines",
    [
        "p = MatMul (x, W0) r = MatMul (x, W1) y = Add (p, r)",
        "p = MatMul (x, W0) q = Add (p, b0) y = Mul (p, q)",
        "p = MatMul (x, W0) y = Sub (p, b0)",
    ],
    ids=["of two products", "read twice", "subtracted"],
)
def test_what_is_no_bias_stays(lines):
    model = int8(small(lines, K=8))
    assert all(node.input[4] == "zeros_6" for node in products(model))
    onnx.checker.check_model(model, full_check=True)


def test_rows_of_an_odd_length_are_padded_once(fused):
    """Zeros at a row's end change neither its range nor its products."""
    plain = small("p = MatMul (x, W0) r = MatMul (x, W1) y = Add (p, r)", K=7)
    model = int8(plain)
    assert [node.op_type for node in model.graph.node] == ["Pad", INT8_LINEAR, INT8_LINEAR, "Add"]
    x = 3 + np.random.default_rng(1).random((5, 7), np.float32)  # without 0: the padding must not widen the range
    options = onnxruntime.SessionOptions()
    library.register(options, fused)
    for session in (
        onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]),
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"]),
    ):
        wanted = onnxruntime.InferenceSession(plain.SerializeToString(), providers=["CPUExecutionProvider"])
        np.testing.assert_allclose(run(session, x), run(wanted, x), atol=0.2)


@pytest.mark.parametrize("fuse", [True, False])
def test_a_batch_equals_its_singles(tiny_checkpoint, fused, fuse):
    """Within float32's bound, in int8 too: with one step per tensor they differed by int8's own noise."""
    decoder = tiny_checkpoint("swiglu").decoder
    model = int8(build(decoder))
    options = onnxruntime.SessionOptions()
    if fuse:
        library.register(options, fused)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(4)
    prompts = [rng.integers(0, decoder.vocab_size, size=n) for n in (3, 32, 1, 17)]
    together = session.run([bundle.LOGITS], feed(prompts))[0]
    alone = np.concatenate([session.run([bundle.LOGITS], feed([prompt]))[0] for prompt in prompts])
    np.testing.assert_allclose(together, alone, rtol=0, atol=2 * model_bound(decoder) * np.abs(alone).max())


def kinds(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


@pytest.mark.parametrize(
    ("centred", "norm"), [(False, RMS_NORM_INT8_LINEAR), (True, LAYER_NORM_INT8_LINEAR)], ids=["rms", "layer"]
)
def test_norms_and_sums_go_within_the_products(tiny_checkpoint, centred, norm):
    """Of two blocks: qkv or q and kv, and up, take their norms, but for the first, which adds nothing; out and down the
    sum; the head takes the last norm."""
    decoder = tiny_checkpoint("gelu").decoder
    if centred:
        decoder = other_family(decoder)
    plain = build(decoder)
    model = int8(plain)
    assert sum("Skip" in kind for kind in kinds(plain)) == 1
    assert not any("Skip" in kind for kind in kinds(model))
    assert {kind: n for kind, n in kinds(model).items() if kind in FORMS} == {
        INT8_LINEAR: 1,
        INT8_LINEAR_ADD: 4,
        norm: 2 + 2 + 1,
    }
    assert [function.name for function in model.functions if function.name in FORMS] == [
        INT8_LINEAR, INT8_LINEAR_ADD, norm
    ]  # fmt: skip
    onnx.checker.check_model(model)


def test_the_portable_flavour_keeps_norms_of_its_own(tiny_checkpoint):
    model = int8(build(tiny_checkpoint("gelu").decoder, "portable"))
    assert {kind: n for kind, n in kinds(model).items() if kind in FORMS} == {INT8_LINEAR: 10}
    assert [function.name for function in model.functions if function.name in FORMS] == [INT8_LINEAR]


@pytest.mark.parametrize("reader", ["the norm", "delta"])
def test_what_others_read_stays(tiny_checkpoint, reader):
    """One more reader of the second norm, or of what it adds, and that norm keeps its node."""
    model = build(tiny_checkpoint("gelu").decoder)
    norm = next(node for node in model.graph.node if "Skip" in node.op_type)
    name = norm.output[0] if reader == "the norm" else norm.input[1]
    at = list(model.graph.node).index(norm) + 1
    more = helper.make_node("Abs", [name], ["more"], "more")
    nodes = [*model.graph.node[:at], more, *model.graph.node[at:]]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    before, after = (sum("Skip" in node.op_type for node in m.graph.node) for m in (model, int8(model)))
    assert (before, after) == (4, 1)


def test_the_kernels_pass_the_gate_that_the_functions_pass(tiny_checkpoint, fused):
    """The gate asks a runtime without the library; here one with it stands to the same noise."""
    checkpoint = tiny_checkpoint("swiglu")
    plain = build(checkpoint.decoder)
    options = onnxruntime.SessionOptions()
    library.register(options, fused)
    model = int8(plain).SerializeToString()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    assert check_int8(checkpoint.decoder, checkpoint.model, session.run, plain, seed=3).noise <= 1.25
