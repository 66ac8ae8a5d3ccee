"""Checkpoints of transformers' families: read, exported, held against transformers itself, and refused with reasons."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import urllib.request
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from conftest import ACTUARY, HANG_S, serving
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)
from transformers.activations import ACT2FN

from actuary import BadInput, GateFailed
from export import bundle, exporter
from export.cli import export
from export.exporter import export_bundle, read_foreign
from export.graph import build
from export.parity_float32 import model_bound
from models import activations
from models.corpus import Corpus, padded_tokenizer
from models.decoder import GATED, POINTWISE, decoder_of
from models.swap import Tuning, bits_per_byte, tokenized

V, CONTEXT = 300, 48
LENGTHS = (1, 2, 3, 17, CONTEXT - 1, CONTEXT)
GPT2 = {"vocab_size": V, "n_positions": CONTEXT, "n_embd": 32, "n_layer": 2, "n_head": 4}
LLAMA = {
    "vocab_size": V,
    "max_position_embeddings": CONTEXT,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def rope(kind: str, **more: float) -> dict:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **more}}


CONFIGS: dict[str, Callable] = {
    "gpt2": lambda: GPT2Config(**GPT2),
    "gpt2-relu-narrow": lambda: GPT2Config(**GPT2, activation_function="relu", n_inner=40),
    "gpt2-scales": lambda: GPT2Config(**GPT2, scale_attn_by_inverse_layer_idx=True, activation_function="gelu"),
    "gpt2-unscaled": lambda: GPT2Config(**GPT2, scale_attn_weights=False, reorder_and_upcast_attn=True),
    "llama": lambda: LlamaConfig(**LLAMA, tie_word_embeddings=False),
    "llama-tied": lambda: LlamaConfig(**LLAMA, tie_word_embeddings=True),
    "llama-biases": lambda: LlamaConfig(**LLAMA, attention_bias=True, mlp_bias=True, hidden_act="gelu"),
    "llama-head-dim": lambda: LlamaConfig(**LLAMA, head_dim=12, rms_norm_eps=1e-5),
    "llama-linear": lambda: LlamaConfig(**LLAMA, **rope("linear", factor=4.0)),
    "llama-dynamic": lambda: LlamaConfig(**LLAMA, **rope("dynamic", factor=2.0)),
    "llama-yarn": lambda: LlamaConfig(**LLAMA, **rope("yarn", factor=4.0, original_max_position_embeddings=12)),
    "llama3": lambda: LlamaConfig(
        **LLAMA,
        **rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=12),
    ),
    "mistral": lambda: MistralConfig(**LLAMA, sliding_window=None),
    "mistral-wide-window": lambda: MistralConfig(**LLAMA, sliding_window=CONTEXT),
    "qwen2": lambda: Qwen2Config(**LLAMA, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**LLAMA, head_dim=16),
}


def random_model(name: str) -> PreTrainedModel:
    """Weights that matter everywhere: none zero, no gain 1, no bias 0, attention far from uniform."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.float32).eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if weight.ndim == 1:
                weight.copy_((1.0 if "norm" in key or "ln_" in key else 0.0) + 0.3 * torch.randn_like(weight))
            else:
                weight.normal_(std=1.5 * min(weight.shape) ** -0.5)
    return model


def run(session: onnxruntime.InferenceSession, prompt: np.ndarray) -> np.ndarray:
    """Logits [V] after the prompt."""
    feed = {"input_ids": prompt[None], "lengths": np.array([len(prompt)]), "top_k": np.array([0])}
    return session.run([bundle.LOGITS], feed)[0][0]


def worst_error(model: PreTrainedModel, session: onnxruntime.InferenceSession) -> float:
    """Largest |error| of a logit over its row's largest |logit|, against transformers in float32, at LENGTHS."""
    rng = np.random.default_rng(1)
    worst = 0.0
    for length in LENGTHS:
        prompt = rng.integers(0, V, size=length)
        with torch.inference_mode():
            expected = model(input_ids=torch.from_numpy(prompt)[None]).logits[0, -1].numpy()
        worst = max(worst, float(np.abs(run(session, prompt) - expected).max() / np.abs(expected).max()))
    return worst


@pytest.mark.parametrize("name", CONFIGS)
def test_the_graph_gives_transformers_own_logits(name: str):
    model = random_model(name)
    decoder = decoder_of(model, name)
    session = onnxruntime.InferenceSession(build(decoder).SerializeToString(), providers=["CPUExecutionProvider"])
    # Each of the two is within the gate's bound of the exact logits.
    assert worst_error(model, session) <= min(1e-4, 2 * model_bound(decoder))


@pytest.mark.parametrize(("table", "theirs"), [(t, n) for t in (POINTWISE, GATED) for n in t])
def test_each_activation_is_transformers_own(table, theirs: str):
    x = torch.linspace(-9, 9, 4001, dtype=torch.float64)
    ours = activations.get(table[theirs])
    got = ours.expression(x, torch.full_like(x, 1.5)) / 1.5 if ours.gated else ours.expression(x)
    torch.testing.assert_close(got, ACT2FN[theirs](x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (lambda: LlamaConfig(**LLAMA, hidden_act="gelu_new"), ["gelu_new", "gated", "silu"]),
        (lambda: GPT2Config(**GPT2, activation_function="sqrtsoftplus"), ["sqrtsoftplus", "gelu_new, gelu_python"]),
        (lambda: MistralConfig(**LLAMA, sliding_window=8), ["window of 8", "context of 48"]),
        (lambda: Qwen2Config(**LLAMA, use_sliding_window=True, sliding_window=8, max_window_layers=1), ["window of 8"]),
        (
            lambda: LlamaConfig(
                **LLAMA,
                **rope("longrope", long_factor=[2.0] * 4, short_factor=[1.0] * 4, original_max_position_embeddings=12),
            ),
            ["longrope", "llama3"],
        ),
    ],
)
def test_what_one_table_or_node_cannot_say_is_refused_by_name(config: Callable, words: list[str]):
    with pytest.raises(BadInput) as refused:
        decoder_of(AutoModelForCausalLM.from_config(config()), "mine")
    assert all(word in str(refused.value) for word in words), refused.value


@pytest.fixture(scope="module")
def folders(corpus, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`folders(name)`: the random model of that name as save_pretrained writes it, and a tokenizer. Not to change."""
    root = tmp_path_factory.mktemp("real")

    def make(name: str) -> Path:
        if not (root / name).is_dir():
            random_model(name).save_pretrained(root / name)
            padded_tokenizer(corpus.tokenizer(V), V).save(str(root / name / "tokenizer.json"))
        return root / name

    return make


@pytest.fixture
def saved(folders, tmp_path) -> Path:
    """A folder that a test may damage."""
    return Path(shutil.copytree(folders("qwen2"), tmp_path / "mine"))


@pytest.mark.parametrize("name", ["gpt2", "llama", "llama-tied", "llama3", "mistral", "qwen2", "qwen3"])
def test_a_folder_becomes_a_bundle_that_a_plain_onnxruntime_runs(folders, tmp_path, name: str):
    folder, manifest = export_bundle(read_foreign(str(folders(name))), tmp_path, seed=3)
    session = onnxruntime.InferenceSession(folder / bundle.MODEL, providers=["CPUExecutionProvider"])
    model = AutoModelForCausalLM.from_pretrained(folders(name), dtype=torch.float32).eval()
    assert worst_error(model, session) <= min(1e-4, 2 * manifest.parity.bound)
    assert manifest.parity.max_rel <= manifest.parity.bound
    assert (manifest.name, manifest.family) == (name, model.config.model_type)
    assert manifest.activation == ("gelu_tanh" if name == "gpt2" else "swiglu")
    assert manifest.parameters == sum(weight.numel() for weight in model.parameters())
    assert manifest.quality is None
    assert (folder / bundle.TOKENIZER).read_bytes() == (folders(name) / bundle.TOKENIZER).read_bytes()


def test_shards_say_what_one_file_says(folders, tmp_path):
    random_model("llama").save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 2
    shutil.copy(folders("llama") / "tokenizer.json", tmp_path / "sharded")
    one, many = (read_foreign(str(folder)).decoder.weights for folder in (folders("llama"), tmp_path / "sharded"))
    assert one.keys() == many.keys()
    for key, array in one.items():
        np.testing.assert_array_equal(array, many[key])


def test_bfloat16_on_disk_is_float32_in_memory(folders, tmp_path):
    folder = Path(shutil.copytree(folders("llama"), tmp_path / "half"))
    model = random_model("llama").to(torch.bfloat16)
    model.save_pretrained(folder)
    read = read_foreign(str(folder)).decoder
    np.testing.assert_array_equal(read.weights["embed"], model.model.embed_tokens.weight.detach().float().numpy())


@pytest.mark.parametrize("name", ["gpt2", "mistral"])
def test_a_shorter_context_cuts_the_tables_and_nothing_else(folders, tmp_path, name: str):
    folder, manifest = export_bundle(read_foreign(str(folders(name)), context=20), tmp_path)
    assert manifest.context == 20
    session = onnxruntime.InferenceSession(folder / bundle.MODEL, providers=["CPUExecutionProvider"])
    model = random_model(name)
    prompt = np.arange(20) * 13 % V
    expected = model(input_ids=torch.from_numpy(prompt)[None]).logits[0, -1].detach().numpy()
    assert np.abs(run(session, prompt) - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("context", [0, CONTEXT + 1])
def test_a_context_that_the_model_does_not_know_is_refused(folders, context: int):
    with pytest.raises(BadInput, match=f"context {context} does not fit checkpoint 'llama', which knows 1 to 48"):
        read_foreign(str(folders("llama")), context=context).decoder  # noqa: B018


def _another_base(decoder):
    context, half = decoder.rope[0].shape
    angles = np.arange(context)[:, None] / 11000.0 ** (np.arange(half) / half)
    return {"rope": (np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32))}


def _without(*names: str) -> Callable:
    return lambda d: {"weights": {k: v for k, v in d.weights.items() if not any(name in k for name in names)}}


@pytest.mark.parametrize(
    ("name", "misread"),
    [
        ("llama", _another_base),
        ("llama", lambda d: {"norm_eps": 2e-5}),
        ("llama-yarn", lambda d: {"rope": tuple(table / 1.1386294 for table in d.rope)}),  # 0.1 ln 4 + 1
        ("llama-biases", _without("1.down.bias")),
        ("qwen2", _without("0.qkv.bias")),
        ("qwen3", _without("0.k_norm")),
        ("gpt2", lambda d: {"activation": activations.get("gelu")}),
        ("gpt2", lambda d: {"weights": {**d.weights, "position": np.roll(d.weights["position"], 1, axis=0)}}),
        ("gpt2-scales", lambda d: {"score_scales": (d.score_scales[0],) * 2}),
    ],
)
def test_the_gate_sees_a_reading_that_is_a_little_wrong(folders, tmp_path, monkeypatch, name: str, misread: Callable):
    right = exporter.decoder_of

    def wrong(*arguments):
        decoder = right(*arguments)
        return dataclasses.replace(decoder, **misread(decoder))

    checkpoint = read_foreign(str(folders(name)))
    monkeypatch.setattr(exporter, "decoder_of", wrong)
    with pytest.raises(GateFailed, match="misses parity"):
        export_bundle(checkpoint, tmp_path / "out", seed=5)
    assert not list((tmp_path / "out").iterdir())


def _config(**changed: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))

    return damage


def _weights(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def _cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _sharded(index: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "model-00001-of-00003.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return damage


THREE = {"weight_map": {str(i): f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)}}


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_pickled, ["pytorch_model.bin", "pickle", "save_pretrained(folder, safe_serialization=True)"]),
        (lambda f: (f / "model.safetensors").unlink(), ["holds neither model.safetensors nor", "save_pretrained"]),
        (_sharded(THREE), ["2 of its 3 shards", "model-00002-of-00003.safetensors, model-00003-of-00003"]),
        (_sharded({"weight_map": {"a": "../../elsewhere.safetensors"}}), ["index.json must map"]),
        (_sharded([]), ["index.json must hold a JSON object"]),
        (_cut, ["model.safetensors is cut short or damaged", "copy it again"]),
        (lambda f: (f / "model.safetensors").write_bytes(b"weights"), ["model.safetensors is cut short or damaged"]),
        (_weights(lambda w: w.pop("model.layers.1.mlp.up_proj.weight")), ["needs model.layers.1.mlp.up_proj.weight"]),
        (_weights(lambda w: w.update(extra=torch.ones(2))), ["holds extra, which the model does not have"]),
        (_config(vocab_size=V + 1), ["model.embed_tokens.weight has another shape, [300, 32]", "says [301, 32]"]),
        # Sizes that no machine has room for: shapes are compared before anything is allocated.
        (_config(vocab_size=10**11), ["another shape", "[100000000000, 32]"]),
        (_config(hidden_size=2**22, num_attention_heads=2**18), ["another shape"]),
        (_config(num_hidden_layers=10**6, layer_types=None), ["num_hidden_layers = 1000000"]),
        (_config(num_key_value_heads=3), ["num_key_value_heads = 3", "must divide num_attention_heads = 4"]),
        (_config(num_key_value_heads=0), ["num_key_value_heads = 0"]),
        (_config(intermediate_size=0), ["intermediate_size = 0"]),
        (
            _weights(lambda w: w["model.norm.weight"].__setitem__(3, torch.nan)),
            ["model.norm.weight holds NaN or infinity", "take another copy"],
        ),
        (_config(model_type="bert"), ["architecture 'bert'; we read: gpt2, llama, mistral, qwen2, qwen3"]),
        (_config(model_type=None), ["architecture None"]),
        (_config(model_type="actuary_gpt"), ["our own; export it without --from"]),
        (_config(quantization_config={"quant_method": "gptq"}), ["quantised", "gptq"]),
        (_config(hidden_act="gelu_new"), ["gelu_new", "swish"]),
        (_config(num_attention_heads=0), ["config.json", "num_attention_heads"]),
        (_config(max_position_embeddings=-1), ["max_position_embeddings = -1"]),
        (_config(rope_parameters={"rope_type": "spiral", "rope_theta": 1e4}), ["config.json", "spiral"]),
        (lambda f: (f / "config.json").write_text("{"), ["config.json cannot be read"]),
        (lambda f: (f / "config.json").unlink(), ["config.json is missing"]),
        (lambda f: (f / "tokenizer.json").write_text("{}"), ["tokenizer.json cannot be read"]),
        (lambda f: (f / "tokenizer.json").unlink(), ["holds no tokenizer.json, nor vocab.json"]),
        (lambda f: shutil.copy(f.parent / "large.json", f / "tokenizer.json"), ["301 entries, the model 300"]),
    ],
)
def test_bad_folders_are_refused_with_what_to_do(saved, corpus, damage: Callable, words: list[str]):
    padded_tokenizer(corpus.tokenizer(V), V + 1).save(str(saved.parent / "large.json"))
    damage(saved)
    with pytest.raises(BadInput) as refused:
        read_foreign(str(saved))
    assert all(word in str(refused.value) for word in words), refused.value
    assert refused.value.exit_code == 2


def test_a_slow_tokenizers_files_are_enough(folders, tmp_path):
    """GPT-2's vocab.json and merges.txt: the fast form is made of them."""
    folder = Path(shutil.copytree(folders("gpt2"), tmp_path / "slow"))
    parts = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(parts["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in parts["merges"]))
    made = Tokenizer.from_str(read_foreign(str(folder)).tokenizer_json.decode())
    given = Tokenizer.from_file(str(folders("gpt2") / "tokenizer.json"))
    assert made.encode("def f(x): return x").ids == given.encode("def f(x): return x").ids


@pytest.fixture
def text(tmp_path, corpus) -> Path:
    (tmp_path / "text.txt").write_text("\n".join(corpus.train)[:60000])
    return tmp_path / "text.txt"


def test_a_corpus_that_is_named_measures_what_is_lost(folders, text, tmp_path):
    """On the checkpoint's own tokens; held to the same share as our own."""
    given = ["--from", str(folders("qwen2")), "--precision", "int8", "--out", str(tmp_path / "out")]
    measured = CliRunner().invoke(export, [*given, "--corpus", str(text)])
    assert measured.exception is None, measured.exception
    quality = bundle.read_bundle(tmp_path / "out" / "qwen2").quality
    assert quality.tokens > 500
    assert quality.bits_per_byte != quality.fp32_bits_per_byte
    assert quality.bits_per_byte <= quality.fp32_bits_per_byte * (1 + exporter.MOST_LOSS)
    read = read_foreign(str(folders("qwen2")))
    tuning = Tuning(window=CONTEXT, held_out_tokens=exporter.FOREIGN_TOKENS)
    tokens = tokenized(Corpus.read([text]), Tokenizer.from_str(read.tokenizer_json.decode()), tuning)
    assert quality.fp32_bits_per_byte == pytest.approx(bits_per_byte(read.model, tokens, CONTEXT), rel=1e-5)
    # Without a text nothing is measured, and that is said.
    silent = CliRunner().invoke(export, given)
    assert silent.exception is None
    assert "what int8 loses on text was not measured" in " ".join(silent.stderr.split())
    assert bundle.read_bundle(tmp_path / "out" / "qwen2").quality is None


def test_another_familys_loss_past_the_limit_is_refused(folders, text, tmp_path, monkeypatch):
    monkeypatch.setattr(exporter, "MOST_LOSS", -0.01)
    with pytest.raises(GateFailed, match=r"bits per byte of held-out text, in float32 .*use --precision fp32"):
        export_bundle(
            read_foreign(str(folders("gpt2"))), tmp_path, precision="bf16", corpus=lambda: Corpus.read([text])
        )
    assert not list(tmp_path.rglob("model.onnx"))


def test_bf16_says_how_it_was_checked(folders, tmp_path):
    done = actuary("export", "--from", folders("gpt2"), "--precision", "bf16", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stderr.split())
    assert re.search("not run here: bf16 has no kernels on the CPU; checked (by emulation|on CUDA)", said), said
    assert "--precision fp32" not in said


def test_a_checkpoint_is_not_replaced_by_its_own_bundle(folders, tmp_path):
    folder = Path(shutil.copytree(folders("gpt2"), tmp_path / "dest" / "one" / "gpt2"))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for out, more in ((folder.parent, []), (folder.parent.parent, ["--name", "one"])):
        refused = CliRunner().invoke(export, ["--from", str(folder), "--out", str(out), *more]).exception
        assert isinstance(refused, BadInput), refused
        assert "holds the checkpoint itself; choose another --out or --name" in str(refused)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def actuary(*arguments: object) -> subprocess.CompletedProcess:
    command = [*ACTUARY, *map(str, arguments)]
    environment = {**os.environ, "NO_COLOR": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=HANG_S, env=environment)


def test_the_verb_exports_shows_and_serves(folders, tmp_path):
    done = actuary("export", "--from", folders("qwen2"), "--name", "little-qwen", "--out", tmp_path, "--json")
    assert done.returncode == 0, done.stderr
    (manifest,) = json.loads(done.stdout)
    assert (manifest["name"], manifest["family"], manifest["context"]) == ("little-qwen", "qwen2", CONTEXT)
    shown = actuary("inspect", tmp_path / "little-qwen").stdout
    assert "qwen2" in shown
    assert "not measured" in shown
    prompt = list(range(40, 60))
    with serving(tmp_path) as (url, _):
        body = json.dumps({"model": "little-qwen", "prompt": prompt, "top_k": 5}).encode()
        request = urllib.request.Request(f"{url}/v1/next-token", body, {"Content-Type": "application/json"})
        answer = json.load(urllib.request.urlopen(request))
    logits = random_model("qwen2")(input_ids=torch.tensor([prompt])).logits[0, -1]
    softmax = torch.softmax(logits.detach().double(), -1)
    top = answer["results"][0]["top"]
    assert [entry["id"] for entry in top] == softmax.topk(5).indices.tolist()
    assert [entry["softmax"] for entry in top] == pytest.approx(softmax.topk(5).values.tolist(), rel=1e-3)


def test_bad_input_is_exit_code_2_and_leaves_nothing(saved, tmp_path):
    _cut(saved)
    refused = actuary("export", "--from", saved, "--out", tmp_path / "out")
    assert refused.returncode == 2
    assert "cut short or damaged" in " ".join(refused.stderr.split())
    assert "Traceback" not in refused.stderr
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--from", "/nowhere/absent"], "/nowhere/absent is not a folder"),
        (["--from", "nobody/nothing"], "the hub does not give"),
        (["--from", "{saved}", "{saved}"], "one of the three"),
        (["--from", "{saved}", "--random"], "one of the three"),
        (["--from", "{saved}", "--dim", "64"], "--dim goes with --random"),
        (["--from", "{saved}", "--context", "64", "--name", "mine"], "knows 1 to 48 positions"),
        (["{saved}"], "actuary export --from"),
        (["--from", "{saved}", "--name", "../mine"], "cannot name a bundle"),
    ],
)
def test_the_verb_refuses(saved, tmp_path, monkeypatch, arguments: list[str], words: str):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    given = [argument.format(saved=saved) for argument in arguments]
    refused = CliRunner().invoke(export, [*given, "--out", str(tmp_path / "out")]).exception
    assert isinstance(refused, BadInput)
    assert words in str(refused)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
