// A few vectors times a matrix of weights of any kind, forward only.
//
// Letters: t vectors, o rows, i columns.
#pragma once

#include <cstdint>

#include "native/targets.hpp"
#include "native/weights.hpp"

namespace bm {

struct FewVectors {
  std::int64_t n_vectors;
  bool narrow;            // x and y are bfloat16, else float32
  const void* x;          // (t, i), rows x_stride numbers apart
  std::int64_t x_stride;
  Weights weights;        // (o, i)
  const float* bias;      // (o), or null
  void* y;                // (t, o)
  int n_threads;
};

struct WeightProduct {
  void (*few_vectors)(const FewVectors& call);
};

BM_DECLARE(WeightProduct, weight_product);

}  // namespace bm
