"""Rounds of visits, each round kept when it is finished: design and workload in, a run folder out.

    warm-up   one discarded visit of each arm, at every start of the load
    round     a visit of each arm, in the design's order -> samples and blocks, written together
    look      after each full cycle: is it settled?

A round that was cut short leaves nothing, so that a comparison that was killed goes on with the round that it was in.
"""

from __future__ import annotations

import contextlib
import datetime
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import polars as pl

from actuary import ActuaryError, BadInput
from loadtest.compare import store
from loadtest.compare.design import Design, Visit
from loadtest.compare.generator import Generator, GeneratorDied, Place, Seen
from loadtest.compare.server import POLL_S, Meter, OwnServer, ServerDied, pid_at, ready
from loadtest.compare.workloads import Workload
from loadtest.samples import KEPT_SHARE, too_slow

DIGITS = 6  # of a second, in a round's facts
GONE_S = 5.0  # in which a process that has hung up has ended
VOID_ROUNDS = 3  # in a row in which an arm's block does not count end a comparison
VOID_S = 15.0  # and as long, where the client was too slow: three rounds of short blocks are one busy second
NOTHING_SENT = "nothing sent"


Settled = Callable[[pl.DataFrame], bool]


class Interrupted(Exception):
    """Ctrl-C or SIGTERM."""


class Progress(Protocol):
    """Who is told how it goes; `terminal.py` draws it."""

    def starting(self, what: str) -> None: ...

    def visiting(self, number: int, position: int, arm: str) -> None: ...

    def finished(self, number: int, blocks: pl.DataFrame) -> None: ...

    def say(self, sentence: str) -> None: ...


@dataclass
class Stop:
    """Whether Ctrl-C or SIGTERM asked for an end."""

    asked: bool = False


@dataclass
class Comparison:
    """What `measure` runs."""

    design: Design
    workload: Workload
    folder: Path
    url: str
    own: OwnServer | None  # of the comparison; None where --url names another's
    restart: Callable[[], OwnServer] | None
    warm: Callable[[str], None]  # the server at a URL, where the workload is sent to a warm cache
    place: Place
    progress: Progress
    stop: Stop = field(default_factory=Stop)
    said: list[str] = field(default_factory=list)  # since the last round that was kept

    def look(self) -> None:
        """Between two looks at Locust: is there a reason to stop?"""
        if self.stop.asked:
            raise Interrupted
        if self.own:
            self.own.check()

    def renew_server(self) -> None:
        """In place of one of ours that has died, or no longer answers: then it still runs, beside the new one."""
        assert self.restart is not None
        if self.own:
            self.own.stop()
        self.own = self.restart()
        self.url = self.own.url
        self.own.wait(self.look)


@contextlib.contextmanager
def stopping() -> Iterator[Stop]:
    """Ctrl-C and SIGTERM end the round in work, and what was kept is judged; while it is judged they end nothing."""
    stop = Stop()

    def ask(_signal: int, _frame: FrameType | None) -> None:
        stop.asked = True

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def measure(comparison: Comparison, settled: Settled) -> str:
    """Measures what is missing. "settled", "minutes" or "interrupted": why it ended.

    A Locust or a server of ours that dies is started again, once for each round; ActuaryError when that is not enough.
    """
    state = _State(comparison, store.read(comparison.folder))
    died_in, server_died = -1, False
    while not (why := over(comparison.design, state.blocks, settled)):
        try:
            if server_died:
                comparison.renew_server()
            return state.load(settled)
        except Interrupted:
            return "interrupted"
        except (GeneratorDied, ServerDied) as error:
            server_died = isinstance(error, ServerDied)
            if died_in == state.number or (server_died and comparison.restart is None):
                raise ActuaryError(
                    f"{error}\n{state.number} rounds are kept; go on with --resume {comparison.folder}"
                ) from error
            died_in = state.number
            sentence = f"{str(error).splitlines()[0].partition(';')[0]}; started again in round {state.number}"
            comparison.said.append(sentence)
            comparison.progress.say(sentence)
    return why


def over(design: Design, blocks: pl.DataFrame, settled: Settled) -> str:
    """Why no round is missing: "settled", "minutes", or empty where one is. There is always one."""
    rounds = blocks["round"].n_unique()
    if not rounds:
        return ""
    # Asked after a full cycle only: between two the arms' places are not balanced.
    if rounds % design.cycle == 0 and not design.fixed and settled(blocks):
        return "settled"
    full = rounds >= design.rounds or _run_s(blocks) + design.round_s > design.minutes * 60
    return "minutes" if full else ""


def _run_s(blocks: pl.DataFrame) -> float:
    """Seconds of load so far: a resumed run's clock goes on where it stopped."""
    end = (pl.col("began_s") + pl.col("window_s")).max()
    return float(blocks.select(end).item() or 0.0)


class _State:
    """How far a run is."""

    def __init__(self, comparison: Comparison, kept: store.Run) -> None:
        self.comparison, self.design = comparison, comparison.design
        self.number, self.blocks = len(kept.rounds), kept.blocks
        # Of recorded traffic a round sends one window, and its lulls are left out.
        last = kept.rounds[-1].get("window", self.number - 1) if kept.rounds else -1
        self.window = self.design.next_window(last + 1, comparison.workload)
        self.origin = 0.0  # of the run's clock, by time.monotonic
        self.void_in_a_row = {arm: list[float]() for arm in self.design.arms}  # when each of those blocks began

    def load(self, settled: Settled) -> str:
        """From one start of Locust to its end."""
        comparison, design = self.comparison, self.design
        where = comparison.place.master
        comparison.progress.starting(
            f"waiting for {comparison.place.workers} workers at {where[0]} port {where[1]}"
            if where
            else "starting Locust"
        )
        with Generator(
            comparison.url,
            comparison.workload,
            design.models,
            design.users,
            design.timeout_s,
            comparison.place,
            comparison.folder,
            comparison.look,
        ) as locust:
            meter = Meter(comparison.own.process.pid if comparison.own else pid_at(comparison.url))
            comparison.warm(comparison.url)
            self._warm_up(locust)
            self.origin = time.monotonic() - _run_s(self.blocks)
            while True:
                self._round(locust, meter)
                if why := over(design, self.blocks, settled):
                    return why

    def _warm_up(self, locust: Generator) -> None:
        visits = []
        for arm in self.design.order(self.number):
            self.comparison.progress.starting(f"warm-up: {arm}")
            seen = locust.visit(self.design.visit(self.window, arm), lambda *_: None)
            visits.append({"arm": arm, "model": self.design.model_of(arm), **_warm_facts(seen)})
            check_alive(self.comparison, seen)
        store.add_warmup(self.comparison.folder, {"at": _now(), "before_round": self.number, "visits": visits})

    def _round(self, locust: Generator, meter: Meter) -> None:
        began = _now()
        frames, facts = [], []
        for position, arm in enumerate(self.design.order(self.number)):
            self.comparison.progress.visiting(self.number, position, arm)
            visit = self.design.visit(self.window, arm)
            window = _Window(meter)
            seen = locust.visit(visit, window.on)
            check_alive(self.comparison, seen)
            where = {"round": self.number, "position": position, "arm": arm, "model": visit.model}
            began_s = window.at["began"] - self.origin
            facts.append(
                {
                    **where,
                    "began_s": round(began_s + visit.settle_s, DIGITS),
                    "window_s": visit.block_s,
                    "cpu_s": window.cpu_s(visit.block_s),
                    "rss_mb": window.rss_mb,
                    "client_cpu_share": round(seen.cpu_share, 4),
                    "void": why_void(seen.rows, visit),
                }
            )
            frames.append(frame_of(seen.rows, where, began_s))
        samples = pl.concat(frames)
        said, self.comparison.said = self.comparison.said, []
        told = {"at": began, "window": self.window, "blocks": facts, "said": said}
        store.write_round(self.comparison.folder, self.number, samples, told)
        self.blocks = pl.concat([self.blocks, store.blocks_of(samples, facts)])
        self.number += 1
        self.window = self.design.next_window(self.window + 1, self.comparison.workload)
        self._check_void(facts)
        self.comparison.progress.finished(self.number, self.blocks)

    def _check_void(self, facts: Sequence[dict[str, Any]]) -> None:
        """An arm whose blocks never count has no pairs, however long it takes.

        BadInput where no block of any arm ever counted: that server, or that load, is no comparison's.
        """
        for block in facts:
            row = self.void_in_a_row[block["arm"]]
            if block["void"]:
                row.append(block["began_s"])
            else:
                row.clear()
        never = [block for block in facts if self._is_hopeless(block)]
        if never:
            reasons = "; ".join(f"{block['arm']}: {block['void']}" for block in never)
            least = min(len(self.void_in_a_row[block["arm"]]) for block in never)
            kind = ActuaryError if (self.blocks["void"] == "").any() else BadInput
            raise kind(
                f"of the last {least} rounds no block counts of {reasons}\n"
                f"{remedy([block['void'] for block in never])}\n"
                f"{self.number} rounds are kept in {self.comparison.folder}: with that folder `actuary compare "
                "--resume` goes on, and `actuary report` judges those that count"
            )

    def _is_hopeless(self, block: dict[str, Any]) -> bool:
        row = self.void_in_a_row[block["arm"]]
        if len(row) < VOID_ROUNDS:
            return False
        return not of_this_machine(block["void"]) or block["began_s"] + block["window_s"] - row[0] >= VOID_S


def of_this_machine(void: str) -> bool:
    """Whether a block does not count because of the client, which a busy moment makes slow; else it is the server."""
    return void.startswith("client") or void == NOTHING_SENT


def remedy(voids: Sequence[str]) -> str:
    """What to do where blocks do not count for these reasons."""
    if all(map(of_this_machine, voids)):
        return (
            "this machine is too busy to send that load: stop what else runs and go on, or begin anew with less of it "
            "(--rate, --users), longer blocks (--block), or workers on other machines (--workers with --master)"
        )
    return (
        "the server does not answer that load: see what its log says and go on, or begin anew with less of it (--rate, "
        "--users), more time (--timeout), or without that variant (--variants)"
    )


def check_alive(comparison: Comparison, seen: Seen) -> None:
    """A server that is not ours is known to have died by the requests that it left unanswered.

    Ours says how it ended; killed, it hangs up before it can be waited for, on a busy machine long before.
    """
    if any(row["failure"] for row in seen.rows) and not ready(comparison.url):
        until = time.monotonic() + GONE_S
        comparison.look()
        while comparison.own and time.monotonic() < until:
            time.sleep(POLL_S)
            comparison.look()
        raise ServerDied(f"the server at {comparison.url} no longer answers")


class _Window:
    """What the server's process spends between the settling and the end of a block."""

    def __init__(self, meter: Meter) -> None:
        self.meter, self.at = meter, dict[str, float]()
        self.read: list[tuple[float, float | None]] = []
        self.rss_mb: float | None = None

    def on(self, name: str, at: float) -> None:
        self.at[name] = at
        if name in ("block", "ended"):
            self.read.append((time.monotonic(), self.meter.cpu_s()))
        if name == "ended":
            self.rss_mb = self.meter.rss_mb()

    def cpu_s(self, window_s: float) -> float | None:
        """Of `window_s`: this process may be told a little late that it began or ended."""
        (began, before), (ended, after) = self.read
        if before is None or after is None:
            return None
        return round((after - before) * window_s / (ended - began), DIGITS)


def why_void(rows: Sequence[dict[str, Any]], visit: Visit) -> str:
    """Why a block does not count; empty where it does."""
    measured = [row for row in rows if not row["settling"]]
    failed = [row["failure"] for row in measured if row["failure"]]
    if len(failed) == len(measured):
        return f"nothing answered: {failed[0]}" if failed else NOTHING_SENT
    if len(failed) > (1 - KEPT_SHARE) * len(measured):
        return f"{len(failed)} of {len(measured)} requests failed: {failed[0]}"
    return too_slow([row["late_ms"] for row in measured if not row["starved"]]) if visit.open else ""


def _warm_facts(seen: Seen) -> dict[str, Any]:
    good = [row for row in seen.rows if not row["failure"]]
    first = min(good, key=lambda row: row["at_s"], default=None)
    latencies = pl.Series([row["latency_ms"] for row in good], dtype=pl.Float64)
    return {
        "requests": len(seen.rows),
        "failures": len(seen.rows) - len(good),
        "first_ms": first and first["latency_ms"],
        "p50_ms": latencies.median(),
    }


def frame_of(rows: Sequence[dict[str, Any]], where: dict[str, Any], began_s: float) -> pl.DataFrame:
    schema = {name: kind for name, kind in store.SAMPLES.items() if name not in where}
    moved = [pl.col(name) + began_s for name in ("planned_s", "at_s")]
    return (
        pl.DataFrame(rows, schema=schema)
        .with_columns(*moved, *(pl.lit(value, store.SAMPLES[name]).alias(name) for name, value in where.items()))
        .select(store.SAMPLES.names())
        .sort("at_s")
    )


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
