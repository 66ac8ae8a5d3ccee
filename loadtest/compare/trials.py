"""`actuary compare` put to the test, on the machine as it is: how often it says what is not so, and misses what is.

    python -m loadtest.compare.trials twin artifacts/bundles/gelu BUNDLES              # the same weights, two names
    python -m loadtest.compare.trials run OUT --runs 20 -- --bundles BUNDLES --variants gelu,gelu-twin --minutes 1
    python -m loadtest.compare.trials run OUT --runs 10 --truth 1.05 -- --bundles B --variants fast,slow --minutes 3
    python -m loadtest.compare.trials truth B fast,slow --minutes 5          # by how much it is slower

`run` makes comparisons one after another, each with its own seed and with what follows `--`, kept in OUT/00, OUT/01
and so on; one that was killed goes on with the same command. What came of them is in OUT/trials.json: how many flag a
difference, and of a known `--truth`, how many find it and how many intervals hold it.

`truth` measures a ratio in another way than `actuary compare` does, with none of its load or statistics: one client
that waits for each answer asks both variants in turns, A B B A, some requests each. It is the truth of `--users 1`.
Its requests are those of a comparison that is not told which to send.
"""

from __future__ import annotations

import http.client
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import click

from actuary import ActuaryError, BadInput
from loadtest.compare.arms import Arms
from loadtest.compare.cli import RESULT
from loadtest.compare.prompts import built_in, make_workload
from loadtest.compare.server import OwnServer
from loadtest.compare.store import RUN
from loadtest.compare.workloads import Bodies
from loadtest.plan import PROMPTS, served_models
from loadtest.shared import POSITIVE, machine, write

FIGURES: Final = "trials.json"
BUSY: Final = "busy.json"  # of one comparison: when it ran, how long, and how busy the machine was
CHUNKS: Final = 30  # of the truth's turns: its standard error is of their ratios
# One leg of a turn, and how many of it count not. Of single requests in turns a model of 10 MB finds the processor's
# caches full of the other's weights: 1.5 ms instead of 1.05, and a model of a twelfth more layers 8 % slower, not 12.
LEG, SETTLING = 40, 10
_PATH = click.Path(path_type=Path)


@click.group()
def trials() -> None:
    """`actuary compare` put to the test."""


@trials.command()
@click.argument("bundle", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("bundles", type=_PATH)
def twin(bundle: Path, bundles: Path) -> None:
    """Copy BUNDLE into BUNDLES twice: under its own name, and with `-twin` behind it."""
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    for name in (manifest["name"], f"{manifest['name']}-twin"):
        shutil.copytree(bundle, bundles / name)
        write(bundles / name / "manifest.json", json.dumps({**manifest, "name": name}, indent=2) + "\n")


@trials.command()
@click.argument("out", type=_PATH)
@click.option("--runs", type=click.IntRange(1), required=True, help="Comparisons.")
@click.option("--truth", type=POSITIVE, help="The first variant's p50 over the baseline's; 1 where they are the same.")
@click.argument("arguments", nargs=-1)
def run(out: Path, runs: int, truth: float | None, arguments: tuple[str, ...]) -> None:
    """Comparisons with ARGUMENTS, and what came of them; goes on where it was stopped."""
    out = out.absolute()
    results = []
    for number in range(runs):
        folder = out / f"{number:02d}"
        if not _complete(folder):
            _compare(folder, (*arguments, "--seed", str(number)))
        results.append(_told(folder))
        figures = {**counted(results, truth), "arguments": arguments, "machine": machine(), "trials": results}
        write(out / FIGURES, json.dumps(figures, indent=2) + "\n")
        click.echo(f"{number + 1}/{runs}: {results[-1]['sentence']}")
    click.echo(json.dumps(counted(results, truth)))


def _complete(folder: Path) -> bool:
    """A comparison that was stopped has a result too, of what it had."""
    if not (folder / BUSY).exists():  # written last
        return False
    return bool(json.loads((folder / RESULT).read_text(encoding="utf-8"))["ended"] != "interrupted")


def _compare(folder: Path, arguments: Sequence[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    how = ("--resume", str(folder)) if (folder / RUN).exists() else (*arguments, "--out", str(folder))
    busy = {"began": time.time(), "load_average": os.getloadavg()[0]}
    ended = subprocess.run([sys.executable, "-m", "actuary", "compare", *how], check=False, stdout=subprocess.DEVNULL)
    if ended.returncode:
        raise ActuaryError(f"`actuary compare` ended with exit code {ended.returncode}; mend it, and run this again")
    busy |= {"took_s": round(time.time() - busy["began"], 1), "load_average_after": os.getloadavg()[0]}
    write(folder / BUSY, json.dumps(busy) + "\n")


def _told(folder: Path) -> dict[str, Any]:
    """What one comparison of two variants says."""
    result = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    (arm,) = result["arms"]
    kept = {name: arm.get(name) for name in ("outcome", "differs", "p50", "smallest_seen", "sentence")}
    kept |= {name: result[name] for name in ("fit", "aa", "rounds", "void_rounds", "looks", "ended")}
    return {**kept, **json.loads((folder / BUSY).read_text(encoding="utf-8"))}


def counted(results: Sequence[dict[str, Any]], truth: float | None) -> dict[str, Any]:
    """How many of the comparisons say what.

    `flagged` find any difference: an arm slower or faster, or a baseline that differs from itself. `holding` have an
    interval that holds the truth.
    """
    outcomes = [each["outcome"] for each in results]
    told: dict[str, Any] = {"runs": len(results)}
    told["flagged"] = sum(each["outcome"] in ("slower", "faster") or not each["fit"] for each in results)
    told["unfit"] = sum(not each["fit"] for each in results)
    told |= {name: outcomes.count(name) for name in ("slower", "faster", "equivalent", "inconclusive")}
    if truth:
        told |= {"truth": truth, "holding": sum(_holds(each["p50"], truth) for each in results)}
    return told


def _holds(found: dict[str, float | None] | None, truth: float) -> bool:
    """An end that is open holds everything on its side; where nothing was measured, nothing is held."""
    if found is None:
        return False
    low, high = found["low"], found["high"]
    return (low is None or low <= truth) and (high is None or truth <= high)


@trials.command()
@click.argument("bundles", type=_PATH)
@click.argument("variants")
@click.option("--minutes", type=POSITIVE, default=5.0, show_default=True)
@click.option("--ops", type=_PATH, default=Path("artifacts/ops"), show_default=True)
@click.option("--out", type=_PATH, required=True, help="Folder of the server's log and of truth.json.")
def truth(bundles: Path, variants: str, minutes: float, ops: Path, out: Path) -> None:
    """By how much the second of two VARIANTS is slower than the first."""
    names = variants.split(",")
    if len(names) != 2:
        raise BadInput(f"{variants!r} are not two variants, like gelu,slow")
    out.mkdir(parents=True, exist_ok=True)
    server = OwnServer(bundles, ops, out)
    try:
        server.wait(lambda: None)
        bodies = _bodies(server.url, names)
        in_turns(server.url, bodies, names, 2.0)  # the first requests are slow
        turns = in_turns(server.url, bodies, names, minutes * 60)
    finally:
        server.stop()
    found = {"variants": names, "minutes": minutes, **ratio_of(turns), "machine": machine()}
    write(out / "truth.json", json.dumps(found, indent=2) + "\n")
    click.echo(json.dumps(found))


def _bodies(url: str, names: Sequence[str]) -> Bodies:
    """As `actuary compare` sends where nobody says: a prompt that is in the cache has another ratio."""
    served = served_models(url)
    arms = Arms(url, {name: served[name] for name in names})
    workload = make_workload(built_in(), arms, cache="cold", completions=0, texts=False, top_k=10, speed=1.0)
    return Bodies(workload, names)


Turn = tuple[list[float], list[float]]  # latencies in ms of A and of B


def in_turns(url: str, bodies: Bodies, names: Sequence[str], seconds: float) -> list[Turn]:
    """A B B A, LEG requests each, the same prompts but for how they begin, until the time is over."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
    turns: list[Turn] = []
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        turn: Turn = ([], [])
        for which in (0, 1, 1, 0):
            latencies_ms = []
            for number in range(LEG):
                path, body = bodies.of(names[which], number % len(PROMPTS))
                began = time.perf_counter()
                connection.request("POST", path, body, {"content-type": "application/json"})
                answer = connection.getresponse()
                said = answer.read()
                latencies_ms.append((time.perf_counter() - began) * 1000)
                if answer.status != 200:
                    raise ActuaryError(f"{url} answered {answer.status}: {said[:200]!r}")
            turn[which].extend(latencies_ms[SETTLING:])
        turns.append(turn)
    return turns


def ratio_of(turns: Sequence[Turn]) -> dict[str, Any]:
    """p50 of B over p50 of A, with a standard error from CHUNKS of the turns in the order of time."""
    each = len(turns) // CHUNKS
    if not each:
        raise ActuaryError(f"{len(turns)} turns are too few, it takes {CHUNKS}; give more --minutes")
    medians = []
    for at in range(0, each * CHUNKS, each):
        a, b = zip(*turns[at : at + each], strict=True)
        medians.append(tuple(statistics.median(latency for turn in one for latency in turn) for one in (a, b)))
    log_ratios = [math.log(b / a) for a, b in medians]
    ratio, error = math.exp(statistics.fmean(log_ratios)), statistics.stdev(log_ratios) / math.sqrt(CHUNKS)
    p50_ms = [round(statistics.median(one), 3) for one in zip(*medians, strict=True)]
    return {"ratio": ratio, "standard_error": ratio * error, "turns": len(turns), "p50_ms": p50_ms}


if __name__ == "__main__":
    try:
        trials(standalone_mode=False)
    except ActuaryError as error:
        sys.exit(f"{error}")
