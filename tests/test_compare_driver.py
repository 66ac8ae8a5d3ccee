"""What the driver of a comparison decides, on stand-ins for its server and its load."""

from __future__ import annotations

import ctypes
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import psutil
import pytest
from compare_runs import TRUTH, write_run
from conftest import free_port
from test_compare_design import _design, _workload

from actuary import ActuaryError, BadInput
from loadtest import plan as planning
from loadtest.compare import cli, ffn, report, server, store, verdict
from loadtest.compare.design import Visit
from loadtest.compare.driver import VOID_ROUNDS, VOID_S, Comparison, _State, check_alive
from loadtest.compare.generator import Generator, GeneratorDied, Place, Seen
from loadtest.compare.server import Meter, ServerDied
from loadtest.compare.workloads import Workload


class Silent:
    """Progress that nobody reads."""

    def starting(self, what: str) -> None: ...

    def visiting(self, number: int, position: int, arm: str) -> None: ...

    def finished(self, number: int, blocks: pl.DataFrame) -> None: ...

    def say(self, sentence: str) -> None: ...


class StandIn:
    """A server of its own that writes down what is done with it."""

    def __init__(self, url: str, done: list[str]) -> None:
        self.url, self._done = url, done
        done.append(f"start {url}")

    def stop(self) -> None:
        self._done.append(f"stop {self.url}")

    def wait(self, look: Any) -> None:
        self._done.append(f"wait {self.url}")


def _comparison(folder: Path, design: Any = None, workload: Any = None, **changes: Any) -> Comparison:
    values: dict[str, Any] = {
        "design": design or _design(models=("a", "b")), "workload": workload or _workload(), "folder": folder,
        "url": "http://one", "own": None, "restart": None, "warm": lambda url: None, "place": Place(),
        "progress": Silent(),
    }  # fmt: skip
    return Comparison(**(values | changes))


def _state(comparison: Comparison) -> _State:
    empty = pl.LazyFrame(schema=store.SAMPLES)
    return _State(comparison, store.Run({}, store.blocks_of(empty, []), empty, [], []))


def test_a_server_that_hangs_is_stopped_before_another_is_started(tmp_path: Path) -> None:
    done: list[str] = []
    old = StandIn("http://one", done)
    comparison = _comparison(tmp_path, own=old, restart=lambda: StandIn("http://two", done))
    comparison.renew_server()
    assert done == ["start http://one", "stop http://one", "start http://two", "wait http://two"]
    assert comparison.url == "http://two"


@pytest.mark.parametrize(("well", "kind"), [(False, BadInput), (True, ActuaryError)])
def test_where_no_block_of_any_arm_counts_the_input_is_bad(well: bool, kind: type, tmp_path: Path) -> None:
    """Exit code 2; where another arm answers well it is that arm's variant which failed: 1."""
    state = _state(_comparison(tmp_path))
    for number in range(VOID_ROUNDS - 1):
        state._check_void(_facts_of(state, number, well))
    last = _facts_of(state, VOID_ROUNDS - 1, well)
    with pytest.raises(ActuaryError, match=r"no block counts of .*b: nothing answered") as raised:
        state._check_void(last)
    assert type(raised.value) is kind


SLOW = "client too slow to keep the plan: with users free, p99 of the lateness was 14.1 ms (bound 10 ms)"


@pytest.mark.parametrize(
    ("void", "remedy"),
    [
        ("nothing answered: HTTP 503", "the server does not answer that load"),
        (SLOW, "this machine is too busy"),
        ("nothing sent", "this machine is too busy"),
    ],
)
def test_it_is_said_why_no_block_counts_what_to_do_and_how_to_go_on(void: str, remedy: str, tmp_path: Path) -> None:
    state = _state(_comparison(tmp_path))
    said = ""
    while not said:
        state.number += 1
        try:
            state._check_void(_facts_of(state, state.number, True, void))
        except ActuaryError as error:
            said = str(error)
    for words in (
        f"b: {void}",
        remedy,
        "--rate",
        f"{state.number} rounds are kept in {tmp_path}",
        "--resume",
        "report",
    ):
        assert words in said


@pytest.mark.parametrize("void", [SLOW, "nothing sent"])
def test_a_busy_moment_ends_no_comparison(void: str, tmp_path: Path) -> None:
    """As long as VOID_S it may last, however many short rounds that is, and as often as it ends before."""
    state = _state(_comparison(tmp_path))
    long = int(VOID_S)
    for number in range(3 * long):
        state._check_void(_facts_of(state, number, number % long == 0, void, but=""))
    with pytest.raises(ActuaryError, match=f"of the last {long} rounds"):
        state._check_void(_facts_of(state, 3 * long, False, void))


def _facts_of(
    state: _State, number: int, well: bool, void: str = "nothing answered: HTTP 503", but: str = "b"
) -> list[dict[str, Any]]:
    """A round of 1 s whose blocks are void; where it is `well` those of the arm `but` alone."""
    facts = [
        {"round": number, "position": position, "arm": arm, "model": arm[0], "began_s": float(number), "window_s": 1.0,
         "cpu_s": None, "rss_mb": None, "client_cpu_share": 0.1,
         "void": "" if well and arm != but else void}
        for position, arm in enumerate(state.design.arms)
    ]  # fmt: skip
    state.blocks = pl.concat([state.blocks, store.blocks_of(pl.LazyFrame(schema=store.SAMPLES), facts)])
    return facts


class Replay:
    """A load that answers each planned request, and keeps which windows it was told."""

    def __init__(self, workload: Workload) -> None:
        self._workload, self.windows = workload, list[int]()

    def visit(self, visit: Visit, on: Any) -> Seen:
        self.windows.append(visit.round)
        for name in ("began", "block", "ended"):
            on(name, 0.0)
        rows = [
            {"worker": "w0", "prompt": prompt, "planned_s": when_s, "at_s": when_s, "latency_ms": 1.0, "late_ms": 0.0,
             "starved": 0, "tokens": 0, "settling": when_s < visit.settle_s, "failure": ""}
            for when_s, prompt in visit.planned(self._workload)
        ]  # fmt: skip
        return Seen(rows, 0.1)


def test_a_lull_of_recorded_traffic_is_left_out(tmp_path: Path) -> None:
    """Windows of 1 s, of which the first quarter is discarded: 1 to 6 hold nothing, and 8 only what is discarded."""
    design = _design(models=("a", "b"), arrivals="recorded", settle_s=0.25, block_s=0.75)
    workload = _workload(at_s=(0.5, 7.5, 8.1, 9.5))  # begins again after 12.666 s
    (tmp_path / store.ROUNDS).mkdir()
    state = _state(_comparison(tmp_path, design, workload))
    locust = Replay(workload)
    for _ in range(3):
        state._round(locust, Meter(None))  # type: ignore[arg-type]
    assert locust.windows[::3] == [0, 7, 9]
    assert (state.blocks["void"] == "").all()
    assert state.blocks["round"].unique().to_list() == [0, 1, 2], "the windows' numbers are not the rounds'"

    rounds = [json.loads(path.read_text()) for path in sorted((tmp_path / store.ROUNDS).glob("*.json"))]
    resumed = _State(state.comparison, store.Run({}, state.blocks, pl.LazyFrame(), rounds, []))
    resumed._round(locust, Meter(None))  # type: ignore[arg-type]
    assert locust.windows[-1] == 20, "goes on where the kept rounds ended; 13.17 s and 20.17 s are discarded"


def test_traffic_of_which_nothing_is_ever_due_in_a_block_is_refused(tmp_path: Path) -> None:
    design = _design(arrivals="recorded", settle_s=0.25, block_s=0.75)  # alone at 0 s, it is replayed each second
    with pytest.raises(BadInput, match="--settle"):
        _state(_comparison(tmp_path, design, _workload(at_s=(0.0,))))


def test_blocks_that_do_not_count_are_said_by_arm_and_cause() -> None:
    slow = "client too slow to keep the plan: with users free, p99 of the lateness was {} ms (bound 10 ms)"
    why = ["", "3 of 60 requests failed: HTTP 503 overloaded", "2 of 61 requests failed: HTTP 503 overloaded",
           "2 of 61 requests failed: timeout", slow.format(12.5), slow.format(14.1), "nothing sent"]  # fmt: skip
    blocks = pl.DataFrame({"arm": ["a", "b", "b", "b", "a", "a", "b"], "void": why})
    assert cli.void_of(blocks) == {
        ("b", "requests failed: HTTP 503 overloaded"): 2,
        ("b", "requests failed: timeout"): 1,
        ("a", "client too slow to keep the plan"): 2,
        ("b", "nothing sent"): 1,
    }


def test_that_the_load_stands_in_an_experiments_record_is_said() -> None:
    kinds = {"gelu": "model", "act": "experiment", "act:again": "experiment"}
    arms = [{"model": arm.partition(":")[0], "facts": {"object": kind}} for arm, kind in kinds.items()]
    [said] = cli._of_experiments({"arms": arms})
    assert said.startswith("act is an experiment: this load stands in its record")


@pytest.mark.parametrize("resumed_when", ["over", "missing"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_it_judges_does_not_throw_the_verdict_away(
    number: signal.Signals, resumed_when: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On a folder whose load is over, and on one whose load ends at once: `measure` is told to find it settled."""

    def change(run: dict[str, Any]) -> None:
        run["arguments"] = dict.fromkeys(("sweep", "objective_ms", "master")) | {"url": "http://one", "workers": 0}
        run["design"] |= {"minutes": 0.1 if resumed_when == "over" else 60.0, "fixed": True}

    run = store.run_of(write_run(tmp_path / "run", change, truth={name: TRUTH[name] for name in ("gelu", "relu")}))
    _workload().write(tmp_path / "run" / store.WORKLOAD)
    monkeypatch.setattr(planning, "served_models", lambda url: {arm["model"]: arm["facts"] for arm in run["arms"]})
    monkeypatch.setattr(cli, "measure", lambda comparison, settled: "settled")
    written, judged = report.write_files, verdict.judge

    def signalled(call: Callable[..., Any]) -> Callable[..., Any]:
        def then(*given: Any, **more: Any) -> Any:
            signal.raise_signal(number)
            return call(*given, **more)

        return then

    monkeypatch.setattr(verdict, "judge", signalled(judged))
    monkeypatch.setattr(report, "write_files", signalled(written))
    before = [signal.signal(each, _exits) for each in (signal.SIGINT, signal.SIGTERM)]
    try:
        cli.compare.main(["--resume", str(tmp_path / "run")], standalone_mode=False)
        assert signal.getsignal(number) is _exits, "afterwards it is as before"
    finally:
        for each, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
            signal.signal(each, handler)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["arms"][0]["model"] == "relu"
    assert (tmp_path / "run" / "report.md").is_file()


def _exits(number: int, _frame: Any) -> None:
    raise SystemExit(128 + number)


def test_a_profile_that_is_stopped_is_left_for_the_next_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arms = [{"model": model, "facts": {"provider": ffn.CPU, "context": 32, "files": {}}} for model in ("a", "b")]
    store.create(tmp_path / "run", {"arms": arms, "workload": {}})
    profiler = tmp_path / "profiler"
    profiler.write_text("#!/bin/sh\necho $$ >> pids\nexec sleep 600\n")
    profiler.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(profiler))
    monkeypatch.setattr(ffn, "_bundle", lambda *_: tmp_path)
    started = tmp_path / "pids"
    ffn.measure(tmp_path / "run", tmp_path, tmp_path, lambda: started.exists() and bool(started.read_text().strip()))
    (pid,) = started.read_text().split()
    assert not psutil.pid_exists(int(pid))
    assert not (tmp_path / "run" / ffn.FILE).exists()
    assert ffn.said(tmp_path / "run") == []


@pytest.mark.parametrize("first", ["", """printf '{"said": "ready"}\\n' >&"$2";"""])
def test_a_locust_that_hangs_up_before_it_ends_is_told_by_its_exit_code(
    first: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As one that is killed does on a busy machine, while the driver waits for it or is about to tell it something."""
    locust = tmp_path / "locust"
    hang_up = 'while [ "$1" != --driver ]; do shift; done; FIRST eval "exec $2>&-"; sleep 0.5; kill -9 $$'
    locust.write_text("#!/bin/bash\n" + hang_up.replace("FIRST", first))
    locust.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(locust))
    begun = Generator("http://one", _workload(), ("a", "b"), 1, 1.0, Place(), tmp_path, lambda: None)
    with pytest.raises(GeneratorDied, match=r"^Locust ended with exit code -9; "), begun as running:
        running.visit(_design().visit(0, "a"), lambda *_: None)


def test_a_server_that_hangs_up_before_it_ends_is_told_by_its_exit_code(tmp_path: Path) -> None:
    """As one of ours that is killed does on a busy machine; one of another is not waited for."""
    own = object.__new__(server.OwnServer)
    own.log = tmp_path / server.LOG
    own.log.touch()
    own.process = subprocess.Popen(["bash", "-c", "sleep 0.5; kill -9 $$"])
    nobody = f"http://127.0.0.1:{free_port()}"
    failed = Seen([{"failure": "no answer"}], 0.1)
    with pytest.raises(ServerDied, match="no longer answers"):
        check_alive(_comparison(tmp_path, url=nobody), failed)
    with pytest.raises(ServerDied, match="the server ended with exit code -9"):
        check_alive(_comparison(tmp_path, url=nobody, own=own), failed)


def test_between_fork_and_exec_no_library_is_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, ...]] = []
    monkeypatch.setattr(server, "_PRCTL", lambda *words: told.append(words))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: pytest.fail("loads a library in the child"))
    server.die_with_parent()
    assert told == [(server.PR_SET_PDEATHSIG, signal.SIGTERM)]
