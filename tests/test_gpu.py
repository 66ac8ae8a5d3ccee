"""On a CUDA device: the service gives the CPU's numbers, and training runs. Elsewhere skipped, with the reason."""

from __future__ import annotations

import httpx2 as httpx
import onnxruntime
import pytest
import torch
from conftest import serving

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


@pytest.fixture(autouse=True)
def _on_a_device():
    if reason := cuda_missing():
        pytest.skip(reason)


def test_cuda_serves_what_the_cpu_serves(bundles):
    def answers(provider: str) -> list[dict]:
        with serving(bundles, "--provider", provider) as (url, _):
            body = {"model": "*", "prompt": PROMPTS, "top_k": 5}
            return httpx.post(f"{url}/v1/next-token", json=body, timeout=60).json()["results"]

    for on_gpu, on_cpu in zip(answers("cuda"), answers("cpu"), strict=True):
        assert (on_gpu["provider"], on_cpu["provider"]) == ("CUDAExecutionProvider", "CPUExecutionProvider")
        for ours, theirs in zip(on_gpu["top"], on_cpu["top"], strict=True):
            # TF32 rounds products to 10 bits: 2^-11 of a logit's size, through two blocks.
            assert ours["softmax"] == pytest.approx(theirs["softmax"], rel=1e-2)


def test_training_runs_on_the_device(corpus, tmp_path):
    recipe = Recipe(steps=20, batch=2, layers=1, dim=32, heads=2, context=32, vocab=300)
    quality = train_variant(Variant("swish"), recipe, corpus, tmp_path, lambda report: None, lambda: False)
    assert quality["bits_per_byte"] < 8
