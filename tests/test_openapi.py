"""The OpenAPI document against what is answered, over every operation that it has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from conftest import HANG_S, serving

# What a schema cannot say is not to be accepted: names that serve, ids of a vocabulary, lengths of a context; 1.0 is an
# integer to JSON Schema, and none here.
LEFT_OUT = "positive_data_acceptance"


@pytest.fixture(scope="module")
def url(bundles: Path, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("kept")
    with serving(bundles, "--database", str(folder / "x.db"), "--compare", str(folder / "compare")) as (url, _):
        yield url


def test_what_is_answered_is_what_the_document_says(url: str, tmp_path: Path) -> None:
    """Statuses, types and bodies; what the schemas refuse is refused, and so are methods that are not there.

    Without the one operation that would put load on this machine.
    """
    command = [
        *(
            sys.executable,
            "-m",
            "schemathesis.cli",
            "run",
            f"{url}/openapi.json",
            "--exclude-name",
            "POST /v1/comparisons",
        ),
        *("--checks", "all", "--exclude-checks", LEFT_OUT, "--phases", "examples,coverage,fuzzing"),
        *("--max-examples", "5", "--seed", "1", "--generation-deterministic"),
        *("--suppress-health-check", "all", "--continue-on-failure", "--no-color", "--warnings", "off"),
    ]
    pytest.importorskip("schemathesis", reason="pip install -e '.[dev]' brings it")
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=HANG_S, cwd=tmp_path, env={**os.environ, "COLUMNS": "160"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Tested: " in done.stdout


def operations(url: str) -> dict[tuple[str, str], dict[str, Any]]:
    paths = httpx.get(f"{url}/openapi.json").json()["paths"]
    return {(method, path): operation for path, methods in paths.items() for method, operation in methods.items()}


def test_every_operation_says_what_it_answers(url: str) -> None:
    """With a schema, wherever it is JSON, and errors in our shape alone."""
    for place, operation in operations(url).items():
        for status, answer in operation["responses"].items():
            about = answer["content"].get("application/json")
            if about is None:
                assert {"text/plain", "text/html"} & set(answer["content"]), place
                continue
            shape = json.dumps(about["schema"])
            if place == ("get", "/v1/studies/{name}") and status == "200":
                continue  # a file, as `actuary study` wrote it
            assert "$ref" in shape, (place, status)
            if status >= "400" and status != "503":
                assert ("InferenceError" if place[1].startswith("/v2") else "ErrorAnswer") in shape, (place, status)


def test_a_null_and_a_field_that_is_ignored_are_in_the_document(url: str) -> None:
    """Of completions, where clients of others send what we do not have."""
    schemas = httpx.get(f"{url}/openapi.json").json()["components"]["schemas"]
    fields = schemas["CompletionRequest"]["properties"]
    assert schemas["CompletionRequest"]["additionalProperties"] is False
    assert {"type": "null"} in fields["top_k"]["anyOf"]
    assert {"type": "null"} not in fields["prompt"]["anyOf"]
    assert fields["suffix"]["enum"] == ["", None]
    asked = {"model": "gelu", "prompt": [1], "max_tokens": 1}
    for name, field in fields.items():
        for value in [*field.get("enum", []), *([{}] if "Taken" in field.get("description", "") else [])]:
            answer = httpx.post(f"{url}/v1/completions", json={**asked, name: value})
            assert answer.status_code == 200, (name, value, answer.text)
    for name, value in (("early_stopping", 0), ("early_stopping", 0.0), ("length_penalty", True), ("stop", "\ud800")):
        body = json.dumps({**asked, name: value})
        headers = {"content-type": "application/json"}
        answer = httpx.post(f"{url}/v1/completions", content=body, headers=headers)
        assert (answer.status_code, answer.json()["error"]["type"]) == (422, "invalid_request"), name
