"""Training: paired batches, exact resume, what is kept and refused, and the figures that it ends with."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from conftest import ACTUARY, HANG_S, free_port
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file

from actuary import BadInput
from models.corpus import Ids
from models.gpt import ActuaryConfig, ActuaryGPT
from models.quality import held_out_quality
from models.train import Diverged, Recipe, Stopped, Variant, finished, train_variant, windows
from models.trainer import to_train, train_all

RECIPE = Recipe(steps=24, batch=2, layers=1, dim=32, heads=2, context=32, vocab=300)
SHAPE = ["--layers", "1", "--dim", "32", "--heads", "2", "--context", "32", "--vocab", "300"]


def train(variant: Variant, corpus, out: Path, recipe: Recipe = RECIPE, stop_after: int | None = None):
    seen = []

    def should_stop() -> bool:
        seen.append(1)
        return stop_after is not None and len(seen) >= stop_after

    return train_variant(variant, recipe, corpus, out, lambda report: None, should_stop)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_batches_depend_on_seed_and_step_alone(corpus):
    ids = corpus.ids(300).train
    assert windows(ids, RECIPE, seed=0, step=3).shape == (2, 33)
    assert np.array_equal(windows(ids, RECIPE, 0, 3), windows(ids, dataclasses.replace(RECIPE, steps=99, dim=64), 0, 3))
    assert not np.array_equal(windows(ids, RECIPE, 0, 3), windows(ids, RECIPE, 1, 3))
    assert not np.array_equal(windows(ids, RECIPE, 0, 3), windows(ids, RECIPE, 0, 4))


def test_training_lowers_bits_per_byte_and_writes_a_whole_checkpoint(corpus, tmp_path):
    first = train(Variant("gelu"), corpus, tmp_path / "a", dataclasses.replace(RECIPE, steps=1))
    quality = train(Variant("gelu"), corpus, tmp_path / "b", dataclasses.replace(RECIPE, steps=60))
    assert quality["bits_per_byte"] < first["bits_per_byte"] - 0.1
    assert quality == finished(tmp_path / "b" / "gelu")
    assert {path.name for path in (tmp_path / "b" / "gelu").iterdir()} >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "quality.json",
    }
    assert not list((tmp_path / "b").rglob("*.bin"))
    assert not list((tmp_path / "b" / ".unfinished").glob("*"))


@pytest.mark.parametrize("name", ["gelu", "swish"])  # with and without learned scalars
def test_stopped_and_resumed_equals_never_stopped(corpus, tmp_path, name: str):
    variant = Variant(name, head="sigmoid")
    train(variant, corpus, tmp_path / "whole")
    with pytest.raises(Stopped, match="stopped after 7 of 24 steps; the same command goes on from there"):
        train(variant, corpus, tmp_path / "parts", stop_after=7)
    assert finished(tmp_path / "parts" / variant.name) is None
    train(variant, corpus, tmp_path / "parts")
    whole, parts = (weights(tmp_path / kind / variant.name) for kind in ("whole", "parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_a_state_of_other_settings_or_a_damaged_one_is_not_gone_on_from(corpus, tmp_path):
    with pytest.raises(Stopped):
        train(Variant("relu"), corpus, tmp_path, stop_after=5)
    (state,) = (tmp_path / ".unfinished").iterdir()
    other = dataclasses.replace(RECIPE, steps=8)
    train(Variant("relu"), corpus, tmp_path / "fresh", other)
    state_bytes = state.read_bytes()
    (tmp_path / "damaged" / ".unfinished").mkdir(parents=True)
    (tmp_path / "damaged" / ".unfinished" / state.name).write_bytes(state_bytes[: len(state_bytes) // 2])
    for folder, recipe in ((tmp_path, other), (tmp_path / "damaged", other)):
        train(Variant("relu"), corpus, folder, recipe)
        got, fresh = weights(folder / "relu"), weights(tmp_path / "fresh" / "relu")
        assert all(torch.equal(got[key], fresh[key]) for key in fresh)


def test_a_folder_that_is_no_checkpoint_is_never_replaced(corpus, tmp_path):
    (tmp_path / "gelu").mkdir()
    assert to_train([Variant("gelu")], RECIPE, corpus, tmp_path) == [Variant("gelu")]
    (tmp_path / "gelu" / "notes.txt").write_text("mine")
    with pytest.raises(BadInput, match=r"gelu is not a checkpoint that .*, and would be deleted; choose another"):
        to_train([Variant("gelu")], RECIPE, corpus, tmp_path)


def test_finished_variants_are_kept_and_other_settings_refused(corpus, tmp_path):
    train(Variant("gelu"), corpus, tmp_path)
    both = [Variant("gelu"), Variant("relu")]
    assert to_train(both, RECIPE, corpus, tmp_path) == [Variant("relu")]
    with pytest.raises(
        BadInput, match=r"was trained with other settings \(steps 24, now 25\); choose another --out, or delete it"
    ):
        to_train(both, dataclasses.replace(RECIPE, steps=25), corpus, tmp_path)


def test_a_diverged_variant_is_named_and_the_others_finish(corpus, tmp_path, monkeypatch):
    wild = dataclasses.replace(RECIPE, matrix_lr=1e30, vector_lr=1e30, clip_norm=1e30)
    with pytest.raises(Diverged, match=r"relu2 diverged: the loss is .* at step"):
        train(Variant("relu2"), corpus, tmp_path, wild)
    monkeypatch.setattr("models.train.ActuaryGPT.forward", _diverging_for("relu2", ActuaryGPT.forward))
    failures = train_all(
        [Variant("relu2"), Variant("gelu")], RECIPE, corpus, tmp_path / "set", workers=1, console=Console(stderr=True)
    )
    assert [type(failure) for failure in failures] == [Diverged]
    assert finished(tmp_path / "set" / "gelu")


def _diverging_for(name: str, forward):
    def wrapped(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        if self.config.activation == name:
            output.loss = output.loss * float("nan")
        return output

    return wrapped


def test_names_of_variants():
    names = [
        Variant("gelu").name,
        Variant("gelu", "sigmoid").name,
        Variant("gelu", "sigmoid", 2).name,
        Variant("relu", seed=1).name,
    ]
    assert names == ["gelu", "gelu-sigmoid-head", "gelu-sigmoid-head-seed2", "relu-seed1"]


def test_the_rate_climbs_stays_and_falls():
    recipe = Recipe(steps=100)
    assert recipe.rate(0) == pytest.approx(0.2)
    assert recipe.rate(4) == recipe.rate(39) == 1.0
    assert recipe.rate(99) == pytest.approx(0.02)
    assert recipe.rate(69) == pytest.approx((1 + 0.02) / 2)


@pytest.mark.parametrize("tokens", [33, 40, 65])  # windows of 16: whole ones only, a short last one, one token left
def test_held_out_figures_by_hand(tokens: int):
    """A model that says the same everywhere: bits per byte and ECE follow from counting."""
    V = 8
    model = ActuaryGPT(ActuaryConfig("gelu", vocab_size=V, context=16, layers=1, dim=8, heads=1))
    prior = torch.tensor([0.5, 0.25, 0.05, 0.05, 0.05, 0.05, 0.025, 0.025])
    with torch.no_grad():
        model.embed.weight.zero_()
        model.head_bias.copy_(prior.log())
    held_out = np.random.default_rng(0).integers(0, V, size=tokens).astype(np.int32)
    ids = Ids(held_out, held_out, train_bytes=99, held_out_bytes=50)
    bits, ece, mass = held_out_quality(model, ids)
    assert bits == pytest.approx(-np.log2(prior.numpy()[held_out[1:]]).sum() / 50, rel=1e-5)
    assert ece == pytest.approx(abs(0.5 - (held_out[1:] == 0).mean()), abs=1e-6)
    assert mass == pytest.approx(float(torch.sigmoid(prior.log()).sum()), rel=1e-5)


_started: list[subprocess.Popen] = []


@pytest.fixture(autouse=True)
def _nothing_outlives_its_test():
    yield
    while _started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(_started.pop().pid, signal.SIGKILL)


def command_of(out: Path, *arguments: str) -> list[str]:
    return ["train", "--corpus", str(Path(json.__file__).parent), *SHAPE, "--out", str(out), *arguments]


def run_train(
    out: Path, cwd: Path, *arguments: str, launcher: list[str] | None = None, env: dict[str, str] | None = None
) -> subprocess.Popen:
    """`actuary train` on the json package's sources, in a process group of its own."""
    command = [*(launcher or ACTUARY), *command_of(out, *arguments)]
    process = subprocess.Popen(
        command, cwd=cwd, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    _started.append(process)
    return process


def test_ctrl_c_keeps_finished_variants_and_the_command_goes_on(tmp_path, actuary_here):
    """Two workers, SIGINT once the first variants are finished; the second run, here and in turn, finishes the rest."""
    arguments = ("--activations", "relu,gelu,silu", "--steps", "150", "--workers", "2", "--json")
    process = run_train(tmp_path / "out", tmp_path, *arguments)
    deadline = time.monotonic() + HANG_S
    while (
        not list((tmp_path / "out").glob("*/quality.json")) and process.poll() is None and time.monotonic() < deadline
    ):
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as the terminal does: the program and its workers
    stdout, stderr = process.communicate(timeout=HANG_S)
    kept = {path.parent.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*/quality.json")}
    assert process.returncode == 1, stderr
    assert 0 < len(kept) < 3, stderr
    assert {row["name"] for row in json.loads(stdout)["variants"]} == set(kept)
    again = actuary_here(*command_of(tmp_path / "out", *arguments, "--workers", "1"))
    assert again.returncode == 0, again.stderr
    summary = json.loads(again.stdout)
    assert {row["name"] for row in summary["variants"]} == {"relu", "gelu", "silu"}
    assert set(summary["yardsticks"]) == {"unigram", "bigram", "zlib"}
    assert all((tmp_path / "out" / name / "quality.json").stat().st_mtime_ns == then for name, then in kept.items())


def test_ctrl_c_while_the_workers_start_is_no_crash(tmp_path):
    arguments = ("--activations", "relu,gelu", "--steps", "100000", "--workers", "2")
    process = run_train(tmp_path / "out", tmp_path, *arguments)
    parent, deadline = psutil.Process(process.pid), time.monotonic() + HANG_S
    while (
        len([c for c in parent.children() if "spawn_main" in " ".join(c.cmdline())]) < 2 and time.monotonic() < deadline
    ):
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # they import torch now
    _, stderr = process.communicate(timeout=HANG_S)
    assert process.returncode == 1, stderr
    assert "Traceback" not in stderr
    assert "the same command goes on from there" in stderr or "was not started" in stderr


ON_THE_CPU = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}


def two_ranks(*program: object) -> list[str]:
    """The program, or another one, in two processes; `accelerate launch --cpu` would start one."""
    torchrun = ["torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
    return [sys.executable, "-m", *torchrun, *(map(str, program) if program else ("-m", "actuary"))]


def test_two_processes_train_the_same_model(tmp_path):
    """Two ranks share each batch; one document on standard output, and the weights of one process to rounding."""
    arguments = ("--activations", "gelu", "--steps", "12", "--batch", "4", "--json")
    summaries = []
    for out, launcher in (("one", None), ("two", two_ranks())):
        process = run_train(tmp_path / out, tmp_path, *arguments, launcher=launcher, env=ON_THE_CPU)
        stdout, stderr = process.communicate(timeout=HANG_S)
        assert process.returncode == 0, stderr
        summaries.append(json.loads(stdout)["variants"][0])
    assert [summary["processes"] for summary in summaries] == [1, 2]
    one, two = (weights(tmp_path / out / "gelu") for out in ("one", "two"))
    # The gradient is the mean of two means: the same to rounding, which Adam's first steps magnify (2e-5 seen).
    assert max(float((one[key] - two[key]).abs().max()) for key in one) < 2e-4
    assert summaries[0]["bits_per_byte"] == pytest.approx(summaries[1]["bits_per_byte"], rel=1e-4)


def test_processes_stop_together(tmp_path):
    """SIGTERM to one rank alone: both leave at the same step, and the state is there to go on from."""
    program = tmp_path / "actuary_that_saves_often.py"  # each 20 s otherwise, which two busy ranks spend on two cores
    program.write_text("import models.train\nmodels.train.SAVE_EVERY_S = 0.5\nimport actuary\nactuary.main()\n")
    arguments = ("--activations", "gelu", "--steps", "100000", "--batch", "4")
    process = run_train(tmp_path / "out", tmp_path, *arguments, launcher=two_ranks(program), env=ON_THE_CPU)
    deadline = time.monotonic() + HANG_S
    state = tmp_path / "out" / ".unfinished" / "gelu.safetensors"
    while not state.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    ranks = [child for child in psutil.Process(process.pid).children() if str(program) in child.cmdline()]
    assert len(ranks) == 2
    ranks[1].send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=HANG_S)
    stopped = {int(step) for step in re.findall(r"gelu stopped after (\d+) of", stderr)}
    with safe_open(state, "pt") as file:
        assert stopped == {int(file.metadata()["step"])}, stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--activations", "swigul"], "did you mean 'swiglu'"),
        (["--activations", ","], "--activations is empty"),
        (["--activations", "gelu,gelu"], "more than once"),
        (["--steps", "0"], "0 is not in the range"),
        (["--seeds", "-1"], "-1 is not in the range"),
        (["--head", "tanh"], "'tanh' is not one of"),
        (["--dim", "30", "--heads", "4"], "dim 30 must be a multiple"),
        (["--corpus", "/nowhere"], "corpus path /nowhere does not exist"),
        (["--context", "100000"], "the corpus is too small"),
        (["--vocab", "3"], "vocab 3 is too small"),
    ],
)
def test_bad_arguments_exit_with_2_and_leave_nothing(tmp_path, actuary_here, arguments, message):
    done = actuary_here(*command_of(tmp_path / "out", *arguments))
    assert done.returncode == 2, done.stderr
    assert message in " ".join(done.stderr.split())
    assert not list(tmp_path.glob("out/*"))
