"""What the API must refuse, with which status and words; and whatever hypothesis thinks of."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st

from service.app import create_app
from service.errors import shown
from service.schema import ErrorAnswer, NextTokenAnswer
from service.settings import Settings
from service.vocabulary import Vocabulary

MAX_BODY_BYTES = 20_000
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def client(bundles: Path) -> Iterator[TestClient]:
    limits = {"max_prompts": 64, "max_body_bytes": MAX_BODY_BYTES}
    app = create_app(Settings(bundles=bundles, provider="cpu", threads=1, **limits))
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


NEXT = "/v1/next-token"
OVER_CONTEXT = list(range(33))  # the tiny bundles' context is 32
BAD_BODIES = [
    (400, "", "not JSON: nothing but a space", b" "),
    (400, "not JSON", "not JSON", b"{model: gelu}"),
    (400, "", "not UTF-8", b'{"model": "gelu", "prompt": "\xff"}'),
    (422, "U+D800", "a surrogate in UTF-8", b'{"model": "gelu", "prompt": "\xed\xa0\x80"}'),
    (400, "", "deep nesting", b'{"prompt":' + b"[" * 9000 + b"]" * 9000 + b"}"),
    (400, "", "a number of 5000 digits", b'{"model": "gelu", "prompt": "a", "top_k": ' + b"9" * 5000 + b"}"),
    (422, "JSON object", "an array", b"[1, 2]"),
    (422, "JSON object", "a string", b'"gelu"'),
    (422, "JSON object", "null", b"null"),
    (422, "empty", "no body", b""),
    (422, "integer", "NaN", b'{"model": "gelu", "prompt": "a", "top_k": NaN}'),
    (422, "integer", "Infinity", b'{"model": "gelu", "prompt": "a", "top_k": Infinity}'),
    (422, "whole", "NaN as an id", b'{"model": "gelu", "prompt": [NaN]}'),
    (422, "U+D800", "a lone surrogate", b'{"model": "gelu", "prompt": "a\\ud800"}'),
    (422, "U+DFFF", "a lone surrogate in a list", b'{"model": "gelu", "prompt": ["a", "\\udfff"]}'),
    (404, "ud800", "a lone surrogate as a name", b'{"model": "\\ud800", "prompt": "a"}'),
    (422, "ud800", "a lone surrogate as a field", b'{"model": "gelu", "prompt": "a", "\\ud800": 1}'),
]
BAD_FIELDS = [
    (422, "empty", {"prompt": ""}),
    (422, "not empty", {"prompt": []}),
    (422, "empty", {"prompt": ["a", ""]}),
    (422, "empty", {"prompt": [[]]}),
    (422, "empty", {"prompt": [[1], []]}),
    (422, "prompt", {"prompt": [[], "a"]}),
    (422, "prompt", {"prompt": ["a", 1]}),
    (422, "prompt", {"prompt": [[1], 2]}),
    (422, "prompt", {"prompt": {"text": "a"}}),
    (422, "prompt", {"prompt": 5}),
    (422, "Field required", {"prompt": None}),
    (422, "U+0000", {"prompt": "a\0"}),
    (422, "U+0000", {"prompt": "a", "tokens": ["\0"]}),
    (422, "33 tokens, over the context of 'gelu', 32", {"prompt": OVER_CONTEXT}),
    (422, "prompt[1] has 33", {"prompt": [[1], OVER_CONTEXT]}),
    (422, "context", {"prompt": "if " * 4000}),
    (422, "has 0 to 299", {"prompt": [-1]}),
    (422, "has 0 to 299", {"prompt": [300]}),
    (422, "has 0 to 299", {"prompt": [10**30]}),
    (422, "whole", {"prompt": [True]}),
    (422, "whole", {"prompt": [1.0]}),
    (422, "whole", {"prompt": [[1], [2.5]]}),
    (422, "greater than or equal to 0", {"top_k": -1}),
    (422, "0 to 300", {"top_k": 301}),
    (422, "0 to 300", {"top_k": 10**30}),
    (422, "integer", {"top_k": 1.5}),
    (422, "integer", {"top_k": True}),
    (422, "integer", {"top_k": "5"}),
    (422, "tokens[0], 'if x is not', is", {"tokens": ["if x is not"]}),
    (422, "tokens[1] holds the id 300", {"tokens": [0, 300]}),
    (422, "tokens", {"tokens": [True]}),
    (422, "tokens", {"tokens": [1.5]}),
    (422, "tokens", {"tokens": "a"}),
    (422, "empty", {"tokens": [""]}),
    (422, "at most 256", {"tokens": [1] * 257}),
    (404, "known: gelu, gelu-sigmoid-head, swiglu; did you mean 'swiglu'?", {"model": "swigul"}),
    (404, "unknown variant '*'", {"model": ["*", "gelu"]}),
    (404, "unknown variant", {"model": ["gelu", "nothing"]}),
    (422, "twice", {"model": ["gelu", "gelu"]}),
    (422, "model", {"model": []}),
    (422, "model", {"model": 3}),
    (422, "model", {"model": [["gelu"]]}),
    (422, "did you mean 'top_k'?", {"topk": 3}),
    (422, "send several requests", {"prompt": ["a"] * 65}),
    (422, "send several requests", {"model": "*", "prompt": ["a"] * 22}),
]


def refusal(response: Any) -> dict:
    """The error of a refusal, in the promised shape."""
    ErrorAnswer.model_validate(response.json(), strict=True)
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == response.status_code
    assert response.headers["x-request-id"]
    response.content.decode().encode()
    return error


@pytest.mark.parametrize(("status", "says", "what", "body"), BAD_BODIES, ids=[case[2] for case in BAD_BODIES])
def test_a_bad_body_is_refused(client: TestClient, status: int, says: str, what: str, body: bytes) -> None:
    response = client.post(NEXT, content=body, headers=JSON)
    assert response.status_code == status, response.text
    assert says in refusal(response)["message"], what


@pytest.mark.parametrize(("status", "says", "fields"), BAD_FIELDS, ids=lambda value: str(value)[:40])
def test_a_bad_field_is_refused(client: TestClient, status: int, says: str, fields: dict) -> None:
    response = client.post(NEXT, json={"model": "gelu", "prompt": "a", **fields})
    assert response.status_code == status, response.text
    assert says in refusal(response)["message"]


def test_the_wrong_content_type_is_refused(client: TestClient) -> None:
    for content_type in ("text/plain", "application/x-www-form-urlencoded", ""):
        body = b'{"model": "gelu", "prompt": "a"}'
        response = client.post(NEXT, content=body, headers={"content-type": content_type})
        assert response.status_code == 422
        assert "application/json" in refusal(response)["message"]


@pytest.mark.parametrize("path", [NEXT, "/v1/completions", "/v1/score", "/v1/tokenize", "/tokenize", "/v1/comparisons"])
def test_a_compressed_body_is_refused_and_not_read_as_it_is(client: TestClient, path: str) -> None:
    for encoding, body in (("gzip", gzip.compress(b"{}")), ("br", b'{"model": "gelu", "prompt": "a"}')):
        response = client.post(path, content=body, headers={**JSON, "content-encoding": encoding})
        assert response.status_code == 422
        assert f"content-encoding '{encoding}' is not read here" in refusal(response)["message"]
    body = b'{"model": "gelu", "prompt": "a"}'
    assert client.post(NEXT, content=body, headers={**JSON, "content-encoding": "Identity"}).status_code == 200


def test_allow_names_the_methods_of_all_routes_of_a_path(client: TestClient) -> None:
    for path, methods in (
        (NEXT, "POST"),
        ("/v1/experiments/act", "DELETE, GET, POST, PUT"),
        ("/v1/comparisons", "GET, POST"),
        ("/v1/comparisons/x", "DELETE, GET"),
        ("/health", "GET, HEAD"),
        ("/page/main.js", "GET, HEAD"),
        ("/v2/models/gelu/versions/1/infer", "POST"),
    ):
        response = client.request("PATCH", path)
        assert (response.status_code, response.headers["allow"]) == (405, methods)


def test_routes_and_methods_that_are_not_there(client: TestClient) -> None:
    missing = client.get("/v1/nothing")
    assert missing.status_code == 404
    assert "/v1/nothing" in refusal(missing)["message"]
    wrong = client.get(NEXT)
    assert wrong.status_code == 405
    assert wrong.headers["allow"] == "POST"
    assert refusal(wrong)["type"] == "method_not_allowed"
    unknown = client.get("/v1/models/gelo")
    assert unknown.status_code == 404
    assert "gelu" in refusal(unknown)["message"]


@pytest.mark.parametrize("announced", [True, False], ids=["content-length", "chunked"])
def test_a_body_over_the_limit_is_refused(client: TestClient, announced: bool) -> None:
    def pieces(size: int) -> Iterator[bytes]:
        text = json.dumps({"model": "gelu", "prompt": "a"}).encode()
        yield text + b" " * (size - len(text))

    for size, status in ((MAX_BODY_BYTES, 200), (MAX_BODY_BYTES + 1, 413)):
        body = b"".join(pieces(size)) if announced else pieces(size)
        response = client.post(NEXT, content=body, headers=JSON)
        assert response.status_code == status
    assert str(MAX_BODY_BYTES) in refusal(response)["message"]


def test_an_answer_that_would_be_too_long_is_refused(bundles: Path) -> None:
    with TestClient(create_app(Settings(bundles=bundles, provider="cpu", threads=1, max_entries=200))) as client:
        response = client.post(NEXT, json={"model": "*", "prompt": "a", "top_k": 100})
        assert response.status_code == 422
        assert "200" in refusal(response)["message"]
        whole = client.post(NEXT, json={"model": "gelu", "prompt": "a", "top_k": 300})
        assert len(whole.json()["results"][0]["top"]) == 300, "one result may list its whole vocabulary"


def test_what_cannot_fit_is_refused_before_it_is_tokenized(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """One token stands for so many bytes at most, so a text is too long by its size alone."""
    vocabulary = client.app.state.service.library.variants["gelu"].vocabulary
    tokenized = []
    monkeypatch.setattr(vocabulary, "encode", lambda text, **_: tokenized.append(text))
    for param, fields in (
        ("prompt", {"prompt": "if " * 4000}),
        ("tokens[0]", {"prompt": "a", "tokens": ["if " * 4000]}),
    ):
        response = client.post(NEXT, json={"model": "gelu", **fields})
        assert response.status_code == 422
        assert refusal(response)["param"] == param
        assert "at least" in refusal(response)["message"]
    assert not tokenized


def test_the_fewest_tokens_are_never_more_than_there_are(client: TestClient, bundles: Path, tmp_path: Path) -> None:
    vocabulary = client.app.state.service.library.variants["gelu"].vocabulary
    longest = max(vocabulary._tokenizer.get_vocab(), key=len)
    for text in ("a", "é" * 50, longest * 9, "if x is not\n" * 20, " " * 500, "\U0001f600" * 30):
        assert 1 <= vocabulary.fewest_tokens(text) <= len(vocabulary.encode(text, special_tokens=False))
    assert vocabulary.fewest_tokens("a" * (len(longest) + 1)) == 2
    swallows = json.loads((bundles / "gelu" / "tokenizer.json").read_text())
    swallows["normalizer"] = {"type": "Strip", "strip_left": True, "strip_right": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps(swallows))
    assert Vocabulary(tmp_path / "tokenizer.json").fewest_tokens(" " * 10_000 + "a") == 1


def test_a_logged_path_keeps_to_its_line(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError

    monkeypatch.setattr("service.library.Library.unknown", broken)
    assert client.get("/v1/models/a%0aERROR forged").status_code == 500
    assert len(caplog.messages) == 1
    assert "\n" not in caplog.messages[0]


def test_a_defect_of_ours_is_a_500_in_the_same_shape(bundles: Path) -> None:
    app = create_app(Settings(bundles=bundles, provider="cpu", threads=1))
    library = app.state.service.library

    class Broken:
        def run(self, *_: object) -> None:
            raise RuntimeError("secret detail")

    object.__setattr__(library.variants["gelu"], "session", Broken())
    with TestClient(app, raise_server_exceptions=False) as client:
        response = client.post(NEXT, json={"model": "*", "prompt": "a"})
        assert response.status_code == 500
        assert "secret" not in refusal(response)["message"]
        assert client.post(NEXT, json={"model": "swiglu", "prompt": "a"}).status_code == 200


SURROGATES = st.text(st.characters(categories=["Cs"]))
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | SURROGATES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
small = settings(max_examples=150, deadline=None)


@small
@given(
    body=st.fixed_dictionaries(
        {},
        optional={
            "model": st.sampled_from(["gelu", "*", ["gelu", "swiglu"]]) | anything,
            "prompt": st.text(max_size=40) | st.lists(st.integers(-1, 310), max_size=40) | anything,
            "top_k": st.integers(-1, 310) | anything,
            "tokens": st.lists(st.text(max_size=3) | st.integers(-1, 310), max_size=4) | anything,
            "more": anything,
        },
    )
    | anything
)
def test_no_json_is_answered_with_500(client: TestClient, body: object) -> None:
    response = client.post(NEXT, content=json.dumps(body).encode(), headers=JSON)
    assert response.status_code in (200, 400, 404, 422)
    if response.status_code != 200:
        refusal(response)


@small
@given(body=st.binary(max_size=200))
def test_no_bytes_are_answered_with_500(client: TestClient, body: bytes) -> None:
    response = client.post(NEXT, content=body, headers=JSON)
    assert response.status_code in (400, 422)
    refusal(response)


@small
@given(prompt=st.text(min_size=1, max_size=30))
def test_any_text_is_a_prompt(client: TestClient, prompt: str) -> None:
    """Every text but U+0000 and lone surrogates is answered, or is too long."""
    response = client.post(
        NEXT,
        content=json.dumps({"model": "gelu", "prompt": prompt}),
        headers=JSON,
    )
    if response.status_code == 200:
        NextTokenAnswer.model_validate(response.json(), strict=True)
    else:
        message = refusal(response)["message"]
        assert "context" in message or "U+" in message


@pytest.mark.parametrize("value", [10**4300, [10**9999]], ids=["alone", "in a list"])
def test_a_number_of_any_length_can_be_shown(value: object) -> None:
    assert "a number of more than 4300 digits" in shown(value)
