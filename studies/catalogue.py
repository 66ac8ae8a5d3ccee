"""The list of studies, in the claims' order; a study's module is imported when it is asked for."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Sequence
from typing import cast

from actuary import BadInput
from studies.study import Claim, Study

# Claim N is the N-th name; its module is studies/NAME.py, with `_` for `-`.
NAMES = (
    "slope",
    "vanishing",
    "zigzag",
    "moons",
    "magnitudes",
    "language",
    "head",
    "two-classes",
    "cost",
    "stability",
    "gates",
)
ALL = "all"


def chosen(asked: Sequence[str]) -> list[str]:
    """The studies that are asked for, each once and in the claims' order; BadInput where one is none."""
    for name in asked:
        if name not in (*NAMES, ALL):
            nearest = difflib.get_close_matches(name, (*NAMES, ALL), n=1, cutoff=0.4)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise BadInput(f"unknown study {name!r}; known: {', '.join(NAMES)}, or {ALL}{hint}")
    return [name for name in NAMES if name in asked or ALL in asked]


def study(name: str) -> Study:
    """The module of a study; it may bring torch along."""
    return cast(Study, importlib.import_module(f"studies.{name.replace('-', '_')}"))


def claim(name: str) -> Claim:
    return study(name).CLAIM
