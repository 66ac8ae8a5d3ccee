"""Experiments in real processes: what a restart, a signal and a locked database leave; what is imported, and when."""

from __future__ import annotations

import json
import math
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import sqlalchemy as sa
from conftest import ACTUARY, HANG_S, free_port, serving

from service.experiments.database import Database
from service.experiments.tables import exposures


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "experiments.json"
    path.write_text(json.dumps({"act": {"arms": {"gelu": 2, "swiglu": 1}}}))
    return path


def ask(http: httpx.Client, key: str) -> httpx.Response:
    body = {"model": "act", "prompt": "if x"}
    return http.post("/v1/next-token", json=body, headers={"x-actuary-key": key})


def stored(database: str) -> dict[str, tuple[str, int]]:
    """Arm and status of every exposure, by id."""
    opened = Database(database)
    with opened.reading() as connection:
        query = sa.select(exposures.c.id, exposures.c.variant, exposures.c.status)
        found = {row.id: (row.variant, row.status) for row in connection.execute(query)}
    opened.close()
    return found


def test_nothing_that_was_answered_is_lost_at_sigterm(bundles: Path, database: str, file: Path) -> None:
    """Eight callers go on until nobody answers; two processes on one database, one of them ended after the other."""
    answered: dict[str, str] = {}
    arms: dict[str, set[str]] = {}
    lock = threading.Lock()
    arguments = ("--experiments", str(file), "--database", database)
    with serving(bundles, *arguments) as (one, process), serving(bundles, *arguments) as (other, second):

        def call(caller: int) -> None:
            with httpx.Client(base_url=(one, other)[caller % 2], timeout=HANG_S) as http:
                for n in range(100_000):
                    key = f"key {n % 150}"
                    try:
                        response = ask(http, key)
                    except httpx.TransportError:
                        return
                    if response.status_code != 200:
                        return
                    with lock:
                        answered[response.headers["x-exposure-id"]] = response.headers["x-arm"]
                        arms.setdefault(key, set()).add(response.headers["x-arm"])

        with ThreadPoolExecutor(8) as pool:
            callers = [pool.submit(call, n) for n in range(8)]
            for ended in (process, second):
                enough, limit = len(answered) + 300, time.monotonic() + HANG_S
                while len(answered) < enough and time.monotonic() < limit:
                    time.sleep(0.01)
                ended.send_signal(signal.SIGTERM)
                assert ended.wait(HANG_S) == 0
            for caller in callers:
                caller.result()
    assert len(answered) >= 600
    found = stored(database)
    assert {id_: arm for id_, (arm, status) in found.items() if status == 200 and id_ in answered} == answered
    assert len(found) - len(answered) <= 8, "of each caller one answer may have been cut off"
    assert all(len(each) == 1 for each in arms.values())
    share = Counter(next(iter(each)) for each in arms.values())
    assert abs(share["gelu"] - len(arms) * 2 / 3) < 4 * math.sqrt(len(arms) * 2 / 9)
    with serving(bundles, *arguments) as (url, _), httpx.Client(base_url=url) as http:
        verdict = http.get("/v1/experiments/act").json()
        assert sum(arm["exposures"] for arm in verdict["arms"]) == len(found)
        assert sum(arm["keys"] for arm in verdict["arms"]) == len(arms)
        for key, its in list(arms.items())[:40]:
            assert ask(http, key).headers["x-arm"] in its, "after a restart"


def test_what_a_locked_database_could_not_take_is_written_at_the_end(bundles: Path, tmp_path: Path, file: Path) -> None:
    database = tmp_path / "x.db"
    with serving(bundles, "--experiments", str(file), "--database", str(database)) as (url, process):
        with httpx.Client(base_url=url) as http, sqlite3.connect(database, isolation_level=None) as other:
            other.execute("BEGIN EXCLUSIVE")
            took_s = []
            for n in range(20):
                began = time.monotonic()
                assert ask(http, str(n)).status_code == 200
                took_s.append(time.monotonic() - began)
            process.send_signal(signal.SIGTERM)
            time.sleep(2)
            assert process.poll() is None
            other.execute("COMMIT")
        process.wait(HANG_S)
        assert process.returncode == 0
        assert len(stored(str(database))) == 20
        assert max(took_s) < 4, "no answer waits for a lock, which SQLite waits for 5 s"


def test_what_is_lost_is_said_and_the_end_comes(bundles: Path, tmp_path: Path, file: Path) -> None:
    database = tmp_path / "x.db"
    with serving(bundles, "--experiments", str(file), "--database", str(database)) as (url, process):
        with httpx.Client(base_url=url) as http, sqlite3.connect(database, isolation_level=None) as other:
            other.execute("BEGIN EXCLUSIVE")
            for n in range(20):
                assert ask(http, str(n)).status_code == 200
            process.send_signal(signal.SIGTERM)
            _, said = process.communicate(timeout=HANG_S)
            other.execute("COMMIT")
        assert process.returncode == 0
        assert "20 experiment records are lost: database is locked" in said
        assert "Traceback" not in said
    assert stored(str(database)) == {}


def imported(bundles: Path, *arguments: str) -> set[str]:
    """What the process has imported after it answered and was told to stop."""
    port = free_port()
    code = (
        "import sys, actuary\n"
        f"arguments = ['serve', '--bundles', {str(bundles)!r}, '--port', '{port}', *sys.argv[1:]]\n"
        "actuary.cli.main(arguments, standalone_mode=False)\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))\n"
    )
    command = [sys.executable, "-c", code, *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + HANG_S
        while time.monotonic() < deadline and process.poll() is None:
            try:
                body = {"model": "gelu", "prompt": "if x"}
                assert httpx.post(f"http://127.0.0.1:{port}/v1/next-token", json=body).status_code == 200
                break
            except httpx.TransportError:
                time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        found, said = process.communicate(timeout=HANG_S)
    finally:
        process.kill()
    assert process.returncode == 0, said
    return set(found.split())


def test_a_database_is_imported_with_the_first_experiment_and_not_before(
    bundles: Path, tmp_path: Path, file: Path
) -> None:
    database = str(tmp_path / "x.db")
    databases = {"sqlalchemy", "alembic", "psycopg", "mako"}
    assert not imported(bundles, "--database", database) & databases
    assert not Path(database).exists()
    first = imported(bundles, "--database", database, "--experiments", str(file))
    assert {"sqlalchemy", "alembic"} <= first
    assert not first & {"torch", "transformers", "psycopg", "scipy", "polars"}
    second = imported(bundles, "--database", database)
    assert "sqlalchemy" in second, "the experiment goes on"
    assert "alembic" not in second, "half a second, where there is nothing to change"


@pytest.mark.parametrize(
    ("definition", "arguments", "says"),
    [
        ({"act": {"arms": {"gelu": 1, "swigul": 1}}}, (), "did you mean 'swiglu'"),
        ({"act": {"arms": {"gelu": 1, "swiglu": -1}}}, (), "above 0"),
        ({"gelu": {"arms": {"gelu": 1, "swiglu": 1}}}, (), "'gelu' is a variant"),
        ({}, ("--database", "mysql://host/x"), "postgresql://USER"),
        (
            {},
            ("--database", "postgresql://someone:secret@127.0.0.1:1/x"),
            "--database postgresql+psycopg://someone:***",
        ),
        ({}, ("--key-header", "a b"), "--key-header"),
        ({}, ("--outcome-mb", "-1"), "--outcome-mb"),
        ({}, ("--max-exposures", "-1"), "--max-exposures"),
    ],
)
def test_a_start_that_cannot_be_ends_with_2(
    bundles: Path, tmp_path: Path, definition: dict[str, Any], arguments: tuple[str, ...], says: str
) -> None:
    file = tmp_path / "x.json"
    file.write_text(json.dumps(definition))
    database = () if "--database" in arguments else ("--database", str(tmp_path / "x.db"))
    command = [*ACTUARY, "serve", "--bundles", str(bundles), "--port", "0", "--experiments", str(file)]
    ended = subprocess.run([*command, *database, *arguments], capture_output=True, text=True, timeout=HANG_S)
    assert ended.returncode == 2, ended.stderr
    assert says in ended.stderr
    assert "Traceback" not in ended.stderr
    assert "secret" not in ended.stderr
