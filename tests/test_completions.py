"""/v1/completions of a running model: against torch, sampled, streamed against not, and what it costs."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from completing import CONTEXT, V, ask, completions_client, joined, one, streamed
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from service.completions import ENTRY_BYTES, prepare
from service.completions_schema import CompletionRequest

small = settings(max_examples=100, deadline=None)


@pytest.fixture(scope="module")
def client(bundles: Path) -> Iterator[TestClient]:
    with completions_client(bundles) as client:
        yield client


def encode(bundles: Path, text: str) -> list[int]:
    return Tokenizer.from_file(str(bundles / "gelu" / "tokenizer.json")).encode(text).ids


def log_softmax(checkpoint: Any, ids: Sequence[int]) -> np.ndarray:
    """[T, V], in float64."""
    with torch.no_grad():
        logits = checkpoint.model.double()(torch.tensor([list(ids)])).logits[0]
    return torch.log_softmax(logits, -1).numpy()


# Against torch.


@pytest.mark.parametrize("model", ["gelu", "swiglu", "gelu-sigmoid-head"])
def test_greedy_is_the_chain_of_the_likeliest_tokens(client: TestClient, tiny_checkpoint: Callable, model: str) -> None:
    """Also of a variant with a sigmoid head, whose log-probabilities are of the softmax over its logits."""
    checkpoint = tiny_checkpoint(*{"gelu-sigmoid-head": ("gelu", "sigmoid")}.get(model, (model,)))
    ids = [5, 6, 7]
    choice = one(
        client,
        model=model,
        prompt=ids,
        max_tokens=12,
        temperature=0,
        logprobs=1,
        ignore_eos=True,
        return_token_ids=True,
    )
    expected = list(ids)
    for logprob, top in zip(choice["logprobs"]["token_logprobs"], choice["logprobs"]["top_logprobs"], strict=True):
        row = log_softmax(checkpoint, expected)[-1]
        expected.append(int(row.argmax()))
        assert logprob == pytest.approx(row.max(), abs=1e-4)
        assert list(top.values()) == [logprob]
    assert choice["token_ids"] == expected[3:]
    assert choice["prompt_token_ids"] == ids
    assert choice["finish_reason"] == "length"


@pytest.mark.parametrize("model", ["gelu", "gelu-sigmoid-head"])
@pytest.mark.parametrize("max_tokens", [0, 1])
def test_echo_scores_the_prompt_as_lm_eval_asks(
    client: TestClient, tiny_checkpoint: Callable, model: str, max_tokens: int
) -> None:
    checkpoint = tiny_checkpoint(*{"gelu-sigmoid-head": ("gelu", "sigmoid")}.get(model, (model,)))
    prompts = [[5, 6, 7, 250, 9, 10], [299], [250] * 31, list(range(1, 20))]
    body = {"model": model, "temperature": 0, "max_tokens": max_tokens, "logprobs": 1, "seed": 1234, "echo": True}
    answer = ask(client, prompt=prompts, **body)
    for ids, choice in zip(prompts, answer["choices"], strict=True):
        table = choice["logprobs"]
        logprobs, tops = table["token_logprobs"], table["top_logprobs"]
        assert len(table["tokens"]) == len(table["text_offset"]) == len(logprobs) == len(tops) == len(ids) + max_tokens
        assert logprobs[0] is None
        assert tops[0] is None
        rows = log_softmax(checkpoint, ids)
        assert logprobs[1 : len(ids)] == pytest.approx([rows[at, id_] for at, id_ in enumerate(ids[1:])], abs=1e-4)
        for at in range(1, len(ids)):
            greedy = int(rows[at - 1].argmax()) == ids[at]
            assert max(tops[at].values()) == pytest.approx(rows[at - 1].max(), abs=1e-4)
            assert (logprobs[at] == max(tops[at].values())) == greedy, "as lm-eval decides it"
            assert logprobs[at] in tops[at].values()
    count = sum(map(len, prompts))
    assert answer["usage"] == {
        "prompt_tokens": count,
        "completion_tokens": max_tokens * len(prompts),
        "total_tokens": count + max_tokens * len(prompts),
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_all_log_probabilities_of_the_vocabulary(client: TestClient, tiny_checkpoint: Callable) -> None:
    row = log_softmax(tiny_checkpoint("gelu"), [5, 6, 7])[-1]
    (top,) = one(client, prompt=[5, 6, 7], max_tokens=1, temperature=0, logprobs=V)["logprobs"]["top_logprobs"]
    assert len(top) == V, "no name twice"
    assert list(top.values()) == sorted(top.values(), reverse=True)
    assert list(top.values()) == pytest.approx(sorted(row, reverse=True), abs=1e-4)
    assert sum(np.exp(list(top.values()))) == pytest.approx(1, abs=1e-5)
    listed = one(client, prompt=[5, 6, 7], max_tokens=1, temperature=0, logprobs=V, return_tokens_as_token_ids=True)
    (by_id,) = listed["logprobs"]["top_logprobs"]
    assert {f"token_id:{id_}": value for id_, value in enumerate(row)} == pytest.approx(by_id, abs=1e-4)
    assert list(by_id.values()) == list(top.values())


def test_tokens_asked_for_by_id_are_listed_too(client: TestClient, tiny_checkpoint: Callable) -> None:
    row = log_softmax(tiny_checkpoint("gelu"), [5, 6, 7])[-1]
    body = {"prompt": [5, 6, 7], "max_tokens": 1, "temperature": 0, "return_tokens_as_token_ids": True}
    best = int(row.argmax())
    others = [int(row.argmin()), best, 17]
    (top,) = one(client, **body, logprob_token_ids=others)["logprobs"]["top_logprobs"]
    expected = {f"token_id:{id_}": row[id_] for id_ in (best, others[0], 17)}
    assert list(top) == list(expected)
    assert top == pytest.approx(expected, abs=1e-4)
    (top,) = one(client, **body, logprob_token_ids=others, logprobs=2)["logprobs"]["top_logprobs"]
    assert set(top) == {f"token_id:{id_}" for id_ in (*row.argsort()[-2:].tolist(), *others)}
    (top,) = one(client, **body, logprobs=0)["logprobs"]["top_logprobs"]
    assert list(top) == [f"token_id:{best}"]
    assert one(client, **body)["logprobs"] is None


def test_logprobs_are_the_models_own_however_it_is_sampled(client: TestClient) -> None:
    body = {"prompt": [5, 6, 7], "max_tokens": 1, "logprobs": V, "return_tokens_as_token_ids": True}
    (plain,) = one(client, **body, temperature=0)["logprobs"]["top_logprobs"]
    forced = one(client, **body, temperature=0.3, logit_bias={"17": 100}, top_k=3)["logprobs"]
    assert forced["tokens"] == ["token_id:17"]
    assert forced["top_logprobs"] == [plain]
    assert forced["token_logprobs"] == [plain["token_id:17"]]


# Sampling.


def test_samples_are_distributed_as_softmax(client: TestClient, tiny_checkpoint: Callable) -> None:
    """Chi-square with a fixed seed over the likeliest of 480 first tokens; 99.9 % of seeds pass."""
    p = np.exp(log_softmax(tiny_checkpoint("gelu"), [5, 6, 7])[-1])
    counts = np.zeros(V)
    for seed in range(30):
        body = {"prompt": [5, 6, 7], "max_tokens": 1, "seed": seed, "n": 16, "return_token_ids": True}
        for choice in ask(client, **body)["choices"]:
            counts[choice["token_ids"][0]] += 1
    best = p.argsort()[::-1][:150]
    observed = np.array([*counts[best].reshape(15, 10).sum(axis=1), counts.sum() - counts[best].sum()])
    expected = 480 * np.array([*p[best].reshape(15, 10).sum(axis=1), 1 - p[best].sum()])
    assert (expected > 5).all()
    assert ((observed - expected) ** 2 / expected).sum() < 37.7, "15 degrees of freedom"


def test_a_seed_repeats_alone_and_in_company(client: TestClient) -> None:
    body = {"prompt": [[5, 6, 7], [8, 9]], "max_tokens": 8, "n": 3, "ignore_eos": True}
    first = ask(client, **body, seed=-7)["choices"]
    assert [choice["index"] for choice in first] == list(range(6))
    texts = [choice["text"] for choice in first]
    assert len(set(texts)) > 3
    others = [threading.Thread(target=ask, args=(client,), kwargs={**body, "seed": seed}) for seed in range(4)]
    for other in others:
        other.start()
    assert [choice["text"] for choice in ask(client, **body, seed=-7)["choices"]] == texts, "whatever runs beside it"
    for other in others:
        other.join()
    alone = ask(client, **body | {"prompt": [5, 6, 7]}, seed=-7)["choices"]
    assert [choice["text"] for choice in alone] == texts[:3]
    assert one(client, **body | {"prompt": [5, 6, 7], "n": 1}, seed=-7)["text"] == texts[0]
    twice = ask(client, **body | {"prompt": [[5, 6, 7]] * 2}, seed=-7)["choices"]
    assert [choice["text"] for choice in twice[:3]] == texts[:3]
    assert twice[3]["text"] not in texts[:3], "each prompt has draws of its own"
    assert [choice["text"] for choice in ask(client, **body, seed=8)["choices"]] != texts
    fresh = {one(client, prompt=[5, 6, 7], max_tokens=8)["text"] for _ in range(4)}
    assert len(fresh) > 1, "without a seed"


def test_echo_gives_the_prompt_as_it_was_given(client: TestClient, bundles: Path) -> None:
    for prompt in ("if é\n", "<|endoftext|>x", " 😀 "):
        choice = one(client, prompt=prompt, echo=True, max_tokens=3, temperature=0, logprobs=1)
        ids = encode(bundles, prompt)
        assert choice["text"].startswith(prompt)
        plain = one(client, prompt=prompt, max_tokens=3, temperature=0, logprobs=1)
        assert choice["text"] == prompt + plain["text"]
        assert choice["logprobs"]["token_logprobs"][len(ids) :] == pytest.approx(plain["logprobs"]["token_logprobs"])
        offsets, tokens = choice["logprobs"]["text_offset"], choice["logprobs"]["tokens"]
        for offset, token in zip(offsets, tokens, strict=True):
            if not token.startswith("bytes:") and token != "<|endoftext|>":
                assert choice["text"][offset:].startswith(token)
        by_ids = one(client, prompt=ids, echo=True, max_tokens=3, temperature=0, logprobs=1)
        assert by_ids == choice
        assert one(client, prompt=prompt, echo=True, max_tokens=0)["text"] == prompt


@small
@given(
    prompt=st.lists(st.integers(0, V - 1), min_size=1, max_size=8) | st.text(min_size=1, max_size=4),
    max_tokens=st.integers(0, 12),
    n=st.integers(1, 2),
    seed=st.integers(-(1 << 63), (1 << 63) - 1),
    temperature=st.sampled_from([0, 0.7, 1, 2]),
    stop=st.lists(st.text(min_size=1, max_size=2), max_size=3),
    echo=st.booleans(),
    logprobs=st.none() | st.integers(0, 3),
)
def test_streamed_is_what_is_answered(client: TestClient, prompt, max_tokens, **asked: Any) -> None:
    """Of a running model, whose random tokens are bytes of no UTF-8 for the most part."""
    if "\0" in prompt or (isinstance(prompt, str) and len(prompt.encode()) > 16):
        prompt = "x"
    body = {"prompt": prompt, "max_tokens": max_tokens, **asked}
    answer = ask(client, **body)
    chunks = streamed(client, **body, stream_options={"include_usage": True})
    *parts, last = chunks
    for whole, choice in zip(joined(parts), answer["choices"], strict=True):
        one_run, other = whole.pop("logprobs"), choice.pop("logprobs")
        assert whole == choice
        assert (one_run is None) == (other is None) == (asked["logprobs"] is None)
        if one_run is not None:
            assert one_run["tokens"] == other["tokens"]
            assert one_run["text_offset"] == other["text_offset"]
            # Two runs, whose prompts may have been batched otherwise.
            assert one_run["token_logprobs"] == pytest.approx(other["token_logprobs"], abs=1e-4)
            for top, its in zip(one_run["top_logprobs"], other["top_logprobs"], strict=True):
                assert (top is None) == (its is None)
                assert top is None or sorted(top.values()) == pytest.approx(sorted(its.values()), abs=1e-4)
    for usage in (last["usage"], answer["usage"]):  # the second may find the first one's keys and values
        assert usage.pop("prompt_tokens_details")["cached_tokens"] <= usage["prompt_tokens"]
    assert last["usage"] == answer["usage"]
    assert all(part["usage"] is None for part in parts)


def test_the_default_is_16_tokens(client: TestClient) -> None:
    answer = ask(client, prompt=[5, 6], ignore_eos=True)
    assert answer["usage"]["completion_tokens"] == 16
    assert answer["object"] == "text_completion"
    assert answer["model"] == "gelu"
    assert answer["id"].startswith("cmpl-")


def test_a_whole_context_is_generated_and_scored(client: TestClient) -> None:
    answer = ask(client, prompt=[1], max_tokens=CONTEXT - 1, ignore_eos=True)
    assert answer["usage"]["total_tokens"] == CONTEXT
    choice = one(client, prompt=[1] * CONTEXT, max_tokens=0, echo=True, logprobs=1)
    assert len(choice["logprobs"]["tokens"]) == CONTEXT


def test_times_and_metrics(client: TestClient) -> None:
    def count(stage: str) -> float:
        text = client.get("/metrics").text
        return float(re.search(rf'actuary_stage_seconds_count{{model="gelu",stage="{stage}"}} (\S+)', text)[1])

    response = client.post("/v1/completions", json={"model": "gelu", "prompt": "a", "max_tokens": 2})
    for name in ("x-tokenize-ms", "x-queue-ms", "x-infer-ms"):
        assert 0 <= float(response.headers[name]) <= float(response.headers["x-total-ms"])
    before = count("infer")
    streamed(client, max_tokens=2)
    assert count("infer") == before + 1
    assert 'actuary_requests_total{model="gelu",route="/v1/completions",status="200"}' in client.get("/metrics").text


def test_the_document_describes_it(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    route = document["paths"]["/v1/completions"]["post"]
    assert {"404", "408", "413", "422", "429", "503"} <= set(route["responses"])
    assert set(route["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
    ask(client, **document["components"]["schemas"]["CompletionRequest"]["examples"][0])


def test_the_curl_line_of_the_readme_answers(client: TestClient) -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    (body,) = re.findall(r"/v1/completions -H .*\\\n +-d '(\{.*\})'", readme)
    *chunks, usage = streamed(client, **json.loads(body))
    assert joined(chunks)[0]["finish_reason"] in ("stop", "length")
    assert usage["usage"]["completion_tokens"] > 0


@pytest.mark.parametrize(
    ("fields", "entries"),
    [
        ({}, 0),
        ({"logprobs": 0}, 8),
        ({"logprobs": 3, "logprob_token_ids": [1, 2]}, 40),
        ({"logprobs": 3, "echo": True}, 33),
    ],
)
def test_a_choice_says_what_its_log_probabilities_take(
    client: TestClient, fields: dict[str, Any], entries: int
) -> None:
    """Of 8 tokens, and 3 of the prompt where they are listed."""
    service = client.app.state.service
    asked = CompletionRequest(model="gelu", prompt=[5, 6, 7], max_tokens=8, n=2, **fields)
    completing = asyncio.run(prepare(asked, service.library, service.settings))
    assert [job.bytes for job in completing.jobs(lambda *_: None)] == [ENTRY_BYTES * entries] * 2


def test_the_choices_of_a_request_share_what_they_have_in_common(client: TestClient) -> None:
    """A thousand ends and biases would take the event loop 0.2 ms for each choice."""
    service = client.app.state.service
    fields: dict[str, Any] = {"logit_bias": {"4": 1, "5": -1}, "stop_token_ids": [6, 7], "min_tokens": 2}
    asked = CompletionRequest(model="gelu", prompt=[5, 6, 7], n=16, **fields)
    jobs = asyncio.run(prepare(asked, service.library, service.settings)).jobs(lambda *_: None)
    assert len(jobs) == 16
    first, *others = (job.reader._sampler._sampling for job in jobs)
    assert all(other is first for other in others)
