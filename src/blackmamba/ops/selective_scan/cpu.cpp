// Vectors run along d, so that B and C are broadcasts and nothing is summed across lanes in the
// loops. A task is one row of the batch and some groups of channels. It reads time in chunks; for a
// chunk and a group it first writes delta, delta x and so on into scratch memory, then reads them
// block by block, a block being `lanes` channels, with up to 16 states of each channel in registers.
#include "selective_scan/cpu.hpp"

#include <algorithm>
#include <cstddef>
#include <cstring>

#include "native/simd.hpp"
#include "native/threads.hpp"
#include "selective_scan/lanes.hpp"

namespace bm {
namespace {

using std::int64_t;

constexpr int64_t chunk = scan_chunk;
constexpr int64_t pad = 16;                       // channels are padded to this, whatever `lanes` is
constexpr int most_states = lanes == 16 ? 16 : 8;  // of a channel in registers, going forward
constexpr int most_adjoints = lanes == 16 ? 8 : 4;  // the same going backward, with their sums

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
// Of one block: streams (t, stride), one vector a token; B and C (t, n); states (n, lanes); decays,
// befores and sums (t, n, lanes). Pointers to states are already at the first of the N.

// Lines of the inputs that will be wanted next. The loops ask for them token by token, as no processor
// guesses that the next group of channels follows: in each token of a block for one vector of each
// tensor, row after row of the group, since every row lies in another page.
struct Ahead {
  const char* lines[4];    // of the first row
  std::int64_t steps[4];    // bytes from row to row; 0 where nothing is wanted
  std::int64_t row, column;  // where this block's share begins, in vectors
  std::int64_t columns;     // vectors of a row
  std::int64_t width;       // bytes of a vector

  explicit Ahead(const void* nothing) : row(0), column(0), columns(1), width(0) {
    for (int i = 0; i < 4; ++i) clear(i, nothing);
  }
  void clear(int i, const void* nothing) {
    lines[i] = static_cast<const char*>(nothing), steps[i] = 0;
  }
  // Moves the last two tensors to another pass over the block: a processor waits for only some 20
  // lines at a time.
  Ahead split(const void* nothing) {
    Ahead other = *this;
    for (int i = 0; i < 2; ++i) {
      other.lines[i] = lines[i + 2], other.steps[i] = steps[i + 2];
      other.clear(i + 2, nothing), clear(i + 2, nothing);
    }
    return other;
  }
};

class Fetcher {
 public:
  explicit Fetcher(const Ahead& ahead) : a_(ahead), row_(ahead.row), column_(ahead.column) {}
  BM_INLINE void fetch() {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
      __builtin_prefetch(a_.lines[i] + row_ * a_.steps[i] + column_ * a_.width, 0, 3);
    if (++column_ == a_.columns) column_ = 0, ++row_;
  }

 private:
  const Ahead& a_;
  int64_t row_, column_;
};

struct Block {
  int64_t n, stride;
  const float *delta, *drive, *B, *C;
  const float* A2;  // log2(e) A
  float* y;         // sum of C h
  Ahead ahead;
};

template <int N>
void advance(const Block& k, float* state, int64_t first, int64_t last, bool fresh, bool add) {
  vec h[N];
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) h[i] = fresh ? vec{} : load(state + i * lanes);
  const float* const A2 = k.A2;
  const float *B = k.B + first * k.n, *C = k.C + first * k.n;
  const float *delta = k.delta + first * k.stride, *drive = k.drive + first * k.stride;
  float* y = k.y + first * k.stride;
  Fetcher fetcher(k.ahead);
  for (int64_t t = first; t < last; ++t) {
    fetcher.fetch();
    const vec dl = load(delta), u = load(drive);
    vec sums[4] = {};
    if (add) sums[0] = load(y);
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) {
      const vec a = decay2(dl * load(A2 + i * lanes));
      h[i] = a * h[i] + u * B[i];
      sums[i % 4] += h[i] * C[i];
    }
    store(y, (sums[0] + sums[1]) + (sums[2] + sums[3]));
    delta += k.stride, drive += k.stride, y += k.stride, B += k.n, C += k.n;
  }
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) store(state + i * lanes, h[i]);
}

struct Adjoint {
  const float* grad;           // of y before the gate, (t, stride)
  float *decays, *befores;     // exp(delta A), and the state that it meets
  float *sums_B, *sums_C;      // to be summed over lanes
  float *grad_drive, *grad_rate;  // (t, stride): sums over n of B g, and of A2 decay g h
};

// The states again, with what the way back needs.
template <int N>
void recompute(const Block& k, const Adjoint& q, const float* state, int64_t first,
               int64_t last, bool fresh, bool add) {
  vec h[N];
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) h[i] = fresh ? vec{} : load(state + i * lanes);
  const float* const A2 = k.A2;
  const float *B = k.B + first * k.n, *C = k.C + first * k.n;
  const float *delta = k.delta + first * k.stride, *drive = k.drive + first * k.stride;
  const float* grad = q.grad + first * k.stride;
  float* y = k.y + first * k.stride;
  constexpr int64_t step = N * lanes;
  float *decays = q.decays + first * step, *befores = q.befores + first * step;
  const int64_t sums_step = k.n * lanes;
  float* sums_C = q.sums_C + first * sums_step;
  Fetcher fetcher(k.ahead);
  for (int64_t t = first; t < last; ++t) {
    fetcher.fetch();
    const vec dl = load(delta), u = load(drive), gy = load(grad);
    vec sums[4] = {};
    if (add) sums[0] = load(y);
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) {
      const vec a = decay2(dl * load(A2 + i * lanes));
      store(decays + i * lanes, a);
      store(befores + i * lanes, h[i]);
      h[i] = a * h[i] + u * B[i];
      sums[i % 4] += h[i] * C[i];
      store(sums_C + i * lanes, gy * h[i] + load(sums_C + i * lanes));
    }
    store(y, (sums[0] + sums[1]) + (sums[2] + sums[3]));
    delta += k.stride, drive += k.stride, grad += k.stride, y += k.stride, B += k.n, C += k.n;
    decays += step, befores += step, sums_C += sums_step;
  }
}

// Back through time; `carry` is the gradient of the state behind token last - 1, then before `first`.
template <int N>
void retreat(const Block& k, const Adjoint& q, float* carry, float* grad_A, int64_t first,
             int64_t last, bool add) {
  vec g[N], gA[N];
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) g[i] = load(carry + i * lanes), gA[i] = load(grad_A + i * lanes);
  constexpr int64_t step = N * lanes;
  const int64_t sums_step = k.n * lanes, end = last - 1;
  const float* const A2 = k.A2;
  const float *B = k.B + end * k.n, *C = k.C + end * k.n;
  const float *delta = k.delta + end * k.stride, *drive = k.drive + end * k.stride;
  const float* grad = q.grad + end * k.stride;
  float *grad_drive = q.grad_drive + end * k.stride, *grad_rate = q.grad_rate + end * k.stride;
  const float *decays = q.decays + end * step, *befores = q.befores + end * step;
  float* sums_B = q.sums_B + end * sums_step;
  Fetcher fetcher(k.ahead);
  for (int64_t t = last; t > first; --t) {
    fetcher.fetch();
    const vec dl = load(delta), u = load(drive), gy = load(grad);
    vec to_drive[2] = {}, to_rate[2] = {};
    if (add) to_drive[0] = load(grad_drive), to_rate[0] = load(grad_rate);
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) {
      const vec whole = gy * C[i] + g[i];
      store(sums_B + i * lanes, whole * u + load(sums_B + i * lanes));
      to_drive[i % 2] += whole * B[i];
      g[i] = whole * load(decays + i * lanes);
      const vec log_decay = g[i] * load(befores + i * lanes);
      gA[i] += log_decay * dl;
      to_rate[i % 2] += log_decay * load(A2 + i * lanes);
    }
    store(grad_drive, to_drive[0] + to_drive[1]);
    store(grad_rate, to_rate[0] + to_rate[1]);
    delta -= k.stride, drive -= k.stride, grad -= k.stride, B -= k.n, C -= k.n;
    grad_drive -= k.stride, grad_rate -= k.stride;
    decays -= step, befores -= step, sums_B -= sums_step;
  }
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) store(carry + i * lanes, g[i]), store(grad_A + i * lanes, gA[i]);
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

// The share of block j of a group of W channels, in fetching a group of up to four tensors
// (b, l, width) that begins at token t and channel d0.
template <class T>
Ahead ahead(const Row<T>& row, const Rows (&tensors)[4], int64_t t, int64_t d0, int64_t j, int64_t W,
            const void* nothing) {
  Ahead out(nothing);
  if (t < 0 || t >= row.s.l) return out;
  out.columns = W / lanes;
  out.width = lanes * static_cast<int64_t>(sizeof(T));
  const int64_t done = j / lanes * chunk;
  out.row = done / out.columns, out.column = done % out.columns;
  for (int i = 0; i < 4; ++i)
    if (tensors[i].data) {
      out.lines[i] = reinterpret_cast<const char*>(row.at(tensors[i], t, d0));
      out.steps[i] = tensors[i].row * static_cast<int64_t>(sizeof(T));
    }
  return out;
}

// Where the start of a chunk lies in `starts`, (b, chunks, d padded, n) in blocks.
BM_INLINE int64_t start_offset(const Scan& s, int64_t row, int64_t c, int64_t d0) {
  const int64_t padded = divide_up(s.d, pad) * pad;
  return ((row * divide_up(s.l, chunk) + c) * padded + d0) * s.n;
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
    delta = memory.floats(chunk * W), drive = memory.floats(chunk * W);
    sums = memory.floats(chunk * W);
    B = memory.floats(chunk * n), C = memory.floats(chunk * n);
    return memory.used();
  };
  const int64_t needed = cut(Arena(nullptr));
  float* const memory = scratch<float>(Slot::a, needed);
  cut(Arena(memory));
  const Ahead idle(memory);
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
      for (int64_t t = 0; t < tokens; ++t) {
        const T *x = row.at(s.x, start + t, group.d0), *dt = row.at(s.dt, start + t, group.d0);
        for (int64_t j = 0; j < group.padded; j += lanes) {
          const int m = group.count(j);
          vec rate = load_some(dt + j, m) + load(bias + w + j);
          if (s.softplus) rate = softplus_rate<false>(rate).delta;
          store(delta + t * W + j, rate);
          store(drive + t * W + j, rate * load_some(x + j, m));
        }
      }
      const bool last = w + W >= all.width;  // of the chunk
      const int64_t next_start = last ? start + chunk : start, next_d0 = all.d0 + (last ? 0 : w + W);
      for (int64_t j = 0; j < group.padded; j += lanes) {
        const Ahead next =
            ahead<T>(row, {s.x, s.dt, s.z, y}, next_start, next_d0, j, group.padded, memory);
        over_states<most_states>(n, [&](auto count, int64_t k) {
          const int64_t at = (w + j) * n + k * lanes;
          const Block block{n,     W,     delta + j, drive + j,
                            B + k, C + k, A2 + at,   sums + j, k == 0 ? next : idle};
          for (int i = 0; i < documents; ++i)
            advance<count.value>(block, state + at, begins[i], begins[i + 1], i > 0 || fresh, k > 0);
        });
      }
      for (int64_t t = 0; t < tokens; ++t) {
        const T* const x = row.at(s.x, start + t, group.d0);
        const T* const z = s.z.data ? row.at(s.z, start + t, group.d0) : nullptr;
        T* const to = static_cast<T*>(out.y) + (row.row * s.l + start + t) * s.d + group.d0;
        for (int64_t j = 0; j < group.padded; j += lanes) {
          const int m = group.count(j);
          vec y = load(sums + t * W + j);
          if (s.D) y += load(skip + w + j) * load_some(x + j, m);
          if (z) {
            const vec v = load_some(z + j, m);
            y *= v * gate_of(v);
          }
          store_some(to + j, y, m);
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
    decays = memory.floats(chunk * most_adjoints * lanes);
    befores = memory.floats(chunk * most_adjoints * lanes);
    sums_B = memory.floats((chunk * n + lanes) * lanes);
    sums_C = memory.floats((chunk * n + lanes) * lanes);
    return memory.used();
  };
  const int64_t needed = cut(Arena(nullptr));
  float* const memory = scratch<float>(Slot::a, needed);
  cut(Arena(memory));
  const Ahead idle(memory);
  const int64_t size = s.l * s.d;
  const Rows grad_x{out.x, size, s.d}, grad_dt{out.dt, size, s.d}, grad_z{out.z, size, s.d};
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
      for (int64_t t = 0; t < tokens; ++t) {
        const T *x = row.at(s.x, start + t, group.d0), *dt = row.at(s.dt, start + t, group.d0);
        const T* const gy = row.at(grad_y, start + t, group.d0);
        const T* const z = s.z.data ? row.at(s.z, start + t, group.d0) : nullptr;
        for (int64_t j = 0; j < group.padded; j += lanes) {
          const int64_t i = t * W + j;
          const int m = group.count(j);
          vec rate = load_some(dt + j, m) + load(bias + w + j);
          if (s.softplus) {
            const Rate both = softplus_rate<true>(rate);
            rate = both.delta;
            store(slope + i, both.slope);
          }
          store(delta + i, rate);
          store(drive + i, rate * load_some(x + j, m));
          vec g = load_some(gy + j, m);
          if (z) {
            const vec v = load_some(z + j, m), open = gate_of(v);
            store(gate + i, g * (open * (1.0f + v * (1.0f - open))));
            g *= v * open;
          }
          store(grad + i, g);
        }
      }
      std::memset(sums_B, 0, tokens * n * lanes * 4);
      std::memset(sums_C, 0, tokens * n * lanes * 4);

      const bool last = w + W >= all.width;  // of the chunk
      const int64_t next_start = last ? start - chunk : start, next_d0 = all.d0 + (last ? 0 : w + W);
      for (int64_t j = 0; j < group.padded; j += lanes) {
        Ahead next =
            ahead<T>(row, {s.x, s.dt, s.z, grad_y}, next_start, next_d0, j, group.padded, memory);
        Ahead here = ahead<T>(row, {grad_x, grad_dt, grad_z, {}}, start, group.d0, j, group.padded,
                              memory);
        if (next_start >= 0) {  // and the states that the next group starts from
          const int64_t offset = start_offset(s, row.row, next_start / chunk, next_d0);
          here.lines[3] = reinterpret_cast<const char*>(starts + offset);
          here.steps[3] = here.columns * here.width;
        }
        const float* const before = starts + start_offset(s, row.row, c, group.d0 + j);
        const int64_t states = (w + j) * n;
        const bool several = n > most_adjoints;
        const Ahead next_2 = several ? next.split(memory) : idle;
        const Ahead here_2 = several ? here.split(memory) : idle;
        const auto block = [&](int64_t k, const Ahead& lines) {
          return Block{n,     W,     delta + j,               drive + j,
                       B + k, C + k, A2 + states + k * lanes, sums + j, lines};
        };
        const auto adjoint = [&](int64_t k) {
          const int64_t at = k * lanes;
          return Adjoint{grad + j,    decays,       befores,    sums_B + at,
                         sums_C + at, to_drive + j, to_rate + j};
        };
        over_states<most_adjoints>(n, [&](auto count, int64_t k) {
          const int64_t at = states + k * lanes;
          for (int i = 0; i < documents; ++i)
            recompute<count.value>(block(k, k == 0 ? next : k == most_adjoints ? next_2 : idle), adjoint(k), before + k * lanes, begins[i],
                                   begins[i + 1], i > 0 || fresh, k > 0);
          for (int i = documents - 1; i >= 0; --i) {
            retreat<count.value>(block(k, k == 0 ? here : k == most_adjoints ? here_2 : idle), adjoint(k), carry + at, grad_A + at, begins[i],
                                 begins[i + 1], k > 0);
            // nothing goes back into the document before
            if (i > 0 || fresh) std::memset(carry + at, 0, count.value * lanes * 4);
          }
        });
      }

      for (int64_t t = 0; t < tokens; ++t) {
        const T* const x = row.at(s.x, start + t, group.d0);
        const int64_t offset = (row.row * s.l + start + t) * s.d + group.d0;
        T *const gx = static_cast<T*>(out.x) + offset, *const gdt = static_cast<T*>(out.dt) + offset;
        T* const gz = out.z ? static_cast<T*>(out.z) + offset : nullptr;
        for (int64_t j = 0; j < group.padded; j += lanes) {
          const int64_t i = t * W + j;
          const int m = group.count(j);
          const vec v = load_some(x + j, m), g = load(grad + i), D = load(skip + w + j);
          if (gz) store_some(gz + j, load(gate + i) * (load(sums + i) + D * v), m);
          store_some(gx + j, load(to_drive + i) * load(delta + i) + g * D, m);
          vec rate = load(to_rate + i) * ln_2 + load(to_drive + i) * v;
          if (s.softplus) rate *= load(slope + i);
          store_some(gdt + j, rate, m);
          store(grad_bias + w + j, load(grad_bias + w + j) + rate);
          store(grad_D + w + j, load(grad_D + w + j) + g * v);
        }
      }
      const int64_t to = ((group.d0 / W * s.b + row.row) * s.l + start) * n;
      for (int64_t i = 0; i < tokens * n; i += lanes) {
        const int left = static_cast<int>(std::min<int64_t>(lanes, tokens * n - i));
        store_some(partials.B + to + i, row_sums(sums_B + i * lanes), left);
        store_some(partials.C + to + i, row_sums(sums_C + i * lanes), left);
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
