"""What may be asked of a comparison: the body of POST /v1/comparisons, with the limits of `actuary compare`."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, PlainValidator, model_validator
from pydantic_core import PydanticCustomError

from service.errors import Invalid, shown
from service.library import Library
from service.schema import Request

MOST_RATE = 1_000_000  # at 1e308 a block's arrivals are planned for ever
MOST_MINUTES = 7 * 24 * 60


TwoOrMore = Annotated[list[str], Field(min_length=2, json_schema_extra={"uniqueItems": True})]


def _variants(value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise PydanticCustomError("variants", "must be a list of names")
    twice = next((name for name, times in Counter(value).items() if times > 1), None)
    if twice is not None:
        raise PydanticCustomError(
            "variants", "names {name} twice; the baseline enters twice by itself", {"name": shown(twice)}
        )
    if len(value) < 2:
        raise PydanticCustomError("variants", "must name two variants or more; one alone is nothing to compare")
    return value


class ComparisonRequest(Request):
    """Two served variants or more, under load in turn."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"variants": ["gelu", "swiglu"], "baseline": "gelu", "minutes": 3, "users": 4}]}
    )

    variants: Annotated[list[str], PlainValidator(_variants, json_schema_input_type=TwoOrMore)]
    baseline: str | None = Field(None, description="What the others are compared with; the first, if not given.")
    minutes: float = Field(5.0, gt=0, le=MOST_MINUTES, description="Of load at most.")
    users: int | None = Field(None, ge=1, le=10_000, description="At once, in a closed loop; 4, if not given.")
    rate: float | None = Field(
        None, gt=0, le=MOST_RATE, description="Poisson arrivals per second, in place of a closed loop."
    )
    equivalence: float = Field(0.02, gt=0, lt=1, description="A difference that does not matter, as a share.")

    @model_validator(mode="after")
    def _plans_something(self) -> ComparisonRequest:
        planned, arms = self.minutes * 60 * (math.inf if self.rate is None else self.rate), len(self.variants) + 1
        if planned < arms:
            raise PydanticCustomError(
                "rate",
                "rate {rate} plans {planned} requests in {minutes} minutes, and there are {arms} arms, the baseline "
                "twice; raise rate or minutes",
                {
                    **{"rate": shown(self.rate), "planned": f"{planned:.2g}", "minutes": shown(self.minutes)},
                    **{"arms": arms, "param": "rate"},
                },
            )
        return self

    def check(self, library: Library, experiments: Mapping[str, Collection[str]]) -> None:
        """ApiError where the service does not have what is named, or it is an experiment; of these the arms."""
        for name in self.variants:
            if name in experiments:
                raise Invalid(
                    f"{name!r} is an experiment: the load would stand in its record as if it were its users', and its "
                    f"shadows would have copies of it; name variants, as its arms {', '.join(experiments[name])}. What "
                    "an experiment itself costs is measured with one that is made for that, at a terminal: actuary "
                    "compare --url URL --variants VARIANT,EXPERIMENT",
                    "variants",
                )
            library.one(name)
        if self.baseline is not None and self.baseline not in self.variants:
            known = ", ".join(self.variants)
            raise Invalid(f"baseline {shown(self.baseline)} is not among the variants {known}", "baseline")

    def command(self, url: str, folder: Path) -> list[str]:
        """It ends, judged, when this process does."""
        words = [sys.executable, "-m", "actuary", "compare", "--with-parent", "--url", url, "--out", str(folder)]
        words += ["--variants", ",".join(self.variants), "--minutes", repr(self.minutes)]
        words += ["--equivalence", repr(self.equivalence)]
        for option in ("baseline", "users", "rate"):
            if (value := getattr(self, option)) is not None:
                words += [f"--{option}", str(value)]
        return words
