// Arguments and entries of the root-mean-square norm's kernels.
#pragma once

#include <cstdint>

#include "native/targets.hpp"

namespace bm {

struct RmsNormInputs {
  const void* x;        // (t, m), contiguous, as all that follow; with an update: what it is added to
  const float* weight;  // (m)
  float eps;
  std::int64_t t, m;
  bool x_is_bf16, y_is_bf16;
  int n_threads;
};

// What is added to x before its norm.
struct RmsNormSum {
  const void* update;  // (t, m), or null: nothing, then no total either
  bool is_bf16;
  void* total;         // (t, m) in x's dtype
};

struct RmsNorm {
  void (*forward)(const RmsNormInputs& in, const RmsNormSum& sum, void* y);
  // x: the total, if there was an update; grad_total, of the total by other ways, may be null.
  // grad_y in y's dtype, the others (t, m) in x's; grad_weight (m); narrow (t, m) bfloat16, a copy
  // of grad_x for a narrower update, or null.
  void (*backward)(const RmsNormInputs& in, const void* grad_y, const void* grad_total, void* grad_x,
                   float* grad_weight, void* narrow);
};

BM_DECLARE(RmsNorm, rms_norm);

}  // namespace bm
