// A task is one row of logits, which stays in cache for its three passes: greatest logit, sum of
// exponentials, gradient. Bytes moved: the logits once, and once more if their gradient is wanted.
// Bound: memory for long rows, else exp.
#include "linear_cross_entropy/cpu.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "native/simd.hpp"
#include "native/threads.hpp"

namespace bm {
namespace {

constexpr std::int64_t small = 1 << 13;  // logits below which waking threads costs more

// f(place, how many) for each vector of 0 .. n - 1; four at a time, number 0 .. 3
template <class F>
BM_INLINE void each_vector(std::int64_t n, F f) {
  std::int64_t c = 0;
  for (; c + 4 * lanes <= n; c += 4 * lanes)
    for (int j = 0; j < 4; ++j) f(c + j * lanes, lanes, j);
  for (; c < n; c += lanes) f(c, static_cast<int>(std::min<std::int64_t>(lanes, n - c)), 0);
}

// NaN is passed over here; the sum of exponentials meets it
template <class T>
float greatest(const T* x, std::int64_t n) {
  vec most[4];
  for (vec& m : most) m = splat(-__builtin_inff());
  std::int64_t c = 0;
  for (; c + 4 * lanes <= n; c += 4 * lanes)
    for (int j = 0; j < 4; ++j) {
      const vec v = load(x + c + j * lanes);
      most[j] = v > most[j] ? v : most[j];
    }
  float result = -__builtin_inff();
  for (const vec& m : most)
    for (int i = 0; i < lanes; ++i) result = m[i] > result ? m[i] : result;
  for (; c < n; ++c) result = to_float(x[c]) > result ? to_float(x[c]) : result;
  return result;
}

template <class T>
float row(T* x, std::int64_t n, std::int64_t label, bool gradient, float factor) {
  constexpr bool keeps = std::is_same_v<T, float>;  // exponentials, in place of their logits
  const float most = greatest(x, n), of_label = to_float(x[label]);
  vec sums[4] = {};
  each_vector(n, [&](std::int64_t c, int left, int j) {
    const vec e = exp(load_some(x + c, left) - most);
    if (keeps && gradient) store_some(x + c, e, left);
    if (left == lanes) {
      sums[j] += e;
    } else {
      for (int i = 0; i < left; ++i) sums[0][i] += e[i];
    }
  });
  const float total = sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
  if (gradient) {
    const float scale = factor / total;
    each_vector(n, [&](std::int64_t c, int left, int) {
      const vec v = load_some(x + c, left);
      store_some(x + c, (keeps ? v : exp(v - most)) * scale, left);
    });
    // not softmax - 1 of a rounded softmax
    const float share = std::exp(of_label - most) / total;
    x[label] = from_float<T>((share - 1.0f) * factor);
  }
  return std::log(total) + (most - of_label);
}

template <class T>
void run(const SoftmaxInputs& in, float* losses) {
  const int n_threads = in.t * in.v < small ? 1 : in.n_threads;
  parallel_for(n_threads, in.t, [&](std::int64_t i) {
    T* x = static_cast<T*>(in.logits) + i * in.v;
    if (in.labels[i] == in.ignore_index) {
      losses[i] = 0;
      if (in.gradient) std::memset(x, 0, in.v * sizeof(T));
      return;
    }
    losses[i] = row(x, in.v, in.labels[i], in.gradient, in.factor);
  });
}

void run_any(const SoftmaxInputs& in, float* losses) {
  return in.is_bf16 ? run<bf16>(in, losses) : run<float>(in, losses);
}

}  // namespace

BM_DEFINE(SoftmaxCrossEntropy, softmax_cross_entropy) = {run_any};

}  // namespace bm
