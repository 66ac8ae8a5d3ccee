"""Where a bundle's time goes, by ONNX Runtime's own profile: each node's time, summed to the parts of the model.

    session with enable_profiling -> runs of one prompt -> its file of events -> ms of each part, shares of the whole

Called by `actuary inspect --profile`. A node belongs to the part whose weights it reads or stands between
(export/wiring.py). Profiling costs a node about a microsecond; times are whole microseconds.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any, get_args

import numpy as np
from pydantic import BaseModel, ConfigDict

from actuary import BadInput
from export import bundle, onnx_file
from export.audit import CPU, check_file, check_precision
from export.bundle import Manifest
from export.inspection import fitting, open_session
from export.onnx_file import OnnxFile
from export.wiring import Part, Wiring

WARM_UP = 3
MOST_RUNS, LEAST_RUNS, MOST_S = 50, 5, 10.0  # 124M parameters take 0.1 s a run
TOP_K = 10
DEFAULT_TOKENS = 64
FFN: tuple[Part, ...] = ("up", "activation", "down")


class Profile(BaseModel):
    """The middle of `runs` runs of one prompt."""

    model_config = ConfigDict(frozen=True)

    tokens: int
    runs: int
    threads: int
    total_ms: float  # of all nodes
    ms: dict[str, float]  # ffn, attention, head and other are the whole; up, activation and down are ffn
    share: dict[str, float]  # the same of total_ms


def profile_bundle(folder: Path, manifest: Manifest, ops: Path, tokens: int, threads: int = 1) -> Profile:
    """On the CPU, with the operators that the service would have, and without a cache of earlier tokens."""
    if not 1 <= tokens <= manifest.context:
        raise BadInput(f"--tokens {tokens}: {manifest.name!r} takes prompts of 1 to {manifest.context} tokens")
    check_file(onnx_file.read(folder / bundle.MODEL), manifest.opset)
    check_precision(manifest.precision, CPU)
    fits, _ = fitting(manifest, CPU, ops)
    with tempfile.TemporaryDirectory() as scratch:
        saved = Path(scratch) / bundle.MODEL
        session = open_session(folder / bundle.MODEL, CPU, fits, saved, Path(scratch) / "profile", threads)
        graph = onnx_file.read(saved)
        runs = _run(session, manifest, tokens)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    parts = Wiring(graph).parts(manifest.layers)
    if parts is None:
        raise BadInput(f"{folder} cannot be split into parts: its weights are called or joined as in no model of ours")
    return summed(events, graph, parts, runs, tokens, threads)


def _run(session: Any, manifest: Manifest, tokens: int) -> int:
    """How many runs are to be counted."""
    ids = np.random.default_rng(0).integers(manifest.vocab_size, size=(1, tokens))
    feeds = {
        bundle.INPUT_IDS: ids,
        bundle.LENGTHS: np.array([tokens]),
        bundle.TOP_K: np.array([min(TOP_K, manifest.vocab_size)]),
    }
    for _ in range(WARM_UP):
        session.run(None, feeds)
    start = perf_counter()
    for run in range(1, MOST_RUNS + 1):
        session.run(None, feeds)
        if run >= LEAST_RUNS and perf_counter() - start > MOST_S:
            break
    return run


def summed(
    events: list[dict[str, Any]], graph: OnnxFile, parts: list[Part], runs: int, tokens: int, threads: int
) -> Profile:
    """The last `runs` runs of a profile's events; each has one event of each node, in the order of `graph`."""
    timed = sorted(
        (event for event in events if event["cat"] == "Node" and event["name"].endswith("_kernel_time")),
        key=lambda event: float(event["ts"]),
    )
    size = len(graph.nodes)
    if len(timed) != (runs + WARM_UP) * size:
        raise BadInput(f"onnxruntime's profile has {len(timed)} times of {size} nodes in {runs + WARM_UP} runs")
    us = np.array([event["dur"] for event in timed[WARM_UP * size :]], dtype=np.float64).reshape(runs, size)
    for event, node in zip(timed[-size:], graph.nodes, strict=True):
        if event["args"]["op_name"] != node.op_type:
            raise BadInput(f"onnxruntime ran {event['name']} where its graph has {node.op_type} {node.name!r}")
    # The middle half of each node's times: another process may take the core in any run, and always does in some.
    middle = np.sort(us, axis=0)[runs // 4 : runs - runs // 4].mean(axis=0) / 1000
    ms = {part: float(middle[[each == part for each in parts]].sum()) for part in get_args(Part)}
    total_ms = float(middle.sum())
    ms["ffn"] = sum(ms[part] for part in FFN)
    return Profile(
        tokens=tokens,
        runs=runs,
        threads=threads,
        total_ms=round(total_ms, 4),
        ms={name: round(value, 4) for name, value in ms.items()},
        share={name: round(value / total_ms, 4) for name, value in ms.items()},
    )
