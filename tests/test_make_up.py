"""The README's first command, and what the default recipe must have learned. The slowest file: it trains for real."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2 as httpx
import psutil
import pytest
from conftest import ACTUARY, HANG_S, free_port, serving

from export.ops.build import find_nvcc

ROOT = Path(__file__).parent.parent
VENV = Path(sys.prefix)
DRIVER = Path("/proc/driver/nvidia/version")
UNCHANGED = "nothing has changed since it was built"
DEFAULT_SET = {"gelu", "silu", "swiglu", "relu", "sigmoid", "gelu-sigmoid-head"}


@contextlib.contextmanager
def make_up(artifacts: Path, steps: int) -> Iterator[tuple[str, str, psutil.Process]]:
    """`make up` until it serves: its URL, what it said, its process. -o: the environment is there."""
    port = free_port()
    command = [
        "make",
        "-o",
        f"{VENV}/.installed",
        "up",
        f"VENV={VENV}",
        f"ARTIFACTS={artifacts}",
        f"STEPS={steps}",
        f"PORT={port}",
    ]
    log = artifacts.parent / f"{port}.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "NO_COLOR": "1", "MAKEFLAGS": ""},
        )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + HANG_S
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/health/ready").status_code == 200 and "curl -s" in log.read_text():
                    break
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield url, log.read_text(), psutil.Process(process.pid)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)  # Ctrl-C, as the terminal sends it
        process.wait(HANG_S)


def service_of(make: psutil.Process) -> psutil.Process:
    (service,) = [child for child in make.children(recursive=True) if "serve" in child.cmdline()]
    return service


def spent_s(make: psutil.Process) -> float:
    """Processor time of all that it has run, and of the service that it runs."""
    done, runs = make.cpu_times(), service_of(make).cpu_times()
    return done.user + done.system + done.children_user + done.children_system + runs.user + runs.system


def test_make_up_trains_exports_serves_and_a_second_one_only_serves(tmp_path, fused):
    """The operators' library is there, by its time older than its sources; test_ops_build.py shows it compiled."""
    artifacts = tmp_path / "artifacts"
    shutil.copytree(fused.path.parent, artifacts / "ops")
    os.utime(artifacts / "ops" / "library.json", (0, 0))
    with make_up(artifacts, steps=10) as (url, said, make):
        assert {model["id"] for model in httpx.get(f"{url}/v1/models").json()["data"]} == DEFAULT_SET
        assert (UNCHANGED in " ".join(said.split())) == (not (find_nvcc() and DRIVER.exists())), said  # or with CUDA
        assert f"{url}/ (the page)" in said
        (curl,) = [line for line in said.splitlines() if line.strip().startswith("curl ")]
        answer = subprocess.run(shlex.split(curl), capture_output=True, text=True, timeout=HANG_S)
        assert {result["model"] for result in json.loads(answer.stdout)["results"]} == DEFAULT_SET
        assert service_of(make).memory_info().rss < 400e6
    before = {path: path.stat().st_mtime_ns for path in artifacts.rglob("*") if path.is_file()}
    with make_up(artifacts, steps=10) as (_, said, make):
        assert UNCHANGED not in " ".join(said.split()), "it looked again"
        assert spent_s(make) < 10, "seconds of processor time before the second `make up` serves"
    assert {path: path.stat().st_mtime_ns for path in artifacts.rglob("*") if path.is_file()} == before


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> dict[str, dict]:
    """What gelu and gelu-sigmoid-head, trained by the default recipe, say after `if x is not`, over HTTP.

    Of 400 steps, not its 1000, which take 100 s of the processor more: all that is asked of it is there by then.
    """
    folder = tmp_path_factory.mktemp("default")
    for arguments in (
        ["train", "--activations", "gelu,gelu-sigmoid-head", "--steps", "400", "--out", "checkpoints"],
        ["export", "checkpoints", "--out", "bundles"],
    ):
        done = subprocess.run([*ACTUARY, *arguments], cwd=folder, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
    with serving(folder / "bundles") as (url, _):
        body = {"model": "*", "prompt": ["if x is not", "        return self", "import", "def __init__("], "top_k": 3}
        results = httpx.post(f"{url}/v1/next-token", json=body).json()["results"]
    return {name: [result for result in results if result["model"] == name] for name in ("gelu", "gelu-sigmoid-head")}


def test_none_comes_first_after_if_x_is_not(answers):
    first = {name: results[0]["top"][0]["text"] for name, results in answers.items()}
    assert " None" in first.values(), first


def test_sigmoid_s_mass_is_about_1_where_it_was_trained_and_arbitrary_where_not(answers):
    trained = [result["sigmoid"]["mass"] for result in answers["gelu-sigmoid-head"]]
    arbitrary = [result["sigmoid"]["mass"] for result in answers["gelu"]]
    assert all(0.4 < mass < 2.5 for mass in trained), trained
    assert sum(trained) / len(trained) == pytest.approx(1, abs=0.35)
    assert sum(arbitrary) / len(arbitrary) > 2, arbitrary
    assert all(
        result["softmax"]["mass"] == pytest.approx(1, abs=1e-4) for results in answers.values() for result in results
    )
