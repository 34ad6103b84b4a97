// Arguments and entries of the activation's kernels.
#pragma once

#include <cstdint>

#include "native/targets.hpp"

namespace bm {

struct ActivateInputs {
  const void* h;        // (t, 2f), or (t, f) if not gated; strides in numbers, last one 1
  std::int64_t h_row;
  std::int64_t t, f;
  bool gelu, gated, is_bf16;
  int n_threads;
};

struct Activate {
  void (*forward)(const ActivateInputs& in, void* y);  // y (t, f), contiguous
  // grad_y (t, f), its rows stride numbers apart; grad_h as h, contiguous
  void (*backward)(const ActivateInputs& in, const void* grad_y, std::int64_t stride, void* grad_h);
};

BM_DECLARE(Activate, activate);

}  // namespace bm
