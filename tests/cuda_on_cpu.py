"""The CUDA kernels on a machine without a device: cuda.cu compiled by the C++ compiler, its threads run one by one.

A stand-in for nvcc takes the real build's commands, so that everything but the device is what it will be: the printed
functors, the index arithmetic, the packs and their alignment (trapped where it is wrong), the grid's limits, the choice
of form by type. ONNX Runtime sees the CUDA operators on its CPU provider, bfloat16 included, and its own float ones not
at all.
"""

from __future__ import annotations

import re
import stat
import sys
from pathlib import Path

import pytest

from export.ops import build
from export.ops.library import Library

RUNTIME = """
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#define __global__
#define __device__
#define __launch_bounds__(n)
struct Index { unsigned x; };
static thread_local Index gridDim, blockIdx, threadIdx;
using cudaError_t = int;
using cudaStream_t = void*;
constexpr int cudaSuccess = 0, cudaDevAttrMultiProcessorCount = 16;
static thread_local int last_error = 0;
inline int cudaGetLastError() { const int error = last_error; last_error = 0; return error; }
inline int cudaGetDevice(int* device) { return *device = 0; }
inline int cudaDeviceGetAttribute(int* value, int, int) { *value = 2; return 0; }  // so few that every grid loops
inline const char* cudaGetErrorString(int error) {
  return error == 9 ? "invalid configuration argument" : "not the provider's stream";
}
template <class Kernel, class Call>
void launch_here(Kernel kernel, unsigned blocks, unsigned threads, void* stream, const Call& call) {
  if (blocks == 0 || blocks > 0x7fffffffu) { last_error = 9; return; }
  if (stream) { last_error = 400; return; }  // the CPU provider has none: anything else was not read from it
  gridDim.x = blocks;
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
    for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x) kernel(call);
  }
}
"""
FP16 = """
#pragma once
#include <cstdint>
#include <cstring>
struct __half { uint16_t bits; };
inline float __half2float(__half x) { _Float16 y; std::memcpy(&y, &x, 2); return y; }
inline __half __float2half_rn(float x) { const _Float16 y = x; __half z; std::memcpy(&z, &y, 2); return z; }
"""
BF16 = """
#pragma once
#include <cstdint>
#include <cstring>
struct __nv_bfloat16 { uint16_t bits; };
inline float __bfloat162float(__nv_bfloat16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16; float y; std::memcpy(&y, &bits, 4); return y;
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  uint32_t bits; std::memcpy(&bits, &x, 4);
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}
"""
TRAPS = "-fsanitize=undefined -fsanitize-undefined-trap-on-error"  # a pack that is not aligned ends the process
NVCC = """#!{python}
import os, sys
given = sys.argv[1:]
if "--version" in given:
    print("a stand-in, release 0")
elif "--list-gpu-code" in given:
    print("sm_80 sm_89 sm_90 sm_120")
else:
    made = ["c++", "-fPIC", "-fvisibility=hidden", "-I{shim}", *"{traps}".split()]
    while given:
        word = given.pop(0)
        if word in ("--threads", "-ccbin", "-cudart"):
            given.pop(0)
        elif word == "-Xlinker":
            made.append("-Wl," + given.pop(0))
        elif word.endswith(".cu"):
            made += ["-x", "c++", word]
        elif not word.startswith(("-gencode", "-Xcompiler")):
            made.append(word)
    os.execvp(made[0], made)
"""


def replaced(text: str, pattern: str, by: str) -> str:
    new, times = re.subn(pattern, by, text)
    assert times == 1, f"{pattern} stands {times} times in the source"
    return new


def built(folder: Path, *changes: tuple[str, str]) -> Library:
    """The library of all activations into `folder`, its CUDA operators as the CPU's.

    Args:
        changes: of cuda.cu, (pattern, by): faults that must be seen.
    """
    native, shim, nvcc = folder / "native", folder / "shim", folder / "nvcc"
    native.mkdir(parents=True)
    shim.mkdir()
    for source in build.NATIVE.iterdir():
        text = source.read_text()
        if source.name == "cuda.cu":
            for pattern, by in changes:
                text = replaced(text, pattern, by)
            text = replaced(text, r"<<<(.*), kThreads, 0, stream>>>\(call\)", r", \1, kThreads, stream, call)")
            text = replaced(text, r"  kernel<F, T, kWidth>(?=,)", "  launch_here(kernel<F, T, kWidth>")
        if source.name == "op.cpp":
            text = replaced(text, "CUDAExecutionProvider", "CPUExecutionProvider")
            text = replaced(text, r"\{\{false, ort::kFloat\},\s*\{false, ort::kFloat16\},", "{")
            text = replaced(text, r"void\* stream = nullptr;", "void* stream = &stream;")
        (native / source.name).write_text(text)
    for name, text in (("cuda_runtime.h", RUNTIME), ("cuda_fp16.h", FP16), ("cuda_bf16.h", BF16)):
        (shim / name).write_text(text)
    nvcc.write_text(NVCC.format(python=sys.executable, shim=shim, traps=TRAPS))
    nvcc.chmod(nvcc.stat().st_mode | stat.S_IXUSR)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NVCC", str(nvcc))
        patch.setattr(build, "NATIVE", native)
        return build.build(folder / "ops", cuda=True)[0]
