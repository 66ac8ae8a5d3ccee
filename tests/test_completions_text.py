"""What tokens become in a completion, against plain definitions: text, stops, places, usage, errors in midstream.

A `Script` (completing.py) stands for the engine, where a test must say which tokens come: it feeds the readers rows
whose likeliest tokens are these.
"""

from __future__ import annotations

import asyncio
import codecs
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from completing import Script, V, completions_client, events_of, joined
from fastapi.testclient import TestClient
from hypothesis import example, given, settings
from hypothesis import strategies as st

from service.completions import complete
from service.completions_schema import CompletionRequest
from service.engine import Done, Rows
from service.errors import ApiError
from service.events import EventStream, stream
from service.schema import ErrorAnswer
from service.stops import Stops
from service.vocabulary import Vocabulary

many = settings(max_examples=300, deadline=None)


@pytest.fixture(scope="module")
def client(bundles: Path) -> Iterator[TestClient]:
    with completions_client(bundles) as client:
        yield client


@pytest.fixture(scope="module")
def vocabulary(bundles: Path) -> Vocabulary:
    return Vocabulary(bundles / "gelu" / "tokenizer.json")


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
