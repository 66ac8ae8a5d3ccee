"""The fused operators: every kernel against float64 on every instruction set, what a plain runtime makes of the same
file, and every shape that must be refused."""

from __future__ import annotations

import itertools
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import psutil
import pytest
from conftest import HANG_S
from native_ops import FUSED, run
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from actuary import GateFailed
from export.bundle import DOMAIN, OPSET
from export.graph_parts import IR_VERSION
from export.ops import error_bound, library
from export.ops.check import (
    SHAPES,
    check_activation,
    check_special,
    one_node,
    probes,
    special_probes,
    worst_ratio,
)
from export.ops.onnx_function import onnx_function
from export.ops.trace import trace
from models.activations import get

ISAS = ["x86-64-v4", "x86-64-v3", "x86-64"] if platform.machine() == "x86_64" else [platform.machine()]


# --- the numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("name", FUSED)
def test_each_kernel_is_within_its_bound_on_each_instruction_set(fused, isa: str, name: str):
    record, rng = get(name), np.random.default_rng(17)
    for biased, type in itertools.product((False, True), ("float32", "float16")):
        feeds = probes(record, rng, biased, type)
        got = run(one_node(record, None, biased, type), feeds, fused)
        worst_ratio(record, feeds, got, error_bound.KERNEL, f"the kernel ({type}, {biased=}, {isa})")


@pytest.mark.parametrize("name", FUSED)
def test_without_the_library_the_same_file_means_the_same(fused, name: str):
    """One file: a plain runtime inlines it, with the library it fuses, onnx's ReferenceEvaluator reads it."""
    record, rng = get(name), np.random.default_rng(23)
    for biased, type in itertools.product((False, True), ("float32", "float16")):
        model = one_node(record, onnx_function(name, trace(record), biased), biased, type)
        feeds = probes(record, rng, biased, type)
        inlined = error_bound.FLOAT16 if type == "float16" else error_bound.FLOAT32
        worst_ratio(record, feeds, run(model, feeds), inlined, f"the inlined function ({type}, {biased=})")
        worst_ratio(record, feeds, run(model, feeds, fused), error_bound.KERNEL, f"the kernel ({type}, {biased=})")
        if type == "float32":
            few = {key: array[:32] if key == "x" else array for key, array in feeds.items()}
            few["x"] = np.clip(few["x"], -50, 50)  # numpy warns where e^x overflows
            (read,) = ReferenceEvaluator(onnx.load_from_string(model)).run(None, few)
            worst_ratio(record, few, read, error_bound.FLOAT32, f"onnx's ReferenceEvaluator ({biased=})")


# What a stranger has who only installed onnxruntime.
STRANGER = """
import importlib.util, sys
sys.path[:0] = sys.argv[2:]
import numpy, onnxruntime
from pathlib import Path
assert not any(map(importlib.util.find_spec, ("actuary", "export", "torch", "onnx")))
for model in sorted(Path(sys.argv[1]).glob("*.onnx")):
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    numpy.save(model.with_suffix(".npy"), session.run(None, dict(numpy.load(model.with_suffix(".npz"))))[0])
"""


def test_every_file_runs_where_nothing_of_ours_is_installed(tmp_path, bundles):
    """A process that sees numpy and onnxruntime alone: neither our library, nor Actuary, torch or onnx."""
    wanted = {}
    for name in FUSED:
        record = get(name)
        wanted[name] = probes(record, np.random.default_rng(29))
        (tmp_path / f"{name}.onnx").write_bytes(one_node(record, onnx_function(name, trace(record))))
    ids, lengths = np.arange(24).reshape(2, 12), np.array([12, 5])
    wanted["bundle"] = {"input_ids": ids, "lengths": lengths, "top_k": np.array([1])}
    shutil.copy(bundles / "swiglu" / "model.onnx", tmp_path / "bundle.onnx")
    for name, feeds in wanted.items():
        np.savez(tmp_path / f"{name}.npz", **feeds)
    installed = tmp_path / "installed"
    installed.mkdir()
    for package in (np, onnxruntime):
        folder = Path(package.__file__).parent
        for part in folder.parent.glob(f"{folder.name}*"):  # numpy.libs too
            (installed / part.name).symlink_to(part)
    command = [sys.executable, "-I", "-S", "-c", STRANGER, str(tmp_path), str(installed)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG_S, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for name in FUSED:
        got = np.load(tmp_path / f"{name}.npy")
        worst_ratio(get(name), wanted[name], got, error_bound.FLOAT32, "a plain onnxruntime")
    session = onnxruntime.InferenceSession(bundles / "swiglu" / "model.onnx", providers=["CPUExecutionProvider"])
    assert np.array_equal(np.load(tmp_path / "bundle.npy"), session.run(["logits"], wanted["bundle"])[0])


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("type", ["float32", "float16"])
def test_infinity_and_nan_come_out_as_in_torch(fused, name: str, type: str):
    record = get(name)
    feeds = special_probes(record, type)
    check_special(record, feeds, run(one_node(record, None, False, type), feeds, fused), "the kernel", type)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["swiglu", "gelu", "swish"])
@pytest.mark.parametrize("type", ["float32", "float16"])
def test_every_shape_and_one_or_two_threads_agree(fused, name: str, shape: tuple[int, ...], type: str):
    """Odd lengths, empty batches, one row or many: element by element what the whole is, in one block or several."""
    record, rng = get(name), np.random.default_rng(1)
    width = shape[-1] * (2 if record.gated else 1)
    for biased in (False, True):
        feeds = {"x": rng.normal(size=(*shape[:-1], width)), "bias": rng.normal(size=width)}
        feeds |= {f"learned.{key}": [start] for key, start in record.learned.items()}
        feeds = {key: np.array(array, type) for key, array in feeds.items() if biased or key != "bias"}
        model = one_node(record, None, biased, type)
        one, two = (run(model, feeds, fused, threads) for threads in (1, 2))
        assert one.shape == two.shape == shape
        np.testing.assert_array_equal(one, two)
        worst_ratio(record, feeds, one, error_bound.KERNEL) if one.size else None


def test_a_result_is_written_over_its_input(fused):
    """Four in a row and a sum need one tensor of memory beside x; with a result beside its input it would be two."""
    names = ["x", "a", "b", "c", "d"]
    nodes = [helper.make_node("tanh", [i], [o], domain=DOMAIN) for i, o in itertools.pairwise(names)]
    nodes.append(helper.make_node("ReduceSum", ["d", "axis"], ["y"], keepdims=0))
    axis = onnx.numpy_helper.from_array(np.array([1]), "axis")
    x = np.random.default_rng(0).normal(size=(4096, 4096)).astype(np.float32)
    shapes = {"x": x.shape, "y": [len(x)]}
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    model = helper.make_model(
        helper.make_graph(nodes, "chain", values[:1], values[1:], [axis]),
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)],
        ir_version=IR_VERSION,
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    library.register(options, fused)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    process = psutil.Process()
    before = process.memory_info().rss
    (y,) = session.run(None, {"x": x})
    assert 0.9 < (process.memory_info().rss - before) / x.nbytes < 1.5
    row = x[7].astype(np.float64)
    assert y[7] == pytest.approx(np.tanh(np.tanh(np.tanh(np.tanh(row)))).sum(), abs=1e-3)


def test_the_gate_tells_a_kernel_of_another_formula(fused):
    """A library whose `gelu` is the tanh form, under the digest of the erf form, misses the bound."""
    record = get("gelu")
    feeds = probes(record, np.random.default_rng(0))
    with pytest.raises(GateFailed, match="activation 'gelu' misses parity at"):
        worst_ratio(record, feeds, run(one_node(get("gelu_tanh")), feeds, fused), error_bound.KERNEL)
    assert check_activation(record, onnx_function("gelu", trace(record)), np.random.default_rng(0), fused) <= 1


# --- the graph ------------------------------------------------------------------------------------------------------


def optimized(model: onnx.ModelProto, tmp_path: Path, fused=None) -> list[str]:
    """The operators that run, after ONNX Runtime's own fusions."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    if fused:
        library.register(options, fused)
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]


@pytest.mark.parametrize("name", ["swiglu", "gelu"])
def test_shape_inference_keeps_the_fusions_that_follow(fused, tmp_path, name: str):
    """MatMul + Add behind a fused node becomes Gemm without any value_info: our node says its shape."""
    record = get(name)
    rng, width = np.random.default_rng(0), 16 if record.gated else 8
    weights = [
        onnx.numpy_helper.from_array(rng.normal(size=s).astype(np.float32), n) for n, s in (("w", (8, 4)), ("b", (4,)))
    ]
    graph = helper.make_graph(
        [
            helper.make_node(name, ["x"], ["h"], domain=DOMAIN),
            helper.make_node("MatMul", ["h", "w"], ["p"]),
            helper.make_node("Add", ["p", "b"], ["y"]),
        ],
        "ffn",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", width])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", 4])],
        weights,
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(
        graph, functions=[onnx_function(name, trace(record))], opset_imports=opsets, ir_version=IR_VERSION
    )
    assert optimized(model, tmp_path, fused) == [name, "Gemm"]
    assert name not in optimized(model, tmp_path)


# --- what is refused at the door ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "biased", "feeds", "says"),
    [
        ("swiglu", False, {"x": (2, 7)}, r"swiglu: the last dimension of x is odd in \[2, 7\]; it must be 2H"),
        ("biased_swiglu", True, {"x": (2, 8), "bias": (4,)}, r"bias has shape \[4\]; it must be \[8\]"),
        ("biased_gelu", True, {"x": (2, 8), "bias": (2, 8)}, r"biased_gelu: bias has shape \[2, 8\]; it must be \[8\]"),
        ("gelu", False, {"x": ()}, "gelu: x has 0 dimensions; it must have 1 to 16, the last of them H"),
        ("gelu", False, {"x": (1,) * 17}, "gelu: x has 17 dimensions"),
        ("swish", False, {"x": (2, 8), "learned.beta": (2,)}, r"learned scalar 1 has shape \[2\]; it must be \[1\]"),
        ("swish", False, {"x": (2, 8), "learned.beta": (0,)}, r"learned scalar 1 has shape \[0\]"),
    ],
)
def test_a_wrong_shape_is_an_error_that_names_it(fused, name: str, biased: bool, feeds: dict, says: str):
    record = get(name.removeprefix("biased_"))
    arrays = {key: np.zeros(shape, np.float32) for key, shape in feeds.items()}
    with pytest.raises(Exception, match=says):
        run(one_node(record, None, biased), arrays, fused)


def test_mixed_types_are_refused_when_the_session_opens(fused):
    model = onnx.load_from_string(one_node(get("gelu"), None, biased=True))
    model.graph.input[1].type.tensor_type.elem_type = TensorProto.FLOAT16
    with pytest.raises(Exception, match=r"bias|Type"):
        run(model.SerializeToString(), {}, fused)
