#include "native/cpu.hpp"

#include "native/simd.hpp"

namespace bm {
namespace {

template <class F>
void map(const float* x, float* y, std::int64_t n, F f) {
  for (std::int64_t i = 0; i < n; i += lanes) {
    const int left = static_cast<int>(n - i < lanes ? n - i : lanes);
    store_some(y + i, f(load_some(x + i, left)), left);
  }
}

vec through_bf16(vec v) {
  bf16 narrow[lanes];
  store(narrow, v);
  return load(narrow);
}

void apply(Function f, const float* x, float* y, std::int64_t n) {
  switch (f) {
    case Function::exp2_nonpositive: return map(x, y, n, [](vec v) { return exp2_nonpositive(v); });
    case Function::exp: return map(x, y, n, [](vec v) { return exp(v); });
    case Function::sigmoid: return map(x, y, n, [](vec v) { return sigmoid(v); });
    case Function::silu: return map(x, y, n, [](vec v) { return silu(v); });
    case Function::softplus: return map(x, y, n, [](vec v) { return softplus(v); });
    case Function::round_to_bf16: return map(x, y, n, [](vec v) { return through_bf16(v); });
  }
}

float multiply_adds(std::int64_t n) {
  constexpr int chains = 16;
  vec sums[chains];
  for (int j = 0; j < chains; ++j) sums[j] = splat(1.0f + j);
  vec a = splat(0.999f), b = splat(0.001f);
  asm volatile("" : "+m"(a), "+m"(b));  // unknown to the compiler
  for (std::int64_t i = 0; i < n; ++i)
    for (int j = 0; j < chains; ++j) sums[j] = sums[j] * a + b;
  vec total{};
  for (int j = 0; j < chains; ++j) total += sums[j];
  return sum(total);
}

#if defined(__AVX512BF16__)
float multiply_pairs(std::int64_t n) {
  constexpr int chains = 16;
  __m512 sums[chains];
  for (int j = 0; j < chains; ++j) sums[j] = _mm512_set1_ps(1.0f + j);
  __m512i a = _mm512_set1_epi32(0x3f80), b = _mm512_set1_epi32(0x3f80);
  asm volatile("" : "+m"(a), "+m"(b));  // unknown to the compiler
  for (std::int64_t i = 0; i < n; ++i)
    for (int j = 0; j < chains; ++j)
      sums[j] = _mm512_dpbf16_ps(sums[j], (__m512bh)a, (__m512bh)b);
  __m512 total = _mm512_setzero_ps();
  for (int j = 0; j < chains; ++j) total = _mm512_add_ps(total, sums[j]);
  return _mm512_reduce_add_ps(total);
}
#else
constexpr float (*multiply_pairs)(std::int64_t) = nullptr;
#endif

}  // namespace

BM_DEFINE(Elementwise, elementwise) = {apply, multiply_adds, multiply_pairs, lanes};

}  // namespace bm
