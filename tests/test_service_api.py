"""The API in this process: promised shapes, and numbers against their definitions.

One thread, so that nothing here depends on how products are split among threads.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest
from conftest import counted_batches
from fastapi.testclient import TestClient
from tokenizers import Tokenizer

from service.app import create_app
from service.schema import NextTokenAnswer
from service.settings import Settings

PROMPTS = ["if x is not", "return", "for i in range(10):", "a", "import json\n\n\ndef"]


@pytest.fixture(scope="module")
def client(bundles: Path) -> Iterator[TestClient]:
    app = create_app(Settings(bundles=bundles, provider="cpu", threads=1))
    with TestClient(app) as client:
        yield client


@pytest.fixture(scope="module")
def facts(client: TestClient) -> dict[str, dict]:
    return {model["id"]: model for model in client.get("/v1/models").json()["data"]}


def ask(client: TestClient, **body: object) -> dict:
    response = client.post("/v1/next-token", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def differs(one: dict, other: dict, bound: float) -> str:
    """Where two results over the whole vocabulary differ by more than rounding, else nothing.

    Each run is within `bound` of float64, relative to the largest |logit| (the manifest's parity
    bound), so two runs are within twice that: d. The sigmoid's slope is at most 1/4, and a softmax
    probability p moves by at most p (exp(2 d) - 1). 1e-7 and 1e-9: their own last float32 digits.
    """
    d = 2 * bound * max(abs(entry["logit"]) for entry in one["top"])
    other_by_id = {entry["id"]: entry for entry in other["top"]}
    for entry in one["top"]:
        twin = other_by_id[entry["id"]]
        softmax_moves = entry["softmax"] * math.expm1(2 * d) + 1e-9
        allowed = {"logit": d, "sigmoid": d / 4 + 1e-7, "softmax": softmax_moves}
        for number, most in allowed.items():
            if not abs(entry[number] - twin[number]) <= most:
                return f"id {entry['id']}: {number} {entry[number]} and {twin[number]}, allowed {most}"
    return ""


def test_the_answer_has_the_promised_shape(client: TestClient) -> None:
    response = client.post(
        "/v1/next-token",
        json={"model": ["gelu", "swiglu"], "prompt": ["if x", "return"], "top_k": 3, "tokens": [7, "a"]},
        headers={"x-request-id": "mine-1"},
    )
    body = response.json()
    NextTokenAnswer.model_validate(body, strict=True)
    assert [(r["prompt_index"], r["model"]) for r in body["results"]] == [
        (0, "gelu"),
        (0, "swiglu"),
        (1, "gelu"),
        (1, "swiglu"),
    ]
    assert body["id"].startswith("nt-")
    assert body["usage"]["prompt_tokens"] == sum(r["prompt_tokens"] for r in body["results"])
    assert response.headers["x-request-id"] == "mine-1"
    total_ms = float(response.headers["x-total-ms"])
    for part in ("x-tokenize-ms", "x-queue-ms", "x-infer-ms"):
        assert 0 <= float(response.headers[part]) < total_ms
    for result in body["results"]:
        assert [entry["rank"] for entry in result["top"]] == [1, 2, 3]
        assert result["chosen"][0]["id"] == 7
        assert result["chosen"][1]["text"] == "a"
        assert result["provider"] == "CPUExecutionProvider"
        timing = result["timing_ms"]
        assert timing["tokenize"] + timing["queue"] + timing["infer"] <= timing["total"] < total_ms


def test_the_times_in_the_headers_add_up(bundles: Path) -> None:
    """Of two variants, one slow: the other's queue is the slow one's inference, and the request's has it once."""

    @dataclasses.dataclass
    class Slow:
        session: Any

        def run(self, *given: Any) -> Any:
            time.sleep(0.1)
            return self.session.run(*given)

    app = create_app(Settings(bundles=bundles, provider="cpu", threads=1))
    variant = app.state.service.library.variants["gelu"]
    object.__setattr__(variant, "session", Slow(variant.session))
    with TestClient(app) as client:
        headers = client.post("/v1/next-token", json={"model": ["gelu", "swiglu"], "prompt": "a"}).headers
    parts = {name: float(headers[f"x-{name}-ms"]) for name in ("tokenize", "queue", "infer")}
    assert parts["queue"] > 100
    assert sum(parts.values()) <= float(headers["x-total-ms"])


def test_a_large_answer_is_whole(client: TestClient, facts: dict[str, dict]) -> None:
    """The whole vocabulary for every variant, and 256 tokens besides."""
    vocab_size = facts["gelu"]["vocab_size"]
    answer = ask(client, model="*", prompt=["a", "if x"], top_k=vocab_size, tokens=list(range(256)))
    NextTokenAnswer.model_validate(answer, strict=True)
    assert len(answer["results"]) == 2 * len(facts)
    for result in answer["results"]:
        assert len(result["top"]) == vocab_size
        assert len(result["chosen"]) == 256


def test_an_unsafe_request_id_is_replaced(client: TestClient) -> None:
    for unsafe in ("a b", "x" * 129, "é", ""):
        given = client.get("/health", headers={"x-request-id": unsafe.encode()}).headers["x-request-id"]
        assert given != unsafe
        assert len(given) == 32


def test_the_numbers_agree_with_their_definitions(client: TestClient, facts: dict[str, dict]) -> None:
    """Over the whole vocabulary, in float64; 1e-5 is 84 units of float32, for sums of V = 300 terms."""
    vocab_size = facts["gelu"]["vocab_size"]
    every_id = list(range(256))
    for name in facts:
        body = ask(client, model=name, prompt="if x is not", top_k=vocab_size, tokens=every_id)
        (result,) = body["results"]
        assert sorted(entry["id"] for entry in result["top"]) == list(range(vocab_size))
        logits = np.zeros(vocab_size)
        for entry in result["top"]:
            logits[entry["id"]] = entry["logit"]
        softmax = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        sigmoid = 1 / (1 + np.exp(-logits))
        order = sorted(range(vocab_size), key=lambda i: (-logits[i], i))
        assert [entry["id"] for entry in result["top"]] == order
        for entry in itertools.chain(result["top"], result["chosen"]):
            assert entry["rank"] == order.index(entry["id"]) + 1
            assert entry["softmax"] == pytest.approx(softmax[entry["id"]], rel=1e-5)
            assert entry["sigmoid"] == pytest.approx(sigmoid[entry["id"]], rel=1e-5)
        for kind, probabilities in (("softmax", softmax), ("sigmoid", sigmoid)):
            shares = probabilities / probabilities.sum()
            assert result[kind]["mass"] == pytest.approx(probabilities.sum(), rel=1e-5)
            bits = -(shares * np.log2(shares)).sum()
            assert result[kind]["entropy_bits"] == pytest.approx(bits, rel=1e-5)


def test_top_k_zero_lists_nothing(client: TestClient) -> None:
    body = ask(client, model="gelu", prompt="a", top_k=0, tokens=["a"])
    assert body["results"][0]["top"] == []
    assert len(body["results"][0]["chosen"]) == 1


def test_a_null_is_as_if_not_given(client: TestClient) -> None:
    body = ask(client, model="gelu", prompt="a", top_k=None, tokens=None)
    assert len(body["results"][0]["top"]) == 10


def test_text_and_its_ids_are_the_same_prompt(client: TestClient, bundles: Path) -> None:
    ids = Tokenizer.from_file(str(bundles / "gelu" / "tokenizer.json")).encode("if x is not").ids
    (by_text,) = ask(client, model="gelu", prompt="if x is not")["results"]
    (by_ids,) = ask(client, model="gelu", prompt=ids)["results"]
    assert by_text["top"] == by_ids["top"]


def test_a_fragment_of_a_character_shows_its_bytes(client: TestClient, facts: dict[str, dict]) -> None:
    body = ask(client, model="gelu", prompt="a", top_k=facts["gelu"]["vocab_size"])
    fragments = [entry for entry in body["results"][0]["top"] if "bytes" in entry]
    whole = [entry for entry in body["results"][0]["top"] if "bytes" not in entry]
    continuations_and_leads = {*range(0x80, 0xC0), *range(0xC2, 0xF5)}
    assert {entry["bytes"][0] for entry in fragments} >= continuations_and_leads
    for entry in fragments:
        with pytest.raises(UnicodeDecodeError):
            bytes(entry["bytes"]).decode()
        assert "\ufffd" in entry["text"]
    assert not any("\ufffd" in entry["text"] for entry in whole)


def test_a_batch_equals_its_singles(client: TestClient, facts: dict[str, dict]) -> None:
    """Prompts of different lengths, padded into one batch, give what each gives alone."""
    vocab_size = facts["gelu"]["vocab_size"]
    prompts = [*PROMPTS, "x" * 20, "yield"]
    batch = ask(client, model="*", prompt=prompts, top_k=vocab_size)["results"]
    assert len({result["prompt_tokens"] for result in batch}) > 3
    for result in batch:
        single = ask(client, model=result["model"], prompt=prompts[result["prompt_index"]], top_k=vocab_size)
        bound = facts[result["model"]]["parity"]["bound"]
        assert not differs(result, single["results"][0], bound)


def test_the_tolerance_can_fail(client: TestClient, facts: dict[str, dict]) -> None:
    vocab_size = facts["gelu"]["vocab_size"]
    one, other = ask(client, model="gelu", prompt=["if x is not", "if x is not "], top_k=vocab_size)["results"]
    assert differs(one, other, facts["gelu"]["parity"]["bound"])


def test_concurrent_requests_equal_singles(bundles: Path) -> None:
    """Requests that meet in a batch, with their own top_k and tokens, get their own answers."""
    bound = 0.0

    async def together() -> tuple[list[dict], list[dict]]:
        app = create_app(Settings(bundles=bundles, provider="cpu", threads=1))
        batches = counted_batches(app.state.service.engine)
        http = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x")
        async with app.router.lifespan_context(app), http:
            nonlocal bound
            bound = max(v.manifest.parity.bound for v in app.state.service.library.variants.values())

            async def one(prompt: str, model: str, top_k: int) -> dict:
                body = {"model": model, "prompt": prompt, "top_k": top_k, "tokens": [top_k]}
                response = await http.post("/v1/next-token", json=body)
                assert response.status_code == 200, response.text
                return response.json()["results"][0]

            pairs = itertools.product(PROMPTS * 4, ["gelu", "swiglu"])
            cases = [(prompt, model, top_k) for top_k, (prompt, model) in enumerate(pairs)]
            at_once = await asyncio.gather(*(one(*case) for case in cases))
            assert max(batches) > 1, "no two requests met in a batch"
            batches.clear()
            alone = [await one(*case) for case in cases]
            assert set(batches) == {1}
            return at_once, alone

    at_once, alone = asyncio.run(together())
    for top_k, (one, other) in enumerate(zip(at_once, alone, strict=True)):
        assert len(one["top"]) == len(other["top"]) == top_k
        assert [entry["id"] for entry in one["chosen"]] == [entry["id"] for entry in other["chosen"]] == [top_k]
        # All that were asked for, by id: near ties may change places in `top`.
        assert not differs({"top": one["chosen"] + one["top"]}, {"top": other["chosen"] + other["top"]}, bound)


def test_models_and_activations(client: TestClient, facts: dict[str, dict]) -> None:
    assert set(facts) == {"gelu", "swiglu", "gelu-sigmoid-head"}
    for name, model in facts.items():
        assert model["object"] == "model"
        assert model["root"] == name
        assert {"activation", "head", "precision", "provider", "context", "vocab_size", "parameters"} <= set(model)
        assert client.get(f"/v1/models/{name}").json() == model
    body = client.get("/v1/activations").json()
    listed = {record["name"]: record for record in body["data"]}
    assert listed["gelu"]["served_by"] == ["gelu", "gelu-sigmoid-head"]
    assert listed["swiglu"]["kind"] == "gated"
    for record in listed.values():
        curve = record["curve"]
        assert len(curve["x"]) == len(curve["y"]) == len(curve["slope"]) > 10
        assert {"formula", "kind", "paper", "learned", "units"} <= set(record)


@pytest.mark.parametrize("path", ["/health", "/health/live", "/health/ready"])
def test_health_may_be_asked_without_a_body(client: TestClient, path: str) -> None:
    assert client.head(path).status_code == 200
    assert set(client.get("/openapi.json").json()["paths"][path]) == {"get"}


def test_health(client: TestClient) -> None:
    assert client.get("/health/live").json() == {"live": True}
    assert client.get("/health").json()["ready"] is True
    ready = client.get("/health/ready")
    assert ready.status_code == 200
    assert set(ready.json()["variants"]) == {"gelu", "swiglu", "gelu-sigmoid-head"}


def test_not_ready_before_it_serves_and_while_it_drains(bundles: Path) -> None:
    app = create_app(Settings(bundles=bundles, provider="cpu", threads=1))
    client = TestClient(app)
    assert client.get("/health/ready").status_code == 503
    assert client.post("/v1/next-token", json={"model": "gelu", "prompt": "a"}).status_code == 503
    with client:
        assert client.get("/health/ready").status_code == 200
        app.state.service.draining = True
        assert client.get("/health/ready").status_code == 503
        assert client.get("/health/live").status_code == 200


def test_the_documents_need_nothing_from_outside(client: TestClient) -> None:
    page = client.get("/docs").text
    assert "http://" not in page
    assert "https://" not in page
    assert client.get("/redoc").status_code == 404, "its script asks a CDN for a picture"
    assert client.get("/static-offline-docs/swagger-ui-bundle.js").status_code == 200
    document = client.get("/openapi.json").json()
    operation = document["paths"]["/v1/next-token"]["post"]
    assert {"400", "404", "408", "413", "422", "429", "503"} <= set(operation["responses"])
    for status in ("404", "422", "429"):
        schema = operation["responses"][status]["content"]["application/json"]["schema"]
        assert schema["$ref"].endswith("ErrorAnswer")
    example = document["components"]["schemas"]["NextTokenRequest"]["examples"][0]
    assert client.post("/v1/next-token", json={**example, "tokens": []}).status_code == 200


def test_plotly_is_served_compressed_and_cached(client: TestClient) -> None:
    first = client.get("/assets/plotly.min.js", headers={"accept-encoding": "gzip"})
    assert first.headers["content-encoding"] == "gzip"
    assert "plotly.js v" in first.text[:400]
    plain = client.get("/assets/plotly.min.js", headers={"accept-encoding": "identity"})
    assert "content-encoding" not in plain.headers
    assert plain.text == first.text
    for accepted, packed in (
        ("gzip;q=0, *", False),
        ("br, GZIP;q=0.5", True),
        ("gzip; q=0.0", False),
        ("gzip;q=1", True),
    ):
        answer = client.get("/assets/plotly.min.js", headers={"accept-encoding": accepted})
        assert ("content-encoding" in answer.headers) == packed, accepted
    again = client.get("/assets/plotly.min.js", headers={"if-none-match": first.headers["etag"]})
    assert again.status_code == 304
    assert not again.content
