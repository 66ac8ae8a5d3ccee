"""A record -> its page in Markdown and its drawings; all records of a folder -> the index. From the JSON alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from models.files import write_atomically
from studies import store
from studies.catalogue import NAMES
from studies.drawing import draw
from studies.store import Record
from studies.study import Cell, Chart, Field, Table

INDEX = "README.md"


def heading(record: Record) -> str:
    """The title; with the verdict, where the claim does not simply hold."""
    verdict = record.finding.verdict
    return record.claim.title + ("" if verdict == "holds" else f" ({verdict})")


def page(record: Record) -> str:
    """docs/studies/NAME.md."""
    claim, finding = record.claim, record.finding
    command = f"actuary study {claim.name}" + " --quick" * record.quick
    command += f" --seeds {record.seeds}" if record.seeds is not None else ""
    command += f" --steps {record.steps}" if record.steps is not None else ""
    parts = [
        f"# {heading(record)}",
        f"<!-- written by `{command}` from {claim.name}.json; not to be edited -->",
        f"**Claim {claim.number}** ({claim.source}). {claim.statement}",
        f"**It would be refuted by** {claim.refuted_by}",
        f"**Verdict: {finding.verdict}.** {finding.sentence}",
    ]
    if record.quick:
        parts.append("A quick run: smaller than the study's own size, with a wider spread.")
    parts.append(_figures(record))
    for chart in finding.charts:
        parts.append(f"![{_plain(_described(chart))}]({file_of(record, chart)})")
        parts.append(chart.note)
    parts += [_table(table) for table in finding.tables]
    parts.append("## Settings\n\n" + "\n".join(_settings(finding.settings)))
    versions = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    parts.append(
        f"{record.date}, {record.machine}; {versions}; {record.seconds:g} s beside what was kept. The numbers are in "
        f"[{claim.name}.json]({claim.name}.json). To repeat: `{command}`. [All studies]({INDEX})"
    )
    return "\n\n".join(part for part in parts if part) + "\n"


def file_of(record: Record, chart: Chart | Field) -> str:
    return f"{record.claim.name}-{chart.name}.svg"


def _figures(record: Record) -> str:
    rows: list[list[Cell]] = []
    for figure in record.finding.figures:
        agrees = "" if figure.agrees is None else "yes" if figure.agrees else "no: did not reproduce"
        rows.append([figure.what, figure.measured, figure.published, agrees])
    return _grid(["", "measured", "article", "agrees"], rows) if rows else ""


def _table(table: Table) -> str:
    grid = _grid(table.columns, table.rows)
    return f"## {table.title}\n\n{grid}" + (f"\n\n{table.note}" if table.note else "")


def _grid(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """A Markdown table; columns of numbers stand at the right."""
    numeric = [all(not isinstance(row[at], str) for row in rows) for at in range(len(columns))]
    lines = [columns, ["---:" if right else "---" for right in numeric], *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def _cell(cell: Cell) -> str:
    if cell is None:
        return ""
    text = cell if isinstance(cell, str) else f"{cell:.6g}" if isinstance(cell, float) else str(cell)
    return text.replace("|", "\\|")


def _settings(settings: dict[str, Any], indent: str = "") -> list[str]:
    """Lines of a list, with lists inside."""
    lines = []
    for name, value in settings.items():
        if isinstance(value, dict):
            lines += [f"{indent}- {name}:", *_settings(value, f"{indent}  ")]
        else:
            lines.append(f"{indent}- {name}: {_setting(value)}")
    return lines


def _setting(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_setting, value))
    return value if isinstance(value, str) else json.dumps(value)


def _described(chart: Chart | Field) -> str:
    if isinstance(chart, Field):
        return chart.title
    names = ", ".join(line.name for line in chart.lines if line.name)
    return f"{chart.title}: {chart.y_label} over {chart.x_label}" + (f", of {names}" if names else "")


def _plain(text: str) -> str:
    return text.replace("[", "(").replace("]", ")").replace("\n", " ")


def index(records: Sequence[Record]) -> str:
    """docs/studies/README.md: a row for each, by number."""
    rows: list[list[Cell]] = []
    for record in sorted(records, key=lambda each: each.claim.number):
        claim, finding = record.claim, record.finding
        run = f"{record.date}, " + ("quick" if record.quick else "full")
        rows.append(
            [claim.number, f"[{claim.title}]({claim.name}.md)", f"**{finding.verdict}**", finding.sentence, run]
        )
    return (
        "# Studies\n\n<!-- written by `actuary study` and `make docs`; not to be edited -->\n\n"
        "The source documents' claims about sigmoid and its rivals, measured. `actuary study NAME` repeats one, "
        "`actuary study all --quick` all of them in some minutes.\n\n"
        + _grid(["#", "claim", "verdict", "why", "run"], rows)
        + "\n"
    )


def records(folder: Path) -> list[Record]:
    """All that are kept in a folder, in the claims' order; BadInput where one cannot be read."""
    return [store.read(path) for name in NAMES if (path := store.path_of(folder, name)).is_file()]


def drawings(record: Record) -> dict[str, bytes]:
    """File name -> SVG, of every chart."""
    return {file_of(record, chart): draw(chart, "svg") for chart in record.finding.charts}


def write(folder: Path, record: Record) -> None:
    """The page and its drawings, beside the record."""
    for name, content in drawings(record).items():
        write_atomically(folder / name, content.decode())
    write_atomically(folder / f"{record.claim.name}.md", page(record))


def write_index(folder: Path) -> None:
    write_atomically(folder / INDEX, index(records(folder)))


def keep(folder: Path, pictures: Path, record: Record, old: Record | None) -> None:
    """Writes a record and all that shows it; of `old`, whose place it takes, no drawing is left.

    Args:
        pictures: folder of PNGs, for where no SVG is taken.
    """
    store.write(folder, record)
    record = store.read(store.path_of(folder, record.claim.name))  # pages are of what is kept, to its digits
    write(folder, record)
    write_index(folder)
    for chart in record.finding.charts:
        (pictures / file_of(record, chart)).with_suffix(".png").write_bytes(draw(chart, "png"))
    if old:
        remove_drawings(folder, old, record)


def remove_drawings(folder: Path, old: Record, new: Record) -> None:
    """Those of `old` that `new` has not."""
    for name in {file_of(old, chart) for chart in old.finding.charts}:
        if name not in {file_of(new, chart) for chart in new.finding.charts}:
            (folder / name).unlink(missing_ok=True)
