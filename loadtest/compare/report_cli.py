"""`actuary report`: draw a stored run of `actuary compare` or `actuary load` again, or set it against an old one."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import click

from actuary import BadInput
from loadtest import report as load_report
from loadtest.compare import against, cli, lent, report, store, verdict
from loadtest.plan import Plan
from loadtest.samples import in_window, read_samples
from loadtest.shared import check_json, write

RESULT, SAMPLES = "result.json", "samples.csv"


@click.command("report")
@click.argument("folder", metavar="RUN", type=click.Path(path_type=Path))
@click.option("--against", "old", metavar="OLD", type=click.Path(path_type=Path), help="An older run of compare.")
@click.option("--other-bundles", is_flag=True, help="With --against: the same names hold other bundles, on purpose.")
@click.option(
    "--quality-from",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Trained bundles, whose bits per byte stand for variants of the same activation with random weights.",
)
@click.option("--json", "json_file", metavar="FILE", help="Write the verdict here too; - is standard output.")
def report_(
    folder: Path, old: Path | None, other_bundles: bool, quality_from: Path | None, json_file: str | None
) -> None:
    """Draw a stored run again: report.html, which opens without a network, and report.md.

    RUN is a folder of `actuary compare` or of `actuary load`. With --against, two comparisons are set against each
    other arm by arm, each over its own baseline; what is not comparable is refused with the reason.

    \b
    Examples:
      actuary report artifacts/compare/20261121T220000.000000Z
      actuary report artifacts/compare/new --against artifacts/compare/old --json -
    """
    check_json(json_file)
    if folder.is_dir() and not os.access(folder, os.W_OK):
        raise BadInput(f"{folder} is not yours to write a report into; copy the run to a folder of yours")
    if (folder / store.RUN).is_file():
        written, document = _comparison(folder, old, other_bundles, quality_from)
        for arm in document["arms"]:
            click.echo(arm["sentence"], err=json_file == "-")
    elif old or quality_from:
        option = "--against" if old else "--quality-from"
        raise BadInput(f"{option} is for runs of `actuary compare`; {folder} holds none: there is no {store.RUN}")
    else:
        written, document = _load(folder)
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    if json_file == "-":
        click.echo(text, nl=False)
    elif json_file:
        write(Path(json_file), text)
    for path in written:
        click.echo(str(path), err=True)


def _comparison(
    folder: Path, old: Path | None, other_bundles: bool, quality_from: Path | None
) -> tuple[list[Path], dict[str, Any]]:
    run = store.read(folder)
    result = _result_of(folder, run)
    if quality_from:
        note = lent.lend_quality(run.run, quality_from)
        design = run.run["design"]
        judged = verdict.judge(run.run, run.blocks, run.samples, margin=design["equivalence"], seed=design["seed"])
        result = {**result, **judged, "said": [*result["said"], note]}
    if old is None:
        return report.write_files(folder, run, result), result
    if old.resolve() == folder.resolve():
        raise BadInput(f"--against {old} is the run itself; name an older one")
    found = against.compare(
        run, store.read(old), margin=result["margin"], alpha=result["alpha"], other_bundles=other_bundles
    )
    found["old"] = old.resolve().name
    return report.write_files(folder, run, result, found), {**result, "against": found}


def _result_of(folder: Path, run: store.Run) -> dict[str, Any]:
    """The verdict that the run ended with; of one that was cut short, what can be said of its rounds."""
    if not run.rounds:
        raise BadInput(f"{folder} holds no finished round; go on with it by `actuary compare --resume {folder}`")
    try:
        result: dict[str, Any] = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        if result["rounds"] == len(run.rounds):
            return result
    except FileNotFoundError:
        pass
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise BadInput(f"{folder / RESULT} cannot be read: {error!r}; delete it, and it is judged anew") from error
    cut_short = f"cut short: {len(run.rounds)} rounds of at most {run.run['design']['rounds']} are in this verdict"
    return cli.result_of(folder, "killed", [cut_short])


def _load(folder: Path) -> tuple[list[Path], dict[str, Any]]:
    result = _load_result(folder)
    asked = result["plan"]
    kept = {name: asked[name] for name in ("users", "rate", "duration_s", "warmup_s", "top_k", "seed", "timeout_s")}
    models = tuple(row["model"] for row in result["rows"])
    plan = Plan(url=result["url"], models=models, prompts=(), **kept)
    measured = in_window(read_samples(folder / SAMPLES), plan, result["window_s"])
    page = folder / f"{report.NAME}.html"
    write(page, load_report.draw(result, measured))
    return [page], result


def _load_result(folder: Path) -> dict[str, Any]:
    """BadInput for anything but what `actuary load` left."""
    if not folder.is_dir():
        raise BadInput(f"{folder} is no folder; name one that `actuary compare` or `actuary load` wrote")
    try:
        result: dict[str, Any] = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        kind, schema = result["kind"], result["schema"]
    except FileNotFoundError as error:
        raise BadInput(f"{folder} holds no run: there is neither {store.RUN} nor {RESULT}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{folder / RESULT} is not of `actuary load`: {error!r}") from error
    if kind != "load" or schema != 1:
        raise BadInput(
            f"{folder / RESULT} is of kind {kind!r} and schema {schema!r}; this version reads schema 1 of 'load'"
        )
    if not (folder / SAMPLES).is_file():
        raise BadInput(f"{folder} has lost its {SAMPLES}; there is nothing to draw")
    return result
