"""Claim 3: sigmoid's outputs are all positive, so all gradients of one unit's weights share a sign for one example.

Source: 000, 002, which call what follows zig-zag: a step can only raise or only lower all weights of a unit. A
mini-batch can mix signs. Refuted by units whose gradients differ in sign for one example, or batches that never mix.

A perceptron 10-64-64-64-1, sigmoid beside tanh and ReLU; of the units after the first hidden layer, whose inputs are
outputs of the activation, the share with weight gradients of one sign: by batch, untrained and after training.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from studies.perceptron import Perceptron, batch, one_thread
from studies.study import Cell, Chart, Claim, Figure, Finding, Line, Options, Table, of_few, verdict_of

CLAIM = Claim(
    number=3,
    name="zigzag",
    title="Positive outputs give all weights of a unit gradients of one sign",
    statement="Sigmoid's outputs are positive, so the gradients of one unit's incoming weights share a sign for one "
    "example, and weights move in a zig-zag; a mini-batch can mix signs.",
    source="000, 002",
    refuted_by="a unit whose weight gradients differ in sign for one example, or mini-batches of 32 that never mix "
    "them.",
)

INPUTS, WIDTHS = 10, (10, 64, 64, 64, 1)
ACTIVATIONS = ("sigmoid", "relu", "tanh")
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
ONE, MANY = 1, 32
SEEDS, QUICK_SEEDS = 50, 10
EXAMPLES, STEPS, RATE = 256, 100, 3e-3  # of the training that "trained" means: full batches, Adam


def of_one_sign(gradient: Tensor) -> tuple[int, int]:
    """Of a layer's weight gradient [outputs, inputs]: units whose entries share a sign, units that have any gradient.

    An entry of 0 has no sign: of a ReLU that is off.
    """
    positive, negative = (gradient > 0).any(dim=1), (gradient < 0).any(dim=1)
    return int((positive ^ negative).sum()), int((positive | negative).sum())


def share(net: Perceptron, x: Tensor, y: Tensor) -> float:
    """Of the units after the first hidden layer, the output included; NaN where none has a gradient."""
    counts = [of_one_sign(gradient) for gradient in net.gradients(x, y).weights[1:]]
    same, all_ = (sum(each) for each in zip(*counts, strict=True))
    return same / all_ if all_ else float("nan")


def train(net: Perceptron, x: Tensor, y: Tensor) -> None:
    adam = torch.optim.Adam(net.parameters(), lr=RATE)
    for _ in range(STEPS):
        adam.zero_grad()
        F.binary_cross_entropy_with_logits(net(x), y).backward()  # type: ignore[no-untyped-call]
        adam.step()


def shares(activation: str, trained: bool, seed: int) -> list[float]:
    """One for each of BATCHES, drawn anew."""
    generator = torch.Generator().manual_seed(seed)
    x, y = batch(EXAMPLES, INPUTS, "plane", generator)
    net = Perceptron(WIDTHS, activation, "matched", torch.Generator().manual_seed(1_000_000 + seed))
    if trained:
        train(net, x, y)
    picked = [torch.randperm(EXAMPLES, generator=generator)[:size] for size in BATCHES]
    return [share(net, x[rows], y[rows]) for rows in picked]


@one_thread()
def run(options: Options) -> Finding:
    seeds = range(options.seeds or (QUICK_SEEDS if options.quick else SEEDS))
    charts, found = [], {}
    rows: list[list[Cell]] = []
    for at, (trained, name) in enumerate((trained, name) for trained in (False, True) for name in ACTIVATIONS):
        state = "trained" if trained else "untrained"
        each = []
        for seed in seeds:
            options.report(f"{name}, {state}, seed {seed}", (at + seed / len(seeds)) / 6)
            each.append(shares(name, trained, seed))
        found[name, trained] = np.array(each)
    for trained in (False, True):
        state = f"after {STEPS} steps" if trained else "untrained"
        charts.append(_chart(found, trained, state))
        for name in ACTIVATIONS:
            columns = (found[name, trained][:, BATCHES.index(size)] for size in (ONE, MANY))
            cells = [round(100 * float(np.nanmean(column)), 1) for column in columns]
            rows.append([name, state, *cells])
    one = {key: values[:, BATCHES.index(ONE)] for key, values in found.items()}
    many = {key: values[:, BATCHES.index(MANY)] for key, values in found.items()}
    always = all(np.nanmin(one["sigmoid", trained]) == 1 for trained in (False, True))
    mixes = [float(np.nanmean(many["sigmoid", trained])) < 1 for trained in (False, True)]
    figures = []
    for name, published in (("sigmoid", "100 %"), ("relu", ""), ("tanh", "")):
        for trained, state in ((False, "untrained"), (True, "trained")):
            agrees = bool(np.nanmin(one[name, trained]) == 1) if published else None
            figures.append(Figure(f"one example, {name}, {state}", _percent(one[name, trained]), published, agrees))
    for trained, state in ((False, "untrained"), (True, "trained")):
        text, mixed = _percent(many["sigmoid", trained]), mixes[trained]
        figures.append(Figure(f"batch of {MANY}, sigmoid, {state}", text, "less than 100 %", mixed))
        for name in ACTIVATIONS[1:]:
            figures.append(Figure(f"batch of {MANY}, {name}, {state}", _percent(many[name, trained])))
    untrained, after = (100 * float(np.nanmean(many["sigmoid", trained])) for trained in (False, True))
    does = "but hardly does" if min(untrained, after) > 50 else "and does"
    return Finding(
        verdict=verdict_of([always, *mixes]),
        sentence=f"For one example {_percent(one['sigmoid', False])} of sigmoid's units have weight gradients of one "
        f"sign, and {_percent(one['relu', False])} of ReLU's, which is not negative either; of tanh's "
        f"{_percent(one['tanh', False])}. A batch of {MANY} can mix them, {does} under sigmoid: {untrained:.0f} % are "
        f"left of one sign untrained, {after:.0f} % after {STEPS} steps; under ReLU "
        f"{_percent(many['relu', False])} and {_percent(many['relu', True])}." + of_few(len(seeds)),
        figures=figures,
        settings={
            "net": "10-64-64-64-1, float64, Xavier for sigmoid and tanh, He for ReLU",
            "examples": f"{EXAMPLES}, normal, labels by the side of a random hyperplane",
            "trained": f"{STEPS} full-batch steps of Adam at {RATE:g}",
            "units": "of the second and third hidden layer and the output, that have any gradient",
            "seeds": len(seeds),
        },
        tables=(
            Table(
                "Units whose weight gradients share a sign, %",
                ("activation", "state", "one example", f"batch of {MANY}"),
                rows,
                "Mean over seeds.",
            ),
        ),
        charts=charts,
    )


def _percent(shares: NDArray[Any]) -> str:
    return f"{100 * float(np.nanmean(shares)):.3g} %"


def _chart(found: dict[tuple[str, bool], NDArray[Any]], trained: bool, state: str) -> Chart:
    lines = []
    for name in ACTIVATIONS:
        shares = 100 * found[name, trained]
        low, high = np.nanpercentile(shares, [10, 90], axis=0)
        lines.append(Line(name, BATCHES, list(np.nanmean(shares, axis=0)), list(low), list(high)))
    return Chart(
        name="trained" if trained else "untrained",
        title=f"Units whose weight gradients share a sign, {state}",
        x_label="examples in the batch",
        y_label="% of units",
        lines=lines,
        log_x=True,
        note="Mean over seeds, with the tenth and ninetieth percentile. "
        + (
            f"All {EXAMPLES} are what it was trained on: there its errors sum to nearly nothing, and signs mix."
            if trained
            else "Sigmoid's outputs hardly differ between examples, so that a batch's gradient is nearly one number "
            "times them."
        ),
    )
