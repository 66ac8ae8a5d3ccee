"""What this machine can do at best, measured, and what a formula asks of it: the two sides of a roofline.

A roof is min(multiply-add rate, intensity * bytes per second), Williams et al. 2009. Rates are the best of their
samples, since a roof is what was reached at all; an activation's own figures are medians.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from onnx import TensorProto, helper

from export import bundle
from export.bench import Clock, bound_run, copy_run, open_session, seconds_per_call
from export.graph_parts import IR_VERSION
from export.ops.trace import trace
from models.activations import Activation

# Floating-point operations for each element. A special function is counted as what a vector library spends on it: expf
# in glibc's libmvec is a product and a rounding for the range, two steps of reduction, a polynomial of degree 5 by
# multiply-adds and a scaling, about 16. The same on every machine, where an instruction count is not.
EXP = 16
OPERATIONS = {
    "exp": EXP, "expm1": EXP + 2, "log": EXP, "log1p": EXP + 2, "erf": EXP + 4, "tanh": EXP + 4, "sigmoid": EXP + 3,
    "softplus": 2 * EXP + 4, "sin": EXP, "cos": EXP, "atan": EXP, "softmax": EXP + 4, "mean": 1, "sum": 1,
}  # fmt: skip
PRODUCTS = ((1024, 1024, 1024), (128, 768, 3072))  # M, K, N: a large one, and that of GPT-2's block
MEMORY_BYTES = 2**28  # read and written by one copy: past any cache


@dataclass(frozen=True)
class Rates:
    """Best rates of one machine, on as many threads as was asked.

    Args:
        gflop_per_s: of a large product, a multiply-add counted as two.
        memory_gb_per_s: of a copy of MEMORY_BYTES, what is read and what is written.
        cache_gb_per_s: of a copy as large as an activation's own tensors.
    """

    gflop_per_s: float
    memory_gb_per_s: float
    cache_gb_per_s: float

    def roof(self, intensity: float, cached: bool) -> float:
        """GFLOP/s at an intensity, in operations per byte."""
        return min(self.gflop_per_s, intensity * (self.cache_gb_per_s if cached else self.memory_gb_per_s))

    def best(self, other: Rates) -> Rates:
        return Rates(
            max(self.gflop_per_s, other.gflop_per_s),
            max(self.memory_gb_per_s, other.memory_gb_per_s),
            max(self.cache_gb_per_s, other.cache_gb_per_s),
        )


def operations(record: Activation) -> int:
    """Floating-point operations of one hidden element; what is not named in OPERATIONS counts one."""
    return sum(OPERATIONS.get(step.operation, 1) for step in trace(record).steps)


def special(record: Activation) -> bool:
    """Whether the formula has an exp or its like."""
    return any(OPERATIONS.get(step.operation, 1) >= EXP for step in trace(record).steps)


def moved(record: Activation) -> int:
    """Bytes that one hidden element moves at least, in float32: x or gate and up come in, one number goes out."""
    return 4 * (3 if record.gated else 2)


def intensity(record: Activation) -> float:
    """Operations per byte."""
    return operations(record) / moved(record)


def measure_rates(
    threads: int, rounds: int, activation_bytes: int, clock: Clock, products: Sequence[tuple[int, int, int]] = PRODUCTS
) -> Rates:
    """The machine's best rates, of `rounds` samples each, in turn."""
    ways = [("product", _product(M, K, N, threads), 2 * M * K * N, 1) for M, K, N in products]
    ways.append(("memory", copy_run(MEMORY_BYTES), MEMORY_BYTES, 1))
    ways.append(("cache", copy_run(activation_bytes), activation_bytes, max(1, 2**26 // activation_bytes)))
    best = dict.fromkeys((name for name, *_ in ways), 0.0)
    for _ in range(rounds + 1):  # one to warm up
        for name, run, amount, calls in ways:
            best[name] = max(best[name], amount / seconds_per_call(run, calls, clock) / 1e9)
    return Rates(best["product"], best["memory"], best["cache"])


def _product(M: int, K: int, N: int, threads: int) -> Callable[[], None]:
    """[M, K] times [K, N] in ONNX Runtime."""
    shapes = {"a": (M, K), "b": (K, N), "y": (M, N)}
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    graph = helper.make_graph([helper.make_node("MatMul", ["a", "b"], ["y"])], "product", value[:2], value[2:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", bundle.OPSET)], ir_version=IR_VERSION)
    rng = np.random.default_rng(0)
    feeds = {name: rng.normal(size=shapes[name]).astype(np.float32) for name in "ab"}
    return bound_run(open_session(model, None, threads), feeds)
