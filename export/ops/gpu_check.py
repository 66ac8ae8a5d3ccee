"""The one script to run on a machine with a CUDA device: `make gpu-check`, or `python -m export.ops.gpu_check`.

    found     device, driver, versions; exit code 2 with reason and remedy where something is missing
    build     the fused operators with their CUDA half
    kernels   every activation on the device against float64 (export/ops/gpu_measure.py)
    speed     fused, unfused, torch eager, torch.compile and a copy, with the share of the memory's bandwidth
    models    whole bundles: logits against torch, latency beside torch
    tests     pytest -m gpu

Writes OUT/gpu-check.json after every row and OUT/gpu-check.md, ready for docs/log.md, at the end: also where a part
failed (exit code 1), and on Ctrl-C. Wants PyTorch with CUDA, onnxruntime-gpu, nvcc and a C++ compiler; of torch any
version with torch.compile, 2.11 and newer. `speed` stops early enough to leave, of --minutes, what the later parts
usually take; the other parts run to their end, `tests` for TESTS_S at most.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import importlib.util
import io
import json
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import Progress
from rich.text import Text

from actuary import ActuaryError, BadInput
from export.ops.gpu_report import in_a_line, markdown

if TYPE_CHECKING:
    from export.ops.device import Place
    from export.ops.library import Library
    from models.activations import Activation

errors = Console(stderr=True, markup=False, highlight=False)  # paths and versions hold brackets
Row = dict[str, Any]
Result = dict[str, Any]

ROOT = Path(__file__).parents[2]
PARTS = ("kernels", "speed", "models", "tests")
PACKAGES = ("numpy", "onnx", "onnxruntime", "pydantic", "safetensors", "tokenizers", "torch", "transformers")
OLDEST_DEVICE = (8, 0)  # compute capability of the oldest of build.CUDA_ARCHS
# What is measured: a pointwise activation with a costly function and the usual gated one, rows M, widths H by kind. The
# large ones come first: they say most, should time run out.
SPEED = {"swiglu": (11008, 3072, 1024), "gelu": (3072, 1024)}
ROWS = (4096, 1, 128, 512, 16)
TYPES = ("float16", "bfloat16", "float32")
SHAPES = {
    "default": {"layers": 2, "dim": 128, "heads": 2, "context": 128, "vocab_size": 2048},
    "10M": {"layers": 6, "dim": 384, "heads": 6, "context": 128, "vocab_size": 8192},
}
EXPORTS = (("fp32", "portable"), ("fp32", "ort"), ("fp16", "ort"), ("bf16", "ort"))
BATCHES, TOKENS = (1, 16), 128
ROUNDS = 9
TESTS_S = 300  # the most that `tests` may take
# What the parts after `speed` usually take, and `speed` leaves them of --minutes.
USUALLY_S = {"models": 90, "tests": 100}


# --- what is here ----------------------------------------------------------------------------------------------------


def found() -> Row:
    """Device, driver and versions; BadInput lists all that is missing, each with its remedy."""
    absent = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if absent:
        raise BadInput(
            f"needs the Python packages {', '.join(absent)}; install them into {sys.executable} with: pip "
            "install -e '.[train,serve,dev]' (on a machine without a network from wheels, with --no-deps)"
        )
    import torch  # isort: split
    import onnxruntime  # after torch, whose CUDA libraries it takes

    from export.ops.build import find_nvcc

    missing = []
    if not torch.cuda.is_available():
        missing.append(
            f"torch {torch.__version__} sees no CUDA device: run this where nvidia-smi lists one, with a torch built "
            "for CUDA (pip's default build on x86-64 Linux is one; the CPU index's is not)"
        )
    elif torch.cuda.get_device_capability() < OLDEST_DEVICE:
        missing.append(
            f"{torch.cuda.get_device_name()} has compute capability {torch.cuda.get_device_capability()}; the kernels "
            f"are built for {OLDEST_DEVICE} and newer (A100, RTX 30 and later)"
        )
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        missing.append(
            f"onnxruntime {onnxruntime.__version__} was built without CUDA: pip uninstall onnxruntime, then pip "
            "install onnxruntime-gpu==1.31.1"
        )
    nvcc = None
    try:
        nvcc = find_nvcc()
        if not nvcc:
            missing.append("nvcc is not there: install NVIDIA's CUDA toolkit 12.8 or newer, or name it in NVCC")
    except BadInput as error:
        missing.append(str(error))
    try:
        importlib.metadata.version("actuary")
    except importlib.metadata.PackageNotFoundError:
        missing.append(f"actuary itself is not installed: pip install --no-deps --no-build-isolation --editable {ROOT}")
    if missing:
        raise BadInput(f"cannot run here. {'; '.join(missing)}")
    with contextlib.redirect_stdout(io.StringIO()) as said:
        onnxruntime.preload_dlls()
    properties: Any = torch.cuda.get_device_properties(0)
    smi = _output("nvidia-smi", "--query-gpu=driver_version,clocks.max.memory,clocks.max.sm", "--format=csv,noheader")
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "device": properties.name,
        "capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "multiprocessors": properties.multi_processor_count,
        "driver, memory and processor clock": smi or "nvidia-smi does not say",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "onnxruntime": onnxruntime.__version__,
        "preload_dlls": said.getvalue().strip(),
        "nvcc": next((line for line in _output(nvcc or "nvcc", "--version").splitlines() if "release" in line), ""),
    }


def check_provider(provider: str, preload_said: str) -> None:
    """BadInput where ONNX Runtime has the provider and does not run it, as where CUDA's libraries do not load."""
    from onnx import TensorProto, helper

    from export.ops.check import open_session

    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "probe", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    try:
        open_session(model.SerializeToString(), provider=provider).run(None, {"x": [1.0]})
    except Exception as error:  # ours where it does not open, onnxruntime's own where it does not run
        raise BadInput(
            f"{provider} does not run here ({preload_said or error}); CUDA's and cuDNN's libraries must be of the "
            "major version that onnxruntime-gpu was built for: pip install -e '.[cuda]', or a torch that brings them"
        ) from error


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=30).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


# --- the parts -------------------------------------------------------------------------------------------------------


def kernels(
    result: Result, library: Library, place: Place, records: list[Activation], types: tuple[str, ...]
) -> Iterator[None]:
    """Fills result["kernels"], a row a step."""
    from export.ops.gpu_measure import check_kernels

    for row in check_kernels(records, library, place, types):
        result["kernels"].append(row)
        if row["failed"]:
            result["failures"].append(row["failed"])
        yield


def speed(result: Result, library: Library, place: Place, rounds: int, until: float) -> Iterator[None]:
    """Fills result["speed"], a case a step, until that time.monotonic()."""
    from export.ops.gpu_measure import Case, measure_speed
    from models.activations import get

    cases = [
        Case(get(name), type, rows, hidden)
        for rows in ROWS for type in TYPES for name, widths in SPEED.items() for hidden in widths
    ]  # fmt: skip
    for done, case in enumerate(cases):
        if time.monotonic() > until:
            result["notes"].append(f"speed stopped for --minutes after {done} of {len(cases)} cases")
            return
        result["speed"].append(measure_speed(case, library, place, rounds))
        row = result["speed"][-1]
        result["failures"] += [f"{case.label}, {way}: {why}" for way, why in row["failed"].items() if way == "fused"]
        yield


def models(result: Result, library: Library, place: Place, folder: Path, rounds: int) -> Iterator[None]:
    """Fills result["models"], an export a step."""
    from export.ops.gpu_measure import ModelCase, measure_model

    for (label, shape), (precision, flavor) in ((s, e) for s in SHAPES.items() for e in EXPORTS):
        case = ModelCase(label, shape, "swiglu", precision, flavor)
        try:
            row = measure_model(case, library, place, folder, BATCHES, TOKENS, rounds)
        except Exception as error:  # the other exports may still go
            row = {"model": label, "precision": precision, "flavor": flavor, "failed": {"export": in_a_line(error)}}
        result["models"].append(row)
        result["failures"] += [
            f"{label} {precision} {flavor}, {way}: {why}"
            for way, why in row["failed"].items() if not way.startswith("compiled")
        ]  # fmt: skip
        yield


def tests(result: Result, timeout_s: float) -> Iterator[None]:
    """Fills result["tests"] with the exit code and the end of what pytest said."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-rs", "-q", "-p", "no:cacheprovider", "tests/test_gpu.py"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=timeout_s)
        code, said = done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired as late:
        code, said = 124, str(late)
    result["tests"] = {"exit_code": code, "said": said.strip().splitlines()[-12:]}
    if code or " passed" not in "".join(result["tests"]["said"][-1:]):  # all skipped is not what was asked for
        result["failures"].append(f"pytest -m gpu: exit code {code}: {' | '.join(result['tests']['said'][-3:])}")
    yield


# --- the run ----------------------------------------------------------------------------------------------------------


def save(result: Result, out: Path) -> None:
    """Writes both files whole."""
    from models.files import write_atomically

    write_atomically(out / "gpu-check.json", json.dumps(result, indent=2))
    write_atomically(out / "gpu-check.md", markdown(result))


def check(result: Result, out: Path, steps: dict[str, tuple[Callable[[], Iterator[None]], int]]) -> None:
    """Takes every part's steps, saving after each; a part that breaks is a failure, and the next one goes on.

    Args:
        steps: part -> (its steps, how many there are).
    """
    with Progress(console=errors, disable=not errors.is_terminal) as progress:
        try:
            for part, (make, total) in steps.items():
                task = progress.add_task(part, total=total)
                errors.print(f"{part} ...") if not errors.is_terminal else None
                try:
                    for _ in make():
                        progress.advance(task)
                        save(result, out)
                except Exception as error:  # one part must not take the others with it
                    result["failures"].append(f"{part}: {in_a_line(error)}")
        except KeyboardInterrupt:
            result["failures"].append("stopped by Ctrl-C; what was measured before stands")
        finally:
            save(result, out)


def empty(about: Row) -> Result:
    """A result in which nothing was measured yet."""
    return {
        "found": about, "build": "", "kernels": [], "speed": [], "models": [], "tests": {}, "notes": [], "failures": [],
    }  # fmt: skip


@click.command()
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=Path("artifacts/gpu-check"),
              show_default=True, help="Folder for gpu-check.json and gpu-check.md.")  # fmt: skip
@click.option("--parts", default=",".join(PARTS), show_default=True, help="Those to run, with commas between.")
@click.option(
    "--minutes",
    type=click.FloatRange(1),
    default=8,
    show_default=True,
    help="When `speed` stops, less what the parts after it usually take.",
)
def main(out: Path, parts: str, minutes: float) -> None:
    """Check and measure the fused operators on this machine's CUDA device."""
    wanted = [part.strip() for part in parts.split(",")]
    unknown = [part for part in wanted if part not in PARTS]
    if unknown:
        raise BadInput(f"unknown part {unknown[0]!r}; known: {', '.join(PARTS)}")
    start = time.monotonic()
    about = found()
    for key, value in about.items():
        errors.print(f"{key}: {value}")

    check_provider("CUDAExecutionProvider", about["preload_dlls"])
    from export.ops.build import build, elementwise
    from export.ops.device import ON_CUDA
    from models.activations import get
    from models.files import check_writable

    check_writable(out)
    result = empty(about)
    try:
        with errors.status("building") as status:
            library, anew = build(out / "ops", cuda=True, say=lambda line: status.update(Text(line)))
    except ActuaryError as error:
        result["failures"].append(str(error))
        save(result, out)
        raise
    seconds = time.monotonic() - start
    result["build"] = f"CUDA {', '.join(library.cuda)}; {library.nvcc}" + (
        f"; built in {seconds:.0f} s" if anew else ""
    )
    records = [get(name) for name in elementwise()]
    until = start + 60 * minutes - sum(seconds for part, seconds in USUALLY_S.items() if part in wanted)
    cases = len(ROWS) * len(TYPES) * sum(map(len, SPEED.values()))
    steps: dict[str, tuple[Callable[[], Iterator[None]], int]] = {
        "kernels": (lambda: kernels(result, library, ON_CUDA, records, TYPES), len(records) * len(TYPES)),
        "speed": (lambda: speed(result, library, ON_CUDA, ROUNDS, until), cases),
        "models": (lambda: models(result, library, ON_CUDA, out / "bundles", ROUNDS), len(SHAPES) * len(EXPORTS)),
        "tests": (lambda: tests(result, TESTS_S), 1),
    }
    check(result, out, {part: steps[part] for part in PARTS if part in wanted})
    errors.print(f"{out / 'gpu-check.md'} and {out / 'gpu-check.json'}")
    click.echo(markdown(result))
    if result["failures"]:
        raise ActuaryError(f"{len(result['failures'])} failures: {result['failures'][0]}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # compilers end, what was measured is saved
    try:
        main(standalone_mode=False)
    except click.ClickException as wrong:
        wrong.show()
        sys.exit(wrong.exit_code)
    except click.Abort:
        sys.exit(1)
    except ActuaryError as error:
        click.echo(f"gpu-check: {error}", err=True)
        sys.exit(error.exit_code)
