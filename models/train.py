"""Trains one variant: recipe and ids in, checkpoint folder out, resumable at any step.

Variants are paired: the batch of step s depends on the seed and s alone, so two activations with one
seed see the same text in the same order. accelerate carries the model to whatever device or number of
processes there is; on one CPU it adds nothing.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import logging as transformers_logging

from actuary import ActuaryError, BadInput
from models.corpus import Corpus
from models.files import new_folder, write_atomically
from models.gpt import ActuaryConfig, ActuaryGPT, log_probabilities
from models.quality import held_out_quality

SAVE_EVERY_S = 20.0
REPORT_EVERY = 10
UNFINISHED = ".unfinished"  # inside the output folder: states of variants that were stopped


class Stopped(ActuaryError):
    """Training was asked to stop; its state is saved."""


class Diverged(ActuaryError):
    """The loss is no longer a number."""


@dataclass(frozen=True)
class Variant:
    """What is trained: an activation under a head, from a seed."""

    activation: str
    head: Literal["softmax", "sigmoid"] = "softmax"
    seed: int = 0

    @property
    def name(self) -> str:
        head = "-sigmoid-head" if self.head == "sigmoid" else ""
        return f"{self.activation}{head}" + (f"-seed{self.seed}" if self.seed else "")


@dataclass(frozen=True)
class Recipe:
    """How every variant of a set is trained. The rates were chosen at the default shape (docs/log.md)."""

    steps: int = 1200
    batch: int = 4
    layers: int = 2
    dim: int = 128
    heads: int = 2
    context: int = 128
    vocab: int = 2048
    gated_width: Literal["matched", "full"] = "matched"
    matrix_lr: float = 6e-3
    matrix_weight_decay: float = 0.1
    vector_lr: float = 1e-2  # embeddings, gains, biases, learned activation scalars; not decayed
    betas: tuple[float, float] = (0.9, 0.95)
    clip_norm: float = 1.0
    warm_up: float = 0.05  # shares of the steps
    flat_until: float = 0.4
    last_rate: float = 0.02

    def __post_init__(self) -> None:
        for name in ("steps", "batch"):
            if getattr(self, name) < 1:
                raise BadInput(f"{name} must be at least 1, not {getattr(self, name)}")

    def config(self, variant: Variant) -> ActuaryConfig:
        return ActuaryConfig(
            activation=variant.activation,
            head=variant.head,
            vocab_size=self.vocab,
            context=self.context,
            layers=self.layers,
            dim=self.dim,
            heads=self.heads,
            gated_width=self.gated_width,
        )

    def rate(self, step: int) -> float:
        """Share of the peak rate at a step: linear up, flat, linear down."""
        done = (step + 1) / self.steps
        if done < self.warm_up:
            return done / self.warm_up
        if done <= self.flat_until:
            return 1.0
        return 1 + (self.last_rate - 1) * (done - self.flat_until) / (1 - self.flat_until)


@dataclass(frozen=True)
class Progress:
    """What a progress bar shows of one variant."""

    name: str
    step: int
    loss: float  # nats per token, of the head's own loss
    bits_per_byte: float  # of the batch, under the head's probabilities


def fingerprint(variant: Variant, recipe: Recipe, corpus_sha256: str) -> dict[str, Any]:
    """What must be equal for a finished or stopped variant to count as this one."""
    return json.loads(
        json.dumps({**dataclasses.asdict(variant), **dataclasses.asdict(recipe), "corpus_sha256": corpus_sha256})
    )


def finished(folder: Path) -> dict[str, Any] | None:
    """What training measured of the checkpoint in `folder`; None where none is finished."""
    path = folder / "quality.json"
    return json.loads(path.read_text()) if path.is_file() else None


def windows(ids: NDArray[np.int32], recipe: Recipe, seed: int, step: int) -> NDArray[np.int32]:
    """The batch of one step: [batch, context + 1], the same for every activation."""
    starts = np.random.default_rng([seed, step]).integers(0, len(ids) - recipe.context, size=recipe.batch)
    return np.stack([ids[start : start + recipe.context + 1] for start in starts])


def _optimizer(model: ActuaryGPT, recipe: Recipe) -> torch.optim.AdamW:
    """Matrices decay; embeddings, gains, biases and learned scalars learn faster and do not."""
    embedding = model.embed.weight
    matrices = [p for p in model.parameters() if p.ndim == 2 and p is not embedding]
    vectors = [p for p in model.parameters() if p.ndim < 2 or p is embedding]
    groups = [
        {"params": matrices, "peak": recipe.matrix_lr, "weight_decay": recipe.matrix_weight_decay},
        {"params": vectors, "peak": recipe.vector_lr, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.matrix_lr, betas=recipe.betas, fused=True)


def _save_state(path: Path, step: int, mark: dict[str, Any], model: ActuaryGPT, optimizer: torch.optim.AdamW) -> None:
    """Weights and Adam's moments as safetensors, so that a state is never unpickled."""
    tensors = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            tensors[f"{key}.{name}"] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(
        {name: tensor.cpu().contiguous() for name, tensor in tensors.items()},
        partial,
        {"step": str(step), "fingerprint": json.dumps(mark)},
    )
    partial.replace(path)


def _load_state(path: Path, mark: dict[str, Any], model: ActuaryGPT, optimizer: torch.optim.AdamW) -> int:
    """Puts a stopped variant's state back; the step to go on from, 0 where there is none of the same kind."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata()
            if json.loads(metadata["fingerprint"]) != mark:
                return 0
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.copy_(file.get_tensor(f"model.{name}"))
                    keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}.{name}" in file.keys()]  # noqa: SIM118
                    optimizer.state[parameter] = {
                        key: file.get_tensor(f"{key}.{name}").to(parameter.device) for key in keys
                    }
            return int(metadata["step"])
    except (FileNotFoundError, safetensors.SafetensorError):
        return 0


def train_variant(
    variant: Variant,
    recipe: Recipe,
    corpus: Corpus,
    out: Path,
    report: Callable[[Progress], None],
    should_stop: Callable[[], bool],
) -> dict[str, Any]:
    """Trains OUT/NAME from where it stands, and measures it on the held-out half.

    Args:
        report: called every few steps, on the first process only.
        should_stop: asked after every step; when true the state is saved and Stopped is raised.
    Returns: what stands in the checkpoint's quality.json.
    """
    transformers_logging.disable_progress_bar()
    ids = corpus.ids(recipe.vocab)
    accelerator = Accelerator()
    if recipe.batch % accelerator.num_processes:
        raise BadInput(
            f"batch {recipe.batch} must be a multiple of the {accelerator.num_processes} processes that share it"
        )
    share = slice(accelerator.process_index, None, accelerator.num_processes)
    torch.manual_seed(variant.seed)
    model = ActuaryGPT(recipe.config(variant))
    model.start_head_at(torch.from_numpy(ids.frequency(recipe.vocab)))
    model.to(accelerator.device)
    optimizer = _optimizer(model, recipe)
    mark = fingerprint(variant, recipe, corpus.sha256)
    state_path = out / UNFINISHED / f"{variant.name}.safetensors"
    first = _load_state(state_path, mark, model, optimizer)
    wrapped, prepared = accelerator.prepare(model, optimizer)
    started = saved = time.monotonic()
    for step in range(first, recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * recipe.rate(step)
        batch = torch.from_numpy(windows(ids.train, recipe, variant.seed, step)[share]).long().to(accelerator.device)
        output = wrapped(batch, labels=batch)
        accelerator.backward(output.loss)
        accelerator.clip_grad_norm_(wrapped.parameters(), recipe.clip_norm)
        prepared.step()
        prepared.zero_grad()
        if step % REPORT_EVERY == 0 or step + 1 == recipe.steps:
            loss = float(output.loss.detach())
            if not math.isfinite(loss):
                raise Diverged(
                    f"{variant.name}: the loss is {loss} at step {step + 1}; lower --steps or the recipe's rates"
                )
            if accelerator.is_main_process:
                nats = _batch_nats(output.logits, batch, variant.head)
                report(Progress(variant.name, step + 1, loss, nats / math.log(2) / ids.bytes_per_token))
        if step + 1 < recipe.steps and (should_stop() or time.monotonic() - saved > SAVE_EVERY_S):
            saved = time.monotonic()
            if accelerator.is_main_process:
                _save_state(state_path, step + 1, mark, model, optimizer)
            if should_stop():
                raise Stopped(
                    f"{variant.name} stopped after {step + 1} of {recipe.steps} steps; "
                    "the same command goes on from there"
                )
    seconds = time.monotonic() - started
    quality: dict[str, Any] = {}
    if accelerator.is_main_process:
        bits_per_byte, ece, mass = held_out_quality(model, ids)
        quality = {
            "bits_per_byte": bits_per_byte,
            "ece": ece,
            "sigmoid_mass": mass,
            "corpus_sha256": corpus.sha256,
            "seconds": seconds,
            "recipe": mark,
        }
        with new_folder(out / variant.name) as folder:
            model.cpu().save_pretrained(folder)
            corpus.tokenizer(recipe.vocab).save(str(folder / "tokenizer.json"))
            write_atomically(folder / "quality.json", json.dumps(quality, indent=2))
        state_path.unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    accelerator.free_memory()
    return quality


def _batch_nats(logits: Tensor, batch: Tensor, head: Literal["softmax", "sigmoid"]) -> float:
    """Mean nats per token of a batch's logits [B, T, V] for ids [B, T + 1]."""
    with torch.inference_mode():
        return -float(log_probabilities(logits, head).gather(-1, batch[:, 1:, None]).mean())
