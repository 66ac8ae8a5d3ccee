"""Where a bundle's nodes run: held against ONNX Runtime's own profile, refused by name."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import cuda_kernels
import onnx
import onnxruntime
import pytest
from bundle_kinds import CACHED, KINDS, NOWHERE, changed, inspected, of_ir_version, of_opset, placed, profiled, standard
from fastapi.testclient import TestClient
from onnx import TensorProto, helper

from actuary import BadInput
from export import audit, bundle, onnx_file
from export.audit import CPU, CUDA, Assigned, audit_of, check_file, check_placement, foreseen_on_cuda
from export.bundle import read_manifest
from export.exporter import export_bundle
from export.graph_parts import ORT
from export.inspection import in_a_line
from export.ops import library
from service.app import create_app
from service.runtime import Runtime
from service.settings import Settings

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
