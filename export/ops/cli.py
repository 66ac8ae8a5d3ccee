"""The verb of the fused operators: `actuary ops build`."""

from __future__ import annotations

import json
from pathlib import Path

import click
from rich.console import Console
from rich.text import Text

from export.ops.library import DEFAULT_FOLDER

errors = Console(stderr=True, markup=False, highlight=False)  # paths and versions hold brackets


@click.group()
def ops() -> None:
    """The fused operators: each activation as one compiled loop instead of a handful of standard ones."""


@ops.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=DEFAULT_FOLDER,
    show_default=True,
    help="Folder for the library.",
)
@click.option(
    "--cuda/--no-cuda",
    default=None,
    help="With its CUDA half, which needs nvcc.  [default: where nvcc and a GPU's driver are]",
)
@click.option("--json", "as_json", is_flag=True, help="What was built, as one JSON document on standard output.")
def build(out: Path, cuda: bool | None, as_json: bool) -> None:
    """Compile every activation of the registry into one library, where that is not done yet.

    \b
    Example: actuary ops build
    Needs a C++ compiler. Without the library, everything runs as standard operators: the same numbers, slower.
    """
    with errors.status("tracing the registry") as status:
        from export.ops.build import build as build_library
        from export.ops.trace import trace
        from models.activations import registry

        made, anew = build_library(out, cuda, lambda line: status.update(Text(line)))
    halves = ", ".join(made.isas) + (f" and CUDA {', '.join(made.cuda)}" if made.cuda else ", no CUDA")
    errors.print(
        f"{made.path}: {len(made.activations)} activations for {halves}; vector functions: {made.vector_math}; "
        f"{made.compiler}{'' if anew else '; nothing has changed since it was built'}",
        soft_wrap=True,
    )
    for name, record in registry().items():
        if outside := trace(record).outside:
            errors.print(
                f"left out: {name} uses {outside}, outside the compiler's vocabulary; it runs unfused",
                soft_wrap=True,
            )
    if as_json:
        click.echo(json.dumps({**made.model_dump(mode="json"), "path": str(made.path), "built_anew": anew}, indent=2))
