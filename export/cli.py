"""The verbs of export/: `actuary export`, `actuary inspect`, `actuary explain`, `actuary list`."""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from actuary import ActuaryError, BadInput

if TYPE_CHECKING:
    from export.bundle import Manifest, Precision
    from export.exporter import Checkpoint
    from export.inspection import Inspection
    from models.gpt import ActuaryConfig

errors = Console(stderr=True)


@click.command()
@click.argument("checkpoints", nargs=-1, type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("artifacts/bundles"),
    show_default=True,
    help="Folder for the bundles.",
)
@click.option(
    "--precision",
    type=click.Choice(["fp32", "int8", "fp16", "bf16"]),
    default="fp32",
    show_default=True,
    help="fp32 is for CPU and CUDA; int8 quantises the products, for the CPU: one step for each token, so a prompt's "
    "answer does not depend on what it is batched with, and the fused operators (actuary ops build) run them about "
    "twice as fast; fp16 and bf16 are for CUDA. What these lose is measured on held-out text.",
)
@click.option(
    "--corpus",
    type=click.Path(path_type=Path, exists=True),
    multiple=True,
    help="With --precision int8, fp16, bf16: the text it was trained on, or with --from any text, to measure the "
    "loss on; may be repeated.  [default: Python's standard library; with --from none]",
)
@click.option(
    "--flavor",
    type=click.Choice(["ort", "portable"]),
    default="ort",
    show_default=True,
    help="With ONNX Runtime's own operators and, in fp32 and int8, a cache of keys and values, or with standard "
    "operators only; the activation's node is in both.",
)
@click.option("--from", "source", metavar="DIR", help="A checkpoint of transformers: a folder, or a name on the hub.")
@click.option("--name", help="The bundle's name, where one checkpoint is exported.  [default: the checkpoint's]")
@click.option(
    "--random", "random_weights", is_flag=True, help="No checkpoint: random weights of the shape that follows."
)
@click.option("--activation", help="With --random.")
@click.option(
    "--head", type=click.Choice(["softmax", "sigmoid"]), default="softmax", show_default=True, help="With --random."
)
@click.option("--layers", type=click.IntRange(1), default=2, show_default=True, help="With --random.")
@click.option("--dim", type=click.IntRange(2), default=128, show_default=True, help="With --random.")
@click.option("--heads", type=click.IntRange(1), help="With --random.  [default: about one per 64 channels]")
@click.option(
    "--context",
    type=click.IntRange(1),
    default=128,
    show_default=True,
    help="With --random; with --from, where it shall be shorter than the checkpoint's.",
)
@click.option("--vocab", type=click.IntRange(1), default=2048, show_default=True, help="With --random.")
@click.option(
    "--gated-width",
    type=click.Choice(["matched", "full"]),
    default="matched",
    show_default=True,
    help="With --random: hidden width of gated forms.",
)
@click.option("--json", "as_json", is_flag=True, help="The manifests as one JSON document on standard output.")
@click.pass_context
def export(
    ctx: click.Context, /, checkpoints: tuple[Path, ...], out: Path, precision: Precision,
    corpus: tuple[Path, ...], flavor: Literal["ort", "portable"], source: str | None, name: str | None,
    random_weights: bool, activation: str | None, as_json: bool, **shape: Any,
) -> None:  # fmt: skip
    """Turn checkpoints into ONNX bundles that run in any onnxruntime.

    CHECKPOINTS are folders that `actuary train` wrote, or folders of them; --from reads a model of transformers'
    (GPT-2, Llama, Mistral, Qwen2, Qwen3; safetensors) instead. Each passes the parity gate against
    torch or is not written; a bundle that stood there stays until the new one is whole.

    \b
    Examples:
      actuary export artifacts/checkpoints
      actuary export artifacts/checkpoints/gelu --out /tmp/bundles --name gelu-mine
      actuary export --from ~/models/Qwen2-0.5B --context 1024
      actuary export --random --activation swiglu --layers 12 --dim 768 --heads 12 --context 1024 --vocab 50257
    """
    if sum((bool(checkpoints), random_weights, source is not None)) != 1:
        raise BadInput(
            "name the checkpoints to export, or give --from with one of transformers', or --random with a shape: one "
            "of the three; see actuary export --help"
        )
    if random_weights and not activation:
        raise BadInput("--random needs --activation; known ones: actuary list")
    given = [
        key for key in ("activation", *shape) if ctx.get_parameter_source(key) is click.core.ParameterSource.COMMANDLINE
    ]
    context = shape["context"] if source is not None and "context" in given else None
    if context is not None:
        given.remove("context")
    if given and not random_weights:
        raise BadInput(f"--{given[0].replace('_', '-')} goes with --random; a checkpoint brings its own")
    if corpus and (precision == "fp32" or random_weights):
        why = "random weights have nothing to lose" if random_weights else "fp32 loses nothing"
        raise BadInput(f"--corpus is the text on which int8, fp16 and bf16 are measured, and {why}; leave it out")
    with errors.status("loading torch"):
        from export import exporter
        from export.inspection import in_a_line
        from export.ops.library import DEFAULT_FOLDER
        from export.ops.trace import trace
        from models.activations import get
        from models.corpus import Corpus
        from models.files import check_writable
        from models.gpt import ActuaryConfig, default_heads

    sources: list[tuple[str, Path | None, Callable[[], Checkpoint]]]
    if random_weights:
        shape["heads"] = shape["heads"] or default_heads(shape["dim"])
        config = ActuaryConfig(activation=activation or "", vocab_size=shape.pop("vocab"), **shape)
        named = f"{config.name}-random" if name is None else name
        sources = [(named, None, functools.partial(_random, named, config))]
    elif source is not None:
        sources = [(source, Path(source), functools.partial(exporter.read_foreign, source, context))]
    else:
        folders = exporter.find_checkpoints(list(checkpoints))
        if name and len(folders) > 1:
            raise BadInput(f"--name {name} fits one bundle, but {len(folders)} checkpoints are named")
        exporter.check_names(folders)
        sources = [(str(folder), folder, functools.partial(exporter.read_checkpoint, folder)) for folder in folders]
    named_text = functools.partial(Corpus.read, corpus) if corpus else None
    check_writable(out)
    manifests, failures = [], []
    for label, origin, read in sources:  # one at a time: each may fill the memory
        try:
            default = origin.resolve().name if origin else label
            exporter.check_target(out, default if name is None else name, origin)
            with errors.status(f"exporting {label}"):
                folder, manifest = exporter.export_bundle(
                    read(), out, name, flavor=flavor, precision=precision, corpus=named_text
                )
        except ActuaryError as error:
            failures.append(error)
            continue
        manifests.append(manifest)
        errors.print(
            f"{folder}: {manifest.parameters:,} parameters, relative error of the logits "
            f"{manifest.parity.max_rel:.1e} against torch in float64 ({manifest.parity.bound:.1e} allowed)",
            highlight=False,
            soft_wrap=True,
        )
        if precision != "fp32" and not random_weights:
            errors.print(_loss(manifest), highlight=False, soft_wrap=True)
        errors.print(in_a_line(folder, manifest, DEFAULT_FOLDER), markup=False, highlight=False, soft_wrap=True)
        if outside := trace(get(manifest.activation)).outside:
            errors.print(_outside(manifest.activation, outside), highlight=False, soft_wrap=True)
    if as_json:
        click.echo(json.dumps([json.loads(manifest.to_json()) for manifest in manifests], indent=2))
    if failures:  # the rest is exported; bad input weighs more than a gate that refused
        worst = max(failures, key=lambda error: error.exit_code)
        raise type(worst)("; ".join(map(str, failures)))


def _loss(manifest: Manifest) -> str:
    quality = manifest.quality
    if quality is None:
        return f"what {manifest.precision} loses on text was not measured: name some with --corpus"
    return (
        f"{quality.bits_per_byte:.4f} bits per byte held out, {quality.fp32_bits_per_byte:.4f} in fp32; the loss "
        f"measured on {quality.tokens:,} tokens"
    )


def _outside(name: str, outside: str) -> str:
    return f"{name}: outside the compiler's vocabulary: {escape(outside)}; exported as standard operators by torch.onnx"


def _random(name: str, config: ActuaryConfig) -> Checkpoint:
    from export.exporter import random_checkpoint
    from models.corpus import Corpus

    return random_checkpoint(name, config, Corpus.read())


@click.command()
@click.argument("folder", metavar="BUNDLE", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option(
    "--provider",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Where to open it: auto is CUDA where it loads, else the CPU; cuda refuses what would fall to the CPU.",
)
@click.option(
    "--ops",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("artifacts/ops"),
    show_default=True,
    help="Folder of `actuary ops build`.",
)
@click.option("--json", "as_json", is_flag=True, help="Manifest and audit, node by node, as one JSON document.")
def inspect(folder: Path, provider: Literal["auto", "cpu", "cuda"], ops: Path, as_json: bool) -> None:
    """What is in a bundle, where its nodes run here, and one block as it was loaded.

    Its files are found to be the ones its manifest names; then it is opened as the service would open it.

    \b
    Examples:
      actuary inspect artifacts/bundles/gelu
      actuary inspect artifacts/bundles/gelu --ops /nowhere     # without the fused operators
    """
    from export.audit import check_placement
    from export.bundle import read_bundle
    from export.inspection import draw_block, inspect_bundle

    manifest = read_bundle(folder)
    found: Inspection | None = None
    refused: BadInput | None = None
    try:
        found = inspect_bundle(folder, manifest, provider, ops)
        if provider == "cuda":
            check_placement(found.audit)
    except BadInput as error:  # what is in it is told all the same
        refused = error
    if as_json:
        audit = {**found.audit.model_dump(mode="json"), "unfused": found.unfused} if found else None
        click.echo(json.dumps({**json.loads(manifest.to_json()), "audit": audit}, indent=2))
    else:
        console = Console()
        console.print(_described(folder, manifest, found))
        if found:
            console.print("\n" + draw_block(found, manifest), markup=False, highlight=False, soft_wrap=True)
    if refused:
        raise refused


def _described(folder: Path, manifest: Manifest, found: Inspection | None) -> Table:
    table = Table(box=None, show_header=False)
    table.add_column(style="bold")
    table.add_column()
    quality, measured = "not measured", manifest.quality
    if measured:
        quality = f"{measured.bits_per_byte:.3f} bits per byte held out, ECE {measured.ece:.3f}"
        if measured.fp32_bits_per_byte is not None:
            quality += f"; {measured.fp32_bits_per_byte:.3f} in float32 (loss over {measured.tokens:,} tokens)"
    rows = {
        "name": manifest.name,
        "family": manifest.family,
        "activation": f"{manifest.activation}: {manifest.formula} ({manifest.kind})",
        "paper": manifest.activation_info.paper,
        "head": manifest.head,
        "shape": f"{manifest.layers} layers, dim {manifest.dim}, {manifest.heads} heads, hidden {manifest.hidden}, "
        f"context {manifest.context}, vocabulary {manifest.vocab_size}",
        "parameters": f"{manifest.parameters:,}",
        "precision": f"{manifest.precision}, {manifest.flavor}, opset {manifest.opset}",
        "quality": quality,
        "parity": f"relative error {manifest.parity.max_rel:.1e} of {manifest.parity.bound:.1e} allowed; "
        + (
            f"{manifest.parity.noise:.2f} of the noise that rounding makes; "
            if manifest.parity.noise is not None
            else ""
        )
        + f"the activation alone {manifest.parity.activation:.2f} of its bound; "
        f"checked on: {', '.join(manifest.parity.verified)}",
        "created": f"{manifest.created.isoformat()} with {', '.join(f'{k} {v}' for k, v in manifest.versions.items())}",
        **{
            name: f"sha256 {digest[:16]}..., {(folder / name).stat().st_size:,} bytes"
            for name, digest in manifest.files.items()
        },
        **(_audited(found) if found else {}),
    }
    for key, value in rows.items():
        table.add_row(key, escape(value))
    return table


def _audited(found: Inspection) -> dict[str, str]:
    """Rows of the audit: how our operators run, and each provider's nodes by operator."""
    from export.audit import CUDA, RUNS

    audit = found.audit
    rows = {}
    for what, runs in (
        ("activation runs", audit.activation), ("attention runs", audit.attention), ("products run", audit.products),
    ):  # fmt: skip
        if runs:
            cpus = audit.provider == CUDA and what != "activation runs"
            why = "its kernel is the CPU's alone" if cpus else found.unfused
            rows[what] = f"{runs}: {RUNS[runs]}" + (f"; {why}" if runs == "inlined" and why else "")
    for provider, count in audit.counts.items():
        operators = Counter(
            f"{node.domain}::{node.op_type}" if node.domain else node.op_type
            for node in audit.nodes
            if node.provider == provider
        )
        rows[provider.removesuffix("ExecutionProvider") + " runs"] = f"{count} nodes: " + ", ".join(
            f"{name} {times}" for name, times in operators.most_common()
        )
    for n, note in enumerate(audit.notes):
        rows["note" + f" {n + 1}" * (len(audit.notes) > 1)] = note
    if found.foreseen:
        rows["on CUDA"] = f"refused: {found.foreseen}"
    return rows


@click.command()
@click.argument("activation")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
def explain(activation: str, as_json: bool) -> None:
    """One activation: formula, kind, paper, learned scalars, and its three forms: ONNX, C++, CUDA.

    \b
    Example: actuary explain swiglu
    """
    import onnx

    from export.catalogue import describe
    from export.graph_parts import STANDARD
    from export.ops.cpp_functor import cpp_functor
    from export.ops.onnx_function import onnx_function
    from export.ops.trace import trace
    from models.activations import get

    record = get(activation)
    info, expression = describe(record), trace(record)
    fused = expression.elementwise
    forms = {
        "onnx": onnx.printer.to_text(onnx_function(record.name, expression)),
        "cpp": cpp_functor(record.name, expression) if fused else None,
        "cuda": cpp_functor(record.name, expression, cuda=True) if fused else None,
    }
    if as_json:
        known = {
            **info.model_dump(exclude={"curve"}),
            "elementwise": fused,
            "fused": fused,
            "outside": expression.outside,
        }
        click.echo(json.dumps({**known, **forms}, indent=2))
        return
    console = Console(highlight=False)
    console.print(f"[bold]{info.name}[/]  {escape(info.formula)}", soft_wrap=True)
    console.print(f"{info.kind}; {escape(info.paper)}", soft_wrap=True)
    if info.learned:
        console.print("learned: " + ", ".join(f"{name}, starting at {start:g}" for name, start in info.learned.items()))
    if expression.outside:
        console.print(_outside(record.name, expression.outside), soft_wrap=True)
    elif fused:
        console.print("each element alone: one fused loop where `actuary ops build` was run, else the function inlined")
        if operator := STANDARD.get(record.name):
            console.print(f"where no bias is added to x first: ONNX's own {operator}, which is as fast (docs/log.md)")
    else:
        console.print("over the hidden axis: exported as standard operators, never fused; so no C++ and no CUDA form")
    for name, title in (("onnx", "ONNX function"), ("cpp", "C++ functor"), ("cuda", "CUDA functor")):
        if text := forms[name]:
            console.print(f"\n[bold]{title}[/]")
            console.print(text.rstrip(), markup=False, soft_wrap=True)


@click.command("list")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
def list_(as_json: bool) -> None:
    """Every activation of the registry: name, kind, formula, paper.

    \b
    Example: actuary list --json | jq -r '.[].name'
    """
    from export.catalogue import describe
    from models.activations import registry

    records = [describe(record) for record in registry().values()]
    if as_json:
        click.echo(json.dumps([record.model_dump(exclude={"curve"}) for record in records], indent=2))
        return
    table = Table(box=None, header_style="bold")
    for column in ("name", "kind", "formula", "paper"):
        table.add_column(column, no_wrap=column in ("name", "kind"))
    for record in records:
        table.add_row(record.name, record.kind, *map(escape, (record.formula, record.paper)))
    Console().print(table)
