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
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor
from transformers.utils import logging as transformers_logging

from actuary import ActuaryError, BadInput
from models import activations
from models.corpus import Corpus
from models.files import new_folder, write_atomically
from models.gpt import ActuaryConfig, ActuaryGPT, log_probabilities, variant_name
from models.quality import held_out_quality
from models.resume import load_state, save_state

SAVE_EVERY_S = 20.0
REPORT_EVERY = 10
WORST_BITS_PER_BYTE = 64.0  # eight times what no knowledge at all would cost: not a model
QUALITY = "quality.json"  # what training measured, beside the weights; written last, so it says "finished"
UNFINISHED = ".unfinished"  # inside the output folder: states of variants that were stopped


class Stopped(ActuaryError):
    """Training was asked to stop; its state is saved."""


class Diverged(ActuaryError):
    """The loss is no longer a number."""


def _diverged(variant: Variant, what: str) -> Diverged:
    return Diverged(f"{variant.name} diverged: {what}; nothing of it was kept, the other variants go on")


@dataclass(frozen=True)
class Variant:
    """What is trained: an activation under a head, from a seed."""

    activation: str
    head: Literal["softmax", "sigmoid"] = "softmax"
    seed: int = 0

    @property
    def name(self) -> str:
        return variant_name(self.activation, self.head, self.seed)


@dataclass(frozen=True)
class Recipe:
    """How every variant of a set is trained. The rates were chosen at the default shape (docs/log.md)."""

    steps: int = 1000
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
    """What must be equal for a finished or stopped variant to count as this one; the formula itself is part of it."""
    formula = activations.get(variant.activation).digest
    mark = {
        **dataclasses.asdict(variant),
        **dataclasses.asdict(recipe),
        "corpus_sha256": corpus_sha256,
        "formula": formula,
    }
    return dict(json.loads(json.dumps(mark)))  # tuples become lists, as they will when it is read back


def finished(folder: Path) -> dict[str, Any] | None:
    """What training measured of the checkpoint in `folder`; None where none is finished; BadInput: it is damaged."""
    path = folder / QUALITY
    if not path.is_file():
        return None
    try:
        measured = json.loads(path.read_text(encoding="utf-8"))
        for key in ("bits_per_byte", "ece", "sigmoid_mass", "seconds"):
            float(measured[key])
        return {**measured, "recipe": dict(measured["recipe"])}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise BadInput(f"{path} cannot be read ({error!r}); delete {folder} and train it again") from error


def windows(ids: NDArray[np.int32], recipe: Recipe, seed: int, step: int) -> NDArray[np.int32]:
    """The batch of one step: [batch, context + 1], the same for every activation."""
    starts = np.random.default_rng([seed, step]).integers(0, len(ids) - recipe.context, size=recipe.batch)
    return np.stack([ids[start : start + recipe.context + 1] for start in starts])


def optimizer_of(model: ActuaryGPT, recipe: Recipe) -> torch.optim.AdamW:
    """Matrices decay; embeddings, gains, biases and learned scalars learn faster and do not."""
    embedding = model.embed.weight
    matrices = [p for p in model.parameters() if p.ndim == 2 and p is not embedding]
    vectors = [p for p in model.parameters() if p.ndim < 2 or p is embedding]
    groups = [
        {"params": matrices, "peak": recipe.matrix_lr, "weight_decay": recipe.matrix_weight_decay},
        {"params": vectors, "peak": recipe.vector_lr, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.matrix_lr, betas=recipe.betas, fused=True)


def _any_process(accelerator: Accelerator, *flags: bool) -> tuple[bool, ...]:
    """Whether a flag stands on any process, so that all of them leave the loop at the same step."""
    if accelerator.num_processes == 1:
        return flags
    raised = accelerator.reduce(torch.tensor(flags, dtype=torch.float32, device=accelerator.device))
    return tuple(bool(count) for count in raised.tolist())


def train_variant(
    variant: Variant,
    recipe: Recipe,
    corpus: Corpus,
    out: Path,
    report: Callable[[Progress], None],
    should_stop: Callable[[], bool],
) -> dict[str, Any]:
    """Trains OUT/NAME from where it stands, and measures it on the held-out text.

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
    optimizer = optimizer_of(model, recipe)
    mark = fingerprint(variant, recipe, corpus.sha256)
    state_path = out / UNFINISHED / f"{variant.name}.safetensors"
    first, seconds_before = load_state(state_path, mark, model, optimizer)
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
        loss = math.nan
        reports = step % REPORT_EVERY == 0 or step + 1 == recipe.steps
        if reports:
            loss = float(output.loss.detach())
        stop, diverged = _any_process(accelerator, should_stop(), reports and not math.isfinite(loss))
        if diverged:
            raise _diverged(variant, f"the loss is {loss} at step {step + 1}")
        if reports and accelerator.is_main_process:
            nats = _batch_nats(output.logits, batch, variant.head)
            report(Progress(variant.name, step + 1, loss, nats / math.log(2) / ids.bytes_per_token))
        if step + 1 < recipe.steps and (stop or time.monotonic() - saved > SAVE_EVERY_S):
            saved = time.monotonic()
            if accelerator.is_main_process:
                save_state(state_path, step + 1, seconds_before + saved - started, mark, model, optimizer)
            if stop:
                raise Stopped(
                    f"{variant.name} stopped after {step + 1} of {recipe.steps} steps; "
                    "the same command goes on from there"
                )
    seconds = seconds_before + time.monotonic() - started
    quality: dict[str, Any] = {}
    if accelerator.is_main_process:
        bits_per_byte, ece, mass = held_out_quality(model, ids)
        if not bits_per_byte < WORST_BITS_PER_BYTE:
            raise _diverged(variant, f"it ended at {bits_per_byte:.3g} bits per byte")
        quality = {
            "bits_per_byte": bits_per_byte,
            "ece": ece,
            "sigmoid_mass": mass,
            "corpus_sha256": corpus.sha256,
            "seconds": seconds,
            "processes": accelerator.num_processes,
            "recipe": mark,
        }
        with new_folder(out / variant.name) as folder:
            model.cpu().save_pretrained(folder)
            corpus.tokenizer(recipe.vocab).save(str(folder / "tokenizer.json"))
            write_atomically(folder / QUALITY, json.dumps(quality, indent=2))
        state_path.unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    accelerator.free_memory()
    return quality


def _batch_nats(logits: Tensor, batch: Tensor, head: Literal["softmax", "sigmoid"]) -> float:
    """Mean nats per token of a batch's logits [B, T, V], each position's for the id [B, T] after it."""
    with torch.inference_mode():
        return -float(log_probabilities(logits[:, :-1], head).gather(-1, batch[:, 1:, None]).mean())
