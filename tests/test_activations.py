"""The registry: every record against a trusted outsider and a figure checked by hand; bad records and names refused."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from actuary import BadInput
from models import activations
from models.activations import Activation, get, registry

# torch's own functions; what it lacks is written out from the paper.
OUTSIDERS = {
    "threshold": lambda x: (x >= 0).to(x.dtype),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "softmax": lambda x: F.softmax(x, dim=-1),
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "prelu": lambda x: F.prelu(x, torch.tensor([0.25], dtype=x.dtype)),
    "elu": F.elu,
    "selu": F.selu,
    "celu": F.celu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x / (1 + torch.exp(-1.702 * x)),
    "silu": F.silu,
    "swish": F.silu,  # at beta = 1
    "solu": lambda x: F.layer_norm(x * F.softmax(x, dim=-1), x.shape[-1:]),
    "relu2": lambda x: F.relu(x).square(),
    "relu6": F.relu6,
    "softplus": F.softplus,
    "mish": F.mish,
    "glu": lambda x: F.glu(torch.cat(x.chunk(2, -1)[::-1], -1)),  # torch gates by the second half
    "bilinear": lambda x: x.chunk(2, -1)[0] * x.chunk(2, -1)[1],
    "reglu": lambda x: F.relu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1],
    "geglu": lambda x: F.gelu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1],
    "swiglu": lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1],
}
# Value and slope of single places, worked out by hand.
BY_HAND = {
    "sigmoid": (5.0, 0.9933, 0.0066),
    "tanh": (0.0, 0.0, 1.0),
    "relu6": (7.0, 6.0, 0.0),
    "relu2": (3.0, 9.0, 6.0),
    "leaky_relu": (-2.0, -0.02, 0.01),
    "elu": (-1.0, math.exp(-1) - 1, math.exp(-1)),
    "selu": (1.0, 1.0507, 1.0507),
    "gelu": (1.0, 0.8413, 1.0833),  # Phi(1), Phi(1) + phi(1)
    "silu": (0.0, 0.0, 0.5),
    "softplus": (0.0, math.log(2), 0.5),
    "threshold": (0.0, 1.0, 0.0),
}


def start_values(record: Activation, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([start], dtype=dtype) for name, start in record.learned.items()}


def test_every_activation_of_the_source_documents_is_there():
    assert set(registry()) >= set(OUTSIDERS)


@pytest.mark.parametrize("name", OUTSIDERS)
def test_agrees_with_an_outsider(name: str):
    x = torch.cat([torch.linspace(-30, 30, 1201), torch.tensor([0.0, 1e-6, -1e-6, 100.0, -100.0, 500.0])]).double()
    x = x[: len(x) // 8 * 8].reshape(-1, 8)
    record = get(name)
    torch.testing.assert_close(record(x, **start_values(record)), OUTSIDERS[name](x), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", BY_HAND)
def test_value_and_slope_by_hand(name: str):
    z, value, slope = BY_HAND[name]
    x = torch.tensor([z], dtype=torch.float64, requires_grad=True)
    y = get(name)(x)
    assert y.item() == pytest.approx(value, abs=1e-4)
    gradient = torch.autograd.grad(y.sum(), x)[0] if y.requires_grad else torch.zeros(1)
    assert gradient.item() == pytest.approx(slope, abs=1e-4)


@pytest.mark.parametrize("name", registry())
@pytest.mark.parametrize("magnitude", [500.0, 1e3, 1e4])
def test_value_and_gradient_hold_at_extremes(name: str, magnitude: float):
    record = get(name)
    width = 16 if record.gated else 8
    x = magnitude * torch.linspace(-1, 1, width)[None]
    x.requires_grad_()
    learned = {key: value.requires_grad_() for key, value in start_values(record, torch.float32).items()}
    y = record(x, **learned)
    assert y.isfinite().all()
    if y.requires_grad:
        y.sum().backward()
        assert all(leaf.grad.isfinite().all() for leaf in (x, *learned.values()))


def test_learned_scalars_come_from_the_signature():
    assert dict(get("swish").learned) == {"beta": 1.0}
    assert dict(get("prelu").learned) == {"a": 0.25}
    assert not get("gelu").learned


def test_unknown_name_gives_the_list_and_the_nearest():
    with pytest.raises(
        BadInput, match=r"unknown activation 'swigul'; known: threshold, .*swiglu; did you mean 'swiglu'\?"
    ):
        get("swigul")


@pytest.mark.parametrize(
    ("expression", "kind"),
    [
        (lambda y: y, "pointwise"),
        (lambda x, beta=1.0: x, "pointwise"),  # learned, but does not say so
        (lambda x: x, "learned"),  # says so, but is not
        (lambda x: x, "gated"),
        (lambda gate, up: gate, "pointwise"),
    ],
)
def test_a_record_whose_arguments_do_not_fit_its_kind_is_refused(expression, kind):
    with pytest.raises(BadInput, match=r"takes .*; allowed: \(x\)"):
        Activation("mine", expression, kind, "me")


@pytest.mark.parametrize("name", ["my act", "é", "", "1st"])
def test_a_name_that_cannot_be_an_operator_is_refused(name: str):
    with pytest.raises(BadInput, match="must be an ASCII identifier"):
        Activation(name, lambda x: x, "pointwise", "me")


def test_the_digest_follows_the_formula():
    def digest(expression, kind="pointwise"):
        return Activation("mine", expression, kind, "me").digest

    assert digest(lambda x: torch.tanh(x)) == digest(lambda x: 2 * torch.sigmoid(2 * x) - 1)  # the same function
    assert digest(lambda x: torch.tanh(x)) != digest(lambda x: torch.tanh(1.001 * x))
    assert digest(lambda x, a=1.0: a * x, "learned") != digest(lambda x, a=2.0: a * x, "learned")


def test_a_model_that_holds_a_record_can_be_copied():
    record = activations.get("swish")
    assert record.learned
    assert copy.deepcopy([record]) == [record]


def test_a_broken_entry_point_is_named(monkeypatch):
    class Point:
        name, value = "bad", "nowhere:bad"

        def load(self):
            raise ImportError("no module named nowhere")

    monkeypatch.setattr(activations.importlib.metadata, "entry_points", lambda group: [Point()])
    activations.registry.cache_clear()
    try:
        with pytest.raises(BadInput, match="'bad' that 'nowhere:bad' should provide cannot be loaded"):
            registry()
    finally:
        activations.registry.cache_clear()
