// The loops of attention. Compiled once for each instruction set, as vector.cpp: everything but the table is internal,
// and nothing of C++'s library is used, whose templates the linker keeps one copy of.
//
//   scores  = q k^T         four rows of q at a time, 32 keys side by side: keys are laid [D][32] first
//   weights = e^(scores - max), and their sum
//   y       = weights v / sum
//
// A few rows (a token that was just generated) read keys and values where they lie.
#include "attention.h"

#include <cmath>
#include <cstring>
#include <new>

#include "isa.h"

namespace {
#include "vector_math.h"

using actuary::Attention;

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
void fill_zero(float* from, float* to) {
  if (from < to) std::memset(from, 0, static_cast<size_t>(to - from) * sizeof(float));
}

// Memory that is not set to 0. Throws where there is none; attention_op.cpp catches it in the thread that it befell.
struct Scratch {
  explicit Scratch(int64_t bytes) : data(::operator new(static_cast<size_t>(bytes))) {}
  ~Scratch() { ::operator delete(data); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  float* floats() const { return static_cast<float*>(data); }
  void* data;
};

constexpr float kNever = -__builtin_inff();  // the score of what a row does not see; it always sees itself
constexpr int64_t kLanes = 16, kTile = 32, kRows = 4;  // 8 sums of 16 lanes each fit AVX-512's registers, twice
typedef float Vector __attribute__((vector_size(64), aligned(4), may_alias));

// x / sqrt(mean(x^2) + eps) * gain, and channel i turned with channel i + D / 2; in place. kD is D where the compiler
// knows it, else 0.
template <int64_t kD>
void norm_and_turn(float* x, const Attention& call, const float* gain, int64_t position) {
  const int64_t D = kD ? kD : call.D, half = D / 2;
  if (gain) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < D; ++i) sum += x[i] * x[i];
    const float scale = 1.0f / std::sqrt(sum / static_cast<float>(D) + call.eps);
#pragma omp simd
    for (int64_t i = 0; i < D; ++i) x[i] *= scale * gain[i];
  }
  if (call.cos) {
    const float *cos = call.cos + position * half, *sin = call.sin + position * half;
#pragma omp simd
    for (int64_t i = 0; i < half; ++i) {
      const float a = x[i], b = x[i + half];
      x[i] = a * cos[i] - b * sin[i];
      x[i + half] = b * cos[i] + a * sin[i];
    }
  }
}

// That one of a template over D for this D; others take the loops of unknown length.
#define ACTUARY_OF_D(f, D) ((D) == 64 ? f<64> : (D) == 32 ? f<32> : (D) == 128 ? f<128> : f<0>)

void prepare_token(const Attention& call, int64_t n) {
  float* row = call.present + n * call.width();
  std::memcpy(row, call.kv + n * call.kv_stride, static_cast<size_t>(call.width()) * sizeof(float));
  const auto one = ACTUARY_OF_D(norm_and_turn, call.D);
  for (int64_t h = 0; h < call.kv_heads; ++h) one(row + h * call.D, call, call.k_gain, call.position_of[n]);
}

void prepare_row(const Attention& call, int64_t r) {
  const int64_t width = call.heads * call.D, n = call.token_of[r];
  float* row = call.turned + r * width;
  std::memcpy(row, call.q + r * call.q_stride, static_cast<size_t>(width) * sizeof(float));
  const auto one = ACTUARY_OF_D(norm_and_turn, call.D);
  for (int64_t h = 0; h < call.heads; ++h) one(row + h * call.D, call, call.q_gain, call.position_of[n]);
}

// One query head of one row that asks, and how many keys it sees.
struct Line {
  const float* q;
  float* y;
  int64_t seen;
};

// Scores to weights, in place: e^(score - max). Their sum.
float weigh(float* scores, int64_t n) {
  float largest = scores[0];
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < n; ++i) largest = scores[i] > largest ? scores[i] : largest;
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    scores[i] = expf(scores[i] - largest);
    sum += scores[i];
  }
  return sum;
}

// Keys and values where they lie. kD is D where that is known to the compiler, else 0.
template <int64_t kD>
void attend_line(const Line& line, const float* const* keys, int64_t to_value, int64_t size, float* scores) {
  const int64_t D = kD ? kD : size;
  for (int64_t k = 0; k < line.seen; ++k) {
    const float *key = keys[k], *q = line.q;
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < D; ++i) sum += q[i] * key[i];
    scores[k] = sum;
  }
  const float scale = 1.0f / weigh(scores, line.seen);
  float local[kD ? kD : 1];
  float* y = kD ? local : line.y;
  for (int64_t i = 0; i < D; ++i) y[i] = 0;
  for (int64_t k = 0; k < line.seen; ++k) {
    const float *value = keys[k] + to_value, weight = scores[k];
#pragma omp simd
    for (int64_t i = 0; i < D; ++i) y[i] += weight * value[i];
  }
  for (int64_t i = 0; i < D; ++i) line.y[i] = y[i] * scale;
}

// Scores [4][room] of four rows against `tiles` tiles of keys, each [D][32].
void score(const Line* lines, const float* tiles, int64_t count, int64_t D, float* scores, int64_t room) {
  for (int64_t t = 0; t < count; ++t) {
    const float* tile = tiles + t * D * kTile;
    Vector sums[kRows][2] = {};
    for (int64_t i = 0; i < D; ++i) {
      const Vector low = *reinterpret_cast<const Vector*>(tile + i * kTile);
      const Vector high = *reinterpret_cast<const Vector*>(tile + i * kTile + kLanes);
      for (int64_t r = 0; r < kRows; ++r) {
        const float q = lines[r].q[i];
        sums[r][0] += q * low;
        sums[r][1] += q * high;
      }
    }
    for (int64_t r = 0; r < kRows; ++r) {
      *reinterpret_cast<Vector*>(scores + r * room + t * kTile) = sums[r][0];
      *reinterpret_cast<Vector*>(scores + r * room + t * kTile + kLanes) = sums[r][1];
    }
  }
}

// y [4][padded] = weights [4][room] times values [n][padded], kVectors * 16 of their channels from `at` on.
template <int kVectors>
void mix(const float* weights, int64_t room, const float* values, int64_t n, int64_t padded, int64_t at, float* y) {
  Vector sums[kRows][kVectors] = {};
  for (int64_t k = 0; k < n; ++k) {
    Vector value[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      value[v] = *reinterpret_cast<const Vector*>(values + k * padded + at + v * kLanes);
    }
    for (int64_t r = 0; r < kRows; ++r) {
      const float weight = weights[r * room + k];
      for (int v = 0; v < kVectors; ++v) sums[r][v] += weight * value[v];
    }
  }
  for (int64_t r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) *reinterpret_cast<Vector*>(y + r * padded + at + v * kLanes) = sums[r][v];
  }
}

void attend_many(const Line* lines, int64_t line_count, const float* const* keys, int64_t count, int64_t to_value,
                 int64_t D) {
  const int64_t tiles = (count + kTile - 1) / kTile, room = tiles * kTile;
  const int64_t padded = (D + kLanes - 1) / kLanes * kLanes;
  const int64_t size = tiles * D * kTile + count * padded + kRows * room + kRows * padded;
  const Scratch scratch(size * static_cast<int64_t>(sizeof(float)));
  float* laid = scratch.floats();
  float *values = laid + tiles * D * kTile, *scores = values + count * padded, *y = scores + kRows * room;
  for (int64_t k = 0; k < room; ++k) {
    float* to = laid + k / kTile * D * kTile + k % kTile;
    if (k >= count) {  // what nobody sees must only be a number
      for (int64_t i = 0; i < D; ++i) to[i * kTile] = 0;
      continue;
    }
    for (int64_t i = 0; i < D; ++i) to[i * kTile] = keys[k][i];
    std::memcpy(values + k * padded, keys[k] + to_value, static_cast<size_t>(D) * sizeof(float));
    fill_zero(values + k * padded + D, values + (k + 1) * padded);
  }
  for (int64_t at = 0; at < line_count; at += kRows) {
    Line four[kRows];
    int64_t seen = 0;
    for (int64_t r = 0; r < kRows; ++r) {
      four[r] = lines[least(at + r, line_count - 1)];  // the last one stands in for those that are not there
      seen = most(seen, four[r].seen);
    }
    score(four, laid, (seen + kTile - 1) / kTile, D, scores, room);
    float sums[kRows];
    const int64_t scored = (seen + kTile - 1) / kTile * kTile;
    for (int64_t r = 0; r < kRows; ++r) {
      // Whole vectors, whose rest weighs e^-huge = 0: one element at a time, it took a fifth of the time of all this.
      for (int64_t k = four[r].seen; k < scored; ++k) scores[r * room + k] = kNever;
      sums[r] = weigh(scores + r * room, scored);
    }
    int64_t channel = 0;
    for (; channel + 4 * kLanes <= padded; channel += 4 * kLanes) mix<4>(scores, room, values, seen, padded, channel, y);
    for (; channel < padded; channel += kLanes) mix<1>(scores, room, values, seen, padded, channel, y);
    for (int64_t r = 0; r < kRows && at + r < line_count; ++r) {
      const float scale = 1.0f / sums[r];
      for (int64_t i = 0; i < D; ++i) four[r].y[i] = y[r * padded + i] * scale;
    }
  }
}

void attend(const Attention& call, int64_t prompt, int64_t kv_head) {
  const Attention::Prompt& own = call.prompts[prompt];
  if (own.row_count == 0) return;
  const int64_t group = call.heads / call.kv_heads, D = call.D, line_count = own.row_count * group;
  int64_t count = 0;
  for (int64_t i = 0; i < own.row_count; ++i) count = most(count, call.position_of[call.token_of[own.rows[i]]] + 1);
  const Scratch for_lines(line_count * static_cast<int64_t>(sizeof(Line)));
  const Scratch for_keys(count * static_cast<int64_t>(sizeof(float*)));
  auto* lines = static_cast<Line*>(for_lines.data);
  auto* keys = static_cast<const float**>(for_keys.data);
  for (int64_t i = 0; i < line_count; ++i) {
    const int64_t r = own.rows[i / group], at = (r * call.heads + kv_head * group + i % group) * D;
    lines[i] = {call.turned + at, call.y + at, call.position_of[call.token_of[r]] + 1};
  }
  for (int64_t k = 0; k < count; ++k) {
    const float* row = k < own.past_length ? call.past + own.slots[k] * call.width()
                                           : call.present + (own.start + k - own.past_length) * call.width();
    keys[k] = row + kv_head * D;
  }
  const int64_t to_value = call.kv_heads * D;
  if (line_count >= kRows) return attend_many(lines, line_count, keys, count, to_value, D);
  const Scratch scores(count * static_cast<int64_t>(sizeof(float)));
  const auto one = ACTUARY_OF_D(attend_line, D);
  for (int64_t i = 0; i < line_count; ++i) one(lines[i], keys, to_value, D, scores.floats());
}

}  // namespace

#define ACTUARY_JOIN(a, b) a##b
#define ACTUARY_TABLE(isa) ACTUARY_JOIN(attention_, isa)
namespace actuary {
extern const AttentionLoops ACTUARY_TABLE(ACTUARY_ISA);
const AttentionLoops ACTUARY_TABLE(ACTUARY_ISA) = {prepare_token, prepare_row, attend};
}  // namespace actuary
