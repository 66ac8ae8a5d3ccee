"""`actuary study`: runs studies one after the other, and keeps each as it ends: record, page, drawings, index.

run(Options) -> Finding -> Record -> OUT/NAME.json, NAME.md, NAME-CHART.svg, README.md; KEPT/NAME/NAME-CHART.png
"""

from __future__ import annotations

import contextlib
import json
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from actuary import ActuaryError, cores, not_installed
from studies.catalogue import ALL, chosen

if TYPE_CHECKING:
    from studies.store import Record

COLOURS = {"holds": "green", "holds in part": "yellow", "did not reproduce": "red"}
console = Console(stderr=True)


@click.command()
@click.argument("names", nargs=-1, required=True, metavar=f"NAME...|{ALL}")
@click.option("--quick", is_flag=True, help="Smaller, with the same direction: all of them in 8 minutes on two cores.")
@click.option("--seeds", type=click.IntRange(1, 1000), help="In place of each study's own number.")
@click.option("--steps", type=click.IntRange(1, 1_000_000), help="Of each training, where a study trains on text.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=Path("docs/studies"),
              show_default=True, help="Folder for records, pages and drawings.")  # fmt: skip
@click.option("--kept", type=click.Path(path_type=Path, file_okay=False), default=Path("artifacts/studies"),
              show_default=True, help="Folder for what a study may go on from, and for drawings as PNG.")  # fmt: skip
@click.option("--workers", type=click.IntRange(1, 256), help="Processes at once.  [default: one per core]")
@click.option("--again", is_flag=True, help="Also what is there already, of the same settings and this machine.")
@click.option("--json", "as_json", is_flag=True, help="The records as one JSON list on standard output.")
def study(
    names: tuple[str, ...], quick: bool, seeds: int | None, steps: int | None, out: Path, kept: Path,
    workers: int | None, again: bool, as_json: bool,
) -> None:  # fmt: skip
    """Measure claims of the source documents, and say whether they hold.

    Prints the figures beside the article's with the verdict, and writes OUT/NAME.json, its page OUT/NAME.md, drawings
    and an index. What is there already is not run again. One that fails does not stop the others. After Ctrl-C the
    same command goes on.

    \b
    Names: slope, vanishing, zigzag, moons, magnitudes, language, head, two-classes, cost, stability, gates; all.

    \b
    Examples:
      actuary study slope
      actuary study vanishing zigzag --seeds 50 --out /tmp/studies
      actuary study all --quick
    """
    asked = chosen(names)
    with console.status("loading torch"):
        from models.files import check_writable
        from studies import document
        from studies.store import to_json
    for folder in (out, kept):
        check_writable(folder)
    there = {record.claim.name: record for record in document.records(out)}
    records: list[Record] = []
    failures: dict[str, Exception] = {}
    for name in asked:
        old = there.get(name)
        try:
            if old is not None and not again and _same(old, name, quick, seeds, steps):
                said = f"{name}: done on {old.date} with these settings, on this machine; --again runs it anew"
                console.print(said, highlight=False, soft_wrap=True)
                record = old
            else:
                if old is not None and quick and not old.quick:
                    said = f"{name}: the full run of {old.date} in {out} is replaced by a quick one; --out keeps it"
                    console.print(said, highlight=False, soft_wrap=True)
                record = _run(name, quick, seeds, steps, kept, workers or cores())
            document.keep(out, kept / name, record, old)
        except KeyboardInterrupt:
            rest = f"{len(records)} of {len(asked)} done are kept in {out}; the same command goes on"
            raise ActuaryError(f"stopped in {name}; {rest}") from None
        except Exception as error:  # the others are run all the same, and the exit code says it
            failures[name] = error
            if not isinstance(error, (ActuaryError, ModuleNotFoundError)):
                traceback.print_exception(error)
            if len(asked) > 1:
                console.print(f"[red]{name} failed:[/] {escape(_in_a_line(error))}", soft_wrap=True)
            continue
        records.append(record)
        _show(record)
    if as_json:
        click.echo(json.dumps([json.loads(to_json(record)) for record in records], ensure_ascii=False))
    if failures and len(asked) == 1:
        raise failures[asked[0]]
    if failures:
        said = "; ".join(f"{name}: {_in_a_line(error)}" for name, error in failures.items())
        raise ActuaryError(f"{len(failures)} of {len(asked)} studies failed: {said}")


def _in_a_line(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name:
        return not_installed("study", error.name)
    return str(error) or type(error).__name__


def _same(record: Record, name: str, quick: bool, seeds: int | None, steps: int | None) -> bool:
    """Whether that is what a run would be again: of the claim and the formulas as they stand, so asked for, here."""
    from models.activations import registry
    from studies.catalogue import claim
    from studies.store import machine

    asked = (claim(name), quick, seeds, steps, machine())
    if (record.claim, record.quick, record.seeds, record.steps, record.machine) != asked:
        return False
    now = {each: activation.digest for each, activation in registry().items()}
    return all(now.get(each) == digest for each, digest in record.finding.data.get("digests", {}).items())


def _run(name: str, quick: bool, seeds: int | None, steps: int | None, kept: Path, workers: int) -> Record:
    from studies import store
    from studies.catalogue import study as module_of
    from studies.study import Options

    began = time.monotonic()
    folder = kept / name
    folder.mkdir(parents=True, exist_ok=True)
    with _bar(name) as report:
        module = module_of(name)
        finding = module.run(Options(quick, seeds, folder, workers, report, steps))
    return store.record(module.CLAIM, finding, quick, seeds, time.monotonic() - began, steps)


@contextlib.contextmanager
def _bar(name: str) -> Iterator[Callable[[str, float], None]]:
    """What a study does, and how far it is."""
    if not console.is_terminal:
        console.print(f"{name} ...")
    columns = (TextColumn("{task.description:<11}"), BarColumn(bar_width=24), TextColumn("{task.fields[doing]}"))
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        task = progress.add_task(name, total=1.0, doing="")
        yield lambda doing, share: progress.update(task, completed=share, doing=escape(doing))


def _show(record: Record) -> None:
    """The figures beside the article's, and the verdict."""
    claim, finding = record.claim, record.finding
    table = Table(box=None, header_style="bold", title=f"{claim.number}. {claim.title}", title_justify="left")
    for column in ("", "measured", "article", ""):
        table.add_column(column)
    for figure in finding.figures:
        agrees = {None: "", True: "[green]agrees[/]", False: "[red]did not reproduce[/]"}[figure.agrees]
        table.add_row(escape(figure.what), escape(figure.measured), escape(figure.published), agrees)
    console.print(table)
    colour = COLOURS[finding.verdict]
    console.print(f"[{colour}]{finding.verdict}[/]: {escape(finding.sentence)}\n", highlight=False, soft_wrap=True)
