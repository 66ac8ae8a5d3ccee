"""The activation's own gate: ONNX Runtime against torch in float64, element by element, at random and extreme inputs.

Three things carry one meaning and are held to it here: the traced steps, the ONNX function (inlined by a plain
runtime), and the fused kernel (where a library is given). Each must stay within the running error bound of its own
arithmetic (error_bound.py), so a wrong formula cannot hide in a large model. Called by the parity gate of an export,
by the tests and by `make gpu-check`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper
from torch import Tensor

from actuary import GateFailed
from export.bundle import DOMAIN, OPSET
from export.graph_parts import IR_VERSION
from export.ops import error_bound, library
from export.ops.error_bound import SIXTEEN_BITS, Arithmetic, rounded_to, value_and_bound
from export.ops.library import Library
from export.ops.onnx_function import operator_name
from export.ops.trace import trace
from models.activations import Activation

Feeds = dict[str, NDArray[Any]]

CPU = "CPUExecutionProvider"
LARGEST = {"float32": float(np.finfo(np.float32).max)} | {name: most for name, (_, _, most) in SIXTEEN_BITS.items()}
TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
# From 86.98 to 88.8: where a vector exp changes over to 0 and to infinity (native/vector_math.h).
EXTREMES = (1e4, -1e4, 1e3, -1e3, 104.0, -104.0, 88.8, -88.8, 88.74, -88.74, 88.7229, -88.7229, 88.7228, -88.7228,
            88.3, -88.3, 87.3, -87.3, 86.99, -86.99, 86.97, -86.97, 20.0, -20.0, 1.0, -1.0, 1e-3, -1e-3, 1e-7, -1e-7,
            1e-30, -1e-30, 1e-40, -1e-40, 0.0, -0.0)  # fmt: skip
NORMALS, SCALES, WIDTH = 1024, (1, 10, 1e3), 8
SPECIAL = (np.inf, -np.inf, np.nan, 0.0, -0.0, 1.0, -1.0, 1e4, -1e4)
SHAPES = ((1,), (3, 7), (0, 8), (2, 0), (2, 3, 5, 31), (1, 4097), (17, 129), (40, 3072))  # of y: odd, empty, long, many


def open_session(
    model: bytes | str,
    fused: Library | None = None,
    provider: str = CPU,
    settings: dict[str, str] | None = None,
    profile: str = "",
    strict: bool = False,
) -> onnxruntime.InferenceSession:
    """A session of a plain ONNX Runtime or with the fused operators; GateFailed with its own words where it refuses the
    model, or would run it elsewhere than asked.

    Args:
        settings: of the provider.
        profile: begins the name of the file that `end_profiling` writes; empty for none.
        strict: refuse a model of which any node would fall to the CPU.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if profile:
        options.enable_profiling, options.profile_file_prefix = True, profile
    if strict:
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    if fused:
        library.register(options, fused, cuda=provider != CPU)
    try:
        session = onnxruntime.InferenceSession(
            model, options, providers=[provider], provider_options=[settings or {}], enable_fallback=0
        )
    except Exception as error:  # onnxruntime raises its own classes, without a public base
        raise GateFailed(f"ONNX Runtime {onnxruntime.__version__} does not load the exported model: {error}") from error
    if session.get_providers()[0] != provider:
        raise GateFailed(f"ONNX Runtime {onnxruntime.__version__} does not run {provider} here; do its libraries load?")
    return session


def one_node(
    activation: Activation, function: onnx.FunctionProto | None = None, biased: bool = False, type: str = "float32"
) -> bytes:
    """A model of the activation's operator alone, of any shape; with its meaning where `function` is given."""
    element = TYPES[type]
    inputs = ["x", *(["bias"] if biased else []), *(f"learned.{name}" for name in activation.learned)]
    graph = helper.make_graph(
        [helper.make_node(operator_name(activation.name, biased), inputs, ["y"], domain=DOMAIN)],
        "activation",
        [helper.make_tensor_value_info(name, element, None) for name in inputs],
        [helper.make_tensor_value_info("y", element, None)],
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
    functions = [function] if function else []
    model = helper.make_model(graph, functions=functions, opset_imports=opsets, ir_version=IR_VERSION)
    return bytes(model.SerializeToString())


def probes(activation: Activation, rng: np.random.Generator, biased: bool = False, type: str = "float32") -> Feeds:
    """Inputs of `one_node`: x [n, WIDTH] or [n, 2 WIDTH], normal values at three scales and every extreme, each half
    shuffled on its own, so that extremes meet each other. Of type bfloat16, which numpy has not, float32 arrays of such
    values."""
    normals = [scale * rng.normal(size=NORMALS) for scale in SCALES]
    values = np.concatenate([np.tile(EXTREMES, 4), *normals])
    halves = 2 if activation.gated else 1
    x = np.concatenate([rng.permutation(values).reshape(-1, WIDTH) for _ in range(halves)], axis=-1)
    learned = {f"learned.{name}": [start + rng.normal() / 2] for name, start in activation.learned.items()}
    bias = {"bias": rng.normal(size=halves * WIDTH)} if biased else {}
    return typed({"x": x, **bias, **learned}, type)


def typed(feeds: Mapping[str, Any], type: str) -> Feeds:
    """The same in another type: bfloat16 as float32 arrays of its values."""
    if type != "bfloat16":
        return {name: np.array(array, dtype=type) for name, array in feeds.items()}
    return {
        name: torch.from_numpy(np.array(array, dtype=np.float32)).bfloat16().float().numpy()
        for name, array in feeds.items()
    }


def special_probes(activation: Activation, type: str = "float32") -> Feeds:
    """Inputs of `one_node`: x [n, 1] or [n, 2], infinities, NaN, zeros and sizes, each with each."""
    x = np.array(list(itertools.product(SPECIAL, SPECIAL)))[:, : 2 if activation.gated else 1]
    return typed({"x": x, **{f"learned.{name}": [start] for name, start in activation.learned.items()}}, type)


def check_special(activation: Activation, feeds: Feeds, got: NDArray[Any], what: str, type: str) -> None:
    """GateFailed where infinity and NaN do not come out of `special_probes` as in torch, or a number is not near."""
    exact = {name: array.numpy() for name, array in exact_arguments(activation, feeds).items()}
    with np.errstate(over="ignore"):
        wanted = typed({"y": activation.expression(*exact_arguments(activation, feeds).values()).numpy()}, type)["y"]
    # e^-1e4 is no float, and what is below 2^-125 may be 0 before it is multiplied by 1e4 twice.
    relative = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 1e-2}[type]
    wrong = np.flatnonzero(~np.isclose(got, wanted, rtol=relative, atol=1e-29, equal_nan=True))
    if wrong.size:
        at = {name: float(np.broadcast_to(array, wanted.shape).flat[wrong[0]]) for name, array in exact.items()}
        raise GateFailed(
            f"activation {activation.name!r} misses parity at {at}: {what} gives {got.flat[wrong[0]]!r}, torch "
            f"{wanted.flat[wrong[0]]!r}"
        )


def exact_arguments(activation: Activation, feeds: Feeds) -> dict[str, Tensor]:
    """The expression's arguments in float64, bias added: name -> [..., H], or [1] for a learned scalar."""
    exact = {name.removeprefix("learned."): torch.from_numpy(array).double() for name, array in feeds.items()}
    x = exact.pop("x")
    if "bias" in feeds:
        x = x + exact.pop("bias")
    tensors = x.chunk(2, dim=-1) if activation.gated else (x,)
    return dict(zip(trace(activation).tensors, tensors, strict=True)) | {
        name: exact[name] for name in activation.learned
    }


def worst_ratio(
    activation: Activation,
    feeds: Feeds,
    got: NDArray[Any],
    arithmetic: Arithmetic,
    what: str = "ONNX Runtime",
    type: str = "",
) -> float:
    """The worst |error| of `got` over its bound; GateFailed above 1, naming the inputs and both values.

    Args:
        type: that `got` was rounded to, where it is not its array's.
    """
    exact = exact_arguments(activation, feeds)
    type = type or got.dtype.name
    exact_value, exact_bound = value_and_bound(trace(activation), exact, arithmetic, bias_added="bias" in feeds)
    value = exact_value.numpy()
    bound = (rounded_to(type, exact_value, exact_bound) if type in SIXTEEN_BITS else exact_bound).numpy()
    reference = activation.expression(*exact.values()).numpy()
    if not np.allclose(value, reference, rtol=1e-12, atol=1e-300, equal_nan=True):
        raise GateFailed(f"the traced form of {activation.name!r} is not its torch expression; report this")
    with np.errstate(invalid="ignore"):
        ratio = np.abs(got.astype(np.float64) - reference) / bound
    ratio[np.isnan(got) & np.isnan(reference)] = 0.0
    past = np.abs(reference) + bound >= LARGEST[type]
    ratio[past & np.isinf(got) & (np.sign(got) == np.sign(reference))] = 0.0
    worst = int(np.argmax(np.where(np.isnan(ratio), np.inf, ratio)))
    if not ratio.flat[worst] <= 1:
        at = {name: float(np.broadcast_to(exact[name], value.shape).flat[worst]) for name in exact}
        raise GateFailed(
            f"activation {activation.name!r} misses parity at {at}: {what} gives {got.flat[worst]!r}, torch in float64 "
            f"{reference.flat[worst]!r}, allowed error {bound.flat[worst]:.3g}"
        )
    return float(ratio.flat[worst])


def check_activation(
    activation: Activation, function: onnx.FunctionProto, rng: np.random.Generator, fused: Library | None = None
) -> float:
    """The worst |error| over its bound in float32, of the exported function inlined and, where a library with this
    formula is given, of its kernel; GateFailed above 1."""
    biased = function.name != activation.name
    feeds = probes(activation, rng, biased)
    model = one_node(activation, function, biased)
    (got,) = open_session(model).run(None, feeds)
    inlined = worst_ratio(activation, feeds, got, error_bound.FLOAT32)
    if not fused or fused.why_not(activation.name, trace(activation).digest, cuda=False):
        return inlined
    (got,) = open_session(model, fused).run(None, feeds)
    return max(inlined, worst_ratio(activation, feeds, got, error_bound.KERNEL, "the fused kernel"))
