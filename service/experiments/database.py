"""The experiments' database: SQLite or PostgreSQL, opened, and its tables made what they are now.

Imported once an experiment is defined, and not before: SQLAlchemy takes 0.2 s and Alembic 0.2 s more, the latter only
where the tables are not there yet, or are those of an older version. Several processes may share one database.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, NoSuchModuleError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from actuary import BadInput
from service.errors import utf8

HEAD = "0002"  # the last change in migrations/versions
BUSY_S = 5  # how long a locked database is waited for, and one that does not answer
MIGRATE_S = 600  # the same in PostgreSQL while its tables are changed, by this process or another
_MIGRATING = 0x416374  # any number: what PostgreSQL locks while one process makes the tables


class Down(Exception):
    """The database does not answer, is locked, is full, ...: the same may work later."""


class Database:
    """Blocks; safe from any thread."""

    def __init__(self, database: str) -> None:
        """Open it, and make or change its tables where that is due; BadInput where it cannot be used."""
        url = _url(database)
        self.shown = utf8(url.render_as_string(hide_password=True))
        self._engine = _engine(url, self.shown)
        self.insert: Any = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}[url.get_backend_name()]
        try:
            _migrate(self._engine, self.shown)
        except DBAPIError as error:
            raise BadInput(f"--database {self.shown} cannot be used: {_reason(error)}") from None

    def close(self) -> None:
        self._engine.dispose()

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """A transaction; Down where what fails may work later."""
        with _saying_down(), self._engine.connect() as connection:
            yield connection

    @contextmanager
    def writing(self) -> Iterator[sa.Connection]:
        """The same with SQLite's lock from its beginning: to take it later fails where another has written."""
        with _saying_down(), self._engine.execution_options(immediate=True).begin() as connection:
            yield connection


@contextmanager
def _saying_down() -> Iterator[None]:
    try:
        yield
    except (DBAPIError, PoolTimeout) as error:
        lost = isinstance(error, DBAPIError) and error.connection_invalidated
        if lost or isinstance(error, OperationalError | InterfaceError | PoolTimeout):
            raise Down(_reason(error)) from error
        raise


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
            for limit in ("statement_timeout", "lock_timeout"):  # an index over many rows takes its time
                connection.exec_driver_sql(f"SET LOCAL {limit} = '{MIGRATE_S}s'")
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
