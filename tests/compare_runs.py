"""Folders of comparisons with known truth, without a server: what the report and its tests are drawn from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from loadtest.compare import store

# model: (latency over gelu's, bits per byte, hidden width of C = 384, parameters)
TRUTH = {
    "gelu": (1.0, 2.310, 1536, 14_155_776),
    "gelu_tanh": (0.995, 2.3102, 1536, 14_155_776),
    "relu": (0.93, 2.334, 1536, 14_155_776),
    "silu": (0.97, 2.306, 1536, 14_155_776),
    "swiglu": (1.05, 2.271, 1024, 14_155_776),
    "mish": (1.12, 2.301, 1536, 14_155_776),
}
BASE_MS = 5.1
PER_BLOCK = 40  # answers, and five more that are discarded as settling


@dataclass(frozen=True)
class Spec:
    """A run to write. Everything that a test turns is a field."""

    truth: dict[str, tuple[float, float | None, int, int]]
    rounds: int = 30
    seed: int = 0
    void: tuple[tuple[int, str], ...] = ((11, "mish"),)
    again: float = 1.0  # the A/A arm's latency over the baseline's: 1 on a fit machine
    rate: float | None = None


def write_run(folder: Path, change: Callable[[dict[str, Any]], None] = lambda run: None, **spec: Any) -> Path:
    """A run folder as `actuary compare` leaves it before it is judged; `change` edits run.json's record."""
    asked = Spec(**({"truth": TRUTH} | spec))
    run = record(asked)
    change(run)
    store.create(folder, run)
    random = np.random.default_rng(asked.seed)
    clock_s = 0.0
    for number in range(asked.rounds):
        order = random.permutation([arm["arm"] for arm in run["arms"]])
        drift = 1 + 0.08 * np.sin(number / 5) + random.normal(0, 0.01)
        samples, blocks = [], []
        for position, arm in enumerate(map(str, order)):
            model = arm.removesuffix(":again")
            factor = asked.truth[model][0] * (asked.again if arm.endswith(":again") else 1.0)
            void = "client too slow" if (number, arm) in asked.void else ""
            where = {"round": number, "position": position, "arm": arm, "model": model}
            samples.append(_requests(random, where, clock_s, factor * drift * random.normal(1, 0.012), asked.rate))
            window = {"began_s": clock_s + 0.2, "window_s": 1.0, "cpu_s": 0.2 * factor * drift, "rss_mb": 410.0}
            blocks.append({**where, **window, "client_cpu_share": 0.3, "void": void})
            clock_s += 1.3
        store.write_round(folder, number, pl.concat(samples), {"at": run["started"], "blocks": blocks, "said": []})
    visits = [{**arm, "requests": 9, "failures": 0, "first_ms": 31.0, "p50_ms": 6.2} for arm in run["arms"]]
    store.add_warmup(folder, {"at": run["started"], "before_round": 0, "visits": visits})
    return folder


def record(asked: Spec) -> dict[str, Any]:
    """run.json."""
    models = list(asked.truth)
    again = f"{models[0]}:again"
    arms = [{"arm": arm, "model": arm.removesuffix(":again"), "facts": facts(arm.removesuffix(":again"), asked)}
            for arm in (*models, again)]  # fmt: skip
    variants = f"--variants {','.join(models)} --baseline {models[0]}"
    load = f"--rate {asked.rate:g}" if asked.rate else "--users 2"
    return {
        "design": {
            "models": models, "minutes": 5.0, "block_s": 1.0, "settle_s": 0.2, "users": 2, "rate": asked.rate,
            "arrivals": "constant", "seed": asked.seed, "timeout_s": 30.0, "equivalence": 0.02, "fixed": False,
            "baseline": models[0], "arms": [*models, again], "cycle": 14, "rounds": 35,
        },
        "arms": arms,
        "machine": {"host": "m", "cpu": "A CPU at 2.5 GHz", "cores": 2, "system": "Linux-6.1-x86_64"},
        "versions": {"python": "3.11.7", "actuary": "0.1.0", "locust": "2.47.0", "onnxruntime": "1.31.1"},
        "started": "2026-11-21T22:00:00+00:00",
        "command": f"actuary compare {variants} --minutes 5 {load} --seed {asked.seed}",
        "arguments": {},
        "url": "http://127.0.0.1:41234",
        "own_server": True,
        "workload": {
            "source": "256 prompts of the held-out corpus", "requests": 256, "cache": "cold", "sent_as": "ids",
            "prompt_tokens": {"min": 8, "mean": 31.5, "max": 64}, "generated_tokens": None,
        },
    }  # fmt: skip


def facts(model: str, asked: Spec) -> dict[str, Any]:
    """The model's entry of /v1/models."""
    _, bits, hidden, parameters = asked.truth[model]
    quality = {"bits_per_byte": bits, "ece": 0.02, "corpus_sha256": "c" * 64}
    return {
        "id": model, "activation": model, "kind": "gated" if model == "swiglu" else "pointwise", "head": "softmax",
        "precision": "fp32", "flavor": "ort", "layers": 6, "dim": 384, "heads": 6, "hidden": hidden,
        "gated_width": "matched" if model == "swiglu" else None, "context": 256,
        "vocab_size": 8192, "parameters": parameters, "provider": "CPUExecutionProvider", "unfused": [],
        "quality": None if bits is None else quality,
        "files": {"model.onnx": hashlib.sha256(model.encode()).hexdigest(), "tokenizer.json": "a" * 64},
    }  # fmt: skip


def _requests(
    random: np.random.Generator, where: dict[str, Any], clock_s: float, factor: float, rate: float | None
) -> pl.DataFrame:
    count = PER_BLOCK + 5
    at_s = clock_s + np.sort(random.uniform(0, 1.2, count))
    infer_ms = 0.78 * BASE_MS * factor * random.lognormal(0, 0.08, count)
    rest_ms = 0.2 * BASE_MS * random.lognormal(0, 0.25, count) + (random.random(count) < 0.01) * 12
    late_ms = random.exponential(0.3, count) if rate else np.zeros(count)
    columns: dict[str, Any] = {
        "worker": "w0", "prompt": random.integers(0, 256, count), "planned_s": at_s - late_ms / 1000, "at_s": at_s,
        "latency_ms": infer_ms + rest_ms + 0.2, "late_ms": late_ms, "starved": 0, "queue_ms": 0.06 * infer_ms,
        "tokenize_ms": 0.11, "infer_ms": infer_ms, "total_ms": 1.06 * infer_ms + 0.15, "ttft_ms": np.nan,
        "itl_ms": np.nan, "tokens": 0, "settling": np.arange(count) < 5, "failure": "",
    }  # fmt: skip
    return (
        pl.DataFrame(columns)
        .with_columns(pl.lit(value).alias(name) for name, value in where.items())
        .select(pl.col(name).cast(kind) for name, kind in store.SAMPLES.items())
    )
