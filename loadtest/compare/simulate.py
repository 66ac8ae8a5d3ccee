"""Comparisons of known truth, thousands of them: what chose the estimator, its interval and its looks.

    python -m loadtest.compare.simulate

prints, for each kind of noise, how far each estimator errs, how often each interval misses, and how often a whole
comparison with looks on the way says something false. `statistics.py` quotes the figures; its test runs a part.

    quiet    blocks differ by 3 %
    busy     by 5 %, the machine drifts by 10 %, and one block in ten is slowed by 30 % on average
    shared   as recorded on two cores that others used at the same time, in blocks of 0.15 s after 0.05 s: the level
             jumps by 60 % every four blocks, neighbouring blocks' ranks correlate by 0.6, twenty blocks apart by 0.1
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import numpy as np
from scipy import signal, stats

from loadtest.compare import statistics
from loadtest.compare.design import Design
from loadtest.compare.sequential import Array, Look

KINDS: Final = ("quiet", "busy", "shared")
Randomness = np.random.Generator


def noise(random: Randomness, blocks: int, kind: str) -> Array:
    """log p50 of so many blocks, one after another, of one and the same variant."""
    if kind == "quiet":
        return random.normal(0, 0.03, blocks)
    if kind == "busy":
        disturbed = (random.random(blocks) < 0.1) * random.exponential(0.3, blocks)
        return random.normal(0, 0.05, blocks) + disturbed + np.linspace(0, 0.1, blocks)
    spikes = (random.random(blocks) < 0.1) * random.exponential(0.8, blocks)
    jumped = np.maximum.accumulate(np.where(random.random(blocks) < 0.25, np.arange(blocks), 0))
    level = random.exponential(0.6, blocks)[jumped]
    slow: Array = signal.lfilter([0.2 * math.sqrt(1 - 0.97**2)], [1, -0.97], random.normal(0, 1, blocks))
    return random.normal(0, 0.12, blocks) + spikes + level + slow


def design(others: int, rounds: int, seed: int = 0) -> Design:
    """A baseline against so many others."""
    models = tuple(f"m{i}" for i in range(1 + others))
    return Design(
        models=models, minutes=(others + 2) * rounds / 60, block_s=0.9, settle_s=0.1, users=1, rate=None,
        arrivals="constant", seed=seed, timeout_s=1, equivalence=0.02, fixed=False,
    )  # fmt: skip


def comparison(random: Randomness, plan: Design, kind: str, effects: Sequence[float]) -> Array:
    """log p50 [rounds, arms] of one comparison; `effects` are log ratios of all of `plan.arms` but the first."""
    arms, rounds = plan.arms, plan.rounds
    place = {arm: i for i, arm in enumerate(arms)}
    order = np.array([[place[arm] for arm in plan.order(number)] for number in range(rounds)])
    blocks = np.empty((rounds, len(arms)))
    np.put_along_axis(blocks, order, noise(random, rounds * len(arms), kind).reshape(rounds, -1), axis=1)
    truth: Array = np.array([0.0, *effects])
    return blocks + truth


def over_baselines(blocks: Array, arm: int) -> Array:
    """As `statistics.pairs` gives them; the last arm is the A/A arm."""
    last = blocks.shape[1] - 1
    over = blocks[:, [0]] if arm == last else blocks[:, [0, last]]
    return blocks[:, [arm]] - over


LOCATIONS: Final[dict[str, Callable[[Array], float]]] = {
    "mean": lambda pairs: float(np.mean(pairs)),
    "10 % trimmed": lambda pairs: float(stats.trim_mean(pairs, 0.1, axis=None)),
    "20 % trimmed": lambda pairs: float(stats.trim_mean(pairs, 0.2, axis=None)),
    "30 % trimmed": lambda pairs: float(stats.trim_mean(pairs, 0.3, axis=None)),
    "40 % trimmed": lambda pairs: float(stats.trim_mean(pairs, 0.4, axis=None)),
    "median": lambda pairs: float(np.median(pairs)),
    "Hodges-Lehmann": lambda pairs: _hodges_lehmann(pairs.ravel()),
}


def _hodges_lehmann(values: Array) -> float:
    return float(np.median((values[:, None] + values)[np.triu_indices(len(values))]) / 2)


def estimators(comparisons: int = 1000, rounds: int = 60) -> Iterator[str]:
    """Error of each location: over the first baseline block, over both averaged, and over both apart."""
    for kind in KINDS:
        errors: dict[tuple[str, str], list[float]] = {}
        for seed in range(comparisons):
            blocks = comparison(np.random.default_rng(seed), design(1, rounds, seed), kind, (0, 0))
            apart = over_baselines(blocks, 1)
            references = {"first": apart[:, [0]], "averaged": apart.mean(axis=1), "apart": apart}
            for name, locate in LOCATIONS.items():
                for reference, pairs in references.items():
                    errors.setdefault((name, reference), []).append(100 * locate(pairs))
        for (name, reference), found in errors.items():
            yield f"{kind:7} {name:15} {reference:9} sd {np.std(found):5.2f} %  bias {np.mean(found):+5.2f} %"


def intervals(comparisons: int = 1000) -> Iterator[str]:
    """How often intervals of 95 % and 99.5 % miss, of an arm and of the A/A arm."""
    for kind in KINDS:
        for rounds in (8, 14, 30, 60, 120):
            missed: dict[tuple[str, float], list[bool]] = {}
            for seed in range(comparisons):
                blocks = comparison(np.random.default_rng(seed), design(1, rounds, seed), kind, (0, 0))
                for level in (0.05, 0.005):
                    for name, (low, high) in _candidates(blocks, level, seed):
                        missed.setdefault((name, level), []).append(not low <= 0 <= high)
            told = ", ".join(f"{name} {np.mean(each):.1%}" for (name, _), each in missed.items())
            yield f"{kind:7} {rounds:3} rounds, at 5 % and 0.5 %: {told}"


def _candidates(blocks: Array, level: float, seed: int) -> Iterator[tuple[str, tuple[float, float]]]:
    pairs, again = over_baselines(blocks, 1), over_baselines(blocks, 2)
    for name, data in (("arm", pairs), ("A/A", again)):
        found = statistics.estimate(data, seed)
        assert found is not None
        yield f"{name} t", found.interval(level)
    for method in ("percentile", "BCa"):
        found = stats.bootstrap(
            tuple(pairs.T), statistics.location, n_resamples=statistics.RESAMPLES, vectorized=True, paired=True,
            method=method, confidence_level=1 - level, rng=np.random.default_rng(seed),
        )  # fmt: skip
        yield f"arm {method}", tuple(found.confidence_interval)


def verdicts(kind: str, effects: Sequence[float], rounds: int, comparisons: int, alpha: float = 0.05) -> dict[str, Any]:
    """Shares of whole comparisons, looked at after every cycle and stopped when settled, that end in each way.

    `effects` are log ratios of the others and, last, of the A/A arm. `false` says slower or faster of an arm without
    a difference, or finds the A/A arm to differ; `missed` has an interval that does not hold the truth.
    """
    ends: list[dict[str, float]] = []
    for seed in range(comparisons):
        plan = design(len(effects) - 1, rounds, seed)
        blocks = comparison(np.random.default_rng(seed), plan, kind, effects)
        ends.append(_run(blocks, plan, effects, alpha))
    return {name: float(np.mean([end[name] for end in ends])) for name in ends[0]}


def _run(blocks: Array, plan: Design, effects: Sequence[float], alpha: float) -> dict[str, float]:
    step, rounds = statistics.every(plan), plan.rounds
    ats = [*range(step, rounds, step), rounds]
    margin = plan.equivalence
    for k, at in enumerate(ats, start=1):
        taken = [Look(each, each / rounds) for each in ats[:k]]
        found = {str(arm): statistics.estimate(over_baselines(blocks[:at], arm)) for arm in range(1, blocks.shape[1])}
        estimates = {arm: each for arm, each in found.items() if each}
        judged = [each for _, each in sorted(statistics.step_down(estimates, taken, alpha).items())]
        if not judged:
            continue
        outcomes = [statistics.outcome(each.interval, margin) for each in judged[:-1]]
        fit = statistics.fit(judged[-1].interval, margin)
        if fit and "inconclusive" not in outcomes:
            break
    claimed = {"slower": 1.0, "faster": -1.0, "equivalent": 0.0, "inconclusive": math.nan}
    truth = list(effects)
    return {
        "stopped at": at / rounds,
        "unfit": not fit,
        "false": not fit
        or any(claimed[o] * t < 0 or (t == 0 and abs(claimed[o]) == 1) for o, t in zip(outcomes, truth, strict=False))
        or any(o == "equivalent" and abs(t) > math.log1p(margin) for o, t in zip(outcomes, truth, strict=False)),
        "differs": any(statistics.differs(each.interval) for each, t in zip(judged, truth, strict=True) if t == 0),
        "missed": any(not e.interval[0] <= t <= e.interval[1] for e, t in zip(judged, truth, strict=True)),
        "first found": fit and (claimed[outcomes[0]] * truth[0] > 0),
        "first missed": not judged[0].interval[0] <= truth[0] <= judged[0].interval[1],
        "decided": float(np.mean([outcome != "inconclusive" for outcome in outcomes])) * fit,
    }


def main() -> None:
    for line in estimators():
        print(line, flush=True)
    for line in intervals():
        print(line, flush=True)
    for kind in KINDS:
        for effects in ((0, 0), (0.05, 0), (0, 0, 0, 0, 0, 0), (0.05, 0, 0, -0.05, 0, 0)):
            for rounds in (60, 300):
                ends = verdicts(kind, effects, rounds, 200 if rounds == 300 else 500)
                told = ", ".join(f"{name} {share:.1%}" for name, share in ends.items())
                print(f"{kind:7} {effects}, at most {rounds} rounds: {told}", flush=True)


if __name__ == "__main__":
    main()
