"""The verb `actuary bench ops`."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import track
from rich.table import Table

from actuary import BadInput, cores

errors = Console(stderr=True)
WAYS = ("fused", "unfused", "torch", "copy")


def _sizes(ctx: click.Context, parameter: click.Parameter, value: str) -> list[int]:
    try:
        sizes = [int(part) for part in value.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1:
        raise click.BadParameter(f"{value!r} must be whole numbers of at least 1 with commas between, as 1,16,128")
    return sizes


@click.command()
@click.option("--activations", default="*", show_default=True, help="Names with commas between; * for all.")
@click.option("--rows", default="1,16,128,512", show_default=True, callback=_sizes, help="Tokens at once.")
@click.option("--hidden", default="1024,3072", show_default=True, callback=_sizes, help="Hidden widths.")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Of each run.")
@click.option("--rounds", type=click.IntRange(3), default=9, show_default=True, help="Samples of each way.")
@click.option("--ops", "folder", type=click.Path(path_type=Path), default=Path("artifacts/ops"), show_default=True,
              help="Folder of the fused library.")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=Path("artifacts/bench"),
              show_default=True, help="Folder for ops.json and ops.html.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
def ops(
    activations: str, rows: list[int], hidden: list[int], threads: int, rounds: int, folder: Path, out: Path,
    as_json: bool,
) -> None:  # fmt: skip
    """Nanoseconds per element of each activation: fused, unfused, torch eager, and copying its bytes.

    Alone, in the feed-forward block, and in the whole default model. Ctrl-C keeps what was measured.

    \b
    Examples:
      actuary bench ops --activations swiglu,gelu --rows 128
      actuary bench ops --threads 2 --json > ops.json
    """
    with errors.status("loading torch"):
        from export import bench as measuring
        from export.ops import library
        from export.ops.trace import trace
        from models.activations import get, registry
        from models.files import check_writable, write_atomically
    if threads > cores():
        raise BadInput(f"--threads {threads} is more than the {cores()} cores that this process may use")
    names = list(registry()) if activations == "*" else [name.strip() for name in activations.split(",")]
    records = [get(name) for name in names]
    check_writable(out)
    fused = library.find(folder)
    say = functools.partial(errors.print, markup=False, highlight=False, soft_wrap=True)
    if fused is None:
        say(f"no fused library in {folder}: measured without it; build it with: actuary ops build")
    else:
        for record in records:
            if reason := fused.why_not(record.name, trace(record).digest, cuda=False):
                say(f"{record.name} is not measured fused: {reason}")
    result: dict[str, Any] = {"machine": measuring.machine(fused, threads, rounds), "rows": []}
    total = len(measuring.cases(records, rows, hidden))
    stopped = ""
    try:
        for measured in track(
            measuring.run(records, rows, hidden, fused, threads, rounds),
            description="measuring", total=total, console=errors, disable=not errors.is_terminal,
        ):  # fmt: skip
            result["rows"].append(measured.row())
            if not errors.is_terminal and len(result["rows"]) % max(1, total // 10) == 0:
                say(f"{len(result['rows'])} of {total} cases")
    except KeyboardInterrupt:
        stopped = "stopped"
    except MemoryError:
        stopped = "out of memory: lower --rows or --hidden;"
    if stopped:
        say(f"{stopped} after {len(result['rows'])} of {total} cases")
    if not result["rows"]:
        raise click.Abort
    write_atomically(out / "ops.json", json.dumps(result, indent=2))
    write_atomically(out / "ops.html", measuring.picture(result))
    say(f"{out / 'ops.json'} and {out / 'ops.html'}")
    if as_json:
        click.echo(json.dumps(result, indent=2))
    else:
        Console().print(_table(result))


def _table(result: dict[str, Any]) -> Table:
    from export.bench import shown

    title = "nanoseconds per hidden element, median; fused / unfused is the median of each round's own ratio"
    table = Table(box=None, header_style="bold", title=title, title_justify="left")
    for column in ("activation", "place", "rows", "hidden"):
        table.add_column(column, justify="right" if column in ("rows", "hidden") else "left")
    for way in WAYS:
        table.add_column(way, justify="right")
    table.add_column("fused / unfused", justify="right")
    for row in result["rows"]:
        figures = [shown(row[way]["ns_per_element"]) if way in row else "" for way in WAYS]
        ratio = f"{row['fused']['of_unfused']:.2f}" if "fused" in row else ""
        table.add_row(row["activation"], row["place"], str(row["rows"]), str(row["hidden"]), *figures, ratio)
    return table
