"""Claims 1, 2, 3, 8 and 10: small cases by hand, and each direction with seeds that no study uses."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.activations import registry
from studies import perceptron, slope, stability, two_classes, vanishing, zigzag
from studies.study import Options

# The studies' own seeds count from 0; nobody has looked at what these give.
SEEDS = range(70_000, 70_010)


@pytest.fixture(autouse=True)
def one_thread():
    with perceptron.one_thread():
        yield


# 1, slope


@pytest.mark.parametrize(
    ("z", "value", "steepness"),
    [(-5, 0.0067, 0.0066), (-2, 0.1192, 0.1050), (-1, 0.2689, 0.1966), (0, 0.5, 0.25), (1, 0.7311, 0.1966),
     (2, 0.8808, 0.1050), (5, 0.9933, 0.0066)],
)  # fmt: skip
def test_the_slope_table_by_hand(z, value, steepness):
    row = next(row for row in slope.table().rows if row[0] == z)
    assert row[1] == pytest.approx(value, abs=5e-5)
    assert row[2] == pytest.approx(steepness, abs=5e-5)
    assert row[3] == pytest.approx(row[2], rel=1e-4)


@given(st.floats(-700, 700))
def test_the_slope_is_s_times_one_minus_s(z):
    (value,), (steepness,) = slope.value_and_slope("sigmoid", [z])
    assert steepness == pytest.approx(value * (1 - value), abs=1e-15)
    assert 0 <= steepness <= 0.25


def test_every_activation_has_its_curves_and_its_row():
    finding = slope.finding()
    for kind in ("", "-slope"):
        drawn = [
            line.name for chart in finding.charts if chart.name.endswith("-slope") == bool(kind) for line in chart.lines
        ]
        assert sorted(drawn) == sorted(registry())
    assert [row[0] for row in finding.tables[1].rows] == list(registry())
    assert finding.verdict == "holds"


def test_flat_shares_by_hand():
    """ReLU is flat left of 0, at 0 itself too: 121 of 241 places; a step and a gate of 1 everywhere and nowhere."""
    flat = {row[0]: row[2] for row in slope.steepness().rows}
    assert flat["relu"] == pytest.approx(100 * 121 / 241, abs=0.05)
    assert flat["threshold"] == 100
    assert flat["bilinear"] == 0


# 2, vanishing


def test_four_slopes_of_a_quarter():
    assert vanishing.STEEPEST**4 == 0.00390625


def test_a_chain_of_single_units_by_hand():
    """1-1-1-1 with weights 1 and biases 0, x = 0: the first slope is 1/4, a delta p - y times the slopes after it."""
    net = perceptron.Perceptron((1, 1, 1, 1), "sigmoid", "matched", torch.Generator())
    with torch.no_grad():
        for weight in net.weights:
            weight.fill_(1.0)
    found = net.gradients(torch.tensor([[0.0]], dtype=torch.float64), torch.tensor([0.0], dtype=torch.float64))
    first = 0.5
    second = 1 / (1 + math.exp(-first))
    third = 1 / (1 + math.exp(-second))
    assert found.slopes[0].item() == 0.25
    assert found.slopes[1].item() == pytest.approx(second * (1 - second))
    assert found.deltas[2].item() == pytest.approx(third)  # p - 0
    assert found.deltas[1].item() == pytest.approx(third * second * (1 - second))
    assert found.deltas[0].item() == pytest.approx(third * second * (1 - second) * 0.25)
    assert found.weights[1].item() == pytest.approx(found.deltas[1].item() * first)
    assert found.weights[0].item() == 0  # x is 0


def test_gradients_are_those_of_torch_s_own_layers():
    net = perceptron.Perceptron((10, 64, 64, 1), "relu", "default", torch.Generator().manual_seed(SEEDS[0]))
    layers = [torch.nn.Linear(*pair, dtype=torch.float64) for pair in ((10, 64), (64, 64), (64, 1))]
    for layer, weight, bias in zip(layers, net.weights, net.biases, strict=True):
        layer.weight.data, layer.bias.data = weight.detach().clone(), bias.detach().clone()
    model = torch.nn.Sequential(layers[0], torch.nn.ReLU(), layers[1], torch.nn.ReLU(), layers[2])
    x, y = perceptron.batch(32, 10, "coin", torch.Generator().manual_seed(SEEDS[1]))
    torch.nn.BCEWithLogitsLoss()(model(x)[:, 0], y).backward()
    assert torch.equal(net(x), model(x)[:, 0])
    for layer, gradient in zip(layers, net.gradients(x, y).weights, strict=True):
        assert torch.allclose(layer.weight.grad, gradient, rtol=1e-12)


@pytest.mark.parametrize("init", perceptron.INITS)
@pytest.mark.parametrize("labels", perceptron.LABELS)
def test_the_first_gradient_vanishes_under_sigmoid(init, labels):
    sigmoid, relu = (vanishing.norms(name, init, labels, 3, SEEDS) for name in ("sigmoid", "relu"))
    assert (relu > sigmoid).all()
    assert np.median(relu / sigmoid) > vanishing.MUCH


@pytest.mark.parametrize("init", perceptron.INITS)
def test_it_falls_with_depth_and_no_layer_passes_more_than_a_quarter_of_the_slopes(init):
    by_depth = [vanishing.norms("sigmoid", init, "coin", depth, SEEDS[:4]) for depth in (2, 4, 8)]
    for shallow, deep in itertools.pairwise(by_depth):
        assert (deep < shallow).all()
    products = [vanishing.first_layer("sigmoid", init, "coin", 4, seed)[1] for seed in SEEDS]
    assert 0 < max(products) <= 0.25**4


def test_the_factor_of_a_layer_by_hand():
    assert vanishing.per_layer([2, 3, 5], [1.0, 0.25, 0.25**3]) == pytest.approx(0.25)


# 3, zigzag


def test_units_of_one_sign_by_hand():
    """Two of one sign, one mixed, one without any; a zero beside a sign has none."""
    gradient = torch.tensor([[1.0, 2.0], [-1.0, 0.0], [1.0, -1.0], [0.0, 0.0]])
    assert zigzag.of_one_sign(gradient) == (2, 3)


@pytest.mark.parametrize("trained", [False, True])
def test_one_example_never_mixes_signs_under_sigmoid_and_a_batch_does(trained, monkeypatch):
    monkeypatch.setattr(zigzag, "STEPS", 20)
    found = np.array([zigzag.shares("sigmoid", trained, seed) for seed in SEEDS])
    assert (found[:, zigzag.BATCHES.index(1)] == 1).all()
    assert found[:, zigzag.BATCHES.index(32)].mean() < 1


def test_tanh_mixes_signs_for_one_example():
    found = np.array([zigzag.shares("tanh", False, seed) for seed in SEEDS])
    assert found[:, zigzag.BATCHES.index(1)].mean() < 0.05  # 64 signs by chance


# 8, two classes


@given(st.floats(-1e4, 1e4, width=32), st.floats(-1e4, 1e4, width=32))
def test_softmax_of_two_is_sigmoid_of_their_difference(a, b):
    pair = np.array([[a, b]])
    for way in (two_classes.by_torch, two_classes.by_numpy, two_classes.by_registry):
        softmax, sigmoid = way(pair)
        assert softmax[0] == pytest.approx(sigmoid[0], abs=4e-16 * max(1, abs(a), abs(b)))


def test_two_classes_by_hand():
    """ln 3 and 0: odds of 3 to 1. In ONNX Runtime too."""
    for way, (compute, types) in two_classes.WAYS.items():
        for type_ in types:
            softmax, sigmoid = compute(np.array([[math.log(3), 0], [0, math.log(3)], [7, 7]]).astype(type_))
            for values in (softmax, sigmoid):
                assert values == pytest.approx([0.75, 0.25, 0.5], abs=1e-6), way


def test_both_give_the_same_gradient_by_hand():
    """p - 1 of the target's logit: at odds of 3 to 1, -1/4."""
    for gradient in two_classes.gradients(np.array([[math.log(3), 0.0]])):
        assert gradient == pytest.approx([-0.25])


# 10, stability


@pytest.mark.parametrize("name", [name for name in stability.FORMS if name not in stability.NAIVE])
@pytest.mark.parametrize("type_", stability.TYPES)
def test_the_stable_forms_at_the_extremes(name, type_):
    values, slopes = stability.value_and_slope(stability.FORMS[name], [-1000.0, -500.0, 0.0, 500.0, 1000.0], type_)
    assert values == pytest.approx([0, 0, 0.5, 1, 1], abs=1e-200)
    assert slopes == pytest.approx([0, 0, 0.25, 0, 0], abs=1e-200)


@given(st.floats(-60, 60))
def test_the_stable_form_is_the_naive_one_where_that_does_not_overflow(x):
    for form in (stability.stable, torch.sigmoid):
        (value,), (steepness,) = stability.value_and_slope(form, [x], "float64")
        assert (value, steepness) == pytest.approx(stability.exact(x), rel=1e-14)
        assert value == pytest.approx(1 / (1 + math.exp(-x)), rel=1e-14)


def test_the_naive_forms_overflow():
    (value, *_), (steepness, *_) = stability.value_and_slope(stability.naive, [-1000.0], "float64")
    assert value == 0  # 1 / infinity
    assert math.isnan(steepness)
    (value,), _ = stability.value_and_slope(stability.naive_quotient, [1000.0], "float64")
    assert math.isnan(value)


def test_losses_by_hand():
    """A logit of 1000 with label 0 costs 1000; at 0 either label ln 2; with the right label nothing."""
    for name in ("on logits, written out", "on logits, torch's"):
        x = torch.tensor([1000.0, 0.0, 0.0, 1000.0, -1000.0])
        y = torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0])
        expected = [1000, math.log(2), math.log(2), 0, 1000]
        assert stability.LOSSES[name](x, y).tolist() == pytest.approx(expected)
    on_probabilities = stability.loss_on_probabilities(torch.tensor([1000.0, 1000.0]), torch.tensor([0.0, 1.0]))
    assert math.isinf(on_probabilities[0])
    assert math.isnan(on_probabilities[1])


def test_exact_by_hand():
    assert stability.exact(0.0) == (0.5, 0.25)
    assert stability.exact(math.log(3)) == pytest.approx((0.75, 0.1875))
    assert stability.exact(1e308) == (1, 0)
    assert stability.exact_loss(0.0, 1.0) == pytest.approx((math.log(2), -0.5))


def test_what_is_wrong_is_told_apart():
    assert stability.wrong(0.5, 0.5, "float32") == ""
    assert stability.wrong(float("nan"), 0.5, "float32") == "NaN"
    assert stability.wrong(float("-inf"), 0.5, "float32") == "infinite"
    assert stability.wrong(100.0, 1000.0, "float32", relative=True) == "100, not 1e+03"
    assert stability.wrong(1000.0, 1000.0001, "float32", relative=True) == ""
    assert stability.wrong(0.5, 0.50001, "float32") != ""


def test_the_fused_kernel_is_right_too(fused):
    assert stability.in_onnx(fused) == ""


def test_without_a_library_it_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(stability.library, "DEFAULT_FOLDER", tmp_path)
    found, why = stability.find_library()
    assert found is None
    assert "actuary ops build" in why


# The whole of them, as small as they get


@pytest.mark.parametrize("module", [slope, vanishing, zigzag, two_classes, stability], ids=lambda m: m.CLAIM.name)
def test_a_study_runs_from_end_to_end(module, tmp_path: Path, monkeypatch, corpus):
    """With the service of claims 8 and 10, and one seed."""
    monkeypatch.setattr(vanishing, "DEPTHS", (2, 4))
    monkeypatch.setattr(zigzag, "STEPS", 2)
    for served in (two_classes, stability):
        monkeypatch.setattr(served.Corpus, "read", lambda *_: corpus)
        monkeypatch.setattr(served, "QUICK_PROMPTS" if served is stability else "QUICK_PAIRS", 2)
    shares = []
    options = Options(True, 1, tmp_path, 1, lambda doing, share: shares.append(share))
    finding = module.run(options)
    assert shares == sorted(shares)
    assert all(0 <= share <= 1 for share in shares)
    assert finding.verdict in ("holds", "holds in part")
    if module in (two_classes, stability):
        assert finding.verdict == "holds", [figure for figure in finding.figures if figure.agrees is False]
