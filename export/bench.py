"""`actuary bench ops`: what one activation costs, alone, in its feed-forward block and in a whole model.

Four ways to compute the same thing, visited in turn in a fresh random order each round, so that drift of the
machine meets them alike: `fused` (our kernel), `unfused` (ONNX Runtime's own operators: the same file without
the library), `torch` (eager), and `copy`, memory copied once with the activation's own bytes: what no kernel can
beat where its data are out of cache. Figures are nanoseconds per hidden element, median and quartiles over rounds.
"""

from __future__ import annotations

import html
import itertools
import math
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from actuary import BadInput, processor
from export import bundle
from export.graph import build
from export.graph_parts import IR_VERSION
from export.ops import library as ops
from export.ops.library import Library
from export.ops.onnx_function import onnx_function
from export.ops.trace import trace
from models.activations import Activation
from models.decoder import from_actuary
from models.gpt import ActuaryConfig, ActuaryGPT

Place = Literal["alone", "ffn", "model"]
Way = Literal["fused", "unfused", "torch", "copy"]
Clock = Callable[[], float]  # seconds
PLACES: tuple[Place, ...] = ("alone", "ffn", "model")
AT_LEAST_S = 0.004  # one sample: as many calls as fill this, so that a clock tick and a call's overhead are small
EXPANSION = 4  # H over C in the feed-forward block
MODEL: dict[str, Any] = {"layers": 2, "dim": 128, "heads": 2, "context": 128, "vocab_size": 2048}  # the default shape


@dataclass(frozen=True)
class Case:
    """One activation at one size in one place."""

    place: Place
    activation: str
    rows: int  # M: tokens at once
    hidden: int  # H

    @property
    def label(self) -> str:
        return f"{self.activation} {self.place} {self.rows} x {self.hidden}"


@dataclass
class Measured:
    """Samples of a case, in nanoseconds per hidden element."""

    case: Case
    samples: dict[Way, list[float]] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        """As JSON: median, quartiles and the ratio to `unfused`, paired round by round, for each way."""
        unfused = np.array(self.samples["unfused"])
        ways: dict[str, Any] = {}
        for way, values in self.samples.items():
            low, middle, high = np.percentile(values, [25, 50, 75])
            ways[way] = {
                "ns_per_element": round(float(middle), 4),
                "quartiles": [round(float(low), 4), round(float(high), 4)],
                "of_unfused": round(float(np.median(np.array(values) / unfused)), 4),
            }
        c = self.case
        return {"place": c.place, "activation": c.activation, "rows": c.rows, "hidden": c.hidden, **ways}


def cases(records: Sequence[Activation], rows: Sequence[int], hidden: Sequence[int]) -> list[Case]:
    """Alone and in the feed-forward block at every size, and in the default model once."""
    for width in hidden:
        if width % EXPANSION:
            raise BadInput(f"hidden {width} must be a multiple of {EXPANSION}: the block has a quarter as channels")
    sizes = list(itertools.product(rows, hidden))
    found = [Case(place, r.name, m, h) for r in records for place in ("alone", "ffn") for m, h in sizes]
    for record in records:
        config = ActuaryConfig(activation=record.name, **MODEL)
        found.append(Case("model", record.name, config.context, config.hidden))
    return found


def open_session(model: onnx.ModelProto, library: Library | None, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    if library:
        ops.register(options, library)
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def bound_run(session: onnxruntime.InferenceSession, feeds: dict[str, NDArray[Any]]) -> Callable[[], None]:
    """A run whose inputs lie ready and whose outputs are not copied."""
    binding = session.io_binding()
    for name, array in feeds.items():
        binding.bind_cpu_input(name, array)
    for output in session.get_outputs():
        binding.bind_output(output.name)
    return lambda: session.run_with_iobinding(binding)


def _one_node(record: Activation, width: int, hidden: int, ffn: bool, rng: np.random.Generator) -> onnx.ModelProto:
    """x [M, width] -> activation -> [M, H]; with `ffn`, between two products from and to C = H / 4 channels."""
    floats = TensorProto.FLOAT
    learned = {f"learned.{name}": np.array([start], dtype=np.float32) for name, start in record.learned.items()}
    weights, nodes, first, last, C = dict(learned), [], "x", "y", hidden // EXPANSION
    if ffn:
        weights["up"] = rng.normal(size=(C, width), scale=C**-0.5).astype(np.float32)
        weights["down"] = rng.normal(size=(hidden, C), scale=hidden**-0.5).astype(np.float32)
        nodes.append(helper.make_node("MatMul", ["x", "up"], ["projected"]))
        first, last = "projected", "activated"
    nodes.append(helper.make_node(record.name, [first, *learned], [last], domain=bundle.DOMAIN))
    if ffn:
        nodes.append(helper.make_node("MatMul", ["activated", "down"], ["y"]))
    graph = helper.make_graph(
        nodes,
        "bench",
        [helper.make_tensor_value_info("x", floats, ["rows", C if ffn else width])],
        [helper.make_tensor_value_info("y", floats, ["rows", C if ffn else hidden])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
        value_info=[helper.make_tensor_value_info("activated", floats, ["rows", hidden])] if ffn else [],
    )
    return helper.make_model(
        graph,
        functions=[onnx_function(record.name, trace(record))],
        opset_imports=[helper.make_opsetid("", bundle.OPSET), helper.make_opsetid(bundle.DOMAIN, 1)],
        ir_version=IR_VERSION,
    )


def _torch_run(record: Activation, model: onnx.ModelProto, x: NDArray[np.float32], ffn: bool) -> Callable[[], None]:
    tensors = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in model.graph.initializer}
    learned = {name: tensors[f"learned.{name}"] for name in record.learned}
    start = torch.from_numpy(x)

    def run() -> None:
        with torch.inference_mode():
            if ffn:
                record(start @ tensors["up"], **learned) @ tensors["down"]
            else:
                record(start, **learned)

    return run


def copy_run(bytes_moved: int) -> Callable[[], None]:
    """Reads half of these bytes and writes the other half, on torch's threads."""
    source = torch.ones(bytes_moved // 2, dtype=torch.uint8)
    target = torch.empty_like(source)

    def run() -> None:
        target.copy_(source)

    return run


def _ways(record: Activation, case: Case, library: Library | None, threads: int) -> dict[Way, Callable[[], None]]:
    rng = np.random.default_rng(0)
    if case.place == "model":
        model = ActuaryGPT(ActuaryConfig(activation=record.name, **MODEL)).eval()
        proto = build(from_actuary(model, record.name))
        ids = rng.integers(0, MODEL["vocab_size"], size=(1, case.rows))
        feeds: dict[str, NDArray[Any]] = {
            bundle.INPUT_IDS: ids, bundle.LENGTHS: np.array([case.rows]), bundle.TOP_K: np.array([1])
        }  # fmt: skip
        tokens = torch.from_numpy(ids)

        def eager() -> None:
            with torch.inference_mode():
                model(tokens, logits_to_keep=1)

    else:
        width, ffn = case.hidden * (2 if record.gated else 1), case.place == "ffn"
        proto = _one_node(record, width, case.hidden, ffn, rng)
        x = rng.normal(size=(case.rows, case.hidden // EXPANSION if ffn else width)).astype(np.float32)
        feeds, eager = {"x": x}, _torch_run(record, proto, x, ffn)
    ways: dict[Way, Callable[[], None]] = {
        "unfused": bound_run(open_session(proto, None, threads), feeds),
        "torch": eager,
    }
    if library and not library.why_not(record.name, trace(record).digest, cuda=False):
        ways["fused"] = bound_run(open_session(proto, library, threads), feeds)
    if case.place == "alone":
        ways["copy"] = copy_run(4 * case.rows * case.hidden * (3 if record.gated else 2))
    return ways


def seconds_per_call(run: Callable[[], None], calls: int, clock: Clock = time.perf_counter) -> float:
    start = clock()
    for _ in range(calls):
        run()
    return (clock() - start) / calls


def measure(
    record: Activation, case: Case, library: Library | None, threads: int, rounds: int,
    clock: Clock = time.perf_counter,
) -> Measured:  # fmt: skip
    """All ways of one case, `rounds` samples each, after a warm-up."""
    torch.set_num_threads(threads)
    ways = _ways(record, case, library, threads)
    calls = {
        way: max(1, math.ceil(AT_LEAST_S / max(seconds_per_call(run, 3, clock), 1e-7))) for way, run in ways.items()
    }
    elements = case.rows * case.hidden * (MODEL["layers"] if case.place == "model" else 1)
    result = Measured(case, {way: [] for way in ways})
    rng = np.random.default_rng(0)
    for _ in range(rounds):
        for i in rng.permutation(len(ways)):
            way = list(ways)[i]
            result.samples[way].append(1e9 * seconds_per_call(ways[way], calls[way], clock) / elements)
    return result


def run(
    records: Sequence[Activation], rows: Sequence[int], hidden: Sequence[int], library: Library | None, threads: int,
    rounds: int,
) -> Iterator[Measured]:  # fmt: skip
    """Measures every case, one at a time."""
    by_name = {record.name: record for record in records}
    for case in cases(records, rows, hidden):
        yield measure(by_name[case.activation], case, library, threads, rounds)


def machine(library: Library | None, threads: int, rounds: int) -> dict[str, Any]:
    """What the figures were measured on and with."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {processor()}",
        "threads": threads,
        "rounds": rounds,
        "library": {
            **library.model_dump(include={"compiler", "vector_math", "inputs"}), "isa": ops.running_isa(library)
        } if library else None,
        "versions": {
            "onnxruntime": onnxruntime.__version__, "torch": torch.__version__, "python": platform.python_version()
        },
    }  # fmt: skip


_COLOURS: dict[Way, str] = {"fused": "#3b8bd0", "unfused": "#e0782f", "torch": "#8a8f98", "copy": "#3fa36b"}
_MEANING = """
<p>Each dot is the median, each line the quartiles, in nanoseconds per hidden element: less is better.</p>
<dl>
<dt>fused</dt><dd>our kernel for the whole activation, in ONNX Runtime</dd>
<dt>unfused</dt><dd>the same file without the library: ONNX Runtime's own operators, one by one</dd>
<dt>torch</dt><dd>the same expression in torch, eager</dd>
<dt>copy</dt><dd>memory copied once, as many bytes as the activation reads and writes</dd>
</dl>
<p><b>alone</b> is the activation by itself; <b>ffn</b> between the two products of its block; <b>model</b> the
default model with one prompt. Ratios are medians over rounds, each round's own pair of samples divided.</p>
"""
_STYLE = """
body{font:16px/1.5 system-ui;max-width:60rem;margin:2rem auto;padding:0 1rem}
dl{display:grid;grid-template-columns:max-content 1fr;gap:0 1rem}dd{margin:0}dt{font-weight:600}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}th,td{padding:.15rem .7rem;text-align:right}
th:first-child,td:first-child,th:nth-child(2),td:nth-child(2){text-align:left}thead{border-bottom:1px solid #999}
"""


def picture(result: dict[str, Any]) -> str:
    """One HTML file that opens without a network: a panel per place and size, and everything as a table."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in result["rows"]:
        sizes = "" if row["place"] == "model" else f", {row['rows']} row{'s'[: row['rows'] != 1]} of {row['hidden']}"
        groups.setdefault(f"{row['place']}{sizes}", []).append(row)
    # One order for all panels, the dearest unfused on top, so that an activation keeps its place.
    first = sorted(next(iter(groups.values())), key=lambda row: row["unfused"]["ns_per_element"])
    order = [row["activation"] for row in first]
    charts = "".join(_chart(title, rows, order, script=i == 0) for i, (title, rows) in enumerate(groups.items()))
    about = result["machine"]
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>actuary bench ops</title><style>{_STYLE}</style>"
        f"<h1>What an activation costs</h1><p>{about['date']}, {html.escape(about['machine'])}; threads: "
        f"{about['threads']}; rounds: {about['rounds']}; onnxruntime {about['versions']['onnxruntime']}, "
        f"torch {about['versions']['torch']}.</p>{_MEANING}{charts}<h2>All figures</h2>{_rows(result)}</html>"
    )


def _chart(title: str, rows: list[dict[str, Any]], order: list[str], script: bool) -> str:
    import plotly.graph_objects as go

    figure = go.Figure()
    for way, colour in _COLOURS.items():
        own = [row for row in rows if way in row]
        middle = [row[way]["ns_per_element"] for row in own]
        spread = [row[way]["quartiles"] for row in own]
        figure.add_scatter(
            x=middle,
            y=[row["activation"] for row in own],
            mode="markers",
            name=way,
            marker={"color": colour, "size": 9},
            error_x={
                "array": [high - value for (_, high), value in zip(spread, middle, strict=True)],
                "arrayminus": [value - low for (low, _), value in zip(spread, middle, strict=True)],
                "thickness": 1.5,
            },
        )
    figure.update_layout(
        title=title, height=150 + 24 * len(rows), margin={"l": 110, "r": 20, "t": 50, "b": 40}, template="plotly_white"
    )
    # To the dearest median and a bit: one disturbed round's quartile would press all dots to the left.
    most = max(row[way]["ns_per_element"] for row in rows for way in _COLOURS if way in row)
    figure.update_xaxes(range=[0, 1.15 * most], title="ns per hidden element")
    figure.update_yaxes(categoryorder="array", categoryarray=order)
    drawn: str = figure.to_html(full_html=False, include_plotlyjs=script, config={"displayModeBar": False})
    return drawn


def _rows(result: dict[str, Any]) -> str:
    heads = "".join(f"<th>{head}" for head in ("activation", "place", "rows", "hidden", *_COLOURS, "fused / unfused"))
    lines = []
    for row in result["rows"]:
        figures = [shown(row[way]["ns_per_element"]) if way in row else "" for way in _COLOURS]
        ratio = f"{row['fused']['of_unfused']:.2f}" if "fused" in row else ""
        cells = (row["activation"], row["place"], row["rows"], row["hidden"], *figures, ratio)
        lines.append("<tr>" + "".join(f"<td>{cell}" for cell in cells))
    return f"<table><thead><tr>{heads}<tbody>{''.join(lines)}</table>"


def shown(value: float) -> str:
    """Three figures, and all digits before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
