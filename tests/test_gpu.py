"""On a CUDA device: the service gives the CPU's numbers, fused and not, and training runs. Elsewhere skipped, with the
reason. Kernels, speed and whole models are checked there by `make gpu-check`, which runs this too."""

from __future__ import annotations

import json
import shutil
import urllib.request

import onnxruntime
import pytest
import torch
from conftest import TINY_VARIANTS, serving

from export.exporter import export_bundle
from export.ops.build import build
from models.train import Recipe, Variant, train_variant

pytestmark = pytest.mark.gpu
PROMPTS = ["if x is not", "def ", "class Reader:"]


def cuda_missing() -> str:
    """Why CUDA does not run here; empty where it does."""
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no CUDA device"
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        return f"onnxruntime {onnxruntime.__version__} was built without CUDA"
    return ""


@pytest.fixture(scope="module", autouse=True)
def _on_a_device():
    """Of the module, so that elsewhere nothing is compiled and exported before it is skipped, which took 41 s."""
    if reason := cuda_missing():
        pytest.skip(reason)


@pytest.fixture(scope="module")
def cuda_ops(tmp_path_factory):
    """The folder of a library with its CUDA half, or of none where nvcc is not there."""
    folder = tmp_path_factory.mktemp("cuda") / "ops"
    if shutil.which("nvcc"):
        build(folder, cuda=True)
    return folder


@pytest.fixture(scope="module", params=["ort", "portable"])
def exported(request, tiny_checkpoint, tmp_path_factory):
    """Bundles of one flavour, which --provider cuda refuses where any of their floating-point work falls to the CPU."""
    out = tmp_path_factory.mktemp(request.param)
    for activation, head in TINY_VARIANTS:
        export_bundle(tiny_checkpoint(activation, head), out, flavor=request.param)
    return out


@pytest.mark.parametrize("fused", [False, True])
def test_cuda_serves_what_the_cpu_serves(exported, cuda_ops, fused: bool):
    """Over HTTP, without and with the fused operators, of which the activations' must then run on the device."""
    pytest.importorskip("fastapi", reason="the service's packages are not installed")
    if fused and not cuda_ops.exists():
        pytest.skip("no nvcc: the fused operators have no CUDA half here")

    def asked(url: str, body: dict | None = None) -> dict:
        data = json.dumps(body).encode() if body else None
        request = urllib.request.Request(url, data, {"content-type": "application/json"})
        return json.load(urllib.request.urlopen(request, timeout=60))

    def answers(provider: str, ops: str) -> tuple[list[str], list[dict]]:
        with serving(exported, "--provider", provider, "--ops", ops) as (url, _):
            why_not = [model["unfused"] for model in asked(f"{url}/v1/models")["data"]]
            body = {"model": "*", "prompt": PROMPTS, "top_k": 5}
            return why_not, asked(f"{url}/v1/next-token", body)["results"]

    (why_not, on_cuda), (_, on_cpu) = (
        answers("cuda", str(cuda_ops) if fused else "/nowhere"),
        answers("cpu", "/nowhere"),
    )
    assert not any(why_not) if fused else all(why_not)
    for ours, theirs in zip(on_cuda, on_cpu, strict=True):
        assert (ours["provider"], theirs["provider"]) == ("CUDAExecutionProvider", "CPUExecutionProvider")
        for mine, other in zip(ours["top"], theirs["top"], strict=True):
            # TF32 rounds products to 10 bits: 2^-11 of a logit's size, through two blocks.
            assert mine["softmax"] == pytest.approx(other["softmax"], rel=1e-2)


def test_training_runs_on_the_device(corpus, tmp_path):
    recipe = Recipe(steps=20, batch=2, layers=1, dim=32, heads=2, context=32, vocab=300)
    quality = train_variant(Variant("swish"), recipe, corpus, tmp_path, lambda report: None, lambda: False)
    assert quality["bits_per_byte"] < 8
