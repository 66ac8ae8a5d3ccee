"""The feed-forward blocks' share of each variant's time: `actuary inspect --profile` of the bundles of its own server.

No comparison can show an activation to cost more than this share. Measured when the server is gone, one variant after
another, on prompts of the workload's mean length; kept in the run folder's ffn.json.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loadtest.compare import store
from loadtest.compare.server import die_with_parent
from loadtest.shared import write

FILE = "ffn.json"
TIMEOUT_S = 300.0
POLL_S = 0.1  # between two looks at whether it is to stop
CPU = "CPUExecutionProvider"
PARTS = ("ffn", "attention", "head", "other", "activation")  # the last is within the first
ROOT = Path(__file__).parents[2]


def measure(folder: Path, bundles: Path, ops: Path, stopped: Callable[[], bool] = lambda: False) -> None:
    """Writes what the folder lacks; a variant that cannot be profiled stays without, and why is said.

    It ends when it is `stopped`; what is then missing is measured by the next call.
    """
    run = store.run_of(folder)
    kept = _read(folder)
    tokens = max(1, round((run["workload"].get("prompt_tokens") or {"mean": 64})["mean"]))
    for arm in run["arms"]:
        model, facts = arm["model"], arm["facts"]
        if model in kept:
            continue
        if facts.get("provider") == CPU:
            bundle = _bundle(bundles, model, facts["files"])
            if bundle is None:
                kept[model] = {"why": f"its bundle is no longer in {bundles} as it was served"}
            else:
                found = _profile(bundle, ops, min(tokens, facts["context"]), stopped)
                if found is None:
                    return
                kept[model] = found
        else:
            kept[model] = {"why": f"it ran with {facts.get('provider')}, and the profile is of the CPU"}
        write(folder / FILE, json.dumps(kept, indent=2, allow_nan=False) + "\n")


def result(folder: Path) -> dict[str, Any]:
    """What result.json says of it; nothing where nothing was measured."""
    shares = {model: each["share"] for model, each in _read(folder).items() if "share" in each}
    return {"ffn_share": shares} if shares else {}


def said(folder: Path) -> list[str]:
    return [
        f"no share of the feed-forward blocks of {model}: {each['why']}"
        for model, each in _read(folder).items()
        if "why" in each
    ]


def _read(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / FILE
    kept: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return kept


def _bundle(bundles: Path, model: str, files: dict[str, str]) -> Path | None:
    """The bundle that was served so called; its folder may be called otherwise."""
    for manifest in sorted(bundles.glob("*/manifest.json")):
        try:
            told = json.loads(manifest.read_text(encoding="utf-8"))
            if (told["name"], told["files"]) == (model, files):
                return manifest.parent
        except (OSError, ValueError, KeyError, TypeError):
            continue  # refused by the server too
    return None


def _profile(bundle: Path, ops: Path, tokens: int, stopped: Callable[[], bool]) -> dict[str, Any] | None:
    """None where it was stopped."""
    command = [sys.executable, "-m", "actuary", "inspect", str(bundle), "--profile", "--tokens", str(tokens)]
    command += ["--ops", str(ops), "--json"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    until = time.monotonic() + TIMEOUT_S
    # Of its own session: Ctrl-C reaches this process only, which then stops it.
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=die_with_parent,
    )
    with process:
        try:
            while not (ended := _ended(process)) and not stopped() and time.monotonic() < until:
                pass
        finally:
            process.kill()
    if ended is None:
        return None if stopped() else {"why": f"its profile took longer than {TIMEOUT_S:g} s"}
    out, errors = ended
    if process.returncode:
        return {"why": (errors.strip().splitlines() or [f"exit code {process.returncode}"])[-1]}
    told = json.loads(out)
    return {**told, "share": {part: told["share"][part] for part in PARTS}}


def _ended(process: subprocess.Popen[str]) -> tuple[str, str] | None:
    """What it has said, once it has ended."""
    try:
        return process.communicate(timeout=POLL_S)
    except subprocess.TimeoutExpired:
        return None
