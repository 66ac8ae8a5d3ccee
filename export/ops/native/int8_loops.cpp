// The loops of Int8Linear (int8_linear.h), compiled once for each instruction set, ACTUARY_ISA its name here.
//
// All give the same numbers, but for the norm's: sums are exact, and each float32 operation rounds once (build.py forbids contraction).
#include <algorithm>
#include <cmath>
#include <cstring>

#include "int8_linear.h"

#if defined(__AVX512VNNI__) || defined(__AVX2__)
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 says so of its own header (bug 105593)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#endif

namespace {
using actuary::Int8Norm;
using actuary::Int8Panel;
using actuary::kDepth;
using actuary::kPanel;

struct Range {
  float least, largest;  // with 0 between them
  float poison;          // 0; NaN where the row holds NaN or an infinity
};

struct Scale {
  float step, inverse, zero;
};

Scale scale_of(const Range& range) {
  if (range.poison != 0.0f) return {range.poison, 0.0f, 0.0f};
  const float step = std::max(range.largest / 255.0f - range.least / 255.0f, actuary::kTiny);
  const float inverse = 1.0f / step;
  return {step, inverse, std::nearbyint(-range.least * inverse)};
}

#if defined(__AVX512VNNI__)
constexpr int kRows = 4;  // 16 sums, 4 of weights, 1 of x: 465 GOP/s on a core of EPYC 9004, one vpdpbusd a cycle

Range range_of(const float* x, int64_t K) {
  __m512 least = _mm512_setzero_ps(), largest = least, poison = least;
  const auto take = [&](__m512 v) {
    least = _mm512_min_ps(least, v);
    largest = _mm512_max_ps(largest, v);
    poison = _mm512_fmadd_ps(v, _mm512_setzero_ps(), poison);
  };
  int64_t k = 0;
  for (; k + 16 <= K; k += 16) take(_mm512_loadu_ps(x + k));
  if (k < K) take(_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << (K - k)) - 1), x + k));
  return {_mm512_reduce_min_ps(least), _mm512_reduce_max_ps(largest), _mm512_reduce_add_ps(poison)};
}

void quantise_row(const float* x, int64_t K, const Scale& scale, uint8_t* q) {
  const __m512 inverse = _mm512_set1_ps(scale.inverse);
  const __m512i zero = _mm512_set1_epi32(static_cast<int>(scale.zero));
  const auto rounded = [&](__m512 v) {
    return _mm512_cvtusepi32_epi8(_mm512_add_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(v, inverse)), zero));
  };
  int64_t k = 0;
  for (; k + 16 <= K; k += 16) _mm_storeu_si128(reinterpret_cast<__m128i*>(q + k), rounded(_mm512_loadu_ps(x + k)));
  if (k < K) {
    const auto rest = static_cast<__mmask16>((1u << (K - k)) - 1);
    _mm_mask_storeu_epi8(q + k, rest, rounded(_mm512_maskz_loadu_ps(rest, x + k)));
  }
}

template <int R>
void tile(const uint8_t* q, const float* step, const int32_t* zero, const Int8Panel& panel,
          const float* residual, float* y, int64_t stride) {
  __m512i sum[R][4];
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < 4; ++v) sum[r][v] = _mm512_setzero_si512();
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < 4; ++v) __builtin_prefetch(y + r * stride + 16 * v, 1);
  }
  const int8_t* w = panel.weights;
  for (int64_t k = 0; k < panel.K; k += kDepth, w += kPanel * kDepth) {
    __m512i weights[4];
    for (int v = 0; v < 4; ++v) weights[v] = _mm512_loadu_si512(w + 64 * v);
    for (int r = 0; r < R; ++r) {
      int32_t four;
      std::memcpy(&four, q + r * panel.K + k, sizeof four);
      const __m512i x = _mm512_set1_epi32(four);
      for (int v = 0; v < 4; ++v) sum[r][v] = _mm512_dpbusd_epi32(sum[r][v], x, weights[v]);
    }
  }
  for (int v = 0; v < 4; ++v) {
    const int64_t left = std::clamp<int64_t>(panel.columns - 16 * v, 0, 16);
    const auto mask = static_cast<__mmask16>((1u << left) - 1);
    const __m512i sums = _mm512_maskz_loadu_epi32(mask, panel.sums + 16 * v);
    const __m512 steps = _mm512_maskz_loadu_ps(mask, panel.step + 16 * v);
    const __m512 bias = _mm512_maskz_loadu_ps(mask, panel.bias + 16 * v);
    for (int r = 0; r < R; ++r) {
      const __m512i moved = _mm512_sub_epi32(sum[r][v], _mm512_mullo_epi32(_mm512_set1_epi32(zero[r]), sums));
      const __m512 scaled = _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(moved), steps), _mm512_set1_ps(step[r]));
      __m512 sum_of_row = _mm512_add_ps(scaled, bias);
      if (residual) {
        sum_of_row = _mm512_add_ps(sum_of_row, _mm512_maskz_loadu_ps(mask, residual + r * stride + 16 * v));
      }
      _mm512_mask_storeu_ps(y + r * stride + 16 * v, mask, sum_of_row);
    }
  }
}

#elif defined(__AVX2__)
constexpr int kRows = 3;  // 12 sums, 1 of weights, 3 of x: all 16 registers

Range range_of(const float* x, int64_t K) {
  __m256 least = _mm256_setzero_ps(), largest = least, poison = least;
  int64_t k = 0;
  for (; k + 8 <= K; k += 8) {
    const __m256 v = _mm256_loadu_ps(x + k);
    least = _mm256_min_ps(least, v);
    largest = _mm256_max_ps(largest, v);
    poison = _mm256_add_ps(_mm256_mul_ps(v, _mm256_setzero_ps()), poison);
  }
  float lows[8], highs[8], poisons[8];
  _mm256_storeu_ps(lows, least);
  _mm256_storeu_ps(highs, largest);
  _mm256_storeu_ps(poisons, poison);
  Range range{0, 0, 0};
  const auto take = [&](float low, float high, float poisoned) {
    range = {std::min(range.least, low), std::max(range.largest, high), range.poison + poisoned};
  };
  for (int i = 0; i < 8; ++i) take(lows[i], highs[i], poisons[i]);
  for (; k < K; ++k) take(x[k], x[k], x[k] * 0.0f);
  return range;
}

void quantise_row(const float* x, int64_t K, const Scale& scale, uint8_t* q) {
  const __m128 inverse = _mm_set1_ps(scale.inverse);
  const __m128i zero = _mm_set1_epi32(static_cast<int>(scale.zero));
  for (int64_t k = 0; k < K; k += 4) {  // K is a multiple of 4
    const __m128i rounded = _mm_add_epi32(_mm_cvtps_epi32(_mm_mul_ps(_mm_loadu_ps(x + k), inverse)), zero);
    const __m128i words = _mm_packs_epi32(rounded, rounded), bytes = _mm_packus_epi16(words, words);
    const int four = _mm_cvtsi128_si32(bytes);
    std::memcpy(q + k, &four, sizeof four);
  }
}

// vpmaddubsw would saturate at 255 * 127 * 2; in 16 bits vpmaddwd cannot. Of each sum's lanes two belong to a column.
template <int R>
void tile(const uint8_t* q, const float* step, const int32_t* zero, const Int8Panel& panel,
          const float* residual, float* y, int64_t stride) {
  for (int64_t column = 0; column < panel.columns; column += 16) {
    __m256i sum[R][4];
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < 4; ++v) sum[r][v] = _mm256_setzero_si256();
    }
    const int8_t* w = panel.weights + column * kDepth;
    for (int64_t k = 0; k < panel.K; k += kDepth, w += kPanel * kDepth) {
      __m256i x[R];
      for (int r = 0; r < R; ++r) {
        int32_t four;
        std::memcpy(&four, q + r * panel.K + k, sizeof four);
        x[r] = _mm256_cvtepu8_epi16(_mm_set1_epi32(four));
      }
      for (int v = 0; v < 4; ++v) {
        const auto* at = reinterpret_cast<const __m128i*>(w + 16 * v);
        const __m256i weights = _mm256_cvtepi8_epi16(_mm_loadu_si128(at));
        for (int r = 0; r < R; ++r) sum[r][v] = _mm256_add_epi32(sum[r][v], _mm256_madd_epi16(x[r], weights));
      }
    }
    const int64_t last = std::min<int64_t>(panel.columns - column, 16);
    for (int r = 0; r < R; ++r) {
      int32_t pairs[32];
      for (int v = 0; v < 4; ++v) _mm256_storeu_si256(reinterpret_cast<__m256i*>(pairs + 8 * v), sum[r][v]);
      for (int64_t i = 0; i < last; ++i) {
        const int64_t n = column + i;
        const auto moved = static_cast<float>(pairs[2 * i] + pairs[2 * i + 1] - zero[r] * panel.sums[n]);
        const float sum_of_row = moved * panel.step[n] * step[r] + panel.bias[n];
        y[r * stride + n] = residual ? sum_of_row + residual[r * stride + n] : sum_of_row;
      }
    }
  }
}

#else
constexpr int kRows = 1;

Range range_of(const float* x, int64_t K) {
  Range range{0, 0, 0};
  for (int64_t k = 0; k < K; ++k) {
    range = {std::min(range.least, x[k]), std::max(range.largest, x[k]), range.poison + x[k] * 0.0f};
  }
  return range;
}

void quantise_row(const float* x, int64_t K, const Scale& scale, uint8_t* q) {
  for (int64_t k = 0; k < K; ++k) {
    const float rounded = std::nearbyint(x[k] * scale.inverse) + scale.zero;
    q[k] = static_cast<uint8_t>(rounded < 255.0f ? std::max(rounded, 0.0f) : 255.0f);  // 255 for NaN too
  }
}

template <int R>
void tile(const uint8_t* q, const float* step, const int32_t* zero, const Int8Panel& panel,
          const float* residual, float* y, int64_t stride) {
  static_assert(R == 1);
  int32_t sum[kPanel] = {};
  const int8_t* w = panel.weights;
  for (int64_t k = 0; k < panel.K; k += kDepth, w += kPanel * kDepth) {
    for (int64_t n = 0; n < kPanel; ++n) {
      for (int64_t i = 0; i < kDepth; ++i) sum[n] += q[k + i] * w[n * kDepth + i];
    }
  }
  for (int64_t n = 0; n < panel.columns; ++n) {
    const auto moved = static_cast<float>(sum[n] - *zero * panel.sums[n]);
    const float sum_of_row = moved * panel.step[n] * *step + panel.bias[n];
    y[n] = residual ? sum_of_row + residual[n] : sum_of_row;
  }
  (void)stride;
}
#endif

void normalise(const float* x, int64_t K, const Int8Norm& norm, float* y) {
  float mean = 0.0f, squares = 0.0f;
  if (norm.shift) {
#pragma omp simd reduction(+ : mean)
    for (int64_t k = 0; k < K; ++k) mean += x[k];
    mean /= static_cast<float>(K);
  }
#pragma omp simd reduction(+ : squares)
  for (int64_t k = 0; k < K; ++k) squares += (x[k] - mean) * (x[k] - mean);
  const float inverse = 1.0f / std::sqrt(squares / static_cast<float>(K) + norm.epsilon);
  if (norm.shift) {
#pragma omp simd
    for (int64_t k = 0; k < K; ++k) y[k] = (x[k] - mean) * inverse * norm.gain[k] + norm.shift[k];
  } else {
#pragma omp simd
    for (int64_t k = 0; k < K; ++k) y[k] = x[k] * inverse * norm.gain[k];
  }
}

void quantise(const float* x, int64_t rows, int64_t K, const Int8Norm& norm, float* room, uint8_t* q, float* step,
              int32_t* zero) {
  for (int64_t r = 0; r < rows; ++r, x += K, q += K) {
    if (norm.gain) normalise(x, K, norm, room);
    const float* from = norm.gain ? room : x;
    const Scale scale = scale_of(range_of(from, K));
    step[r] = scale.step;
    zero[r] = static_cast<int32_t>(scale.zero);
    quantise_row(from, K, scale, q);
  }
}

template <int R>
void rest(const uint8_t* q, const float* step, const int32_t* zero, int64_t rows, const Int8Panel& panel,
          const float* residual, float* y, int64_t stride) {
  if constexpr (R > 0) {
    if (rows == R) return tile<R>(q, step, zero, panel, residual, y, stride);
    rest<R - 1>(q, step, zero, rows, panel, residual, y, stride);
  }
}

void multiply(const uint8_t* q, const float* step, const int32_t* zero, int64_t rows, const Int8Panel& panel,
              const float* residual, float* y, int64_t stride) {
  int64_t r = 0;
  const auto beside = [&] { return residual ? residual + r * stride : nullptr; };
  for (; r + kRows <= rows; r += kRows) {
    tile<kRows>(q + r * panel.K, step + r, zero + r, panel, beside(), y + r * stride, stride);
  }
  rest<kRows - 1>(q + r * panel.K, step + r, zero + r, rows - r, panel, beside(), y + r * stride, stride);
}
}  // namespace

#define ACTUARY_JOIN(a, b) a##b
#define ACTUARY_TABLE(isa) ACTUARY_JOIN(int8_, isa)
namespace actuary {
extern const Int8Loops ACTUARY_TABLE(ACTUARY_ISA);
const Int8Loops ACTUARY_TABLE(ACTUARY_ISA) = {quantise, multiply};
}  // namespace actuary
