"""The fused operators: every kernel against float64 on every instruction set, what a plain runtime makes of the same
file, every shape that must be refused, every library that must not load, and the build."""

from __future__ import annotations

import ctypes
import functools
import itertools
import json
import os
import platform
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import psutil
import pytest
import torch
from conftest import ACTUARY, serving
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from actuary import ActuaryError, BadInput, GateFailed, cores
from export.bundle import DOMAIN, OPSET, ActivationInfo
from export.catalogue import describe
from export.graph_parts import IR_VERSION
from export.ops import build, error_bound, library
from export.ops.check import (
    SHAPES,
    check_activation,
    check_special,
    one_node,
    probes,
    special_probes,
    worst_ratio,
)
from export.ops.cpp_functor import cpp_functor, literal
from export.ops.onnx_function import onnx_function
from export.ops.trace import VOCABULARY, trace
from models.activations import Activation, get, registry
from models.files import new_folder
from service.runtime import Runtime

FUSED = [name for name, record in registry().items() if trace(record).elementwise]
ISAS = ["x86-64-v4", "x86-64-v3", "x86-64"] if platform.machine() == "x86_64" else [platform.machine()]


def run(model: bytes, feeds: dict, fused=None, threads: int = 1) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    if fused:
        library.register(options, fused)
    (y,) = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"]).run(None, feeds)
    return y


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
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
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


def copied(fused, folder: Path, **changes) -> Path:
    """The library in a folder of its own, its record changed."""
    folder.mkdir()
    shutil.copy(fused.path, folder)
    record = {**fused.model_dump(mode="json"), **changes}
    (folder / library.RECORD).write_text(json.dumps(record))
    return folder


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"ops_version": 99}, f"of version 99, where this is {library.OPS_VERSION}"),
        ({"ort_api": 17}, "for ONNX Runtime's interface 17, where this is 24"),
        ({"machine": "sparc"}, "for the processor 'sparc', where this is"),
        ({"system": "darwin"}, "for the system 'darwin', where this is 'linux'"),
        ({"sha256": "0" * 64}, "with the sha256"),
        ({"activations": 3}, "are damaged"),
    ],
)
def test_a_library_that_does_not_fit_is_refused_with_the_remedy(fused, tmp_path, changes: dict, says: str):
    with pytest.raises(BadInput, match=f"{says}.*build it with: actuary ops build"):
        library.find(copied(fused, tmp_path / "ops", **changes))


def test_a_damaged_library_is_refused_and_one_never_built_is_not(fused, tmp_path):
    folder = copied(fused, tmp_path / "ops")
    assert library.find(folder).sha256 == fused.sha256
    binary = folder / library.BINARY
    binary.write_bytes(binary.read_bytes()[:1000])
    with pytest.raises(BadInput, match="with the sha256"):
        library.find(folder)
    binary.unlink()
    with pytest.raises(BadInput, match=r"damaged \(No such file"):
        library.find(folder)
    for text, says in (
        ("{", "Expecting property name"),
        ("{}", "library.json: ops_version: Field required"),
        ("[]", "library.json: Input should be a valid dictionary"),
    ):
        (folder / library.RECORD).write_text(text)
        with pytest.raises(BadInput, match=rf"damaged \({says}.*build it with: actuary ops build"):
            library.find(folder)
    assert library.find(tmp_path / "nothing") is None


def test_a_folder_that_one_may_not_enter_is_refused_in_words(tmp_path, monkeypatch):
    def denied(path: Path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "exists", denied)  # root, who may run this, may enter all
    with pytest.raises(BadInput, match=r"cannot read the fused operators in .*: Permission denied; make it readable"):
        library.find(tmp_path)


def test_a_binary_that_is_no_library_is_refused_in_words(fused, tmp_path):
    (tmp_path / library.BINARY).write_bytes(b"not a library")
    foreign = fused.model_copy(update={"path": tmp_path / library.BINARY})
    with pytest.raises(BadInput, match=r"ONNX Runtime does not load .*actuary ops build"):
        library.register(onnxruntime.SessionOptions(), foreign)


def test_each_failed_registration_hands_out_a_status_of_its_own(fused, tmp_path):
    """ONNX Runtime frees what it is handed: the same status at the second failure would be freed twice."""
    statuses = iter([0x1000, 0x2000])
    create_domain = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: next(statuses))
    api = (ctypes.c_void_p * 415)()
    api[26] = ctypes.cast(create_domain, ctypes.c_void_p)
    get_api = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)(lambda _: ctypes.addressof(api))
    base = (ctypes.c_void_p * 2)(ctypes.cast(get_api, ctypes.c_void_p))
    another = ctypes.CDLL(shutil.copy(fused.path, tmp_path))  # not the copy whose operators are registered
    another.RegisterCustomOps.restype = ctypes.c_void_p
    assert [another.RegisterCustomOps(None, base) for _ in range(2)] == [0x1000, 0x2000]


# --- at run time ----------------------------------------------------------------------------------------------------


def info(name: str, **changes) -> ActivationInfo:
    return describe(get(name)).model_copy(update=changes)


def test_the_library_is_used_for_its_own_formulas_only(fused):
    runtime = Runtime("cpu", 1, fused.path.parent)
    assert runtime.ops is not None
    assert runtime.unfused(info("gelu")) == ""
    assert "formula of 'gelu' is not the bundle's" in runtime.unfused(info("gelu", digest="0" * 12))
    assert "export it again" in runtime.unfused(info("gelu", digest=""))
    assert "has no 'softmax'" in runtime.unfused(info("softmax"))
    assert "has no CUDA kernels" in fused.why_not("gelu", trace(get("gelu")).digest, cuda=True)
    assert fused.model_copy(update={"cuda": ["90"]}).why_not("gelu", trace(get("gelu")).digest, cuda=True) == ""


def test_a_service_without_a_library_says_so_and_one_with_a_damaged_one_does_not_start(fused, bundles, tmp_path):
    runtime = Runtime("cpu", 1, tmp_path / "nothing")
    assert runtime.ops is None
    assert "actuary ops build" in runtime.unfused(info("gelu"))
    folder = copied(fused, tmp_path / "ops", ops_version=99)
    serve = [*ACTUARY, "serve", "--bundles", str(bundles), "--port", "0", "--ops", str(folder)]
    done = subprocess.run(serve, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stderr
    assert "of version 99" in done.stderr
    assert "actuary ops build" in done.stderr


def test_a_served_bundle_runs_fused_and_answers_the_same(fused, bundles):
    import httpx2 as httpx

    def answers(*arguments: str) -> tuple[list[str], list[dict]]:
        with serving(bundles, *arguments) as (url, _):
            body = {"model": "*", "prompt": ["if x is not", "def "], "top_k": 5}
            models = httpx.get(f"{url}/v1/models").json()["data"]
            return [m["unfused"] for m in models], httpx.post(f"{url}/v1/next-token", json=body).json()["results"]

    why, with_ops = answers("--ops", str(fused.path.parent))
    why_not, without = answers("--ops", "/nowhere")
    assert set(why) == {""}
    assert all("never built" in reason for reason in why_not)
    for ours, theirs in zip(with_ops, without, strict=True):
        assert [token["id"] for token in ours["top"]] == [token["id"] for token in theirs["top"]]
        assert [t["logit"] for t in ours["top"]] == pytest.approx([t["logit"] for t in theirs["top"]], abs=1e-4)


# --- the build ------------------------------------------------------------------------------------------------------


def test_nothing_is_compiled_twice(fused, tmp_path, monkeypatch):
    folder = copied(fused, tmp_path / "ops")
    before = (folder / library.BINARY).stat().st_mtime_ns
    monkeypatch.setattr(build, "_compile", lambda *_: pytest.fail("compiled again"))
    again, anew = build.build(folder, cuda=False)
    assert (again.inputs, anew, (folder / library.BINARY).stat().st_mtime_ns) == (fused.inputs, False, before)


def test_another_formula_is_another_library(fused, tmp_path, monkeypatch):
    folder, wanted = copied(fused, tmp_path / "ops"), []
    monkeypatch.setattr(build, "elementwise", lambda: {"silu": trace(get("silu"))})
    monkeypatch.setattr(build, "_compile", lambda *arguments: wanted.append(arguments[4]) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build.build(folder, cuda=False)
    assert wanted != [fused.inputs]
    assert library.find(folder).sha256 == fused.sha256, "a build that fails leaves what was there"


def actuary(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*ACTUARY, *arguments], env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )


def test_without_a_compiler_it_says_what_to_install(tmp_path):
    done = actuary("ops", "build", "--out", str(tmp_path / "ops"), PATH="/nonexistent", CXX="")
    assert done.returncode == 2, done.stderr
    assert "none of c++, g++, clang++ is there; install one" in done.stderr
    assert not (tmp_path / "ops").exists()


@pytest.mark.parametrize("variable", ["CXX", "NVCC"])
def test_a_compiler_with_arguments_is_refused_and_named(tmp_path, monkeypatch, variable: str):
    if not shutil.which("c++"):
        pytest.skip("no C++ compiler")
    monkeypatch.setenv(variable, "ccache c++")
    with pytest.raises(BadInput, match=f"{variable}='ccache c\\+\\+' is not a program on PATH; name one without arg"):
        build.build(tmp_path / "ops")


def test_a_compiler_that_fails_is_quoted_and_nothing_is_left(tmp_path):
    compiler = tmp_path / "broken++"
    compiler.write_text(
        "#!/bin/sh\necho 'broken++ 1.0'\necho 'this line is the reason' >&2\n"
        "case $1 in --version) exit 0;; esac\nexit 3\n"
    )
    compiler.chmod(0o755)
    done = actuary("ops", "build", "--out", str(tmp_path / "ops"), CXX=str(compiler))
    assert done.returncode == 1, done.stderr
    assert "exit code 3" in done.stderr
    assert "this line is the reason" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["broken++"]


@pytest.fixture
def slow_compiler(tmp_path, monkeypatch) -> Path:
    """A compiler that fails at the second file, if told to, and else waits on a process of its own, as real ones do."""
    folder = tmp_path / "compiler"
    (folder / "tmp").mkdir(parents=True)
    (folder / "c++").write_text(
        "#!/bin/sh\ncase $* in *--version*) echo slow 1.0; exit 0;; *probe.cpp*) exit 1;; esac\n"
        f"case $FAIL$* in yes*/attention.cpp*) while [ ! -e {folder}/waiting ]; do sleep 0.1; done; exit 3;; esac\n"
        f"sleep 600 &\necho $! >> {folder}/waiting\nwait\n"
    )
    (folder / "c++").chmod(0o755)
    monkeypatch.setenv("CXX", str(folder / "c++"))
    monkeypatch.setenv("TMPDIR", str(folder / "tmp"))
    return folder


def ended(folder: Path, most: int) -> bool:
    """Whether at most so many compilers were started, and none of them runs."""
    pids = [int(line) for line in (folder / "waiting").read_text().split()]
    alive = [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]
    return 0 < len(pids) <= most and not alive and not list((folder / "tmp").iterdir())


def test_the_first_compile_that_fails_ends_the_others(slow_compiler, tmp_path, monkeypatch):
    monkeypatch.setenv("FAIL", "yes")
    monkeypatch.setattr(build, "cores", lambda: 2)
    monkeypatch.setattr(build.tempfile, "tempdir", str(slow_compiler / "tmp"))
    with pytest.raises(ActuaryError, match="failed with exit code 3"):
        build.build(tmp_path / "ops", cuda=False)
    assert ended(slow_compiler, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["compiler"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_process_alone_ends_its_compilers_and_leaves_nothing(slow_compiler, tmp_path, number):
    command = [*ACTUARY, "ops", "build", "--no-cuda", "--out", str(tmp_path / "ops")]
    # In the background of a shell without job control, as under nohup, SIGINT is ignored, and children inherit that.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heed)
    deadline = time.monotonic() + 60
    while not (slow_compiler / "waiting").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    said = process.communicate(timeout=10)[1]
    assert process.returncode == {signal.SIGINT: 1, signal.SIGTERM: 143}[number], said
    assert "Traceback" not in said
    assert ended(slow_compiler, cores())
    assert [path.name for path in tmp_path.iterdir()] == ["compiler"]


@pytest.mark.parametrize("attempts", [1, 3])
def test_two_builds_at_once_into_one_folder_both_end_and_the_last_stays(tmp_path, monkeypatch, attempts: int):
    """Between the two renames of one, another's folder takes the place, several times over."""
    rename, place = Path.rename, tmp_path / "ops"
    others = iter(range(attempts))

    def late(path: Path, target: Path) -> Path:
        if target == place and next(others, None) is not None:
            place.mkdir()
            (place / "theirs").touch()
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", late)
    with new_folder(place) as folder:
        (folder / "ours").touch()
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["ops", "ops/ours"]


def test_an_editors_file_among_the_sources_changes_nothing(tmp_path, monkeypatch):
    native = shutil.copytree(build.NATIVE, tmp_path / "native")
    monkeypatch.setattr(build, "NATIVE", native)
    tools = build.Toolchain("c++", "1", None, "")
    before = build._hash_of_inputs(tools, {})
    (native / ".cpu.cpp.swp").write_bytes(b"b0VIM\xff\xfe")
    assert build._hash_of_inputs(tools, {}) == before
    (native / "cpu.cpp").write_bytes(b"// \xff")
    assert build._hash_of_inputs(tools, {}) != before


def test_paths_with_brackets_are_printed_as_they_are(fused, tmp_path):
    (tmp_path / "x[").mkdir()
    folder = copied(fused, tmp_path / "x[" / "y]")
    done = actuary("ops", "build", "--no-cuda", "--out", str(folder))
    assert done.returncode == 0, done.stderr
    assert f"{folder}/{library.BINARY}: " in done.stderr


@pytest.fixture(params=["g++", "clang++"])
def compiler(request, monkeypatch) -> str:
    if not shutil.which(request.param):
        pytest.skip(f"no {request.param}")
    monkeypatch.setenv("CXX", request.param)
    return request.param


def test_either_compiler_builds_what_formulas_hold_without_a_warning(compiler, tmp_path, monkeypatch):
    """Minimum and maximum, a tensor that is not read, a step that nothing reads, and what vector.cpp declares. What C++
    does not define, such as a null pointer moved on (which clang looks for), ends the process here."""
    traps = ("-fsanitize=undefined", "-fsanitize-undefined-trap-on-error")
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, *traps))

    def dead(x):
        torch.exp(x)
        return torch.clamp(x, -1, 1)

    records = {
        "one_side": Activation("one_side", lambda gate, up: torch.sigmoid(gate), "gated", "a test"),
        "dead": Activation("dead", dead, "pointwise", "a test"),
        "erf": get("gelu"),
        "mish": get("mish"),
    }
    monkeypatch.setattr(build, "elementwise", lambda: {name: trace(record) for name, record in records.items()})
    built, _ = build.build(tmp_path / "ops", cuda=False, strict=True)
    assert (built.vector_math == "libmvec") <= (compiler == "g++"), "clang has no libmvec to call"
    for name in ("one_side", "dead"):
        feeds = probes(records[name], np.random.default_rng(3))
        worst_ratio(records[name], feeds, run(one_node(records[name]), feeds, built), error_bound.KERNEL)


def test_a_folder_of_other_things_is_not_replaced(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(BadInput, match=r"holds 'thesis.tex', which is none of ours"):
        build.build(tmp_path, cuda=False)


def test_cuda_without_nvcc_is_refused(monkeypatch, tmp_path):
    if not shutil.which("c++"):
        pytest.skip("no C++ compiler")
    done = actuary("ops", "build", "--cuda", "--out", str(tmp_path / "ops"), NVCC="/nonexistent/nvcc")
    assert done.returncode == 2, done.stderr
    assert "NVCC='/nonexistent/nvcc' is not a program on PATH" in done.stderr
    monkeypatch.delenv("NVCC", raising=False)
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    with pytest.raises(BadInput, match="--cuda needs nvcc"):
        build.build(tmp_path / "ops", cuda=True)


def test_a_plain_compiler_without_libmvec_builds_and_is_right(fused, tmp_path, monkeypatch):
    """What clang or another C library leaves: no vector functions, the baseline's instructions, portable float16."""
    monkeypatch.setattr(build, "LIBMVEC_PROBE", "#error no libmvec here")
    monkeypatch.setattr(build, "ISAS", {})
    monkeypatch.setattr(build, "elementwise", lambda: {name: trace(get(name)) for name in ("gelu", "swiglu", "mish")})
    plain, _ = build.build(tmp_path / "ops", cuda=False)
    assert plain.vector_math == "exp, tanh and erf only"
    assert plain.isas == [platform.machine().replace("x86_64", "x86-64")]
    for name, type in itertools.product(plain.activations, ("float32", "float16")):
        feeds = probes(get(name), np.random.default_rng(2), True, type)
        worst_ratio(get(name), feeds, run(one_node(get(name), None, True, type), feeds, plain), error_bound.KERNEL)


def device_code(binary: Path) -> list[tuple[str, int]]:
    """("ptx" or "elf", architecture) of all device code in a library, as cuobjdump lists it.

    A fat binary is a header of magic number, version, its own size and that of the entries; an entry's header begins
    with its kind (1 or 2), and has its own and its code's size at 4 and 8, the architecture at 28.
    """
    data, found, at = binary.read_bytes(), [], 0
    while (at := data.find(struct.pack("<IH", 0xBA55ED50, 1), at)) >= 0:
        header, size = struct.unpack_from("<HQ", data, at + 6)
        entry, at = at + header, at + header + size
        while entry < at:
            kind, _, own, code = struct.unpack_from("<HHIQ", data, entry)
            found.append(({1: "ptx", 2: "elf"}[kind], struct.unpack_from("<I", data, entry + 28)[0]))
            entry += own + code
    return found


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc here: the CUDA half is compiled where it is")
def test_the_cuda_half_compiles_and_loads_without_a_gpu(tmp_path):
    """Every activation for every architecture, 38 s of processor time with the CPU half; PTX of the oldest is for those
    without code of their own. On a machine without CUDA the library loads, and its CPU half runs."""
    both, _ = build.build(tmp_path / "ops", cuda=True)
    assert both.cuda == ["80", "89", "90", "120"]
    assert set(both.activations) == set(FUSED)
    code = device_code(both.path)
    assert {("ptx", 80), *(("elf", int(arch)) for arch in both.cuda)} <= set(code)
    if shutil.which("cuobjdump"):
        command = ["cuobjdump", "-lelf", "-lptx", str(both.path)]
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        named = re.findall(r"sm_(\d+)[a-z]?\.(cubin|ptx)", listed)
        assert sorted(code) == sorted(("elf" if kind == "cubin" else kind, int(arch)) for arch, kind in named)
    needed = subprocess.run(["ldd", both.path], capture_output=True, text=True).stdout
    assert not re.search(r"libcud|not found", needed), (
        "CUDA's runtime is inside, and its driver looked for when it runs"
    )
    feeds = probes(get("swiglu"), np.random.default_rng(2))
    worst_ratio(get("swiglu"), feeds, run(one_node(get("swiglu")), feeds, both), error_bound.KERNEL)


# --- the printed functors -------------------------------------------------------------------------------------------

# One expression for every word of the vocabulary, each of them defined on all of float32.
WORDS = {
    "add sub neg": lambda x: 1 - (-(x + 0.5)),
    "div abs ge": lambda x: torch.where(x >= 0.25, x / (1 + torch.abs(x)), x),
    "gt le lt": lambda x: torch.where(x > 1, x, torch.where(x <= -1, -x, torch.where(x < 0.5, 2 * x, 3 * x))),
    "exp log": lambda x: torch.log(1 + torch.exp(torch.clamp(x, -20, 20))),
    "expm1 log1p": lambda x: torch.log1p(torch.abs(torch.expm1(torch.clamp(x, -30, 30)))),
    "sqrt rsqrt": lambda x: torch.sqrt(torch.abs(x) + 1) * torch.rsqrt(1 + x * x),
    "sin cos atan": lambda x: torch.sin(torch.clamp(x, -3, 3)) * torch.atan(x) + torch.cos(torch.clamp(x, -3, 3)),
    "erf tanh sigmoid": lambda x: torch.erf(x) + torch.tanh(x) * torch.sigmoid(x),
    "relu maximum minimum": lambda x: torch.maximum(torch.relu(x), torch.minimum(0.1 * x, x + 1)),
    "pow where": lambda x: torch.where(x >= 0, torch.pow(torch.abs(x) + 1, 1.7), torch.pow(torch.clamp(x, -9, 9), 3)),
    "softplus mul": lambda x: x * torch.nn.functional.softplus(x) + torch.pow(torch.clamp(x, -9, 9), 4),
}


@pytest.fixture(scope="module")
def words(tmp_path_factory, fused):
    """A library of the expressions above, under the names word_0, word_1, ..."""
    patch = pytest.MonkeyPatch()
    records = {f"word_{i}": Activation(f"word_{i}", e, "pointwise", "a test") for i, e in enumerate(WORDS.values())}
    scalars = lambda x, float=2.0, ü=0.5, mul_0=0.1: float * x + ü * torch.tanh(x) + mul_0  # noqa: E731
    records["word_names"] = Activation("word_names", scalars, "learned", "a test")
    patch.setattr(build, "registry", lambda: records)
    yield records, build.build(tmp_path_factory.mktemp("words") / "ops", cuda=False, strict=True)[0]
    patch.undo()


def test_every_word_of_the_vocabulary_is_said_above():
    said = {step.operation for e in WORDS.values() for step in trace(Activation("w", e, "pointwise", "t")).steps}
    assert said >= VOCABULARY - {"softmax", "mean", "sum"}


@pytest.mark.parametrize("index", [*range(len(WORDS)), "names"])
def test_every_word_compiles_to_what_it_means(words, index):
    records, built = words
    record = records[f"word_{index}"]
    feeds = probes(record, np.random.default_rng(4))
    worst_ratio(record, feeds, run(one_node(record), feeds, built), error_bound.KERNEL)


def test_min_and_max_hand_nan_on_from_either_side(words):
    records, built = words
    record = records[f"word_{[*WORDS].index('relu maximum minimum')}"]
    assert np.isnan(run(one_node(record), {"x": np.array([np.nan] * 17, np.float32)}, built)).all()


def test_explain_shows_the_three_forms():
    shown = actuary("explain", "swish").stdout
    assert 'Sigmoid ("t.0")' in shown
    assert "x / (1.0f + expf(-mul_0))" in shown  # and not 1 / (...), times x
    assert "__device__ float operator()(float x) const" in shown
    forms = json.loads(actuary("explain", "swiglu", "--json").stdout)
    assert forms["cpp"] == cpp_functor("swiglu", trace(get("swiglu")))
    assert (forms["fused"], "__device__" in forms["cuda"], "Split" in forms["onnx"]) == (True, True, True)
    solu = json.loads(actuary("explain", "solu", "--json").stdout)
    assert (solu["fused"], solu["cpp"], solu["cuda"]) == (False, None, None)


def test_a_hidden_axis_has_no_functor():
    with pytest.raises(BadInput, match="'solu' looks at the whole hidden axis: it has no function of one element"):
        cpp_functor("solu", trace(get("solu")))


def test_c_and_cuda_differ_in_a_qualifier_only():
    for name in FUSED:
        on_device = cpp_functor(name, trace(get(name)), cuda=True)
        assert on_device.count("__device__ ") == 2
        assert on_device.replace("__device__ ", "") == cpp_functor(name, trace(get(name)))


@pytest.mark.parametrize(
    ("value", "text"), [(0.1, "0.1f"), (-2.0, "(-2.0f)"), (1e-30, "1e-30f"), (1e300, "INFINITY"), (float("nan"), "NAN")]
)
def test_literals_read_back(value: float, text: str):
    assert literal(value) == text


def test_a_name_that_begins_like_a_biased_operator_is_refused():
    with pytest.raises(BadInput, match="must not begin with 'biased_'"):
        Activation("biased_gelu", lambda x: x, "pointwise", "me")


def test_too_many_learned_scalars_are_refused(monkeypatch):
    def many(x, a=1.0, b=1.0, c=1.0, d=1.0, e=1.0, f=1.0, g=1.0, h=1.0, i=1.0):
        return x * a * b * c * d * e * f * g * h * i

    monkeypatch.setattr(build, "registry", lambda: {"many": Activation("many", many, "learned", "me")})
    with pytest.raises(BadInput, match="'many' has 9 learned scalars; at most 8"):
        build.elementwise()


def test_the_sources_are_part_of_the_package():
    from importlib.resources import files

    assert {path.name for path in files("export.ops").joinpath("native").iterdir()} >= {
        "ort_abi.h", "activation.h", "isa.h", "vector_math.h",
        "op.cpp", "check.cpp", "cpu.cpp", "vector.cpp", "cuda.cu",
    }  # fmt: skip
