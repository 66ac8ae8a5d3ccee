"""JSON of large answers, put together from pieces: each call of json.dumps holds the GIL until it is done."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from typing import Any

AT_ONCE = 1_000  # 65,536 entries at once hold the GIL for 0.2 s

_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


def dumps(value: Any) -> str:
    """`value` as JSON, about AT_ONCE entries at a time."""
    if not isinstance(value, dict | list) or _entries(value) <= AT_ONCE:
        return _encode(value)
    nested = any(isinstance(item, dict | list) for item in (value.values() if isinstance(value, dict) else value))
    if isinstance(value, dict):
        if nested:
            return f"{{{','.join(f'{_encode(name)}:{dumps(item)}' for name, item in value.items())}}}"
        items = iter(value.items())
        pieces = [_encode(dict(islice(items, AT_ONCE)))[1:-1] for _ in range(0, len(value), AT_ONCE)]
        return f"{{{','.join(pieces)}}}"
    if nested:
        return f"[{','.join(_runs(value))}]"
    return f"[{','.join(_encode(value[at : at + AT_ONCE])[1:-1] for at in range(0, len(value), AT_ONCE))}]"


def _runs(items: list[Any]) -> Iterator[str]:
    """The items of a list, so many at a time as have AT_ONCE entries."""
    run: list[Any] = []
    entries = 0
    for item in items:
        own = 1 + (_entries(item) if isinstance(item, dict | list) else 0)
        if run and entries + own > AT_ONCE:
            yield _encode(run)[1:-1]
            run, entries = [], 0
        if own > AT_ONCE:
            yield dumps(item)
        else:
            run.append(item)
            entries += own
    if run:
        yield _encode(run)[1:-1]


def _entries(value: Any) -> int:
    """How many entries it has, in all its parts."""
    if isinstance(value, dict):
        return len(value) + sum(_entries(item) for item in value.values() if isinstance(item, dict | list))
    return len(value) + sum(_entries(item) for item in value if isinstance(item, dict | list))
