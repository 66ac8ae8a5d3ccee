"""/metrics: every counter against what was done, its labels bounded, its cost."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import psutil
import pytest
from conftest import serving
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from service.app import create_app
from service.engine import Engine, Job, Rows
from service.errors import ApiError
from service.metrics import NONE, SEVERAL, Metrics, model_label
from service.prefix_cache import PrefixCache
from service.settings import Settings
from service.variant import Piece

LIMIT_S = 60
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


@pytest.fixture
def client(bundles: Path) -> Iterator[TestClient]:
    app = create_app(Settings(bundles=bundles, provider="cpu", threads=1, max_queue=256, max_body_bytes=2_000))
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


def samples(text: str) -> Samples:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


class Scrape:
    """`scrape(name, label=value, ...)`: the sum over the series that have these labels."""

    def __init__(self, client: Any) -> None:
        response = client.get("/metrics")
        assert response.status_code == 200
        assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        self.all = samples(response.text)

    def __call__(self, name: str, **labels: str) -> float:
        return sum(v for (n, has), v in self.all.items() if n == name and labels.items() <= set(has))


def test_requests_are_counted_by_route_model_and_status(client: TestClient) -> None:
    for model in ("gelu", "gelu", "swiglu", ["gelu", "swiglu"], "*", "nothing"):
        client.post("/v1/next-token", json={"model": model, "prompt": "a"})
    client.post("/v1/next-token", json={"model": "gelu", "prompt": ""})
    client.post("/v1/next-token", json={"model": "gelu", "prompt": [300]})
    client.post("/v1/next-token", content=b"x" * 3_000)
    client.get("/v1/next-token")
    client.post("/v1/score", json={"model": "swiglu", "query": "a", "items": ["b"], "label_token_ids": [1]})
    client.post("/v1/tokenize", json={"prompt": "a"})
    client.post("/tokenize", json={"prompt": "a", "model": "gelu"})
    client.get("/v1/models/gelu")
    client.get("/v1/models/nothing")
    scrape = Scrape(client)

    def counted(route: str, model: str, status: int) -> float:
        return scrape("actuary_requests_total", route=route, model=model, status=str(status))

    assert counted("/v1/next-token", "gelu", 200) == 2
    assert counted("/v1/next-token", "swiglu", 200) == 1
    assert counted("/v1/next-token", SEVERAL, 200) == 2
    assert counted("/v1/next-token", NONE, 404) == 1
    assert counted("/v1/next-token", NONE, 422) == 1, "refused before its model is known"
    assert counted("/v1/next-token", "gelu", 422) == 1
    assert counted("other", NONE, 413) == 1, "refused before its route is known"
    assert counted("/v1/next-token", NONE, 405) == 1
    assert counted("/v1/score", "swiglu", 200) == 1
    assert counted("/v1/tokenize", SEVERAL, 200) == 1
    assert counted("/tokenize", "gelu", 200) == 1
    assert counted("/v1/models/{name}", NONE, 200) == 1
    assert counted("/v1/models/{name}", NONE, 404) == 1
    assert scrape("actuary_requests_total") == 15
    assert scrape("actuary_request_seconds_count") == 15
    assert Scrape(client)("actuary_requests_total", route="/metrics", status="200") == 1


def test_no_label_is_of_a_caller_s_making(client: TestClient) -> None:
    """However many paths, names, methods and headers they think of."""
    client.post("/v1/next-token", json={"model": "gelu", "prompt": "a"})
    client.get("/v1/models/x")
    client.get("/health")
    client.get("/nothing")
    client.get("/page/index.html")
    before = set(Scrape(client).all)
    for i in range(20):
        client.get(f"/nothing/{i}")
        client.get(f"/v1/models/{i}")
        client.get(f"/page/{i}")
        client.get(f"/page/{i}/../../{i}")
        client.get(f"/health?{i}", headers={"x-request-id": f"id-{i}", "host": f"h{i}"})
        client.request(f"GET{i}", f"/nothing/{i}")
        client.post(f"/v1/{i}", json={})
        client.post("/v1/next-token", json={"model": f"gelu-{i}", "prompt": "a"})
        client.post("/v1/next-token", json={"model": ["gelu", str(i)], "prompt": "a"})
        client.get("/tokenizer_info", params={"model": str(i)})
    after = {(name, labels) for name, labels in Scrape(client).all if name == "actuary_requests_total"}
    new = {tuple(sorted(dict(labels).items())) for _, labels in after - before}
    values = {value for labels in new for _, value in labels}
    assert values <= {"/metrics", "/page", "/v1/next-token", "/tokenizer_info", "other", "", "200", "404", "405"}


@pytest.mark.parametrize(
    ("names", "label"),
    [
        (["a"], "a"),
        (["a", "b"], SEVERAL),
        (["*"], SEVERAL),
        (["c"], NONE),
        (["a", "c"], NONE),
        (["*", "a"], NONE),
        ([], NONE),
    ],
)
def test_the_label_of_a_model(names: list[str], label: str) -> None:
    assert model_label(names, {"a": 1, "b": 2}) == label


def test_times_are_those_of_the_headers(client: TestClient) -> None:
    told = {"tokenize": 0.0, "queue": 0.0, "infer": 0.0}
    for prompt in ("a", "if x is not", ["a"] * 8):
        headers = client.post("/v1/next-token", json={"model": "gelu", "prompt": prompt}).headers
        for stage in told:
            told[stage] += float(headers[f"x-{stage}-ms"]) / 1e3
    scrape = Scrape(client)
    for stage, seconds in told.items():
        assert scrape("actuary_stage_seconds_count", stage=stage, model="gelu") == 3
        # Three headers of three decimals in milliseconds.
        assert scrape("actuary_stage_seconds_sum", stage=stage, model="gelu") == pytest.approx(seconds, abs=1.5e-6)
        assert scrape("actuary_stage_seconds_bucket", stage=stage, model="gelu", le="+Inf") == 3
    assert scrape("actuary_request_seconds_sum", route="/v1/next-token") >= sum(told.values()) - 1.5e-6


def test_batches_tokens_and_padding_are_counted(client: TestClient) -> None:
    client.post("/v1/next-token", json={"model": "gelu", "prompt": [[1] * 10, [1] * 6, [1] * 8]})
    client.post("/v1/next-token", json={"model": "swiglu", "prompt": [1, 2, 3]})
    scrape = Scrape(client)
    assert scrape("actuary_batch_prompts_count", model="gelu") == 1
    assert scrape("actuary_batch_prompts_sum", model="gelu") == 3
    assert scrape("actuary_batch_prompts_bucket", model="gelu", le="2.0") == 0
    assert scrape("actuary_batch_prompts_bucket", model="gelu", le="4.0") == 1
    assert scrape("actuary_tokens_total", model="gelu", kind="prompt") == 24
    assert scrape("actuary_tokens_total", model="gelu", kind="padding") == 0
    assert scrape("actuary_tokens_total", model="swiglu", kind="prompt") == 3
    assert scrape("actuary_tokens_total", model="swiglu", kind="padding") == 0


def test_what_the_cache_holds_is_counted(bundles: Path) -> None:
    app = create_app(Settings(bundles=bundles, provider="cpu", threads=1))
    caches = app.state.service.engine._caches
    caches.update({variant: PrefixCache(variant.pool_shape[0], 32, variant.pool_shape[1]) for variant in caches})
    with TestClient(app) as client:
        for prompt in ([1] * 20, [1] * 20 + [2], [3] * 20):
            client.post("/v1/next-token", json={"model": "gelu", "prompt": prompt})
        scrape = Scrape(client)
        assert scrape("actuary_tokens_total", model="gelu", kind="prompt") == 20 + 1 + 20
        assert scrape("actuary_tokens_total", model="gelu", kind="cached") == 20
        assert scrape("actuary_tokens_total", model="gelu", kind="generated") == 0
        assert scrape("actuary_cache_evicted_tokens_total", model="gelu") == 21 + 20 - 32
        assert scrape("actuary_cache_slots", model="gelu", kind="all") == 32
        assert scrape("actuary_cache_slots", model="gelu", kind="used") == 32
        assert scrape("actuary_cache_slots", model="swiglu", kind="used") == 0
        assert scrape("actuary_running_sequences") == 0


class Gated:
    """Stands for a Variant: computes once the gate is open."""

    name, context, row_bytes, cached = "gated", 9, 1, False

    def __init__(self) -> None:
        self.started, self.gate = threading.Event(), threading.Event()

    def faster_wide(self, tokens: int) -> bool:
        return False

    def tokens_of(self, piece: Piece) -> int:
        return len(piece.ids)

    def compute(self, pieces: list[Piece], *_: Any) -> list[Rows]:
        self.started.set()
        assert self.gate.wait(LIMIT_S)
        return [Rows(*[np.zeros((1, 2))] * 6) for _ in pieces]


class Broken(Gated):
    def compute(self, *_: Any) -> list[Rows]:
        raise RuntimeError("out of memory")


def test_what_is_dropped_and_what_is_refused_is_counted() -> None:
    async def scene() -> Samples:
        engine, variant = Engine(max_queue=4, max_batch_tokens=100, timeout_s=1.0), Gated()
        metrics = Metrics(engine.metrics, engine.tell)

        numbers = itertools.count()  # one prompt is not computed twice

        def job(variant: Any = variant) -> Job:
            return Job(variant, [next(numbers)], 1)

        async def gone(task: asyncio.Task[Any]) -> None:
            await asyncio.wait([task], timeout=LIMIT_S)

        async with engine:
            computed = asyncio.create_task(engine.run([job()]))
            while not variant.started.is_set():
                await asyncio.sleep(0.001)
            leaves = asyncio.create_task(engine.run([job(), job(), job()]))
            await asyncio.sleep(0)
            with pytest.raises(ApiError):
                await engine.run([job(), job()])
            assert samples((await metrics.text()).decode())["actuary_queue_prompts", frozenset()] == 3
            leaves.cancel()
            await gone(leaves)
            late = asyncio.create_task(engine.run([job(), job()]))
            await gone(late)
            await gone(computed)
            assert isinstance(late.exception(), ApiError)
            variant.gate.set()
            await engine.run([job()])
        return samples((await metrics.text()).decode())

    found = asyncio.run(scene())

    def dropped(reason: str) -> float:
        return found["actuary_dropped_prompts_total", frozenset({("reason", reason)})]

    assert dropped("client_gone") == 3
    assert dropped("timeout") == 2, "of the first, which was being computed, nothing was in the queue"
    assert dropped("failed") == 0
    assert found["actuary_refused_prompts_total", frozenset()] == 2
    assert found["actuary_queue_prompts", frozenset()] == 0


def test_a_request_whose_others_failed_is_dropped_as_failed() -> None:
    async def scene() -> float:
        engine, variant = Engine(max_queue=9, max_batch_tokens=1, timeout_s=LIMIT_S), Gated()
        async with engine:
            first = asyncio.create_task(engine.run([Job(variant, [1], 1)]))
            while not variant.started.is_set():
                await asyncio.sleep(0.001)
            # The broken one's turn comes first; the others of its request still wait then, some until it has failed.
            others = [Job(variant, [n], 1) for n in range(2, 9)]
            fails = asyncio.create_task(engine.run([Job(Broken(), [1], 1), *others]))
            await asyncio.sleep(0)
            variant.gate.set()
            await asyncio.wait([first, fails], timeout=LIMIT_S)
            assert isinstance(fails.exception(), RuntimeError)
        return engine.metrics._dropped.labels("failed")._value.get()

    assert 1 <= asyncio.run(scene()) <= 7


def test_nothing_waits_in_a_gauge_that_could_be_old(client: TestClient) -> None:
    assert Scrape(client)("actuary_queue_prompts") == 0
    assert ("actuary_queue_prompts", frozenset()) in Scrape(client).all
    for reason in ("client_gone", "timeout", "failed"):
        assert ("actuary_dropped_prompts_total", frozenset({("reason", reason)})) in Scrape(client).all


def test_two_services_of_one_process_count_apart(bundles: Path, client: TestClient) -> None:
    with TestClient(create_app(Settings(bundles=bundles, provider="cpu", threads=1))) as other:
        other.get("/health")
        assert Scrape(other)("actuary_requests_total", route="/health") == 1
    assert Scrape(client)("actuary_requests_total", route="/health") == 0


def test_a_defect_of_ours_is_counted_too(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError

    monkeypatch.setattr("service.library.Library.unknown", broken)
    assert client.get("/v1/models/a").status_code == 500
    assert Scrape(client)("actuary_requests_total", route="/v1/models/{name}", status="500") == 1


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="process metrics are read from /proc")
def test_a_real_process_tells_its_memory_and_the_clients_that_left(bundles: Path) -> None:
    with serving(bundles, "--max-prompts", "1000") as (url, process), httpx.Client(base_url=url) as http:
        resident = Scrape(http)("process_resident_memory_bytes")
        assert resident == pytest.approx(psutil.Process(process.pid).memory_info().rss, rel=0.2)
        assert Scrape(http)("process_cpu_seconds_total") > 0
        models = len(http.get("/v1/models").json()["data"])
        draw = random.Random(0)
        deadline = time.monotonic() + LIMIT_S
        while not Scrape(http)("actuary_requests_total", route="/v1/next-token", status="499"):
            assert time.monotonic() < deadline, "no request was ever left in time"
            # Many, and in no cache: what is answered within 50 ms is not watched for who leaves.
            prompts = [[draw.randrange(300) for _ in range(32)] for _ in range(1000 // models)]
            body = {"model": "*", "prompt": prompts, "top_k": 0}
            with contextlib.suppress(httpx.ReadTimeout):  # where this process waits longer than that, it is answered
                httpx.post(f"{url}/v1/next-token", json=body, timeout=httpx.Timeout(5, read=0.001))


def test_inference_protocol_requests_are_counted_under_their_model(client: TestClient) -> None:
    ids = {"name": "input_ids", "datatype": "INT64", "shape": [1, 2], "data": [1, 2]}
    assert client.post("/v2/models/gelu/infer", json={"inputs": [ids]}).status_code == 200
    assert client.post("/v2/models/gulu/infer", json={"inputs": [ids]}).status_code == 404
    scrape = Scrape(client)
    route = "/v2/models/{name}/infer"
    assert scrape("actuary_requests_total", route=route, model="gelu", status="200") == 1
    assert scrape("actuary_requests_total", route=route, model=NONE, status="404") == 1


def test_the_document_names_it(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    assert "text/plain" in json.dumps(document["paths"]["/metrics"]["get"]["responses"]["200"])
