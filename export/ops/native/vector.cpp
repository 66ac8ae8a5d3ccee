// The vector loops: each printed functor over n elements, with and without biases.
//
// Compiled once for each instruction set, ACTUARY_ISA its name here; the compiler's own vector code does the rest.
// Everything but the table has internal linkage: the linker must never take one set's code for another's.
#include <cmath>

#include "activation.h"
#include "isa.h"

#ifdef ACTUARY_LIBMVEC
// glibc has vector versions of these (libmvec); GCC calls them from a loop once it is told so.
#define ACTUARY_SIMD(f) extern "C" __attribute__((simd("notinbranch"))) float f(float) noexcept;
ACTUARY_SIMD(expm1f) ACTUARY_SIMD(logf) ACTUARY_SIMD(log1pf) ACTUARY_SIMD(sinf) ACTUARY_SIMD(cosf) ACTUARY_SIMD(atanf)
extern "C" __attribute__((simd("notinbranch"))) float powf(float, float) noexcept;
#endif

#ifdef __clang__
#pragma clang diagnostic ignored "-Wpass-failed"  // of loops that call C's library: clang has no libmvec to call
#endif

#ifdef __F16C__
#include <immintrin.h>
#endif

namespace {
#include "vector_math.h"  // hides <cmath>'s functions of these names from the functors

#include "functors.h"

template <class F, bool kBiased>
void segment(const float* x, const float* up, const float* bias, const float* up_bias, const float* learned, float* y,
             int64_t n) {
  const F f(learned);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float first = kBiased ? x[i] + bias[i] : x[i];
    if constexpr (F::kTensors == 2) {
      y[i] = f(first, kBiased ? up[i] + up_bias[i] : up[i]);
    } else {
      y[i] = f(first);
    }
  }
}

// Exact: every float16 is a float.
void to_float(const uint16_t* from, float* to, int64_t n) {
  int64_t i = 0;
#ifdef __F16C__
  for (; i + 8 <= n; i += 8) {
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  }
#endif
  for (; i < n; ++i) {
    const uint32_t sign = (from[i] & 0x8000u) << 16, rest = (from[i] & 0x7fffu) << 13;
    float scaled;  // as a float, `rest` has an exponent that is 112 too small; subnormals too
    __builtin_memcpy(&scaled, &rest, 4);
    scaled *= 0x1p112f;
    uint32_t bits;
    __builtin_memcpy(&bits, &scaled, 4);
    bits |= sign | (rest >= 0x0f800000u ? 0x7f800000u : 0u);  // infinity and NaN keep the largest exponent
    __builtin_memcpy(to + i, &bits, 4);
  }
}

// To the nearest, ties to even; past 65520 infinity.
void to_half(const float* from, uint16_t* to, int64_t n) {
  int64_t i = 0;
#ifdef __F16C__
  for (; i + 8 <= n; i += 8) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), 0));
  }
#endif
  for (; i < n; ++i) {
    uint32_t bits;
    __builtin_memcpy(&bits, from + i, 4);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    bits &= 0x7fffffffu;
    float size;
    __builtin_memcpy(&size, &bits, 4);
    const float shifted = size + 0.5f;  // an ulp of 0.5 is 2^-24, the step of subnormal float16
    uint32_t subnormal;
    __builtin_memcpy(&subnormal, &shifted, 4);
    subnormal -= 0x3f000000u;
    const uint32_t normal = (bits - (112u << 23) + 0xfffu + ((bits >> 13) & 1u)) >> 13;
    const uint32_t special = bits > 0x7f800000u ? 0x7e00u : 0x7c00u;
    const uint32_t rounded = bits < 0x38800000u ? subnormal : bits < 0x477ff000u ? normal : special;
    to[i] = static_cast<uint16_t>(sign | rounded);
  }
}

#define ACTUARY_ROW(name) {segment<Fused_##name, false>, segment<Fused_##name, true>},
const actuary::Segment kSegments[][2] = {ACTUARY_EVERY(ACTUARY_ROW)};
}  // namespace

#define ACTUARY_JOIN(a, b) a##b
#define ACTUARY_TABLE(isa) ACTUARY_JOIN(isa_, isa)
#define ACTUARY_ATTENTION(isa) ACTUARY_JOIN(attention_, isa)
namespace actuary {
extern const AttentionLoops ACTUARY_ATTENTION(ACTUARY_ISA);  // attention.cpp
extern const Isa ACTUARY_TABLE(ACTUARY_ISA);
const Isa ACTUARY_TABLE(ACTUARY_ISA) = {kSegments, to_float, to_half, &ACTUARY_ATTENTION(ACTUARY_ISA)};
}  // namespace actuary
