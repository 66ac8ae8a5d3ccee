"""An experiment's sums to what `GET /v1/experiments/NAME` answers, in the words of `actuary compare`.

Latency is compared by the ratio of geometric means, exp of the difference of mean logarithms: few slow requests do not
carry it away, and it is what an interval of means can say. With k arms each comparison has alpha / (k - 1), so that
all intervals of one measure hold together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from service.experiments.confidence import (
    ALPHA,
    LEAST_KEYS,
    SHARE_ALPHA,
    Interval,
    Sums,
    difference,
    mean,
    share_p_value,
)
from service.experiments.definition import Definition, Running

Of = tuple[str, str, str]
NOTHING = Sums()


def verdict(running: Running, sums: Mapping[Of, Sums]) -> dict[str, Any]:
    """Of an experiment with these sums, by measure, variant, and whose answers a shadow's are compared with."""
    definition = running.definition
    shares = _shares(definition, sums)
    return {
        "object": "experiment",
        "name": definition.name,
        "began": int(running.began),
        "baseline": definition.baseline,
        "salt": definition.salt,
        "fit": shares["fits"],
        "shares": shares,
        "arms": [_arm(variant, definition, sums, fit=shares["fits"]) for variant in definition.arms],
        "shadows": [
            _shadow(shadow, arm, sums)
            for shadow in definition.shadows
            for arm in definition.arms
            if ("kl", shadow, arm) in sums
        ],
        "alpha": ALPHA,
        "equivalence": definition.equivalence,
        "least_keys": LEAST_KEYS,
    }


def _shares(definition: Definition, sums: Mapping[Of, Sums]) -> dict[str, Any]:
    """Whether keys came to the arms as planned. A key is counted once, and a request without one as a key."""
    keys = [sums.get(("failed", variant, ""), NOTHING).keys for variant in definition.arms]
    p_value = share_p_value(keys, list(definition.shares.values()))
    return {"p_value": p_value, "fits": p_value >= SHARE_ALPHA}


def _arm(variant: str, definition: Definition, sums: Mapping[Of, Sums], *, fit: bool) -> dict[str, Any]:
    is_baseline = variant == definition.baseline
    alpha = ALPHA / max(1, len(definition.arms) - 1)

    def against_baseline(measure: str) -> Interval | None:
        arm, baseline = (sums.get((measure, name, ""), NOTHING) for name in (variant, definition.baseline))
        return None if is_baseline else difference(arm, baseline, alpha)

    failed, total, loss = (sums.get((measure, variant, ""), NOTHING) for measure in ("failed", "total", "loss"))
    latency, fields = against_baseline("total"), dict[str, Any]()
    if not is_baseline:
        outcome = outcome_of(latency, definition.equivalence) if fit else "inconclusive"
        fields = {
            "outcome": outcome,
            "latency": _ratio(latency),
            "infer": _ratio(against_baseline("infer")),
            "log_loss": _difference(against_baseline("loss")),
            "failures": _difference(against_baseline("failed")),
            "sentence": _sentence(variant, definition.baseline, latency, outcome, fit=fit),
        }
    return {
        "model": variant,
        "weight": definition.arms[variant],
        "share": definition.shares[variant],
        "keys": failed.keys,
        "exposures": int(failed.n),
        "failed": int(failed.s),
        "geometric_mean_ms": math.exp(total.mean) if total.n else None,
        "outcomes": int(loss.n),
        "mean_log_loss": loss.mean if loss.n else None,
        **fields,
    }


def outcome_of(latency: Interval | None, equivalence: float) -> str:
    """By the logarithm of a ratio: within the margin on both sides it is no difference, however sure."""
    if latency is None:
        return "inconclusive"
    margin = math.log1p(equivalence)
    if -margin <= latency.low and latency.high <= margin:
        return "equivalent"
    if latency.low > 0:
        return "slower"
    return "faster" if latency.high < 0 else "inconclusive"


def _ratio(latency: Interval | None) -> dict[str, float] | None:
    if latency is None:
        return None
    return {"ratio": math.exp(latency.estimate), "low": math.exp(latency.low), "high": math.exp(latency.high)}


def _difference(interval: Interval | None) -> dict[str, float] | None:
    if interval is None:
        return None
    return {"difference": interval.estimate, "low": interval.low, "high": interval.high}


def _sentence(variant: str, baseline: str, latency: Interval | None, outcome: str, *, fit: bool) -> str:
    if not fit:
        return f"{variant}: the arms' shares are not as planned, so that nothing can be said"
    if latency is None:
        return f"{variant}: fewer than {LEAST_KEYS} keys of it or of {baseline} have been answered"
    estimate, low, high = (100 * math.expm1(value) for value in (latency.estimate, latency.low, latency.high))
    return f"{variant}: {outcome}, {estimate:+.1f} % [{low:.1f}, {high:.1f}] latency over {baseline}"


def _shadow(variant: str, against: str, sums: Mapping[Of, Sums]) -> dict[str, Any]:
    measures = {name: sums[name, variant, against] for name in ("same_top", "kl", "sum_abs_dp", "infer")}
    found = {name: (measure, mean(measure, ALPHA)) for name, measure in measures.items()}
    infer, its_interval = found.pop("infer")
    return {
        "model": variant,
        "against": against,
        "compared": int(infer.n),
        **{
            name: {"mean": measure.mean, "low": interval and interval.low, "high": interval and interval.high}
            for name, (measure, interval) in found.items()
        },
        "infer": _ratio(its_interval) or {"ratio": math.exp(infer.mean), "low": None, "high": None},
    }
