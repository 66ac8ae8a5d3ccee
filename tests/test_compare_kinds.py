"""`actuary compare` with each kind of load besides the usual: recorded traffic, a corpus, cold and warm, a sweep."""

from __future__ import annotations

import json
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
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
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


def test_a_sweep_finds_what_a_server_carries(stand_in: Server, tmp_path: Path) -> None:
    stand_in.core = threading.Lock()  # one request at a time, so each variant carries what its delay allows
    arguments = ("--url", stand_in.url, "--sweep", "0.9", "--objective-ms", "60", *QUICK)
    result = _compare(*arguments, cwd=tmp_path)
    assert (result["objective_ms"], result["objective_given"]) == (60, True)
    for arm in ("fast", "slow", "fast" + AGAIN):
        rows = [row for row in result["sweep"] if row["arm"] == arm]
        assert len(rows) >= 6
        knee = result["knee"][arm]["rate"]
        # Its core does nothing else, but a busy machine wakes it late.
        assert 0.3 < knee * DELAY_MS[arm.removesuffix(AGAIN)] / 1000 < 1.02
        assert result["goodput"][arm]["per_s"] <= 1000 / DELAY_MS[arm.removesuffix(AGAIN)]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "How much each one carries" in page
    folder = tmp_path / "run" / sweep.FOLDER
    steps = sorted((folder / "rounds").glob("*.json"))
    assert len(steps) >= 7

    # A step that is not whole is taken again, and only what is missing is measured.
    for path in (steps[-1], steps[-2], steps[-2].with_suffix(".parquet")):
        path.unlink()
    before = {path: path.stat().st_mtime_ns for path in steps[:-2]}
    _compare("--resume", "run", cwd=tmp_path)
    again = sorted((folder / "rounds").glob("*.json"))
    assert len(again) >= len(steps) - 1
    assert {path: path.stat().st_mtime_ns for path in steps[:-2]} == before
    assert len(list((folder / "rounds").glob("*.parquet"))) == len(again)


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
