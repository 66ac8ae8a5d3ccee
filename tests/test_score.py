"""/v1/score: its numbers against next-token's and against torch; what it refuses."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from service.app import create_app
from service.schema import ErrorAnswer, ScoreAnswer
from service.settings import Settings

JSON = {"content-type": "application/json"}
LABELS = [17, 299, 0, 42]
small = settings(max_examples=100, deadline=None)


@pytest.fixture(scope="module")
def client(bundles: Path) -> Iterator[TestClient]:
    """Without a cache, so that the same batch gives the same floats however often."""
    limits = {"max_prompts": 64, "max_entries": 2_000, "max_body_bytes": 20_000, "cache_mb": 0}
    app = create_app(Settings(bundles=bundles, provider="cpu", threads=1, **limits))
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


def ask(client: TestClient, **body: object) -> dict[str, Any]:
    response = client.post("/v1/score", json={"model": "gelu", "label_token_ids": LABELS, **body})
    assert response.status_code == 200, response.text
    ScoreAnswer.model_validate(response.json(), strict=True)
    return response.json()


def refusal(response: Any) -> dict[str, Any]:
    ErrorAnswer.model_validate(response.json(), strict=True)
    return response.json()["error"]


def chosen(client: TestClient, prompt: object, model: str = "gelu") -> list[dict[str, float]]:
    """LABELS as next-token reports them, each prompt alone."""
    response = client.post("/v1/next-token", json={"model": model, "prompt": prompt, "tokens": LABELS, "top_k": 0})
    return response.json()["results"][0]["chosen"]


def moves(client: TestClient, prompt: str | list[int]) -> float:
    """How far a probability may move between two runs, relative to itself.

    Each run's logits are within the parity bound of float64, relative to the largest: two are within d = twice that,
    and p moves by at most p (exp(2 d) - 1). 1e-7: float32's last digit.
    """
    body = {"model": "gelu", "prompt": prompt, "top_k": 300}
    top = client.post("/v1/next-token", json=body).json()["results"][0]["top"]
    bound = client.get("/v1/models/gelu").json()["parity"]["bound"]
    return math.expm1(4 * bound * max(abs(entry["logit"]) for entry in top)) + 1e-7


def test_the_answer_has_the_promised_shape(client: TestClient) -> None:
    response = client.post(
        "/v1/score", json={"model": "gelu", "query": "if x", "items": [" is", " not"], "label_token_ids": LABELS}
    )
    answer = response.json()
    ScoreAnswer.model_validate(answer, strict=True)
    assert answer["object"] == "scoring"
    assert answer["model"] == "gelu"
    assert [len(scores) for scores in answer["scores"]] == [4, 4]
    assert answer["usage"]["prompt_tokens"] == answer["usage"]["total_tokens"] > 2
    for name in ("x-tokenize-ms", "x-queue-ms", "x-infer-ms"):
        assert 0 <= float(response.headers[name]) < float(response.headers["x-total-ms"])


@pytest.mark.parametrize("model", ["gelu", "swiglu", "gelu-sigmoid-head"])
def test_scores_are_the_probabilities_over_the_vocabulary(client: TestClient, model: str) -> None:
    """One item at a time, so that both routes compute the same batch: the very same floats."""
    for item in (" is not", "", " None and x"):
        (scores,) = ask(client, model=model, query="if x", items=[item])["scores"]
        assert scores == [entry["softmax"] for entry in chosen(client, "if x" + item, model)]


def test_with_softmax_they_are_the_probabilities_among_the_labels(client: TestClient) -> None:
    (scores,) = ask(client, query="if x", items=[" is not"], apply_softmax=True)["scores"]
    logits = np.array([entry["logit"] for entry in chosen(client, "if x is not")], np.float64)
    assert sum(scores) == pytest.approx(1, abs=1e-12)
    assert scores == pytest.approx(np.exp(logits) / np.exp(logits).sum(), rel=1e-12)
    (plain,) = ask(client, query="if x", items=[" is not"])["scores"]
    assert scores == pytest.approx([p / sum(plain) for p in plain], rel=1e-6), "float32's last digits"
    assert ask(client, query="a", items=[""], label_token_ids=[7], apply_softmax=True)["scores"] == [[1.0]]


def test_the_numbers_agree_with_torch(client: TestClient, tiny_checkpoint: Callable) -> None:
    checkpoint = tiny_checkpoint("gelu")
    ids = [5, 6, 7, 250]
    with torch.no_grad():
        logits = checkpoint.model.double()(torch.tensor([ids])).logits[0, -1].numpy()
    softmax = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    rel = moves(client, ids)
    (scores,) = ask(client, query=ids[:2], items=[ids[2:]])["scores"]
    assert scores == pytest.approx(softmax[LABELS], rel=rel)
    (scores,) = ask(client, query=ids[:2], items=[ids[2:]], apply_softmax=True)["scores"]
    assert scores == pytest.approx(softmax[LABELS] / softmax[LABELS].sum(), rel=2 * rel)


def test_labels_so_unlikely_that_they_round_to_0_still_have_shares(client: TestClient) -> None:
    variant = client.app.state.service.library.variants["gelu"]
    session = variant.session

    class Far:
        def run(self, *given: Any) -> Any:
            logits, softmax, *rest = session.run(*given)
            logits = np.full_like(logits, -1000)
            logits[:, 17] = -1001
            return [logits, np.zeros_like(softmax), *rest]

    object.__setattr__(variant, "session", Far())
    try:
        assert ask(client, query="a", items=[""], label_token_ids=[17, 42])["scores"] == [[0, 0]]
        (scores,) = ask(client, query="a", items=[""], label_token_ids=[17, 42], apply_softmax=True)["scores"]
        assert scores == pytest.approx([1 / (1 + math.e), math.e / (1 + math.e)])
    finally:
        object.__setattr__(variant, "session", session)


def test_items_keep_their_order_and_equal_their_singles(client: TestClient) -> None:
    items = [" is not", "", " None" * 3, " is", " is not"]
    together = ask(client, query="if x", items=items)["scores"]
    for item, scores in zip(items, together, strict=True):
        (alone,) = ask(client, query="if x", items=[item])["scores"]
        assert scores == pytest.approx(alone, rel=moves(client, "if x" + item))
    assert together[0] != pytest.approx(together[3], rel=moves(client, "if x is not")), "the tolerance can fail"


def test_labels_keep_their_order_and_may_repeat(client: TestClient) -> None:
    (forth,) = ask(client, query="a", items=["b"], label_token_ids=[1, 2, 3])["scores"]
    (back,) = ask(client, query="a", items=["b"], label_token_ids=[3, 2, 1, 3])["scores"]
    assert back == [*forth[::-1], forth[2]]
    (shares,) = ask(client, query="a", items=["b"], label_token_ids=[3, 3], apply_softmax=True)["scores"]
    assert shares == [0.5, 0.5]


def test_text_ids_and_single_items_are_the_same(client: TestClient, bundles: Path) -> None:
    encode = Tokenizer.from_file(str(bundles / "gelu" / "tokenizer.json")).encode
    by_text = ask(client, query="if x", items=["\n"])
    assert encode("if x\n").ids == [*encode("if x").ids, *encode("\n").ids], "no token spans the border"
    assert by_text == ask(client, query="if x", items="\n")
    assert by_text == ask(client, query=encode("if x").ids, items=[encode("\n").ids])
    assert by_text == ask(client, query="\n", items="if x", item_first=True)
    assert by_text == ask(client, query="", items=["if x\n"])
    assert by_text == ask(client, query=[], items=[encode("if x\n").ids])
    assert by_text != ask(client, query="\n", items="if x")


def test_no_items_have_no_scores(client: TestClient) -> None:
    assert ask(client, query="a", items=[])["scores"] == []
    assert ask(client, query="a", items=[])["usage"]["total_tokens"] == 0


@pytest.mark.parametrize(
    ("status", "says", "fields"),
    [
        (422, "Field required", {"query": None}),
        (422, "Field required", {"items": None}),
        (422, "Field required", {"label_token_ids": None}),
        (422, "Field required", {"model": None}),
        (404, "did you mean 'swiglu'?", {"model": "swigul"}),
        (404, "unknown variant '*'", {"model": "*"}),
        (422, "string", {"model": ["gelu"]}),
        (422, "query + items[0] is no token at all", {"query": "", "items": [""]}),
        (422, "query + items[1] is no token at all", {"query": [], "items": [[1], []]}),
        (422, "both be text", {"query": "a", "items": [[1]]}),
        (422, "both be text", {"query": [1], "items": ["a"]}),
        (422, "both be text", {"query": [1], "items": "a"}),
        (422, "must be", {"items": ["a", [1]]}),
        (422, "must be", {"query": [1], "items": [1, 2]}),
        (422, "must be", {"query": [1], "items": [[True]]}),
        (422, "must be", {"query": [1.0], "items": [[1]]}),
        (422, "must be", {"query": 3}),
        (422, "U+0000", {"query": "\0"}),
        (422, "U+0000", {"items": ["\0"]}),
        (422, "query + items[0] has 33 tokens, over the context", {"query": [1] * 32, "items": [[1]]}),
        (422, "over the context", {"query": "if " * 100, "items": ["a"]}),
        (422, "holds the id 300", {"query": [1], "items": [[300]]}),
        (422, "holds the id -1", {"query": [-1], "items": [[1]]}),
        (422, "at least 1", {"label_token_ids": []}),
        (422, "label_token_ids holds the id 300; variant 'gelu' has 0 to 299", {"label_token_ids": [1, 300]}),
        (422, "holds the id -1", {"label_token_ids": [-1]}),
        (422, "integer", {"label_token_ids": ["a"]}),
        (422, "integer", {"label_token_ids": [True]}),
        (422, "boolean", {"apply_softmax": "yes"}),
        (422, "send several requests", {"items": ["a"] * 65}),
        (422, "send several requests", {"items": ["a"] * 10, "label_token_ids": list(range(201))}),
        (422, "20096 characters; one request may have 20000", {"query": "a" * 313, "items": ["b"] * 64}),
        (422, "did you mean 'label_token_ids'", {"label_tokens_ids": [1]}),
    ],
)
def test_what_is_wrong_is_refused(client: TestClient, status: int, says: str, fields: dict[str, object]) -> None:
    body = {"model": "gelu", "query": "a", "items": ["b"], "label_token_ids": [1], **fields}
    response = client.post("/v1/score", json=body)
    assert response.status_code == status, response.text
    assert says in refusal(response)["message"]


def test_a_large_request_is_answered_whole(client: TestClient) -> None:
    """Its texts go to a thread, and so do its scores."""
    items = [f"{' is not' * 3} {i}" for i in range(64)]
    labels = list(range(30))
    scores = ask(client, query="if x is not ", items=items, label_token_ids=labels)["scores"]
    assert len(scores) == 64
    (alone,) = ask(client, query="if x is not ", items=[items[40]], label_token_ids=labels)["scores"]
    assert scores[40] == pytest.approx(alone, rel=moves(client, "if x is not " + items[40]))


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.text(st.characters(categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
ids = st.lists(st.integers(-1, 310), max_size=20)


@small
@given(
    body=st.fixed_dictionaries(
        {
            "model": st.just("gelu") | anything,
            "query": st.text(max_size=10) | ids | anything,
            "items": st.lists(st.text(max_size=10), max_size=4) | st.lists(ids, max_size=4) | anything,
            "label_token_ids": ids | anything,
        },
        optional={"apply_softmax": st.booleans() | anything, "item_first": st.booleans() | anything},
    )
    | anything
)
def test_no_json_is_answered_with_500(client: TestClient, body: object) -> None:
    response = client.post("/v1/score", content=json.dumps(body).encode(), headers=JSON)
    if response.status_code == 200:
        ScoreAnswer.model_validate(response.json(), strict=True)
    else:
        assert response.status_code in (400, 404, 422)
        refusal(response)


def test_the_document_describes_it(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    assert {"404", "408", "413", "422", "429", "503"} <= set(document["paths"]["/v1/score"]["post"]["responses"])
    ask(client, **document["components"]["schemas"]["ScoreRequest"]["examples"][0])


def test_the_curl_line_of_the_readme_answers(client: TestClient) -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    (body,) = re.findall(r"/v1/score -H .*\\\n +-d '(\{.*\})'", readme)
    answer = ask(client, **json.loads(body))
    assert [sum(scores) for scores in answer["scores"]] == pytest.approx([1, 1])
