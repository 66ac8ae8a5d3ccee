"""Export: what a bundle holds, what the gate refuses, and what bad input leaves behind."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from conftest import ACTUARY, TINY
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from actuary import BadInput, GateFailed
from export import bundle, cli, exporter, parity_float32, prompt_runs
from export.exporter import export_bundle, find_checkpoints, read_checkpoint
from export.graph import build
from export.graph_parts import Flavor
from export.parity_float32 import check_model, model_bound
from models import activations
from models.decoder import Decoder, from_actuary
from models.decoder import decoder_of as any_decoder_of
from models.files import new_folder

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


def decoder_of(checkpoint: exporter.Checkpoint) -> Decoder:
    return from_actuary(checkpoint.model, checkpoint.name)


def changed(decoder: Decoder, weights: dict[str, np.ndarray]) -> Decoder:
    return dataclasses.replace(decoder, weights={**decoder.weights, **weights})


def open_built(decoder: Decoder, flavor: Flavor = "ort") -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(build(decoder, flavor).SerializeToString(), providers=["CPUExecutionProvider"])


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
    assert {(entry.domain, entry.version) for entry in model.opset_import} == {
        ("", 20),
        (bundle.DOMAIN, 1),
        ("com.microsoft", 1),
    }
    shapes = {
        i.name: [d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim]
        for i in (*model.graph.input, *model.graph.output)
    }
    assert shapes["input_ids"] == ["batch", "time"]
    assert shapes["logits"] == ["asked", V]  # one row a prompt, and one for each of `rows`
    assert shapes["top_ids"] == ["asked", "top"]
    weights = sum(np.prod(tensor.dims) for tensor in model.graph.initializer)
    assert weights >= manifest["parameters"]


def test_the_last_position_is_gathered_before_the_vocabulary(bundles: Path):
    """No product of the graph may have both a time axis and the vocabulary's width."""
    model = onnx.load(bundles / "gelu" / "model.onnx")
    order = [node.op_type for node in model.graph.node]
    reads = {name: i for i, node in enumerate(model.graph.node) for name in node.input}
    gathered = order.index("CachedAttentionOfRows")
    assert gathered < reads["blocks.1.up.weight"] < reads["head.weight"]  # the last block's FFN sees one row a prompt


def test_a_batch_of_different_lengths_equals_each_alone(session, tiny_checkpoint):
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, V, size=n).tolist() for n in (1, 2, 9, 31, CONTEXT, 9)]
    together = run(session, prompts, width=CONTEXT)
    # Both are within the model bound of the exact logits, so within twice that of each other; an error of d in the
    # logits is one of at most 2 d, relative, in a softmax, and of log2(e) (2 d) * logits in an entropy.
    bound = 2 * model_bound(decoder_of(tiny_checkpoint("gelu")))
    for i, prompt in enumerate(prompts):
        alone = run(session, [prompt])
        d = bound * float(np.abs(alone[bundle.LOGITS]).max())
        np.testing.assert_allclose(together[bundle.LOGITS][i], alone[bundle.LOGITS][0], rtol=0, atol=d)
        for name in (bundle.SOFTMAX, bundle.SIGMOID, bundle.MASS, bundle.ENTROPY_BITS):
            np.testing.assert_allclose(together[name][i], alone[name][0], rtol=4 * d, atol=1e-30)
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
    model = build(changed(decoder_of(checkpoint), {"head.bias": np.linspace(-scale, scale, V, dtype=np.float32)}))
    outputs = run(
        onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]), [[5, 6, 7]]
    )
    assert all(np.isfinite(value).all() for value in outputs.values())
    assert outputs[bundle.MASS][0, 0] == pytest.approx(1, abs=1e-5)
    assert outputs[bundle.MASS][0, 1] == pytest.approx(V / 2, rel=0.02)
    assert outputs[bundle.ENTROPY_BITS][0, 0] == pytest.approx(0, abs=1e-3)
    assert outputs[bundle.ENTROPY_BITS][0, 1] == pytest.approx(np.log2(V / 2), rel=0.01)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("blocks.0.down.weight", lambda w: w * np.float32(1.0005)),
        ("head.bias", lambda w: w + np.eye(1, V, 7, dtype=np.float32)[0] * np.float32(1e-3)),
        ("blocks.1.q_norm.weight", lambda w: w * np.float32(1.002)),
    ],
)
def test_the_gate_sees_a_model_that_is_a_little_wrong(tiny_checkpoint, name, damage):
    checkpoint = tiny_checkpoint("gelu")
    decoder = decoder_of(checkpoint)
    _, max_rel, left_out = check_model(decoder, checkpoint.model, open_built(decoder).run, seed=4)
    assert max_rel <= model_bound(decoder)
    assert left_out == 0
    wrong = open_built(changed(decoder, {name: damage(decoder.weights[name])}))
    with pytest.raises(GateFailed, match=r"'gelu' misses parity: logit of token \d+ .*allowed"):
        check_model(decoder, checkpoint.model, wrong.run, seed=4)


def test_the_gate_sees_a_sigmoid_that_is_wrong_in_its_tail(tiny_checkpoint):
    """ONNX Runtime's own Sigmoid is right to 1e-7 absolute: on an unlikely token that is no digit at all."""
    checkpoint = tiny_checkpoint("gelu")
    with torch.no_grad():
        checkpoint.model.head_bias -= 15
    decoder = decoder_of(checkpoint)
    model = build(decoder)
    (node,) = [node for node in model.graph.node if bundle.SIGMOID in node.output]
    node.op_type = "Sigmoid"
    node.input[0] = bundle.LOGITS
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    with pytest.raises(GateFailed, match="the graph's sigmoid misses its definition"):
        check_model(decoder, checkpoint.model, session.run, seed=2)


def test_weights_past_a_size_lie_beside_the_model(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(prompt_runs, "IN_MEMORY_BYTES", 1000)
    folder, manifest = export_bundle(tiny_checkpoint("swiglu"), tmp_path)
    assert set(manifest.files) == {"model.onnx", "model.onnx.data", "tokenizer.json"}
    assert (folder / "model.onnx").stat().st_size < (folder / "model.onnx.data").stat().st_size
    assert bundle.read_bundle(folder) == manifest


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_another_type_are_exported_in_float32(saved, tmp_path, dtype):
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(saved / "model.safetensors").items()}
    save_file(tensors, saved / "model.safetensors", {"format": "pt"})
    _config(saved, dtype=str(dtype).removeprefix("torch."))
    assert export_bundle(read_checkpoint(saved), tmp_path / "out")[1].precision == "fp32"


def test_a_checkpoint_of_another_formula_is_refused(saved):
    measured = {"bits_per_byte": 2.0, "ece": 0.01, "sigmoid_mass": 1.0, "seconds": 1.0, "corpus_sha256": "0"}
    recipe = {"formula": activations.get("gelu").digest}
    (saved / "quality.json").write_text(json.dumps(measured | {"recipe": recipe}))
    assert read_checkpoint(saved).quality.bits_per_byte == 2.0
    (saved / "quality.json").write_text(json.dumps(measured | {"recipe": recipe | {"formula": "0" * 12}}))
    with pytest.raises(BadInput, match="was trained when 'gelu' had another formula"):
        read_checkpoint(saved)


def test_a_model_that_fails_the_gate_is_not_written_and_the_old_bundle_stays(tiny_checkpoint, tmp_path, monkeypatch):
    export_bundle(tiny_checkpoint("gelu"), tmp_path)
    before = {path.name: path.read_bytes() for path in (tmp_path / "gelu").iterdir()}
    monkeypatch.setattr(
        exporter,
        "build",
        lambda decoder, *a, **k: build(changed(decoder, {"head.bias": decoder.weights["head.bias"] + 1}), *a, **k),
    )
    with pytest.raises(GateFailed):
        export_bundle(tiny_checkpoint("gelu"), tmp_path)
    assert {path.name: path.read_bytes() for path in (tmp_path / "gelu").iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["activations.json", "gelu"]


def test_what_torch_itself_cannot_decide_is_left_out_and_counted(tiny_checkpoint, monkeypatch):
    """A step function may fall either way within rounding: then torch's own float32 misses its float64."""
    checkpoint = tiny_checkpoint("threshold")
    decoder = decoder_of(checkpoint)
    session = open_built(decoder)
    torch_logits, flips = parity_float32._torch_logits, 3

    def flipping(model, prompt):
        nonlocal flips
        flips -= model.dtype == torch.float32
        return torch_logits(model, prompt) + (0.01 if model.dtype == torch.float32 and flips >= 0 else 0)

    monkeypatch.setattr(parity_float32, "_torch_logits", flipping)
    assert check_model(decoder, checkpoint.model, session.run, seed=1)[2] == 3
    flips = parity_float32.PROBES
    with pytest.raises(GateFailed, match="is not determined in float32"):
        check_model(decoder, checkpoint.model, session.run, seed=1)


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
        (lambda f: _config(f, layers="two"), "layers must be a whole number of at least 1, not 'two'"),
        (lambda f: _config(f, dim=None), "dim must be a whole number"),
        (lambda f: _config(f, activation=5), "activation must be a name of the registry, not 5"),
        (lambda f: _config(f, gated_width="half"), "gated_width must be matched or full, not 'half'"),
        (lambda f: (f / "config.json").write_text("[]"), "config.json must hold an object"),
        (lambda f: (f / "quality.json").write_text("{"), "cannot be read"),
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


def _long_rope(tiny_checkpoint) -> exporter.Checkpoint:
    return tiny_checkpoint("gelu", context=2048)


def _long_position(tiny_checkpoint) -> exporter.Checkpoint:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=V, n_positions=2048, n_embd=32, n_layer=1, n_head=2)).eval()
    return exporter.Checkpoint("gpt2", model, tiny_checkpoint("gelu").tokenizer_json, quality=None)


def _damaged_past_1500(*arguments) -> Decoder:
    decoder = any_decoder_of(*arguments)
    if decoder.rope is None:
        position = decoder.weights["position"].copy()
        position[1500:] = 0
        return changed(decoder, {"position": position})
    cos, sin = (table.copy() for table in decoder.rope)
    cos[1500:], sin[1500:] = 1, 0
    return dataclasses.replace(decoder, rope=(cos, sin))


def test_an_output_that_is_not_a_folder_is_refused(tiny_checkpoint, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match=r"cannot write to .*choose a folder that you may write to"):
        export_bundle(tiny_checkpoint("gelu"), tmp_path / "file" / "inside")


def _tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("there", ["checkpoint", "folder", "file", "link"])
def test_what_is_no_bundle_is_never_replaced(saved, tiny_checkpoint, tmp_path, monkeypatch, there):
    """`actuary export --out` of the checkpoints' own folder would else delete the checkpoint that it exports."""
    target = tmp_path / "out" / "gelu"
    target.parent.mkdir()
    if there == "checkpoint":
        saved.rename(target)
        saved = target
    elif there == "folder":
        target.mkdir()
        (target / "notes.txt").write_text("mine")
    elif there == "file":
        target.write_text("mine")
    else:
        (tmp_path / "elsewhere").mkdir()
        target.symlink_to(tmp_path / "elsewhere")
    before = _tree(tmp_path)
    monkeypatch.setattr(exporter, "read_checkpoint", lambda folder: pytest.fail("it was read"))
    refused = CliRunner().invoke(cli.export, [str(saved), "--out", str(tmp_path / "out")]).exception
    assert isinstance(refused, BadInput), refused
    assert "choose another --out or --name" in str(refused)
    with pytest.raises(BadInput, match="is not a bundle"):
        export_bundle(tiny_checkpoint("gelu"), tmp_path / "out")
    assert _tree(tmp_path) == before
    assert target.is_symlink() == (there == "link")


def test_an_empty_folder_and_a_bundle_are_replaced(tiny_checkpoint, tmp_path):
    (tmp_path / "gelu").mkdir()
    first = export_bundle(tiny_checkpoint("gelu"), tmp_path, seed=1)[1]
    assert export_bundle(tiny_checkpoint("gelu"), tmp_path, flavor="portable")[1].flavor != first.flavor


@pytest.mark.parametrize("renames", [0, 1, 2], ids=["before both", "between them", "after both"])
def test_ctrl_c_at_the_swap_in_leaves_one_of_the_two(tmp_path, monkeypatch, renames):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old").write_text("")
    rename, count = Path.rename, 0

    def interrupted(self, target):
        nonlocal count
        count += 1
        if count == renames + 1:
            raise KeyboardInterrupt
        done = rename(self, target)
        if count == renames == 2:
            raise KeyboardInterrupt
        return done

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "a") as folder:
        (folder / "new").write_text("")
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == [
        "a",
        "a/new" if renames == 2 else "a/old",
    ]


ENDED = """
import os, signal, sys, time
from pathlib import Path
import actuary
from export import exporter
def check(*_):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(10)
exporter.parity.check = check
actuary.main(sys.argv[1:])
"""


def test_sigterm_leaves_no_half_written_folder(saved, tmp_path):
    command = [sys.executable, "-c", ENDED, "export", str(saved), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert "ended by SIGTERM" in done.stderr
    assert not list((tmp_path / "out").iterdir())


def test_a_disk_that_is_full_is_told_in_a_line(saved, tmp_path):
    """A limit on a file's size says EFBIG where a full disk says ENOSPC."""
    command = ["bash", "-c", f'ulimit -f 20; exec "$0" "$@" export {saved} --out {tmp_path / "out"}', *ACTUARY]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert "actuary: no room left in" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("make", [_long_rope, _long_position], ids=["rope", "position"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_gate_sees_a_table_that_is_wrong_past_the_long_prompts(
    tmp_path, tiny_checkpoint, monkeypatch, make, precision
):
    """Positions that no probe reaches, of a model too large for a prompt of its whole context."""
    monkeypatch.setattr(parity_float32, "WHOLE_PARAMETERS", 0)
    checkpoint = make(tiny_checkpoint)
    _, manifest = export_bundle(checkpoint, tmp_path, precision=precision)
    assert manifest.parity.longest_prompt == 1024
    monkeypatch.setattr(exporter, "decoder_of", _damaged_past_1500)
    with pytest.raises(GateFailed, match=r"its table (rope.cos|position) says .* of position 1500, channel"):
        export_bundle(checkpoint, tmp_path, precision=precision)


def test_a_small_model_is_asked_with_its_whole_context(tiny_checkpoint, tmp_path):
    _, manifest = export_bundle(tiny_checkpoint("gelu", context=1100), tmp_path)
    assert (manifest.parity.longest_prompt, manifest.parity.probes) == (1100, parity_float32.PROBES + 1)


@pytest.mark.parametrize("arguments", [[], ["--random", "--activation", "gelu", "--precision", "int8"]])
def test_a_corpus_that_nothing_reads_is_refused(saved, tmp_path, arguments):
    given = [*(arguments or [str(saved)]), "--corpus", __file__, "--out", str(tmp_path / "out")]
    refused = CliRunner().invoke(cli.export, given).exception
    assert isinstance(refused, BadInput), refused
    assert "--corpus is the text on which int8, fp16 and bf16 are measured" in str(refused)


def test_a_folders_name_that_names_no_bundle_is_refused_before_it_is_read(saved, tmp_path, monkeypatch):
    bad = saved.rename(saved.with_name("my model"))
    monkeypatch.setattr(exporter, "read_checkpoint", lambda folder: pytest.fail("it was read"))
    refused = CliRunner().invoke(cli.export, [str(bad), "--out", str(tmp_path / "out")]).exception
    assert "'my model' cannot name a bundle" in str(refused)
    assert "choose one with --name" in str(refused)


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
    (tmp_path / "set" / ".gelu.x1y2").mkdir()  # what a killed export leaves
    shutil.copytree(saved, tmp_path / "set" / ".gelu.x1y2" / "new")
    assert len(find_checkpoints([tmp_path / "set"])) == 2
    with pytest.raises(BadInput, match="have one name; export them one at a time, with --name"):
        exporter.check_names([saved, tmp_path / "elsewhere" / "gelu"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="neither a checkpoint"):
        find_checkpoints([tmp_path / "empty"])


WITHOUT = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[1].split(","):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Refuse())
import actuary
actuary.main(sys.argv[2:])
"""


def without(packages: str, *arguments: str) -> subprocess.CompletedProcess:
    """The program where these packages are not installed."""
    command = [sys.executable, "-c", WITHOUT, packages, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def test_the_verb_works_where_the_service_is_not_installed(saved, tmp_path):
    done = without(
        "service,fastapi,uvicorn,starlette,locust",
        "export",
        str(saved),
        "--out",
        str(tmp_path / "out"),
        "--name",
        "mine",
        "--json",
    )
    assert done.returncode == 0, done.stderr
    (manifest,) = json.loads(done.stdout)
    assert manifest["name"] == "mine"
    assert bundle.read_bundle(tmp_path / "out" / "mine").name == "mine"


@pytest.mark.parametrize(
    ("packages", "verb", "message"),
    [
        ("torch", ["train"], "needs the package 'torch', which is not installed"),
        ("torch", ["list"], "pip install -e '.[train]'"),
        ("fastapi", ["serve"], "pip install -e '.[serve]'"),
        ("uvicorn", ["serve"], "pip install -e '.[serve]'"),
        ("numpy", ["load"], "needs the package 'numpy'"),
        ("loadtest", ["load"], "`actuary load` is not part of this installation: it leaves loadtest"),
    ],
)  # fmt: skip
def test_a_missing_package_is_named_with_its_remedy(packages, verb, message):
    done = without(packages, *verb)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr


def test_random_weights_of_any_shape(tmp_path, actuary_here, corpus, monkeypatch):
    """With the small corpus' tokenizer: that of the default one takes 20 s."""
    monkeypatch.setattr("models.corpus.Corpus.read", lambda *_: corpus)
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
    done = actuary_here("export", "--random", "--activation", "geglu", *shape, "--out", "out")
    assert done.returncode == 0, done.stderr
    manifest = bundle.read_bundle(tmp_path / "out" / "geglu-random")
    assert (manifest.hidden, manifest.heads, manifest.vocab_size, manifest.quality) == (96, 3, 300, None)
    inspected = actuary_here("inspect", "out/geglu-random", "--json")
    assert json.loads(inspected.stdout)["activation"] == "geglu"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name the checkpoints to export, or give --from"),
        (["--random"], "--random needs --activation"),
        (["--random", "--activation", "nope"], "unknown activation 'nope'"),
        (["/nowhere"], "does not exist"),
        ([".", "--random", "--activation", "gelu"], "one of the three"),
        ([".", "--dim", "64"], "--dim goes with --random"),
        (["--random", "--activation", "gelu", "--precision", "fp13"], "'fp13' is not"),
    ],
)
def test_bad_arguments_exit_with_2(tmp_path, actuary_here, arguments, message):
    done = actuary_here("export", *arguments, "--out", "out")
    assert done.returncode == 2, done.stderr
    assert message in " ".join(done.stderr.split())
    assert not (tmp_path / "out").exists()
