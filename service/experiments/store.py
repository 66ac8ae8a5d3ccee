"""The experiments' database: SQLite or PostgreSQL, opened and brought up to date; records in, sums out.

Imported once an experiment is defined, and not before: SQLAlchemy takes 0.2 s and Alembic 0.2 s more, the latter only
where the tables are not there yet. Several processes may share one database. A batch is one transaction; what it has
that the database has already, since an answer was lost on the way, is not counted again.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, NoSuchModuleError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from actuary import BadInput
from service.errors import utf8
from service.experiments.confidence import Sums
from service.experiments.records import Exposed, Outcome, Record, Shadowed
from service.experiments.tables import arm_sums, experiments, exposures, key_sums, outcomes, shadows

HEAD = "0001"  # the last change in migrations/versions
BUSY_S = 5  # how long a locked database is waited for, and one that does not answer
LEAST_MS = 1e-3  # a logarithm needs more than nothing
_MIGRATING = 0x416374  # any number: what PostgreSQL locks while one process makes the tables

Of = tuple[str, str, str]  # a measure, a variant, and whose answers a shadow's are compared with, else ""


class Down(Exception):
    """The database does not answer, is locked, is full, ...: the same may work later."""


@dataclass(frozen=True)
class Row:
    """An experiment as the database has it."""

    id: int
    name: str
    definition: str
    began: float


@dataclass(frozen=True)
class _Value:
    """One value of a measure."""

    experiment_id: int
    measure: str
    variant: str
    against: str
    key_hash: int | None
    value: float


class Store:
    """Blocks; safe from any thread."""

    def __init__(self, database: str) -> None:
        """Open it, and make or change its tables where that is due; BadInput where it cannot be used."""
        url = _url(database)
        self.shown = utf8(url.render_as_string(hide_password=True))
        self._engine = _engine(url, self.shown)
        insert = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}[url.get_backend_name()]
        self._insert: Any = insert
        try:
            _migrate(self._engine, self.shown)
        except DBAPIError as error:
            raise BadInput(f"--database {self.shown} cannot be used: {_reason(error)}") from None

    def close(self) -> None:
        self._engine.dispose()

    # --- experiments

    def running(self) -> list[Row]:
        """In the order they began."""
        table = experiments.c
        query = sa.select(table.id, table.name, table.definition, table.began).where(table.ended.is_(None))
        with _Guard(), self._engine.connect() as connection:
            return [Row(*row) for row in connection.execute(query.order_by(table.id))]

    def begin(self, name: str, definition: str) -> Row:
        """Have it run with that definition: as it does, or anew, and what it was before is ended."""
        table = experiments.c
        runs = sa.select(table.id, table.definition, table.began).where(table.name == name, table.ended.is_(None))
        with _Guard():
            while True:
                now = time.time()
                with self._writing() as connection:
                    found = connection.execute(runs.with_for_update()).first()
                    if found and found.definition == definition:
                        return Row(found.id, name, definition, found.began)
                    if found:
                        connection.execute(sa.update(experiments).where(table.id == found.id).values(ended=now))
                    anew = self._insert(experiments).values(name=name, definition=definition, began=now)
                    id_ = connection.execute(anew.on_conflict_do_nothing().returning(table.id)).scalar()
                    if id_ is not None:  # else another process began it at the same time
                        return Row(id_, name, definition, now)

    def end(self, id_: int) -> None:
        with _Guard(), self._writing() as connection:
            connection.execute(sa.update(experiments).where(experiments.c.id == id_).values(ended=time.time()))

    def sums(self, id_: int) -> dict[Of, Sums]:
        """Of one experiment."""
        table = arm_sums.c
        columns = (table["keys"], table.n, table.s, table.ss, table.sn, table.nn)
        query = sa.select(table.measure, table.variant, table.against, *columns).where(table.experiment_id == id_)
        with _Guard(), self._engine.connect() as connection:
            return {(row[0], row[1], row[2]): Sums(*row[3:]) for row in connection.execute(query)}

    # --- records

    def write(self, records: Sequence[Record]) -> None:
        """All of them, or where it raises Down none."""
        with _Guard(), self._writing() as connection:
            values: list[_Value] = []
            for exposed in self._new(connection, exposures, ("id",), records, Exposed):
                values += _of_exposed(exposed)
            for outcome in self._new(connection, outcomes, ("exposure_id", "prompt_index"), records, Outcome):
                values.append(_value(outcome, "loss", outcome.log_loss))
            for shadowed in self._new(connection, shadows, ("exposure_id", "variant"), records, Shadowed):
                values += _of_shadowed(shadowed)
            if values:
                self._add(connection, values)

    def _writing(self) -> Any:
        """A transaction with SQLite's lock from its beginning: to take it later fails where another has written."""
        return self._engine.execution_options(immediate=True).begin()

    def _new(
        self, connection: sa.Connection, table: sa.Table, key: tuple[str, ...], records: Sequence[Record], kind: type
    ) -> list[Any]:
        """Store the records of that kind; those that were not there yet."""
        mine = {tuple(getattr(record, name) for name in key): record for record in records if isinstance(record, kind)}
        if not mine:
            return []
        rows = [{name: getattr(record, name) for name in table.columns.keys()} for record in mine.values()]  # noqa: SIM118
        statement = self._insert(table).on_conflict_do_nothing().returning(*(table.c[name] for name in key))
        return [mine[tuple(row)] for row in connection.execute(statement, rows)]

    def _add(self, connection: sa.Connection, values: Iterable[_Value]) -> None:
        """Bring the sums up to date: first each key's, whose squares then change those of its arm."""
        arms: dict[tuple[Any, ...], list[float]] = defaultdict(lambda: [0.0] * 6)
        keys: dict[tuple[Any, ...], list[float]] = defaultdict(lambda: [0.0, 0.0])
        for value in values:
            arm = (value.experiment_id, value.measure, value.variant, value.against)
            if value.key_hash is None:
                _change(arms[arm], 0.0, 0.0, 1.0, value.value)
            else:
                sums = keys[*arm, value.key_hash]
                sums[0] += 1
                sums[1] += value.value
        if keys:
            for *arm, key_hash, n, s in self._increase(connection, key_sums, keys):
                dn, ds = keys[*arm, key_hash]
                before = n - dn
                _change(arms[tuple(arm)], before, s - ds if before else 0.0, n, s)
        self._increase(connection, arm_sums, arms)

    def _increase(
        self, connection: sa.Connection, table: sa.Table, by: Mapping[tuple[Any, ...], Sequence[float]]
    ) -> list[Any]:
        """Add to rows of a table of sums, by primary key; each row as it then is.

        In the order of their keys: two processes that write at once wait for one another, and never both.
        """
        key = [column.name for column in table.primary_key]
        sums = [column.name for column in table.columns if column.name not in key]
        insert = self._insert(table)
        added = {name: table.c[name] + insert.excluded[name] for name in sums}
        statement = insert.on_conflict_do_update(index_elements=key, set_=added).returning(*table.columns)
        rows = [dict(zip(key + sums, (*of, *by[of]), strict=True)) for of in sorted(by)]
        return list(connection.execute(statement, rows))


def _change(sums: list[float], n: float, s: float, new_n: float, new_s: float) -> None:
    """What one key changes in keys, n, s, ss, sn and nn of its arm."""
    for at, change in enumerate(
        (float(n == 0), new_n - n, new_s - s, new_s**2 - s**2, new_s * new_n - s * n, new_n**2 - n**2)
    ):
        sums[at] += change


def _value(record: Record, measure: str, value: float, against: str = "") -> _Value:
    return _Value(record.experiment_id, measure, record.variant, against, record.key_hash, value)


def _of_exposed(record: Exposed) -> list[_Value]:
    values = [_value(record, "failed", float(record.status >= 400))]
    if record.status < 400:
        values.append(_value(record, "total", math.log(max(LEAST_MS, record.total_ms))))
        values.append(_value(record, "infer", math.log(max(LEAST_MS, record.infer_ms))))
    return values


def _of_shadowed(record: Shadowed) -> list[_Value]:
    slower = math.log(max(LEAST_MS, record.infer_ms) / max(LEAST_MS, record.real_infer_ms))
    measures = {"same_top": record.same_top, "kl": record.kl, "sum_abs_dp": record.sum_abs_dp, "infer": slower}
    return [_value(record, measure, value, record.against) for measure, value in measures.items()]


class _Guard:
    """Says of what may work later that it may."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        lost = isinstance(error, DBAPIError) and error.connection_invalidated
        if lost or isinstance(error, OperationalError | InterfaceError | PoolTimeout):
            assert error
            raise Down(_reason(error)) from error


def _reason(error: BaseException) -> str:
    return utf8(" ".join(str(getattr(error, "orig", None) or error).split())[:300])


def _url(database: str) -> sa.URL:
    """A path, sqlite:///PATH or postgresql://...; BadInput for all else."""
    if "://" not in database:
        return sa.URL.create("sqlite", database=str(Path(database).expanduser()))
    try:
        url = sa.make_url(database)
    except ArgumentError:
        raise BadInput("--database is no URL; give a file, or postgresql://USER:PASSWORD@HOST/NAME") from None
    if url.drivername in ("postgresql", "postgres", "postgresql+psycopg"):
        return url.set(drivername="postgresql+psycopg")
    if url.drivername == "sqlite" and url.database:
        return url
    raise BadInput(
        f"--database {url.render_as_string(hide_password=True)}: offered are a file, sqlite:///FILE and "
        "postgresql://USER:PASSWORD@HOST/NAME"
    )


def _engine(url: sa.URL, shown: str) -> sa.Engine:
    try:
        if url.get_backend_name() == "postgresql":
            answer_by = {"connect_timeout": BUSY_S, "tcp_user_timeout": 1000 * BUSY_S}
            within = {"options": f"-c statement_timeout={BUSY_S}s -c lock_timeout={BUSY_S}s"}
            return sa.create_engine(url, pool_pre_ping=True, connect_args={**answer_by, **within})
        assert url.database
        Path(url.database).parent.mkdir(parents=True, exist_ok=True)
        engine = sa.create_engine(url, connect_args={"timeout": BUSY_S})
    except (ModuleNotFoundError, NoSuchModuleError):
        raise BadInput(
            f"--database {shown} needs the package psycopg; install it with: pip install -e '.[postgres]'"
        ) from None
    except OSError as error:
        raise BadInput(f"--database {shown} cannot be made: {error.strerror}; name another file") from None

    @sa.event.listens_for(engine, "connect")
    def _(connection: Any, __: object) -> None:
        connection.isolation_level = None  # sqlite3 would begin transactions by itself, and not for each statement
        connection.execute("PRAGMA journal_mode = WAL")  # who reads does not wait for who writes
        connection.execute("PRAGMA synchronous = NORMAL")  # a power cut may cost the last batches, and nothing else

    @sa.event.listens_for(engine, "begin")
    def _(connection: sa.Connection) -> None:
        immediate = connection.get_execution_options().get("immediate")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")

    return engine


def _migrate(engine: sa.Engine, shown: str) -> None:
    """Make the tables what they are now; one process at a time, the others then find it done."""
    if _revision(engine) == HEAD:
        return
    from alembic import command
    from alembic.config import Config
    from alembic.script import ScriptDirectory
    from alembic.util import CommandError

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    with engine.execution_options(immediate=True).begin() as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_MIGRATING)))
        config.attributes["connection"] = connection
        try:
            command.upgrade(config, "head")
        except CommandError as error:
            known = ", ".join(
                sorted(script.revision for script in ScriptDirectory.from_config(config).walk_revisions())
            )
            raise BadInput(
                f"--database {shown} was made by another version of Actuary: {error}; known: {known}. Serve with that "
                "version, or name another database"
            ) from None


def _revision(engine: sa.Engine) -> str | None:
    """The last change that the tables have had."""
    with engine.connect() as connection:
        if not sa.inspect(connection).has_table("alembic_version"):
            return None
        found: str | None = connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar()
        return found
