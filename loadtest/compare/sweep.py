"""Drives each arm at several rates, so that its knee is seen (knee.py): after a comparison's own blocks.

    closed loop, all users, each arm once        -> about what it can carry
    first pass: shares of that, rising           -> about where its knee is
    further passes: rates around that knee       -> until the minutes are over

At each step every arm is visited once, in an order drawn anew, at its own rate; what a visit leaves is answered before
the next begins, so that an overload is its own arm's alone. The steps are kept as a comparison's rounds are.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from actuary import BadInput
from loadtest.compare import store
from loadtest.compare.design import Design
from loadtest.compare.driver import Comparison, Interrupted, check_alive, frame_of, why_void
from loadtest.compare.generator import Generator, GeneratorDied, Seen
from loadtest.compare.knee import Block, best_goodput, bound_of, by_rate, knee_of, knees, sweep
from loadtest.compare.server import ServerDied

FOLDER = "sweep"
FIRST_PASS = (0.3, 0.5, 0.7, 0.85, 1.0, 1.15)  # of what an arm carried in a closed loop
AROUND = (0.85, 0.93, 1.0, 1.07, 1.15)  # of its knee, as the passes before have it
OVER, UNDER = 1.3, 0.6  # of the highest and lowest rate, where the knee is beyond them
# A queue needs time to become what its rate makes of it: longer than the blocks of a comparison, which only pair.
SETTLE_S, BLOCK_S = 0.5, 2.0
LEAST_USERS, MOST_USERS = 8, 128
ROUND = 1_000_000  # of the first step: it seeds what is sent, and no round of the comparison has it


def measure(comparison: Comparison, minutes: float, objective_ms: float | None) -> str:
    """Takes steps until the minutes are over, those in the folder counted; why it ended before, or nothing."""
    if not missing_s(comparison.folder, minutes):
        return ""
    folder = comparison.folder / FOLDER
    (folder / store.ROUNDS).mkdir(parents=True, exist_ok=True)
    try:
        _measure(comparison, folder, minutes, objective_ms)
    except Interrupted:
        return "the sweep of rates was interrupted"
    except (GeneratorDied, ServerDied) as error:
        return f"the sweep of rates ended early: {str(error).splitlines()[0]}"
    return ""


def missing_s(folder: Path, minutes: float) -> float:
    """Of the minutes, what the steps in a run's folder leave."""
    taken_s: float = sum(step["took_s"] for step in _read(folder / FOLDER))
    return max(0.0, 60 * minutes - taken_s)


def _measure(comparison: Comparison, folder: Path, minutes: float, objective_ms: float | None) -> None:
    design = replace(comparison.design, settle_s=SETTLE_S, block_s=BLOCK_S)
    users = users_of(store.read(comparison.folder).blocks, design)
    steps = _read(folder)
    with Generator(
        comparison.url,
        comparison.workload,
        design.models,
        users,
        design.timeout_s,
        comparison.place,
        comparison.folder,
        comparison.look,
    ) as locust:
        comparison.warm(comparison.url)
        # By the steps' own time, as a resumed run counts it: what is between them would be missing for ever.
        while sum(step["took_s"] for step in steps) < 60 * minutes:
            rates = next_rates(steps, lambda: _blocks(folder), design, objective_ms)
            order = random.Random(f"{design.seed}/sweep/{len(steps)}").sample(design.arms, len(design.arms))
            steps.append(_step(comparison, locust, design, folder, len(steps), {arm: rates[arm] for arm in order}))


def users_of(blocks: pl.DataFrame, design: Design) -> int:
    """So many that what they leave behind when a visit ends is answered within about a second."""
    answered = blocks.filter(pl.col("void") == "")["requests_per_s"]
    slowest = answered.min() if len(answered) else 0.0
    assert isinstance(slowest, float)
    return max(LEAST_USERS, min(MOST_USERS, math.ceil(slowest)))


def next_rates(
    steps: Sequence[dict[str, Any]], blocks: Callable[[], Sequence[Block]], design: Design, objective_ms: float | None
) -> dict[str, float | None]:
    """The rate of each arm in the next step; None: a closed loop."""
    if not steps:
        return dict.fromkeys(design.arms, None)
    carried = {each["arm"]: each["carried_per_s"] for each in steps[0]["blocks"]}
    at = len(steps) - 1
    if at < len(FIRST_PASS):
        return {arm: _round(FIRST_PASS[at] * carried[arm]) for arm in design.arms}
    at = (at - len(FIRST_PASS)) % len(AROUND)
    if at:  # a pass goes on as it began
        begun = {each["arm"]: each["rate"] for each in steps[-at]["blocks"]}
        return {arm: _round(begun[arm] / AROUND[0] * AROUND[at]) for arm in design.arms}
    known = blocks()
    bound_ms = objective_ms
    if bound_ms is None and any(block.arm == design.baseline for block in known):
        bound_ms = bound_of(known, design.baseline)
    # Where the client was too slow in all of the baseline's blocks there is no bound yet, and so no knee to go around.
    knee = {arm: _near_knee(known, arm, bound_ms, carried[arm]) if bound_ms else carried[arm] for arm in design.arms}
    return {arm: _round(AROUND[0] * knee[arm]) for arm in design.arms}


def _near_knee(blocks: Sequence[Block], arm: str, bound_ms: float, carried_per_s: float) -> float:
    """One of 20 rates of each octave, so that the rates of two passes are mostly the same and their blocks add up."""
    at_rate = by_rate([block for block in blocks if block.arm == arm])
    if not at_rate:
        return carried_per_s
    knee = knee_of({rate: its for (_, rate), its in at_rate.items()}, bound_ms)
    rates = [rate for _, rate in at_rate]
    if not 0 < knee < math.inf:
        knee = OVER * max(rates) if knee else UNDER * min(rates)
    return float(2 ** (round(20 * math.log2(knee)) / 20))


def _round(rate: float) -> float:
    return float(f"{rate:.4g}")


def _step(
    comparison: Comparison,
    locust: Generator,
    design: Design,
    folder: Path,
    number: int,
    rates: dict[str, float | None],
) -> dict[str, Any]:
    began = time.monotonic()
    frames, facts = [], []
    for position, (arm, rate) in enumerate(rates.items()):
        said = "what it can carry" if rate is None else f"{rate:g}/s"
        comparison.progress.starting(f"sweep of rates, step {number + 1}: {arm}, {said}")
        visit = replace(design.visit(ROUND + number, arm), rate=rate)
        began_s = time.monotonic() - began
        seen = locust.visit(visit, lambda *_: None)
        check_alive(comparison, seen)  # before it is kept: what a dead server does not carry is no knee
        where = {"round": number, "position": position, "arm": arm, "model": visit.model}
        frames.append(frame_of(seen.rows, where, began_s))
        facts.append(
            {
                **where,
                "rate": rate,
                "window_s": visit.block_s,
                "carried_per_s": _carried_per_s(seen, design),
                "void": why_void(seen.rows, visit) if rate is not None else "",
            }
        )
    step = {"took_s": round(time.monotonic() - began, 3), "blocks": facts}
    store.write_round(folder, number, pl.concat(frames), step)
    return step


def _carried_per_s(seen: Seen, design: Design) -> float:
    """Answers per second, by when they came."""
    ended = [row["at_s"] + row["latency_ms"] / 1000 for row in seen.rows if not row["failure"]]
    inside: int = sum(design.settle_s <= end_s < design.settle_s + design.block_s for end_s in ended)
    return max(1, inside) / design.block_s


def _read(folder: Path) -> list[dict[str, Any]]:
    found = sorted((folder / store.ROUNDS).glob("[0-9]*.json"))
    try:
        steps = [json.loads(path.read_text(encoding="utf-8")) for path in found]
        if [step["round"] for step in steps] != list(range(len(steps))):
            raise BadInput(f"{folder} lacks a step: there are {', '.join(path.stem for path in found)}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"a step in {folder} cannot be read: {error}; measure again") from error
    return steps


def _blocks(folder: Path) -> list[Block]:
    """Of the steps so far, but for closed loops and those whose client was too slow."""
    return [*_blocks_of(folder, _read(folder))]


def _blocks_of(folder: Path, steps: Sequence[dict[str, Any]]) -> Iterator[Block]:
    for step in steps:
        samples = pl.read_parquet(folder / store.ROUNDS / f"{step['round']:05d}.parquet").filter(~pl.col("settling"))
        for each in step["blocks"]:
            if each["rate"] is None or _slow_client(each):
                continue
            its = samples.filter(pl.col("position") == each["position"])
            well = its.filter(pl.col("failure") == "")
            latencies = (well["latency_ms"] + well["late_ms"]).to_numpy().astype(np.float64)
            starved = int(its["starved"].sum())
            yield Block(each["arm"], each["rate"], each["window_s"], latencies, len(its), starved)


def _slow_client(block: dict[str, Any]) -> bool:
    """Failures and silence are the server's, and count."""
    return str(block["void"]).startswith("client")


def said(folder: Path, design: Design, objective_ms: float | None) -> list[str]:
    """What a reader must know of the sweep before trusting it: what does not count, and why there may be no result."""
    steps = _read(folder / FOLDER)
    driven = [each for step in steps for each in step["blocks"] if each["rate"] is not None]
    slow = [each for each in driven if _slow_client(each)]
    sentences = []
    if slow:
        sentences.append(f"{len(slow)} of {len(driven)} blocks of the sweep of rates do not count: {slow[0]['void']}")
    if steps and not any(each["arm"] == design.baseline and not _slow_client(each) for each in driven):
        sentences.append(
            f"the sweep of rates says nothing, since no block of {design.baseline} counts; give it more minutes, or a "
            "quieter machine"
        )
    elif steps and math.isinf(_bound_ms(_blocks(folder / FOLDER), design, objective_ms)):
        sentences.append(
            f"the sweep of rates says nothing, since {design.baseline} answered nothing at its lowest rate, which the "
            "bound is taken from; give one with --objective-ms, or measure again"
        )
    return sentences


def _bound_ms(blocks: Sequence[Block], design: Design, objective_ms: float | None) -> float:
    """Infinite where nobody gave one and the baseline, at its lowest rate, answered nothing."""
    return objective_ms or bound_of(blocks, design.baseline)


def result(folder: Path, design: Design, objective_ms: float | None) -> dict[str, Any]:
    """What result.json says of it: sweep, knee, goodput and the objective; nothing where there was no sweep."""
    blocks = _blocks(folder / FOLDER)
    if not any(block.arm == design.baseline for block in blocks):
        return {}
    bound_ms = _bound_ms(blocks, design, objective_ms)
    if math.isinf(bound_ms):
        return {}
    rows = sweep(blocks, bound_ms)
    return {
        "sweep": rows,
        "knee": knees(blocks, bound_ms, design.seed),
        "goodput": best_goodput(rows),
        "objective_ms": round(bound_ms, 4),
        "objective_given": objective_ms is not None,
    }
