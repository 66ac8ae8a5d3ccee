"""Every activation of the registry, without a line each: trains, exports, passes the gate, answers over HTTP."""

from __future__ import annotations

import math

import httpx2 as httpx
import onnx
import pytest
import torch
from conftest import TINY, serving

from export import bundle
from export.attention import OF_ROWS, PACKED
from export.exporter import export_bundle, read_checkpoint
from export.graph_parts import STANDARD
from models.activations import registry
from models.gpt import log_probabilities
from models.train import Recipe, Variant, train_variant

RECIPE = Recipe(
    steps=20,
    batch=2,
    layers=TINY["layers"],
    dim=TINY["dim"],
    heads=TINY["heads"],
    context=TINY["context"],
    vocab=TINY["vocab_size"],
)
PROMPT = "if x is not"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, corpus):
    out = tmp_path_factory.mktemp("checkpoints")
    for name in registry():
        train_variant(Variant(name), RECIPE, corpus, out, lambda report: None, lambda: False)
    return out


@pytest.fixture(scope="module")
def all_bundles(tmp_path_factory, checkpoints):
    out = tmp_path_factory.mktemp("all")
    for name in registry():
        export_bundle(read_checkpoint(checkpoints / name), out)
    return out


@pytest.fixture(scope="module")
def served(all_bundles):
    """A service of all of them."""
    with serving(all_bundles) as (url, _):
        yield url


@pytest.fixture(scope="module")
def answers(served):
    """One request for all variants: {name: result}."""
    body = {"model": "*", "prompt": PROMPT, "top_k": TINY["vocab_size"]}
    response = httpx.post(f"{served}/v1/next-token", json=body, timeout=60)
    assert response.status_code == 200, response.text
    return {result["model"]: result for result in response.json()["results"]}


@pytest.mark.parametrize("name", registry())
def test_exports_as_one_node_a_block_and_passes_the_gate(name: str, all_bundles):
    manifest = bundle.read_bundle(all_bundles / name)
    assert manifest.activation == name
    assert manifest.parity.max_rel <= manifest.parity.bound < 1e-4
    assert manifest.parity.activation <= 1
    assert manifest.quality is not None
    assert math.isfinite(manifest.quality.bits_per_byte)
    model = onnx.load(all_bundles / name / bundle.MODEL)
    ours = [node.op_type for node in model.graph.node if node.domain == bundle.DOMAIN]
    attention = [PACKED] * (TINY["layers"] - 1) + [OF_ROWS]
    functions = {(f.domain, f.name) for f in model.functions} - {(bundle.DOMAIN, PACKED), (bundle.DOMAIN, OF_ROWS)}
    if name in STANDARD:
        assert [node.op_type for node in model.graph.node].count(STANDARD[name]) == TINY["layers"]
        assert ours == attention
        assert not functions
    else:
        assert ours == [node for block in attention for node in (block, name)]
        assert functions == {(bundle.DOMAIN, name)}


@pytest.mark.parametrize("name", registry())
def test_answers_over_http_what_torch_computes(name: str, answers, checkpoints, all_bundles, corpus):
    result = answers[name]
    model = read_checkpoint(checkpoints / name).model
    ids = torch.tensor([corpus.tokenizer(TINY["vocab_size"]).encode(PROMPT).ids])
    with torch.inference_mode():
        logits = model(ids).logits[0, -1]
    # torch in float32 and ONNX Runtime each stay within the gate's bound of the exact logits; an error of d in every
    # logit is one of at most 2 d, relative, in a softmax.
    d = 2 * bundle.read_manifest(all_bundles / name).parity.bound * float(logits.abs().max())
    softmax, sigmoid = log_probabilities(logits, "softmax").exp(), torch.sigmoid(logits)
    assert result["prompt_tokens"] == ids.shape[1]
    assert len(result["top"]) == TINY["vocab_size"]
    for entry in result["top"]:
        assert entry["softmax"] == pytest.approx(float(softmax[entry["id"]]), rel=4 * d)
        assert entry["sigmoid"] == pytest.approx(float(sigmoid[entry["id"]]), rel=4 * d)
    assert result["softmax"]["mass"] == pytest.approx(1, abs=1e-5)
    assert result["sigmoid"]["mass"] == pytest.approx(float(sigmoid.sum()), rel=4 * d)


def test_the_service_lists_all_of_them(served):
    listed = httpx.get(f"{served}/v1/activations").json()["data"]
    assert {entry["name"]: entry["served_by"] for entry in listed} == {name: [name] for name in registry()}
