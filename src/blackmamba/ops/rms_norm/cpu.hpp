// Arguments and entries of the root-mean-square norm's kernels.
#pragma once

#include <cstdint>

#include "native/targets.hpp"

namespace bm {

struct RmsNormInputs {
  const void* x;        // (t, m), contiguous, as all that follow
  const float* weight;  // (m)
  float eps;
  std::int64_t t, m;
  bool x_is_bf16, y_is_bf16;
  int n_threads;
};

struct RmsNorm {
  void (*forward)(const RmsNormInputs& in, void* y);
  // grad_y in y's dtype, grad_x (t, m) in x's; grad_weight (m)
  void (*backward)(const RmsNormInputs& in, const void* grad_y, void* grad_x, float* grad_weight);
};

BM_DECLARE(RmsNorm, rms_norm);

}  // namespace bm
