"""The experiments that run here: the service's one door to all of this.

    expose -> Exposure, or None at once where no experiment is named
    ... ended -> settle, of some together: the record is written, rows are kept for an outcome, shadows have their copy

Nothing of a database is imported, and no thread started, before there is an experiment.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.requests import Request

from actuary import BadInput
from export import bundle
from service.completions_schema import CompletionRequest
from service.engine import Engine
from service.errors import ApiError, Invalid, shown
from service.experiments.counters import Counters
from service.experiments.definition import Assignment, Definition, Running, parse, read_file
from service.experiments.exposure import Exposure, Logits
from service.experiments.outcomes import Kept, KeptRows, log_loss
from service.experiments.records import Exposed, Outcome
from service.experiments.shadow import Copy, Shadows
from service.experiments.verdict import verdict
from service.library import Library
from service.next_token import chosen_id
from service.schema import NextTokenRequest
from service.settings import Settings

if TYPE_CHECKING:
    from service.experiments.recorder import Recorder
    from service.experiments.retention import Retention
    from service.experiments.store import Row, Store

log = logging.getLogger("actuary.service")

MOST_RUNNING = 64
LOOK_S = 2.0  # from look to look for a database that is not there yet
REFRESH_S = 2.0  # until other processes on the same database know what was changed by one of them
FLUSH_S = 2.0  # how long a verdict waits for what is not written yet
# Until what has ended is settled: 50 us right after its answer, with cold caches and the next request waiting; of ten
# together 20 us each. Their batches' logits stay in memory meanwhile.
SETTLE_S = 0.02


class Experiments:
    """Between `start` and `close` they are recorded."""

    def __init__(self, settings: Settings, library: Library, engine: Engine) -> None:
        """Open those of the settings' file and database; BadInput where one cannot be."""
        self.counters = Counters()
        self._settings = settings
        self._library = library
        self._engine = engine
        self._key_header = settings.key_header.lower().encode()
        self._running: dict[str, Running] = {}
        self._process = secrets.token_hex(4)  # what this one's exposure ids begin with
        self._rows = KeptRows(settings.outcome_mb << 20, self._process)
        self._shadows = Shadows(lambda: engine.idle, lambda record: self._add(record), self.counters)
        self._lock = threading.Lock()  # one change of what runs at a time
        self._store: Store | None = None
        self._recorder: Recorder | None = None
        self._retention: Retention | None = None
        self._started = False
        self._looking: asyncio.Task[None] | None = None  # for a database that is not there yet
        self._refreshed = 0.0
        self._skipped = set[int]()  # ids of those that cannot run here, which was said
        self._ended: list[tuple[Exposure, int, float]] = []  # its status, and when; not settled yet
        self._settling: asyncio.TimerHandle | None = None
        definitions = read_file(settings.experiments, library) if settings.experiments else []
        if len(definitions) > MOST_RUNNING:
            raise BadInput(f"--experiments {settings.experiments} has {len(definitions)}; at most {MOST_RUNNING} run")
        if definitions or "://" in settings.database or Path(settings.database).exists():
            self._begin_all(self._open(), definitions)

    def _begin_all(self, store: Store, definitions: Sequence[Definition]) -> None:
        from service.experiments.database import Down

        try:
            for definition in definitions:
                store.begin(definition.name, definition.as_json())
            self._refresh(store)
        except Down as error:
            raise BadInput(f"--database {store.database.shown} does not answer: {error}") from None

    def start(self) -> None:
        self._started = True
        if self._store:
            self._record(self._store)
        else:
            self._looking = asyncio.get_running_loop().create_task(self._look())

    def answer_no_more(self) -> None:
        """On the event loop, before `close`."""
        self.settle()
        if self._looking:
            self._looking.cancel()

    def close(self) -> None:
        """Write what waits; again it does nothing."""
        self._started = False
        self._engine.on_work = None
        self._shadows.close()
        recorder, self._recorder = self._recorder, None
        if recorder:
            recorder.close()
        store, self._store = self._store, None
        if store:
            store.database.close()

    async def _look(self) -> None:
        """Another process may make the database's file, and begin experiments in it."""
        while self._store is None and self._started:
            await asyncio.sleep(LOOK_S)
            if Path(self._settings.database).exists():
                await asyncio.to_thread(self._appeared)

    def _appeared(self) -> None:
        try:
            with self._lock:
                if self._store is None and self._started:
                    store = self._open()
                    self._refresh(store)
                    self._record(store)
        except Exception as error:  # it is being made, or is none of ours
            log.error("the experiments' database %s cannot be used: %s", self._settings.database, error)

    # --- a request

    def expose(self, asked: NextTokenRequest | CompletionRequest, request: Request) -> Exposure | None:
        """Its exposure, where its model is an experiment; None where it is variants.

        On the event loop. An exposure costs 40 us with cold caches, and later 15 to be settled; naming a variant, 5.
        """
        running = self._running
        if not running:
            return None
        names = [asked.model] if isinstance(asked.model, str) else asked.model
        if running.keys().isdisjoint(names):
            for name in names:
                if name not in self._library.variants and names != ["*"]:
                    self._library.unknown(name, running)
            return None
        if len(names) > 1:
            name = next(name for name in names if name in running)
            raise Invalid(f"model names the experiment {name!r} beside others; name it alone", "model")
        scope, its = request.scope, running[names[0]]
        key = next((value for name, value in scope["headers"] if name == self._key_header), b"")
        if not key and isinstance(asked, CompletionRequest) and asked.user:
            key = asked.user.encode("utf-8", "surrogatepass")
        arm = its.assignment.arm(key) if key else its.assignment.any_arm()
        id_ = self._process + os.urandom(8).hex()
        return Exposure(id_, its, arm, key, asked, scope["path"], request.state.arrived, self._engine, self._end)

    def _end(self, exposure: Exposure, status: int, ended: float) -> None:
        self._ended.append((exposure, status, ended))
        if exposure.running.definition.shadows:  # they want the quiet moment right after it
            asyncio.get_running_loop().call_soon(self.settle)
        elif self._settling is None:
            self._settling = asyncio.get_running_loop().call_later(SETTLE_S, self.settle)

    def settle(self) -> None:
        """Have what has ended counted. On the event loop."""
        if self._settling:
            self._settling.cancel()
            self._settling = None
        ended, self._ended = self._ended, []
        for exposure, status, at in ended:
            self._settle(exposure, exposure.record(status, at))

    def _settle(self, exposure: Exposure, record: Exposed) -> None:
        self._add(record)
        definition, variants = exposure.running.definition, self._library.variants
        if record.status != 200 or not (self._settings.outcome_mb or definition.shadows):
            return
        rows: list[Logits] = exposure.engine.rows()
        if not rows:
            return
        if self._settings.outcome_mb:
            kept = Kept(definition.name, exposure.running.id, variants[record.variant], record.key_hash, [*rows])
            self._rows.keep(record.id, kept)
        for shadow in definition.shadows:
            self._shadows.offer(
                Copy(
                    record.id,
                    record.experiment_id,
                    variants[shadow],
                    record.variant,
                    record.key_hash,
                    exposure.engine.prompts[0],
                    rows[0],
                    record.infer_ms,
                )
            )

    def _add(self, record: Any) -> bool:
        if self._recorder:
            return self._recorder.add(record)
        self.counters.lost()
        return False

    # --- outcomes and verdicts

    def outcome(self, name: str, id_: str, token: int | str, prompt_index: int) -> dict[str, Any]:
        """Count what really came; ApiError where it cannot be, or was already."""
        self._one(name)
        kept, row = self._rows.find(name, id_, prompt_index)
        token_id = chosen_id(token, "token", kept.variant)
        loss = log_loss(row, token_id)
        record = Outcome(
            id_, prompt_index, kept.experiment_id, kept.variant.name, kept.key_hash, token_id, loss, time.time()
        )
        if not self._add(record):
            raise ApiError("unavailable", "too many records wait for the experiments' database; report it again later")
        self._rows.spend(kept, prompt_index)
        return {"object": "outcome", "id": id_, "model": kept.variant.name, "token": token_id, "log_loss": loss}

    def verdicts(self) -> list[dict[str, Any]]:
        """Of all that run. Blocks."""
        return [self._verdict(running) for running in self._running.values()]

    def verdict(self, name: str) -> dict[str, Any]:
        """Blocks."""
        return self._verdict(self._one(name))

    @property
    def arms(self) -> dict[str, tuple[str, ...]]:
        """Of each that runs."""
        return {name: tuple(running.definition.arms) for name, running in self._running.items()}

    def summaries(self) -> list[dict[str, Any]]:
        """What runs, for the list of models."""
        return [self.summary(running) for running in self._running.values()]

    def summary(self, running: Running) -> dict[str, Any]:
        """An experiment without its figures, and what each of its arms takes."""
        definition = running.definition
        arms = [self._library.variants[arm].manifest for arm in definition.arms]
        return {
            "id": definition.name,
            "object": "experiment",
            "created": int(running.began),
            "owned_by": "actuary",
            "baseline": definition.baseline,
            "arms": definition.shares,
            "shadows": list(definition.shadows),
            "context": min(arm.context for arm in arms),
            "vocab_size": arms[0].vocab_size,
            "files": {bundle.TOKENIZER: arms[0].files[bundle.TOKENIZER]},  # which all arms share
        }

    def tokenizer_of(self, model: str) -> str:
        """A variant that has the tokenizer of `model`, which may be an experiment: all of its arms have the same."""
        return self._running[model].definition.baseline if model in self._running else model

    def _verdict(self, running: Running) -> dict[str, Any]:
        from service.experiments.database import Down

        try:
            assert self._store
            if self._recorder:
                self._recorder.flush(FLUSH_S)
            return verdict(running, self._store.sums(running.id))
        except Down as error:
            raise _away(error) from None

    def _one(self, name: str) -> Running:
        if name not in self._running:
            known = f"those that run: {', '.join(self._running)}" if self._running else "none runs"
            raise ApiError("not_found", f"there is no experiment {shown(name)}; {known}", "name")
        return self._running[name]

    # --- what runs

    def begin(self, name: str, fields: object) -> tuple[Running, bool]:
        """Have it run as `fields` say, from nothing where it ran otherwise; and whether it is new. Blocks."""
        definition = parse(name, fields, self._library)
        with self._lock:
            before = self._running.get(name)
            if before is None and len(self._running) >= MOST_RUNNING:
                raise Invalid(f"{MOST_RUNNING} experiments run; end one first")
            try:
                store = self._store or self._open()
                store.begin(name, definition.as_json())
                self._refresh(store)
            except BadInput as error:
                raise ApiError("unavailable", str(error)) from None
            except Exception as error:
                raise _as_api_error(error) from None
            if self._started and not self._recorder:
                self._record(store)
            now = self._running.get(name)
            if now is None:
                raise ApiError("conflict", f"another process ended {name!r} at the same time; ask again", "name")
            return now, before is None or before.id != now.id

    def end(self, name: str) -> Running:
        """Have it run no more; what is stored of it stays. Blocks."""
        with self._lock:
            running = self._one(name)
            try:
                assert self._store
                self._store.end(running.id)
                self._refresh(self._store)
            except Exception as error:
                raise _as_api_error(error) from None
            return running

    def _open(self) -> Store:
        from service.experiments.database import Database
        from service.experiments.store import Store

        self._store = Store(Database(self._settings.database))
        return self._store

    def _record(self, store: Store) -> None:
        from service.experiments.recorder import Recorder
        from service.experiments.retention import Retention

        self._retention = Retention(store.database, self._settings.max_exposures)
        self._recorder = Recorder(store, self.counters, self._tick)
        self._engine.on_work = self._shadows.give_way
        self._shadows.start()

    def _tick(self) -> None:
        """In the recorder's thread: what other processes on this database have changed; what may leave it."""
        if time.monotonic() - self._refreshed > REFRESH_S and self._store:
            with self._lock:
                self._refresh(self._store)
        if self._retention:
            self._retention.tick()

    def _refresh(self, store: Store) -> None:
        """What runs here, by the database."""
        running = {}
        before = {each.id: each for each in self._running.values()}
        for row in store.running():
            if its := before.get(row.id) or self._of(row):
                running[row.name] = its
        self._running = running
        self._refreshed = time.monotonic()

    def _of(self, row: Row) -> Running | None:
        from service.experiments.definition import loads

        try:
            definition: Definition = parse(row.name, loads(row.definition), self._library)
        except Invalid as error:
            if row.id not in self._skipped:
                log.error("the experiment %s of the database does not run here: %s", shown(row.name), error.detail)
            self._skipped.add(row.id)
            return None
        return Running(row.id, definition, Assignment(definition), row.began)


def _as_api_error(error: Exception) -> Exception:
    from service.experiments.database import Down

    return _away(error) if isinstance(error, Down) else error


def _away(error: Exception) -> ApiError:
    return ApiError("unavailable", f"the experiments' database does not answer: {error}; try again later")
