"""The registry: every feed-forward activation that Actuary knows, one record each.

A record is a torch expression, its kind, and the paper it comes from. Everything else is derived
from it: the feed-forward block (models/gpt.py), the ONNX function, its formula as text and its
curve (export/ops), the manifest, the service's list, the load test's rows, the README's table and
the parametrised tests. To add an activation, add a record here, or publish one from a package of
your own under the entry-point group `actuary.activations`:

    [project.entry-points."actuary.activations"]
    squared_silu = "my_package:squared_silu"     # an Activation

An expression is written over torch's elementwise functions, so that it can be traced. Its
arguments say what it is: `x` alone is pointwise, `gate, up` are the two halves of a gated
projection, and an argument with a default (`beta=1.0`) is a learned scalar that starts there.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib.metadata
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from actuary import BadInput

Kind = Literal["pointwise", "learned", "gated", "hidden_axis"]
ENTRY_POINTS = "actuary.activations"
BIASED = "biased_"  # NAME's operator after the addition of a bias is called biased_NAME (export/ops)


@dataclass(frozen=True)
class Activation:
    """One feed-forward activation.

    Args:
        name: the field's name for it; also the name of the checkpoint, the bundle and the operator.
        expression: over tensors of one shape [..., H]: `f(x)`, or `f(gate, up)`; returns [..., H].
            Further arguments are learned scalars, their defaults the initial values.
        kind: `pointwise`, `learned` (pointwise with learned scalars), `gated`, or `hidden_axis`
            (one unit's output depends on all H).
        paper: where the formula comes from.
    """

    name: str
    expression: Callable[..., Tensor]
    kind: Kind
    paper: str

    def __post_init__(self) -> None:
        arguments = tuple(inspect.signature(self.expression).parameters)
        tensors = arguments[: len(arguments) - len(self.learned)]
        expected = ("gate", "up") if self.kind == "gated" else ("x",)
        if tensors != expected or (self.kind == "learned") != (self.kind != "gated" and bool(self.learned)):
            raise BadInput(
                f"activation {self.name!r} of kind {self.kind!r} takes {arguments}; allowed: (x) when pointwise "
                "or hidden_axis, (x, scalar=start, ...) when learned, (gate, up) when gated"
            )
        if not (self.name.isidentifier() and self.name.isascii()):
            raise BadInput(f"activation name {self.name!r} must be an ASCII identifier: it names an ONNX operator")
        if self.name.startswith(BIASED):
            raise BadInput(
                f"activation name {self.name!r} must not begin with {BIASED!r}: so begin the operators that add a bias "
                "before an activation"
            )

    @property
    def gated(self) -> bool:
        return self.kind == "gated"

    @functools.cached_property
    def learned(self) -> Mapping[str, float]:
        """Learned scalars and where they start."""
        parameters = inspect.signature(self.expression).parameters.values()
        return MappingProxyType({p.name: p.default for p in parameters if p.default is not p.empty})

    @functools.cached_property
    def digest(self) -> str:
        """12 hex digits that say whether a model was trained with this function, however it is written: of its values
        at fixed places, to 6 figures. Whether a kernel is the very same: export/ops/trace.py."""
        x = torch.linspace(-8, 8, 64, dtype=torch.float64).reshape(8, 8)
        tensors = (x, x.flip(0)) if self.gated else (x,)
        learned = (torch.tensor([start], dtype=torch.float64) for start in self.learned.values())
        text = " ".join(f"{value:.6g}" for value in self.expression(*tensors, *learned).flatten().tolist())
        return hashlib.sha256(f"{text} {dict(self.learned)}".encode()).hexdigest()[:12]

    def __deepcopy__(self, memo: object) -> Activation:
        return self  # nothing in it changes; a model that holds it can be copied

    def __call__(self, projected: Tensor, **learned: Tensor) -> Tensor:
        """Apply to the up-projection's output: [..., H], or packed [..., 2H] when gated -> [..., H]."""
        tensors = projected.chunk(2, dim=-1) if self.gated else (projected,)
        return self.expression(*tensors, **learned)


SQRT_HALF = math.sqrt(0.5)
SQRT_2_OVER_PI = math.sqrt(2 / math.pi)
SELU_ALPHA, SELU_SCALE = 1.6732632423543772, 1.0507009873554805  # the fixed point of Klambauer's eq. 14
CELU_ALPHA = 1.0


# Shared between pointwise records and the gated forms built from them.
def relu(x: Tensor) -> Tensor:
    return torch.relu(x)


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x * SQRT_HALF))


def silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def threshold(x: Tensor) -> Tensor:
    return torch.where(x >= 0, torch.ones_like(x), torch.zeros_like(x))


def elu(x: Tensor) -> Tensor:
    # min(x, 0) inside, so that expm1 never overflows in the branch that is not taken.
    return torch.relu(x) + torch.expm1(torch.clamp(x, max=0))


def solu(x: Tensor) -> Tensor:
    y = x * torch.softmax(x, dim=-1)
    centred = y - torch.mean(y, dim=-1, keepdim=True)
    return centred * torch.rsqrt(torch.mean(centred * centred, dim=-1, keepdim=True) + 1e-5)


SHAZEER = "Shazeer 2020, GLU Variants Improve Transformer, arXiv:2002.05202"

# fmt: off
BUILT_IN = (
    Activation("threshold", threshold, "pointwise", "Rosenblatt 1958, The Perceptron"),
    Activation("sigmoid", lambda x: torch.sigmoid(x), "pointwise", "Verhulst 1838; Rumelhart et al. 1986"),
    Activation("tanh", lambda x: torch.tanh(x), "pointwise", "LeCun et al. 1998, Efficient BackProp"),
    Activation("softmax", lambda x: torch.softmax(x, dim=-1), "hidden_axis",
               "Bridle 1990, Training Stochastic Model Recognition Algorithms"),
    Activation("relu", relu, "pointwise",
               "Nair & Hinton 2010, Rectified Linear Units Improve Restricted Boltzmann Machines"),
    Activation("leaky_relu", lambda x: torch.where(x >= 0, x, 0.01 * x), "pointwise",
               "Maas et al. 2013, Rectifier Nonlinearities Improve Neural Network Acoustic Models"),
    Activation("prelu", lambda x, a=0.25: torch.where(x >= 0, x, a * x), "learned",
               "He et al. 2015, Delving Deep into Rectifiers, arXiv:1502.01852"),
    Activation("elu", elu, "pointwise", "Clevert et al. 2016, Exponential Linear Units, arXiv:1511.07289"),
    Activation("selu", lambda x: SELU_SCALE * (torch.relu(x) + SELU_ALPHA * torch.expm1(torch.clamp(x, max=0))),
               "pointwise", "Klambauer et al. 2017, Self-Normalizing Neural Networks, arXiv:1706.02515"),
    # At alpha = 1, torch's default, CELU is ELU: the two rows are each other's control.
    Activation("celu", lambda x: torch.relu(x) + CELU_ALPHA * torch.expm1(torch.clamp(x, max=0) / CELU_ALPHA),
               "pointwise", "Barron 2017, Continuously Differentiable Exponential Linear Units, arXiv:1704.07483"),
    Activation("gelu", gelu, "pointwise", "Hendrycks & Gimpel 2016, Gaussian Error Linear Units, arXiv:1606.08415"),
    Activation("gelu_tanh", lambda x: 0.5 * x * (1 + torch.tanh(SQRT_2_OVER_PI * (x + 0.044715 * x * x * x))),
               "pointwise", "Hendrycks & Gimpel 2016, section 2; GPT-2's gelu_new"),
    Activation("quick_gelu", lambda x: x * torch.sigmoid(1.702 * x), "pointwise",
               "Hendrycks & Gimpel 2016, section 2; CLIP"),
    Activation("silu", silu, "pointwise",
               "Elfwing et al. 2017, arXiv:1702.03118; Ramachandran et al. 2017, arXiv:1710.05941"),
    Activation("swish", lambda x, beta=1.0: x * torch.sigmoid(beta * x), "learned",
               "Ramachandran et al. 2017, Searching for Activation Functions, arXiv:1710.05941"),
    Activation("solu", solu, "hidden_axis", "Elhage et al. 2022, Softmax Linear Units, Transformer Circuits Thread"),
    Activation("relu2", lambda x: torch.relu(x) ** 2, "pointwise", "So et al. 2021, Primer, arXiv:2109.08668"),
    Activation("relu6", lambda x: torch.clamp(x, 0, 6), "pointwise",
               "Krizhevsky 2010, Convolutional Deep Belief Networks on CIFAR-10"),
    Activation("softplus", lambda x: torch.nn.functional.softplus(x), "pointwise",
               "Dugas et al. 2001, Incorporating Second-Order Functional Knowledge"),
    Activation("mish", lambda x: x * torch.tanh(torch.nn.functional.softplus(x)), "pointwise",
               "Misra 2019, arXiv:1908.08681"),
    Activation("glu", lambda gate, up: torch.sigmoid(gate) * up, "gated",
               "Dauphin et al. 2017, Language Modeling with Gated Convolutional Networks, arXiv:1612.08083"),
    Activation("bilinear", lambda gate, up: gate * up, "gated", SHAZEER),
    Activation("reglu", lambda gate, up: relu(gate) * up, "gated", SHAZEER),
    Activation("geglu", lambda gate, up: gelu(gate) * up, "gated", SHAZEER),
    Activation("swiglu", lambda gate, up: silu(gate) * up, "gated", SHAZEER),
)
# fmt: on


@functools.cache
def registry() -> Mapping[str, Activation]:
    """Every activation by name: ours in the order above, then those of installed packages."""
    records = {record.name: record for record in BUILT_IN}
    for point in sorted(importlib.metadata.entry_points(group=ENTRY_POINTS), key=lambda p: p.name):
        try:
            record = point.load()
        except Exception as error:
            raise BadInput(
                f"the activation {point.name!r} that {point.value!r} should provide cannot be loaded: {error}; "
                "mend or uninstall that package"
            ) from error
        if not isinstance(record, Activation) or record.name != point.name or record.name in records:
            raise BadInput(
                f"entry point {point.name!r} of {ENTRY_POINTS} gives {record!r}; it must be an Activation "
                f"named {point.name!r} and may not reuse a known name"
            )
        records[record.name] = record
    return MappingProxyType(records)


def get(name: str) -> Activation:
    """The record called `name`; BadInput with the list and the nearest name where there is none."""
    known = registry()
    if name in known:
        return known[name]
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    raise BadInput(f"unknown activation {name!r}; known: {', '.join(known)}{hint}")
