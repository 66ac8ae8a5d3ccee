"""Rounds of visits. In a round each workload goes to every contender once, in an order drawn anew, so that drift of
the machine meets them alike; while one is measured the others' processes are stopped.

A visit is kept as one line of visits.jsonl when it is over. A run that was killed goes on where it was: with the
workload of the round that it had not finished, which is begun again, so that what is compared was measured together.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from actuary import ActuaryError
from loadtest.bench import workloads
from loadtest.bench.contenders import Contender
from loadtest.bench.servers import Server
from loadtest.bench.workloads import Workload

ROOT = Path(__file__).parent.parent.parent
NEAR = 0.95  # a contender that reaches less than the rate over this is not sent it
NOT_THERE = 404

Record = dict[str, Any]
Progress = Callable[[str], None]


class Visits:
    """What was measured so far, on disk."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.records: list[Record] = []
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    self.records.append(json.loads(line))
                except ValueError:
                    continue  # torn by a kill

    def add(self, records: Sequence[Record]) -> None:
        """All contenders of one workload in one round, at once."""
        self.records += records
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
            file.flush()
            os.fsync(file.fileno())

    def of(self, workload: Workload, round_: int | None = None) -> list[Record]:
        return [r for r in self.records if r["workload"] == workload.name and round_ in (None, r["round"])]


@dataclasses.dataclass(frozen=True)
class Pace:
    """How long a visit is."""

    warm_s: float
    seconds: float


def takes_part(contender: Contender, workload: Workload) -> bool:
    if workload.kind == "turns":
        return contender.setting == "six"
    return contender.setting != "six" and (workload.kind != "generate" or contender.generates)


def cells(contenders: Sequence[Contender]) -> list[tuple[Workload, list[Contender]]]:
    """Each workload with those whom it visits."""
    found = [(w, [c for c in contenders if takes_part(c, w)]) for w in workloads.ALL]
    return [(workload, those) for workload, those in found if those]


def run(
    visits: Visits, servers: dict[str, Server], rounds: int, pace: Pace, vocab_size: int, progress: Progress
) -> None:  # fmt: skip
    """Fills `visits` up to so many rounds; the servers are paused. `progress` is told each visit that is over."""
    contenders = [server.contender for server in servers.values()]
    for round_ in range(rounds):
        for workload, those in cells(contenders):
            if {record["contender"] for record in visits.of(workload, round_)} >= {c.name for c in those}:
                for contender in those:
                    progress(f"round {round_ + 1}: {workload.name}: {contender.name}: kept")
                continue
            order = random.Random(f"{round_} {workload.name}").sample(those, len(those))
            measured = []
            for contender in order:
                rate = _rate(visits, workload, contender, contenders)
                told = {
                    "workload": dataclasses.asdict(workload), "ours": contender.ours, "vocab_size": vocab_size,
                    "seed": f"round {round_}", "warm_s": pace.warm_s, "seconds": pace.seconds, "rate": rate,
                }  # fmt: skip
                seen = _turns if workload.kind == "turns" else visit
                record = seen(servers[contender.name], told)
                record |= {"round": round_, "workload": workload.name, "contender": contender.name, "rate": rate}
                measured.append(record)
                progress(f"round {round_ + 1}: {workload.name}: {contender.name}: {said(record)}")
            visits.add(measured)


def said(record: Record) -> str:
    if record["skipped"]:
        return f"not measured: {record['skipped']}"
    failed = f", {record['failures']} failed: {record['first_failure'][:80]}" if record["failures"] else ""
    return f"{record['per_s']:.1f}/s{failed}"


def visit(server: Server, told: Record) -> Record:
    """One workload on one server, which is awake for as long."""
    if told["workload"]["kind"] == "open" and told["rate"] is None:
        return _skipped("the rate is above what it reaches")
    if not server.alive:
        server.start()
        server.pause()
    models = told.get("models", server.contender.models)
    client = subprocess.Popen(
        [sys.executable, "-m", "loadtest.bench.client"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert client.stdin
    assert client.stdout
    try:
        client.stdin.write(json.dumps({**told, "port": server.port, "models": models}) + "\n")
        client.stdin.flush()
        client.stdout.readline()  # its bodies are made
        server.resume()
        machine, own, began = _busy_s(), server.cpu_s(), time.perf_counter()
        out, errors = client.communicate("\n", timeout=600)
        lasted = time.perf_counter() - began
        machine, own = _busy_s() - machine, server.cpu_s() - own
    finally:
        client.kill()
        server.pause()
    if client.returncode:
        why = errors.strip().splitlines()[-1] if errors.strip() else "no answer"
        record = _skipped("") | {"failures": 1, "first_failure": f"the client ended: {why}"}
    else:
        record = {"skipped": "", **json.loads(out)}
    if record.get("status") == NOT_THERE and not record["latency_ms"]:
        return _skipped("it has no such route")
    spent = record["client_cpu_s"]
    return record | {
        "resident_mb": round(server.resident_mb(), 1),
        "server_cores": round(own / lasted, 3),
        "client_cores": round(spent / lasted, 3),
        "others_cores": round(max(0.0, machine - own - spent) / lasted, 3),
    }


def _turns(server: Server, told: Record) -> Record:
    """Six variants in turn; or each alone for a sixth of the time, and what that is with as many requests of each."""
    models = server.contender.models
    if told["workload"]["name"] == workloads.TURNS[1].name:
        return visit(server, told)
    parts = []
    for model in models:
        share = {"warm_s": told["warm_s"] / 2, "seconds": told["seconds"] / 3, "models": [model]}
        parts.append(visit(server, told | share))
    rates = [part["per_s"] for part in parts]
    together = {key: [value for part in parts for value in part[key]] for key in ("latency_ms", "infer_ms")}
    per_s = len(rates) / sum(1 / rate for rate in rates) if min(rates) > 0 else 0.0
    failures = sum(part["failures"] for part in parts)
    return parts[-1] | together | {"per_s": per_s, "failures": failures, "each_per_s": rates}


def _skipped(why: str) -> Record:
    return {
        "skipped": why, "per_s": 0.0, "latency_ms": [], "infer_ms": [], "failures": 0, "first_failure": "",
        "client_cpu_s": 0.0, "window_s": 0.0,
    }  # fmt: skip


def _rate(visits: Visits, workload: Workload, contender: Contender, everybody: Sequence[Contender]) -> float | None:
    """Arrivals/s of an open loop, from the closed loop of the first round; None where it is not one, or too much."""
    if workload.kind != "open":
        return None
    reached = {record["contender"]: record["per_s"] for record in visits.of(workloads.BASIS, 0)}
    those = [c for c in everybody if c.name in reached]
    if workload is workloads.OPEN[0]:
        best: dict[tuple[str, str], float] = {}  # of an engine's settings
        for c in those:
            best[c.engine, c.precision] = max(best.get((c.engine, c.precision), 0.0), reached[c.name])
        yardstick = min(best.values())
    else:
        mine = [c for c in those if c.precision == contender.precision]
        yardstick = max(reached[c.name] for c in [c for c in mine if not c.ours] or mine)
    rate = round(workload.share * yardstick, 1)
    if rate <= 0:
        raise ActuaryError(f"{workloads.BASIS.name}: an engine served nothing; see its log, and run with --again")
    return rate if rate <= NEAR * reached[contender.name] else None


def _busy_s() -> float:
    """Processor time of the whole machine."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - times.iowait - times.guest - times.guest_nice)


def ceiling(pace: Pace, vocab_size: int) -> Iterator[Record]:
    """What the client reaches against a server that does nothing, at each number of callers."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    nothing = [sys.executable, "-m", "loadtest.bench.client", "--nothing", str(port)]
    process = subprocess.Popen(nothing, env=environment)
    try:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        for workload in workloads.CLOSED[:3]:
            told = {
                "workload": dataclasses.asdict(workload), "ours": False, "models": [], "vocab_size": vocab_size,
                "seed": "nothing", "warm_s": pace.warm_s, "seconds": pace.seconds, "port": port,
            }  # fmt: skip
            done = subprocess.run(
                [sys.executable, "-m", "loadtest.bench.client"], input=json.dumps(told) + "\n\n", text=True,
                capture_output=True, env=environment, check=True,
            )  # fmt: skip
            seen = json.loads(done.stdout.splitlines()[-1])
            yield {"callers": workload.callers, **{key: seen[key] for key in ("per_s", "latency_ms", "client_cpu_s")}}
    finally:
        process.kill()
        process.wait()
