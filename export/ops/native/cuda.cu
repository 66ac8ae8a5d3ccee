// The CUDA half: one kernel over every printed functor, for float, float16 and bfloat16, in float32 arithmetic.
//
// A thread takes 16 bytes at a time (4 floats, 8 halves), so that loads and stores are whole; single elements where H or
// a pointer does not allow it. Kernels go to ONNX Runtime's stream and allocate nothing, so that a CUDA graph can hold
// them.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "activation.h"

namespace actuary {
namespace {
#include "functors.cuh"

constexpr int kThreads = 256;
constexpr int kBlocksPerProcessor = 8;  // 2048 threads: all that a multiprocessor holds
constexpr int kPackBytes = 16;

template <class T, int kWidth>
struct alignas(sizeof(T) * kWidth) Pack {
  T of[kWidth];
};

__device__ float to_float(float x) { return x; }
__device__ float to_float(__half x) { return __half2float(x); }
__device__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ void from_float(float x, float* y) { *y = x; }
__device__ void from_float(float x, __half* y) { *y = __float2half_rn(x); }
__device__ void from_float(float x, __nv_bfloat16* y) { *y = __float2bfloat16_rn(x); }

// y [rows, H] = f(x [rows, kTensors * H] + bias); rows and H counted in packs of kWidth along H. y may be x.
template <class F, class T, int kWidth>
__global__ void __launch_bounds__(kThreads) kernel(Call call) {
  using P = Pack<T, kWidth>;
  float learned[F::kLearned ? F::kLearned : 1];
  for (int i = 0; i < F::kLearned; ++i) learned[i] = to_float(*static_cast<const T*>(call.learned[i]));
  const F f(learned);
  const P *x = static_cast<const P*>(call.x), *bias = static_cast<const P*>(call.bias);
  P* y = static_cast<P*>(call.y);
  const int64_t H = call.H, total = call.rows * H, stride = int64_t{gridDim.x} * kThreads;
  const bool small = total < int64_t{1} << 31;  // a 64-bit division is a function of some hundred instructions
  for (int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x; at < total; at += stride) {
    const int64_t row = small ? static_cast<uint32_t>(at) / static_cast<uint32_t>(H) : at / H;
    const int64_t column = at - row * H, in = row * H * F::kTensors + column;
    const P first = x[in];
    const P second = F::kTensors == 2 ? x[in + H] : first;
    P zero{};
    const P first_bias = bias ? bias[column] : zero;
    const P second_bias = bias && F::kTensors == 2 ? bias[column + H] : zero;
    P result;
    for (int i = 0; i < kWidth; ++i) {
      const float a = to_float(first.of[i]) + (bias ? to_float(first_bias.of[i]) : 0.0f);
      if constexpr (F::kTensors == 2) {
        from_float(f(a, to_float(second.of[i]) + (bias ? to_float(second_bias.of[i]) : 0.0f)), &result.of[i]);
      } else {
        from_float(f(a), &result.of[i]);
      }
    }
    y[at] = result;
  }
}

template <class F, class T, int kWidth>
cudaError_t launch(Call call, cudaStream_t stream) {
  call.H /= kWidth;
  int device = 0, processors = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (status != cudaSuccess) return status;
  const int64_t needed = (call.rows * call.H + kThreads - 1) / kThreads, most = int64_t{kBlocksPerProcessor} * processors;
  kernel<F, T, kWidth><<<static_cast<unsigned>(needed < most ? needed : most), kThreads, 0, stream>>>(call);
  return cudaGetLastError();
}

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % kPackBytes == 0; }

template <class F, class T>
cudaError_t typed(Call call, cudaStream_t stream) {
  constexpr int kWidth = kPackBytes / sizeof(T);
  if (F::kTensors == 1 && !call.bias) {  // rows do not matter: one long one
    call.H *= call.rows;
    call.rows = 1;
  }
  const bool whole = call.H % kWidth == 0 && aligned(call.x) && aligned(call.y) && aligned(call.bias);
  return whole ? launch<F, T, kWidth>(call, stream) : launch<F, T, 1>(call, stream);
}

template <class F>
cudaError_t any(ort::ElementType type, const Call& call, cudaStream_t stream) {
  switch (type) {
    case ort::kFloat: return typed<F, float>(call, stream);
    case ort::kFloat16: return typed<F, __half>(call, stream);
    default: return typed<F, __nv_bfloat16>(call, stream);
  }
}

#define ACTUARY_ROW(name) any<Fused_##name>,
using Any = cudaError_t (*)(ort::ElementType, const Call&, cudaStream_t);
const Any kEvery[] = {ACTUARY_EVERY(ACTUARY_ROW)};

}  // namespace

const char* compute_cuda(int activation, ort::ElementType type, const Call& call, void* stream) {
  const cudaError_t status = kEvery[activation](type, call, static_cast<cudaStream_t>(stream));
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

}  // namespace actuary
