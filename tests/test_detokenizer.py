"""Tokens to text, one at a time, against what the tokenizer says of all: byte-level, and of Llama 2's kind."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from completing import Script, V, completions_client, rows_for
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from service.completions import complete
from service.completions_schema import CompletionRequest
from service.detokenizer import Detokenizer
from service.library import Library
from service.logprobs import Listing
from service.vocabulary import Vocabulary

many = settings(max_examples=300, deadline=None)


@pytest.fixture(scope="module")
def client(bundles: Path) -> Iterator[TestClient]:
    with completions_client(bundles) as client:
        yield client


@pytest.fixture(scope="module")
def vocabulary(bundles: Path) -> Vocabulary:
    return Vocabulary(bundles / "gelu" / "tokenizer.json")


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
