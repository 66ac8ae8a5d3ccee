"""`actuary inspect`: a block drawn from its nodes, and what the verb prints."""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from pathlib import Path

import onnx
import onnxruntime
import pytest
from bundle_kinds import CACHED, KINDS, NOWHERE, changed, inspected, of_opset, standard
from conftest import ACTUARY

from export import bundle
from export.audit import CPU
from export.bundle import read_manifest
from export.inspection import NO_BLOCK, WIDTH, draw_block
from export.ops import library

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
    return subprocess.run([*ACTUARY, *map(str, arguments)], capture_output=True, text=True, timeout=600)


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
