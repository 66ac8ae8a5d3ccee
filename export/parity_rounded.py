"""The parity gate's bound of int8, fp16 and bf16: the noise that rounding makes, measured on the model itself.

Their error is rounding to known steps, so it is measured instead of bounded: the float32 graph, itself held to its own
bound (export/parity_float32.py), runs DRAWS times with random errors of the size that rounding makes
(export/precision.py, export/half.py). What that does to a prompt's logits, as a root mean square, is its noise. Three
things are held to it: the error of the middle one of all prompts, over its noise, to SAFETY_OF_NOISE; that of each
prompt, alone and in a batch, to SAFETY_OF_EACH; and the largest error to SAFETY_OF_LARGEST times the noise's largest. A
function with a jump may fall the other way on some prompts, with an error many times the others', so it is not held to
the second (`jumps`). Where the second or third is missed, as many draws again are made, up to ROUNDS times; and what
still misses is asked once more, on other probes, before it is refused.

Measured over six seeds: every activation of the registry at random weights (ours), and small models of GPT-2, Llama,
Mistral, Qwen2 and Qwen3 with attention far from uniform, 32 or 64 channels wide (families):

                       middle prompt       each prompt, of DRAWS draws
                       ours       families        ours    families
    fp16            0.72..1.09   0.57..1.23       1.50      2.36
    bf16            0.85..1.07   0.79..1.12       1.66      3.47
    a step function 0.30..1.10                   15.25                (not held to the second)

int8 has no row: its own was of one step a tensor, and of the step a token that it has now none was measured. A fault
adds in squares, so one that moves all logits by 0.75 times the noise is seen, and one on few prompts from 2.3 times
(tests/test_precision.py, tests/test_half.py).

The CPU has no kernels of bfloat16, and in float16 its session rounds less often than a device: it computes in float32
and leaves out casts between neighbours. Both are therefore also held to the bound as `emulated` graphs, made from the
written file, which round wherever a kernel of the half type would; and on CUDA where a device is there. The manifest's
`parity.verified` says which.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from actuary import GateFailed
from export import bundle, half
from export.half import HalfName
from export.parity_float32 import compare, model_bound, probes_of, prompts_of
from export.precision import dithered as dithered_int8
from export.prompt_runs import Run, alone_and_together, feed, run_of_model
from models.activations import Activation
from models.decoder import Decoder

SAFETY_OF_NOISE, SAFETY_OF_EACH, SAFETY_OF_LARGEST, DRAWS, ROUNDS = 1.25, 2.5, 2, 4, 4


class Rounded(NamedTuple):
    """How a graph of rounded numbers did: the worst of its runs."""

    max_abs: float
    max_rel: float
    bound: float  # of max_rel
    noise: float  # the error of the middle prompt over its noise
    left_out: int


def check_rounded(
    decoder: Decoder,
    reference: PreTrainedModel,
    runs: Mapping[bundle.Verified, Run],
    float_model: onnx.ModelProto,
    noisy: Callable[[onnx.ModelProto, np.random.Generator], onnx.ModelProto],
    called: str,
    seed: int,
) -> Rounded:
    """The float32 graph against torch, then each run of the one made from it against both; GateFailed where one misses.

    Args:
        noisy: `float_model` with random errors of the size that rounding makes.
        called: the precision, for messages.
    """
    once = functools.partial(_check_rounded, decoder, reference, runs, float_model, noisy, called)
    try:
        return once(seed)
    except GateFailed:  # of single draws of noise, one in some hundred is small
        return once(seed + 1)


def _check_rounded(
    decoder: Decoder,
    reference: PreTrainedModel,
    runs: Mapping[bundle.Verified, Run],
    float_model: onnx.ModelProto,
    noisy: Callable[[onnx.ModelProto, np.random.Generator], onnx.ModelProto],
    called: str,
    seed: int,
) -> Rounded:
    probes = probes_of(decoder, reference, seed)
    plain = run_of_model(float_model)
    compare(decoder, probes, plain)
    exact = alone_and_together(plain, probes.prompts)
    largest = np.abs(exact).max(axis=-1, keepdims=True)
    rng = np.random.default_rng(seed)
    errors: list[NDArray[np.float64]] = []

    def draw() -> float:
        """Draws more noise, and says what it allows."""
        for _ in range(DRAWS):
            errors.append(alone_and_together(run_of_model(noisy(float_model, rng)), probes.prompts) - exact)
        most = max(float(np.abs(error / largest).max()) for error in errors)
        return model_bound(decoder) + SAFETY_OF_LARGEST * most

    bound = draw()
    sizes = {
        where: np.sqrt(np.square(alone_and_together(run, probes.prompts) - exact).mean(axis=-1))
        for where, run in runs.items()
    }

    def over_noise(where: bundle.Verified) -> NDArray[np.float64]:
        """Of each prompt alone, then of each in its batch."""
        return np.asarray(sizes[where] / np.sqrt(np.square(errors).mean(axis=(0, -1))))

    ratios = {where: float(np.median(over_noise(where))) for where in runs}
    where = max(ratios, key=ratios.__getitem__)
    if not ratios[where] <= SAFETY_OF_NOISE:
        raise GateFailed(
            f"{decoder.name!r} in {called} misses parity: the typical error of its logits ({where}) is "
            f"{ratios[where]:.2f} times what rounding to {called} makes, allowed {SAFETY_OF_NOISE} "
            f"(seed {seed}); use --precision fp32"
        )
    for each in () if jumps(decoder.activation) else runs:
        while not (most := float(over_noise(each).max())) <= SAFETY_OF_EACH:
            if len(errors) >= ROUNDS * DRAWS:
                row = int(over_noise(each).argmax())
                raise GateFailed(
                    f"{decoder.name!r} in {called} misses parity: after a prompt of "
                    f"{len(probes.prompts[row % len(probes.prompts)])} tokens (seed {seed}, {each}, "
                    f"{'alone' if row < len(probes.prompts) else 'in a batch'}) the error of its logits is {most:.2f} "
                    f"times what rounding to {called} makes there, allowed {SAFETY_OF_EACH}; use --precision fp32"
                )
            bound = draw()
    found: list[tuple[float, float]] = []
    for run in runs.values():
        while True:
            try:
                found.append(compare(decoder, probes, run, bound))
                break
            except GateFailed:
                if len(errors) >= ROUNDS * DRAWS:
                    raise
            bound = draw()
    return Rounded(max(a for a, _ in found), max(r for _, r in found), bound, ratios[where], probes.left_out)


def check_int8(
    decoder: Decoder, reference: PreTrainedModel, run: Run, float_model: onnx.ModelProto, seed: int
) -> Rounded:
    """int8 as ONNX Runtime's CPU runs it, which is the only place where it shall run."""
    return check_rounded(decoder, reference, {"cpu": run}, float_model, dithered_int8, "int8", seed)


def check_half(
    decoder: Decoder,
    reference: PreTrainedModel,
    runs: Mapping[bundle.Verified, Run],
    float_model: onnx.ModelProto,
    seed: int,
    name: HalfName,
) -> Rounded:
    """A half type; BadInput where the probes show values that it cannot hold."""
    prompts = prompts_of(decoder, np.random.default_rng(seed))
    if name == "fp16":  # bfloat16 reaches as far as float32
        half.check_range(_ranges(float_model, prompts), name)
    noisy = functools.partial(half.dithered, name=name)
    return check_rounded(decoder, reference, runs, float_model, noisy, name, seed)


def _ranges(float_model: onnx.ModelProto, prompts: list[NDArray[np.int64]]) -> dict[str, float]:
    """The largest |value| of every tensor that a half type would hold, by what it is called."""
    model, called = half.ranged(float_model)
    run = run_of_model(model)
    found = np.array([run(list(called), feed([prompt])) for prompt in prompts])  # [PROBES, tensors]
    return dict(zip(called.values(), found.max(axis=0).tolist(), strict=True))


def jumps(activation: Activation) -> bool:
    """Whether it has a step between -20 and 20, found by its values 1e-4 apart: a slope of 100 is no step."""
    x = torch.linspace(-20, 20, 400_001, dtype=torch.float64)
    row = torch.stack([x, torch.zeros_like(x)], -1)  # two hidden units, for what works over that axis
    arguments = [row, torch.ones_like(row)] if activation.gated else [row]
    learned = [torch.tensor([start], dtype=torch.float64) for start in activation.learned.values()]
    y = activation.expression(*arguments, *learned)
    return bool((y.diff(dim=0).abs() > 0.01).any())
