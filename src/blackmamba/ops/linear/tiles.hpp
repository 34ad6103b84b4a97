// Products of bfloat16 by matrix units (AMX), part of cpu.cpp.
//
// A tile is 16 lines of 64 bytes: 16 rows of 32 numbers of k, or for the other side 16 pairs of k
// of 16 rows. a is packed in tiles first, 32 rows side by side, k after k, where its rows cannot be
// loaded as they lie. A task is a block of c: for one piece of k after another it packs its rows of
// b, which stay in L2, and multiplies 32 rows of a with 32 of them after the other, four tiles of
// sums at once. The sums of the 32 rows before are written meanwhile, and the next ones of a
// brought near. Where b lies in rows and meets few of a, the sides are exchanged, as b then needs
// no turning, and the sums are turned instead. Sums are float32 up to the end; numbers that are
// subnormal count as 0. Bytes moved: a once for every 512 rows of b, b once for every 1,024 of a or
// more. Bound: the caches that feed the units.
#pragma once

#include <algorithm>
#include <cstring>

#include "linear/blocks.hpp"
#include "linear/narrow.hpp"
#include "native/threads.hpp"
#include "native/transpose.hpp"

namespace bm {
namespace {
namespace tiles {

#if defined(BM_AMX) && defined(__AVX512BF16__)

using View = Operand<std::uint16_t>;

// rows, numbers of k, and both, of a tile
constexpr int side = 16, depth = 32, numbers = side * depth;
constexpr std::int64_t pack_rows = 2 * side;
constexpr std::int64_t most_piece = 512;  // of k: a pack of b stays in L1
// of c in a task of several pieces; of one, 4 times that
constexpr std::int64_t most_rows = 32 * pack_rows;
constexpr std::int64_t most_kept = 1 << 17;            // sums of a task between pieces of k
constexpr std::int64_t most_columns = 16 * pack_rows;  // of c in a task
constexpr std::int64_t most_packed = 1 << 22;          // numbers of a at a time

// ---- the unit -----------------------------------------------------------------------------------
// By name and not by intrinsics: GCC's do not say that a load reads memory.

// The calling thread's tiles, all of 16 lines of 64 bytes, for as long as this lives.
class Unit {
 public:
  Unit() {
    struct alignas(64) {
      std::uint8_t palette = 1, start = 0, reserved[14] = {};
      std::uint16_t line_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      std::uint8_t lines[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shape;
    asm volatile("ldtilecfg %0" ::"m"(shape));
  }
  ~Unit() { asm volatile("tilerelease"); }
  Unit(const Unit&) = delete;
  Unit& operator=(const Unit&) = delete;
};

template <int tile>
BM_INLINE void zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(tile));
}
template <int tile>
BM_INLINE void load(const void* p, std::int64_t line_bytes = 64) {
#if defined(BM_SANITIZE)  // which does not look into it
  for (int i = 0; i < side; ++i) {
    char seen[64];
    std::memcpy(seen, static_cast<const char*>(p) + i * line_bytes, sizeof seen);
    asm volatile("" ::"m"(seen));
  }
#endif
  asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(tile), "r"(p), "r"(line_bytes) : "memory");
}
template <int tile>
BM_INLINE void store(void* p) {
#if defined(BM_SANITIZE)
  std::memset(p, 0, 1024);
#endif
  asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(tile), "r"(p), "r"(64L) : "memory");
}
template <int sums, int rows, int pairs>
BM_INLINE void multiply_add() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sums), "i"(rows), "i"(pairs));
}

// One or two tiles for each step of k: where they lie, in numbers.
struct Tiles {
  const std::uint16_t* at;
  int count;
  std::int64_t next, step, line;  // from the first to the second, to the next step's, between lines
  std::int64_t ahead = 0;  // to what is brought near meanwhile,
  int lines = 0;           // of which so many lines at each step

  BM_INLINE void ask() const {
    for (int i = 0; i < lines; ++i) __builtin_prefetch(at + ahead + i * line, 0, 2);
  }
};

// One side's tiles times the other's over so many steps of k; sums begin with those at `from`, or
// 0. Tile (i, j) of the sums is the (2 i + j)-th at `from` and `to`. Meanwhile `beside` is called
// at each step.
template <int M, int N, class F>
BM_INLINE void block(Tiles rows, Tiles pairs, std::int64_t steps, const float* from, float* to,
                     F& beside) {
  F mine = beside;  // in registers, as its memory would be reread at each step
  const auto each = [](const auto& f0, const auto& f1, const auto& f2, const auto& f3) {
    f0();
    if constexpr (N > 1) f1();
    if constexpr (M > 1) f2();
    if constexpr (M > 1 && N > 1) f3();
  };
  if (from != nullptr)
    each([&] { load<0>(from); }, [&] { load<1>(from + 256); }, [&] { load<2>(from + 512); },
         [&] { load<3>(from + 768); });
  else
    each([] { zero<0>(); }, [] { zero<1>(); }, [] { zero<2>(); }, [] { zero<3>(); });
  for (std::int64_t i = 0; i < steps; ++i, rows.at += rows.step, pairs.at += pairs.step) {
    load<6>(pairs.at, 2 * pairs.line);
    load<4>(rows.at, 2 * rows.line);
    if constexpr (N > 1) load<7>(pairs.at + pairs.next, 2 * pairs.line);
    if constexpr (M > 1) load<5>(rows.at + rows.next, 2 * rows.line);
    each([] { multiply_add<0, 4, 6>(); }, [] { multiply_add<1, 4, 7>(); },
         [] { multiply_add<2, 5, 6>(); }, [] { multiply_add<3, 5, 7>(); });
    rows.ask();
    pairs.ask();
    mine.step();
  }
  beside = mine;
  each([&] { store<0>(to); }, [&] { store<1>(to + 256); }, [&] { store<2>(to + 512); },
       [&] { store<3>(to + 768); });
}

template <class F>
void some_tiles(const Tiles& rows, const Tiles& pairs, std::int64_t steps, const float* from,
                float* to, F& beside) {
  if (rows.count > 1 && pairs.count > 1) return block<2, 2>(rows, pairs, steps, from, to, beside);
  if (rows.count > 1) return block<2, 1>(rows, pairs, steps, from, to, beside);
  if (pairs.count > 1) return block<1, 2>(rows, pairs, steps, from, to, beside);
  return block<1, 1>(rows, pairs, steps, from, to, beside);
}

// ---- packing ------------------------------------------------------------------------------------

BM_INLINE bool in_rows(const View& x) { return x.column == 1 && x.columns == nullptr; }
BM_INLINE bool in_columns(const View& x) { return x.row == 1 && x.rows == nullptr; }

// n <= 16 numbers as the low halves of lanes; zeros behind them
BM_INLINE __m512i halves(const std::uint16_t* p, int n) {
  __m256i v;
#if defined(BM_SANITIZE)
  v = _mm256_setzero_si256();
  std::memcpy(&v, p, std::min(n, 16) * sizeof *p);
#else
  v = _mm256_maskz_loadu_epi16(first(n), p);
#endif
  return _mm512_cvtepu16_epi32(v);
}
BM_INLINE __m512i scaled(__m512i low_halves, float factor) {
  const __m512 wide = _mm512_castsi512_ps(_mm512_slli_epi32(low_halves, 16));
  const __m256bh narrow = _mm512_cvtneps_pbh(_mm512_mul_ps(wide, _mm512_set1_ps(factor)));
  return _mm512_cvtepu16_epi32((__m256i)narrow);
}

// A tile of rows i .. i + n - 1 and columns j .. j + k - 1 of x, n <= 16 and k <= 32, zeros behind
// them: of rows, or of pairs.
BM_INLINE void pack_tile(const View& x, const float* scale, std::int64_t i, int n, std::int64_t j,
                         int k, bool of_pairs, std::uint16_t* out) {
  __m512 lines[16];
  bool are_pairs = false;
  if (in_rows(x) && scale == nullptr) {
    for (int r = 0; r < 16; ++r) {
      const bf16* row = r < n ? narrow::row_of(x, i + r) + j : nullptr;
      lines[r] = r >= n     ? _mm512_setzero_ps()
                 : k == 32 ? narrow::words<true>(row, k)
                           : narrow::words<false>(row, k);
    }
  } else if (in_columns(x)) {
    are_pairs = true;
    const auto number = [&](int c) {
      if (c >= k) return _mm512_setzero_si512();
      const std::int64_t column = row_number(x.columns, j + c);
      const __m512i v = halves(x.data + i + column * x.column, n);
      return scale == nullptr ? v : scaled(v, scale[column]);
    };
    for (int p = 0; p < 16; ++p)
      lines[p] = _mm512_castsi512_ps(
          _mm512_or_si512(number(2 * p), _mm512_slli_epi32(number(2 * p + 1), 16)));
  } else {
    bf16 found[16][32] = {};
    for (int r = 0; r < n; ++r)
      for (int c = 0; c < k; ++c) {
        const std::int64_t column = row_number(x.columns, j + c);
        const bf16 one = narrow::row_of(x, i + r)[column * x.column];
        found[r][c] = scale ? from_float<bf16>(to_float(one) * scale[column]) : one;
      }
    for (int r = 0; r < 16; ++r) std::memcpy(&lines[r], found[r], 64);
  }
  if (are_pairs != of_pairs) transpose(lines);
  for (int r = 0; r < 16; ++r) std::memcpy(out + r * depth, &lines[r], 64);
}

BM_INLINE int tiles_of(std::int64_t rows) { return rows > side ? 2 : 1; }

// Rows i .. i + n - 1, n <= 32, columns j .. j + k - 1 of x: for each 32 columns its tiles side by
// side.
void pack(const View& x, const float* scale, std::int64_t i, std::int64_t n, std::int64_t j,
          std::int64_t k, bool of_pairs, std::uint16_t* out) {
  const int count = tiles_of(n);
  for (std::int64_t c = 0; c < k; c += depth)
    for (int t = 0; t < count; ++t, out += numbers)
      pack_tile(x, scale, i + t * side,
                static_cast<int>(std::min<std::int64_t>(side, n - t * side)), j + c,
                static_cast<int>(std::min<std::int64_t>(depth, k - c)), of_pairs, out);
}

// ---- a block of c -------------------------------------------------------------------------------

BM_INLINE void write(std::uint16_t* out, vec low, vec high, int n) {
#if !defined(BM_SANITIZE)
  if (n == pack_rows) {
    const __m512bh both = _mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
    _mm512_storeu_si512(out, (__m512i)both);
    return;
  }
#endif
  store_some(reinterpret_cast<bf16*>(out), low, n);
  store_some(reinterpret_cast<bf16*>(out) + side, high, n - side);
}
BM_INLINE void write(float* out, vec low, vec high, int n) {
  store_some(out, low, n);
  store_some(out + side, high, n - side);
}

// The sums of 32 rows of c on their way there, a part at each step of what is multiplied meanwhile.
// A row is written from its first column to its last: memory takes several lines of a row in a
// fraction of the time.
template <class C>
class Finish {
 public:
  Finish(const Product<std::uint16_t, C>& p, bool turned) : p_(&p), turned_(turned) {}

  // Rows i .. i + m - 1 and columns j .. j + n - 1, m <= 32: four tiles for each 32 columns, of
  // which lines are rows, or `turned` columns. In so many steps.
  void begin(float* sums, std::int64_t i, int m, std::int64_t j, std::int64_t n,
             std::int64_t steps) {
    if (turned_)
      for (std::int64_t t = 0; t < 4 * pieces(n, pack_rows); ++t)
        if (t / 2 * side < n && t % 2 * side < m) turn(sums + t * 256);
    sums_ = sums;
    i_ = i;
    j_ = j;
    n_ = n;
    m_ = m;
    at_once_ = static_cast<int>(pieces(m * pieces(n, pack_rows), steps));
    row_ = -1;
    next_row();
  }
  BM_INLINE void step() {
    for (int i = 0; i < at_once_ && row_ < m_; ++i) one();
  }
  void end() {
    while (row_ < m_) one();
  }

 private:
  static void turn(float* tile) {
    __m512 lines[16];
    std::memcpy(lines, tile, sizeof lines);
    transpose(lines);
    std::memcpy(tile, lines, sizeof lines);
  }
  BM_INLINE void next_row() {
    column_ = 0;
    if (++row_ >= m_) return;
    const std::int64_t row = row_number(p_->c_rows, i_ + row_);
    out_ = p_->c + row * p_->c_row + j_;
    at_ = sums_ + row_ / side * (turned_ ? 256 : 512) + row_ % side * side;
    scale_ = p_->row_scale ? p_->row_scale[row] : 1.0f;
  }
  BM_INLINE void one() {
    const int n = static_cast<int>(std::min(pack_rows, n_ - column_));
    vec low = bm::load(at_), high = n > side ? bm::load(at_ + (turned_ ? 512 : 256)) : vec{};
    if (p_->bias) {
      low += load_some(p_->bias + j_ + column_, n);
      if (n > side) high += load_some(p_->bias + j_ + column_ + side, n - side);
    }
    low *= scale_;
    high *= scale_;
    if (p_->accumulate) {
      low += load_some(narrow::numbers(out_), n);
      if (n > side) high += load_some(narrow::numbers(out_) + side, n - side);
    }
    write(out_, low, high, n);
    __builtin_prefetch(out_ + pack_rows * p_->c_row, 1, 2);  // written next
    at_ += 1024;
    out_ += pack_rows;
    column_ += pack_rows;
    if (column_ >= n_) next_row();
  }

  const Product<std::uint16_t, C>* p_;
  bool turned_;
  float* sums_ = nullptr;
  const float* at_ = nullptr;
  C* out_ = nullptr;
  std::int64_t i_ = 0, j_ = 0, n_ = 0, column_ = 0;
  int m_ = 0, row_ = 0, at_once_ = 0;
  float scale_ = 1;
};

// How a product is cut: the same pieces of k on any number of threads.
struct Cut {
  std::int64_t piece, n_pieces, rows, columns;  // rows and columns of c in a task
  bool turned;
  std::int64_t k_of(std::int64_t q, std::int64_t k) const { return std::min(piece, k - q * piece); }
};

BM_INLINE std::int64_t whole(std::int64_t n, std::int64_t size) { return pieces(n, size) * size; }

// Whether tiles of rows can be loaded from where x lies. Rows a multiple of 2 KiB apart share few
// lines of L1.
BM_INLINE bool in_lines(const View& x, const float* scale, std::int64_t k) {
  return in_rows(x) && x.rows == nullptr && scale == nullptr && k % depth == 0 &&
         x.row % depth == 0 && x.row % 1024 != 0 &&
         reinterpret_cast<std::uintptr_t>(x.data) % 64 == 0;
}
template <class C>
BM_INLINE bool is_read_in_place(const Product<std::uint16_t, C>& p, const Cut& cut,
                                std::int64_t m) {
  return !cut.turned && m == pack_rows && in_lines(p.a, p.k_scale, p.k);
}
BM_INLINE Tiles where_it_is(const View& x, std::int64_t i, std::int64_t j) {
  return {x.data + i * x.row + j, 2, side * x.row, depth, x.row};
}
BM_INLINE Tiles packed_at(const std::uint16_t* at, std::int64_t rows) {
  const int count = tiles_of(rows);
  return {at, count, numbers, count * numbers, depth};
}

// Rows i .. i + m - 1 of the `packed` ones in `a`, which begin with row `start`, times b's rows
// j .. j + n - 1.
template <class C>
void task(const Product<std::uint16_t, C>& p, const Cut& cut, const std::uint16_t* a,
          std::int64_t packed, std::int64_t start, std::int64_t i, std::int64_t m, std::int64_t j,
          std::int64_t n) {
  constexpr int sums = 4 * 256;
  const std::int64_t packs = pieces(n, pack_rows), blocks = pieces(m, pack_rows);
  const bool several = cut.n_pieces > 1;
  std::uint16_t* const b = scratch<std::uint16_t>(Slot::b, packs * pack_rows * cut.piece);
  float* const kept = scratch<float>(Slot::a, (several ? blocks : 2) * packs * sums);
  const Unit unit;
  Finish<C> finish(p, cut.turned);
  const auto width_of = [&](std::int64_t pack) {
    return static_cast<int>(std::min(pack_rows, n - pack * pack_rows));
  };
  const auto b_in_place = [&](std::int64_t pack) {
    return cut.turned && width_of(pack) == pack_rows && in_lines(p.b, nullptr, p.k);
  };
  for (std::int64_t q = 0; q < cut.n_pieces; ++q) {
    const std::int64_t from = q * cut.piece, k = cut.k_of(q, p.k), steps = pieces(k, depth);
    const auto rows_at = [&](std::int64_t r) {
      const int count = static_cast<int>(std::min(pack_rows, m - r * pack_rows));
      const std::int64_t row = i + r * pack_rows;
      return is_read_in_place(p, cut, count)
                 ? where_it_is(p.a, start + row, from)
                 : packed_at(a + packed * from + row * steps * depth, count);
    };
    for (std::int64_t of_b = 0; of_b < packs; ++of_b)
      if (!b_in_place(of_b))
        pack(p.b, nullptr, j + of_b * pack_rows, width_of(of_b), from, k, !cut.turned,
             b + of_b * pack_rows * cut.piece);
    for (std::int64_t r = 0; r < blocks; ++r) {
      const int count = static_cast<int>(std::min(pack_rows, m - r * pack_rows));
      const std::int64_t row = i + r * pack_rows;
      Tiles left = rows_at(r);
      std::int64_t to_next = 0;
      if (r + 1 < blocks && !cut.turned && packs >= 4) {
        const Tiles next = rows_at(r + 1);
        if (next.line == left.line) {  // both packed, or both not
          left.lines = static_cast<int>(pieces(pack_rows, packs));
          to_next = next.at - left.at;
        }
      }
      for (std::int64_t of_b = 0; of_b < packs; ++of_b) {
        left.ahead = to_next + of_b * left.lines * left.line;
        const std::int64_t column = j + of_b * pack_rows;
        Tiles right = b_in_place(of_b)
                          ? where_it_is(p.b, column, from)
                          : packed_at(b + of_b * pack_rows * cut.piece, width_of(of_b));
        if (r == 0 && b_in_place(of_b)) {
          right.ahead = pack_rows * p.b.row;
          right.lines = pack_rows;
        }
        float* const to = kept + ((several ? r : r % 2) * packs + of_b) * sums;
        const float* const before = q > 0 ? to : nullptr;
        if (cut.turned)
          some_tiles(right, left, steps, before, to, finish);
        else
          some_tiles(left, right, steps, before, to, finish);
      }
      finish.end();
      if (q + 1 == cut.n_pieces)
        finish.begin(kept + (several ? r : r % 2) * packs * sums, start + row, count, j, n,
                     packs * steps);
    }
  }
  finish.end();
}

template <class C>
void multiply(const Product<std::uint16_t, C>& p) {
  if (p.m == 0 || p.n == 0) return;
  if (p.k == 0) return without_terms(p);
  const int n_threads = p.m * p.n * p.k < small ? 1 : p.n_threads;
  Cut cut;
  cut.piece = whole(pieces(p.k, pieces(p.k, most_piece)), depth);
  cut.n_pieces = pieces(p.k, cut.piece);
  const std::int64_t k_all = whole(p.k, depth);
  const std::int64_t m_part = std::max(2 * pack_rows, most_packed / k_all / pack_rows * pack_rows);
  for (std::int64_t start = 0; start < p.m; start += m_part) {
    const std::int64_t m = std::min(m_part, p.m - start), packed = whole(m, side);
    // turning a tile of b takes some 60 cycles, of sums 70
    cut.turned = in_rows(p.b) && 70 * 2 * m < 60 * k_all;
    cut.rows = std::min(whole(m, pack_rows), cut.n_pieces > 1 ? most_rows : 4 * most_rows);
    cut.columns = most_columns;
    if (cut.n_pieces > 1)
      cut.columns =
          std::clamp(most_kept / cut.rows / pack_rows * pack_rows, pack_rows, most_columns);
    const auto n_tasks = [&] { return pieces(m, cut.rows) * pieces(p.n, cut.columns); };
    while (n_tasks() < 8 && cut.columns > pack_rows)
      cut.columns = whole(cut.columns / 2, pack_rows);
    while (n_tasks() < 8 && cut.rows > 2 * pack_rows) cut.rows = whole(cut.rows / 2, pack_rows);

    std::uint16_t* const a = scratch<std::uint16_t>(Slot::d, packed * k_all);
    const std::int64_t blocks = pieces(m, pack_rows);
    parallel_for(n_threads, cut.n_pieces * blocks, [&](std::int64_t t) {
      const std::int64_t q = t / blocks, i = t % blocks * pack_rows, k = cut.k_of(q, p.k);
      if (is_read_in_place(p, cut, std::min(pack_rows, m - i))) return;
      pack(p.a, p.k_scale, start + i, std::min(pack_rows, m - i), q * cut.piece, k, cut.turned,
           a + packed * q * cut.piece + i * whole(k, depth));
    });
    const std::int64_t stripes = pieces(m, cut.rows);
    parallel_for(n_threads, n_tasks(), [&](std::int64_t t) {
      const std::int64_t i = t % stripes * cut.rows, j = t / stripes * cut.columns;
      task(p, cut, a, packed, start, i, std::min(cut.rows, m - i), j,
           std::min(cut.columns, p.n - j));
    });
  }
}

#else

template <class C>
constexpr void (*multiply)(const Product<std::uint16_t, C>& p) = nullptr;

#endif

}  // namespace tiles
}  // namespace
}  // namespace bm
