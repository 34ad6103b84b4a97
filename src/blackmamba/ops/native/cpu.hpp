// Functions of simd.hpp on whole arrays, for the tests of their error bounds; and the processor's
// rate of multiply-adds, for the benchmarks.
#pragma once

#include <cstdint>

#include "native/targets.hpp"

namespace bm {

enum class Function { exp2_nonpositive, exp, sigmoid, silu, softplus, round_to_bf16 };

struct Elementwise {
  void (*apply)(Function f, const float* x, float* y, std::int64_t n);
  // n rounds of 16 independent vector multiply-adds; returns a number that depends on all of them
  float (*multiply_adds)(std::int64_t n);
  // the same of pairs of bfloat16, or null without an instruction for them
  float (*multiply_pairs)(std::int64_t n);
  int lanes;
};

BM_DECLARE(Elementwise, elementwise);

}  // namespace bm
