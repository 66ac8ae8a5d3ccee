"""/v1/studies: what is in the folder is listed and given as it is; what is damaged, or elsewhere, is not."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from kept_studies import keep, study

from service.app import create_app
from service.settings import Settings

LISTED = ("claim", "verdict", "sentence", "quick", "date")


@pytest.fixture(scope="module")
def here(bundles: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[TestClient, Path]]:
    folder = tmp_path_factory.mktemp("studies") / "kept"
    with TestClient(create_app(Settings(bundles=bundles, provider="cpu", threads=1, studies=folder))) as client:
        yield client, folder


@pytest.fixture
def folder(here: tuple[TestClient, Path]) -> Iterator[Path]:
    """The folder, with four studies; empty again afterwards."""
    _, folder = here
    keep(folder, {})
    yield folder
    for path in folder.iterdir():
        path.unlink()


@pytest.fixture
def client(here: tuple[TestClient, Path], folder: Path) -> TestClient:
    return here[0]


def write(folder: Path, name: str, body: str) -> None:
    (folder / f"{name}.json").write_text(body)


def test_they_are_listed_by_number_and_each_is_given_as_it_is(client: TestClient, folder: Path) -> None:
    listed = client.get("/v1/studies").json()
    files = {path.stem: json.loads(path.read_text()) for path in folder.iterdir()}
    assert [each["claim"]["name"] for each in listed["data"]] == ["vanishing", "moons", "language", "cost"]
    assert listed["damaged"] == []
    for each in listed["data"]:
        assert each == {name: files[each["claim"]["name"]][name] for name in LISTED}
    for name in files:
        answer = client.get(f"/v1/studies/{name}")
        assert answer.content == (folder / f"{name}.json").read_bytes()
        assert answer.headers["content-type"] == "application/json"


def test_what_is_written_while_it_runs_is_seen(client: TestClient, folder: Path) -> None:
    write(folder, "gates", json.dumps(study(11, "gates", "holds")))
    assert [each["claim"]["number"] for each in client.get("/v1/studies").json()["data"]] == [2, 4, 6, 9, 11]


def test_no_folder_is_no_error(here: tuple[TestClient, Path], bundles: Path, tmp_path: Path) -> None:
    settings = Settings(bundles=bundles, provider="cpu", threads=1, studies=tmp_path / "nothing")
    with TestClient(create_app(settings)) as client:
        assert client.get("/v1/studies").json() == {"object": "list", "data": [], "damaged": []}
        answer = client.get("/v1/studies/moons")
        assert answer.status_code == 404
        assert "actuary study all" in answer.json()["error"]["message"]


def without(field: str) -> str:
    whole = study(5, "bad", "holds")
    del whole[field]
    return json.dumps(whole)


def with_(**fields: Any) -> str:
    return json.dumps(study(5, "bad", "holds") | fields)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("", "cannot be read"),
        ("{", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ("[]", "valid dictionary"),
        ("\ud800".encode("utf-16", "surrogatepass").decode("latin-1"), "cannot be read"),
        (without("sentence"), "sentence: Field required"),
        (without("charts"), "charts: Field required"),
        (with_(schema=2), "schema: Input should be 1"),
        (with_(verdict="splendid"), "verdict: Input should be 'holds'"),
        (with_(settings={"rate": float("nan")}), "NaN"),
        (with_(figures=["x"]), "figures.0"),
        (with_(sentence="half a pair: \ud800"), "surrogates not allowed"),
        (with_(versions={"\udc00": 1}), "surrogates not allowed"),
        (without("machine"), "machine: Field required"),
        (with_(versions=None), "versions: Input should be a valid dictionary"),
        (with_(seconds="long"), "seconds: Input should be a valid number"),
        (json.dumps(study(5, "other", "holds")), "holds the study 'other'"),
        (with_(sentence="x" * (4 << 20)), "bytes; at most"),
    ],
)
def test_a_damaged_file_is_left_out_and_said(client: TestClient, folder: Path, body: str, said: str) -> None:
    write(folder, "bad", body)
    listed = client.get("/v1/studies").json()
    assert [each["claim"]["name"] for each in listed["data"]] == ["vanishing", "moons", "language", "cost"]
    [damaged] = listed["damaged"]
    assert damaged["name"] == "bad"
    assert said in damaged["reason"]
    answer = client.get("/v1/studies/bad")
    assert answer.status_code == 404
    assert said in answer.json()["error"]["message"]
    assert "`actuary study bad`" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "name", ["..%2Fsecret", "%2e%2e%2fsecret", "..", "secret.json", "%00", "a" * 65, "-x", "moons%0A", "mööns"]
)
def test_no_name_leads_out_of_the_folder(client: TestClient, folder: Path, name: str) -> None:
    (folder.parent / "secret.json").write_text(json.dumps(study(1, "secret", "holds")))
    answer = client.get(f"/v1/studies/{name}")
    assert answer.status_code == 404
    assert "What is claimed" not in answer.text


def test_a_link_out_of_the_folder_is_not_followed(client: TestClient, folder: Path) -> None:
    outside = folder.parent / "secret.json"
    outside.write_text(json.dumps(study(1, "secret", "holds")))
    (folder / "secret.json").symlink_to(outside)
    assert client.get("/v1/studies").json()["damaged"] == [
        {"name": "secret", "reason": "secret.json is a link that leads elsewhere"}
    ]
    assert client.get("/v1/studies/secret").status_code == 404


def test_what_is_no_file_is_not_waited_for(client: TestClient, folder: Path) -> None:
    pipe = folder / "pipe.json"
    os.mkfifo(pipe)
    freed = threading.Timer(5, lambda: os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)))  # whoever waits after all
    freed.start()
    try:
        assert client.get("/v1/studies").json()["damaged"] == [{"name": "pipe", "reason": "pipe.json is no file"}]
        assert client.get("/v1/studies/pipe").status_code == 404
    finally:
        freed.cancel()


def test_an_unknown_name_is_told_what_is_known(client: TestClient) -> None:
    error = client.get("/v1/studies/monos").json()["error"]
    assert error["message"] == (
        "there is no study 'monos' here; known: cost, language, moons, vanishing; did you mean 'moons'?"
    )
    assert (error["type"], error["param"]) == ("not_found", "name")


def test_an_activation_says_whether_it_would_run_fused(bundles: Path, fused: Any) -> None:
    """Without the library why not, with it nothing; without torch either way."""
    for ops, expected in ((bundles, "never built"), (fused.path.parent, "")):
        with TestClient(create_app(Settings(bundles=bundles, provider="cpu", threads=1, ops=ops))) as client:
            unfused = {each["name"]: each["unfused"] for each in client.get("/v1/activations").json()["data"]}
        assert unfused["gelu"] == expected or (expected and expected in unfused["gelu"])
        assert unfused["softmax"], "what looks at the hidden axis never fuses"
