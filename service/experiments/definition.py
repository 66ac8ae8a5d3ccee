"""An experiment's definition, from a file or a request's body, and the arm that it gives a key.

    {"arms": {"gelu": 1, "swiglu": 1}, "baseline": "gelu", "salt": "...", "shadows": ["relu"], "equivalence": 0.02}

An arm is drawn by weighted rendezvous: each has a keyed hash of the key, as a uniform u in (0, 1), and the least of
-log(u) / weight wins, which has the chance weight / sum of weights. It needs no state, so that a key has the same arm
after a restart, in each process and on each machine; and where a weight changes, or an arm comes or goes, keys move to
or from that arm alone, which cumulative intervals cannot do for more than two.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import math
import random
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actuary import BadInput
from export.bundle import NAME
from service.errors import ApiError, Invalid, nearest, shown
from service.library import Library
from service.variant import Variant

FIELDS = ("arms", "baseline", "salt", "shadows", "equivalence")
MAX_ARMS, MAX_SHADOWS, MAX_SALT = 16, 4, 256
LEAST_SHARE = 1e-6
EQUIVALENCE = 0.02  # a ratio of latencies within this of 1 makes no difference in practice
_SCALE = 2.0**-64


@dataclass(frozen=True)
class Definition:
    """A checked experiment: two arms or more, or one and shadows."""

    name: str
    arms: dict[str, float]  # weight of each variant
    baseline: str
    salt: str
    shadows: tuple[str, ...] = ()
    equivalence: float = EQUIVALENCE

    def as_json(self) -> str:
        """The same text for the same definition; `parse` reads it."""
        fields = {field: getattr(self, field) for field in FIELDS}
        return json.dumps(fields, sort_keys=True)

    @property
    def shares(self) -> dict[str, float]:
        """What share of the keys each arm should have."""
        total = math.fsum(self.arms.values())
        return {variant: weight / total for variant, weight in self.arms.items()}


class Assignment:
    """Which arm a key has. 2 us for two arms, 20 with cold caches."""

    def __init__(self, definition: Definition) -> None:
        salt = hashlib.blake2b(definition.salt.encode()).digest()  # any length to the 64 bytes that a key may have
        self._key_hash = hashlib.blake2b(key=salt, digest_size=8, person=b"key")
        self._arms = [
            (variant, share, hashlib.blake2b(variant.encode() + b"\0", key=salt, digest_size=8))
            for variant, share in definition.shares.items()
        ]
        self._variants = tuple(definition.shares)
        self._upto = tuple(itertools.accumulate(definition.shares.values()))  # to 1

    def arm(self, key: bytes) -> str:
        best, chosen = math.inf, ""
        for variant, share, prefix in self._arms:
            state = prefix.copy()
            state.update(key)
            u = (int.from_bytes(state.digest(), "big") + 0.5) * _SCALE
            if (score := -math.log(u) / share) < best:
                best, chosen = score, variant
        return chosen

    def any_arm(self) -> str:
        """Of a request without a key, by chance. 1 us."""
        return self._variants[bisect.bisect(self._upto, random.random(), hi=len(self._upto) - 1)]

    def key_hash(self, key: bytes) -> int:
        """What is stored of a key: 64 bits that say nothing of it, signed as databases have them."""
        state = self._key_hash.copy()
        state.update(key)
        return int.from_bytes(state.digest(), "big", signed=True)


@dataclass(frozen=True)
class Running:
    """A definition that runs: `id` in the database, and since when, in seconds since 1970."""

    id: int
    definition: Definition
    assignment: Assignment
    began: float


def parse(name: str, fields: object, library: Library) -> Definition:
    """The experiment called `name`; Invalid, with what is allowed, where it is none that this library can serve."""
    if not re.fullmatch(NAME, name):
        raise Invalid(
            f"{shown(name)} cannot name an experiment; allowed: 1 to 128 letters, digits, '.', '_' and '-', the first "
            "a letter or digit",
            "name",
        )
    if name in library.variants:
        raise Invalid(f"{name!r} is a variant; give the experiment another name", "name")
    if not isinstance(fields, dict):
        raise Invalid(f"an experiment is an object with {_one_of(FIELDS)}; got {shown(fields)}")
    for field in fields:
        if field not in FIELDS:
            raise Invalid(f"unknown field {shown(field)}; known: {', '.join(FIELDS)}{nearest(field, FIELDS)}")
    arms = _arms(fields.get("arms"), library)
    shadows = _shadows(fields.get("shadows"), arms, library)
    if len(arms) == 1 and not shadows:
        raise Invalid(
            f"arms names {next(iter(arms))!r} alone; name at least two variants to compare, or shadows", "arms"
        )
    _check_tokenizer([*arms, *shadows], library)
    baseline = fields.get("baseline", next(iter(arms)))
    if not isinstance(baseline, str) or baseline not in arms:
        raise Invalid(f"baseline {shown(baseline)} is no arm; one of: {', '.join(arms)}", "baseline")
    salt = fields.get("salt", name)
    if not isinstance(salt, str) or not 0 < len(salt) <= MAX_SALT or not salt.isprintable():
        raise Invalid(f"salt {shown(salt)} must be a printable text of 1 to {MAX_SALT} characters", "salt")
    equivalence = fields.get("equivalence", EQUIVALENCE)
    if isinstance(equivalence, bool) or not isinstance(equivalence, int | float) or not 0 < equivalence < 1:
        raise Invalid(f"equivalence {shown(equivalence)} must be a number between 0 and 1, as 0.02", "equivalence")
    return Definition(name, arms, baseline, salt, shadows, float(equivalence))


def _arms(given: Any, library: Library) -> dict[str, float]:
    if not isinstance(given, dict) or not given:
        raise Invalid(f'arms must be an object of variants and weights, as {{"gelu": 1}}; got {shown(given)}', "arms")
    if len(given) > MAX_ARMS:
        raise Invalid(f"arms names {len(given)} variants; at most {MAX_ARMS}", "arms")
    arms = {}
    for variant, weight in given.items():
        _check_served(variant, "arms", library)
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise Invalid(f"the weight of {variant!r} is {shown(weight)}; it must be a number above 0", "arms")
        try:
            arms[variant] = float(weight)
        except OverflowError:
            arms[variant] = math.inf
        if not 0 < arms[variant] < math.inf:
            raise Invalid(
                f"the weight of {variant!r} is {shown(weight)}; it must be a finite number above 0: leave an arm "
                "out that is to have no traffic",
                "arms",
            )
    total = sum(arms.values())
    for variant, weight in arms.items():
        if not weight >= LEAST_SHARE * total or total == math.inf:
            raise Invalid(
                f"the weight of {variant!r} is {shown(given[variant])} of {total:g} in all, less than one key in "
                f"{1 / LEAST_SHARE:,.0f}, or no number; raise it or leave the arm out",
                "arms",
            )
    return arms


def _shadows(given: Any, arms: Mapping[str, float], library: Library) -> tuple[str, ...]:
    if given is None:
        return ()
    if not isinstance(given, list) or not all(isinstance(variant, str) for variant in given):
        raise Invalid(f"shadows must be a list of variants; got {shown(given)}", "shadows")
    if len(given) > MAX_SHADOWS:
        raise Invalid(f"shadows names {len(given)} variants; at most {MAX_SHADOWS}", "shadows")
    for at, variant in enumerate(given):
        _check_served(variant, "shadows", library)
        if variant in arms:
            raise Invalid(f"shadows names {variant!r}, which is an arm; an arm answers, a shadow never does", "shadows")
        if variant in given[:at]:
            raise Invalid(f"shadows names {variant!r} twice; name each once", "shadows")
    return tuple(given)


def _check_served(variant: str, param: str, library: Library) -> None:
    try:
        library.one(variant)
    except ApiError as error:
        raise Invalid(f"{param}: {error.detail}", param) from None


def _check_tokenizer(variants: list[str], library: Library) -> None:
    """A log loss is per token, and a shadow's probabilities are compared one by one."""
    first, *others = (library.variants[name] for name in variants)
    for other in others:
        if _tokens(other) != _tokens(first):
            raise Invalid(
                f"{first.name!r} and {other.name!r} have different vocabularies, so that probabilities of their tokens "
                "do not compare; name variants with the same tokenizer",
                "arms",
            )


def _tokens(variant: Variant) -> tuple[int, int]:
    return id(variant.vocabulary), variant.manifest.vocab_size


def _one_of(names: tuple[str, ...]) -> str:
    return ", ".join(names[:-1]) + " and " + names[-1]


def loads(text: str | bytes) -> Any:
    """JSON, in which no object may name a thing twice; Invalid where it does, ValueError where it is no JSON."""
    return json.loads(text, object_pairs_hook=_unique)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise Invalid(f"{shown(name)} stands twice in one object; name each arm and each field once")
        found[name] = value
    return found


def read_file(path: Path, library: Library) -> list[Definition]:
    """The experiments of a JSON or TOML file, {name: definition}; BadInput where one is wrong."""
    try:
        text = path.read_text(encoding="utf-8")
        found = tomllib.loads(text) if path.suffix == ".toml" else loads(text)
        if not isinstance(found, dict):
            raise Invalid(f"it must hold an object {{NAME: DEFINITION}}; got {shown(found)}")
        definitions = []
        for name, fields in found.items():
            try:
                definitions.append(parse(name, fields, library))
            except Invalid as error:
                raise BadInput(f"--experiments {path}: {shown(name)}: {error.detail}") from None
    except OSError as error:
        raise BadInput(f"--experiments {path} cannot be read: {error.strerror}; name a JSON or TOML file") from None
    except Invalid as error:
        raise BadInput(f"--experiments {path}: {error.detail}") from None
    except ValueError as error:  # neither JSON nor TOML, or no text at all
        kind = "TOML" if path.suffix == ".toml" else "JSON"
        raise BadInput(f"--experiments {path} is not {kind}: {error}") from None
    return definitions
