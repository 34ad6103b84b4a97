// A task is a block of rows. Bytes moved: h once and y once forward; h, y's gradient and h's
// gradient once backward, which computes the activation again. Bound: memory; GELU is near exp's.
#include "activate/cpu.hpp"

#include <algorithm>

#include "native/simd.hpp"
#include "native/threads.hpp"

namespace bm {
namespace {

constexpr std::int64_t block = 1 << 13;  // numbers a task writes, about
constexpr std::int64_t small = 1 << 14;  // numbers below which waking threads costs more

struct Slope {
  vec value, derivative;
};

struct Silu {
  static BM_INLINE vec value(vec x) { return silu(x); }
  static BM_INLINE Slope slope(vec x) {
    const vec s = sigmoid(x);
    return {x * s, s * (1.0f + x * (1.0f - s))};
  }
};

struct Gelu {
  static BM_INLINE vec value(vec x) { return gelu(x); }
  static BM_INLINE Slope slope(vec x) {
    const Normal n = normal(x);
    return {x * n.below, n.below + x * n.density_times_root * 0.39894228f};
  }
};

// f(row) for all rows, in parallel
template <class F>
BM_INLINE void each_row(const ActivateInputs& in, F f) {
  const std::int64_t rows = std::max<std::int64_t>(1, block / std::max<std::int64_t>(1, in.f));
  const int n_threads = in.t * in.f < small ? 1 : in.n_threads;
  parallel_for(n_threads, (in.t + rows - 1) / rows, [&](std::int64_t i) {
    const std::int64_t stop = std::min((i + 1) * rows, in.t);
    for (std::int64_t row = i * rows; row < stop; ++row) f(row);
  });
}

template <class T, class Act>
void forward(const ActivateInputs& in, void* out) {
  each_row(in, [&](std::int64_t row) {
    const T* h = static_cast<const T*>(in.h) + row * in.h_row;
    T* y = static_cast<T*>(out) + row * in.f;
    over(in.f, [&](std::int64_t c, int n) {
      const vec value = Act::value(load_some(h + c, n));
      store_some(y + c, in.gated ? value * load_some(h + in.f + c, n) : value, n);
    });
  });
}

template <class T, class Act>
void backward(const ActivateInputs& in, const ActivateGradients& grad) {
  each_row(in, [&](std::int64_t row) {
    const T* h = static_cast<const T*>(in.h) + row * in.h_row;
    const T* gy = static_cast<const T*>(grad.y) + row * grad.y_row;
    T* gh = static_cast<T*>(grad.h) + row * (in.gated ? 2 : 1) * in.f;
    const std::int64_t place = grad.places ? grad.places[row] : row;
    const float scale = grad.scale ? grad.scale[place] : 1.0f;
    vec dot{};
    over(in.f, [&](std::int64_t c, int n) {
      const Slope act = Act::slope(load_some(h + c, n));
      const vec unscaled = load_some(gy + c, n), g = unscaled * scale;
      const vec up = in.gated ? load_some(h + in.f + c, n) : splat(1.0f);
      dot += unscaled * up * act.value;  // zeros beyond n, as their gradient is
      store_some(gh + c, g * up * act.derivative, n);
      if (in.gated) store_some(gh + in.f + c, g * act.value, n);
    });
    if (grad.dots) grad.dots[place] = sum(dot);
  });
}

void run_forward(const ActivateInputs& in, void* y) {
  if (in.is_bf16) return in.gelu ? forward<bf16, Gelu>(in, y) : forward<bf16, Silu>(in, y);
  return in.gelu ? forward<float, Gelu>(in, y) : forward<float, Silu>(in, y);
}

void run_backward(const ActivateInputs& in, const ActivateGradients& grad) {
  if (in.is_bf16) return in.gelu ? backward<bf16, Gelu>(in, grad) : backward<bf16, Silu>(in, grad);
  return in.gelu ? backward<float, Gelu>(in, grad) : backward<float, Silu>(in, grad);
}

}  // namespace

BM_DEFINE(Activate, activate) = {run_forward, run_backward};

}  // namespace bm
