"""Trains a set of variants, several at a time, with one progress bar each; what is finished is kept.

Two variants in two one-thread processes use two cores better than one after the other in two threads (a
product of 512 x 128 x 512 does not fill a second core), so workers are processes. On a GPU, or under
`accelerate launch`, variants run one after the other in this process and accelerate does the spreading.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from actuary import ActuaryError, BadInput
from models import activations
from models.corpus import Corpus
from models.train import Diverged, Recipe, Stopped, Variant, fingerprint, finished, train_variant
from models.train import Progress as Report

_stop = threading.Event()
_reports: Any = None  # a worker's queue to its parent


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def to_train(variants: Sequence[Variant], recipe: Recipe, corpus: Corpus, out: Path) -> list[Variant]:
    """The variants that are not there yet; BadInput where one is there from other settings."""
    missing = []
    for variant in variants:
        activations.get(variant.activation)
        recipe.config(variant)  # refuses a shape before anything is trained
        done = finished(out / variant.name)
        if done is None:
            missing.append(variant)
            continue
        asked = fingerprint(variant, recipe, corpus.sha256)
        other = {
            key: (done["recipe"].get(key), value) for key, value in asked.items() if done["recipe"].get(key) != value
        }
        if other:
            differences = ", ".join(f"{key} {was!r}, now {now!r}" for key, (was, now) in other.items())
            raise BadInput(
                f"{out / variant.name} was trained with other settings ({differences}); "
                "choose another --out, or delete it"
            )
    return missing


def train_all(
    variants: Sequence[Variant], recipe: Recipe, corpus: Corpus, out: Path, workers: int, console: Console
) -> list[ActuaryError]:
    """Trains every variant that is missing into OUT/NAME. Returns what kept some from finishing; the rest are there."""
    missing = to_train(variants, recipe, corpus, out)
    smallest = min(len(ids) for ids in (corpus.ids(recipe.vocab).train, corpus.ids(recipe.vocab).held_out))
    if smallest <= recipe.context + 1:
        raise BadInput(
            f"the corpus is too small: a half has {smallest} tokens, context {recipe.context} needs more; "
            "name more text or lower --context"
        )
    if not missing:
        return []
    distributed = int(os.environ.get("WORLD_SIZE", "1")) > 1
    main = int(os.environ.get("RANK", "0")) == 0
    with _bars(missing, recipe, console, visible=main) as show:
        if distributed or torch.cuda.is_available() or workers == 1 or len(missing) == 1:
            return _in_turn(missing, recipe, corpus, out, show)
        return _side_by_side(missing, recipe, corpus, out, min(workers, len(missing)), show)


@contextlib.contextmanager
def _bars(variants: Sequence[Variant], recipe: Recipe, console: Console, visible: bool) -> Iterator[Any]:
    columns = (
        TextColumn("{task.description:<22}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}  bits/byte {task.fields[bits]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not visible, refresh_per_second=4) as progress:
        tasks = {
            v.name: progress.add_task(v.name, total=recipe.steps, loss="     -", bits="    -", start=False)
            for v in variants
        }
        smooth: dict[str, float] = {}

        def show(report: Report) -> None:
            # Single batches of 512 tokens jump by 10 %; an average over about ten reports can be read.
            bits = smooth[report.name] = (
                0.9 * smooth.get(report.name, report.bits_per_byte) + 0.1 * report.bits_per_byte
            )
            progress.start_task(tasks[report.name])
            progress.update(tasks[report.name], completed=report.step, loss=f"{report.loss:6.3f}", bits=f"{bits:5.3f}")
            if visible and not console.is_terminal and report.step == recipe.steps:
                console.print(
                    f"{report.name}: {report.step} steps, loss {report.loss:.3f}, "
                    f"{bits:.3f} bits per byte of training text"
                )

        yield show


@contextlib.contextmanager
def _stopping_on_signal() -> Iterator[None]:
    """Ctrl-C and SIGTERM ask for a stop after the running step."""
    _stop.clear()
    before = {number: signal.signal(number, lambda *_: _stop.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _in_turn(variants: Sequence[Variant], recipe: Recipe, corpus: Corpus, out: Path, show: Any) -> list[ActuaryError]:
    failures: list[ActuaryError] = []
    with _stopping_on_signal():
        for variant in variants:
            try:
                train_variant(variant, recipe, corpus, out, show, _stop.is_set)
            except Diverged as error:
                failures.append(error)
            except Stopped as error:
                return [*failures, error]
    return failures


def _start_worker(threads: int, reports: Any) -> None:
    global _reports
    _reports = reports
    torch.set_num_threads(threads)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: _stop.set())


def _work(variant: Variant, recipe: Recipe, corpus: Corpus, out: Path) -> None:
    train_variant(variant, recipe, corpus, out, _reports.put, _stop.is_set)


def _side_by_side(
    variants: Sequence[Variant], recipe: Recipe, corpus: Corpus, out: Path, workers: int, show: Any
) -> list[ActuaryError]:
    context = multiprocessing.get_context("spawn")
    reports = context.Queue()
    listener = threading.Thread(target=lambda: [show(report) for report in iter(reports.get, None)], daemon=True)
    listener.start()
    failures: list[ActuaryError] = []
    with (
        _stopping_on_signal(),
        ProcessPoolExecutor(workers, context, _start_worker, (max(1, cores() // workers), reports)) as pool,
    ):
        futures: dict[Future[None], Variant] = {
            pool.submit(_work, variant, recipe, corpus, out): variant for variant in variants
        }
        for future, variant in futures.items():
            while not future.done():
                if _stop.wait(0.2):  # the signal reached this process: pass it on, and start nothing new
                    for other in futures:
                        other.cancel()
                    for child in multiprocessing.active_children():
                        os.kill(child.pid, signal.SIGTERM)
                    break
            if future.cancelled():
                failures.append(Stopped(f"{variant.name} was not started"))
                continue
            error = future.exception()
            if isinstance(error, ActuaryError):
                failures.append(error)
            elif error is not None:
                raise error
    reports.put(None)
    listener.join()
    return failures
