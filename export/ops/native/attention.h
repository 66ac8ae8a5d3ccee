// Causal attention over packed prompts with a cache, as its parts see it; what it computes: export/attention.py.
//
//   attention_op.cpp   the two operators, their host check, and threads around the loops
//   attention.cpp      the loops, compiled once for each instruction set
#pragma once

#include <cstdint>
#include <vector>

#include "ort_abi.h"

namespace actuary {

// One call, checked. A row of keys and values, [2 kv_heads D], holds the keys of all heads, then the values.
struct Attention {
  int64_t heads, kv_heads, D;
  float eps;
  int64_t N, R;                // tokens; rows that ask
  const float* q;              // [R, heads D], its rows q_stride apart
  const float* kv;             // [N, 2 kv_heads D], its rows kv_stride apart
  int64_t q_stride, kv_stride;
  const float* past;           // [S, 2 kv_heads D]
  const float *cos, *sin;      // [context, D / 2], or null
  const float *q_gain, *k_gain;  // [D], or null
  float* y;                    // [R, heads D]
  float* present;              // [N, 2 kv_heads D]
  float* turned;               // [R, heads D]: q as the scores take it

  const int64_t *position_of, *token_of;  // of each token [N]; of each row [R]
  struct Prompt {
    int64_t start, past_length;  // its first token; how many earlier ones it has
    const int64_t* slots;        // of those
    const int64_t* rows;         // that ask, row_count of them, in order
    int64_t row_count;
  };
  const Prompt* prompts;

  int64_t width() const { return 2 * kv_heads * D; }
};

struct AttentionLoops {
  void (*prepare_token)(const Attention& call, int64_t n);  // kv -> present
  void (*prepare_row)(const Attention& call, int64_t r);    // q -> turned
  void (*attend)(const Attention& call, int64_t prompt, int64_t kv_head);
};

// Their OrtCustomOps, which live as long as the library.
const std::vector<const ort::CustomOp*>& attention_ops(ort::Api api);

}  // namespace actuary
