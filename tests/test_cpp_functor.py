"""The printed C++ and CUDA functors: every word of the vocabulary, compiled, means what torch computes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from native_ops import FUSED, run

from actuary import BadInput
from export.ops import build, error_bound
from export.ops.check import one_node, probes, worst_ratio
from export.ops.cpp_functor import cpp_functor, literal
from export.ops.trace import VOCABULARY, trace
from models.activations import Activation, get

# One expression for every word of the vocabulary, each of them defined on all of float32.
WORDS = {
    "add sub neg": lambda x: 1 - (-(x + 0.5)),
    "div abs ge": lambda x: torch.where(x >= 0.25, x / (1 + torch.abs(x)), x),
    "gt le lt": lambda x: torch.where(x > 1, x, torch.where(x <= -1, -x, torch.where(x < 0.5, 2 * x, 3 * x))),
    "exp log": lambda x: torch.log(1 + torch.exp(torch.clamp(x, -20, 20))),
    "expm1 log1p": lambda x: torch.log1p(torch.abs(torch.expm1(torch.clamp(x, -30, 30)))),
    "sqrt rsqrt": lambda x: torch.sqrt(torch.abs(x) + 1) * torch.rsqrt(1 + x * x),
    "sin cos atan": lambda x: torch.sin(torch.clamp(x, -3, 3)) * torch.atan(x) + torch.cos(torch.clamp(x, -3, 3)),
    "erf tanh sigmoid": lambda x: torch.erf(x) + torch.tanh(x) * torch.sigmoid(x),
    "relu maximum minimum": lambda x: torch.maximum(torch.relu(x), torch.minimum(0.1 * x, x + 1)),
    "pow where": lambda x: torch.where(x >= 0, torch.pow(torch.abs(x) + 1, 1.7), torch.pow(torch.clamp(x, -9, 9), 3)),
    "softplus mul": lambda x: x * torch.nn.functional.softplus(x) + torch.pow(torch.clamp(x, -9, 9), 4),
}


@pytest.fixture(scope="module")
def words(tmp_path_factory, fused):
    """A library of the expressions above, under the names word_0, word_1, ..."""
    patch = pytest.MonkeyPatch()
    records = {f"word_{i}": Activation(f"word_{i}", e, "pointwise", "a test") for i, e in enumerate(WORDS.values())}
    scalars = lambda x, float=2.0, ü=0.5, mul_0=0.1: float * x + ü * torch.tanh(x) + mul_0  # noqa: E731
    records["word_names"] = Activation("word_names", scalars, "learned", "a test")
    patch.setattr(build, "registry", lambda: records)
    yield records, build.build(tmp_path_factory.mktemp("words") / "ops", cuda=False, strict=True)[0]
    patch.undo()


def test_every_word_of_the_vocabulary_is_said_above():
    said = {step.operation for e in WORDS.values() for step in trace(Activation("w", e, "pointwise", "t")).steps}
    assert said >= VOCABULARY - {"softmax", "mean", "sum"}


@pytest.mark.parametrize("index", [*range(len(WORDS)), "names"])
def test_every_word_compiles_to_what_it_means(words, index):
    records, built = words
    record = records[f"word_{index}"]
    feeds = probes(record, np.random.default_rng(4))
    worst_ratio(record, feeds, run(one_node(record), feeds, built), error_bound.KERNEL)


def test_min_and_max_hand_nan_on_from_either_side(words):
    records, built = words
    record = records[f"word_{[*WORDS].index('relu maximum minimum')}"]
    assert np.isnan(run(one_node(record), {"x": np.array([np.nan] * 17, np.float32)}, built)).all()


def test_explain_shows_the_three_forms(actuary_here):
    shown = actuary_here("explain", "swish").stdout
    assert 'Sigmoid ("t.0")' in shown
    assert "x / (1.0f + expf(-mul_0))" in shown  # and not 1 / (...), times x
    assert "__device__ float operator()(float x) const" in shown
    forms = json.loads(actuary_here("explain", "swiglu", "--json").stdout)
    assert forms["cpp"] == cpp_functor("swiglu", trace(get("swiglu")))
    assert (forms["fused"], "__device__" in forms["cuda"], "Split" in forms["onnx"]) == (True, True, True)
    solu = json.loads(actuary_here("explain", "solu", "--json").stdout)
    assert (solu["fused"], solu["cpp"], solu["cuda"]) == (False, None, None)


def test_a_hidden_axis_has_no_functor():
    with pytest.raises(BadInput, match="'solu' looks at the whole hidden axis: it has no function of one element"):
        cpp_functor("solu", trace(get("solu")))


def test_c_and_cuda_differ_in_a_qualifier_only():
    for name in FUSED:
        on_device = cpp_functor(name, trace(get(name)), cuda=True)
        assert on_device.count("__device__ ") == 2
        assert on_device.replace("__device__ ", "") == cpp_functor(name, trace(get(name)))


@pytest.mark.parametrize(
    ("value", "text"), [(0.1, "0.1f"), (-2.0, "(-2.0f)"), (1e-30, "1e-30f"), (1e300, "INFINITY"), (float("nan"), "NAN")]
)
def test_literals_read_back(value: float, text: str):
    assert literal(value) == text


def test_a_name_that_begins_like_a_biased_operator_is_refused():
    with pytest.raises(BadInput, match="must not begin with 'biased_'"):
        Activation("biased_gelu", lambda x: x, "pointwise", "me")


def test_too_many_learned_scalars_are_refused(monkeypatch):
    def many(x, a=1.0, b=1.0, c=1.0, d=1.0, e=1.0, f=1.0, g=1.0, h=1.0, i=1.0):
        return x * a * b * c * d * e * f * g * h * i

    monkeypatch.setattr(build, "registry", lambda: {"many": Activation("many", many, "learned", "me")})
    with pytest.raises(BadInput, match="'many' has 9 learned scalars; at most 8"):
        build.elementwise()


def test_the_sources_are_part_of_the_package():
    from importlib.resources import files

    assert {path.name for path in files("export.ops").joinpath("native").iterdir()} >= {
        "ort_abi.h", "activation.h", "isa.h", "vector_math.h",
        "op.cpp", "check.cpp", "cpu.cpp", "vector.cpp", "cuda.cu",
    }  # fmt: skip
