"""Activations outside the compiler's vocabulary: exported as torch.onnx writes them, and held to torch all the same."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import httpx2 as httpx
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import ACTUARY, HANG_S, TINY, serving

from actuary import BadInput, GateFailed
from export import bundle
from export.exporter import export_bundle
from export.ops.check import check_activation, one_node
from export.ops.fallback import value_and_bound
from export.ops.formula import formula
from export.ops.onnx_function import onnx_function
from export.ops.trace import trace
from models import activations
from models.activations import Activation

RUNNING = "x * torch.sigmoid(torch.cumsum(x, dim=-1) / 8)"
PLUGIN = f"""
import torch
from models.activations import Activation

running = Activation("running", lambda x: {RUNNING}, "hidden_axis", "this test, 2026")
nothing = Activation("nothing", lambda x: torch.special.digamma(x * x + 1), "pointwise", "this test, 2026")
"""
ENTRY_POINTS = "[actuary.activations]\nrunning = more:running\nnothing = more:nothing\n"
SHAPE = ["--layers", "2", "--dim", "32", "--heads", "2", "--context", "32", "--vocab", "300"]


def record(expression, kind: str) -> Activation:
    return Activation("mine", expression, kind, "a test")


RECORDS = {
    "cumsum": record(lambda x: x * torch.sigmoid(torch.cumsum(x, dim=-1) / 8), "hidden_axis"),
    "top": record(lambda x: torch.where(x >= x.topk(3, dim=-1).values[..., -1:], x, 0 * x), "hidden_axis"),
    "learned": record(lambda x, beta=0.5: x * torch.sigmoid(beta * torch.sort(x, dim=-1).values), "learned"),
    "gated": record(lambda gate, up, a=1.5: torch.nn.functional.hardswish(a * gate) * up, "gated"),
    "pointwise": record(lambda x: torch.nn.functional.hardtanh(x) * torch.asinh(x), "pointwise"),
}


@pytest.mark.parametrize("name", RECORDS)
def test_the_function_is_what_torch_computes(name: str):
    activation = RECORDS[name]
    expression = trace(activation)
    assert expression.outside
    assert not expression.elementwise
    assert check_activation(activation, onnx_function("mine", expression), np.random.default_rng(3)) <= 1


@pytest.mark.parametrize("shape", [(2, 3, 8), (5, 8), (0, 8), (1, 1, 24)])
def test_the_function_holds_for_any_shape(shape: tuple[int, ...]):
    """A block sees [B, T, H], the last one [B, H]; H is the model's."""
    activation = RECORDS["cumsum"]
    session = onnxruntime.InferenceSession(
        one_node(activation, onnx_function("mine", trace(activation))), providers=["CPUExecutionProvider"]
    )
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    (y,) = session.run(None, {"x": x})
    np.testing.assert_allclose(y, activation.expression(torch.from_numpy(x)).numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("cumsum", lambda x: x * torch.sigmoid(torch.cumsum(x, dim=-1) / 8.001)),
        ("pointwise", lambda x: torch.nn.functional.hardtanh(x) * torch.asinh(x) * 1.00001),
        ("gated", lambda gate, up, a=1.5: torch.nn.functional.hardsigmoid(a * gate) * gate * up),
    ],
)
def test_the_gate_sees_another_formula(right: str, wrong):
    function = onnx_function("mine", trace(record(wrong, RECORDS[right].kind)))
    with pytest.raises(GateFailed, match="activation 'mine' misses parity"):
        check_activation(RECORDS[right], function, np.random.default_rng(3))


def test_the_bound_says_something():
    """It must stay near single precision, or it would pass everything."""
    x = 4 * torch.randn(64, 8, dtype=torch.float64)
    value, bound = value_and_bound(trace(RECORDS["cumsum"]), {"x": x}, 2.0**-24)
    torch.testing.assert_close(value, RECORDS["cumsum"].expression(x))
    assert float(bound.max()) < 1e-4


def test_the_formula_shows_it_as_it_is_written():
    assert formula(trace(RECORDS["cumsum"])) == "x * sigmoid(cumsum(x, dim=-1) / 8)"
    assert formula(trace(record(lambda x: torch.nn.functional.softplus(x, beta=2.0), "pointwise"))) == (
        "softplus(x, beta=2.0)"
    )


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        (
            lambda x: torch.special.digamma(x),
            r"uses special_digamma\(\).* it has no ONNX form of prims.digamma; rewrite",
        ),
        (
            lambda x: torch.stack([v if v > 0 else -v for v in x.flatten()]).reshape(x.shape),
            "uses control flow that depends on values, outside .* torch.onnx cannot export it either: Guard",
        ),
    ],
    ids=["no ONNX form", "control flow"],
)
def test_what_torch_cannot_export_either_is_refused_by_name(expression, message: str):
    with pytest.raises(BadInput, match=message):
        onnx_function("mine", trace(record(expression, "pointwise")))


@pytest.mark.parametrize("precision", ["int8", "fp16", "bf16"])
def test_every_precision(tiny_checkpoint, tmp_path, monkeypatch, precision):
    activation = Activation("mine", RECORDS["gated"].expression, "gated", "a test")
    known = {**activations.registry(), "mine": activation}
    monkeypatch.setattr(activations, "registry", lambda: known)
    folder, manifest = export_bundle(tiny_checkpoint("mine"), tmp_path, precision=precision)
    assert manifest.parity.activation <= 1
    model = onnx.load(folder / bundle.MODEL)
    ours = [node.op_type for node in model.graph.node if node.domain == bundle.DOMAIN]
    assert [name for name in ours if name not in bundle.STRUCTURAL] == ["mine"] * TINY["layers"]


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    site = tmp_path_factory.mktemp("site")
    (site / "more.py").write_text(PLUGIN)
    info = site / "more-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: more\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    return {**os.environ, "PYTHONPATH": str(site), "NO_COLOR": "1"}


def test_a_plugin_reaches_every_room(environment, tmp_path, monkeypatch):
    def actuary(*arguments: str, code: int = 0) -> subprocess.CompletedProcess:
        done = subprocess.run(
            [*ACTUARY, *arguments], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=HANG_S
        )
        assert done.returncode == code, done.stderr
        return done

    said = "running: outside the compiler's vocabulary: cumsum(); exported as standard operators by torch.onnx"
    explained = actuary("explain", "running").stdout
    assert said in explained
    assert "CumSum" in explained
    corpus = str(Path(json.__file__).parent)
    recipe = ["--activations", "running,nothing", "--steps", "5", "--corpus", corpus, *SHAPE]
    actuary("train", *recipe, "--out", "checkpoints")
    exported = actuary("export", "checkpoints", "--out", "bundles", "--json", code=2)
    assert said in exported.stderr
    assert "'nothing' uses special_digamma()" in exported.stderr
    assert "it has no ONNX form of prims.digamma" in " ".join(exported.stderr.split())
    (manifest,) = json.loads(exported.stdout)
    assert manifest["formula"] == "x * sigmoid(cumsum(x, dim=-1) / 8)"
    monkeypatch.setenv("PYTHONPATH", environment["PYTHONPATH"])
    with serving(tmp_path / "bundles") as (url, _):
        answer = httpx.post(f"{url}/v1/next-token", json={"model": "running", "prompt": "def "}).json()
        assert answer["results"][0]["activation"] == "running"


def test_the_library_leaves_it_out_and_says_so(environment, tmp_path, fused):
    done = subprocess.run(
        [*ACTUARY, "ops", "build", "--no-cuda", "--out", str(tmp_path / "ops"), "--json"],
        env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "left out: running uses cumsum(), outside the compiler's vocabulary" in done.stderr
    assert set(json.loads(done.stdout)["activations"]) == set(fused.activations)
