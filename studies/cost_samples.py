"""Measures what activations cost, alone, in their feed-forward block and in a whole model; the samples of export/bench.

Passes over all cases, each in a fresh random order, with a few rounds each: whatever else the machine does meets every
activation, and the medians that are compared come from the same minutes. All runs on one thread, and what is counted is
that thread's own time: by the wall's clock, beside five other programs on two cores, quartiles stood a factor of ten
apart.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from actuary import ActuaryError, BadInput
from export import bench
from export.bench import EXPANSION, MODEL, Case, Way
from export.ops import library as ops
from export.ops.build import build
from export.ops.device import Place
from export.ops.gpu_measure import interleaved
from export.ops.library import Library
from models.activations import Activation
from models.gpt import ActuaryConfig
from studies.perceptron import one_thread
from studies.roofline import Rates, measure_rates

Where = Literal["alone", "ffn", "model", "alone wide", "ffn wide"]
WIDE = 3072  # H of GPT-2's smallest model, C = 768
BUILT = Path("artifacts/ops")
THREADS = 1
CLOCK = time.thread_time
WAYS: tuple[Way, ...] = ("fused", "unfused", "torch")
PLACES: dict[Where, tuple[Where, str]] = {  # a block or a model -> the activation alone at its size, and how it reads
    "ffn": ("alone", f"block, C = {MODEL['dim']}"),
    "ffn wide": ("alone wide", f"block, C = {WIDE // EXPANSION}"),
    "model": ("alone", "whole model"),
}


@dataclass(frozen=True)
class Spread:
    """Nanoseconds per hidden element over all samples."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        return cls(*(float(value) for value in np.percentile(samples, [25, 50, 75])))


# Of one activation: place -> way -> figures.
Cost = dict[Where, dict[Way, Spread]]


def cases(record: Activation, wide: int = WIDE) -> dict[Where, Case]:
    """Alone and in its block at the default model's width and at a wide one, and in the default model."""
    rows, hidden = MODEL["context"], ActuaryConfig(activation=record.name, **MODEL).hidden
    return {
        "alone": Case("alone", record.name, rows, hidden),
        "ffn": Case("ffn", record.name, rows, hidden),
        "model": Case("model", record.name, rows, hidden),
        "alone wide": Case("alone", record.name, rows, wide),
        "ffn wide": Case("ffn", record.name, rows, wide),
    }


def measure(
    records: Mapping[str, Activation],
    library: Library | None,
    passes: int,
    rounds: int,
    report: Callable[[str, float], None],
    wide: int = WIDE,
) -> tuple[dict[str, Cost], Rates]:
    """Every activation's cost, and the machine's rates beside them, from `passes` times `rounds` samples of each."""
    work = [(record, where, case) for record in records.values() for where, case in cases(record, wide).items()]
    samples: dict[tuple[str, Where], dict[Way, list[float]]] = {}
    rates = Rates(0, 0, 0)
    rng = np.random.default_rng(0)
    with one_thread():  # THREADS, and those of before for what runs after
        for nth in range(passes):
            rates = rates.best(measure_rates(THREADS, rounds, 8 * MODEL["context"] * 4 * MODEL["dim"], CLOCK))
            for done, at in enumerate(rng.permutation(len(work))):
                record, where, case = work[at]
                report(f"pass {nth + 1} of {passes}: {case.label}", (nth + done / len(work)) / passes)
                of = samples.setdefault((record.name, where), {})
                for way, values in bench.measure(record, case, library, THREADS, rounds, CLOCK).samples.items():
                    of.setdefault(way, []).extend(values)
    costs: dict[str, Cost] = {name: {} for name in records}
    for (name, where), ways in samples.items():
        costs[name][where] = {way: Spread.of(values) for way, values in ways.items()}
    return costs, rates


def fused_library(kept: Path, built: Path = BUILT) -> tuple[Library | None, str]:
    """The fused operators, and where they are from: those that were built, else built here, else none and why."""
    found = ops.find(built)
    if found is not None:
        return found, f"{found.compiler}, {ops.running_isa(found)}"
    try:
        found, _ = build(kept / "ops", cuda=False)
    except (BadInput, ActuaryError) as error:
        return None, f"none, so all is unfused: {error}"
    return found, f"{found.compiler}, {ops.running_isa(found)}"


def served(ways: Mapping[Way, Spread]) -> Way:
    """How it is served: fused where there is a kernel."""
    return "fused" if "fused" in ways else "unfused"


def share(cost: Cost, where: Where, way: Way) -> float:
    """Of the block's or the model's time, what the activation takes alone at the same size and in the same way."""
    return cost[PLACES[where][0]][way].median / cost[where][way].median


# --- a GPU -----------------------------------------------------------------------------------------------------------


def void(_: Tensor) -> None:
    pass


@dataclass(frozen=True)
class DeviceCost:
    """One activation on a device, torch eager in half precision: nanoseconds per hidden element.

    Args:
        ffn: of its block, C = hidden / 4.
    """

    alone: Spread
    ffn: Spread


@dataclass(frozen=True)
class DeviceRates:
    tflop_per_s: float  # of a product in half precision
    gb_per_s: float  # of a copy, read and written
    exp_per_s: float  # 1e12 elements of torch.exp a second, in half precision


def measure_device(
    records: Mapping[str, Activation],
    place: Place,
    rounds: int,
    report: Callable[[str, float], None],
    rows: int = 8192,
    hidden: int = 4 * 4096,
    dtype: torch.dtype = torch.float16,
) -> tuple[dict[str, DeviceCost], DeviceRates]:
    """The same on a device that torch sees, at sizes that fill it."""
    of: Any = {"device": place.device, "dtype": dtype}
    C = hidden // EXPANSION
    costs: dict[str, DeviceCost] = {}
    with torch.inference_mode():
        for done, record in enumerate(records.values()):
            report(f"{record.name} on {place.device}", done / len(records))
            width = hidden * (2 if record.gated else 1)
            x, up, down = torch.randn(rows, C, **of), torch.randn(C, width, **of), torch.randn(hidden, C, **of)
            projected = torch.randn(rows, width, **of)
            learned = {name: torch.tensor([start], **of) for name, start in record.learned.items()}

            def alone(record: Activation = record, projected: Any = projected, learned: Any = learned) -> None:
                record(projected, **learned)

            def block(
                record: Activation = record, x: Any = x, up: Any = up, down: Any = down, learned: Any = learned
            ) -> None:
                record(x @ up, **learned) @ down

            found = interleaved({"alone": alone, "ffn": block}, place, rounds)
            each = {way: Spread.of([1e9 * s / rows / hidden for s in seconds]) for way, seconds in found.items()}
            costs[record.name] = DeviceCost(each["alone"], each["ffn"])
        a, y = torch.randn(hidden, hidden // 2, **of), torch.randn(rows, hidden, **of)
        into = torch.empty_like(y)
        found = interleaved(
            {
                "product": lambda: void(torch.mm(y, a)),
                "copy": lambda: void(into.copy_(y)),
                "exp": lambda: void(torch.exp(y, out=into)),
            },
            place,
            rounds,
        )
    best = {way: min(seconds) for way, seconds in found.items()}
    return costs, DeviceRates(
        2 * rows * hidden * (hidden // 2) / best["product"] / 1e12,
        2 * y.nbytes / best["copy"] / 1e9,
        y.numel() / best["exp"] / 1e12,
    )
