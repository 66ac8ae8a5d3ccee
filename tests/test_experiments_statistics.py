"""Confidence of experiments: against formulas done over, and against what happens when one watches all the time."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import integrate, special, stats

from service.experiments import confidence
from service.experiments.confidence import ALPHA, LEAST_KEYS, SHARE_ALPHA, Interval, Sums, difference, share_p_value
from service.experiments.definition import Assignment, Definition, Running
from service.experiments.verdict import outcome_of, verdict

Floats = NDArray[np.float64]


def sums_of(by_key: list[list[float]]) -> Sums:
    n, s = np.array([len(values) for values in by_key]), np.array([sum(values) for values in by_key])
    return Sums(len(by_key), *(float(x) for x in (n.sum(), s.sum(), (s * s).sum(), (s * n).sum(), (n * n).sum())))


def test_mean_and_variance_of_keys_that_ask_once_are_those_of_a_sample() -> None:
    values = np.random.default_rng(0).normal(3, 2, 100)
    sums = sums_of([[value] for value in values])
    assert sums.mean == pytest.approx(values.mean())
    assert sums.variance == pytest.approx(values.var(ddof=1) / 100)


def test_the_variance_is_that_of_keys() -> None:
    """As a bootstrap over keys finds it; taking requests for units would be wrong by the square of five."""
    rng = np.random.default_rng(1)
    by_key = [list(rng.normal(rng.normal(1, 0.5), 0.1, rng.integers(1, 60))) for _ in range(400)]
    draws = rng.integers(0, 400, (4000, 400))
    n, s = np.array([len(v) for v in by_key]), np.array([sum(v) for v in by_key])
    bootstrap = (s[draws].sum(1) / n[draws].sum(1)).var()
    flat = np.concatenate(by_key)
    assert sums_of(by_key).variance == pytest.approx(bootstrap, rel=0.1)
    assert sums_of(by_key).variance > 20 * flat.var() / flat.size


def test_the_interval_is_the_papers() -> None:
    """Equation (9) of arXiv:2103.06476, for t keys with standard deviation sd; and tightest where it says."""
    t, sd, alpha = 700, 0.8, 0.03
    rho = confidence.rho(alpha)
    expected = sd * math.sqrt(2 * (t * rho**2 + 1) / (t**2 * rho**2) * math.log(math.sqrt(t * rho**2 + 1) / alpha))
    assert confidence.half_width(sd**2 / t, t, alpha) == pytest.approx(expected)
    at = confidence.TIGHT_AT

    def width(rho: float) -> float:
        return math.sqrt(2 * (at * rho**2 + 1) / (at * rho) ** 2 * math.log(math.sqrt(at * rho**2 + 1) / alpha))

    assert width(rho) <= 1.001 * min(width(rho * f) for f in np.geomspace(0.3, 3, 201))


def latencies(rng: np.random.Generator, size: tuple[int, ...]) -> Floats:
    """Logarithms with a long right tail: one in twenty waits for others."""
    return rng.normal(1, 0.2, size) + (rng.random(size) < 0.05) * rng.exponential(1.0, size)


def watched(values: Floats, arms: NDArray[np.bool_], shift: float = 0.0) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """values, arms [runs, keys], a key after the other -> at each key, whether it has left 0, and whether `shift`."""
    n1, n0 = np.cumsum(arms, 1), np.cumsum(~arms, 1)

    def mean_and_variance(mine: NDArray[np.bool_], n: Any) -> tuple[Floats, Floats]:
        m = np.maximum(n, 2)
        s, ss = np.cumsum(values * mine, 1), np.cumsum(values**2 * mine, 1)
        return s / m, (ss - s**2 / m) / (m - 1)

    (mean1, of_a_key1), (mean0, of_a_key0) = mean_and_variance(arms, n1), mean_and_variance(~arms, n0)
    t = n1 + n0
    variance = np.maximum(of_a_key1, of_a_key0) * (1 / np.maximum(n1, 2) + 1 / np.maximum(n0, 2))
    spread = t * confidence.rho(ALPHA) ** 2
    half = np.sqrt(variance * 2 * (spread + 1) / spread * np.log(np.sqrt(spread + 1) / ALPHA))
    judged = np.minimum(n1, n0) >= LEAST_KEYS
    return judged & (np.abs(mean1 - mean0) > half), judged & (np.abs(mean1 - mean0 - shift) > half)


def test_the_watching_test_computes_what_the_service_does() -> None:
    rng = np.random.default_rng(2)
    values, arms = latencies(rng, (1, 300)), rng.random((1, 300)) < 0.5
    shown = []
    for keys in range(1, 301):
        one, other = ([[v] for v in values[0, :keys][arms[0, :keys] == arm]] for arm in (True, False))
        found = difference(sums_of(one), sums_of(other), ALPHA) if min(len(one), len(other)) > 1 else None
        shown.append(found is not None and not found.low <= 0 <= found.high)
    assert shown == watched(values, arms)[0][0].tolist()


@pytest.mark.parametrize("share", [0.5, 0.1])
def test_watching_all_the_time_raises_no_more_false_alarms_than_alpha(share: float) -> None:
    """1000 A/A experiments of 4000 keys, looked at after every one; a t-test looked at so often is wrong in a third."""
    rng = np.random.default_rng(3)
    runs, keys = 1000, 4000
    values, arms = latencies(rng, (runs, keys)), rng.random((runs, keys)) < share
    alarms = watched(values, arms)[0].any(1).sum()
    # Were it ALPHA exactly, more than this would come once in 1000 times.
    assert alarms <= stats.binom.ppf(0.999, runs, ALPHA), alarms
    assert alarms > 0 or share == 0.5, "an interval that never errs is too wide to be one"


def test_a_true_difference_is_found_and_covered_at_every_look() -> None:
    rng = np.random.default_rng(4)
    runs, keys, shift = 300, 4000, 0.05
    values, arms = latencies(rng, (runs, keys)), rng.random((runs, keys)) < 0.5
    found, missed = watched(values + shift * arms, arms, shift)
    assert found[:, -1].mean() > 0.8
    assert missed.any(1).sum() <= stats.binom.ppf(0.999, runs, ALPHA)


def test_keys_that_come_back_raise_no_more_false_alarms() -> None:
    """120 people of very different habits who go on asking, an A/A experiment, watched after every 40 requests."""
    rng = np.random.default_rng(5)
    runs, people, alarms = 300, 160, 0
    for _ in range(runs):
        arms = rng.random(people) < 0.5
        own, often = rng.normal(1, 0.3, people), rng.pareto(1.5, people) + 0.1
        n, s, alarm = np.zeros(people), np.zeros(people), False
        for _ in range(100):
            who = rng.choice(people, 40, p=often / often.sum())
            np.add.at(n, who, 1)
            np.add.at(s, who, own[who] + rng.normal(0, 0.2, 40))
            sums = []
            for arm in (True, False):
                a, b = n[(arms == arm) & (n > 0)], s[(arms == arm) & (n > 0)]
                sums.append(Sums(len(a), a.sum(), b.sum(), (b * b).sum(), (a * b).sum(), (a * a).sum()))
            found = difference(sums[0], sums[1], ALPHA)
            alarm |= found is not None and not found.low <= 0 <= found.high
        alarms += alarm
    assert alarms <= stats.binom.ppf(0.999, runs, ALPHA), alarms


def test_the_share_test_is_its_definition() -> None:
    """1 over the Bayes factor of a beta prior, integrated, for two arms."""
    keys, share = (130, 210), 0.5
    prior = stats.beta(confidence.SHARE_PRIOR * share, confidence.SHARE_PRIOR * (1 - share))
    likelihood = stats.binom(sum(keys), share).pmf(keys[0])
    mixture, _ = integrate.quad(lambda p: prior.pdf(p) * stats.binom(sum(keys), p).pmf(keys[0]), 0.2, 0.6)
    assert share_p_value(keys, [share, 1 - share]) == pytest.approx(min(1, likelihood / mixture), rel=1e-6)
    assert share_p_value((0, 0), [0.5, 0.5]) == 1


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.9, 0.1), (0.5, 0.3, 0.2)])
def test_watching_the_shares_raises_few_false_alarms_and_finds_a_wrong_split(shares: tuple[float, ...]) -> None:
    rng = np.random.default_rng(6)
    runs, looks, each = 400, 100, 50
    prior = confidence.SHARE_PRIOR * np.array(shares)

    def alarms(true: Any) -> int:
        keys = rng.multinomial(each, true, (runs, looks)).cumsum(1)
        log_beta = special.gammaln(prior + keys).sum(-1) - special.gammaln((prior + keys).sum(-1))
        log_factor = log_beta - special.gammaln(prior).sum() + special.gammaln(prior.sum()) - keys @ np.log(shares)
        for look in (0, looks - 1):
            expected = min(1.0, math.exp(-log_factor[0, look]))
            assert share_p_value(keys[0, look].tolist(), shares) == pytest.approx(expected, rel=1e-6)
        return int((np.exp(-log_factor) < SHARE_ALPHA).any(1).sum())

    assert alarms(shares) <= stats.binom.ppf(0.999, runs, SHARE_ALPHA)
    others = -0.05 / (len(shares) - 1)
    wrong = [share + (others if at else 0.05) for at, share in enumerate(shares)]
    assert alarms(wrong) > 0.95 * runs


@pytest.mark.parametrize(
    ("low", "high", "outcome"),
    [
        (0.001, 0.3, "slower"),
        (0.03, 0.04, "slower"),
        (0.001, 0.019, "equivalent"),
        (-0.0197, 0.0197, "equivalent"),
        (-0.021, 0.01, "inconclusive"),
        (-0.3, 0.001, "inconclusive"),
        (-0.3, -0.001, "faster"),
        (-0.021, -0.001, "faster"),
    ],
)
def test_outcomes(low: float, high: float, outcome: str) -> None:
    assert outcome_of(Interval((low + high) / 2, low, high), 0.02) == outcome


def running(**arms: float) -> Running:
    definition = Definition("act", arms, next(iter(arms)), "act")
    return Running(1, definition, Assignment(definition), 0.0)


def test_a_verdict_says_what_was_put_in() -> None:
    rng = np.random.default_rng(7)
    gelu, swiglu = (sums_of([[v] for v in rng.normal(mean, 0.1, 5000)]) for mean in (1.0, 1.1))
    counted = Sums(5000, 5000, 0, 0, 0, 5000)
    sums = {("failed", arm, ""): counted for arm in ("gelu", "swiglu")}
    found = verdict(running(gelu=1, swiglu=1), {**sums, ("total", "gelu", ""): gelu, ("total", "swiglu", ""): swiglu})
    baseline, arm = found["arms"]
    assert "outcome" not in baseline
    assert arm["outcome"] == "slower"
    assert arm["latency"]["low"] < math.exp(0.1) < arm["latency"]["high"]
    assert arm["sentence"].startswith("swiglu: slower, +1")
    assert arm["log_loss"] is None
    assert found["fit"]


def test_a_wrong_split_voids_every_outcome() -> None:
    sums = {
        ("failed", "gelu", ""): Sums(1000, 1000, 0, 0, 0, 1000),
        ("failed", "swiglu", ""): Sums(800, 800, 0, 0, 0, 800),
    }
    rng = np.random.default_rng(8)
    values = {
        ("total", arm, ""): sums_of([[v] for v in rng.normal(at, 0.1, 800)])
        for at, arm in enumerate(("gelu", "swiglu"))
    }
    found = verdict(running(gelu=1, swiglu=1), {**sums, **values})
    assert found["fit"] is False
    assert found["arms"][1]["outcome"] == "inconclusive"
    assert "shares" in found["arms"][1]["sentence"]


def test_more_arms_share_the_error_rate() -> None:
    rng = np.random.default_rng(9)
    values = {("total", arm, ""): sums_of([[v] for v in rng.normal(1, 0.1, 800)]) for arm in "abc"}
    two, three = (verdict(running(**dict.fromkeys(arms, 1)), values)["arms"][1]["latency"] for arms in ("ab", "abc"))
    assert three["low"] < two["low"] < two["ratio"] == three["ratio"] < two["high"] < three["high"]
