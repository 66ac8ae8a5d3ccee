"""Comparisons as `actuary compare` leaves them when it has ended: what the service and its page read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from compare_runs import write_run

from loadtest.compare import report, store, verdict
from loadtest.compare.design import Design
from loadtest.compare.knee import Block, best_goodput, knees, sweep
from loadtest.compare.progress import Written

# What each carries per second, and up to which share of that it was driven: relu not as far as its knee.
SWEPT = {
    **{"gelu": (300.0, 1.2), "gelu_tanh": (303.0, 1.2), "relu": (310.0, 0.7), "silu": (290.0, 1.2)},
    **{"swiglu": (270.0, 1.2), "mish": (240.0, 1.2), "gelu:again": (301.0, 1.2)},
}


class Silent:
    """A Progress whom nobody hears."""

    def starting(self, what: str) -> None: ...

    def visiting(self, number: int, position: int, arm: str) -> None: ...

    def finished(self, number: int, blocks: pl.DataFrame) -> None: ...

    def say(self, sentence: str) -> None: ...


def keep(
    folder: Path,
    ended: str = "settled",
    drawn: bool = False,
    swept: Mapping[str, tuple[float, float]] | None = None,
    **spec: Any,
) -> dict[str, Any]:
    """Writes a whole one; gives result.json. `swept` is of sweep_of, `spec` of compare_runs."""
    write_run(folder, **spec)
    run = store.read(folder)
    design = Design.of_json(run.run["design"])
    result = {
        "schema": 1,
        "kind": "compare",
        **verdict.judge(run.run, run.blocks, run.samples),
        "ended": ended,
        "said": [],
        **(sweep_of(swept) if swept else {}),
    }
    (folder / "result.json").write_text(json.dumps(result))
    progress = Written(folder, design, Silent())
    progress.finished(len(run.rounds), run.blocks)
    progress.starting("judging")
    if drawn:
        report.write_files(folder, run, result)
    return result


def sweep_of(arms: Mapping[str, tuple[float, float]]) -> dict[str, Any]:
    """What result.json says of a sweep over queues, by arm: what it carries per second, and up to which share of it."""
    random, blocks, bound_ms = np.random.default_rng(7), [], 40.0
    for arm, (carried, most) in arms.items():
        for share in (each for each in (0.3, 0.5, 0.7, 0.75, 0.8, 0.85, 0.93, 1.0, 1.07, 1.15) if each <= most):
            rate = float(f"{share * carried:.4g}")
            for _ in range(2 if 0.7 < share < 1 else 1):
                answered = round(2 * rate * min(1.0, 1 / share))
                latencies_ms = 2 + random.exponential(2 * share / max(0.02, 1 - share), answered)
                blocks.append(Block(arm, rate, 2.0, latencies_ms, round(2 * rate), 0))
    rows = sweep(blocks, bound_ms)
    found = {"sweep": rows, "knee": knees(blocks, bound_ms, 0), "goodput": best_goodput(rows)}
    return {**found, "objective_ms": bound_ms, "objective_given": True}
