"""What the verbs of this room share: numbers that are finite, files that are written whole, what the machine is."""

from __future__ import annotations

import math
import os
import platform
from pathlib import Path
from typing import Any

import click

from actuary import BadInput, processor


class Finite(click.FloatRange):
    """click's own range lets NaN and infinity through."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number", param, ctx)
        return number


POSITIVE = Finite(min=0, min_open=True)


def free_users(rate: float) -> int:
    """As many as must wait when a server stands still for a second, so that arrivals find one free."""
    return max(8, min(1000, math.ceil(rate)))


def check_json(json_file: str | None) -> None:
    """What would fail after the run fails here, before it."""
    try:
        if json_file and json_file != "-":
            path = Path(json_file).absolute()
            if path.is_dir():
                raise BadInput(f"--json {json_file} is a folder; name a file")
            part(path).touch()
            part(path).unlink()
    except OSError as error:
        raise BadInput(f"--json {json_file} cannot be written: {error}; name a file in a folder of yours") from error


def write(path: Path, text: str) -> None:
    """Whole or not at all."""
    part(path).write_text(text, encoding="utf-8")
    part(path).replace(path)


def part(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def tail(path: Path) -> str:
    return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-8:]) if path.is_file() else ""


def machine() -> dict[str, Any]:
    """Of the load generator; the server's is the same only where the URL is this machine's."""
    return {"host": platform.node(), "cpu": processor(), "cores": os.cpu_count(), "system": platform.platform()}
