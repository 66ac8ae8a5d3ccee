"""A server of known delays that says what Actuary's would, and does wrong what a name promises."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

DELAY_MS = {"fast": 7.3, "slow": 9.7, "broken": 1.0, "liar": 1.0, "hangs": 1.0, "drips": 1.0}
HANGS_AFTER = 30  # requests; before them `hangs` and `drips` answer as `fast` does


class StandIn(BaseHTTPRequestHandler):
    """/v1/models, /tokenize and /v1/next-token as API.md promises them: `broken` answers 503, `liar` another's name,
    and later `hangs` says nothing for ever, and `drips` a byte now and then, so that no read times out."""

    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        if self.path == "/health/ready":
            self._answer(200, {"ready": True})
            return
        files = {"tokenizer.json": "0" * 64}
        facts = {"object": "model", "context": 64, "vocab_size": 1000, "files": files}
        models = [{"id": name, "root": name, **facts} for name in self.server.models]
        self._answer(200, {"object": "list", "data": models})

    def do_POST(self) -> None:
        began = time.perf_counter()
        request = json.loads(self.rfile.read(int(self.headers["content-length"])))
        model = request["model"]
        if self.path == "/tokenize":
            self._answer(200, {"tokens": [*range(7, 7 + len(request["prompt"].split()))]})
            return
        self.server.seen.append((model, request["prompt"]))
        with self.server.core:
            time.sleep(DELAY_MS[model] / 1000 + self.server.stall_s())
        if model in ("hangs", "drips") and len(self.server.seen) > HANGS_AFTER:
            self.close_connection = True
            with contextlib.suppress(OSError):  # the client has left
                if model == "drips":
                    self.wfile.write(b"HTTP/1.1 200 X\r\ncontent-length: 999\r\n\r\n")
                while not self.server.closing.wait(0.2):
                    self.wfile.write(b" " if model == "drips" else b"")
            return
        if model == "broken":
            error = {"message": "no", "type": "overloaded", "param": None, "code": 503}
            self._answer(503, {"error": error})
            return
        name = "someone-else" if model == "liar" else model
        top = [{"rank": i + 1, "id": i, "text": "x"} for i in range(request["top_k"])]
        total_ms = (time.perf_counter() - began) * 1000
        times = {
            "x-queue-ms": 0.125,
            "x-tokenize-ms": 0.25,
            "x-infer-ms": DELAY_MS[model],
            "x-total-ms": total_ms,
        }
        result = {"prompt_index": 0, "model": name, "top": top}
        self._answer(200, {"object": "next_token", "results": [result]}, times)

    def _answer(self, status: int, body: object, headers: dict[str, float] | None = None) -> None:
        payload = json.dumps(body).encode()
        head = [f"HTTP/1.1 {status} X", "content-type: application/json", f"content-length: {len(payload)}"]
        head += [f"{name}: {value:.3f}" for name, value in (headers or {}).items()]
        self.wfile.write("\r\n".join([*head, "", ""]).encode() + payload)

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, models: list[str]) -> None:
        super().__init__(("127.0.0.1", 0), StandIn)
        self.models = models
        self.seen: list[tuple[str, str]] = []
        self.stall_at: int | None = None  # the count of requests that makes the server stand still
        self.stall_until = 0.0
        self.core: contextlib.AbstractContextManager[object] = contextlib.nullcontext()  # a lock: one at a time
        self.closing = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def stall_s(self) -> float:
        if self.stall_at and len(self.seen) >= self.stall_at:
            self.stall_at, self.stall_until = None, time.perf_counter() + 0.5
        return max(0.0, self.stall_until - time.perf_counter())


@contextlib.contextmanager
def standing_in(models: list[str]) -> Iterator[Server]:
    server = Server(models)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        thread.join()
        server.server_close()
