"""The state of a variant that was stopped: weights, Adam's moments, how far it came. Never pickle: safetensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file

from models.gpt import ActuaryGPT

MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def save_state(
    path: Path, step: int, seconds: float, mark: dict[str, Any], model: ActuaryGPT, optimizer: torch.optim.Optimizer
) -> None:
    """Replaces `path` by the state after `step` steps and `seconds` of training under the settings `mark`."""
    tensors = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        tensors |= {f"{key}.{name}": value for key, value in optimizer.state[parameter].items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    metadata = {"step": str(step), "seconds": str(seconds), "fingerprint": json.dumps(mark)}
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, partial, metadata)
    partial.replace(path)


def load_state(
    path: Path, mark: dict[str, Any], model: ActuaryGPT, optimizer: torch.optim.Optimizer
) -> tuple[int, float]:
    """Puts a stopped variant's state back: (step to go on from, seconds spent).

    (0, 0.0), and nothing changed, where there is no state, a damaged one, or one of other settings.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if json.loads(metadata.get("fingerprint", "null")) != mark:
                return 0, 0.0
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a dict)
    except (FileNotFoundError, safetensors.SafetensorError, json.JSONDecodeError):
        return 0, 0.0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"model.{name}"])
            moments = {key: tensors[f"{key}.{name}"] for key in MOMENTS if f"{key}.{name}" in tensors}
            # Adam counts steps on the CPU or, when fused, beside the parameter; its moments lie beside it.
            optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in moments.items()}
    return int(metadata["step"]), float(metadata["seconds"])
