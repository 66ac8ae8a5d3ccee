"""Where a bundle's nodes run: read right, held against ONNX Runtime's own profile, refused by name, drawn."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cuda_kernels
import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import ACTUARY, TINY
from fastapi.testclient import TestClient
from onnx import TensorProto, helper
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from actuary import BadInput
from export import audit, bundle, onnx_file
from export.audit import CPU, CUDA, Assigned, audit_of, check_file, check_placement, foreseen_on_cuda
from export.bundle import read_manifest
from export.exporter import Checkpoint, export_bundle
from export.graph import build
from export.graph_parts import ORT
from export.inspection import NO_BLOCK, WIDTH, Inspection, draw_block, in_a_line, inspect_bundle
from export.ops import library
from service.app import create_app
from service.runtime import Runtime
from service.settings import Settings

NOWHERE = Path("/nowhere")


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Callable) -> Path:
    """A bundle of each kind: both flavours, float32 as it was before the cache, int8, an activation over the hidden
    axis, one layer, other families."""
    out = tmp_path_factory.mktemp("kinds")
    for flavor in ("ort", "portable"):
        export_bundle(tiny_checkpoint("swiglu"), out, f"swiglu-{flavor}", flavor=flavor)
    for precision in ("int8", "fp16", "bf16"):
        export_bundle(tiny_checkpoint("swiglu"), out, f"swiglu-{precision}", precision=precision)
    export_bundle(tiny_checkpoint("solu"), out, "solu")
    export_bundle(tiny_checkpoint("mish", layers=1), out, "one-layer")
    for name, before, made in (
        ("swiglu-ort", "swiglu-before", tiny_checkpoint("swiglu")),
        ("one-layer", "one-before", tiny_checkpoint("mish", layers=1)),
    ):
        uncached = build(made.decoder, "ort")
        changed(out / name, out / before, lambda model, to=uncached: model.CopyFrom(to), name=before)
    shape = {"vocab_size": TINY["vocab_size"], "bos_token_id": 0, "eos_token_id": 0}
    llama = LlamaForCausalLM(
        LlamaConfig(
            **shape, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=32,
        )
    )  # fmt: skip
    gpt2 = GPT2LMHeadModel(GPT2Config(**shape, n_positions=32, n_embd=32, n_layer=2, n_head=2))
    for name, model in (("llama", llama), ("gpt2", gpt2)):
        tokenizer = tiny_checkpoint("gelu").tokenizer_json
        export_bundle(Checkpoint(name, model.eval(), tokenizer, quality=None), out)
    return out


KINDS = (
    "swiglu-ort", "swiglu-portable", "swiglu-before", "swiglu-int8", "swiglu-fp16", "solu", "one-layer", "one-before",
    "llama", "gpt2",
)  # fmt: skip
CACHED = {"swiglu-ort", "swiglu-int8", "solu", "one-layer", "llama", "gpt2"}


def inspected(folder: Path, ops: Path = NOWHERE, loaded: bool = True) -> Inspection:
    return inspect_bundle(folder, read_manifest(folder), "cpu", ops, loaded)


def changed(folder: Path, to: Path, change: Callable[[onnx.ModelProto], object] = id, **manifest: object) -> Path:
    """A copy of the bundle with another graph or manifest, signed as by somebody who knows how."""
    shutil.copytree(folder, to)
    model = onnx.load(to / bundle.MODEL)
    change(model)
    onnx.save(model, to / bundle.MODEL)
    stated = json.loads((to / bundle.MANIFEST).read_text())
    stated["files"][bundle.MODEL] = hashlib.sha256((to / bundle.MODEL).read_bytes()).hexdigest()
    (to / bundle.MANIFEST).write_text(json.dumps({**stated, **manifest}))
    return to


def of_opset(version: int, domain: str = "") -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        next(entry for entry in model.opset_import if entry.domain == domain).version = version

    return change


def of_ir_version(version: int) -> Callable[[onnx.ModelProto], None]:
    return lambda model: setattr(model, "ir_version", version)


def standard(model: onnx.ModelProto) -> None:
    """The activation as one standard operator, as the exporter may write one that is faster."""
    for node in model.graph.node:
        if node.domain == bundle.DOMAIN and node.op_type not in bundle.STRUCTURAL:
            node.domain, node.op_type = "", "Relu"
    for function in list(model.functions):
        if function.name not in bundle.STRUCTURAL:
            model.functions.remove(function)


# --- the file -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_a_file_is_read_as_onnx_reads_it(kinds: Path, tmp_path: Path, name: str):
    """Ours, as onnx wrote it, and as ONNX Runtime writes it."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "saved.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(kinds / name / bundle.MODEL, options, providers=[CPU])
    for path in (kinds / name / bundle.MODEL, tmp_path / "saved.onnx"):
        got, model = onnx_file.read(path), onnx.load(path)
        assert got.ir_version == model.ir_version
        assert got.opsets == {entry.domain: entry.version for entry in model.opset_import}
        assert got.weights == {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
        assert [(n.op_type, n.name, n.domain, n.inputs, n.outputs) for n in got.nodes] == [
            (n.op_type, n.name, n.domain, tuple(n.input), tuple(n.output)) for n in model.graph.node
        ]
        casts = [a.i for n in model.graph.node if n.op_type == "Cast" for a in n.attribute if a.name == "to"]
        assert [n.to for n in got.nodes if n.op_type == "Cast"] == casts


def profiled(path: Path, ops: Path | None = None, optimized: bool = True) -> list[dict[str, Any]]:
    """What a run of the model says of each node that ran."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.enable_profiling = True
    options.profile_file_prefix = str(path.parent / "profile")
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if ops:
        library.register(options, library.find(ops))
    session = onnxruntime.InferenceSession(path, options, providers=[CPU])
    ids = np.array([[1, 2, 3], [4, 5, 0]])
    session.run(None, {bundle.INPUT_IDS: ids, bundle.LENGTHS: np.array([3, 2]), bundle.TOP_K: np.array([2])})
    written = Path(session.end_profiling())
    events = json.loads(written.read_text())
    written.unlink()
    return [event for event in events if event["cat"] == "Node" and event["name"].endswith("_kernel_time")]


@pytest.mark.parametrize("name", ["swiglu-ort", "swiglu-portable", "swiglu-before", "one-layer", "llama", "gpt2"])
def test_floating_point_work_is_what_reads_floats_when_it_runs(kinds: Path, name: str):
    """Of the graph's nodes, and of those that come out of the functions of the cache's attention."""
    file = onnx_file.read(kinds / name / bundle.MODEL)
    ours = {node.name: file.works_on_floats(node) for node in file.nodes} | file.inside
    seen: dict[str, set[bool]] = {}
    for event in profiled(kinds / name / bundle.MODEL, optimized=False):
        node = re.sub("^_inlfunc_.*_(?=CachedAttention)", "", event["name"].removesuffix("_kernel_time"))
        if event["args"]["op_name"] not in onnx_file.SIZES:  # which reads floats, and not their values
            seen.setdefault(node, set()).add("float" in str(event["args"]["input_type_shape"]))
    both = ours.keys() & seen.keys()
    assert len(both) > (120 if name in CACHED else 60)
    assert {name: {ours[name]} for name in both} == {name: seen[name] for name in both}
    assert {"Shape", "Range"} <= {n.op_type for n in file.nodes if not ours[n.name]}
    assert bool(file.inside) == (name in CACHED)


def test_a_function_that_works_on_floats_in_one_call_does(tmp_path: Path):
    """What a body does is known from what its calls are given, those of other functions too."""
    head = '<ir_version: 10, opset_import: ["": 20, "x": 1]>'
    inner = '<domain: "x", opset_import: ["": 20]> Inner (a) => (b) { b = Add (a, a) }'
    outer = '<domain: "x", opset_import: ["": 20, "x": 1]> Outer (a, c) => (b, s) { s = Shape (a) b = x.Inner (c) }'
    for call, works in (("Outer (f, i)", False), ("Outer (i, f)", True)):
        graph = f"g (int64[2] i) => (int64[1] s) <float[2] f = {{1, 2}}> {{ once = x.Inner (i) y, s = x.{call} }}"
        model = onnx.parser.parse_model(f"{head} {graph}")
        for text in (inner, outer):
            function = onnx.parser.parse_function(text)
            for node in function.node:
                node.name = f"{function.name}:{node.output[0]}"
            model.functions.append(function)
        onnx.save(model, tmp_path / bundle.MODEL)
        assert onnx_file.read(tmp_path / bundle.MODEL).inside == {
            "Inner:b": works, "Outer:s": False, "Outer:b": works
        }  # fmt: skip


def test_what_was_made_of_floats_counts_as_floating_point_work(kinds: Path, tmp_path: Path):
    """An integer product is no shape arithmetic."""
    inlined = onnx.inliner.inline_local_functions(onnx.load(kinds / "swiglu-int8" / bundle.MODEL))
    onnx.save(inlined, tmp_path / bundle.MODEL)
    file = onnx_file.read(tmp_path / bundle.MODEL)
    products = [node for node in file.nodes if node.op_type == "MatMulInteger"]
    assert products
    assert all(map(file.works_on_floats, products))


def test_what_is_no_model_is_refused(kinds: Path, tmp_path: Path):
    whole = (kinds / "solu" / bundle.MODEL).read_bytes()
    path = tmp_path / "model.onnx"
    for content in (b"", b"{}", b"\xff" * 40, *(whole[: len(whole) * n // 20] for n in range(20))):
        path.write_bytes(content)
        with pytest.raises(BadInput, match=r"no whole ONNX model .* export it again"):
            onnx_file.read(path)
    with pytest.raises(BadInput, match="cannot be read"):
        onnx_file.read(tmp_path / "absent.onnx")


# --- what became of it ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_the_audit_lists_the_nodes_that_run(kinds: Path, fused: library.Library, name: str):
    for ops in (None, fused.path.parent):
        found = inspected(kinds / name, ops or NOWHERE)
        ran = Counter(
            (event["args"]["op_name"], event["args"]["provider"])
            for event in profiled(kinds / name / bundle.MODEL, ops)
        )
        assert Counter((node.op_type, node.provider) for node in found.audit.nodes) == ran
        assert found.audit.counts == {CPU: ran.total()}
        assert found.audit.fallen == ()


@pytest.mark.parametrize("name", ["swiglu-ort", "swiglu-portable", "swiglu-int8", "swiglu-fp16", "one-layer"])
def test_what_is_ours_is_fused_where_its_kernel_is_and_inlined_where_not(kinds: Path, fused: library.Library, name):
    folder, manifest = kinds / name, read_manifest(kinds / name)
    blocks, int8 = manifest.layers, "int8" in name
    expected = Counter({manifest.activation: blocks})
    if name in CACHED:
        expected |= Counter({"CachedAttention": blocks - 1, "CachedAttentionOfRows": 1})
    for ops, runs in ((fused.path.parent, "fused"), (NOWHERE, "inlined")):
        found = inspected(folder, ops)
        assert found.audit.activation == runs
        assert found.audit.attention == (runs if name in CACHED else None)
        assert found.audit.products == (runs if int8 else None)
        assert bool(found.unfused) == (runs == "inlined")
        ours = Counter(node.op_type for node in found.audit.nodes if node.domain == bundle.DOMAIN)
        products = sum(ours.pop(name, 0) for name in bundle.PRODUCTS)
        assert ours == (expected if runs == "fused" else Counter())
        # qkv, of the last block q and kv; out, up, down; and the head
        assert products == (4 * blocks + 2 if runs == "fused" and int8 else 0)


def test_the_one_may_run_fused_and_the_other_not(kinds: Path):
    """A session on CUDA has the activation's kernel and not the attention's."""
    file = onnx_file.read(kinds / "swiglu-ort" / bundle.MODEL)
    kept = [Assigned(n.name, n.domain, n.op_type, CUDA) for n in file.nodes if n.op_type not in bundle.ATTENTION]
    found = audit_of(kept, file, "fp32", CUDA)
    assert (found.activation, found.attention, found.products) == ("fused", "inlined", None)
    kept = [Assigned(n.name, n.domain, n.op_type, CPU) for n in file.nodes if n.op_type != "swiglu"]
    found = audit_of(kept, file, "fp32", CPU)
    assert (found.activation, found.attention, found.products) == ("inlined", "fused", None)


def test_attention_and_int8_products_run_fused_where_the_activation_never_does(
    fused: library.Library, tmp_path: Path, tiny_checkpoint: Callable
):
    """The library is registered for them alone; and not where it has another formula of the activation."""
    folder, _ = export_bundle(tiny_checkpoint("solu"), tmp_path, precision="int8")
    found = inspected(folder, fused.path.parent)
    assert (found.audit.activation, found.audit.attention, found.audit.products) == ("inlined", "fused", "fused")
    assert sum(node.op_type in bundle.PRODUCTS for node in found.audit.nodes) == 10
    opened = Runtime("cpu", 1, fused.path.parent).open(folder / bundle.MODEL, read_manifest(folder).activation_info)
    assert (
        audit.audit(opened, onnx_file.read(folder / bundle.MODEL), "int8").nodes
        == inspected(folder, fused.path.parent, loaded=False).audit.nodes
    )
    assert fused.fits("solu", "any", cuda=False)
    assert fused.fits("gelu", fused.activations["gelu"], cuda=False)
    assert not fused.fits("gelu", "another", cuda=False)
    assert not fused.fits("gelu", "", cuda=False)
    assert not fused.fits("solu", "any", cuda=True)


def test_an_activation_over_the_hidden_axis_is_never_fused(kinds: Path, fused: library.Library):
    found = inspected(kinds / "solu", fused.path.parent)
    assert found.audit.activation == "inlined"
    assert "never fuses" in found.unfused


def test_an_activation_written_as_a_standard_operator_is_neither(kinds: Path, fused: library.Library, tmp_path: Path):
    folder = changed(kinds / "one-layer", tmp_path / "relu", standard)
    for ops in (fused.path.parent, NOWHERE):
        assert inspected(folder, ops).audit.activation == "standard"


@pytest.fixture(scope="module")
def cuda_kernels_here(tmp_path_factory: pytest.TempPathFactory) -> list[cuda_kernels.Kernel]:
    if CUDA not in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime was built without CUDA")
    if missing := [program for program in ("cc", "readelf") if not shutil.which(program)]:
        pytest.skip(f"no {missing[0]}")
    return cuda_kernels.listed(tmp_path_factory.mktemp("kernels"))


def test_what_is_not_refused_on_cuda_has_its_kernels_there(kinds: Path, cuda_kernels_here: list[cuda_kernels.Kernel]):
    """Every operator, those of the functions too, of the types that it is given; and what is refused has not."""
    for name in (*KINDS, "swiglu-bf16"):
        model = onnx.load(kinds / name / bundle.MODEL)
        precision = read_manifest(kinds / name).precision
        refused = foreseen_on_cuda(onnx_file.read(kinds / name / bundle.MODEL), precision)
        assert bool(cuda_kernels.missing(model, cuda_kernels_here)) == bool(refused), name
    before = onnx.load(kinds / "swiglu-before" / bundle.MODEL)
    assert cuda_kernels.missing(before, cuda_kernels_here) == {"GroupQueryAttention"}


# --- what must be refused -------------------------------------------------------------------------------------------


def placed(file: onnx_file.OnnxFile, on_cpu: Callable[[onnx_file.Node], bool]) -> list[Assigned]:
    """An assignment as a CUDA session would have it."""
    return [Assigned(n.name, n.domain, n.op_type, CPU if on_cpu(n) else CUDA) for n in file.nodes]


def fallen(file: onnx_file.OnnxFile, on_cpu: Callable[[onnx_file.Node], bool], precision: str = "fp32") -> str:
    """What a CUDA session with these nodes on the CPU is refused with; empty where it is not."""
    found = audit_of(placed(file, on_cpu), file, precision, CUDA)
    assert bool(found.notes) == bool(found.fallen)  # where it is not refused, it is said
    try:
        check_placement(found)
    except BadInput as refusal:
        return str(refusal)
    return ""


def test_shapes_and_ids_may_stay_on_the_cpu(kinds: Path):
    for name in KINDS:
        file = onnx_file.read(kinds / name / bundle.MODEL)
        assert fallen(file, lambda node: False) == ""
        assert fallen(file, lambda node, file=file: not file.works_on_floats(node)) == ""


def test_floating_point_work_on_the_cpu_is_refused_with_what_helps(kinds: Path):
    file = onnx_file.read(kinds / "swiglu-before" / bundle.MODEL)

    def on_cpu(*operators: str, precision: str = "fp32") -> str:
        return fallen(file, lambda node: node.op_type in operators, precision)

    attention = on_cpu("GroupQueryAttention")
    (name,) = (node.name for node in file.nodes if node.op_type == "GroupQueryAttention")
    assert "1 node works on floating-point numbers on the CPU" in attention
    assert name in attention
    assert "export it again, also with --precision fp16" in attention
    assert "--provider auto" in attention
    half = on_cpu("GroupQueryAttention", precision="fp16")
    assert "--flavor portable" in half
    assert "fp16" not in half
    norms = on_cpu("SkipSimplifiedLayerNormalization")
    assert "--flavor portable" in norms
    assert "fp16" not in norms
    assert "and 1 more" in norms  # 4 nodes, of which three are named
    assert "actuary ops build --cuda" in on_cpu("swiglu")
    assert "--provider cpu" in on_cpu("MatMul", "GroupQueryAttention")
    assert "--flavor" not in on_cpu("MatMul", "GroupQueryAttention")


def test_what_came_out_of_a_function_or_a_fusion_is_floating_point_work(kinds: Path):
    file = onnx_file.read(kinds / "swiglu-ort" / bundle.MODEL)
    inlined = [*placed(file, lambda node: False), Assigned("", "", "Sigmoid", CPU)]
    assert [node.op_type for node in audit_of(inlined, file, "fp32", CUDA).fallen] == ["Sigmoid"]
    product = next(node.name for node in file.nodes if node.op_type == "MatMul")
    joined = [Assigned(f"{product}/MatMulAddFusion", "", "Gemm", CPU)]
    assert [node.op_type for node in audit_of(joined, file, "fp32", CUDA).fallen] == ["Gemm"]
    squeeze = next(node.name for node in file.nodes if node.op_type == "Squeeze")
    assert not audit_of([Assigned(f"{squeeze}/Fused", "", "Squeeze", CPU)], file, "fp32", CUDA).fallen


def test_shapes_and_ids_in_the_function_of_attention_are_none(kinds: Path):
    """Told from its floating-point work by their names, which ONNX Runtime keeps when it inlines."""
    file = onnx_file.read(kinds / "swiglu-ort" / bundle.MODEL)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry(audit.RECORD, "1")
    session = onnxruntime.InferenceSession(kinds / "swiglu-ort" / bundle.MODEL, options, providers=[CPU])
    told = [node for part in session.get_provider_graph_assignment_info() for node in part.get_nodes()]
    inlined = [Assigned(n.name, n.domain, n.op_type, CPU) for n in told if n.name.startswith("_inlfunc_")]
    fallen = audit_of(inlined, file, "fp32", CUDA).fallen
    of = [Counter(node.op_type for node in nodes) for nodes in (inlined, fallen)]
    blocks = 2
    assert [count["Softmax"] for count in of] == [blocks, blocks]
    assert [count["MatMul"] for count in of] == [2 * blocks, 2 * blocks]
    assert [count["ScatterND"] for count in of] == [1, 1]
    for operator in ("Shape", "Range", "Min", "Less", "GreaterOrEqual", "Expand", "ConstantOfShape"):
        assert (of[0][operator] > 0, of[1][operator]) == (True, 0)
    assert 0 < of[1]["Gather"] < of[0]["Gather"] + 1
    unknown = [Assigned("_inlfunc_CachedAttention_CachedAttention:other", "", "Min", CPU)]
    assert len(audit_of(unknown, file, "fp32", CUDA).fallen) == 1


def test_a_node_keeps_its_provider_through_the_last_fusions(kinds: Path):
    """The saved graph has other nodes than were assigned; those without a name count as the slowest of their type."""
    found = inspected(kinds / "swiglu-before")
    file = onnx_file.read(kinds / "swiglu-before" / bundle.MODEL)
    assigned = placed(file, lambda node: node.op_type in ("GroupQueryAttention", "Shape"))
    assigned += [Assigned("", "", "Sigmoid", CUDA), Assigned("", "", "Sigmoid", CPU), Assigned("", "", "Mul", CUDA)]
    again = audit_of(assigned, file, "fp32", CUDA, found.graph)
    assert {node.op_type for node in again.fallen} == {"GroupQueryAttention", "Sigmoid"}
    on_cpu = {node.op_type for node in again.nodes if node.provider == CPU}
    assert on_cpu == {"GroupQueryAttention", "Shape", "Sigmoid"} & {node.op_type for node in again.nodes}
    assert "GroupQueryAttention" in on_cpu


def test_what_is_known_to_keep_a_graph_from_cuda_is_foreseen(kinds: Path):
    def foreseen(name: str, precision: str = "fp32") -> str:
        return foreseen_on_cuda(onnx_file.read(kinds / name / bundle.MODEL), precision)

    assert "GroupQueryAttention" in foreseen("swiglu-before")
    assert foreseen("swiglu-ort") == ""
    assert foreseen("swiglu-fp16", "fp16") == ""
    assert foreseen("swiglu-portable") == ""
    assert "no CUDA kernel" in foreseen("swiglu-int8", "int8")


def test_the_line_at_export_says_all_of_it(kinds: Path, fused: library.Library):
    def line(name: str, ops: Path = NOWHERE) -> str:
        return in_a_line(kinds / name, read_manifest(kinds / name), ops)

    assert "swiglu inlined (there are no fused operators in /nowhere); on CUDA: refused" in line("swiglu-before")
    assert "swiglu inlined (there are no fused operators in /nowhere); on CUDA: not tried" in line("swiglu-ort")
    assert "swiglu fused; on CUDA: not tried, nothing known against it" in line("swiglu-portable", fused.path.parent)
    assert "fp16 runs on the CPU through casts" in line("swiglu-fp16")
    assert line("swiglu-bf16").startswith("not run here: bf16 has no kernels on the CPU; checked ")


def test_the_newest_versions_are_those_that_onnxruntime_opens():
    def opens(ir_version: int, **opsets: int) -> bool:
        name = "QuickGelu" if ORT in opsets else "Relu"
        value = [helper.make_tensor_value_info(x, TensorProto.FLOAT, [1]) for x in "xy"]
        node = helper.make_node(name, ["x"], ["y"], domain=ORT if ORT in opsets else "")
        imports = [helper.make_opsetid(domain, version) for domain, version in {"": 20, **opsets}.items()]
        graph = helper.make_graph([node], "g", value[:1], value[1:])
        model = helper.make_model(graph, opset_imports=imports, ir_version=ir_version)
        onnxruntime.set_default_logger_severity(4)
        try:
            onnxruntime.InferenceSession(model.SerializeToString(), providers=[CPU])
        except Exception:
            return False
        return True

    assert (opens(audit.NEWEST_IR), opens(audit.NEWEST_IR + 1)) == (True, False)
    for domain in ("", ORT):
        newest = audit.NEWEST_OPSETS[domain]
        assert (opens(10, **{domain: newest}), opens(10, **{domain: newest + 1})) == (True, False)


def test_the_cpu_has_no_kernels_for_bfloat16_and_has_them_for_float16():
    """What `cannot_run` takes for granted."""
    for element, runs in ((TensorProto.BFLOAT16, False), (TensorProto.FLOAT16, True)):
        value = [helper.make_tensor_value_info(x, element, [2, 2]) for x in "xy"]
        graph = helper.make_graph([helper.make_node("MatMul", ["x", "x"], ["y"])], "g", value[:1], value[1:])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        name = {TensorProto.BFLOAT16: "bf16", TensorProto.FLOAT16: "fp16"}[element]
        assert bool(audit.cannot_run(name, CPU)) == (not runs)
        if runs:
            onnxruntime.InferenceSession(model.SerializeToString(), providers=[CPU])
        else:
            with pytest.raises(Exception, match="NOT_IMPLEMENTED"):
                onnxruntime.InferenceSession(model.SerializeToString(), providers=[CPU])


NEWER = {
    "opset": (of_opset(99), {}, "opset of ai.onnx is 99, onnxruntime here takes up to 26"),
    "opset of ONNX Runtime's": (of_opset(2, ORT), {}, "opset of com.microsoft is 2"),
    "opset of ours": (of_opset(2, bundle.DOMAIN), {}, "opset of ai.actuary is 2"),
    "IR version": (of_ir_version(99), {}, "IR version is 99, onnxruntime here takes up to 13"),
    "manifest's opset": (id, {"opset": 99}, "the manifest says opset 99, its graph is of 20"),
    "precision": (id, {"precision": "bf16"}, "bf16 has no kernels on the CPU; serve it with --provider cuda"),
}


@pytest.mark.parametrize(("change", "manifest", "words"), NEWER.values(), ids=NEWER.keys())
def test_a_bundle_that_the_runtime_cannot_run_is_refused_and_the_others_serve(
    bundles: Path, tmp_path: Path, change: Callable, manifest: dict, words: str
):
    shutil.copytree(bundles / "gelu", tmp_path / "gelu")
    changed(bundles / "swiglu", tmp_path / "swiglu", change, **manifest)
    with TestClient(create_app(Settings(bundles=tmp_path, provider="cpu", threads=1))) as client:
        ready = client.get("/health/ready").json()
        assert ready["variants"] == ["gelu"]
        (refused,) = ready["refused"]
        assert refused["name"] == "swiglu"
        assert words in refused["reason"]
    with pytest.raises(BadInput) as told:
        inspected(tmp_path / "swiglu")
    assert words in str(told.value)


def test_an_opset_older_than_ours_is_no_reason(kinds: Path):
    file = onnx_file.read(kinds / "solu" / bundle.MODEL)
    check_file(file, 20)
    with pytest.raises(BadInput, match="one of the two was changed"):
        check_file(file, 19)


# --- the service ----------------------------------------------------------------------------------------------------


@pytest.fixture
def attention_falls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sessions say what a CUDA session is thought to say: all on the device, but for GroupQueryAttention."""

    def pretended(session: Any, file: onnx_file.OnnxFile, precision: str) -> audit.Audit:
        return audit_of(placed(file, lambda node: node.op_type == "GroupQueryAttention"), file, precision, CUDA)

    monkeypatch.setattr("service.variant.audit", pretended)


@pytest.mark.usefixtures("attention_falls")
def test_cuda_by_name_refuses_what_fell_to_the_cpu_and_serves_what_did_not(
    kinds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Runtime, "strict", True)
    for name in ("swiglu-before", "swiglu-ort"):
        shutil.copytree(kinds / name, tmp_path / name)
    with TestClient(create_app(Settings(bundles=tmp_path, provider="cpu", threads=1))) as client:
        listed = client.get("/v1/models").json()
    assert [model["id"] for model in listed["data"]] == ["swiglu-ort"]
    assert listed["data"][0]["provider"] == CUDA
    assert listed["data"][0]["audit"]["notes"] == []
    (refused,) = listed["refused"]
    assert "GroupQueryAttention" in refused["reason"]
    assert "export it again, also with --precision fp16" in refused["reason"]


@pytest.mark.usefixtures("attention_falls")
def test_auto_serves_it_and_says_so(kinds: Path, capfd: pytest.CaptureFixture[str]):
    from service.server import _announce

    app = create_app(Settings(bundles=kinds / "swiglu-before", provider="cpu", threads=1))
    with TestClient(app) as client:
        (model,) = client.get("/v1/models").json()["data"]
    (note,) = model["audit"]["notes"]
    assert "GroupQueryAttention" in note
    nodes = len(onnx_file.read(kinds / "swiglu-before" / bundle.MODEL).nodes)
    assert model["audit"]["nodes"] == {CPU: 1, CUDA: nodes - 1}
    _announce(app.state.service, 1)
    assert f"swiglu-before: {note}" in capfd.readouterr().err


def with_cuda(asked: str) -> Runtime:
    """A runtime as on a machine with CUDA."""
    runtime = Runtime("cpu", 1)
    runtime._asked, runtime._cuda = asked, True
    return runtime


def test_int8_goes_to_the_cpu_under_auto_and_is_refused_under_cuda(kinds: Path):
    from service.variant import open_variant
    from service.vocabulary import Vocabulary

    def opened(runtime: Runtime):
        return open_variant(kinds / "swiglu-int8", runtime, lambda path, sha256: Vocabulary(path))

    variant = opened(with_cuda("auto"))
    assert variant.provider == CPU
    assert "int8" in " ".join(variant.audit.notes)
    assert "no CUDA kernel" in " ".join(variant.audit.notes)
    with pytest.raises(BadInput, match=r"int8 .* no CUDA kernel; .*--precision fp16"):
        opened(with_cuda("cuda"))
    assert opened(Runtime("cpu", 1)).audit.notes == ()


def test_a_session_on_cuda_does_without_the_operators_that_are_the_cpus_alone(
    kinds: Path, fused: library.Library, monkeypatch: pytest.MonkeyPatch
):
    """Both who open a bundle; the service on the CPU next, where CUDA does not load, and then with them."""
    if onnxruntime.get_available_providers()[0] != CPU and Path("/dev/nvidia0").exists():
        pytest.skip("CUDA may run here")
    asked: list[bool] = []
    register = library.register

    def recorded(options: Any, ops: library.Library, cuda: bool = False) -> None:
        asked.append(cuda)
        register(options, ops, cuda)

    monkeypatch.setattr(library, "register", recorded)
    folder, with_kernels = kinds / "swiglu-ort", fused.model_copy(update={"cuda": ["90"]})
    runtime = with_cuda("auto")
    runtime.ops = with_kernels
    session = runtime.open(folder / bundle.MODEL, read_manifest(folder).activation_info)
    assert asked == [True, False]
    found = audit.audit(session, onnx_file.read(folder / bundle.MODEL), "fp32")
    assert (found.activation, found.attention) == ("fused", "fused")
    asked.clear()
    monkeypatch.setattr(library, "find", lambda ops: with_kernels)
    monkeypatch.setattr("export.inspection._preload", lambda: None)
    assert inspect_bundle(folder, read_manifest(folder), "auto", NOWHERE).audit.attention == "fused"
    assert asked == [True, False]


def test_float16_on_the_cpu_is_said_and_bfloat16_refused(kinds: Path, tmp_path: Path):
    for precision in ("fp16", "bf16"):
        shutil.copytree(kinds / f"swiglu-{precision}", tmp_path / precision)
    with TestClient(create_app(Settings(bundles=tmp_path, provider="cpu", threads=1))) as client:
        listed = client.get("/v1/models").json()
    (model,), (refused,) = listed["data"], listed["refused"]
    assert model["id"] == "swiglu-fp16"
    assert "fp16 runs on the CPU through casts" in model["audit"]["notes"][0]
    assert "bf16 has no kernels on the CPU" in refused["reason"]
    with pytest.raises(BadInput, match="bf16 has no kernels on the CPU"):
        inspected(kinds / "swiglu-bf16")


@pytest.mark.parametrize("fuse", [True, False])
def test_the_list_of_models_says_how_the_activation_runs(
    kinds: Path, tmp_path: Path, fused: library.Library, fuse: bool
):
    changed(kinds / "one-layer", tmp_path / "standard", standard, name="standard")
    for name in ("swiglu-ort", "solu"):
        shutil.copytree(kinds / name, tmp_path / name)
    ops = fused.path.parent if fuse else NOWHERE
    with TestClient(create_app(Settings(bundles=tmp_path, provider="cpu", threads=1, ops=ops))) as client:
        models = {model["id"]: model for model in client.get("/v1/models").json()["data"]}
    runs = {name: model["audit"]["activation"] for name, model in models.items()}
    assert runs == {"standard": "standard", "swiglu-ort": "fused" if fuse else "inlined", "solu": "inlined"}
    assert models["swiglu-ort"]["audit"]["attention"] == runs["swiglu-ort"]
    assert (models["swiglu-ort"]["unfused"] == "") == fuse
    assert "needs no kernel of ours" in models["standard"]["unfused"]


# --- the drawing ----------------------------------------------------------------------------------------------------


def rows(drawing: str) -> dict[str, str]:
    """Label: operators, of the drawing's rows."""
    found: dict[str, str] = {}
    label = ""
    for line in drawing.splitlines()[2:]:
        if line.startswith("  |   |   "):
            words = line[10:].split("  ")
            label = words[0].strip() or label
            text = " ".join(filter(None, (word.strip() for word in words[1:]))).removesuffix(" CPU")
            found[label] = f"{found[label]} {text}" if label in found else text
    return found


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("fuse", [True, False])
def test_a_block_is_drawn_from_its_nodes(kinds: Path, fused: library.Library, name: str, fuse: bool):
    """Every operator of the drawing is in the graph as often, and the rows are those of a block, in order."""
    folder, manifest = kinds / name, read_manifest(kinds / name)
    found = inspected(folder, fused.path.parent if fuse else NOWHERE)
    drawing = draw_block(found, manifest)
    lines = drawing.splitlines()
    assert len(lines) <= 25
    assert max(map(len, lines)) <= WIDTH
    assert drawing.isascii()
    inside, asked = ("N", "B + E") if name in CACHED else ("B, T", "B")
    assert lines[2] == f"      x [{inside}, {manifest.dim}]"
    assert lines[-1] == f"      x [{asked if manifest.layers == 1 else inside}, {manifest.dim}]"
    labels = ["attention_norm", "qkv", "attention", "out", "ffn_norm", "up", manifest.activation, "down"]
    drawn = rows(drawing)
    assert [label for label in drawn if label in labels] == labels
    assert sum(line.startswith("  '-> +") for line in lines) == 2
    act = drawn[manifest.activation]
    assert act.startswith(f"{found.audit.activation}: ")
    assert (f"{bundle.DOMAIN}::" in act) == (found.audit.activation == "fused")
    there = Counter(node.op_type for node in found.graph.nodes)
    drawn_there = Counter[str]()
    for operators in drawn.values():
        for entry in operators.partition(": ")[2].split(", ") if ": " in operators else operators.split(", "):
            if not entry.startswith("within"):
                operator, *more = entry.split()
                times = next((int(word[1:]) for word in more if word.startswith("x")), 1)
                drawn_there[operator.removeprefix(f"{bundle.DOMAIN}::")] += times
    assert drawn_there <= there
    # The last block alone asks for one row.
    if name not in CACHED:
        assert drawn_there["GatherND"] == (manifest.layers == 1)
    elif found.audit.attention == "fused":
        assert drawn_there["Gather"] == drawn_there["CachedAttentionOfRows"] == (manifest.layers == 1)
        assert drawn_there["CachedAttention"] == (manifest.layers > 1)
    else:
        assert drawn_there["ScatterND"] == (manifest.layers == 1)
        assert drawn_there["Softmax"] >= 1


def test_the_block_in_the_readme_is_one(kinds: Path, fused: library.Library):
    """Of the bundle swiglu-ort as it is drawn today."""
    drawing = draw_block(inspected(kinds / "swiglu-ort", fused.path.parent), read_manifest(kinds / "swiglu-ort"))
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    assert f"```text\n{drawing}\n```" in readme


def test_grouped_queries_and_biases_show(kinds: Path, fused: library.Library):
    llama = rows(draw_block(inspected(kinds / "llama", fused.path.parent), read_manifest(kinds / "llama")))
    assert llama["qkv"] == "MatMul [64x128]"  # 4 query heads and 2 pairs of 16 channels
    assert llama["attention"] == "ai.actuary::CachedAttention"
    assert llama["up"] == "MatMul [64x192]"  # gate and up
    assert llama["down"] == "MatMul [96x64]"
    gpt2 = rows(draw_block(inspected(kinds / "gpt2"), read_manifest(kinds / "gpt2")))
    assert gpt2["qkv"] == "Gemm [32x96]"
    assert gpt2["ffn_norm"] == "SkipLayerNormalization"


def test_flavours_and_precisions_show(kinds: Path, fused: library.Library):
    ort, before, portable, int8 = (
        rows(
            draw_block(inspected(kinds / f"swiglu-{kind}", fused.path.parent), read_manifest(kinds / f"swiglu-{kind}"))
        )
        for kind in ("ort", "before", "portable", "int8")
    )
    assert ort["attention"] == int8["attention"] == "ai.actuary::CachedAttention"
    inlined = rows(draw_block(inspected(kinds / "swiglu-ort"), read_manifest(kinds / "swiglu-ort")))["attention"]
    assert inlined.startswith("Split x4, Reshape x6, ")
    assert inlined.endswith("MatMul x2, Where, Softmax, Compress")
    assert "GroupQueryAttention" in before["attention"]
    assert "Softmax" in portable["attention"]
    assert ort["ffn_norm"] == "SkipSimplifiedLayerNormalization"
    assert portable["ffn_norm"] == "SimplifiedLayerNormalization"
    assert int8["up"] == f"{bundle.DOMAIN}::RmsNormInt8Linear [32x176]"
    solu = rows(draw_block(inspected(kinds / "solu"), read_manifest(kinds / "solu")))["solu"]
    assert solu.startswith("inlined: Softmax, Mul")


def test_another_activation_is_drawn_where_another_stands(kinds: Path, tmp_path: Path):
    folder = changed(kinds / "one-layer", tmp_path / "relu", standard)
    assert rows(draw_block(inspected(folder), read_manifest(folder)))["mish"] == "standard: Relu"


def test_weights_of_other_names_are_not_drawn(kinds: Path, tmp_path: Path):
    def renamed(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            node.input[:] = [name.replace("blocks.0.up", "elsewhere") for name in node.input]
        for tensor in model.graph.initializer:
            tensor.name = tensor.name.replace("blocks.0.up", "elsewhere")

    folder = changed(kinds / "solu", tmp_path / "renamed", renamed)
    assert draw_block(inspected(folder), read_manifest(folder)) == NO_BLOCK


# --- the verb -------------------------------------------------------------------------------------------------------


def actuary(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*ACTUARY, *map(str, arguments)], capture_output=True, text=True, timeout=120)


def test_inspect_prints_the_audit_and_the_block(kinds: Path, fused: library.Library):
    done = actuary("inspect", kinds / "swiglu-ort", "--provider", "cpu", "--ops", fused.path.parent)
    assert done.returncode == 0, done.stderr
    words = " ".join(done.stdout.split())
    assert "activation runs fused: one kernel of ours" in words
    assert "attention runs fused: one kernel of ours" in words
    assert "ai.actuary::swiglu 2" in words
    assert "ai.actuary::CachedAttention 1" in words
    assert "ai.actuary::CachedAttentionOfRows 1" in words
    assert "on CUDA" not in words
    assert draw_block(inspected(kinds / "swiglu-ort", fused.path.parent), read_manifest(kinds / "swiglu-ort")) in (
        done.stdout
    )


def test_inspect_says_what_is_inlined_and_what_cuda_would_refuse(kinds: Path):
    done = actuary("inspect", kinds / "swiglu-ort", "--provider", "cpu", "--ops", NOWHERE)
    assert done.returncode == 0, done.stderr
    words = " ".join(done.stdout.split())
    inlined = "inlined: its function's body, in standard operators; there are no fused operators in /nowhere"
    assert f"activation runs {inlined} attention runs {inlined}" in words
    done = actuary("inspect", kinds / "swiglu-before", "--provider", "cpu", "--ops", NOWHERE)
    words = " ".join(done.stdout.split())
    assert "attention runs" not in words
    assert "com.microsoft::GroupQueryAttention 1" in words
    assert "on CUDA refused: 1 node works on floating-point numbers" in words


def test_inspect_as_json_is_the_manifest_and_the_audit(kinds: Path):
    done = actuary("inspect", kinds / "llama", "--provider", "cpu", "--ops", NOWHERE, "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    found = inspected(kinds / "llama")
    assert {**document, "audit": None} == {**json.loads((kinds / "llama" / bundle.MANIFEST).read_text()), "audit": None}
    assert [node["op_type"] for node in document["audit"]["nodes"]] == [node.op_type for node in found.graph.nodes]
    assert document["audit"]["activation"] == document["audit"]["attention"] == "inlined"
    assert "no fused operators" in document["audit"]["unfused"]


def test_inspect_tells_what_is_in_a_bundle_that_does_not_run_and_ends_with_2(kinds: Path, tmp_path: Path):
    folder = changed(kinds / "solu", tmp_path / "newer", of_opset(99))
    done = actuary("inspect", folder)
    assert done.returncode == 2
    assert "solu" in done.stdout
    assert "opset of ai.onnx is 99" in done.stderr
    as_json = actuary("inspect", folder, "--json")
    assert as_json.returncode == 2
    assert json.loads(as_json.stdout)["audit"] is None


def test_inspect_with_cuda_where_there_is_none_is_refused(kinds: Path):
    if onnxruntime.get_available_providers()[0] != CPU and Path("/dev/nvidia0").exists():
        pytest.skip("CUDA may run here")
    done = actuary("inspect", kinds / "solu", "--provider", "cuda")
    assert done.returncode == 2
    assert "--provider cuda" in done.stderr
    assert "--provider cpu" in done.stderr
