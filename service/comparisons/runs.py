"""A folder of comparisons -> what the API says of them. Files alone: run.json, progress.json, result.json, report.html.

What `actuary compare` was told on a terminal to leave there is listed beside what this service started, which has an
`asked.json` too.
"""

from __future__ import annotations

import datetime
import fcntl
import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from service.errors import ApiError, shown

ASKED, RUN, PROGRESS, RESULT, REPORT, LOCK = (
    "asked.json",  # ours: what was asked, and what the process said where it `failed` or `stopped` without a verdict
    "run.json",
    "progress.json",
    "result.json",
    "report.html",
    "lock",
)
SCHEMA: Final = 1  # of run.json
ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
Json = dict[str, Any]


# What the list reads, and its type where it is there.
_TYPES: Final[dict[str, dict[str, type]]] = {
    ASKED: {"started": str, "failed": str, "variants": list},
    RUN: {"started": str, "design": dict},
    RESULT: {"arms": list, "said": list},
}


class Damaged(Exception):
    """A file is there and says nothing that we could use."""


@dataclass(frozen=True)
class Runs:
    """The comparisons in `root`, each a folder by its id."""

    root: Path

    def all(self, mine: str | None) -> list[Json]:
        """What there is to say in short, newest first; `mine` runs as a child of this process."""
        try:
            names = [path.name for path in self.root.iterdir()]
        except FileNotFoundError:  # it is made with the first
            return []
        found = [summary(folder, mine) for name in names if (folder := self._folder(name))]
        return sorted(found, key=lambda each: (each["started"], each["id"]), reverse=True)

    def one(self, name: str, mine: str | None) -> Json:
        """All that is known; 404 where there is none."""
        return detail(self.folder(name), mine)

    def folder(self, name: str) -> Path:
        found = self._folder(name)
        if found is None:
            raise ApiError("not_found", f"there is no comparison {shown(name)}; GET /v1/comparisons lists them", "id")
        return found

    def report(self, name: str) -> Path:
        path = self.folder(name) / REPORT
        if not _within(path) or not path.is_file():
            raise ApiError("not_found", f"comparison {name} has no report yet; it is drawn when it has ended", "id")
        return path

    def _folder(self, name: str) -> Path | None:
        """None where it is none of ours, or a link that leads out."""
        if not ID.fullmatch(name):
            return None
        folder = self.root.resolve() / name
        ours = _within(folder) and any((folder / file).is_file() for file in (ASKED, RUN))
        return folder if ours else None


def summary(folder: Path, mine: str | None) -> Json:
    """Its line in the list."""
    return _Files.read(folder).summary(mine)


def detail(folder: Path, mine: str | None) -> Json:
    """The line, and what was measured."""
    files = _Files.read(folder)
    run = files.run or {}
    return {
        **files.summary(mine),
        "mine": folder.name == mine,  # whether DELETE stops it
        "progress": files.progress,
        "result": files.result,
        "design": run.get("design"),
        "command": run.get("command"),
        "machine": run.get("machine"),
        "report": _within(folder / REPORT) and (folder / REPORT).is_file(),
    }


@dataclass(frozen=True)
class _Files:
    folder: Path
    asked: Json | None
    run: Json | None
    progress: Json | None
    result: Json | None
    damage: str

    @classmethod
    def read(cls, folder: Path) -> _Files:
        found: dict[str, Json | None] = {}
        damage = ""
        for name in (ASKED, RUN, PROGRESS, RESULT):
            try:
                found[name] = _read(folder / name)
            except Damaged as error:
                found[name], damage = None, str(error)
        for name, fields in _TYPES.items():
            content = found[name] or {}
            for field, kind in fields.items():
                if not isinstance(content.get(field), kind | None):
                    found[name], damage = None, f"{name} cannot be used: its {field} is {shown(content[field])}"
                    break
        schema = (found[RUN] or {}).get("schema", SCHEMA)
        if schema != SCHEMA:
            damage = f"{RUN} was written by another version: its schema is {shown(schema)}, this one reads {SCHEMA}"
            found[RUN] = found[RESULT] = None
        return cls(folder, found[ASKED], found[RUN], found[PROGRESS], found[RESULT], damage)

    def summary(self, mine: str | None) -> Json:
        asked, run, result = self.asked or {}, self.run or {}, self.result or {}
        design = run.get("design") or {}
        arms = result.get("arms") or []
        state = self.state(mine)
        why = [self.damage, "" if result else asked.get(state, "")]
        return {
            "id": self.folder.name,
            "object": "comparison",
            "started": run.get("started") or asked.get("started") or _changed(self.folder),
            "state": state,
            "baseline": design.get("baseline") or asked.get("baseline"),
            "models": design.get("models") or asked.get("variants") or [],
            "fit": result.get("fit"),
            "sentences": [arm["sentence"] for arm in arms if isinstance(arm, dict) and "sentence" in arm],
            "said": [*(sentence for sentence in why if sentence), *(result.get("said") or [])],
        }

    def state(self, mine: str | None) -> str:
        """running, done, stopped or failed. One whose process was killed was stopped."""
        if self.folder.name == mine or _locked(self.folder / LOCK):
            return "running"
        if self.damage:
            return "failed"
        if self.result:
            return "stopped" if self.result.get("ended") == "interrupted" else "done"
        return "failed" if (self.asked or {}).get("failed") else "stopped"


def _within(path: Path) -> bool:
    """Whether it is what its name says, and no link to elsewhere."""
    return os.path.realpath(path) == str(path)


def _read(path: Path) -> Json | None:
    try:
        if not _within(path):
            raise Damaged(f"{path.name} is a link that leads out of the folder")
        # A number that JSON does not have would make our answer none.
        text = path.read_text(encoding="utf-8")
        found = json.loads(text, parse_constant=lambda _: None, parse_float=_finite)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise Damaged(f"{path.name} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise Damaged(f"{path.name} holds no JSON object")
    return found


def _finite(text: str) -> float | None:
    number = float(text)
    return number if math.isfinite(number) else None


def _locked(path: Path) -> bool:
    """Whether `actuary compare` measures into this folder: its process holds the lock, a killed one does not."""
    try:
        with path.open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # there is none
        return False
    return False


def _changed(folder: Path) -> str:
    return datetime.datetime.fromtimestamp(folder.stat().st_mtime, datetime.UTC).isoformat(timespec="seconds")
