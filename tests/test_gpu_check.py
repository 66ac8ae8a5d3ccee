"""`make gpu-check` as far as it goes without a device: its parts on the CPU, its report, its refusals; and the CUDA
kernels themselves, compiled for the CPU and run thread by thread (cuda_on_cpu.py)."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time

import cuda_on_cpu
import numpy as np
import pytest
import torch
from conftest import HANG_S

from actuary import BadInput, GateFailed
from export import onnx_file
from export.graph import build as build_graph
from export.ops import build, error_bound, gpu_check, gpu_measure
from export.ops.check import one_node, open_session, probes, worst_ratio
from export.ops.device import ON_CPU, ON_CUDA, run_once
from export.ops.gpu_measure import (
    SHAPED,
    Case,
    ModelCase,
    check_kernels,
    interleaved,
    measure_model,
    measure_speed,
)
from export.ops.gpu_report import markdown
from export.ops.trace import trace
from models.activations import get


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """The CUDA kernels of one activation of each kind, on the CPU."""
    if not shutil.which("c++"):
        pytest.skip("no C++ compiler")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "elementwise", lambda: {name: trace(get(name)) for name in SHAPED})
        return cuda_on_cpu.built(tmp_path_factory.mktemp("emulated") / "cuda")


@pytest.fixture
def measured() -> dict:
    """A result that holds a row of everything, with a failure and what did not run."""
    way = {"us": 2.5, "quartiles_us": [2.0, 3.0], "gb_per_s": 1230.0, "share_of_copy": 0.91, "of_unfused": 0.33}
    result = gpu_check.empty({"date": "2026-11-21", "device": "a device", "driver": "580 | 1"})
    result["kernels"] = [
        {"activation": "gelu", "type": "float16", "ratio": 0.5, "failed": ""},
        {"activation": "gelu", "type": "float32", "ratio": None, "failed": "misses parity"},
    ]
    result["speed"] = [
        {"activation": "swiglu", "type": "bfloat16", "rows": 16, "hidden": 1024, "copies": 16, "bytes": 98304,
         "rounds": 9, "failed": {"unfused": "no kernel\nfor | this"}, "fused": way, "copy": way},
    ]  # fmt: skip
    latency = {"batch": 1, "tokens": 128, "fused": {"ms": 1.5, "quartiles_ms": [1.4, 1.6]}}
    result["models"] = [
        {"model": "10M", "precision": "fp32", "flavor": "ort", "failed": {}, "skipped": "", "latency": [latency],
         "max_rel_fused": 1e-6, "bound": 1e-5},
        {"model": "10M", "precision": "bf16", "flavor": "ort", "failed": {}, "skipped": "export has no precision bf16"},
    ]  # fmt: skip
    result["tests"] = {"exit_code": 0, "said": ["...", "2 passed in 3.21s"]}
    result["failures"] = ["activation 'gelu' misses parity"]
    return result


# --- the kernels of cuda.cu -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("type", ["float32", "float16", "bfloat16"])
def test_the_cuda_kernels_index_and_round_rightly(emulated, type: str):
    """Every extreme and every shape, biased too, on grids that loop: within the bound, and nothing written outside."""
    rows = list(check_kernels([get(name) for name in SHAPED], emulated, ON_CPU, (type,)))
    assert [(row["activation"], row["failed"]) for row in rows] == [(name, "") for name in SHAPED]
    assert all(0 < row["ratio"] <= 1 for row in rows)


def test_a_kernel_of_another_formula_is_reported(emulated):
    """The library's gelu is the erf form; a record of that name that means the tanh form must miss."""
    impostor = dataclasses.replace(get("gelu_tanh"), name="gelu")
    (row,) = check_kernels([impostor], emulated, ON_CPU, ("float32",))
    assert "activation 'gelu' misses parity at" in row["failed"]
    assert "the kernel on CPUExecutionProvider (float32)" in row["failed"]
    assert row["ratio"] is None
    result = gpu_check.empty({})
    list(gpu_check.kernels(result, emulated, ON_CPU, [impostor, get("swiglu")], ("float32",)))
    assert [bool(row["failed"]) for row in result["kernels"]] == [True, False]
    assert len(result["failures"]) == 1


def test_half_an_ulp_is_what_a_16_bit_result_may_miss(emulated):
    """The bound of bfloat16 is not so wide that a wrong rounding passes: one step up is refused."""
    record, rng = get("swiglu"), np.random.default_rng(3)
    feeds = probes(record, rng, False, "bfloat16")
    got = run_once(one_node(record, None, False, "bfloat16"), feeds, (len(feeds["x"]), 8), "bfloat16", ON_CPU, emulated)
    worst_ratio(record, feeds, got, error_bound.KERNEL, type="bfloat16")
    with pytest.raises(GateFailed, match="misses parity"):
        worst_ratio(record, feeds, got * np.float32(1 + 2**-7), error_bound.KERNEL, type="bfloat16")


def test_a_kernel_that_goes_one_too_far_is_seen(tmp_path, monkeypatch):
    if not shutil.which("c++"):
        pytest.skip("no C++ compiler")
    monkeypatch.setattr(build, "elementwise", lambda: {"relu": trace(get("relu"))})
    library = cuda_on_cpu.built(tmp_path / "cuda", (r"at < total;", "at <= total;"))
    (row,) = check_kernels([get("relu")], library, ON_CPU, ("float16",))
    assert "the kernel wrote outside its output" in row["failed"]


def test_a_provider_that_does_not_run_is_an_error_and_no_fallback(fused):
    if torch.cuda.is_available():
        pytest.skip("CUDA runs here")
    with pytest.raises(GateFailed, match="CUDAExecutionProvider"):
        open_session(one_node(get("gelu")), fused, ON_CUDA.provider)


# --- speed and models -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("type", ["float32", "float16", "bfloat16"])
def test_every_way_is_measured_and_one_that_does_not_run_says_why(emulated, monkeypatch, type: str):
    monkeypatch.setattr(torch, "compile", lambda function, **_: 1 / 0)
    case = Case(get("swiglu"), type, 4, 64)
    row = measure_speed(case, emulated, ON_CPU, rounds=3, most_bytes=3 * case.bytes_moved)
    assert row["bytes"] == 4 * 64 * 3 * (4 if type == "float32" else 2)
    assert row["copies"] == 3
    assert row["failed"].pop("compiled") == "ZeroDivisionError: division by zero"
    if type == "bfloat16":  # ONNX Runtime's own operators have no such kernel on the CPU
        assert "Could not find an implementation" in row["failed"].pop("unfused")
    assert row["failed"] == {}
    for way in {"fused", "eager", "copy"} | ({"unfused"} if type != "bfloat16" else set()):
        low, high = row[way]["quartiles_us"]
        assert 0 < low <= row[way]["us"] <= high
        assert row[way]["gb_per_s"] > 0
    assert row["copy"]["share_of_copy"] == 1


def test_without_a_copy_the_other_ways_are_measured_and_reported(fused, monkeypatch, measured):
    every = gpu_measure.made_and_run
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(
        gpu_measure, "made_and_run", lambda makers, place: every({**makers, "copy": lambda: 1 / 0}, place)
    )
    row = measure_speed(Case(get("swiglu"), "float32", 4, 64), fused, ON_CPU, rounds=3, most_bytes=1)
    assert row["failed"] == {"copy": "ZeroDivisionError: division by zero"}
    assert row["fused"]["us"] > 0
    assert "share_of_copy" not in row["fused"]
    measured["speed"] = [row]
    assert "copy: ZeroDivisionError" in markdown(measured)


def test_samples_are_interleaved():
    order = []
    ways = {way: lambda way=way: (order.append(way), time.sleep(0.005)) for way in ("a", "b", "c")}
    samples = interleaved(ways, ON_CPU, rounds=5)
    assert all(len(values) == 5 and min(values) >= 0.005 for values in samples.values())
    rounds = [order[i : i + 3] for i in range(9, len(order), 3)]  # after three runs of each that find how many to take
    assert all(sorted(each) == ["a", "b", "c"] for each in rounds)
    assert len({tuple(each) for each in rounds}) > 1


def test_a_model_is_exported_held_to_torch_and_timed(fused, corpus, tmp_path, monkeypatch):
    from models.corpus import Corpus

    monkeypatch.setattr(Corpus, "read", lambda *_: corpus)
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    shape = {"layers": 1, "dim": 32, "heads": 2, "context": 16, "vocab_size": 300}
    row = measure_model(
        ModelCase("tiny", shape, "swiglu", "fp32", "ort"), fused, ON_CPU, tmp_path, batches=(1, 3), tokens=16, rounds=3
    )
    assert row["failed"] == {}
    assert max(row["max_rel_fused"], row["max_rel_unfused"]) <= row["bound"]
    assert [(latency["batch"], latency["tokens"]) for latency in row["latency"]] == [(1, 16), (3, 16)]
    assert all({"fused", "unfused", "eager", "compiled"} <= set(latency) for latency in row["latency"])
    skipped = measure_model(ModelCase("tiny", shape, "swiglu", "fp7", "ort"), fused, ON_CPU, tmp_path, (1,), 16, 3)
    assert skipped["skipped"] == "export has no precision fp7"


def test_a_model_that_would_visit_the_cpu_is_not_timed_on_the_device(fused, corpus, tmp_path, monkeypatch):
    """As float32 with GroupQueryAttention would, which no export writes now."""
    from export import exporter
    from models.corpus import Corpus

    monkeypatch.setattr(Corpus, "read", lambda *_: corpus)
    monkeypatch.setattr(exporter, "build", lambda decoder, flavor, cache: build_graph(decoder, flavor))
    shape = {"layers": 2, "dim": 32, "heads": 2, "context": 16, "vocab_size": 300}
    on_cuda = fused.model_copy(update={"cuda": ["90"]})
    row = measure_model(ModelCase("tiny", shape, "swiglu", "fp32", "ort"), on_cuda, ON_CUDA, tmp_path, (1,), 16, 3)
    assert "no kernel for" in row["skipped"]
    assert "GroupQueryAttention" in row["skipped"]
    assert (row["failed"], row["latency"]) == ({}, [])
    assert gpu_measure.foreseen_on_cuda(onnx_file.read(tmp_path / "tiny-fp32-ort" / "model.onnx"), "fp16") == ""


def test_nothing_that_it_exports_is_known_to_visit_the_cpu(tiny_checkpoint, tmp_path):
    from export import exporter

    for precision, flavor in gpu_check.EXPORTS:
        path, _ = exporter.export_bundle(
            tiny_checkpoint("swiglu"), tmp_path, f"{precision}-{flavor}", flavor=flavor, precision=precision
        )
        assert gpu_measure.foreseen_on_cuda(onnx_file.read(path / "model.onnx"), precision) == ""


def test_an_nvcc_that_is_none_is_named_with_all_else_that_is_missing(monkeypatch):
    monkeypatch.setenv("NVCC", "ccache nvcc")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BadInput, match=r"sees no CUDA device.*NVCC='ccache nvcc' is not a program on PATH"):
        gpu_check.found()


@pytest.mark.parametrize(
    ("code", "last", "failures"), [(0, "2 passed, 1 skipped in 9s", 0), (0, "3 skipped in 9s", 1), (1, "1 failed", 1)]
)
def test_tests_that_all_skip_are_a_failure(monkeypatch, code: int, last: str, failures: int):
    done = subprocess.CompletedProcess([], code, f"...\n{last}\n", "")
    monkeypatch.setattr(gpu_check.subprocess, "run", lambda *_, **__: done)
    result = gpu_check.empty({})
    list(gpu_check.tests(result, 1))
    assert (result["tests"]["exit_code"], len(result["failures"])) == (code, failures)


def test_speed_stops_in_time(fused):
    result = gpu_check.empty({})
    assert list(gpu_check.speed(result, fused, ON_CPU, 3, until=0)) == []
    assert result["notes"] == ["speed stopped for --minutes after 0 of 75 cases"]


# --- the report and the run -----------------------------------------------------------------------------------------


def test_the_report_is_tables_for_the_log(measured):
    text = markdown(measured)
    lines = text.splitlines()
    assert lines[0] == "## 2026-11-21: on a CUDA device"
    assert "driver 580 / 1" in text
    assert "| gelu | 0.50 | missed |" in lines
    took = "2.5 (2 to 3) | - | - | - | 2.5 (2 to 3) | 1230 | 0.91 | 0.33"
    assert f"| swiglu | bfloat16 | 16 | 1024 | {took} |" in lines
    assert "- does not run: bfloat16, unfused: no kernel for / this" in lines
    assert "| 10M | fp32, ort | 1 x 128 | 1.0e-06 (1.0e-05) | 1.5 (1.4 to 1.6) | - | - | - |" in lines
    assert "| 10M | bf16, ort | - | export has no precision bf16 | - | - | - | - |" in lines
    assert "1 of 2 within it" in text
    assert "`pytest -m gpu`: 2 passed in 3.21s." in lines
    tables = [line for line in lines if line.startswith("|")]
    assert all(line.endswith("|") for line in tables)


def test_a_broken_part_and_ctrl_c_keep_what_was_measured(measured, tmp_path):
    def breaks():
        yield
        raise RuntimeError("the device fell off\nthe bus")

    def measures():
        measured["speed"].append(dict(measured["speed"][0], rows=17))
        yield

    def interrupted():
        yield
        raise KeyboardInterrupt

    steps = {"kernels": (breaks, 2), "speed": (measures, 1), "models": (interrupted, 2), "tests": (breaks, 1)}
    gpu_check.check(measured, tmp_path, steps)
    kept = json.loads((tmp_path / "gpu-check.json").read_text())
    assert kept["failures"][1:] == [
        "kernels: RuntimeError: the device fell off",
        "stopped by Ctrl-C; what was measured before stands",
    ]
    assert [row["rows"] for row in kept["speed"]] == [16, 17]
    text = (tmp_path / "gpu-check.md").read_text()
    assert "- kernels: RuntimeError: the device fell off" in text
    assert "| swiglu | bfloat16 | 17 |" in text


def test_an_empty_result_is_a_report_too():
    assert markdown(gpu_check.empty({})).startswith("## : on a CUDA device")


def gpu_check_says(*arguments: str, cwd, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "export.ops.gpu_check", *arguments],
        cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, timeout=HANG_S,
    )  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_without_a_device_it_says_what_is_missing_and_exits_with_2(tmp_path):
    done = gpu_check_says(cwd=tmp_path, NVCC="")
    assert done.returncode == 2, done.stderr
    assert f"torch {torch.__version__} sees no CUDA device: run this where nvidia-smi lists one" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_part_exits_with_2(tmp_path):
    done = gpu_check_says("--parts", "kernels,sped", cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "unknown part 'sped'; known: kernels, speed, models, tests" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_a_provider_whose_libraries_do_not_load_is_refused_with_the_remedy():
    gpu_check.check_provider("CPUExecutionProvider", "")
    with pytest.raises(BadInput, match=r"CUDAExecutionProvider does not run here \(no libcudnn\); CUDA's and cuDNN's"):
        gpu_check.check_provider("CUDAExecutionProvider", "no libcudnn")


def test_missing_packages_are_named_with_the_remedy(monkeypatch):
    monkeypatch.setattr(gpu_check, "PACKAGES", ("torch", "no_such_package"))
    with pytest.raises(BadInput, match=r"needs the Python packages no_such_package; install them into .* with: pip "):
        gpu_check.found()


def test_all_that_is_missing_is_said_at_once(monkeypatch):
    import onnxruntime

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv("NVCC", raising=False)
    with pytest.raises(BadInput) as refused:
        gpu_check.found()
    said = str(refused.value)
    assert "Tesla T4 has compute capability (7, 5)" in said
    assert "was built without CUDA: pip uninstall onnxruntime" in said
    assert "nvcc is not there: install" in said
