"""Locust as a process of its own: started, watched, stopped, and what it said of itself.

It patches the standard library's sockets and threads for gevent when it is imported, so this process
only reads the samples that the other appends to a file.
"""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from loadtest.plan import Plan
from loadtest.samples import Sample, parse_sample

LOCUSTFILE = Path(__file__).with_name("locustfile.py")
SAMPLES, LOG = "samples.csv", "locust.log"


def _command(plan: Plan, prompts: Path | None, folder: Path) -> list[str]:
    # A little longer than the window, so that its last requests are answered under the same load.
    stop_s = plan.warmup_s + plan.duration_s + 0.5
    command = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--headless", "--only-summary"]
    command += ["--host", plan.url, "--users", str(plan.users), "--spawn-rate", str(plan.users)]
    command += [
        "--stop-after",
        str(stop_s),
        "--stop-timeout",
        # Whole seconds, as Locust wants them; so the last request sent ends as an answer or a counted timeout.
        str(math.ceil(plan.timeout_s) + 1),
        "--exit-code-on-error",
        "0",
    ]
    command += ["--models", ",".join(plan.models), "--top-k", str(plan.top_k), "--seed", str(plan.seed)]
    command += ["--request-timeout", str(plan.timeout_s), "--samples", str(folder / SAMPLES)]
    command += ["--rate", str(plan.rate)] if plan.rate is not None else []
    return command + (["--prompts", str(prompts.absolute())] if prompts else [])


def run_locust(plan: Plan, prompts: Path | None, folder: Path) -> tuple[bool, int]:
    """Runs Locust to its end, or until Ctrl-C or SIGTERM. (whether it was interrupted, its exit code)"""
    # Our own arguments are the whole configuration: no LOCUST_* variables, no locust.conf of the folder.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LOCUST_")}
    environment["PYTHONPATH"] = os.pathsep.join([str(LOCUSTFILE.parent.parent), environment.get("PYTHONPATH", "")])
    interrupted = False

    def stop(_signal: int, _frame: FrameType | None) -> None:
        nonlocal interrupted
        interrupted = True

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with (folder / LOG).open("wb") as log:
            process = subprocess.Popen(
                _command(plan, prompts, folder),
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches this process only, which then stops that one
            )
        try:
            asked_to_stop = False
            with _Watch(plan, folder / SAMPLES) as watch:
                while process.poll() is None:
                    watch.update()
                    if interrupted and not asked_to_stop:
                        process.terminate()
                        asked_to_stop = True
                    time.sleep(0.1)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return interrupted, process.returncode


class _Watch:
    """A progress bar fed by the samples that Locust appends to its file."""

    def __init__(self, plan: Plan, path: Path) -> None:
        self.plan, self.path = plan, path
        self.offset, self.rest = 0, ""
        self.began: float | None = None
        self.count = self.failed = 0
        self.last: list[float] = []
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[said]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )

    def __enter__(self) -> _Watch:
        self.progress.start()
        self.task = self.progress.add_task("starting", total=self.plan.warmup_s + self.plan.duration_s, said="")
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def update(self) -> None:
        if not self.path.is_file():
            return
        self.began = self.began or time.monotonic()
        with self.path.open(encoding="utf-8") as file:
            file.seek(self.offset)
            text = self.rest + file.read()
            self.offset = file.tell()
        *lines, self.rest = text.split("\n")
        for line in lines:
            sample = parse_sample(next(csv.reader([line]), []))
            if sample:
                self.count += 1
                self.failed += bool(sample.failure)
                self.last = [*self.last[-199:], sample.latency_ms]
        elapsed_s = time.monotonic() - self.began
        said = f"{self.count} requests, {self.failed} failed"
        if self.last:
            said += f", p50 {np.median(self.last):.2f} ms"
        end_s = self.plan.warmup_s + self.plan.duration_s
        phase = (
            "warm-up" if elapsed_s < self.plan.warmup_s else "measuring" if elapsed_s < end_s else "the last answers"
        )
        self.progress.update(self.task, description=phase, completed=elapsed_s, said=said)


def client_facts(samples_file: Path, samples: list[Sample]) -> dict[str, Any]:
    """How long the load lasted, what it cost, what it left unanswered; from the samples alone where Locust died."""
    try:
        facts: dict[str, Any] = json.loads(samples_file.with_suffix(".client.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        facts = {"stopped_after_s": max(sample.at_s for sample in samples), "lasted_s": None, "cpu_s": {}, "sent": {}}
    sent = facts["sent"].values()
    return facts | {"unanswered": sum(sent) - len(samples) if sent else None}
