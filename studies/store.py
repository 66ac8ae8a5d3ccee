"""A run of a study as a file: what came of it, of which claim, where and when; NAME.json, read by all that shows it.

{"schema": 1, "claim": {...}, "verdict", "sentence", "figures": [...], "settings": {...}, "tables": [...],
 "charts": [{"type": "chart" | "field", ...}], "data": {...}, "quick", "seeds", "machine", "date", "versions",
 "seconds", "steps"}
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import math
import platform
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from actuary import BadInput, cores, processor
from models.files import write_atomically
from studies.study import Chart, Claim, Finding

SCHEMA = 1
DIGITS = 6  # of a number that is kept: below any spread here, and half the size of all of them
VERSIONED = ("actuary", "torch", "numpy", "onnxruntime")


@dataclasses.dataclass(frozen=True)
class Record:
    """A run that is kept.

    Args:
        seeds, steps: as they were asked for; None where the study chose.
        versions: of Python and the packages that computed.
    """

    claim: Claim
    finding: Finding
    quick: bool
    seeds: int | None
    machine: str
    date: str
    versions: dict[str, str]
    seconds: float
    steps: int | None = None


_RECORD = TypeAdapter(Record)
_FINDING = tuple(field.name for field in dataclasses.fields(Finding))


def rounded(value: Any) -> Any:
    """The same in Python's own numbers, floats of DIGITS figures, whole ones as integers."""
    if isinstance(value, dict):
        return {str(key): rounded(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(each) for each in value]
    if hasattr(value, "tolist"):  # numpy's and torch's
        return rounded(value.tolist())
    if isinstance(value, float) and math.isfinite(value):
        short = float(f"{value:.{DIGITS}g}")
        return int(short) if short.is_integer() and abs(short) < 10**DIGITS else short
    return value


def to_json(record: Record) -> str:
    """As in the docstring above, a line for each field, and for each row of a list of records.

    ValueError where a number is not finite: a study says None, or writes out what it saw.
    """
    kept = rounded(dataclasses.asdict(record))
    finding = kept.pop("finding")
    for chart, of in zip(finding["charts"], record.finding.charts, strict=True):
        chart["type"] = "chart" if isinstance(of, Chart) else "field"
    fields = {"schema": SCHEMA, "claim": kept.pop("claim"), **finding, **kept}
    return "{\n" + ",\n".join(f"{json.dumps(name)}: {_lines(value)}" for name, value in fields.items()) + "\n}\n"


def _lines(value: Any) -> str:
    def dump(part: Any) -> str:
        return json.dumps(part, ensure_ascii=False, allow_nan=False)

    if isinstance(value, list) and value:
        return "[\n" + ",\n".join(map(dump, value)) + "\n]"
    return dump(value)


def from_json(text: str) -> Record:
    """ValueError where that is no record."""
    fields = json.loads(text)
    if not isinstance(fields, dict) or fields.get("schema") != SCHEMA:
        raise ValueError(f"its schema is not {SCHEMA}")
    return _RECORD.validate_python({**fields, "finding": {name: fields.get(name) for name in _FINDING}})


def path_of(folder: Path, name: str) -> Path:
    return folder / f"{name}.json"


def write(folder: Path, record: Record) -> None:
    write_atomically(path_of(folder, record.claim.name), to_json(record))


def read(path: Path) -> Record:
    """The record in a file; BadInput where there is none that can be read."""
    try:
        return from_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}") from error
    except (ValidationError, ValueError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else None
        what = f"{'.'.join(map(str, first['loc']))}: {first['msg']}" if first else str(error)
        raise BadInput(f"{path} is not a study's record: {what}; delete it, and run the study again") from error


def machine() -> str:
    return f"{processor()}, {cores()} cores, {platform.system()} {platform.machine()}"


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in VERSIONED:
        # onnxruntime is a package of either name.
        for package in (name, f"{name}-gpu"):
            try:
                found[name] = importlib.metadata.version(package)
                break
            except importlib.metadata.PackageNotFoundError:
                continue
    return found


def record(
    claim: Claim, finding: Finding, quick: bool, seeds: int | None, seconds: float, steps: int | None = None
) -> Record:
    """A run that ended now, here."""
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return Record(claim, finding, quick, seeds, machine(), today, versions(), round(seconds, 1), steps)
