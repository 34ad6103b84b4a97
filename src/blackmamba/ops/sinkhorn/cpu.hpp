// Arguments and entries of the balanced choice of experts.
#pragma once

#include <cstdint>

#include "native/targets.hpp"

namespace bm {

struct SinkhornInputs {
  const float* logits;  // (t, e), contiguous
  std::int64_t t, e;
  float scale, tolerance;
  bool paper_start;
  std::int64_t max_iterations;
};

struct Sinkhorn {
  // ids (t): where each token's row of the plan is largest
  void (*choice)(const SinkhornInputs& in, std::int64_t* ids);
};

BM_DECLARE(Sinkhorn, sinkhorn);

}  // namespace bm
