"""What `make gpu-check` checks and measures, each part on a place that is given: CUDA, or the CPU for the tests.

    kernels   every fused kernel against float64, at the inputs and shapes of the CPU's tests
    speed     one activation: fused, unfused, torch eager and compiled, and a copy of its bytes
    models    whole bundles: logits against torch in float64, and latency

Ways of computing the same thing are visited in turn, in a fresh random order each round. A sample is as many calls as
fill AT_LEAST_S, started one after the other and waited for once at the end, so it holds what launching costs where that
is more than the device's own work.
"""

from __future__ import annotations

import itertools
import math
import time
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx import helper
from torch import Tensor

from actuary import GateFailed
from export import bundle, onnx_file
from export.audit import foreseen_on_cuda
from export.graph_parts import IR_VERSION
from export.ops import error_bound
from export.ops.check import (
    SHAPES,
    TYPES,
    WIDTH,
    check_special,
    one_node,
    open_session,
    probes,
    special_probes,
    typed,
    worst_ratio,
)
from export.ops.device import ON_CPU, Place, bound, run_once
from export.ops.gpu_report import in_a_line
from export.ops.library import Library
from export.ops.onnx_function import onnx_function
from export.ops.trace import trace
from models.activations import Activation

SHAPED = ("swiglu", "gelu", "swish")  # gated, pointwise, learned: with them every shape is tried, as on the CPU
Run = Callable[[], None]
Row = dict[str, Any]

AT_LEAST_S = 0.004
MOST_COPIES, MOST_BYTES = 16, 2**30  # of one activation in a run; more than any second-level cache, less than a device


# --- the kernels' numbers --------------------------------------------------------------------------------------------


def check_kernels(
    records: Sequence[Activation], library: Library, place: Place, types: Sequence[str] = tuple(TYPES)
) -> Iterator[Row]:
    """One row per activation and type: the worst |error| over its bound, and what missed, if anything."""
    for record, type in itertools.product(records, types):
        row: Row = {"activation": record.name, "type": type, "ratio": None, "failed": ""}
        try:
            row["ratio"] = round(_worst_of(record, type, library, place), 4)
        except GateFailed as missed:
            row["failed"] = str(missed)
        yield row


def _worst_of(record: Activation, type: str, library: Library, place: Place) -> float:
    what, rng, worst = f"the kernel on {place.provider} ({type})", np.random.default_rng(17), 0.0
    for biased in (False, True):
        model = one_node(record, None, biased, type)
        feeds = probes(record, rng, biased, type)
        got = run_once(model, feeds, (len(feeds["x"]), WIDTH), type, place, library)
        worst = max(worst, worst_ratio(record, feeds, got, error_bound.KERNEL, what, type))
    feeds = special_probes(record, type)
    got = run_once(one_node(record, None, False, type), feeds, (len(feeds["x"]), 1), type, place, library)
    check_special(record, feeds, got, what, type)
    if record.name not in SHAPED:
        return worst
    # Whole packs and single elements, rows that end inside a pack, a buffer that is not aligned, an empty one.
    for shape, offset, biased in [*itertools.product(SHAPES, (0,), (False, True)), ((4, 64), 1, True)]:
        width = shape[-1] * (2 if record.gated else 1)
        arrays = {"x": rng.normal(size=(*shape[:-1], width)), **({"bias": rng.normal(size=width)} if biased else {})}
        feeds = typed(arrays | {f"learned.{name}": [start] for name, start in record.learned.items()}, type)
        got = run_once(one_node(record, None, biased, type), feeds, shape, type, place, library, offset)
        if got.size:
            worst = max(worst, worst_ratio(record, feeds, got, error_bound.KERNEL, f"{what} at {shape}", type))
    return worst


# --- speed -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One activation of one type at one size."""

    activation: Activation
    type: str
    rows: int  # M
    hidden: int  # H

    @property
    def label(self) -> str:
        return f"{self.activation.name} {self.type} {self.rows} x {self.hidden}"

    @property
    def bytes_moved(self) -> int:
        """Read and written by one activation that keeps everything else to itself."""
        return self.rows * self.hidden * (3 if self.activation.gated else 2) * torch_type(self.type).itemsize


def torch_type(type: str) -> torch.dtype:
    found: torch.dtype = getattr(torch, type)
    return found


def measure_speed(case: Case, library: Library, place: Place, rounds: int, most_bytes: int = MOST_BYTES) -> Row:
    """Microseconds of one activation for each way, and its share of what a copy of the same bytes reaches.

    A run holds several independent ones, each on tensors of its own: together they outgrow the device's cache where
    sizes allow it, and what one run costs to start is shared, as it is in a model.
    """
    copies = max(1, min(MOST_COPIES, most_bytes // case.bytes_moved))
    ways, failed = _speed_ways(case, library, place, copies)
    samples = interleaved(ways, place, rounds)
    row: Row = {
        "activation": case.activation.name, "type": case.type, "rows": case.rows, "hidden": case.hidden,
        "copies": copies, "bytes": case.bytes_moved, "rounds": rounds, "failed": failed,
    }  # fmt: skip
    for way, seconds in samples.items():
        each = np.array(seconds) / copies
        low, middle, high = (float(value) for value in np.percentile(each, [25, 50, 75]))
        row[way] = {
            "us": round(1e6 * middle, 3),
            "quartiles_us": [round(1e6 * low, 3), round(1e6 * high, 3)],
            "gb_per_s": float(f"{case.bytes_moved / middle / 1e9:.4g}"),
        }
        if "copy" in samples:
            row[way]["share_of_copy"] = round(float(np.median(np.array(samples["copy"]) / np.array(seconds))), 4)
        if "unfused" in samples:
            row[way]["of_unfused"] = round(float(np.median(np.array(seconds) / np.array(samples["unfused"]))), 4)
    return row


def _speed_ways(case: Case, library: Library, place: Place, copies: int) -> tuple[dict[str, Run], dict[str, str]]:
    """The ways that run, and why others do not."""
    record, dtype = case.activation, torch_type(case.type)
    width = case.hidden * (2 if record.gated else 1)
    xs = [torch.randn(case.rows, width, device=place.device, dtype=dtype) for _ in range(copies)]
    ys = [torch.empty(case.rows, case.hidden, device=place.device, dtype=dtype) for _ in range(copies)]
    learned = {name: torch.tensor([start], device=place.device, dtype=dtype) for name, start in record.learned.items()}
    inputs = {f"x{i}": x for i, x in enumerate(xs)} | {f"learned.{name}": value for name, value in learned.items()}
    outputs = {f"y{i}": y for i, y in enumerate(ys)}
    model = _several(record, case.type, case.rows, case.hidden, copies)
    half = case.bytes_moved // 2
    sources, targets = (
        [torch.zeros(half, dtype=torch.uint8, device=place.device) for _ in range(copies)] for _ in range(2)
    )

    def together(xs: list[Tensor]) -> list[Tensor]:
        return [record(x, **learned) for x in xs]

    def session(fused: Library | None) -> Run:
        return bound(open_session(model, fused, place.provider, strict=place != ON_CPU), inputs, outputs)

    def torch_run(function: Callable[[list[Tensor]], list[Tensor]]) -> Run:
        def run() -> None:
            with torch.inference_mode():
                function(xs)

        return run

    def copy() -> None:
        for source, target in zip(sources, targets, strict=True):
            target.copy_(source)

    torch._dynamo.reset()  # past eight shapes it would run eagerly without a word
    makers: dict[str, Callable[[], Run]] = {
        "fused": lambda: session(library),
        "unfused": lambda: session(None),
        "eager": lambda: torch_run(together),
        "compiled": lambda: torch_run(torch.compile(together, fullgraph=True, dynamic=False)),
        "copy": lambda: copy,
    }
    return made_and_run(makers, place)


def made_and_run(makers: dict[str, Callable[[], Run]], place: Place) -> tuple[dict[str, Run], dict[str, str]]:
    """The ways that could be made and run once, and why others could not."""
    ways: dict[str, Run] = {}
    failed: dict[str, str] = {}
    for way, make in makers.items():
        try:
            run = make()
            run()
            place.synchronize()
            ways[way] = run
        except Exception as error:  # a type without a kernel, a compiler that is not there: anything, and worth a line
            failed[way] = in_a_line(error)
    return ways, failed


def _several(record: Activation, type: str, rows: int, hidden: int, copies: int) -> bytes:
    """`copies` nodes of the activation side by side: x0 -> y0, x1 -> y1, ..."""
    width, element = hidden * (2 if record.gated else 1), TYPES[type]
    scalars = [f"learned.{name}" for name in record.learned]
    graph = helper.make_graph(
        [helper.make_node(record.name, [f"x{i}", *scalars], [f"y{i}"], domain=bundle.DOMAIN) for i in range(copies)],
        "speed",
        [helper.make_tensor_value_info(f"x{i}", element, [rows, width]) for i in range(copies)]
        + [helper.make_tensor_value_info(name, element, [1]) for name in scalars],
        [helper.make_tensor_value_info(f"y{i}", element, [rows, hidden]) for i in range(copies)],
    )
    model = helper.make_model(
        graph,
        functions=[onnx_function(record.name, trace(record))],
        opset_imports=[helper.make_opsetid("", bundle.OPSET), helper.make_opsetid(bundle.DOMAIN, 1)],
        ir_version=IR_VERSION,
    )
    return bytes(model.SerializeToString())


def interleaved(ways: dict[str, Run], place: Place, rounds: int) -> dict[str, list[float]]:
    """Seconds of one run of each way, `rounds` samples."""
    calls = {way: max(1, math.ceil(AT_LEAST_S / max(_sample(run, 3, place), 1e-7))) for way, run in ways.items()}
    samples: dict[str, list[float]] = {way: [] for way in ways}
    rng, names = np.random.default_rng(0), list(ways)
    for _ in range(rounds):
        for i in rng.permutation(len(names)):
            samples[names[i]].append(_sample(ways[names[i]], calls[names[i]], place))
    return samples


def _sample(run: Run, calls: int, place: Place) -> float:
    place.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    place.synchronize()
    return (time.perf_counter() - start) / calls


# --- whole models ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelCase:
    """A model of random weights, and how it is exported."""

    label: str
    shape: dict[str, Any]
    activation: str
    precision: str  # of export.exporter
    flavor: str


TORCH_TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def measure_model(
    case: ModelCase, library: Library, place: Place, folder: Path, batches: Sequence[int], tokens: int, rounds: int
) -> Row:
    """Exports the model, holds its logits on the device to torch's in float64, and times it beside torch."""
    from export import exporter
    from models.corpus import Corpus
    from models.gpt import ActuaryConfig

    row: Row = {
        "model": case.label, "activation": case.activation, "precision": case.precision, "flavor": case.flavor,
        "failed": {}, "skipped": "", "latency": [],
    }  # fmt: skip
    if case.precision not in typing.get_args(exporter.Precision):
        return row | {"skipped": f"export has no precision {case.precision}"}
    corpus = Corpus.read()
    config = ActuaryConfig(activation=case.activation, **case.shape)
    made = exporter.random_checkpoint(case.label, config, corpus)
    precision: Any = case.precision
    flavor: Any = case.flavor
    path, manifest = exporter.export_bundle(
        made, folder, f"{case.label}-{case.precision}-{case.flavor}", seed=0, flavor=flavor, precision=precision
    )
    file = str(path / bundle.MODEL)
    # It would run, and its figures be those of a graph that visits the CPU.
    if place != ON_CPU and (why := foreseen_on_cuda(onnx_file.read(path / bundle.MODEL), case.precision)):
        return row | {"skipped": why}
    reason = library.why_not(case.activation, manifest.activation_info.digest, cuda=place != ON_CPU)
    if reason:
        raise GateFailed(f"the fused operators do not serve the bundle just exported: {reason}")
    row |= {"bound": manifest.parity.bound, "parameters": manifest.parameters}
    model: Any = made.model
    ids = {batch: _ids(config.vocab_size, batch, tokens) for batch in batches}
    exact = {batch: _logits(model.double(), ids[batch]).cpu() for batch in batches}
    # Products in float32 throughout, where the device would round their inputs to 10 bits (TF32).
    exactly = {"use_tf32": "0"} if place != ON_CPU else {}
    for name, fused in (("fused", library), ("unfused", None)):
        try:
            worst = max(_parity(file, fused, place, exactly, ids[batch], exact[batch]) for batch in batches)
            row[f"max_rel_{name}"] = worst
            if not worst <= manifest.parity.bound:
                row["failed"][name] = f"relative error {worst:.2g} of the logits, allowed {manifest.parity.bound:.2g}"
        except Exception as error:  # of ONNX Runtime, of torch: the other way may still run
            row["failed"][name] = in_a_line(error)
    model = model.to(place.device, TORCH_TYPES[case.precision])
    for batch in batches:
        row["latency"].append(
            {"batch": batch, "tokens": tokens} | _latency(file, library, place, exactly, ids[batch], model, rounds)
        )
    for latency in row["latency"]:
        row["failed"] |= {f"{way}, batch {latency['batch']}": why for way, why in latency.pop("failed").items()}
    return row


def _ids(vocab: int, batch: int, tokens: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(1).integers(0, vocab, size=(batch, tokens)))


def _logits(model: Any, ids: Tensor) -> Tensor:
    """[B, V], at the last position."""
    with torch.inference_mode():
        found: Tensor = model(ids, logits_to_keep=1).logits[:, -1]
    return found


def _bound_model(
    file: str, fused: Library | None, place: Place, settings: dict[str, str], ids: Tensor
) -> tuple[Run, Tensor]:
    """A run of the bundle on the device, and the logits [B, V] that it writes."""
    session = open_session(file, fused, place.provider, settings)
    vocab = next(output for output in session.get_outputs() if output.name == bundle.LOGITS).shape[-1]
    assert isinstance(vocab, int), "a bundle's vocabulary is part of its graph"
    logits = torch.zeros(len(ids), vocab, device=place.device)
    inputs = {
        bundle.INPUT_IDS: ids.to(place.device),
        bundle.LENGTHS: torch.full((len(ids),), ids.shape[1], device=place.device),
        bundle.TOP_K: torch.ones(1, dtype=torch.int64),
    }
    place.synchronize()
    return bound(session, inputs, {bundle.LOGITS: logits}), logits


def _parity(
    file: str, fused: Library | None, place: Place, settings: dict[str, str], ids: Tensor, exact: Tensor
) -> float:
    """The largest |error| of a logit over its row's largest |logit|."""
    run, logits = _bound_model(file, fused, place, settings, ids)
    run()
    place.synchronize()
    error = (logits.cpu().double() - exact).abs().amax(-1) / exact.abs().amax(-1)
    return float(error.max())


def _latency(
    file: str, library: Library, place: Place, settings: dict[str, str], ids: Tensor, model: Any, rounds: int
) -> Row:
    """Milliseconds of one answer for each way; float32 products in full everywhere, as torch has them by itself."""
    on_device = ids.to(place.device)
    torch._dynamo.reset()
    makers: dict[str, Callable[[], Run]] = {
        "fused": lambda: _bound_model(file, library, place, settings, ids)[0],
        "unfused": lambda: _bound_model(file, None, place, settings, ids)[0],
        "eager": lambda: _torch_run(model, on_device),
        "compiled": lambda: _torch_run(torch.compile(model, dynamic=False), on_device),
    }
    ways, failed = made_and_run(makers, place)
    row: Row = {"failed": failed}
    for way, seconds in interleaved(ways, place, rounds).items():
        low, middle, high = (1e3 * float(value) for value in np.percentile(seconds, [25, 50, 75]))
        row[way] = {"ms": round(middle, 4), "quartiles_ms": [round(low, 4), round(high, 4)]}
    return row


def _torch_run(model: Any, ids: Tensor) -> Run:
    def run() -> None:
        _logits(model, ids)

    return run
