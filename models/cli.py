"""The verb of models/: `actuary train`."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table

from actuary import ActuaryError, BadInput, cores

if TYPE_CHECKING:
    from models.train import Recipe, Variant

DEFAULT_SET = "gelu,silu,swiglu,relu,sigmoid,gelu-sigmoid-head"
errors = Console(stderr=True)


def _variants(names: str, head: str, seeds: int) -> list[Variant]:
    from models import activations
    from models.gpt import SIGMOID_HEAD
    from models.train import Variant

    asked = [name.strip() for name in names.split(",") if name.strip()]
    if not asked:
        raise BadInput("--activations is empty; name some, with commas between: --activations gelu,swiglu")
    variants = []
    for name in asked:
        activation = activations.get(name.removesuffix(SIGMOID_HEAD)).name
        own_head = "sigmoid" if name.endswith(SIGMOID_HEAD) else head
        variants += [Variant(activation, own_head, seed) for seed in range(seeds)]
    twice = {v.name for v in variants if variants.count(v) > 1}
    if twice:
        raise BadInput(f"--activations names {', '.join(sorted(twice))} more than once")
    return variants


@click.command()
@click.option(
    "--activations",
    default=DEFAULT_SET,
    show_default=True,
    help="Names with commas between; NAME-sigmoid-head trains that one under the sigmoid head.",
)
@click.option(
    "--head",
    type=click.Choice(["softmax", "sigmoid"]),
    default="softmax",
    show_default=True,
    help="Cross-entropy, or per-token binary cross-entropy with a prior bias.",
)
@click.option("--steps", type=click.IntRange(1), default=None, help="Optimizer steps.  [default: 1000]")
@click.option(
    "--seeds",
    type=click.IntRange(1, 1000),
    default=1,
    show_default=True,
    help="Train each variant from this many seeds.",
)
@click.option("--layers", type=click.IntRange(1), default=None, help="Blocks.  [default: 2]")
@click.option("--dim", type=click.IntRange(2), default=None, help="Channels of the residual stream.  [default: 128]")
@click.option(
    "--heads", type=click.IntRange(1), default=None, help="Attention heads.  [default: about one per 64 channels]"
)
@click.option("--context", type=click.IntRange(2), default=None, help="Longest prompt, in tokens.  [default: 128]")
@click.option("--vocab", type=click.IntRange(1), default=None, help="Entries of the byte-level BPE.  [default: 2048]")
@click.option("--batch", type=click.IntRange(1), default=None, help="Windows per step.  [default: 4]")
@click.option(
    "--gated-width",
    type=click.Choice(["matched", "full"]),
    default="matched",
    show_default=True,
    help="Hidden width of gated forms: the pointwise forms' parameters, or their width.",
)
@click.option(
    "--corpus",
    "paths",
    type=click.Path(path_type=Path),
    multiple=True,
    help="File or folder of UTF-8 text; may be repeated.  [default: Python's standard library]",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("artifacts/checkpoints"),
    show_default=True,
    help="Folder for the checkpoints.",
)
@click.option(
    "--workers", type=click.IntRange(1), default=None, help="Variants trained side by side.  [default: one per core]"
)
@click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
def train(
    activations: str,
    head: str,
    seeds: int,
    gated_width: str,
    paths: tuple[Path, ...],
    out: Path,
    workers: int | None,
    as_json: bool,
    **shape: int | None,
) -> None:
    """Train variants of a small GPT, one per activation, on the same batches.

    Finished variants are kept and skipped; after Ctrl-C the same command goes on where it stopped. Ends with
    held-out bits per byte and calibration (ECE), beside unigram, bigram and zlib.

    \b
    Examples:
      actuary train --activations gelu,swiglu --steps 600 --seeds 3
      actuary train --activations silu --corpus ~/notes --corpus book.txt
      torchrun --nproc_per_node 4 -m actuary train --activations gelu --batch 64     (or accelerate launch)
    """
    from accelerate import Accelerator

    from models.corpus import Corpus
    from models.gpt import default_heads
    from models.train import Recipe
    from models.trainer import train_all

    given = {key: value for key, value in shape.items() if value is not None}
    if "dim" in given and "heads" not in given:
        given["heads"] = default_heads(given["dim"])
    recipe = Recipe(gated_width=gated_width, **given)  # type: ignore[arg-type]
    variants = _variants(activations, head, seeds)
    processes = Accelerator()
    if processes.is_main_process and not errors.is_terminal:
        errors.print("reading the corpus")
    with errors.status("reading the corpus"), processes.main_process_first():
        corpus = Corpus.read(paths)
        corpus.ids(recipe.vocab)
    failures = train_all(variants, recipe, corpus, out, workers or cores(), errors)
    summary = _summary(variants, recipe, corpus.yardsticks(recipe.vocab), out)
    if as_json and processes.is_main_process:
        click.echo(json.dumps(summary, indent=2))
    elif processes.is_main_process:
        _print(summary, errors)
    if failures:
        raise ActuaryError("; ".join(map(str, failures)))


def _summary(variants: list[Variant], recipe: Recipe, yardsticks: dict[str, float], out: Path) -> dict[str, Any]:
    from models.train import finished

    rows = []
    for variant in variants:
        done = finished(out / variant.name)
        if done is not None:
            rows.append(
                {
                    "name": variant.name,
                    "activation": variant.activation,
                    "head": variant.head,
                    "seed": variant.seed,
                    **done,
                }
            )
    return {"out": str(out), "steps": recipe.steps, "variants": rows, "yardsticks": yardsticks}


def _print(summary: dict[str, Any], console: Console) -> None:
    if not summary["variants"]:
        return
    table = Table(
        box=None, header_style="bold", title=f"held-out quality after {summary['steps']} steps", title_justify="left"
    )
    table.add_column("variant")
    for column in ("bits/byte", "ECE", "sigmoid mass", "seconds"):
        table.add_column(column, justify="right")
    for row in sorted(summary["variants"], key=lambda row: row["bits_per_byte"]):
        table.add_row(
            row["name"],
            f"{row['bits_per_byte']:.3f}",
            f"{row['ece']:.3f}",
            f"{row['sigmoid_mass']:.3g}",
            f"{row['seconds']:.0f}",
        )
    by_variant: dict[tuple[str, str], list[float]] = {}
    for row in summary["variants"]:
        by_variant.setdefault((row["activation"], row["head"]), []).append(row["bits_per_byte"])
    for name, value in sorted(summary["yardsticks"].items(), key=lambda item: item[1]):
        table.add_row(f"[dim]{name}[/]", f"[dim]{value:.3f}[/]")
    console.print(table)
    for (activation, head), values in by_variant.items():
        if len(values) > 1:
            console.print(
                f"{activation} ({head}) over {len(values)} seeds: "
                f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"
            )


@click.command()
@click.option("--from", "source", required=True, help="Folder that transformers' save_pretrained wrote, or a hub name.")
@click.option("--activation", required=True, help="A name of the registry; see actuary list.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=Path("artifacts/swapped"),
              show_default=True, help="Folder for the new checkpoint.")  # fmt: skip
@click.option("--name", help="Of the new checkpoint.  [default: SOURCE-ACTIVATION]")
@click.option("--gated-width", type=click.Choice(["matched", "full"]), default="matched", show_default=True,
              help="From pointwise to gated or back: as many parameters, or as many units.")  # fmt: skip
@click.option("--corpus", "paths", type=click.Path(path_type=Path), multiple=True,
              help="File or folder of UTF-8 text; may be repeated.  [default: Python's standard library]")  # fmt: skip
@click.option("--steps", type=click.IntRange(0), default=200, show_default=True, help="Of tuning; 0 only swaps.")
@click.option("--batch", type=click.IntRange(1), default=4, show_default=True, help="Windows per step.")
@click.option("--window", type=click.IntRange(2), help="Tokens of a window.  [default: 128, or the whole context]")
@click.option("--rate", type=click.FloatRange(0, min_open=True), default=3e-4, show_default=True, help="Learning rate.")
@click.option("--distil", type=click.FloatRange(0, 1), default=0.0, show_default=True,
              help="Share of the loss that is the distance from the original's predictions.")  # fmt: skip
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="The report as one JSON document on standard output.")
def swap(
    source: str, activation: str, out: Path, name: str | None, gated_width: str, paths: tuple[Path, ...], steps: int,
    batch: int, window: int | None, rate: float, distil: float, seed: int, as_json: bool,
) -> None:  # fmt: skip
    """Give a transformers checkpoint another feed-forward activation, and tune it on a corpus.

    Reports held-out bits per byte before, after the swap and after tuning. Ctrl-C saves; the same command goes on.
    `actuary export --from OUT/NAME` exports the result.

    \b
    Examples:
      actuary swap --from ~/gpt2 --activation swiglu --corpus ~/notes --distil 0.5
      actuary swap --from ~/llama --activation reglu --steps 0
    """
    with errors.status("loading torch"):
        from models.swapping import swap_checkpoint

    report = swap_checkpoint(
        source, activation, out, name, gated_width, paths, errors,
        steps=steps, batch=batch, window=window, rate=rate, distil=distil, seed=seed,
    )  # fmt: skip
    if as_json:
        click.echo(json.dumps(report, indent=2))
        return
    table = Table(
        box=None, header_style="bold", title=f"held-out bits per byte of {report['name']}", title_justify="left"
    )
    for column in ("before", "swapped", "tuned"):
        table.add_column(column, justify="right")
    table.add_row(*(f"{report['bits_per_byte'][key]:.4f}" for key in ("before", "swapped", "tuned")))
    errors.print(table)
    errors.print(f"export it with: actuary export --from {report['folder']}", highlight=False, soft_wrap=True)
