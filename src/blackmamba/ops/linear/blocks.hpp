// What the products of float32 and those of bfloat16 share.
#pragma once

#include <cstring>

#include "linear/cpu.hpp"
#include "native/simd.hpp"

namespace bm {
namespace {

constexpr int rows_at_once = lanes == 16 ? 8 : 4, vectors = 3, width = vectors * lanes;
constexpr std::int64_t most_k = 384;     // of a piece: a pack of b stays in L2
constexpr std::int64_t small = 1 << 17;  // multiply-adds below which waking threads costs more

BM_INLINE std::int64_t row_number(const std::int64_t* rows, std::int64_t i) {
  return rows ? rows[i] : i;
}

// The product without terms: zeros, or the bias.
template <class T, class C>
void without_terms(const Product<T, C>& p) {
  if (p.accumulate) return;
  if (p.bias == nullptr && p.c_rows == nullptr && p.c_row == p.n) {  // as of an expert without tokens
    std::memset(p.c, 0, static_cast<std::size_t>(p.m * p.n) * sizeof(C));
    return;
  }
  for (std::int64_t i = 0; i < p.m; ++i) {
    const std::int64_t row = row_number(p.c_rows, i);
    const float scale = p.row_scale ? p.row_scale[row] : 1.0f;
    for (std::int64_t j = 0; j < p.n; ++j) {
      const float y = p.bias ? p.bias[j] * scale : 0.0f;
      if constexpr (sizeof(C) == 4)
        p.c[row * p.c_row + j] = y;
      else
        p.c[row * p.c_row + j] = from_float<bf16>(y).bits;
    }
  }
}

}  // namespace
}  // namespace bm
