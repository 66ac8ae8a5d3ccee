"""What leaves the database, so that it stays within a size; no verdict changes by it, now or later.

    exposures   beyond the newest --max-exposures, with the outcomes and shadows of before then. A verdict reads sums
                (tables.py), which have had them, and are the very ones: nothing is estimated anew
    key sums    of experiments that ended: until then each is needed, for a key that asks again moves the square of its
                own sum. So those of what runs stay, however many keys there are, and MOST_KEYS are said

Definitions and the arms' sums, some rows for each experiment, stay for good.
"""

from __future__ import annotations

import logging
import time
from time import monotonic

import sqlalchemy as sa

from service.experiments.database import Database
from service.experiments.store import LATE_S
from service.experiments.tables import arm_sums, experiments, exposures, key_sums, outcomes, shadows

log = logging.getLogger("actuary.service")

EVERY_S = 60.0  # to find the oldest of a million takes 70 ms in SQLite
AT_ONCE = 2_000  # rows of a table that leave together: 50 ms, and who writes waits no longer
FORGET_S = 2 * LATE_S  # after an experiment's end: no transaction that still counted something of it is under way
MOST_KEYS = 1_000_000  # of an experiment that runs: 0.3 GB of sums


class Retention:
    """Of one process; several may do the same at once. Blocks."""

    def __init__(self, database: Database, most: int) -> None:
        """`most` exposures are kept, of all experiments together."""
        self._database = database
        self._most = most
        self._due = 0.0  # by monotonic
        self._said = set[int]()  # ids of experiments with too many keys
        self._left = False  # anything, which was said

    def tick(self) -> None:
        """A step, where one is due: some thousand rows; the next is due soon where there are more."""
        if monotonic() < self._due:
            return
        if not self.step():
            self._say_keys()
            self._due = monotonic() + EVERY_S

    def step(self) -> bool:
        """Have at most AT_ONCE rows of each table leave; whether there are more."""
        upto = self._oldest_to_leave()
        ended = self._with_key_sums()
        if upto is None and not ended:
            return False
        if upto is not None and not self._left:
            log.warning("more than --max-exposures %d: the oldest leave; verdicts keep them in their sums", self._most)
            self._left = True
        with self._database.writing() as connection:
            left = [
                _leave(connection, table, table.c.at <= upto, table.c.at)
                for table in (exposures, outcomes, shadows)
                if upto is not None
            ]
            if ended:
                left.append(_leave(connection, key_sums, key_sums.c.experiment_id.in_(ended), key_sums.c.experiment_id))
        return max(left) >= AT_ONCE

    def _oldest_to_leave(self) -> float | None:
        """The time of the newest exposure that is one too many."""
        query = sa.select(exposures.c.at).order_by(exposures.c.at.desc()).offset(self._most).limit(1)
        with self._database.reading() as connection:
            found: float | None = connection.execute(query).scalar()
        return found

    def _with_key_sums(self) -> list[int]:
        """Experiments that ended long ago and have sums of keys yet."""
        table = experiments.c
        some = sa.exists().where(key_sums.c.experiment_id == table.id)
        query = sa.select(table.id).where(table.ended < time.time() - FORGET_S, some).order_by(table.id).limit(100)
        with self._database.reading() as connection:
            return list(connection.execute(query).scalars())

    def _say_keys(self) -> None:
        """Of each that runs with more than MOST_KEYS, once."""
        table, sums = experiments.c, arm_sums.c
        units = (  # keys, and requests without one: cheap, and never less
            sa.select(table.id, table.name)
            .join(arm_sums, sa.and_(sums.experiment_id == table.id, sums.measure == "failed"))
            .where(table.ended.is_(None), table.id.not_in(sorted(self._said)))
            .group_by(table.id, table.name)
            .having(sa.func.sum(sums["keys"]) > MOST_KEYS)
        )
        with self._database.reading() as connection:
            for id_, name in connection.execute(units).all():
                its = sa.select(1).where(key_sums.c.experiment_id == id_, key_sums.c.measure == "failed")
                counted = sa.select(sa.func.count()).select_from(its.limit(MOST_KEYS + 1).subquery())
                if connection.execute(counted).scalar_one() > MOST_KEYS:
                    self._said.add(id_)
                    log.error(
                        "the experiment %s has over %d keys, and the database grows with each: their sums stay while "
                        "it runs, since its verdict needs them; end it, or begin it anew, once it has said enough",
                        name,
                        MOST_KEYS,
                    )


def _leave(
    connection: sa.Connection, table: sa.Table, which: sa.ColumnElement[bool], order: sa.ColumnElement[object]
) -> int:
    """Delete at most AT_ONCE rows; how many. Those that another process deletes at the moment are left to it."""
    key = sa.tuple_(*table.primary_key)
    oldest = sa.select(*table.primary_key).where(which).order_by(order).limit(AT_ONCE)
    return connection.execute(sa.delete(table).where(key.in_(oldest.with_for_update(skip_locked=True)))).rowcount
