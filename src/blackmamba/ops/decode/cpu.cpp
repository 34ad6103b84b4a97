// A step is one parallel region. Inside it each thread takes its share of the rows of one product after
// another, in blocks, and then some of another's that is held up (crew.hpp). They meet only where the next
// product needs all of the last: after in_proj, x_proj, the state update and out_proj of a Mamba layer;
// after fc1 and fc2 of a feed-forward layer. What lies between two products is done by the thread that
// has the numbers, in its cache.
//
// Bytes: every weight that a token uses, once. Bound: the processor's read bandwidth (batch 1), or
// its multiply-adds (from a batch of about 8).
#include "decode/cpu.hpp"

#include <algorithm>
#include <cmath>

#include "native/crew.hpp"
#include "native/product.hpp"
#include "native/simd.hpp"
#include "native/threads.hpp"
#include "selective_state_update/cpu.hpp"

namespace bm {
namespace {

// Memory cut into pieces; without memory, how much that would be.
struct Cutting {
  float* memory;
  std::int64_t used = 0;
  float* take(std::int64_t count) {
    float* const start = memory ? memory + used : nullptr;
    used += (count + 15) / 16 * 16;
    return start;
  }
};

// What a layer's products begin with, of each of b tokens.
struct Rows {
  float *normed, *second, *sorted, *gate;  // (b, m), (b, m), (b, m), (b)
  std::int32_t *expert, *order, *begin;    // (b), (b), (e + 1)
  std::int32_t *met, *n_met;               // (e), (1): experts with tokens

  Rows(const DecodePlan& p, Cutting& from) {
    const std::int64_t b = p.batch;
    const auto whole = [&](std::int64_t count) {
      return reinterpret_cast<std::int32_t*>(from.take(count));
    };
    normed = from.take(b * p.m);
    second = from.take(b * p.m);
    sorted = from.take(b * p.m);
    gate = from.take(b);
    expert = whole(b);
    order = whole(b);
    begin = whole(p.most_experts + 1);
    met = whole(p.most_experts);
    n_met = whole(1);
  }
};

// Where a step keeps what goes from one phase to the next.
struct Buffers {
  float *x, *xz, *low, *y, *hidden;
  Rows rows;

  Buffers(const DecodePlan& p, Cutting& from) : rows(p, from) {
    const std::int64_t b = p.batch;
    x = from.take(b * p.m);
    xz = from.take(b * 2 * p.d);
    low = from.take(b * (p.r + 2 * p.n));
    y = from.take(b * p.d);
    hidden = from.take(b * p.widest_expert);
  }
};

std::int64_t workspace(const DecodePlan& plan) {
  Cutting nothing{nullptr};
  Buffers(plan, nothing);
  return nothing.used;
}

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

// What all threads of a step share.
struct Step {
  DecodePlan& plan;
  const std::int64_t* ids;
  float* logits;
  Buffers at;
  Crew crew;
};

// One of a step's threads.
class Member {
 public:
  Member(Step& step, int number)
      : p_(step.plan), at_(step.at), crew_(step.crew), step_(step), me_(number), rows_(step.at.rows) {
    reserve();
    if (!few_) return;
    Cutting size{nullptr};
    Rows(p_, size);
    Cutting own{scratch<float>(Slot::c, size.used)};
    rows_ = Rows(p_, own);
  }

  void run() {
    const std::int64_t m = p_.m;
    each(p_.batch, [&](std::int64_t b) { embed(b); });
    for (const DecodeLayer& layer : p_.layers) {
      const bool pair = layer.has_mamba && layer.has_feed_forward;
      each_row([&](std::int64_t b) {
        apply_norm(layer.norm, at_.x + b * m, rows_.normed + b * m, m);
        if (pair) apply_norm(layer.feed_forward_norm, at_.x + b * m, rows_.second + b * m, m);
      });
      if (layer.has_mamba) mamba(layer.mamba);
      if (layer.has_feed_forward)
        feed_forward(layer.feed_forward, pair ? rows_.second : rows_.normed);
    }
    each_row([&](std::int64_t b) {
      apply_norm(p_.final_norm, at_.x + b * m, rows_.normed + b * m, m);
    });
    const Blocks blocks = in_blocks(p_.head.weights);
    const void* x = nullptr;
    each(
        blocks.count, [&] { x = prepared(p_.head.weights, rows_.normed, m, p_.batch); },
        [&](std::int64_t i) {
          product(p_.head, blocks.first(i), blocks.size(i), x, p_.batch, step_.logits + blocks.first(i),
                  p_.v);
        });
  }

 private:
  static constexpr std::int64_t channels = 64;  // of a task of the state update

  template <class Before, class F>
  void each(std::int64_t n_tasks, const Before& before, const F& f) {
    crew_.each(me_, n_tasks, before, f);
  }
  template <class F>
  void each(std::int64_t n_tasks, const F& f) {
    crew_.each(me_, n_tasks, [] {}, f);
  }

  // Scratch memory for whatever task this thread may get: that must not grow in a later step.
  void reserve() const {
    std::int64_t bytes = prepared_bytes(p_.head.weights), numbers = channels;
    const auto fit = [&](const Linear& l, std::int64_t some) {
      bytes = std::max(bytes, prepared_bytes(l.weights));
      numbers = std::max(numbers, some);
    };
    for (const DecodeLayer& layer : p_.layers) {
      if (layer.has_mamba) {
        const Mamba& l = layer.mamba;
        for (const Linear* product : {&l.in_proj, &l.x_proj, &l.dt_proj}) fit(*product, 0);
        fit(l.out_proj, in_blocks(l.out_proj.weights).rows);
      }
      if (layer.has_feed_forward) {
        const FeedForward& l = layer.feed_forward;
        fit(l.fc1, 2 * in_blocks(l.fc1.weights, l.fc2.weights.cols, lanes).rows);
        fit(l.fc2, in_blocks(l.fc2.weights).rows);
      }
    }
    scratch<char>(Slot::b, p_.batch * bytes);
    scratch<float>(Slot::a, p_.batch * numbers);
  }

  // a product's rows, a multiple of so many in a block
  Blocks in_blocks(const Weights& w, std::int64_t n_rows, int multiple) const {
    return Blocks::of_shares(n_rows, w.row_bytes(), crew_.size(), p_.batch, multiple);
  }
  Blocks in_blocks(const Weights& w) const { return in_blocks(w, w.rows, 4); }

  // f(b) for what is little work: where rows are few, each thread does it for itself into memory of its
  // own, which takes less time than to wait for another.
  template <class F>
  void each_row(const F& f) {
    if (!few_) return each(p_.batch, f);
    for (std::int64_t b = 0; b < p_.batch; ++b) f(b);
  }

  // A quantised embedding has 8 bits: weights.hpp.
  void embed(std::int64_t b) {
    const Weights& table = p_.embedding;
    float* const x = at_.x + b * p_.m;
    const std::int64_t start = step_.ids[b] * p_.m;
    if (table.kind == WeightKind::float32) {
      std::memcpy(x, static_cast<const float*>(table.data) + start, p_.m * sizeof(float));
    } else if (table.kind == WeightKind::bfloat16) {
      const bf16* const row = static_cast<const bf16*>(table.data) + start;
      for (int i = 0; i < p_.m; ++i) x[i] = to_float(row[i]);
    } else {
      const std::int64_t groups = (p_.m + table.group - 1) / table.group;
      const std::int8_t* const row = static_cast<const std::int8_t*>(table.data) + start;
      const bf16* const scales = static_cast<const bf16*>(table.scales) + step_.ids[b] * groups;
      for (int i = 0; i < p_.m; ++i) x[i] = row[i] * to_float(scales[i / table.group]);
    }
  }

  // ---- the Mamba layer ----

  void mamba(const Mamba& l) {
    const std::int64_t d = p_.d, m = p_.m, low = p_.r + 2 * p_.n;
    // [x | z]: the convolution of a channel needs only its own row
    const Blocks in = in_blocks(l.in_proj.weights, 2 * d, lanes);
    const void* x = nullptr;
    each(
        in.count, [&] { x = prepared(l.in_proj.weights, rows_.normed, m, p_.batch); },
        [&](std::int64_t i) {
          const std::int64_t first = in.first(i), n = in.size(i);
          product(l.in_proj, first, n, x, p_.batch, at_.xz + first, 2 * d);
          for (int b = 0; b < p_.batch; ++b) convolve(l, b, first, first + n < d ? n : d - first);
        });
    const Blocks mid = in_blocks(l.x_proj.weights);
    each(
        mid.count, [&] { x = prepared(l.x_proj.weights, at_.xz, 2 * d, p_.batch); },
        [&](std::int64_t i) {
          product(l.x_proj, mid.first(i), mid.size(i), x, p_.batch, at_.low + mid.first(i), low);
        });
    each(
        (d + channels - 1) / channels, [&] { x = prepared(l.dt_proj.weights, at_.low, low, p_.batch); },
        [&](std::int64_t i) {
          const std::int64_t first = i * channels, n = std::min(channels, d - first);
          float* const dt = scratch<float>(Slot::a, p_.batch * channels);
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
    const Blocks blocks = in_blocks(l.weights);
    const void* x = nullptr;
    each(
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
    if (l.n_experts > 0) each_row([&](std::int64_t b) { route(l, in, b); });
    if (few_)
      sort(l, in);
    else
      each(1, [&](std::int64_t) { sort(l, in); });
    const int n_met = *rows_.n_met;

    const Blocks rows = in_blocks(l.fc1.weights, f, lanes);
    const void* x = nullptr;
    const auto prepare_in = [&] { x = prepared(l.fc1.weights, rows_.sorted, m, p_.batch); };
    each(n_met * rows.count, prepare_in, [&](std::int64_t i) {
      const std::int64_t e = rows_.met[i / rows.count], first = rows.first(i % rows.count);
      const std::int64_t n = rows.size(i % rows.count);
      const int start = rows_.begin[e], count = rows_.begin[e + 1] - start;
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

    const Blocks out_rows = in_blocks(l.fc2.weights);
    const auto prepare_hidden = [&] { x = prepared(l.fc2.weights, at_.hidden, f, p_.batch); };
    each(n_met * out_rows.count, prepare_hidden, [&](std::int64_t i) {
      const std::int64_t e = rows_.met[i / out_rows.count], first = out_rows.first(i % out_rows.count);
      const std::int64_t n = out_rows.size(i % out_rows.count);
      const int start = rows_.begin[e], count = rows_.begin[e + 1] - start;
      const Linear fc2{l.fc2.weights.at(e), l.fc2.bias ? l.fc2.bias + e * m : nullptr};
      float* const out = scratch<float>(Slot::a, count * n);
      product(fc2, first, n, of_row(x, l.fc2.weights, start), count, out, n);
      for (int t = 0; t < count; ++t) {
        const std::int64_t b = rows_.order[start + t];
        const float gate = l.n_experts > 0 ? rows_.gate[b] : 1.0f;
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
      dot_rows<1, 1>(l.router_weight + e * p_.m, p_.m, x, p_.m, &logit, 1, false);
      logit += l.router_bias[e];
      if (e == 0 || logit > largest || (logit != logit && largest == largest)) {
        best = e;
        largest = logit;
      }
    }
    rows_.expert[b] = best;
    rows_.gate[b] = 1.0f / (1.0f + std::exp(-largest));
  }

  void sort(const FeedForward& l, const float* in) {
    const int n_experts = l.n_experts > 0 ? l.n_experts : 1;
    int placed = 0, met = 0;
    for (int e = 0; e < n_experts; ++e) {
      rows_.begin[e] = placed;
      for (int b = 0; b < p_.batch; ++b) {
        if (l.n_experts > 0 && rows_.expert[b] != e) continue;
        rows_.order[placed] = b;
        std::memcpy(rows_.sorted + placed * p_.m, in + b * p_.m, p_.m * sizeof(float));
        ++placed;
      }
      if (placed > rows_.begin[e]) rows_.met[met++] = e;
    }
    rows_.begin[n_experts] = placed;
    *rows_.n_met = met;
  }

  DecodePlan& p_;
  Buffers& at_;
  Crew& crew_;
  Step& step_;
  int me_;
  bool few_ = p_.batch <= 4;
  Rows rows_;
};

void step(DecodePlan& plan, const std::int64_t* ids, float* logits, int n_threads) {
  Cutting memory{plan.memory.data()};
  Step shared{.plan = plan, .ids = ids, .logits = logits, .at = Buffers(plan, memory), .crew = {}};
  run_crew(
      n_threads < Crew::most ? n_threads : Crew::most,
      [](const void* context, int member, int n_members) {
        Step& all = *static_cast<Step*>(const_cast<void*>(context));
        all.crew.enter(n_members);
        Member(all, member).run();
      },
      &shared);
}

}  // namespace

BM_DEFINE(Decode, decode) = {workspace, step};

}  // namespace bm
