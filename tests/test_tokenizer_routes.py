"""/tokenize, /detokenize and /tokenizer_info: what vLLM's clients and lm-eval's remote tokenizer send and read."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from conftest import HANG_S, serving
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, processors

from service.app import create_app
from service.schema import DetokenizeAnswer, ErrorAnswer, TokenizeAnswer, TokenizerInfo
from service.settings import Settings
from service.vocabulary import Vocabulary

JSON = {"content-type": "application/json"}
MAX_TEXT_BYTES, MAX_IDS = 10_000, 5_000
small = settings(max_examples=100, deadline=None)


@pytest.fixture(scope="module")
def client(bundles: Path) -> Iterator[TestClient]:
    limits = {"max_text_bytes": MAX_TEXT_BYTES, "max_entries": MAX_IDS}
    app = create_app(Settings(bundles=bundles, provider="cpu", threads=1, **limits))
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


@pytest.fixture(scope="module")
def tokenizer(bundles: Path) -> Tokenizer:
    return Tokenizer.from_file(str(bundles / "gelu" / "tokenizer.json"))


@pytest.fixture
def with_tokenizer(bundles: Path, tmp_path: Path) -> Callable[[str, Callable[[Tokenizer], None]], TestClient]:
    """`with_tokenizer(name, change)`: a service on the bundles, the one called `name` with a changed tokenizer."""

    def make(name: str, change: Callable[[Tokenizer], None]) -> TestClient:
        shutil.copytree(bundles, tmp_path, dirs_exist_ok=True)
        path = tmp_path / name / "tokenizer.json"
        changed = Tokenizer.from_file(str(path))
        change(changed)
        changed.save(str(path))
        manifest = json.loads((tmp_path / name / "manifest.json").read_text())
        manifest["files"]["tokenizer.json"] = hashlib.sha256(path.read_bytes()).hexdigest()
        (tmp_path / name / "manifest.json").write_text(json.dumps(manifest))
        return TestClient(create_app(Settings(bundles=tmp_path, provider="cpu", threads=1)))

    return make


def put_bos_before(tokenizer: Tokenizer) -> None:
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )


def ask(client: TestClient, path: str, **body: object) -> dict[str, Any]:
    response = client.post(path, content=json.dumps(body).encode(), headers=JSON)
    assert response.status_code == 200, response.text
    return response.json()


def refusal(response: Any, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    ErrorAnswer.model_validate(response.json(), strict=True)
    return response.json()["error"]


@pytest.mark.parametrize("prefix", ["", "/v1"])
def test_the_answers_have_the_promised_shapes(client: TestClient, tokenizer: Tokenizer, prefix: str) -> None:
    ids = tokenizer.encode("if x is not").ids
    told = ask(client, f"{prefix}/tokenize", prompt="if x is not", add_special_tokens=False)
    assert told == {"count": len(ids), "max_model_len": 32, "tokens": ids, "token_strs": None}
    TokenizeAnswer.model_validate(told, strict=True)
    assert ask(client, f"{prefix}/detokenize", tokens=ids) == {"prompt": "if x is not"}
    info = client.get(f"{prefix}/tokenizer_info").json()
    TokenizerInfo.model_validate(info, strict=True)
    assert info["models"] == ["gelu", "gelu-sigmoid-head", "swiglu"]


def test_what_lm_eval_does_with_a_remote_tokenizer(client: TestClient) -> None:
    """lm_eval/utils.py, RemoteTokenizer: eos_token must be a key; its id is the first of its encoding."""
    info = client.get("/tokenizer_info").json()
    assert {"bos_token", "eos_token", "pad_token", "chat_template"} <= info.keys()
    assert info["eos_token"] == info["bos_token"] == "<|endoftext|>"
    assert ask(client, "/tokenize", prompt=info["eos_token"], add_special_tokens=False)["tokens"] == [0]
    assert ask(client, "/detokenize", tokens=[0])["prompt"] == info["eos_token"], "special tokens are kept"
    assert ask(client, "/tokenize", prompt="", add_special_tokens=False)["tokens"] == []
    assert ask(client, "/detokenize", tokens=[])["prompt"] == ""


def test_token_strings_are_as_the_vocabulary_spells_them(client: TestClient, tokenizer: Tokenizer) -> None:
    told = ask(client, "/tokenize", prompt="a é", return_token_strs=True)
    assert told["token_strs"] == [tokenizer.id_to_token(id_) for id_ in told["tokens"]]
    assert "".join(told["token_strs"]).startswith("aĠ"), "and not as text, in which a part of é is nothing"


@pytest.mark.parametrize("model", [None, "gelu", "*"])
def test_a_model_may_be_named(client: TestClient, model: str | None) -> None:
    assert ask(client, "/tokenize", prompt="a", model=model)["count"] == 1
    assert ask(client, "/detokenize", tokens=[65], model=model)
    assert client.get("/tokenizer_info", params={"model": model} if model else {}).status_code == 200


def test_special_tokens_are_added_where_the_tokenizer_has_any(with_tokenizer: Callable) -> None:
    with with_tokenizer("gelu", put_bos_before) as client:
        plain = ask(client, "/tokenize", prompt="a", model="gelu", add_special_tokens=False)["tokens"]
        assert ask(client, "/tokenize", prompt="a", model="gelu")["tokens"] == [0, *plain]


def test_a_model_must_be_named_where_the_tokenizers_differ(with_tokenizer: Callable) -> None:
    with with_tokenizer("gelu", put_bos_before) as client:
        for response in (
            client.post("/tokenize", json={"prompt": "a"}),
            client.post("/detokenize", json={"tokens": [1]}),
            client.get("/tokenizer_info"),
        ):
            error = refusal(response, 422)
            assert error["param"] == "model"
            assert "2 different tokenizers: gelu; gelu-sigmoid-head, swiglu" in error["message"]
        assert ask(client, "/tokenize", prompt="a", model="swiglu")["count"] == 1
        assert client.get("/tokenizer_info", params={"model": "gelu"}).json()["models"] == ["gelu"]


def test_where_variants_differ_in_context_the_shortest_counts(client: TestClient) -> None:
    variant = client.app.state.service.library.variants["swiglu"]
    manifest = variant.manifest
    object.__setattr__(variant, "manifest", manifest.model_copy(update={"context": 16}))
    try:
        assert ask(client, "/tokenize", prompt="a")["max_model_len"] == 16
        assert ask(client, "/tokenize", prompt="a", model="gelu")["max_model_len"] == 32
    finally:
        object.__setattr__(variant, "manifest", manifest)


@pytest.mark.parametrize(
    ("name", "part", "special"),
    [
        ("llama 2", "bos_token", "<s>"),
        ("llama 2", "eos_token", "</s>"),
        ("llama 3", "bos_token", "<|begin_of_text|>"),
        ("llama 3", "eos_token", "<|end_of_text|>"),
        ("neox", "pad_token", "<|padding|>"),
    ],
)
def test_special_tokens_are_known_by_their_published_names(
    tokenizer: Tokenizer, tmp_path: Path, name: str, part: str, special: str
) -> None:
    named = {"llama 2": ["<s>", "</s>"], "llama 3": ["<|begin_of_text|>", "<|end_of_text|>"], "neox": ["<|padding|>"]}
    other = Tokenizer.from_str(tokenizer.to_str())
    other.add_special_tokens(named[name])
    other.save(str(tmp_path / "tokenizer.json"))
    assert Vocabulary(tmp_path / "tokenizer.json").special_tokens[part] == special


def test_what_is_put_before_a_prompt_is_its_first_token_whatever_its_name(tokenizer: Tokenizer, tmp_path: Path) -> None:
    other = Tokenizer.from_str(tokenizer.to_str())
    other.add_special_tokens(["<s>", "<start>"])
    id_ = other.token_to_id("<start>")
    other.post_processor = processors.TemplateProcessing(single="<start> $A", special_tokens=[("<start>", id_)])
    other.save(str(tmp_path / "tokenizer.json"))
    assert Vocabulary(tmp_path / "tokenizer.json").special_tokens["bos_token"] == "<start>"


def test_bytes_are_told_where_the_text_is_no_utf_8(client: TestClient, tokenizer: Tokenizer) -> None:
    """As in next-token answers; a U+FFFD that somebody wrote is text."""
    euro = tokenizer.encode("€").ids
    assert len(euro) > 1, "the tiny vocabulary has it in parts"
    assert ask(client, "/detokenize", tokens=euro) == {"prompt": "€"}
    assert ask(client, "/detokenize", tokens=[0, *euro[:-1]]) == {
        "prompt": "<|endoftext|>\ufffd",
        "bytes": list(b"<|endoftext|>" + "€".encode()[:-1]),
    }
    assert ask(client, "/detokenize", tokens=tokenizer.encode("\ufffd").ids) == {"prompt": "\ufffd"}


@small
@given(ids=st.lists(st.integers(0, 299), max_size=40))
def test_any_ids_have_a_text_and_their_bytes_agree_with_it(client: TestClient, ids: list[int]) -> None:
    told = ask(client, "/detokenize", tokens=ids)
    DetokenizeAnswer.model_validate(told, strict=True)
    if "bytes" in told:
        assert bytes(told["bytes"]).decode(errors="replace") == told["prompt"]
        with pytest.raises(UnicodeDecodeError):
            bytes(told["bytes"]).decode()


@small
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=60))
def test_any_text_comes_back(client: TestClient, text: str) -> None:
    ids = ask(client, "/tokenize", prompt=text, add_special_tokens=False)["tokens"]
    assert ask(client, "/detokenize", tokens=ids) == {"prompt": text}


def test_an_id_without_a_token_has_no_text(client: TestClient) -> None:
    """A model's vocabulary may be larger than its tokenizer's."""
    variants = client.app.state.service.library.variants.values()
    kept = [variant.manifest for variant in variants]
    for variant in variants:
        object.__setattr__(variant, "manifest", variant.manifest.model_copy(update={"vocab_size": 400}))
    try:
        assert (
            ask(client, "/detokenize", tokens=[399, 65, 399])["prompt"]
            == ask(client, "/detokenize", tokens=[65])["prompt"]
        )
    finally:
        for variant, manifest in zip(variants, kept, strict=True):
            object.__setattr__(variant, "manifest", manifest)


@pytest.mark.parametrize(
    ("path", "status", "says", "body"),
    [
        ("/tokenize", 422, "Field required", {}),
        ("/tokenize", 422, "string", {"prompt": 5}),
        ("/tokenize", 422, "string", {"prompt": ["a"]}),
        ("/tokenize", 422, "U+0000", {"prompt": "a\0"}),
        ("/tokenize", 422, "U+D800", {"prompt": "a\ud800"}),
        ("/tokenize", 422, "boolean", {"prompt": "a", "add_special_tokens": 1}),
        ("/tokenize", 422, "known: model, prompt", {"messages": [{"role": "user", "content": "a"}]}),
        ("/tokenize", 422, "did you mean 'add_special_tokens'", {"prompt": "a", "add_special_token": True}),
        ("/tokenize", 404, "did you mean 'swiglu'?", {"prompt": "a", "model": "swigul"}),
        ("/tokenize", 422, "string", {"prompt": "a", "model": ["gelu"]}),
        ("/tokenize", 413, "10001 bytes; allowed: 10000", {"prompt": "a" * 10_001}),
        ("/tokenize", 413, "12000 bytes; allowed: 10000", {"prompt": "é" * 6_000}),
        ("/detokenize", 422, "Field required", {}),
        ("/detokenize", 422, "list", {"tokens": "a"}),
        ("/detokenize", 422, "tokens[1]", {"tokens": [1, 1.5]}),
        ("/detokenize", 422, "tokens[0]", {"tokens": [True]}),
        ("/detokenize", 422, "tokens[0]", {"tokens": [None]}),
        ("/detokenize", 422, "tokens[1] is the id -1; there are 0 to 299", {"tokens": [1, -1]}),
        ("/detokenize", 422, "there are 0 to 299", {"tokens": [300]}),
        ("/detokenize", 422, "there are 0 to 299", {"tokens": [10**40]}),
        ("/detokenize", 404, "unknown variant", {"tokens": [1], "model": "no"}),
        ("/detokenize", 413, "5001 ids; allowed: 5000", {"tokens": [1] * 5_001}),
    ],
)
@pytest.mark.parametrize("prefix", ["", "/v1"])
def test_what_is_wrong_is_refused(
    client: TestClient, prefix: str, path: str, status: int, says: str, body: dict[str, object]
) -> None:
    response = client.post(prefix + path, content=json.dumps(body).encode(), headers=JSON)
    assert says in refusal(response, status)["message"]


def test_an_unknown_model_has_no_tokenizer(client: TestClient) -> None:
    assert "did you mean 'gelu'" in refusal(client.get("/tokenizer_info", params={"model": "gelo"}), 404)["message"]
    refusal(client.get("/tokenizer_info?model=%ff%00"), 404)
    refusal(client.get("/tokenizer_info?model="), 404)


def test_a_parameter_that_would_be_passed_over_is_refused(client: TestClient) -> None:
    for query, says in (("modle=gelu", "did you mean 'model'?"), ("model=gelu&model=swiglu", "model is given 2 times")):
        assert says in refusal(client.get(f"/v1/tokenizer_info?{query}"), 422)["message"]


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.text(st.characters(categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)


@small
@given(
    path=st.sampled_from(["/tokenize", "/detokenize"]),
    body=st.fixed_dictionaries(
        {},
        optional={
            "model": st.sampled_from(["gelu", "*"]) | anything,
            "prompt": st.text(max_size=40) | anything,
            "tokens": st.lists(st.integers(-1, 310), max_size=40) | anything,
            "add_special_tokens": anything,
            "return_token_strs": anything,
        },
    )
    | anything,
)
def test_no_json_is_answered_with_500(client: TestClient, path: str, body: object) -> None:
    response = client.post(path, content=json.dumps(body).encode(), headers=JSON)
    if response.status_code != 200:
        refusal(response, response.status_code)
        assert response.status_code in (400, 404, 422)


def test_a_large_text_and_its_ids_are_answered_whole(client: TestClient, tokenizer: Tokenizer) -> None:
    """Those go to a thread."""
    words = random.Random(0).choices(["if", "x", "is", "not", "€", "None", "\n"], k=1_200)
    text = " ".join(words)
    told = ask(client, "/tokenize", prompt=text, add_special_tokens=False)
    assert told["tokens"] == tokenizer.encode(text).ids
    assert told["count"] == len(told["tokens"]) > 2_000
    assert ask(client, "/detokenize", tokens=told["tokens"]) == {"prompt": text}
    message = refusal(client.post("/detokenize", json={"tokens": [*told["tokens"], 300]}), 422)["message"]
    assert f"tokens[{told['count']}]" in message


def test_large_texts_are_taken_one_at_a_time_and_may_wait_too_long(
    bundles: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = create_app(Settings(bundles=bundles, provider="cpu", threads=1, timeout_s=2))
    vocabulary = app.state.service.library.variants["gelu"].vocabulary
    running, most, lock = 0, 0, threading.Lock()

    def slow(text: str, **_: object) -> list[int]:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.9)
        with lock:
            running -= 1
        return [1]

    monkeypatch.setattr(vocabulary, "encode", slow)
    with TestClient(app) as client:
        statuses: list[int] = []
        body = {"prompt": "a" * 5_000}
        threads = [
            threading.Thread(target=lambda: statuses.append(client.post("/tokenize", json=body).status_code))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert most == 1
    assert set(statuses) == {200, 408}


def test_others_are_answered_during_a_long_text(bundles: Path) -> None:
    """The largest text that is allowed, with its tokens spelt."""
    body = {"prompt": "a'" * (1 << 17), "return_token_strs": True}
    with serving(bundles) as (url, _), httpx.Client(base_url=url, timeout=HANG_S) as http:
        worst_s, took_s, answers = 0.0, 0.0, []

        def long() -> None:
            nonlocal took_s
            began = time.monotonic()
            answers.append(httpx.post(f"{url}/tokenize", json=body, timeout=HANG_S))
            took_s = time.monotonic() - began

        thread = threading.Thread(target=long)
        assert http.get("/health/live").status_code == 200
        thread.start()
        while thread.is_alive():
            began = time.monotonic()
            assert http.get("/health/live").status_code == 200
            worst_s = max(worst_s, time.monotonic() - began)
        assert answers[0].status_code == 200
        assert answers[0].json()["count"] == 1 << 18
        assert worst_s < took_s / 2, "with the GIL held or on the event loop it is nearly all of it"


def test_the_document_describes_them(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    assert {"/v1/tokenize", "/v1/detokenize", "/v1/tokenizer_info"} <= document["paths"].keys()
    for name in ("TokenizeRequest", "DetokenizeRequest"):
        example = document["components"]["schemas"][name]["examples"][0]
        assert ask(client, f"/v1/{name.removesuffix('Request').lower()}", **example)
