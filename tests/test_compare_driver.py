"""What the driver of a comparison decides, on stand-ins for its server and its load."""

from __future__ import annotations

import ctypes
import signal
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from test_compare_design import _design, _workload

from actuary import ActuaryError, BadInput
from loadtest.compare import server, store
from loadtest.compare.driver import VOID_ROUNDS, Comparison, _State
from loadtest.compare.generator import Place


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
    with pytest.raises(ActuaryError, match="no block counts of .*b: nothing answered") as raised:
        for number in range(VOID_ROUNDS):
            facts = [
                {"round": number, "position": position, "arm": arm, "model": arm[0], "began_s": 1.0, "window_s": 1.0,
                 "cpu_s": None, "rss_mb": None, "client_cpu_share": 0.1,
                 "void": "" if well and arm != "b" else "nothing answered: HTTP 503"}
                for position, arm in enumerate(state.design.arms)
            ]  # fmt: skip
            state.blocks = pl.concat([state.blocks, store.blocks_of(pl.LazyFrame(schema=store.SAMPLES), facts)])
            state._check_void(facts)
    assert type(raised.value) is kind
    assert number == VOID_ROUNDS - 1


def test_between_fork_and_exec_no_library_is_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, ...]] = []
    monkeypatch.setattr(server, "_PRCTL", lambda *words: told.append(words))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: pytest.fail("loads a library in the child"))
    server.die_with_parent()
    assert told == [(server.PR_SET_PDEATHSIG, signal.SIGTERM)]
