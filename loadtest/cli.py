"""`actuary load`: check what was asked, have Locust send it, and report what it measured."""

from __future__ import annotations

import datetime
import json
import platform
import shlex
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from actuary import ActuaryError, BadInput
from loadtest import plan as planning
from loadtest import report
from loadtest.plan import Plan
from loadtest.runner import LOG, SAMPLES, client_facts, run_locust
from loadtest.samples import (
    PERCENTILE_METHOD,
    Sample,
    in_window,
    judge_client,
    read_samples,
    summarise,
)
from loadtest.shared import POSITIVE, Finite, check_json, free_users, machine, tail, write

PACKAGES = ("actuary", "locust", "gevent", "geventhttpclient", "numpy", "plotly")
RESULT, REPORT = "result.json", "report.html"


@click.command()
@click.option("--url", default=planning.DEFAULT_URL, show_default=True, help="The server.")
@click.option("--models", metavar="A,B", help="Variants to ask.  [default: all that the server lists]")
@click.option("--users", type=click.IntRange(1, 10_000), help="Users at once.  [default: 8; with --rate, one per 1/s]")
@click.option("--rate", type=POSITIVE, help="Constant arrivals per second, of all variants together.")
@click.option("--duration", type=POSITIVE, default=30.0, show_default=True, help="Seconds measured.")
@click.option("--warmup", type=Finite(min=0), default=3.0, show_default=True, help="Seconds before, discarded.")
@click.option("--prompts", type=click.Path(path_type=Path), help="One per line, text or .jsonl.  [default: built in]")
@click.option("--top-k", type=click.IntRange(0), default=10, show_default=True, help="Tokens asked for.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the order of requests.")
@click.option("--timeout", type=POSITIVE, default=30.0, show_default=True, help="Seconds until one failed.")
@click.option("--json", "json_file", metavar="FILE", help="Write the result here too; - is standard output.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder.  [default: artifacts/load/<time>]")
@click.option("--html/--no-html", default=True, show_default=True, help="Draw report.html.")
def load(
    url: str,
    models: str | None,
    users: int | None,
    rate: float | None,
    duration: float,
    warmup: float,
    prompts: Path | None,
    top_k: int,
    seed: int,
    timeout: float,
    json_file: str | None,
    out: Path | None,
    html: bool,
) -> None:
    """Put load on a running service, one row per variant.

    Without --rate each user sends its next request when the last was answered (a closed loop). With
    --rate requests leave at planned times whether or not the server keeps up, and latency counts from
    the plan. Variants take turns on the same prompts, so their rows have equal counts. Ctrl-C ends the
    run early and reports what was measured.

    \b
    Examples:
      actuary load --duration 20 --users 4
      actuary load --models gelu,swiglu --rate 100 --duration 60 --json result.json
    """
    url = planning.check_url(url)
    asked = planning.read_prompts(prompts) if prompts else planning.PROMPTS
    served = planning.served_models(url)
    if users is None:
        users = 8 if rate is None else free_users(rate)
    plan = Plan(
        url,
        planning.choose_models(models, served),
        users,
        rate,
        duration,
        warmup,
        asked,
        top_k,
        seed,
        timeout,
    )
    started = datetime.datetime.now(datetime.UTC)
    folder = (out or Path("artifacts/load") / started.strftime("%Y%m%dT%H%M%S.%fZ")).absolute()
    _prepare_destinations(folder, json_file)

    interrupted, status = run_locust(plan, prompts, folder)
    samples = read_samples(folder / SAMPLES) if (folder / SAMPLES).is_file() else []
    if not samples:
        ending = tail(folder / LOG)
        why = "interrupted before the first answer" if interrupted else f"Locust sent nothing (exit code {status})"
        raise ActuaryError(f"{why}; its log {folder / LOG} ends with:\n{ending}")

    client = client_facts(folder / SAMPLES, samples)
    window_s = min(plan.duration_s, client["stopped_after_s"] - plan.warmup_s)
    measured = in_window(samples, plan, window_s)
    if not measured:
        if interrupted:
            raise ActuaryError(f"stopped within the warm-up of {warmup:g} s, nothing measured; samples: {folder}")
        raise ActuaryError(
            f"all {len(samples)} requests that were answered were planned in the warm-up of {warmup:g} s: the server "
            f"or this client is far behind the plan; lower --rate; samples: {folder}"
        )
    result = _result(plan, prompts, measured, window_s, client, started, interrupted)
    result["served"] = {name: served[name] for name in plan.models}
    if html:
        write(folder / REPORT, report.draw(result, measured))
    document = json.dumps(result, indent=2, ensure_ascii=False) + "\n"
    write(folder / RESULT, document)
    if json_file == "-":
        click.echo(document, nl=False)
    elif json_file:
        write(Path(json_file), document)
    _print(result, folder, Console(stderr=json_file == "-", highlight=False))
    if all(row["failures"] == row["requests"] for row in result["rows"]):
        raise ActuaryError(f"every request failed: {_reasons(result['rows'])}")


def _prepare_destinations(folder: Path, json_file: str | None) -> None:
    """Makes `folder`; what would fail after the run fails here, before it."""
    check_json(json_file)
    try:
        if (folder / SAMPLES).exists() or (folder / RESULT).exists():
            raise BadInput(f"--out {folder} already holds a run; name another folder")
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"--out {folder} cannot be made: {error}; name a folder where you may write") from error


def _result(
    plan: Plan,
    prompts: Path | None,
    measured: list[Sample],
    window_s: float,
    client: dict[str, Any],
    started: datetime.datetime,
    interrupted: bool,
) -> dict[str, Any]:
    cpu_s = max(client["cpu_s"].values(), default=None)
    cpu_share = cpu_s / client["lasted_s"] if cpu_s is not None and client["lasted_s"] else None
    rows = [summarise(name, [s for s in measured if s.model == name], window_s) for name in plan.models]
    return {
        "schema": 1,
        "kind": "load",
        "url": plan.url,
        "started": started.isoformat(timespec="seconds"),
        "command": _repeat(plan, prompts),
        "plan": {
            "users": plan.users,
            "rate": plan.rate,
            "duration_s": plan.duration_s,
            "warmup_s": plan.warmup_s,
            "prompts": str(prompts) if prompts else f"{len(plan.prompts)} built in",
            "top_k": plan.top_k,
            "seed": plan.seed,
            "timeout_s": plan.timeout_s,
        },
        "window_s": round(window_s, 3),
        "interrupted": interrupted,
        "percentile_method": f"numpy {PERCENTILE_METHOD}",
        "rows": rows,
        "total": summarise("all", measured, window_s),
        "client": judge_client(measured, plan, window_s, cpu_share, client["unanswered"]),
        "machine": machine(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
    }


def _repeat(plan: Plan, prompts: Path | None) -> str:
    words = [
        "actuary",
        "load",
        "--url",
        plan.url,
        "--models",
        ",".join(plan.models),
        "--users",
        str(plan.users),
    ]
    words += ["--rate", str(plan.rate)] if plan.rate is not None else []
    words += ["--duration", str(plan.duration_s), "--warmup", str(plan.warmup_s), "--timeout", str(plan.timeout_s)]
    words += ["--top-k", str(plan.top_k), "--seed", str(plan.seed)]
    return shlex.join(words + (["--prompts", str(prompts)] if prompts else []))


def _reasons(rows: list[dict[str, Any]]) -> str:
    return "; ".join(f"{r['model']}: {n} x {why}" for r in rows for why, n in r["failure_reasons"].items())


def _print(result: dict[str, Any], folder: Path, console: Console) -> None:
    caption = f"latency in ms, {result['percentile_method']} percentiles; infer: the server's own time"
    table = Table(title=report.headline(result), caption=caption, box=None, padding=(0, 1, 0, 0))
    variant, *numbers = report.HEADINGS
    table.add_column(variant, no_wrap=True, min_width=8)
    for heading in numbers:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in [*result["rows"], result["total"]]:
        table.add_row(*report.cells(row))
    console.print(table)
    if any(row["failures"] for row in result["rows"]):
        console.print(f"failures: {_reasons(result['rows'])}", markup=False)
    for note in report.notes(result):
        console.print(f"note: {note}", markup=False)
    console.print(f"kept in {folder}", markup=False, soft_wrap=True)
