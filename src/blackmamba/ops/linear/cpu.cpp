// The rows of b are packed 3 vectors side by side, k after k; a task is a block of c: for one piece
// of k after another it multiplies rows of a, 8 at a time, with each pack, adding
// up in 24 registers. Rows of a whose numbers do not lie side by side are packed as well. What comes
// next is on its way from memory meanwhile. Bytes moved: little beside the work, unless a side is short.
// Bound: the multiply-add units.
//
// Of a few hundred rows of a, memory is felt: then b is read where it is; or, where b lies in rows, a
// task packs its own part. A c larger than the caches goes past them.
//
// Source: the blocking is that of Goto and van de Geijn 2008 (doi 10.1145/1356052.1356053).
#include "linear/cpu.hpp"

#include <algorithm>

#include "linear/narrow.hpp"
#include "linear/panels.hpp"
#include "linear/tiles.hpp"
#include "native/crew.hpp"

namespace bm {
namespace {

constexpr std::int64_t most_columns = 16 * width;      // of c in a task
constexpr std::int64_t most_rows = 16 * rows_at_once;  // of c in a task
constexpr std::int64_t most_packed = 1 << 22;          // numbers of b at a time
constexpr std::int64_t few_rows = 512;  // of c, for which packing b costs more than it saves

// Whether rows of b can be read where they are: for few rows of c, packing is not worth it.
BM_INLINE bool b_in_place(const Product<float>& p, int columns) {
  return columns % lanes == 0 && p.b.row == 1 && p.b.rows == nullptr && p.b.columns == nullptr &&
         p.m <= few_rows;
}

// Memory for packs of m rows of a.
BM_INLINE float* room_for_rows(std::int64_t m, std::int64_t k) {
  return scratch<float>(Slot::a, pieces(m, rows_at_once) * rows_at_once * k);
}

// The block of c of rows i .. i + m - 1 and of panels first .. last - 1, of columns from `start` on, for
// k numbers from k_start; b has a pack for each panel.
template <bool packed>
void task(const Product<float>& p, std::int64_t i, std::int64_t m, std::int64_t start,
          const Panels& panels, std::int64_t first, std::int64_t last, std::int64_t k_start,
          std::int64_t k_all, const float* b) {
  const std::int64_t n_pieces = pieces(k_all, most_k), piece = pieces(k_all, n_pieces);
  float* a_pack = packed ? room_for_rows(m, piece) : nullptr;
  for (std::int64_t done = 0; done < k_all; done += piece) {
    const std::int64_t k = std::min(piece, k_all - done), from = k_start + done;
    if (packed) pack_rows(p.a, p.k_scale, i, m, from, k, a_pack);
    for (std::int64_t at = first; at < last; ++at) {
      const std::int64_t j = start + panels.begin(at);
      const int n = panels.size(at);
      const bool in_place = b_in_place(p, n);
      const float* b_pack = in_place ? p.b.data + j + from * p.b.column
                                     : b + at * width * k_all + done * width;
      Coming next{nullptr, in_place ? p.b.column : width, false};  // beside this one, or behind it
      if (at + 1 < last)
        next.at = in_place ? b_pack + n : b_pack + width * k_all;
      else if (done + piece < k_all)
        next.at = in_place ? p.b.data + start + panels.begin(first) + (from + k) * p.b.column
                           : b + first * width * k_all + (done + piece) * width;
      panel<packed>(p, i, m, j, n, from, k, a_pack, b_pack, next.step, at == first, next);
    }
  }
}

// Whether rows of a can be read where they are.
BM_INLINE bool a_in_rows(const Product<float>& p) {
  return p.a.column == 1 && p.a.columns == nullptr && p.k_scale == nullptr;
}

// The same of all k, where nobody has packed b: the task does, a panel before it is used. The task after
// this one begins with panel `then` of `after`, if there is one.
template <bool packed>
void task_that_packs(const Product<float>& p, std::int64_t i, std::int64_t m, std::int64_t first,
                     std::int64_t last, const Product<float>* after, std::int64_t then) {
  const Panels panels(p.n);
  const std::int64_t n_pieces = pieces(p.k, most_k), piece = pieces(p.k, n_pieces);
  float* a_pack = packed ? room_for_rows(m, piece) : nullptr;
  float* b = scratch<float>(Slot::b, width * piece);
  const auto coming = [](const Product<float>& q, std::int64_t column, std::int64_t from) {
    const bool in_rows = q.b.column == 1;
    if (q.b.rows != nullptr || q.b.columns != nullptr) return Coming{};
    return Coming{q.b.data + column * q.b.row + from * q.b.column, in_rows ? q.b.row : q.b.column,
                  in_rows};
  };
  for (std::int64_t from = 0; from < p.k; from += piece) {
    const std::int64_t k = std::min(piece, p.k - from);
    if (packed) pack_rows(p.a, p.k_scale, i, m, from, k, a_pack);
    for (std::int64_t at = first; at < last; ++at) {
      const std::int64_t j = panels.begin(at);
      pack<width>(p.b, nullptr, j, panels.size(at), from, k, b);
      Coming next{};
      if (at + 1 < last)
        next = coming(p, panels.begin(at + 1), from);
      else if (from + k < p.k)
        next = coming(p, panels.begin(first), from + k);
      else if (after != nullptr)
        next = coming(*after, Panels(after->n).begin(then), 0);
      panel<packed>(p, i, m, j, panels.size(at), from, k, a_pack, b, width, at == 0, next);
    }
  }
}

// Whether tasks should pack b: its rows are long or meet few of a, or all have few numbers.
bool packs_in_tasks(const Product<float>& p) {
  if (!a_in_rows(p)) return p.k <= most_k && p.m >= 4 * few_rows;
  return p.b.column == 1 && p.b.rows == nullptr && p.b.columns == nullptr &&
         (p.m <= few_rows || p.k <= most_k);
}

void multiply_each(const Product<float>* products, std::int64_t count, int n_threads);

void multiply(const Product<float>& p) {
  if (p.m == 0 || p.n == 0) return;
  if (p.k == 0) return without_terms(p);
  if (packs_in_tasks(p)) return multiply_each(&p, 1, p.n_threads);
  const int n_threads = p.m * p.n * p.k < small ? 1 : p.n_threads;
  const auto run = a_in_rows(p) ? task<false> : task<true>;

  // b a part at a time: few rows of many columns are cut in columns
  const std::int64_t k_part = std::min<std::int64_t>(p.k, most_packed / most_columns);
  const std::int64_t n_part =
      std::max<std::int64_t>(1, most_packed / k_part / most_columns) * most_columns;
  // blocks small enough that there is work for several threads
  std::int64_t rows = most_rows, columns = most_columns;
  const auto n_blocks = [&] { return pieces(p.m, rows) * pieces(std::min(p.n, n_part), columns); };
  // where b is read in place, as few as can be: its rows then come in long pieces, and once
  const std::int64_t enough = b_in_place(p, width) ? 2 * n_threads : 16;
  const std::int64_t narrow = b_in_place(p, width) ? width : 4 * width;
  // a that has to be packed, for as many columns as can be
  const bool is_wide = !a_in_rows(p) && p.n <= most_columns;
  while (n_blocks() < enough && columns > narrow && !is_wide) columns /= 2;
  while (n_blocks() < enough && rows > 4 * rows_at_once) rows /= 2;
  while (n_blocks() < enough && columns > width) columns /= 2;

  for (std::int64_t n_start = 0; n_start < p.n; n_start += n_part) {
    const Panels panels(std::min(n_part, p.n - n_start));
    for (std::int64_t k_start = 0; k_start < p.k; k_start += k_part) {
      const std::int64_t k = std::min(k_part, p.k - k_start);
      float* b = scratch<float>(Slot::d, panels.count * width * k);
      parallel_for(n_threads, panels.count, [&](std::int64_t i) {
        if (b_in_place(p, panels.size(i))) return;
        pack<width>(p.b, nullptr, n_start + panels.begin(i), panels.size(i), k_start, k,
                    b + i * width * k);
      });
      const std::int64_t n_rows = pieces(p.m, rows), panels_each = columns / width;
      parallel_for(n_threads, n_rows * pieces(panels.count, panels_each), [&](std::int64_t t) {
        const std::int64_t i = t % n_rows * rows, first = t / n_rows * panels_each;
        run(p, i, std::min(rows, p.m - i), n_start, panels, first,
            std::min(first + panels_each, panels.count), k_start, k, b);
        stream_ends();
      });
    }
  }
}

// How a product is cut into tasks that pack b themselves: a panel for many rows of a, or many panels
// for fewer rows that are packed, too.
struct Cut {
  std::int64_t panels, panels_each, n_panels, rows = 0, n_rows = 0, count;  // n_: of tasks
  explicit Cut(const Product<float>& p)
      : panels(pieces(p.n, width)),
        panels_each(a_in_rows(p) ? 1 : most_columns / width),
        n_panels(pieces(panels, panels_each)),
        count(p.m > 0 && p.n > 0 ? 1 : 0) {
    if (count == 0 || p.k == 0) return;  // without terms it is one task
    const std::int64_t parts = pieces(p.m, a_in_rows(p) ? few_rows : 2 * most_rows);
    rows = pieces(pieces(p.m, parts), rows_at_once) * rows_at_once;
    n_rows = pieces(p.m, rows);
    count = n_rows * n_panels;
  }
  // Where a task's rows and panels begin. All panels of the same rows follow each other.
  std::int64_t row(std::int64_t task) const { return task / n_panels * rows; }
  std::int64_t panel(std::int64_t task) const { return task % n_panels * panels_each; }
};

void multiply_each(const Product<float>* products, std::int64_t count, int n_threads) {
  if (count == 0) return;
  std::int64_t work = 0, total = 0;
  std::int64_t* ends = scratch<std::int64_t>(Slot::c, count);  // of each product's tasks
  for (std::int64_t i = 0; i < count; ++i) {
    work += products[i].m * products[i].n * products[i].k;
    ends[i] = total += Cut(products[i]).count;
  }
  const auto of = [&](std::int64_t t) { return std::upper_bound(ends, ends + count, t) - ends; };
  const auto run = [&](std::int64_t t) {
    const std::int64_t mine = of(t), begin = mine > 0 ? ends[mine - 1] : 0;
    const Product<float>& p = products[mine];
    if (p.k == 0) return without_terms(p);
    const Cut cut(p);
    const Product<float>* after = nullptr;
    std::int64_t then = 0;
    if (t + 1 < total) {
      const std::int64_t other = of(t + 1);
      after = products + other;
      then = other == mine ? cut.panel(t + 1 - begin) : 0;
    }
    const std::int64_t i = cut.row(t - begin), first = cut.panel(t - begin);
    const auto task = a_in_rows(p) ? task_that_packs<false> : task_that_packs<true>;
    task(p, i, std::min(cut.rows, p.m - i), first, std::min(first + cut.panels_each, cut.panels),
         after, then);
    stream_ends();
  };
  // a share of neighbouring tasks each, as they read the same rows
  if (work < small) n_threads = 1;
  Crew crew;
  const auto member = [&](int number, int n_members) {
    crew.enter(n_members);
    crew.each(number, total, [] {}, run);
  };
  run_crew(
      std::min(n_threads, Crew::most),
      [](const void* context, int number, int n_members) {
        (*static_cast<decltype(member)*>(context))(number, n_members);
      },
      &member);
}

}  // namespace

BM_DEFINE(Linear, linear) = {
    multiply,
    multiply_each,
    narrow::multiply<std::uint16_t>,
    narrow::multiply<float>,
    tiles::multiply<std::uint16_t>,
    tiles::multiply<float>,
};

}  // namespace bm
