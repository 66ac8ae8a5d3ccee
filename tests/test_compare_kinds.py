"""`actuary compare` with each kind of load besides the usual: recorded traffic, a corpus, cold and warm, a sweep."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from conftest import ACTUARY
from stand_in import DELAY_MS, Server, standing_in

from actuary import main
from loadtest import samples
from loadtest.compare import ffn, store, sweep
from loadtest.compare.design import AGAIN

ROOT = Path(__file__).parents[1]
QUICK = ("--block", "0.2", "--settle", "0.05", "--minutes", "0.05", "--users", "2", "--fixed", "--out", "run")


@pytest.fixture
def stand_in() -> Iterator[Server]:
    with standing_in(["fast", "slow"]) as server:
        yield server


def _compare(*arguments: object, cwd: Path) -> dict[str, Any]:
    """Its result."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    command = [*ACTUARY, "compare", *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads((cwd / "run" / "result.json").read_text())


def test_recorded_traffic_keeps_its_times(stand_in: Server, tmp_path: Path) -> None:
    times = (0.0, 0.02, 0.03, 0.3, 0.31, 0.5)
    lines = [{"at_s": at, "prompt": [n] * (n + 1)} for n, at in enumerate(times)]
    (tmp_path / "traffic.jsonl").write_text("\n".join(map(json.dumps, lines)))
    _compare("--url", stand_in.url, "--traffic", "traffic.jsonl", "--speed", 2, *QUICK, cwd=tmp_path)
    kept = store.read(tmp_path / "run")
    assert kept.run["workload"]["period_s"] == pytest.approx(0.3)
    samples = kept.samples.collect()
    by_arm = {arm: its for (arm, number), its in samples.group_by("arm", "round") if number == 0}
    assert {*by_arm} == {"fast", "slow", "fast" + AGAIN}
    for its in by_arm.values():  # each arm the same stretch: 0.25 s, twice as fast
        its = its.sort("planned_s")
        assert its["prompt"].to_list() == [0, 1, 2, 3, 4]
        planned = its["planned_s"] - its["planned_s"][0]
        assert planned.to_list() == pytest.approx([at / 2 for at in times[:5]], abs=1e-4)
    following = samples.filter(pl.col("round") == 1, pl.col("arm") == "slow").sort("planned_s")
    assert following["prompt"].to_list()[:2] == [5, 0]  # goes on where round 0 ended, and then begins again


def test_a_corpus_is_sent_in_lengths(stand_in: Server, tmp_path: Path) -> None:
    (tmp_path / "held-out.txt").write_text(" ".join(f"word{n}" for n in range(500)))
    corpus = ("--corpus", "held-out.txt", "--lengths", "uniform:5-9")
    result = _compare("--url", stand_in.url, *corpus, *QUICK, cwd=tmp_path)
    workload = store.read(tmp_path / "run").run["workload"]
    assert workload["prompt_tokens"]["min"] == 5
    assert workload["prompt_tokens"]["max"] == 9
    assert "held-out.txt" in workload["source"]
    assert {len(prompt) for _, prompt in stand_in.seen} == {5, 6, 7, 8, 9}
    assert "ffn_share" not in result  # of another's server there are no bundles


@pytest.mark.parametrize("cache", ["cold", "warm"])
def test_cold_and_warm_differ_in_what_is_sent(cache: str, stand_in: Server, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text("[1, 2, 3, 4, 5]")
    _compare("--url", stand_in.url, "--prompts", "prompts.jsonl", "--cache", cache, *QUICK, cwd=tmp_path)
    sent = [prompt for _, prompt in stand_in.seen]
    if cache == "warm":
        assert sent[:2] == [[[1, 2, 3, 4, 5]]] * 2  # each variant computes each prompt before the load
        assert all(prompt == [1, 2, 3, 4, 5] for prompt in sent[2:])
    else:
        assert {tuple(prompt[3:]) for prompt in sent} == {(4, 5)}
        assert len({tuple(prompt[:3]) for prompt in sent}) > 0.95 * len(sent)


def test_a_sweep_of_rates_is_in_the_result_and_goes_on(
    stand_in: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it comes to, and at which rates, is in test_compare_sweep.py; here nothing is too late or too slow."""
    stand_in.core = threading.Lock()  # one request at a time, as a server of one core
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(samples, "LATE_BOUND_MS", math.inf)
    monkeypatch.setattr(sweep, "SETTLE_S", 0.1)
    monkeypatch.setattr(sweep, "BLOCK_S", 0.5)
    folder, minutes = tmp_path / "run" / sweep.FOLDER / "rounds", 0.2

    def compare(*arguments: object) -> dict[str, Any]:
        with pytest.raises(SystemExit) as ended:
            main(["compare", *map(str, arguments)])
        assert not ended.value.code
        # Till the minutes are over and no longer.
        took_s = [json.loads(path.read_text())["took_s"] for path in sorted(folder.glob("*.json"))]
        assert sum(took_s[:-1]) < 60 * minutes <= sum(took_s)
        return json.loads((tmp_path / "run" / "result.json").read_text())

    result = compare("--url", stand_in.url, "--sweep", minutes, "--objective-ms", "60", *QUICK)
    assert (result["objective_ms"], result["objective_given"]) == (60, True)
    steps = sorted(folder.glob("*.json"))
    for arm in ("fast", "slow", "fast" + AGAIN):
        rows = [row for row in result["sweep"] if row["arm"] == arm]
        assert sum(row["blocks"] for row in rows) == len(steps) - 1  # but for the closed loop
        assert all(row["p50_ms"] > DELAY_MS[arm.removesuffix(AGAIN)] for row in rows)
        assert {"rate", "low", "high", "few"} == {*result["knee"][arm]}
    assert "Latency against rate" in (tmp_path / "run" / "report.html").read_text()

    steps[-1].unlink()
    before = {path: path.stat().st_mtime_ns for path in steps[:-1]}
    compare("--resume", "run")
    again = sorted(folder.glob("*.json"))
    assert again[: len(steps)] == steps
    assert {path: path.stat().st_mtime_ns for path in steps[:-1]} == before
    assert len(list(folder.glob("*.parquet"))) == len(again)


def test_the_share_of_the_feed_forward_blocks_is_in_the_result(bundles: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text("[1, 2, 3, 4, 5]")
    arguments = ("--bundles", bundles, "--variants", "gelu,swiglu", "--prompts", "prompts.jsonl")
    result = _compare(*arguments, *QUICK, cwd=tmp_path)
    assert {*result["ffn_share"]} == {"gelu", "swiglu"}
    for shares in result["ffn_share"].values():
        assert sum(shares[part] for part in ("ffn", "attention", "head", "other")) == pytest.approx(1, abs=1e-3)
        assert 0 < shares["activation"] < shares["ffn"]
    kept = json.loads((tmp_path / "run" / ffn.FILE).read_text())
    assert kept["gelu"]["tokens"] == 5
    assert "feed-forward" in (tmp_path / "run" / "report.html").read_text()
    assert not [said for said in result["said"] if "feed-forward" in said]


def test_what_cannot_be_profiled_says_why(tmp_path: Path, bundles: Path) -> None:
    facts = json.loads((bundles / "gelu" / "manifest.json").read_text())
    arms = [
        {"model": "gelu", "facts": {**facts, "provider": "CUDAExecutionProvider"}},
        {"model": "swiglu", "facts": {**facts, "provider": ffn.CPU, "files": {}}},
        {"model": "gelu-sigmoid-head", "facts": {"provider": ffn.CPU, "context": 32, "files": json.loads(
            (bundles / "gelu-sigmoid-head" / "manifest.json").read_text())["files"]}},
    ]  # fmt: skip
    store.create(tmp_path / "run", {"arms": arms, "workload": {"prompt_tokens": {"mean": 40}}})
    ffn.measure(tmp_path / "run", bundles, Path("/nowhere"))
    assert [*ffn.result(tmp_path / "run")["ffn_share"]] == ["gelu-sigmoid-head"]  # at its context: 32 tokens
    said = ffn.said(tmp_path / "run")
    assert len(said) == 2
    assert "CUDAExecutionProvider" in said[0]
    assert "is no longer in" in said[1]
    assert sys.executable == ACTUARY[0]
