"""One visit: sends a workload to one server and says what it saw. A process of its own, told by JSON.

    echo '{"port": 8000, "workload": {...}, ...}' | python -m loadtest.bench.client

asyncio with a few lines of HTTP/1.1: bodies are made before the clock starts, connections stay open, answers are
not decoded. What it costs is measured against a server that does nothing (`--nothing PORT` is that server), and
stands in the report. Client and server share the machine's cores, as they do in every figure of every contender.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import sys
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import uvloop

from loadtest.bench.workloads import BATCH, GENERATED, Door, Workload, bodies

# Bodies made before the clock starts, for each second of the visit; past these they are made as they are sent.
READY_PER_S = 600
GENERATE_WAVES = 3  # requests of each caller that are measured, after one that is not
INFER = b"\r\nx-infer-ms: "
ANSWER_TIMEOUT_S = 60.0  # past the visit's own seconds, for the last answers


class Connection(asyncio.Protocol):
    """One request at a time."""

    def __init__(self) -> None:
        self.answer: asyncio.Future[tuple[float, int, float, bytes]] | None = None
        self.read = bytearray()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # of TCP
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.read += data
        head = self.read.find(b"\r\n\r\n")
        if head < 0:
            return
        lower = bytes(self.read[: head + 2]).lower()
        length_at = lower.find(b"\r\ncontent-length: ")
        if length_at < 0:
            self._end(OSError(f"an answer without content-length: {bytes(self.read[:200])!r}"))
            return
        length = int(lower[length_at + 18 : lower.index(b"\r\n", length_at + 18)])
        if len(self.read) < head + 4 + length:
            return
        at = lower.find(INFER)
        infer_ms = float(lower[at + len(INFER) : lower.index(b"\r\n", at + len(INFER))]) if at >= 0 else 0.0
        status, body = int(self.read[9:12]), bytes(self.read[head + 4 :])
        self.read.clear()
        if self.answer and not self.answer.done():
            self.answer.set_result((time.perf_counter(), status, infer_ms, body))

    def connection_lost(self, error: Exception | None) -> None:
        self._end(error or OSError("the server closed the connection"))

    def _end(self, error: Exception) -> None:
        if self.answer and not self.answer.done():
            self.answer.set_exception(error)

    async def ask(self, request: bytes) -> tuple[float, int, float, bytes]:
        """(when its last byte came, by perf_counter; status; the server's own x-infer-ms or 0; body)"""
        self.answer = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        return await self.answer


@dataclasses.dataclass
class Seen:
    """What a visit saw, in its window."""

    latency_ms: list[float] = dataclasses.field(default_factory=list)
    infer_ms: list[float] = dataclasses.field(default_factory=list)
    failures: int = 0
    first_failure: str = ""
    status: int = 200  # of the first failure
    window_s: float = 0.0
    served: float = 0.0  # answers, of a closed loop the part of each that lay in the window

    def add(self, since: float, answer: tuple[float, int, float, bytes]) -> None:
        at, status, infer_ms, body = answer
        if status != 200:
            self.failures += 1
            if not self.first_failure:
                self.first_failure, self.status = body[:300].decode(errors="replace"), status
            return
        self.latency_ms.append(round(1e3 * (at - since), 3))
        if infer_ms:
            self.infer_ms.append(infer_ms)

    def add_share(self, since: float, answer: tuple[float, int, float, bytes], begin: float, end: float) -> None:
        """A request that lay in the window in part is served in part: whole ones alone would count a batch of 32 that
        ends every 0.3 s as 9 or as 10 in 3 s. Its latency counts where it was answered in the window."""
        at, status = answer[:2]
        if status == 200:
            self.served += max(0.0, min(at, end) - max(since, begin)) / (at - since)
        if begin <= at < end or (status != 200 and at >= begin):
            self.add(since, answer)


def _request(asked: tuple[str, bytes], port: int) -> bytes:
    path, body = asked
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def _ready(stream: Iterator[tuple[str, bytes]], count: int, port: int) -> Iterator[bytes]:
    made = (_request(asked, port) for asked in stream)
    return itertools.chain(deque(itertools.islice(made, count)), made)


async def _connect(port: int) -> Connection:
    _, connection = await asyncio.get_running_loop().create_connection(Connection, "127.0.0.1", port)
    return connection


async def _closed(told: dict[str, Any], streams: list[Iterator[bytes]]) -> Seen:
    """Each caller sends its next request when the last was answered."""
    seen = Seen(window_s=told["seconds"])
    connections = [await _connect(told["port"]) for _ in streams]
    begin = time.perf_counter() + told["warm_s"]
    end = begin + told["seconds"]

    async def call(connection: Connection, stream: Iterator[bytes]) -> None:
        while (since := time.perf_counter()) < end:
            seen.add_share(since, await connection.ask(next(stream)), begin, end)

    await asyncio.gather(*map(call, connections, streams))
    return seen


async def _open(workload: Workload, told: dict[str, Any], stream: Iterator[bytes]) -> Seen:
    """Requests leave at planned times whether or not the server keeps up; latency counts from the plan."""
    seen = Seen(window_s=told["seconds"])
    free = asyncio.Queue[Connection]()
    for _ in range(workload.callers):
        free.put_nowait(await _connect(told["port"]))
    start = time.perf_counter() + 0.05
    asking = set[asyncio.Task[None]]()

    async def ask(planned: float, request: bytes) -> None:
        connection = await free.get()
        answer = await connection.ask(request)
        free.put_nowait(connection)
        if planned >= start + told["warm_s"]:
            seen.add(planned, answer)

    for i in range(int((told["warm_s"] + told["seconds"]) * told["rate"])):
        planned = start + i / told["rate"]
        if (early := planned - time.perf_counter()) > 0:
            await asyncio.sleep(early)
        asking.add(asyncio.create_task(ask(planned, next(stream))))
    await asyncio.gather(*asking)
    return seen


async def _counted(told: dict[str, Any], streams: list[Iterator[bytes]]) -> Seen:
    """Each caller sends one request, waits for the others', and then so many: whole generations, none cut."""
    seen = Seen()
    connections = [await _connect(told["port"]) for _ in streams]
    first = await asyncio.gather(*(c.ask(next(s)) for c, s in zip(connections, streams, strict=True)))
    if any(status != 200 for _, status, _, _ in first):
        seen.add(0.0, next(answer for answer in first if answer[1] != 200))
        return seen
    begin = time.perf_counter()

    async def call(connection: Connection, stream: Iterator[bytes]) -> None:
        for _ in range(GENERATE_WAVES):
            since = time.perf_counter()
            seen.add(since, await connection.ask(next(stream)))

    await asyncio.gather(*map(call, connections, streams))
    seen.window_s = time.perf_counter() - begin
    return seen


async def visit(told: dict[str, Any]) -> dict[str, Any]:
    """`told`: port, ours, models, workload, vocab_size, seed, warm_s, seconds, and of an open loop rate."""
    workload = Workload(**told["workload"])
    door = Door(told["ours"], tuple(told["models"]))
    callers = 1 if workload.kind == "open" or (workload.kind == "generate" and not door.ours) else workload.callers
    count = int(READY_PER_S * (told["warm_s"] + told["seconds"]))
    count = GENERATE_WAVES + 1 if workload.kind == "generate" else -(-count // callers)
    streams = [
        _ready(bodies(workload, door, caller, told["vocab_size"], told["seed"]), count, told["port"])
        for caller in range(callers)
    ]
    print("ready", flush=True)  # the server is woken now
    sys.stdin.readline()
    cpu = time.process_time()
    async with asyncio.timeout(told["warm_s"] + told["seconds"] + ANSWER_TIMEOUT_S):
        if workload.kind == "open":
            seen = await _open(workload, told, streams[0])
        elif workload.kind == "generate":
            seen = await _counted(told, streams)
        else:
            seen = await _closed(told, streams)
    seen.served = seen.served or len(seen.latency_ms)
    tokens = GENERATED * (1 if door.ours else BATCH) if workload.kind == "generate" else 1
    return {
        **dataclasses.asdict(seen),
        "per_s": seen.served * tokens / seen.window_s if seen.window_s else 0.0,
        "client_cpu_s": time.process_time() - cpu,
    }


class _Nothing(asyncio.Protocol):
    """Answers any request at once with as many bytes as a rival's answer has."""

    ANSWER = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 300\r\n\r\n" + b" " * 300

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # of TCP
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        if data.endswith(b"}"):  # a body's last byte, of which none has another
            self.transport.write(self.ANSWER)


async def _serve_nothing(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(_Nothing, "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--nothing"]:
        uvloop.run(_serve_nothing(int(sys.argv[2])))
    else:
        print(json.dumps(uvloop.run(visit(json.loads(sys.stdin.readline())))))
