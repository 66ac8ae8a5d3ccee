"""Where a bundle's time goes: nodes told apart by the weights that they read, times summed over runs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from conftest import ACTUARY, TINY

from actuary import BadInput
from export import bundle, onnx_file
from export.audit import CPU
from export.bundle import Manifest, read_manifest
from export.inspection import fitting, open_session
from export.onnx_file import Node, OnnxFile
from export.profiling import WARM_UP, profile_bundle, summed
from export.wiring import Wiring

NOWHERE = Path("/nowhere")


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Any) -> Path:
    """Every way in which a graph of ours is written."""
    from export.exporter import export_bundle

    out = tmp_path_factory.mktemp("kinds")
    for activation in ("gelu", "swiglu", "relu"):
        export_bundle(tiny_checkpoint(activation), out, activation)
        export_bundle(tiny_checkpoint(activation), out, f"{activation}-portable", flavor="portable")
    export_bundle(tiny_checkpoint("swiglu"), out, "swiglu-int8", precision="int8")
    return out


def loaded(folder: Path, ops: Path, saved: Path) -> OnnxFile:
    """The graph as ONNX Runtime runs it."""
    fits, _ = fitting(read_manifest(folder), CPU, ops)
    open_session(folder / bundle.MODEL, CPU, fits, saved)
    return onnx_file.read(saved)


def parts_of(graph: OnnxFile) -> dict[str, list[str]]:
    """Operators by part, in order."""
    parts = Wiring(graph).parts(TINY["layers"])
    assert parts is not None
    found: dict[str, list[str]] = {}
    for node, part in zip(graph.nodes, parts, strict=True):
        found.setdefault(part, []).append(node.op_type)
    return found


def test_each_operator_of_a_fused_graph_has_its_part(kinds: Path, fused: Any, tmp_path: Path) -> None:
    found = parts_of(loaded(kinds / "swiglu", fused.path.parent, tmp_path / "model.onnx"))
    assert found["up"] == found["down"] == ["MatMul", "MatMul"]
    assert found["activation"] == ["swiglu", "swiglu"]
    assert Counter(found["attention"]) == {
        "MatMul": 2 + 3, "CachedAttention": 1, "CachedAttentionOfRows": 1, "Gather": 1,  # qkv and out; q, kv and out
    }  # fmt: skip
    assert found["head"][0] in ("Gemm", "MatMul")
    assert {"TopK", "LogSoftmax"} <= {*found["head"]}
    # The norms that stand alone, and what makes positions of lengths, are nobody's.
    assert {"SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization", "Range"} <= {*found["other"]}
    assert not {"MatMul", "Gemm", "Softmax"} & {*found["other"]}


def test_in_int8_a_product_takes_its_norm_with_it(kinds: Path, fused: Any, tmp_path: Path) -> None:
    found = parts_of(loaded(kinds / "swiglu-int8", fused.path.parent, tmp_path / "model.onnx"))
    assert found["up"] == ["RmsNormInt8Linear"] * 2
    assert found["down"] == ["Int8LinearAdd"] * 2
    assert found["activation"] == ["swiglu"] * 2
    assert found["head"][0] == "RmsNormInt8Linear"


@pytest.mark.parametrize("kind", ["gelu-portable", "swiglu-portable", "relu", "swiglu-int8"])
def test_without_our_kernels_every_product_still_has_its_part(kinds: Path, kind: str, tmp_path: Path) -> None:
    graph = loaded(kinds / kind, NOWHERE, tmp_path / "model.onnx")
    found = parts_of(graph)
    products = {"MatMul", "MatMulInteger", "Gemm", "FusedMatMul"}
    assert not products & {*found["other"]}
    for part in ("up", "down"):
        assert len([op for op in found[part] if op in products]) == TINY["layers"]
    assert "Softmax" in found["attention"]  # attention's own, not the head's
    assert "Softmax" not in found["activation"]
    assert {"up", "activation", "down", "attention", "head", "other"} == {*found}


def test_names_that_are_not_ours_have_no_parts() -> None:
    node = Node("MatMul", "a", "", ("x", "layer.0.weight"), ("y",))
    graph = OnnxFile(10, {"": 20}, (node,), {"layer.0.weight": (2, 2)}, frozenset(), {})
    assert Wiring(graph).parts(1) is None


def _events(durations: list[list[int]], kinds: list[str]) -> list[dict[str, Any]]:
    """A profile of so many runs, its events not in order of time."""
    flat = [
        {"cat": "Node", "name": f"{kind}_kernel_time", "ts": 100 * run + at, "dur": us, "args": {"op_name": kind}}
        for run, row in enumerate(durations)
        for at, (kind, us) in enumerate(zip(kinds, row, strict=True))
    ]
    return [{"cat": "Session", "name": "model_run", "ts": 0, "dur": 9}, *reversed(flat)]


def test_times_are_summed_by_part_and_a_disturbed_run_does_not_count() -> None:
    kinds = ["Up", "Act", "Down", "Attend", "Head", "Norm"]
    nodes = tuple(Node(kind, kind, "", (), ()) for kind in kinds)
    graph = OnnxFile(10, {"": 20}, nodes, {}, frozenset(), {})
    runs = [[3000, 1000, 2000, 2500, 1000, 500]] * 8
    runs[3] = [3000, 1000, 2000, 2500, 90_000, 500]  # another process took the core
    durations = [[7_000_000] * 6] * WARM_UP + runs
    parts: Any = ["up", "activation", "down", "attention", "head", "other"]
    profile = summed(_events(durations, kinds), graph, parts, 8, 64, 1)
    assert profile.total_ms == 10
    assert profile.share == {
        "up": 0.3, "activation": 0.1, "down": 0.2, "attention": 0.25, "head": 0.1, "other": 0.05, "ffn": 0.6,
    }  # fmt: skip
    assert profile.ms["ffn"] == 6
    with pytest.raises(BadInput, match=r"66 times of 6 nodes in 10 runs"):
        summed(_events(durations, kinds), graph, parts, 7, 64, 1)
    with pytest.raises(BadInput, match="ran Up_kernel_time where its graph has Act"):
        summed(_events(durations, kinds), OnnxFile(10, {}, nodes[1:] + nodes[:1], {}, frozenset(), {}), parts, 8, 64, 1)


@pytest.mark.parametrize("kind", ["gelu", "swiglu-portable", "swiglu-int8"])
def test_the_shares_of_a_bundle_are_the_whole(kinds: Path, kind: str) -> None:
    folder = kinds / kind
    profile = profile_bundle(folder, read_manifest(folder), NOWHERE, tokens=20)
    assert profile.tokens == 20
    share = profile.share
    assert share["ffn"] + share["attention"] + share["head"] + share["other"] == pytest.approx(1, abs=3e-4)
    assert share["up"] + share["activation"] + share["down"] == pytest.approx(share["ffn"], abs=3e-4)
    assert min(share.values()) > 0


def test_inspect_tells_the_profile(kinds: Path) -> None:
    from export.cli import inspect

    runner, folder = CliRunner(), str(kinds / "gelu")
    told = runner.invoke(inspect, [folder, "--profile", "--tokens", "9", "--ops", "/nowhere", "--json"])
    assert told.exit_code == 0, told.output
    document = json.loads(told.stdout)
    assert (document["name"], document["tokens"], document["threads"]) == ("gelu", 9, 1)
    assert document["share"]["ffn"] > 0
    shown = runner.invoke(inspect, [folder, "--profile"]).output
    assert "one prompt of 32 tokens, one core" in shown  # its context, which is less than 64
    assert "activation" in shown
    for arguments, said in (
        (["--tokens", "9"], "--profile runs"),
        (["--profile", "--provider", "cuda"], "one core of the CPU"),
        (["--profile", "--tokens", "33"], "takes prompts of 1 to 32 tokens"),
    ):
        refused = runner.invoke(inspect, [folder, *arguments])
        assert isinstance(refused.exception, BadInput)
        assert said in str(refused.exception)


def test_a_profile_needs_neither_torch_nor_onnx(kinds: Path) -> None:
    forbid = "import sys; sys.modules.update(dict.fromkeys(('torch', 'onnx', 'transformers')))"
    call = f"from actuary import main; main(['inspect', {str(kinds / 'gelu')!r}, '--profile', '--json'])"
    done = subprocess.run([ACTUARY[0], "-c", f"{forbid}; {call}"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["name"] == "gelu"
    assert sys.executable == ACTUARY[0]


def test_a_manifest_says_the_width_of_a_gated_form(kinds: Path, tmp_path: Path, tiny_checkpoint: Any) -> None:
    from export.exporter import export_bundle

    export_bundle(tiny_checkpoint("swiglu", gated_width="full"), tmp_path, "full")
    for folder, width in ((kinds / "swiglu", "matched"), (tmp_path / "full", "full"), (kinds / "gelu", None)):
        assert read_manifest(folder).gated_width == width
        assert json.loads((folder / "manifest.json").read_text())["gated_width"] == width
    # What a bundle of another family has: Llama-2's 11008 of 4096.
    fields = json.loads((kinds / "swiglu" / "manifest.json").read_text())
    assert Manifest.model_validate({**fields, "dim": 4096, "hidden": 11008}).gated_width == "other"
    assert Manifest.model_validate({**fields, "dim": 4096, "hidden": 10920}).gated_width == "matched"
