"""`actuary swap`: what each kind of swap keeps, that tuning helps, that it resumes, exports, and refuses."""

from __future__ import annotations

import copy
import json
import subprocess
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from conftest import ACTUARY, HANG_S
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from actuary import BadInput
from export.exporter import export_bundle, read_foreign
from models import activations, cli, swap
from models.checkpoints import read_pretrained
from models.corpus import padded_tokenizer
from models.swap import Text, Tuning, bits_per_byte, swap_activation, tune
from models.train import Stopped

V, T = 300, 32
GPT2 = GPT2Config(vocab_size=V, n_positions=T, n_embd=32, n_layer=2, n_head=2, n_inner=96, attn_pdrop=0, resid_pdrop=0,
                  embd_pdrop=0)  # fmt: skip
LLAMA = LlamaConfig(vocab_size=V, max_position_embeddings=T, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                    num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True)  # fmt: skip


def model_of(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture
def ids():
    return torch.from_numpy(np.random.default_rng(0).integers(0, V, size=(2, T)))


@pytest.fixture(params=["gpt2", "llama"])
def saved(request, tmp_path, corpus):
    model = model_of(GPT2 if request.param == "gpt2" else LLAMA)
    folder = tmp_path / request.param
    model.save_pretrained(folder)
    padded_tokenizer(corpus.tokenizer(V), V).save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize(("config", "own"), [(GPT2, "gelu_tanh"), (LLAMA, "swiglu")])
def test_a_swap_to_the_same_activation_changes_nothing(config, own, ids):
    model = model_of(config)
    before = model(ids).logits
    swap_activation(model, activations.get(own))
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-5)


def test_a_gated_form_starts_as_the_pointwise_one_it_is_made_of(ids):
    """geglu with up = 1 is gelu: at full width the swap keeps the function, whatever the weights are."""
    pointwise, gated = model_of(GPT2), model_of(GPT2)
    swap_activation(pointwise, activations.get("gelu"))
    swap_activation(gated, activations.get("geglu"), "full")
    torch.testing.assert_close(gated(ids).logits, pointwise(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("config", "name"), [(GPT2, "swiglu"), (LLAMA, "gelu")])
def test_matched_width_keeps_the_parameters(config, name):
    model = model_of(config)
    before = model.num_parameters()
    swap_activation(model, activations.get(name))
    assert model.num_parameters() == pytest.approx(before, rel=0.03)


def test_the_units_that_are_kept_are_the_large_ones():
    model = model_of(GPT2)
    with torch.no_grad():
        model.transformer.h[0].mlp.c_proj.weight[:32] *= 1e-3  # [in, out]: units 0 to 31 say next to nothing
    swap_activation(model, activations.get("reglu"))
    assert float(model.transformer.h[0].mlp.down.weight.detach().norm(dim=0).min()) > 0.1


def test_a_narrow_block_is_swapped_to_a_gated_form(ids):
    """Four units: a gated form keeps them all, since it can keep no more."""
    config = copy.deepcopy(GPT2)
    config.n_inner = 4
    model = model_of(config)
    swap_activation(model, activations.get("swiglu"))
    assert model.transformer.h[0].mlp.down.weight.shape == (32, 4)
    assert model(ids).logits.isfinite().all()


@pytest.mark.parametrize("there", ["folder", "file", "link", "source"])
def test_what_is_no_swapped_checkpoint_is_never_replaced(tmp_path, monkeypatch, there):
    target = tmp_path / "out" / "mine"
    target.parent.mkdir()
    if there == "file":
        target.write_text("mine")
    elif there == "link":
        (tmp_path / "elsewhere").mkdir()
        target.symlink_to(tmp_path / "elsewhere")
    else:
        (target / "inside").mkdir(parents=True)
        (target / "inside" / "config.json").write_text("{}")
    monkeypatch.setattr("models.swapping.read_pretrained", lambda source: pytest.fail("it was read"))
    source = target / "inside" if there == "source" else tmp_path / "gpt2"
    before = sorted(tmp_path.rglob("*"))
    given = ["--from", str(source), "--activation", "relu", "--out", str(target.parent), "--name", "mine"]
    refused = CliRunner().invoke(cli.swap, given).exception
    assert isinstance(refused, BadInput), refused
    assert "choose another --out or --name" in str(refused)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_disk_that_is_full_is_told_in_a_line(saved, tmp_path, corpus):
    """A limit on a file's size says EFBIG where a full disk says ENOSPC; safetensors has its own class for both."""
    (tmp_path / "a.txt").write_text("\n".join(corpus.train)[:20000])
    given = f"--from {saved} --activation relu --corpus a.txt --steps 0 --out out"
    command = ["bash", "-c", f'ulimit -f 60; exec "$0" "$@" swap {given}', *ACTUARY]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG_S, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert "actuary: no room left in out: File too large" in " ".join(done.stderr.split())
    assert not list((tmp_path / "out").iterdir())


def test_tuning_lowers_what_the_swap_raised(ids):
    """A model fitted to one short text loses it with the swap and finds it again."""
    text = Text(
        np.tile(np.arange(40, dtype=np.int32) * 7 % V, 40), np.tile(np.arange(40, dtype=np.int32) * 7 % V, 4), 160
    )
    model = model_of(GPT2)
    tuning = Tuning(steps=60, window=16, rate=3e-3)

    def tuned(model, path):
        tune(model, None, text, tuning, path, {}, lambda step, loss: None, lambda: False)
        return bits_per_byte(model, text, 16)

    before = tuned(model, Path("/nonexistent/state"))
    swap_activation(model, activations.get("relu2"))
    swapped = bits_per_byte(model, text, 16)
    assert swapped > before
    assert tuned(model, Path("/nonexistent/state")) < (before + swapped) / 2


def test_a_stopped_tuning_goes_on_where_it_stopped(tmp_path):
    rng = np.random.default_rng(0)
    text = Text(rng.integers(0, V, 400).astype(np.int32), rng.integers(0, V, 100).astype(np.int32), 100)
    tuning, steps = Tuning(steps=6, window=8, distil=0.5), []

    def run(stop_after: int):
        model, teacher = model_of(LLAMA), model_of(LLAMA)
        swap_activation(model, activations.get("swish"))
        tune(model, teacher, text, tuning, tmp_path / "s.safetensors", {}, lambda step, loss: steps.append(step),
             lambda: (bool(stop_after) and len(calls) >= stop_after) or calls.append(0))  # fmt: skip
        return model

    calls: list[int] = []
    whole = run(0)
    calls.clear()
    with pytest.raises(Stopped, match="goes on from there"):
        run(3)
    assert (tmp_path / "s.safetensors").is_file()
    calls.clear()
    resumed = run(0)
    assert len(calls) < 6
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert not (tmp_path / "s.safetensors").exists()


def test_the_program_swaps_tunes_and_its_result_exports(saved, tmp_path, corpus):
    text = tmp_path / "text"
    text.mkdir()
    (text / "a.txt").write_text("\n".join(corpus.train)[:40000])
    command = [*ACTUARY, "swap", "--from", str(saved), "--activation", "geglu", "--corpus", str(text), "--steps", "4",
               "--distil", "0.5", "--out", str(tmp_path / "out"), "--json"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG_S, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    figures = report["bits_per_byte"]
    assert set(figures) == {"before", "swapped", "tuned"}
    assert "step 4 of 4, loss" in done.stderr  # no terminal: a line instead of a bar
    # Four steps on text of the same kind help; whether the swap itself hurts is chance, where all weights are random.
    assert figures["tuned"] < figures["swapped"]
    assert figures["before"] != figures["swapped"]
    folder = tmp_path / "out" / f"{saved.name}-geglu"
    again = read_pretrained(str(folder))
    prompt = list(range(5, 25))
    with torch.inference_mode():
        expected = again.model(torch.tensor([prompt])).logits[0, -1].numpy()
    bundle_folder, manifest = export_bundle(read_foreign(str(folder)), tmp_path / "bundles")
    assert manifest.activation == "geglu"
    session = onnxruntime.InferenceSession(bundle_folder / "model.onnx", providers=["CPUExecutionProvider"])
    feed = {"input_ids": np.array([prompt]), "lengths": np.array([len(prompt)]), "top_k": np.array([1])}
    np.testing.assert_allclose(
        session.run(["logits"], feed)[0][0], expected, rtol=1e-4, atol=1e-4 * abs(expected).max()
    )
    with pytest.raises(ValueError, match="actuary_swap_"):  # the family's own blocks would be of random weights
        AutoModelForCausalLM.from_pretrained(folder)
    finished = subprocess.run(command, capture_output=True, text=True, timeout=HANG_S, cwd=tmp_path)
    assert (finished.returncode, json.loads(finished.stdout)) == (0, report)
    assert "is finished" in " ".join(finished.stderr.split())
    other = subprocess.run([*command, "--rate", "0.1"], capture_output=True, text=True, timeout=HANG_S, cwd=tmp_path)
    assert (other.returncode, json.loads((folder / "swap.json").read_text())) == (2, report)
    assert "was swapped with other settings" in " ".join(other.stderr.split())
    # A swapped checkpoint can be swapped again, and a damaged record of the swap is refused.
    once_more = read_pretrained(str(folder)).model
    swap_activation(once_more, activations.get("relu"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {swap.SWAP: {"activation": "geglu"}}))
    with pytest.raises(BadInput, match="swap the checkpoint again"):
        read_pretrained(str(folder))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--activation", "geul"], "did you mean 'gelu'"),
        (["--activation", "relu", "--window", "999"], "longer than the checkpoint's context of 32"),
        (["--activation", "relu", "--distil", "2"], "is not in the range"),
        (["--activation", "relu", "--name", "a/b"], "must be the plain name of a folder"),
        (["--activation", "relu", "--corpus", "short.txt"], "name more text with --corpus"),
    ],
)
def test_bad_arguments_exit_with_2_and_write_nothing(tmp_path, corpus, actuary_here, arguments, message):
    model_of(GPT2).save_pretrained(tmp_path / "gpt2")
    padded_tokenizer(corpus.tokenizer(V), V).save(str(tmp_path / "gpt2" / "tokenizer.json"))
    assert Tokenizer.from_file(str(tmp_path / "gpt2" / "tokenizer.json")).get_vocab_size() == V
    (tmp_path / "short.txt").write_text("two words")
    done = actuary_here("swap", "--from", "gpt2", *arguments, "--out", "out")
    assert done.returncode == 2, done.stderr
    assert message in " ".join(done.stderr.split())
    assert not list((tmp_path / "out").glob("*")) if (tmp_path / "out").exists() else True
