// The CPU half: which instruction set runs, how a call is cut into blocks for threads, float16 around float32 loops.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <iterator>

#include "isa.h"

#ifdef __x86_64__
#include <cpuid.h>
#endif

namespace actuary {

// ACTUARY_ISAS(X): X(name, "what people call it", whether this processor has it), best first; printed by build.py.
#include "isas.h"
#define ACTUARY_DECLARE(name, called, runs) extern const Isa isa_##name;
ACTUARY_ISAS(ACTUARY_DECLARE)

namespace {

#ifdef __x86_64__
// vector.cpp's float16 needs it on both levels; clang's __builtin_cpu_supports does not know the name.
[[maybe_unused]] bool has_f16c() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

struct Choice {
  const char* called;
  const Isa* isa;
  bool (*runs)();
};
#define ACTUARY_CHOICE(name, called, runs) {called, &isa_##name, [] { return static_cast<bool>(runs); }},
const Choice kChoices[] = {ACTUARY_ISAS(ACTUARY_CHOICE)};

std::atomic<const Choice*> chosen{nullptr};

const Choice& choice() {
  const Choice* found = chosen.load(std::memory_order_relaxed);
  if (!found) {
    found = std::find_if(std::begin(kChoices), std::end(kChoices) - 1, [](const Choice& c) { return c.runs(); });
    chosen.store(found, std::memory_order_relaxed);
  }
  return *found;
}

struct Work {
  const Isa* isa;
  Segment segment;
  bool half, gated;
  const Call* call;
  int64_t rows, H;  // as the loops see them: a plain pointwise call is one long row
  int64_t block;
  float learned[kMaxLearned];
};

constexpr int64_t kChunk = 512;  // float16 elements widened at a time: four such buffers stay in the first-level cache

// One stretch of n outputs in one row, its first at `column`.
void stretch(const Work& work, int64_t row, int64_t column, int64_t n) {
  const int64_t in = row * work.H * (work.gated ? 2 : 1) + column, out = row * work.H + column;
  const Call& call = *work.call;
  if (!work.half) {
    const float *x = static_cast<const float*>(call.x) + in, *bias = static_cast<const float*>(call.bias);
    if (bias) bias += column;
    const float *up = work.gated ? x + work.H : nullptr, *up_bias = work.gated && bias ? bias + work.H : nullptr;
    work.segment(x, up, bias, up_bias, work.learned, static_cast<float*>(call.y) + out, n);
    return;
  }
  const uint16_t *x = static_cast<const uint16_t*>(call.x) + in, *bias = static_cast<const uint16_t*>(call.bias);
  uint16_t* y = static_cast<uint16_t*>(call.y) + out;
  float wide[4][kChunk];  // x, up, bias, up's bias; the result goes where x was
  for (int64_t at = 0; at < n; at += kChunk) {
    const int64_t size = std::min(kChunk, n - at);
    work.isa->to_float(x + at, wide[0], size);
    if (work.gated) work.isa->to_float(x + at + work.H, wide[1], size);
    if (bias) work.isa->to_float(bias + column + at, wide[2], size);
    if (bias && work.gated) work.isa->to_float(bias + column + at + work.H, wide[3], size);
    work.segment(wide[0], wide[1], wide[2], wide[3], work.learned, wide[0], size);
    work.isa->to_half(wide[0], y + at, size);
  }
}

void block(void* pointer, size_t index) {
  const Work& work = *static_cast<const Work*>(pointer);
  const int64_t end = std::min(work.rows * work.H, static_cast<int64_t>(index + 1) * work.block);
  for (int64_t at = static_cast<int64_t>(index) * work.block; at < end;) {
    const int64_t row = at / work.H, column = at % work.H, n = std::min(work.H - column, end - at);
    stretch(work, row, column, n);
    at += n;
  }
}

}  // namespace

const Isa& running() { return *choice().isa; }

ort::Status* compute_cpu(ort::Api api, const ort::Context* context, int activation, ort::ElementType type,
                         const Call& call) {
  const Activation& known = kActivations[activation];
  Work work{};
  work.isa = &running();
  work.segment = work.isa->segments[activation][call.bias != nullptr];
  work.half = type == ort::kFloat16;
  work.gated = known.tensors == 2;
  work.call = &call;
  const bool one_row = !work.gated && !call.bias;
  work.rows = one_row ? 1 : call.rows;
  work.H = one_row ? call.rows * call.H : call.H;
  for (int i = 0; i < known.learned; ++i) {
    if (work.half) {
      work.isa->to_float(static_cast<const uint16_t*>(call.learned[i]), work.learned + i, 1);
    } else {
      work.learned[i] = *static_cast<const float*>(call.learned[i]);
    }
  }
  const int64_t total = work.rows * work.H;
  const int64_t blocks = (total + known.block - 1) / known.block;
  if (blocks <= 1) {
    work.block = total;
    block(&work, 0);
    return nullptr;
  }
  work.block = ((total + blocks - 1) / blocks + 63) / 64 * 64;  // of one size, in whole cache lines
  const size_t count = static_cast<size_t>((total + work.block - 1) / work.block);
  return ort::parallel_for(api, context, block, count, size_t{0}, static_cast<void*>(&work));
}

}  // namespace actuary

#define ACTUARY_EXPORT extern "C" __attribute__((visibility("default")))

// The instruction set whose loops run, "x86-64-v4".
ACTUARY_EXPORT const char* actuary_ops_isa() { return actuary::choice().called; }

// Run those of another; 0, or -1 where this library or this processor does not have it. For tests and benchmarks.
ACTUARY_EXPORT int actuary_ops_use_isa(const char* called) {
  for (const auto& choice : actuary::kChoices) {
    if (!std::strcmp(choice.called, called) && choice.runs()) {
      actuary::chosen.store(&choice);
      return 0;
    }
  }
  return -1;
}
