"""What experiments are stored as: definitions, records in, sums out.

A batch of records is one transaction, with its writer's number in it: what the database has already, since the answer
that it has it was lost on the way, is not counted again, though its rows may have left meanwhile
(service/experiments/retention.py).
"""

from __future__ import annotations

import math
import secrets
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from service.experiments.confidence import Sums
from service.experiments.database import Database
from service.experiments.records import Exposed, Outcome, Record, Shadowed
from service.experiments.tables import arm_sums, experiments, exposures, key_sums, outcomes, shadows, writers

LATE_S = 24 * 3600.0  # after an experiment's end no record of it is counted any more
LEAST_MS = 1e-3  # a logarithm needs more than nothing

Of = tuple[str, str, str]  # a measure, a variant, and whose answers a shadow's are compared with, else ""


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

    def __init__(self, database: Database) -> None:
        self.database = database
        self._insert = database.insert
        self._writer = secrets.token_hex(8)

    # --- experiments

    def running(self) -> list[Row]:
        """In the order they began."""
        table = experiments.c
        query = sa.select(table.id, table.name, table.definition, table.began).where(table.ended.is_(None))
        with self.database.reading() as connection:
            return [Row(*row) for row in connection.execute(query.order_by(table.id))]

    def begin(self, name: str, definition: str) -> Row:
        """Have it run with that definition: as it does, or anew, and what it was before is ended."""
        table = experiments.c
        runs = sa.select(table.id, table.definition, table.began).where(table.name == name, table.ended.is_(None))
        while True:
            now = time.time()
            with self.database.writing() as connection:
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
        with self.database.writing() as connection:
            connection.execute(sa.update(experiments).where(experiments.c.id == id_).values(ended=time.time()))

    def sums(self, id_: int) -> dict[Of, Sums]:
        """Of one experiment."""
        table = arm_sums.c
        columns = (table["keys"], table.n, table.s, table.ss, table.sn, table.nn)
        query = sa.select(table.measure, table.variant, table.against, *columns).where(table.experiment_id == id_)
        with self.database.reading() as connection:
            return {(row[0], row[1], row[2]): Sums(*row[3:]) for row in connection.execute(query)}

    # --- records

    def write(self, records: Sequence[Record], number: int) -> int:
        """All of them, or where it raises Down none that are sure; how many came too late to be counted.

        The next number is a higher one. Where Down was raised, the same records are written with the same number.
        """
        with self.database.writing() as connection:
            if not self._is_new(connection, number):
                return 0
            late = self._ended_long_ago(connection, {record.experiment_id for record in records})
            counted = [record for record in records if record.experiment_id not in late]
            values: list[_Value] = []
            for table, kind in ((exposures, Exposed), (outcomes, Outcome), (shadows, Shadowed)):
                mine = [record for record in counted if isinstance(record, kind)]
                if mine:
                    names = table.columns.keys()
                    rows = [{name: getattr(record, name) for name in names} for record in mine]
                    connection.execute(sa.insert(table), rows)
                for record in mine:
                    values += _values(record)
            if values:
                self._add(connection, values)
            return len(records) - len(counted)

    def _is_new(self, connection: sa.Connection, number: int) -> bool:
        """Whether the batch of that number is not stored; from now on it is."""
        insert = self._insert(writers).values(writer=self._writer, number=number)
        higher = insert.on_conflict_do_update(
            index_elements=["writer"],
            set_={"number": insert.excluded.number},
            where=writers.c.number < insert.excluded.number,
        )
        return connection.execute(higher.returning(writers.c.number)).first() is not None

    def _ended_long_ago(self, connection: sa.Connection, ids: set[int]) -> set[int]:
        """Those of which no key's sums may be left, so that what is added now would count its key twice."""
        table = experiments.c
        query = sa.select(table.id).where(table.id.in_(sorted(ids)), table.ended < time.time() - LATE_S)
        return set(connection.execute(query).scalars())

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


def _values(record: Record) -> list[_Value]:
    if isinstance(record, Exposed):
        return _of_exposed(record)
    return [_value(record, "loss", record.log_loss)] if isinstance(record, Outcome) else _of_shadowed(record)


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
