"""/v1/completions: against torch, against plain definitions of text and stops, streamed against not, what it refuses.

A `Script` stands for the engine where a test must say which tokens come: it feeds the readers rows whose likeliest
tokens are these.
"""

from __future__ import annotations

import asyncio
import codecs
import dataclasses
import json
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from service.app import create_app
from service.completions import ENTRY_BYTES, complete, prepare
from service.completions_schema import CompletionAnswer, CompletionRequest
from service.detokenizer import Detokenizer
from service.engine import Done, Rows
from service.errors import ApiError
from service.events import EventStream, stream
from service.library import Library
from service.logprobs import Listing
from service.schema import ErrorAnswer
from service.settings import Settings
from service.stops import Stops
from service.vocabulary import Vocabulary

JSON = {"content-type": "application/json"}
CONTEXT, V = 32, 300
small = settings(max_examples=100, deadline=None)
many = settings(max_examples=300, deadline=None)


@pytest.fixture(scope="module")
def client(bundles: Path) -> Iterator[TestClient]:
    limits = {"max_prompts": 16, "max_entries": 2_000, "max_body_bytes": 20_000}
    app = create_app(Settings(bundles=bundles, provider="cpu", threads=1, **limits))
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


@pytest.fixture(scope="module")
def vocabulary(bundles: Path) -> Vocabulary:
    return Vocabulary(bundles / "gelu" / "tokenizer.json")


def ask(client: TestClient, **body: object) -> dict[str, Any]:
    response = client.post("/v1/completions", json={"model": "gelu", "prompt": "if x is not", **body})
    assert response.status_code == 200, response.text
    CompletionAnswer.model_validate(response.json(), strict=True)
    return response.json()


def one(client: TestClient, **body: object) -> dict[str, Any]:
    (choice,) = ask(client, **body)["choices"]
    return choice


def events_of(text: str) -> list[Any]:
    """The contents of server-sent events; "[DONE]" as it is."""
    assert text.endswith("\n\n")
    lines = text.removesuffix("\n\n").split("\n\n")
    assert all(line.startswith("data: ") for line in lines)
    return [d if d == "[DONE]" else json.loads(d) for d in (line.removeprefix("data: ") for line in lines)]


def streamed(client: TestClient, **body: object) -> list[dict[str, Any]]:
    """The chunks of a streamed answer, without its end."""
    asked = {"model": "gelu", "prompt": "if x is not", "stream": True, **body}
    response = client.post("/v1/completions", json=asked)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, end = events_of(response.text)
    assert end == "[DONE]"
    for chunk in chunks:
        CompletionAnswer.model_validate(chunk, strict=True)
    return chunks


def joined(chunks: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the choices of chunks are together."""
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for part in chunk["choices"]:
            whole = choices.setdefault(part["index"], part | {"text": "", "logprobs": part["logprobs"] and {}})
            assert whole["finish_reason"] is None or whole["text"] == "", "nothing comes after the last"
            whole["text"] += part["text"]
            for column, values in (part["logprobs"] or {}).items():
                whole["logprobs"][column] = whole["logprobs"].get(column, []) + values
            whole |= {"finish_reason": part["finish_reason"], "stop_reason": part["stop_reason"]}
    return [choices[index] for index in sorted(choices)]


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


# The engine as a script.


class Script:
    """An engine whose model says `tokens` whatever the prompt, each with all but certainty."""

    def __init__(self, tokens: Sequence[int], fails_after: int | None = None, error: Exception | None = None) -> None:
        self.tokens = tokens
        self.fails_after = fails_after
        self.error = error
        self.read = 0
        self.cancelled = asyncio.Event()

    async def run(self, jobs: Sequence[Any]) -> list[Done]:
        try:
            return [await self._run(job) for job in jobs]
        except asyncio.CancelledError:
            self.cancelled.set()
            raise

    async def _run(self, job: Any) -> Done:
        said = iter(self.tokens)
        wanted = len(job.ids) - job.reader.first
        token: int | None = await asyncio.to_thread(job.reader.read, rows_for([0] * (wanted - 1) + [next(said, 0)]))
        returned = 0
        while token is not None:
            self.read += 1
            if self.read == self.fails_after:
                if self.error is None:
                    await asyncio.Event().wait()  # until it is cancelled
                raise self.error
            returned += 1
            assert returned <= job.max_tokens
            token = await asyncio.to_thread(job.reader.read, rows_for([next(said, 0)]))
        return Done(None, 0.001, 0.002, 1.0, cached_tokens=2)


def rows_for(tokens: Sequence[int]) -> Rows:
    logits = np.zeros((len(tokens), V), np.float32)
    logits[np.arange(len(tokens)), list(tokens)] = 20
    softmax = np.exp(logits - logits.max(axis=1, keepdims=True))
    softmax /= softmax.sum(axis=1, keepdims=True)
    top_ids = np.argsort(-logits, axis=1, kind="stable")
    ones = np.ones((len(tokens), 2), np.float32)
    return Rows(logits, softmax, softmax, top_ids, ones, ones)


def scripted(client: TestClient, tokens: Sequence[int], **body: object) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The choice that is answered, and the chunks that are streamed, where the model says `tokens`."""
    service = client.app.state.service
    fields = {"model": "gelu", "prompt": [1], "temperature": 0, "max_tokens": len(tokens), **body}

    async def both() -> tuple[bytes, bytes]:
        asked = CompletionRequest.model_validate(fields)
        answered = await complete(asked, service.library, Script(tokens), service.settings)
        events = await stream(asked, service.library, Script(tokens), service.settings, "id")
        return answered.body, b"".join([chunk async for chunk in events])

    body_, sent = asyncio.run(both())
    (choice,) = json.loads(body_)["choices"]
    *chunks, end = events_of(sent.decode())
    assert end == "[DONE]"
    return choice, chunks


@pytest.fixture(scope="module")
def id_of_byte(vocabulary: Vocabulary) -> dict[int, int]:
    """The token of each byte alone."""
    found = {vocabulary.bytes_of(id_): id_ for id_ in range(V) if id_ not in vocabulary.special_ids}
    return {byte: found[bytes([byte])] for byte in range(256)}


def cut(text: str, stops: Sequence[str]) -> tuple[str, str | None]:
    """The plain definition of stop strings: character by character, the first that is complete, then the longest."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return text[: end - len(stop)], stop
    return text, None


STOPS = st.lists(st.text("ab€😀\n", min_size=1, max_size=4), max_size=4)


@many
@given(st.lists(st.text("ab€😀\n", max_size=6), max_size=12), STOPS)
@example(["a", "b", "a"], ["ba"])
@example(["aab"], ["aaab", "ab"])
def test_stops_are_found_however_the_text_is_cut(pieces: list[str], stop: list[str]) -> None:
    finder, said = Stops(stop), ""
    text, expected = cut("".join(pieces), stop)
    for piece in pieces:
        said += finder.feed(piece)
        assert text.startswith(said), "nothing is said that may have to be taken back"
        if finder.found is not None:
            break
    if finder.found is None:
        said += finder.flush()
    assert (said, finder.found) == (text, expected)


@many
@given(
    data=st.text("ab€😀\n", max_size=7).map(str.encode)
    | st.binary(max_size=20)
    | st.lists(st.sampled_from([b"\xf0\x9f", b"\x98\x80", b"\xe2\x82\xac", b"a", b"\xff"]), max_size=8).map(b"".join),
    stop=STOPS | st.just(["\ufffd"]),
    echo=st.booleans(),
    include=st.booleans(),
)
@example(data="a😀b".encode(), stop=["😀b"], echo=False, include=False)
def test_text_is_the_bytes_up_to_the_stop_and_streams_to_the_same(
    client: TestClient, id_of_byte: dict[int, int], data: bytes, stop: list[str], echo: bool, include: bool
) -> None:
    """Each token is one byte, so that every character beyond ASCII is split."""
    tokens = [id_of_byte[byte] for byte in data][:20] or [id_of_byte[0x61]]
    data = bytes(data)[:20] or b"a"
    text, found = cut(data.decode("utf-8", "replace"), stop)
    choice, chunks = scripted(
        client,
        tokens,
        prompt="if é",
        stop=stop,
        echo=echo,
        logprobs=1,
        ignore_eos=True,
        include_stop_str_in_output=include,
    )
    shown = ("if é" if echo else "") + text + (found or "" if include else "")
    assert choice["text"] == shown
    assert (choice["finish_reason"], choice["stop_reason"]) == ("length" if found is None else "stop", found)
    (whole,) = joined(chunks)
    assert whole == choice
    if "\ufffd" not in shown:
        assert not any("\ufffd" in chunk["choices"][0]["text"] for chunk in chunks)
    table = choice["logprobs"]
    assert len({len(column) for column in table.values()}) == 1
    generated = table["text_offset"][len(client.app.state.service.library.variants["gelu"].vocabulary.encode("if é")) :]
    before = [len(codecs.utf_8_decode(data[:at], "replace", False)[0]) for at in range(len(data))]
    if not echo:
        generated = table["text_offset"]
    start = len("if é") if echo else 0
    assert generated == [min(start + at, len(shown)) for at in before[: len(generated)]]


def test_each_character_comes_with_its_last_byte(client: TestClient, id_of_byte: dict[int, int]) -> None:
    data = "a😀€".encode()
    choice, chunks = scripted(client, [id_of_byte[byte] for byte in data], logprobs=0)
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["a", "", "", "", "😀", "", "", "€"]
    assert choice["logprobs"]["text_offset"] == [0, 1, 1, 1, 1, 2, 2, 2]
    assert choice["logprobs"]["tokens"] == [
        "a", "bytes:\\xf0", "bytes:\\x9f", "bytes:\\x98", "bytes:\\x80", "bytes:\\xe2", "bytes:\\x82", "bytes:\\xac",
    ]  # fmt: skip
    assert [next(iter(top)) for top in choice["logprobs"]["top_logprobs"]] == choice["logprobs"]["tokens"]


def test_a_stop_is_kept_back_until_it_is_none(client: TestClient, id_of_byte: dict[int, int]) -> None:
    choice, chunks = scripted(client, [id_of_byte[byte] for byte in b"xENyEND!"], stop=["END"])
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["x", "", "", "ENy", "", "", ""]
    assert choice["text"] == "xENy"
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "END")
    choice, chunks = scripted(client, [id_of_byte[byte] for byte in b"xEN"], stop="END")
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["x", "", "EN"]
    assert choice["finish_reason"] == "length"


def test_an_entry_comes_when_its_place_in_the_text_is_known(client: TestClient, id_of_byte: dict[int, int]) -> None:
    choice, chunks = scripted(client, [id_of_byte[byte] for byte in b"xENyEND!"], stop=["END"], logprobs=0)
    tokens = [chunk["choices"][0]["logprobs"]["tokens"] for chunk in chunks]
    assert tokens == [["x"], ["E"], [], ["N", "y"], ["E"], [], ["N", "D"]]
    assert choice["logprobs"]["text_offset"] == [0, 1, 2, 3, 4, 4, 4]


def test_what_is_cut_off_has_its_place_at_the_texts_end(client: TestClient, id_of_byte: dict[int, int]) -> None:
    """All tokens are listed and counted, the stop string's too, as vLLM does."""
    choice, _ = scripted(client, [id_of_byte[byte] for byte in b"xyEND!"], stop=["END"], logprobs=0)
    assert choice["logprobs"]["tokens"] == ["x", "y", "E", "N", "D"]
    assert choice["logprobs"]["text_offset"] == [0, 1, 2, 2, 2]


def test_the_end_of_text_ends_a_choice_without_a_word(client: TestClient, vocabulary: Vocabulary, id_of_byte) -> None:
    eos, a, b = vocabulary.eos_id, id_of_byte[ord("a")], id_of_byte[ord("b")]
    choice, chunks = scripted(client, [a, eos, b], logprobs=0)
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("a", "stop", None)
    assert choice["logprobs"]["tokens"] == ["a", "<|endoftext|>"]
    assert len(chunks) == 2
    choice, _ = scripted(client, [a, eos, b], ignore_eos=True)
    assert (choice["text"], choice["finish_reason"]) == ("ab", "length")
    choice, _ = scripted(client, [a, eos, b], ignore_eos=True, skip_special_tokens=False)
    assert choice["text"] == "a<|endoftext|>b"
    choice, _ = scripted(client, [a, b, b], stop_token_ids=[b], ignore_eos=True)
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("a", "stop", b)
    choice, _ = scripted(client, [eos, a, a, b], min_tokens=2, return_token_ids=True)
    assert choice["token_ids"][0] != eos
    assert choice["finish_reason"] == "length"


def test_no_stop_before_min_tokens(client: TestClient, id_of_byte: dict[int, int]) -> None:
    tokens = [id_of_byte[byte] for byte in b"abab"]
    assert scripted(client, tokens, stop="ab", min_tokens=2)[0]["text"] == "ab"
    assert scripted(client, tokens, stop="ab", min_tokens=3)[0]["text"] == "abab"
    assert scripted(client, tokens, stop="ab", min_tokens=1)[0]["text"] == "ab", "the first one's start came before"
    assert scripted(client, tokens, stop="ab")[0]["text"] == ""


def test_a_character_that_a_prompt_of_ids_begins_is_finished_by_the_answer(
    client: TestClient, id_of_byte: dict[int, int]
) -> None:
    data = [id_of_byte[byte] for byte in "x😀y".encode()]
    choice, _ = scripted(client, data[3:], prompt=data[:3], logprobs=0)
    assert choice["text"] == "😀y"
    assert choice["logprobs"]["text_offset"] == [0, 0, 1]
    choice, chunks = scripted(client, data[3:], prompt=data[:3], echo=True, logprobs=0)
    assert choice["text"] == "x😀y"
    assert choice["logprobs"]["text_offset"] == [0, 1, 1, 1, 1, 2]
    assert joined(chunks) == [choice]
    assert scripted(client, [0], prompt=data[:3], echo=True, max_tokens=0)[0]["text"] == "x\ufffd"
    assert scripted(client, [0], prompt=data[:3], max_tokens=0)[0]["text"] == ""


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_the_rows_of_a_prompt_may_come_in_pieces(client: TestClient, id_of_byte: dict[int, int], size: int) -> None:
    """Before the last row of the prompt nothing is chosen, nor said."""
    service = client.app.state.service
    fields = {
        "model": "gelu",
        "prompt": [5, 6, 7, 8, 9],
        "max_tokens": 2,
        "temperature": 0,
        "echo": True,
        "logprobs": 2,
    }
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(6, V)).astype(np.float32)
    softmax = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    rows = Rows(logits, softmax, softmax, np.argsort(-logits, axis=1), np.ones((6, 2)), np.ones((6, 2)))

    class InPieces:
        async def run(self, jobs: Sequence[Any]) -> list[Done]:
            (job,) = jobs
            assert job.reader.first == 0
            for start in range(0, 5, size):
                piece = slice(start, min(start + size, 5))
                token = job.reader.read(Rows(*(column[piece] for column in vars(rows).values())))
                assert (token is None) == (piece.stop < 5)
            assert token == logits[4].argmax()
            assert job.reader.read(Rows(*(column[5:] for column in vars(rows).values()))) is None
            return [Done(None, 0, 0, 1)]

    asked = CompletionRequest.model_validate(fields)
    answered = asyncio.run(complete(asked, service.library, InPieces(), service.settings))
    table = json.loads(answered.body)["choices"][0]["logprobs"]
    tokens = [6, 7, 8, 9, int(logits[4].argmax()), int(logits[5].argmax())]
    expected = np.log(softmax[np.arange(6), tokens])
    assert table["token_logprobs"][1:] == pytest.approx(expected, abs=1e-5)
    assert [len(top) for top in table["top_logprobs"][1:]] == [
        2 + (t not in r[:2]) for t, r in zip(tokens, rows.top_ids, strict=True)
    ]


def test_usage_counts_each_prompt_once_and_every_generated_token(client: TestClient, id_of_byte) -> None:
    service = client.app.state.service
    tokens = [id_of_byte[byte] for byte in b"abEND"]
    fields = {"model": "gelu", "prompt": [[1, 2, 3], [4]], "n": 2, "temperature": 0, "stop": ["END"], "stream": True}
    options = {"include_usage": True, "continuous_usage_stats": True}

    async def both() -> tuple[bytes, bytes]:
        asked = CompletionRequest.model_validate({**fields, "stream_options": options})
        answered = await complete(asked, service.library, Script(tokens), service.settings)
        events = await stream(asked, service.library, Script(tokens), service.settings, "id")
        return answered.body, b"".join([chunk async for chunk in events])

    body, sent = asyncio.run(both())
    expected = {"prompt_tokens": 4, "completion_tokens": 20, "total_tokens": 24}
    expected["prompt_tokens_details"] = {"cached_tokens": 4}  # 2 of each prompt, not of each choice
    assert json.loads(body)["usage"] == expected
    *chunks, last, _ = events_of(sent.decode())
    assert last["choices"] == []
    assert last["usage"] == expected
    seen = {0: 0, 1: 0, 2: 0, 3: 0}
    for chunk in chunks:
        (choice,) = chunk["choices"]
        seen[choice["index"]] += 1
        prompt_tokens = [3, 3, 1, 1][choice["index"]]
        counted = seen[choice["index"]]
        assert chunk["usage"] == {
            "prompt_tokens": prompt_tokens, "completion_tokens": counted, "total_tokens": prompt_tokens + counted,
        }  # fmt: skip


def test_an_error_before_the_first_token_has_its_status(client: TestClient) -> None:
    service = client.app.state.service
    asked = CompletionRequest.model_validate({"model": "gelu", "prompt": [1], "stream": True})
    full = ApiError("queue_full", "full", headers={"retry-after": "1"})

    class Full:
        async def run(self, jobs: object) -> list[Done]:
            raise full

    with pytest.raises(ApiError) as caught:
        asyncio.run(stream(asked, service.library, Full(), service.settings, "id"))
    assert caught.value is full


@pytest.mark.parametrize(
    ("error", "kind"), [(ApiError("timeout", "too long"), "timeout"), (ZeroDivisionError("secret"), "internal")]
)
def test_an_error_in_midstream_is_an_event_and_the_end(client: TestClient, id_of_byte, error, kind) -> None:
    service = client.app.state.service
    asked = CompletionRequest.model_validate({"model": "gelu", "prompt": [1], "stream": True, "temperature": 0})
    script = Script([id_of_byte[byte] for byte in b"abcdef"], fails_after=3, error=error)

    async def sent() -> bytes:
        events = await stream(asked, service.library, script, service.settings, "req-7")
        return b"".join([chunk async for chunk in events])

    *chunks, last = events_of(asyncio.run(sent()).decode())
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "abc"
    ErrorAnswer.model_validate(last, strict=True)
    assert last["error"]["type"] == kind
    assert ("req-7" in last["error"]["message"]) == (kind == "internal")
    assert "secret" not in last["error"]["message"]


@pytest.mark.parametrize("when", ["before the first token", "in midstream"])
def test_work_ends_when_the_client_hangs_up(client: TestClient, id_of_byte, when: str) -> None:
    service = client.app.state.service
    asked = CompletionRequest.model_validate({"model": "gelu", "prompt": [1], "stream": True, "temperature": 0})

    async def before() -> None:
        script = Script([])
        script._run = lambda job: asyncio.Event().wait()
        begun = asyncio.ensure_future(stream(asked, service.library, script, service.settings, "id"))
        await asyncio.sleep(0.05)
        begun.cancel()
        await asyncio.wait_for(script.cancelled.wait(), 10)

    async def amid() -> None:
        script = Script([id_of_byte[byte] for byte in b"abcdef"], fails_after=3)
        events = await stream(asked, service.library, script, service.settings, "id")
        gone = asyncio.Event()
        sent: list[Any] = []

        async def receive() -> dict[str, Any]:
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)
            if b'"c"' in message.get("body", b""):
                gone.set()

        done: list[Any] = []
        await asyncio.wait_for(EventStream(events, done.append)({"type": "http"}, receive, send), 10)
        await asyncio.wait_for(script.cancelled.wait(), 10)
        assert not done
        assert b"[DONE]" not in b"".join(message.get("body", b"") for message in sent)

    asyncio.run(before() if when == "before the first token" else amid())


# Text.


@many
@given(st.lists(st.integers(0, V - 1), max_size=25))
def test_the_detokenizers_pieces_are_what_the_tokenizer_decodes(vocabulary: Vocabulary, ids: list[int]) -> None:
    detokenizer = Detokenizer(vocabulary)
    assert "".join(map(detokenizer.feed, ids)) + detokenizer.flush() == vocabulary.decode(ids)[0]


@many
@given(st.lists(st.integers(0, V - 1), max_size=25), st.integers(0, 25))
def test_a_text_goes_on_where_a_prompt_ends(vocabulary: Vocabulary, ids: list[int], at: int) -> None:
    before, after = ids[:at], ids[at:]
    first, second = Detokenizer(vocabulary), Detokenizer(vocabulary, before, finish=True)
    said = "".join(map(first.feed, before))
    assert said + "".join(map(second.feed, after)) + second.flush() == vocabulary.decode(ids)[0]


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    """A tokenizer of Llama 2's kind: blanks as U+2581, bytes as <0xE2>, the first blank dropped, <s> put before."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "ab", "é"]
    ids = {token: at for at, token in enumerate(tokens)}
    merges = [("▁", "a"), ("a", "b")]
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<unk>", "<s>", "</s>")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", ids["<s>"])])
    path = tmp_path_factory.mktemp("sentencepiece") / "tokenizer.json"
    tokenizer.save(str(path))
    return Vocabulary(path)


@many
@given(st.text("ab é€😀", max_size=20), st.integers(0, 10))
def test_other_decoders_keep_blanks_and_characters_too(sentencepiece: Vocabulary, text: str, at: int) -> None:
    ids = sentencepiece.encode(text, special_tokens=False)
    whole = sentencepiece.decode(ids)[0]
    first, second = Detokenizer(sentencepiece), Detokenizer(sentencepiece, ids[:at], finish=True)
    said = "".join(map(first.feed, ids[:at]))
    assert "\ufffd" not in said
    after = "".join(map(second.feed, ids[at:]))
    assert said + after + second.flush() == whole
    assert said + after == whole, "nothing is left"
    assert sentencepiece.around(text) == (1, 0)
    assert sentencepiece.eos_id == 2


def test_two_tokens_of_one_text_keep_apart(sentencepiece: Vocabulary) -> None:
    a, blank_a = sentencepiece.encode("aa", special_tokens=False)[1], sentencepiece.encode("a", special_tokens=False)[0]
    assert a != blank_a
    rows = rows_for([a])
    for own, other in ((a, blank_a), (blank_a, a)):
        entries = Listing(sentencepiece, 1, [a, blank_a, 299], as_ids=False).entries(rows, slice(None), [own], [0])
        assert entries.tokens == ["a"]
        (top,) = entries.top_logprobs
        assert list(top) == ["a", f"token_id:{other}", "token_id:299"], "299 is no token of the tokenizer's"
        assert top["a"] == entries.token_logprobs[0]
        assert (top["a"] > top[f"token_id:{other}"]) == (own == a)


def test_what_the_tokenizer_puts_before_a_prompt_has_no_text(client: TestClient, sentencepiece: Vocabulary) -> None:
    service = client.app.state.service
    variant = dataclasses.replace(service.library.variants["gelu"], vocabulary=sentencepiece)
    library = Library({"gelu": variant}, (), ())
    said = sentencepiece.encode("b a😀", special_tokens=False)[1:]

    def scored(**body: object) -> dict[str, Any]:
        fields = {"model": "gelu", "temperature": 0, "max_tokens": len(said), "echo": True, "logprobs": 0, **body}
        asked = CompletionRequest.model_validate(fields)
        return json.loads(asyncio.run(complete(asked, library, Script(said), service.settings)).body)["choices"][0]

    by_text = scored(prompt="ab b")
    assert by_text["text"] == "ab bb a😀"
    prompt_tokens = 1 + len(sentencepiece.encode("ab b", special_tokens=False))
    assert by_text["logprobs"]["text_offset"][:2] == [0, 0]
    assert by_text["logprobs"]["tokens"][0] == "<s>"
    assert by_text["logprobs"]["text_offset"][prompt_tokens:] == [4, 5, 7, 7, 7, 7]
    by_ids = scored(prompt=sentencepiece.encode("ab b"))
    assert by_ids["text"] == "<s> ab bb a😀", "of ids all is shown"
    assert scored(prompt="ab b", add_special_tokens=False)["text"] == by_text["text"]


def test_bytes_of_no_character_leave_their_neighbours_alone(sentencepiece: Vocabulary) -> None:
    """tokenizers gives U+FFFD for each byte of a run that holds one that is wrong; we for that one."""
    ids = [3 + byte for byte in "€".encode() + b"\xff\xe2"] + sentencepiece.encode(" a", special_tokens=False)
    detokenizer = Detokenizer(sentencepiece)
    assert [detokenizer.feed(id_) for id_ in ids] == ["", "", "€", "\ufffd", "", "\ufffd a"]


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


# What is refused, and what is let pass.


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
