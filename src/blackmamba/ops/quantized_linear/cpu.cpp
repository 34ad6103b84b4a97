// Owns: a block of rows, for all vectors.
// Keeps on chip: the vectors, and the block while they are taken a few at a time.
// Bytes: the weights once. Bound: bandwidth for 1 or 2 vectors, then arithmetic.
#include "quantized_linear/cpu.hpp"

#include "native/product.hpp"

namespace bm {
namespace {

void few_vectors(const FewVectors& c) {
  const std::int64_t o = c.weights.rows, i = c.weights.cols;
  const int t = static_cast<int>(c.n_vectors);
  const float* in = static_cast<const float*>(c.x);
  std::int64_t stride = c.x_stride;
  if (c.narrow) {
    float* const wide = scratch<float>(Slot::d, t * i);
    for (std::int64_t r = 0; r < t; ++r) {
      const bf16* const row = static_cast<const bf16*>(c.x) + r * stride;
      for (std::int64_t k = 0; k < i; ++k) wide[r * i + k] = to_float(row[k]);
    }
    in = wide;
    stride = i;
  }
  const void* const x = prepared(c.weights, in, stride, t);
  const Blocks blocks(o, c.weights.row_bytes(), c.n_threads, t);
  parallel_for(c.n_threads, blocks.count, [&](std::int64_t block) {
    const std::int64_t first = blocks.first(block), n = blocks.size(block);
    float* const out = scratch<float>(Slot::a, t * n);
    product_rows(c.weights, first, n, x, t, out, n);
    for (std::int64_t r = 0; r < t; ++r)
      for (std::int64_t j = 0; j < n; ++j) {
        const float y = out[r * n + j] + (c.bias ? c.bias[first + j] : 0.0f);
        if (c.narrow)
          static_cast<bf16*>(c.y)[r * o + first + j] = from_float<bf16>(y);
        else
          static_cast<float*>(c.y)[r * o + first + j] = y;
      }
  });
}

}  // namespace

BM_DEFINE(WeightProduct, weight_product) = {few_vectors};

}  // namespace bm
