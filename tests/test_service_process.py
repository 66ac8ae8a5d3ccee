"""The real process: what it imports, how it starts, how it refuses to, how it ends."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import httpx2 as httpx
import psutil
import pytest
import uvicorn
from conftest import HANG_S, free_port, serving

from service.runtime import CPU, CUDA, Runtime
from service.server import serve_until_stopped
from service.settings import Settings
from service.vocabulary import Vocabulary

ACTUARY = [str(Path(sys.executable).with_name("actuary"))]  # the installed program
MAX_GROWTH_BYTES = 48 * 2**20  # over idle, by bodies of 1 MiB: two copies as text, one as bytes, and small change
MEGABYTE = {"prompt": "a'" * 524_188}  # as large as the default limit lets a body be; 1 M tokens, were they made


def ask(url: str, **body: object) -> httpx.Response:
    return httpx.post(f"{url}/v1/next-token", json={"model": "gelu", "prompt": "if x is not", **body}, timeout=HANG_S)


def start(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A start that is expected to end by itself."""
    command = [*ACTUARY, "serve", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=HANG_S)


def test_it_answers_in_little_memory(server_url: str, bundles: Path) -> None:
    assert ask(server_url, model="*").status_code == 200
    with serving(bundles) as (url, process):
        resident = psutil.Process(process.pid).memory_info
        assert ask(url, model="*").status_code == 200
        idle = resident().rss
        for _ in range(20):
            assert ask(url, model="*", prompt=["if x is not"] * 8).status_code == 200
        for _ in range(4):
            assert "over the context" in ask(url, model="*", **MEGABYTE).text
        assert resident().rss - idle < MAX_GROWTH_BYTES


@pytest.mark.parametrize("field", ["prompt", "tokens"])
def test_it_answers_others_during_a_long_text(bundles: Path, field: str) -> None:
    """Tokenizing it on the event loop, or with the GIL held, would stop them for as long as it takes."""
    body = MEGABYTE if field == "prompt" else {"tokens": [MEGABYTE["prompt"]]}
    with serving(bundles) as (url, _), ThreadPoolExecutor(1) as pool, httpx.Client(base_url=url) as http:
        assert ask(url).status_code == 200
        sent = time.monotonic()
        long = pool.submit(ask, url, **body)
        worst_s = 0.0
        while not long.done():
            began = time.monotonic()
            assert http.get("/health/live").status_code == 200
            worst_s = max(worst_s, time.monotonic() - began)
        assert long.result().status_code == 422
        assert worst_s < (time.monotonic() - sent) / 2, "it is most of the time where the loop waits"


def test_tokenizing_lets_other_threads_run(bundles: Path) -> None:
    vocabulary = Vocabulary(bundles / "gelu" / "tokenizer.json")
    with ThreadPoolExecutor(1) as pool:
        began = before = time.monotonic()
        worst_s = 0.0
        encoding = pool.submit(vocabulary.encode, MEGABYTE["prompt"])
        while not encoding.done():
            time.sleep(0.001)
            worst_s = max(worst_s, (now := time.monotonic()) - before)
            before = now
    assert len(encoding.result()) > 500_000
    assert worst_s < (before - began) / 2, "with the GIL held it is the whole time"


def test_it_never_imports_torch_transformers_or_onnx(bundles: Path) -> None:
    """The process says what it has imported, after it has answered and drained."""
    port = free_port()
    code = (
        "import sys, actuary\n"
        f"arguments = ['serve', '--bundles', {str(bundles)!r}, '--port', '{port}']\n"
        "actuary.cli.main(arguments, standalone_mode=False)\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))\n"
    )
    command = [sys.executable, "-c", code]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + HANG_S
        while time.monotonic() < deadline and process.poll() is None:
            try:
                assert ask(url, model="*").status_code == 200
                break
            except httpx.TransportError:
                time.sleep(0.05)
        assert httpx.get(f"{url}/assets/plotly.min.js").status_code == 200
        process.send_signal(signal.SIGTERM)
        imported, said = process.communicate(timeout=HANG_S)
    finally:
        process.kill()
    assert process.returncode == 0, said
    roots = set(imported.split())
    assert {"onnxruntime", "uvloop", "httptools", "service"} <= roots
    assert not roots & {"torch", "transformers", "onnx", "plotly", "models", "loadtest"}


def test_it_says_what_serves_what_is_refused_and_where(bundles: Path, tmp_path: Path) -> None:
    shutil.copytree(bundles, tmp_path / "bundles")
    (tmp_path / "bundles" / "swiglu" / "manifest.json").write_text("[]")
    port = free_port()
    command = [*ACTUARY, "serve", "--bundles", str(tmp_path / "bundles"), "--port", str(port)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = ""
        for line in process.stderr:
            said += line
            if "http://" in line:
                break
        assert httpx.get(f"http://127.0.0.1:{port}/health/ready").status_code == 200, "it serves once it says so"
        process.send_signal(signal.SIGINT)
    assert process.returncode == 0
    assert f"2 variants on http://127.0.0.1:{port}/" in said
    assert "gelu-sigmoid-head: gelu, sigmoid head, fp32" in said
    assert "refused swiglu: " in said


def test_options_overrule_the_environment(bundles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACTUARY_MAX_BODY_BYTES", "200")
    monkeypatch.setenv("ACTUARY_MAX_PROMPTS", "2")
    with serving(bundles, "--max-prompts", "3") as (url, _):
        assert ask(url, prompt="x" * 300).status_code == 413
        assert ask(url, prompt=["a"] * 3).status_code == 200
        assert ask(url, prompt=["a"] * 4).status_code == 422


def test_a_chunked_body_over_the_limit_is_refused_and_the_connection_ends_well(bundles: Path) -> None:
    with serving(bundles, "--max-body-bytes", "100000") as (url, _), httpx.Client(base_url=url) as http:
        pieces = (b" " * 50_000 for _ in range(40))
        response = http.post("/v1/next-token", content=pieces, headers={"content-type": "application/json"})
        assert response.status_code == 413
        assert response.json()["error"]["code"] == 413
        assert http.get("/health/ready").status_code == 200


def different(prompts: int) -> list[list[int]]:
    """So many prompts: of the same one, all that wait are computed at once. Long ones, so that a queue lasts."""
    return [[n // 300, n % 300, *range(30)] for n in range(prompts)]


def waiting(http: httpx.Client, least: int) -> int:
    """How many prompts wait, once at least so many do."""
    end = time.monotonic() + HANG_S
    while (found := http.get("/health").json()["waiting"]) < least:
        assert time.monotonic() < end, f"{found} wait"
    return found


def test_a_full_queue_is_429_with_retry_after(bundles: Path) -> None:
    """Eight callers with four prompts each on a queue of four: some are refused, none fails otherwise."""
    with serving(bundles, "--max-queue", "4", "--max-prompts", "4", "--max-batch-tokens", "1") as (url, _):
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda n: ask(url, prompt=different(4 * n + 4)[-4:], top_k=300), range(80)))
        assert {answer.status_code for answer in answers} == {200, 429}
        refused = next(answer for answer in answers if answer.status_code == 429)
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["type"] == "queue_full"
        assert ask(url).status_code == 200


def asked(url: str, **body: object) -> HTTPConnection:
    """A connection with a request on it: the machine has all of it, whether the server has taken it yet or not."""
    connection = HTTPConnection(url.removeprefix("http://"), timeout=HANG_S)
    connection.request("POST", "/v1/next-token", json.dumps(body), {"content-type": "application/json"})
    return connection


def test_sigterm_finishes_what_is_queued(bundles: Path) -> None:
    """Requests that were taken are answered in full, later ones find nobody, and the process ends with 0."""
    slow = ("--max-batch-tokens", "1", "--timeout-s", "300")
    with serving(bundles, *slow) as (url, process), httpx.Client(base_url=url) as client:
        callers = [asked(url, model="*", prompt=different(32 * n + 32)[-32:], top_k=300) for n in range(2)]
        waiting(client, 20)
        process.send_signal(signal.SIGTERM)
        for caller in callers:
            answer = caller.getresponse()
            assert answer.status == 200
            assert len(json.load(answer)["results"]) == 96
        assert process.wait(timeout=HANG_S) == 0
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{url}/health")


def test_sigterm_answers_what_had_arrived(bundles: Path) -> None:
    """A request on a new connection, and one on a connection that was there, while the server could look at neither."""
    with serving(bundles) as (url, process):
        there = HTTPConnection(url.removeprefix("http://"), timeout=HANG_S)
        there.request("GET", "/health")
        assert there.getresponse().read()
        process.send_signal(signal.SIGSTOP)
        there.request("GET", "/health")
        new = asked(url, model="gelu", prompt="if x is not")
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)  # so that its watch for signals, every 0.1 s, is due before it reads
        process.send_signal(signal.SIGCONT)
        assert [there.getresponse().status, new.getresponse().status] == [200, 200]
        assert process.wait(timeout=HANG_S) == 0


@pytest.mark.parametrize("moment", ["service.server.create_app", "uvicorn.Config.get_loop_factory"])
def test_a_signal_during_the_start_ends_it(bundles: Path, moment: str) -> None:
    """While the bundles load, and in the moment before uvicorn listens to signals itself."""
    code = (
        "import os, signal, unittest.mock, actuary, service.server, uvicorn\n"
        f"original = {moment}\n"
        "def told(*given):\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return original(*given)\n"
        f"unittest.mock.patch({moment!r}, told).start()\n"
        f"actuary.cli.main(['serve', '--bundles', {str(bundles)!r}, '--port', '0'])\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=HANG_S)
    assert ended.returncode == 0, ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_body_that_never_ends_is_answered_408_and_does_not_delay_the_end(bundles: Path) -> None:
    head = b"POST /v1/next-token HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{"
    with serving(bundles, "--timeout-s", "1") as (url, process):

        def half_a_request() -> socket.socket:
            caller = socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=HANG_S)
            caller.sendall(head)
            return caller

        with half_a_request() as caller:
            said = b"".join(iter(lambda: caller.recv(4096), b""))  # to the end: the connection is closed
        assert said.startswith(b"HTTP/1.1 408 "), said
        assert b'"type": "timeout"' in said
        with half_a_request():
            time.sleep(0.2)
            process.send_signal(signal.SIGTERM)
            _, said = process.communicate(timeout=HANG_S)
        assert process.returncode == 0
        assert "Traceback" not in said


def test_draining_outlasts_the_longest_wait(bundles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a request that is due a 408 would be cut off."""
    configs: list[uvicorn.Config] = []
    monkeypatch.setattr("service.server._Server.run", lambda server, _: configs.append(server.config))
    monkeypatch.setattr("signal.signal", lambda *_: None)
    with socket.socket() as listener:
        serve_until_stopped(Settings(bundles=bundles, provider="cpu", threads=1, timeout_s=7), listener)
    assert configs[0].timeout_graceful_shutdown > 7 + 1


def test_draining_gives_up_what_still_generates_before_it_is_cut_off(
    bundles: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    servers: list[Any] = []
    monkeypatch.setattr("service.server._Server.run", lambda server, _: servers.append(server))
    monkeypatch.setattr("signal.signal", lambda *_: None)
    with socket.socket() as listener:
        serve_until_stopped(Settings(bundles=bundles, provider="cpu", threads=1, timeout_s=0.05), listener)
    servers[0].servers = []
    given_up: list[float] = []
    monkeypatch.setattr(servers[0]._service.engine, "give_up", lambda: given_up.append(time.monotonic()))

    async def shut_down(server: uvicorn.Server, sockets: Any = None) -> None:
        while not given_up:
            await asyncio.sleep(0.01)

    monkeypatch.setattr("uvicorn.Server.shutdown", shut_down)
    asyncio.run(asyncio.wait_for(servers[0].shutdown(), 10))


def test_a_client_that_hangs_up_is_dropped_from_the_queue(bundles: Path) -> None:
    with serving(bundles, "--max-batch-tokens", "1") as (url, _), httpx.Client(base_url=url) as http:
        callers = []
        for n in range(4):
            body = json.dumps({"model": "*", "prompt": different(64 * n + 64)[-64:]}).encode()
            head = "POST /v1/next-token HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            head += f"content-length: {len(body)}\r\n\r\n"
            caller = socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])))
            caller.sendall(head.encode() + body)
            callers.append(caller)
        before = waiting(http, 100)
        for caller in callers:
            caller.close()
        while http.get("/health").json()["waiting"]:
            time.sleep(0.01)
        metrics = http.get("/metrics").text
        [dropped] = re.findall(r'actuary_dropped_prompts_total\{reason="client_gone"\} (\S+)', metrics)
        assert float(dropped) > before / 2, f"{before} waited, {dropped} were dropped when their clients left"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--bundles", "/nowhere"), "actuary export"),
        (("--port", "70000"), "--port 70000"),
        (("--port", "http"), "not a valid integer"),
        (("--threads", "0"), "--threads 0"),
        (("--provider", "tpu"), "'auto', 'cpu', 'cuda'"),
        (("--host", "no.such.host.invalid"), "--host"),
        (("--host", "a..b"), "--host"),
        (("--host", "a" * 64), "--host"),
        (("--max-queue", "5"), "max_queue 5"),
        (("--unknown",), "--unknown"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_start_that_cannot_be_ends_with_2_and_says_what_to_do(arguments: tuple[str, ...], says: str) -> None:
    ended = start("--port", "0", *arguments)
    assert ended.returncode == 2, ended.stderr
    assert says in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_taken_port_ends_with_2(server_url: str, bundles: Path) -> None:
    ended = start("--bundles", str(bundles), "--port", server_url.rpartition(":")[2])
    assert ended.returncode == 2
    assert "--port" in ended.stderr


def test_cuda_that_is_asked_for_and_not_there_ends_with_2(bundles: Path) -> None:
    if Path("/dev/nvidia0").exists():
        pytest.skip("there is a CUDA device here")
    ended = start("--bundles", str(bundles), "--port", "0", "--provider", "cuda")
    assert ended.returncode == 2
    assert ended.stderr.startswith("actuary: --provider cuda: CUDA does not run here")
    assert "--provider cpu" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(("offers", "says"), [(True, ""), (False, "a line of its own")], ids=["runs", "does not"])
def test_cuda_that_runs_is_not_said_to_be_missing(monkeypatch: pytest.MonkeyPatch, offers: bool, says: str) -> None:
    """Whatever loading its libraries prints: that is a reason only where no CUDA session opens."""

    class Session:
        def get_providers(self) -> list[str]:
            return [CUDA, CPU] if offers else [CPU]

    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr("onnxruntime.preload_dlls", lambda: print("a line of its own"))
    monkeypatch.setattr("onnxruntime.InferenceSession", lambda *_, **__: Session())
    runtime = Runtime("auto", threads=1)
    runtime.open(Path("model.onnx"))
    assert runtime.no_cuda == says


def test_help_needs_no_server_and_names_the_environment() -> None:
    ended = start("--help")
    assert ended.returncode == 0
    for expected in ("ACTUARY_MAX_QUEUE", "ACTUARY_PORT", "--provider", "actuary serve --bundles"):
        assert expected in ended.stdout
