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

struct ActivateGradients {
  const void* y;         // gradient of y (t, f), its rows y_row numbers apart
  std::int64_t y_row;
  void* h;               // (t, 2f) or (t, f), contiguous
  const float* scale;    // (t), multiplies each row of y's gradient first; or null
  float* dots;           // (t), each row's product of y and its unscaled gradient; or null
  const std::int64_t* places;  // (t), where row i's scale and dot are; null: at i
};

struct Activate {
  void (*forward)(const ActivateInputs& in, void* y);  // y (t, f), contiguous
  void (*backward)(const ActivateInputs& in, const ActivateGradients& grad);
};

BM_DECLARE(Activate, activate);

}  // namespace bm
