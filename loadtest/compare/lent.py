"""Bits per byte of trained models for variants whose weights say nothing: latency of a real size, quality of a small.

Latency does not depend on what the weights say, so `actuary export --random` makes bundles of any size. What an
activation buys has to come from models that were trained; `actuary report RUN --quality-from DIR` takes it from there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from actuary import BadInput

MANIFEST = "manifest.json"


def lend_quality(run: dict[str, Any], folder: Path) -> str:
    """Gives each arm of run.json without a quality that of its activation in `folder`; a sentence on what was done."""
    trained = _trained(folder)
    # An experiment has no activation of its own.
    without = [arm for arm in run["arms"] if not arm["facts"].get("quality") and "activation" in arm["facts"]]
    given = [arm for arm in without if _key(arm["facts"]) in trained]
    if not given:
        wanted = sorted({arm["facts"]["activation"] for arm in without})
        raise BadInput(
            f"--quality-from {folder} has nothing to lend: the run lacks the quality of "
            f"{', '.join(wanted) or 'no variant'}; measured there: {', '.join(sorted(name for name, _ in trained))}"
        )
    for arm in given:
        arm["facts"]["quality"] = trained[_key(arm["facts"])]["quality"]
    sizes = {f"{t['layers']} layers of C = {t['dim']}" for t in (trained[_key(arm["facts"])] for arm in given)}
    models = ", ".join(dict.fromkeys(arm["model"] for arm in given))
    return (
        f"bits per byte of {models} are not of these weights, which say nothing, but of trained models of the same "
        f"activations with {' and '.join(sorted(sizes))}"
    )


def _key(facts: dict[str, Any]) -> tuple[str, str]:
    return facts["activation"], facts["head"]


def _trained(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Manifests with a quality by (activation, head); of several, the one that has the activation's own name."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for path in sorted(folder.glob(f"*/{MANIFEST}")):
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            key = _key(manifest)
            if manifest["quality"] and (key not in found or manifest["name"] == manifest["activation"]):
                found[key] = manifest
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BadInput(f"--quality-from: {path} is no manifest of a bundle: {error!r}; export it again") from error
    if not found:
        raise BadInput(f"--quality-from {folder} holds no bundle whose quality was measured; name a folder of them")
    return found
