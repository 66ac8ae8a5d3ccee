"""`actuary ops build`: what is built anew, what is refused, and what is left where it is stopped or fails."""

from __future__ import annotations

import functools
import itertools
import platform
import re
import shutil
import signal
import struct
import subprocess
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from conftest import ACTUARY, HANG_S
from native_ops import FUSED, actuary, copied, run

from actuary import ActuaryError, BadInput, cores
from export.ops import build, error_bound, library
from export.ops.check import one_node, probes, worst_ratio
from export.ops.trace import trace
from models.activations import Activation, get
from models.files import new_folder


def test_nothing_is_compiled_twice(fused, tmp_path, monkeypatch):
    folder = copied(fused, tmp_path / "ops")
    before = (folder / library.BINARY).stat().st_mtime_ns
    monkeypatch.setattr(build, "_compile", lambda *_: pytest.fail("compiled again"))
    again, anew = build.build(folder, cuda=False)
    assert (again.inputs, anew, (folder / library.BINARY).stat().st_mtime_ns) == (fused.inputs, False, before)


def test_another_formula_is_another_library(fused, tmp_path, monkeypatch):
    folder, wanted = copied(fused, tmp_path / "ops"), []
    monkeypatch.setattr(build, "elementwise", lambda: {"silu": trace(get("silu"))})
    monkeypatch.setattr(build, "_compile", lambda *arguments: wanted.append(arguments[4]) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build.build(folder, cuda=False)
    assert wanted != [fused.inputs]
    assert library.find(folder).sha256 == fused.sha256, "a build that fails leaves what was there"


def test_without_a_compiler_it_says_what_to_install(tmp_path):
    done = actuary("ops", "build", "--out", str(tmp_path / "ops"), PATH="/nonexistent", CXX="")
    assert done.returncode == 2, done.stderr
    assert "none of c++, g++, clang++ is there; install one" in done.stderr
    assert not (tmp_path / "ops").exists()


@pytest.mark.parametrize("variable", ["CXX", "NVCC"])
def test_a_compiler_with_arguments_is_refused_and_named(tmp_path, monkeypatch, variable: str):
    if not shutil.which("c++"):
        pytest.skip("no C++ compiler")
    monkeypatch.setenv(variable, "ccache c++")
    with pytest.raises(BadInput, match=f"{variable}='ccache c\\+\\+' is not a program on PATH; name one without arg"):
        build.build(tmp_path / "ops")


def test_a_compiler_that_fails_is_quoted_and_nothing_is_left(tmp_path):
    compiler = tmp_path / "broken++"
    compiler.write_text(
        "#!/bin/sh\necho 'broken++ 1.0'\necho 'this line is the reason' >&2\n"
        "case $1 in --version) exit 0;; esac\nexit 3\n"
    )
    compiler.chmod(0o755)
    done = actuary("ops", "build", "--out", str(tmp_path / "ops"), CXX=str(compiler))
    assert done.returncode == 1, done.stderr
    assert "exit code 3" in done.stderr
    assert "this line is the reason" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["broken++"]


@pytest.fixture
def slow_compiler(tmp_path, monkeypatch) -> Path:
    """A compiler that fails at the second file, if told to, and else waits on a process of its own, as real ones do."""
    folder = tmp_path / "compiler"
    (folder / "tmp").mkdir(parents=True)
    (folder / "c++").write_text(
        "#!/bin/sh\ncase $* in *--version*) echo slow 1.0; exit 0;; *probe.cpp*) exit 1;; esac\n"
        f"case $FAIL$* in yes*/attention.cpp*) while [ ! -e {folder}/waiting ]; do sleep 0.1; done; exit 3;; esac\n"
        f"sleep 600 &\necho $! >> {folder}/waiting\nwait\n"
    )
    (folder / "c++").chmod(0o755)
    monkeypatch.setenv("CXX", str(folder / "c++"))
    monkeypatch.setenv("TMPDIR", str(folder / "tmp"))
    return folder


def ended(folder: Path, most: int) -> bool:
    """Whether at most so many compilers were started, and none of them runs."""
    pids = [int(line) for line in (folder / "waiting").read_text().split()]
    alive = [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]
    return 0 < len(pids) <= most and not alive and not list((folder / "tmp").iterdir())


def test_the_first_compile_that_fails_ends_the_others(slow_compiler, tmp_path, monkeypatch):
    monkeypatch.setenv("FAIL", "yes")
    monkeypatch.setattr(build, "cores", lambda: 2)
    monkeypatch.setattr(build.tempfile, "tempdir", str(slow_compiler / "tmp"))
    with pytest.raises(ActuaryError, match="failed with exit code 3"):
        build.build(tmp_path / "ops", cuda=False)
    assert ended(slow_compiler, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["compiler"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_process_alone_ends_its_compilers_and_leaves_nothing(slow_compiler, tmp_path, number):
    command = [*ACTUARY, "ops", "build", "--no-cuda", "--out", str(tmp_path / "ops")]
    # In the background of a shell without job control, as under nohup, SIGINT is ignored, and children inherit that.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heed)
    deadline = time.monotonic() + HANG_S
    while not (slow_compiler / "waiting").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    said = process.communicate(timeout=HANG_S)[1]
    assert process.returncode == {signal.SIGINT: 1, signal.SIGTERM: 143}[number], said
    assert "Traceback" not in said
    assert ended(slow_compiler, cores())
    assert [path.name for path in tmp_path.iterdir()] == ["compiler"]


@pytest.mark.parametrize("attempts", [1, 3])
def test_two_builds_at_once_into_one_folder_both_end_and_the_last_stays(tmp_path, monkeypatch, attempts: int):
    """Between the two renames of one, another's folder takes the place, several times over."""
    rename, place = Path.rename, tmp_path / "ops"
    others = iter(range(attempts))

    def late(path: Path, target: Path) -> Path:
        if target == place and next(others, None) is not None:
            place.mkdir()
            (place / "theirs").touch()
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", late)
    with new_folder(place) as folder:
        (folder / "ours").touch()
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["ops", "ops/ours"]


def test_an_editors_file_among_the_sources_changes_nothing(tmp_path, monkeypatch):
    native = shutil.copytree(build.NATIVE, tmp_path / "native")
    monkeypatch.setattr(build, "NATIVE", native)
    tools = build.Toolchain("c++", "1", None, "")
    before = build._hash_of_inputs(tools, {})
    (native / ".cpu.cpp.swp").write_bytes(b"b0VIM\xff\xfe")
    assert build._hash_of_inputs(tools, {}) == before
    (native / "cpu.cpp").write_bytes(b"// \xff")
    assert build._hash_of_inputs(tools, {}) != before


def test_paths_with_brackets_are_printed_as_they_are(fused, tmp_path):
    (tmp_path / "x[").mkdir()
    folder = copied(fused, tmp_path / "x[" / "y]")
    done = actuary("ops", "build", "--no-cuda", "--out", str(folder))
    assert done.returncode == 0, done.stderr
    assert f"{folder}/{library.BINARY}: " in done.stderr


@pytest.fixture(params=["g++", "clang++"])
def compiler(request, monkeypatch) -> str:
    if not shutil.which(request.param):
        pytest.skip(f"no {request.param}")
    monkeypatch.setenv("CXX", request.param)
    return request.param


def test_either_compiler_builds_what_formulas_hold_without_a_warning(compiler, tmp_path, monkeypatch):
    """Minimum and maximum, a tensor that is not read, a step that nothing reads, and what vector.cpp declares. What C++
    does not define, such as a null pointer moved on (which clang looks for), ends the process here."""
    traps = ("-fsanitize=undefined", "-fsanitize-undefined-trap-on-error")
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, *traps))

    def dead(x):
        torch.exp(x)
        return torch.clamp(x, -1, 1)

    records = {
        "one_side": Activation("one_side", lambda gate, up: torch.sigmoid(gate), "gated", "a test"),
        "dead": Activation("dead", dead, "pointwise", "a test"),
        "erf": get("gelu"),
        "mish": get("mish"),
    }
    monkeypatch.setattr(build, "elementwise", lambda: {name: trace(record) for name, record in records.items()})
    built, _ = build.build(tmp_path / "ops", cuda=False, strict=True)
    assert (built.vector_math == "libmvec") <= (compiler == "g++"), "clang has no libmvec to call"
    for name in ("one_side", "dead"):
        feeds = probes(records[name], np.random.default_rng(3))
        worst_ratio(records[name], feeds, run(one_node(records[name]), feeds, built), error_bound.KERNEL)


def test_a_folder_of_other_things_is_not_replaced(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(BadInput, match=r"holds 'thesis.tex', which is none of ours"):
        build.build(tmp_path, cuda=False)


def test_cuda_without_nvcc_is_refused(monkeypatch, tmp_path):
    if not shutil.which("c++"):
        pytest.skip("no C++ compiler")
    done = actuary("ops", "build", "--cuda", "--out", str(tmp_path / "ops"), NVCC="/nonexistent/nvcc")
    assert done.returncode == 2, done.stderr
    assert "NVCC='/nonexistent/nvcc' is not a program on PATH" in done.stderr
    monkeypatch.delenv("NVCC", raising=False)
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    with pytest.raises(BadInput, match="--cuda needs nvcc"):
        build.build(tmp_path / "ops", cuda=True)


def test_a_plain_compiler_without_libmvec_builds_and_is_right(fused, tmp_path, monkeypatch):
    """What clang or another C library leaves: no vector functions, the baseline's instructions, portable float16."""
    monkeypatch.setattr(build, "LIBMVEC_PROBE", "#error no libmvec here")
    monkeypatch.setattr(build, "ISAS", {})
    monkeypatch.setattr(build, "elementwise", lambda: {name: trace(get(name)) for name in ("gelu", "swiglu", "mish")})
    plain, _ = build.build(tmp_path / "ops", cuda=False)
    assert plain.vector_math == "exp, tanh and erf only"
    assert plain.isas == [platform.machine().replace("x86_64", "x86-64")]
    for name, type in itertools.product(plain.activations, ("float32", "float16")):
        feeds = probes(get(name), np.random.default_rng(2), True, type)
        worst_ratio(get(name), feeds, run(one_node(get(name), None, True, type), feeds, plain), error_bound.KERNEL)


def device_code(binary: Path) -> list[tuple[str, int]]:
    """("ptx" or "elf", architecture) of all device code in a library, as cuobjdump lists it.

    A fat binary is a header of magic number, version, its own size and that of the entries; an entry's header begins
    with its kind (1 or 2), and has its own and its code's size at 4 and 8, the architecture at 28.
    """
    data, found, at = binary.read_bytes(), [], 0
    while (at := data.find(struct.pack("<IH", 0xBA55ED50, 1), at)) >= 0:
        header, size = struct.unpack_from("<HQ", data, at + 6)
        entry, at = at + header, at + header + size
        while entry < at:
            kind, _, own, code = struct.unpack_from("<HHIQ", data, entry)
            found.append(({1: "ptx", 2: "elf"}[kind], struct.unpack_from("<I", data, entry + 28)[0]))
            entry += own + code
    return found


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc here: the CUDA half is compiled where it is")
def test_the_cuda_half_compiles_and_loads_without_a_gpu(tmp_path):
    """Every activation for every architecture, 38 s of processor time with the CPU half; PTX of the oldest is for those
    without code of their own. On a machine without CUDA the library loads, and its CPU half runs."""
    both, _ = build.build(tmp_path / "ops", cuda=True)
    assert both.cuda == ["80", "89", "90", "120"]
    assert set(both.activations) == set(FUSED)
    code = device_code(both.path)
    assert {("ptx", 80), *(("elf", int(arch)) for arch in both.cuda)} <= set(code)
    if shutil.which("cuobjdump"):
        command = ["cuobjdump", "-lelf", "-lptx", str(both.path)]
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        named = re.findall(r"sm_(\d+)[a-z]?\.(cubin|ptx)", listed)
        assert sorted(code) == sorted(("elf" if kind == "cubin" else kind, int(arch)) for arch, kind in named)
    needed = subprocess.run(["ldd", both.path], capture_output=True, text=True).stdout
    assert not re.search(r"libcud|not found", needed), (
        "CUDA's runtime is inside, and its driver looked for when it runs"
    )
    feeds = probes(get("swiglu"), np.random.default_rng(2))
    worst_ratio(get("swiglu"), feeds, run(one_node(get("swiglu")), feeds, both), error_bound.KERNEL)
