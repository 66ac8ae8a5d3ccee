"""What the service and the page know of an activation, derived from its record: formula, kind, paper, curve.

The service never imports torch, so this is written out at export: into each manifest, and for the whole
registry beside the bundles.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch

from export.bundle import CATALOGUE, ActivationInfo, Catalogue, Curve
from export.ops.formula import formula
from export.ops.trace import trace
from models.activations import Activation, registry
from models.files import write_atomically

# 6 each side shows every bend, relu6's included; steps of 0.05 draw smoothly and land on 0, where steps jump.
REACH, PER_UNIT = 6, 20
UNITS = 8  # of a hidden axis: the drawn one and seven at 0


def curve(activation: Activation) -> Curve:
    """f and its slope at places [241] from -REACH to REACH, in float64, rounded to 6 digits."""
    x = (torch.arange(-REACH * PER_UNIT, REACH * PER_UNIT + 1, dtype=torch.float64) / PER_UNIT).requires_grad_()
    learned = [torch.tensor([start], dtype=torch.float64) for start in activation.learned.values()]
    units = UNITS if activation.kind == "hidden_axis" else 1
    if activation.gated:
        y = activation.expression(x, torch.ones_like(x), *learned)
    else:
        rows = torch.cat([x[:, None], torch.zeros(len(x), units - 1, dtype=torch.float64)], dim=-1)
        y = activation.expression(rows, *learned)[:, 0]
    # A step function has no path back to x: its slope is 0 wherever it exists.
    slope = torch.autograd.grad(y.sum(), x)[0] if y.requires_grad else torch.zeros_like(x)

    def rounded(values: torch.Tensor) -> list[float | None]:
        return [float(f"{value:.6g}") if math.isfinite(value) else None for value in values.detach().tolist()]

    return Curve(x=x.tolist(), y=rounded(y), slope=rounded(slope), units=units)


def describe(activation: Activation) -> ActivationInfo:
    """The record as people who only serve it see it."""
    expression = trace(activation)
    return ActivationInfo(
        name=activation.name,
        formula=formula(expression),
        kind=activation.kind,
        paper=activation.paper,
        learned=dict(activation.learned),
        digest=expression.digest,
        record_digest=activation.digest,
        curve=curve(activation),
    )


def write_catalogue(folder: Path) -> None:
    """Writes every activation of the registry beside the bundles of `folder`."""
    catalogue = Catalogue(activations=[describe(record) for record in registry().values()])
    write_atomically(folder / CATALOGUE, catalogue.model_dump_json())
