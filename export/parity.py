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

The bound of int8, fp16 and bf16. Their error is rounding to known steps, so it is measured instead of bounded: the
float32 graph, itself held to the bound above, runs DRAWS times with random errors of the size that rounding makes
(export/precision.py, export/half.py). What that does to a prompt's logits, as a root mean square, is its noise. The
error of the middle one of all prompts, over its noise, must stay within SAFETY_OF_NOISE = 1.25, and the largest error
within SAFETY_OF_LARGEST = 2 times the noise's largest. It is the middle one because a step function may fall the other
way on some prompts, with an error many times the others'; and where the largest is missed, as many draws again are
made, up to ROUNDS times, so that they too may meet such a step. Every activation
and 14 random GELU models show 0.92 to 1.07 and 0.33 to 0.65 of the two in int8, 0.89 to 1.06 and 0.04 to 0.60 in fp16,
0.87 to 1.02 and 0.05 to 0.50 in bf16; 14 models of a step function, whose noise says less, 0.44 to 1.19 and 0.01 to
0.77.
A fault adds in squares, so one that moves the logits by 0.75 times the noise is seen (tests/test_precision.py,
tests/test_half.py).

The CPU has no kernels of bfloat16, and in float16 its session rounds less often than a device: it computes in float32
and leaves out casts between neighbours. Both are therefore also held to the bound as `emulated` graphs, made from the
written file, which round wherever a kernel of the half type would; and on CUDA where a device is there. The manifest's
`parity.verified` says which.
"""

from __future__ import annotations

import functools
import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from actuary import GateFailed
from export import bundle, half
from export.graph import STANDARD
from export.half import HalfName
from export.ops import error_bound
from export.ops.check import check_activation, one_node, open_session, worst_ratio
from export.ops.check import probes as activation_probes
from export.ops.error_bound import TINY, UNIT
from export.ops.onnx_function import onnx_function, operator_name
from export.ops.trace import trace
from export.precision import dithered as dithered_int8
from models.activations import Activation
from models.decoder import Decoder

SAFETY = 4
SAFETY_OF_NOISE, SAFETY_OF_LARGEST, DRAWS, ROUNDS = 1.25, 2, 4, 4  # of int8, fp16, bf16
IN_MEMORY_BYTES = 1_800_000_000  # a larger model goes to ONNX Runtime by a file: protobuf cannot hold 2 GiB
PROBES = 12
LONGEST_PROBE, LONGEST_OTHER_PROBE = 1024, 128  # tokens; 2,200 in all: at 124M parameters as many more take 15 s
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
    short = rng.integers(1, min(T, LONGEST_OTHER_PROBE), size=PROBES - 6, endpoint=True)
    lengths = [1, min(2, T), max(1, T // 2 - 1), T, *short]
    random = [rng.integers(0, V, size=int(length)) for length in lengths]
    ends = min(T, LONGEST_OTHER_PROBE)
    return [*random, np.zeros(ends, dtype=np.int64), np.full(max(1, ends - 1), V - 1)]


@dataclass(frozen=True)
class _Probes:
    """Prompts and what torch says of them: logits [PROBES, V] in float64."""

    seed: int
    prompts: list[NDArray[np.int64]]
    exact: NDArray[np.float64]
    scale: NDArray[np.float64]  # [PROBES, 1], the largest |logit|
    fair: NDArray[np.bool_]  # [PROBES]


def _probes(decoder: Decoder, reference: PreTrainedModel, seed: int) -> _Probes:
    prompts, bound = _prompts(decoder, np.random.default_rng(seed)), model_bound(decoder)
    single = np.stack([_torch_logits(reference, prompt) for prompt in prompts]).astype(np.float64)
    exact = np.stack([_torch_logits(reference.double(), prompt) for prompt in prompts])
    reference.float()
    scale = np.abs(exact).max(axis=-1, keepdims=True)
    # A step function may fall either way where its input is within rounding of the step: a probe on which
    # torch in float32 does not meet torch in float64 says nothing of the export.
    fair = (np.abs(single - exact) / scale).max(axis=-1) <= bound
    if fair.sum() < PROBES / 2:
        raise GateFailed(
            f"torch's own float32 misses its float64 by more than {bound:.2g} on {PROBES - fair.sum()} of "
            f"{PROBES} probes: {decoder.name!r} at these weights is not determined in float32"
        )
    return _Probes(seed, prompts, exact, scale, fair)


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
    probes = _probes(decoder, reference, seed)
    return *_compare(decoder, probes, run, bound), int(PROBES - probes.fair.sum())


def _compare(decoder: Decoder, probes: _Probes, run: Run, bound: float | None = None) -> tuple[float, float]:
    """(max_abs, max_rel) of a run; GateFailed past the bound, by default float32's."""
    prompts, exact, scale, fair = probes.prompts, probes.exact, probes.scale, probes.fair
    bound = model_bound(decoder) if bound is None else bound
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
            f"(seed {probes.seed}, probe {probe}): torch in float64 {exact[probe, token]:.7g}, "
            f"ONNX Runtime alone {alone[probe, token]:.7g}, in a batch {outputs[bundle.LOGITS][probe, token]:.7g}; "
            f"relative error {max_rel:.2g}, allowed {bound:.2g}"
        )
    _check_probabilities(outputs)
    return float(max(error.max() for error in errors)), max_rel


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
    probes = _probes(decoder, reference, seed)
    plain = _opened(float_model)
    _compare(decoder, probes, plain)
    exact = _alone_and_together(plain, probes.prompts)
    largest = np.abs(exact).max(axis=-1, keepdims=True)
    rng = np.random.default_rng(seed)
    errors: list[NDArray[np.float64]] = []

    def draw() -> float:
        """Draws more noise, and says what it allows."""
        for _ in range(DRAWS):
            errors.append(_alone_and_together(_opened(noisy(float_model, rng)), probes.prompts) - exact)
        most = max(float(np.abs(error / largest).max()) for error in errors)
        return model_bound(decoder) + SAFETY_OF_LARGEST * most

    bound = draw()
    noise = np.sqrt(np.square(errors).mean(axis=(0, -1)))  # of each prompt

    def over_noise(run: Run) -> float:
        error = np.sqrt(np.square(_alone_and_together(run, probes.prompts) - exact).mean(axis=-1))
        return float(np.median(error / noise))

    ratios = {where: over_noise(run) for where, run in runs.items()}
    where = max(ratios, key=ratios.__getitem__)
    if not ratios[where] <= SAFETY_OF_NOISE:
        raise GateFailed(
            f"{decoder.name!r} in {called} misses parity: the typical error of its logits ({where}) is "
            f"{ratios[where]:.2f} times what rounding to {called} makes, allowed {SAFETY_OF_NOISE} "
            f"(seed {seed})"
        )
    found: list[tuple[float, float]] = []
    for run in runs.values():
        while True:
            try:
                found.append(_compare(decoder, probes, run, bound))
                break
            except GateFailed:
                if len(errors) >= ROUNDS * DRAWS:
                    raise
            bound = draw()
    left_out = int(PROBES - probes.fair.sum())
    return Rounded(max(a for a, _ in found), max(r for _, r in found), bound, ratios[where], left_out)


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
    prompts = _prompts(decoder, np.random.default_rng(seed))
    if name == "fp16":  # bfloat16 reaches as far as float32
        half.check_range(_ranges(float_model, prompts), name)
    noisy = functools.partial(half.dithered, name=name)
    return check_rounded(decoder, reference, runs, float_model, noisy, name, seed)


def _ranges(float_model: onnx.ModelProto, prompts: list[NDArray[np.int64]]) -> dict[str, float]:
    """The largest |value| of every tensor that a half type would hold, by what it is called."""
    model, called = half.ranged(float_model)
    run = _opened(model)
    found = np.array([run(list(called), _feed([prompt])) for prompt in prompts])  # [PROBES, tensors]
    return dict(zip(called.values(), found.max(axis=0).tolist(), strict=True))


def _opened(model: onnx.ModelProto) -> Run:
    """A CPU session of a model in memory."""
    if model.ByteSize() <= IN_MEMORY_BYTES:
        return run_of(open_session(model.SerializeToString()))
    with tempfile.TemporaryDirectory(prefix="actuary-parity-") as scratch:
        path = Path(scratch) / bundle.MODEL
        onnx.save_model(model, path, save_as_external_data=True, location=f"{bundle.MODEL}.data")
        onnx.load_external_data_for_model(model, scratch)  # saving took it out of the model
        return run_of(open_session(str(path)))


def run_of(session: onnxruntime.InferenceSession) -> Run:
    return lambda outputs, feeds: list(session.run(outputs, feeds))


def cuda_session(model_path: str) -> onnxruntime.InferenceSession | None:
    """A session of the file on CUDA; None where there is no device or ONNX Runtime does not run on it."""
    provider = "CUDAExecutionProvider"
    if not Path("/proc/driver/nvidia/version").exists() or provider not in onnxruntime.get_available_providers():
        return None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    onnxruntime.preload_dlls()
    session = onnxruntime.InferenceSession(model_path, options, providers=[provider, "CPUExecutionProvider"])
    return session if provider in session.get_providers() else None


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


def _function(model_path: str, activation: Activation) -> onnx.FunctionProto:
    """The activation's, as the file has it; what it means, where a standard operator stands in its place."""
    names = [operator_name(activation.name, biased) for biased in (False, True)]
    functions = onnx.load(model_path, load_external_data=False).functions
    found = [function for function in functions if function.name in names]
    if not found and activation.name in STANDARD:
        return onnx_function(activation.name, trace(activation))
    (function,) = found
    return onnx.FunctionProto.FromString(function.SerializeToString())  # a copy, so that the model it stood in can go


def _check_half_activation(decoder: Decoder, function: onnx.FunctionProto, seed: int) -> float:
    """The function in float16: its arithmetic is float32, and rounds once more at the end."""
    activation, biased = decoder.activation, function.name != decoder.activation.name
    feeds = activation_probes(activation, np.random.default_rng(seed), biased, "float16")
    (got,) = open_session(one_node(activation, function, biased, "float16")).run(None, feeds)
    return worst_ratio(activation, feeds, got, error_bound.FLOAT32)


def check(
    decoder: Decoder,
    reference: PreTrainedModel,
    model_path: str,
    seed: int,
    float_model: onnx.ModelProto | None = None,
    precision: Literal["fp32", "int8", "fp16", "bf16"] = "fp32",
) -> bundle.Parity:
    """Both comparisons on the file as written; GateFailed where one misses.

    Args:
        float_model: the float32 graph that the file's one was made from; None where the file is float32.
    """
    function = _function(model_path, decoder.activation)
    worst = check_activation(decoder.activation, function, np.random.default_rng(seed))

    def later(opened: Callable[[], Run]) -> Run:
        """A session that opens when torch has its answers: two models take the room."""
        once = functools.cache(opened)
        return lambda outputs, feeds: once()(outputs, feeds)

    run = later(lambda: run_of(open_session(model_path)))
    runs: dict[bundle.Verified, Run] = {} if precision == "bf16" else {"cpu": run}
    if precision in half.HALVES:
        worst = max(worst, _check_half_activation(decoder, function, seed))
        runs["emulated"] = later(lambda: _opened(half.emulated(onnx.load(model_path))))
        if cuda := cuda_session(model_path):
            runs["cuda"] = run_of(cuda)
    if float_model is None:
        max_abs, max_rel, left_out = check_model(decoder, reference, run, seed)
        rounded = Rounded(max_abs, max_rel, model_bound(decoder), math.nan, left_out)
    elif precision == "fp16" or precision == "bf16":
        rounded = check_half(decoder, reference, runs, float_model, seed, precision)
    else:
        rounded = check_int8(decoder, reference, run, float_model, seed)
    return bundle.Parity(
        max_abs=rounded.max_abs,
        max_rel=rounded.max_rel,
        bound=rounded.bound,
        noise=None if float_model is None else rounded.noise,
        verified=list(runs),
        activation=worst,
        probes=PROBES,
        probes_left_out=rounded.left_out,
    )
