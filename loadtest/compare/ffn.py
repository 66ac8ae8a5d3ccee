"""The feed-forward blocks' share of each variant's time: `actuary inspect --profile` of the bundles of its own server.

No comparison can show an activation to cost more than this share. Measured when the server is gone, one variant after
another, on prompts of the workload's mean length; kept in the run folder's ffn.json.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from loadtest.compare import store
from loadtest.shared import write

FILE = "ffn.json"
TIMEOUT_S = 300.0
CPU = "CPUExecutionProvider"
PARTS = ("ffn", "attention", "head", "other", "activation")  # the last is within the first
ROOT = Path(__file__).parents[2]


def measure(folder: Path, bundles: Path, ops: Path) -> None:
    """Writes what the folder lacks; a variant that cannot be profiled stays without, and why is said."""
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
                kept[model] = _profile(bundle, ops, min(tokens, facts["context"]))
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


def _profile(bundle: Path, ops: Path, tokens: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "actuary", "inspect", str(bundle), "--profile", "--tokens", str(tokens)]
    command += ["--ops", str(ops), "--json"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return {"why": f"its profile took longer than {TIMEOUT_S:g} s"}
    if done.returncode:
        return {"why": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}
    told = json.loads(done.stdout)
    return {**told, "share": {part: told["share"][part] for part in PARTS}}
