"""Graphs and precisions: every flavour computes the same model, and each precision keeps to its own bound."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import TINY

from actuary import BadInput, GateFailed
from export import attention, bundle, exporter, parity_rounded, precision, prompt_runs
from export.exporter import export_bundle
from export.graph import Positions, build
from export.graph_parts import ORT, Flavor
from export.ops.int8_function import FORMS
from export.parity_float32 import model_bound
from export.parity_rounded import SAFETY_OF_NOISE, check_int8
from models.activations import registry
from models.decoder import Decoder


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
    decoder = family(tiny_checkpoint("swiglu", **shape).decoder)
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
    model = build(tiny_checkpoint("gelu").decoder, flavor)
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


def int8_gate(checkpoint, model: onnx.ModelProto, seed: int = 3) -> tuple[float, float, float, float, int]:
    """The gate's verdict on the int8 form of `model`, as if it had been made from the checkpoint."""
    run = opened(precision.int8(model)).run
    return check_int8(checkpoint.decoder, checkpoint.model, run, build(checkpoint.decoder), seed)


def test_int8_is_what_its_steps_say():
    """By hand: a step is the largest |w| of its channel over 127, and no weight is off by more than half of one."""
    rng = np.random.default_rng(0)
    W = rng.normal(size=(64, 5)).astype(np.float32)
    W[:, 2] = 0
    q, step = precision.quantised(W)
    assert q.dtype == np.int8
    assert np.abs(q).max(axis=0).tolist() == [127, 127, 0, 127, 127]
    assert (np.abs(q * step - W) <= step / 2 * 1.001).all()


@pytest.mark.parametrize("flavor", ["ort", "portable"])
def test_int8_quantises_every_product_and_keeps_the_rest(tiny_checkpoint, tmp_path, flavor):
    folder, manifest = export_bundle(tiny_checkpoint("swiglu"), tmp_path, flavor=flavor, precision="int8")
    assert (manifest.precision, manifest.flavor, manifest.quality) == ("int8", flavor, None)
    assert 0 < manifest.parity.noise <= SAFETY_OF_NOISE
    assert manifest.parity.max_rel <= manifest.parity.bound < 0.1
    model = onnx.load(folder / bundle.MODEL)
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    # An int8 matrix lies in panels of four dimensions.
    matrices = {
        tensor.name
        for tensor in model.graph.initializer
        if len(tensor.dims) in (2, 4) and "rope" not in tensor.name and tensor.name not in bundle.CACHE
    }
    assert {name for name in matrices if types[name] != onnx.TensorProto.INT8} == {"embed"}
    assert len(matrices) == 1 + 4 + 5 + 1  # embed; qkv or q and kv, out, up, down of two blocks; head
    assert [node.op_type for node in model.graph.node if node.domain == bundle.DOMAIN]
    assert not [node for node in model.graph.node if node.op_type == "MatMul" and matrices.intersection(node.input)]
    assert {f.domain for f in model.functions} == {bundle.DOMAIN}
    cached = [attention.PACKED, attention.OF_ROWS] if flavor == "ort" else []
    assert [f.name for f in model.functions if f.name not in FORMS] == ["swiglu", *cached]


@pytest.mark.parametrize("activation", ["gelu", "relu", "swiglu", "threshold", "softmax"])
def test_int8_shows_the_noise_that_rounding_makes(tiny_checkpoint, activation):
    checkpoint = tiny_checkpoint(activation)
    _, max_rel, bound, noise, _ = int8_gate(checkpoint, build(checkpoint.decoder))
    assert max_rel <= bound
    # A bound that nothing comes near could not fail; where a step falls the other way in the noise alone, it is far.
    assert (0.3 if activation == "threshold" else 0.7) <= noise <= SAFETY_OF_NOISE


@pytest.mark.parametrize(
    "damage",
    [
        lambda name, w: w * np.float32(1.08) if name == "blocks.0.down.weight" else w,
        lambda name, w: w * np.float32(1.08) if name == "blocks.1.qkv.weight" else w,
        lambda name, w: w * np.float32(1.03) if name == "head.weight" else w,
        lambda name, w: w + np.float32(0.05) if name == "head.bias" else w,
        lambda name, w: np.roll(w, 1, axis=0) if name == "blocks.0.up.weight" else w,
    ],
    ids=["down 8 %", "qkv 8 %", "head 3 %", "bias", "rows of up moved"],
)
def test_the_int8_gate_sees_a_matrix_that_is_a_little_wrong(tiny_checkpoint, damage):
    checkpoint = tiny_checkpoint("gelu")
    weights = {name: damage(name, w) for name, w in checkpoint.decoder.weights.items()}
    with pytest.raises(GateFailed, match="misses parity"):
        int8_gate(checkpoint, build(dataclasses.replace(checkpoint.decoder, weights=weights)))


@pytest.mark.parametrize(("right", "wrong"), [("gelu", "relu"), ("swiglu", "geglu")])
def test_the_int8_gate_sees_another_activation(tiny_checkpoint, right, wrong):
    """quick_gelu in the place of gelu is less than int8's own noise: that the activation's own gate sees."""
    checkpoint = tiny_checkpoint(right)
    other = dataclasses.replace(checkpoint.decoder, activation=tiny_checkpoint(wrong).decoder.activation)
    with pytest.raises(GateFailed, match="misses parity"):
        int8_gate(checkpoint, build(other))


@pytest.mark.parametrize(("activation", "seen"), [("gelu", True), ("threshold", False)])
def test_the_int8_gate_sees_a_fault_on_a_few_prompts(tiny_checkpoint, activation, seen):
    """Logits off by four times the noise after prompts of more than 30 of 32 tokens alone: the middle prompt is right.
    A step function does as much in the noise itself."""
    checkpoint = tiny_checkpoint(activation)
    plain = build(checkpoint.decoder)
    right, rng = opened(precision.int8(plain)).run, np.random.default_rng(0)
    noise = np.std(
        [
            opened(precision.dithered(plain, rng)).run([bundle.LOGITS], prompt_runs.feed([np.arange(32)]))[0]
            for _ in range(4)
        ],
        axis=0,
    ).mean()

    def run(outputs, feeds):
        got = right(outputs, feeds)
        if outputs == [bundle.LOGITS]:
            long = (feeds[bundle.LENGTHS] > 30)[:, None]
            got[0] = got[0] + long * 4 * noise * np.sign(np.random.default_rng(1).normal(size=got[0].shape))
        return got

    def gate():
        return check_int8(
            checkpoint.decoder, checkpoint.model, run, plain, seed=5
        )  # 3 of its 12 prompts; of the next seed's 4

    if seen:
        with pytest.raises(GateFailed, match=r"misses parity: after a prompt of 3\d tokens .*use --precision fp32"):
            gate()
    else:
        assert gate().noise <= SAFETY_OF_NOISE


def test_a_jump_is_told_from_a_slope():
    assert {name for name, record in registry().items() if parity_rounded.jumps(record)} == {"threshold"}


def test_noise_that_came_out_small_is_drawn_again(tiny_checkpoint, monkeypatch):
    checkpoint, seeds, once = tiny_checkpoint("gelu"), [], parity_rounded._check_rounded

    def unlucky(*arguments):
        seeds.append(arguments[-1])
        if len(seeds) == 1:
            raise GateFailed("misses parity")
        return once(*arguments)

    monkeypatch.setattr(parity_rounded, "_check_rounded", unlucky)
    int8_gate(checkpoint, build(checkpoint.decoder))
    assert seeds == [3, 4]


@pytest.fixture(scope="module")
def measured(tiny_checkpoint, corpus):
    """A checkpoint that says what it was trained on."""
    quality = bundle.Quality(bits_per_byte=5.0, ece=0.1, corpus_sha256=corpus.sha256)
    return dataclasses.replace(tiny_checkpoint("gelu"), quality=quality)


def test_int8_says_what_it_loses_on_held_out_text(measured, corpus, tmp_path):
    _, manifest = export_bundle(measured, tmp_path, precision="int8", corpus=lambda: corpus)
    quality = manifest.quality
    assert quality.tokens == len(corpus.ids(TINY["vocab_size"]).held_out) - 1
    assert quality.bits_per_byte != quality.fp32_bits_per_byte
    assert quality.bits_per_byte <= quality.fp32_bits_per_byte * 1.005
    assert bundle.read_bundle(tmp_path / "gelu").quality == quality


def test_int8_that_loses_too_much_is_not_written(measured, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(exporter, "MOST_LOSS", -0.01)
    with pytest.raises(GateFailed, match=r"bits per byte of held-out text, in float32 .*use --precision fp32"):
        export_bundle(measured, tmp_path / "out", precision="int8", corpus=lambda: corpus)
    assert not list(tmp_path.rglob("model.onnx"))


def test_int8_is_not_measured_on_another_corpus(measured, corpus, tmp_path):
    other = dataclasses.replace(measured, quality=measured.quality.model_copy(update={"corpus_sha256": "0" * 64}))
    with pytest.raises(BadInput, match="name the same with --corpus"):
        export_bundle(other, tmp_path / "out", precision="int8", corpus=lambda: corpus)
    assert not list(tmp_path.rglob("model.onnx"))


def test_int8_of_a_model_that_is_too_large_is_refused(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(prompt_runs, "IN_MEMORY_BYTES", 1000)
    with pytest.raises(BadInput, match="int8 is written for models of up to"):
        export_bundle(tiny_checkpoint("gelu"), tmp_path / "out", precision="int8")
    assert not list(tmp_path.rglob("model.onnx"))
