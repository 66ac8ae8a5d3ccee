"""A package outside this repository adds an activation with one record, and it reaches every room."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx2 as httpx
import pytest
from conftest import ACTUARY, HANG_S, free_port

RECORD = """
import torch
from models.activations import Activation

def soft_gate(x, slope=0.5):
    return x * torch.sigmoid(slope * x + 1) + torch.atan(x) / 3

record = Activation("soft_gate", soft_gate, "learned", "this test, 2026")
"""
METADATA = "Metadata-Version: 2.1\nName: more-activations\nVersion: 1.0\n"
ENTRY_POINTS = "[actuary.activations]\nsoft_gate = more_activations:record\n"
SHAPE = ["--layers", "1", "--dim", "32", "--heads", "2", "--context", "32", "--vocab", "300"]


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """An environment in which the package is installed: its module and its metadata on the path."""
    site = tmp_path_factory.mktemp("site")
    (site / "more_activations.py").write_text(RECORD)
    info = site / "more_activations-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(METADATA)
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    return {**os.environ, "PYTHONPATH": str(site), "NO_COLOR": "1"}


def test_one_record_reaches_every_room(environment, tmp_path):
    def actuary(*arguments: str) -> str:
        done = subprocess.run(
            [*ACTUARY, *arguments], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=HANG_S
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "soft_gate" in {record["name"] for record in json.loads(actuary("list", "--json"))}
    corpus = str(Path(json.__file__).parent)
    trained = json.loads(
        actuary(
            "train",
            "--activations",
            "soft_gate",
            "--steps",
            "5",
            "--corpus",
            corpus,
            *SHAPE,
            "--out",
            "checkpoints",
            "--json",
        )
    )
    assert trained["variants"][0]["name"] == "soft_gate"
    (manifest,) = json.loads(actuary("export", "checkpoints", "--out", "bundles", "--json"))
    assert manifest["formula"] == "x * sigmoid(slope * x + 1) + atan(x) / 3"
    port = free_port()
    service = subprocess.Popen(
        [*ACTUARY, "serve", "--bundles", str(tmp_path / "bundles"), "--port", str(port)], env=environment
    )
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + HANG_S
        while True:
            try:
                assert httpx.get(f"{url}/health/ready").status_code == 200
                break
            except httpx.TransportError:
                assert service.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.05)
        answer = httpx.post(f"{url}/v1/next-token", json={"model": "soft_gate", "prompt": "def "}).json()
        assert answer["results"][0]["activation"] == "soft_gate"
        listed = {info["name"]: info for info in _listed(url)}
        assert listed["soft_gate"]["formula"] == manifest["formula"]
        actuary(
            "load",
            "--url",
            url,
            "--users",
            "1",
            "--duration",
            "2",
            "--warmup",
            "0",
            "--json",
            "load.json",
            "--out",
            "load",
        )
        assert "soft_gate" in (tmp_path / "load.json").read_text()
    finally:
        service.send_signal(signal.SIGTERM)
        service.wait(HANG_S)
    (weights,) = (tmp_path / "checkpoints").glob("*/model.safetensors")
    assert (
        "slope"
        in subprocess.run(
            [
                sys.executable,
                "-c",
                f"import safetensors; print(list(safetensors.safe_open({str(weights)!r}, 'pt').keys()))",
            ],
            capture_output=True,
            text=True,
        ).stdout
    )


def _listed(url: str) -> list[dict]:
    answer = httpx.get(f"{url}/v1/activations").json()
    return answer["data"] if isinstance(answer, dict) else answer
