"""The Open Inference Protocol: its numbers against /v1/next-token's, what it refuses, and its stock clients."""

from __future__ import annotations

import asyncio
import gzip
import json
import math
import subprocess
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest
from conftest import HANG_S, counted_batches
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from service import inference_wire
from service.app import create_app
from service.settings import Settings

CLIENTS = Path(__file__).parent / "clients"
OUTPUTS = ("logits", "softmax", "sigmoid")
MAX_BODY_BYTES = 20_000
V = 300  # of the tiny bundles; their context is 32
INFER = "/v2/models/gelu/infer"
PROMPTS = [[5, 6, 7], [8, 9], [299]]
Arrays = dict[str, NDArray[np.float32]]


@pytest.fixture(scope="module")
def client(bundles: Path) -> Iterator[TestClient]:
    limits = {"max_prompts": 64, "max_body_bytes": MAX_BODY_BYTES}
    app = create_app(Settings(bundles=bundles, provider="cpu", threads=1, **limits))
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


def tensor(name: str, values: Any, **fields: Any) -> dict:
    array = np.array(values)
    return {"name": name, "datatype": "INT64", "shape": list(array.shape), "data": array.ravel().tolist(), **fields}


def padded(prompts: list[list[int]], padding: int = 0) -> list[dict]:
    """Both inputs."""
    longest = max(map(len, prompts))
    ids = [prompt + [padding] * (longest - len(prompt)) for prompt in prompts]
    return [tensor("input_ids", ids), tensor("lengths", [len(prompt) for prompt in prompts])]


def in_binary(request: dict) -> tuple[bytes, dict[str, str]]:
    """The request with its inputs' numbers after the JSON object, and the headers that say so."""
    inputs, tail = [], b""
    for each in request["inputs"]:
        numbers = np.array(each["data"], "<i8").tobytes()
        tail += numbers
        inputs.append({**each, "parameters": {"binary_data_size": len(numbers)}})
        del inputs[-1]["data"]
    head = json.dumps({**request, "inputs": inputs}).encode()
    return head + tail, {"inference-header-content-length": str(len(head))}


def arrays(response: Any) -> Arrays:
    """The tensors of an answer, in JSON and in binary, held to what the protocol says of its shape."""
    assert response.status_code == 200, response.text
    length = response.headers.get("inference-header-content-length")
    kind = "application/json" if length is None else "application/octet-stream"
    assert response.headers["content-type"] == kind
    head = response.content if length is None else response.content[: int(length)]
    tail = response.content[len(head) :]
    body = json.loads(head)
    assert set(body) == {"model_name", "model_version", "id", "outputs"}
    assert body["model_version"] == "1"
    found = {}
    for output in body["outputs"]:
        assert output["datatype"] == "FP32"
        if "data" in output:
            assert set(output) == {"name", "datatype", "shape", "data"}
            numbers = np.array(output["data"], np.float32)
        else:
            size = output["parameters"]["binary_data_size"]
            numbers, tail = np.frombuffer(tail[:size], "<f4"), tail[size:]
        found[output["name"]] = numbers.reshape(output["shape"])
    assert not tail
    return found


def infer(client: TestClient, **request: Any) -> Arrays:
    return arrays(client.post(INFER, json={"inputs": padded(PROMPTS), **request}))


def by_next_token(post: Callable[..., Any], model: str, prompts: list[list[int]]) -> Arrays:
    """The same from /v1/next-token: [B, V] each."""
    body = post("/v1/next-token", json={"model": model, "prompt": prompts, "top_k": V}).json()
    found = {name: np.zeros((len(prompts), V), np.float32) for name in OUTPUTS}
    for result in body["results"]:
        for entry in result["top"]:
            for name, field in zip(OUTPUTS, ("logit", "softmax", "sigmoid"), strict=True):
                found[name][result["prompt_index"], entry["id"]] = entry[field]
    return found


def assert_equal(found: Arrays, expected: Arrays, bound: float) -> None:
    """Two runs are within d = 2 * bound * max|logit| of each other, `bound` from the manifest's parity.

    The sigmoid's slope is at most 1/4, a softmax probability p moves by at most p (exp(2 d) - 1); 1e-7: a
    probability's last float32 digit.
    """
    d = 2 * bound * np.abs(expected["logits"]).max()
    moves = {"logits": d, "softmax": expected["softmax"] * math.expm1(2 * d) + 1e-7, "sigmoid": d / 4 + 1e-7}
    assert found
    for name, values in found.items():
        assert values.shape == expected[name].shape
        off = np.abs(values - expected[name]) - moves[name]
        at = np.unravel_index(off.argmax(), off.shape)
        assert off[at] <= 0, f"{name}{[int(i) for i in at]}: {values[at]} for {expected[name][at]}"


@pytest.fixture(scope="module")
def bound(client: TestClient) -> float:
    return max(model["parity"]["bound"] for model in client.get("/v1/models").json()["data"])


@pytest.mark.parametrize("model", ["gelu", "swiglu", "gelu-sigmoid-head"])
@pytest.mark.parametrize("form", ["json", "binary"])
def test_the_numbers_are_those_of_next_token(client: TestClient, bound: float, model: str, form: str) -> None:
    expected = by_next_token(client.post, model, PROMPTS)
    request = {"id": "mine", "inputs": padded(PROMPTS)}
    if form == "json":
        response = client.post(f"/v2/models/{model}/infer", json=request)
        assert response.json()["id"] == "mine"
        assert response.json()["model_name"] == model
    else:
        content, headers = in_binary({**request, "parameters": {"binary_data_output": True}})
        response = client.post(f"/v2/models/{model}/infer", content=content, headers=headers)
    found = arrays(response)
    assert tuple(found) == OUTPUTS
    assert_equal(found, expected, bound)
    other = by_next_token(client.post, model, PROMPTS[::-1])
    with pytest.raises(AssertionError):  # the tolerance can fail
        assert_equal(found, other, bound)


def test_only_what_is_asked_for_in_the_order_asked(client: TestClient, bound: float) -> None:
    whole = infer(client)
    for names in (["softmax"], ["sigmoid", "logits"]):
        found = infer(client, outputs=[{"name": name} for name in names])
        assert list(found) == names
        assert_equal(found, whole, bound)
    assert list(infer(client, outputs=[])) == list(OUTPUTS)


def test_an_output_says_more_than_the_request(client: TestClient, bound: float) -> None:
    """`binary_data` of an output comes before `binary_data_output` of the request."""
    whole = infer(client)
    outputs = [
        {"name": "softmax"},
        {"name": "logits", "parameters": {"binary_data": False}},
        {"name": "sigmoid", "parameters": {"binary_data": True, "of_another_extension": [1]}},
    ]
    for default, in_json in ((True, {"logits"}), (False, {"softmax", "logits"}), (None, {"softmax", "logits"})):
        request = {"inputs": padded(PROMPTS), "outputs": outputs, "parameters": {"binary_data_output": default}}
        response = client.post(INFER, json=request)
        found = arrays(response)
        assert list(found) == ["softmax", "logits", "sigmoid"]
        head = json.loads(response.content[: int(response.headers["inference-header-content-length"])])
        assert {output["name"] for output in head["outputs"] if "data" in output} == in_json
        assert_equal(found, whole, bound)


def test_padding_is_not_looked_at(client: TestClient, bound: float) -> None:
    whole = infer(client)
    for padding in (-100, 300, 2**62):
        assert_equal(infer(client, inputs=padded(PROMPTS, padding)), whole, bound)


def test_without_lengths_every_prompt_is_whole(client: TestClient, bound: float) -> None:
    expected = by_next_token(client.post, "gelu", [[5, 6, 7], [8, 9, 0]])
    found = infer(client, inputs=[tensor("input_ids", [[5, 6, 7], [8, 9, 0]])])
    assert_equal(found, expected, bound)


def test_nested_data_is_flat_data(client: TestClient, bound: float) -> None:
    ids, lengths = padded(PROMPTS)
    nested = {**ids, "data": np.reshape(ids["data"], ids["shape"]).tolist()}
    assert_equal(infer(client, inputs=[lengths, nested]), infer(client, inputs=[ids, lengths]), bound)


def test_one_input_in_binary_and_one_in_json(client: TestClient, bound: float) -> None:
    ids, lengths = padded(PROMPTS)
    for binary, plain in ((ids, lengths), (lengths, ids)):
        content, _ = in_binary({"inputs": [binary]})
        tail = np.array(binary["data"], "<i8").tobytes()
        head = json.loads(content[: -len(tail)])
        head["inputs"].append(plain)
        text = json.dumps(head).encode()
        headers = {"inference-header-content-length": str(len(text))}
        assert_equal(arrays(client.post(INFER, content=text + tail, headers=headers)), infer(client), bound)


def test_a_batch_equals_its_singles(client: TestClient, bound: float) -> None:
    prompts = [[n] * (1 + n % 32) for n in range(64)]
    whole = infer(client, inputs=padded(prompts))
    for at in (0, 31, 40, 63):
        single = infer(client, inputs=padded([prompts[at]]))
        assert_equal(single, {name: values[at : at + 1] for name, values in whole.items()}, bound)


@pytest.mark.parametrize("given_id", ["", "a b", "é\n\0", "\ud800", "x" * 9000])
def test_an_id_comes_back_as_it_was(client: TestClient, given_id: str) -> None:
    response = client.post(INFER, content=json.dumps({"id": given_id, "inputs": padded(PROMPTS)}))
    arrays(response)
    assert response.json()["id"] == given_id


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "identity"])
def test_a_compressed_body_is_read(client: TestClient, bound: float, encoding: str) -> None:
    content, headers = in_binary({"inputs": padded(PROMPTS)})
    packed = {"gzip": gzip.compress, "deflate": zlib.compress, "identity": bytes}[encoding](content)
    response = client.post(INFER, content=packed, headers={**headers, "content-encoding": encoding})
    assert_equal(arrays(response), infer(client), bound)


def test_a_large_answer_is_whole(client: TestClient, bound: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces, as it is sent past a size, and as JSON that is dumped in pieces."""
    whole = infer(client)
    monkeypatch.setattr(inference_wire, "AT_ONCE_BYTES", 100)
    monkeypatch.setattr(inference_wire, "NUMBERS_PER_DUMP", 7)
    outputs = [{"name": "logits"}, {"name": "softmax", "parameters": {"binary_data": True}}]
    response = client.post(INFER, json={"inputs": padded(PROMPTS), "outputs": outputs})
    assert int(response.headers["content-length"]) == len(response.content)
    assert "transfer-encoding" not in response.headers
    assert_equal(arrays(response), whole, bound)


def test_what_is_large_is_not_read_on_the_event_loop(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []
    parse = inference_wire.parse
    record = lambda *given: (threads.append(threading.get_ident()), parse(*given))[1]  # noqa: E731
    monkeypatch.setattr(inference_wire, "parse", record)
    text = json.dumps({"inputs": padded(PROMPTS)})
    client.post(INFER, content=text)
    client.post(INFER, content=text)
    monkeypatch.setattr(inference_wire, "INLINE_BYTES", len(text) - 1)
    assert client.post(INFER, content=text).status_code == 200
    client.post(INFER, content=zlib.compress(text.encode()), headers={"content-encoding": "deflate"})
    assert threads[0] == threads[1]
    assert threads[0] not in threads[2:]


def test_long_json_of_lists_is_refused_before_it_is_parsed(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """json.loads holds the GIL over them: 0.3 s for a megabyte."""
    monkeypatch.setattr(inference_wire, "INLINE_BYTES", 100)
    rows = {"inputs": [{**tensor("input_ids", [[1]] * 64), "data": [[1]] * 64}]}
    assert client.post(INFER, json=rows).status_code == 200
    for empty in ([], {}):
        response = client.post(INFER, json={**rows, "parameters": {"of_another_extension": [empty] * 1000}})
        assert response.status_code == 400
        assert "1071 lists and objects; allowed: 1064" in refusal(response)


def test_it_shares_batches_with_next_token(bundles: Path) -> None:
    async def together() -> None:
        app = create_app(Settings(bundles=bundles, provider="cpu", threads=1))
        batches = counted_batches(app.state.service.engine)
        http = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x")
        async with app.router.lifespan_context(app), http:
            v1 = [http.post("/v1/next-token", json={"model": "gelu", "prompt": [n, 6, 7]}) for n in range(8)]
            v2 = [http.post(INFER, json={"inputs": padded([[n, 6, 7]])}) for n in range(8)]
            answers = await asyncio.gather(*(each for pair in zip(v1, v2, strict=True) for each in pair))
        for n in range(8):
            best = answers[2 * n].json()["results"][0]["top"][0]
            assert arrays(answers[2 * n + 1])["logits"].argmax() == best["id"]
        assert sum(batches) < 16, "each prompt was computed for both"
        assert len(batches) < 8, "each request was a batch of its own"

    asyncio.run(together())


@pytest.mark.parametrize("version", ["", "/versions/1"])
def test_models_and_health(client: TestClient, version: str) -> None:
    server = client.get("/v2").json()
    assert server["name"] == "actuary"
    assert server["extensions"] == ["binary_tensor_data"]
    assert client.get("/v2/health/live").json() == {"live": True}
    assert client.get("/v2/health/ready").json() == {"ready": True}
    model = client.get(f"/v2/models/gelu{version}").json()
    assert model["name"] == "gelu"
    assert model["versions"] == ["1"]
    assert model["inputs"] == [
        {"name": "input_ids", "datatype": "INT64", "shape": [-1, -1]},
        {"name": "lengths", "datatype": "INT64", "shape": [-1]},
    ]
    assert model["outputs"] == [{"name": name, "datatype": "FP32", "shape": [-1, V]} for name in OUTPUTS]
    assert client.get(f"/v2/models/gelu{version}/ready").json() == {"name": "gelu", "ready": True}
    response = client.post(f"/v2/models/gelu{version}/infer", json={"inputs": padded(PROMPTS)})
    assert set(arrays(response)) == set(OUTPUTS)
    assert response.json()["id"] == response.headers["x-request-id"], "an id is given where none was"
    assert float(response.headers["x-infer-ms"]) > 0


def test_not_ready_before_it_serves_and_while_it_drains(bundles: Path) -> None:
    app = create_app(Settings(bundles=bundles, provider="cpu", threads=1))
    client = TestClient(app)
    for path in ("/v2/health/ready", "/v2/models/gelu/ready"):
        response = client.get(path)
        assert response.status_code == 503
        assert response.json()["ready"] is False
    response = client.post(INFER, json={"inputs": padded(PROMPTS)})
    assert response.status_code == 503
    assert "stopping" in refusal(response)
    assert client.get("/v2/health/live").status_code == 200
    with client:
        assert client.get("/v2/models/gelu/ready").status_code == 200
        app.state.service.draining = True
        assert client.get("/v2/health/ready").status_code == 503


def test_it_is_described_once(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    assert {path for path in paths if path.startswith("/v2")} == {
        "/v2",
        "/v2/health/live",
        "/v2/health/ready",
        "/v2/models/{name}",
        "/v2/models/{name}/ready",
        "/v2/models/{name}/infer",
    }
    infer = paths["/v2/models/{name}/infer"]["post"]
    assert {"400", "404", "408", "413", "429", "503"} <= set(infer["responses"])
    body = infer["requestBody"]["content"]["application/json"]
    assert list(arrays(client.post(INFER, json=body["example"]))) == ["softmax"]


def refusal(response: Any) -> str:
    """The message of a refusal, in the protocol's shape."""
    assert set(response.json()) == {"error"}
    assert response.headers["x-request-id"]
    message = response.json()["error"]
    assert isinstance(message, str)
    return message


IDS, LENGTHS = padded(PROMPTS)  # [3, 3], [3]
NOT_JSON = [
    ("not JSON", b"{inputs"),
    ("not JSON", b""),
    ("not JSON", b'{"id": "\xff"}'),
    ("not JSON", b'{"inputs":' + b"[" * 9000 + b"]" * 9000 + b"}"),
    ("not JSON", b'{"inputs": [' + b"9" * 5000 + b"]}"),
    ("JSON object", b"[1, 2]"),
    ("JSON object", b"null"),
    ("ud800", b'{"inputs": [{"name": "\\ud800", "datatype": "INT64", "shape": [1]}]}'),
    ("'input_ids' is missing", b'{"parameters": {"\\ud800": "\\ud800"}, "inputs": []}'),
]
BAD = [
    ("inputs: Field required", {}),
    ("inputs: ", {"inputs": IDS}),
    ("inputs: Field required", {"inputs": None}),
    ("inputs[0]", {"inputs": [None]}),
    ("inputs[0].name: Field required", {"inputs": [{}] * 1000}),
    ("inputs[0].shape", {"inputs": [{**IDS, "shape": "3"}]}),
    ("inputs[0].shape[1]", {"inputs": [{**IDS, "shape": [3, 3.0]}]}),
    ("inputs[0].shape[0]", {"inputs": [{**IDS, "shape": [True, 3]}]}),
    ("inputs[0].shape", {"inputs": [{**IDS, "shape": [1] * 5000}]}),
    ("inputs[0].parameters", {"inputs": [{**IDS, "parameters": [1]}]}),
    ("parameters: ", {"inputs": [IDS], "parameters": "none"}),
    ("id: ", {"inputs": [IDS], "id": 5}),
    ("outputs: ", {"inputs": [IDS], "outputs": {"name": "logits"}}),
    ("outputs[0].name", {"inputs": [IDS], "outputs": [{"name": 1}]}),
    ("unknown output 'logit'; known: logits, softmax, sigmoid; did you mean 'logits'?",
     {"inputs": [IDS], "outputs": [{"name": "logit"}]}),
    ("'logits' is given twice", {"inputs": [IDS], "outputs": [{"name": "logits"}] * 2}),
    ("classes", {"inputs": [IDS], "outputs": [{"name": "logits", "parameters": {"classification": 3}}]}),
    ("shared memory", {"inputs": [IDS], "outputs": [{"name": "logits", "parameters": {"shared_memory_region": "a"}}]}),
    ("binary_data is 1;", {"inputs": [IDS], "outputs": [{"name": "logits", "parameters": {"binary_data": 1}}]}),
    ("binary_data_output is 'yes'", {"inputs": [IDS], "parameters": {"binary_data_output": "yes"}}),
    ("unknown input 'input_id'", {"inputs": [{**IDS, "name": "input_id"}]}),
    ("'input_ids' is given twice", {"inputs": [IDS, IDS]}),
    ("'input_ids' is missing", {"inputs": [LENGTHS]}),
    ("'input_ids' is missing", {"inputs": []}),
    ("'input_ids' is 'INT32'", {"inputs": [{**IDS, "datatype": "INT32"}]}),
    ("'lengths' is 'FP32'", {"inputs": [IDS, {**LENGTHS, "datatype": "FP32"}]}),
    ("[B, T]", {"inputs": [{**IDS, "shape": [9]}]}),
    ("[B, T]", {"inputs": [{**IDS, "shape": []}]}),
    ("[B, T]", {"inputs": [{**IDS, "shape": [1, 3, 3]}]}),
    ("[B, T]", {"inputs": [{**IDS, "shape": [0, 3], "data": []}]}),
    ("[B, T]", {"inputs": [{**IDS, "shape": [3, 0], "data": []}]}),
    ("[B, T]", {"inputs": [{**IDS, "shape": [-3, -3]}]}),
    ("65 rows; one request may have 64", {"inputs": [tensor("input_ids", [[1]] * 65)]}),
    ("send several", {"inputs": [{**IDS, "shape": [10**30, 3]}]}),
    ("33 columns, over the context of 'gelu', 32", {"inputs": [tensor("input_ids", [[1] * 33])]}),
    ("over the context", {"inputs": [{**IDS, "shape": [3, 10**4000]}]}),
    ("must be [3]", {"inputs": [IDS, tensor("lengths", [1, 2])]}),
    ("must be [3]", {"inputs": [IDS, tensor("lengths", [[1], [2], [3]])]}),
    ("must be [3]", {"inputs": [IDS, tensor("lengths", 3)]}),
    ("has no data", {"inputs": [{**IDS, "data": None}]}),
    ("9 numbers; its shape [3, 2] asks for 6", {"inputs": [{**IDS, "shape": [3, 2]}]}),
    ("2 rows; its shape [3, 3] asks for 3", {"inputs": [{**IDS, "data": [[1, 2, 3]] * 2}]}),
    ("has 2 numbers", {"inputs": [{**IDS, "data": [[1, 2, 3], [1, 2], [1]]}]}),
    ("holds 5 where a list", {"inputs": [{**IDS, "data": [[1, 2, 3], 5, [1, 2, 3]]}]}),
    ("whole numbers", {"inputs": [{**IDS, "data": [1, 2, 3, 4, 5, 6, 7, 8, [9]]}]}),
    ("whole numbers", {"inputs": [{**IDS, "data": [[[1], 2, 3]] * 3}]}),
    ("holds 'abc' where a list", {"inputs": [{**IDS, "data": "abc"}]}),
    ("holds {'a': 1} where a list", {"inputs": [{**IDS, "data": {"a": 1}}]}),
    ("holds 1.0;", {"inputs": [{**IDS, "data": [1.0] * 9}]}),
    ("holds True;", {"inputs": [{**IDS, "data": [True] * 9}]}),
    ("holds nan;", {"inputs": [{**IDS, "data": [math.nan] * 9}]}),
    ("holds None;", {"inputs": [{**IDS, "data": [1, None] + [1] * 7}]}),
    ("holds '1';", {"inputs": [{**IDS, "data": ["1"] * 9}]}),
    ("input_ids[0, 2] is 300; 'gelu' has 0 to 299", {"inputs": [tensor("input_ids", [[1, 2, 300]])]}),
    ("input_ids[1, 0] is -1", {"inputs": [tensor("input_ids", [[1], [-1]])]}),
    ("input_ids[0, 0] is 1000", {"inputs": [{**IDS, "shape": [1, 1], "data": [10**30]}]}),
    ("lengths[1] is 0", {"inputs": [IDS, tensor("lengths", [1, 0, 1])]}),
    ("lengths[2] is 4", {"inputs": [IDS, tensor("lengths", [1, 3, 4])]}),
    ("lengths[0] is -1", {"inputs": [IDS, tensor("lengths", [-1, 3, 4])]}),
    ("shared memory", {"inputs": [{**IDS, "parameters": {"shared_memory_region": "a"}}]}),
]  # fmt: skip


@pytest.mark.parametrize(("says", "body"), NOT_JSON, ids=lambda value: str(value)[:40])
def test_a_body_that_is_no_request_is_refused(client: TestClient, says: str, body: bytes) -> None:
    response = client.post(INFER, content=body)
    assert response.status_code == 400, response.text
    assert says in refusal(response)


@pytest.mark.parametrize(("says", "request_"), BAD, ids=lambda value: str(value)[:40])
def test_a_bad_request_is_refused(client: TestClient, says: str, request_: dict) -> None:
    response = client.post(INFER, content=json.dumps(request_))
    assert response.status_code == 400, response.text
    assert says in refusal(response)
    assert len(refusal(response)) < 400


def test_a_bad_binary_body_is_refused(client: TestClient) -> None:
    content, headers = in_binary({"inputs": [IDS, LENGTHS]})
    length = int(headers["inference-header-content-length"])

    def says(words: str, content: bytes, length: object = length, **headers: str) -> None:
        headers = {"inference-header-content-length": str(length), **headers}
        response = client.post(INFER, content=content, headers=headers)
        assert response.status_code == 400, response.text
        assert words in refusal(response)

    says("'lengths' needs 24 bytes, and 23 are left", content[:-1])
    says("'input_ids' needs 72 bytes, and 0 are left", content[:length])
    says("97 bytes follow the JSON object, and its tensors are 96", content + b"\0")
    says("not JSON", content, length - 1)
    says("not JSON", content, length + 1)
    says("not JSON", content, 0)
    for bad in (len(content) + 1, "-1", "+5", "1_0", "5.0", "0x5", "", "9" * 5000, "five"):
        says("Inference-Header-Content-Length is", content, bad)
    assert client.post(INFER, content=content).status_code == 400, "the header is missing"
    only_ids = json.dumps({"inputs": [IDS]}).encode()
    says("8 bytes follow", only_ids + bytes(8), len(only_ids))
    for size in (71, 73, -72, 0, 72.0, "72", True, 10**30, [72]):
        head = json.dumps({"inputs": [{**IDS, "data": None, "parameters": {"binary_data_size": size}}]}).encode()
        says("is 72 bytes", head + content[length:], len(head))
    both = json.dumps({"inputs": [{**IDS, "parameters": {"binary_data_size": 72}}]}).encode()
    says("both data and binary_data_size", both + bytes(72), len(both))
    huge = np.full(9, np.iinfo(np.int64).min)
    head = json.dumps({"inputs": [{**IDS, "data": None, "parameters": {"binary_data_size": 72}}]}).encode()
    says("input_ids[0, 0] is -9223372036854775808", head + huge.tobytes(), len(head))


def test_a_bad_compressed_body_is_refused(client: TestClient) -> None:
    text = json.dumps({"inputs": [IDS]}).encode()
    packed = gzip.compress(text)
    for words, body, encoding in (
        ("is not read; allowed: identity, gzip, deflate", text, "br"),
        ("is not read", packed, "gzip, gzip"),
        ("the body is not gzip", text, "gzip"),
        ("the body is not deflate", packed, "deflate"),
        ("cut off", packed[:-5], "gzip"),
        ("cut off", b"", "deflate"),
        ("goes on after its end", packed + b"x", "gzip"),
    ):
        response = client.post(INFER, content=body, headers={"content-encoding": encoding})
        assert response.status_code == 400, response.text
        assert words in refusal(response)


def test_a_body_over_the_limit_is_refused(client: TestClient) -> None:
    text = json.dumps({"inputs": [IDS]}).encode()
    for size, status in ((MAX_BODY_BYTES, 200), (MAX_BODY_BYTES + 1, 413), (10**7, 413)):
        content = text.ljust(size)
        for body, headers in ((content, {}), (gzip.compress(content), {"content-encoding": "gzip"})):
            response = client.post(INFER, content=body, headers=headers)
            assert response.status_code == status, response.text
            if status != 200:
                assert str(MAX_BODY_BYTES) in refusal(response)


@pytest.mark.parametrize(
    "model", ["gelo", "*", "gelu/versions/2", "gelu/versions/", "%F0%9F%98%80", "a%0Ab", "%ED%A0%80"]
)
def test_an_unknown_model_or_version_is_refused(client: TestClient, model: str) -> None:
    for path, response in (
        (path, client.request(method, f"/v2/models/{model}{path}", json={"inputs": [IDS]}))
        for method, path in (("GET", ""), ("GET", "/ready"), ("POST", "/infer"))
    ):
        assert response.status_code == 404, path
        refusal(response)
    assert "did you mean 'gelu'?" in refusal(client.get("/v2/models/gelo"))
    assert "unknown version '2' of 'gelu'; known: 1" in refusal(client.get("/v2/models/gelu/versions/2"))


def test_routes_and_methods_that_are_not_there(client: TestClient) -> None:
    assert client.get("/v2/nothing").status_code == 404
    assert "/v2/nothing" in refusal(client.get("/v2/nothing"))
    response = client.get(INFER)
    assert response.status_code == 405
    assert response.headers["allow"] == "POST"
    refusal(response)
    assert isinstance(client.get("/v2nd").json()["error"], dict), "that is not under /v2"


def test_much_json_is_refused_and_the_same_in_binary_is_not(bundles: Path) -> None:
    with TestClient(create_app(Settings(bundles=bundles, provider="cpu", threads=1, max_entries=599))) as client:
        request = {"inputs": [tensor("input_ids", [[1], [2]])]}
        response = client.post(INFER, json=request)
        assert response.status_code == 400
        assert "599 in JSON: ask for it in binary" in refusal(response)
        in_binary = client.post(INFER, json={**request, "parameters": {"binary_data_output": True}})
        assert arrays(in_binary)["logits"].shape == (2, V)
        assert arrays(client.post(INFER, json={"inputs": [tensor("input_ids", [[1]])]}))["logits"].shape == (1, V)


def test_a_full_queue_says_when_to_come_back(bundles: Path) -> None:
    settings = Settings(bundles=bundles, provider="cpu", threads=1, max_queue=4, max_prompts=4)
    app = create_app(settings)
    with TestClient(app) as client:
        app.state.service.engine._waiting = 4
        response = client.post(INFER, json={"inputs": [IDS, LENGTHS]})
        assert response.status_code == 429
        assert int(response.headers["retry-after"]) >= 1
        assert "queue" in refusal(response)


def test_a_defect_of_ours_is_a_500_in_the_same_shape(bundles: Path) -> None:
    app = create_app(Settings(bundles=bundles, provider="cpu", threads=1))

    class Broken:
        def run(self, *_: object) -> None:
            raise RuntimeError("secret detail")

    object.__setattr__(app.state.service.library.variants["gelu"], "session", Broken())
    with TestClient(app, raise_server_exceptions=False) as client:
        response = client.post(INFER, json={"inputs": [IDS]})
        assert response.status_code == 500
        assert "secret" not in refusal(response)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.text(st.characters(categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=6,
)
parameters = st.dictionaries(
    st.sampled_from(["binary_data_size", "binary_data", "binary_data_output", "classification", "x"]),
    st.integers(-8, 80) | st.booleans() | anything,
    max_size=2,
)
inputs = st.fixed_dictionaries(
    {
        "name": st.sampled_from(["input_ids", "lengths"]) | anything,
        "datatype": st.just("INT64") | anything,
        "shape": st.lists(st.integers(-1, 4), max_size=3) | anything,
    },
    optional={
        "data": st.lists(st.integers(-1, 310), max_size=9) | anything,
        "parameters": parameters | anything,
    },
)
small = settings(max_examples=150, deadline=None)


def answered(client: TestClient, body: bytes, **headers: str) -> None:
    response = client.post(INFER, content=body, headers=headers)
    assert response.status_code in (200, 400), response.text
    if response.status_code == 200:
        arrays(response)
    else:
        refusal(response)


@small
@given(
    request=st.fixed_dictionaries(
        {"inputs": st.lists(inputs, max_size=3) | anything},
        optional={
            "id": st.text() | anything,
            "parameters": parameters | anything,
            "outputs": st.lists(
                st.fixed_dictionaries(
                    {"name": st.sampled_from(OUTPUTS) | anything}, optional={"parameters": parameters | anything}
                ),
                max_size=3,
            )
            | anything,
        },
    ),
    tail=st.binary(max_size=80),
    binary=st.booleans(),
)
def test_no_request_is_answered_with_500(client: TestClient, request: dict, tail: bytes, binary: bool) -> None:
    head = json.dumps(request).encode()
    if binary:
        answered(client, head + tail, **{"inference-header-content-length": str(len(head))})
    else:
        answered(client, head)


@small
@given(data=st.data())
def test_no_broken_binary_body_is_answered_with_500(client: TestClient, data: st.DataObject) -> None:
    """A good one, cut, lengthened, overwritten or with another header."""
    content, headers = in_binary({"inputs": [IDS, LENGTHS]})
    at = data.draw(st.integers(0, len(content)), "at")
    new = data.draw(st.binary(max_size=20), "new")
    content = content[:at] + new + content[data.draw(st.sampled_from([at, at + len(new), len(content)]), "until") :]
    length = headers["inference-header-content-length"]
    length = data.draw(
        st.sampled_from([length]) | st.integers(-5, 400).map(str) | st.text("0123456789+-_ .", max_size=4)
    )
    encoding = data.draw(st.sampled_from(["identity"] * 4 + ["gzip", "deflate"]), "encoding")
    if data.draw(st.booleans(), "compressed"):
        content = {"gzip": gzip.compress, "deflate": zlib.compress, "identity": bytes}[encoding](content)
    answered(client, content, **{"inference-header-content-length": length, "content-encoding": encoding})


@small
@given(body=st.binary(max_size=200), encoding=st.sampled_from(["identity", "gzip", "deflate", "br"]))
def test_no_bytes_are_answered_with_500(client: TestClient, body: bytes, encoding: str) -> None:
    answered(client, body, **{"content-encoding": encoding})


# What the stock clients send is in tests/clients; the last id is padding.
STOCK_PROMPTS = [[5, 6, 7], [8, 9]]


@pytest.mark.parametrize(
    ("package", "script", "scheme", "forms"),
    [
        ("tritonclient[http]==2.73.0", "triton.py", "", {"binary", "json", "mixed", "gzip", "deflate", "async"}),
        ("kserve==0.21.0", "kserve_v2.py", "http://", {"binary", "json", "mixed"}),
    ],
    ids=["tritonclient", "kserve"],
)
def test_stock_clients_work_unmodified(
    server_url: str,
    bound: float,
    client_python: Callable[..., Path],
    package: str,
    script: str,
    scheme: str,
    forms: set[str],
) -> None:
    url = scheme + server_url.removeprefix("http://")
    command = [str(client_python(package)), "-I", str(CLIENTS / script), url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG_S)
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)
    status, message = answers.pop("refusal")
    assert status == "400"
    assert "the input 'input_ids' is missing" in message
    assert set(answers) == forms
    expected = by_next_token(httpx.Client(base_url=server_url).post, "gelu", STOCK_PROMPTS)
    for form, answer in answers.items():
        names = {"softmax", "logits"} if form == "mixed" else set(OUTPUTS)
        assert set(answer) == names
        assert_equal({name: np.array(values, np.float32) for name, values in answer.items()}, expected, bound)
