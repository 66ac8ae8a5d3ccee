"""Claim 5: sigmoid compresses the signal layer by layer, ReLU keeps its magnitude.

Source: 001. Refuted by a trained sigmoid net whose layers carry as much of the signal as a ReLU net's.

The nets are the moons study's and deeper ones of the same width. The article's figures read as if of one measure, but
no one measure gives both 0.3 and 0.5: a sigmoid's mean magnitude is near 0.5 wherever its inputs are about zero, and
how much of that differs from point to point, the standard deviation, is near 0.3 after the first layer. Both are
shown, at the start and trained.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.activations import get
from studies.small_nets import HIDDEN, Hidden, Layers, Setting, forward, moons, start, train
from studies.spread import Spread, line_of, percent, shown, spread_of
from studies.study import Cell, Chart, Claim, Figure, Finding, Options, Table, Verdict, of_few

CLAIM = Claim(
    number=5,
    name="magnitudes",
    title="Sigmoid compresses the signal, ReLU keeps it",
    statement="First-layer pre-activations have a magnitude of about 2.0 under both; sigmoid compresses that to about "
    "0.3, and then stays at 0.5 to 0.6 through depth; ReLU keeps its magnitude.",
    source="001",
    refuted_by="a trained sigmoid net whose activations are as large as a ReLU net's, or a ReLU net's that shrink or "
    "grow.",
)

WIDTH = 8
DEPTHS = (2, 4, 8)  # hidden layers
SEEDS, QUICK_SEEDS, QUICK_DEPTHS = 20, 5, (2, 4)
BEFORE, COMPRESSED, DEEP = 2.0, 0.3, (0.5, 0.6)  # the article's
NEAR = 0.1  # of the article's figure: how far from it our median agrees; a range grows with seeds and decides nothing
KEPT = 0.8  # ReLU keeps its magnitude where the last hidden layer's over the first's is from this to its inverse
LEARNT = 0.75  # a net below this accuracy has not learned the task: half is a guess


@dataclass(frozen=True)
class Signal:
    """A layer's signal on the test points, one value per seed: how large, and how much it differs between points."""

    before: NDArray[np.float64]  # mean |pre-activation|
    after: NDArray[np.float64]  # mean |activation|
    varies: NDArray[np.float64]  # standard deviation of a unit's activation over the points, mean over units


@dataclass(frozen=True)
class Net:
    """The hidden layers' signals of one kind and depth, over seeds."""

    hidden: Hidden
    depth: int
    start: list[Signal]
    trained: list[Signal]
    accuracy: NDArray[np.float64]  # [S], trained


def signals(layers: Layers, hidden: Hidden, x: Tensor) -> list[Signal]:
    """Of every hidden layer, first to last; x [S, N, 2]."""
    with torch.no_grad():
        before, after = forward(layers, hidden, x)
    return [
        Signal(
            z.abs().double().mean((1, 2)).numpy(),
            a.abs().double().mean((1, 2)).numpy(),
            a.double().std(1, correction=0).mean(1).numpy(),
        )
        for z, a in zip(before, after, strict=False)  # the logit has no activation
    ]


def run(options: Options) -> Finding:
    seeds = range(options.seeds or (QUICK_SEEDS if options.quick else SEEDS))
    return found(seeds, QUICK_DEPTHS if options.quick else DEPTHS, options)


def found(seeds: Sequence[int], depths: Sequence[int], options: Options, base: Setting | None = None) -> Finding:
    """The study at any size."""
    base = base or Setting()
    x = moons(seeds, base.noise).test_x
    nets = []
    for at, depth in enumerate(depths):
        setting = dataclasses.replace(base, widths=(2, *(WIDTH,) * depth, 1))
        for half, hidden in enumerate(HIDDEN):
            options.report(f"{depth} hidden layers, {hidden}", (at + half / 2) / len(depths))
            trained = train(hidden, setting, seeds)
            fresh = signals(start(hidden, setting.widths, seeds), hidden, x)
            nets.append(Net(hidden, depth, fresh, signals(trained.layers, hidden, x), trained.accuracy[-1]))
    return conclude(nets, list(seeds), base)


def conclude(nets: Sequence[Net], seeds: list[int], base: Setting) -> Finding:
    """The verdict, by rule. Two halves: the sigmoid nets' layers are smaller than the ReLU nets' and stay in a band;
    the ReLU nets' magnitude is kept. Both and all four figures of the article: it holds; both or one: in part."""
    shallow = {net.hidden: net for net in nets if net.depth == nets[0].depth}
    sigmoid, relu = shallow["sigmoid"], shallow["relu"]
    deep = [s for net in nets if net.hidden == "sigmoid" for s in net.trained[1:]]
    smaller = all(
        np.median(s.after) < np.median(r.after)
        for net, other in _pairs(nets)
        for s, r in zip(net.trained, other.trained, strict=True)
    )
    shares = [float(np.median(net.trained[-1].after / net.trained[0].after)) for net in nets if net.hidden == "relu"]
    keeps = all(KEPT <= share <= 1 / KEPT for share in shares)
    first = [spread_of(net.trained[0].before) for net in (sigmoid, relu)]
    varies, after = spread_of(sigmoid.trained[0].varies), spread_of(sigmoid.trained[0].after)
    band = [spread_of(s.after) for s in deep]
    in_band = all(DEEP[0] <= s.median <= DEEP[1] for s in band)
    figures = [
        *(Figure(f"{name} first-layer pre-activation, mean magnitude", each.text(), "about 2.0", _near(each, BEFORE))
          for name, each in zip(("sigmoid's", "ReLU's"), first, strict=True)),
        Figure("sigmoid's first activation, mean magnitude", after.text(), "about 0.3", _near(after, COMPRESSED)),
        Figure("sigmoid's first activation, standard deviation over points", varies.text(), "about 0.3",
               _near(varies, COMPRESSED)),
        Figure("sigmoid's deeper activations, mean magnitude", _ends(band), "0.5 to 0.6", in_band),
        Figure(f"ReLU's last hidden magnitude over its first, by depth; kept within {KEPT:g} to {1 / KEPT:g}",
               ", ".join(shown(share) for share in shares), "kept", keeps),
    ]  # fmt: skip
    exact = all(figure.agrees for figure in figures)
    verdict: Verdict = (
        "holds" if smaller and keeps and exact else "holds in part" if smaller or keeps else "did not reproduce"
    )
    start_varies = [spread_of(s.varies) for s in max((n for n in nets if n.hidden == "sigmoid"), key=_depth).start]
    changes = "grow" if min(shares) >= 1 else "shrink" if max(shares) <= 1 else "shrink or grow"
    change = "keep their magnitude" if keeps else changes
    sentence = (
        f"Sigmoid turns first pre-activations of {first[0].text()} into activations of {after.text()} that differ "
        f"between points by {varies.text()}, and deeper ones of {_ends(band)}; ReLU's, of {first[1].text()}, {change} "
        f"through the hidden layers, {_ends_of(shares)} times. Before training, what differs between points falls from "
        f"{shown(start_varies[0].median)} to {start_varies[-1].median:.1g} over {len(start_varies)} sigmoid layers."
        + of_few(len(seeds))
    )
    learned = {
        f"{_name(net.hidden)}, {net.depth} hidden": percent(float((net.accuracy >= LEARNT).mean()), 0) for net in nets
    }
    depths = ", ".join(str(net.depth) for net in nets if net.hidden == "relu")
    return Finding(
        verdict=verdict,
        sentence=sentence,
        figures=figures,
        settings={
            "nets": f"2, then {WIDTH} units in each of {depths} hidden layers, then 1",
            "points and training": f"as in the moons study: noise {base.noise:g}, {base.optimizer_name}, "
            f"{base.epochs} epochs",
            "measured on": "the test points",
            "seeds": seeds,
            f"nets that learned the task (over {LEARNT:.0%})": learned,
        },
        tables=[_table(net) for net in nets],
        charts=[
            _chart("trained", "Mean activation after training", "mean magnitude", nets, "trained", "after"),
            _chart("varies", "What differs between points, after training", "standard deviation over points", nets,
                   "trained", "varies"),
            _chart("varies-at-start", "What differs between points, before training", "standard deviation over points",
                   [net for net in nets if net.depth == nets[-1].depth], "start", "varies"),
        ],
        data={"digests": {name: get(name).digest for name in HIDDEN}},
    )  # fmt: skip


def _pairs(nets: Sequence[Net]) -> list[tuple[Net, Net]]:
    """The sigmoid and the ReLU net of each depth."""
    by = {(net.hidden, net.depth): net for net in nets}
    return [(net, by["relu", depth]) for (hidden, depth), net in by.items() if hidden == "sigmoid"]


def _depth(net: Net) -> int:
    return net.depth


def _near(measured: Spread, published: float) -> bool:
    """Whether the median is within a tenth of the article's figure."""
    return abs(measured.median - published) <= NEAR * published


def _ends(band: Sequence[Spread]) -> str:
    return _ends_of([s.median for s in band])


def _ends_of(values: Sequence[float]) -> str:
    low, high = shown(min(values)), shown(max(values))
    return low if low == high else f"{low} to {high}"


def _name(hidden: Hidden) -> str:
    return "ReLU" if hidden == "relu" else hidden


def _table(net: Net) -> Table:
    rows: list[list[Cell]] = []
    for number, (fresh, trained) in enumerate(zip(net.start, net.trained, strict=True), start=1):
        values = (fresh.before, fresh.after, fresh.varies, trained.before, trained.after, trained.varies)
        rows.append([number, *(spread_of(each).text() for each in values)])
    return Table(
        f"{_name(net.hidden)}, {net.depth} hidden layers",
        ["layer", "start: before", "start: after", "start: differs by", "before", "after", "differs by"],
        rows,
        f"Medians over seeds of mean magnitudes, with their range. Accuracy {percent(float(np.median(net.accuracy)))}.",
    )


def _chart(name: str, title: str, label: str, nets: Sequence[Net], when: str, what: str) -> Chart:
    lines = []
    for net in nets:
        layers = [spread_of(getattr(signal, what)) for signal in getattr(net, when)]
        numbers = list(range(1, len(layers) + 1))
        lines.append(line_of(f"{_name(net.hidden)}, {net.depth} hidden", numbers, layers, net.hidden == "relu"))
    note = "Medians over seeds; the bands are their range, whose floor is 0 where a ReLU net is dead."
    return Chart(name, title, "hidden layer", label, lines, log_y=True, note=note)
