"""What the service makes of an audit: whom it refuses, what it serves and says."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
from bundle_kinds import NOWHERE, changed, inspected, placed, standard
from fastapi.testclient import TestClient

from actuary import BadInput
from export import audit, bundle, onnx_file
from export.audit import CPU, CUDA, audit_of
from export.bundle import read_manifest
from export.inspection import inspect_bundle
from export.ops import library
from service.app import create_app
from service.runtime import Runtime
from service.settings import Settings


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
