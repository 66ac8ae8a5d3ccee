"""What a trained model is worth on text it has not seen: bits per byte, calibration, and the mass of its sigmoids."""

from __future__ import annotations

import math

import numpy as np
import torch

from models.corpus import Ids
from models.gpt import ActuaryGPT, log_probabilities

ECE_BINS = 15
WINDOWS = 16  # at once: logits [16, 128, 2048] are 17 MB


@torch.inference_mode()
def held_out_quality(model: ActuaryGPT, ids: Ids) -> tuple[float, float, float]:
    """Held-out bits per byte, expected calibration error, and mean mass of the sigmoids.

    Every held-out token counts once, predicted from the window of `context` tokens that it stands in. The
    ECE (Guo et al. 2017, 15 equal bins) is of the likeliest token: of its softmax, or under the sigmoid head of
    its raw sigmoid.
    """
    model.eval()
    head, T = model.config.head, model.config.context
    device = model.embed.weight.device
    nats, mass, total = 0.0, 0.0, 0
    bins = np.zeros((3, ECE_BINS))  # count, confidence, hits
    pieces = [ids.held_out[start : start + T + 1] for start in range(0, len(ids.held_out) - 1, T)]
    whole = len(pieces) - (len(pieces[-1]) <= T)  # a last window that is short goes alone
    groups = [pieces[i : min(i + WINDOWS, whole)] for i in range(0, whole, WINDOWS)]
    groups += [pieces[whole:]] if whole < len(pieces) else []
    for group in groups:
        batch = torch.from_numpy(np.stack(group)).long().to(device)
        logits = model.logits(model.hidden_states(batch[:, :-1]))
        log_p, targets = log_probabilities(logits, head), batch[:, 1:]
        nats -= float(log_p.gather(-1, targets[..., None]).cpu().double().sum())
        sigmoids = torch.sigmoid(logits)
        mass += float(sigmoids.cpu().double().sum())
        total += targets.numel()
        likeliest = log_p.argmax(-1, keepdim=True)
        confidence = (
            (log_p.exp() if head == "softmax" else sigmoids).gather(-1, likeliest)[..., 0].cpu().numpy().ravel()
        )
        hits = (likeliest[..., 0] == targets).cpu().numpy().ravel()
        which = np.minimum((confidence * ECE_BINS).astype(int), ECE_BINS - 1)
        for row, weights in enumerate((None, confidence, hits)):
            bins[row] += np.bincount(which, weights=weights, minlength=ECE_BINS)
    ece = float(np.abs(bins[1] - bins[2]).sum() / total)
    return nats / math.log(2) / ids.held_out_bytes, ece, mass / total
