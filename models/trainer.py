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
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from actuary import ActuaryError, BadInput, cores
from models import activations
from models.corpus import Corpus
from models.files import check_replaceable, check_writable
from models.train import QUALITY, Diverged, Recipe, Stopped, Variant, fingerprint, finished, train_variant
from models.train import Progress as Report

# One variant's training, as its arguments come: (variant, recipe, corpus, out).
Job = tuple[Variant, Recipe, Corpus, Path]
Work = Callable[[Variant, Recipe, Corpus, Path, Callable[[Report], None], Callable[[], bool]], Any]

_stop = threading.Event()
_reports: Any = None  # a worker's queue to its parent


def to_train(variants: Sequence[Variant], recipe: Recipe, corpus: Corpus, out: Path) -> list[Variant]:
    """The variants that are not there yet; BadInput where one is there from other settings."""
    missing = []
    for variant in variants:
        activations.get(variant.activation)
        recipe.config(variant)  # refuses a shape before anything is trained
        done = finished(out / variant.name)
        if done is None:
            check_replaceable(out / variant.name, QUALITY, "a checkpoint that `actuary train` finished")
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
            f"the corpus is too small: its smaller part has {smallest} tokens, context {recipe.context} needs more; "
            "name more text or lower --context"
        )
    if not missing:
        return []
    check_writable(out)
    distributed = int(os.environ.get("WORLD_SIZE", "1")) > 1
    main = int(os.environ.get("RANK", "0")) == 0
    with _bars(missing, recipe, console, visible=main) as show:
        jobs = [(variant, recipe, corpus, out) for variant in missing]
        return run_jobs(jobs, 1 if distributed or torch.cuda.is_available() else workers, show)


def run_jobs(
    jobs: Sequence[Job], workers: int, show: Callable[[Report], None], work: Work = train_variant
) -> list[ActuaryError]:
    """Does `work` for each job, in this process where there is one worker. Returns what kept some from finishing.

    Args:
        work: a function of a module, so that another process finds it by name.
    """
    _stop.clear()
    if workers == 1 or len(jobs) == 1:
        return _in_turn(jobs, show, work)
    return _side_by_side(jobs, min(workers, len(jobs)), show, work)


@contextlib.contextmanager
def _bars(variants: Sequence[Variant], recipe: Recipe, console: Console, visible: bool) -> Iterator[Any]:
    columns = (  # 80 characters in all
        TextColumn("{task.description:<18}"),
        BarColumn(bar_width=12),
        TextColumn("{task.completed:>4.0f}/{task.total:.0f}"),
        TextColumn("loss {task.fields[loss]} {task.fields[bits]} bits/byte"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not (visible and console.is_terminal)) as progress:
        tasks = {v.name: progress.add_task(v.name, total=recipe.steps, loss="-", bits="-") for v in variants}
        smooth: dict[str, float] = {}
        said = dict.fromkeys(tasks, -1)

        def show(report: Report) -> None:
            # Single batches of 512 tokens jump by 10 %; an average over about ten reports can be read.
            bits = smooth[report.name] = (
                0.9 * smooth.get(report.name, report.bits_per_byte) + 0.1 * report.bits_per_byte
            )
            fields = {"loss": f"{report.loss:.3f}", "bits": f"{bits:.3f}"}
            progress.update(tasks[report.name], completed=report.step, **fields)
            tenth = 10 * report.step // recipe.steps
            if visible and not console.is_terminal and tenth > said[report.name]:  # a log file: ten lines, not a bar
                said[report.name] = tenth
                console.print(
                    f"{report.name}: step {report.step} of {recipe.steps}, loss {report.loss:.3f}, "
                    f"{bits:.3f} bits per byte of training text",
                    soft_wrap=True,
                )

        yield show


_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def _on_signal(handler: Any) -> Iterator[None]:
    """Ctrl-C and SIGTERM go to `handler` inside the block."""
    before = {number: signal.signal(number, handler) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _ask_to_stop(*_: Any) -> None:
    """After the running step."""
    _stop.set()


def _in_turn(jobs: Sequence[Job], show: Callable[[Report], None], work: Work) -> list[ActuaryError]:
    failures: list[ActuaryError] = []
    with _on_signal(_ask_to_stop):
        for job in jobs:
            try:
                work(*job, show, _stop.is_set)
            except Diverged as error:
                failures.append(error)
            except Stopped as error:
                return [*failures, error]
    return failures


def _start_worker(threads: int, reports: Any) -> None:
    global _reports
    _reports = reports
    torch.set_num_threads(threads)
    for number in _SIGNALS:
        signal.signal(number, _ask_to_stop)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


def _work(work: Work, job: Job) -> None:
    work(*job, _reports.put, _stop.is_set)


def _side_by_side(jobs: Sequence[Job], workers: int, show: Callable[[Report], None], work: Work) -> list[ActuaryError]:
    context = multiprocessing.get_context("spawn")
    reports = context.Queue()
    listener = threading.Thread(target=lambda: [show(report) for report in iter(reports.get, None)], daemon=True)
    listener.start()
    try:
        with (
            _on_signal(_ask_to_stop),
            ProcessPoolExecutor(workers, context, _start_worker, (max(1, cores() // workers), reports)) as pool,
        ):
            # A worker inherits this mask until _start_worker lifts it: a Ctrl-C while it imports torch, which the
            # terminal sends to it as well as to us, waits instead of killing it.
            signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
            try:
                futures = {pool.submit(_work, work, job): job[0] for job in jobs}
            finally:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
            while wait(futures, timeout=0.2).not_done:
                if _stop.is_set() or any(_is_fatal(future) for future in futures):
                    _stop_workers(futures)
        return [failure for future, variant in futures.items() if (failure := _failure(future, variant))]
    finally:
        reports.put(None)
        listener.join()


def _is_fatal(future: Future[None]) -> bool:
    """Whether this ends the others too: anything but a variant that was stopped or diverged."""
    if not future.done() or future.cancelled():
        return False
    return not isinstance(future.exception(), (Stopped, Diverged, NoneType))


def _stop_workers(futures: Iterable[Future[None]]) -> None:
    """Starts nothing new, and asks every worker to save its state; again and again, since some may not listen yet."""
    for future in futures:
        future.cancel()
    for child in multiprocessing.active_children():
        if child.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.pid, signal.SIGTERM)


def _failure(future: Future[None], variant: Variant) -> ActuaryError | None:
    """What kept the variant from finishing; raises what is not about this variant alone."""
    if future.cancelled():
        return Stopped(f"{variant.name} was not started")
    error = future.exception()
    if isinstance(error, (Stopped, Diverged, NoneType)):
        return error
    if isinstance(error, BrokenProcessPool):
        raise ActuaryError(
            "a worker process died (out of memory?); what is finished is kept: run the same command again, "
            "perhaps with fewer --workers"
        ) from error
    raise error
