"""The run folder: a round is there whole or not at all, and blocks are what their samples say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from actuary import BadInput
from loadtest.compare import store
from loadtest.compare.design import Visit
from loadtest.compare.driver import why_void


def _samples(number: int, position: int = 0, count: int = 20, **columns: Any) -> pl.DataFrame:
    values: dict[str, Any] = {
        "round": number,
        "position": position,
        "arm": "a",
        "model": "a",
        "worker": "w0",
        "prompt": 0,
    }
    values |= {"planned_s": 1.0, "at_s": 1.0, "latency_ms": 5.0, "late_ms": 0.0, "starved": 0}
    values |= {"queue_ms": 0.1, "tokenize_ms": 0.2, "infer_ms": 3.0, "total_ms": 3.5, "ttft_ms": float("nan")}
    values |= {"itl_ms": float("nan"), "tokens": 0, "settling": False, "failure": ""}
    filled = {name: value if isinstance(value, list) else [value] * count for name, value in (values | columns).items()}
    return pl.DataFrame(filled, schema=store.SAMPLES)


def _facts(number: int, position: int = 0, **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {"round": number, "position": position, "arm": "a", "model": "a", "began_s": 1.0}
    values |= {"window_s": 2.0, "cpu_s": 0.5, "rss_mb": 100.0, "client_cpu_share": 0.2, "void": ""}
    return values | changes


def _write(folder: Path, number: int) -> None:
    store.write_round(folder, number, _samples(number), {"at": "now", "blocks": [_facts(number)], "said": []})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    store.create(tmp_path / "run", {"design": {}})
    return tmp_path / "run"


def test_rounds_come_back_as_they_were_written(run: Path) -> None:
    for number in range(3):
        _write(run, number)
    kept = store.read(run)
    assert [each["round"] for each in kept.rounds] == [0, 1, 2]
    assert kept.blocks["requests"].to_list() == [20, 20, 20]
    assert kept.samples.collect().height == 60
    assert kept.samples.collect_schema() == store.SAMPLES
    assert not list(run.rglob("*.part"))


def test_a_torn_round_is_not_there_and_is_written_over(run: Path) -> None:
    _write(run, 0)
    (run / "rounds" / "00001.parquet").write_bytes(b"PAR1 torn by a kill")
    (run / "rounds" / "00001.json.part").write_text('{"round": 1, "blo')
    assert store.read(run).samples.collect().height == 20
    _write(run, 1)
    assert store.read(run).samples.collect()["round"].to_list() == [0] * 20 + [1] * 20


def test_a_torn_line_of_the_warm_up_is_skipped(run: Path) -> None:
    for number in range(2):
        store.add_warmup(run, {"visits": [number]})
    whole = (run / store.WARMUP).read_bytes()
    (run / store.WARMUP).write_bytes(whole[:-3])
    assert store.read(run).warmup == [{"visits": [0]}]
    store.add_warmup(run, {"visits": [2]})
    assert store.read(run).warmup == [{"visits": [0]}, {"visits": [2]}]


def test_what_is_damaged_is_named(run: Path) -> None:
    for number in range(3):
        _write(run, number)
    kept = (run / "rounds" / "00001.parquet").read_bytes()
    (run / "rounds" / "00001.parquet").write_bytes(kept[: len(kept) // 2])
    with pytest.raises(BadInput, match="cannot be read"):
        store.read(run)
    (run / "rounds" / "00001.parquet").unlink()
    with pytest.raises(BadInput, match="cannot be read"):
        store.read(run)
    (run / "rounds" / "00001.json").unlink()
    with pytest.raises(BadInput, match="lacks a round"):
        store.read(run)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"schema": 2, "kind": "compare"}', "written by another version"),
        ('{"schema": 1, "kind": "load"}', "kind 'load'"),
        ('{"kind": "compare"}', "cannot be read"),
        ("[]", "cannot be read"),
        ("{", "cannot be read"),
    ],
)
def test_a_folder_of_another_kind_or_version_is_refused(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / store.RUN).write_text(text)
    with pytest.raises(BadInput, match=said):
        store.read(tmp_path)


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="holds no run"):
        store.read(tmp_path / "none")


def test_a_run_is_never_written_over(run: Path) -> None:
    before = (run / store.RUN).read_bytes()
    with pytest.raises(BadInput, match="already holds a run"):
        store.create(run, {})
    assert (run / store.RUN).read_bytes() == before


def test_two_comparisons_do_not_share_a_folder(run: Path) -> None:
    with store.locked(run), pytest.raises(BadInput, match="another comparison"), store.locked(run):
        pass
    with store.locked(run):
        pass


def test_a_block_by_hand() -> None:
    latencies = [float(ms) for ms in range(1, 11)]
    samples = pl.concat(
        [
            _samples(0, count=10, latency_ms=latencies, late_ms=[100.0] + [0.0] * 9),
            _samples(0, count=2, latency_ms=1e6, settling=True),
            _samples(0, count=1, latency_ms=1e6, failure="HTTP 503"),
        ]
    )
    (block,) = store.blocks_of(samples, [_facts(0)]).to_dicts()
    assert (block["requests"], block["failures"]) == (11, 1)
    corrected = [101.0, *latencies[1:]]
    for percent in (50, 90, 99):
        assert block[f"p{percent}_ms"] == pytest.approx(np.percentile(corrected, percent))
    assert block["mean_ms"] == pytest.approx(np.mean(corrected))
    assert block["uncorrected_p50_ms"] == 5.5
    assert block["uncorrected_p99_ms"] == pytest.approx(np.percentile(latencies, 99))
    assert block["requests_per_s"] == 5.0
    assert block["cpu_ms"] == 50.0
    assert block["infer_ms"] == 3.0
    assert block["ttft_ms"] is None


def test_a_block_in_which_nothing_was_answered_is_a_row() -> None:
    facts = [_facts(0), _facts(0, position=1, arm="b", cpu_s=None, void="nothing answered")]
    first, second = store.blocks_of(_samples(0), facts).to_dicts()
    assert first["p50_ms"] == 5.0
    assert (second["requests"], second["requests_per_s"], second["p50_ms"], second["cpu_ms"]) == (0, 0.0, None, None)


def test_times_that_the_server_did_not_say_are_no_numbers() -> None:
    (block,) = store.blocks_of(_samples(0, count=2, infer_ms=[float("nan"), 4.0]), [_facts(0)]).to_dicts()
    assert block["infer_ms"] == 4.0


# --- which blocks count ---------------------------------------------------------------------------


def _rows(count: int = 100, **columns: Any) -> list[dict[str, Any]]:
    return _samples(0, count=count, **columns).to_dicts()


_OPEN = Visit("a", 0, 0.2, 1.0, 4, 50.0, "constant", 0)
_CLOSED = Visit("a", 0, 0.2, 1.0, 4, None, "constant", 0)


def test_a_good_block_counts() -> None:
    assert why_void(_rows(), _OPEN) == why_void(_rows(), _CLOSED) == ""


def test_failures_over_one_percent_void() -> None:
    assert why_void(_rows(failure=["HTTP 503"] + [""] * 99), _CLOSED) == ""
    assert "2 of 100 requests failed: HTTP 503" in why_void(_rows(failure=["HTTP 503"] * 2 + [""] * 98), _CLOSED)
    assert "nothing answered: HTTP 503" in why_void(_rows(failure="HTTP 503"), _CLOSED)
    assert why_void([], _CLOSED) == "nothing sent"
    assert why_void(_rows(settling=True), _CLOSED) == "nothing sent"


def test_a_client_that_is_late_voids_and_a_server_that_is_slow_does_not() -> None:
    assert "client too slow" in why_void(_rows(late_ms=30.0), _OPEN)
    assert why_void(_rows(late_ms=30.0, starved=1), _OPEN) == "", "no user was free: the wait is the server's"
    assert why_void(_rows(late_ms=9.0), _OPEN) == ""
    assert why_void(_rows(count=50, late_ms=[30.0] + [0.0] * 49), _OPEN) == "", "one of fifty is more than the share"
    assert "client too slow" in why_void(_rows(count=50, late_ms=[30.0] * 2 + [0.0] * 48), _OPEN)
    assert why_void(_rows(late_ms=[30.0] * 50 + [0.0] * 50, settling=[True] * 50 + [False] * 50), _OPEN) == ""


def test_facts_are_json(run: Path) -> None:
    _write(run, 0)
    assert json.loads((run / "rounds" / "00000.json").read_text())["blocks"][0]["void"] == ""
