// A task is 3 vectors of columns of one matrix for all rows of its group, or 128 rows of one outer
// product. Numbers that are summed side by side lie in pairs: b's are packed so, 3 vectors wide, and 8
// rows of a at a time multiplied with them, adding up in 24 registers of float32. Bytes moved: little
// beside the work. Bound: the multiply-add units.
#include "grouped_product/cpu.hpp"

#include <algorithm>
#include <cstring>

#include "native/simd.hpp"
#include "native/threads.hpp"
#include "native/transpose.hpp"

namespace bm {
namespace {

constexpr int rows_at_once = lanes == 16 ? 8 : 4, vectors = 3, width = vectors * lanes;
constexpr std::int64_t rows_of_task = 128;  // of an outer product's result
constexpr std::int64_t small = 1 << 17;     // multiply-adds below which waking threads costs more

// For processors with a fast instruction for it, see native/bfloat16.py; elsewhere for tests.
// Two bfloat16, the first in the low half, in each lane.
BM_INLINE vec add_pairs(vec sum, uvec a, uvec b) {
#if defined(__AVX512BF16__)
  return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
  sum += (vec)(a << 16) * (vec)(b << 16);
  return sum + (vec)(a & 0xFFFF0000u) * (vec)(b & 0xFFFF0000u);
#endif
}

BM_INLINE std::uint32_t pair_at(const void* p) {
  std::uint32_t pair;
  std::memcpy(&pair, p, sizeof pair);
  return pair;
}
BM_INLINE uvec pairs_at(const std::uint32_t* p) {
  uvec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
BM_INLINE uvec same(std::uint32_t x) { return x - uvec{}; }

BM_INLINE std::int64_t row_number(const std::int64_t* rows, std::int64_t i) {
  return rows ? rows[i] : i;
}

// the first n numbers as the low halves of lanes; zeros behind them
BM_INLINE uvec low_halves(const bf16* p, int n) {
  half_uvec narrow{};
  if (n >= lanes)
    std::memcpy(&narrow, p, sizeof narrow);
  else if (n > 0)
    std::memcpy(&narrow, p, static_cast<std::size_t>(n) * sizeof(bf16));
  return __builtin_convertvector(narrow, uvec);
}

// n numbers of row `first` beside those of row `second` (null: zeros) as pairs, to w of them
template <int w>
BM_INLINE void interleave(const bf16* first, const bf16* second, std::int64_t n,
                          std::uint32_t* out) {
  for (int j = 0; j < w; j += lanes) {
    const int left = static_cast<int>(std::min<std::int64_t>(lanes, n - j));
    uvec pairs = low_halves(first + j, left);
    if (second != nullptr) pairs |= low_halves(second + j, left) << 16;
    std::memcpy(out + j, &pairs, sizeof pairs);
  }
}

// R rows by V vectors over k pairs: row r's pairs at a[r], step apart; c in bfloat16.
template <int R, int V>
BM_INLINE void block(const char* const* a, std::int64_t step, const std::uint32_t* b,
                     std::int64_t k, bf16* const* c, int n, const float* scales) {
  vec sums[R][V] = {};
  for (std::int64_t j = 0; j < k; ++j) {
    uvec columns[V];
    for (int v = 0; v < V; ++v) columns[v] = pairs_at(b + j * width + v * lanes);
    for (int r = 0; r < R; ++r) {
      const uvec x = same(pair_at(a[r] + j * step));
      for (int v = 0; v < V; ++v) sums[r][v] = add_pairs(sums[r][v], columns[v], x);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v)
      store_some(c[r] + v * lanes, scales ? sums[r][v] * scales[r] : sums[r][v], n - v * lanes);
}

template <int R>
void rows_block(const char* const* a, std::int64_t step, const std::uint32_t* b, std::int64_t k,
                bf16* const* c, int n, const float* scales) {
  if (n > 2 * lanes) return block<R, 3>(a, step, b, k, c, n, scales);
  if (n > lanes) return block<R, 2>(a, step, b, k, c, n, scales);
  return block<R, 1>(a, step, b, k, c, n, scales);
}

void some_rows(int count, const char* const* a, std::int64_t step, const std::uint32_t* b,
               std::int64_t k, bf16* const* c, int n, const float* scales) {
  if (count == rows_at_once) return rows_block<rows_at_once>(a, step, b, k, c, n, scales);
  int r = 0;
  for (; r + 2 <= count; r += 2)
    rows_block<2>(a + r, step, b, k, c + r, n, scales ? scales + r : nullptr);
  if (r < count) rows_block<1>(a + r, step, b, k, c + r, n, scales ? scales + r : nullptr);
}

// Columns j .. j + n - 1 (n <= width) of matrix `of`, as k / 2 rows of width pairs.
void pack_columns(const GroupedProduct& p, std::int64_t of, std::int64_t j, std::int64_t n,
                  std::uint32_t* out) {
  const bf16* b = static_cast<const bf16*>(p.b) + of * p.n * p.k;
  if (p.transposed) {
    for (std::int64_t i = 0; i < p.k; i += 2)
      interleave<width>(b + i * p.n + j, b + (i + 1) * p.n + j, n, out + i / 2 * width);
    return;
  }
  std::int64_t done = 0;
#if defined(__AVX512F__)
  for (; done + 16 <= p.k / 2; done += 16)
    for (int column = 0; column < width; column += 16) {
      __m512 r[16];
      for (int i = 0; i < 16; ++i)
        r[i] = column + i < n ? _mm512_loadu_ps(b + (j + column + i) * p.k + 2 * done)
                              : _mm512_setzero_ps();
      transpose(r);
      for (int i = 0; i < 16; ++i) _mm512_store_ps(out + (done + i) * width + column, r[i]);
    }
#endif
  for (std::int64_t column = 0; column < width; ++column)
    for (std::int64_t i = done; i < p.k / 2; ++i)
      out[i * width + column] = column < n ? pair_at(b + (j + column) * p.k + 2 * i) : 0;
}

std::int64_t first_of(const std::int64_t* ends, std::int64_t j) { return j ? ends[j - 1] : 0; }

void product(const GroupedProduct& p) {
  const std::int64_t panels = pieces(p.n, width);
  if (p.g == 0 || p.n == 0 || p.ends[p.g - 1] == 0) return;
  const int n_threads = p.ends[p.g - 1] * p.n * p.k < small ? 1 : p.n_threads;
  parallel_for(n_threads, p.g * panels, [&](std::int64_t task) {
    const std::int64_t of = task / panels, j = task % panels * width, last = p.ends[of];
    const std::int64_t n = std::min<std::int64_t>(width, p.n - j);
    if (first_of(p.ends, of) == last) return;
    std::uint32_t* b = scratch<std::uint32_t>(Slot::a, width * p.k / 2 + 1);
    pack_columns(p, of, j, n, b);
    for (std::int64_t i = first_of(p.ends, of); i < last; i += rows_at_once) {
      const int count = static_cast<int>(std::min<std::int64_t>(rows_at_once, last - i));
      const char* a[rows_at_once];
      bf16* c[rows_at_once];
      float scales[rows_at_once];
      for (int r = 0; r < count; ++r) {
        const std::int64_t to = row_number(p.c_rows, i + r);
        a[r] = static_cast<const char*>(p.a) + row_number(p.a_rows, i + r) * p.a_row * 2;
        c[r] = static_cast<bf16*>(p.c) + to * p.c_row + j;
        if (p.scale) scales[r] = p.scale[to];
      }
      some_rows(count, a, 4, b, p.k / 2, c, static_cast<int>(n), p.scale ? scales : nullptr);
    }
  });
}

// Up to lanes numbers of a sorted row, from number i on, times the row's scale and rounded again.
BM_INLINE uvec scaled_halves(const GroupedOuter& p, std::int64_t row, std::int64_t i, int n) {
  const std::int64_t from = row_number(p.a_rows, row);
  const uvec halves = low_halves(static_cast<const bf16*>(p.a) + from * p.a_row + i, n);
  if (p.scale == nullptr) return halves;
  bf16 rounded[lanes];
  store(rounded, (vec)(halves << 16) * p.scale[from]);
  return low_halves(rounded, lanes);
}

void outer(const GroupedOuter& p) {
  if (p.g == 0 || p.m == 0 || p.n == 0) return;
  const std::int64_t stripes = pieces(p.m, rows_of_task);
  const int n_threads = p.ends[p.g - 1] * p.m * p.n < small ? 1 : p.n_threads;
  parallel_for(n_threads, p.g * stripes, [&](std::int64_t task) {
    const std::int64_t of = task / stripes, i = task % stripes * rows_of_task;
    const std::int64_t begin = first_of(p.ends, of), t = p.ends[of] - begin, pairs = pieces(t, 2);
    const std::int64_t m = std::min<std::int64_t>(rows_of_task, p.m - i);
    // a across: pairs of rows, lanes numbers of them at a time
    std::uint32_t* a = scratch<std::uint32_t>(Slot::a, pieces(m, lanes) * lanes * pairs + 1);
    std::uint32_t* b = scratch<std::uint32_t>(Slot::b, width * pairs + 1);
    for (std::int64_t q = 0; q < pairs; ++q)
      for (std::int64_t r = 0; r < m; r += lanes) {
        const std::int64_t row = begin + 2 * q;
        const int some = static_cast<int>(std::min<std::int64_t>(lanes, m - r));
        uvec both = scaled_halves(p, row, i + r, some);
        if (2 * q + 1 < t) both |= scaled_halves(p, row + 1, i + r, some) << 16;
        std::memcpy(a + r * pairs + q * lanes, &both, sizeof both);
      }
    for (std::int64_t j = 0; j < p.n; j += width) {
      const std::int64_t n = std::min<std::int64_t>(width, p.n - j);
      const bf16* rows = static_cast<const bf16*>(p.b) + j;
      for (std::int64_t q = 0; q < pairs; ++q) {
        const std::int64_t row = begin + 2 * q;
        interleave<width>(
            rows + row_number(p.b_rows, row) * p.b_row,
            2 * q + 1 < t ? rows + row_number(p.b_rows, row + 1) * p.b_row : nullptr, n,
            b + q * width);
      }
      for (std::int64_t r = 0; r < m; r += rows_at_once) {
        const int count = static_cast<int>(std::min<std::int64_t>(rows_at_once, m - r));
        const char* a_rows[rows_at_once];
        bf16* c_rows[rows_at_once];
        for (int s = 0; s < count; ++s) {
          a_rows[s] = reinterpret_cast<const char*>(a + (r + s) / lanes * lanes * pairs +
                                                    (r + s) % lanes);
          c_rows[s] = static_cast<bf16*>(p.c) + (of * p.m + i + r + s) * p.n + j;
        }
        some_rows(count, a_rows, 4 * lanes, b, pairs, c_rows, static_cast<int>(n), nullptr);
      }
    }
  });
}

bool sort(const GroupedOrder& p) {
  std::fill(p.ends, p.ends + p.g, 0);
  for (std::int64_t i = 0; i < p.t; ++i) {
    if (p.ids[i] < 0 || p.ids[i] >= p.g) return false;
    ++p.ends[p.ids[i]];
  }
  std::int64_t total = 0;  // ends are beginnings now, and move while rows are put down
  for (std::int64_t j = 0; j < p.g; ++j) {
    const std::int64_t count = p.ends[j];
    p.ends[j] = total;
    total += count;
  }
  for (std::int64_t i = 0; i < p.t; ++i) p.order[p.ends[p.ids[i]]++] = i;
  return true;
}

}  // namespace

BM_DEFINE(Grouped, grouped) = {sort, product, outer};

}  // namespace bm
