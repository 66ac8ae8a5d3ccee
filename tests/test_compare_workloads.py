"""What a comparison sends: prompts read and refused, cut to lengths, cold and warm, and streams timed."""

from __future__ import annotations

import itertools
import json
import math
import random
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actuary import BadInput
from loadtest import plan
from loadtest.compare import prompts
from loadtest.compare.arms import Arms
from loadtest.compare.prompts import Lengths, built_in, cut_corpus, make_workload, read_prompts, read_traffic
from loadtest.compare.stream import lines, read_stream
from loadtest.compare.workloads import COMPLETIONS, FRESH_TOKENS, NEXT_TOKEN, Bodies, Request, Workload


class _Arms(Arms):
    """Two arms whose tokenizer makes an id of each byte."""

    def __init__(self, contexts: tuple[int, int] = (64, 48), tokenizers: tuple[str, str] = ("a", "a")) -> None:
        facts = {
            name: {"context": context, "vocab_size": 256 + n, "files": {"tokenizer.json": tokenizer}}
            for n, (name, context, tokenizer) in enumerate(zip(("gelu", "swiglu"), contexts, tokenizers, strict=True))
        }
        super().__init__("http://h", facts)

    def _ask(self, path: str, body: Any) -> Any:
        assert path == "/tokenize"
        ids = list(body["prompt"].encode())
        return {"tokens": ids if body["model"] == "gelu" else [*ids, 0]}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def written(*documents: Any, name: str = "prompts.jsonl") -> Path:
        path = tmp_path / name
        text = [each if isinstance(each, str) else json.dumps(each) for each in documents]
        path.write_text("\n".join(text), encoding="utf-8")
        return path

    return written


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_file_of_prompts_holds_texts_ids_and_how_many_tokens_to_generate(write: Callable[..., Path]) -> None:
    path = write('"ab"', [1, 2, 3], "", {"prompt": "abc"}, {"prompt": [7], "max_tokens": 4})
    workload = make_workload(read_prompts(path), _Arms())
    assert workload.requests == (
        Request((97, 98)), Request((1, 2, 3)), Request((97, 98, 99)), Request((7,), max_tokens=4),
    )  # fmt: skip
    assert workload.tokens == (2, 3, 3, 1)
    assert workload.streamed
    facts = workload.facts()
    assert facts["prompt_tokens"] == {"min": 1, "mean": 2.25, "max": 3}
    assert (facts["sent_as"], facts["cache"]) == ("ids", "cold")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", r"line 2 is not JSON"),
        ('{"prompt": ""}', r"line 2: prompt must be a text or a list of token ids, not empty; it is ''"),
        ('{"prompt": []}', r"line 2: prompt must be .* it is \[\]"),
        ('{"prompt": [1, -1]}', r"line 2: prompt must be .* it is \[1, -1\]"),
        ('{"prompt": [1, true]}', r"line 2: prompt must be"),
        ("17", r"line 2: prompt must be .* it is 17"),
        ('{"text": "a"}', r"line 2: unknown field 'text'; known: max_tokens, prompt"),
        ('{"prompt": "a", "max_tokens": -1}', r"line 2: max_tokens must be a whole number from 0, not -1"),
        ('{"prompt": "a", "max_tokens": true}', r"line 2: max_tokens .* not True"),
        ('"\\ud800"', r"line 2: a lone surrogate"),
        ("[" * 100_000, r"line 2 is not JSON"),
    ],
)
def test_a_bad_line_is_told_by_its_number(write: Callable[..., Path], line: str, said: str) -> None:
    with pytest.raises(BadInput, match=said) as refused:
        read_prompts(write('"fine"', line))
    assert refused.value.exit_code == 2


@pytest.mark.parametrize("name", ["prompts.jsonl", "prompts.txt"])
def test_an_empty_file_is_refused(write: Callable[..., Path], name: str) -> None:
    with pytest.raises(BadInput, match="holds no"):
        read_prompts(write("", "  ", name=name))
    with pytest.raises(BadInput, match="cannot be read"):
        read_prompts(Path("/nowhere") / name)


def test_what_one_of_the_arms_cannot_take_is_refused_by_name(write: Callable[..., Path]) -> None:
    for prompt, completions, said in (
        ([1] * 49, 0, "line 1 has 49 tokens, over the context of 'swiglu', 48"),
        ([1] * 45, 4, "line 1 has 45 tokens and 4 to generate, over the context of 'swiglu', 48"),
        ([1, 256], 0, "line 1 holds the id 256; 'gelu' has 0 to 255"),
    ):
        with pytest.raises(BadInput, match=said):
            make_workload(read_prompts(write(prompt)), _Arms(), completions=completions)
    at_most = make_workload(read_prompts(write([255] * 45)), _Arms(), completions=3)
    assert at_most.requests[0].max_tokens == 3


def test_different_tokenizers_are_refused_unless_texts_are_asked(write: Callable[..., Path]) -> None:
    arms = _Arms(tokenizers=("a", "b"))
    with pytest.raises(BadInput, match=r"2 different tokenizers \(gelu, swiglu have one each\).*--texts"):
        make_workload(built_in(), arms)
    texts = read_prompts(write('"abc"'))
    workload = make_workload(texts, arms, texts=True)
    assert workload.requests[0].prompt == "abc"
    assert workload.tokens == (4,)  # by swiglu's, which makes more of it
    assert workload.facts()["sent_as"] == "texts"
    with pytest.raises(BadInput, match="this prompt is token ids"):
        make_workload(read_prompts(write([1])), arms, texts=True)
    # What makes a cold text another has to fit as well: 41 + swiglu's own one + 7 of 48.
    with pytest.raises(BadInput, match="42 tokens and up to 7 that make each text another, over the context"):
        make_workload(read_prompts(write(json.dumps("a" * 41))), arms, texts=True)
    make_workload(read_prompts(write(json.dumps("a" * 41))), arms, texts=True, cache="warm")


# --- lengths ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "written",
    ["", "64", "fixed:0", "fixed:-1", "fixed:1.5", "uniform:8", "uniform:9-8", "uniform:0-8", "uniform:1.5-8",
     "lognormal:64", "lognormal:0.5-1", "lognormal:nan-1", "normal:64-8", "fixed:64x"],
)  # fmt: skip
def test_a_distribution_that_is_none_is_refused(written: str) -> None:
    with pytest.raises(BadInput, match="--lengths"):
        Lengths.parse(written)


def test_lengths_have_the_distribution_that_was_asked() -> None:
    order = random.Random(1)
    assert {Lengths.parse("fixed:64").draw(order, 99) for _ in range(9)} == {64}
    uniform = [Lengths.parse("uniform:8-11").draw(order, 99) for _ in range(400)]
    assert {*uniform} == {8, 9, 10, 11}
    drawn = np.array([Lengths.parse("lognormal:64-32").draw(order, 10_000) for _ in range(20_000)])
    assert drawn.mean() == pytest.approx(64, rel=0.02)  # 32 / sqrt(20,000) = 0.23, so 0.35 %
    assert drawn.std() == pytest.approx(32, rel=0.08)
    assert (drawn < 64).mean() > 0.55  # its median lies below its mean
    short = [Lengths.parse("lognormal:64-32").draw(order, 70) for _ in range(500)]
    assert max(short) <= 70


def test_lengths_that_do_not_fit_are_refused() -> None:
    for written in ("fixed:49", "uniform:8-49", "lognormal:49-8"):
        with pytest.raises(BadInput, match="49 tokens are more than 48"):
            Lengths.parse(written).check(48)
        Lengths.parse(written).check(49)
    with pytest.raises(BadInput, match="hardly any length"):
        Lengths.parse("lognormal:1000-1").draw(random.Random(0), 9)


def test_a_corpus_is_cut_by_its_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "PIECE_CHARACTERS", 7)
    text = "".join(chr(33 + n % 90) for n in range(200))
    (tmp_path / "held-out.txt").write_text(text)

    def cut(lengths: str = "uniform:8-20", seed: int = 0, completions: int = 0) -> tuple[Request, ...]:
        return cut_corpus(tmp_path / "held-out.txt", Lengths.parse(lengths), _Arms(), completions, seed).requests

    requests = cut()
    assert len(requests) == 256
    assert {len(request.prompt) for request in requests} == {*range(8, 21)}
    assert all(bytes(request.prompt).decode() in text for request in requests)  # the ids as they stand in it
    assert cut() == requests != cut(seed=1)
    cut("fixed:48")
    with pytest.raises(BadInput, match="48 tokens are more than 40"):
        cut("fixed:48", completions=8)
    (tmp_path / "held-out.txt").write_text("short")
    with pytest.raises(BadInput, match=r"has 5 tokens, a prompt is to have \d+; give a longer text"):
        cut()
    (tmp_path / "held-out.txt").write_text(" ")
    with pytest.raises(BadInput, match="holds no text"):
        cut()


# --- recorded traffic -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"at_s": NaN, "prompt": "a"}', "line 2: at_s must be a number of seconds .* not nan"),
        ('{"at_s": Infinity, "prompt": "a"}', "line 2: at_s .* not inf"),
        ('{"at_s": -1, "prompt": "a"}', "line 2: at_s .* not -1"),
        ('{"at_s": ' + "9" * 400 + ', "prompt": "a"}', r"line 2: at_s .* not 9{57}\.\.\."),
        ('{"at_s": "1", "prompt": "a"}', "line 2: at_s .* not '1'"),
        ('{"at_s": true, "prompt": "a"}', "line 2: at_s .* not True"),
        ('{"prompt": "a"}', "line 2: at_s .* not None"),
        ('"a"', "line 2: expected"),
        ('{"at_s": 0.5, "prompt": "a"}', "line 2: at_s 0.5 is before the line above, 1; sort"),
    ],
)
def test_bad_traffic_is_told_by_its_line(write: Callable[..., Path], line: str, said: str) -> None:
    with pytest.raises(BadInput, match=said):
        read_traffic(write({"at_s": 1, "prompt": "a"}, line))


def test_traffic_is_replayed_with_its_own_timing(write: Callable[..., Path]) -> None:
    path = write(*({"at_s": 1000 + at, "prompt": "abc"} for at in (0, 1, 1, 5)))
    workload = make_workload(read_traffic(path), _Arms(), speed=2.0)
    assert workload.traffic
    assert [request.at_s for request in workload.requests] == [0, 1, 1, 5]
    period_s = 2.5 * (1 + 1 / 3)  # 5 s twice as fast, and a mean gap
    assert workload.period_s == pytest.approx(period_s)
    assert [*workload.due(0, 2.6)] == [(0, 0), (0.5, 1), (0.5, 2), (2.5, 3)]
    assert [*workload.due(0.5, 2.5)] == [(0.5, 1), (0.5, 2)]  # from its begin on, to before its end
    later = [*workload.due(2.0, 2 * period_s)]
    assert [number for _, number in later] == [3, 0, 1, 2, 3]  # it begins again
    assert [when_s for when_s, _ in later[1:]] == pytest.approx([period_s + at for at in (0, 0.5, 0.5, 2.5)])
    # Cut into windows, nothing is lost or sent twice.
    cuts = [*workload.due(0, 100)]
    windows = [each for at in range(100) for each in workload.due(at, at + 1)]
    assert windows == cuts


def test_traffic_of_one_request_has_no_timing(write: Callable[..., Path]) -> None:
    with pytest.raises(BadInput, match="one request"):
        read_traffic(write({"at_s": 1, "prompt": "a"}))
    at_once = make_workload(read_traffic(write(*[{"at_s": 1, "prompt": "a"}] * 3)), _Arms())
    assert len([*at_once.due(0, 1)]) == 3  # and does not go on for ever


# --- the file between the driver and Locust ---------------------------------------------------------------------------


def test_a_workload_comes_back_as_it_was_written(tmp_path: Path, write: Callable[..., Path]) -> None:
    path = write({"at_s": 0, "prompt": "é", "max_tokens": 2}, {"at_s": 0.1, "prompt": [1]})
    workload = make_workload(read_traffic(path), _Arms(), cache="warm", top_k=3, speed=1.5)
    workload.write(tmp_path / "workload.json")
    assert Workload.read(tmp_path / "workload.json") == workload
    for text in ("", "[]", "{}", '{"schema": 1}', '{"schema": 2}'):
        (tmp_path / "workload.json").write_text(text)
        with pytest.raises(BadInput, match="start the comparison anew"):
            Workload.read(tmp_path / "workload.json")


# --- cold and warm ----------------------------------------------------------------------------------------------------


def _bodies(workload: Workload, times: int = 1) -> list[tuple[str, dict[str, Any]]]:
    made = Bodies(workload, ["gelu", 'a"b'])
    numbers = itertools.product(range(times), range(len(workload.requests)), ["gelu", 'a"b'])
    return [(path, json.loads(body)) for path, body in (made.of(model, number) for _, number, model in numbers)]


def test_warm_prompts_are_sent_as_they_are() -> None:
    workload = Workload("here", (Request((5, 6, 7, 8)), Request('say "é"', max_tokens=3)), 256, "warm", top_k=2)
    (path, body), (_, other), (streamed, completion), _ = _bodies(workload)
    assert (path, body) == (NEXT_TOKEN, {"model": "gelu", "prompt": [5, 6, 7, 8], "top_k": 2})
    assert other["model"] == 'a"b'
    assert (streamed, completion["prompt"]) == (COMPLETIONS, 'say "é"')
    assert (completion["max_tokens"], completion["ignore_eos"], completion["temperature"]) == (3, True, 0)
    assert completion["stream"] is True
    assert "top_k" not in completion  # there it would be a sampling setting


def test_a_cold_prompt_keeps_its_length_and_never_begins_alike() -> None:
    ids = (*range(200, 210),)
    workload = Workload("here", (Request(ids), Request((9,)), Request("say é")), 256, "cold")
    sent = [body["prompt"] for _, body in _bodies(workload, times=200)]
    longer = [prompt for prompt in sent if len(prompt) == len(ids) and not isinstance(prompt, str)]
    assert len(longer) == 400
    assert {tuple(prompt[FRESH_TOKENS:]) for prompt in longer} == {ids[FRESH_TOKENS:]}
    # 400 draws of 256^3: two are the same in one of 200 runs, three in none.
    assert len({tuple(prompt[:FRESH_TOKENS]) for prompt in longer}) >= 399
    assert all(0 <= id_ < 256 for prompt in longer for id_ in prompt)
    assert all(len(prompt) == 1 for prompt in sent if not isinstance(prompt, str) and len(prompt) != len(ids))
    texts = [prompt for prompt in sent if isinstance(prompt, str)]
    assert all(text.endswith(" say é") and len(text) == 6 + len(" say é") for text in texts)
    assert len({*texts}) >= len(texts) - 2
    # Another process draws others, or a second run would find what the first one left in the server's cache.
    one, two = Bodies(workload, ["gelu"]), Bodies(workload, ["gelu"])
    assert [one.of("gelu", 0) for _ in range(9)] != [two.of("gelu", 0) for _ in range(9)]


def _post(url: str, path: str, body: str) -> bytes:
    request = urllib.request.Request(url + path, body.encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as response:
        return response.read()


def _models(url: str) -> dict[str, dict[str, Any]]:
    return {name: entry for name, entry in plan.served_models(url).items() if name in ("gelu", "swiglu")}


def test_the_service_finds_warm_prompts_in_its_cache_and_cold_ones_not(server_url: str) -> None:
    arms = Arms(server_url, _models(server_url))
    assert len(arms.tokenizers) == 1
    ids = arms.encode("if x is not None and y is not None:\n    return x + y", "gelu")[:24]
    found: dict[str, list[int]] = {"warm": [], "cold": []}
    for cache in ("warm", "cold"):
        workload = Workload("here", (Request(ids, max_tokens=2),), arms.vocab_sizes["gelu"], cache)
        if cache == "warm":
            arms.warm(workload)
        bodies = Bodies(workload, ["gelu", "swiglu"])
        for model in ("gelu", "swiglu") * 20:
            body = json.loads(bodies.of(model, 0)[1]) | {"stream": False}
            del body["stream_options"]
            usage = json.loads(_post(server_url, COMPLETIONS, json.dumps(body)))["usage"]
            found[cache].append(usage["prompt_tokens_details"]["cached_tokens"])
            assert usage["completion_tokens"] == 2
    assert {*found["warm"]} == {len(ids) - 1}  # the last token alone is computed
    # By chance a first token is one of 20 others' of 300, and hardly ever a second one too.
    assert max(found["cold"]) < FRESH_TOKENS
    assert np.mean(found["cold"]) < 0.5


# --- streams ----------------------------------------------------------------------------------------------------------


def _stream(*events: tuple[float, object]) -> Any:
    """Read events that arrive at these seconds, by a clock that stands in between."""
    now = [10.0]

    def arriving() -> Iterator[bytes]:
        for at_s, event in events:
            now[0] = 10.0 + at_s
            yield event if isinstance(event, bytes) else json.dumps(event).encode()

    return read_stream(arriving(), 10.0, lambda: now[0])


def _chunk(tokens: int, text: str = "x") -> dict[str, object]:
    return {"choices": [{"text": text}], "usage": {"completion_tokens": tokens}}


def test_a_stream_is_timed_by_its_tokens_not_by_its_chunks() -> None:
    # The first chunk brings one token, the second three, the third none: a character is not whole.
    timed = _stream(
        (0.030, _chunk(1)), (0.060, _chunk(4)), (0.065, _chunk(4, "")), (0.080, _chunk(5)),
        (0.0801, {"choices": [], "usage": {"completion_tokens": 5}}), (0.0802, b"[DONE]"),
    )  # fmt: skip
    assert timed.ttft_ms == pytest.approx(30)
    assert timed.itl_ms == pytest.approx(50 / 4)
    assert timed.latency_ms == pytest.approx(80.2)
    assert (timed.tokens, timed.failure) == (5, "")


def test_one_token_has_no_time_between() -> None:
    timed = _stream((0.03, _chunk(1)), (0.031, b"[DONE]"))
    assert timed.ttft_ms == pytest.approx(30)
    assert math.isnan(timed.itl_ms)


@pytest.mark.parametrize(
    ("events", "failure"),
    [
        ([], "stream: cut off before [DONE]"),
        ([_chunk(1)], "stream: cut off before [DONE]"),
        ([_chunk(1), {"error": {"type": "timeout"}}], "stream: timeout"),
        ([b"[DONE]"], "wrong answer: no token generated"),
        ([{"choices": [{}]}, b"[DONE]"], "wrong answer: an event that is no completion's (KeyError)"),
        ([b"{", b"[DONE]"], "wrong answer: an event that is no completion's (JSONDecodeError)"),
    ],
)
def test_a_stream_that_ends_badly_failed(events: list[object], failure: str) -> None:
    timed = _stream(*((0.01 * n, event) for n, event in enumerate(events)))
    assert timed.failure == failure


def test_events_are_split_as_they_come() -> None:
    answer = iter([b"data: {}\n", b"\n", b": a comment\n", b"data:[DONE]\r\n", b""])
    assert [*lines(lambda separator: next(answer))] == [b"{}", b"[DONE]"]


def test_the_services_own_stream_is_read(server_url: str) -> None:
    workload = Workload("here", (Request((5, 6, 7), max_tokens=9),), 300)
    path, body = Bodies(workload, ["gelu"]).of("gelu", 0)
    answer = iter([*_post(server_url, path, body).splitlines(keepends=True), b""])
    timed = read_stream(lines(lambda _: next(answer)), 0.0)
    assert (timed.tokens, timed.failure) == (9, "")
