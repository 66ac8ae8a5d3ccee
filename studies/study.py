"""What a study is: a claim, how it was measured, and what came of it.

    NAME.py:  CLAIM, run(Options) -> Finding        one file per claim
    cli.py:   `actuary study` runs it; store.py keeps it as JSON; drawing.py and document.py show it
    service:  the page draws the same JSON

Nothing here draws or measures, and nothing imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

Verdict = Literal["holds", "holds in part", "did not reproduce"]
Cell = str | float | int | None
ENOUGH_SEEDS = 5  # three lie 1.7 standard deviations apart on average, five 2.3; 90 % of all lie within 3.3


@dataclass(frozen=True)
class Claim:
    """One claim of the source documents.

    Args:
        number: its row in the list of claims.
        name: of the command, the file and the page; letters, digits and hyphens.
        title: a line that reads as a heading.
        statement: what is claimed, in one or two sentences.
        source: the documents that claim it.
        refuted_by: the measurement that would speak against it.
    """

    number: int
    name: str
    title: str
    statement: str
    source: str
    refuted_by: str


@dataclass(frozen=True)
class Options:
    """How a study is asked to run.

    Args:
        quick: smaller, for two cores and some minutes in all; the direction is kept, the spread is wider.
        seeds: how many; None takes the study's own number.
        kept: folder for work that may be stopped and resumed.
        workers: processes at once.
        report: called with what is done now, and the share of the whole, 0 to 1.
    """

    quick: bool
    seeds: int | None
    kept: Path
    workers: int
    report: Callable[[str, float], None]
    steps: int | None = None  # of each training; None takes the study's own number


@dataclass(frozen=True)
class Figure:
    """A measured number beside the article's; texts, as they are to be read."""

    what: str
    measured: str
    published: str = ""
    agrees: bool | None = None  # None where nothing was published, or the two cannot be compared


@dataclass(frozen=True)
class Table:
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""


@dataclass(frozen=True)
class Line:
    """One series. `low` and `high` are its spread, as long as `y`; x may be names where the chart is bars.

    A dashed one is a line among points too. `names` says what each point is, where that is not told by its x.
    """

    name: str
    x: Sequence[float] | Sequence[str]
    y: Sequence[float | None]
    low: Sequence[float | None] | None = None
    high: Sequence[float | None] | None = None
    dashed: bool = False
    names: Sequence[str] | None = None


@dataclass(frozen=True)
class Chart:
    """Lines, points or bars over one pair of axes. `name` is letters, digits and hyphens, and names its file."""

    name: str
    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    kind: Literal["lines", "points", "bars"] = "lines"
    log_x: bool = False
    log_y: bool = False
    note: str = ""


@dataclass(frozen=True)
class Field:
    """A function of two variables as colours, with points over it.

    Args:
        z: [rows, columns], rows from the lowest y.
        points: name -> (x, y).
    """

    name: str
    title: str
    x: Sequence[float]
    y: Sequence[float]
    z: Sequence[Sequence[float]]
    points: dict[str, tuple[Sequence[float], Sequence[float]]] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Finding:
    """What came of a study.

    Args:
        verdict: whether the claim holds.
        sentence: why, in one or two sentences with the figures that decide.
        figures: ours beside the article's.
        settings: what it was run with, sizes and seeds and all, so that another may repeat it.
        data: what only the page draws, by name.
    """

    verdict: Verdict
    sentence: str
    figures: Sequence[Figure]
    settings: dict[str, Any]
    tables: Sequence[Table] = ()
    charts: Sequence[Chart | Field] = ()
    data: dict[str, Any] = field(default_factory=dict)


def verdict_of(conditions: Iterable[bool]) -> Verdict:
    """Of a claim that holds where all of these do, and in part where some do."""
    met = list(conditions)
    return "holds" if all(met) else "holds in part" if any(met) else "did not reproduce"


def of_few(seeds: int) -> str:
    """What a sentence adds where so few seeds say little of the spread."""
    said = "One seed says nothing" if seeds == 1 else f"{seeds} seeds say little"
    return "" if seeds >= ENOUGH_SEEDS else f" {said} of the spread."


class Study(Protocol):
    """What studies/NAME.py offers."""

    CLAIM: Claim

    def run(self, options: Options) -> Finding: ...
