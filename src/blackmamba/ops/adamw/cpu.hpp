// Arguments and entries of AdamW and of the norm of gradients.
#pragma once

#include <cstdint>

#include "native/targets.hpp"

namespace bm {

struct AdamWTensor {
  void* parameter;       // (n), contiguous, as all that follow
  const void* gradient;  // (n)
  float *m, *v;          // (n)
  float* master;         // (n), or null: then a bfloat16 parameter is rounded at random
  std::int64_t n;
  std::uint32_t number;  // of the tensor, for its noise
  bool parameter_is_bf16, gradient_is_bf16;
  float decay;
};

struct AdamWFactors {
  float lr, c1, c2, scale;  // scale: of gradients
  std::int64_t seed;
  float beta1, rest1, beta2, rest2, eps;
};

struct NormTensor {
  const void* data;  // (n), contiguous
  std::int64_t n;
  bool is_bf16;
};

struct AdamW {
  void (*update)(const AdamWTensor* tensors, std::int64_t n_tensors, const AdamWFactors& factors,
                 int n_threads);
  // the sum of all squares
  double (*squares)(const NormTensor* tensors, std::int64_t n_tensors, int n_threads);
};

BM_DECLARE(AdamW, adamw);

}  // namespace bm
