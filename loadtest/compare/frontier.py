"""What quality costs: each variant's bits per byte of held-out text beside its latency, and who is beaten by nobody."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from loadtest.compare.words import Table, facts_of, interval, percent


@dataclass(frozen=True)
class Point:
    """One variant. Latency is its ratio of p50 to the baseline's, which pairs blocks and so is free of drift."""

    model: str
    ratio: float
    low: float
    high: float
    bits: float
    bits_low: float | None  # None where the spread of the quality is not known
    bits_high: float | None
    best: bool = False  # no other is at least as good in both and better in one


def points(run: Mapping[str, Any], result: Mapping[str, Any]) -> tuple[list[Point], str]:
    """The variants whose quality is known, fastest first; or none, and why there is nothing to draw."""
    facts = facts_of(run)
    measured = {result["baseline"]: {"ratio": 1.0, "low": 1.0, "high": 1.0}}
    measured |= {arm["model"]: arm["p50"] for arm in result["arms"] if arm["p50"] and arm["model"] in facts}
    qualities = {model: facts[model]["quality"] for model in measured if facts.get(model, {}).get("quality")}
    if not qualities:
        return [], (
            "No bits per byte here: the weights are random or their quality was not measured. Latency does not depend "
            "on what the weights say, quality does; it has to come from trained models of the same activations."
        )
    texts = {quality["corpus_sha256"] for quality in qualities.values()}
    if len(texts) > 1:
        return [], "The variants' bits per byte are of different held-out texts, so they cannot be set beside each other."
    if len(qualities) == 1:
        return [], f"Only {next(iter(qualities))}'s quality is known; a frontier needs at least two."
    found = [_point(model, measured[model], quality) for model, quality in qualities.items()]
    return [replace(each, best=not any(_beats(other, each) for other in found)) for each in sorted(found, key=_place)], ""


def _place(point: Point) -> tuple[float, float]:
    return point.ratio, point.bits


def _point(model: str, p50: Mapping[str, float], quality: Mapping[str, Any]) -> Point:
    low, high = quality.get("interval") or (None, None)
    return Point(model, p50["ratio"], p50["low"], p50["high"], quality["bits_per_byte"], low, high)


def _beats(one: Point, other: Point) -> bool:
    return one.ratio <= other.ratio and one.bits <= other.bits and (one.ratio, one.bits) != (other.ratio, other.bits)


def unknown(run: Mapping[str, Any], found: list[Point]) -> list[str]:
    drawn = {point.model for point in found}
    return [model for model in facts_of(run) if model not in drawn]


def said(found: list[Point], left_out: list[str]) -> str:
    """How to read the picture, and what it shows."""
    best = [point.model for point in found if point.best]
    words = (
        "Each point is a variant: further left answers sooner, further down predicts held-out text better. "
        "Filled points on the dotted line are beaten by nobody in both at once"
    )
    words += f": {', '.join(best)}" if len(best) < len(found) else ", which here are all of them"
    words += ". Bars are intervals of the paired difference in latency; where they overlap, the order is not certain"
    words += (
        ", and of the quality."
        if any(point.bits_low is not None for point in found)
        else "; the quality is one training's, so its spread over seeds is not known."
    )
    return words + (f" Not drawn, for its quality is not known: {', '.join(left_out)}." if left_out else "")


def table(found: list[Point], baseline: str, baseline_ms: float | None) -> Table:
    bits = {point.model: point.bits for point in found}
    rows = []
    for point in found:
        p50 = "-" if baseline_ms is None else f"{baseline_ms * point.ratio:.2f}"
        versus = percent(point.bits / bits[baseline]) if baseline in bits else "-"
        latency = "baseline" if point.model == baseline else interval(
            {"ratio": point.ratio, "low": point.low, "high": point.high}
        )
        rows.append((point.model, p50, latency, f"{point.bits:.4f}", versus, "yes" if point.best else ""))
    return Table(
        ("variant", "p50, ms", "latency", "bits per byte", "difference", "on the frontier"), tuple(rows)
    )
