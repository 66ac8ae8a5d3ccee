"""Where each node of an opened bundle runs, whether the activation is ours, and what must be refused.

    file = onnx_file.read(path)
    check_file(file, manifest.opset); check_precision(manifest.precision, provider)      # before it is opened
    found = audit(session, file, manifest.precision)      # `session` opened with RECORD = "1" in its options
    check_placement(found)                                # where CUDA was asked for by name

A node that the preferred provider has no kernel for goes to the CPU provider without a word, its tensors copied
there and back. For shapes and ids that is how ONNX Runtime works best; for floating-point work it makes a CUDA session
slower than the CPU alone, so whoever asked for CUDA by name is told instead.

ONNX Runtime says where it put each node once functions are inlined and before its last fusions, and a fused node stays
where its parts were. Imported by the serving process, so neither torch nor onnx may be imported here.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

from actuary import BadInput
from export.bundle import ATTENTION, DOMAIN, PRODUCTS, STRUCTURAL
from export.onnx_file import SIZES, OnnxFile

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
RECORD = "session.record_ep_graph_assignment_info"  # the option without which a session does not say

# What onnxruntime 1.31.1 opens; tests/test_audit.py asks it.
NEWEST_IR = 13
NEWEST_OPSETS = {"": 26, "com.microsoft": 1, DOMAIN: 1}
# What has no kernel at all, and what to do then.
_NO_KERNEL = {
    ("bf16", CPU): "bf16 has no kernels on the CPU; serve it with --provider cuda, or export it with --precision fp32",
    ("int8", CUDA): "int8 products that are quantised as they run have no CUDA kernel; serve it with --provider cpu or "
    "auto, or export it with --precision fp16",
}
_SLOW = {("fp16", CPU): "fp16 runs on the CPU through casts to float32 and back; fp32 is faster there"}
# CUDA kernels for float16 and bfloat16 alone (onnxruntime-gpu 1.31.1, by get_all_opkernel_def). We write it for these
# alone; float32 graphs of before the cache had it too.
_HALF_ONLY = {"GroupQueryAttention"}
# What ONNX Runtime puts before the name of a node out of a function; the cache's attention calls its own so.
_INLINED = re.compile(r"^_inlfunc_.*?_(?=[A-Za-z]+:)")

Runs = Literal["fused", "inlined", "standard"]
RUNS: dict[Runs, str] = {
    "fused": "one kernel of ours",
    "inlined": "its function's body, in standard operators",
    "standard": "one of ONNX's own operators, which needs no kernel of ours",
}


class Assigned(NamedTuple):
    """A node as ONNX Runtime names it, and the provider that it went to."""

    name: str  # "" where it came out of a function
    domain: str
    op_type: str
    provider: str


class Placed(BaseModel):
    """A node of the graph as it was loaded."""

    model_config = ConfigDict(frozen=True)

    name: str
    domain: str
    op_type: str
    provider: str
    floating: bool  # it works on floating-point numbers, not on shapes and ids alone


class Audit(BaseModel):
    """What became of a bundle's graph in a session."""

    model_config = ConfigDict(frozen=True)

    provider: str  # that the session prefers
    precision: str
    activation: Runs
    attention: Runs | None  # of a graph with a cache; None where it has no operator of ours
    products: Runs | None  # in int8, likewise
    nodes: tuple[Placed, ...]
    fallen: tuple[Placed, ...]  # floating-point work that another provider was preferred for, and the CPU got
    notes: tuple[str, ...] = ()  # what runs, and not as one would think

    @property
    def counts(self) -> dict[str, int]:
        """Nodes by provider."""
        return dict(Counter(node.provider for node in self.nodes))

    @property
    def summary(self) -> dict[str, Any]:
        """What a list of models says of it."""
        return {
            "activation": self.activation,
            "attention": self.attention,
            "products": self.products,
            "nodes": self.counts,
            "notes": list(self.notes),
        }


def check_file(file: OnnxFile, opset: int) -> None:
    """BadInput where the file is newer than the runtime, or not of the opset that its manifest says."""
    newer = [("IR version", file.ir_version, NEWEST_IR)] + [
        (f"opset of {domain or 'ai.onnx'}", version, NEWEST_OPSETS[domain])
        for domain, version in file.opsets.items()
        if domain in NEWEST_OPSETS
    ]
    for what, has, newest in newer:
        if has > newest:
            raise BadInput(
                f"the graph's {what} is {has}, onnxruntime here takes up to {newest}; export it again with this "
                "version of Actuary, or install the version that it came from"
            )
    if file.opsets.get("") != opset:
        raise BadInput(
            f"the manifest says opset {opset}, its graph is of {file.opsets.get('', 'none')}; one of the two was "
            "changed: export it again"
        )


def cannot_run(precision: str, provider: str) -> str:
    """Why the provider has nothing to run that precision with, and what to do; empty where it has."""
    return _NO_KERNEL.get((precision, provider), "")


def check_precision(precision: str, provider: str) -> None:
    if why := cannot_run(precision, provider):
        raise BadInput(why)


def audit(session: Any, file: OnnxFile, precision: str, loaded: OnnxFile | None = None) -> Audit:
    """What became of `file` in `session`.

    Args:
        session: an onnxruntime.InferenceSession whose options had RECORD = "1".
        loaded: the graph as the session saved it; with it, the nodes are those after the last fusions.
    """
    assigned = [
        Assigned(node.name, node.domain, node.op_type, part.ep_name)
        for part in session.get_provider_graph_assignment_info()
        for node in part.get_nodes()
    ]
    return audit_of(assigned, file, precision, session.get_providers()[0], loaded)


def audit_of(
    assigned: Sequence[Assigned], file: OnnxFile, precision: str, provider: str, loaded: OnnxFile | None = None
) -> Audit:
    """The same of what a session said."""
    nodes = _as_assigned(assigned, file)
    fallen = [node for node in nodes if node.floating and node.provider == CPU != provider]
    found = Audit(
        provider=provider,
        precision=precision,
        activation=_runs(assigned, file, lambda operator: operator not in STRUCTURAL) or "standard",
        attention=_runs(assigned, file, lambda operator: operator in ATTENTION),
        products=_runs(assigned, file, lambda operator: operator in PRODUCTS),
        nodes=tuple(nodes if loaded is None else _as_loaded(assigned, loaded, provider)),
        fallen=tuple(fallen),
    )
    notes = [_SLOW[precision, provider]] if (precision, provider) in _SLOW else []
    if fallen:
        notes.append(f"{_fallen(found)}: slower than on one device")
    return found.model_copy(update={"notes": tuple(notes)})


def _runs(assigned: Iterable[Assigned], file: OnnxFile, which: Callable[[str], bool]) -> Runs | None:
    """How those of our operators run; None where the file has none of them."""
    ours, kept = (
        sum(node.domain == DOMAIN and which(node.op_type) for node in nodes) for nodes in (file.nodes, assigned)
    )
    return None if not ours else "fused" if kept == ours else "inlined"


def _as_assigned(assigned: Iterable[Assigned], file: OnnxFile) -> list[Placed]:
    known = file.inside | {node.name: file.works_on_floats(node) for node in file.nodes}

    def floating(node: Assigned) -> bool:
        # "MatMul_100/MatMulAddFusion" was MatMul_100. What has no name came out of the activation's function; of
        # anything else that is new to us we assume the worse.
        whole = known.get(node.name, known.get(_INLINED.sub("", node.name.partition("/")[0]), True))
        return whole and node.op_type not in SIZES

    return [Placed(**node._asdict(), floating=floating(node)) for node in assigned]


def _as_loaded(assigned: Sequence[Assigned], loaded: OnnxFile, provider: str) -> list[Placed]:
    by_name = {node.name: node.provider for node in assigned if node.name}
    # Nodes out of a function have no name: of those of one type we say the slowest, as they go to one provider. A
    # fusion keeps its parts' provider; where it took none of their names, we say the preferred one.
    unnamed: dict[str, str] = {}
    for node in assigned:
        if not node.name and unnamed.get(node.op_type) != CPU:
            unnamed[node.op_type] = node.provider

    def place(name: str, op_type: str) -> str:
        if not name:
            return unnamed.get(op_type, provider)
        return by_name.get(name) or by_name.get(name.partition("/")[0], provider)

    return [
        Placed(
            name=node.name,
            domain=node.domain,
            op_type=node.op_type,
            provider=place(node.name, node.op_type),
            floating=loaded.works_on_floats(node),
        )
        for node in loaded.nodes
    ]


def check_placement(found: Audit) -> None:
    """BadInput where floating-point work fell to the CPU; for those who asked for another provider by name."""
    if found.fallen:
        raise BadInput(f"{_fallen(found)}; {_remedy(found)}, or accept the copies with --provider auto")


def foreseen_on_cuda(file: OnnxFile, precision: str) -> str:
    """What is known, without a device, to make `--provider cuda` refuse this graph; empty where nothing is."""
    if why := cannot_run(precision, CUDA):
        return why
    assigned = [
        Assigned(
            node.name,
            node.domain,
            node.op_type,
            CPU if precision == "fp32" and node.op_type in _HALF_ONLY else CUDA,
        )
        for node in file.nodes
    ]
    try:
        check_placement(audit_of(assigned, file, precision, CUDA))
    except BadInput as refusal:
        return str(refusal)
    return ""


def _fallen(found: Audit) -> str:
    nodes = found.fallen
    named = ", ".join(f"{node.name or 'unnamed'} ({node.op_type})" for node in nodes[:3])
    more = f" and {len(nodes) - 3} more" if len(nodes) > 3 else ""
    count = "1 node works" if len(nodes) == 1 else f"{len(nodes)} nodes work"
    where = f"on floating-point numbers on the CPU, where {found.provider} was to"
    return f"{count} {where}: it has no kernel for {named}{more}"


def _remedy(found: Audit) -> str:
    """What helps, of that which is known to."""
    fallen = found.fallen
    if all(node.domain == DOMAIN for node in fallen):
        return "build their kernels with actuary ops build --cuda"
    if all(node.domain == "com.microsoft" for node in fallen):
        half = found.precision == "fp32" and all(node.op_type in _HALF_ONLY for node in fallen)
        return "export it again" + (", also with --precision fp16" if half else " with --flavor portable")
    return "serve it with --provider cpu"
