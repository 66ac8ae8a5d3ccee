"""How a comparison goes, in its folder: progress.json, small and whole at any time, for whoever looks on from outside.

    {"schema", "at", "doing", "rounds", "planned", "arms", "p50_ms": {arm: [of each round, or null]},
     "void": [{"round", "arm", "why"}], "said": []}

The service's page reads it, which has no polars for the rounds themselves.
"""

from __future__ import annotations

import datetime
import json
import math
from pathlib import Path
from typing import Any

import polars as pl

from loadtest.compare.design import Design
from loadtest.compare.driver import Progress
from loadtest.compare.store import SCHEMA
from loadtest.shared import write

PROGRESS = "progress.json"
DIGITS = 3  # of a millisecond; latencies are kept to 0.1 ms


class Written:
    """Writes the file after each round, and hands all that it is told to `then`."""

    def __init__(self, folder: Path, design: Design, then: Progress) -> None:
        self._path, self._then = folder / PROGRESS, then
        self._known: dict[str, Any] = {
            "doing": "starting",
            "rounds": 0,
            "planned": design.rounds,
            "arms": list(design.arms),
            "p50_ms": {arm: [] for arm in design.arms},
            "void": [],
            "said": [],
        }

    def starting(self, what: str) -> None:
        self._then.starting(what)
        self._write(doing=what)

    def visiting(self, number: int, position: int, arm: str) -> None:
        self._then.visiting(number, position, arm)  # not written: a block begins within a millisecond

    def finished(self, number: int, blocks: pl.DataFrame) -> None:
        self._then.finished(number, blocks)
        p50_ms: dict[str, list[float | None]] = {arm: [] for arm in self._known["arms"]}
        # A round has each arm once, so that the lists are of one length, in the rounds' order.
        for arm, p50 in blocks.sort("round").select("arm", "p50_ms").iter_rows():
            p50_ms[arm].append(None if p50 is None or not math.isfinite(p50) else round(p50, DIGITS))
        void = blocks.filter(pl.col("void") != "").select("round", "arm", pl.col("void").alias("why")).to_dicts()
        self._write(doing="measuring", rounds=number, p50_ms=p50_ms, void=void)

    def say(self, sentence: str) -> None:
        self._then.say(sentence)
        self._write(said=[*self._known["said"], sentence])

    def _write(self, **changed: Any) -> None:
        self._known |= changed
        at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        write(self._path, json.dumps({"schema": SCHEMA, "at": at, **self._known}, ensure_ascii=False) + "\n")
