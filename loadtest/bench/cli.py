"""The verb `actuary bench serve`."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import signal
import statistics
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from actuary import BadInput, cores, processor
from loadtest.bench import agreement, contenders, report, setup, visits, workloads
from loadtest.bench.contenders import ENVIRONMENTS, Contender
from loadtest.bench.servers import Server, fleet
from loadtest.bench.visits import Pace, Visits

errors = Console(stderr=True, highlight=False)
FULL, QUICK = Pace(0.4, 1.2), Pace(0.3, 1.0)
ROUNDS = 5
DOCS = setup.ROOT / "docs"
MEASURING = tuple(f"loadtest/bench/{name}.py" for name in ("client", "contenders", "servers", "visits", "workloads"))
STARTS = 3  # the first warms the files and does not count


@click.command()
@click.option("--rounds", type=click.IntRange(1), help=f"Visits of each cell.  [default: {ROUNDS}; with --quick 1]")
@click.option("--only", metavar="NAME,...", help="Contenders or engines, as openvino or openvino-int8-wide.")
@click.option("--quick", is_flag=True, help="Short visits, once: shows that all of it works.")
@click.option("--again", is_flag=True, help="Drop what an earlier run of these sources measured.")
@click.option("--ops", type=click.Path(path_type=Path), default=Path("artifacts/ops"), show_default=True,
              help="Folder of our fused operators.")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=Path("artifacts/bench-serve"),
              show_default=True, help="Folder of environments, models and raw results.")  # fmt: skip
def serve(rounds: int | None, only: str | None, quick: bool, again: bool, ops: Path, out: Path) -> None:
    """Our server against the engines that others would pick: same weights, same machine, over HTTP.

    The first run installs each engine into an environment of its own (minutes). A run that was stopped goes on with
    the same command. With all contenders and 5 rounds or more, which take 40 minutes, docs/benchmarks.md
    is written; else the same document lies in the run's folder alone.

    \b
    Examples:
      actuary bench serve
      actuary bench serve --only actuary,openvino --rounds 3
      actuary bench serve --quick
    """
    if importlib.util.find_spec("matplotlib") is None:  # which an hour later would be a pity
        raise BadInput("bench serve draws with matplotlib, which is not installed: pip install -e '.[bench]'")
    everybody = contenders.contenders(cores())
    chosen = _choose(everybody, only)
    pace, rounds = (QUICK, rounds or 1) if quick else (FULL, rounds or ROUNDS)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # and the servers end
    out, ops = out.absolute(), ops.absolute()
    setup.make(out, chosen, _say)
    plan = _plan(chosen, pace, ops)
    run = out / "runs" / hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()[:12]
    if again:
        shutil.rmtree(run, ignore_errors=True)
    run.mkdir(parents=True, exist_ok=True)
    (run / "plan.json").write_text(json.dumps(plan, indent=2), encoding="utf-8")
    kept = Visits(run / "visits.jsonl")
    _say(f"results in {run}" + (f", where {len(kept.records)} visits are kept" if kept.records else ""))
    started = run / "started.json"  # what starting them showed; not measured again by a run that goes on
    if not started.is_file() or len(kept.records) < rounds * _cells(chosen):
        with fleet(out, chosen, ops) as servers:
            about = _start(servers, out, 1 if quick or started.is_file() else STARTS)
            if not started.is_file():
                started.write_text(json.dumps(about, indent=2), encoding="utf-8")
            _measure(kept, servers, rounds, pace)
    facts = plan | {
        "servers": json.loads(started.read_text(encoding="utf-8")),
        "ceiling": list(visits.ceiling(pace, setup.VOCAB_SIZE)),
        "rounds": rounds, "command": _command(only, quick, rounds), "date": datetime.date.today().isoformat(),
        "versions": ", ".join(f"{name} {version}" for name, version in plan["versions"].items()),
        "open_all": workloads.OPEN[0].name, "open_near": workloads.OPEN[1].name,
    }  # fmt: skip
    (run / "facts.json").write_text(json.dumps(facts, indent=2), encoding="utf-8")
    document = report.document(kept, chosen, facts)
    whole = len(chosen) == len(everybody) and rounds >= ROUNDS and not quick
    for folder in [run, DOCS] if whole else [run]:
        (folder / "benchmarks.md").write_text(document, encoding="utf-8")
        report.draw(kept, chosen, folder / "benchmarks.svg")
        _say(f"{folder / 'benchmarks.md'} and benchmarks.svg")


def _say(text: str) -> None:
    errors.print(text, markup=False, soft_wrap=True)


def _choose(everybody: list[Contender], only: str | None) -> list[Contender]:
    if only is None:
        return everybody
    known = [name for c in everybody for name in (c.engine, c.name)]
    names = [name.strip() for name in only.split(",")]
    for name in names:
        if name not in known:
            raise BadInput(f"--only {name}: no such contender; known: {', '.join(dict.fromkeys(known))}")
    return [c for c in everybody if c.engine in names or c.name in names]


def _command(only: str | None, quick: bool, rounds: int) -> str:
    words = ["actuary bench serve", f"--rounds {rounds}", f"--only {only}" if only else "", "--quick" if quick else ""]
    return "`" + " ".join(word for word in words if word) + "`"


def _plan(chosen: list[Contender], pace: Pace, ops: Path) -> dict[str, Any]:
    """All that a figure depends on; visits of another plan are not mixed with it."""
    packages = {name: list(ENVIRONMENTS[name][0]) for name in ENVIRONMENTS if any(c.engine == name for c in chosen)}
    library = ops / "library.json"
    return {
        "contenders": [asdict(contender) for contender in chosen],
        "packages": packages,
        "sources": setup.digest("service", "export", "loadtest/rivals", *MEASURING),
        "ops": hashlib.sha256(library.read_bytes()).hexdigest()[:16] if library.is_file() else "none",
        "version": importlib.metadata.version("actuary"),
        "machine": _cpu(),
        "cores": cores(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": _versions(packages),
        **asdict(pace),
    }


def _versions(packages: dict[str, list[str]]) -> dict[str, str]:
    found = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "fastapi", "uvicorn")}
    pinned = dict(package.split("==") for those in packages.values() for package in those)
    return found | {name: pinned[name] for name in (*contenders.VERSIONED, "nncf") if name in pinned}


def _cpu() -> str:
    """The processor's name, and what of it the products of int8 use."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8") if info.is_file() else ""
    extensions = [flag for flag in ("avx2", "avx512f", "avx512_vnni", "amx_int8") if f" {flag}" in text]
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return f"{processor()} ({', '.join(extensions)}), {cores()} cores, {memory_gb:.0f} GB"


def _start(servers: dict[str, Server], out: Path, starts: int) -> dict[str, Any]:
    """Starts each alone, holds its answers to the reference's, and stops it in its tracks."""
    about = {}
    for name, server in servers.items():
        for n in range(starts):
            if n:
                server.stop()
            server.start()
        deviation = None
        if server.contender.setting != "six":  # whose weights are others
            deviation = asdict(agreement.check(server, out / "reference.json"))
        counted = server.start_s[1:] or server.start_s
        about[name] = {
            "start_s": statistics.median(counted),
            "resident_mb": round(server.resident_mb(), 1),
            "deviation": deviation,
        }
        server.pause()
        _say(f"{name}: ready after {statistics.median(counted):.2f} s, {about[name]['resident_mb']:.0f} MB")
    return about


def _cells(chosen: list[Contender]) -> int:
    """Visits of a round."""
    return sum(len(those) for _, those in visits.cells(chosen))


def _measure(kept: Visits, servers: dict[str, Server], rounds: int, pace: Pace) -> None:
    total = rounds * _cells([server.contender for server in servers.values()])
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=errors, disable=not errors.is_terminal,
    )  # fmt: skip
    with bar:
        task = bar.add_task("measuring", total=total)
        done = 0

        def progress(said: str) -> None:
            nonlocal done
            done += 1
            bar.update(task, completed=done)
            if not said.endswith(": kept"):
                bar.console.print(f"{done}/{total} {said}", markup=False, soft_wrap=True)

        visits.run(kept, servers, rounds, pace, setup.VOCAB_SIZE, progress)
