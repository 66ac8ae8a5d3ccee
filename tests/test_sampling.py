"""service/sampling.py against the plain definitions: what may be chosen, how often, and that a seed repeats it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from service.sampling import Sampler, Sampling, _draw, most, nucleus

V = 300
many = settings(max_examples=200, deadline=None)
# Few different values, so that there are ties; and any.
logit_rows = st.lists(
    st.sampled_from([-3.0, 0.0, 0.5, 0.5, 2.0]) | st.floats(-50, 50, width=32), min_size=1, max_size=40
)


def sampler(vocab_size: int = V, *, seed: int = 0, ends=(), min_tokens: int = 0, prompt=(), **asked) -> Sampler:
    sampling = Sampling(**asked, ends=ends, min_tokens=min_tokens)
    return Sampler(sampling, vocab_size, prompt, np.random.default_rng(seed))


def softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    scaled = logits.astype(np.float64) / temperature
    weights = np.exp(scaled - scaled.max())
    return weights / weights.sum()


def ranked(probabilities: np.ndarray) -> list[int]:
    """Ids by falling probability, ties by rising id."""
    return sorted(range(len(probabilities)), key=lambda id_: (-probabilities[id_], id_))


@many
@given(logit_rows)
def test_temperature_0_is_the_highest_logit_and_of_equal_ones_the_smallest_id(row):
    logits = np.array(row, np.float32)
    assert sampler(len(row), temperature=0).choose(logits) == ranked(logits)[0]


@many
@given(
    st.lists(st.sampled_from([0.0, 1e-30, 0.25, 0.5, 1.0]) | st.floats(0, 1, width=32), min_size=1, max_size=40),
    st.data(),
)
def test_the_highest_are_as_many_as_asked_for(weights, data):
    weights = np.array(weights, np.float32)
    count = data.draw(st.integers(1, len(weights)))
    assert most(weights, count).tolist() == sorted(ranked(weights)[:count])


@many
@given(st.lists(st.integers(0, 1000), min_size=1, max_size=60).filter(any), st.integers(1, 1000))
@example([1, 1, 1, 1], 500)
def test_the_nucleus_is_the_smallest_set_of_that_mass(weights, thousandths):
    """Whole numbers, so that sums are exact."""
    weights = np.array(weights, np.float32) / 1024
    goal = thousandths / 1000 * float(weights.sum(dtype=np.float64))
    best = ranked(weights)
    count = int(np.searchsorted(np.cumsum(weights[best], dtype=np.float64), goal)) + 1
    assert nucleus(weights, thousandths / 1000).tolist() == sorted(best[:count])


@many
@given(
    st.lists(st.sampled_from([0.0, 0.5, 1.0, 1e-40]) | st.floats(0, 1, width=32), min_size=1, max_size=700).filter(any)
)
@example([1.0] * 513 + [0.0])
def test_a_draw_is_where_the_running_sum_passes_it(weights):
    weights = np.array(weights, np.float32)
    reached = np.cumsum(weights, dtype=np.float64)
    for uniform in (0.0, 0.1, 0.5, 0.9, np.nextafter(1.0, 0.0)):
        index = _draw(weights, uniform)
        assert weights[index] > 0
        slack = 1e-12 * reached[-1]
        assert reached[index] >= uniform * reached[-1] - slack
        assert reached[index] - weights[index] <= uniform * reached[-1] + slack


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 3.0},
        {"top_k": 7},
        {"top_p": 0.6},
        {"min_p": 0.2},
        {"temperature": 2.0, "top_k": 40, "top_p": 0.9},
        {"logit_bias": {5: 3.0, 6: -100.0}},
    ],
)
def test_what_is_drawn_is_distributed_as_asked(asked):
    """Chi-square with a fixed seed: 99.9 % of seeds pass; a temperature of 1.1 for 1 fails it."""
    logits = (2 * np.random.default_rng(7).normal(size=V)).astype(np.float32)
    biased = logits.copy()
    for id_, bias in asked.get("logit_bias", {}).items():
        biased[id_] += bias
    p = softmax(biased, asked.get("temperature", 1.0))
    p[p < asked.get("min_p", 0) * p.max()] = 0
    best = ranked(p)
    p[best[asked.get("top_k", V) :]] = 0
    nucleus = np.cumsum(p[best]) / p.sum()
    p[best[int(np.searchsorted(nucleus, asked.get("top_p", 1.0))) + 1 :]] = 0
    p /= p.sum()

    draws = 20_000
    chooser = sampler(seed=1, **asked)
    counts = np.bincount([chooser.choose(logits) for _ in range(draws)], minlength=V)
    assert not counts[p == 0].any(), "what may not be chosen"
    assert chi_square_passes(counts, p)
    if not asked:
        assert not chi_square_passes(counts, softmax(logits, 1.1)), "the test can fail"


def chi_square_passes(counts: np.ndarray, p: np.ndarray) -> bool:
    """Cells of fewer than 5 expected are one cell; the bound is Wilson and Hilferty's for 99.9 %."""
    expected = p * counts.sum()
    large = expected >= 5
    observed = np.append(counts[large], counts[~large].sum())
    expected = np.append(expected[large], expected[~large].sum())
    observed, expected = observed[expected > 0], expected[expected > 0]
    freedom = len(observed) - 1
    bound = freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3
    return ((observed - expected) ** 2 / expected).sum() < bound


def test_the_same_seed_chooses_the_same_and_another_does_not():
    rows = np.random.default_rng(3).normal(size=(50, V)).astype(np.float32)
    first, again, other = (sampler(seed=seed) for seed in (5, 5, 6))
    chosen = [first.choose(row) for row in rows]
    assert chosen == [again.choose(row) for row in rows]
    assert chosen != [other.choose(row) for row in rows]


def test_the_row_is_left_as_it_was():
    row = np.random.default_rng(3).normal(size=V).astype(np.float32)
    before = row.copy()
    chooser = sampler(
        ends=[1], min_tokens=3, prompt=[2], logit_bias={3: 5.0}, frequency_penalty=1, repetition_penalty=2, top_p=0.5
    )
    for _ in range(5):
        chooser.choose(row)
    assert (row == before).all()


def test_a_bias_of_100_forces_and_of_minus_100_forbids():
    row = np.random.default_rng(3).normal(size=V).astype(np.float32)
    assert sampler(logit_bias={17: 100}).choose(row) == 17
    assert sampler(temperature=0, logit_bias={17: 100}).choose(row) == 17
    best = int(row.argmax())
    assert sampler(temperature=0, logit_bias={best: -100}).choose(row) == ranked(row)[1]


def test_penalties_are_as_defined():
    """Keskar et al. for repetition; OpenAI's for the other two: logit - count * frequency - (count > 0) * presence."""
    row = np.array([1.0, 0.9, -0.1, -0.2], np.float32)
    assert sampler(4, temperature=0, prompt=[0], repetition_penalty=2).choose(row) == 1, "1 / 2 is under 0.9"
    row = np.array([-1.0, -1.9, -2.1, -3.0], np.float32)
    assert sampler(4, temperature=0, prompt=[0, 3], repetition_penalty=2).choose(row) == 1, "-1 * 2 is under -1.9"
    chooser = sampler(3, temperature=0, prompt=[0], frequency_penalty=0.4)
    row = np.array([1.0, 0.9, 0.0], np.float32)
    assert [chooser.choose(row) for _ in range(4)] == [0, 1, 0, 1], "the prompt does not count"
    chooser = sampler(3, temperature=0, presence_penalty=0.4)
    assert [chooser.choose(row) for _ in range(4)] == [0, 1, 0, 0], "once, however often"
    chooser = sampler(3, temperature=0, frequency_penalty=-0.1)
    assert [chooser.choose(row) for _ in range(3)] == [0, 0, 0]


def test_no_end_before_min_tokens():
    row = np.array([9.0, 8.0, 1.0], np.float32)
    chooser = sampler(3, temperature=0, ends=[0, 1], min_tokens=2)
    assert [chooser.choose(row) for _ in range(4)] == [2, 2, 0, 0]
    chooser = sampler(3, ends=[0, 1], min_tokens=50, logit_bias={0: 100})
    assert {chooser.choose(row) for _ in range(50)} == {2}, "whatever the bias"


@pytest.mark.parametrize("temperature", [1e-300, 1e-30, 1e-6, 1e30, 1e300])
@pytest.mark.parametrize("scale", [0, 1, 1e4, 1e30])
def test_extremes_choose_something_finite(temperature, scale):
    row = (scale * np.random.default_rng(3).normal(size=V)).astype(np.float32)
    with np.errstate(invalid="raise", divide="raise"):
        ids = [
            sampler(seed=seed, temperature=temperature, top_p=0.9, repetition_penalty=100).choose(row)
            for seed in range(5)
        ]
    assert all(0 <= id_ < V for id_ in ids)
    if scale and temperature <= 1e-6:
        assert set(ids) == {int(row.argmax())}
    if temperature >= 1e30 > scale:
        assert len(set(ids)) > 1


@pytest.mark.parametrize("asked", [{"top_k": V}, {"top_k": 10 * V}, {"top_k": 0}, {"top_p": 1.0}, {"min_p": 0.0}])
def test_what_leaves_all_changes_nothing(asked):
    rows = np.random.default_rng(3).normal(size=(50, V)).astype(np.float32)
    plain, chooser = sampler(seed=5), sampler(seed=5, **asked)
    assert [plain.choose(row) for row in rows] == [chooser.choose(row) for row in rows]


@pytest.mark.parametrize("asked", [{"top_k": 1}, {"top_p": 0.0}, {"top_p": 1e-9}, {"min_p": 1.0}])
def test_what_leaves_one_is_greedy(asked):
    rows = np.random.default_rng(3).normal(size=(50, V)).astype(np.float32)
    chooser = sampler(**asked)
    assert [chooser.choose(row) for row in rows] == rows.argmax(axis=1).tolist()
