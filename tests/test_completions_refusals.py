"""What /v1/completions refuses, and what it lets pass."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from completing import V, completions_client, events_of, one
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st

from service.completions_schema import CompletionAnswer, CompletionRequest
from service.schema import ErrorAnswer

JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def client(bundles: Path) -> Iterator[TestClient]:
    with completions_client(bundles) as client:
        yield client


@pytest.mark.parametrize(
    ("status", "says", "fields"),
    [
        (422, "model: Field required", {"model": None}),
        (422, "prompt: Field required", {"prompt": None}),
        (404, "did you mean 'swiglu'?", {"model": "swigul"}),
        (404, "unknown variant '*'", {"model": "*"}),
        (422, "string", {"model": ["gelu"]}),
        (422, "is empty", {"prompt": ""}),
        (422, "must be a text", {"prompt": []}),
        (422, "must be a text", {"prompt": ["a", [1]]}),
        (422, "must be a text", {"prompt": {"a": 1}}),
        (422, "must be a text", {"prompt": [True]}),
        (422, "holds the id 300", {"prompt": [300]}),
        (422, "prompt[1] holds the id -1", {"prompt": [[1], [-1]]}),
        (422, "prompt has 33 tokens, over the context", {"prompt": [1] * 33, "max_tokens": 0}),
        (422, "allowed for this prompt: 0 to 2", {"prompt": [1] * 30, "max_tokens": 3}),
        (422, "max_tokens is 16, over the context", {"prompt": [1] * 20, "max_tokens": None}),
        (422, "allowed for this prompt", {"max_tokens": 10**30}),
        (422, "greater than or equal to 0", {"max_tokens": -1}),
        (422, "valid integer", {"max_tokens": 3.5}),
        (422, "valid integer", {"max_tokens": "3"}),
        (422, "valid integer", {"max_tokens": True}),
        (422, "greater than or equal to 0", {"temperature": -0.1}),
        (422, "too large", {"temperature": 10**400}),
        (422, "valid number", {"temperature": "hot"}),
        (422, "less than or equal to 1", {"top_p": 1.1}),
        (422, "greater than or equal to 0", {"top_p": -0.1}),
        (422, "greater than or equal to -1", {"top_k": -2}),
        (422, "less than or equal to 1", {"min_p": 2}),
        (422, "17 choices; one request may ask for 16", {"n": 17}),
        (422, "are 18 choices", {"n": 2, "prompt": ["a"] * 9}),
        (422, "are 2048 choices", {"n": 1024, "prompt": ["a", "b"]}),
        (422, "less than or equal to 1048576; got 1000000", {"n": 10**30}),
        (422, "less than or equal to 1048576", {"n": 10**4299, "prompt": ["a"] * 9}),
        (422, "greater than or equal to 1", {"n": 0}),
        (422, "best_of 3 is not n 2", {"n": 2, "best_of": 3}),
        (422, "less than", {"seed": 1 << 63}),
        (422, "a text or a list of texts", {"stop": 3}),
        (422, "a text or a list of texts", {"stop": [3]}),
        (422, "1 to 256 characters; one has 0", {"stop": ""}),
        (422, "one has 257", {"stop": ["a" * 257]}),
        (422, "at most 64 texts", {"stop": ["a"] * 65}),
        (422, "stop_token_ids holds the id 300", {"stop_token_ids": [300]}),
        (422, "min_tokens 5 is more than max_tokens 4", {"max_tokens": 4, "min_tokens": 5}),
        (422, "the whole vocabulary", {"stop_token_ids": list(range(V)), "min_tokens": 1}),
        (422, "valid boolean", {"stream": "yes"}),
        (422, "for stream true", {"stream_options": {"include_usage": True}}),
        (422, "unknown field 'usage'", {"stream": True, "stream_options": {"usage": True}}),
        (422, "greater than or equal to 0", {"logprobs": -1}),
        (422, "valid integer", {"logprobs": True}),
        (422, "logprobs 301 is more than the vocabulary", {"logprobs": 301}),
        (422, "one answer may list 2000", {"logprobs": 300, "max_tokens": 7}),
        (422, "one answer may list 2000", {"logprobs": 100, "echo": True, "prompt": [1] * 20, "max_tokens": 1}),
        (422, "logprob_token_ids holds the id 300", {"logprob_token_ids": [1, 300]}),
        (422, "at most 1024 items", {"logprob_token_ids": [1] * 1025}),
        (422, "an object of token ids", {"logit_bias": [1]}),
        (422, "the key 'x' is no token id", {"logit_bias": {"x": 1}}),
        (422, "the key '-1' is no token id", {"logit_bias": {"-1": 1}}),
        (422, "logit_bias holds the id 300", {"logit_bias": {"300": 1}}),
        (422, "the bias of 5 is 100.5; allowed: -100 to 100", {"logit_bias": {"5": 100.5}}),
        (422, "the bias of 5 is 'a'", {"logit_bias": {"5": "a"}}),
        (422, "the bias of 5 is None", {"logit_bias": {"5": None}}),
        (422, "less than or equal to 2", {"presence_penalty": 3}),
        (422, "greater than or equal to -2", {"frequency_penalty": -3}),
        (422, "greater than 0", {"repetition_penalty": 0}),
        (422, "suffix is not offered", {"suffix": "x"}),
        (422, "use_beam_search is not offered; got True", {"use_beam_search": True}),
        (422, "prompt_logprobs is not offered; got 0; leave it out; echo with logprobs", {"prompt_logprobs": 0}),
        (422, "response_format is not offered", {"response_format": {"type": "json_object"}}),
        (422, "did you mean 'max_tokens'", {"max_token": 3}),
    ],
)
def test_what_is_wrong_is_refused(client: TestClient, status: int, says: str, fields: dict[str, object]) -> None:
    for streaming in ({}, {"stream": True}):
        response = client.post(
            "/v1/completions",
            json={"model": "gelu", "prompt": "a", **({} if "stream_options" in fields else streaming), **fields},
        )
        assert response.status_code == status, response.text
        ErrorAnswer.model_validate(response.json(), strict=True)
        assert says in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "field", ["suffix", "best_of", "min_tokens", "stream_options", "n", "logit_bias", "temperature"]
)
def test_a_refusal_names_its_field(client: TestClient, field: str) -> None:
    value = {"min_tokens": 99, "stream_options": {}, "temperature": -1}.get(field, 5)
    response = client.post("/v1/completions", json={"model": "gelu", "prompt": ["a"] * 4, field: value})
    assert response.status_code == 422
    assert response.json()["error"]["param"] == field


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize(
    "field", ["temperature", "top_p", "min_p", "presence_penalty", "repetition_penalty", "max_tokens"]
)
def test_no_number_is_refused(client: TestClient, field: str, number: str) -> None:
    for value in (number, f'{{"5": {number}}}') if field == "temperature" else (number,):
        name = field if value == number else "logit_bias"
        body = f'{{"model": "gelu", "prompt": "a", "{name}": {value}}}'
        response = client.post("/v1/completions", content=body, headers=JSON)
        assert response.status_code == 422, response.text
        ErrorAnswer.model_validate(response.json(), strict=True)


def test_nulls_are_what_is_not_given(client: TestClient) -> None:
    known = set(CompletionRequest.model_fields) - {"model", "prompt", "seed", "temperature"}
    nulls = dict.fromkeys(known | {"suffix", "user", "prompt_logprobs", "guided_json"})
    assert one(client, seed=1, **nulls) == one(client, seed=1)


def test_what_clients_send_besides_changes_nothing(client: TestClient) -> None:
    body = {"user": "u", "metadata": {"a": "b"}, "priority": 0, "suffix": "", "use_beam_search": False}
    body |= {"length_penalty": 1.0, "best_of": 1, "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}}
    body |= {"stop": [], "stream": False, "top_k": -1, "top_p": 1, "min_p": 0, "repetition_penalty": 1}
    body |= {"response_format": {"type": "text"}, "echo": False}
    assert one(client, seed=1, **body) == one(client, seed=1)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.text(st.characters(categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
numbers = st.integers(-2, 40) | st.floats(-3, 3)
VALID = {
    "model": st.just("gelu"),
    "prompt": st.text(max_size=10)
    | st.lists(st.integers(-1, 310), max_size=20)
    | st.lists(st.text(max_size=4), max_size=3),
    "logit_bias": st.dictionaries(st.integers(-1, 310).map(str), numbers, max_size=4),
    "stop": st.text(max_size=3) | st.lists(st.text(max_size=3), max_size=3),
}


@settings(max_examples=300, deadline=None)
@given(
    body=st.fixed_dictionaries(
        {name: VALID[name] | anything for name in ("model", "prompt")},
        optional={
            name: VALID.get(name, numbers | st.booleans() | st.lists(st.integers(-1, 310), max_size=3)) | anything
            for name in CompletionRequest.model_fields
            if name not in ("model", "prompt")
        },
    )
    | anything
)
def test_no_json_is_answered_with_500(client: TestClient, body: object) -> None:
    response = client.post("/v1/completions", content=json.dumps(body).encode(), headers=JSON)
    if response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream"):
        assert events_of(response.text)[-1] == "[DONE]"
    elif response.status_code == 200:
        CompletionAnswer.model_validate(response.json(), strict=True)
    else:
        assert response.status_code in (400, 404, 422)
        ErrorAnswer.model_validate(response.json(), strict=True)
