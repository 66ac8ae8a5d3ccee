// Int8Linear: y = x @ W + bias by whole numbers, each row of x with a step of its own, so that a row's answer does not
// depend on the rows beside it. Its forms take in what stands before it and after it: a norm of x, a sum with y.
//
//   int8_linear.cpp   the operator: shapes and types of a call, and how it is cut for threads
//   int8_loops.cpp    the loops, compiled once for each instruction set: AVX-512 VNNI, AVX2, plain C++
//
// What it computes, in float32 but for the sum; rounding to the nearest, ties to even:
//
//   least = min(x, 0), largest = max(x, 0)            of a row
//   step  = max(largest / 255 - least / 255, kTiny)   NaN where the row holds NaN or an infinity
//   zero  = round(-least * (1 / step))
//   q     = min(round(x * (1 / step)) + zero, 255)    never below 0: x is not below least
//   y     = (sum(q w) - zero * sums) * W's step * step + bias (+ residual)
//
// export/ops/int8_function.py says the same in standard operators, to the last bit but for the norm's numbers.
#pragma once

#include <cstdint>
#include <vector>

#include "ort_abi.h"

namespace actuary {

// W lies as panels [ceil(N / 64), K / 4, 64, 4]: 64 columns, and of each four rows in a lane of vpdpbusd. A panel of
// 384 rows stays in the first-level cache for all rows of x; columns past N are 0.
constexpr int64_t kPanel = 64;
constexpr int64_t kDepth = 4;
constexpr float kTiny = 1e-35f;         // whose inverse is a float; the step of a row of zeros
constexpr int64_t kMostRows = 1 << 16;  // of W: 255 * 127 * K stays within int32

// What is done to a row before its range is taken: x / sqrt(mean(x^2) + epsilon) * gain, or, centred, that of
// x - mean(x), + shift.
struct Int8Norm {
  const float *gain, *shift;  // [K]; null: no norm; shift null: not centred
  float epsilon;
};

// One panel: `columns` of its 64 count.
struct Int8Panel {
  const int8_t* weights;
  const int32_t* sums;  // of each column of W
  const float *step, *bias;
  int64_t K, columns;
};

struct Int8Loops {
  // x [rows, K] -> q [rows, K], and of each row its step and zero. `room` [K] is for the norm.
  void (*quantise)(const float* x, int64_t rows, int64_t K, const Int8Norm& norm, float* room, uint8_t* q, float* step,
                   int32_t* zero);
  // y [rows, columns], its rows `stride` apart; `residual` as y, or null. They may be one.
  void (*multiply)(const uint8_t* q, const float* step, const int32_t* zero, int64_t rows, const Int8Panel& panel,
                   const float* residual, float* y, int64_t stride);
};

// For op.cpp's domain.
const std::vector<const ort::CustomOp*>& linear_ops(ort::Api api);

}  // namespace actuary
