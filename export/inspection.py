"""Opens a bundle as the service would, audits it, and draws one block from the nodes that it then has.

Called by `actuary inspect`. ONNX Runtime saves the graph as it stands after inlining and fusing; the block is what
lies, in that graph, between the weights called `blocks.0.`.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
import textwrap
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import onnxruntime

from actuary import BadInput
from export import bundle, onnx_file
from export.audit import CPU, CUDA, RECORD, Audit, audit, cannot_run, check_file, check_precision, foreseen_on_cuda
from export.bundle import Manifest
from export.onnx_file import OnnxFile
from export.ops import library
from export.ops.library import Library
from export.wiring import Wiring, plain

FATAL = 4  # what goes wrong is raised and reported by us
WIDTH = 100  # columns of the drawing
NO_BLOCK = "no block drawn: no weights are called blocks.0.*, or they are joined as in no model of ours"
NO_BREAK = "\N{NO-BREAK SPACE}"


@dataclass(frozen=True)
class Inspection:
    audit: Audit
    graph: OnnxFile  # as loaded, its nodes the audit's in their order; the file's where that was not asked for
    unfused: str  # why no kernel of ours runs; empty where one may
    foreseen: str  # where it runs on the CPU: what would keep it from CUDA; empty where nothing is known to


def inspect_bundle(
    folder: Path, manifest: Manifest, provider: Literal["auto", "cpu", "cuda"], ops: Path, loaded: bool = True
) -> Inspection:
    """BadInput where the runtime here cannot run it; what fell to the CPU is for the caller to judge.

    Args:
        ops: folder of the fused operators; there may be none.
        loaded: with the graph as it stands after loading, which takes a copy of the weights on disk; without, its
            nodes are those before ONNX Runtime's last fusions.
    """
    file = onnx_file.read(folder / bundle.MODEL)
    check_file(file, manifest.opset)
    if provider != "cpu":
        try:
            return _in_session(folder, manifest, file, CUDA, ops, loaded)
        except BadInput:
            if provider == "cuda":
                raise
    return _in_session(folder, manifest, file, CPU, ops, loaded)


def _in_session(folder: Path, manifest: Manifest, file: OnnxFile, provider: str, ops: Path, loaded: bool) -> Inspection:
    check_precision(manifest.precision, provider)
    if provider == CUDA:
        _preload()
    fits, unfused = fitting(manifest, provider, ops)
    with tempfile.TemporaryDirectory() as scratch:
        saved = Path(scratch) / bundle.MODEL if loaded else None
        session = open_session(folder / bundle.MODEL, provider, fits, saved)
        graph = onnx_file.read(saved) if saved else None
    found = audit(session, file, manifest.precision, graph)
    foreseen = foreseen_on_cuda(file, manifest.precision) if provider == CPU else ""
    return Inspection(found, graph or file, unfused, foreseen)


def fitting(manifest: Manifest, provider: str, ops: Path) -> tuple[Library | None, str]:
    """The fused operators that a session of the bundle takes; and why its activation has no kernel of ours there."""
    built, info, cuda = library.find(ops), manifest.activation_info, provider == CUDA
    if not built:
        return None, f"there are no fused operators in {ops}"
    fits = built if built.fits(info.name, info.digest, cuda=cuda) else None
    return fits, built.why_not(info.name, info.digest, cuda=cuda)


def _preload() -> None:
    """CUDA's libraries out of site-packages, where there are any."""
    onnxruntime.set_default_logger_severity(FATAL)
    if CUDA not in onnxruntime.get_available_providers():
        raise BadInput("--provider cuda: this onnxruntime was built without CUDA; use --provider cpu")
    with contextlib.redirect_stdout(io.StringIO()):  # it says where it looked; the session, whether it found
        onnxruntime.preload_dlls()


def open_session(
    path: Path, provider: str, ops: Library | None, saved: Path | None, profile: Path | None = None, threads: int = 0
) -> Any:
    """A session of `path` that wrote its graph to `saved`, with the weights in a file beside it.

    Args:
        profile: how the file of times begins that it writes once its profiling ends; None: it takes none.
        threads: of the session; 0: one for each core.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = FATAL
    options.intra_op_num_threads = threads
    if profile:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    options.add_session_config_entry(RECORD, "1")
    if saved:
        options.optimized_model_filepath = str(saved)
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights")
        options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
    if ops:
        library.register(options, ops, cuda=provider == CUDA)
    providers = [provider] if provider == CPU else [provider, CPU]
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=providers, enable_fallback=0)
    except Exception as error:  # onnxruntime raises its own classes, without a public base
        raise BadInput(f"onnxruntime does not open {path} with {provider}: {error}; export it again") from error
    if session.get_providers()[0] != provider:
        raise BadInput(
            "--provider cuda: CUDA does not run here; check the driver with nvidia-smi, or use --provider cpu"
        )
    return session


def in_a_line(folder: Path, manifest: Manifest, ops: Path) -> str:
    """What `actuary export` says of a bundle that it wrote: where its nodes run here, and what is known of CUDA."""
    if why := cannot_run(manifest.precision, CPU):
        where = "on CUDA" if "cuda" in manifest.parity.verified else "by emulation"
        return f"not run here: {why.partition(';')[0]}; checked {where}"
    try:
        found = inspect_bundle(folder, manifest, "cpu", ops, loaded=False)
    except BadInput as error:
        return f"not opened here: {error}"
    why = f" ({found.unfused})" if found.audit.activation == "inlined" else ""
    said = f"{len(found.audit.nodes)} nodes on the CPU, {manifest.activation} {found.audit.activation}{why}"
    cuda = "refused, and actuary inspect says why" if found.foreseen else "not tried, nothing known against it"
    return "; ".join([said, *found.audit.notes, f"on CUDA: {cuda}"])


def draw_block(found: Inspection, manifest: Manifest) -> str:
    """Block 0 as it was loaded, top to bottom, the residual stream on the left; or why there is none."""
    g = Wiring(found.graph)
    at = "blocks.0."
    norm1, norm2, up = (g.reading(f"{at}{role}.") for role in ("attention_norm", "ffn_norm", "up"))
    end = g.reading("blocks.1.attention_norm.") or g.reading("norm.")
    qkv = g.reading(f"{at}qkv.", f"{at}q.", f"{at}kv.")
    # A norm that adds may take the bias of the product before it too.
    out, down = g.reading(f"{at}out.") - norm2, g.reading(f"{at}down.") - end
    if not all((norm1, qkv, out, norm2, up, down, end)):
        return NO_BLOCK
    try:
        (add1, x), (add2, _) = g.meeting(out, norm2), g.meeting(down, end)
    except KeyError:
        return NO_BLOCK
    act = g.between(up, down)
    runs = found.audit.activation
    where = {
        "attention_norm": norm1 | g.between([g.makers[x]], norm1),
        "qkv": qkv,
        "attention": g.between(norm1, out) - qkv,
        "out": out | g.between(out, [add1]),
        "+": {add1},
        "ffn_norm": norm2 | g.between([add1], norm2),
        "up": up | g.between(norm2, up),
        manifest.activation: act,
        "down": down | g.between(down, [add2]),
        "+ ": {add2},
    }
    texts = {label: _operators(found.graph, nodes, at) for label, nodes in where.items()}
    texts[manifest.activation] = f"{runs}: {texts[manifest.activation] or 'within ' + texts['up']}"
    if norm2 <= up:
        texts["ffn_norm"] = "within up's operator"
    for label, add, operators in (
        ("+", add1, {"out": out, "ffn_norm": norm2}),
        ("+ ", add2, {"down": down, "the next norm": end}),
    ):
        for name, nodes in operators.items():
            if add in nodes:
                texts[label] = f"within {name}'s operator"
    cached, last = bundle.PAST in found.graph.weights, manifest.layers == 1
    stream = "N" if cached else "B, T"
    answered = ("B + E" if cached else "B") if last else stream  # the last block goes on with the rows that are asked
    width = max(map(len, where))
    room = WIDTH - len("  |   |     ") - width - len("  CPU+CUDA")
    lines = [f"block 0 of {manifest.layers} as it was loaded", "", f"      x [{stream}, {manifest.dim}]"]
    for label, nodes in where.items():
        if label in ("attention_norm", "ffn_norm"):
            lines.append("  .---|")
        left = "  '-> +" if label.strip() == "+" else "  |   |"
        places = {found.audit.nodes[i].provider.removesuffix("ExecutionProvider") for i in nodes}
        shown = "" if label.strip() == "+" else label
        place = "+".join(sorted(places))
        for text in textwrap.wrap(texts[label], room):
            lines.append(f"{left}   {shown:<{width}}  {text.replace(NO_BREAK, ' '):<{room}}  {place}".rstrip())
            left, shown, place = "  |   |", "", ""
    return "\n".join([*lines, f"      x [{answered}, {manifest.dim}]"])


def _operators(graph: OnnxFile, nodes: Iterable[int], at: str) -> str:
    """Their operators in order, "Reshape x3, MatMul [32x96]": how often, and the shape of a matrix of the block."""
    count: Counter[str] = Counter()
    for i in sorted(nodes):
        node = graph.nodes[i]
        read = [graph.weights.get(name, ()) for name in node.inputs if plain(name).startswith(at)]
        matrices = [dims for dims in read if len(dims) == 2]
        matrices += [(4 * panels[1], step[0]) for panels, step in pairwise(read) if len(panels) == 4]  # Int8Linear's
        shape = next((f"{NO_BREAK}[{rows}x{columns}]" for rows, columns in matrices), "")
        count[(f"{node.domain}::" if node.domain == bundle.DOMAIN else "") + node.op_type + shape] += 1
    return ", ".join(name if times == 1 else f"{name}{NO_BREAK}x{times}" for name, times in count.items())
