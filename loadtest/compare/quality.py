"""Bits per byte of held-out text, arm against baseline: the other axis of the verdict.

A bundle's quality was measured when it was exported; it has no blocks. How far it would move if trained again is
only known where several variants differ by nothing but their seed (`gelu`, `gelu-seed1`, ...).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from scipy import stats

_SEED = re.compile(r"-seed\d+")  # in the names that `actuary train --seeds` gives


def bits_per_byte(facts: Mapping[str, Mapping[str, Any]], model: str, baseline: str, alpha: float) -> dict[str, Any]:
    """{"value", "baseline", "difference", "ratio", "low", "high", "seeds", "note"}; `difference` is in bits.

    Where both were trained from two seeds or more, value and baseline are geometric means over them and the interval
    is Welch's, of the logarithms; else it is null, and `note` says why.
    """
    mine, its = _seeds(facts, model), _seeds(facts, baseline)
    spread = len(mine) > 1 and len(its) > 1
    value = _mean(mine) if spread else _bits(facts, model)
    base = _mean(its) if spread else _bits(facts, baseline)
    texts = {_quality(facts, each).get("corpus_sha256") for each in (*(mine if spread else [model]), baseline)}
    found: dict[str, Any] = {"value": value, "baseline": base, "difference": None, "ratio": None}
    found |= {"low": None, "high": None, "seeds": [len(mine), len(its)] if spread else [1, 1], "note": ""}
    if value is None or base is None:
        unknown = [each for each, bits in ((model, value), (baseline, base)) if bits is None]
        return {**found, "note": f"the quality of {' and '.join(unknown)} was not measured"}
    if len(texts) > 1:
        return {**found, "note": f"{model} and {baseline} were measured on different texts"}
    found |= {"difference": value - base, "ratio": value / base}
    if not spread:
        return {**found, "note": "of one seed each: how far another training would move it is not known"}
    welch = stats.ttest_ind([*map(math.log, mine.values())], [*map(math.log, its.values())], equal_var=False)
    low, high = welch.confidence_interval(1 - alpha)
    return {**found, "low": math.exp(low), "high": math.exp(high)}


def _seeds(facts: Mapping[str, Mapping[str, Any]], model: str) -> dict[str, float]:
    """Bits per byte of all variants that differ from `model` by their seed only."""
    family = _SEED.sub("", model)
    found = {name: _bits(facts, name) for name in facts if _SEED.sub("", name) == family}
    return {name: bits for name, bits in found.items() if bits is not None}


def _mean(values: Mapping[str, float]) -> float:
    return math.exp(sum(map(math.log, values.values())) / len(values))


def _bits(facts: Mapping[str, Mapping[str, Any]], model: str) -> float | None:
    bits = _quality(facts, model).get("bits_per_byte")
    return float(bits) if isinstance(bits, int | float) and bits > 0 else None


def _quality(facts: Mapping[str, Mapping[str, Any]], model: str) -> Mapping[str, Any]:
    return facts.get(model, {}).get("quality") or {}
