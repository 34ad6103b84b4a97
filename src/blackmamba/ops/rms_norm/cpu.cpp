// A task is a block of rows. A row is read twice, the second time from cache. Bytes moved: x, an
// update, the total and y once forward; x and all gradients once backward. Bound: memory.
#include "rms_norm/cpu.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "native/simd.hpp"
#include "native/threads.hpp"

namespace bm {
namespace {

constexpr std::int64_t row_block = 32;
constexpr std::int64_t small = 1 << 14;  // numbers below which waking threads costs more

std::int64_t n_tasks(const RmsNormInputs& in) { return (in.t + row_block - 1) / row_block; }
int n_threads(const RmsNormInputs& in) { return in.t * in.m < small ? 1 : in.n_threads; }

// f(row) for the rows of task i
template <class F>
BM_INLINE void each_row(const RmsNormInputs& in, std::int64_t i, F f) {
  const std::int64_t stop = std::min((i + 1) * row_block, in.t);
  for (std::int64_t row = i * row_block; row < stop; ++row) f(row);
}

// Sums over a row in four parts, so that no addition waits for the one before.
template <class F>
BM_INLINE float sum_over(std::int64_t m, F term) {
  vec sums[4] = {};
  std::int64_t c = 0;
  for (; c + 4 * lanes <= m; c += 4 * lanes)
    for (int j = 0; j < 4; ++j) sums[j] += term(c + j * lanes, lanes);
  for (; c < m; c += lanes) sums[0] += term(c, static_cast<int>(std::min<std::int64_t>(lanes, m - c)));
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// 1 / sqrt(mean(x^2) + eps)
template <class X>
BM_INLINE float scale_of(const RmsNormInputs& in, const X* x) {
  const float squares = sum_over(in.m, [&](std::int64_t c, int n) {
    const vec v = load_some(x + c, n);
    return v * v;
  });
  return 1.0f / std::sqrt(squares / static_cast<float>(in.m) + in.eps);
}

// total = x + update, rounded to x's dtype
template <class X, class U>
BM_INLINE void add(const X* x, const U* update, X* total, std::int64_t m) {
  std::int64_t c = 0;
  for (; c + lanes <= m; c += lanes) store(total + c, load(x + c) + load(update + c));
  const int n = static_cast<int>(m - c);
  store_some(total + c, load_some(x + c, n) + load_some(update + c, n), n);
}

template <class X, class Y>
void forward(const RmsNormInputs& in, const RmsNormSum& sum, void* out) {
  parallel_for(n_threads(in), n_tasks(in), [&](std::int64_t i) {
    each_row(in, i, [&](std::int64_t row) {
      const X* x = static_cast<const X*>(in.x) + row * in.m;
      if (sum.update != nullptr) {
        X* total = static_cast<X*>(sum.total) + row * in.m;
        if (sum.is_bf16)
          add(x, static_cast<const bf16*>(sum.update) + row * in.m, total, in.m);
        else
          add(x, static_cast<const float*>(sum.update) + row * in.m, total, in.m);
        x = total;
      }
      Y* y = static_cast<Y*>(out) + row * in.m;
      const float scale = scale_of(in, x);
      std::int64_t c = 0;
      for (; c + lanes <= in.m; c += lanes) store(y + c, load(x + c) * scale * load(in.weight + c));
      const int n = static_cast<int>(in.m - c);
      store_some(y + c, load_some(x + c, n) * scale * load_some(in.weight + c, n), n);
    });
  });
}

// With g = grad_y weight and s the scale: grad_x = s g - x s^3 / m sum(g x), and grad_weight is
// the sum over rows of grad_y x s: each task sums its own rows.
template <class X, class Y>
void backward(const RmsNormInputs& in, const void* grad_y, const void* grad_total, void* grad_x,
              float* grad_weight, void* narrow) {
  const std::int64_t tasks = n_tasks(in), m = in.m;
  float* parts = scratch<float>(Slot::d, tasks * m);
  parallel_for(n_threads(in), tasks, [&](std::int64_t i) {
    float* part = parts + i * m;
    std::memset(part, 0, m * sizeof(float));
    each_row(in, i, [&](std::int64_t row) {
      const X* x = static_cast<const X*>(in.x) + row * m;
      const Y* gy = static_cast<const Y*>(grad_y) + row * m;
      const X* beside = grad_total ? static_cast<const X*>(grad_total) + row * m : nullptr;
      X* gx = static_cast<X*>(grad_x) + row * m;
      bf16* copy = narrow ? static_cast<bf16*>(narrow) + row * m : nullptr;
      const float scale = scale_of(in, x);
      const float along = sum_over(m, [&](std::int64_t c, int n) {
        return load_some(gy + c, n) * load_some(in.weight + c, n) * load_some(x + c, n);
      });
      const float back = along * scale * scale * scale / static_cast<float>(m);
      const auto one = [&](std::int64_t c, int n) {
        const vec here = load_some(x + c, n), g = load_some(gy + c, n) * scale;
        store_some(part + c, load_some(part + c, n) + g * here, n);
        vec sum = g * load_some(in.weight + c, n) - here * back;
        if (beside != nullptr) sum += load_some(beside + c, n);
        store_some(gx + c, sum, n);
        if (copy != nullptr) store_some(copy + c, sum, n);
      };
      std::int64_t c = 0;
      for (; c + lanes <= m; c += lanes) one(c, lanes);
      one(c, static_cast<int>(m - c));
    });
  });
  for (std::int64_t c = 0; c < m; c += lanes) {
    const int n = static_cast<int>(std::min<std::int64_t>(lanes, m - c));
    vec total{};
    for (std::int64_t i = 0; i < tasks; ++i) total += load_some(parts + i * m + c, n);
    store_some(grad_weight + c, total, n);
  }
}

void run_forward(const RmsNormInputs& in, const RmsNormSum& sum, void* y) {
  const auto run = in.x_is_bf16 ? (in.y_is_bf16 ? forward<bf16, bf16> : forward<bf16, float>)
                                : (in.y_is_bf16 ? forward<float, bf16> : forward<float, float>);
  run(in, sum, y);
}

void run_backward(const RmsNormInputs& in, const void* grad_y, const void* grad_total, void* grad_x,
                  float* grad_weight, void* narrow) {
  const auto run = in.x_is_bf16
                       ? (in.y_is_bf16 ? backward<bf16, bf16> : backward<bf16, float>)
                       : (in.y_is_bf16 ? backward<float, bf16> : backward<float, float>);
  run(in, grad_y, grad_total, grad_x, grad_weight, narrow);
}

}  // namespace

BM_DEFINE(RmsNorm, rms_norm) = {run_forward, run_backward};

}  // namespace bm
