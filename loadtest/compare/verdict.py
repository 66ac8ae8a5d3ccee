"""A run and its blocks -> the verdict: the JSON that `actuary compare` promises, with a sentence per variant.

Only the primary measure, p50, decides. Its intervals are corrected for the number of arms and of looks; the other
measures of an arm are given at the same level as its p50, and claim nothing. Where the A/A arm differs, no outcome
is claimed.

p50, memory and the server's own times are of a typical block (`statistics.py`). p90, p99, mean, throughput, CPU and
tokens are of all answers together (`pooled.py`), so that what is slow once in a while is in them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import polars as pl

from loadtest.compare import pooled, statistics
from loadtest.compare.design import AGAIN, Design
from loadtest.compare.quality import bits_per_byte
from loadtest.compare.statistics import LEAST_ROUNDS, Estimate, Judged

Ratio = dict[str, float | None]  # "ratio", "low", "high"
FAILED_SHARE: Final = 0.001  # of its requests: where more failed, an arm's sentence says so

# Above 1 is more of it: slower in a latency, faster in a throughput.
MEASURES: Final = {
    "p50": statistics.PRIMARY,
    "p90": "p90_ms",
    "p99": "p99_ms",
    "mean": "mean_ms",
    "uncorrected_p50": "uncorrected_p50_ms",
    "uncorrected_p99": "uncorrected_p99_ms",
    "throughput": "requests_per_s",
    "cpu": "cpu_ms",  # of the server's process, per request
    "memory": "rss_mb",  # of the server's process, which holds all variants
    "queue": "queue_ms",
    "tokenize": "tokenize_ms",
    "infer": "infer_ms",
    "total": "total_ms",
    "ttft": "ttft_ms",
    "itl": "itl_ms",
    "tokens_per_s": "tokens_per_s",
}


def judge(
    run: Mapping[str, Any],
    blocks: pl.DataFrame,
    samples: pl.DataFrame | pl.LazyFrame | None = None,
    *,
    margin: float = 0.02,
    alpha: float = 0.05,
    seed: int = 0,
) -> dict[str, Any]:
    """`run` is run.json, `blocks` and `samples` what `store.read` makes of the finished rounds.

    Every measure is {"ratio", "low", "high"} over the baseline, or null where nothing is known of it, as of p90 and p99
    without `samples`; low and high are null where there are too few rounds for an interval, or an early look leaves
    it open.
    """
    design = Design.of_json(dict(run["design"]))
    judged = statistics.judge_primary(blocks, design, alpha, seed)
    again = judged.get(design.baseline + AGAIN)
    facts = {arm["model"]: arm.get("facts") or {} for arm in run["arms"]}
    counted = statistics.whole_rounds(blocks)
    rounds, whole = blocks["round"].n_unique(), counted["round"].n_unique()
    together = pooled.estimates(counted, samples, design, seed)
    arms = []
    for model in design.models[1:]:
        level = judged[model].level if judged else alpha
        measures = {
            name: _together(together[model].get(name), level)
            if name in pooled.MEANS or name in pooled.TAILS
            else _typical(counted, column, design, model, level, seed)
            for name, column in MEASURES.items()
        }
        quality = bits_per_byte(facts, model, design.baseline, alpha)
        claim = _claim(judged.get(model), again, counted, design, margin)
        sentence = _sentence(model, claim, measures["p50"], quality, again, design.baseline, margin, whole)
        counts = failures(blocks, model)
        sentence += f", {said}" if (said := failed(counts)) else ""
        arms.append({"model": model, **claim, **measures, "bits_per_byte": quality, **counts, "sentence": sentence})
    return {
        "baseline": design.baseline,
        "fit": again is not None and statistics.fit(again.interval, margin),
        "aa": {**_ratio(again), "confidence": 1 - again.level} if again else {"ratio": None, "low": None, "high": None},
        "arms": arms,
        "blocks": blocks.height,
        "rounds": rounds,
        "void_rounds": rounds - whole,
        "looks": len(statistics.looks(blocks, design)),
        "margin": margin,
        "alpha": alpha,
        "primary": "p50",
        "command": run["command"],
    }


def failures(blocks: pl.DataFrame, arm: str) -> dict[str, int]:
    """How many requests were sent and failed in all its blocks, void ones too: failures are what made them so."""
    its = blocks.filter(pl.col("arm") == arm)
    return {name: int(its[name].sum()) if name in its.columns else 0 for name in ("requests", "failures")}


def failed(counts: Mapping[str, int]) -> str:
    """1.2 % of its requests failed; empty where that is next to none."""
    share = counts["failures"] / max(1, counts["requests"])
    return f"{share * 100:.1f} % of its requests failed" if share > FAILED_SHARE else ""


def _claim(
    primary: Judged | None, again: Judged | None, counted: pl.DataFrame, design: Design, margin: float
) -> dict[str, Any]:
    """An arm's outcome and what stands behind it."""
    if primary is None or again is None:
        return {"outcome": "inconclusive", "confidence": None, "needs_minutes": None, "smallest_seen": None}
    fit = statistics.fit(again.interval, margin)
    outcome = statistics.outcome(primary.interval, margin) if fit else "inconclusive"
    undecided = fit and outcome == "inconclusive"
    return {
        "outcome": outcome,
        "differs": fit and statistics.differs(primary.interval),  # an equivalent arm may, by less than the margin
        "confidence": 1 - primary.level,
        "needs_minutes": _needs_minutes(primary, counted, design, margin) if undecided else None,
        "smallest_seen": _finite(statistics.smallest_seen(primary.estimate, primary.level)),
    }


def _needs_minutes(primary: Judged, counted: pl.DataFrame, design: Design, margin: float) -> float | None:
    """How much longer, at least one cycle; None where no length would do."""
    missing = statistics.rounds_needed(primary.estimate, margin, primary.share) - primary.estimate.rounds
    began = counted.group_by("round").agg(pl.col("began_s").min()).sort("round")
    # From round to round: what stands between two visits is in it, a pause of a resumed run is not.
    round_s = began.select(pl.col("began_s").diff().median()).item() or design.round_s
    return _finite(max(missing, design.cycle) * float(round_s) / 60)


def _together(found: Estimate | None, level: float) -> Ratio | None:
    return _ratio(Judged(found, level, level)) if found else None


def _typical(counted: pl.DataFrame, column: str, design: Design, arm: str, level: float, seed: int) -> Ratio | None:
    if column not in counted.columns:
        return None
    log_ratios = statistics.pairs(counted, column, design.baseline, arm)
    found = statistics.estimate(log_ratios, seed)
    if found is not None:
        return _ratio(Judged(found, level, level))
    if len(log_ratios):
        return {"ratio": math.exp(statistics.location(*log_ratios.T)), "low": None, "high": None}
    return None


def _ratio(judged: Judged) -> Ratio:
    low, high = judged.interval
    return {"ratio": math.exp(judged.estimate.log_ratio), "low": _exp(low), "high": _exp(high)}


def _exp(log: float) -> float | None:
    return _finite(math.exp(log)) if abs(log) < 100 else None


def _finite(value: float) -> float | None:
    """JSON has no infinity."""
    return value if math.isfinite(value) else None


def _sentence(
    model: str,
    claim: Mapping[str, Any],
    p50: Ratio | None,
    quality: Mapping[str, Any],
    again: Judged | None,
    baseline: str,
    margin: float,
    whole: int,
) -> str:
    """swiglu: +2.1 % [1.2, 3.0] p50 over gelu, -0.6 % bits per byte"""
    bits = f", {percent(quality['ratio'])} bits per byte" if quality["ratio"] else ""
    if p50 is None or again is None:
        few = f"nothing is claimed of {whole} rounds that count, it takes {LEAST_ROUNDS} in which every arm answers"
        return f"{model}: {few}{bits}"
    if not statistics.fit(again.interval, margin):
        unfit = f"the machine was not fit, {baseline} against itself came out at {interval(_ratio(again))}"
        return f"{model}: {interval(p50)} p50 over {baseline}, but nothing is claimed: {unfit}{bits}"
    said = f"{model}: {interval(p50)} p50 over {baseline}"
    if claim["outcome"] == "equivalent":
        said += f", {'a difference, but none' if claim['differs'] else 'no difference'} beyond {margin * 100:g} %"
    if claim["outcome"] == "inconclusive":
        more = claim["needs_minutes"]
        longer = f"about {max(1, round(more))} more minutes would settle it" if more else "no length would settle it"
        said += f", inconclusive ({longer})"
    return said + bits


def percent(ratio: float) -> str:
    """+2.1 % of 1.021."""
    return f"{_points(ratio):+.1f} %"


def interval(found: Ratio) -> str:
    """+2.1 % [1.2, 3.0]"""
    ratio, low, high = found["ratio"], found["low"], found["high"]
    assert ratio is not None
    if low is None or high is None:
        return f"{percent(ratio)} [open]"
    return f"{percent(ratio)} [{_points(low):.1f}, {_points(high):.1f}]"


def _points(ratio: float) -> float:
    return round((ratio - 1) * 100, 1) + 0.0  # not -0.0
