"""The `actuary` program: one table of verbs, each of which lives in its own room.

Nothing is imported for a verb until it is called, so `actuary serve` never sees torch and
`actuary --help` answers in an image that holds only one room. The exceptions that every room
raises stand here too, because this is the one module that all of them may import.
"""

from __future__ import annotations

import errno
import importlib
import os
import platform
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

# ActuaryError                exit code 1: the work was done and its result is a failure
#  |- GateFailed              a parity gate or a comparison found what it must not
#  `- BadInput                exit code 2: arguments, files or folders that we cannot use


class ActuaryError(Exception):
    """Something failed that a person can act on; the message says what, and what to do."""

    exit_code = 1


class GateFailed(ActuaryError):
    """A check refused a result; nothing was written."""


class BadInput(ActuaryError):
    """The caller gave something that cannot be used; the message names it and what is allowed."""

    exit_code = 2


ROOMS = ("models", "export", "service", "loadtest", "studies")

# verb: (where its click command is, the optional extra that it needs, one line for --help)
VERBS: dict[str, tuple[str, str, str]] = {
    "list": ("export.cli:list_", "train", "Every activation of the registry."),
    "train": ("models.cli:train", "train", "Train variants of a small GPT, one per activation."),
    "explain": ("export.cli:explain", "train", "One activation: formula, kind, paper; as ONNX, C++ and CUDA."),
    "export": ("export.cli:export", "train", "Turn checkpoints into ONNX bundles that run anywhere."),
    "inspect": ("export.cli:inspect", "serve", "What is in a bundle, and where its nodes run."),
    "swap": ("models.cli:swap", "train", "Another activation for a transformers checkpoint, tuned."),
    "ops": ("export.ops.cli:ops", "train", "Build the fused operators: each activation as one compiled loop."),
    "bench": ("actuary:bench", "train,serve,load", "What an activation costs; our server against other engines."),
    "serve": ("service.cli:serve", "serve", "Serve every bundle of a folder over HTTP."),
    "load": ("loadtest.cli:load", "load", "Put load on a running service, one row per variant."),
    "compare": ("loadtest.compare.cli:compare", "load", "Which variant is slower under load, and how sure that is."),
    "study": ("studies.cli:study", "train,study", "Whether a claim about sigmoid and its rivals holds, measured."),
    "report": ("loadtest.compare.report_cli:report_", "load", "Draw a stored run again, or set it against an old one."),
}

# verb: (where its click command is, the optional extra that it needs, one line for --help)
BENCHES: dict[str, tuple[str, str, str]] = {
    "ops": ("export.bench_cli:ops", "train,load", "What an activation costs, without a server."),
    "serve": ("loadtest.bench.cli:serve", "train,serve,load,bench", "Our server against other engines, over HTTP."),
}

# Verbs that fill a folder beside its place, or have children to end. serve and load end on SIGTERM in their own way;
# train saves its state.
WRITERS = {"export", "swap", "ops", "study"}
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def cores() -> int:
    """How many cores this process may use, which under a container or taskset is less than the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    """Its name, for whatever states a figure."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown processor"


class _LazyGroup(click.Group):
    """Imports a verb's module when the verb is called, and not before."""

    verbs = VERBS

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.verbs)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in self.verbs:
            return None
        where, extra, _ = self.verbs[name]
        module, _, attribute = where.partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        command.epilog = (
            f"Needs the extra: pip install -e '.[{extra}]'" if extra else "Needs nothing beside the program."
        )
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl([(name, line) for name, (_, _, line) in self.verbs.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and args[0] not in self.verbs:
            ctx.fail(f"unknown verb {args[0]!r}; known: {', '.join(self.verbs)}")
        return super().resolve_command(ctx, args)


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="actuary")
def cli() -> None:
    """What an activation function costs to serve, and what it buys.

    \b
    From a formula to a served probability:
      actuary train --activations gelu,swiglu --steps 600
      actuary export artifacts/checkpoints/gelu artifacts/checkpoints/swiglu
      actuary serve
      curl -s localhost:8000/v1/next-token -H 'content-type: application/json' \\
           -d '{"model": "*", "prompt": "if x is not", "top_k": 3}'
    """


class _Benches(_LazyGroup):
    verbs = BENCHES


@click.group(cls=_Benches)
def bench() -> None:
    """What an activation costs, and our server against the engines that others would pick."""


def main(argv: list[str] | None = None) -> Any:
    """Run one verb. Exits 0 when done, 1 when it failed, 2 for bad arguments or input."""
    arguments = sys.argv[1:] if argv is None else argv
    if WRITERS.intersection(arguments[:1]):
        signal.signal(signal.SIGTERM, _end)
    try:
        return cli.main(args=arguments, prog_name="actuary")
    except ActuaryError as error:
        click.echo(f"actuary: {error}", err=True)
        sys.exit(error.exit_code)
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        where = error.filename or f"the folder that was written to, or in {tempfile.gettempdir()}"
        click.echo(f"actuary: no room left in {where}: {error.strerror}; make some, or name another folder", err=True)
        sys.exit(ActuaryError.exit_code)
    except ModuleNotFoundError as missing:
        verb = next((argument for argument in arguments if argument in VERBS), "")
        if not verb or not missing.name:
            raise
        click.echo(f"actuary: {not_installed(verb, missing.name)}", err=True)
        sys.exit(BadInput.exit_code)


def _end(number: int, _: Any) -> None:
    """SIGTERM takes half-written folders away, as Ctrl-C does."""
    signal.signal(number, signal.SIG_IGN)
    click.echo("actuary: ended by SIGTERM", err=True)
    sys.exit(128 + number)


def not_installed(verb: str, module: str) -> str:
    """Which package or room a verb lacks, and what to do."""
    if module.partition(".")[0] in ROOMS:
        return f"`actuary {verb}` is not part of this installation: it leaves {module.replace('.', '/')} out"
    extra = VERBS[verb][1]
    remedy = f"pip install -e '.[{extra}]' in Actuary's folder" if extra else f"pip install {module}"
    return f"`actuary {verb}` needs the package {module!r}, which is not installed; install it with: {remedy}"


if __name__ == "__main__":
    # `python -m actuary` runs this file under another name; the rooms raise the exceptions of `actuary`.
    importlib.import_module("actuary").main()
