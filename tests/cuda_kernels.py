"""What ONNX Runtime has CUDA kernels for, told on a machine without CUDA.

onnxruntime-gpu lists them once its providers' libraries are loaded, and those load where the libraries that they need
are there. Stand-ins are compiled for these, of functions that return 0: listing calls few of them and runs nothing. In
a process of its own, which is left without tidying up: what is behind the stand-ins has nothing to tidy.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
from onnx import TensorProto, helper

from export.graph_parts import ORT

PROVIDERS = ("cuda", "tensorrt")  # the list asks both
LISTED = """
import json, os, sys
from onnxruntime.capi.onnxruntime_pybind11_state import get_all_opkernel_def
found = [
    (kernel.domain, kernel.op_name, *kernel.version_range, kernel.type_constraints)
    for kernel in get_all_opkernel_def() if kernel.provider == "CUDAExecutionProvider"
]
with open(sys.argv[1], "w") as file:
    json.dump(found, file)
os._exit(0)
"""
# Domain, operator, the first and last version of its schema, and for each of its type variables those it is for.
Kernel = tuple[str, str, int, int, dict[str, list[str]]]


def listed(folder: Path) -> list[Kernel]:
    """All of them; `folder` gets the stand-ins."""
    binaries = [Path(onnxruntime.__file__).parent / f"capi/libonnxruntime_providers_{name}.so" for name in PROVIDERS]
    for library, names in _needed(binaries).items():
        source, versions = folder / "stand_in.c", folder / "versions"
        source.write_text("".join(f"long {name}(void) {{ return 0; }}\n" for name in sorted(names)))
        versions.write_text(f"{library} {{ global: *; }};\n")
        command = ["cc", "-shared", "-fPIC", "-w", "-fno-builtin", f"-Wl,-soname,{library}", str(source)]
        subprocess.run([*command, f"-Wl,--version-script={versions}", "-o", str(folder / library)], check=True)
    path = ":".join([str(folder), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])])
    command = [sys.executable, "-c", LISTED, str(folder / "kernels.json")]
    subprocess.run(command, check=True, env={**os.environ, "LD_LIBRARY_PATH": path}, stderr=subprocess.DEVNULL)
    return [tuple(kernel) for kernel in json.loads((folder / "kernels.json").read_text())]


def _needed(binaries: Sequence[Path]) -> dict[str, set[str]]:
    """Library of CUDA's or TensorRT's: the functions that are asked of it."""
    needed: dict[str, set[str]] = {}
    for binary in binaries:
        libraries = [line.partition("Shared library: [")[2].rstrip("]") for line in _readelf("-d", binary)]
        libraries = [name for name in libraries if name.startswith(("libcu", "libnv"))]
        for library in libraries:
            needed.setdefault(library, set())
        for line in _readelf("--dyn-syms", binary):
            words = line.split()
            if len(words) < 8 or words[4] != "GLOBAL" or words[6] != "UND":
                continue
            name, _, version = words[7].partition("@")
            if version in libraries:
                needed[version].add(name)
            elif not version and not name.startswith("Provider_"):  # which ONNX Runtime itself has
                needed[libraries[0]].add(name)  # or any other: the loader looks in all of them
    return needed


def _readelf(what: str, binary: Path) -> list[str]:
    done = subprocess.run(["readelf", "-W", what, str(binary)], check=True, capture_output=True, text=True)
    return done.stdout.splitlines()


def missing(model: onnx.ModelProto, kernels: Sequence[Kernel]) -> set[str]:
    """The operators of the graph, its functions inlined, that have no CUDA kernel for the types they are given."""
    return {
        operator
        for domain, operator, version, types in _operators(onnx.inliner.inline_local_functions(model))
        if not any(
            (domain, operator) == kernel[:2]
            and kernel[2] <= version <= kernel[3]
            and all(type in kernel[4].get(variable, [type]) for variable, type in types.items())
            for kernel in kernels
        )
    }


def _operators(model: onnx.ModelProto) -> Iterator[tuple[str, str, int, dict[str, str]]]:
    """Domain, operator, its schema's version and the types of its type variables, of every node that is left to run."""
    opset = next(entry.version for entry in model.opset_import if entry.domain == "")
    types = {value.name: _type(value.type.tensor_type.elem_type) for value in model.graph.input}
    types |= {tensor.name: _type(tensor.data_type) for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.domain == ORT:  # of whose operators we take those that answer in the type of their first input
            types |= dict.fromkeys(node.output, types[node.input[0]])
            yield ORT, node.op_type, 1, {"T": types[node.input[0]]}
            continue
        schema = onnx.defs.get_schema(node.op_type, opset, "")
        alone = {each.type_param_str: each.allowed_type_strs[0] for each in schema.type_constraints}
        bound: dict[str, str] = {}
        for slots, names in ((schema.inputs, node.input), (schema.outputs, node.output)):
            for i, name in enumerate(names):
                variable = slots[min(i, len(slots) - 1)].type_str
                if slots is schema.outputs or name not in types:
                    types[name] = _stated(node) or bound.get(variable) or alone.get(variable, variable)
                if name:
                    bound.setdefault(variable, types[name])
        if node.op_type != "Constant":  # it becomes an initializer
            operator = "Cast" if node.op_type == "CastLike" else node.op_type  # a function of ONNX's own
            bound = {"T1": bound["T1"], "T2": types[node.output[0]]} if operator == "Cast" else bound
            version = onnx.defs.get_schema(operator, opset, "").since_version
            yield "", operator, version, bound


def _stated(node: onnx.NodeProto) -> str:
    """The type that an attribute gives the output; empty where the inputs do."""
    given: dict[str, Any] = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    if node.op_type == "Cast":
        return _type(given["to"])
    if node.op_type in ("Constant", "ConstantOfShape"):
        if "value" in given:
            return _type(given["value"].data_type)
        integers = {"value_int", "value_ints"} & given.keys()
        return _type(TensorProto.INT64 if integers else TensorProto.FLOAT)
    return ""


def _type(element: int) -> str:
    return f"tensor({TensorProto.DataType.Name(element).lower()})"
