"""Prints an Expression as a formula that people read: `0.5 * x * (1 + erf(0.7071 * x))`.

For the manifest, the README's table, the service's list and the page.
"""

from __future__ import annotations

import itertools
import string

from export.ops.trace import Expression, Ref, Step

# operation: (sign, how tightly it binds)
_INFIX = {"ge": (">=", 1), "gt": (">", 1), "le": ("<=", 1), "lt": ("<", 1),
          "add": ("+", 2), "sub": ("-", 2), "mul": ("*", 3), "div": ("/", 3), "pow": ("^", 5)}  # fmt: skip
_NEGATION = 4
_CALL = 6
_NAMES = {"maximum": "max", "minimum": "min"}

# What a function that is the whole activation means; "tanh(x)" would tell a reader of `tanh` nothing.
_MEANING = {
    "sigmoid": "1 / (1 + exp(-x))",
    "tanh": "(exp(x) - exp(-x)) / (exp(x) + exp(-x))",
    "softplus": "log(1 + exp(x))",
    "softmax": "exp(x) / sum(exp(x))",
    "relu": "max(0, x)",
}


def formula(expression: Expression) -> str:
    """The expression as one line; a step that is used twice is named first: `a = ...; f(a)`."""
    if len(expression.steps) == 1 and expression.steps[0].operation in _MEANING and not expression.outside:
        return _MEANING[expression.steps[0].operation]
    steps = {step.name: step for step in expression.steps}
    uses = [argument for step in expression.steps for argument in step.arguments]
    named: dict[str, str] = {}
    taken = {*expression.tensors, *expression.learned, "e"}
    letters = (letter + "'" * round for round in itertools.count() for letter in string.ascii_lowercase)
    free = (letter for letter in letters if letter not in taken)
    lines: list[str] = []

    def show(ref: Ref, outside: int) -> str:
        if not isinstance(ref, str):
            return f"{ref:.5g}"
        if ref not in steps or ref in named:
            return named.get(ref, ref)
        text, binds = show_step(steps[ref])
        return f"({text})" if binds < outside else text

    def show_step(step: Step) -> tuple[str, int]:
        if step.operation in _INFIX:
            sign, binds = _INFIX[step.operation]
            left, right = step.arguments
            # a - (b - c) keeps its brackets, and so does (a ^ b) ^ c, since powers bind from the right.
            tight_left, tight_right = step.operation == "pow", step.operation in ("sub", "div")
            return f"{show(left, binds + tight_left)} {sign} {show(right, binds + tight_right)}", binds
        if step.operation == "neg":
            return f"-{show(step.arguments[0], _NEGATION)}", _NEGATION
        if step.operation == "relu":
            return f"max(0, {show(step.arguments[0], 0)})", _CALL
        name = _NAMES.get(step.operation, step.operation)
        return f"{name}({', '.join(show(argument, 0) for argument in step.arguments)})", _CALL

    for step in expression.steps:
        if uses.count(step.name) > 1:
            letter = next(free)
            lines.append(f"{letter} = {show_step(step)[0]}")
            named[step.name] = letter
    return "; ".join([*lines, show(expression.result, 0)])
