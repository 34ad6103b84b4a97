// Arguments and entries of products of bfloat16 rows with one of several matrices each.
#pragma once

#include <cstdint>

#include "native/targets.hpp"

namespace bm {

// Rows are sorted by the matrix that they go with: those of matrix j end at ends[j].
struct GroupedProduct {
  const void* a;              // bfloat16; sorted row i at a + a_rows[i] * a_row, k numbers
  std::int64_t a_row;
  const std::int64_t* a_rows;  // null: i
  const void* b;              // (g, n, k) bfloat16, contiguous; transposed: (g, k, n)
  bool transposed;
  void* c;                    // bfloat16; sorted row i to c + c_rows[i] * c_row, n numbers
  std::int64_t c_row;
  const std::int64_t* c_rows;  // null: i; each row once
  const float* scale;         // c's row is multiplied by scale[c_rows[i]]; or null
  const std::int64_t* ends;   // (g)
  std::int64_t g, n, k;       // k even
  int n_threads;
};

// c_j = sum over j's rows i of a_i times b_i.
struct GroupedOuter {
  const void* a;              // bfloat16; row a_rows[i] at a + a_rows[i] * a_row, m numbers
  std::int64_t a_row;
  const std::int64_t* a_rows;  // null: i
  const float* scale;         // multiplies a's row a_rows[i] by scale[a_rows[i]]; or null
  const void* b;              // bfloat16; row b_rows[i] at b + b_rows[i] * b_row, n numbers
  std::int64_t b_row;
  const std::int64_t* b_rows;  // null: i
  void* c;                    // (g, m, n) bfloat16, contiguous
  const std::int64_t* ends;   // (g)
  std::int64_t g, m, n;
  int n_threads;
};

// Rows that go with one matrix as neighbours.
struct GroupedOrder {
  const std::int64_t* ids;  // (t), each row's matrix, 0 .. g - 1
  std::int64_t t, g;
  std::int64_t* order;      // (t): rows of the first matrix, of the second, ..., each as they stand
  std::int64_t* ends;       // (g): how many rows of `order` are there up to each matrix's last
};

struct Grouped {
  bool (*sort)(const GroupedOrder& p);  // false if an id is none of 0 .. g - 1
  void (*product)(const GroupedProduct& p);
  void (*outer)(const GroupedOuter& p);
};

BM_DECLARE(Grouped, grouped);

}  // namespace bm
