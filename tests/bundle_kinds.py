"""A bundle of each kind, which the tests of what becomes of bundles share, and what is done to copies of them."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from conftest import TINY
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from export import bundle, onnx_file
from export.audit import CPU, CUDA, Assigned
from export.bundle import read_manifest
from export.exporter import Checkpoint, export_bundle
from export.graph import build
from export.inspection import Inspection, inspect_bundle
from export.ops import library

NOWHERE = Path("/nowhere")  # no fused operators are there


def write_kinds(out: Path, tiny_checkpoint: Callable) -> None:
    """Both flavours, float32 as it was before the cache, int8, an activation over the hidden axis, one layer, other
    families."""
    for flavor in ("ort", "portable"):
        export_bundle(tiny_checkpoint("swiglu"), out, f"swiglu-{flavor}", flavor=flavor)
    for precision in ("int8", "fp16", "bf16"):
        export_bundle(tiny_checkpoint("swiglu"), out, f"swiglu-{precision}", precision=precision)
    export_bundle(tiny_checkpoint("solu"), out, "solu")
    export_bundle(tiny_checkpoint("mish", layers=1), out, "one-layer")
    for name, before, made in (
        ("swiglu-ort", "swiglu-before", tiny_checkpoint("swiglu")),
        ("one-layer", "one-before", tiny_checkpoint("mish", layers=1)),
    ):
        uncached = build(made.decoder, "ort")
        changed(out / name, out / before, lambda model, to=uncached: model.CopyFrom(to), name=before)
    shape = {"vocab_size": TINY["vocab_size"], "bos_token_id": 0, "eos_token_id": 0}
    llama = LlamaForCausalLM(
        LlamaConfig(
            **shape, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=32,
        )
    )  # fmt: skip
    gpt2 = GPT2LMHeadModel(GPT2Config(**shape, n_positions=32, n_embd=32, n_layer=2, n_head=2))
    for name, model in (("llama", llama), ("gpt2", gpt2)):
        tokenizer = tiny_checkpoint("gelu").tokenizer_json
        export_bundle(Checkpoint(name, model.eval(), tokenizer, quality=None), out)


KINDS = (
    "swiglu-ort", "swiglu-portable", "swiglu-before", "swiglu-int8", "swiglu-fp16", "solu", "one-layer", "one-before",
    "llama", "gpt2",
)  # fmt: skip
CACHED = {"swiglu-ort", "swiglu-int8", "solu", "one-layer", "llama", "gpt2"}


def inspected(folder: Path, ops: Path = NOWHERE, loaded: bool = True) -> Inspection:
    return inspect_bundle(folder, read_manifest(folder), "cpu", ops, loaded)


def changed(folder: Path, to: Path, change: Callable[[onnx.ModelProto], object] = id, **manifest: object) -> Path:
    """A copy of the bundle with another graph or manifest, signed as by somebody who knows how."""
    shutil.copytree(folder, to)
    model = onnx.load(to / bundle.MODEL)
    change(model)
    onnx.save(model, to / bundle.MODEL)
    stated = json.loads((to / bundle.MANIFEST).read_text())
    stated["files"][bundle.MODEL] = hashlib.sha256((to / bundle.MODEL).read_bytes()).hexdigest()
    (to / bundle.MANIFEST).write_text(json.dumps({**stated, **manifest}))
    return to


def of_opset(version: int, domain: str = "") -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        next(entry for entry in model.opset_import if entry.domain == domain).version = version

    return change


def of_ir_version(version: int) -> Callable[[onnx.ModelProto], None]:
    return lambda model: setattr(model, "ir_version", version)


def standard(model: onnx.ModelProto) -> None:
    """The activation as one standard operator, as the exporter may write one that is faster."""
    for node in model.graph.node:
        if node.domain == bundle.DOMAIN and node.op_type not in bundle.STRUCTURAL:
            node.domain, node.op_type = "", "Relu"
    for function in list(model.functions):
        if function.name not in bundle.STRUCTURAL:
            model.functions.remove(function)


def profiled(path: Path, ops: Path | None = None, optimized: bool = True) -> list[dict[str, Any]]:
    """What a run of the model says of each node that ran."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.enable_profiling = True
    options.profile_file_prefix = str(path.parent / "profile")
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if ops:
        library.register(options, library.find(ops))
    session = onnxruntime.InferenceSession(path, options, providers=[CPU])
    ids = np.array([[1, 2, 3], [4, 5, 0]])
    session.run(None, {bundle.INPUT_IDS: ids, bundle.LENGTHS: np.array([3, 2]), bundle.TOP_K: np.array([2])})
    written = Path(session.end_profiling())
    events = json.loads(written.read_text())
    written.unlink()
    return [event for event in events if event["cat"] == "Node" and event["name"].endswith("_kernel_time")]


def placed(file: onnx_file.OnnxFile, on_cpu: Callable[[onnx_file.Node], bool]) -> list[Assigned]:
    """An assignment as a CUDA session would have it."""
    return [Assigned(n.name, n.domain, n.op_type, CPU if on_cpu(n) else CUDA) for n in file.nodes]
