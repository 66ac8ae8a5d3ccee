"""Prints an Expression as a C++ functor: one text, valid in C++ and in CUDA, in float32 arithmetic.

    struct Fused_swish {  // learned scalars are its members
      float operator()(float x) const { ...; return mul_2; }  // or (gate, up)
    };

The kernels of export/ops/native are templates over such functors, so a new record needs no C++ of its own.
Each operation is one row of the table below, in a form that agrees with torch at +-1e4, +-inf, NaN, zeros
and subnormals: `relu` and `min`/`max` hand NaN on, `sigmoid` and `softplus` never form inf / inf.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

import numpy as np

from actuary import BadInput
from export.ops.trace import Expression, Ref, Step

# Our name for an operation -> the C++ expression, over operands that are names or constants.
_TEMPLATES = {
    "add": "{0} + {1}", "sub": "{0} - {1}", "mul": "{0} * {1}", "div": "{0} / {1}", "neg": "-{0}",
    "ge": "{0} >= {1}", "gt": "{0} > {1}", "le": "{0} <= {1}", "lt": "{0} < {1}", "where": "{0} ? {1} : {2}",
    "abs": "fabsf({0})", "exp": "expf({0})", "expm1": "expm1f({0})", "log": "logf({0})", "log1p": "log1pf({0})",
    "sqrt": "sqrtf({0})", "rsqrt": "1.0f / sqrtf({0})", "sin": "sinf({0})", "cos": "cosf({0})", "atan": "atanf({0})",
    "erf": "erff({0})", "tanh": "tanhf({0})", "pow": "powf({0}, {1})",
    "sigmoid": "1.0f / (1.0f + expf(-{0}))",  # where e^-x is inf, the quotient is 0
    "softplus": "{0} > 20.0f ? {0} : log1pf(expf({0}))",  # torch's threshold: e^-20 is below half an ulp of 20
    "relu": "0.0f > {0} ? 0.0f : {0}",  # NaN compares false and stays
    "maximum": "(({0} > {1}) | ({0} != {0})) ? {0} : {1}",  # a NaN in {1} wins by losing every comparison
    "minimum": "(({0} < {1}) | ({0} != {0})) ? {0} : {1}",
}  # fmt: skip
_TIMES_SIGMOID = "{0} / (1.0f + expf(-{1}))"  # {0} * sigmoid({1}), also where e^-x is inf: 0, and inf * 0 is NaN
# x^n as products, which are vector code everywhere and round less often than powf errs (error_bound.py).
_WHOLE_POWERS = {
    -2.0: "1.0f / ({0} * {0})", -1.0: "1.0f / {0}", 0.0: "1.0f", 0.5: "sqrtf({0})",
    1.0: "{0}", 2.0: "{0} * {0}", 3.0: "{0} * {0} * {0}", 4.0: "({0} * {0}) * ({0} * {0})",
}  # fmt: skip
_COMPARISONS = ("ge", "gt", "le", "lt")

# What one element costs beside its load and store, in ns on one AVX-512 core (EPYC 9004, libmvec of glibc 2.36, in
# cache, 2026-11-21). Decides how many elements are worth waking a thread for, and nothing else.
_COST_NS = {
    "exp": 0.2, "sigmoid": 0.2, "tanh": 0.2, "erf": 0.3, "softplus": 0.8, "expm1": 0.3, "log": 0.4, "log1p": 0.5,
    "sin": 0.5, "cos": 0.5, "atan": 0.5, "pow": 1.5, "sqrt": 0.1, "rsqrt": 0.2, "div": 0.1,
}  # fmt: skip
_LOAD_AND_STORE_NS = 0.1


def cost_ns(expression: Expression) -> float:
    """A rough cost of one element, for the size of a thread's block."""
    return _LOAD_AND_STORE_NS + sum(_COST_NS.get(step.operation, 0.01) for step in expression.steps)


def functor_name(activation: str) -> str:
    """The struct's name; its prefix keeps activations such as `tanh` or `float` apart from C++'s own names."""
    return f"Fused_{activation}"


def literal(value: float) -> str:
    """The float32 nearest to `value` as a C++ literal that reads back exactly."""
    with np.errstate(over="ignore"):
        single = np.float32(value)
    if np.isnan(single):
        return "NAN"
    text = "INFINITY" if np.isinf(single) else f"{abs(single)!s}f"
    return f"(-{text})" if np.signbit(single) else text


def _live(steps: Sequence[Step], result: Ref) -> list[Step]:
    """The steps that the result needs."""
    needed, live = {result}, []
    for step in reversed(steps):
        if step.name in needed:
            needed.update(step.arguments)
            live.append(step)
    return live[::-1]


def _quotients(expression: Expression) -> tuple[dict[str, tuple[Ref, Ref]], set[str]]:
    """Products a * sigmoid(b) -> (a, b), and the sigmoids that nothing else reads: one division does for both."""
    sigmoids = {step.name: step.arguments[0] for step in expression.steps if step.operation == "sigmoid"}
    uses = Counter([expression.result, *(ref for step in expression.steps for ref in step.arguments)])
    found: dict[str, tuple[Ref, Ref]] = {}
    absorbed: set[str] = set()
    for step in expression.steps:
        alone = [ref for ref in step.arguments if ref in sigmoids and uses[ref] == 1]
        if step.operation == "mul" and alone:
            sigmoid = str(alone[-1])
            other = step.arguments[step.arguments[0] == sigmoid]
            found[step.name], absorbed = (other, sigmoids[sigmoid]), absorbed | {sigmoid}
    return found, absorbed


def cpp_functor(name: str, expression: Expression, cuda: bool = False) -> str:
    """The struct of activation `name`; BadInput where the expression looks at the whole hidden axis.

    Args:
        cuda: for the device: `__device__` before each member function. Elsewhere the text is the same.
    """
    if not expression.elementwise:
        raise BadInput(f"activation {name!r} looks at the whole hidden axis: it has no function of one element")
    struct, where = functor_name(name), "__device__ " if cuda else ""
    expression = dataclasses.replace(expression, steps=tuple(_live(expression.steps, expression.result)))
    read = {expression.result, *(ref for step in expression.steps for ref in step.arguments)}
    parameters = ", ".join(f"float {tensor}" if tensor in read else "float" for tensor in expression.tensors)
    # A learned scalar may be called like a step or a C++ keyword, or in letters that not every compiler reads.
    members = [f"learned_{i}_{key}" if key.isascii() else f"learned_{i}" for i, key in enumerate(expression.learned)]
    names = dict(zip(expression.learned, members, strict=True)) | {tensor: tensor for tensor in expression.tensors}

    def operand(ref: Ref) -> str:
        return names[ref] if isinstance(ref, str) else literal(ref)

    lines = [
        f"struct {struct} {{",
        f"  static constexpr int kTensors = {len(expression.tensors)}, kLearned = {len(members)};",
        *(f"  float {member};" for member in members),
        f"  {where}explicit {struct}(const float*{' learned' if members else ''})"
        + (" : " + ", ".join(f"{member}(learned[{i}])" for i, member in enumerate(members)) if members else "")
        + " {}",
        f"  {where}float operator()({parameters}) const {{",
    ]
    quotients, absorbed = _quotients(expression)
    for step in expression.steps:
        if step.name in absorbed:
            continue
        template, arguments = _TEMPLATES[step.operation], step.arguments
        if step.operation == "pow" and not isinstance(arguments[1], str):
            template = _WHOLE_POWERS.get(arguments[1], template)
        if step.name in quotients:
            template, arguments = _TIMES_SIGMOID, quotients[step.name]
        kind = "bool" if step.operation in _COMPARISONS else "float"
        lines.append(f"    const {kind} {step.name} = {template.format(*map(operand, arguments))};")
        names[step.name] = step.name
    lines += [f"    return {operand(expression.result)};", "  }", "};"]
    return "\n".join(lines) + "\n"
