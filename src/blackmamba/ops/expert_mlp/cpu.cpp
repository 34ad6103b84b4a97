// Owns: a block of rows of one expert, for all tokens of that expert.
// Bytes: the weights of every chosen expert, once; x, h and y stay in the cache. Bound: bandwidth.
#include "expert_mlp/cpu.hpp"

#include "native/product.hpp"

namespace bm {
namespace {

void read_row(const FewTokens& c, std::int64_t t, float* out) {
  const std::int64_t m = c.fc2.rows;
  if (c.narrow) {
    const bf16* const row = static_cast<const bf16*>(c.x) + t * c.x_stride;
    for (std::int64_t i = 0; i < m; ++i) out[i] = to_float(row[i]);
  } else {
    std::memcpy(out, static_cast<const float*>(c.x) + t * c.x_stride, m * sizeof(float));
  }
}

void few_tokens(const FewTokens& c) {
  const std::int64_t m = c.fc2.rows, f = c.fc2.cols, n = c.n_tokens;
  // tokens of one expert become neighbours: order[begin[e] .. begin[e + 1]]
  std::int64_t* const begin = scratch<std::int64_t>(Slot::c, c.n_experts + 1 + n);
  std::int64_t* const order = begin + c.n_experts + 1;
  std::int64_t placed = 0;
  for (int e = 0; e < c.n_experts; ++e) {
    begin[e] = placed;
    for (std::int64_t t = 0; t < n; ++t)
      if (c.expert_ids[t] == e) order[placed++] = t;
  }
  begin[c.n_experts] = placed;

  float* const sorted = scratch<float>(Slot::d, n * (m + f));
  float* const hidden = sorted + n * m;
  for (std::int64_t i = 0; i < n; ++i) read_row(c, order[i], sorted + i * m);

  const void* x = prepared(c.fc1, sorted, m, static_cast<int>(n));
  const Blocks rows(f, c.fc1.row_bytes(), c.n_threads, c.n_tokens);
  parallel_for(c.n_threads, c.n_experts * rows.count, [&](std::int64_t i) {
    const std::int64_t e = i / rows.count, first = rows.first(i % rows.count);
    const std::int64_t size = rows.size(i % rows.count), start = begin[e];
    const int count = static_cast<int>(begin[e + 1] - start);
    if (count == 0) return;
    const Weights fc1 = c.fc1.at(e);
    const float* const bias = c.fc1_bias ? c.fc1_bias + e * c.fc1.rows : nullptr;
    float* const gate = scratch<float>(Slot::a, 2 * count * size);
    float* const up = gate + count * size;
    const void* const own = of_row(x, fc1, start);
    product_rows(fc1, first, size, own, count, gate, size);
    if (c.gated) product_rows(fc1, f + first, size, own, count, up, size);
    for (int t = 0; t < count; ++t) {
      float* const h = hidden + (start + t) * f + first;
      const auto with_bias = [&](const float* x, std::int64_t row, int some) {
        return bias ? load_some(x, some) + load_some(bias + row, some) : load_some(x, some);
      };
      float* const kept = c.h ? c.h + (start + t) * c.fc1.rows + first : nullptr;
      over(size, [&](std::int64_t j, int some) {
        const vec g = with_bias(gate + t * size + j, first + j, some);
        if (kept) store_some(kept + j, g, some);
        vec value = c.gelu ? gelu(g) : silu(g);
        if (c.gated) {
          const vec u = with_bias(up + t * size + j, f + first + j, some);
          if (kept) store_some(kept + f + j, u, some);
          value *= u;
        }
        store_some(h + j, value, some);
      });
    }
  });

  x = prepared(c.fc2, hidden, f, static_cast<int>(n));
  const Blocks out_rows(m, c.fc2.row_bytes(), c.n_threads, c.n_tokens);
  parallel_for(c.n_threads, c.n_experts * out_rows.count, [&](std::int64_t i) {
    const std::int64_t e = i / out_rows.count, first = out_rows.first(i % out_rows.count);
    const std::int64_t size = out_rows.size(i % out_rows.count), start = begin[e];
    const int count = static_cast<int>(begin[e + 1] - start);
    if (count == 0) return;
    float* const out = scratch<float>(Slot::a, count * size);
    const Weights fc2 = c.fc2.at(e);
    product_rows(fc2, first, size, of_row(x, fc2, start), count, out, size);
    for (int t = 0; t < count; ++t) {
      const std::int64_t token = order[start + t];
      const float gate = c.gate ? c.gate[token] : 1.0f;
      for (std::int64_t j = 0; j < size; ++j) {
        const float bias = c.fc2_bias ? c.fc2_bias[e * m + first + j] : 0.0f;
        const float y = (out[t * size + j] + bias) * gate;
        const std::int64_t place = token * m + first + j;
        if (c.narrow)
          static_cast<bf16*>(c.y)[place] = from_float<bf16>(y);
        else
          static_cast<float*>(c.y)[place] = y;
      }
    }
  });
}

}  // namespace

BM_DEFINE(ExpertMlp, expert_mlp) = {few_tokens};

}  // namespace bm
