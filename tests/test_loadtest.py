"""`actuary load` against a stand-in server of known delays, and once against the real service."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import HANG_S, free_port
from stand_in import DELAY_MS, Server, StandIn, standing_in

from actuary import BadInput
from loadtest import plan as planning
from loadtest.cli import _repeat
from loadtest.plan import Plan
from loadtest.runner import _command, _Watch
from loadtest.samples import Sample, in_window, judge_client, read_samples, summarise, write_header, write_samples

ROOT = Path(__file__).parents[1]
LOCUSTFILE = ROOT / "loadtest" / "locustfile.py"


@pytest.fixture
def stand_in(request: pytest.FixtureRequest) -> Iterator[Server]:
    with standing_in(getattr(request, "param", ["fast", "slow", "broken", "liar"])) as server:
        yield server


def _load(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "actuary", "load", *arguments]
    return subprocess.run(command, cwd=cwd, env=_environment(), capture_output=True, text=True, timeout=HANG_S)


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", "LOCUST_USERS": "999"}


def _plan(**changes: Any) -> Plan:
    values: dict[str, Any] = {
        "url": "http://h",
        "models": ("a",),
        "users": 2,
        "rate": None,
        "duration_s": 10.0,
    }
    values |= {"warmup_s": 0.0, "prompts": ("p",), "top_k": 1, "seed": 0, "timeout_s": 5.0}
    return Plan(**(values | changes))


def _sample(latency_ms: float = 1.0, at_s: float = 1.0, **changes: Any) -> Sample:
    values: dict[str, Any] = {"worker": "w0", "model": "a", "prompt": 0, "late_ms": 0.0, "starved": 0}
    values |= {"queue_ms": 0.1, "tokenize_ms": 0.1, "infer_ms": 0.5, "total_ms": 0.7, "failure": ""}
    values |= {"planned_s": at_s, "at_s": at_s, "latency_ms": latency_ms}
    return Sample(**(values | changes))


# --- the real thing, against the stand-in ---------------------------------------------------------


def test_rows_samples_and_report_of_a_closed_loop(stand_in: Server, tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = (
        "--url",
        stand_in.url,
        "--users",
        "4",
        "--duration",
        "3",
        "--warmup",
        "0.5",
        "--out",
        str(out),
    )
    done = _load(*arguments, "--json", "-", "--top-k", "3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)  # nothing else on standard output
    rows = {row["model"]: row for row in result["rows"]}
    assert list(rows) == stand_in.models

    # Balanced: each of four users gives every variant one request per round, of which two may be cut.
    counts = [row["requests"] for row in rows.values()]
    assert min(counts) > 50
    assert max(counts) - min(counts) <= 8, counts

    # Finer than a millisecond: 7.3 ms must not read as 7, nor 9.7 as 10. The least of some hundred
    # latencies is close to its delay even on busy cores; the median may lie above it.
    for name in ("fast", "slow"):
        latency = rows[name]["latency_ms"]
        assert DELAY_MS[name] < latency["min"] < DELAY_MS[name] + 2
        assert latency["min"] < latency["p50"] <= latency["p90"] <= latency["p99"] <= latency["max"]
        assert rows[name]["server_ms"]["infer"]["p50"] == DELAY_MS[name]
        assert rows[name]["server_ms"]["queue"]["mean"] == 0.125
    gap = rows["slow"]["latency_ms"]["min"] - rows["fast"]["latency_ms"]["min"]
    assert abs(gap - 2.4) < 0.5, gap

    assert rows["fast"]["failures"] == 0
    assert rows["broken"]["failure_reasons"] == {"HTTP 503 overloaded": rows["broken"]["requests"]}
    assert rows["broken"]["latency_ms"]["p50"] is None
    assert rows["broken"]["requests_per_s"] == 0
    assert rows["liar"]["failure_reasons"] == {
        "wrong answer: of 'someone-else', asked for 'liar'": rows["liar"]["requests"]
    }
    for name in ("locust", "numpy", "python"):
        assert result["versions"][name]
    assert result["machine"]["cores"]
    assert result["percentile_method"] == "numpy linear"
    assert result["plan"]["users"] == 4, "LOCUST_USERS of the environment must not count"

    # The rows are those of the raw samples, by numpy's percentile over the same window.
    measured = in_window(read_samples(out / "samples.csv"), _plan(warmup_s=0.5), result["window_s"])
    fast = [sample.latency_ms for sample in measured if sample.model == "fast"]
    assert len(fast) == rows["fast"]["requests"]
    assert rows["fast"]["latency_ms"]["p90"] == pytest.approx(np.percentile(fast, 90), abs=1e-3)
    assert any(abs(latency * 10 - round(latency * 10)) > 1e-6 for latency in fast), "rounded to 0.1 ms"

    assert json.loads((out / "result.json").read_text()) == result
    page = (out / "report.html").read_text()
    assert "HTTP 503 overloaded" in page
    assert "$" not in page.split("</style>")[0]
    assert "src=" not in page.split("<body>")[1], "an asset from outside"
    assert "fast" in done.stderr
    assert not list(out.glob("*.part"))
    assert {prompt for _, prompt in stand_in.seen} == set(planning.PROMPTS)


@pytest.mark.parametrize("stand_in", [["fast", "slow"]], indirect=True)
def test_constant_rate_keeps_its_plan_and_charges_a_stall_to_all_who_were_due(stand_in: Server, tmp_path: Path) -> None:
    stand_in.stall_at = 75  # half a second into the window
    arguments = ("--url", stand_in.url, "--rate", "50", "--users", "2", "--duration", "2", "--warmup", "1")
    done = _load(*arguments, "--json", "result.json", "--no-html", "--out", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    fast, slow = result["rows"]
    assert abs(fast["requests"] - slow["requests"]) <= 2  # a round may be cut at either end of the window
    assert fast["requests"] + slow["requests"] == pytest.approx(100, abs=2)
    # Two users wait through the stall of 500 ms, and some 25 requests were due in it.
    total = result["total"]
    assert total["latency_ms"]["p90"] > 100
    assert total["uncorrected_ms"]["p90"] < 50
    client = result["client"]
    assert client["kept_plan"] is False
    assert "all 2 users waiting" in client["said"][0]
    assert "note: " in done.stdout
    assert not (tmp_path / "run" / "report.html").exists()


@pytest.mark.parametrize("stand_in", [["fast"]], indirect=True)
def test_ctrl_c_reports_what_was_measured(stand_in: Server, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "actuary", "load", "--url", stand_in.url, "--duration", "60"]
    process = subprocess.Popen(
        [*command, "--users", "2", "--warmup", "0", "--out", "run"],
        cwd=tmp_path,
        env=_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    _wait_until(lambda: len(stand_in.seen) > 50)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=HANG_S)
    assert process.returncode == 0, errors
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["interrupted"]
    assert result["rows"][0]["failures"] == 0
    # Those in flight were waited for, and every request that the server saw is a sample.
    assert len(read_samples(tmp_path / "run" / "samples.csv")) == len(stand_in.seen)
    assert "interrupted" in output


@pytest.mark.parametrize("stand_in", [["fast", "hangs"]], indirect=True)
def test_a_request_without_an_answer_is_a_failure(stand_in: Server, tmp_path: Path) -> None:
    arguments = ("--url", stand_in.url, "--users", "2", "--duration", "2", "--warmup", "0", "--timeout", "1.5")
    done = _load(*arguments, "--no-html", "--out", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["rows"][0]["failures"] == 0
    assert result["rows"][1]["failure_reasons"]["no answer within 1.5 s"] >= 2  # of each of the two users
    assert result["client"]["unanswered"] == 0
    assert len(read_samples(tmp_path / "run" / "samples.csv")) == len(stand_in.seen)


@pytest.mark.parametrize("stand_in", [["fast", "drips"]], indirect=True)
def test_a_request_that_was_cut_off_is_said(stand_in: Server, tmp_path: Path) -> None:
    arguments = ("--url", stand_in.url, "--users", "2", "--duration", "1", "--warmup", "0", "--timeout", "0.5")
    done = _load(*arguments, "--no-html", "--out", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "result.json").read_text())["client"]["unanswered"] == 2  # one of each user
    assert len(read_samples(tmp_path / "run" / "samples.csv")) == len(stand_in.seen) - 2
    assert "note: 2 requests had neither an answer nor a timeout" in done.stdout


@pytest.mark.parametrize("stand_in", [["broken"]], indirect=True)
def test_all_failed_is_exit_1_with_its_result(stand_in: Server, tmp_path: Path) -> None:
    done = _load("--url", stand_in.url, "--duration", "1", "--warmup", "0", "--out", "run", cwd=tmp_path)
    assert done.returncode == 1
    assert "every request failed" in done.stderr
    assert "HTTP 503 overloaded" in done.stderr
    assert json.loads((tmp_path / "run" / "result.json").read_text())["rows"][0]["latency_ms"]["p50"] is None


@pytest.mark.parametrize("stand_in", [["fast", "slow"]], indirect=True)
def test_master_and_worker_bring_every_sample_to_the_master(stand_in: Server, tmp_path: Path) -> None:
    port = free_port()
    samples = tmp_path / "samples.csv"
    locust = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--headless", "--only-summary"]
    master = [*locust, "--master", "--master-bind-host", "127.0.0.1", "--master-bind-port", str(port)]
    master += [
        "--host",
        stand_in.url,
        "--users",
        "2",
        "--spawn-rate",
        "2",
        "--run-time",
        "3s",
        "--stop-timeout",
        "5",
    ]
    master += [
        "--expect-workers",
        "1",
        "--expect-workers-max-wait",
        str(HANG_S),
        "--rate",
        "40",
        "--samples",
        str(samples),
    ]
    worker = [*locust, "--worker", "--master-host", "127.0.0.1", "--master-port", str(port)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes: dict[str, Any] = {
        "stdin": subprocess.DEVNULL,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
    }
    processes = [
        subprocess.Popen(command, cwd=tmp_path, env=environment, text=True, **pipes) for command in (master, worker)
    ]
    try:
        outputs = [process.communicate(timeout=HANG_S)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    kept = read_samples(samples)
    assert len(kept) == len(stand_in.seen), "a sample was lost on its way to the master"
    assert len(kept) / max(s.at_s for s in kept) == pytest.approx(40, rel=0.1)
    assert Counter(s.model for s in kept) == Counter(model for model, _ in stand_in.seen)
    assert all(not s.failure and s.latency_ms > DELAY_MS[s.model] for s in kept)
    facts = json.loads(samples.with_suffix(".client.json").read_text())
    assert len(facts["cpu_s"]) == 1


def test_the_real_service(server_url: str, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("if x\nfor i in\n")  # the tiny variants' context is 32 tokens
    arguments = ("--url", server_url, "--users", "2", "--duration", "3", "--warmup", "0.5", "--out", "run")
    done = _load(*arguments, "--prompts", "prompts.txt", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert {row["model"] for row in result["rows"]} == set(planning.served_models(server_url))
    for row in result["rows"]:
        assert row["requests"] > 0
        assert row["failures"] == 0, row["failure_reasons"]
        server, client = row["server_ms"], row["latency_ms"]
        assert 0 < server["infer"]["p50"] <= server["total"]["p50"] <= client["p50"]


# --- refused at the door --------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["--rate", "--duration", "--warmup", "--timeout"])
@pytest.mark.parametrize("value", ["-1", "nan", "inf", "many"])
def test_bad_numbers(option: str, value: str, run_load: Any) -> None:
    code, message = run_load(option, value)
    assert code == 2
    assert option in message


@pytest.mark.parametrize(("option", "value"), [("--rate", "0"), ("--duration", "0"), ("--users", "0")])
def test_zero_where_it_means_nothing(option: str, value: str, run_load: Any) -> None:
    assert run_load(option, value)[0] == 2


def test_server_down(run_load: Any, tmp_path: Path) -> None:
    code, message = run_load("--url", f"http://127.0.0.1:{free_port()}", "--out", str(tmp_path / "run"))
    assert code == 2
    assert "actuary serve" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://h", "http://", "http://h?x=1"])
def test_bad_url(url: str, run_load: Any) -> None:
    code, message = run_load("--url", url)
    assert (code, "not the address" in message) == (2, True)


def test_unknown_and_repeated_variant(stand_in: Server, run_load: Any, tmp_path: Path) -> None:
    out = ("--out", str(tmp_path / "run"))
    code, message = run_load("--url", stand_in.url, "--models", "fast,slwo", *out)
    assert code == 2
    assert "served: fast, slow, broken, liar" in message
    assert "did you mean 'slow'?" in message
    assert run_load("--url", stand_in.url, "--models", "fast,fast", *out)[0] == 2
    assert run_load("--url", stand_in.url, "--models", "", *out)[0] == 2
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("p.txt", "\n  \n", "no prompt"),
        ("p.jsonl", "{", "line 1 is not JSON"),
        ("p.jsonl", '"a"\n{"text": "b"}', "line 2"),
        ("p.jsonl", '"\\ud800"', "surrogate"),
        ("p.txt", None, "cannot be read"),
    ],
)
def test_bad_prompts(name: str, text: str | None, said: str, run_load: Any, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    code, message = run_load("--prompts", str(tmp_path / name))
    assert code == 2
    assert said in message


def test_a_folder_that_holds_a_run_is_not_written_over(stand_in: Server, run_load: Any, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text("{}")
    code, message = run_load("--url", stand_in.url, "--out", str(tmp_path))
    assert code == 2
    assert "already holds a run" in message


def test_where_nothing_can_be_written_is_said_before_the_run(stand_in: Server, run_load: Any, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    before = sorted(tmp_path.iterdir())
    for option, value in (
        ("--json", tmp_path / "folder"),
        ("--json", tmp_path / "none" / "r.json"),
        ("--json", "/proc/r.json"),
        ("--out", "/proc/x"),
        ("--out", tmp_path / "file"),
        ("--out", tmp_path / "file" / "x"),
        ("--out", tmp_path / ("x" * 300)),
    ):
        out = ("--out", str(tmp_path / "new")) if option == "--json" else ()
        code, message = run_load("--url", stand_in.url, option, str(value), *out)
        assert (code, message.count("\n")) == (2, 1), message
        assert f"{option} {value}" in message
    assert sorted(tmp_path.iterdir()) == before
    assert not stand_in.seen


@pytest.fixture
def run_load(capsys: pytest.CaptureFixture[str]) -> Any:
    from actuary import main

    def run(*arguments: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            main(["load", *arguments])
        assert isinstance(ended.value.code, int)
        return ended.value.code, capsys.readouterr().err

    return run


# --- the parts ------------------------------------------------------------------------------------


def test_turns_are_balanced_and_paired_on_prompts() -> None:
    models, prompts = ("a", "b", "c"), ("p", "q")
    sent = list(islice(planning.turns(models, prompts, seed=1), 60))
    assert set(Counter(sent).values()) == {10}, "every variant sees every prompt equally often"
    for start in range(0, 60, 3):
        assert {model for model, _ in sent[start : start + 3]} == set(models)
        assert len({prompt for _, prompt in sent[start : start + 3]}) == 1
    assert len({tuple(m for m, _ in sent[i : i + 3]) for i in range(0, 60, 3)}) > 1, "the order is shuffled"
    assert sent == list(islice(planning.turns(models, prompts, seed=1), 60))
    assert sent != list(islice(planning.turns(models, prompts, seed=2), 60))


def test_percentiles_by_hand() -> None:
    # 1..10: rank 0.9 * 9 = 8.1, between the ninth and the tenth: 9 + 0.1
    row = summarise("a", [_sample(float(ms)) for ms in range(1, 11)], window_s=2.0)
    assert row["latency_ms"]["p50"] == 5.5
    assert row["latency_ms"]["p90"] == 9.1
    assert row["latency_ms"]["mean"] == 5.5
    assert row["requests_per_s"] == 5.0


def test_a_failure_counts_and_its_latency_does_not() -> None:
    row = summarise("a", [_sample(1.0), _sample(500.0, failure="HTTP 503")], window_s=1.0)
    assert (row["requests"], row["failures"], row["requests_per_s"]) == (2, 1, 1.0)
    assert row["latency_ms"]["max"] == 1.0


def test_the_window_goes_by_the_planned_time() -> None:
    plan = _plan(warmup_s=1.0, rate=10.0)
    early = _sample(at_s=1.5, planned_s=0.9, late_ms=600.0)  # planned in the warm-up, left late
    late = _sample(at_s=11.2, planned_s=10.9, late_ms=300.0)  # planned in the window, left after it
    assert in_window([early, late, _sample(at_s=0.5), _sample(at_s=11.0)], plan, 10.0) == [late]


def test_every_request_that_was_planned_in_the_window_is_in_it(tmp_path: Path) -> None:
    """Ten a second for three seconds are thirty, wherever rounding puts the time at which each left."""
    path, planned_s, sent = tmp_path / "samples.csv", 0.0, []
    for i in range(60):
        late_ms = 0.01 + 0.037 * i
        sent.append(_sample(at_s=planned_s + late_ms / 1000, planned_s=planned_s, late_ms=late_ms))
        planned_s += 1 / 10
    with path.open("w", newline="") as file:
        write_header(file)
        write_samples(file, sent)
    kept = read_samples(path)
    assert len(in_window(kept, _plan(warmup_s=1.0, rate=10.0), 3.0)) == 30
    assert len(in_window(kept, _plan(warmup_s=0.1, rate=10.0), 0.2)) == 2, "0.1 + 0.2 is more than 0.3 in binary"


def test_client_verdict() -> None:
    plan = _plan(rate=10.0)
    on_time = [_sample(at_s=i / 10, late_ms=0.2) for i in range(100)]
    assert judge_client(on_time, plan, 10.0, 0.2)["kept_plan"] is True
    assert judge_client(on_time[:90], plan, 10.0, 0.2)["kept_plan"] is False
    assert judge_client(on_time[:29], plan, 3.0, 0.2)["kept_plan"] is True, "one of thirty fell outside the window"
    assert judge_client(on_time[:27], plan, 3.0, 0.2)["kept_plan"] is False
    slow = judge_client([s._replace(late_ms=30.0) for s in on_time], plan, 10.0, 0.99)
    assert slow["kept_plan"] is False
    assert any("client too slow" in said for said in slow["said"])
    assert any("99% of a core" in said for said in slow["said"])
    starved = judge_client([s._replace(late_ms=30.0, starved=1) for s in on_time], plan, 10.0, 0.2)
    assert starved["kept_plan"] is False
    assert not any("client too slow" in said for said in starved["said"]), "the server was, not the client"
    assert judge_client(on_time, _plan(), 10.0, 0.2)["kept_plan"] is None, "a closed loop has no plan"


def test_a_torn_last_line_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "samples.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([Sample._fields, _sample(), _sample()])
    path.write_text(path.read_text()[:-9])
    assert len(read_samples(path)) == 1


def test_jsonl_and_text_prompts(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('"a\\nb"\n\n{"prompt": "c", "note": 1}\n')
    assert planning.read_prompts(tmp_path / "p.jsonl") == ("a\nb", "c")
    (tmp_path / "p.txt").write_text("x = \n\n  y\n")
    assert planning.read_prompts(tmp_path / "p.txt") == ("x = ", "  y")


def test_only_a_newline_ends_a_prompt(tmp_path: Path) -> None:
    inside = "a\u2028b\u0085c\fd"
    (tmp_path / "p.txt").write_bytes(f"{inside}\r\nx\n".encode())
    assert planning.read_prompts(tmp_path / "p.txt") == (inside, "x")
    (tmp_path / "p.jsonl").write_text(json.dumps(inside, ensure_ascii=False) + "\n")
    assert planning.read_prompts(tmp_path / "p.jsonl") == (inside,)


def test_the_progress_bar_counts_a_failure_with_a_comma(tmp_path: Path) -> None:
    path = tmp_path / "samples.csv"
    with path.open("w", newline="") as file:
        write_header(file)
        write_samples(file, [_sample(), _sample(failure='HTTP 400 the prompt "x, y" is too long, cut it')])
    with _Watch(_plan(), path) as watch:
        watch.update()
    assert (watch.count, watch.failed) == (2, 1)


def test_the_command_that_repeats_a_run_repeats_all_of_it() -> None:
    plan = _plan(rate=1234567.5, duration_s=12345.678, warmup_s=0.1, timeout_s=7.25)
    words = _repeat(plan, None).split()
    for option, value in (("--rate", 1234567.5), ("--duration", 12345.678), ("--warmup", 0.1), ("--timeout", 7.25)):
        assert float(words[words.index(option) + 1]) == value


@pytest.mark.parametrize("timeout_s", [0.5, 30.0, 100.0])
def test_locust_waits_longer_than_a_request_may_take(timeout_s: float, tmp_path: Path) -> None:
    words = _command(_plan(timeout_s=timeout_s), None, tmp_path)
    assert float(words[words.index("--stop-timeout") + 1]) > timeout_s


@pytest.mark.parametrize("models", ["[]", "{}", '{"data": []}', '{"data": [1]}', "<html>"])
def test_a_server_that_is_not_ours(models: str, stand_in: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        StandIn, "do_GET", lambda self: self._answer(200, json.loads(models) if models[0] != "<" else 3)
    )
    with pytest.raises(BadInput):
        planning.served_models(stand_in.url)


def _wait_until(condition: Any) -> None:
    deadline = time.monotonic() + HANG_S
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)
