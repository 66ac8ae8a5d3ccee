"""`actuary compare`: check what was asked, measure round by round, judge, and report."""

from __future__ import annotations

import datetime
import json
import platform
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import click
import polars as pl
from rich.console import Console

from actuary import ActuaryError, BadInput
from loadtest import plan as planning
from loadtest.compare import ffn, store, sweep
from loadtest.compare.arms import Arms
from loadtest.compare.design import AGAIN, Design
from loadtest.compare.driver import Comparison, Settled, Stop, measure, over, stopping
from loadtest.compare.options import arguments_of, block_of, folder_to_resume, options, place_of, repeat
from loadtest.compare.progress import Written
from loadtest.compare.prompts import Lengths, Source, built_in, cut_corpus, make_workload, read_prompts, read_traffic
from loadtest.compare.server import OwnServer, die_with_parent
from loadtest.compare.terminal import Terminal
from loadtest.compare.workloads import Workload
from loadtest.shared import check_json, machine, write

PACKAGES = ("actuary", "locust", "gevent", "geventhttpclient", "numpy", "polars", "scipy")
OF_THE_SERVER = ("onnxruntime-gpu", "onnxruntime", "uvicorn")  # where it is our own
RESULT = "result.json"
FIGURES = re.compile(r"^\d+ of \d+ |(?<=client too slow to keep the plan): .*")  # of one block, in why it is void


@click.command()
@options
@click.pass_context
def compare(context: click.Context, /, **given: Any) -> None:
    """Compare variants under load: which is slower, which faster, by how much, and how sure that is.

    Short blocks of load on one variant after another, in a balanced random order, until it is settled or the minutes
    are over. The baseline takes part twice: where it differs from itself, the machine was not fit. Without --url it
    starts a server of its own. Ctrl-C judges what was measured; --resume goes on.

    \b
    Examples:
      actuary compare --variants gelu,swiglu,relu --minutes 3
      actuary compare --url http://127.0.0.1:8000 --rate 50 --json result.json
    """
    if given["with_parent"]:
        die_with_parent()
    check_json(given["json_file"])
    resumed = given["resume"] is not None
    arguments = {} if resumed else arguments_of(given)  # refused before there is a folder
    folder = folder_to_resume(context) if resumed else _new_folder(given["out"])
    arguments = arguments or store.run_of(folder)["arguments"]
    console = Console(stderr=True)
    with ExitStack() as held:  # from when the load begins until the report is written: signals only ask
        with _tidy(folder, keep=resumed), store.locked(folder):
            result = _measured(arguments, folder, resumed, console, held)
        document = json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        write(folder / RESULT, document)
        from loadtest.compare import report  # plotly takes a second

        report.write_files(folder, store.read(folder), result)
        if given["json_file"] == "-":
            click.echo(document, nl=False)
        elif given["json_file"]:
            write(Path(given["json_file"]), document)
    _print(result, folder, Console(stderr=given["json_file"] == "-", highlight=False))


def _new_folder(out: Path | None) -> Path:
    now = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%S.%fZ")
    folder = (out or Path("artifacts/compare") / now).absolute()
    if (folder / store.RUN).exists():
        raise BadInput(f"--out {folder} already holds a run; go on with it by --resume, or name another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"--out {folder} cannot be made: {error}; name a folder where you may write") from error
    return folder


@contextmanager
def _tidy(folder: Path, keep: bool) -> Iterator[None]:
    """A folder in which no run came to be goes again, unless it held something before."""
    alien = keep or any(folder.iterdir())
    try:
        yield
    finally:
        if not alien and not (folder / store.RUN).exists():
            with suppress(OSError):
                shutil.rmtree(folder)


def _measured(
    arguments: dict[str, Any], folder: Path, resumed: bool, console: Console, held: ExitStack
) -> dict[str, Any]:
    if resumed and (ended := _over(folder, arguments)):
        return _judged(arguments, folder, ended, [], held.enter_context(stopping()), console)
    source = None if resumed else _source(arguments)  # before a server is started

    def start() -> OwnServer:
        return OwnServer(Path(arguments["bundles"]), Path(arguments["ops"]), folder)

    own = None if arguments["url"] else start()
    comparison = None
    try:
        if own:
            with console.status("starting the server"):
                own.wait(lambda: None)
        url = own.url if own else arguments["url"]
        served = planning.served_models(url)
        if resumed:
            run = store.run_of(folder)
            design = Design.of_json(run["design"])
            workload = Workload.read(folder / store.WORKLOAD)
            _check_same(run, served)
        else:
            assert source is not None
            models = _models(arguments, served)
            arms = Arms(url, {model: served[model] for model in models})
            workload = _workload(source, arms, arguments)
            design = _design(arguments, models, workload, arms)
            run = _run(arguments, design, workload, served, url, own is not None)
            workload.write(folder / store.WORKLOAD)
            store.create(folder, run)
        with Terminal(design, console) as terminal:
            progress = Written(folder, design, terminal)
            stop = held.enter_context(stopping())
            comparison = Comparison(
                design,
                workload,
                folder,
                url,
                own,
                start if own else None,
                lambda url: _warm(url, design, served, workload),
                place_of(arguments),
                progress,
                stop,
            )
            for sentence in [] if resumed else _of_experiments(run):
                comparison.said.append(sentence)
                progress.say(sentence)
            ended = measure(comparison, _settled(run))
            said = _and_then(comparison, arguments) if ended != "interrupted" else []
            said = [*comparison.said, *said]  # what no round that was kept has said
            progress.starting("judging")
    finally:
        own = comparison.own if comparison else own
        if own:
            own.stop()
    return _judged(arguments, folder, ended, said, stop, console)


def _judged(
    arguments: dict[str, Any], folder: Path, ended: str, said: list[str], stop: Stop, console: Console
) -> dict[str, Any]:
    """When the server is gone: what of its own bundles is measured without it, and the verdict."""
    if not arguments["url"] and not stop.asked:
        with console.status("where each variant's time goes"):
            ffn.measure(folder, Path(arguments["bundles"]), Path(arguments["ops"]), lambda: stop.asked)
        if stop.asked:
            said = [*said, f"stopped before it was known where each variant's time goes; --resume {folder} goes on"]
    return result_of(folder, ended, said)


def _and_then(comparison: Comparison, arguments: dict[str, Any]) -> list[str]:
    """What is measured after the blocks, with the same server; why it ended early, where it did."""
    if not arguments.get("sweep"):
        return []
    why = sweep.measure(comparison, arguments["sweep"], arguments["objective_ms"])
    return [why] if why else []


def _over(folder: Path, arguments: dict[str, Any]) -> str:
    """Why no load is missing; empty where some is."""
    kept = store.read(folder)
    if arguments.get("sweep") and sweep.missing_s(folder, arguments["sweep"]):
        return ""
    return over(Design.of_json(kept.run["design"]), kept.blocks, _settled(kept.run))


def _source(arguments: dict[str, Any]) -> Source | None:
    if arguments["traffic"]:
        return read_traffic(Path(arguments["traffic"]))
    if arguments["prompts"]:
        return read_prompts(Path(arguments["prompts"]))
    return built_in()


def _workload(source: Source, arms: Arms, arguments: dict[str, Any]) -> Workload:
    completions = arguments["completions"] or 0
    if arguments["corpus"]:
        lengths = Lengths.parse(arguments["lengths"] or "fixed:64")
        source = cut_corpus(Path(arguments["corpus"]), lengths, arms, completions, arguments["seed"])
    return make_workload(
        source,
        arms,
        cache=arguments["cache"],
        completions=completions,
        texts=arguments["texts"],
        top_k=arguments["top_k"],
        speed=arguments["speed"],
    )


def _warm(url: str, design: Design, served: dict[str, dict[str, object]], workload: Workload) -> None:
    if workload.cache == "warm":
        Arms(url, {model: served[model] for model in design.models}).warm(workload)


def _models(arguments: dict[str, Any], served: dict[str, dict[str, object]]) -> tuple[str, ...]:
    """The baseline first."""
    models = planning.choose_models(arguments["variants"], served)
    if len(models) < 2:
        raise BadInput(f"the server serves {models[0]!r} alone, which is nothing to compare; export another variant")
    baseline = arguments["baseline"] or models[0]
    if baseline not in models:
        raise BadInput(f"--baseline {baseline!r} is not served; served: {', '.join(served)}")
    for model in models:
        if model.endswith(AGAIN):
            raise BadInput(f"variant {model!r} has the name of an A/A arm; export it under another --name")
    return (baseline, *(model for model in models if model != baseline))


def _design(arguments: dict[str, Any], models: tuple[str, ...], workload: Workload, arms: Arms) -> Design:
    known = arguments["block"] and arguments["settle"] is not None
    if workload.traffic:
        gap_s = workload.period_s / len(workload.requests)
    else:
        gap_s = 1 / arguments["rate"] if arguments["rate"] else 0.0
    block_s, settle_s = block_of(arguments, 0.0 if known else arms.answer_s(workload), gap_s)
    return Design(
        models,
        arguments["minutes"],
        block_s,
        settle_s,
        arguments["users"],
        arguments["rate"],
        "recorded" if workload.traffic else arguments["arrivals"],
        arguments["seed"],
        arguments["timeout"],
        arguments["equivalence"],
        arguments["fixed"],
    )


def _run(
    arguments: dict[str, Any],
    design: Design,
    workload: Workload,
    served: dict[str, dict[str, object]],
    url: str,
    own: bool,
) -> dict[str, Any]:
    facts = [{"arm": arm, "model": (model := design.model_of(arm)), "facts": served[model]} for arm in design.arms]
    versions = {"python": platform.python_version()}
    for name in (*PACKAGES, *(OF_THE_SERVER if own else ())):
        with suppress(PackageNotFoundError):  # of onnxruntime's two names one is installed
            versions[name] = version(name)
    return {
        "design": design.as_json(),
        "arms": facts,
        "machine": machine(),
        "versions": versions,
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": repeat(
            {
                **arguments,
                **{"variants": ",".join(design.models), "baseline": design.baseline},
                **{"block": design.block_s, "settle": design.settle_s},
            }
        ),
        "url": url,
        "own_server": own,
        "workload": workload.facts(),
        "arguments": arguments,
    }


def _of_experiments(run: dict[str, Any]) -> list[str]:
    """What whoever names one should know."""
    asked = dict.fromkeys(arm["model"] for arm in run["arms"] if arm["facts"].get("object") == "experiment")
    return [
        f"{model} is an experiment: this load stands in its record, each request as of a key of its own; where users "
        "ask for it, its verdict is of both"
        for model in asked
    ]


def _check_same(run: dict[str, Any], served: dict[str, dict[str, object]]) -> None:
    """The server of a resumed run must serve what it served before."""
    for arm in run["arms"]:
        model, before = arm["model"], arm["facts"]
        if model not in served:
            raise BadInput(f"the run compares {model!r}, which is not served any more; served: {', '.join(served)}")
        if served[model].get("files") != before.get("files"):
            raise BadInput(f"{model!r} is another bundle than when the run began; start a new run")


def _settled(run: dict[str, Any]) -> Settled:
    design = Design.of_json(run["design"])

    def settled(blocks: pl.DataFrame) -> bool:
        from loadtest.compare import statistics  # scipy takes a second

        return statistics.settled(blocks, design)

    return settled


def result_of(folder: Path, ended: str, said: list[str]) -> dict[str, Any]:
    """What is to be said of a run's folder: the verdict on its rounds, and what was measured beside them."""
    kept = store.read(folder)
    if not kept.rounds:
        raise ActuaryError(f"stopped before the first round was finished, nothing to judge; --resume {folder} goes on")
    from loadtest.compare import verdict  # scipy takes a second

    design = Design.of_json(kept.run["design"])
    objective_ms = kept.run["arguments"].get("objective_ms")
    judged = verdict.judge(kept.run, kept.blocks, kept.samples, margin=design.equivalence, seed=design.seed)
    baseline = {
        arm: verdict.failed(verdict.failures(kept.blocks, arm)) for arm in design.arms if arm not in design.models[1:]
    }
    failed = [f"{arm}: {share}" for arm, share in baseline.items() if share]  # of the others their sentences say it
    return {
        "schema": store.SCHEMA,
        "kind": store.KIND,
        **judged,
        "ended": ended,
        "said": [*_said(kept), *failed, *said, *sweep.said(folder, design, objective_ms), *ffn.said(folder)],
        "cold": kept.warmup,
        **sweep.result(folder, design, objective_ms),
        **ffn.result(folder),
    }


def void_of(blocks: pl.DataFrame) -> Counter[tuple[str, str]]:
    """How many blocks do not count, by arm and by why, without the figures of the single block."""
    void = blocks.filter(pl.col("void") != "").select("arm", "void").rows()
    return Counter((arm, FIGURES.sub("", why)) for arm, why in void)


def _said(kept: store.Run) -> list[str]:
    """What a reader must know before trusting a figure."""
    said = [sentence for each in kept.rounds for sentence in each["said"]]
    for (arm, why), count in void_of(kept.blocks).most_common():
        said.append(f"{count} {'blocks do' if count > 1 else 'block does'} not count of {arm}: {why}")
    share = kept.blocks["client_cpu_share"].median()
    if isinstance(share, float) and share > 0.9:
        said.append(
            f"the load generator used {share:.0%} of a core: its own latency is in these figures; lower the load or "
            "spread it with --workers"
        )
    return said


def _print(result: dict[str, Any], folder: Path, console: Console) -> None:
    for arm in result["arms"]:
        console.print(arm["sentence"], markup=False, soft_wrap=True)
    for note in result["said"]:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    console.print(f"kept in {folder}", markup=False, soft_wrap=True)
