"""How a comparison goes, in its folder: progress.json, small and whole at any time, for whoever looks on from outside.

    {"schema", "at", "doing", "rounds", "planned", "arms", "p50_ms": {arm: [of each round, or null]},
     "void": [{"round", "arm", "why"}], "said": []}

The service's page reads it, which has no polars for the rounds themselves.
"""

from __future__ import annotations

import datetime
import json
import math
import time
from pathlib import Path
from typing import Any

import polars as pl

from loadtest.compare.design import Design
from loadtest.compare.driver import Progress
from loadtest.compare.store import SCHEMA
from loadtest.shared import write

PROGRESS = "progress.json"
EVERY_S = 1.0  # a round may take less; what is then missing is written at the end
DIGITS = 3  # of a millisecond; latencies are kept to 0.1 ms


class Written:
    """Writes the file after rounds, and hands all that it is told to `then`."""

    def __init__(self, folder: Path, design: Design, then: Progress) -> None:
        self._path, self._then = folder / PROGRESS, then
        self._written = -math.inf
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
        new = blocks.filter(pl.col("round") >= self._known["rounds"]).sort("round")
        # A round has each arm once, so that the lists are of one length, in the rounds' order.
        for arm, p50 in new.select("arm", "p50_ms").iter_rows():
            known = p50 is not None and math.isfinite(p50)
            self._known["p50_ms"][arm].append(round(p50, DIGITS) if known else None)
        void = new.filter(pl.col("void") != "").select("round", "arm", pl.col("void").alias("why"))
        self._known["void"] += void.to_dicts()
        self._known |= {"doing": "measuring", "rounds": number}
        if time.monotonic() > self._written + EVERY_S:
            self._write()

    def say(self, sentence: str) -> None:
        self._then.say(sentence)
        self._write(said=[*self._known["said"], sentence])

    def _write(self, **changed: Any) -> None:
        self._known |= changed
        self._written = time.monotonic()
        at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        write(
            self._path,
            json.dumps({"schema": SCHEMA, "at": at, **self._known}, ensure_ascii=False, allow_nan=False) + "\n",
        )
