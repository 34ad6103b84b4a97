// Arguments and entries of the cross-entropy's kernel.
#pragma once

#include <cstdint>

#include "native/targets.hpp"

namespace bm {

struct SoftmaxInputs {
  void* logits;                // (t, v), contiguous; overwritten by their gradient if wanted
  const std::int64_t* labels;  // (t)
  std::int64_t t, v, ignore_index;
  bool gradient;
  float factor;                // multiplies the gradient
  bool is_bf16;
  int n_threads;
};

struct SoftmaxCrossEntropy {
  void (*run)(const SoftmaxInputs& in, float* losses);  // losses (t), 0 where ignored
};

BM_DECLARE(SoftmaxCrossEntropy, softmax_cross_entropy);

}  // namespace bm
