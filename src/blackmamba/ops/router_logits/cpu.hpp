// Arguments and entries of the router's product.
#pragma once

#include <cstdint>

#include "native/targets.hpp"

namespace bm {

struct RouterInputs {
  const void* x;  // (t, m); rows x_row numbers apart
  std::int64_t x_row;
  bool is_bf16;
  const float* weight;  // (e, m), contiguous
  std::int64_t t, m, e;
  int n_threads;
};

struct RouterGradients {
  const float* logits;  // gradient of the logits (t, e), contiguous
  void* x;              // (t, m), contiguous, in x's dtype
  float* weight;        // (e, m), contiguous
  float* bias;          // (e)
};

struct RouterLogits {
  void (*forward)(const RouterInputs& in, const float* bias, float* logits);  // (t, e), contiguous
  void (*backward)(const RouterInputs& in, const RouterGradients& grad);
};

BM_DECLARE(RouterLogits, router_logits);

}  // namespace bm
