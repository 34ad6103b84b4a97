// Products of bfloat16 by the multiply-adds of float32, part of cpu.cpp: for processors that multiply
// pairs of bfloat16 slower than that, or not at all.
//
// All rows of a are widened once, 8 side by side, k after k. A task is some packs of 3 vectors of b's
// rows: it widens one piece of k after another, the next one on its way from memory meanwhile, and
// multiplies it with each pack of a. Sums are float32 up to the end. Bytes moved: b once for every 512
// rows of a. Bound: the multiply-add units.
#pragma once

#include <algorithm>
#include <cstring>

#include "linear/blocks.hpp"
#include "native/threads.hpp"
#include "native/transpose.hpp"

namespace bm {
namespace {
namespace narrow {

using View = Operand<std::uint16_t>;

constexpr std::int64_t step = 32;        // numbers of k that are unpacked together
constexpr std::int64_t most_rows = 512;  // of a in a task
constexpr std::int64_t most_packed = 1 << 22;  // numbers of a at a time

BM_INLINE const bf16* row_of(const View& x, std::int64_t i) {
  return reinterpret_cast<const bf16*>(x.data) + row_number(x.rows, i) * x.row;
}

#if defined(__AVX512F__)
// n <= step numbers; zeros behind them
template <bool whole>
BM_INLINE __m512 words(const bf16* p, int n) {
  if (whole) return _mm512_loadu_ps(p);
#if defined(BM_SANITIZE)
  __m512 v = _mm512_setzero_ps();
  std::memcpy(&v, p, n * sizeof(bf16));
  return v;
#else
  const __mmask32 some = n < 32 ? (1u << n) - 1 : ~0u;
  return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(some, p));
#endif
}

// put(c, number at + c of each of 16 rows) for c < n <= step; null rows are zeros
template <bool whole, class F>
BM_INLINE void turn(const bf16* const* rows, std::int64_t at, int n, const F& put) {
  __m512 r[16];
  for (int i = 0; i < 16; ++i)
    r[i] = rows[i] ? words<whole>(rows[i] + at, n) : _mm512_setzero_ps();
  transpose(r);
  for (int c = 0; c < 16; ++c) {
    if (whole || 2 * c < n) put(2 * c, (vec)((uvec)r[c] << 16));
    if (whole || 2 * c + 1 < n) put(2 * c + 1, (vec)((uvec)r[c] & 0xffff0000u));
  }
}
#endif

// put(c, number j + c of rows i .. i + lanes - 1) for c < k; zeros from row n on
template <class F>
BM_INLINE void across(const View& x, const float* scale, std::int64_t i, int n, std::int64_t j,
                      std::int64_t k, const F& put) {
  const auto place = [&](std::int64_t c) { return row_number(x.columns, j + c) * x.column; };
  const auto factor = [&](std::int64_t c) { return scale[x.columns[j + c]]; };
  if (x.row == 1 && x.rows == nullptr) {  // a column's numbers lie side by side
    const bf16* from = reinterpret_cast<const bf16*>(x.data) + i;
    for (std::int64_t c = 0; c < k; ++c) {
      const vec v = load_some(from + place(c), n);
      put(c, scale ? v * factor(c) : v);
    }
    return;
  }
  const bf16* rows[lanes] = {};
  for (int r = 0; r < std::min(n, lanes); ++r) rows[r] = row_of(x, i + r);
#if defined(__AVX512F__)
  if (x.column == 1 && x.columns == nullptr) {
    std::int64_t c = 0;
    const auto from = [&](std::int64_t d, vec v) { put(c + d, v); };
    for (; c + step <= k; c += step) turn<true>(rows, j + c, step, from);
    if (c < k) turn<false>(rows, j + c, static_cast<int>(k - c), from);
    return;
  }
#endif
  for (std::int64_t c = 0; c < k; ++c) {
    float numbers[lanes];
    for (int r = 0; r < lanes; ++r) numbers[r] = rows[r] ? to_float(rows[r][place(c)]) : 0.0f;
    const vec v = load(numbers);
    put(c, scale ? v * factor(c) : v);
  }
}

// Rows i .. i + lanes - 1 of a, columns j .. j + k - 1, as packs of rows_at_once
void pack_rows(const View& x, const float* scale, std::int64_t i, int n, std::int64_t j,
               std::int64_t k, float* out) {
  across(x, scale, i, n, j, k, [&](std::int64_t c, vec v) {
#if defined(__AVX512F__)
    _mm256_storeu_ps(out + 8 * c, _mm512_castps512_ps256((__m512)v));
    _mm256_storeu_ps(out + 8 * (k + c), _mm512_extractf32x8_ps((__m512)v, 1));
#else
    float numbers[lanes];
    store(numbers, v);
    for (int part = 0; part < lanes / rows_at_once; ++part)
      std::memcpy(out + rows_at_once * (part * k + c), numbers + part * rows_at_once,
                  rows_at_once * sizeof(float));
#endif
  });
}

// Rows i .. i + n - 1 (n <= width) of b, columns j .. j + k - 1, side by side
void pack_columns(const View& x, std::int64_t i, std::int64_t n, std::int64_t j, std::int64_t k,
                  float* out) {
  for (int block = 0; block < n; block += lanes)
    across(x, nullptr, i + block, static_cast<int>(std::min<std::int64_t>(lanes, n - block)), j, k,
           [&](std::int64_t c, vec v) { store(out + c * width + block, v); });
}

// Memory to bring near, a line after the other, some with each `step` numbers of k.
struct Ahead {
  const bf16* at = nullptr;
  std::int64_t rows = 0, stride = 0;  // stride numbers apart
  int lines = 1, line = 0;            // of each, and the next one's

  Ahead() = default;
  // of rows i .. i + n - 1 and columns j .. j + k - 1
  Ahead(const View& x, std::int64_t i, std::int64_t n, std::int64_t j, std::int64_t k) {
    const bool by_columns = x.row == 1;
    if (x.rows != nullptr || x.columns != nullptr || !(by_columns || x.column == 1)) return;
    at = reinterpret_cast<const bf16*>(x.data) + i * x.row + j * x.column;
    rows = by_columns ? k : n;
    stride = by_columns ? x.column : x.row;
    lines = static_cast<int>(((by_columns ? n : k) + line_numbers - 1) / line_numbers);
  }
  std::int64_t left() const { return rows * lines; }
  BM_INLINE void ask() {
    if (rows == 0) return;
    __builtin_prefetch(at + line * line_numbers, 0, 2);
    if (++line < lines) return;
    line = 0;
    at += stride;
    --rows;
  }

 private:
  static constexpr int line_numbers = 32;
};

// What becomes of the sums of a piece of k.
struct Finish {
  bool first, last;  // piece
  float* kept;       // sums between pieces, rows_at_once x width
  const float *bias, *scales;
  bool accumulate;
};

BM_INLINE bf16* numbers(std::uint16_t* p) { return reinterpret_cast<bf16*>(p); }
BM_INLINE float* numbers(float* p) { return p; }

// A pack of a by V vectors of a pack of b; `count` rows of n numbers are written.
template <int V, class C>
BM_INLINE void block(const float* a, const float* b, std::int64_t k, int at_once, Ahead& ahead,
                     C* const* c, int count, int n, const Finish& finish) {
  constexpr int R = rows_at_once;
  vec sums[R][V] = {};
  if (!finish.first)
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) sums[r][v] = load(finish.kept + r * width + v * lanes);
  const auto one = [&](std::int64_t j) {
    vec columns[V];
    for (int v = 0; v < V; ++v) columns[v] = load(b + j * width + v * lanes);
    for (int r = 0; r < R; ++r) {
      const float x = a[j * R + r];
      for (int v = 0; v < V; ++v) sums[r][v] += x * columns[v];
    }
  };
  std::int64_t j = 0;
  for (; j + step <= k; j += step) {
    for (int i = 0; i < at_once; ++i) ahead.ask();
    for (int i = 0; i < step; ++i) one(j + i);
  }
  for (; j < k; ++j) one(j);
  if (!finish.last) {
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) store(finish.kept + r * width + v * lanes, sums[r][v]);
    return;
  }
  for (int r = 0; r < R; ++r) {
    if (r == count) return;
    for (int v = 0; v < V; ++v) {
      const int left = n - v * lanes;
      auto* const out = numbers(c[r]) + v * lanes;
      vec y = sums[r][v];
      if (finish.bias != nullptr) y += load_some(finish.bias + v * lanes, left);
      if (finish.scales != nullptr) y *= finish.scales[r];
      if (finish.accumulate) y += load_some(out, left);
      store_some(out, y, left);
    }
  }
}

// How a product is cut: the same pieces of k on any number of threads.
struct Cut {
  std::int64_t piece, n_pieces, rows, packs;  // rows of a and packs of b in a task
  std::int64_t k_of(std::int64_t q, std::int64_t k) const { return std::min(piece, k - q * piece); }
};

// Rows i .. i + m - 1 of the `packed` ones in `a`, which begin with row `start`, times b's rows
// j .. j + n - 1.
template <class C>
void task(const Product<std::uint16_t, C>& p, const Cut& cut, const float* a, std::int64_t packed,
          std::int64_t start, std::int64_t i, std::int64_t m, std::int64_t j, std::int64_t n) {
  const std::int64_t blocks = pieces(m, rows_at_once);
  float* const kept = cut.n_pieces > 1
                          ? scratch<float>(Slot::a, blocks * rows_at_once * width)
                          : nullptr;
  float* const b = scratch<float>(Slot::b, width * cut.piece);
  for (std::int64_t column = j; column < j + n; column += width) {
    const std::int64_t left = std::min<std::int64_t>(width, j + n - column);
    for (std::int64_t q = 0; q < cut.n_pieces; ++q) {
      const std::int64_t from = q * cut.piece, k = cut.k_of(q, p.k);
      pack_columns(p.b, column, left, from, k, b);
      Ahead ahead;
      if (q + 1 < cut.n_pieces)
        ahead = Ahead(p.b, column, left, from + k, cut.k_of(q + 1, p.k));
      else if (column + width < j + n)
        ahead = Ahead(p.b, column + width, std::min<std::int64_t>(width, j + n - column - width),
                      0, cut.k_of(0, p.k));
      const std::int64_t steps = blocks * (k / step);
      const int at_once = steps > 0 ? static_cast<int>(pieces(ahead.left(), steps)) : 0;
      for (std::int64_t r = 0; r < blocks; ++r) {
        const int count =
            static_cast<int>(std::min<std::int64_t>(rows_at_once, m - r * rows_at_once));
        C* c[rows_at_once];
        float scales[rows_at_once];
        for (int s = 0; s < count; ++s) {
          const std::int64_t row = row_number(p.c_rows, start + i + r * rows_at_once + s);
          c[s] = p.c + row * p.c_row + column;
          if (p.row_scale) scales[s] = p.row_scale[row];
        }
        const Finish finish{q == 0, q + 1 == cut.n_pieces,
                            kept ? kept + r * rows_at_once * width : nullptr,
                            p.bias ? p.bias + column : nullptr, p.row_scale ? scales : nullptr,
                            p.accumulate};
        const float* const rows = a + packed * from + (i + r * rows_at_once) * k;
        const int some = static_cast<int>(left);
        if (left > 2 * lanes)
          block<3>(rows, b, k, at_once, ahead, c, count, some, finish);
        else if (left > lanes)
          block<2>(rows, b, k, at_once, ahead, c, count, some, finish);
        else
          block<1>(rows, b, k, at_once, ahead, c, count, some, finish);
      }
    }
  }
}

template <class C>
void multiply(const Product<std::uint16_t, C>& p) {
  if (p.m == 0 || p.n == 0) return;
  if (p.k == 0) return without_terms(p);
  const int n_threads = p.m * p.n * p.k < small ? 1 : p.n_threads;
  Cut cut;
  cut.n_pieces = pieces(p.k, most_k);
  cut.piece = pieces(pieces(p.k, cut.n_pieces), step) * step;
  cut.n_pieces = pieces(p.k, cut.piece);
  const std::int64_t m_part =
      std::max<std::int64_t>(64, most_packed / p.k / most_rows * most_rows);
  const std::int64_t all_packs = pieces(p.n, width);
  for (std::int64_t start = 0; start < p.m; start += m_part) {
    const std::int64_t m = std::min(m_part, p.m - start), packed = pieces(m, lanes) * lanes;
    cut.rows = most_rows;
    cut.packs = 8;
    const auto n_tasks = [&] { return pieces(m, cut.rows) * pieces(all_packs, cut.packs); };
    while (n_tasks() < 16 && cut.packs > 1) cut.packs /= 2;
    while (n_tasks() < 16 && cut.rows > 64) cut.rows /= 2;

    float* const a = scratch<float>(Slot::d, packed * p.k);
    const std::int64_t blocks = packed / lanes;
    parallel_for(n_threads, cut.n_pieces * blocks, [&](std::int64_t t) {
      const std::int64_t q = t / blocks, i = t % blocks * lanes, k = cut.k_of(q, p.k);
      pack_rows(p.a, p.k_scale, start + i, static_cast<int>(std::min<std::int64_t>(lanes, m - i)),
                q * cut.piece, k, a + packed * q * cut.piece + i * k);
    });
    const std::int64_t stripes = pieces(m, cut.rows);
    parallel_for(n_threads, n_tasks(), [&](std::int64_t t) {
      const std::int64_t i = t % stripes * cut.rows, j = t / stripes * cut.packs * width;
      task(p, cut, a, packed, start, i, std::min(cut.rows, m - i), j,
           std::min(cut.packs * width, p.n - j));
    });
  }
}

}  // namespace narrow
}  // namespace
}  // namespace bm
