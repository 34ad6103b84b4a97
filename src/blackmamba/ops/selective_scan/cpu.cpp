// Vectors run along d, so that B and C are broadcasts and nothing is summed across lanes in the
// loops. A task is one row of the batch and one group of channels. It reads time in chunks; for a
// chunk it first writes delta, delta x and so on for the group's channels into scratch memory, then
// reads them block by block, a block being `lanes` channels, with up to 16 states of each channel in
// registers.
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

struct Grouping {
  int64_t width, count;  // channels of a group, groups
};

// About 64 tasks where the shape has them, for processors of many cores; no more, as every group
// writes partial sums of grad B and grad C.
Grouping grouping(const Scan& s) {
  const int64_t blocks = divide_up(s.d, pad);
  const int64_t per_group = std::clamp<int64_t>(divide_up(s.b * blocks, 64), 1, 8);
  return {per_group * pad, divide_up(blocks, per_group)};
}

// Memory of a task, cut from one piece.
class Arena {
 public:
  explicit Arena(float* base) : next_(base) {}
  float* floats(int64_t count) {
    float* const out = next_;
    next_ += divide_up(count, 16) * 16;
    used_ += divide_up(count, 16) * 16;
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

struct Block {
  int64_t n, stride;
  const float *delta, *drive, *B, *C;
  const float* A2;  // log2(e) A
  float* y;         // sum of C h
};

template <int N>
void advance(const Block& k, float* state, int64_t first, int64_t last, bool fresh, bool add) {
  vec h[N];
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) h[i] = fresh ? vec{} : load(state + i * lanes);
  const float *B = k.B + first * k.n, *C = k.C + first * k.n;
  const float *delta = k.delta + first * k.stride, *drive = k.drive + first * k.stride;
  float* y = k.y + first * k.stride;
  for (int64_t t = first; t < last; ++t) {
    const vec dl = load(delta), u = load(drive);
    vec sums[4] = {};
    if (add) sums[0] = load(y);
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) {
      const vec a = decay2(dl * load(k.A2 + i * lanes));
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
void recompute(const Block& k, const Adjoint& q, float* state, int64_t first, int64_t last,
               bool fresh, bool add) {
  vec h[N];
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) h[i] = fresh ? vec{} : load(state + i * lanes);
  const float *B = k.B + first * k.n, *C = k.C + first * k.n;
  const float *delta = k.delta + first * k.stride, *drive = k.drive + first * k.stride;
  const float* grad = q.grad + first * k.stride;
  float* y = k.y + first * k.stride;
  const int64_t step = k.n * lanes;
  float *decays = q.decays + first * step, *befores = q.befores + first * step;
  float* sums_C = q.sums_C + first * step;
  for (int64_t t = first; t < last; ++t) {
    const vec dl = load(delta), u = load(drive), gy = load(grad);
    vec sums[4] = {};
    if (add) sums[0] = load(y);
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) {
      const vec a = decay2(dl * load(k.A2 + i * lanes));
      store(decays + i * lanes, a);
      store(befores + i * lanes, h[i]);
      h[i] = a * h[i] + u * B[i];
      sums[i % 4] += h[i] * C[i];
      store(sums_C + i * lanes, gy * h[i] + load(sums_C + i * lanes));
    }
    store(y, (sums[0] + sums[1]) + (sums[2] + sums[3]));
    delta += k.stride, drive += k.stride, grad += k.stride, y += k.stride, B += k.n, C += k.n;
    decays += step, befores += step, sums_C += step;
  }
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) store(state + i * lanes, h[i]);
}

// Back through time; `carry` is the gradient of the state behind token last - 1, then before `first`.
template <int N>
void retreat(const Block& k, const Adjoint& q, float* carry, float* grad_A, int64_t first,
             int64_t last, bool add) {
  vec g[N], gA[N];
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) g[i] = load(carry + i * lanes), gA[i] = load(grad_A + i * lanes);
  const int64_t step = k.n * lanes, end = last - 1;
  const float *B = k.B + end * k.n, *C = k.C + end * k.n;
  const float *delta = k.delta + end * k.stride, *drive = k.drive + end * k.stride;
  const float* grad = q.grad + end * k.stride;
  float *grad_drive = q.grad_drive + end * k.stride, *grad_rate = q.grad_rate + end * k.stride;
  const float *decays = q.decays + end * step, *befores = q.befores + end * step;
  float* sums_B = q.sums_B + end * step;
  for (int64_t t = last; t > first; --t) {
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
      to_rate[i % 2] += log_decay * load(k.A2 + i * lanes);
    }
    store(grad_drive, to_drive[0] + to_drive[1]);
    store(grad_rate, to_rate[0] + to_rate[1]);
    delta -= k.stride, drive -= k.stride, grad -= k.stride, B -= k.n, C -= k.n;
    grad_drive -= k.stride, grad_rate -= k.stride;
    decays -= step, befores -= step, sums_B -= step;
  }
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) store(carry + i * lanes, g[i]), store(grad_A + i * lanes, gA[i]);
}

// ---- what both passes do around them -------------------------------------------------------------

// One row of the batch and one group of channels.
template <class T>
struct Task {
  const Scan& s;
  int64_t row, d0, width, padded;  // channels d0 .. d0 + width - 1

  Task(const Scan& scan, const Grouping& groups, int64_t task)
      : s(scan), row(task / groups.count), d0(task % groups.count * groups.width) {
    width = std::min(groups.width, s.d - d0);
    padded = divide_up(width, lanes) * lanes;
  }

  const T* at(const Rows& rows, int64_t t) const {
    return static_cast<const T*>(rows.data) + row * rows.batch + t * rows.row;
  }
  int count(int64_t j) const { return static_cast<int>(std::min<int64_t>(lanes, width - j)); }

  // (d, n) to blocks of (n, lanes), times `scale`; lanes without a channel get 0
  void to_blocks(const float* from, float* to, float scale) const {
    for (int64_t j = 0; j < padded; j += lanes)
      for (int64_t i = 0; i < s.n; ++i)
        for (int64_t lane = 0; lane < lanes; ++lane)
          *to++ = from && j + lane < width ? scale * from[(d0 + j + lane) * s.n + i] : 0.0f;
  }
  void from_blocks(const float* from, float* to) const {
    for (int64_t j = 0; j < padded; j += lanes)
      for (int64_t i = 0; i < s.n; ++i, from += lanes)
        for (int64_t lane = 0; lane < std::min<int64_t>(lanes, width - j); ++lane)
          to[(d0 + j + lane) * s.n + i] = from[lane];
  }
  void channels(const float* from, float* to) const {
    for (int64_t j = 0; j < padded; ++j) to[j] = from && j < width ? from[d0 + j] : 0.0f;
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

// Where the start of a chunk lies in `starts`, (b, chunks, d padded, n) in blocks.
BM_INLINE int64_t start_offset(const Scan& s, int64_t row, int64_t c, int64_t d0) {
  const int64_t padded = divide_up(s.d, pad) * pad;
  return ((row * divide_up(s.l, chunk) + c) * padded + d0) * s.n;
}

template <class T>
void forward_task(const Scan& s, const ScanOutputs& out, const Task<T>& task) {
  const int64_t W = task.padded, n = s.n;
  float *A2, *state, *skip, *bias, *delta, *drive, *sums, *B, *C;
  const auto cut = [&](Arena memory) {
    A2 = memory.floats(W * n), state = memory.floats(W * n);
    skip = memory.floats(W), bias = memory.floats(W);
    delta = memory.floats(chunk * W), drive = memory.floats(chunk * W);
    sums = memory.floats(chunk * W);
    B = memory.floats(chunk * n), C = memory.floats(chunk * n);
    return memory.used();
  };
  const int64_t needed = cut(Arena(nullptr));
  cut(Arena(scratch<float>(Slot::a, needed)));
  task.to_blocks(s.A, A2, log2_e);
  task.to_blocks(s.initial_state ? s.initial_state + task.row * s.d * n : nullptr, state, 1.0f);
  task.channels(s.D, skip);
  task.channels(s.dt_bias, bias);

  int64_t begins[chunk + 1];
  for (int64_t start = 0, c = 0; start < s.l; start += chunk, ++c) {
    const int64_t tokens = std::min(chunk, s.l - start);
    if (out.starts)
      std::memcpy(out.starts + start_offset(s, task.row, c, task.d0), state, W * n * 4);
    for (int64_t t = 0; t < tokens; ++t) {
      const T *x = task.at(s.x, start + t) + task.d0, *dt = task.at(s.dt, start + t) + task.d0;
      for (int64_t j = 0; j < W; j += lanes) {
        vec rate = load_some(dt + j, task.count(j)) + load(bias + j);
        if (s.softplus) rate = softplus_rate<false>(rate).delta;
        store(delta + t * W + j, rate);
        store(drive + t * W + j, rate * load_some(x + j, task.count(j)));
      }
    }
    task.to_floats(s.B, start, tokens, B);
    task.to_floats(s.C, start, tokens, C);
    const int documents = task.documents(start, tokens, begins);
    const bool fresh = task.new_document(start);
    for (int64_t j = 0; j < W; j += lanes)
      over_states<most_states>(n, [&](auto count, int64_t k) {
        const int64_t at = j * n + k * lanes;
        const Block block{n, W, delta + j, drive + j, B + k, C + k, A2 + at, sums + j};
        for (int i = 0; i < documents; ++i)
          advance<count.value>(block, state + at, begins[i], begins[i + 1], i > 0 || fresh, k > 0);
      });
    for (int64_t t = 0; t < tokens; ++t) {
      const T* const x = task.at(s.x, start + t) + task.d0;
      const T* const z = s.z.data ? task.at(s.z, start + t) + task.d0 : nullptr;
      T* const to = static_cast<T*>(out.y) + (task.row * s.l + start + t) * s.d + task.d0;
      for (int64_t j = 0; j < W; j += lanes) {
        vec y = load(sums + t * W + j);
        if (s.D) y += load(skip + j) * load_some(x + j, task.count(j));
        if (z) y *= silu(load_some(z + j, task.count(j)));
        store_some(to + j, y, task.count(j));
      }
    }
  }
  task.from_blocks(state, out.final_state + task.row * s.d * n);
}

template <class T>
void forward_of(const Scan& s, const ScanOutputs& out) {
  const Grouping groups = grouping(s);
  parallel_for(s.n_threads, s.b * groups.count, [&](int64_t i) {
    forward_task<T>(s, out, Task<T>(s, groups, i));
  });
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
                   const ScanGradients& out, const Partials& partials, const Task<T>& task,
                   int64_t group) {
  const int64_t W = task.padded, n = s.n;
  float *A2, *carry, *skip, *bias, *delta, *drive, *slope, *grad, *gate, *sums, *to_drive, *to_rate;
  float *B, *C, *decays, *befores, *sums_B, *sums_C, *state;
  const auto cut = [&](Arena memory) {
    A2 = memory.floats(W * n), carry = memory.floats(W * n), state = memory.floats(lanes * n);
    skip = memory.floats(W), bias = memory.floats(W);
    delta = memory.floats(chunk * W), drive = memory.floats(chunk * W);
    slope = memory.floats(chunk * W), grad = memory.floats(chunk * W);
    gate = memory.floats(chunk * W), sums = memory.floats(chunk * W);
    to_drive = memory.floats(chunk * W), to_rate = memory.floats(chunk * W);
    B = memory.floats(chunk * n), C = memory.floats(chunk * n);
    decays = memory.floats(chunk * n * lanes), befores = memory.floats(chunk * n * lanes);
    sums_B = memory.floats(chunk * n * lanes), sums_C = memory.floats(chunk * n * lanes);
    return memory.used();
  };
  const int64_t needed = cut(Arena(nullptr));
  cut(Arena(scratch<float>(Slot::a, needed)));
  task.to_blocks(s.A, A2, log2_e);
  task.to_blocks(grad_final + task.row * s.d * n, carry, 1.0f);
  task.channels(s.D, skip);
  task.channels(s.dt_bias, bias);
  const int64_t d_padded = divide_up(s.d, pad) * pad;
  float* const grad_A = partials.A + (task.row * d_padded + task.d0) * n;
  float* const grad_D = partials.D + task.row * d_padded + task.d0;
  float* const grad_bias = partials.bias + task.row * d_padded + task.d0;
  std::memset(grad_A, 0, W * n * 4);
  std::memset(grad_D, 0, W * 4);
  std::memset(grad_bias, 0, W * 4);

  int64_t begins[chunk + 1];
  for (int64_t c = divide_up(s.l, chunk) - 1; c >= 0; --c) {
    const int64_t start = c * chunk, tokens = std::min(chunk, s.l - start);
    for (int64_t t = 0; t < tokens; ++t) {
      const T *x = task.at(s.x, start + t) + task.d0, *dt = task.at(s.dt, start + t) + task.d0;
      const T *gy = task.at(grad_y, start + t) + task.d0;
      const T* const z = s.z.data ? task.at(s.z, start + t) + task.d0 : nullptr;
      for (int64_t j = 0; j < W; j += lanes) {
        const int64_t i = t * W + j;
        const vec raw = load_some(dt + j, task.count(j)) + load(bias + j);
        const vec g = load_some(gy + j, task.count(j));
        if (s.softplus) {
          const Rate rate = softplus_rate<true>(raw);
          store(delta + i, rate.delta);
          store(slope + i, rate.slope);
        } else {
          store(delta + i, raw);
        }
        store(drive + i, load(delta + i) * load_some(x + j, task.count(j)));
        if (z) {
          const vec v = load_some(z + j, task.count(j)), open = sigmoid(v);
          store(grad + i, g * (v * open));
          store(gate + i, g * (open * (1.0f + v * (1.0f - open))));
        } else {
          store(grad + i, g);
        }
      }
    }
    task.to_floats(s.B, start, tokens, B);
    task.to_floats(s.C, start, tokens, C);
    std::memset(sums_B, 0, tokens * n * lanes * 4);
    std::memset(sums_C, 0, tokens * n * lanes * 4);
    const int documents = task.documents(start, tokens, begins);
    const bool fresh = task.new_document(start);

    for (int64_t j = 0; j < W; j += lanes) {
      std::memcpy(state, starts + start_offset(s, task.row, c, task.d0 + j), lanes * n * 4);
      const auto block = [&](int64_t k) {
        return Block{n, W, delta + j, drive + j, B + k, C + k, A2 + j * n + k * lanes, sums + j};
      };
      const auto adjoint = [&](int64_t k) {
        const int64_t at = k * lanes;
        return Adjoint{grad + j,    decays + at,  befores + at, sums_B + at,
                       sums_C + at, to_drive + j, to_rate + j};
      };
      over_states<most_states>(n, [&](auto count, int64_t k) {
        for (int i = 0; i < documents; ++i)
          recompute<count.value>(block(k), adjoint(k), state + k * lanes, begins[i], begins[i + 1],
                                 i > 0 || fresh, k > 0);
      });
      over_states<most_adjoints>(n, [&](auto count, int64_t k) {
        float* const g = carry + j * n + k * lanes;
        for (int i = documents - 1; i >= 0; --i) {
          retreat<count.value>(block(k), adjoint(k), g, grad_A + j * n + k * lanes, begins[i],
                               begins[i + 1], k > 0);
          // nothing goes back into the document before
          if (i > 0 || fresh) std::memset(g, 0, count.value * lanes * 4);
        }
      });
    }

    for (int64_t t = 0; t < tokens; ++t) {
      const T* const x = task.at(s.x, start + t) + task.d0;
      const int64_t offset = (task.row * s.l + start + t) * s.d + task.d0;
      T *const gx = static_cast<T*>(out.x) + offset, *const gdt = static_cast<T*>(out.dt) + offset;
      T* const gz = out.z ? static_cast<T*>(out.z) + offset : nullptr;
      for (int64_t j = 0; j < W; j += lanes) {
        const int64_t i = t * W + j;
        const int m = task.count(j);
        const vec v = load_some(x + j, m), g = load(grad + i), D = load(skip + j);
        if (gz) store_some(gz + j, load(gate + i) * (load(sums + i) + D * v), m);
        store_some(gx + j, load(to_drive + i) * load(delta + i) + g * D, m);
        vec rate = load(to_rate + i) * ln_2 + load(to_drive + i) * v;
        if (s.softplus) rate *= load(slope + i);
        store_some(gdt + j, rate, m);
        store(grad_bias + j, load(grad_bias + j) + rate);
        store(grad_D + j, load(grad_D + j) + g * v);
      }
    }
    const int64_t place = ((group * s.b + task.row) * s.l + start) * n;
    for (int64_t i = 0; i < tokens * n; i += lanes) {
      const int left = static_cast<int>(std::min<int64_t>(lanes, tokens * n - i));
      store_some(partials.B + place + i, row_sums(sums_B + i * lanes), left);
      store_some(partials.C + place + i, row_sums(sums_C + i * lanes), left);
    }
  }
  task.from_blocks(carry, out.initial_state + task.row * s.d * n);
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
  parallel_for(s.n_threads, s.b * groups.count, [&](int64_t i) {
    backward_task<T>(s, starts, grad_y, grad_final, out, partials, Task<T>(s, groups, i),
                     i % groups.count);
  });

  constexpr int64_t piece = 4096;
  parallel_for(s.n_threads, divide_up(per_group, piece), [&](int64_t i) {
    const int64_t begin = i * piece, end = std::min(per_group, begin + piece);
    add_up(partials.B, groups.count, per_group, static_cast<T*>(out.B), begin, end);
    add_up(partials.C, groups.count, per_group, static_cast<T*>(out.C), begin, end);
  });
  parallel_for(s.n_threads, groups.count, [&](int64_t i) {
    Task<T> task(s, groups, i);
    float* const sums = scratch<float>(Slot::a, task.padded * s.n);
    const int64_t all = task.padded * s.n;
    add_up(partials.A + task.d0 * s.n, s.b, d_padded * s.n, sums, 0, all);
    task.from_blocks(sums, out.A);
    const int64_t stop = task.d0 + task.width;
    if (out.D) add_up(partials.D, s.b, d_padded, out.D, task.d0, stop);
    if (out.dt_bias) add_up(partials.bias, s.b, d_padded, out.dt_bias, task.d0, stop);
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
