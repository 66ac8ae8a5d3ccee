"""The parity gate: ONNX Runtime against torch in float64, on fresh probes; a bundle that misses is not written.

Two comparisons. The activation alone, at random and extreme inputs, element by element against the running
error bound of its own expression (export/ops/check.py): a wrong formula cannot hide in a large
model. The whole model, on prompts of several lengths and padded batches, against the bound below.

The bound of the whole model. Each product sums k terms, and rounds with relative error about sqrt(k) * u in
the usual case (Higham & Mary 2019; u = 2^-24). Along the deepest path of L blocks the products have
k = C, D, T, heads D, C, H (D = head_dim), and C in the head; their independent errors add as squares, so

    bound = SAFETY * u * sqrt(L * (2 C + D + T + heads D + H) + C)       of a row's largest |logit|.

SAFETY = 4 covers the norms, the residual stream's growth, and exponentials: a score of 10 multiplies its error by as
much. Default variants and every activation at random weights show at most 0.04 of this bound, small random models of
transformers with attention far from uniform up to 0.7, while gelu_tanh in gelu's place, or one matrix that is off
by 0.05 %, misses it (tests/test_ops.py, tests/test_export.py).

The bound of int8. Its error is rounding to known steps, so it is measured instead of bounded: the float32 graph,
itself held to the bound above, runs DRAWS times with random errors of the quantisers' own steps (export/precision.py).
The root mean square of the logits' error over all probes must stay within SAFETY_OF_NOISE = 1.25 times that noise's,
and the largest error within SAFETY_OF_LARGEST = 2 times its largest. Every activation at random weights shows 0.78 to
1.09 of the noise and 0.27 to 0.67 of the second bound (100 exports). A fault adds in squares, so one that
moves the logits by 0.75 times the noise is seen (tests/test_precision.py).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from actuary import GateFailed
from export import bundle, precision
from export.ops.check import check_activation, open_session
from export.ops.error_bound import TINY, UNIT
from models.decoder import Decoder

SAFETY = 4
SAFETY_OF_NOISE, SAFETY_OF_LARGEST, DRAWS = 1.25, 2, 4  # of int8
PROBES = 12
LONGEST_PROBE, LONGEST_RANDOM_PROBE = 1024, 128  # tokens; 4,300 in all: at 124M parameters 5,000 more take 30 s
BATCH_TOKENS = 2048  # of a padded batch: at 124M parameters one of 12 x 1,024 takes 1.3 GB
Run = Callable[..., list[NDArray[Any]]]


def model_bound(decoder: Decoder) -> float:
    """Largest allowed |error| of a logit over its row's largest |logit|; derived above."""
    d = decoder
    per_block = 2 * d.dim + d.head_dim + d.context + d.heads * d.head_dim + d.hidden
    return SAFETY * UNIT * math.sqrt(d.layers * per_block + d.dim)


def _prompts(decoder: Decoder, rng: np.random.Generator) -> list[NDArray[np.int64]]:
    """Random prompts from 1 token to the whole context or LONGEST_PROBE, and the vocabulary's ends repeated."""
    T, V = min(decoder.context, LONGEST_PROBE), decoder.vocab_size
    short = rng.integers(1, min(T, LONGEST_RANDOM_PROBE), size=PROBES - 6, endpoint=True)
    lengths = [1, min(2, T), max(1, T // 2 - 1), T, *short]
    random = [rng.integers(0, V, size=int(length)) for length in lengths]
    return [*random, np.zeros(T, dtype=np.int64), np.full(max(1, T - 1), V - 1)]


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
    rng = np.random.default_rng(seed)
    prompts, of_float32 = _prompts(decoder, rng), model_bound(decoder)
    bound = of_float32 if bound is None else bound
    single = np.stack([_torch_logits(reference, prompt) for prompt in prompts]).astype(np.float64)
    exact = np.stack([_torch_logits(reference.double(), prompt) for prompt in prompts])
    reference.float()
    scale = np.abs(exact).max(axis=-1, keepdims=True)
    # A step function may fall either way where its input is within rounding of the step: a probe on which
    # torch in float32 does not meet torch in float64 says nothing of the export.
    fair = (np.abs(single - exact) / scale).max(axis=-1) <= of_float32
    if fair.sum() < PROBES / 2:
        raise GateFailed(
            f"torch's own float32 misses its float64 by more than {of_float32:.2g} on {PROBES - fair.sum()} of "
            f"{PROBES} probes: {decoder.name!r} at these weights is not determined in float32"
        )
    alone = np.concatenate([run([bundle.LOGITS], _feed([prompt]))[0] for prompt in prompts])
    top_k = min(5, decoder.vocab_size)
    batches = [run(list(bundle.OUTPUTS), _feed(batch, top_k)) for batch in _batches(prompts)]
    outputs = dict(zip(bundle.OUTPUTS, map(np.concatenate, zip(*batches, strict=True)), strict=True))
    errors = [np.abs(got - exact)[fair] for got in (alone, outputs[bundle.LOGITS])]
    worst = max(errors, key=lambda error: float((error / scale[fair]).max()))
    max_rel = float((worst / scale[fair]).max())
    if not max_rel <= bound:
        row, token = np.unravel_index(int((worst / scale[fair]).argmax()), worst.shape)
        probe = int(np.flatnonzero(fair)[row])
        raise GateFailed(
            f"{decoder.name!r} misses parity: logit of token {token} after a prompt of {len(prompts[probe])} tokens "
            f"(seed {seed}, probe {probe}): torch in float64 {exact[probe, token]:.7g}, "
            f"ONNX Runtime alone {alone[probe, token]:.7g}, in a batch {outputs[bundle.LOGITS][probe, token]:.7g}; "
            f"relative error {max_rel:.2g}, allowed {bound:.2g}"
        )
    _check_probabilities(outputs)
    return float(max(error.max() for error in errors)), max_rel, int(PROBES - fair.sum())


def check_int8(
    decoder: Decoder, reference: PreTrainedModel, run: Run, float_model: onnx.ModelProto, seed: int
) -> tuple[float, float, float, float, int]:
    """The float32 graph against torch; then the int8 one made from it, against both.

    Returns: (max_abs, max_rel, its bound, error over rounding noise, probes left out).
    """
    plain = open_session(float_model.SerializeToString()).run
    check_model(decoder, reference, plain, seed)
    rng = np.random.default_rng(seed)
    prompts = _prompts(decoder, rng)
    exact = _alone_and_together(plain, prompts)
    errors = []
    for _ in range(DRAWS):
        noisy = open_session(precision.dithered(float_model, rng).SerializeToString()).run
        errors.append(_alone_and_together(noisy, prompts) - exact)
    largest = np.abs(exact).max(axis=-1, keepdims=True)
    bound = model_bound(decoder) + SAFETY_OF_LARGEST * max(float(np.abs(error / largest).max()) for error in errors)
    max_abs, max_rel, left_out = check_model(decoder, reference, run, seed, bound)
    noise = float(np.sqrt(np.mean(np.square(errors))))
    ratio = float(np.sqrt(np.mean(np.square(_alone_and_together(run, prompts) - exact)))) / noise
    if not ratio <= SAFETY_OF_NOISE:
        raise GateFailed(
            f"{decoder.name!r} in int8 misses parity: the root mean square error of its logits is {ratio:.2f} times "
            f"what rounding to int8 makes ({noise:.2g}), allowed {SAFETY_OF_NOISE} (seed {seed})"
        )
    return max_abs, max_rel, bound, ratio, left_out


def _alone_and_together(run: Run, prompts: list[NDArray[np.int64]]) -> NDArray[np.float64]:
    """Logits [2 * prompts, V]: of each prompt alone, then of all in padded batches."""
    feeds = [_feed(batch) for batch in [*([prompt] for prompt in prompts), *_batches(prompts)]]
    return np.concatenate([run([bundle.LOGITS], feed)[0] for feed in feeds]).astype(np.float64)


def _torch_logits(model: PreTrainedModel, prompt: NDArray[np.int64]) -> NDArray[Any]:
    """[V], after the prompt."""
    with torch.inference_mode():
        output = model(input_ids=torch.from_numpy(prompt)[None], logits_to_keep=1)
        return np.asarray(output.logits[0, -1].numpy())


def _batches(prompts: list[NDArray[np.int64]]) -> list[list[NDArray[np.int64]]]:
    """The prompts in their order, in batches of at most BATCH_TOKENS with their padding, or of one prompt."""
    batches: list[list[NDArray[np.int64]]] = [[]]
    for prompt in prompts:
        grown = [*batches[-1], prompt]
        if batches[-1] and len(grown) * max(map(len, grown)) > BATCH_TOKENS:
            batches.append([prompt])
        else:
            batches[-1] = grown
    return batches


def _feed(prompts: list[NDArray[np.int64]], top_k: int = 0) -> dict[str, NDArray[np.int64]]:
    ids = np.zeros((len(prompts), max(map(len, prompts))), dtype=np.int64)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    return {bundle.INPUT_IDS: ids, bundle.LENGTHS: np.array([len(p) for p in prompts]), bundle.TOP_K: np.array([top_k])}


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
            raise GateFailed(f"the graph's {name} misses its definition by {error:.2g}, allowed {tolerance:.2g}")
    best = logits.sort(dim=-1, descending=True, stable=True).indices[:, : outputs[bundle.TOP_IDS].shape[-1]]
    if not np.array_equal(best.numpy(), outputs[bundle.TOP_IDS]):
        raise GateFailed(f"the graph's {bundle.TOP_IDS} are not the ids of its largest logits, ties by rising id")


def _function(model_path: str, name: str) -> onnx.FunctionProto:
    """A copy, so that the model it stood in can go."""
    functions = onnx.load(model_path, load_external_data=False).functions
    return onnx.FunctionProto.FromString(next(f for f in functions if f.name == name).SerializeToString())


def check(
    decoder: Decoder,
    reference: PreTrainedModel,
    model_path: str,
    seed: int,
    float_model: onnx.ModelProto | None = None,
) -> bundle.Parity:
    """Both comparisons on the file as written; GateFailed where one misses.

    Args:
        float_model: the float32 graph that the file's int8 one was made from; None where the file is float32.
    """
    function = _function(model_path, decoder.activation.name)
    worst = check_activation(decoder.activation, function, np.random.default_rng(seed))
    opened = functools.cache(lambda: open_session(model_path))  # when torch has its answers: two models take the room
    noise = None

    def run(*given: Any) -> list[NDArray[Any]]:
        return list(opened().run(*given))

    if float_model is None:
        bound = model_bound(decoder)
        max_abs, max_rel, left_out = check_model(decoder, reference, run, seed)
    else:
        max_abs, max_rel, bound, noise, left_out = check_int8(decoder, reference, run, float_model, seed)
    return bundle.Parity(
        max_abs=max_abs,
        max_rel=max_rel,
        bound=bound,
        noise=noise,
        activation=worst,
        probes=PROBES,
        probes_left_out=left_out,
    )
