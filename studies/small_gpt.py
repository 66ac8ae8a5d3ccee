"""Trains small GPTs for a study, several at a time, and measures each: jobs in, one measurement per job out.

The model, the batches, the rates and AdamW are `actuary train`'s own (models/). What differs is what these studies are
about: the loss at the head, and whether the head has a bias. Weights are kept under a name that says how they were
trained, so a study that is run again, and another that asks for the same net, only measures; one that was stopped goes
on at most SAVE_EVERY_S before.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import multiprocessing
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_model, save_model
from torch import Tensor

from actuary import ActuaryError, cores
from models import activations
from models.corpus import END_OF_TEXT, Corpus, Ids
from models.gpt import ActuaryConfig, ActuaryGPT, head_loss
from models.resume import load_state, save_state
from models.train import SAVE_EVERY_S, Recipe, Variant, optimizer_of, windows

Objective = Literal["softmax", "sigmoid", "within"]
SHARED = "small-gpt"  # folder of weights beside the studies' own, since two of them ask for the same nets
AHEAD = 8  # tokens: "within" asks which ids occur among so many that follow
REPORT_EVERY = 20  # steps
Measured = TypeVar("Measured")
Measure = Callable[[ActuaryGPT, Ids], Measured]
_reports: Any = None  # a worker's queue to its parent


@dataclass(frozen=True)
class Job:
    """One net.

    Args:
        objective: softmax: cross-entropy of the next token. sigmoid: binary cross-entropy summed over the vocabulary
            against the next token's one-hot. within: the same against every id among the next AHEAD tokens.
        bias: a learned head bias that starts where the frequencies on the training text say; or none, zero for good.
    """

    activation: str = "gelu"
    objective: Objective = "softmax"
    bias: bool = True
    seed: int = 0

    @property
    def name(self) -> str:
        return f"{self.activation}-{self.objective}{'' if self.bias else '-no-bias'}-seed{self.seed}"

    @property
    def variant(self) -> Variant:
        return Variant(self.activation, "softmax" if self.objective == "softmax" else "sigmoid", self.seed)


def mark_of(job: Job, recipe: Recipe, corpus_sha256: str) -> dict[str, Any]:
    """What must be equal for kept weights to be this job's."""
    formula = activations.get(job.activation).digest
    settings = {**dataclasses.asdict(job), **dataclasses.asdict(recipe)}
    return dict(json.loads(json.dumps({**settings, "corpus_sha256": corpus_sha256, "formula": formula})))


def within(ids: Tensor, V: int) -> Tensor:
    """ids [B, T + AHEAD] -> [B, T, V]: 1 where an id occurs among the AHEAD tokens after position t."""
    following = ids[:, 1:].unfold(1, AHEAD, 1)  # [B, T, AHEAD]
    return torch.zeros(*following.shape[:2], V).scatter_(2, following, 1.0)


def within_frequency(ids: NDArray[np.int32], V: int) -> NDArray[np.float64]:
    """[V]: at which share of positions an id occurs within the next AHEAD tokens, half a count added so that none is 0.

    An occurrence is seen from the AHEAD positions before it, but for those that stand before an earlier one.
    """
    order = np.argsort(ids, kind="stable")  # by id, then by place
    first = np.flatnonzero(np.diff(ids[order], prepend=-1))
    gaps = np.diff(order, prepend=0)
    gaps[first] = order[first]
    counts = np.bincount(ids[order], weights=np.minimum(gaps, AHEAD), minlength=V)
    return (counts + 0.5) / (len(ids) + 1)


def loss_of(logits: Tensor, batch: Tensor, objective: Objective) -> Tensor:
    """Mean nats per position of logits [B, T, V] for the ids [B, T + 1], or [B, T + AHEAD] of "within"."""
    if objective != "within":
        return head_loss(logits, batch[:, 1:], "softmax" if objective == "softmax" else "sigmoid")
    labels = within(batch, logits.shape[-1])
    return F.binary_cross_entropy_with_logits(logits, labels, reduction="none").sum(-1).mean()


def held_out_windows(ids: Ids, T: int, tokens: int, ahead: int = 1) -> Tensor:
    """[N, T + ahead]: windows of T held-out tokens and those after, from all over the text, N * T at most `tokens`.

    They do not overlap but for what is ahead; where all are taken, they are those of models/quality.py.
    """
    there = (len(ids.held_out) - ahead) // T
    chosen = np.linspace(0, there - 1, max(1, min(there, tokens // T))).astype(int)
    return torch.from_numpy(ids.held_out[chosen[:, None] * T + np.arange(T + ahead)]).long()


def tokens_per_byte(corpus: Corpus, V: int, windows: Tensor) -> float:
    """Of the tokens that are predicted in windows [N, T + 1]: bits per token times this are bits per byte."""
    tokenizer = corpus.tokenizer(V)
    # A byte-level token has a letter for each byte; the end of a document is none.
    bytes_of = np.array([len(tokenizer.id_to_token(id) or "") for id in range(V)])
    bytes_of[tokenizer.token_to_id(END_OF_TEXT)] = 0
    predicted = windows[:, 1:].numpy()
    return predicted.size / int(bytes_of[predicted].sum())


def train(job: Job, recipe: Recipe, corpus: Corpus, kept: Path, report: Callable[[float], None]) -> ActuaryGPT:
    """The trained net, from `kept` where it is there. `report` is told the share that is done."""
    mark = mark_of(job, recipe, corpus.sha256)
    digest = hashlib.sha256(json.dumps(mark, sort_keys=True).encode()).hexdigest()[:12]
    path = kept / f"{job.name}-{digest}.safetensors"
    config: ActuaryConfig = recipe.config(job.variant)
    torch.manual_seed(job.seed)
    model: ActuaryGPT = ActuaryGPT(config).eval()  # it has no dropout: the same in training
    if path.is_file():
        load_model(model, path)
        return model
    ids = corpus.ids(recipe.vocab)
    if job.bias:
        frequency = within_frequency(ids.train, recipe.vocab) if job.objective == "within" else None
        model.start_head_at(torch.from_numpy(ids.frequency(recipe.vocab) if frequency is None else frequency))
    model.head_bias.requires_grad_(job.bias)
    optimizer = optimizer_of(model, recipe)
    state = path.with_suffix(".unfinished")
    first, _ = load_state(state, mark, model, optimizer)
    # A window of `context` tokens and those that are asked for: one, or AHEAD.
    drawn = dataclasses.replace(recipe, context=recipe.context + AHEAD - 1) if job.objective == "within" else recipe
    saved = time.monotonic()
    for step in range(first, recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * recipe.rate(step)
        batch = torch.from_numpy(windows(ids.train, drawn, job.seed, step)).long()
        loss = loss_of(model.logits(model.hidden_states(batch[:, : recipe.context])), batch, job.objective)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        if step % REPORT_EVERY == 0:
            if not math.isfinite(float(loss.detach())):
                raise ActuaryError(f"{job.name} diverged at step {step + 1}: its loss is {float(loss.detach())}")
            report(step / recipe.steps)
        if time.monotonic() - saved > SAVE_EVERY_S:
            save_state(state, step + 1, 0.0, mark, model, optimizer)
            saved = time.monotonic()
    kept.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_model(model, str(partial))
    partial.replace(path)
    state.unlink(missing_ok=True)
    return model


def measure_all(
    jobs: Sequence[Job],
    recipe: Recipe,
    corpus: Corpus,
    kept: Path,
    workers: int,
    measure: Callable[[ActuaryGPT, Ids], Measured],
    report: Callable[[str, float], None],
) -> list[Measured]:
    """Trains what is not kept, and returns each job's measurement, in their order.

    Args:
        workers: processes at once, each on its share of the cores; with one it happens in this process.
        measure: a function of a module, since it is sent to the processes by name.
    """
    shares = dict.fromkeys(jobs, 0.0)

    def show(job: Job, share: float) -> None:
        shares[job] = share
        report(f"{job.name}: step {round(share * recipe.steps)} of {recipe.steps}", sum(shares.values()) / len(jobs))

    corpus.ids(recipe.vocab)  # its tokenizer is made once, not by each worker
    if workers == 1 or len(jobs) == 1:
        return [_one(job, recipe, corpus, kept, measure, show) for job in jobs]
    context = multiprocessing.get_context("spawn")
    reports = context.Queue()
    processes = min(workers, len(jobs))
    pool = ProcessPoolExecutor(processes, context, _start_worker, (max(1, cores() // processes), reports))
    try:
        futures = [pool.submit(_work, job, recipe, corpus, kept, measure) for job in jobs]
        while not all(future.done() for future in futures):
            if any(future.done() and future.exception() for future in futures):
                break
            try:
                show(*reports.get(timeout=0.2))
            except queue.Empty:
                continue
        measured = [future.result() for future in futures if future.done()]  # raises what broke one
    except BaseException:  # Ctrl-C too: what trains is given up, what is finished is kept
        pool.shutdown(wait=False, cancel_futures=True)
        for child in multiprocessing.active_children():
            child.terminate()
        raise
    pool.shutdown()
    return measured


def _start_worker(threads: int, reports: Any) -> None:
    global _reports
    _reports = reports
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that is killed stops nobody, and a worker would wait for its next job for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(job: Job, recipe: Recipe, corpus: Corpus, kept: Path, measure: Measure[Measured]) -> Measured:
    return _one(job, recipe, corpus, kept, measure, lambda done, share: _reports.put((done, share)))


def _one(
    job: Job,
    recipe: Recipe,
    corpus: Corpus,
    kept: Path,
    measure: Measure[Measured],
    show: Callable[[Job, float], None],
) -> Measured:
    model = train(job, recipe, corpus, kept, lambda share: show(job, share))
    with torch.inference_mode():
        measured = measure(model, corpus.ids(recipe.vocab))
    show(job, 1.0)
    return measured
