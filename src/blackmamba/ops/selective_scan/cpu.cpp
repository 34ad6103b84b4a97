// Vectors run along d, so that B and C are broadcasts and nothing is summed across lanes in the
// loops. A task is one row of the batch and some groups of channels. It reads time in chunks, and a
// chunk of a group block by block, a block being `lanes` channels: it first writes delta, delta x and
// so on into scratch memory, then goes through time with up to 16 states of each channel in registers.
// Backward these are 4 states of two blocks at a time, so that decays and states of a chunk stay in a
// first-level cache; what is summed over channels is folded to one vector for each 4 states.
#include "selective_scan/cpu.hpp"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <initializer_list>

#include "native/simd.hpp"
#include "native/threads.hpp"
#include "selective_scan/lanes.hpp"

namespace bm {
namespace {

using std::int64_t;

constexpr int64_t chunk = scan_chunk;
constexpr int64_t pad = 16;                       // channels are padded to this, whatever `lanes` is
constexpr int most_states = lanes == 16 ? 16 : 8;  // of a channel in registers, going forward
constexpr int most_adjoints = 4;                   // the same going backward
constexpr int most_blocks = lanes == 16 ? 2 : 1;    // of channels, that go backward together

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How the channels are cut. The groups follow from the shape alone, as grad B and grad C are summed
// within a group first. A task is a run of groups of one row of the batch: its length depends on the
// number of threads, but no result does. Long runs are good, since the rows of all inputs lie in
// different pages.
struct Grouping {
  int64_t width, count;     // channels of a group, groups
  int64_t per_task, tasks;  // groups of a task, tasks of a row
};

Grouping grouping(const Scan& s) {
  const int64_t blocks = divide_up(s.d, pad);
  const int64_t blocks_each = std::clamp<int64_t>(divide_up(s.b * blocks, 48), 1, 8);
  const int64_t count = divide_up(blocks, blocks_each);
  const int64_t wanted = s.n_threads > 1 ? divide_up(4 * s.n_threads, std::max<int64_t>(s.b, 1)) : 1;
  // at most 2^15 states in a task: a few times this has to stay in the cache
  const int64_t most = std::max<int64_t>(1, (1 << 15) / (blocks_each * pad * std::max<int64_t>(s.n, 1)));
  const int64_t per_task = std::clamp<int64_t>(count / wanted, 1, most);
  return {blocks_each * pad, count, per_task, divide_up(count, per_task)};
}

// Memory of a task, cut from one piece.
class Arena {
 public:
  explicit Arena(float* base) : next_(base) {}
  float* floats(int64_t count) {
    // 13 lines between two pieces: those that are read together then differ in their low address bits
    const int64_t size = (divide_up(count, 16) + 13) * 16;
    float* const out = next_;
    next_ += size, used_ += size;
    return out;
  }
  int64_t used() const { return used_; }

 private:
  float* next_;
  int64_t used_ = 0;
};

// One call f(N, k) for each run of N = most, .. 4, 2, 1 states that starts at k.
template <int N>
struct Count {
  static constexpr int value = N;
};
template <int most, class F>
BM_INLINE void over_states(int64_t n, const F& f) {
  int64_t k = 0;
  for (; n - k >= most; k += most) f(Count<most>{}, k);
  if constexpr (most > 8)
    if (n - k >= 8) f(Count<8>{}, k), k += 8;
  if constexpr (most > 4)
    if (n - k >= 4) f(Count<4>{}, k), k += 4;
  if (n - k >= 2) f(Count<2>{}, k), k += 2;
  if (n - k >= 1) f(Count<1>{}, k);
}

// ---- the loops over time -------------------------------------------------------------------------
// Of one or two blocks: streams (t, lanes) of each, one behind the other; B and C (t, n); states
// (n, lanes) of each; decays and befores (t, blocks, N, lanes); sums (t, lanes), folded. Pointers to
// states are already at the first of the N.

// Lines of memory that will be wanted next. The loops ask for some in each token, as no processor
// guesses that the next group of channels follows: every row of it lies in another page.
class Fetcher {
 public:
  // rows of `bytes`, `step` bytes apart
  void add(const void* begin, int64_t step, int64_t rows, int64_t bytes) {
    if (!begin || rows <= 0) return;
    pieces_[count_++] = {static_cast<const char*>(begin), step, rows, divide_up(bytes, line)};
    if (count_ == 1) start(0);
  }
  // the next `lines` lines; nothing once all were asked for
  BM_INLINE void fetch(int lines) {
#pragma GCC unroll 8
    for (int i = 0; i < lines; ++i) {
      __builtin_prefetch(next_, 0, 3);
      next_ += advance_;
      if (--left_ == 0) next_row();
    }
  }

 private:
  static constexpr int64_t line = 64;
  struct Piece {
    const char* begin;
    int64_t step, rows, lines;
  };

  void start(int number) {
    now_ = number, row_ = 0;
    next_ = pieces_[now_].begin, left_ = pieces_[now_].lines, advance_ = line;
  }
  void next_row() {
    const Piece& piece = pieces_[now_];
    if (++row_ < piece.rows) {
      next_ = piece.begin + row_ * piece.step, left_ = piece.lines;
    } else if (now_ + 1 < count_) {
      start(now_ + 1);
    } else {
      left_ = INT64_MAX, advance_ = 0;
    }
  }

  Piece pieces_[8];
  int count_ = 0, now_ = 0;
  int64_t row_ = 0, left_ = INT64_MAX, advance_ = 0;
  const char* next_ = nullptr;
};

constexpr int64_t block_size = chunk * lanes;  // of a stream

struct Block {
  int64_t n;
  const float *delta, *drive, *B, *C;
  const float* A2;  // log2(e) A; blocks are n * lanes apart, as those of states are
  float* y;         // sum of C h
  Fetcher* fetcher;
};

template <int N>
void advance(const Block& k, float* state, int64_t first, int64_t last, bool fresh, bool add) {
  vec h[N];
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) h[i] = fresh ? vec{} : load(state + i * lanes);
  const float* const A2 = k.A2;
  const float *B = k.B + first * k.n, *C = k.C + first * k.n;
  for (int64_t t = first; t < last; ++t) {
    k.fetcher->fetch(4);
    const vec dl = load(k.delta + t * lanes), u = load(k.drive + t * lanes);
    vec sums[2] = {};
    if (add) sums[0] = load(k.y + t * lanes);
    constexpr int step = N < 4 ? N : 4;
#pragma GCC unroll 16
    for (int i = 0; i < N; i += step) {
      vec a[step];
#pragma GCC unroll 4
      for (int m = 0; m < step; ++m) a[m] = dl * load(A2 + (i + m) * lanes);
      to_decays(a);
#pragma GCC unroll 4
      for (int m = 0; m < step; ++m) h[i + m] = a[m] * h[i + m] + u * B[i + m];
#pragma GCC unroll 4
      for (int m = 0; m < step; ++m) sums[m % 2] += h[i + m] * C[i + m];
    }
    store(k.y + t * lanes, sums[0] + sums[1]);
    B += k.n, C += k.n;
  }
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) store(state + i * lanes, h[i]);
}

struct Adjoint {
  const float* grad;         // of y before the gate
  float *decays, *befores;   // exp(delta A), and the state that it meets
  float *sums_B, *sums_C;    // to be summed over lanes
  float *grad_drive, *grad_rate;  // sums over n of B g, and of A2 decay g h
};

// The states again, with what the way back needs. `add`: to sums over earlier states; `sum`: to sums
// over earlier blocks.
template <int N, int M>
void recompute(const Block& k, const Adjoint& q, const float* state, int64_t first, int64_t last,
               bool fresh, bool add, bool sum) {
  const int64_t apart = k.n * lanes;
  vec h[M][N];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) h[m][i] = fresh ? vec{} : load(state + m * apart + i * lanes);
  const float *B = k.B + first * k.n, *C = k.C + first * k.n;
  for (int64_t t = first; t < last; ++t) {
    k.fetcher->fetch(2);
    float* const kept = q.decays + t * (N * M * lanes);
    float* const befores = q.befores + t * (N * M * lanes);
    vec sums[4] = {};
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const int64_t at = m * block_size + t * lanes;
      const vec dl = load(k.delta + at), u = load(k.drive + at), gy = load(q.grad + at);
      vec y = add ? load(k.y + at) : vec{};
      vec a[N];
#pragma GCC unroll 16
      for (int i = 0; i < N; ++i) a[i] = dl * load(k.A2 + m * apart + i * lanes);
      to_decays(a);
#pragma GCC unroll 16
      for (int i = 0; i < N; ++i) {
        store(kept + (m * N + i) * lanes, a[i]);
        store(befores + (m * N + i) * lanes, h[m][i]);
        h[m][i] = a[i] * h[m][i] + u * B[i];
      }
#pragma GCC unroll 16
      for (int i = 0; i < N; ++i) y += h[m][i] * C[i];
      store(k.y + at, y);
#pragma GCC unroll 16
      for (int i = 0; i < N; ++i)
        sums[i] = m > 0 ? gy * h[m][i] + sums[i] : gy * h[m][i];
    }
    const vec folded = fold(sums);
    store(q.sums_C + t * lanes, sum ? folded + load(q.sums_C + t * lanes) : folded);
    B += k.n, C += k.n;
  }
}

// Back through time; `carry` is the gradient of the state behind token last - 1, then before `first`.
template <int N, int M>
void retreat(const Block& k, const Adjoint& q, float* carry, float* grad_A, int64_t first,
             int64_t last, bool add, bool sum) {
  const int64_t apart = k.n * lanes;
  vec g[M][N], gA[M][N];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) {
      g[m][i] = load(carry + m * apart + i * lanes);
      gA[m][i] = load(grad_A + m * apart + i * lanes);
    }
  const float *B = k.B + (last - 1) * k.n, *C = k.C + (last - 1) * k.n;
  for (int64_t t = last - 1; t >= first; --t) {
    k.fetcher->fetch(2);
    const float* const kept = q.decays + t * (N * M * lanes);
    const float* const befores = q.befores + t * (N * M * lanes);
    vec sums[4] = {};
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const int64_t at = m * block_size + t * lanes;
      const vec dl = load(k.delta + at), u = load(k.drive + at), gy = load(q.grad + at);
      const float* const A2 = k.A2 + m * apart;
      vec to_drive = add ? load(q.grad_drive + at) : vec{};
      vec to_rate = add ? load(q.grad_rate + at) : vec{};
#pragma GCC unroll 16
      for (int i = 0; i < N; ++i) {
        const vec whole = gy * C[i] + g[m][i];
        sums[i] = m > 0 ? whole * u + sums[i] : whole * u;
        to_drive += whole * B[i];
        g[m][i] = whole * load(kept + (m * N + i) * lanes);
        const vec log_decay = g[m][i] * load(befores + (m * N + i) * lanes);
        gA[m][i] += log_decay * dl;
        to_rate += log_decay * load(A2 + i * lanes);
      }
      store(q.grad_drive + at, to_drive);
      store(q.grad_rate + at, to_rate);
    }
    const vec folded = fold(sums);
    store(q.sums_B + t * lanes, sum ? folded + load(q.sums_B + t * lanes) : folded);
    B -= k.n, C -= k.n;
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) {
      store(carry + m * apart + i * lanes, g[m][i]);
      store(grad_A + m * apart + i * lanes, gA[m][i]);
    }
}

// ---- what both passes do around them -------------------------------------------------------------

// One row of the batch.
template <class T>
struct Row {
  const Scan& s;
  int64_t row;

  const T* at(const Rows& rows, int64_t t, int64_t d0 = 0) const {
    return static_cast<const T*>(rows.data) + row * rows.batch + t * rows.row + d0;
  }
  void to_floats(const Rows& from, int64_t start, int64_t tokens, float* to) const {
    for (int64_t t = 0; t < tokens; ++t) {
      const T* p = at(from, start + t);
      for (int64_t i = 0; i < s.n; ++i) to[t * s.n + i] = to_float(p[i]);
    }
  }
  bool new_document(int64_t t) const {
    if (!s.seq_idx || t == 0) return false;
    const int64_t* const p = s.seq_idx + row * s.l + t;
    return p[0] != p[-1];
  }
  // Runs of tokens of one document within a chunk: where each begins, and the end behind the last.
  int documents(int64_t start, int64_t tokens, int64_t* begins) const {
    int count = 0;
    begins[count++] = 0;
    if (s.seq_idx)
      for (int64_t t = 1; t < tokens; ++t)
        if (new_document(start + t)) begins[count++] = t;
    begins[count] = tokens;
    return count;
  }
};

// Channels d0 .. d0 + width - 1: those of a group, or of all groups of a task.
struct Channels {
  int64_t n, d0, width, padded;

  Channels(const Scan& s, int64_t begin, int64_t most)
      : n(s.n), d0(begin), width(std::min(most, s.d - begin)),
        padded(divide_up(width, lanes) * lanes) {}

  // of the vector that starts at channel d0 + j
  int count(int64_t j) const { return static_cast<int>(std::min<int64_t>(lanes, width - j)); }

  // (d, n) to blocks of (n, lanes), times `scale`; lanes without a channel get 0
  void to_blocks(const float* from, float* to, float scale) const {
    for (int64_t j = 0; j < padded; j += lanes)
      for (int64_t i = 0; i < n; ++i)
        for (int64_t lane = 0; lane < lanes; ++lane)
          *to++ = from && j + lane < width ? scale * from[(d0 + j + lane) * n + i] : 0.0f;
  }
  void from_blocks(const float* from, float* to) const {
    for (int64_t j = 0; j < padded; j += lanes)
      for (int64_t i = 0; i < n; ++i, from += lanes)
        for (int64_t lane = 0; lane < count(j); ++lane)
          to[(d0 + j + lane) * n + i] = from[lane];
  }
  void pick(const float* from, float* to) const {
    for (int64_t j = 0; j < padded; ++j) to[j] = from && j < width ? from[d0 + j] : 0.0f;
  }
};

// Where the start of a chunk lies in `starts`, (b, chunks, d padded, n) in blocks.
BM_INLINE int64_t start_offset(const Scan& s, int64_t row, int64_t c, int64_t d0) {
  const int64_t padded = divide_up(s.d, pad) * pad;
  return ((row * divide_up(s.l, chunk) + c) * padded + d0) * s.n;
}

// Tokens start .. start + tokens - 1 of a group's channels, of each tensor.
template <class T>
void wanted(Fetcher& fetcher, const Row<T>& row, std::initializer_list<Rows> tensors, int64_t start,
            int64_t d0, int64_t width) {
  if (start < 0 || start >= row.s.l) return;
  const int64_t tokens = std::min(chunk, row.s.l - start), size = sizeof(T);
  for (const Rows& rows : tensors)
    if (rows.data)
      fetcher.add(row.at(rows, start, d0), rows.row * size, tokens, width * size);
}

template <class T>
void forward_task(const Scan& s, const ScanOutputs& out, const Grouping& groups, int64_t task) {
  const Row<T> row{s, task / groups.tasks};
  const Channels all(s, task % groups.tasks * groups.per_task * groups.width,
                     groups.per_task * groups.width);
  const int64_t W = groups.width, n = s.n;
  float *A2, *state, *skip, *bias, *delta, *drive, *sums, *B, *C;
  const auto cut = [&](Arena memory) {
    A2 = memory.floats(all.padded * n), state = memory.floats(all.padded * n);
    skip = memory.floats(all.padded), bias = memory.floats(all.padded);
    delta = memory.floats(block_size), drive = memory.floats(block_size);
    sums = memory.floats(block_size);
    B = memory.floats(chunk * n), C = memory.floats(chunk * n);
    return memory.used();
  };
  const int64_t needed = cut(Arena(nullptr));
  cut(Arena(scratch<float>(Slot::a, needed)));
  const Rows y{out.y, s.l * s.d, s.d};
  all.to_blocks(s.A, A2, log2_e);
  all.to_blocks(s.initial_state ? s.initial_state + row.row * s.d * n : nullptr, state, 1.0f);
  all.pick(s.D, skip);
  all.pick(s.dt_bias, bias);

  int64_t begins[chunk + 1];
  for (int64_t start = 0, c = 0; start < s.l; start += chunk, ++c) {
    const int64_t tokens = std::min(chunk, s.l - start);
    if (out.starts)
      std::memcpy(out.starts + start_offset(s, row.row, c, all.d0), state, all.padded * n * 4);
    row.to_floats(s.B, start, tokens, B);
    row.to_floats(s.C, start, tokens, C);
    const int documents = row.documents(start, tokens, begins);
    const bool fresh = row.new_document(start);
    for (int64_t w = 0; w < all.width; w += W) {
      const Channels group(s, all.d0 + w, W);
      const bool last = w + W >= all.width;  // of the chunk
      Fetcher fetcher;
      wanted<T>(fetcher, row, {s.x, s.dt, s.z, y}, last ? start + chunk : start,
                all.d0 + (last ? 0 : w + W), group.padded);
      for (int64_t j = 0; j < group.padded; j += lanes) {
        const int m = group.count(j);
        const int64_t d0 = group.d0 + j;
        const vec shift = load(bias + w + j), D = load(skip + w + j);
        for (int64_t t = 0; t < tokens; ++t) {
          vec rate = load_some(row.at(s.dt, start + t, d0), m) + shift;
          if (s.softplus) rate = softplus_rate<false>(rate).delta;
          store(delta + t * lanes, rate);
          store(drive + t * lanes, rate * load_some(row.at(s.x, start + t, d0), m));
        }
        over_states<most_states>(n, [&](auto count, int64_t k) {
          const int64_t at = (w + j) * n + k * lanes;
          const Block block{n, delta, drive, B + k, C + k, A2 + at, sums, &fetcher};
          for (int i = 0; i < documents; ++i)
            advance<count.value>(block, state + at, begins[i], begins[i + 1], i > 0 || fresh, k > 0);
        });
        for (int64_t t = 0; t < tokens; ++t) {
          vec sum = load(sums + t * lanes);
          if (s.D) sum += D * load_some(row.at(s.x, start + t, d0), m);
          if (s.z.data) {
            const vec v = load_some(row.at(s.z, start + t, d0), m);
            sum *= v * gate_of(v);
          }
          store_some(static_cast<T*>(out.y) + (row.row * s.l + start + t) * s.d + d0, sum, m);
        }
      }
    }
  }
  all.from_blocks(state, out.final_state + row.row * s.d * n);
}

template <class T>
void forward_of(const Scan& s, const ScanOutputs& out) {
  const Grouping groups = grouping(s);
  parallel_for(s.n_threads, s.b * groups.tasks,
               [&](int64_t i) { forward_task<T>(s, out, groups, i); });
}

void forward(const Scan& s, const ScanOutputs& out) {
  return s.bfloat16 ? forward_of<bf16>(s, out) : forward_of<float>(s, out);
}

// Sums over a part of the work, added up at the end.
struct Partials {
  float *B, *C;        // (groups, b, l, n)
  float *A, *D, *bias;  // (b, d padded, n) in blocks; (b, d padded)
};

template <class T>
void backward_task(const Scan& s, const float* starts, const Rows& grad_y, const float* grad_final,
                   const ScanGradients& out, const Partials& partials, const Grouping& groups,
                   int64_t task) {
  const Row<T> row{s, task / groups.tasks};
  const Channels all(s, task % groups.tasks * groups.per_task * groups.width,
                     groups.per_task * groups.width);
  const int64_t W = groups.width, n = s.n;
  const int64_t runs = n / most_adjoints + 2;  // of states, at most
  float *A2, *carry, *skip, *bias, *delta, *drive, *slope, *grad, *gate, *sums, *to_drive, *to_rate;
  float *B, *C, *decays, *befores, *sums_B, *sums_C;
  const auto cut = [&](Arena memory) {
    A2 = memory.floats(all.padded * n), carry = memory.floats(all.padded * n);
    skip = memory.floats(all.padded), bias = memory.floats(all.padded);
    delta = memory.floats(chunk * W), drive = memory.floats(chunk * W);
    slope = memory.floats(chunk * W), grad = memory.floats(chunk * W);
    gate = memory.floats(chunk * W), sums = memory.floats(chunk * W);
    to_drive = memory.floats(chunk * W), to_rate = memory.floats(chunk * W);
    B = memory.floats(chunk * n), C = memory.floats(chunk * n);
    decays = memory.floats(block_size * most_adjoints * most_blocks);
    befores = memory.floats(block_size * most_adjoints * most_blocks);
    sums_B = memory.floats(runs * block_size);
    sums_C = memory.floats(runs * block_size);
    return memory.used();
  };
  const int64_t needed = cut(Arena(nullptr));
  cut(Arena(scratch<float>(Slot::a, needed)));
  const int64_t size = s.l * s.d;
  const Rows grad_x{out.x, size, s.d}, grad_dt{out.dt, size, s.d};
  const Rows grad_z{out.z, out.z_batch, out.z_row};
  all.to_blocks(s.A, A2, log2_e);
  all.to_blocks(grad_final + row.row * s.d * n, carry, 1.0f);
  all.pick(s.D, skip);
  all.pick(s.dt_bias, bias);
  const int64_t place = row.row * divide_up(s.d, pad) * pad + all.d0;
  float *const grad_A = partials.A + place * n, *const grad_D = partials.D + place;
  float* const grad_bias = partials.bias + place;
  std::memset(grad_A, 0, all.padded * n * 4);
  std::memset(grad_D, 0, all.padded * 4);
  std::memset(grad_bias, 0, all.padded * 4);

  int64_t begins[chunk + 1];
  for (int64_t c = divide_up(s.l, chunk) - 1; c >= 0; --c) {
    const int64_t start = c * chunk, tokens = std::min(chunk, s.l - start);
    row.to_floats(s.B, start, tokens, B);
    row.to_floats(s.C, start, tokens, C);
    const int documents = row.documents(start, tokens, begins);
    const bool fresh = row.new_document(start);
    for (int64_t w = 0; w < all.width; w += W) {
      const Channels group(s, all.d0 + w, W);
      for (int64_t j = 0; j < group.padded; j += lanes) {
        const int m = group.count(j);
        const int64_t d0 = group.d0 + j;
        const vec shift = load(bias + w + j);
        for (int64_t t = 0; t < tokens; ++t) {
          const int64_t i = j * chunk + t * lanes;
          vec rate = load_some(row.at(s.dt, start + t, d0), m) + shift;
          if (s.softplus) {
            const Rate both = softplus_rate<true>(rate);
            rate = both.delta;
            store(slope + i, both.slope);
          }
          store(delta + i, rate);
          store(drive + i, rate * load_some(row.at(s.x, start + t, d0), m));
          vec g = load_some(row.at(grad_y, start + t, d0), m);
          if (s.z.data) {
            const vec v = load_some(row.at(s.z, start + t, d0), m), open = gate_of(v);
            store(gate + i, g * (open * (1.0f + v * (1.0f - open))));
            g *= v * open;
          }
          store(grad + i, g);
        }
      }

      const bool last = w + W >= all.width;  // of the chunk
      const int64_t next_start = last ? start - chunk : start, next_d0 = all.d0 + (last ? 0 : w + W);
      Fetcher fetcher;
      wanted<T>(fetcher, row, {grad_x, grad_dt, grad_z}, start, group.d0, group.padded);
      wanted<T>(fetcher, row, {s.x, s.dt, s.z, grad_y}, next_start, next_d0, group.padded);
      if (next_start >= 0)  // and the states that the next group starts from
        fetcher.add(starts + start_offset(s, row.row, next_start / chunk, next_d0), 0, 1,
                    group.padded * n * 4);
      const auto back_and_forth = [&](auto blocks, int64_t j) {
        constexpr int M = blocks.value;
        int64_t run = 0;  // of states
        over_states<most_adjoints>(n, [&](auto count, int64_t k) {
          constexpr int N = count.value;
          const int64_t at = (w + j) * n + k * lanes, stream = j * chunk;
          const Block block{n,     delta + stream, drive + stream, B + k,
                            C + k, A2 + at,        sums + stream,  &fetcher};
          const Adjoint adjoint{grad + stream,
                                decays,
                                befores,
                                sums_B + run * block_size,
                                sums_C + run * block_size,
                                to_drive + stream,
                                to_rate + stream};
          const float* const before = starts + start_offset(s, row.row, c, group.d0 + j) + k * lanes;
          for (int i = 0; i < documents; ++i)
            recompute<N, M>(block, adjoint, before, begins[i], begins[i + 1], i > 0 || fresh, k > 0,
                            j > 0);
          for (int i = documents - 1; i >= 0; --i) {
            retreat<N, M>(block, adjoint, carry + at, grad_A + at, begins[i], begins[i + 1], k > 0,
                          j > 0);
            if (i > 0 || fresh)  // nothing goes back into the document before
              for (int m = 0; m < M; ++m) std::memset(carry + at + m * n * lanes, 0, N * lanes * 4);
          }
          ++run;
        });
      };
      int64_t j = 0;
      if constexpr (most_blocks == 2)
        for (; j + lanes < group.padded; j += 2 * lanes) back_and_forth(Count<2>{}, j);
      for (; j < group.padded; j += lanes) back_and_forth(Count<1>{}, j);

      const int64_t to = ((group.d0 / W * s.b + row.row) * s.l + start) * n;
      int64_t run = 0;
      over_states<most_adjoints>(n, [&](auto count, int64_t k) {
        float both[2][4];
        for (int64_t t = 0; t < tokens; ++t) {
          unfold(load(sums_B + (run * chunk + t) * lanes), both[0]);
          unfold(load(sums_C + (run * chunk + t) * lanes), both[1]);
          std::memcpy(partials.B + to + t * n + k, both[0], count.value * 4);
          std::memcpy(partials.C + to + t * n + k, both[1], count.value * 4);
        }
        ++run;
      });

      for (int64_t j = 0; j < group.padded; j += lanes) {
        const int m = group.count(j);
        const vec D = load(skip + w + j);
        vec sum_bias = load(grad_bias + w + j), sum_D = load(grad_D + w + j);
        for (int64_t t = 0; t < tokens; ++t) {
          const int64_t i = j * chunk + t * lanes;
          const int64_t offset = (row.row * s.l + start + t) * s.d + group.d0 + j;
          const vec v = load_some(row.at(s.x, start + t, group.d0 + j), m), g = load(grad + i);
          if (out.z)
            store_some(static_cast<T*>(out.z) + row.row * out.z_batch + (start + t) * out.z_row +
                           group.d0 + j,
                       load(gate + i) * (load(sums + i) + D * v), m);
          store_some(static_cast<T*>(out.x) + offset, load(to_drive + i) * load(delta + i) + g * D, m);
          vec rate = load(to_rate + i) * ln_2 + load(to_drive + i) * v;
          if (s.softplus) rate *= load(slope + i);
          store_some(static_cast<T*>(out.dt) + offset, rate, m);
          sum_bias += rate, sum_D += g * v;
        }
        store(grad_bias + w + j, sum_bias);
        store(grad_D + w + j, sum_D);
      }
    }
  }
  all.from_blocks(carry, out.initial_state + row.row * s.d * n);
}

// to[i] = the sum of `count` partial sums, in their order
template <class T>
void add_up(const float* from, int64_t count, int64_t stride, T* to, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i += lanes) {
    const int m = static_cast<int>(std::min<int64_t>(lanes, end - i));
    vec total{};
    for (int64_t g = 0; g < count; ++g) total += load_some(from + g * stride + i, m);
    store_some(to + i, total, m);
  }
}

template <class T>
void backward_of(const Scan& s, const float* starts, const Rows& grad_y, const float* grad_final,
                 const ScanGradients& out) {
  const Grouping groups = grouping(s);
  const int64_t d_padded = divide_up(s.d, pad) * pad, per_group = s.b * s.l * s.n;
  Partials partials;
  const auto cut = [&](Arena memory) {
    partials.B = memory.floats(groups.count * per_group);
    partials.C = memory.floats(groups.count * per_group);
    partials.A = memory.floats(s.b * d_padded * s.n);
    partials.D = memory.floats(s.b * d_padded), partials.bias = memory.floats(s.b * d_padded);
    return memory.used();
  };
  const int64_t needed = cut(Arena(nullptr));
  cut(Arena(scratch<float>(Slot::d, needed)));
  parallel_for(s.n_threads, s.b * groups.tasks, [&](int64_t i) {
    backward_task<T>(s, starts, grad_y, grad_final, out, partials, groups, i);
  });

  constexpr int64_t piece = 4096;
  parallel_for(s.n_threads, divide_up(per_group, piece), [&](int64_t i) {
    const int64_t begin = i * piece, end = std::min(per_group, begin + piece);
    add_up(partials.B, groups.count, per_group, static_cast<T*>(out.B), begin, end);
    add_up(partials.C, groups.count, per_group, static_cast<T*>(out.C), begin, end);
  });
  parallel_for(s.n_threads, groups.count, [&](int64_t i) {
    const Channels group(s, i * groups.width, groups.width);
    const int64_t states = group.padded * s.n, stop = group.d0 + group.width;
    float* const sums = scratch<float>(Slot::a, states);
    add_up(partials.A + group.d0 * s.n, s.b, d_padded * s.n, sums, 0, states);
    group.from_blocks(sums, out.A);
    if (out.D) add_up(partials.D, s.b, d_padded, out.D, group.d0, stop);
    if (out.dt_bias) add_up(partials.bias, s.b, d_padded, out.dt_bias, group.d0, stop);
  });
}

void backward(const Scan& s, const float* starts, const Rows& grad_y, const float* grad_final,
              const ScanGradients& out) {
  return s.bfloat16 ? backward_of<bf16>(s, starts, grad_y, grad_final, out)
                    : backward_of<float>(s, starts, grad_y, grad_final, out);
}

}  // namespace

BM_DEFINE(SelectiveScan, selective_scan) = {forward, backward};

}  // namespace bm
