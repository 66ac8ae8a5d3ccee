"""The run folder of a comparison: each finished round is written whole or not at all, and read back as tables.

    run.json             what is compared; written once
    workload.json        what is sent
    rounds/00000.parquet samples of one round, one row per request
    rounds/00000.json    its blocks; written after the samples, so a round exists exactly when this file does
    warmup.jsonl         one line per start of the load: the discarded first visit of each arm

A killed comparison leaves at most samples without their `.json`, or a `.part`: the resumed one writes over both.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import polars as pl

from actuary import BadInput

SCHEMA: Final = 1
KIND: Final = "compare"
RUN, ROUNDS, WARMUP, WORKLOAD = "run.json", "rounds", "warmup.jsonl", "workload.json"

SAMPLES: Final = pl.Schema(
    {
        "round": pl.Int32,
        "position": pl.Int16,  # of the arm in its round
        "arm": pl.Utf8,
        "model": pl.Utf8,
        "worker": pl.Utf8,  # which Locust process sent it
        "prompt": pl.Int32,  # number of the workload's request
        "planned_s": pl.Float64,  # when it was to leave, since the run's load began; in a closed loop when it left
        "at_s": pl.Float64,  # when it left
        "latency_ms": pl.Float64,  # from when it left until its answer was read whole
        "late_ms": pl.Float64,  # from its planned time until it left; 0 in a closed loop
        "starved": pl.Int8,  # 1: no user was free at its planned time
        "queue_ms": pl.Float64,  # the server's own times; NaN where the answer did not say
        "tokenize_ms": pl.Float64,
        "infer_ms": pl.Float64,
        "total_ms": pl.Float64,
        "ttft_ms": pl.Float64,  # of completions, else NaN
        "itl_ms": pl.Float64,
        "tokens": pl.Int32,  # generated
        "settling": pl.Boolean,  # planned in the discarded seconds before the block
        "failure": pl.Utf8,  # empty where it went well
    }
)
# Of each block beside its samples.
FACTS: Final = pl.Schema(
    {
        "round": pl.Int32,
        "position": pl.Int16,
        "arm": pl.Utf8,
        "model": pl.Utf8,
        "began_s": pl.Float64,  # when its measured seconds began, since the run's load began
        "window_s": pl.Float64,
        "cpu_s": pl.Float64,  # of the server's process in the window; null where it runs elsewhere
        "rss_mb": pl.Float64,
        "client_cpu_share": pl.Float64,  # of a core, of the busiest Locust process
        "void": pl.Utf8,  # why it does not count; empty where it does
    }
)
MEDIANS: Final = ("queue_ms", "tokenize_ms", "infer_ms", "total_ms", "ttft_ms", "itl_ms")


@dataclass(frozen=True)
class Run:
    """What a folder holds."""

    run: dict[str, Any]
    blocks: pl.DataFrame  # one row per block
    samples: pl.LazyFrame  # one row per request
    rounds: list[dict[str, Any]]  # each round's .json
    warmup: list[dict[str, Any]]


def create(folder: Path, run: dict[str, Any]) -> None:
    """Makes the folder of a new run; BadInput where there is one already."""
    if (folder / RUN).exists():
        raise BadInput(f"{folder} already holds a run; go on with it by --resume {folder}, or name another folder")
    try:
        (folder / ROUNDS).mkdir(parents=True, exist_ok=True)
        if any((folder / ROUNDS).iterdir()):
            raise BadInput(f"{folder} holds rounds of a run whose {RUN} is gone; name another folder")
        _write(folder / RUN, _json({"schema": SCHEMA, "kind": KIND, **run}, indent=2) + "\n")
    except OSError as error:
        raise BadInput(f"{folder} cannot be made: {error}; name a folder where you may write") from error


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Only one process measures into a folder; a killed one leaves no lock."""
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BadInput(f"another comparison measures into {folder}; wait for it, or stop it") from None
        yield


def run_of(folder: Path) -> dict[str, Any]:
    """run.json; BadInput where there is none, or it is not ours or of another version."""
    try:
        run = json.loads((folder / RUN).read_text(encoding="utf-8"))
        kind, schema = run["kind"], run["schema"]
    except FileNotFoundError as error:
        raise BadInput(f"{folder} holds no run of `actuary compare`: there is no {RUN}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{folder / RUN} cannot be read: {error}") from error
    if kind != KIND:
        raise BadInput(f"{folder} holds a run of kind {kind!r}, not of `actuary compare`")
    if schema != SCHEMA:
        raise BadInput(
            f"{folder} was written by another version: its schema is {schema}, this version reads {SCHEMA}; "
            "read it with the version that wrote it, or measure again"
        )
    return dict(run)


def write_round(folder: Path, number: int, samples: pl.DataFrame, facts: dict[str, Any]) -> None:
    """Samples first, then the file that makes them count. Both are on the disk when this returns."""
    where = folder / ROUNDS / f"{number:05d}.parquet"
    part = _part(where)
    samples.match_to_schema(SAMPLES).write_parquet(part, compression="zstd")
    _settle(part, where)
    _write(where.with_suffix(".json"), _json({"round": number, **facts}) + "\n")


def add_warmup(folder: Path, visits: dict[str, Any]) -> None:
    with (folder / WARMUP).open("a", encoding="utf-8") as file:
        file.write("\n" + _json(visits))  # what a kill has torn ends at the new line


def _warmups(folder: Path) -> list[dict[str, Any]]:
    if not (folder / WARMUP).is_file():
        return []
    found = []
    for line in (folder / WARMUP).read_text(encoding="utf-8").split("\n"):
        with contextlib.suppress(json.JSONDecodeError):  # empty, or torn
            found.append(json.loads(line))
    return found


def read(folder: Path) -> Run:
    """All finished rounds; BadInput where they are damaged."""
    run = run_of(folder)
    found = sorted((folder / ROUNDS).glob("[0-9]*.json"))
    try:
        rounds = [json.loads(path.read_text(encoding="utf-8")) for path in found]
        if [each["round"] for each in rounds] != list(range(len(rounds))):
            raise BadInput(f"{folder / ROUNDS} lacks a round: there are {', '.join(path.stem for path in found)}")
        paths = [path.with_suffix(".parquet") for path in found]
        samples = pl.scan_parquet(paths, schema=SAMPLES) if paths else pl.LazyFrame(schema=SAMPLES)
        blocks = blocks_of(samples, [block for each in rounds for block in each["blocks"]])
    except (OSError, ValueError, KeyError, TypeError, pl.exceptions.PolarsError) as error:
        raise BadInput(f"a round in {folder / ROUNDS} cannot be read: {error}; restore it, or measure again") from error
    return Run(run, blocks, samples, rounds, _warmups(folder))


def blocks_of(samples: pl.DataFrame | pl.LazyFrame, block_facts: Sequence[dict[str, Any]]) -> pl.DataFrame:
    """One row per block, in the order in which they were measured.

    Latencies are of the answers that went well and were planned in the block: `p50_ms` and the like from the planned
    time, `uncorrected_` from when the request left. Null where there is nothing to say.
    """
    facts = pl.DataFrame(block_facts, schema=FACTS)
    good = pl.col("failure") == ""
    corrected = (pl.col("latency_ms") + pl.col("late_ms")).filter(good)
    uncorrected = pl.col("latency_ms").filter(good)
    sums = (
        samples.lazy()
        .filter(~pl.col("settling"))
        .group_by("round", "position")
        .agg(
            pl.len().alias("requests"),
            (~good).sum().alias("failures"),
            *(corrected.quantile(p / 100, "linear").alias(f"p{p}_ms") for p in (50, 90, 99)),
            corrected.mean().alias("mean_ms"),
            *(uncorrected.quantile(p / 100, "linear").alias(f"uncorrected_p{p}_ms") for p in (50, 99)),
            *(pl.col(name).filter(good).fill_nan(None).median().alias(name) for name in MEDIANS),
            pl.col("tokens").filter(good).sum().cast(pl.Int64),
        )
        .collect()
    )
    counts = pl.col("requests", "failures", "tokens").fill_null(0)
    answered = pl.col("requests") - pl.col("failures")
    return (
        facts.join(sums, on=["round", "position"], how="left")
        .with_columns(counts)
        .with_columns(
            (answered / pl.col("window_s")).alias("requests_per_s"),
            (pl.col("tokens") / pl.col("window_s")).alias("tokens_per_s"),
            pl.when(answered > 0).then(pl.col("cpu_s") * 1000 / answered).alias("cpu_ms"),
        )
        .sort("round", "position")
    )


def _json(record: dict[str, Any], indent: int | None = None) -> str:
    """JSON has no infinity: other readers refuse what Python would write for it."""
    return json.dumps(record, indent=indent, ensure_ascii=False, allow_nan=False)


def _write(path: Path, text: str) -> None:
    part = _part(path)
    part.write_text(text, encoding="utf-8")
    _settle(part, path)


def _part(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def _settle(part: Path, path: Path) -> None:
    """`part` becomes `path`, and neither can be lost after this when the machine goes down."""
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
