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
    int8            0.88..1.12   0.86..1.08       1.60      1.96
    fp16            0.72..1.09   0.57..1.23       1.50      2.36
    bf16            0.85..1.07   0.79..1.12       1.66      3.47
    a step function 0.30..1.10                   15.25                (not held to the second)

Of 300 asked of the families, one missed SAFETY_OF_EACH = 2.5 after all its draws. The largest error is 0.04 to 0.77 of
its bound. A fault adds in squares, so one that moves all logits by 0.75 times the noise is seen, and one on few prompts
from 2.3 times (tests/test_precision.py, tests/test_half.py).

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
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as NotImplementedByRuntime
from transformers import PreTrainedModel

from actuary import GateFailed
from export import bundle, half
from export.graph_parts import STANDARD
from export.half import HalfName
from export.ops import error_bound
from export.ops.check import check_activation, one_node, open_session, worst_ratio
from export.ops.check import probes as activation_probes
from export.ops.error_bound import TINY, UNIT
from export.ops.onnx_function import operator_name
from export.precision import dithered as dithered_int8
from models.activations import Activation
from models.decoder import Decoder
from models.gpt import ActuaryGPT, rope_tables

SAFETY = 4
SAFETY_OF_NOISE, SAFETY_OF_EACH, SAFETY_OF_LARGEST, DRAWS, ROUNDS = 1.25, 2.5, 2, 4, 4  # of int8, fp16, bf16
# The weights of a larger model lie in a file beside it, and it goes to ONNX Runtime so: protobuf cannot hold 2 GiB.
IN_MEMORY_BYTES = 1_800_000_000
REPORT_IT = "the graph is wrong for this model, so nothing was written: report it with its config.json and the seed"
PROBES = 12
LONGEST_PROBE, LONGEST_OTHER_PROBE = 1024, 128  # tokens; 2,200 in all: at 124M parameters as many more take 15 s
# One more prompt, where the context is longer than LONGEST_PROBE: of as many tokens as LONGEST_WHOLE, and as a block's
# scores [heads, T, T] of WHOLE_SCORES numbers (0.5 GB) take; for models of fewer than WHOLE_PARAMETERS. At 26M it takes
# 43 s more of processor time in fp32; at 0.7M none to speak of, and 6 s in bf16 (2 cores, 2026-11-21).
LONGEST_WHOLE, WHOLE_SCORES, WHOLE_PARAMETERS = 4096, 2**27, 10e6
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
    whole = min(decoder.context, LONGEST_WHOLE, math.isqrt(WHOLE_SCORES // decoder.heads))
    more = [rng.integers(0, V, size=whole)] if whole > T and decoder.parameters < WHOLE_PARAMETERS else []
    return [*random, np.zeros(ends, dtype=np.int64), np.full(max(1, ends - 1), V - 1), *more]


@dataclass(frozen=True)
class _Probes:
    """Prompts and what torch says of them: logits [PROBES, V] in float64."""

    seed: int
    prompts: list[NDArray[np.int64]]
    exact: NDArray[np.float64]
    scale: NDArray[np.float64]  # [PROBES, 1], the largest |logit|
    fair: NDArray[np.bool_]  # [PROBES]

    @property
    def left_out(self) -> int:
        return int((~self.fair).sum())


def _probes(decoder: Decoder, reference: PreTrainedModel, seed: int) -> _Probes:
    prompts, bound = _prompts(decoder, np.random.default_rng(seed)), model_bound(decoder)
    single = np.stack([_torch_logits(reference, prompt) for prompt in prompts]).astype(np.float64)
    exact = np.stack([_torch_logits(reference.double(), prompt) for prompt in prompts])
    reference.float()
    scale = np.abs(exact).max(axis=-1, keepdims=True)
    # A step function may fall either way where its input is within rounding of the step: a probe on which
    # torch in float32 does not meet torch in float64 says nothing of the export.
    fair = (np.abs(single - exact) / scale).max(axis=-1) <= bound
    found = _Probes(seed, prompts, exact, scale, fair)
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
    probes = _probes(decoder, reference, seed)
    return *_compare(decoder, probes, run, bound), probes.left_out


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
            f"relative error {max_rel:.2g}, allowed {bound:.2g}; {REPORT_IT}"
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
    sizes = {
        where: np.sqrt(np.square(_alone_and_together(run, probes.prompts) - exact).mean(axis=-1))
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
                found.append(_compare(decoder, probes, run, bound))
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


def _feed(prompts: list[NDArray[np.int64]], top_k: int = 0) -> dict[str, NDArray[Any]]:
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
            raise GateFailed(
                f"the graph's {name} misses its definition by {error:.2g}, allowed {tolerance:.2g}; {REPORT_IT}"
            )
    best = logits.sort(dim=-1, descending=True, stable=True).indices[:, : outputs[bundle.TOP_IDS].shape[-1]]
    if not np.array_equal(best.numpy(), outputs[bundle.TOP_IDS]):
        raise GateFailed(
            f"the graph's {bundle.TOP_IDS} are not the ids of its largest logits, ties by rising id; {REPORT_IT}"
        )


def jumps(activation: Activation) -> bool:
    """Whether it has a step between -20 and 20, found by its values 1e-4 apart: a slope of 100 is no step."""
    x = torch.linspace(-20, 20, 400_001, dtype=torch.float64)
    row = torch.stack([x, torch.zeros_like(x)], -1)  # two hidden units, for what works over that axis
    arguments = [row, torch.ones_like(row)] if activation.gated else [row]
    learned = [torch.tensor([start], dtype=torch.float64) for start in activation.learned.values()]
    y = activation.expression(*arguments, *learned)
    return bool((y.diff(dim=0).abs() > 0.01).any())


def check_tables(decoder: Decoder, reference: PreTrainedModel, model: onnx.ModelProto, folder: Path) -> None:
    """What the file says of each position, over the whole context, against the torch model's own: within one rounding
    of the type that it is stored in. GateFailed names the first position that is not.

    Args:
        model: without its external data, which lies in `folder`.
    """
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    for name, wanted in _tables(reference, decoder.context).items():
        tensor = stored.get(name, stored.get(f"{name}.half"))
        if tensor is None:
            raise GateFailed(f"{decoder.name!r} misses parity: its file has no table {name}; {REPORT_IT}")
        table = onnx.numpy_helper.to_array(tensor, str(folder))
        kind = ml_dtypes.finfo(table.dtype)  # type: ignore[no-untyped-call]
        got, least = table.astype(np.float64), float(kind.smallest_subnormal)
        if got.shape != wanted.shape:
            raise GateFailed(
                f"{decoder.name!r} misses parity: its table {name} is {list(got.shape)}, not {list(wanted.shape)}; "
                f"{REPORT_IT}"
            )
        wrong = ~(np.abs(got - wanted) <= float(kind.eps) * np.abs(wanted) + least)
        if wrong.any():
            at, channel = np.argwhere(wrong)[0]
            raise GateFailed(
                f"{decoder.name!r} misses parity: its table {name} says {got[at, channel]:.7g} of position {at}, "
                f"channel {channel}, torch {wanted[at, channel]:.7g}; {REPORT_IT}"
            )


def _tables(reference: PreTrainedModel, T: int) -> dict[str, NDArray[np.float64]]:
    """What torch knows of T positions: an embedding [T, C], or RoPE's cos and sin [T, D / 2]."""
    if isinstance(reference, ActuaryGPT):
        config = reference.config
        tables = rope_tables(T, config.dim // config.heads)
    elif hasattr(reference, "transformer"):
        return {"position": reference.transformer.wpe.weight.detach()[:T].double().numpy()}
    else:
        with torch.no_grad():
            whole = reference.model.rotary_emb(torch.zeros(1), torch.arange(T)[None])
        tables = tuple(t[0, :, : t.shape[-1] // 2].double() for t in whole)
    return dict(zip(("rope.cos", "rope.sin"), (t.numpy() for t in tables), strict=True))


def check_cache(decoder: Decoder, run: Run, seed: int, bound: float) -> None:
    """Prompts in two parts, the first one's keys and values out of a pool, against the same in one: logits, those of
    `rows` too, and what the cache keeps, within `bound` of the largest; GateFailed names the first that is not."""
    rng = np.random.default_rng(seed)
    for prompts in _batches(_prompts(decoder, rng)):
        whole, kept = run([bundle.LOGITS, bundle.PRESENT], _feed(prompts))
        cuts = [int(rng.integers(0, len(prompt))) for prompt in prompts]
        begun = [(prompt, cut) for prompt, cut in zip(prompts, cuts, strict=True) if cut]
        if not begun:
            continue
        (present,) = run([bundle.PRESENT], _feed([prompt[:cut] for prompt, cut in begun]))
        # In a pool of more slots than are used, in any order; what stands elsewhere must not be read.
        slots = rng.permutation(2 * sum(cuts))
        pool = np.full((len(present), len(slots), present.shape[-1]), 1e3, dtype=np.float32)
        pool[:, slots[: sum(cuts)]] = present
        past_slots, used = np.zeros((len(cuts), max(cuts)), dtype=np.int64), 0
        for row, cut in zip(past_slots, cuts, strict=True):
            row[:cut], used = slots[used : used + cut], used + cut
        rest = [prompt[cut:] for prompt, cut in zip(prompts, cuts, strict=True)]
        ends = np.cumsum([len(part) for part in rest])
        feeds = _feed(rest) | {bundle.PAST: pool, bundle.PAST_SLOTS: past_slots, bundle.PAST_LENGTHS: np.array(cuts)}
        parted, new = run([bundle.LOGITS, bundle.PRESENT], feeds | {bundle.ROWS: ends - 1})
        starts = np.cumsum([0, *map(len, prompts)])
        own = [np.arange(start + cut, start + len(p)) for p, cut, start in zip(prompts, cuts, starts, strict=False)]
        of_kept = float(np.abs(new - kept[:, np.concatenate(own)]).max() / np.abs(kept).max())
        scale = np.abs(whole).max(axis=-1, keepdims=True)
        errors = np.maximum(*(np.abs(part - whole).max(axis=-1) / scale[:, 0] for part in np.split(parted, 2)))
        if not (errors.max() <= bound and of_kept <= bound):
            at = int(errors.argmax())
            raise GateFailed(
                f"{decoder.name!r} misses parity: after a prompt of {len(prompts[at])} tokens (seed {seed}), of them "
                f"{cuts[at]} cached, the logits differ from those without by {errors[at]:.2g} of the largest, "
                f"keys and values by {of_kept:.2g}, allowed {bound:.2g}; {REPORT_IT}"
            )


def check_refused(model_path: str) -> None:
    """The CPU has no kernels of bfloat16: ONNX Runtime must find the file's types to fit, and say that and no more."""
    try:
        onnxruntime.InferenceSession(model_path, providers=["CPUExecutionProvider"])
        reason = "it opens on the CPU, which has no kernels of bfloat16"
    except NotImplementedByRuntime:
        return
    except Exception as error:  # onnxruntime raises its own classes, without a public base
        reason = str(error)
    raise GateFailed(f"the file as bf16 is none that a runtime with its kernels would load: {reason}; {REPORT_IT}")


def _function(model: onnx.ModelProto, activation: Activation) -> onnx.FunctionProto:
    """The activation's, as the file has it; one of the standard operator alone, where that stands in its place."""
    names = [operator_name(activation.name, biased) for biased in (False, True)]
    found = [function for function in model.functions if function.name in names]
    if not found and activation.name in STANDARD:
        node = onnx.helper.make_node(STANDARD[activation.name], ["x"], ["y"])
        opsets = [onnx.helper.make_opsetid("", bundle.OPSET)]
        return onnx.helper.make_function(bundle.DOMAIN, activation.name, ["x"], ["y"], [node], opsets)
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
    precision: bundle.Precision = "fp32",
) -> bundle.Parity:
    """Both comparisons on the file as written; GateFailed where one misses.

    Args:
        float_model: the float32 graph that the file's one was made from; None where the file is float32.
    """
    written = onnx.load(model_path, load_external_data=False)
    function = _function(written, decoder.activation)
    cached = any(value.name == bundle.PAST for value in written.graph.input)
    check_tables(decoder, reference, written, Path(model_path).parent)
    del written  # it is the size of the model
    if precision == "bf16":
        check_refused(model_path)
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
    if cached:
        check_cache(decoder, run, seed, rounded.bound)
    if cached and float_model is not None:  # whose bound is narrower than int8's
        check_cache(decoder, _opened(float_model), seed, model_bound(decoder))
    lengths = [len(prompt) for prompt in _prompts(decoder, np.random.default_rng(seed))]
    return bundle.Parity(
        max_abs=rounded.max_abs,
        max_rel=rounded.max_rel,
        bound=rounded.bound,
        noise=None if float_model is None else rounded.noise,
        verified=list(runs),
        activation=worst,
        probes=len(lengths),
        longest_prompt=max(lengths),
        probes_left_out=rounded.left_out,
    )
