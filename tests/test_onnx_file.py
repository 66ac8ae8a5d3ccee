"""Bundles' graphs read without onnx: against onnx's own reading, and against what ran in ONNX Runtime's profile."""

from __future__ import annotations

import re
from pathlib import Path

import onnx
import onnxruntime
import pytest
from bundle_kinds import CACHED, KINDS, profiled

from actuary import BadInput
from export import bundle, onnx_file
from export.audit import CPU


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
