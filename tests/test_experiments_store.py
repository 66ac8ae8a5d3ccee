"""The experiments' database: migrations, sums against all rows, writers at once, what leaves, one that is away."""

from __future__ import annotations

import itertools
import logging
import math
import sqlite3
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from actuary import BadInput
from service.experiments import database as database_module
from service.experiments import retention as retention_module
from service.experiments import store as store_module
from service.experiments.confidence import Sums
from service.experiments.database import HEAD, Database, Down
from service.experiments.records import Exposed, Outcome, Record, Shadowed
from service.experiments.retention import Retention
from service.experiments.store import Store
from service.experiments.tables import arm_sums, exposures, key_sums, metadata, outcomes, shadows, writers

ROOT = Path(__file__).parent.parent
MIGRATIONS = ROOT / "service" / "experiments" / "migrations"


@pytest.fixture
def store(database: str) -> Iterator[Store]:
    store = Store(Database(database))
    yield store
    store.database.close()


_numbers = itertools.count(1)


def write(store: Store, rows: list[Record]) -> int:
    """As a batch that is new."""
    return store.write(rows, next(_numbers))


def exposed(
    id_: str, variant: str = "gelu", key_hash: int | None = None, total_ms: float = 2.0, at: float = 1e9, **more: int
) -> Exposed:
    return Exposed(
        id_,
        more.get("experiment_id", 1),
        variant,
        key_hash,
        at,
        "/v1",
        more.get("status", 200),
        3,
        0,
        0.1,
        0.1,
        1.0,
        total_ms,
    )


def records(rng: np.random.Generator, how_many: int, prefix: str) -> list[Record]:
    found: list[Record] = []
    for n in range(how_many):
        variant, id_ = ("gelu", "swiglu")[n % 2], f"{prefix}-{n}"
        key_hash = int(rng.integers(-9, 9)) * 2 + n % 2 if rng.random() < 0.7 else None
        status, at = 422 if n % 11 == 0 else 200, 1e9 + n
        found.append(exposed(id_, variant, key_hash, float(rng.lognormal(1, 1)), at, status=status))
        if n % 3 == 0:
            found.append(Outcome(id_, 0, 1, variant, key_hash, 7, float(rng.exponential(2)), at))
        if n % 4 == 0:
            found.append(Shadowed(id_, 1, "relu", variant, key_hash, 1, 0.1, 0.2, 3.0, 2.0, at))
    return found


def expected(rows: list[Record], measure: str, variant: str) -> Sums:
    """Over all rows, one key after the other."""
    values: dict[object, list[float]] = defaultdict(list)
    for row in rows:
        if row.variant != variant:
            continue
        key = object() if row.key_hash is None else row.key_hash
        if measure == "loss" and isinstance(row, Outcome):
            values[key].append(row.log_loss)
        if isinstance(row, Exposed):
            if measure == "failed":
                values[key].append(float(row.status >= 400))
            if measure == "total" and row.status == 200:
                values[key].append(float(np.log(row.total_ms)))
    n, s = (np.array([f(v) for v in values.values()], float) for f in (len, sum))
    return Sums(len(n), n.sum(), s.sum(), (s * s).sum(), (s * n).sum(), (n * n).sum())


def assert_sums(store: Store, rows: list[Record]) -> None:
    found = store.sums(1)
    for measure in ("failed", "total", "loss"):
        for variant in ("gelu", "swiglu"):
            one, other = found[measure, variant, ""], expected(rows, measure, variant)
            assert list(vars(one).values()) == pytest.approx(list(vars(other).values()), rel=1e-9), (measure, variant)


# --- migrations -----------------------------------------------------------------------------------


def test_the_migrations_make_the_tables(store: Store) -> None:
    with store.database.reading() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert context.get_current_revision() == HEAD
        assert compare_metadata(context, metadata) == []


def test_opening_again_changes_nothing(store: Store, database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store.begin("act", "{}")
    monkeypatch.setattr("alembic.command.upgrade", lambda *_: pytest.fail("there is nothing to change"))
    again = Store(Database(database))
    assert again.running() == store.running()
    again.database.close()


def test_many_may_open_an_empty_database_at_once(database: str) -> None:
    together = threading.Barrier(6)

    def one(_: int) -> list[object]:
        together.wait()
        store = Store(Database(database))
        store.begin("act", '{"arms": {}}')
        found = store.running()
        store.database.close()
        return list(found)

    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(one, range(6)))
    assert all(each == found[0] and len(each) == 1 for each in found)


def test_head_is_the_last_migration_and_all_of_them_are_packaged() -> None:
    scripts = ScriptDirectory(str(MIGRATIONS))
    assert scripts.get_heads() == [HEAD]
    for folder in (MIGRATIONS.parent, MIGRATIONS, MIGRATIONS / "versions"):
        assert (folder / "__init__.py").exists(), "or setuptools finds no package"
    assert {path.suffix for path in MIGRATIONS.rglob("*.*")} <= {".py", ".pyc"}, "it packs modules alone"


def test_a_database_of_another_version_is_refused(database: str) -> None:
    opened = Database(database)
    with opened.writing() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    opened.close()
    with pytest.raises(BadInput, match=r"another version of Actuary.*known: 0001, 0002"):
        Database(database)


def test_a_database_of_the_first_version_goes_on(database: str) -> None:
    """Its rows and sums are there, and what it lacked."""
    rows = records(np.random.default_rng(5), 100, "x")
    opened = Database(database)
    write(Store(opened), rows[:60])
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.set_main_option("path_separator", "os")
    with opened.writing() as connection:
        config.attributes["connection"] = connection
        command.downgrade(config, "0001")
    with opened.reading() as connection:
        assert not sa.inspect(connection).has_table("writers")
    opened.close()
    again = Database(database)
    with again.reading() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    write(Store(again), rows[60:])
    assert_sums(Store(again), rows)
    again.close()


# --- sums -----------------------------------------------------------------------------------------


def test_the_sums_are_those_of_all_rows(store: Store) -> None:
    rows = records(np.random.default_rng(0), 500, "x")
    for at in range(0, len(rows), 97):
        write(store, rows[at : at + 97])
        assert_sums(store, rows[: at + 97])
    shadow = store.sums(1)["kl", "relu", "gelu"]
    assert shadow.mean == pytest.approx(0.1)


def test_a_batch_that_is_written_again_is_not_counted_again(store: Store) -> None:
    """By its number alone: its rows may have left. Another writer's numbers are its own."""
    rows = records(np.random.default_rng(1), 100, "x")
    assert store.write(rows[:90], 1) == 0
    assert store.write(rows[:90], 1) == 0
    assert_sums(store, rows[:90])
    Retention(store.database, 0).step()
    store.write(rows[:90], 1)
    store.write(rows[90:], 2)
    store.write(rows[90:], 2)
    assert_sums(store, rows)
    other = records(np.random.default_rng(2), 100, "y")
    Store(store.database).write(other, 1)
    assert_sums(store, [*rows, *other])


def test_processes_that_write_at_once_lose_and_double_nothing(database: str) -> None:
    """Six, each with a connection of its own, the same keys in other orders; and rows leave all the while."""
    all_rows = [records(np.random.default_rng(n), 300, f"writer {n}") for n in range(6)]

    def one(rows: list[Record]) -> None:
        store = Store(Database(database))
        retention = Retention(store.database, 50)
        for at in range(0, len(rows), 40):
            while True:
                try:
                    store.write(rows[at : at + 40], at + 1)
                    retention.step()
                    break
                except Down:
                    time.sleep(0.01)
        store.database.close()

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(one, all_rows))
    store = Store(Database(database))
    assert_sums(store, [row for rows in all_rows for row in rows])
    Retention(store.database, 50).step()
    assert 0 < len(kept(store, exposures)) <= 50
    store.database.close()


def test_an_experiment_runs_once_and_keeps_its_past(store: Store) -> None:
    first = store.begin("act", "1")
    assert store.begin("act", "1") == first
    second = store.begin("act", "2")
    other = store.begin("other", "1")
    assert [row.id for row in store.running()] == [second.id, other.id]
    write(store, [exposed("a", experiment_id=first.id), exposed("b", experiment_id=second.id)])
    store.end(second.id)
    assert [row.name for row in store.running()] == ["other"]
    assert len({first.id, second.id, store.begin("act", "2").id}) == 3
    assert len(kept(store, exposures)) == 2


# --- what leaves ----------------------------------------------------------------------------------


def kept(store: Store, table: sa.Table) -> list[Any]:
    """A row's first column each, in order."""
    with store.database.reading() as connection:
        return sorted(connection.execute(sa.select(table.columns[0])).scalars())


def test_old_exposures_leave_and_every_sum_stays_the_very_same(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """And stays right when keys come again of which no exposure is left."""
    monkeypatch.setattr(retention_module, "AT_ONCE", 37)
    rows = records(np.random.default_rng(6), 400, "x")
    half = next(n for n, row in enumerate(rows) if isinstance(row, Exposed) and row.id == "x-200")
    write(store, rows[:half])
    before, retention = store.sums(1), Retention(store.database, 30)
    steps = 1
    while retention.step():
        steps += 1
    assert steps == math.ceil(170 / 37), "some at a time"
    assert store.sums(1) == before
    newest = [f"x-{n}" for n in range(170, 200)]
    assert kept(store, exposures) == sorted(newest)
    assert kept(store, outcomes) == sorted(id_ for n, id_ in enumerate(newest, 170) if n % 3 == 0)
    assert kept(store, shadows) == sorted(id_ for n, id_ in enumerate(newest, 170) if n % 4 == 0)
    write(store, rows[half:])
    assert_sums(store, rows)
    retention.step()
    assert_sums(store, rows)


@pytest.mark.parametrize(("most", "stay"), [(0, 0), (9, 9), (10, 10), (11, 10)])
def test_as_many_exposures_stay_as_is_said(store: Store, most: int, stay: int) -> None:
    write(store, [exposed(f"{n}", at=1e9 + n) for n in range(10)])
    Retention(store.database, most).step()
    assert kept(store, exposures) == [f"{n}" for n in range(10 - stay, 10)]


def test_sums_of_keys_leave_after_the_end_and_what_then_comes_is_not_counted(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An hour after it may be counted; when it may not, that is told. What runs keeps all, however old."""
    ended, runs = store.begin("ended", "1").id, store.begin("runs", "1").id
    write(store, [exposed(f"{id_} {n}", key_hash=n % 3, experiment_id=id_) for id_ in (ended, runs) for n in range(9)])
    store.end(ended)
    retention, now = Retention(store.database, 100), time.time()

    def later(seconds: float) -> None:
        monkeypatch.setattr(time, "time", lambda: now + seconds)

    later(3600)
    assert write(store, [exposed("soon", key_hash=0, experiment_id=ended)]) == 0
    retention.step()
    assert set(kept(store, key_sums)) == {ended, runs}
    later(store_module.LATE_S + 60)
    sums = store.sums(ended)
    late = [exposed("late", key_hash=0, experiment_id=ended), exposed("other", key_hash=0, experiment_id=runs)]
    assert write(store, late) == 1
    assert store.sums(ended) == sums
    assert store.sums(runs)["failed", "gelu", ""] == Sums(3, 10, 0, 0, 0, 4**2 + 3**2 + 3**2)
    assert "late" not in kept(store, exposures)
    later(retention_module.FORGET_S + 60)
    assert not retention.step()
    assert set(kept(store, key_sums)) == {runs}
    assert store.sums(ended) == sums == {**sums, ("failed", "gelu", ""): Sums(3, 10, 0, 0, 0, 4**2 + 3**2 + 3**2)}
    assert set(kept(store, arm_sums)) == {ended, runs}
    assert len(kept(store, writers)) == 1


def test_very_many_keys_are_said_once_for_each_that_runs(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Requests without a key have no sums of their own, and are not counted among them."""
    monkeypatch.setattr(retention_module, "MOST_KEYS", 20)
    monkeypatch.setattr(retention_module, "EVERY_S", 0.0)
    many, few, ended = (store.begin(name, "1").id for name in ("many", "few", "ended"))
    for id_ in (many, ended):
        write(store, [exposed(f"{id_} {n}", key_hash=n, experiment_id=id_) for n in range(21)])
    write(store, [exposed(f"{few} {n}", key_hash=None if n else 1, experiment_id=few) for n in range(30)])
    store.end(ended)
    retention = Retention(store.database, 1000)
    with caplog.at_level(logging.WARNING):
        retention.tick()
        retention.tick()
    [said] = [record.getMessage() for record in caplog.records]
    assert "experiment many has over 20 keys" in said


# --- a database that is not there -----------------------------------------------------------------


def test_a_locked_database_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database_module, "BUSY_S", 0.2)
    store = Store(Database(str(tmp_path / "x.db")))
    with sqlite3.connect(tmp_path / "x.db", isolation_level=None) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(Down, match="database is locked"):
            store.write([exposed("a")], 1)
        assert store.sums(1) == {}, "who reads does not wait"
        other.execute("COMMIT")
    store.write([exposed("a")], 1)
    assert store.sums(1)["failed", "gelu", ""].n == 1
    store.database.close()


def test_a_lost_connection_is_made_again(postgres: str) -> None:
    import psycopg

    with psycopg.connect(f"{postgres}postgres", autocommit=True) as connection:
        connection.execute("CREATE DATABASE lost")
        store = Store(Database(f"{postgres}lost"))
        for n in range(3):
            write(store, [exposed(f"before {n}")])
            connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'lost'")
            number = next(_numbers)
            try:
                store.write([exposed(f"after {n}")], number)
            except Down:
                store.write([exposed(f"after {n}")], number)
        assert store.sums(1)["failed", "gelu", ""].n == 6
        store.database.close()


@pytest.mark.parametrize(
    ("database", "says"),
    [
        ("mysql://someone:secret@host/x", "postgresql://USER"),
        ("postgresql://someone:secret@127.0.0.1:1/x", "connection"),
        ("://x", "no URL"),
        ("/proc/nothing/x.db", "cannot be"),
        ("/", "cannot be used"),
        ("README.md", "not a database"),
    ],
)
def test_a_database_that_cannot_be_is_refused_and_no_password_shown(
    database: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(BadInput, match="--database") as refused:
        Database(database)
    assert says in str(refused.value)
    assert "secret" not in str(refused.value)
