"""The tables, as migrations/ makes them; tests/test_experiments_store.py holds the two together.

    experiments   a definition and when it ran: one that is changed or ended stays, and another begins from nothing
    exposures     a request that an experiment answered
    outcomes      the token that really came after it
    shadows       what a shadow would have said
    key_sums      per key and measure: how many values, and their sum; only of requests that have a key
    arm_sums      per arm and measure: what service/experiments/confidence.py takes
    writers       per process that ever wrote: the number of its last batch

The sums are kept up with each batch that is written, so that a verdict reads a few rows however long it has run, and
exposures, outcomes and shadows are not needed for it. service/experiments/retention.py says what leaves, and when.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import BigInteger, Column, Float, Index, Integer, MetaData, SmallInteger, String, Table, Text, text

metadata = MetaData()
RUNNING = text("ended IS NULL")


def _columns(kind: Any, *names: str) -> list[Column[Any]]:
    return [Column(name, kind, nullable=False) for name in names]


experiments = Table(
    "experiments",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("name", String(128), nullable=False),
    Column("definition", Text, nullable=False),
    Column("began", Float, nullable=False),  # seconds since 1970, as all times here
    Column("ended", Float, nullable=True),
    Index("one_runs", "name", unique=True, sqlite_where=RUNNING, postgresql_where=RUNNING),
)
exposures = Table(
    "exposures",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("experiment_id", Integer, nullable=False),
    Column("variant", String(128), nullable=False),
    Column("key_hash", BigInteger, nullable=True),  # null: the request had no key
    Column("at", Float, nullable=False),
    Column("route", String(64), nullable=False),
    Column("status", SmallInteger, nullable=False),
    *_columns(Integer, "prompt_tokens", "generated_tokens"),
    *_columns(Float, "prepare_ms", "queue_ms", "infer_ms", "total_ms"),
    Index("exposures_at", "at"),
)
outcomes = Table(
    "outcomes",
    metadata,
    Column("exposure_id", String(32), primary_key=True),
    Column("prompt_index", Integer, primary_key=True, autoincrement=False),
    Column("token", Integer, nullable=False),
    *_columns(Float, "log_loss", "at"),
    Index("outcomes_at", "at"),
)
shadows = Table(
    "shadows",
    metadata,
    Column("exposure_id", String(32), primary_key=True),
    Column("variant", String(128), primary_key=True),
    Column("same_top", SmallInteger, nullable=False),
    *_columns(Float, "kl", "sum_abs_dp", "infer_ms", "at"),
    Index("shadows_at", "at"),
)
key_sums = Table(
    "key_sums",
    metadata,
    Column("experiment_id", Integer, primary_key=True, autoincrement=False),
    Column("measure", String(32), primary_key=True),
    Column("variant", String(128), primary_key=True),
    Column("against", String(128), primary_key=True),  # whose answers a shadow's are compared with; else empty
    Column("key_hash", BigInteger, primary_key=True, autoincrement=False),
    *_columns(Float, "n", "s"),
)
arm_sums = Table(
    "arm_sums",
    metadata,
    Column("experiment_id", Integer, primary_key=True, autoincrement=False),
    Column("measure", String(32), primary_key=True),
    Column("variant", String(128), primary_key=True),
    Column("against", String(128), primary_key=True),
    Column("keys", BigInteger, nullable=False),
    *_columns(Float, "n", "s", "ss", "sn", "nn"),
)
writers = Table(
    "writers",
    metadata,
    Column("writer", String(32), primary_key=True),
    Column("number", BigInteger, nullable=False),
)
