"""What quality costs: each variant's bits per byte of held-out text beside its latency, and who is beaten by nobody."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from loadtest.compare.verdict import percent
from loadtest.compare.words import Table, facts_of, interval


@dataclass(frozen=True)
class Point:
    """One variant. Latency is its ratio of p50 to the baseline's, which pairs blocks and so is free of drift."""

    model: str
    ratio: float
    low: float  # the ratio itself where its interval is not known; bits likewise
    high: float
    bits: float
    bits_low: float
    bits_high: float
    best: bool = False  # no other is at least as good in both and better in one


def points(run: Mapping[str, Any], result: Mapping[str, Any]) -> tuple[list[Point], str]:
    """The variants whose quality is known, fastest first; or none, and why there is nothing to draw."""
    facts = {model: each["quality"] for model, each in facts_of(run).items() if each.get("quality")}
    if not facts:
        return [], (
            "No bits per byte here: the weights are random or their quality was not measured. Latency does not depend "
            "on what the weights say, quality does; it has to come from trained models of the same activations."
        )
    if len({quality["corpus_sha256"] for quality in facts.values()}) > 1:
        return (
            [],
            "The variants' bits per byte are of different held-out texts, so they cannot be set beside each other.",
        )
    baseline = result["baseline"]
    # Over seeds, where there are several, the verdict has the mean: of the baseline too.
    base = next((arm["bits_per_byte"]["baseline"] for arm in result["arms"] if arm["model"] in facts), None)
    found = [Point(baseline, 1.0, 1.0, 1.0, base, base, base)] if baseline in facts and base is not None else []
    found += [_point(arm, base) for arm in result["arms"] if arm["p50"] and arm["model"] in facts]
    if len(found) < 2:
        return [], f"Quality and latency are known of {found[0].model if found else 'none'} alone; it takes two."
    found.sort(key=lambda point: (point.ratio, point.bits))
    return [replace(each, best=not any(_beats(other, each) for other in found)) for each in found], ""


def _point(arm: Mapping[str, Any], base: float | None) -> Point:
    p50, quality = arm["p50"], arm["bits_per_byte"]
    ratio, bits = p50["ratio"], quality["value"]
    low, high = (ratio if p50[end] is None else p50[end] for end in ("low", "high"))
    least, most = (bits if base is None or quality[end] is None else base * quality[end] for end in ("low", "high"))
    return Point(arm["model"], ratio, low, high, bits, least, most)


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
        "; those of the quality are over seeds."
        if any(point.bits_low < point.bits_high for point in found)
        else "; the quality is of one training each, so how far another would move it is not known."
    )
    return words + (f" Not drawn, for its quality is not known: {', '.join(left_out)}." if left_out else "")


def table(found: list[Point], baseline: str, baseline_ms: float | None) -> Table:
    bits = {point.model: point.bits for point in found}
    rows = []
    for point in found:
        p50 = "-" if baseline_ms is None else f"{baseline_ms * point.ratio:.2f}"
        versus = percent(point.bits / bits[baseline]) if baseline in bits and point.model != baseline else "-"
        latency = "baseline" if point.model == baseline else percent(point.ratio)
        if point.low < point.high:
            latency = interval({"ratio": point.ratio, "low": point.low, "high": point.high})
        rows.append((point.model, p50, latency, f"{point.bits:.4f}", versus, "yes" if point.best else ""))
    return Table(("variant", "p50, ms", "latency", "bits per byte", "difference", "on the frontier"), tuple(rows))
