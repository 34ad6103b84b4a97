// The product of rows of a with a panel of b, of float32, part of cpu.cpp: packing, the loop over k, and
// what is brought near meanwhile.
#pragma once

#include <algorithm>
#include <cstdint>

#include "linear/blocks.hpp"
#include "native/simd.hpp"
#include "native/threads.hpp"
#include "native/transpose.hpp"

namespace bm {
namespace {

constexpr std::int64_t line = 16;              // numbers that come together from memory
constexpr std::int64_t past_caches = 1 << 20;  // numbers of c from which on it leaves the caches

BM_INLINE const float* row_of(const Operand<float>& x, std::int64_t i) {
  return x.data + (x.rows ? x.rows[i] : i) * x.row;
}
BM_INLINE std::int64_t place(const Operand<float>& x, std::int64_t j) {
  return (x.columns ? x.columns[j] : j) * x.column;
}

// Rows i .. i + n - 1 (n <= w) of columns j .. j + k - 1, to out[column][w], zeros behind row n.
template <int w>
void pack(const Operand<float>& x, const float* scale, std::int64_t i, std::int64_t n, std::int64_t j,
          std::int64_t k, float* out) {
  if (x.row == 1 && x.rows == nullptr) {  // a column's numbers lie side by side
    for (std::int64_t c = 0; c < k; ++c) {
      const float* from = x.data + i + place(x, j + c);
      const float factor = scale ? scale[x.columns[j + c]] : 1.0f;
      float* to = out + c * w;
      if (n == w) {
        for (int r = 0; r < w; ++r) to[r] = from[r] * factor;
      } else {
        for (int r = 0; r < w; ++r) to[r] = r < n ? from[r] * factor : 0.0f;
      }
    }
    return;
  }
  std::int64_t done = 0;
#if defined(__AVX512F__)
  if (w % 16 == 0 && x.column == 1 && x.columns == nullptr) {
    for (; done + 16 <= k; done += 16)
      for (int block = 0; block < w; block += 16) {
        __m512 r[16];
        for (int row = 0; row < 16; ++row)
          r[row] = block + row < n ? _mm512_loadu_ps(row_of(x, i + block + row) + j + done)
                                   : _mm512_setzero_ps();
        transpose(r);
        for (int c = 0; c < 16; ++c) _mm512_store_ps(out + (done + c) * w + block, r[c]);
      }
  }
#endif
  for (int r = 0; r < w; ++r) {
    if (r >= n) {
      for (std::int64_t c = done; c < k; ++c) out[c * w + r] = 0.0f;
      continue;
    }
    const float* from = row_of(x, i + r);
    for (std::int64_t c = done; c < k; ++c) {
      const float factor = scale ? scale[x.columns[j + c]] : 1.0f;
      out[c * w + r] = from[place(x, j + c)] * factor;
    }
  }
}

// Rows i .. i + m - 1 in packs of rows_at_once, one behind the other. Where a column's numbers lie side by
// side, two packs at a time: 16 numbers are a line.
void pack_rows(const Operand<float>& x, const float* scale, std::int64_t i, std::int64_t m, std::int64_t j,
               std::int64_t k, float* out) {
  std::int64_t r = 0;
#if defined(__AVX512F__)
  if (x.row == 1 && x.rows == nullptr)
    for (; r + 16 <= m; r += 16, out += 16 * k)
      for (std::int64_t c = 0; c < k; ++c) {
        __m512 numbers = _mm512_loadu_ps(x.data + i + r + place(x, j + c));
        if (scale) numbers = _mm512_mul_ps(numbers, _mm512_set1_ps(scale[x.columns[j + c]]));
        _mm256_storeu_ps(out + 8 * c, _mm512_castps512_ps256(numbers));
        _mm256_storeu_ps(out + 8 * (k + c), _mm512_extractf32x8_ps(numbers, 1));
      }
#endif
  for (; r < m; r += rows_at_once, out += rows_at_once * k)
    pack<rows_at_once>(x, scale, i + r, std::min<std::int64_t>(rows_at_once, m - r), j, k, out);
}

// n columns in panels of `width`. A last one of one vector would leave the units waiting: then the
// last two share what is left.
struct Panels {
  std::int64_t n, count;
  explicit Panels(std::int64_t n) : n(n), count(pieces(n, width)) {}
  std::int64_t begin(std::int64_t i) const {
    if (i == count) return n;
    const bool is_short = i == count - 1 && i > 0 && n - i * width <= lanes;
    return i * width - (is_short ? lanes : 0);
  }
  int size(std::int64_t i) const { return static_cast<int>(begin(i + 1) - begin(i)); }
};

// What happens to the sums of a piece of k.
struct Finish {
  bool first, last;  // piece: whether c is new, whether it is done
  bool streams;      // past the caches
  const float *bias, *scales;
  bool is_plain = first && bias == nullptr && scales == nullptr;  // the sums are c
};

// What to bring near while a block is at work: with each `line` numbers of k `count` lines, `next`
// apart; those of the following numbers lie `on` further. No count: nothing. And the same numbers of
// the rows of a that come next.
struct Ahead {
  const float* at;
  std::int64_t next, on;
  int count;
  const float* const* rows;
};

// R rows of c by V vectors: adds up over k numbers of a, from packs of rows_at_once or from rows,
// and a pack of b.
template <int R, int V, bool packed>
BM_INLINE void add_up(vec (&sums)[R][V], const float* const* a, const float* b, std::int64_t step,
                      std::int64_t k, Ahead ahead) {
  const float* rows[R];
  for (int r = 0; r < R; ++r) rows[r] = a[r];
  const auto one = [&](std::int64_t j) {
    vec columns[V];
    for (int v = 0; v < V; ++v) columns[v] = load(b + v * lanes);
    for (int r = 0; r < R; ++r) {
      const float x = packed ? rows[0][j * rows_at_once + r] : rows[r][j];
      for (int v = 0; v < V; ++v) sums[r][v] += x * columns[v];
    }
    b += step;
  };
  std::int64_t j = 0;
  if (ahead.count > 0 || ahead.rows != nullptr)
    for (; j + line <= k; j += line, ahead.at += ahead.on) {
      for (int i = 0; i < ahead.count; ++i) __builtin_prefetch(ahead.at + i * ahead.next, 0, 2);
      if (ahead.rows != nullptr)
        for (int i = 0; i < rows_at_once; ++i) __builtin_prefetch(ahead.rows[i] + j, 0, 3);
      for (int i = 0; i < line; ++i) one(j + i);
    }
  for (; j < k; ++j) one(j);
}

template <int R, int V, bool packed>
BM_INLINE void block(const float* const* a, const float* b, std::int64_t step, std::int64_t k,
                     float* const* c, int n, const Finish& finish, const Ahead& ahead) {
  if (!finish.streams)  // c on its way, too
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) __builtin_prefetch(c[r] + v * lanes, 1, 3);
  vec sums[R][V] = {};
  add_up<R, V, packed>(sums, a, b, step, k, ahead);
  if (finish.is_plain && n >= V * lanes) {  // without a question for each vector
    if (finish.streams) {
      for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) stream(c[r] + v * lanes, sums[r][v]);
    } else {
      for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) store(c[r] + v * lanes, sums[r][v]);
    }
    return;
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) {
      const int left = n - v * lanes;
      float* out = c[r] + v * lanes;
      vec y = sums[r][v];
      if (!finish.first)
        y += load_some(out, left);
      else if (finish.bias != nullptr)
        y += load_some(finish.bias + v * lanes, left);
      if (finish.last && finish.scales != nullptr) y *= finish.scales[r];
      if (finish.streams && left >= lanes)
        stream(out, y);
      else
        store_some(out, y, left);
    }
}

template <int R, bool packed>
void rows_block(const float* const* a, const float* b, std::int64_t step, std::int64_t k,
                float* const* c, int n, const Finish& finish, const Ahead& ahead) {
  if (n > 2 * lanes) return block<R, 3, packed>(a, b, step, k, c, n, finish, ahead);
  if (n > lanes) return block<R, 2, packed>(a, b, step, k, c, n, finish, ahead);
  return block<R, 1, packed>(a, b, step, k, c, n, finish, ahead);
}

// As many of `count` rows as one block takes: how many those are.
template <bool packed>
int some_rows(int count, const float* const* a, const float* b, std::int64_t step, std::int64_t k,
              float* const* c, int n, const Finish& finish) {
  if (count >= 4) return rows_block<4, packed>(a, b, step, k, c, n, finish, {}), 4;
  if (count >= 2) return rows_block<2, packed>(a, b, step, k, c, n, finish, {}), 2;
  return rows_block<1, packed>(a, b, step, k, c, n, finish, {}), 1;
}

// Whether a vector of c is one line of memory.
BM_INLINE bool is_aligned(const Product<float>& p) {
  return reinterpret_cast<std::uintptr_t>(p.c) % 64 == 0 && p.c_row % line == 0;
}

// What of b will be read after a panel, to be brought near meanwhile: k rows of `width` numbers, or
// `width` rows of k numbers, `step` apart. Null: nothing that is known.
struct Coming {
  const float* at;
  std::int64_t step;
  bool in_rows;
};

// The part of it for block `number` of `n_blocks` of a panel of k numbers.
BM_INLINE Ahead share(const Coming& next, std::int64_t number, std::int64_t n_blocks,
                      std::int64_t k) {
  if (next.at == nullptr) return {};
  const std::int64_t lines = k / line;
  if (!next.in_rows) {
    const std::int64_t first = number * lines;
    if (first + lines > k) return {};
    return {next.at + first * next.step, line, next.step, width / static_cast<int>(line), nullptr};
  }
  const std::int64_t each = pieces(width, n_blocks), first = number * each;
  const std::int64_t count = std::min(each, width - first);
  if (count <= 0) return {};
  return {next.at + first * next.step, next.step, line, static_cast<int>(count), nullptr};
}

// Rows i .. i + m - 1 of c, n columns from j on: k numbers from `from` on of a, or of its packs, with
// those of b. Cold: rows of a are not in the cache.
template <bool packed>
void panel(const Product<float>& p, std::int64_t i, std::int64_t m, std::int64_t j, int n,
           std::int64_t from, std::int64_t k, const float* a_pack, const float* b,
           std::int64_t step, bool is_cold, const Coming& next) {
  const bool first = from == 0 && !p.accumulate, last = from + k == p.k;
  const bool streams = first && last && p.m * p.n >= past_caches && is_aligned(p);
  const float* bias = p.bias ? p.bias + j : nullptr;
  for (std::int64_t r = 0; r < m;) {
    const float* a_rows[rows_at_once];
    float *c_rows[rows_at_once], scales[rows_at_once];
    const int count = static_cast<int>(std::min<std::int64_t>(rows_at_once, m - r));
    for (int q = 0; q < count; ++q) {
      const std::int64_t row = p.c_rows ? p.c_rows[i + r + q] : i + r + q;
      a_rows[q] = packed ? a_pack + r * k + q : row_of(p.a, i + r + q) + from;
      c_rows[q] = p.c + row * p.c_row + j;
      if (p.row_scale) scales[q] = p.row_scale[row];
    }
    if (count == rows_at_once) {
      const Finish finish{first, last, streams, bias, p.row_scale ? scales : nullptr};
      Ahead ahead = share(next, r / rows_at_once, m / rows_at_once, k);
      const float* coming_rows[rows_at_once];
      if (!packed && is_cold && r + 2 * rows_at_once <= m) {
        for (int q = 0; q < rows_at_once; ++q)
          coming_rows[q] = row_of(p.a, i + r + rows_at_once + q) + from;
        ahead.rows = coming_rows;
      }
      rows_block<rows_at_once, packed>(a_rows, b, step, k, c_rows, n, finish, ahead);
    } else {
      for (int q = 0; q < count;) {
        const Finish finish{first, last, false, bias, p.row_scale ? scales + q : nullptr};
        q += some_rows<packed>(count - q, a_rows + q, b, step, k, c_rows + q, n, finish);
      }
    }
    r += count;
  }
}

}  // namespace
}  // namespace bm
