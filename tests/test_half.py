"""float16 and bfloat16: what is narrowed and what is not, the gate's verdict, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import TINY
from onnx import TensorProto, numpy_helper
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config, Qwen3Config

from actuary import BadInput, GateFailed
from export import bundle, exporter, half, parity, prompt_runs
from export.exporter import Checkpoint, export_bundle
from export.graph import build
from export.parity_rounded import SAFETY_OF_NOISE, Rounded, check_half
from models.activations import registry
from service.runtime import Runtime
from service.variant import open_variant
from service.vocabulary import Vocabulary

ELEMENTS = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
EXTRA = [(activation, "bf16") for activation in ("gelu", "swish", "swiglu", "threshold", "solu")]
V = TINY["vocab_size"]
GPT2 = {"vocab_size": V, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 2}
LLAMA = {
    "vocab_size": V,
    "max_position_embeddings": 32,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
FAMILIES = {
    "gpt2": lambda: GPT2Config(**GPT2),
    "llama": lambda: LlamaConfig(**LLAMA),  # heads of 8: attention in standard operators, in groups
    "qwen2": lambda: Qwen2Config(**LLAMA, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**LLAMA, head_dim=16),
}


def opened(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def gate(checkpoint: Checkpoint, model: onnx.ModelProto, name: half.HalfName, seed: int = 3) -> Rounded:
    """The gate's verdict on the half form of the float32 graph `model`, as if it were the checkpoint's."""
    runs = {"emulated": opened(half.emulated(half.half(model, name))).run}
    return check_half(checkpoint.decoder, checkpoint.model, runs, build(checkpoint.decoder), seed, name)


@pytest.mark.parametrize("flavor", ["ort", "portable"])
@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_all_that_is_stored_is_narrow(tiny_checkpoint, tmp_path, name, flavor):
    folder, manifest = export_bundle(tiny_checkpoint("swiglu"), tmp_path, flavor=flavor, precision=name)
    assert (manifest.precision, manifest.flavor) == (name, flavor)
    assert "emulated" in manifest.parity.verified
    assert ("cpu" in manifest.parity.verified) == (name == "fp16")
    assert 0.5 < manifest.parity.noise <= SAFETY_OF_NOISE
    assert manifest.parity.max_rel <= manifest.parity.bound < 0.1
    model = onnx.load(folder / bundle.MODEL)
    floats = {t.name: t for t in model.graph.initializer if t.data_type not in (TensorProto.INT64, TensorProto.INT32)}
    wide = {key for key, tensor in floats.items() if tensor.data_type == TensorProto.FLOAT}
    assert {floats[key].data_type for key in floats.keys() - wide} == {ELEMENTS[name]}
    assert all(np.prod(floats[key].dims) == 1 for key in wide)  # eps, the exponent 2, nats to bits
    assert all(o.type.tensor_type.elem_type in (TensorProto.FLOAT, TensorProto.INT64) for o in model.graph.output)
    assert {info.type.tensor_type.elem_type for info in model.graph.value_info} == {ELEMENTS[name]}


@pytest.mark.parametrize("flavor", ["ort", "portable"])
def test_casts_stand_around_norms_and_before_the_logits_alone(tiny_checkpoint, flavor):
    plain = build(tiny_checkpoint("gelu").decoder, flavor)
    model = half.half(plain, "fp16")
    casts = [node for node in model.graph.node if node.op_type == "Cast"]
    before = sum(node.op_type == "Cast" for node in plain.graph.node)
    divisions = sum(node.op_type == "Div" for node in plain.graph.node)
    assert len(casts) - before == 2 * divisions + 1
    assert sum(bundle.LOGITS in node.output for node in casts) == 1


def test_a_norm_of_large_values_does_not_overflow(tiny_checkpoint):
    """Past 255 a square is no float16."""
    decoder = tiny_checkpoint("gelu").decoder
    large = dataclasses.replace(decoder, weights={**decoder.weights, "embed": decoder.weights["embed"] * 2000})
    feed = {bundle.INPUT_IDS: np.array([[5, 6, 7]]), bundle.LENGTHS: np.array([3]), bundle.TOP_K: np.array([1])}
    for flavor in ("ort", "portable"):
        (got,) = opened(half.half(build(large, flavor), "fp16")).run([bundle.LOGITS], feed)
        (want,) = opened(build(large, flavor)).run([bundle.LOGITS], feed)
        np.testing.assert_allclose(got, want, rtol=0, atol=0.02 * np.abs(want).max())


@pytest.mark.parametrize(("activation", "name"), [*((a, "fp16") for a in registry()), *EXTRA])
def test_every_activation_passes_and_shows_the_noise_that_rounding_makes(tiny_checkpoint, tmp_path, activation, name):
    _, manifest = export_bundle(tiny_checkpoint(activation), tmp_path, precision=name, seed=5)
    # A bound that nothing comes near could not fail; where a step falls the other way in the noise alone, it is far.
    assert (0.3 if activation == "threshold" else 0.6) <= manifest.parity.noise <= SAFETY_OF_NOISE
    assert manifest.parity.activation <= 1


@pytest.mark.parametrize("name", ["fp16", "bf16"])
@pytest.mark.parametrize(
    ("weight", "damage"),
    [
        ("blocks.0.down.weight", lambda w, u: w * np.float32(1 + 12 * u)),
        ("blocks.1.qkv.weight", lambda w, u: w * np.float32(1 + 20 * u)),
        ("head.weight", lambda w, u: w * np.float32(1 + 4 * u)),
        ("head.bias", lambda w, u: w + np.float32(6 * u)),
        ("blocks.0.up.weight", lambda w, u: np.roll(w, 1, axis=0)),
    ],
    ids=["down", "qkv", "head", "bias", "rows of up moved"],
)
def test_the_gate_sees_a_matrix_that_is_a_few_roundings_off(tiny_checkpoint, weight, damage, name):
    checkpoint, unit = tiny_checkpoint("gelu"), 2.0 ** (-11 if name == "fp16" else -8)
    weights = {**checkpoint.decoder.weights, weight: damage(checkpoint.decoder.weights[weight], unit)}
    with pytest.raises(GateFailed, match="misses parity"):
        gate(checkpoint, build(dataclasses.replace(checkpoint.decoder, weights=weights)), name)


@pytest.mark.parametrize(("right", "wrong", "name"), [("gelu", "relu", "fp16"), ("swiglu", "geglu", "bf16")])
def test_the_gate_sees_another_activation(tiny_checkpoint, right, wrong, name):
    checkpoint = tiny_checkpoint(right)
    other = dataclasses.replace(checkpoint.decoder, activation=tiny_checkpoint(wrong).decoder.activation)
    with pytest.raises(GateFailed, match="misses parity"):
        gate(checkpoint, build(other), name)


def random_family(family: str, tokenizer_json: bytes) -> Checkpoint:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family](), dtype=torch.float32).eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if weight.ndim == 1:
                weight.copy_((1.0 if "norm" in key or "ln_" in key else 0.0) + 0.3 * torch.randn_like(weight))
            else:
                weight.normal_(std=min(weight.shape) ** -0.5)
    return Checkpoint(family, model, tokenizer_json, quality=None)


@pytest.mark.parametrize(("family", "name"), [*((family, "bf16") for family in FAMILIES), ("gpt2", "fp16")])
def test_other_families(tiny_checkpoint, tmp_path, family, name):
    checkpoint = random_family(family, tiny_checkpoint("gelu").tokenizer_json)
    assert 0.6 <= export_bundle(checkpoint, tmp_path, precision=name)[1].parity.noise <= SAFETY_OF_NOISE


def test_the_gate_sees_a_bias_that_is_missing(tiny_checkpoint):
    checkpoint = random_family("gpt2", tiny_checkpoint("gelu").tokenizer_json)
    decoder = checkpoint.decoder
    wrong = {key: w for key, w in decoder.weights.items() if key != "blocks.0.down.bias"}
    for name in ("fp16", "bf16"):
        with pytest.raises(GateFailed, match="misses parity"):
            gate(checkpoint, build(dataclasses.replace(decoder, weights=wrong)), name)


def test_what_float16_cannot_hold_is_refused_by_name(tiny_checkpoint, tmp_path):
    checkpoint = tiny_checkpoint("relu2")
    with torch.no_grad():
        checkpoint.model.blocks[1].ffn.up.weight[3, 5] = 7e4
    with pytest.raises(BadInput, match=r"the weight blocks.1.up.weight holds 7e\+04, and float16 .*--precision bf16"):
        export_bundle(checkpoint, tmp_path / "out", precision="fp16")
    checkpoint = tiny_checkpoint("relu2")
    with torch.no_grad():
        checkpoint.model.blocks[0].ffn.up.weight *= 300
    with pytest.raises(BadInput, match=r"the tensor blocks.0.hidden holds .* --precision bf16"):
        export_bundle(checkpoint, tmp_path / "out", precision="fp16")
    assert not list(tmp_path.rglob("model.onnx"))
    assert export_bundle(checkpoint, tmp_path / "out", precision="bf16")[1].precision == "bf16"


def test_a_value_near_the_largest_is_refused_too():
    """Other prompts than the gate's may hold twice as much."""
    half.check_range({"x": 32000.0}, "fp16")
    for value in (33000.0, np.inf, np.nan):
        with pytest.raises(BadInput, match="the tensor x"):
            half.check_range({"x": value, "y": 1.0}, "fp16")


def test_the_service_answers_on_the_cpu_what_torch_computes(tiny_checkpoint, tmp_path):
    checkpoint = tiny_checkpoint("swiglu")
    folder, manifest = export_bundle(checkpoint, tmp_path, precision="fp16")
    variant = open_variant(folder, Runtime("cpu", 1), lambda path, sha256: Vocabulary(path))
    prompts = [[5, 6, 7], [1]]
    for prompt, row in zip(prompts, variant.run(prompts, top_k=3), strict=True):
        with torch.inference_mode():
            expected = checkpoint.model(torch.tensor([prompt])).logits[0, -1].numpy()
        np.testing.assert_allclose(row.logits, expected, rtol=0, atol=manifest.parity.bound * np.abs(expected).max())
        assert row.softmax.sum() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_weights_past_a_size_lie_beside_the_model(tiny_checkpoint, tmp_path, monkeypatch, name):
    monkeypatch.setattr(prompt_runs, "IN_MEMORY_BYTES", 1000)
    folder, manifest = export_bundle(tiny_checkpoint("swiglu"), tmp_path, precision=name)
    assert set(manifest.files) == {"model.onnx", "model.onnx.data", "tokenizer.json"}
    assert bundle.read_bundle(folder) == manifest


def _a_cast_to_float32(model: onnx.ModelProto) -> None:
    """Behind the first norm's quotient, where the half type shall go on."""
    cast = next(n for n in model.graph.node if n.op_type == "Cast" and n.attribute[0].i == TensorProto.BFLOAT16)
    cast.attribute[0].i = TensorProto.FLOAT


def _a_weight_in_float32(model: onnx.ModelProto) -> None:
    (weight,) = [t for t in model.graph.initializer if t.name == "blocks.0.up.weight"]
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight).astype(np.float32), weight.name))


@pytest.mark.parametrize("damage", [_a_cast_to_float32, _a_weight_in_float32])
@pytest.mark.parametrize("flavor", ["ort", "portable"])
def test_bf16_that_no_runtime_could_load_is_not_written(tiny_checkpoint, tmp_path, monkeypatch, flavor, damage):
    """Both vanish where every value is in float32: what the CPU says of the file itself tells them."""

    def damaged(model, name):
        model = half.half(model, name)
        damage(model)
        return model

    monkeypatch.setattr(exporter, "half", damaged)
    with pytest.raises(GateFailed, match=r"none that a runtime with its kernels would load: .*report it"):
        export_bundle(tiny_checkpoint("gelu"), tmp_path / "out", precision="bf16", flavor=flavor)
    assert not list(tmp_path.rglob("model.onnx"))


def test_relu_is_checked_as_the_operator_that_is_in_the_file(tiny_checkpoint, monkeypatch):
    activation = tiny_checkpoint("relu").decoder.activation
    function = parity._function(build(tiny_checkpoint("relu").decoder), activation)
    assert [(node.domain, node.op_type) for node in function.node] == [("", "Relu")]
    monkeypatch.setitem(parity.STANDARD, "relu", "Softplus")
    wrong = parity._function(build(tiny_checkpoint("relu").decoder), activation)
    with pytest.raises(GateFailed, match="misses parity"):
        parity.check_activation(activation, wrong, np.random.default_rng(0))


def test_what_is_lost_on_held_out_text_is_measured(tiny_checkpoint, corpus, tmp_path):
    trained = bundle.Quality(bits_per_byte=5.0, ece=0.1, corpus_sha256=corpus.sha256)
    checkpoint = dataclasses.replace(tiny_checkpoint("gelu"), quality=trained)
    _, manifest = export_bundle(checkpoint, tmp_path, precision="bf16", corpus=lambda: corpus)
    quality = manifest.quality
    assert quality.tokens == len(corpus.ids(V).held_out) - 1
    assert quality.bits_per_byte != quality.fp32_bits_per_byte
    assert quality.bits_per_byte == pytest.approx(quality.fp32_bits_per_byte, rel=5e-3)


def test_the_emulated_graph_rounds_what_the_half_one_stores(tiny_checkpoint):
    """Against the half graph's own first product, computed by hand: rows of the table, normed and narrowed."""
    decoder = tiny_checkpoint("gelu").decoder
    model = half.half(build(decoder), "bf16")
    (embed,) = [numpy_helper.to_array(t) for t in model.graph.initializer if t.name == "embed"]
    np.testing.assert_array_equal(embed, decoder.weights["embed"].astype(ml_dtypes.bfloat16))
    shown = half.emulated(model)
    product = next(node.output[0] for node in shown.graph.node if node.op_type == "MatMul").removesuffix(".exact")
    source = next(node.input[0] for node in shown.graph.node if node.op_type == "MatMul")
    for name in (product, source):
        shown.graph.output.append(onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    feed = {bundle.INPUT_IDS: np.array([[5, 6]]), bundle.LENGTHS: np.array([2]), bundle.TOP_K: np.array([1])}
    y, x = opened(shown).run([product, source], feed)
    W = decoder.weights["blocks.0.qkv.weight"].astype(ml_dtypes.bfloat16).astype(np.float32).T
    exact = x.astype(np.float64) @ W
    np.testing.assert_array_equal(y, y.astype(ml_dtypes.bfloat16).astype(np.float32))
    np.testing.assert_allclose(y, exact, rtol=2**-8 * 1.01, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["fp16", "bf16"])
@pytest.mark.parametrize("flavor", ["ort", "portable"])
def test_cuda_runs_what_was_written(tiny_checkpoint, tmp_path, name, flavor):
    if not Path("/proc/driver/nvidia/version").exists():
        pytest.skip("no NVIDIA driver")
    _, manifest = export_bundle(tiny_checkpoint("swiglu"), tmp_path, flavor=flavor, precision=name)
    assert "cuda" in manifest.parity.verified
