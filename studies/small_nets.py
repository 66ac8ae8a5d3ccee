"""Two moons, and small fully connected nets on them: every seed of one setting at once.

make_moons -> standardised points [S, N, 2] and labels [S, N] for S seeds; their nets, a layer's weights [S, in, out],
train together as one batched product. Adam and SGD work element by element, so each net is trained as if it were
alone, and fifty cost little more than one: of matrices of 8 x 8 the call is what costs.

    x -> [ activation(x W + b) ] * hidden layers -> x W + b, the logit
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sklearn.datasets import make_moons
from torch import Tensor

from models import activations
from studies.perceptron import one_thread

Hidden = Literal["sigmoid", "relu"]
HIDDEN: tuple[Hidden, ...] = ("sigmoid", "relu")
TRAIN_POINTS, TEST_POINTS = 300, 2000
EVERY = 10  # epochs between looks at the test points, which cost twice a step
TEST_DRAW = 1_000_000  # added to a seed: test points are another draw of the same distribution
Layers = list[tuple[Tensor, Tensor]]  # weights [S, in, out] and biases [S, 1, out] of each


@dataclass(frozen=True)
class Setting:
    """How the nets of one row are trained: full batch, mean binary cross-entropy on the logit."""

    optimizer: Literal["adam", "sgd"] = "adam"
    rate: float = 3e-3
    noise: float = 0.18
    draw: int | None = None  # of the points, one for all seeds; None: each seed draws its own
    widths: tuple[int, ...] = (2, 8, 8, 1)
    epochs: int = 800

    @property
    def optimizer_name(self) -> str:
        return f"{'Adam' if self.optimizer == 'adam' else 'SGD'} {self.rate:g}"


@dataclass(frozen=True)
class Moons:
    """Points of S seeds, standardised by the training points' mean and deviation."""

    x: Tensor  # [S, 300, 2]
    y: Tensor  # [S, 300], 0 or 1
    test_x: Tensor  # [S, 2000, 2]
    test_y: Tensor  # [S, 2000]


@dataclass(frozen=True)
class Trained:
    """S nets and how they came to be."""

    layers: Layers
    loss: NDArray[np.float64]  # [epochs + 1, S], on the training points; row e is after e epochs
    accuracy: NDArray[np.float64]  # [epochs / EVERY + 1, S], on the test points; row k is after k * EVERY epochs

    def at(self, epoch: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Loss and accuracy [S] after a multiple of EVERY epochs."""
        return self.loss[epoch], self.accuracy[epoch // EVERY]


def moons(seeds: Sequence[int], noise: float) -> Moons:
    drawn = {seed: _one_moons(seed, noise) for seed in set(seeds)}
    parts = [drawn[seed] for seed in seeds]
    x, y, test_x, test_y = (torch.from_numpy(np.stack(part).astype(np.float32)) for part in zip(*parts, strict=True))
    return Moons(x, y, test_x, test_y)


def _one_moons(seed: int, noise: float) -> tuple[NDArray[np.float64], ...]:
    x, y = make_moons(TRAIN_POINTS, noise=noise, random_state=seed)
    test_x, test_y = make_moons(TEST_POINTS, noise=noise, random_state=seed + TEST_DRAW)
    mean, deviation = x.mean(0), x.std(0)
    return (x - mean) / deviation, y, (test_x - mean) / deviation, test_y


def start(hidden: Hidden, widths: Sequence[int], seeds: Sequence[int]) -> Layers:
    """Xavier for sigmoid (Glorot & Bengio 2010), He for ReLU (He et al. 2015), both normal, biases zero. The output
    layer, which no activation follows, is Xavier's in both."""
    layers: Layers = []
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    for number, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        he = hidden == "relu" and number < len(widths) - 2
        deviation = (2 / inputs) ** 0.5 if he else (2 / (inputs + outputs)) ** 0.5
        weights = torch.stack([deviation * torch.randn(inputs, outputs, generator=g) for g in generators])
        layers.append((weights.requires_grad_(), torch.zeros(len(seeds), 1, outputs, requires_grad=True)))
    return layers


def forward(layers: Layers, hidden: Hidden, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """x [S, N, 2] -> every layer's pre-activations [S, N, width], the last being the logit, and the activations of
    all but the last."""
    activation = activations.get(hidden)
    before, after = [], []
    for weights, bias in layers:
        before.append(x @ weights + bias)
        x = activation(before[-1])
        after.append(x)
    return before, after[:-1]


def logits(layers: Layers, hidden: Hidden, x: Tensor) -> Tensor:
    """[S, N, 2] -> [S, N]."""
    return forward(layers, hidden, x)[0][-1][..., 0]


@one_thread()
def train(
    hidden: Hidden,
    setting: Setting,
    seeds: Sequence[int],
    seen: Callable[[int, Layers], None] = lambda epoch, layers: None,
) -> Trained:
    """Trains a net for every seed. `seen` is called with 0, 1, ... epochs done and the layers as they then are."""
    points = moons([seed if setting.draw is None else setting.draw for seed in seeds], setting.noise)
    layers = start(hidden, setting.widths, seeds)
    parameters = [tensor for layer in layers for tensor in layer]
    kind = torch.optim.Adam if setting.optimizer == "adam" else torch.optim.SGD
    optimizer = kind(parameters, lr=setting.rate)
    losses, accuracies = [], []
    for epoch in range(setting.epochs + 1):
        each = F.binary_cross_entropy_with_logits(logits(layers, hidden, points.x), points.y, reduction="none").mean(1)
        with torch.no_grad():
            losses.append(each.numpy().astype(np.float64))
            if epoch % EVERY == 0:
                right = (logits(layers, hidden, points.test_x) > 0) == (points.test_y > 0)
                accuracies.append(right.double().mean(1).numpy())
            seen(epoch, layers)
        if epoch < setting.epochs:
            optimizer.zero_grad()
            torch.autograd.backward(each.sum())  # a sum over seeds: each net's gradient is of its own mean loss
            optimizer.step()
    return Trained(layers, np.stack(losses), np.stack(accuracies))
