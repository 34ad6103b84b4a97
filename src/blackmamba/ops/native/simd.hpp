// Vectors of floats in the width of the instruction set that is being compiled for.
//
// They are the vector types of GCC and Clang: +, *, < and ?: work lane by lane, and the compiler
// emits AVX-512, AVX2, SSE2 or NEON. Everything stands in an unnamed namespace: see targets.hpp.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#define BM_LANES 16
#elif defined(__AVX2__)
#include <immintrin.h>
#define BM_LANES 8
#else
#define BM_LANES 4
#endif

#define BM_INLINE inline __attribute__((always_inline))

namespace bm {
namespace {

constexpr int lanes = BM_LANES;

typedef float vec __attribute__((vector_size(BM_LANES * 4)));
typedef std::int32_t ivec __attribute__((vector_size(BM_LANES * 4)));
typedef std::uint32_t uvec __attribute__((vector_size(BM_LANES * 4)));
typedef std::uint16_t half_uvec __attribute__((vector_size(BM_LANES * 2)));

// A bfloat16 in memory.
struct bf16 {
  std::uint16_t bits;
};

BM_INLINE vec splat(float x) { return x - vec{}; }
BM_INLINE ivec as_int(vec x) { return (ivec)x; }
BM_INLINE vec as_float(ivec x) { return (vec)x; }

BM_INLINE float to_float(float x) { return x; }
BM_INLINE float to_float(bf16 x) {
  const std::uint32_t wide = static_cast<std::uint32_t>(x.bits) << 16;
  float out;
  std::memcpy(&out, &wide, 4);
  return out;
}

template <class T>
BM_INLINE T from_float(float x);
template <>
BM_INLINE float from_float<float>(float x) {
  return x;
}
template <>
BM_INLINE bf16 from_float<bf16>(float x) {  // to nearest, ties to even; NaN stays NaN
  std::uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return {static_cast<std::uint16_t>((bits >> 16) | 0x40)};
  return {static_cast<std::uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

// lanes numbers from memory of any alignment, as float32
BM_INLINE vec load(const float* p) {
  vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
BM_INLINE vec load(const bf16* p) {
  half_uvec narrow;
  std::memcpy(&narrow, p, sizeof narrow);
  return (vec)(__builtin_convertvector(narrow, uvec) << 16);
}

BM_INLINE void store(float* p, vec v) { std::memcpy(p, &v, sizeof v); }
BM_INLINE void store(bf16* p, vec v) {
  const uvec bits = (uvec)v;
  const uvec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const uvec nan = (bits >> 16) | 0x40;
  const uvec is_nan = (uvec)(v != v);
  const half_uvec narrow =
      __builtin_convertvector((is_nan & nan) | (~is_nan & rounded), half_uvec);
  std::memcpy(p, &narrow, sizeof narrow);
}

// To memory past the caches, as what is larger than they are; p on a multiple of the vector's size.
// Other threads may read it after `stream_ends`.
BM_INLINE void stream(float* p, vec v) {
#if defined(__AVX512F__) && !defined(BM_SANITIZE)
  _mm512_stream_ps(p, (__m512)v);
#elif defined(__AVX2__) && !defined(BM_SANITIZE)
  _mm256_stream_ps(p, (__m256)v);
#else
  store(p, v);
#endif
}
BM_INLINE void stream_ends() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// the first n numbers, 0 <= n <= lanes; zeros behind them
template <class T>
BM_INLINE vec load_some(const T* p, int n) {
  if (n >= lanes) return load(p);
  T full[lanes];
  std::memset(full, 0, sizeof full);
  std::memcpy(full, p, static_cast<std::size_t>(n > 0 ? n : 0) * sizeof(T));
  return load(full);
}
template <class T>
BM_INLINE void store_some(T* p, vec v, int n) {
  if (n >= lanes) return store(p, v);
  T full[lanes];
  store(full, v);
  std::memcpy(p, full, static_cast<std::size_t>(n > 0 ? n : 0) * sizeof(T));
}
#if defined(__AVX512F__) && !defined(BM_SANITIZE)  // sanitizers do not look into intrinsics
BM_INLINE __mmask16 first(int n) {
  return n >= 16 ? 0xffff : static_cast<__mmask16>((1u << (n > 0 ? n : 0)) - 1);
}
template <>
BM_INLINE vec load_some<float>(const float* p, int n) {
  return (vec)_mm512_maskz_loadu_ps(first(n), p);
}
template <>
BM_INLINE void store_some<float>(float* p, vec v, int n) {
  _mm512_mask_storeu_ps(p, first(n), (__m512)v);
}
template <>
BM_INLINE vec load_some<bf16>(const bf16* p, int n) {
  return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(n), p)), 16);
}
#endif

// f(i, n) for all i < n_numbers, lanes numbers at a time; n of the last may be fewer. The others are
// apart, so that the compiler knows their n.
template <class F>
BM_INLINE void over(std::int64_t n_numbers, const F& f) {
  std::int64_t i = 0;
  for (; i + lanes <= n_numbers; i += lanes) f(i, lanes);
  if (i < n_numbers) f(i, static_cast<int>(n_numbers - i));
}

// v with zeros from lane n on
BM_INLINE vec keep(vec v, int n) {
  ivec lane;
  for (int i = 0; i < lanes; ++i) lane[i] = i;
  return lane < n ? v : vec{};
}

// NaN wins over any bound: the comparison is false for it
BM_INLINE vec at_least(vec x, float low) { return x < low ? splat(low) : x; }
BM_INLINE vec at_most(vec x, float high) { return x > high ? splat(high) : x; }

BM_INLINE float sum(vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float total = 0;
  for (int i = 0; i < lanes; ++i) total += v[i];
  return total;
#endif
}

// The polynomials below were fitted for the least relative error (tests/ops/test_native.py holds
// the bounds); their constant 1 is exact, so that e^0 is 1 and a state without decay stays as it is.

// 2^x for x <= 0, as in a decay. Relative error at most 2e-7 down to -126; below, 2^-126, which no
// sum of interest can see. NaN gives NaN.
//
// x = i + f with |f| <= 1/2: 2^f by a polynomial, 2^i by adding i to its exponent.
BM_INLINE vec exp2_nonpositive(vec x) {
  x = at_least(x, -126.0f);
  const vec shifted = x + 12582912.0f;  // 1.5 * 2^23: the sum's low bits are the nearest integer
  const vec f = x - (shifted - 12582912.0f);
  vec p = splat(1.3264724e-3f);
  p = p * f + 9.6715132e-3f;
  p = p * f + 5.5507338e-2f;
  p = p * f + 2.4022242e-1f;
  p = p * f + 6.9314698e-1f;
  p = p * f + 1.0f;
  return as_float(as_int(p) + (as_int(shifted) << 23));
}

constexpr float log2_e = 1.44269504088896341f;
constexpr float ln_2 = 0.69314718055994531f;

// e^x. Relative error at most 2e-7 within [-87, 88]; e^-87 below, infinity above. NaN gives NaN.
BM_INLINE vec exp(vec x) {
  const vec bounded = at_most(at_least(x, -87.0f), 88.0f);
  const vec shifted = bounded * log2_e + 12582912.0f;
  const vec i = shifted - 12582912.0f;
  // ln 2 in two parts: i times the first is exact
  const vec f = (bounded - i * 0.693359375f) + i * 2.12194440e-4f;
  vec p = splat(1.3814611e-3f);
  p = p * f + 8.3687103e-3f;
  p = p * f + 4.1668387e-2f;
  p = p * f + 1.6666521e-1f;
  p = p * f + 4.9999993e-1f;
  p = p * f + 1.0f;
  p = p * f + 1.0f;
  const vec y = as_float(as_int(p) + (as_int(shifted) << 23));
  return x > 88.0f ? splat(__builtin_inff()) : y;
}

BM_INLINE vec sigmoid(vec x) { return 1.0f / (1.0f + exp(-x)); }
BM_INLINE vec silu(vec x) { return x / (1.0f + exp(-x)); }

// ln(1 + x) for x >= 0 (also infinity); relative error about 3e-7.
BM_INLINE vec log1p_positive(vec x) {
  // 1 + x = m 2^k with m in [sqrt(1/2), sqrt(2)); what 1 + x lost by rounding is added back.
  const vec u = 1.0f + x;
  const vec lost = x - (u - 1.0f);
  const ivec bits = as_int(u);
  const ivec k = (bits - 0x3f3504f3) >> 23;
  const vec m = as_float(bits - (k << 23));
  const vec correction = lost / u;
  const vec t = m - 1.0f;
  const vec s = t / (2.0f + t), z = s * s;
  // 2 atanh(s) = ln(m); |s| <= 0.172
  vec p = splat(2.9871735e-1f);
  p = p * z + 3.9977541e-1f;
  p = p * z + 6.6666776e-1f;
  const vec log_m = s * (2.0f + z * p);
  const vec out = __builtin_convertvector(k, vec) * ln_2 + (log_m + correction);
  return x == __builtin_inff() ? x : out;
}

// ln(1 + e^x), 0 at -infinity
BM_INLINE vec softplus(vec x) {
  // max(x, 0) + ln(1 + e^-|x|) never overflows
  const vec magnitude = as_float(as_int(x) & 0x7fffffff);
  const vec positive = x < 0.0f ? vec{} : x;
  const vec small = exp(-magnitude);
  // below -87 the true value is e^x itself, near the least float32; exactly 0 keeps pads inert
  const vec tail = x < -87.0f ? vec{} : log1p_positive(small);
  return positive + tail;
}

// P(X < x) for a standard normal X, off by at most 3e-7, and exp(-x^2 / 2)
struct Normal {
  vec below, density_times_root;
};
BM_INLINE Normal normal(vec x) {
  // erfc(z) = exp(-z^2) t p(t) with t = 1 / (1 + 0.3 z), z >= 0; p was fitted for the least
  // relative error, 2.2e-8 up to z = 9, where exp(-z^2) is 0
  const vec z = as_float(as_int(x) & 0x7fffffff) * 0.70710678f;
  const vec e = exp(x * x * -0.5f), t = 1.0f / (1.0f + 0.3f * z);
  vec p = splat(-0.12856003750797523f);
  p = p * t + 0.48079025558903665f;
  p = p * t - 0.50214553271376520f;
  p = p * t + 0.53570112521006930f;
  p = p * t - 0.08594742607545487f;
  p = p * t + 0.21098996274187456f;
  p = p * t + 0.14942400257733880f;
  p = p * t + 0.17054873574062046f;
  p = p * t + 0.16919889446214254f;
  const vec tail = 0.5f * e * t * p;
  return {x < 0.0f ? tail : 1.0f - tail, e};
}
BM_INLINE vec gelu(vec x) { return x * normal(x).below; }

}  // namespace
}  // namespace bm
