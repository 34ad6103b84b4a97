// A task is a block of one tensor. Bytes moved, with bfloat16 parameters and gradients: 14 read and
// 14 written a number with a master, 12 and 10 without; the norm reads the gradients once. Bound:
// memory.
#include "adamw/cpu.hpp"

#include <algorithm>
#include <cmath>

#include "native/simd.hpp"
#include "native/threads.hpp"

namespace bm {
namespace {

constexpr std::int64_t block = 1 << 14;  // numbers of a task
constexpr std::int64_t run = 1 << 10;    // numbers whose squares are summed in float32
constexpr std::int64_t small = 1 << 15;  // numbers below which waking threads costs more

BM_INLINE vec square_root(vec x) {
#if defined(__AVX512F__)
  return (vec)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
  return (vec)_mm256_sqrt_ps((__m256)x);
#else
  for (int i = 0; i < lanes; ++i) x[i] = std::sqrt(x[i]);
  return x;
#endif
}

// 32 bits that look random. Source: Wellons 2018, "Prospecting for Hash Functions", lowbias32.
template <class U>
BM_INLINE U hash(U x) {
  x = (x ^ (x >> 16)) * 0x21F0AAADu;
  x = (x ^ (x >> 15)) * 0xD35A2D97u;
  return x ^ (x >> 15);
}

// up or down to 16 bits: as many random ones are added to those that are cut off
BM_INLINE vec rounded_at_random(vec x, std::int64_t first, std::uint32_t seed) {
  uvec index;
  for (int i = 0; i < lanes; ++i) index[i] = static_cast<std::uint32_t>(i);
  index += static_cast<std::uint32_t>(first);
  const uvec noise = hash(index ^ seed) & 0xFFFFu;
  return (vec)(((uvec)x + noise) & 0xFFFF0000u);
}

// Calls run(tensor, begin, end, task) for every block of every tensor.
template <class T, class F>
void over_blocks(const T* tensors, std::int64_t n_tensors, int n_threads, const F& run) {
  std::int64_t* ends = scratch<std::int64_t>(Slot::a, n_tensors);  // of each tensor's tasks
  std::int64_t n_tasks = 0, n_numbers = 0;
  for (std::int64_t i = 0; i < n_tensors; ++i) {
    n_numbers += tensors[i].n;
    ends[i] = n_tasks += (tensors[i].n + block - 1) / block;
  }
  parallel_for(n_numbers < small ? 1 : n_threads, n_tasks, [&](std::int64_t task) {
    const std::int64_t i = std::upper_bound(ends, ends + n_tensors, task) - ends;
    const std::int64_t begin = (task - (i ? ends[i - 1] : 0)) * block;
    run(tensors[i], begin, std::min(begin + block, tensors[i].n), task);
  });
}

template <class P, class G, bool has_master>
void update_block(const AdamWTensor& t, const AdamWFactors& f, std::int64_t begin,
                  std::int64_t end) {
  P* const parameter = static_cast<P*>(t.parameter);
  const G* const gradient = static_cast<const G*>(t.gradient);
  const float shrink = f.lr * t.decay;
  const std::uint32_t seed = hash(static_cast<std::uint32_t>(f.seed * 65536 + t.number));
  const auto some = [&](std::int64_t i, int n) {
    const vec g = load_some(gradient + i, n) * f.scale;
    const vec m = f.beta1 * load_some(t.m + i, n) + f.rest1 * g;
    const vec v = f.beta2 * load_some(t.v + i, n) + f.rest2 * g * g;
    vec p = has_master ? load_some(t.master + i, n) : load_some(parameter + i, n);
    p -= shrink * p;
    p -= f.lr * (m * f.c1) / (square_root(v) * f.c2 + f.eps);
    store_some(t.m + i, m, n);
    store_some(t.v + i, v, n);
    if (has_master) store_some(t.master + i, p, n);
    if (sizeof(P) == 2 && !has_master) p = rounded_at_random(p, i, seed);
    store_some(parameter + i, p, n);
  };
  std::int64_t i = begin;
  for (; i + lanes <= end; i += lanes) some(i, lanes);
  some(i, static_cast<int>(end - i));
}

using UpdateBlock = void (*)(const AdamWTensor&, const AdamWFactors&, std::int64_t, std::int64_t);

template <class P, class G>
UpdateBlock with_master(const AdamWTensor& t) {
  return t.master ? update_block<P, G, true> : update_block<P, G, false>;
}

UpdateBlock kind_of(const AdamWTensor& t) {
  if (t.parameter_is_bf16)
    return t.gradient_is_bf16 ? with_master<bf16, bf16>(t) : with_master<bf16, float>(t);
  return t.gradient_is_bf16 ? with_master<float, bf16>(t) : with_master<float, float>(t);
}

void update(const AdamWTensor* tensors, std::int64_t n_tensors, const AdamWFactors& factors,
            int n_threads) {
  over_blocks(tensors, n_tensors, n_threads,
              [&](const AdamWTensor& t, std::int64_t begin, std::int64_t end, std::int64_t) {
                kind_of(t)(t, factors, begin, end);
              });
}

// Of at most a run: in four parts, so that no addition waits for the one before.
template <class T>
float squares_of_run(const T* x, std::int64_t n) {
  vec sums[4] = {};
  std::int64_t i = 0;
  for (; i + 4 * lanes <= n; i += 4 * lanes)
    for (int j = 0; j < 4; ++j) {
      const vec v = load(x + i + j * lanes);
      sums[j] += v * v;
    }
  for (; i < n; i += lanes) {
    const vec v = load_some(x + i, static_cast<int>(std::min<std::int64_t>(lanes, n - i)));
    sums[0] += v * v;
  }
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <class T>
double squares_of(const void* data, std::int64_t begin, std::int64_t end) {
  double total = 0;
  for (; begin < end; begin += run)
    total += squares_of_run(static_cast<const T*>(data) + begin, std::min(run, end - begin));
  return total;
}

double squares(const NormTensor* tensors, std::int64_t n_tensors, int n_threads) {
  std::int64_t n_tasks = 0;
  for (std::int64_t i = 0; i < n_tensors; ++i) n_tasks += (tensors[i].n + block - 1) / block;
  double* parts = scratch<double>(Slot::b, n_tasks);
  over_blocks(tensors, n_tensors, n_threads,
              [&](const NormTensor& t, std::int64_t begin, std::int64_t end, std::int64_t task) {
                const auto of = t.is_bf16 ? squares_of<bf16> : squares_of<float>;
                parts[task] = of(t.data, begin, end);
              });
  double total = 0;
  for (std::int64_t i = 0; i < n_tasks; ++i) total += parts[i];
  return total;
}

}  // namespace

BM_DEFINE(AdamW, adamw) = {update, squares};

}  // namespace bm
