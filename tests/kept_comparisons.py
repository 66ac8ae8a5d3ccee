"""Comparisons as `actuary compare` leaves them when it has ended: what the service and its page read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
from compare_runs import write_run

from loadtest.compare import report, store, verdict
from loadtest.compare.design import Design
from loadtest.compare.progress import Written


class Silent:
    """A Progress whom nobody hears."""

    def starting(self, what: str) -> None: ...

    def visiting(self, number: int, position: int, arm: str) -> None: ...

    def finished(self, number: int, blocks: pl.DataFrame) -> None: ...

    def say(self, sentence: str) -> None: ...


def keep(folder: Path, ended: str = "settled", drawn: bool = False, **spec: Any) -> dict[str, Any]:
    """Writes a whole one; gives result.json. `spec` is of compare_runs."""
    write_run(folder, **spec)
    run = store.read(folder)
    design = Design.of_json(run.run["design"])
    result = {
        "schema": 1,
        "kind": "compare",
        **verdict.judge(run.run, run.blocks, run.samples),
        "ended": ended,
        "said": [],
    }
    (folder / "result.json").write_text(json.dumps(result))
    progress = Written(folder, design, Silent())
    progress.finished(len(run.rounds), run.blocks)
    progress.starting("judging")
    if drawn:
        report.write_files(folder, run, result)
    return result
