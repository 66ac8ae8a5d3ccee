"""Builds the fused-operator library from the registry: `actuary ops build`.

    registry --trace.py, cpp_functor.py--> functors.h -.
                                  native/*.cpp, *.cu --'--compiler--> libactuary_ops.so, library.json

The compiler is called directly, some files at a time: a dozen of them need no build system, and so one C++ compiler is
all that a machine must have. nvcc, where it is, adds the CUDA half to the same library. What is built is remembered by
a hash of everything that goes in, so that a second call only looks.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from actuary import ActuaryError, BadInput, cores
from export.bundle import DOMAIN
from export.ops import library
from export.ops.cpp_functor import cost_ns, cpp_functor
from export.ops.library import BINARY, OPS_VERSION, ORT_API, RECORD, Library
from export.ops.trace import Expression, trace
from models.activations import registry
from models.files import check_writable, new_folder

NATIVE = Path(__file__).parent / "native"
MAX_LEARNED = 8  # kMaxLearned of native/activation.h

# No -ffast-math: NaN and infinity must come out as torch gives them. Errno and traps are what keeps GCC from vector
# code, and nobody reads either; contraction to fused multiply-add rounds less often, never more.
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-Wall", "-Wextra", "-fvisibility=hidden")
VECTOR_FLAGS = ("-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd", "-ffp-contract=fast")
# x86-64's levels of instructions: name in C++ -> (what people call it, flags, how to ask the processor). By themselves
# compilers keep to half of AVX-512's width: SwiGLU takes 0.38 ns an element so, and 0.29 at the full width. F16C, which
# clang's __builtin_cpu_supports does not know, is asked for in cpu.cpp.
ISAS = {
    "v4": (
        "x86-64-v4",
        ("-march=x86-64-v4", "-mprefer-vector-width=512"),
        ("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "fma", "bmi2"),
    ),
    "v3": ("x86-64-v3", ("-march=x86-64-v3",), ("avx2", "fma", "bmi2")),
}
# Int8Linear's loops know these besides AVX2 and plain C++: name in C++ -> (its level of ISAS, flags, what it asks for).
INT8_ISAS = {"vnni": ("v4", ("-mavx512vnni",), "avx512vnni")}
INT8_FLAGS = (
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fopenmp-simd",
    "-ffp-contract=off",
)  # each product and sum rounds, as in ONNX
LIBMVEC_PROBE = """
extern "C" __attribute__((simd("notinbranch"))) float expm1f(float) noexcept;
extern "C" __attribute__((simd("notinbranch"))) float log1pf(float) noexcept;
void f(float* x, int n) { for (int i = 0; i < n; ++i) x[i] = expm1f(log1pf(x[i])); }
"""
# Each runs on the later ones of its generation; for all others the driver compiles the oldest one's PTX.
CUDA_ARCHS = ("80", "89", "90", "120")

# One block of elements for a thread should outweigh waking it: about 10 us.
BLOCK_NS = 10_000
BLOCK_ELEMENTS = (16_384, 65_536)


@dataclass(frozen=True)
class Toolchain:
    """The programs that build; nvcc is None where the CUDA half is not wanted or not there."""

    compiler: str
    compiler_version: str
    nvcc: str | None
    nvcc_version: str


def elementwise() -> dict[str, Expression]:
    """Every activation that can be fused, in the registry's order; BadInput where one has too many learned scalars."""
    expressions = {name: trace(record) for name, record in registry().items()}
    for name, expression in expressions.items():
        if len(expression.learned) > MAX_LEARNED:
            raise BadInput(f"activation {name!r} has {len(expression.learned)} learned scalars; at most {MAX_LEARNED}")
    return {name: expression for name, expression in expressions.items() if expression.elementwise}


def generated(
    expressions: Mapping[str, Expression], isas: Mapping[str, tuple[str, str]], int8: Mapping[str, tuple[str, str]]
) -> dict[str, str]:
    """The printed sources, by file name.

    Args:
        isas: name in C++ -> (what people call it, a C++ condition on the processor), best first.
        int8: the same of Int8Linear's loops; what people call it is the level that it belongs to.
    """
    note = "// Printed by export/ops/build.py from the registry; change the record, not this.\n"
    every = "#define ACTUARY_EVERY(X) " + " ".join(f"X({name})" for name in expressions) + "\n"
    rows = [
        f'{{"{name}", "biased_{name}", {len(e.tensors)}, {len(e.learned)}, {block(e)}}},\n'
        for name, e in expressions.items()
    ]

    def choices(levels: Mapping[str, tuple[str, str]]) -> str:
        return " ".join(f'X({name}, "{called}", {runs})' for name, (called, runs) in levels.items())

    isas_h = f"#define ACTUARY_ISAS(X) {choices(isas)}\n#define ACTUARY_INT8_ISAS(X) {choices(int8)}\n"
    return {
        "functors.h": note + "\n".join(cpp_functor(name, e) for name, e in expressions.items()) + every,
        "functors.cuh": note + "\n".join(cpp_functor(name, e, cuda=True) for name, e in expressions.items()) + every,
        "activations.inc": note + "".join(rows),
        "isas.h": note + isas_h,
    }


def block(expression: Expression) -> int:
    """How many elements of this activation are worth another thread."""
    low, high = BLOCK_ELEMENTS
    return min(max(int(BLOCK_NS / cost_ns(expression)) // 1024 * 1024, low), high)


def build(
    out: Path, cuda: bool | None = None, say: Callable[[str], None] = lambda line: None, strict: bool = False
) -> tuple[Library, bool]:
    """Builds the library into the folder `out`, unless what stands there was made of the same: (it, built anew).

    Args:
        cuda: with the CUDA half; by default where nvcc and a GPU's driver are there.
        say: told what is being done, a line at a time.
        strict: a warning is an error, for our tests: elsewhere a newer compiler or a plugin's formula may bring one.
    Raises: BadInput where a compiler is missing or `out` cannot be written, ActuaryError where compiling fails.
    """
    if sys.platform != "linux":
        raise BadInput(f"fused operators are built on Linux, not on {sys.platform}; without them all runs unfused")
    tools = _toolchain(cuda)
    expressions = elementwise()
    inputs = _hash_of_inputs(tools, expressions)
    try:
        present = library.find(out)
    except BadInput:
        present = None  # damaged or foreign: built anew
    if present and present.inputs == inputs:
        return present, False
    check_writable(out.parent)
    if strangers := _strangers(out):
        raise BadInput(
            f"{out} holds {strangers[0]!r}, which is none of ours, and would be replaced; name another --out"
        )
    with tempfile.TemporaryDirectory(prefix="actuary-ops-") as scratch, new_folder(out) as folder:
        made = _compile(Path(scratch), folder / BINARY, tools, expressions, inputs, say, strict)
        (folder / RECORD).write_text(made.model_dump_json(indent=2) + "\n", encoding="utf-8")
        _try_out(made)
    return made.model_copy(update={"path": out / BINARY}), True


def _strangers(out: Path) -> list[str]:
    try:
        return sorted(path.name for path in out.iterdir() if path.name not in (BINARY, RECORD))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise BadInput(f"cannot look into {out}: {error.strerror}; name another --out") from error


def _toolchain(cuda: bool | None) -> Toolchain:
    compiler = _program("CXX", "c++", "g++", "clang++")
    if not compiler:
        raise BadInput(
            "fused operators need a C++ compiler, and none of c++, g++, clang++ is there; install one (Debian, Ubuntu: "
            "apt install g++; Fedora: dnf install gcc-c++) or name it in CXX. Without them all runs unfused"
        )
    nvcc = find_nvcc() if cuda is not False else None
    if cuda and not nvcc:
        raise BadInput("--cuda needs nvcc, which is not there; install NVIDIA's CUDA toolkit or name nvcc in NVCC")
    if cuda is None and not Path("/proc/driver/nvidia/version").exists():
        nvcc = None  # nothing to run it on, and it takes a minute
    return Toolchain(compiler, _version(compiler), nvcc, _version(nvcc) if nvcc else "")


def find_nvcc() -> str | None:
    """The nvcc that builds the CUDA half; BadInput where NVCC names something else than a program."""
    return _program("NVCC", "nvcc", "/usr/local/cuda/bin/nvcc")


def _program(variable: str, *names: str) -> str | None:
    asked = os.environ.get(variable)
    found = next((path for path in map(shutil.which, [asked] if asked else names) if path), None)
    if asked and not found:
        raise BadInput(f"{variable}={asked!r} is not a program on PATH; name one without arguments")
    return found


def _version(program: str) -> str:
    lines = _run([program, "--version"]).stdout.splitlines()
    return next((line for line in lines if "release" in line), lines[0] if lines else "unknown").strip()


def _hash_of_inputs(tools: Toolchain, expressions: Mapping[str, Expression]) -> str:
    parts = [
        repr(tools),
        repr((FLAGS, VECTOR_FLAGS, ISAS, INT8_ISAS, INT8_FLAGS, CUDA_ARCHS, OPS_VERSION, ORT_API)),
        platform.machine(),
    ]
    parts += [repr(platform.libc_ver()), Path(__file__).read_text(encoding="utf-8")]
    parts += [f"{name} {expression.digest}" for name, expression in expressions.items()]
    parts += generated(expressions, {}, {}).values()
    sources = sorted(path for path in NATIVE.iterdir() if path.suffix in (".h", ".cpp", ".cu"))  # no editor's files
    parts += [f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in sources]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _compile(
    scratch: Path,
    binary: Path,
    tools: Toolchain,
    expressions: Mapping[str, Expression],
    inputs: str,
    say: Callable[[str], None],
    strict: bool,
) -> Library:
    """Compiles and links into `binary`; objects and printed sources go to `scratch`."""
    say(f"asking {tools.compiler_version} what it can")
    # -Werror: of an attribute that it does not know, clang only warns.
    libmvec = _accepts(tools, scratch, LIBMVEC_PROBE, [*VECTOR_FLAGS, "-O3", "-Werror", "-lmvec", "-lm"])
    base = platform.machine().replace("x86_64", "x86-64")
    levels = {
        name: (called, flags, " && ".join([*(f'__builtin_cpu_supports("{one}")' for one in features), "has_f16c()"]))
        for name, (called, flags, features) in ISAS.items()
        if platform.machine() == "x86_64" and _accepts(tools, scratch, "int x;", [*flags])
    } | {"base": (base, (), "true")}
    int8_levels = {
        name: (levels[level][0], (*levels[level][1], *flags), f'__builtin_cpu_supports("{feature}")')
        for name, (level, flags, feature) in INT8_ISAS.items()
        if level in levels and _accepts(tools, scratch, "int x;", [*levels[level][1], *flags])
    }
    # AVX-512 without VNNI takes AVX2's; the level's own instructions are there where cpu.cpp chose it.
    int8_levels |= {name: (called, flags, "true") for name, (called, flags, _) in levels.items() if name != "v4"}
    sources = generated(
        expressions,
        {name: (called, runs) for name, (called, _, runs) in levels.items()},
        {name: (called, runs) for name, (called, _, runs) in int8_levels.items()},
    )
    for name, text in sources.items():
        (scratch / name).write_text(text, encoding="utf-8")

    defines = [
        f"-DACTUARY_ORT_API={ORT_API}",
        f"-DACTUARY_OPS_VERSION={OPS_VERSION}",
        f'-DACTUARY_INPUTS="{inputs}"',
        f'-DACTUARY_DOMAIN="{DOMAIN}"',
        *(["-DACTUARY_CUDA"] if tools.nvcc else []),
    ]
    plain = [tools.compiler, *FLAGS, *(["-Werror"] if strict else []), f"-I{scratch}", f"-I{NATIVE}", *defines]
    vector = [*plain, *VECTOR_FLAGS, *(["-DACTUARY_LIBMVEC"] if libmvec else [])]
    jobs = {
        f"{loops}-{name}": [*vector, *flags, f"-DACTUARY_ISA={name}", "-c", str(NATIVE / f"{loops}.cpp")]
        for loops in ("vector", "attention")
        for name, (_, flags, _) in levels.items()
    }
    jobs |= {
        f"int8-{name}": [*plain, *INT8_FLAGS, *flags, f"-DACTUARY_ISA={name}", "-c", str(NATIVE / "int8_loops.cpp")]
        for name, (_, flags, _) in int8_levels.items()
    }
    once = ("op", "check", "cpu", "attention_op", "int8_linear")
    jobs |= {name: [*plain, "-c", str(NATIVE / f"{name}.cpp")] for name in once}
    archs = _cuda_archs(tools.nvcc) if tools.nvcc else []
    if tools.nvcc:
        targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
        targets += [f"-gencode=arch=compute_{archs[0]},code=compute_{archs[0]}", "--threads", str(cores())]
        host = ["-std=c++17", "-O3", "-ccbin", tools.compiler, "-Xcompiler=-fPIC,-fvisibility=hidden"]
        cuda = [tools.nvcc, *host, *targets, f"-I{scratch}", f"-I{NATIVE}", *defines, "-c", str(NATIVE / "cuda.cu")]
        jobs = {"cuda": cuda} | jobs  # first: it takes longest
    objects = [str(scratch / f"{name}.o") for name in jobs]
    _run_all({name: [*job, "-o", str(scratch / f"{name}.o")] for name, job in jobs.items()}, scratch, say)
    if tools.nvcc:
        link = [tools.nvcc, "-shared", "-cudart", "static", "-ccbin", tools.compiler, "-Xlinker", "--no-undefined"]
    else:
        link = [tools.compiler, "-shared", "-Wl,--no-undefined"]
    link += ["-o", str(binary), *objects, *(["-lmvec"] if libmvec else []), "-lm"]
    _run_all({"link": link}, scratch)
    return Library(
        path=binary,
        ops_version=OPS_VERSION,
        ort_api=ORT_API,
        system=sys.platform,
        machine=platform.machine(),
        activations={name: expression.digest for name, expression in expressions.items()},
        isas=[called for called, _, _ in levels.values()],
        vector_math="libmvec" if libmvec else "exp, tanh and erf only",
        cuda=archs,
        compiler=tools.compiler_version,
        nvcc=tools.nvcc_version,
        inputs=inputs,
        sha256=hashlib.sha256(binary.read_bytes()).hexdigest(),
        built=datetime.datetime.now(datetime.UTC).replace(microsecond=0),
    )


def _cuda_archs(nvcc: str) -> list[str]:
    """Those of ours that this nvcc knows: sm_120 came with CUDA 12.8."""
    known = _run([nvcc, "--list-gpu-code"]).stdout.split()
    archs = [arch for arch in CUDA_ARCHS if f"sm_{arch}" in known]
    if not archs:
        raise BadInput(f"{nvcc} knows none of sm_{', sm_'.join(CUDA_ARCHS)}; install CUDA 12 or newer, or --no-cuda")
    return archs


def _accepts(tools: Toolchain, scratch: Path, code: str, flags: list[str]) -> bool:
    """Whether the compiler makes a shared library of `code` with these flags."""
    probe = scratch / "probe.cpp"
    probe.write_text(code, encoding="utf-8")
    before = [flag for flag in flags if not flag.startswith("-l")]
    after = [flag for flag in flags if flag.startswith("-l")]
    command = [tools.compiler, *before, "-shared", "-fPIC", str(probe), "-o", f"{probe}.so", *after]
    return _run([*command, "-Wl,--no-undefined"]).returncode == 0


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _run_all(commands: Mapping[str, list[str]], scratch: Path, say: Callable[[str], None] = lambda line: None) -> None:
    """Runs the commands, as many at a time as there are cores; ActuaryError with what one said that failed.

    Each leads a process group, a compiler being several processes, and none outlives this call, however it ends. Their
    temporary files go to `scratch`.
    """
    waiting, running = list(commands.items()), dict[str, subprocess.Popen[bytes]]()
    try:
        while waiting or running:
            while waiting and len(running) < cores():
                name, command = waiting.pop(0)
                with (scratch / f"{name}.log").open("wb") as log:
                    running[name] = subprocess.Popen(
                        command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, process_group=0,
                        env={**os.environ, "TMPDIR": str(scratch)},
                    )  # fmt: skip
            time.sleep(0.02)
            for name in [name for name, child in running.items() if child.poll() is not None]:
                if code := running.pop(name).returncode:
                    said = (scratch / f"{name}.log").read_text(encoding="utf-8", errors="replace")
                    raise ActuaryError(
                        f"{commands[name][0]} failed with exit code {code}:\n" + "\n".join(said.splitlines()[:20])
                        + f"\nThe command: {' '.join(commands[name])}"
                    )  # fmt: skip
                say(f"compiled {name} ({len(commands) - len(waiting) - len(running)} of {len(commands)})")
    finally:
        for child in running.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def _try_out(made: Library) -> None:
    """ActuaryError where the new library does not load, is not what was just built, or ONNX Runtime refuses it."""
    import onnxruntime

    try:
        said = library.loaded_inputs(made)
        library.register(onnxruntime.SessionOptions(), made)
    except (OSError, BadInput) as error:
        raise ActuaryError(f"the library was built but does not load: {error}") from error
    if said != made.inputs:
        raise ActuaryError(f"the library that loads was made of {said[:12]}, not of {made.inputs[:12]}; report this")
