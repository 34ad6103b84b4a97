// Arguments and entries of the causal convolution's kernels.
#pragma once

#include <cstdint>

#include "native/targets.hpp"

namespace bm {

struct ConvInputs {
  const void* x;       // (b, l, d), strides in numbers, last one 1
  std::int64_t x_batch, x_row;
  const float* weight;  // (k, d)
  const float* bias;    // (d), or null: zeros
  const void* before;   // (b, d, k - 1) in x's dtype, or null: zeros
  const std::int64_t* seq_idx;  // (b, l), or null: one document a row
  std::int64_t b, l, d, k;
  bool silu, is_bf16;  // is_bf16: x, before, and everything of their shape
  int n_threads;
};

struct ConvGradients {
  const void* y;  // gradient of y (b, l, d), strides in numbers, last one 1
  std::int64_t y_batch, y_row;
  void* x;        // (b, l, d), strides in numbers, last one 1
  std::int64_t x_batch, x_row;
  float* weight;  // (k, d), contiguous, as all that follow
  float* bias;    // (d)
  void* before;   // (b, d, k - 1), or null where the input is; zeros already if l is 0
};

struct CausalConv1d {
  void (*forward)(const ConvInputs& in, void* y);  // y (b, l, d), contiguous
  void (*backward)(const ConvInputs& in, const ConvGradients& grad);
};

BM_DECLARE(CausalConv1d, causal_conv1d);

}  // namespace bm
