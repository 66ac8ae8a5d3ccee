"""`actuary compare` as a process: on the real service, and on a stand-in of known delays; killed in every way."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import psutil
import pytest
from conftest import free_port, serving
from stand_in import DELAY_MS, Server, standing_in

from loadtest.compare import store
from loadtest.compare.design import AGAIN, Design
from loadtest.compare.server import Meter, pid_at

ROOT = Path(__file__).parents[1]
LOCUSTFILE = ROOT / "loadtest" / "compare" / "locustfile.py"
ACTUARY = [sys.executable, "-m", "actuary"]
# Blocks of a fifth of a second: enough to see that all is there, too few to say who is slower.
# Four rounds or three with `SHORT` behind it; twice as many without.
SHORT = ("--minutes", "0.05")
QUICK = ("--block", "0.2", "--settle", "0.05", "--minutes", "0.1", "--users", "2", "--fixed")
TIMEOUT_S = 600.0  # a hang, not a busy machine


@pytest.fixture
def stand_in(request: pytest.FixtureRequest) -> Iterator[Server]:
    with standing_in(getattr(request, "param", ["fast", "slow"])) as server:
        yield server


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """The tiny variants' context is 32 tokens."""
    path = tmp_path / "prompts.txt"
    path.write_text("if x\nfor i in\nimport\ndef f(x)\n")
    return path


def _environment() -> dict[str, str]:
    more = {"PYTHONPATH": str(ROOT), "COLUMNS": "200", "LOCUST_USERS": "999", "ACTUARY_PORT": "1"}
    return {**os.environ, **more}


def _started(*arguments: object, cwd: Path) -> subprocess.Popen[str]:
    command = [*ACTUARY, "compare", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=cwd, env=_environment(), **pipes)


def _ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    try:
        out, errors = process.communicate(timeout=TIMEOUT_S)
    finally:
        process.kill()
    return process.returncode, out, errors


def _compare(*arguments: object, cwd: Path) -> tuple[int, str, str]:
    return _ended(_started(*arguments, cwd=cwd))


def _wait_until(condition: Callable[[], Any], process: subprocess.Popen[str] | None = None) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.02)


def _rounds(folder: Path) -> list[Path]:
    return sorted((folder / "rounds").glob("*.json"))


def _whole(folder: Path, rounds: int | None = None) -> store.Run:
    """What the folder holds, each round once with a block of each arm, and no sample of any other."""
    kept = store.read(folder)
    arms = set(kept.run["design"]["arms"])
    assert [each["round"] for each in kept.rounds] == list(range(len(kept.rounds)))
    assert rounds is None or len(kept.rounds) == rounds
    for each in kept.rounds:
        assert [block["position"] for block in each["blocks"]] == list(range(len(arms)))
        assert {block["arm"] for block in each["blocks"]} == arms
    samples = kept.samples.collect()
    counts = samples.filter(~pl.col("settling")).group_by("round", "position", "arm").len()
    assert counts["len"].sum() == kept.blocks["requests"].sum()
    assert set(samples["round"]) <= set(range(len(kept.rounds)))
    # No request is there twice: two that one process sent for one block differ in when, or in what.
    assert samples.select("round", "position", "worker", "at_s", "prompt", "latency_ms").is_unique().all()
    assert not list(folder.rglob("*.part"))
    return kept


def _children(process: subprocess.Popen[str], *words: str) -> list[psutil.Process]:
    """Its children whose command line holds all of `words`."""
    found = []
    for child in psutil.Process(process.pid).children():
        with contextlib.suppress(psutil.Error):
            if set(words) <= set(child.cmdline()):
                found.append(child)
    return found


def _gone(pids: Sequence[int]) -> bool:
    return not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids)


# --- the whole of it ------------------------------------------------------------------------------


def test_a_server_of_its_own_is_started_measured_and_stopped(bundles: Path, prompts: Path, tmp_path: Path) -> None:
    process = _started("--bundles", bundles, "--prompts", prompts, *QUICK, "--out", "run", "--json", "-", cwd=tmp_path)
    _wait_until(lambda: _children(process, "locust"), process)
    children = [child.pid for child in psutil.Process(process.pid).children()]
    assert len(children) == 2, "the server, and one Locust for all blocks"
    record = str(tmp_path / "run" / "experiments.db")
    assert len(_children(process, "--database", record)) == 1, "experiments that run elsewhere have no load of ours"
    code, out, errors = _ended(process)
    assert code == 0, errors
    assert _gone(children)
    result = json.loads(out)  # nothing else on standard output
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == result
    assert result["baseline"] == "gelu"
    assert {arm["model"] for arm in result["arms"]} == {"gelu-sigmoid-head", "swiglu"}
    assert {"ratio", "low", "high"} <= set(result["aa"])
    assert (tmp_path / "run" / "report.html").is_file()

    kept = _whole(tmp_path / "run")
    assert len(kept.rounds) >= 2
    assert kept.run["own_server"]
    assert all(len(arm["facts"]["files"]["model.onnx"]) == 64 for arm in kept.run["arms"])
    for block in kept.blocks.to_dicts():
        assert block["void"] == ""
        assert block["failures"] == 0
        assert 0 < block["infer_ms"] <= block["total_ms"] < block["p50_ms"]
        # Of two cores in 0.2 s; and no block costs nothing, as one of less than 10 ms would by /proc.
        assert 0 < block["cpu_s"] < 0.5
        assert block["rss_mb"] > 20
    assert {visit["arm"] for visit in kept.warmup[0]["visits"]} == set(kept.run["design"]["arms"])
    samples = kept.samples.collect()
    assert any(abs(ms * 10 - round(ms * 10)) > 1e-6 for ms in samples["latency_ms"]), "rounded to 0.1 ms"

    # The command says all that was asked, and measures the same again.
    words = kept.run["command"].split()
    for option, value in (("--block", 0.2), ("--settle", 0.05), ("--minutes", 0.1), ("--users", 2)):
        assert float(words[words.index(option) + 1]) == value
    assert words[words.index("--variants") + 1] == "gelu,gelu-sigmoid-head,swiglu"


def test_arms_never_overlap_and_come_in_the_order_of_the_design(stand_in: Server, tmp_path: Path) -> None:
    code, _, errors = _compare("--url", stand_in.url, *QUICK, "--out", "run", cwd=tmp_path)
    assert code == 0, errors
    kept = _whole(tmp_path / "run")
    design = Design.of_json(kept.run["design"])
    # Warm-up in the first round's order, then the rounds; as the server saw them.
    orders = [design.order(0), *(design.order(number) for number in range(len(kept.rounds)))]
    models = [design.model_of(arm) for order in orders for arm in order]
    assert [model for model, _ in groupby(model for model, _ in stand_in.seen)] == [
        model for model, _ in groupby(models)
    ]

    # Each request that the server saw is in the samples, but for the discarded warm-up's.
    warmed = sum(visit["requests"] for each in kept.warmup for visit in each["visits"])
    assert kept.samples.collect().height + warmed == len(stand_in.seen)

    ends = kept.samples.group_by("round", "position").agg(
        pl.col("at_s").min().alias("first"), (pl.col("at_s") + pl.col("latency_ms") / 1000).max().alias("last")
    )
    spans = ends.collect().sort("round", "position").select("first", "last").rows()
    for (_, last), (first, _) in pairwise(spans):
        assert first > last - 0.002, "a request left before the arm before it was answered"

    assert np.median([first - last for (_, last), (first, _) in pairwise(spans)]) < 1, (
        "Locust starts once, not per block"
    )

    blocks = {arm: each for (arm,), each in kept.blocks.group_by("arm")}
    assert set(blocks) == {"fast", "slow", "fast" + AGAIN}
    for arm, each in blocks.items():
        assert each["p50_ms"].min() > DELAY_MS[design.model_of(arm)]
    assert blocks["fast"]["cpu_s"].is_null().all(), "what listens there is no `actuary serve`"


@pytest.mark.parametrize("arrivals", ["constant", "poisson"])
def test_open_arrivals_leave_as_planned(arrivals: str, stand_in: Server, tmp_path: Path) -> None:
    arguments = ("--block", "1", "--settle", "0.2", "--minutes", "0.1", "--rate", "40", "--arrivals", arrivals)
    code, _, errors = _compare("--url", stand_in.url, *arguments, "--fixed", "--out", "run", cwd=tmp_path)
    assert code == 0, errors
    kept = _whole(tmp_path / "run")
    design = Design.of_json(kept.run["design"])
    samples = kept.samples.collect()
    for number, position, arm in kept.blocks.select("round", "position", "arm").rows():
        its = samples.filter((pl.col("round") == number) & (pl.col("position") == position)).sort("planned_s")
        planned = [when_s for when_s, _ in design.visit(number, arm).planned(_count(8))]
        assert its.height == len(planned)
        began_s = its["planned_s"][0] - planned[0]
        assert its["planned_s"].to_list() == pytest.approx([began_s + when_s for when_s in planned], abs=1e-3)
        late_ms = ((its["at_s"] - its["planned_s"]) * 1000).to_list()
        assert its["late_ms"].to_list() == pytest.approx(late_ms, abs=0.25)  # of times to 0.1 ms


def _count(requests: int) -> Any:
    from loadtest.compare.workloads import Request, Workload

    return Workload("", (Request("x"),) * requests, 10)


def test_workers_share_the_load_and_lose_nothing(stand_in: Server, tmp_path: Path) -> None:
    # Without --settle it would ask how long an answer takes, by requests that are in no sample.
    times = ("--block", "0.5", "--settle", "0.2", "--minutes", "0.05")
    arguments = (*times, "--rate", "60", "--arrivals", "constant", "--workers", "2")
    code, _, errors = _compare("--url", stand_in.url, *arguments, "--fixed", "--out", "run", cwd=tmp_path)
    assert code == 0, errors
    kept = _whole(tmp_path / "run")
    samples = kept.samples.collect()
    assert set(samples["worker"]) == {"w0", "w1"}
    warmed = sum(visit["requests"] for each in kept.warmup for visit in each["visits"])
    assert samples.height + warmed == len(stand_in.seen)
    for block in kept.blocks.to_dicts():
        assert block["requests"] == 30


def test_workers_of_other_machines_join(stand_in: Server, tmp_path: Path) -> None:
    port = free_port()
    locust = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--worker", "--master-host", "127.0.0.1"]
    process = _started(
        *("--url", stand_in.url, *QUICK, *SHORT, "--master", f"127.0.0.1:{port}", "--workers", 1, "--out", "run"),
        cwd=tmp_path,
    )
    worker = subprocess.Popen([*locust, "--master-port", str(port)], cwd=tmp_path, env=_environment())
    try:
        code, _, errors = _ended(process)
        assert code == 0, errors
        worker.wait(TIMEOUT_S)
    finally:
        worker.kill()
    assert _whole(tmp_path / "run").blocks["requests"].min() > 0


def test_completions_are_timed_to_the_first_token_and_between(bundles: Path, prompts: Path, tmp_path: Path) -> None:
    arguments = ("--bundles", bundles, "--prompts", prompts, "--variants", "gelu,swiglu", "--completions", "4")
    code, _, errors = _compare(*arguments, *QUICK, *SHORT, "--out", "run", cwd=tmp_path)
    assert code == 0, errors
    kept = _whole(tmp_path / "run")
    for block in kept.blocks.to_dicts():
        assert block["failures"] == 0, block
        assert 0 < block["ttft_ms"] < block["p50_ms"]
        assert block["itl_ms"] > 0
        assert block["tokens_per_s"] == pytest.approx(4 * block["requests_per_s"])


# --- what a stall does ----------------------------------------------------------------------------


def test_a_stall_of_the_server_is_in_the_corrected_p99_alone(bundles: Path, prompts: Path, tmp_path: Path) -> None:
    """Two users wait through a second in which sixty requests were due; of 240, their two are less than a hundredth."""
    with serving(bundles) as (url, server):
        arguments = ("--url", url, "--variants", "gelu,swiglu", "--prompts", prompts, "--rate", "60", "--users", "2")
        process = _started(
            *arguments, "--block", "4", "--settle", "0.5", "--minutes", "0.01", "--out", "run", cwd=tmp_path
        )
        _wait_until((tmp_path / "run" / "warmup.jsonl").exists, process)
        time.sleep(1.0)  # within the first block
        server.send_signal(signal.SIGSTOP)
        time.sleep(1.0)
        server.send_signal(signal.SIGCONT)
        code, _, errors = _ended(process)
    assert code == 0, errors
    stalled, *others = _whole(tmp_path / "run", rounds=1).blocks.to_dicts()
    assert stalled["p99_ms"] > 800
    assert stalled["uncorrected_p99_ms"] < stalled["p99_ms"] / 2
    assert all(block["p99_ms"] < stalled["p99_ms"] for block in others)


def test_a_client_that_stands_still_voids_its_block_and_says_so(stand_in: Server, tmp_path: Path) -> None:
    process = _started(
        *("--url", stand_in.url, "--rate", "50", "--block", "2", "--settle", "0.2", "--minutes", "0.1", "--fixed"),
        *("--out", "run", "--json", "-"),
        cwd=tmp_path,
    )
    _wait_until((tmp_path / "run" / "warmup.jsonl").exists, process)
    time.sleep(0.7)  # within the first block
    (locust,) = _children(process, "locust")
    locust.send_signal(signal.SIGSTOP)
    time.sleep(0.5)
    locust.send_signal(signal.SIGCONT)
    code, out, errors = _ended(process)
    assert code == 0, errors
    void = [block for block in _whole(tmp_path / "run").blocks.to_dicts() if block["void"]]
    assert (void[0]["round"], void[0]["position"]) == (0, 0)
    assert "client too slow to keep the plan" in void[0]["void"]
    assert json.loads(out)["void_rounds"] >= 1
    assert any("client too slow" in said for said in json.loads(out)["said"])


# --- killed ---------------------------------------------------------------------------------------


def test_a_killed_comparison_leaves_no_process_and_resumes(bundles: Path, prompts: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = _started("--bundles", bundles, "--prompts", prompts, *QUICK, "--out", "run", cwd=tmp_path)
    _wait_until(lambda: len(_rounds(run)) >= 2, process)
    children = [child.pid for child in psutil.Process(process.pid).children()]
    process.kill()
    process.communicate()
    _wait_until(lambda: _gone(children))
    before = {
        path: path.read_bytes() for path in (run / "rounds").iterdir() if path.with_suffix(".json") in _rounds(run)
    }
    assert not (run / "result.json").exists()
    # What a kill between the two files of a round leaves:
    next_ = run / "rounds" / f"{len(_rounds(run)):05d}.parquet"
    shutil.copy(run / "rounds" / "00000.parquet", next_)

    code, _, errors = _compare("--resume", "run", cwd=tmp_path)
    assert code == 0, errors
    kept = _whole(run)
    assert len(kept.rounds) > len(before) // 2
    assert {path: path.read_bytes() for path in before} == before, "a round that was recorded was touched"
    assert len(kept.warmup) == 2
    assert kept.blocks["began_s"].is_sorted()
    result = json.loads((run / "result.json").read_text())
    assert result["rounds"] == len(kept.rounds)

    # A run that is complete measures nothing more.
    code, _, errors = _compare("--resume", "run", cwd=tmp_path)
    assert code == 0, errors
    assert len(_rounds(run)) == len(kept.rounds)


def test_stopped_it_judges_what_it_has_and_goes_on_later(stand_in: Server, tmp_path: Path) -> None:
    """By Ctrl-C, and when it goes on by SIGTERM."""
    run = tmp_path / "run"
    process = _started("--url", stand_in.url, *QUICK, "--minutes", "10", "--out", "run", cwd=tmp_path)
    _wait_until(lambda: len(_rounds(run)) >= 3, process)
    process.send_signal(signal.SIGINT)
    code, _, errors = _ended(process)
    assert code == 0, errors
    kept = _whole(run)
    result = json.loads((run / "result.json").read_text())
    assert (result["ended"], result["rounds"]) == ("interrupted", len(kept.rounds))

    process = _started("--resume", run, cwd=tmp_path)
    _wait_until(lambda: len(_rounds(run)) >= len(kept.rounds) + 2, process)
    process.send_signal(signal.SIGTERM)
    code, _, errors = _ended(process)
    assert code == 0, errors
    rounds = len(_whole(run).rounds)
    result = json.loads((run / "result.json").read_text())
    assert (result["ended"], result["rounds"]) == ("interrupted", rounds)


def test_stopped_before_the_first_round_there_is_nothing_to_judge(stand_in: Server, tmp_path: Path) -> None:
    # With the block and its settling given, nothing is asked before the load.
    arguments = ("--url", stand_in.url, "--block", "30", "--settle", "0.2", "--users", "2")
    process = _started(*arguments, "--out", "run", cwd=tmp_path)
    _wait_until(lambda: stand_in.seen, process)
    process.send_signal(signal.SIGINT)
    code, _, errors = _ended(process)
    assert code == 1
    assert "before the first round" in errors
    assert "--resume" in errors


@pytest.mark.parametrize(("workers", "killed"), [(0, "--driver"), (2, "--driver"), (2, "--worker")])
def test_locust_or_a_worker_killed_is_started_again(
    workers: int, killed: str, stand_in: Server, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = _started("--url", stand_in.url, *QUICK, "--workers", workers, "--out", "run", cwd=tmp_path)
    _wait_until(lambda: len(_rounds(run)) >= 1, process)
    _children(process, killed)[0].kill()
    code, _, errors = _ended(process)
    assert code == 0, errors
    kept = _whole(run)
    assert "started again in round" in errors
    assert len(kept.warmup) == 2
    result = json.loads((run / "result.json").read_text())
    assert any("exit code -9; started again" in said for said in result["said"])


def test_a_server_of_its_own_that_is_killed_is_started_again(bundles: Path, prompts: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = _started("--bundles", bundles, "--prompts", prompts, *QUICK, "--out", "run", cwd=tmp_path)
    _wait_until(lambda: len(_rounds(run)) >= 1, process)
    _children(process, "serve")[0].kill()
    code, _, errors = _ended(process)
    assert code == 0, errors
    kept = _whole(run)
    assert kept.blocks["failures"].sum() == 0, "the round in which it died was measured anew"
    assert any("the server ended with exit code -9" in said for each in kept.rounds for said in each["said"])


def test_another_s_server_that_dies_is_reported_and_what_was_recorded_is_kept(
    bundles: Path, prompts: Path, tmp_path: Path
) -> None:
    run, port = tmp_path / "run", free_port()
    url = f"http://127.0.0.1:{port}"
    command = [*ACTUARY, "serve", "--bundles", str(bundles), "--port", str(port)]
    with serving(bundles) as (first, server):
        process = _started("--url", first, "--prompts", prompts, *QUICK, "--out", "run", cwd=tmp_path)
        _wait_until(lambda: len(_rounds(run)) >= 1, process)
        server.kill()
        code, _, errors = _ended(process)
    assert code == 1
    assert "no longer answers" in errors
    assert "--resume" in errors
    kept = _whole(run)
    assert kept.blocks["failures"].sum() == 0

    # Not up again: that is said. Up again at another place: it is another run's.
    code, _, errors = _compare("--resume", "run", cwd=tmp_path)
    assert (code, "no server answers" in errors) == (2, True)
    code, _, errors = _compare("--resume", "run", "--url", url, cwd=tmp_path)
    assert (code, "leave it out" in errors) == (2, True)
    port = int(first.rpartition(":")[2])
    again = subprocess.Popen([*command[:-1], str(port)], stderr=subprocess.DEVNULL)
    try:
        _wait_until(lambda: _listens(port))
        code, _, errors = _compare("--resume", "run", cwd=tmp_path)
    finally:
        again.terminate()
        again.wait(TIMEOUT_S)
    assert code == 0, errors
    assert len(_whole(run).rounds) > len(kept.rounds)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


# --- refused --------------------------------------------------------------------------------------


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the verb here; its exit code and what it said. Nothing may be left in the folder of the run."""
    from actuary import main

    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            main(["compare", *map(str, arguments)])
        assert isinstance(ended.value.code, int)
        said = capsys.readouterr().err
        assert "Traceback" not in said
        return ended.value.code, said

    return run


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--variants", "fast,slwo"), "did you mean 'slow'?"),
        (("--variants", "fast,fast"), "named twice"),
        (("--variants", "fast"), "'fast' alone is nothing to compare"),
        (("--variants", ""), "alone is nothing to compare"),
        (("--baseline", "none"), "served: fast, slow"),
        (("--variants", "fast,slow", "--baseline", "none"), "not among --variants"),
        (("--bundles", "x"), "leave out either"),
        (("--ops", "x"), "leave out either"),
        (("--prompts", "none.txt"), "cannot be read"),
        (("--prompts", "empty.txt"), "no prompt"),
        (("--prompts", "empty.jsonl"), "holds nothing"),
        (("--traffic", "empty.jsonl"), "holds nothing"),
        (("--traffic", "t.jsonl", "--rate", "5"), "has its own times"),
        (("--prompts", "p.txt", "--corpus", "p.txt"), "both say what to send"),
        (("--lengths", "fixed:8"), "--corpus"),
        (("--workers", "3", "--users", "2"), "give each one"),
        (("--rate", "9", "--block", "0.5"), "fewer than 5 requests"),
        (("--master", "nowhere", "--workers", "1"), "HOST:PORT"),
        (("--master", "127.0.0.1:5557"), "--workers"),
        (("--json", "."), "is a folder"),
        (("--json", "none/r.json"), "cannot be written"),
        (("--out", "/proc/x"), "cannot be made"),
        *(((option, value), option) for option in ("--rate", "--minutes", "--block") for value in ("0", "-1", "nan")),
        *((("--equivalence", value), "--equivalence") for value in ("0", "1", "nan", "x")),
        (("--minutes", "1e308"), "x<=10080"),
        (("--sweep", "10081"), "x<=10080"),
        (("--users", "0"), "--users"),
        (("--settle", "-1"), "--settle"),
        (("--arrivals", "bursts"), "--arrivals"),
        (("--workers", "-1"), "--workers"),
    ],
)
def test_bad_input(arguments: tuple[str, ...], said: str, stand_in: Server, refused: Any, tmp_path: Path) -> None:
    for name in ("empty.txt", "empty.jsonl"):
        (tmp_path / name).write_text("\n \n")
    (tmp_path / "p.txt").write_text("x\n")
    (tmp_path / "t.jsonl").write_text('{"at_s": 0, "prompt": "x"}\n')
    before = sorted(tmp_path.iterdir())
    code, message = refused("--url", stand_in.url, "--out", "run", *arguments)
    assert code == 2
    assert said in message, message
    assert sorted(tmp_path.iterdir()) == before
    assert not stand_in.seen


def test_a_server_that_is_down_or_is_not_ours(stand_in: Server, refused: Any, tmp_path: Path) -> None:
    code, message = refused("--url", f"http://127.0.0.1:{free_port()}", "--out", "run")
    assert (code, "no server answers" in message) == (2, True)
    code, message = refused("--url", f"{stand_in.url}/?x=1", "--out", "run")
    assert (code, "not the address" in message) == (2, True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stand_in", [["fast"]], indirect=True)
def test_a_server_of_one_variant(stand_in: Server, refused: Any) -> None:
    code, message = refused("--url", stand_in.url)
    assert (code, "serves 'fast' alone" in message) == (2, True)


def test_bundles_that_cannot_be_served(refused: Any, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    code, message = refused("--bundles", "none", "--out", "run")
    assert code == 2
    assert "`actuary serve` did not start" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("stand_in", [["fast", "broken"]], indirect=True)
def test_a_variant_that_answers_errors_ends_it(stand_in: Server, tmp_path: Path) -> None:
    """Its blocks are void in every round: nothing can ever be said."""
    code, _, errors = _compare("--url", stand_in.url, *QUICK, "--minutes", "5", "--out", "run", cwd=tmp_path)
    assert code == 1
    assert "HTTP 503 overloaded" in errors
    assert f"3 rounds are kept in {tmp_path / 'run'}: with that folder `actuary compare --resume`" in errors
    assert len(_whole(tmp_path / "run").rounds) == 3
    code, _, errors = _compare("--resume", "run", cwd=tmp_path)  # as it is said; the variant is as it was
    assert (code, "6 rounds are kept" in errors) == (1, True)
    _whole(tmp_path / "run", 6)


def test_resume_refuses_what_is_not_the_run(stand_in: Server, refused: Any, tmp_path: Path) -> None:
    code, _, errors = _compare("--url", stand_in.url, *QUICK, "--minutes", "0.001", "--out", "run", cwd=tmp_path)
    assert code == 0, errors
    code, message = refused("--resume", "run", "--users", "3")
    assert (code, "--users 3: the run in" in message) == (2, True)
    code, message = refused("--resume", "run", "--out", "other")
    assert (code, "--out other" in message) == (2, True)
    code, message = refused("--resume", "none")
    assert (code, "holds no run" in message) == (2, True)
    code, message = refused("--url", stand_in.url, "--out", "run")
    assert (code, "already holds a run" in message) == (2, True)
    with store.locked(tmp_path / "run"):
        code, message = refused("--resume", "run")
    assert (code, "another comparison" in message) == (2, True)
    file = tmp_path / "run" / store.RUN
    kept = json.loads(file.read_text())
    kept["arms"][0]["facts"]["files"] = {"model.onnx": "1" * 64}
    kept["design"]["minutes"] = 5  # of which most are missing
    file.write_text(json.dumps(kept))
    code, message = refused("--resume", "run")
    assert (code, "another bundle" in message) == (2, True)
    file.write_text(json.dumps(kept | {"schema": 2}))
    code, message = refused("--resume", "run")
    assert (code, "another version" in message) == (2, True)


# --- the server's process -------------------------------------------------------------------------


def test_the_process_behind_an_address(server_url: str, stand_in: Server) -> None:
    pid = pid_at(server_url)
    assert pid is not None
    assert "serve" in psutil.Process(pid).cmdline()
    assert pid_at(stand_in.url) is None, "what listens there is no server of ours"
    assert pid_at(f"http://127.0.0.1:{free_port()}") is None
    assert pid_at("http://192.0.2.1:80") is None, "not of this machine"


def test_cpu_time_is_that_of_all_threads_and_finer_than_a_tick() -> None:
    meter = Meter(os.getpid())
    before, own = meter.cpu_s(), time.process_time()
    threads = [threading.Thread(target=lambda: sum(range(200_000))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    after, own_after = meter.cpu_s(), time.process_time()
    assert before is not None
    assert after is not None
    assert after - before == pytest.approx(own_after - own, abs=0.001)
    assert Meter(None).cpu_s() is None
    assert Meter(None).rss_mb() is None
