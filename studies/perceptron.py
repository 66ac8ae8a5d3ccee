"""Perceptrons written out, whose every pre-activation and gradient lies open: what claims 2 and 3 measure on.

    x [B, I] -> ( activation(x W + b) ) * L -> logit [B], binary cross-entropy on logits

In float64, so that what vanishes is the gradient and not its digits.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from models.activations import get

Init = Literal["default", "matched"]
INITS: dict[Init, str] = {
    "default": "PyTorch's nn.Linear: weights and biases uniform within 1 / sqrt(inputs)",
    "matched": "Xavier (Glorot & Bengio 2010) for sigmoid and tanh, He (2015) for ReLU, uniform; biases 0",
}
Labels = Literal["coin", "plane"]
LABELS: dict[Labels, str] = {"coin": "a coin's", "plane": "the side of a random hyperplane"}


@dataclass(frozen=True)
class Gradients:
    """Of one pass.

    Args:
        weights: of each layer [outputs, inputs], the output's last.
        slopes: of each hidden layer's activation at its pre-activations [B, H].
        deltas: of each layer's pre-activations [B, outputs].
        inputs: of each layer [B, inputs].
    """

    weights: list[Tensor]
    slopes: list[Tensor]
    deltas: list[Tensor]
    inputs: list[Tensor]


class Perceptron:
    """Layers [outputs, inputs] with biases; hidden ones end in the registry's `activation`.

    Args:
        widths: from the inputs to the one output: 10, 64, 64, 64, 1.
    """

    def __init__(self, widths: Sequence[int], activation: str, init: Init, generator: torch.Generator) -> None:
        self.activation = get(activation)
        self.weights, self.biases = [], []
        for inputs, outputs in itertools.pairwise(widths):
            reach = 1 / math.sqrt(inputs)
            if init == "matched":
                he = activation == "relu" and outputs != widths[-1]
                reach = math.sqrt(6 / inputs) if he else math.sqrt(6 / (inputs + outputs))
            self.weights.append(_uniform((outputs, inputs), reach, generator))
            self.biases.append(_uniform((outputs,), reach if init == "default" else 0.0, generator))

    def parameters(self) -> list[Tensor]:
        return [*self.weights, *self.biases]

    def __call__(self, x: Tensor) -> Tensor:
        """[B, I] -> logits [B]."""
        for weight, bias in zip(self.weights[:-1], self.biases, strict=False):
            x = self.activation.expression(F.linear(x, weight, bias))
        return F.linear(x, self.weights[-1], self.biases[-1])[:, 0]

    def gradients(self, x: Tensor, y: Tensor) -> Gradients:
        """Of the mean loss over a batch x [B, I] with labels y [B]."""
        inputs: list[Tensor] = []
        before: list[Tensor] = []
        slopes: list[Tensor] = []
        for weight, bias in zip(self.weights, self.biases, strict=True):
            if before:
                x = self.activation.expression(before[-1])
                slopes.append(torch.autograd.grad(x.sum(), before[-1], retain_graph=True)[0])
            inputs.append(x)
            before.append(F.linear(x, weight, bias))
        loss = F.binary_cross_entropy_with_logits(before[-1][:, 0], y)
        found = torch.autograd.grad(loss, [*self.weights, *before])
        layers = len(self.weights)
        return Gradients(list(found[:layers]), slopes, list(found[layers:]), [each.detach() for each in inputs])


def _uniform(shape: tuple[int, ...], reach: float, generator: torch.Generator) -> Tensor:
    drawn = torch.rand(shape, generator=generator, dtype=torch.float64)
    return ((2 * drawn - 1) * reach).requires_grad_()


def batch(size: int, inputs: int, labels: Labels, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Normal x [B, I] and labels y [B]."""
    x = torch.randn(size, inputs, generator=generator, dtype=torch.float64)
    normal = torch.randn(inputs, generator=generator, dtype=torch.float64)
    coin = torch.rand(size, generator=generator, dtype=torch.float64) < 0.5
    return x, (coin if labels == "coin" else x @ normal > 0).double()


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one core: products this small are slower on two, and ten times so beside other work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
