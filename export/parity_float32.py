"""The parity gate's bound of a whole model in float32: ONNX Runtime against torch in float64, on fresh prompts.

Each product sums k terms, and rounds with relative error about sqrt(k) * u in the usual case (Higham & Mary 2019;
u = 2^-24). Along the deepest path of L blocks the products have k = C, D, T, heads D, C, H (D = head_dim), and C in the
head; their independent errors add as squares, so

    bound = SAFETY * u * sqrt(L * (2 C + D + T + heads D + H) + C)       of a row's largest |logit|.

SAFETY = 4 covers the norms, the residual stream's growth, and exponentials: a score of 10 multiplies its error by as
much. Default variants and every activation at random weights show at most 0.04 of this bound, small random models of
transformers with attention far from uniform up to 0.7, while gelu_tanh in gelu's place, or one matrix that is off
by 0.05 %, misses it (tests/test_ops.py, tests/test_export.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from actuary import GateFailed
from export import bundle
from export.ops.error_bound import TINY, UNIT
from export.prompt_runs import Run, feed, in_batches
from models.decoder import Decoder

SAFETY = 4
REPORT_IT = "the graph is wrong for this model, so nothing was written: report it with its config.json and the seed"
PROBES = 12
LONGEST_PROBE, LONGEST_OTHER_PROBE = 1024, 128  # tokens; 2,200 in all: at 124M parameters as many more take 15 s
# One more prompt, where the context is longer than LONGEST_PROBE: of as many tokens as LONGEST_WHOLE, and as a block's
# scores [heads, T, T] of WHOLE_SCORES numbers (0.5 GB) take; for models of fewer than WHOLE_PARAMETERS. At 26M it takes
# 43 s more of processor time in fp32; at 0.7M none to speak of, and 6 s in bf16 (2 cores, 2026-11-21).
LONGEST_WHOLE, WHOLE_SCORES, WHOLE_PARAMETERS = 4096, 2**27, 10e6


def model_bound(decoder: Decoder) -> float:
    """Largest allowed |error| of a logit over its row's largest |logit|; derived above."""
    d = decoder
    per_block = 2 * d.dim + d.head_dim + d.context + d.heads * d.head_dim + d.hidden
    return SAFETY * UNIT * math.sqrt(d.layers * per_block + d.dim)


def prompts_of(decoder: Decoder, rng: np.random.Generator) -> list[NDArray[np.int64]]:
    """Random prompts from 1 token to the whole context or LONGEST_PROBE, and the vocabulary's ends repeated."""
    T, V = min(decoder.context, LONGEST_PROBE), decoder.vocab_size
    short = rng.integers(1, min(T, LONGEST_OTHER_PROBE), size=PROBES - 6, endpoint=True)
    lengths = [1, min(2, T), max(1, T // 2 - 1), T, *short]
    random = [rng.integers(0, V, size=int(length)) for length in lengths]
    ends = min(T, LONGEST_OTHER_PROBE)
    whole = min(decoder.context, LONGEST_WHOLE, math.isqrt(WHOLE_SCORES // decoder.heads))
    more = [rng.integers(0, V, size=whole)] if whole > T and decoder.parameters < WHOLE_PARAMETERS else []
    return [*random, np.zeros(ends, dtype=np.int64), np.full(max(1, ends - 1), V - 1), *more]


@dataclass(frozen=True)
class Probes:
    """Prompts and what torch says of them: logits [PROBES, V] in float64."""

    seed: int
    prompts: list[NDArray[np.int64]]
    exact: NDArray[np.float64]
    scale: NDArray[np.float64]  # [PROBES, 1], the largest |logit|
    fair: NDArray[np.bool_]  # [PROBES]

    @property
    def left_out(self) -> int:
        return int((~self.fair).sum())


def probes_of(decoder: Decoder, reference: PreTrainedModel, seed: int) -> Probes:
    prompts, bound = prompts_of(decoder, np.random.default_rng(seed)), model_bound(decoder)
    single = np.stack([_torch_logits(reference, prompt) for prompt in prompts]).astype(np.float64)
    exact = np.stack([_torch_logits(reference.double(), prompt) for prompt in prompts])
    reference.float()
    scale = np.abs(exact).max(axis=-1, keepdims=True)
    # A step function may fall either way where its input is within rounding of the step: a probe on which
    # torch in float32 does not meet torch in float64 says nothing of the export.
    fair = (np.abs(single - exact) / scale).max(axis=-1) <= bound
    found = Probes(seed, prompts, exact, scale, fair)
    if found.left_out > len(prompts) / 2:
        raise GateFailed(
            f"torch's own float32 misses its float64 by more than {bound:.2g} on {found.left_out} of "
            f"{len(prompts)} probes: {decoder.name!r} at these weights is not determined in float32; train it longer, "
            "or with another activation"
        )
    return found


def check_model(
    decoder: Decoder, reference: PreTrainedModel, run: Run, seed: int, bound: float | None = None
) -> tuple[float, float, int]:
    """Compares logits [B, V] at each prompt's last position, each prompt alone and in padded batches.

    Args:
        reference: the torch model in float32 that `decoder` was read from; compared in float64, and put back.
        run: the exported session's `run`.
        bound: by default float32's.
    Returns: (max_abs, max_rel, probes left out). GateFailed names the probe and both values.
    """
    probes = probes_of(decoder, reference, seed)
    return *compare(decoder, probes, run, bound), probes.left_out


def compare(decoder: Decoder, probes: Probes, run: Run, bound: float | None = None) -> tuple[float, float]:
    """(max_abs, max_rel) of a run; GateFailed past the bound, by default float32's."""
    prompts, exact, scale, fair = probes.prompts, probes.exact, probes.scale, probes.fair
    bound = model_bound(decoder) if bound is None else bound
    alone = np.concatenate([run([bundle.LOGITS], feed([prompt]))[0] for prompt in prompts])
    top_k = min(5, decoder.vocab_size)
    batches = [run(list(bundle.OUTPUTS), feed(batch, top_k)) for batch in in_batches(prompts)]
    outputs = dict(zip(bundle.OUTPUTS, map(np.concatenate, zip(*batches, strict=True)), strict=True))
    errors = [np.abs(got - exact)[fair] for got in (alone, outputs[bundle.LOGITS])]
    worst = max(errors, key=lambda error: float((error / scale[fair]).max()))
    max_rel = float((worst / scale[fair]).max())
    if not max_rel <= bound:
        row, token = np.unravel_index(int((worst / scale[fair]).argmax()), worst.shape)
        probe = int(np.flatnonzero(fair)[row])
        raise GateFailed(
            f"{decoder.name!r} misses parity: logit of token {token} after a prompt of {len(prompts[probe])} tokens "
            f"(seed {probes.seed}, probe {probe}): torch in float64 {exact[probe, token]:.7g}, "
            f"ONNX Runtime alone {alone[probe, token]:.7g}, in a batch {outputs[bundle.LOGITS][probe, token]:.7g}; "
            f"relative error {max_rel:.2g}, allowed {bound:.2g}; {REPORT_IT}"
        )
    _check_probabilities(outputs)
    return float(max(error.max() for error in errors)), max_rel


def _torch_logits(model: PreTrainedModel, prompt: NDArray[np.int64]) -> NDArray[Any]:
    """[V], after the prompt."""
    with torch.inference_mode():
        output = model(input_ids=torch.from_numpy(prompt)[None], logits_to_keep=1)
        return np.asarray(output.logits[0, -1].numpy())


def _check_probabilities(outputs: dict[str, NDArray[Any]]) -> None:
    """Softmax, sigmoid, top ids, mass and entropy against the same graph's logits, in float64."""
    logits = torch.from_numpy(outputs[bundle.LOGITS]).double()
    softmax, log_sigmoid = torch.softmax(logits, -1), torch.nn.functional.logsigmoid(logits)
    shares = torch.softmax(log_sigmoid, -1)  # sigmoids divided by their sum
    expected = {
        bundle.SOFTMAX: softmax,
        bundle.SIGMOID: log_sigmoid.exp(),
        bundle.MASS: torch.stack([softmax.sum(-1), log_sigmoid.exp().sum(-1)], -1),
        bundle.ENTROPY_BITS: torch.stack([-torch.special.xlogy(p, p).sum(-1) for p in (softmax, shares)], -1)
        / math.log(2),
    }
    # log p = l - logsumexp(l) rounds at the size of its terms; a sum over V adds sqrt(V) roundings.
    of_one = 8 * UNIT * (1 + float(logits.abs().max()))
    of_sum = of_one * math.sqrt(logits.shape[-1])
    for name, value in expected.items():
        # A probability must be right in proportion, however small; a mass or an entropy below 1 absolutely.
        one = name in (bundle.SOFTMAX, bundle.SIGMOID)
        tolerance, floor = (of_one, TINY) if one else (of_sum, 1.0)
        missed = (torch.from_numpy(outputs[name]).double() - value).abs() - TINY  # which may be flushed to zero
        error = float((missed / value.abs().clamp(min=floor)).max())
        if not error <= tolerance:
            raise GateFailed(
                f"the graph's {name} misses its definition by {error:.2g}, allowed {tolerance:.2g}; {REPORT_IT}"
            )
    best = logits.sort(dim=-1, descending=True, stable=True).indices[:, : outputs[bundle.TOP_IDS].shape[-1]]
    if not np.array_equal(best.numpy(), outputs[bundle.TOP_IDS]):
        raise GateFailed(
            f"the graph's {bundle.TOP_IDS} are not the ids of its largest logits, ties by rising id; {REPORT_IT}"
        )
