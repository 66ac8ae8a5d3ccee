// What the parts share: one activation as the operators, the host check and the kernels see it.
//
//   op.cpp        an OrtCustomOp per activation, form (plain or biased), element type and provider
//   check.cpp     shapes and types of one call -> Call, or an error that says what is allowed
//   cpu.cpp       threads and float16 around the vector loops
//   vector.cpp    those loops over the printed functors, compiled once for each instruction set; vector_math.h
//   cuda.cu       the device kernels over the same functors
//   functors.h    printed by export/ops/cpp_functor.py, with a table of all activations
#pragma once

#include <cstdint>

#include "ort_abi.h"

namespace actuary {

constexpr int kMaxLearned = 8;  // export/ops/build.py refuses more

// n elements: y[i] = f(x[i]) or f(gate[i], up[i]), after the biases where they are not null. y may be x.
using Segment = void (*)(const float* x, const float* up, const float* bias, const float* up_bias,
                         const float* learned, float* y, int64_t n);

struct Activation {
  const char* name;         // the operator's, "swiglu"
  const char* biased_name;  // "biased_swiglu"
  int tensors;              // 2: x is packed [..., 2H], gate first
  int learned;
  int64_t block;            // elements that are worth another thread
};

extern const Activation kActivations[];
extern const int kActivationCount;

// One call, checked: x [rows, tensors * H] -> y [rows, H].
struct Call {
  const void* x;
  const void* bias;  // [tensors * H], or null
  const void* learned[kMaxLearned];
  void* y;
  int64_t rows, H;
};

// Fills `call` and allocates its output. An error names the value and what is allowed.
ort::Status* check(ort::Api api, ort::Context* context, const Activation& activation, bool biased,
                   ort::ElementType type, Call* call);

// Float or float16, on the threads of ONNX Runtime's own pool.
ort::Status* compute_cpu(ort::Api api, const ort::Context* context, int activation, ort::ElementType type,
                         const Call& call);

#ifdef ACTUARY_CUDA
// Float, float16 or bfloat16, on `stream`. Null, or what CUDA says went wrong.
const char* compute_cuda(int activation, ort::ElementType type, const Call& call, void* stream);
#endif

}  // namespace actuary
