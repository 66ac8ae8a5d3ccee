"""The parity gate: ONNX Runtime against torch in float64, on fresh probes; a bundle that misses is not written.

    the activation alone     random and extreme inputs, each element against the running error bound of its own
                             expression: a wrong formula cannot hide in a large model      export/ops/check.py
    the tables of positions  the whole context, within one rounding                        here
    the whole model          prompts of several lengths, alone and in padded batches       export/parity_float32.py
      in int8, fp16, bf16    against the noise that rounding to them makes                 export/parity_rounded.py
      with a cache           each prompt in two parts against the same whole               export/parity_cache.py

How each bound is derived stands in these files.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path

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
from export.ops import error_bound
from export.ops.check import check_activation, one_node, open_session, worst_ratio
from export.ops.check import probes as activation_probes
from export.ops.onnx_function import operator_name
from export.parity_cache import check_cache
from export.parity_float32 import REPORT_IT, check_model, model_bound, prompts_of
from export.parity_rounded import Rounded, check_half, check_int8
from export.prompt_runs import Run, cuda_session, run_of, run_of_model
from models.activations import Activation
from models.decoder import Decoder
from models.gpt import ActuaryGPT, rope_tables


def check(
    decoder: Decoder,
    reference: PreTrainedModel,
    model_path: str,
    seed: int,
    float_model: onnx.ModelProto | None = None,
    precision: bundle.Precision = "fp32",
) -> bundle.Parity:
    """All of them on the file as written; GateFailed where one misses.

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
        runs["emulated"] = later(lambda: run_of_model(half.emulated(onnx.load(model_path))))
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
        check_cache(decoder, run_of_model(float_model), seed, model_bound(decoder))
    lengths = [len(prompt) for prompt in prompts_of(decoder, np.random.default_rng(seed))]
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
