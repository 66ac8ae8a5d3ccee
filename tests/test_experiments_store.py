"""The experiments' database: migrations, sums against all rows, processes that write at once, one that is away."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from actuary import BadInput
from service.experiments import store as store_module
from service.experiments.confidence import Sums
from service.experiments.records import Exposed, Outcome, Record, Shadowed
from service.experiments.store import HEAD, Down, Store
from service.experiments.tables import exposures, metadata

ROOT = Path(__file__).parent.parent
MIGRATIONS = ROOT / "service" / "experiments" / "migrations"


@pytest.fixture
def store(database: str) -> Iterator[Store]:
    store = Store(database)
    yield store
    store.close()


def exposed(
    id_: str, variant: str = "gelu", key_hash: int | None = None, total_ms: float = 2.0, **more: int
) -> Exposed:
    return Exposed(
        id_,
        more.get("experiment_id", 1),
        variant,
        key_hash,
        1e9,
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
        found.append(exposed(id_, variant, key_hash, float(rng.lognormal(1, 1)), status=422 if n % 11 == 0 else 200))
        if n % 3 == 0:
            found.append(Outcome(id_, 0, 1, variant, key_hash, 7, float(rng.exponential(2)), 1e9))
        if n % 4 == 0:
            found.append(Shadowed(id_, 1, "relu", variant, key_hash, 1, 0.1, 0.2, 3.0, 2.0, 1e9))
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
    with store._engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert context.get_current_revision() == HEAD
        assert compare_metadata(context, metadata) == []


def test_opening_again_changes_nothing(store: Store, database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store.begin("act", "{}")
    monkeypatch.setattr("alembic.command.upgrade", lambda *_: pytest.fail("there is nothing to change"))
    again = Store(database)
    assert again.running() == store.running()
    again.close()


def test_many_may_open_an_empty_database_at_once(database: str) -> None:
    together = threading.Barrier(6)

    def one(_: int) -> list[object]:
        together.wait()
        store = Store(database)
        store.begin("act", '{"arms": {}}')
        found = store.running()
        store.close()
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
    store = Store(database)
    with store._engine.begin() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    store.close()
    with pytest.raises(BadInput, match=r"another version of Actuary.*known: 0001"):
        Store(database)


# --- sums -----------------------------------------------------------------------------------------


def test_the_sums_are_those_of_all_rows(store: Store) -> None:
    rows = records(np.random.default_rng(0), 500, "x")
    for at in range(0, len(rows), 97):
        store.write(rows[at : at + 97])
        assert_sums(store, rows[: at + 97])
    shadow = store.sums(1)["kl", "relu", "gelu"]
    assert shadow.mean == pytest.approx(0.1)


def test_what_is_written_again_is_not_counted_again(store: Store) -> None:
    rows = records(np.random.default_rng(1), 100, "x")
    store.write(rows[:90])
    store.write(rows)
    store.write([*rows, *rows])
    assert_sums(store, rows)


def test_processes_that_write_at_once_lose_and_double_nothing(database: str) -> None:
    """Six, each with a connection of its own, the same keys in other orders."""
    all_rows = [records(np.random.default_rng(n), 300, f"writer {n}") for n in range(6)]

    def write(rows: list[Record]) -> None:
        store = Store(database)
        for at in range(0, len(rows), 40):
            while True:
                try:
                    store.write(rows[at : at + 40])
                    break
                except Down:
                    time.sleep(0.01)
        store.close()

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(write, all_rows))
    store = Store(database)
    assert_sums(store, [row for rows in all_rows for row in rows])
    store.close()


def test_an_experiment_runs_once_and_keeps_its_past(store: Store) -> None:
    first = store.begin("act", "1")
    assert store.begin("act", "1") == first
    second = store.begin("act", "2")
    other = store.begin("other", "1")
    assert [row.id for row in store.running()] == [second.id, other.id]
    store.write([exposed("a", experiment_id=first.id), exposed("b", experiment_id=second.id)])
    store.end(second.id)
    assert [row.name for row in store.running()] == ["other"]
    assert len({first.id, second.id, store.begin("act", "2").id}) == 3
    with store._engine.connect() as connection:
        assert connection.execute(sa.select(sa.func.count()).select_from(exposures)).scalar() == 2


# --- a database that is not there -----------------------------------------------------------------


def test_a_locked_database_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "BUSY_S", 0.2)
    store = Store(str(tmp_path / "x.db"))
    with sqlite3.connect(tmp_path / "x.db", isolation_level=None) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(Down, match="database is locked"):
            store.write([exposed("a")])
        assert store.sums(1) == {}, "who reads does not wait"
        other.execute("COMMIT")
    store.write([exposed("a")])
    assert store.sums(1)["failed", "gelu", ""].n == 1
    store.close()


def test_a_lost_connection_is_made_again(postgres: str) -> None:
    import psycopg

    with psycopg.connect(f"{postgres}postgres", autocommit=True) as connection:
        connection.execute("CREATE DATABASE lost")
        store = Store(f"{postgres}lost")
        for n in range(3):
            store.write([exposed(f"before {n}")])
            connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'lost'")
            try:
                store.write([exposed(f"after {n}")])
            except Down:
                store.write([exposed(f"after {n}")])
        assert store.sums(1)["failed", "gelu", ""].n == 6
        store.close()


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
        Store(database)
    assert says in str(refused.value)
    assert "secret" not in str(refused.value)
