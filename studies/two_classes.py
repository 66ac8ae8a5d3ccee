"""Claim 8: softmax over two classes is sigmoid of the difference of their logits.

Source: 003. Refuted by a difference between the two of more than rounding.

    e^a / (e^a + e^b) = 1 / (1 + e^-(a - b)),    and the gradient by a of its cross-entropy is sigmoid(a - b) - 1

On a grid of pairs whose differences are exact, so that only the two functions round: torch, numpy, the registry's
softmax as ONNX runs it, each in its types; and over HTTP, where a service is asked for the softmax of two tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from export.exporter import export_bundle, random_checkpoint
from export.ops.check import one_node, open_session
from export.ops.onnx_function import onnx_function
from export.ops.trace import trace
from models.activations import get
from models.corpus import Corpus
from models.gpt import ActuaryConfig
from studies.served import TINY, serving
from studies.study import Chart, Claim, Figure, Finding, Line, Options, Table, verdict_of

CLAIM = Claim(
    number=8,
    name="two-classes",
    title="Softmax over two classes is sigmoid",
    statement="For K = 2 softmax reduces to sigmoid of the difference of the two logits.",
    source="003",
    refuted_by="a difference between the two, of values or gradients, that rounding does not explain.",
)

# Quarters to 120: every pair and difference is exact in float16 too, and e^-120 is below float32's smallest.
REACH, STEP = 120.0, 0.25
QUICK_STEP = 1.0
EXTREMES = (-1e4, -1e3, -500.0, 0.0, 500.0, 1e3, 1e4)
# An exponential of 2 units in the last place, a sum, a quotient, and the same on the other side, each rounded: 8 units
# of the result, which is 1 at most, and as many again for what a library rounds twice.
UNITS = 16
PAIRS, QUICK_PAIRS = 64, 16

Values = NDArray[Any]
Way = Callable[
    [Values], tuple[Values, Values]
]  # pairs [N, 2] -> the first's softmax [N], sigmoid of the difference [N]


def grid(step: float) -> Values:
    """Pairs [N, 2]."""
    one = np.concatenate([np.arange(-REACH, REACH + step, step), EXTREMES])
    return np.stack(np.meshgrid(one, one), axis=-1).reshape(-1, 2)


def by_torch(pairs: Values) -> tuple[Values, Values]:
    x = torch.from_numpy(pairs)
    return torch.softmax(x, dim=-1)[:, 0].numpy(), torch.sigmoid(x[:, 0] - x[:, 1]).numpy()


def by_registry(pairs: Values) -> tuple[Values, Values]:
    x = torch.from_numpy(pairs)
    softmax, sigmoid = get("softmax").expression, get("sigmoid").expression
    return softmax(x)[:, 0].numpy(), sigmoid(x[:, 0] - x[:, 1]).numpy()


def by_numpy(pairs: Values) -> tuple[Values, Values]:
    """Both written out in their stable forms: no exponential of more than 0."""
    weights = np.exp(pairs - pairs.max(axis=-1, keepdims=True))
    apart = pairs[:, 0] - pairs[:, 1]
    small = np.exp(-np.abs(apart))
    return weights[:, 0] / weights.sum(axis=-1), np.where(apart >= 0, 1 / (1 + small), small / (1 + small))


def by_onnx(pairs: Values) -> tuple[Values, Values]:
    """The registry's two, as ONNX Runtime runs what is exported of them."""

    def run(name: str, x: Values) -> Values:
        record = get(name)
        session = open_session(one_node(record, onnx_function(name, trace(record))))
        return np.asarray(session.run(None, {"x": x})[0])

    return run("softmax", pairs)[:, 0], run("sigmoid", pairs[:, :1] - pairs[:, 1:])[:, 0]


WAYS: dict[str, tuple[Way, tuple[str, ...]]] = {
    "numpy, written out": (by_numpy, ("float64", "float32")),
    "torch": (by_torch, ("float64", "float32")),
    "the registry's expressions": (by_registry, ("float64", "float32")),
    "the registry's in ONNX Runtime": (by_onnx, ("float32",)),
}


def gradients(pairs: Values) -> tuple[Values, Values]:
    """By the first logit, with the first class as the target: of softmax's cross-entropy, of sigmoid's."""
    x = torch.from_numpy(pairs).requires_grad_()
    first = torch.zeros(len(x), dtype=torch.long)
    (of_softmax,) = torch.autograd.grad(F.cross_entropy(x, first, reduction="sum"), x)
    apart = torch.from_numpy(pairs[:, 0] - pairs[:, 1]).requires_grad_()
    loss = F.binary_cross_entropy_with_logits(apart, torch.ones_like(apart), reduction="sum")
    (of_sigmoid,) = torch.autograd.grad(loss, apart)
    return of_softmax[:, 0].numpy(), of_sigmoid.numpy()


def worst(both: tuple[Values, Values]) -> float:
    """The largest difference; NaN where either holds one."""
    return float(np.abs(both[0].astype(np.float64) - both[1]).max())


def served(kept: Path, pairs: int) -> list[tuple[float, float]]:
    """Of random pairs of tokens: softmax over the two, by /v1/score, and sigmoid of the difference of their logits."""
    checkpoint = random_checkpoint("two", ActuaryConfig(activation="gelu", **TINY), Corpus.read())
    export_bundle(checkpoint, kept / "bundles", seed=0)
    rng = np.random.default_rng(0)
    found = []
    with serving(kept / "bundles", kept) as ask:
        for first, second in rng.integers(0, TINY["vocab_size"], size=(pairs, 2)).tolist():
            prompt = rng.integers(0, TINY["vocab_size"], size=8).tolist()
            chosen = ask("/v1/next-token", {"model": "two", "prompt": prompt, "top_k": 0, "tokens": [first, second]})
            a, b = (entry["logit"] for entry in chosen["results"][0]["chosen"])
            asked = {"model": "two", "query": prompt, "items": [[]], "label_token_ids": [first, second]}
            score = ask("/v1/score", {**asked, "apply_softmax": True})["scores"][0][0]
            found.append((score, float(1 / (1 + np.exp(b - a)))))
    return found


def run(options: Options) -> Finding:
    pairs = grid(QUICK_STEP if options.quick else STEP)
    rows, figures, agree = [], [], []
    cases = [(way, type_) for way, (_, types) in WAYS.items() for type_ in types]
    for at, (way, type_) in enumerate(cases):
        options.report(f"{way}, {type_}", 0.6 * at / len(cases))
        found = worst(WAYS[way][0](pairs.astype(type_)))
        rows.append(_row(way, "values", type_, found))
    for type_ in ("float64", "float32"):
        rows.append(_row("torch", "gradients of cross-entropy", type_, worst(gradients(pairs.astype(type_)))))
    options.report("serving a bundle", 0.6)
    answers = served(options.kept, QUICK_PAIRS if options.quick else PAIRS)
    # Its logits are float32, and those of two requests, computed in other batches.
    apart = max(abs(softmax - sigmoid) for softmax, sigmoid in answers)
    rows.append(_row("the service, of two tokens", "values", "float32", apart))
    for way, of, type_, found, allowed, _ in rows:
        agree.append(found <= allowed)
        figures.append(Figure(f"{way}, {of}, {type_}: largest difference", f"{found:.2g}", "0", agree[-1]))
    x = np.arange(-8, 8.25, 0.25)
    both = by_registry(np.stack([x, np.zeros_like(x)], axis=-1))
    return Finding(
        verdict=verdict_of(agree),
        sentence=f"On {len(pairs):,} pairs of logits the two differ by at most "
        f"{max(row[3] for row in rows if row[2] == 'float64'):.1g} in float64 and "
        f"{max(row[3] for row in rows if row[2] == 'float32'):.1g} in float32, in torch, numpy, ONNX Runtime and over "
        "HTTP: rounding.",
        figures=figures,
        settings={
            "logits": f"-{REACH:g} to {REACH:g} in steps of {QUICK_STEP if options.quick else STEP:g}, each with each",
            "and": [f"{extreme:g}" for extreme in EXTREMES],
            "pairs of tokens": len(answers),
            "served": f"a gelu of random weights, V = {TINY['vocab_size']}, prompts of 8 random tokens",
        },
        tables=(
            Table(
                "Softmax of two against sigmoid of their difference",
                ("computed by", "of", "type", "largest difference", "allowed", "units in the last place of 1"),
                rows,
                f"Allowed: {UNITS} units in the last place of 1.",
            ),
        ),
        charts=(
            Chart(
                "curve", "The first of two classes, the other's logit at 0", "a", "probability",
                [Line("softmax", list(x), list(both[0])), Line("sigmoid", list(x), list(both[1]), dashed=True)],
                note="One curve: they lie on each other.",
            ),
        ),
    )  # fmt: skip


def _row(way: str, of: str, type_: str, found: float) -> tuple[str, str, str, float, float, float]:
    unit = float(np.finfo(type_).eps)
    return way, of, type_, float(f"{found:.3g}"), float(f"{UNITS * unit:.3g}"), round(found / unit, 2)
