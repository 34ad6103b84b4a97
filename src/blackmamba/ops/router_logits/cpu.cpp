// A task is a block of rows, which stay as narrow as they are. Bytes moved: x once forward; x and its
// gradient once backward. The weight stays in the cache. Bound: 2 and 4 e FLOPs a number of x.
#include "router_logits/cpu.hpp"

#include <algorithm>
#include <cstring>

#include "native/simd.hpp"
#include "native/threads.hpp"

namespace bm {
namespace {

constexpr std::int64_t row_block = 64;
constexpr std::int64_t most_parts = 64;     // sums of a weight's gradient that are kept apart
constexpr std::int64_t small = 1 << 15;     // multiply-adds below which waking threads costs more
constexpr std::int64_t at_once = 8;         // experts whose sums a row is read for
constexpr int rows_at_once = 4;             // backward

int n_threads(const RouterInputs& in) { return in.t * in.m * in.e < small ? 1 : in.n_threads; }

template <class T>
const T* row_of(const RouterInputs& in, std::int64_t row) {
  return static_cast<const T*>(in.x) + row * in.x_row;
}

// logits[j] = bias[j] + weight_j x for `count` experts
template <int count, class T>
BM_INLINE void products(const T* x, const float* weight, std::int64_t m, const float* bias,
                        float* logits) {
  vec sums[count] = {};
  over(m, [&](std::int64_t c, int n) {
    const vec here = load_some(x + c, n);
    for (int j = 0; j < count; ++j) sums[j] += here * load_some(weight + j * m + c, n);
  });
  for (int j = 0; j < count; ++j) logits[j] = bias[j] + sum(sums[j]);
}

template <class T>
void forward(const RouterInputs& in, const float* bias, float* logits) {
  parallel_for(n_threads(in), pieces(in.t, row_block), [&](std::int64_t task) {
    const std::int64_t stop = std::min((task + 1) * row_block, in.t);
    for (std::int64_t row = task * row_block; row < stop; ++row) {
      const T* const x = row_of<T>(in, row);
      float* const out = logits + row * in.e;
      std::int64_t j = 0;
      for (; j + at_once <= in.e; j += at_once)
        products<at_once>(x, in.weight + j * in.m, in.m, bias + j, out + j);
      for (; j < in.e; ++j) products<1>(x, in.weight + j * in.m, in.m, bias + j, out + j);
    }
  });
}

// grad_x of R rows, and what they add to a part of the weight's gradient
template <int R, class T>
void backward_rows(const RouterInputs& in, const RouterGradients& grad, std::int64_t row,
                   float* part) {
  const float* const g = grad.logits + row * in.e;
  T* const grad_x = static_cast<T*>(grad.x) + row * in.m;
  over(in.m, [&](std::int64_t c, int n) {
    vec x[R], totals[R] = {};
    for (int r = 0; r < R; ++r) x[r] = load_some(row_of<T>(in, row + r) + c, n);
    for (std::int64_t j = 0; j < in.e; ++j) {
      float* const place = part + j * (in.m + 1) + c;
      const vec weight = load_some(in.weight + j * in.m + c, n);
      vec sum = load_some(place, n);
      for (int r = 0; r < R; ++r) {
        totals[r] += g[r * in.e + j] * weight;
        sum += g[r * in.e + j] * x[r];
      }
      store_some(place, sum, n);
    }
    for (int r = 0; r < R; ++r) store_some(grad_x + r * in.m + c, totals[r], n);
  });
  for (int r = 0; r < R; ++r)
    for (std::int64_t j = 0; j < in.e; ++j) part[j * (in.m + 1) + in.m] += g[r * in.e + j];
}

template <class T>
void backward(const RouterInputs& in, const RouterGradients& grad) {
  const std::int64_t size = (in.m + 1) * in.e;  // a bias behind each row of the weight
  const std::int64_t rows = std::max(row_block, pieces(in.t, most_parts));
  const std::int64_t tasks = pieces(in.t, rows);
  float* const parts = scratch<float>(Slot::d, tasks * size + 1);
  parallel_for(n_threads(in), tasks, [&](std::int64_t task) {
    float* const part = parts + task * size;
    std::memset(part, 0, static_cast<std::size_t>(size) * sizeof(float));
    const std::int64_t stop = std::min((task + 1) * rows, in.t);
    std::int64_t row = task * rows;
    for (; row + rows_at_once <= stop; row += rows_at_once)
      backward_rows<rows_at_once, T>(in, grad, row, part);
    for (; row < stop; ++row) backward_rows<1, T>(in, grad, row, part);
  });
  for (std::int64_t j = 0; j < in.e; ++j) {
    over(in.m + 1, [&](std::int64_t c, int n) {
      vec total{};
      for (std::int64_t task = 0; task < tasks; ++task)
        total += load_some(parts + task * size + j * (in.m + 1) + c, n);
      const bool has_bias = c + n > in.m;
      store_some(grad.weight + j * in.m + c, total, has_bias ? n - 1 : n);
      if (has_bias) grad.bias[j] = total[n - 1];
    });
  }
}

void run_forward(const RouterInputs& in, const float* bias, float* logits) {
  return in.is_bf16 ? forward<bf16>(in, bias, logits) : forward<float>(in, bias, logits);
}

void run_backward(const RouterInputs& in, const RouterGradients& grad) {
  return in.is_bf16 ? backward<bf16>(in, grad) : backward<float>(in, grad);
}

}  // namespace

BM_DEFINE(RouterLogits, router_logits) = {run_forward, run_backward};

}  // namespace bm
