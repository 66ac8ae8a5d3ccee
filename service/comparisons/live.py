"""The comparison that runs here: `actuary compare` as a child process, one at a time, told to end with the service.

    start -> DIR/ID/asked.json, the process, DIR/ID/compare.log
    stop  -> SIGTERM; it judges what it has measured, and ends

The serving process imports nothing of the load test.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
import os
import signal
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

import actuary
from service.comparisons.request import ComparisonRequest
from service.comparisons.runs import ASKED, Json, Runs
from service.errors import ApiError
from service.experiments.live import Experiments
from service.library import Library

LOG = "compare.log"
NEEDS = ("loadtest", "locust", "polars", "psutil", "scipy")
STOP_S = 60.0  # to judge and draw what was measured: 4 s alone, more beside others
END_S = 15.0  # the same, when the service ends; then it is cut short
OFF = "comparisons are off here; start the service with --compare DIR, the folder to keep them in"


class Comparisons:
    """Those of a folder, and the one that runs. To be used on the event loop."""

    def __init__(self, folder: Path | None, library: Library, experiments: Experiments) -> None:
        self.runs = Runs(folder.absolute()) if folder else None
        self._library = library
        self._experiments = experiments
        self._starting = asyncio.Lock()
        self._child: asyncio.subprocess.Process | None = None
        self._running: str | None = None  # its id
        self._watch: asyncio.Task[None] | None = None
        self._told = False  # to stop

    @property
    def why_not(self) -> str:
        """Why none can be started; empty where one can."""
        if self.runs is None:
            return OFF
        missing = next((name for name in NEEDS if find_spec(name) is None), None)
        remedy = "pip install -e '.[load]' in Actuary's folder, and start it again"
        return f"a comparison needs the package {missing!r}, which is not installed here; {remedy}" if missing else ""

    async def all(self) -> list[Json]:
        return await asyncio.to_thread(self.runs.all, self._running) if self.runs else []

    async def one(self, name: str) -> Json:
        return await asyncio.to_thread(self._on().one, name, self._running)

    def report(self, name: str) -> Path:
        return self._on().report(name)

    async def start(self, asked: ComparisonRequest, url: str) -> Json:
        """Begin one against the service at `url`, this one; 409 where one runs."""
        if self.why_not:
            self._refuse(self.why_not)
        asked.check(self._library, self._experiments.arms)
        async with self._starting:
            await self._check_alone()
            now = datetime.datetime.now(datetime.UTC)
            folder = self._on().root / now.strftime("%Y%m%dT%H%M%S.%fZ")
            record = {
                "started": now.isoformat(timespec="seconds"),
                **asked.model_dump(),
                "baseline": asked.baseline or asked.variants[0],
            }
            try:
                folder.mkdir(parents=True)
                _write(folder / ASKED, record)
                with (folder / LOG).open("wb") as log:
                    self._child = await asyncio.create_subprocess_exec(
                        *asked.command(url, folder),
                        env=_environment(),
                        stdin=asyncio.subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                        start_new_session=True,  # Ctrl-C reaches the service, which then tells it
                    )
            except OSError as error:
                self._refuse(f"--compare {folder.parent} cannot be written: {error}; make room, or name another")
            self._running, self._told = folder.name, False
            self._watch = asyncio.create_task(self._watched(self._child, folder, record))
        return await self.one(folder.name)

    async def stop(self, name: str) -> Json:
        """End it, and answer what was measured until then; as it is, where it has ended before."""
        found = await self.one(name)
        if found["state"] == "running":
            if name != self._running or self._watch is None:
                raise ApiError(
                    "conflict", f"comparison {name} was not started by this service; stop it where it was", "id"
                )
            self.tell()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(self._watch), STOP_S)
            found = await self.one(name)
        return found

    def tell(self) -> None:
        """SIGTERM to what runs, once: a second would end it before it has judged."""
        if self._child and self._child.returncode is None and not self._told:
            self._told = True
            with contextlib.suppress(ProcessLookupError):
                self._child.send_signal(signal.SIGTERM)

    async def close(self) -> None:
        self.tell()
        if self._watch:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(self._watch), END_S)

    def _on(self) -> Runs:
        if self.runs is None:
            self._refuse(OFF)
        return self.runs

    def _refuse(self, why: str) -> NoReturn:
        raise ApiError("unavailable", why)

    async def _check_alone(self) -> None:
        running = next((each["id"] for each in await self.all() if each["state"] == "running"), None)
        if running:
            raise ApiError(
                "conflict",
                f"comparison {running} runs, and two would measure each other; wait for it, or stop it with "
                f"DELETE /v1/comparisons/{running}",
            )

    async def _watched(self, child: asyncio.subprocess.Process, folder: Path, record: Json) -> None:
        """Until it ends. Why there is no verdict is kept, where there is none."""
        code = await child.wait()
        if code and code != -signal.SIGTERM:
            why = await asyncio.to_thread(_last_words, folder / LOG, code)
            with contextlib.suppress(OSError):  # no room: then it reads as stopped
                _write(folder / ASKED, {**record, "stopped" if self._told else "failed": why})
        self._running = self._child = None


def _environment() -> dict[str, str]:
    """With the modules of this very program."""
    root = str(Path(actuary.__file__).parent)
    return {**os.environ, "NO_COLOR": "1", "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}


def _last_words(log: Path, code: int) -> str:
    """What a process that failed said last: `actuary: ...`, or else the end of its log."""
    try:
        text = log.read_text(encoding="utf-8", errors="replace").strip()
    except OSError as error:
        text = f"its log cannot be read: {error}"
    said = text.rpartition("\nactuary: ")[2].removeprefix("actuary: ")
    return said[-2000:] or f"the process ended with {code}, and said nothing"


def _write(path: Path, record: Json) -> None:
    """Whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(path)
