"""Claim 2: sigmoid in every hidden layer makes the gradients of early layers vanish.

Source: 000, 004, which multiply the steepest slopes of four layers: 0.25^4 ~ 0.004. Refuted by a first-layer gradient
under sigmoid that is not much smaller than under ReLU, or that does not fall with depth.

A perceptron 10-64-64-64-1 on a batch of 32 with binary cross-entropy, before any training: the norm of the first
layer's weight gradient under sigmoid and under ReLU, on the same data. Then with 2 to 32 hidden layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from studies.perceptron import INITS, LABELS, Init, Labels, Perceptron, batch, one_thread
from studies.study import Chart, Claim, Figure, Finding, Line, Options, Table, of_few, verdict_of

CLAIM = Claim(
    number=2,
    name="vanishing",
    title="Sigmoid in every hidden layer makes early gradients vanish",
    statement="With sigmoid in every hidden layer the gradient is multiplied by at most 0.25 a layer, 0.25^4 ~ 0.004 "
    "for four, so that the first layers get next to none.",
    source="000, 004",
    refuted_by="a first-layer gradient norm under sigmoid within ten times of that under ReLU, or one that does not "
    "fall with depth, faster than under ReLU.",
)

INPUTS, WIDTH, HIDDEN, BATCH = 10, 64, 3, 32
ACTIVATIONS = ("sigmoid", "tanh", "relu")
DEPTHS = (2, 3, 4, 6, 8, 12, 16, 24, 32)
SEEDS, QUICK_SEEDS = 100, 20
DEEP_SEEDS = 20  # of those, at each depth
MUCH = 10.0  # times smaller at least: what "vanishes" is held to
STEEPEST = 0.25
WEIGHTS_SEED = 1_000_000  # weights are drawn apart from data, so that every activation sees the same data


@dataclass(frozen=True)
class Spread:
    """Over seeds."""

    median: float
    low: float  # the tenth percentile
    high: float  # the ninetieth

    @staticmethod
    def of(values: NDArray[np.float64]) -> Spread:
        low, middle, high = np.percentile(values, [10, 50, 90])
        return Spread(float(middle), float(low), float(high))

    def __str__(self) -> str:
        if self.low == self.high:  # one seed
            return f"{self.median:.3g}"
        return f"{self.median:.3g} ({self.low:.3g} to {self.high:.3g})"


def first_layer(activation: str, init: Init, labels: Labels, hidden: int, seed: int) -> tuple[float, float]:
    """The norm of the first layer's weight gradient, and the product over hidden layers of the mean slope."""
    x, y = batch(BATCH, INPUTS, labels, torch.Generator().manual_seed(seed))
    drawn = torch.Generator().manual_seed(WEIGHTS_SEED + seed)
    found = Perceptron((INPUTS, *[WIDTH] * hidden, 1), activation, init, drawn).gradients(x, y)
    return float(found.weights[0].norm()), float(np.prod([float(slope.mean()) for slope in found.slopes]))


def norms(activation: str, init: Init, labels: Labels, hidden: int, seeds: Sequence[int]) -> NDArray[np.float64]:
    """[seeds]"""
    return np.array([first_layer(activation, init, labels, hidden, seed)[0] for seed in seeds])


def per_layer(depths: Sequence[int], medians: Sequence[float]) -> float:
    """What another layer multiplies the norm with: the slope of a straight line through its logarithm."""
    return float(np.exp(np.polyfit(depths, np.log(medians), 1)[0]))


@one_thread()
def run(options: Options) -> Finding:
    seeds = range(options.seeds or (QUICK_SEEDS if options.quick else SEEDS))
    rows, ratios = [], {}
    for at, (init, labels) in enumerate((init, labels) for init in INITS for labels in LABELS):
        options.report(f"10-64-64-64-1, {init} init, {len(seeds)} seeds", 0.1 * at)
        found = {name: norms(name, init, labels, HIDDEN, seeds) for name in ACTIVATIONS}
        ratios[init, labels] = found["relu"] / found["sigmoid"]
        spreads = [Spread.of(found[name]) for name in ACTIVATIONS]
        rows.append((init, LABELS[labels], *map(str, spreads), str(Spread.of(ratios[init, labels]))))
    products = [first_layer("sigmoid", "default", "coin", HIDDEN, seed)[1] for seed in seeds]
    charts, falls = _against_depth(options, seeds[:DEEP_SEEDS])

    figures = [
        Figure("0.25^4", f"{STEEPEST**4:.8f}", "~ 0.004", abs(STEEPEST**4 - 0.004) < 5e-4),
        Figure(
            "mean slopes of the three hidden sigmoids, multiplied, default init",
            f"{np.mean(products):.4f}",
            f"at most 0.25^3 = {STEEPEST**3:.4f}",
            max(products) <= STEEPEST**3,
        ),
    ]
    for (init, labels), ratio in ratios.items():
        what = f"first-layer gradient norm, ReLU over sigmoid, {init} init, labels {LABELS[labels]}"
        figures.append(Figure(what, f"{Spread.of(ratio)}; every seed over {ratio.min():.3g}"))
    for (name, init), fall in falls.items():
        figures.append(Figure(f"what another layer multiplies it with, {name}, {init} init", f"{fall:.3f}"))

    medians = [float(np.median(ratio)) for ratio in ratios.values()]
    smaller = [median >= MUCH and ratio.min() > 1 for median, ratio in zip(medians, ratios.values(), strict=True)]
    falling = [falls["sigmoid", init] < min(0.5, falls["relu", init]) for init in INITS]
    return Finding(
        verdict=verdict_of(smaller + falling),
        sentence=f"The first layer's gradient is {min(medians):.0f} to {max(medians):.0f} times smaller under sigmoid "
        f"than under ReLU, by initialisation and labels, and each further layer multiplies it with "
        f"{falls['sigmoid', 'default']:.2f} to {falls['sigmoid', 'matched']:.2f}. Under ReLU with PyTorch's default "
        f"initialisation it falls too ({falls['relu', 'default']:.2f} a layer); with He's it stays "
        f"({falls['relu', 'matched']:.2f})." + of_few(len(seeds)),
        figures=figures,
        settings={
            "net": f"{INPUTS}-{WIDTH}-{WIDTH}-{WIDTH}-1, float64, untrained",
            "batch": BATCH,
            "loss": "binary cross-entropy on logits, mean over the batch",
            "inputs": "normal",
            "seeds": len(seeds),
            "seeds at each depth": len(seeds[:DEEP_SEEDS]),
            "init": dict(INITS),
        },
        tables=(
            Table(
                "Norm of the first layer's weight gradient",
                ("init", "labels", *ACTIVATIONS, "ReLU over sigmoid"),
                rows,
                "Median over seeds, with the tenth and ninetieth percentile; ratios by seed.",
            ),
        ),
        charts=charts,
    )


def _against_depth(options: Options, seeds: Sequence[int]) -> tuple[list[Chart], dict[tuple[str, Init], float]]:
    """A chart for each init, labels a coin's; what each activation's norm is multiplied with by another layer."""
    charts, falls = [], {}
    for at, init in enumerate(INITS):
        lines = []
        for n, name in enumerate(ACTIVATIONS):
            spreads = []
            for depth in DEPTHS:
                share = (at + (n + DEPTHS.index(depth) / len(DEPTHS)) / len(ACTIVATIONS)) / len(INITS)
                options.report(f"{depth} layers of {name}, {init} init", 0.4 + 0.6 * share)
                spreads.append(Spread.of(norms(name, init, "coin", depth, seeds)))
            lines.append(Line(
                name, DEPTHS, [each.median for each in spreads],
                [each.low for each in spreads], [each.high for each in spreads],
            ))  # fmt: skip
            falls[name, init] = per_layer(DEPTHS, lines[-1].y)  # type: ignore[arg-type]
        charts.append(
            Chart(
                name=f"depth-{init}",
                title=f"Gradient of the first layer against depth, {init} initialisation",
                x_label="hidden layers",
                y_label="norm of the gradient",
                lines=lines,
                log_y=True,
                note=f"{INITS[init]}. Median of {len(seeds)} seeds, with the tenth and ninetieth percentile.",
            )
        )
    return charts, falls
