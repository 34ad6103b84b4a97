// Arguments and entries of the matrix product's kernels.
#pragma once

#include <cstdint>

#include "native/targets.hpp"

namespace bm {

// Number (i, j) lies at data + rows[i] * row + columns[j] * column; null rows: rows[i] = i, and so
// columns.
template <class T>
struct Operand {
  const T* data;
  std::int64_t row, column;
  const std::int64_t *rows, *columns;
};

// c = a b^T: c (m, n), a (m, k), b (n, k). T and C are float, or uint16_t: a bfloat16's bits.
template <class T, class C = T>
struct Product {
  Operand<T> a, b;
  C* c;                       // row c_rows[i] at c + c_rows[i] * c_row, its numbers side by side
  std::int64_t c_row;
  const std::int64_t* c_rows;  // null: i
  const float* bias;           // (n), or null
  const float* row_scale;      // row i is multiplied by row_scale[c_rows[i]]; or null
  const float* k_scale;        // a's column j is multiplied by k_scale[a.columns[j]]; or null
  std::int64_t m, n, k;
  bool accumulate;             // c += instead; then no bias and no row_scale
  int n_threads;
};

struct Linear {
  void (*multiply)(const Product<float>& p);
  // Several that write different rows or matrices, at once; for b that few rows of a meet.
  void (*multiply_each)(const Product<float>* products, std::int64_t count, int n_threads);
  void (*multiply_narrow)(const Product<std::uint16_t>& p);
  void (*multiply_narrow_to_float)(const Product<std::uint16_t, float>& p);
  // By matrix units, where `has_tiles`; null where the compiler knows none.
  void (*multiply_tiles)(const Product<std::uint16_t>& p);
  void (*multiply_tiles_to_float)(const Product<std::uint16_t, float>& p);
};

BM_DECLARE(Linear, linear);

}  // namespace bm
