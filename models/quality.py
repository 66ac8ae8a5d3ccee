"""What a trained model is worth on text it has not seen: bits per byte, calibration, and the mass of its sigmoids."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.corpus import Ids
from models.gpt import ActuaryGPT, Head, log_probabilities

ECE_BINS = 15
WINDOWS = 16  # at once: logits [16, 128, 2048] are 17 MB


def held_out_quality(model: ActuaryGPT, ids: Ids) -> tuple[float, float, float]:
    """Held-out bits per byte, expected calibration error, and mean mass of the sigmoids."""
    model.eval()
    device = model.embed.weight.device
    return quality_of(
        lambda batch: model.logits(model.hidden_states(batch.to(device))),
        model.config.head,
        model.config.context,
        ids.held_out,
        ids.held_out_bytes,
    )


@torch.inference_mode()
def quality_of(
    logits_of: Callable[[Tensor], Tensor],
    head: Head,
    context: int,
    held_out: NDArray[np.int32],
    held_out_bytes: int,
    at_once: int = WINDOWS,
) -> tuple[float, float, float]:
    """The same of anything that turns ids [B, T] into logits [B, T, V], on whichever device.

    Every held-out token counts once, predicted from the window of `context` tokens that it stands in. The
    ECE (Guo et al. 2017, 15 equal bins) is of the likeliest token: of its softmax, or under the sigmoid head of
    its raw sigmoid.
    """
    T = context
    nats, mass, total = 0.0, 0.0, 0
    bins = np.zeros((3, ECE_BINS))  # count, confidence, hits
    pieces = [held_out[start : start + T + 1] for start in range(0, len(held_out) - 1, T)]
    whole = len(pieces) - (len(pieces[-1]) <= T)  # a last window that is short goes alone
    groups = [pieces[i : min(i + at_once, whole)] for i in range(0, whole, at_once)]
    groups += [pieces[whole:]] if whole < len(pieces) else []
    for group in groups:
        batch = torch.from_numpy(np.stack(group)).long()
        logits = logits_of(batch[:, :-1])
        log_p, targets = log_probabilities(logits, head), batch[:, 1:].to(logits.device)
        nats -= float(log_p.gather(-1, targets[..., None]).cpu().double().sum())
        sigmoids = torch.sigmoid(logits)
        mass += float(sigmoids.cpu().double().sum())
        total += targets.numel()
        likeliest = log_p.argmax(-1, keepdim=True)
        confidence = (
            (log_p.exp() if head == "softmax" else sigmoids).gather(-1, likeliest)[..., 0].cpu().numpy().ravel()
        )
        hits = (likeliest[..., 0] == targets).cpu().numpy().ravel()
        bins += reliability(confidence, hits)
    return nats / math.log(2) / held_out_bytes, ece_of(bins), mass / total


def reliability(confidence: NDArray[Any], hits: NDArray[np.bool_]) -> NDArray[np.float64]:
    """[3, ECE_BINS], equal bins of confidence 0 to 1: how many predictions, the sum of their confidence, their hits."""
    which = np.minimum((confidence * ECE_BINS).astype(int), ECE_BINS - 1)
    weights = (None, confidence, hits)
    return np.stack([np.bincount(which, weights=weight, minlength=ECE_BINS) for weight in weights])


def ece_of(bins: NDArray[np.float64]) -> float:
    """Expected calibration error of `reliability`'s bins, or of their sum over several batches."""
    return float(np.abs(bins[1] - bins[2]).sum() / bins[0].sum())
