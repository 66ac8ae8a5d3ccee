"""Export: what a bundle holds, what the gate refuses, and what bad input leaves behind."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import ACTUARY, TINY
from safetensors.torch import load_file, save_file

from actuary import BadInput, GateFailed
from export import bundle, exporter
from export.exporter import export_bundle, find_checkpoints, read_checkpoint
from export.graph import build
from export.parity import check_model, model_bound
from models import activations

V, CONTEXT = TINY["vocab_size"], TINY["context"]


@pytest.fixture(scope="module")
def session(bundles: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(bundles / "gelu" / bundle.MODEL, providers=["CPUExecutionProvider"])


@pytest.fixture
def saved(tiny_checkpoint, tmp_path) -> Path:
    """A checkpoint folder that a test may damage."""
    checkpoint = tiny_checkpoint("gelu")
    folder = tmp_path / "gelu"
    checkpoint.model.save_pretrained(folder)
    (folder / bundle.TOKENIZER).write_bytes(checkpoint.tokenizer_json)
    return folder


def run(session, prompts: list[list[int]], width: int | None = None, top_k: int = 5) -> dict[str, np.ndarray]:
    """Outputs of prompts padded to `width` with arbitrary ids."""
    ids = np.random.default_rng(0).integers(0, V, size=(len(prompts), width or max(map(len, prompts))))
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    feed = {"input_ids": ids, "lengths": np.array([len(p) for p in prompts]), "top_k": np.array([top_k])}
    return dict(zip(bundle.OUTPUTS, session.run(list(bundle.OUTPUTS), feed), strict=True))


def test_manifest_says_what_the_file_is(bundles: Path):
    manifest = json.loads((bundles / "swiglu" / "manifest.json").read_text())
    identity = {"schema", "name", "activation", "formula", "kind", "head", "precision", "flavor", "opset", "created"}
    shape = {"vocab_size", "context", "layers", "dim", "parameters"}
    assert identity | shape | {"quality", "parity", "files", "versions"} <= set(manifest)
    assert (manifest["schema"], manifest["opset"], manifest["formula"]) == (1, 20, "gate * sigmoid(gate) * up")
    assert set(manifest["parity"]) >= {"max_abs", "max_rel", "bound"}
    assert set(manifest["files"]) == {"model.onnx", "tokenizer.json"}
    model = onnx.load(bundles / "swiglu" / "model.onnx")
    assert {(entry.domain, entry.version) for entry in model.opset_import} == {("", 20), (bundle.DOMAIN, 1)}
    shapes = {
        i.name: [d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim]
        for i in (*model.graph.input, *model.graph.output)
    }
    assert shapes["input_ids"] == ["batch", "time"]
    assert shapes["logits"] == ["batch", V]
    assert shapes["top_ids"] == ["batch", "top"]
    weights = sum(np.prod(tensor.dims) for tensor in model.graph.initializer)
    assert weights >= manifest["parameters"]


def test_the_last_position_is_gathered_before_the_vocabulary(bundles: Path):
    """No product of the graph may have both a time axis and the vocabulary's width."""
    model = onnx.load(bundles / "gelu" / "model.onnx")
    order = [node.op_type for node in model.graph.node]
    head = next(i for i, node in enumerate(model.graph.node) if "head.weight" in node.input)
    assert order.index("GatherND") < head
    domain_nodes = [i for i, node in enumerate(model.graph.node) if node.domain == bundle.DOMAIN]
    assert order.index("GatherND") < domain_nodes[-1]  # the last block's FFN sees one row a prompt


def test_a_batch_of_different_lengths_equals_each_alone(session):
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, V, size=n).tolist() for n in (1, 2, 9, 31, CONTEXT, 9)]
    together = run(session, prompts, width=CONTEXT)
    # Both are within the model bound of the exact logits, so within twice that of each other.
    manifest_bound = 2 * 1e-4
    for i, prompt in enumerate(prompts):
        alone = run(session, [prompt])
        for name in (bundle.LOGITS, bundle.SOFTMAX, bundle.SIGMOID, bundle.MASS, bundle.ENTROPY_BITS):
            np.testing.assert_allclose(together[name][i], alone[name][0], rtol=manifest_bound, atol=1e-6)
        assert together[bundle.TOP_IDS][i].tolist() == alone[bundle.TOP_IDS][0].tolist()


@pytest.mark.parametrize("top_k", [0, 1, V])
def test_top_k_may_be_anything_up_to_the_vocabulary(session, top_k: int):
    outputs = run(session, [[1, 2, 3]], top_k=top_k)
    expected = np.argsort(-outputs[bundle.LOGITS][0], kind="stable")[:top_k]
    assert outputs[bundle.TOP_IDS][0].tolist() == expected.tolist()


@pytest.mark.parametrize("scale", [1e4, 1e6])
def test_extreme_logits_give_no_nan(tiny_checkpoint, scale: float):
    """Logits of +-1e4 and more: probabilities, mass and entropy stay numbers, and what they must be."""
    checkpoint = tiny_checkpoint("gelu")
    weights = {name: tensor.numpy().copy() for name, tensor in checkpoint.model.state_dict().items()}
    weights["head_bias"] = np.linspace(-scale, scale, V).astype(np.float32)
    config = checkpoint.model.config
    model = build(config, activations.get("gelu"), weights)
    outputs = run(
        onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]), [[5, 6, 7]]
    )
    assert all(np.isfinite(value).all() for value in outputs.values())
    assert outputs[bundle.MASS][0, 0] == pytest.approx(1, abs=1e-5)
    assert outputs[bundle.MASS][0, 1] == pytest.approx(V / 2, rel=0.02)
    assert outputs[bundle.ENTROPY_BITS][0, 0] == pytest.approx(0, abs=1e-3)
    assert outputs[bundle.ENTROPY_BITS][0, 1] == pytest.approx(np.log2(V / 2), rel=0.01)


@pytest.mark.parametrize(
    "damage",
    [
        lambda weights: weights.update(
            {"blocks.0.ffn.down.weight": weights["blocks.0.ffn.down.weight"] * np.float32(1.0005)}
        ),
        lambda weights: weights.update(
            {"head_bias": weights["head_bias"] + np.eye(1, V, 7, dtype=np.float32)[0] * np.float32(1e-3)}
        ),
        lambda weights: weights.update(
            {"blocks.1.attention.q_norm.weight": weights["blocks.1.attention.q_norm.weight"] * np.float32(1.002)}
        ),
    ],
)
def test_the_gate_sees_a_model_that_is_a_little_wrong(tiny_checkpoint, damage):
    checkpoint = tiny_checkpoint("gelu")
    weights = {name: tensor.numpy().copy() for name, tensor in checkpoint.model.state_dict().items()}
    config = checkpoint.model.config
    right = onnxruntime.InferenceSession(
        build(config, activations.get("gelu"), weights).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    _, max_rel, left_out = check_model(config, checkpoint.model, right.run, seed=4)
    assert max_rel <= model_bound(config)
    assert left_out == 0
    damage(weights)
    wrong = onnxruntime.InferenceSession(
        build(config, activations.get("gelu"), weights).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    with pytest.raises(GateFailed, match=r"'gelu' misses parity: logit of token \d+ .*allowed"):
        check_model(config, checkpoint.model, wrong.run, seed=4)


def test_a_model_that_fails_the_gate_is_not_written_and_the_old_bundle_stays(tiny_checkpoint, tmp_path, monkeypatch):
    export_bundle(tiny_checkpoint("gelu"), tmp_path)
    before = {path.name: path.read_bytes() for path in (tmp_path / "gelu").iterdir()}
    monkeypatch.setattr(
        exporter,
        "build",
        lambda config, activation, weights: build(
            config, activation, weights | {"head_bias": weights["head_bias"] + 1}
        ),
    )
    with pytest.raises(GateFailed):
        export_bundle(tiny_checkpoint("gelu"), tmp_path)
    assert {path.name: path.read_bytes() for path in (tmp_path / "gelu").iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["activations.json", "gelu"]


def test_a_step_on_the_edge_is_left_out_of_the_comparison_and_counted(tiny_checkpoint):
    """threshold jumps where rounding decides; what torch itself cannot decide is not held against the export."""
    checkpoint = tiny_checkpoint("threshold")
    config = checkpoint.model.config
    weights = {name: tensor.numpy().copy() for name, tensor in checkpoint.model.state_dict().items()}
    session = onnxruntime.InferenceSession(
        build(config, activations.get("threshold"), weights).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    for seed in range(5):
        _, max_rel, _ = check_model(config, checkpoint.model, session.run, seed)
        assert max_rel <= model_bound(config)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _reshape(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["norm.weight"] = torch.ones(7)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _drop(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["norm.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _nan(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["norm.weight"][3] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _config(folder: Path, **changes) -> None:
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | changes))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").write_text("{"), "cannot be read"),
        (lambda f: _config(f, model_type="gpt2"), "is a 'gpt2'; `actuary export` reads 'actuary_gpt'"),
        (lambda f: _config(f, activation="geul"), "did you mean 'gelu'"),
        (lambda f: _config(f, dim=48), "cannot be read|do not fit"),
        (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "model.safetensors is missing"),
        (lambda f: _cut(f / "model.safetensors"), "cannot be read"),
        (_reshape, "cannot be read|do not fit"),
        (_drop, "do not fit its config.json at norm.weight"),
        (_nan, "norm.weight holds NaN or infinity"),
        (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer.json"),
        (lambda f: (f / "quality.json").write_text("[]"), "cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_name(saved, tmp_path, damage, message):
    damage(saved)
    with pytest.raises(BadInput, match=message):
        export_bundle(read_checkpoint(saved), tmp_path / "out")
    assert not list((tmp_path / "out").glob("*"))


def test_an_output_that_is_not_a_folder_is_refused(tiny_checkpoint, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match=r"cannot write to .*choose another folder with --out"):
        export_bundle(tiny_checkpoint("gelu"), tmp_path / "file" / "inside")


@pytest.mark.parametrize("name", ["../up", "a/b", ".hidden", "", "x" * 200])
def test_a_name_that_is_no_folder_name_is_refused(tiny_checkpoint, tmp_path, name):
    with pytest.raises(BadInput):
        export_bundle(tiny_checkpoint("gelu"), tmp_path / "out", name=name)
    assert not list(tmp_path.rglob("model.onnx"))


def test_folders_of_checkpoints_are_found(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "set" / "b")
    shutil.copytree(saved, tmp_path / "set" / "a")
    assert find_checkpoints([tmp_path / "set"]) == [tmp_path / "set" / "a", tmp_path / "set" / "b"]
    assert find_checkpoints([saved, saved]) == [saved]
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="neither a checkpoint"):
        find_checkpoints([tmp_path / "empty"])


WITHOUT_THE_SERVICE = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("service", "fastapi", "uvicorn", "starlette", "locust"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Refuse())
import actuary
actuary.main(sys.argv[1:])
"""


def test_the_verb_works_where_the_service_is_not_installed(saved, tmp_path):
    command = [
        sys.executable,
        "-c",
        WITHOUT_THE_SERVICE,
        "export",
        str(saved),
        "--out",
        str(tmp_path / "out"),
        "--name",
        "mine",
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (manifest,) = json.loads(done.stdout)
    assert manifest["name"] == "mine"
    assert bundle.read_bundle(tmp_path / "out" / "mine").name == "mine"
    serve = subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_SERVICE, "serve"], capture_output=True, text=True, timeout=60
    )
    assert serve.returncode == 2
    assert "pip install 'actuary[serve]'" in serve.stderr


def actuary(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run([*ACTUARY, *arguments], capture_output=True, text=True, timeout=120, cwd=cwd)


def test_random_weights_of_any_shape(tmp_path):
    shape = [
        "--layers",
        "1",
        "--dim",
        "24",
        "--heads",
        "3",
        "--context",
        "16",
        "--vocab",
        "300",
        "--gated-width",
        "full",
    ]
    done = actuary("export", "--random", "--activation", "geglu", *shape, "--out", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    manifest = bundle.read_bundle(tmp_path / "out" / "geglu-random")
    assert (manifest.hidden, manifest.heads, manifest.vocab_size, manifest.quality) == (96, 3, 300, None)
    inspected = actuary("inspect", "out/geglu-random", "--json", cwd=tmp_path)
    assert json.loads(inspected.stdout)["activation"] == "geglu"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name the checkpoints to export, or give --random"),
        (["--random"], "--random needs --activation"),
        (["--random", "--activation", "nope"], "unknown activation 'nope'"),
        (["/nowhere"], "does not exist"),
        ([".", "--random", "--activation", "gelu"], "not both"),
        ([".", "--dim", "64"], "--dim goes with --random"),
        (["--random", "--activation", "gelu", "--precision", "fp13"], "'fp13' is not"),
    ],
)
def test_bad_arguments_exit_with_2(tmp_path, arguments, message):
    done = actuary("export", *arguments, "--out", "out", cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert message in " ".join(done.stderr.split())
    assert not (tmp_path / "out").exists()
