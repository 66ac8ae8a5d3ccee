"""Claim 10: the naive sigmoid overflows and the stable form does not; the same of cross-entropy on probabilities.

Source: 004. Refuted by a naive form that gives what is right at +-1000, or a stable one that does not.

    naive   1 / (1 + e^-x), e^x / (1 + e^x)                 e^1000 is infinite in every type
    stable  e^min(x, 0) / (1 + e^-|x|)                      no exponential of more than 0
    loss    -y log p - (1 - y) log(1 - p) of p = sigmoid(x), against max(x, 0) - x y + log(1 + e^-|x|)

Each form at extremes, in float16, float32 and float64, values and gradients; the registry's sigmoid in torch, in ONNX
Runtime with its own operators and fused; and a service on a bundle whose logits reach +-1000.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from export.exporter import export_bundle, random_checkpoint
from export.ops import library
from export.ops.check import one_node, open_session
from export.ops.onnx_function import onnx_function
from export.ops.trace import trace
from models.activations import get
from models.corpus import Corpus
from models.gpt import ActuaryConfig
from studies.served import TINY, serving
from studies.study import Cell, Chart, Claim, Figure, Finding, Line, Options, Table, verdict_of

CLAIM = Claim(
    number=10,
    name="stability",
    title="The naive sigmoid overflows, the stable form does not",
    statement="The naive sigmoid overflows where the stable form does not, and binary cross-entropy is stable on "
    "logits where it is not on probabilities.",
    source="004",
    refuted_by="a naive form without infinity or NaN at +-1000, or a stable one that has one or is not right.",
)

TYPES = {"float16": torch.float16, "float32": torch.float32, "float64": torch.float64}
NAMED = (0.0, 500.0, 1e3, 1e4)  # and their negatives; of each type its largest number besides
UNITS = 8  # in the last place of 1: an exponential of 2, a sum, a quotient, each rounded, and again in float16's torch
LOGIT = 1000.0
PROMPTS, QUICK_PROMPTS = 32, 8
LOSS_AT = tuple(float(x) for x in range(0, 121))

Form = Callable[[Tensor], Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]
Faults = list[tuple[float, str]]  # where, and what is wrong there


def naive(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def naive_quotient(x: Tensor) -> Tensor:
    return torch.exp(x) / (1 + torch.exp(x))


def stable(x: Tensor) -> Tensor:
    up, down = torch.exp(torch.clamp(x, max=0)), torch.exp(-torch.clamp(x, min=0))
    return torch.where(x >= 0, 1 / (1 + down), up / (1 + up))


FORMS: dict[str, Form] = {
    "1 / (1 + e^-x)": naive,
    "e^x / (1 + e^x)": naive_quotient,
    "the stable form": stable,
    "torch.sigmoid": torch.sigmoid,
    "the registry's expression": lambda x: get("sigmoid").expression(x),
}
NAIVE = ("1 / (1 + e^-x)", "e^x / (1 + e^x)")


def loss_on_probabilities(x: Tensor, y: Tensor) -> Tensor:
    p = torch.sigmoid(x)
    return -y * torch.log(p) - (1 - y) * torch.log(1 - p)


def loss_of_torch_on_probabilities(x: Tensor, y: Tensor) -> Tensor:
    """torch's own, which takes no logarithm for less than -100."""
    return F.binary_cross_entropy(torch.sigmoid(x), y, reduction="none")


def loss_on_logits(x: Tensor, y: Tensor) -> Tensor:
    """log(e^x + 1) - x y. Written with |x| its gradient at 0 is autograd's 1 - y and not 1/2 - y."""
    return torch.logaddexp(x, torch.zeros_like(x)) - x * y


def loss_of_torch_on_logits(x: Tensor, y: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(x, y, reduction="none")


LOSSES: dict[str, Loss] = {
    "on probabilities, written out": loss_on_probabilities,
    "on probabilities, torch's": loss_of_torch_on_probabilities,
    "on logits, written out": loss_on_logits,
    "on logits, torch's": loss_of_torch_on_logits,
}
ON_PROBABILITIES = ("on probabilities, written out", "on probabilities, torch's")


def places(type_: str) -> list[float]:
    largest = torch.finfo(TYPES[type_]).max
    found = sorted({sign * value for value in (*NAMED, largest) for sign in (1, -1)})
    return [value for value in found if abs(value) <= largest]


def exact(x: float) -> tuple[float, float]:
    """Sigmoid and its slope, by Python's own arithmetic; 0 where they are below its smallest number."""
    small = math.exp(-min(abs(x), 800.0))  # e^-745 is the last above 0
    value = 1 / (1 + small) if x >= 0 else small / (1 + small)
    return value, small / (1 + small) ** 2


def exact_loss(x: float, y: float) -> tuple[float, float]:
    """Binary cross-entropy and its slope by x."""
    return max(x, 0.0) - x * y + math.log1p(math.exp(-min(abs(x), 800.0))), exact(x)[0] - y


def value_and_slope(of: Form, values: list[float], type_: str) -> tuple[list[float], list[float]]:
    x = torch.tensor(values, dtype=TYPES[type_], requires_grad=True)
    y = of(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    return y.detach().double().tolist(), slope.double().tolist()


def wrong(found: float, right: float, type_: str, relative: bool = False) -> str:
    """What is wrong with a number; empty where nothing is.

    Args:
        relative: the units are of the number itself where that is over 1, as of a loss.
    """
    if not math.isfinite(found):
        return "NaN" if math.isnan(found) else "infinite"
    allowed = UNITS * torch.finfo(TYPES[type_]).eps * (max(1.0, abs(right)) if relative else 1.0)
    return "" if abs(found - right) <= allowed else f"{found:.3g}, not {right:.3g}"


def _cell(said: Faults) -> str:
    """What went wrong and where, of several places."""
    by_kind: dict[str, list[str]] = {}
    for x, what in said:
        by_kind.setdefault(what, []).append(f"{x:.5g}")
    return "; ".join(f"{what} at {', '.join(at)}" for what, at in by_kind.items()) or "right"


def _faults(of: Form, rights: list[tuple[float, float]], at: list[float], type_: str, relative: bool) -> list[Faults]:
    """Of the values, and of the slopes."""
    found = value_and_slope(of, at, type_)
    return [
        [
            (x, what)
            for x, got, right in zip(at, found[which], rights, strict=True)
            if (what := wrong(got, right[which], type_, relative and not which))
        ]
        for which in (0, 1)
    ]


def forms() -> tuple[list[list[Cell]], dict[str, list[Faults]]]:
    """Rows of the table; form -> what went wrong with its values, and with its slopes, of all types."""
    rows: list[list[Cell]] = []
    faults: dict[str, list[Faults]] = {name: [[], []] for name in FORMS}
    for name, form in FORMS.items():
        for type_ in TYPES:
            at = places(type_)
            values, slopes = _faults(form, [exact(x) for x in at], at, type_, relative=False)
            rows.append([name, type_, _cell(values), _cell(slopes)])
            faults[name][0].extend(values)
            faults[name][1].extend(slopes)
    return rows, faults


def losses() -> tuple[list[list[Cell]], dict[str, list[Faults]]]:
    """The same of the losses, both labels, in float32."""
    rows: list[list[Cell]] = []
    faults: dict[str, list[Faults]] = {name: [[], []] for name in LOSSES}
    at = [x for x in places("float32") if abs(x) <= max(NAMED)]
    for name, loss in LOSSES.items():
        for y in (0.0, 1.0):
            of = functools.partial(_with_label, loss, y)
            values, slopes = _faults(of, [exact_loss(x, y) for x in at], at, "float32", relative=True)
            rows.append([name, f"{y:g}", _cell(values), _cell(slopes)])
            faults[name][0].extend(values)
            faults[name][1].extend(slopes)
    return rows, faults


def _with_label(loss: Loss, y: float, x: Tensor) -> Tensor:
    return loss(x, torch.full_like(x, y, requires_grad=False))


def in_onnx(fused: library.Library | None) -> str:
    """What is wrong with the registry's sigmoid in ONNX Runtime, of float32; empty where nothing is."""
    record = get("sigmoid")
    session = open_session(one_node(record, None if fused else onnx_function("sigmoid", trace(record))), fused)
    at = np.array([*places("float32"), np.inf, -np.inf], dtype=np.float32)
    got: NDArray[Any] = session.run(None, {"x": at})[0]
    right = [1.0 if x == np.inf else 0.0 if x == -np.inf else exact(float(x))[0] for x in at]
    said = [(float(x), wrong(float(v), r, "float32")) for x, v, r in zip(at, got, right, strict=True)]
    said = [(x, what) for x, what in said if what]
    return _cell(said) if said else ""


def find_library() -> tuple[library.Library | None, str]:
    """What `actuary ops build` made here, where its sigmoid has today's formula; else why there is none."""
    found = library.find(library.DEFAULT_FOLDER)
    if found is None:
        return None, f"no library in {library.DEFAULT_FOLDER}; {library.REMEDY}"
    why = found.why_not("sigmoid", trace(get("sigmoid")).digest, cuda=False)
    return (None, why) if why else (found, "")


def write_exploded(out: Path) -> None:
    """A bundle `exploded`, hidden sigmoids and weights at random, whose head bias goes from -LOGIT to LOGIT."""
    checkpoint = random_checkpoint("exploded", ActuaryConfig(activation="sigmoid", **TINY), Corpus.read())
    with torch.no_grad():
        checkpoint.model.head_bias.copy_(torch.linspace(-LOGIT, LOGIT, TINY["vocab_size"]))
        for block in checkpoint.model.blocks:
            block.ffn.up.weight.mul_(LOGIT)  # so that the hidden sigmoids too are asked for more than +-1000
    export_bundle(checkpoint, out, seed=0)


def served(kept: Path, prompts: int, fused: library.Library | None) -> tuple[float, float, str]:
    """The lowest and the highest logit that a service answers with; what is wrong with its answers, empty: nothing."""
    write_exploded(kept / "bundles")
    rng, logits, faults = np.random.default_rng(0), [], []
    with serving(kept / "bundles", kept, fused.path.parent if fused else None) as ask:
        for _ in range(prompts):
            prompt = rng.integers(0, TINY["vocab_size"], size=8).tolist()
            body = {"model": "exploded", "prompt": prompt, "top_k": TINY["vocab_size"]}
            (result,) = ask("/v1/next-token", body)["results"]
            for entry in result["top"]:
                logits.append(entry["logit"])
                faults.append(wrong(entry["sigmoid"], exact(entry["logit"])[0], "float32"))
            faults.append(wrong(result["softmax"]["mass"], 1.0, "float32"))
    return min(logits), max(logits), "; ".join(sorted({fault for fault in faults if fault})[:3])


def loss_chart() -> Chart:
    lines = []
    for name in ("on logits, torch's", "on probabilities, torch's", "on probabilities, written out"):
        values, _ = value_and_slope(functools.partial(_with_label, LOSSES[name], 0.0), list(LOSS_AT), "float32")
        shown = [value if math.isfinite(value) else None for value in values]
        lines.append(Line(name, LOSS_AT, shown, dashed=name == "on probabilities, torch's"))
    return Chart(
        name="loss",
        title="Loss of a wrong answer: label 0, float32",
        x_label="logit",
        y_label="binary cross-entropy",
        lines=lines,
        note="It should be the logit. Written out on probabilities it ends where it becomes infinite: from a logit of "
        "17 on the probability rounds to 1. torch's own on probabilities stops at 100.",
    )


def python_overflows() -> bool:
    try:
        math.exp(LOGIT)
    except OverflowError:
        return True
    return False


def run(options: Options) -> Finding:
    options.report("forms of sigmoid", 0.0)
    form_rows, form_faults = forms()
    options.report("forms of the loss", 0.1)
    loss_rows, loss_faults = losses()
    options.report("ONNX Runtime", 0.2)
    fused, why = find_library()
    runs = {"ONNX Runtime, unfused": in_onnx(None)} | ({"ONNX Runtime, fused": in_onnx(fused)} if fused else {})
    options.report("serving a bundle", 0.3)
    low, high, runs["over HTTP"] = served(options.kept, QUICK_PROMPTS if options.quick else PROMPTS, fused)

    overflows = python_overflows()
    raised = "OverflowError" if overflows else "a number"
    figures = [Figure("e^1000 in Python", raised, "overflows", overflows)]
    for name, faults in form_faults.items():
        figures.append(_figure(f"sigmoid, {name}", faults, "overflows" if name in NAIVE else "stable"))
    for name, faults in loss_faults.items():
        expected = "not stable" if name in ON_PROBABILITIES else "stable"
        figures.append(_figure(f"binary cross-entropy {name}", faults, expected))
    for what, fault in runs.items():
        figures.append(Figure(f"sigmoid, {what}", fault or "right", "stable", not fault))
    if not fused:
        figures.append(Figure("sigmoid, ONNX Runtime, fused", f"not run: {why}", "stable"))
    figures.append(
        Figure(
            "logits over HTTP",
            f"{low:.0f} to {high:.0f}",
            f"-{LOGIT:g} to {LOGIT:g}",
            low <= -0.99 * LOGIT and high >= 0.99 * LOGIT,
        )
    )
    agree = [figure.agrees for figure in figures if figure.agrees is not None]
    return Finding(
        verdict=verdict_of(agree),
        sentence=_sentence(form_faults, loss_faults, [what for what, fault in runs.items() if not fault], low, high),
        figures=figures,
        settings={
            "places": [*(f"{x:g}" for x in NAMED), "the largest number of the type", "and their negatives"],
            "types": list(TYPES),
            "served": f"a sigmoid of random weights, head bias from -{LOGIT:g} to {LOGIT:g}, up-projection times "
            f"{LOGIT:g}, V = {TINY['vocab_size']}; prompts of 8 random tokens, all probabilities of each",
            "prompts": QUICK_PROMPTS if options.quick else PROMPTS,
            "fused by": fused.compiler if fused else f"nothing: {why}",
        },
        tables=(
            Table(
                "Forms of sigmoid",
                ("form", "type", "value", "gradient"),
                form_rows,
                f"Right: within {UNITS} units in the last place of 1. The first form's value is right, since 1 over "
                "infinity is 0.",
            ),
            Table("Binary cross-entropy, float32", ("loss", "label", "value", "gradient"), loss_rows),
        ),
        charts=(loss_chart(),),
    )


def _figure(what: str, faults: list[Faults], expected: str) -> Figure:
    said = [f"{kind}: {_kinds(each)}" for kind, each in zip(("value", "gradient"), faults, strict=True) if each]
    return Figure(what, "; ".join(said) or "right", expected, bool(said) == (expected != "stable"))


def _kinds(faults: Faults) -> str:
    named = {what if what in ("NaN", "infinite") else "wrong" for _, what in faults}
    return " or ".join(sorted(named)) or "right"


def _sentence(
    forms: dict[str, list[Faults]], losses: dict[str, list[Faults]], right: list[str], low: float, high: float
) -> str:
    (values, slopes), (other, _) = (forms[name] for name in NAIVE)
    naive = f"1 / (1 + e^-x) is {_kinds(values)} at the extremes, its gradient {_kinds(slopes)}; e^x / (1 + e^x) is "
    stable = [name for name in FORMS if name not in NAIVE and not any(forms[name])]
    (loss,), (slope,) = value_and_slope(
        functools.partial(_with_label, loss_of_torch_on_probabilities, 0.0), [LOGIT], "float32"
    )
    return (
        f"{naive}{_kinds(other)}. Right everywhere: {'; '.join(stable + right)}, where logits go from {low:.0f} to "
        f"{high:.0f}. Cross-entropy on probabilities written out is {_kinds(losses[ON_PROBABILITIES[0]][0])}; of a "
        f"logit of {LOGIT:g} and label 0 torch's own on probabilities makes {loss:g}, with a gradient of {slope:g} in "
        "the place of 1."
    )
