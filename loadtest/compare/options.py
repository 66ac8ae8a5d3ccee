"""What `actuary compare` may be asked: its options, and the checks that need no server."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from actuary import BadInput
from loadtest import plan as planning
from loadtest.compare import store
from loadtest.compare.generator import Place
from loadtest.shared import POSITIVE, Finite, free_users

BUNDLES, OPS = Path("artifacts/bundles"), Path("artifacts/ops")
USERS = 4
USERS_OF_TRAFFIC = 64
BLOCK_S, SETTLE_S = 0.15, 0.05  # at least; statistics.py says what longer ones cost
ANSWERS = 10  # in a block at least: where one takes longer than the block, some blocks have none, and do not count
LEAST_PLANNED = 5  # in a block: of Poisson arrivals one block in 150 has then none
# What --resume does not take from the run: where its result goes, and whose child this is.
FREE = ("resume", "json_file", "with_parent")

_PATH = click.Path(path_type=Path)
# A week: what a run cannot last is a slip of the keyboard, and its number of rounds overflows.
_MINUTES = Finite(min=0, max=10_080, min_open=True)
_RATE = Finite(min=0, max=1_000_000, min_open=True)  # at 1e308 a block's arrivals are planned for ever
_SHARE = Finite(min=0, max=1, min_open=True, max_open=True)


def _option(*names: str, **more: Any) -> Callable[..., Any]:
    return click.option(*names, show_default=more.get("default") is not None, **more)


_OPTIONS = (
    _option("--variants", metavar="A,B,C", help="What is compared.  [default: all that the server lists]"),
    _option("--baseline", metavar="A", help="What the others are compared with.  [default: the first]"),
    _option("--minutes", type=_MINUTES, default=5.0, help="Of load at most."),
    _option("--rate", type=_RATE, help="Arrivals per second of the arm that is visited; else a closed loop."),
    _option(
        "--users",
        type=click.IntRange(1, 10_000),
        help=f"Users at once.  [default: {USERS}; with --rate, one per 1/s; with --traffic, {USERS_OF_TRAFFIC}]",
    ),
    _option("--arrivals", type=click.Choice(["constant", "poisson"]), default="poisson", help="Of --rate."),
    _option("--equivalence", type=_SHARE, default=0.02, help="A difference that does not matter, as a share."),
    _option("--url", help="A running server.  [default: one of its own, on --bundles]"),
    _option("--bundles", type=_PATH, help=f"Of its own server.  [default: {BUNDLES}]"),
    _option("--ops", type=_PATH, help=f"Fused operators of its own server.  [default: {OPS}]"),
    _option("--prompts", type=_PATH, help="One per line, text or .jsonl.  [default: built in]"),
    _option("--corpus", type=_PATH, help="A text to cut prompts from, of --lengths."),
    _option("--lengths", metavar="D", help="In tokens: fixed:64, uniform:8-256, lognormal:64-32.  [default: fixed:64]"),
    _option("--traffic", type=_PATH, help="Recorded traffic, .jsonl with at_s and prompt."),
    _option("--speed", type=POSITIVE, default=1.0, help="Of the replay of --traffic."),
    _option("--completions", type=click.IntRange(1), metavar="TOKENS", help="Generate so many after each prompt."),
    _option(
        "--cache",
        type=click.Choice(["cold", "warm"]),
        default="cold",
        help="cold: no prompt begins as one before; warm: each was computed before.",
    ),
    _option("--texts", is_flag=True, help="Send texts, not token ids."),
    _option("--top-k", type=click.IntRange(0), default=10, help="Tokens asked for."),
    _option(
        "--block",
        type=POSITIVE,
        help=f"Seconds of one measured block.  [default: {BLOCK_S}, or as long as {ANSWERS} answers take]",
    ),
    _option(
        "--settle",
        type=Finite(min=0),
        help=f"Seconds before it, discarded.  [default: {SETTLE_S}, or as long as 2 answers take]",
    ),
    _option(
        "--sweep", type=_MINUTES, metavar="MINUTES", help="Then so many more at rising rates: where each one's knee is."
    ),
    _option(
        "--objective-ms",
        type=POSITIVE,
        help="With --sweep: good answers are within it, and the knee is where p99 leaves it.  [default: 5 times the "
        "baseline's idle p50]",
    ),
    _option("--seed", type=click.IntRange(0), default=0, help="Of orders, prompts and arrivals."),
    _option("--timeout", type=POSITIVE, default=30.0, help="Seconds until a request failed."),
    _option("--fixed", is_flag=True, help="All of --minutes, although it is settled before."),
    _option("--workers", type=click.IntRange(0, 64), default=0, help="More processes that send the load."),
    _option("--master", metavar="HOST:PORT", help="Wait here for --workers from other machines."),
    _option("--json", "json_file", metavar="FILE", help="Write the result here too; - is standard output."),
    _option("--out", type=_PATH, help="Folder.  [default: artifacts/compare/<time>]"),
    # For who starts this as a child, like the service: stop by SIGTERM when that process ends, however it does.
    _option("--with-parent", is_flag=True, hidden=True),
    _option("--resume", metavar="DIR", type=_PATH, help="Go on with a run that was stopped or killed."),
)


def options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def arguments_of(given: dict[str, Any]) -> dict[str, Any]:
    """What was asked, as JSON keeps it, with every default that depends on another argument."""
    asked: dict[str, Any] = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in given.items()
        if name not in (*FREE, "out")
    }
    if asked["url"]:
        if asked["bundles"] or asked["ops"]:
            raise BadInput("--bundles and --ops are of a server of its own; leave out either them or --url")
        asked["url"] = planning.check_url(asked["url"])
    else:
        asked["bundles"] = str(Path(asked["bundles"] or BUNDLES).absolute())
        asked["ops"] = str(Path(asked["ops"] or OPS).absolute())
    sources = [name for name in ("prompts", "corpus", "traffic") if asked[name]]
    if len(sources) > 1:
        raise BadInput(f"--{sources[0]} and --{sources[1]} both say what to send; give one")
    for name in sources:
        asked[name] = str(Path(asked[name]).absolute())
    if asked["lengths"] and not asked["corpus"]:
        raise BadInput("--lengths says how a text is cut; give the text with --corpus")
    if asked["traffic"] and asked["rate"]:
        raise BadInput("--rate: recorded traffic has its own times; --speed hurries them")
    if asked["traffic"] and asked["sweep"]:
        raise BadInput("--sweep chooses its own rates; recorded traffic has its own times: leave one of the two out")
    if asked["objective_ms"] and not asked["sweep"]:
        raise BadInput("--objective-ms is what --sweep looks for; give it its minutes")
    if asked["users"] is None:
        asked["users"] = free_users(asked["rate"]) if asked["rate"] else USERS_OF_TRAFFIC if asked["traffic"] else USERS
    if asked["workers"] > asked["users"]:
        raise BadInput(f"--workers {asked['workers']} have {asked['users']} users between them; give each one, or more")
    if asked["rate"] and asked["block"] and asked["rate"] * asked["block"] < LEAST_PLANNED:
        raise BadInput(
            f"--rate {asked['rate']:g} plans fewer than {LEAST_PLANNED} requests in a --block of {asked['block']:g} s, "
            "which have no median to speak of; raise one of the two"
        )
    if asked["variants"] is not None:
        names = [name.strip() for name in asked["variants"].split(",")]
        for name in names:
            if names.count(name) > 1:
                raise BadInput(f"variant {name!r} is named twice in --variants; the baseline enters twice by itself")
        if len(names) < 2:
            raise BadInput(f"{names[0]!r} alone is nothing to compare; name two variants or more")
        if asked["baseline"] and asked["baseline"] not in names:
            raise BadInput(f"--baseline {asked['baseline']!r} is not among --variants {', '.join(names)}")
    if asked["master"]:
        place_of(asked)
    return asked


def block_of(asked: dict[str, Any], answer_s: float, gap_s: float) -> tuple[float, float]:
    """Seconds of a block, and of settling before it.

    `answer_s` is how long an answer takes, `gap_s` the time between two planned arrivals, 0 in a closed loop.
    """
    block_s = asked["block"] or max(BLOCK_S, round(ANSWERS * max(answer_s, gap_s), 2))
    settle_s = max(SETTLE_S, round(2 * answer_s, 2)) if asked["settle"] is None else asked["settle"]
    return block_s, settle_s


def place_of(asked: dict[str, Any]) -> Place:
    if not asked["master"]:
        return Place(asked["workers"])
    host, _, port = asked["master"].rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise BadInput(f"--master {asked['master']!r} is not HOST:PORT, like 192.0.2.1:5557")
    if not asked["workers"]:
        raise BadInput("--master waits for workers of other machines; say how many with --workers")
    return Place(asked["workers"], (host.strip("[]"), int(port)))


def folder_to_resume(context: click.Context) -> Path:
    """The folder of the run to go on with; BadInput where other arguments were given than it has."""
    folder: Path = context.params["resume"].absolute()
    recorded = store.run_of(folder)["arguments"]
    explicit = {
        name: value
        for name, value in context.params.items()
        if name not in FREE and context.get_parameter_source(name) is not ParameterSource.DEFAULT
    }
    if explicit:
        here = arguments_of({**dict.fromkeys(FREE), "out": None, **recorded, **explicit})
        for name in explicit:
            if name == "out" or here[name] != recorded.get(name):
                was = recorded.get(name, folder)
                raise BadInput(
                    f"--{name.replace('_', '-')} {explicit[name]}: the run in {folder} has {was}; leave it out to go "
                    "on with that run, or start another without --resume"
                )
    return folder


def repeat(arguments: dict[str, Any]) -> str:
    """The command that measures the same again."""
    words = ["actuary", "compare"]
    for name, value in arguments.items():
        option = f"--{name.replace('_', '-')}"
        if value is True:
            words.append(option)
        elif value not in (None, False):
            words += [option, str(value)]
    return shlex.join(words)
