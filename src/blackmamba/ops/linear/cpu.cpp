// The rows of b are packed 3 vectors side by side, k after k; a task is a block of c: for one piece
// of k after another it multiplies rows of a, 8 at a time, with each pack, adding
// up in 24 registers. Rows of a whose numbers do not lie side by side are packed as well. Bytes
// moved: little beside the work, unless a side is short. Bound: the multiply-add units.
//
// Source: the blocking is that of Goto and van de Geijn 2008 (doi 10.1145/1356052.1356053).
#include "linear/cpu.hpp"

#include <algorithm>

#include "native/simd.hpp"
#include "native/threads.hpp"

namespace bm {
namespace {

constexpr int rows_at_once = lanes == 16 ? 8 : 4, vectors = 3, width = vectors * lanes;
constexpr std::int64_t most_k = 384;                   // of a piece: a pack of b stays in L2
constexpr std::int64_t most_columns = 16 * width;      // of c in a task
constexpr std::int64_t most_rows = 16 * rows_at_once;  // of c in a task
constexpr std::int64_t most_packed = 1 << 22;          // numbers of b at a time
constexpr std::int64_t few_rows = 512;  // of c, for which packing b costs more than it saves
constexpr std::int64_t small = 1 << 17;  // multiply-adds below which waking threads costs more

constexpr std::int64_t pieces(std::int64_t n, std::int64_t size) { return (n + size - 1) / size; }

BM_INLINE const float* row_of(const Operand& x, std::int64_t i) {
  return x.data + (x.rows ? x.rows[i] : i) * x.row;
}
BM_INLINE std::int64_t place(const Operand& x, std::int64_t j) {
  return (x.columns ? x.columns[j] : j) * x.column;
}

#if defined(__AVX512F__)
// 16 rows of 16 numbers to 16 columns, in registers
BM_INLINE void transpose(__m512 (&r)[16]) {
  __m512 t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    const auto low = [](__m512 a, __m512 b) {
      return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
    };
    const auto high = [](__m512 a, __m512 b) {
      return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
    };
    r[i] = low(t[i], t[i + 2]);
    r[i + 1] = high(t[i], t[i + 2]);
    r[i + 2] = low(t[i + 1], t[i + 3]);
    r[i + 3] = high(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd);
  }
}
#endif

// Rows i .. i + n - 1 (n <= w) of columns j .. j + k - 1, to out[column][w], zeros behind row n.
template <int w>
void pack(const Operand& x, const float* scale, std::int64_t i, std::int64_t n, std::int64_t j,
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

// What happens to the sums of a piece of k.
struct Finish {
  bool first, last;  // piece: whether c is new, whether it is done
  const float *bias, *scales;
};

// R rows of c by V vectors: adds up over k numbers of a, from packs of rows_at_once or from rows,
// and a pack of b.
template <int R, int V, bool packed>
BM_INLINE void block(const float* const* a, const float* b, std::int64_t step, std::int64_t k,
                     float* const* c, int n, const Finish& finish) {
  vec sums[R][V] = {};
  const float* rows[R];
  for (int r = 0; r < R; ++r) rows[r] = a[r];
  for (std::int64_t j = 0; j < k; ++j, b += step) {
    vec columns[V];
    for (int v = 0; v < V; ++v) columns[v] = load(b + v * lanes);
    for (int r = 0; r < R; ++r) {
      const float x = packed ? rows[0][j * rows_at_once + r] : rows[r][j];
      for (int v = 0; v < V; ++v) sums[r][v] += x * columns[v];
    }
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
      store_some(out, y, left);
    }
}

template <int R, bool packed>
void rows_block(const float* const* a, const float* b, std::int64_t step, std::int64_t k,
                float* const* c, int n, const Finish& finish) {
  if (n > 2 * lanes) return block<R, 3, packed>(a, b, step, k, c, n, finish);
  if (n > lanes) return block<R, 2, packed>(a, b, step, k, c, n, finish);
  return block<R, 1, packed>(a, b, step, k, c, n, finish);
}

// Whether rows of b can be read where they are: for few rows of c, packing is not worth it.
BM_INLINE bool b_in_place(const Product& p) {
  return p.b.row == 1 && p.b.rows == nullptr && p.b.columns == nullptr && p.m <= few_rows;
}

// The block of c of rows i .. i + m - 1 and columns j .. j + n - 1 for k numbers from k_start; b is
// packed from column j.
template <bool packed>
void task(const Product& p, std::int64_t i, std::int64_t m, std::int64_t j, std::int64_t n,
          std::int64_t k_start, std::int64_t k_all, const float* b) {
  const std::int64_t n_pieces = pieces(k_all, most_k), piece = pieces(k_all, n_pieces);
  float* a_pack = packed ? scratch<float>(Slot::a, pieces(m, rows_at_once) * rows_at_once * piece)
                         : nullptr;
  for (std::int64_t done = 0; done < k_all; done += piece) {
    const std::int64_t k = std::min(piece, k_all - done), from = k_start + done;
    if (packed)
      for (std::int64_t r = 0; r < m; r += rows_at_once)
        pack<rows_at_once>(p.a, p.k_scale, i + r, std::min<std::int64_t>(rows_at_once, m - r), from,
                           k, a_pack + r * k);
    for (std::int64_t column = 0; column < n; column += width) {
      const int left = static_cast<int>(std::min<std::int64_t>(width, n - column));
      const bool in_place = left == width && b_in_place(p);
      const float* b_pack = in_place ? p.b.data + j + column + from * p.b.column
                                     : b + column * k_all + done * width;
      const std::int64_t step = in_place ? p.b.column : width;
      for (std::int64_t r = 0; r < m;) {
        const float* a_rows[rows_at_once];
        float *c_rows[rows_at_once], scales[rows_at_once];
        const int count = static_cast<int>(std::min<std::int64_t>(rows_at_once, m - r));
        for (int q = 0; q < count; ++q) {
          const std::int64_t row = p.c_rows ? p.c_rows[i + r + q] : i + r + q;
          a_rows[q] = packed ? a_pack + r * k + q : row_of(p.a, i + r + q) + from;
          c_rows[q] = p.c + row * p.c_row + j + column;
          if (p.row_scale) scales[q] = p.row_scale[row];
        }
        const Finish finish{from == 0 && !p.accumulate, from + k == p.k,
                            p.bias ? p.bias + j + column : nullptr, p.row_scale ? scales : nullptr};
        if (count == rows_at_once) {
          rows_block<rows_at_once, packed>(a_rows, b_pack, step, k, c_rows, left, finish);
        } else {
          int q = 0;
          for (; q + 2 <= count; q += 2) {
            const Finish part{finish.first, finish.last, finish.bias,
                              finish.scales ? finish.scales + q : nullptr};
            rows_block<2, packed>(a_rows + q, b_pack, step, k, c_rows + q, left, part);
          }
          if (q < count) {
            const Finish part{finish.first, finish.last, finish.bias,
                              finish.scales ? finish.scales + q : nullptr};
            rows_block<1, packed>(a_rows + q, b_pack, step, k, c_rows + q, left, part);
          }
        }
        r += count;
      }
    }
  }
}

// The product without terms: zeros, or the bias.
void without_terms(const Product& p) {
  for (std::int64_t i = 0; i < p.m && !p.accumulate; ++i) {
    const std::int64_t row = p.c_rows ? p.c_rows[i] : i;
    const float scale = p.row_scale ? p.row_scale[row] : 1.0f;
    for (std::int64_t j = 0; j < p.n; ++j)
      p.c[row * p.c_row + j] = p.bias ? p.bias[j] * scale : 0.0f;
  }
}

void multiply(const Product& p) {
  if (p.m == 0 || p.n == 0) return;
  if (p.k == 0) return without_terms(p);
  const int n_threads = p.m * p.n * p.k < small ? 1 : p.n_threads;
  const bool a_in_rows = p.a.column == 1 && p.a.columns == nullptr && p.k_scale == nullptr;

  // b a part at a time: few rows of many columns are cut in columns
  const std::int64_t k_part = std::min<std::int64_t>(p.k, most_packed / most_columns);
  const std::int64_t n_part =
      std::max<std::int64_t>(1, most_packed / k_part / most_columns) * most_columns;
  // blocks small enough that there is work for several threads
  std::int64_t rows = most_rows, columns = most_columns;
  const auto n_blocks = [&] { return pieces(p.m, rows) * pieces(std::min(p.n, n_part), columns); };
  while (n_blocks() < 16 && columns > 4 * width) columns /= 2;
  while (n_blocks() < 16 && rows > 4 * rows_at_once) rows /= 2;
  while (n_blocks() < 16 && columns > width) columns /= 2;

  for (std::int64_t n_start = 0; n_start < p.n; n_start += n_part) {
    const std::int64_t n = std::min(n_part, p.n - n_start), packs = pieces(n, width);
    for (std::int64_t k_start = 0; k_start < p.k; k_start += k_part) {
      const std::int64_t k = std::min(k_part, p.k - k_start);
      float* b = scratch<float>(Slot::d, packs * width * k);
      parallel_for(n_threads, packs, [&](std::int64_t i) {
        const std::int64_t j = i * width;
        if (n - j >= width && b_in_place(p)) return;
        pack<width>(p.b, nullptr, n_start + j, std::min<std::int64_t>(width, n - j), k_start, k,
                    b + j * k);
      });
      const std::int64_t n_rows = pieces(p.m, rows);
      parallel_for(n_threads, n_rows * pieces(n, columns), [&](std::int64_t t) {
        const std::int64_t i = t % n_rows * rows, j = t / n_rows * columns;
        const auto run = a_in_rows ? task<false> : task<true>;
        run(p, i, std::min(rows, p.m - i), n_start + j, std::min(columns, n - j), k_start, k,
            b + j * k);
      });
    }
  }
}

}  // namespace

BM_DEFINE(Linear, linear) = {multiply};

}  // namespace bm
