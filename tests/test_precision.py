"""Graphs and precisions: every flavour computes the same model, and each precision keeps to its own bound."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import onnxruntime
import pytest

from export import bundle
from export.exporter import Checkpoint, export_bundle
from export.graph import ORT, Flavor, Positions, build
from export.parity import model_bound
from models.decoder import Decoder, from_actuary


def opened(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def logits(decoder: Decoder, flavor: Flavor, positions: Positions, prompts: list[np.ndarray]) -> list[np.ndarray]:
    """Each prompt's last row [V], the prompts in one padded batch; the padding is any id."""
    lengths = np.array([len(prompt) for prompt in prompts])
    ids = np.random.default_rng(9).integers(0, decoder.vocab_size, size=(len(prompts), lengths.max()))
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    session = opened(build(decoder, flavor, positions))
    if positions == "all":
        (got,) = session.run(None, {bundle.INPUT_IDS: ids})
        return [rows[length - 1] for rows, length in zip(got, lengths, strict=True)]
    feed = {bundle.INPUT_IDS: ids, bundle.LENGTHS: lengths, bundle.TOP_K: np.array([0])}
    return list(session.run([bundle.LOGITS], feed)[0])


def decoder_of(checkpoint: Checkpoint) -> Decoder:
    return from_actuary(checkpoint.model, checkpoint.name)


def other_family(decoder: Decoder) -> Decoder:
    """The same shape as GPT-2 has it: centred norms, embedded positions, biases, no QK-norm, a scale per block."""
    rng = np.random.default_rng(3)
    normal = lambda *shape: (0.2 * rng.normal(size=shape)).astype(np.float32)  # noqa: E731
    weights = {name: w for name, w in decoder.weights.items() if "q_norm" not in name and "k_norm" not in name}
    weights["position"] = normal(decoder.context, decoder.dim)
    for name in [name for name in weights if name.endswith(".weight") and "head" not in name]:
        weights[name.replace(".weight", ".bias")] = normal(weights[name].shape[0])
    scales = tuple(0.3 + 0.1 * i for i in range(decoder.layers))
    return dataclasses.replace(decoder, norm="layer", rope=None, score_scales=scales, weights=weights)


def grouped(decoder: Decoder) -> Decoder:
    """The same with half as many key and value heads as query heads, as Llama has it: no QK-norm."""
    heads, kv_heads, D = decoder.heads, decoder.heads // 2, decoder.head_dim
    q, k, v = np.arange(3 * heads * D).reshape(3, heads * D)  # rows of qkv
    keep = [*q, *k[: kv_heads * D], *v[: kv_heads * D]]
    weights = {
        name: w[keep] if name.endswith("qkv.weight") else w
        for name, w in decoder.weights.items()
        if "q_norm" not in name and "k_norm" not in name
    }
    return dataclasses.replace(decoder, kv_heads=kv_heads, weights=weights)


SHAPES = {
    "heads of 16": {},
    "heads of 8": {"heads": 4},
    "one layer": {"layers": 1},
    "three layers": {"layers": 3},
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("family", [lambda d: d, other_family, grouped], ids=["own", "gpt2", "grouped"])
def test_flavors_and_positions_compute_one_model(tiny_checkpoint, family, shape):
    decoder = family(decoder_of(tiny_checkpoint("swiglu", **shape)))
    rng = np.random.default_rng(2)
    prompts = [rng.integers(0, decoder.vocab_size, size=n) for n in (1, 2, 9, decoder.context, 17)]
    expected = logits(decoder, "portable", "all", prompts)
    # Each is within the model bound of the exact logits, so within twice that of another.
    for flavor, positions in (("ort", "all"), ("ort", "last"), ("portable", "last")):
        for got, want in zip(logits(decoder, flavor, positions, prompts), expected, strict=True):
            np.testing.assert_allclose(got, want, rtol=0, atol=2 * model_bound(decoder) * np.abs(want).max())


def test_the_portable_flavor_has_standard_operators_only(tiny_checkpoint, tmp_path):
    folder, manifest = export_bundle(tiny_checkpoint("swiglu"), tmp_path, flavor="portable")
    model = onnx.load(folder / bundle.MODEL)
    assert manifest.flavor == "portable"
    assert {entry.domain for entry in model.opset_import} == {"", bundle.DOMAIN}
    assert {node.domain for node in model.graph.node} == {"", bundle.DOMAIN}


@pytest.mark.parametrize("flavor", ["ort", "portable"])
def test_queries_of_the_last_block_are_made_for_one_row(tiny_checkpoint, flavor):
    """What nothing reads is not computed: no product of the last block's queries or `out` has a time axis."""
    model = build(decoder_of(tiny_checkpoint("gelu")), flavor)
    names = {weight for node in model.graph.node for weight in node.input if weight.startswith("blocks.1.")}
    assert {"blocks.1.q.weight", "blocks.1.kv.weight"} <= names
    assert "blocks.1.qkv.weight" not in names
    assert "blocks.0.qkv.weight" in {name for node in model.graph.node for name in node.input}
    order = [node.input[1] if node.op_type == "MatMul" else node.op_type for node in model.graph.node]
    assert "GatherND" in order[: order.index("blocks.1.q.weight")]


def test_the_default_flavor_is_ort(tiny_checkpoint, tmp_path):
    folder, manifest = export_bundle(tiny_checkpoint("gelu"), tmp_path)
    assert manifest.flavor == "ort"
    assert {node.domain for node in onnx.load(folder / bundle.MODEL).graph.node} == {"", ORT, bundle.DOMAIN}
