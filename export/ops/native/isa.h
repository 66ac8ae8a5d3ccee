// One instruction set's loops, as vector.cpp makes them and cpu.cpp calls them.
#pragma once

#include "activation.h"
#include "attention.h"

namespace actuary {

struct Isa {
  const Segment (*segments)[2];  // of each activation: plain, biased
  void (*to_float)(const uint16_t* from, float* to, int64_t n);
  void (*to_half)(const float* from, uint16_t* to, int64_t n);
  const AttentionLoops* attention;
};

const Isa& running();  // the one whose loops run in this process

}  // namespace actuary
