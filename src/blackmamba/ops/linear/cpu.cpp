// The rows of b are packed 3 vectors side by side, k after k; a task is a block of c: for one piece
// of k after another it multiplies rows of a, 8 at a time, with each pack, adding
// up in 24 registers. Rows of a whose numbers do not lie side by side are packed as well. Bytes
// moved: little beside the work, unless a side is short. Bound: the multiply-add units.
//
// Of a few hundred rows of a, memory is felt: then b is read where it is, the next part of it on its
// way while one is worked on; or, where b lies in rows, a is what is packed and c comes out across.
// A c larger than the caches goes past them.
//
// Source: the blocking is that of Goto and van de Geijn 2008 (doi 10.1145/1356052.1356053).
#include "linear/cpu.hpp"

#include <algorithm>
#include <utility>

#include "linear/blocks.hpp"
#include "linear/narrow.hpp"
#include "native/simd.hpp"
#include "native/threads.hpp"
#include "native/transpose.hpp"

namespace bm {
namespace {

constexpr std::int64_t most_columns = 16 * width;      // of c in a task
constexpr std::int64_t most_rows = 16 * rows_at_once;  // of c in a task
constexpr std::int64_t most_packed = 1 << 22;          // numbers of b at a time
constexpr std::int64_t few_rows = 512;  // of c, for which packing b costs more than it saves
constexpr std::int64_t across_k = 2 * most_k;  // of a piece where c comes out across
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
  if (x.row == 1 && x.rows == nullptr && scale == nullptr)
    for (; r + 16 <= m; r += 16, out += 16 * k)
      for (std::int64_t c = 0; c < k; ++c) {
        const __m512 numbers = _mm512_loadu_ps(x.data + i + r + place(x, j + c));
        _mm256_storeu_ps(out + 8 * c, _mm512_castps512_ps256(numbers));
        _mm256_storeu_ps(out + 8 * (k + c), _mm512_extractf32x8_ps(numbers, 1));
      }
#endif
  for (; r < m; r += rows_at_once, out += rows_at_once * k)
    pack<rows_at_once>(x, scale, i + r, std::min<std::int64_t>(rows_at_once, m - r), j, k, out);
}

// What happens to the sums of a piece of k.
struct Finish {
  bool first, last;  // piece: whether c is new, whether it is done
  bool streams;      // past the caches
  const float *bias, *scales;
};

// What to bring near while a block is at work: with each `line` numbers of k `count` lines, `next`
// apart; those of the following numbers lie `on` further. No count: nothing.
struct Ahead {
  const float* at;
  std::int64_t next, on;
  int count;
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
  if (ahead.count > 0)
    for (; j + line <= k; j += line, ahead.at += ahead.on) {
      for (int i = 0; i < ahead.count; ++i) __builtin_prefetch(ahead.at + i * ahead.next, 0, 2);
      for (int i = 0; i < line; ++i) one(j + i);
    }
  for (; j < k; ++j) one(j);
}

template <int R, int V, bool packed>
BM_INLINE void block(const float* const* a, const float* b, std::int64_t step, std::int64_t k,
                     float* const* c, int n, const Finish& finish, const Ahead& ahead) {
  vec sums[R][V] = {};
  add_up<R, V, packed>(sums, a, b, step, k, ahead);
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

// The same across: row r of the sums goes to number r of each of c's n rows. A bias is one number a
// row of the sums, a scale one a row of c.
template <int R, int V>
BM_INLINE void block_across(const float* const* a, const float* b, std::int64_t k, float* const* c,
                            int n, const Finish& finish, const Ahead& ahead) {
  vec sums[R][V] = {};
  add_up<R, V, false>(sums, a, b, width, k, ahead);
  float across[R][V * lanes];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) {
      const bool biased = finish.first && finish.bias != nullptr;
      store(across[r] + v * lanes, biased ? sums[r][v] + finish.bias[r] : sums[r][v]);
    }
  for (int i = 0; i < n; ++i)
    for (int r = 0; r < R; ++r) {
      const float y = finish.first ? across[r][i] : c[i][r] + across[r][i];
      c[i][r] = finish.last && finish.scales != nullptr ? y * finish.scales[i] : y;
    }
}

template <int R, bool packed>
void rows_block(const float* const* a, const float* b, std::int64_t step, std::int64_t k,
                float* const* c, int n, const Finish& finish, const Ahead& ahead) {
  if (n > 2 * lanes) return block<R, 3, packed>(a, b, step, k, c, n, finish, ahead);
  if (n > lanes) return block<R, 2, packed>(a, b, step, k, c, n, finish, ahead);
  return block<R, 1, packed>(a, b, step, k, c, n, finish, ahead);
}

template <int R>
void rows_across(const float* const* a, const float* b, std::int64_t k, float* const* c, int n,
                 const Finish& finish, const Ahead& ahead) {
  if (n > 2 * lanes) return block_across<R, 3>(a, b, k, c, n, finish, ahead);
  if (n > lanes) return block_across<R, 2>(a, b, k, c, n, finish, ahead);
  return block_across<R, 1>(a, b, k, c, n, finish, ahead);
}

// Whether rows of b can be read where they are: for few rows of c, packing is not worth it.
BM_INLINE bool b_in_place(const Product<float>& p) {
  return p.b.row == 1 && p.b.rows == nullptr && p.b.columns == nullptr && p.m <= few_rows;
}

// Whether a vector of c is one line of memory.
BM_INLINE bool is_aligned(const Product<float>& p) {
  return reinterpret_cast<std::uintptr_t>(p.c) % 64 == 0 && p.c_row % line == 0;
}

// The block of c of rows i .. i + m - 1 and columns j .. j + n - 1 for k numbers from k_start; b is
// packed from column j.
template <bool packed>
void task(const Product<float>& p, std::int64_t i, std::int64_t m, std::int64_t j, std::int64_t n,
          std::int64_t k_start, std::int64_t k_all, const float* b) {
  const std::int64_t n_pieces = pieces(k_all, most_k), piece = pieces(k_all, n_pieces);
  float* a_pack = packed ? scratch<float>(Slot::a, pieces(m, rows_at_once) * rows_at_once * piece)
                         : nullptr;
  for (std::int64_t done = 0; done < k_all; done += piece) {
    const std::int64_t k = std::min(piece, k_all - done), from = k_start + done;
    if (packed) pack_rows(p.a, p.k_scale, i, m, from, k, a_pack);
    for (std::int64_t column = 0; column < n; column += width) {
      const int left = static_cast<int>(std::min<std::int64_t>(width, n - column));
      const bool in_place = left == width && b_in_place(p);
      const float* b_pack = in_place ? p.b.data + j + column + from * p.b.column
                                     : b + column * k_all + done * width;
      const std::int64_t step = in_place ? p.b.column : width, lines = k / line;
      const float* next = nullptr;  // part of b in place: beside this one, or behind it
      if (in_place && column + 2 * width <= n)
        next = b_pack + width;
      else if (in_place && done + piece < k_all)
        next = p.b.data + j + (from + k) * p.b.column;
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
        const bool first = from == 0 && !p.accumulate, last = from + k == p.k;
        const Finish finish{first, last, first && last && p.m * p.n >= past_caches && is_aligned(p),
                            p.bias ? p.bias + j + column : nullptr, p.row_scale ? scales : nullptr};
        Ahead ahead{};
        const std::int64_t place = r / rows_at_once * lines;  // of `next`, whose k rows have 3 lines
        if (next != nullptr && place + lines <= k)
          ahead = {next + place * step, line, step, width / static_cast<int>(line)};
        if (count == rows_at_once) {
          rows_block<rows_at_once, packed>(a_rows, b_pack, step, k, c_rows, left, finish, ahead);
        } else {
          int q = 0;
          for (; q + 2 <= count; q += 2) {
            const Finish part{first, last, false, finish.bias,
                              finish.scales ? finish.scales + q : nullptr};
            rows_block<2, packed>(a_rows + q, b_pack, step, k, c_rows + q, left, part, {});
          }
          if (q < count) {
            const Finish part{first, last, false, finish.bias,
                              finish.scales ? finish.scales + q : nullptr};
            rows_block<1, packed>(a_rows + q, b_pack, step, k, c_rows + q, left, part, {});
          }
        }
        r += count;
      }
    }
  }
}

// Rows i .. i + m - 1 of a, times packs of all of b, to columns of c: a and b are exchanged here.
void task_across(const Product<float>& p, std::int64_t i, std::int64_t m, const float* b) {
  const std::int64_t panels = pieces(p.n, width);
  for (std::int64_t from = 0; from < p.k; from += across_k) {
    const std::int64_t k = std::min(across_k, p.k - from);
    for (std::int64_t r = 0; r < m; r += rows_at_once) {
      const int count = static_cast<int>(std::min<std::int64_t>(rows_at_once, m - r));
      const float* a_rows[rows_at_once];
      for (int q = 0; q < count; ++q) a_rows[q] = row_of(p.a, i + r + q) + from;
      for (std::int64_t panel = 0; panel < panels; ++panel) {
        const std::int64_t column = panel * width;
        const int left = static_cast<int>(std::min<std::int64_t>(width, p.n - column));
        const float* pack = b + column * p.k + from * width;
        float *c_rows[width], scales[width];
        for (int t = 0; t < left; ++t) {
          const std::int64_t row = p.c_rows ? p.c_rows[column + t] : column + t;
          c_rows[t] = p.c + row * p.c_row + i + r;
          if (p.row_scale) scales[t] = p.row_scale[row];
        }
        Finish finish{from == 0 && !p.accumulate, from + k == p.k, false,
                      p.bias ? p.bias + i + r : nullptr, p.row_scale ? scales : nullptr};
        if (count == rows_at_once) {
          Ahead ahead{};  // each panel's share of the next rows
          if (r + 2 * rows_at_once <= m) {
            const std::int64_t begin = panel * rows_at_once / panels;
            const std::int64_t end = (panel + 1) * rows_at_once / panels;
            ahead = {row_of(p.a, i + r + rows_at_once + begin) + from, p.a.row, line,
                     static_cast<int>(end - begin)};
          }
          rows_across<rows_at_once>(a_rows, pack, k, c_rows, left, finish, ahead);
          continue;
        }
        for (int q = 0; q < count; ++q) {
          rows_across<1>(a_rows + q, pack, k, c_rows, left, finish, {});
          for (int t = 0; t < left; ++t) ++c_rows[t];
          if (finish.bias != nullptr) ++finish.bias;
        }
      }
    }
  }
}

// Whether c should come out across: few rows of a, to be packed in place of many long ones of b.
bool wants_across(const Product<float>& p) {
  return p.m >= width && p.m <= few_rows && p.n >= 2 * p.m && p.k >= 128 &&
         p.m * p.k <= most_packed && p.b.column == 1 && p.b.rows == nullptr &&
         p.b.columns == nullptr && p.k_scale == nullptr;
}

void multiply_across(Product<float> p) {
  std::swap(p.a, p.b);
  std::swap(p.m, p.n);
  const std::int64_t panels = pieces(p.n, width), k_pieces = pieces(p.k, most_k);
  float* b = scratch<float>(Slot::d, panels * width * p.k);
  parallel_for(p.n_threads, panels * k_pieces, [&](std::int64_t i) {
    const std::int64_t j = i % panels * width, from = i / panels * most_k;
    pack<width>(p.b, nullptr, j, std::min<std::int64_t>(width, p.n - j), from,
                std::min(most_k, p.k - from), b + j * p.k + from * width);
  });
  std::int64_t rows = most_rows;
  while (pieces(p.m, rows) < 16 && rows > rows_at_once) rows /= 2;
  parallel_for(p.n_threads, pieces(p.m, rows), [&](std::int64_t t) {
    task_across(p, t * rows, std::min(rows, p.m - t * rows), b);
  });
}

void multiply(const Product<float>& p) {
  if (p.m == 0 || p.n == 0) return;
  if (p.k == 0) return without_terms(p);
  const int n_threads = p.m * p.n * p.k < small ? 1 : p.n_threads;
  if (n_threads == p.n_threads && wants_across(p)) return multiply_across(p);
  const bool a_in_rows = p.a.column == 1 && p.a.columns == nullptr && p.k_scale == nullptr;

  // b a part at a time: few rows of many columns are cut in columns
  const std::int64_t k_part = std::min<std::int64_t>(p.k, most_packed / most_columns);
  const std::int64_t n_part =
      std::max<std::int64_t>(1, most_packed / k_part / most_columns) * most_columns;
  // blocks small enough that there is work for several threads
  std::int64_t rows = most_rows, columns = most_columns;
  const auto n_blocks = [&] { return pieces(p.m, rows) * pieces(std::min(p.n, n_part), columns); };
  // where b is read in place, as few as can be: its rows then come in long pieces, and once
  const std::int64_t enough = b_in_place(p) ? 2 * n_threads : 16;
  const std::int64_t narrow = b_in_place(p) ? width : 4 * width;
  while (n_blocks() < enough && columns > narrow) columns /= 2;
  while (n_blocks() < enough && rows > 4 * rows_at_once) rows /= 2;
  while (n_blocks() < enough && columns > width) columns /= 2;

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
        stream_ends();
      });
    }
  }
}

}  // namespace

BM_DEFINE(Linear, linear) = {multiply, narrow::multiply<std::uint16_t>, narrow::multiply<float>};

}  // namespace bm
