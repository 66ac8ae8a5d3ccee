"""The compiler: traced steps, formulas, ONNX functions and error bounds of every record; what must be refused."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from actuary import BadInput, GateFailed
from export.bundle import DOMAIN, OPSET
from export.catalogue import describe
from export.ops.check import check_activation
from export.ops.error_bound import value_and_bound
from export.ops.formula import formula
from export.ops.onnx_function import onnx_function
from export.ops.trace import MEANING, VOCABULARY, trace
from models.activations import Activation, get, registry


def pointwise(expression, name="mine") -> Activation:
    return Activation(name, expression, "pointwise", "a test")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("gelu", "0.5 * x * (1 + erf(x * 0.70711))"),
        ("swiglu", "gate * sigmoid(gate) * up"),
        ("swish", "x * sigmoid(beta * x)"),
        ("threshold", "where(x >= 0, 1, 0)"),
        ("relu6", "min(max(0, x), 6)"),
        ("sigmoid", "1 / (1 + exp(-x))"),
        ("celu", "max(0, x) + expm1(min(x, 0))"),
        ("solu", "a = x * softmax(x); b = a - mean(a); b * rsqrt(mean(b * b) + 1e-05)"),
    ],
)
def test_formula(name: str, text: str):
    assert formula(trace(get(name))) == text


def test_formula_keeps_the_brackets_that_matter():
    record = pointwise(lambda x: (x - (1 - x)) / (2 / (x + 3)) - -((x * 2) ** 2))
    text = formula(trace(record))
    value = eval(text.replace("^", "**"), {"x": 1.7})
    assert value == pytest.approx(record.expression(1.7))


def test_only_the_hidden_axis_keeps_an_activation_from_being_fused():
    unfused = {name for name, record in registry().items() if not trace(record).elementwise}
    assert unfused == {name for name, record in registry().items() if record.kind == "hidden_axis"}


@pytest.mark.parametrize("name", registry())
def test_traced_steps_are_the_expression(name: str):
    record = get(name)
    generator = torch.Generator().manual_seed(5)
    inputs = {t: 4 * torch.randn(3, 8, generator=generator, dtype=torch.float64) for t in trace(record).tensors}
    inputs |= {key: torch.tensor([start], dtype=torch.float64) for key, start in record.learned.items()}
    value, bound = value_and_bound(trace(record), inputs)
    torch.testing.assert_close(value, record.expression(*inputs.values()), rtol=1e-14, atol=0)
    # A bound that says nothing would pass everything: it must stay near single precision.
    assert float((bound / (1 + value.abs())).max()) < 1e-4


@pytest.mark.parametrize("name", registry())
def test_exported_function_is_within_its_bound(name: str):
    assert check_activation(get(name), onnx_function(name, trace(get(name))), np.random.default_rng(11)) <= 1


@pytest.mark.parametrize(
    ("claimed", "actual"),
    [("gelu", "gelu_tanh"), ("silu", "quick_gelu"), ("geglu", "swiglu"), ("elu", "selu"), ("relu", "leaky_relu")],
)
def test_another_formula_under_the_name_misses_parity(claimed: str, actual: str):
    with pytest.raises(GateFailed, match=f"activation '{claimed}' misses parity at"):
        check_activation(get(claimed), onnx_function(claimed, trace(get(actual))), np.random.default_rng(0))


def test_a_naive_expm1_misses_parity():
    """e^x - 1 loses its digits near 0; the bound is tight enough to see it."""
    naive = pointwise(lambda x: torch.relu(x) + (torch.exp(torch.clamp(x, max=0)) - 1), name="elu")
    with pytest.raises(GateFailed, match="misses parity"):
        check_activation(get("elu"), onnx_function("elu", trace(naive)), np.random.default_rng(0))


@pytest.mark.parametrize("name", registry())
def test_the_reference_evaluator_reads_the_function(name: str):
    record, rng = get(name), np.random.default_rng(3)
    x = rng.normal(size=(2, 5, 16)).astype(np.float32)
    learned = {key: np.array([start], dtype=np.float32) for key, start in record.learned.items()}
    graph = helper.make_graph(
        [helper.make_node(name, ["x", *learned], ["y"], domain=DOMAIN)],
        "one",
        [
            helper.make_tensor_value_info(key, TensorProto.FLOAT, value.shape)
            for key, value in {"x": x, **learned}.items()
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 5, "hidden"])],
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(
        graph, functions=[onnx_function(name, trace(record))], opset_imports=opsets, ir_version=10
    )
    onnx.checker.check_model(model)
    (got,) = ReferenceEvaluator(model).run(None, {"x": x, **learned})
    expected = record(torch.from_numpy(x), **{key: torch.from_numpy(value) for key, value in learned.items()})
    np.testing.assert_allclose(got, expected.numpy(), rtol=2e-5, atol=1e-6)


UNUSUAL = {
    "log1p": lambda x: torch.log1p(torch.exp(-torch.abs(x))),
    "expm1": lambda x: torch.expm1(torch.clamp(x, -80, 80)),
    "rsqrt": lambda x: x * torch.rsqrt(1 + x * x),
    "sin": lambda x: torch.sin(torch.clamp(x, -3, 3)),
    "atan": lambda x: torch.atan(x),
    "maximum": lambda x: torch.maximum(x, 0.1 * x),
    "method": lambda x: x.sigmoid() * x,
    "compare": lambda x: torch.where(x < 1, x, torch.ones_like(x)),
    "sqrt": lambda x: torch.sqrt(torch.abs(x) + 1) - 1,
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_the_rest_of_the_vocabulary_exports_too(name: str):
    record = pointwise(UNUSUAL[name])
    assert check_activation(record, onnx_function("mine", trace(record)), np.random.default_rng(1)) <= 1


def test_every_word_of_the_vocabulary_has_a_meaning():
    assert set(MEANING) == VOCABULARY


@pytest.mark.parametrize(
    ("expression", "named"),
    [
        (lambda x: torch.special.i0(x), "special_i0()"),
        (lambda x: torch.nn.functional.softplus(x, beta=2.0), "softplus() with beta"),
        (lambda x: torch.nn.functional.softplus(x, 2.0), "softplus() with 2.0"),
        (lambda x: x * x.shape[-1], "the attribute shape"),
    ],
)
def test_what_the_vocabulary_lacks_is_named(expression, named: str):
    expression = trace(pointwise(expression))
    assert expression.outside == named
    assert not expression.elementwise


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        (lambda x: torch.softmax(x, dim=0), "does not turn each row"),
        (lambda x: x if x.sum() > 0 else -x, "(does not turn each row|looks at the whole hidden axis)"),
        (lambda x: x - torch.max(x), "does not turn each row"),
        (lambda x: torch.max(x, -1, keepdim=True).values, "does not turn each row"),
        (lambda x: torch.max(x, -1), "cannot be computed"),
        (lambda x: x * float(x), "cannot be computed"),
        (lambda x: torch.cumsum(x, -1), "'pointwise', but looks at the whole hidden axis; mend its kind"),
    ],
)
def test_what_is_no_activation_is_refused(expression, message: str):
    with pytest.raises(BadInput, match=f"activation 'mine' .*{message}"):
        trace(pointwise(expression))


def test_names_of_learned_scalars_clash_with_nothing():
    """`up`, `down` and `x.1`-like names stand beside weights, packed halves and inner tensors of the same name."""
    record = Activation(
        "mine", lambda x, up=1.0, t0=0.5, a=2.0, y=0.1: (a * x + y) * torch.sigmoid(up * x + t0), "learned", "a test"
    )
    assert check_activation(record, onnx_function("mine", trace(record)), np.random.default_rng(1)) <= 1
    doubled = Activation("mine", lambda x, a=1.5: torch.tanh(a * x) * torch.tanh(a * x), "learned", "a test")
    assert formula(trace(doubled)) == "tanh(a * x) * tanh(a * x)"
    shared = Activation("mine", lambda x, a=1.5: (lambda t: t * t + t)(torch.tanh(a * x)), "learned", "a test")
    assert formula(trace(shared)) == "b = tanh(a * x); b * b + b"  # a is taken


def test_a_power_of_a_power_keeps_its_brackets():
    assert formula(trace(pointwise(lambda x: (x**2) ** 3))) == "(x ^ 2) ^ 3"


@pytest.mark.parametrize(
    ("expression", "kind"), [(lambda x: torch.softmax(x, -1), "pointwise"), (lambda x: x, "hidden_axis")]
)
def test_a_kind_that_does_not_fit_the_expression_is_refused(expression, kind):
    with pytest.raises(BadInput, match="mend its kind"):
        trace(Activation("mine", expression, kind, "a test"))


def test_a_curve_has_gaps_where_there_is_no_number():
    curve = describe(pointwise(lambda x: torch.log(x))).curve
    assert curve.y[curve.x.index(-1.0)] is None
    assert curve.y[curve.x.index(1.0)] == 0.0


def test_curves_carry_value_and_slope():
    curve = describe(get("sigmoid")).curve
    middle = curve.x.index(0.0)
    assert (curve.y[middle], curve.slope[middle]) == (0.5, 0.25)
    assert max(curve.slope) == 0.25
    assert describe(get("swiglu")).curve.y == describe(get("silu")).curve.y  # drawn with up = 1
    assert set(describe(get("threshold")).curve.slope) == {0.0}
