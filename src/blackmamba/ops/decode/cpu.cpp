// A step is one parallel region. Inside it the threads claim blocks of rows of one product after
// another and meet only where the next product needs all of the last: after in_proj, x_proj, the
// state update and out_proj of a Mamba layer; after fc1 and fc2 of a feed-forward layer. What lies
// between two products is done by the thread that has the numbers, in its cache.
//
// Bytes: every weight that a token uses, once. Bound: the processor's read bandwidth (batch 1), or
// its multiply-adds (from a batch of about 8).
#include "decode/cpu.hpp"

#include <atomic>
#include <cmath>
#include <sched.h>

#include "native/product.hpp"
#include "native/simd.hpp"
#include "native/threads.hpp"
#include "selective_state_update/cpu.hpp"

namespace bm {
namespace {

// Threads that work through the same list of phases.
class Crew {
 public:
  // Every member says how many there are before anything else; all say the same.
  void enter(int n_members) { n_members_.store(n_members, std::memory_order_relaxed); }
  int size() const { return n_members_.load(std::memory_order_relaxed); }

  // f(i) for i = 0 .. n_tasks - 1, each by some member; returns when all are done. Every member
  // must call it. before() runs once on each member that gets a task.
  template <class Before, class F>
  void each(std::int64_t n_tasks, const Before& before, const F& f) {
    const int n_members = size();
    if (n_members == 1) {
      before();
      for (std::int64_t i = 0; i < n_tasks; ++i) f(i);
      return;
    }
    bool fresh = true;
    for (std::int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < n_tasks;) {
      if (fresh) before();
      fresh = false;
      f(i);
    }
    const unsigned round = round_.load(std::memory_order_relaxed);
    if (waiting_.fetch_add(1, std::memory_order_acq_rel) == n_members - 1) {
      waiting_.store(0, std::memory_order_relaxed);
      next_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; round_.load(std::memory_order_acquire) == round; ++spins) {
      if (spins > 4000) sched_yield();  // someone else has the processor
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }
  }

  template <class F>
  void each(std::int64_t n_tasks, const F& f) {
    each(n_tasks, [] {}, f);
  }

 private:
  std::atomic<int> n_members_{1};
  alignas(64) std::atomic<std::int64_t> next_{0};
  alignas(64) std::atomic<int> waiting_{0};
  alignas(64) std::atomic<unsigned> round_{0};
};

// Where a step keeps what goes from one phase to the next; of b rows each.
struct Buffers {
  float *x, *normed, *second, *sorted, *xz, *low, *y, *hidden;
  float* gate;             // (b)
  std::int32_t *expert, *order, *begin;  // (b), (b), (e + 1)

  explicit Buffers(const DecodePlan& p, float* memory) {
    const std::int64_t b = p.batch;
    const auto take = [&](std::int64_t count) {
      float* const start = memory + used;
      used += (count + 15) / 16 * 16;
      return start;
    };
    x = take(b * p.m);
    normed = take(b * p.m);
    second = take(b * p.m);
    sorted = take(b * p.m);
    xz = take(b * 2 * p.d);
    low = take(b * (p.r + 2 * p.n));
    y = take(b * p.d);
    hidden = take(b * p.widest_expert);
    gate = take(b);
    expert = reinterpret_cast<std::int32_t*>(take(b));
    order = reinterpret_cast<std::int32_t*>(take(b));
    begin = reinterpret_cast<std::int32_t*>(take(p.most_experts + 1));
  }

  std::int64_t used = 0;
};

std::int64_t workspace(const DecodePlan& plan) { return Buffers(plan, nullptr).used; }

void apply_norm(const Norm& norm, const float* x, float* out, std::int64_t m) {
  vec total{};
  if (norm.subtract_mean) {
    over(m, [&](std::int64_t i, int n) { total += load_some(x + i, n); });
  }
  const float mean = sum(total) / m;
  vec squares{};
  over(m, [&](std::int64_t i, int n) {
    const vec centred = load_some(x + i, n) - mean;
    squares += keep(centred * centred, n);
  });
  const float scale = 1.0f / std::sqrt(sum(squares) / m + norm.eps);
  over(m, [&](std::int64_t i, int n) {
    vec v = (load_some(x + i, n) - mean) * scale * load_some(norm.weight + i, n);
    if (norm.bias) v += load_some(norm.bias + i, n);
    store_some(out + i, v, n);
  });
}

// out[b][i] = (W x[b] + bias)[first + i] of prepared x
BM_INLINE void product(const Linear& l, std::int64_t first, std::int64_t n, const void* x, int batch,
                       float* out, std::int64_t ldo) {
  product_rows(l.weights, first, n, x, batch, out, ldo);
  if (l.bias)
    for (int b = 0; b < batch; ++b)
      for (std::int64_t i = 0; i < n; ++i) out[b * ldo + i] += l.bias[first + i];
}

class Step {
 public:
  Step(DecodePlan& plan, const std::int64_t* ids, float* logits)
      : p_(plan), ids_(ids), logits_(logits), at_(plan, plan.memory.data()) {}

  // What one of the threads does.
  void run(int n_members) {
    crew_.enter(n_members);
    const std::int64_t m = p_.m;
    crew_.each(p_.batch, [&](std::int64_t b) { embed(b); });
    for (std::size_t i = 0; i < p_.layers.size(); ++i) {
      DecodeLayer& layer = p_.layers[i];
      const bool pair = layer.has_mamba && layer.has_feed_forward;
      crew_.each(p_.batch, [&](std::int64_t b) {
        apply_norm(layer.norm, at_.x + b * m, at_.normed + b * m, m);
        if (pair) apply_norm(layer.feed_forward_norm, at_.x + b * m, at_.second + b * m, m);
      });
      if (layer.has_mamba) mamba(layer.mamba);
      if (layer.has_feed_forward)
        feed_forward(layer.feed_forward, pair ? at_.second : at_.normed);
    }
    crew_.each(p_.batch, [&](std::int64_t b) {
      apply_norm(p_.final_norm, at_.x + b * m, at_.normed + b * m, m);
    });
    const Blocks blocks(p_.v, p_.head.weights.row_bytes(), crew_.size(), p_.batch);
    const void* x = nullptr;
    crew_.each(
        blocks.count, [&] { x = prepared(p_.head.weights, at_.normed, m, p_.batch); },
        [&](std::int64_t i) {
          product(p_.head, blocks.first(i), blocks.size(i), x, p_.batch, logits_ + blocks.first(i),
                  p_.v);
        });
  }

 private:
  // A quantised embedding has 8 bits: weights.hpp.
  void embed(std::int64_t b) {
    const Weights& table = p_.embedding;
    float* const x = at_.x + b * p_.m;
    const std::int64_t start = ids_[b] * p_.m;
    if (table.kind == WeightKind::float32) {
      std::memcpy(x, static_cast<const float*>(table.data) + start, p_.m * sizeof(float));
    } else if (table.kind == WeightKind::bfloat16) {
      const bf16* const row = static_cast<const bf16*>(table.data) + start;
      for (int i = 0; i < p_.m; ++i) x[i] = to_float(row[i]);
    } else {
      const std::int64_t groups = (p_.m + table.group - 1) / table.group;
      const std::int8_t* const row = static_cast<const std::int8_t*>(table.data) + start;
      const bf16* const scales = static_cast<const bf16*>(table.scales) + ids_[b] * groups;
      for (int i = 0; i < p_.m; ++i) x[i] = row[i] * to_float(scales[i / table.group]);
    }
  }

  // ---- the Mamba layer ----

  void mamba(const Mamba& l) {
    const std::int64_t d = p_.d, m = p_.m, low = p_.r + 2 * p_.n;
    // [x | z]: the convolution of a channel needs only its own row
    const Blocks in(2 * d, l.in_proj.weights.row_bytes(), crew_.size(), p_.batch);
    const void* x = nullptr;
    crew_.each(
        in.count, [&] { x = prepared(l.in_proj.weights, at_.normed, m, p_.batch); },
        [&](std::int64_t i) {
          const std::int64_t first = in.first(i), n = in.size(i);
          product(l.in_proj, first, n, x, p_.batch, at_.xz + first, 2 * d);
          for (int b = 0; b < p_.batch; ++b) convolve(l, b, first, first + n < d ? n : d - first);
        });
    const Blocks mid(low, l.x_proj.weights.row_bytes(), crew_.size(), p_.batch);
    crew_.each(
        mid.count, [&] { x = prepared(l.x_proj.weights, at_.xz, 2 * d, p_.batch); },
        [&](std::int64_t i) {
          product(l.x_proj, mid.first(i), mid.size(i), x, p_.batch, at_.low + mid.first(i), low);
        });
    const std::int64_t width = 64;  // channels
    crew_.each(
        (d + width - 1) / width, [&] { x = prepared(l.dt_proj.weights, at_.low, low, p_.batch); },
        [&](std::int64_t i) {
          const std::int64_t first = i * width, n = d - first < width ? d - first : width;
          float* const dt = scratch<float>(Slot::a, p_.batch * width);
          product(l.dt_proj, first, n, x, p_.batch, dt, n);
          for (std::int64_t b = 0; b < p_.batch; ++b) {
            const float* const B = at_.low + b * low + p_.r;
            const float* const x_z = at_.xz + b * 2 * d + first;
            BM_SAME(selective_state_update)
                .state_update_rows({.n = p_.n,
                                    .softplus = true,
                                    .x = x_z,
                                    .dt = dt + b * n,
                                    .A = l.A + first * p_.n,
                                    .B = B,
                                    .C = B + p_.n,
                                    .D = l.D + first,
                                    .z = x_z + d,
                                    .dt_bias = l.dt_bias + first,
                                    .state = l.ssm_state + (b * d + first) * p_.n,
                                    .y = at_.y + b * d + first},
                                   0, n);
          }
        });
    add_product(l.out_proj, at_.y, d);
  }

  // x of n channels through convolution and SiLU; their memory moves on by one input
  void convolve(const Mamba& l, std::int64_t b, std::int64_t first, std::int64_t n) {
    const std::int64_t d = p_.d, k = p_.k;
    float* const x = at_.xz + b * 2 * d + first;
    float* const seen = l.conv_state + b * (k - 1) * d + first;
    const float* const w = l.conv_weight + first;
    over(n, [&](std::int64_t i, int some) {
      const vec newest = load_some(x + i, some);
      vec total = load_some(l.conv_bias + first + i, some);
      for (std::int64_t j = 0; j + 1 < k; ++j) {
        const vec old = load_some(seen + j * d + i, some);
        total += load_some(w + j * d + i, some) * old;
        if (j > 0) store_some(seen + (j - 1) * d + i, old, some);
      }
      if (k > 1) store_some(seen + (k - 2) * d + i, newest, some);
      total += load_some(w + (k - 1) * d + i, some) * newest;
      store_some(x + i, silu(total), some);
    });
  }

  // the residual stream plus W from + bias
  void add_product(const Linear& l, const float* from, std::int64_t width) {
    const Blocks blocks(p_.m, l.weights.row_bytes(), crew_.size(), p_.batch);
    const void* x = nullptr;
    crew_.each(
        blocks.count, [&] { x = prepared(l.weights, from, width, p_.batch); },
        [&](std::int64_t i) {
          const std::int64_t first = blocks.first(i), n = blocks.size(i);
          float* const out = scratch<float>(Slot::a, p_.batch * n);
          product(l, first, n, x, p_.batch, out, n);
          for (int b = 0; b < p_.batch; ++b) {
            float* const stream = at_.x + b * p_.m + first;
            for (std::int64_t j = 0; j < n; ++j) stream[j] += out[b * n + j];
          }
        });
  }

  // ---- the feed-forward layer ----

  // The tokens of an expert are neighbours in `sorted`: at begin[e] .. begin[e + 1] - 1 stand the
  // rows that `order` names.
  void feed_forward(const FeedForward& l, const float* in) {
    const std::int64_t m = p_.m, f = l.fc2.weights.cols;
    if (l.n_experts > 0) crew_.each(p_.batch, [&](std::int64_t b) { route(l, in, b); });
    crew_.each(1, [&](std::int64_t) { sort(l, in); });
    const int n_experts = l.n_experts > 0 ? l.n_experts : 1;

    const Blocks rows(f, l.fc1.weights.row_bytes(), crew_.size(), p_.batch);
    const void* x = nullptr;
    const auto prepare_in = [&] { x = prepared(l.fc1.weights, at_.sorted, m, p_.batch); };
    crew_.each(n_experts * rows.count, prepare_in, [&](std::int64_t i) {
      const std::int64_t e = i / rows.count, first = rows.first(i % rows.count);
      const std::int64_t n = rows.size(i % rows.count);
      const int start = at_.begin[e], count = at_.begin[e + 1] - start;
      if (count == 0) return;
      const Linear fc1{l.fc1.weights.at(e), l.fc1.bias ? l.fc1.bias + e * l.fc1.weights.rows : nullptr};
      float* const up = scratch<float>(Slot::a, 2 * count * n);
      float* const gate = up + count * n;
      const void* const own = of_row(x, l.fc1.weights, start);
      product(fc1, first, n, own, count, gate, n);
      if (l.gated) product(fc1, f + first, n, own, count, up, n);
      for (int t = 0; t < count; ++t) {
        float* const h = at_.hidden + (start + t) * f + first;
        over(n, [&](std::int64_t j, int some) {
          const vec g = load_some(gate + t * n + j, some);
          vec value = l.gelu ? gelu(g) : silu(g);
          if (l.gated) value *= load_some(up + t * n + j, some);
          store_some(h + j, value, some);
        });
      }
    });

    const Blocks out_rows(m, l.fc2.weights.row_bytes(), crew_.size(), p_.batch);
    const auto prepare_hidden = [&] { x = prepared(l.fc2.weights, at_.hidden, f, p_.batch); };
    crew_.each(n_experts * out_rows.count, prepare_hidden, [&](std::int64_t i) {
      const std::int64_t e = i / out_rows.count, first = out_rows.first(i % out_rows.count);
      const std::int64_t n = out_rows.size(i % out_rows.count);
      const int start = at_.begin[e], count = at_.begin[e + 1] - start;
      if (count == 0) return;
      const Linear fc2{l.fc2.weights.at(e), l.fc2.bias ? l.fc2.bias + e * m : nullptr};
      float* const out = scratch<float>(Slot::a, count * n);
      product(fc2, first, n, of_row(x, l.fc2.weights, start), count, out, n);
      for (int t = 0; t < count; ++t) {
        const std::int64_t b = at_.order[start + t];
        const float gate = l.n_experts > 0 ? at_.gate[b] : 1.0f;
        float* const stream = at_.x + b * m + first;
        for (std::int64_t j = 0; j < n; ++j) stream[j] += gate * out[t * n + j];
      }
    });
  }

  // the expert of largest logit (the first of equals; NaN counts as largest) and its sigmoid
  void route(const FeedForward& l, const float* in, std::int64_t b) {
    const float* const x = in + b * p_.m;
    int best = 0;
    float largest = 0;
    for (int e = 0; e < l.n_experts; ++e) {
      float logit;
      dot_rows<1, 1>(l.router_weight + e * p_.m, p_.m, x, p_.m, &logit, 1);
      logit += l.router_bias[e];
      if (e == 0 || logit > largest || (logit != logit && largest == largest)) {
        best = e;
        largest = logit;
      }
    }
    at_.expert[b] = best;
    at_.gate[b] = 1.0f / (1.0f + std::exp(-largest));
  }

  void sort(const FeedForward& l, const float* in) {
    const int n_experts = l.n_experts > 0 ? l.n_experts : 1;
    int placed = 0;
    for (int e = 0; e < n_experts; ++e) {
      at_.begin[e] = placed;
      for (int b = 0; b < p_.batch; ++b) {
        if (l.n_experts > 0 && at_.expert[b] != e) continue;
        at_.order[placed] = b;
        std::memcpy(at_.sorted + placed * p_.m, in + b * p_.m, p_.m * sizeof(float));
        ++placed;
      }
    }
    at_.begin[n_experts] = placed;
  }

  DecodePlan& p_;
  const std::int64_t* ids_;
  float* logits_;
  Buffers at_;
  Crew crew_;
};

void step(DecodePlan& plan, const std::int64_t* ids, float* logits, int n_threads) {
  Step shared(plan, ids, logits);
  run_crew(
      n_threads,
      [](const void* context, int, int n_members) {
        static_cast<Step*>(const_cast<void*>(context))->run(n_members);
      },
      &shared);
}

}  // namespace

BM_DEFINE(Decode, decode) = {workspace, step};

}  // namespace bm
