// What the scan and its single step share: the decay, softplus and gates on vectors, sums of rows.
#pragma once

#include "native/simd.hpp"

namespace bm {
namespace {

#if defined(__AVX512F__)
constexpr float sixteenths = 786432.0f;  // 1.5 * 2^19: the low bits of x + this count in 1/16

// 2^(r + f) with r = shifted - sixteenths and |f| <= 1/32, to 2e-7: 2^r is one of 16 numbers in a
// register and an exponent, 2^f three terms of its series. That is fewer multiplications, and fewer
// steps that wait for each other, than the polynomial of exp2_nonpositive takes.
BM_INLINE vec exp2_of_parts(vec shifted, vec f) {
  const __m512 powers = _mm512_setr_ps(
      1.0f, 1.04427378f, 1.09050773f, 1.13878863f, 1.18920712f, 1.24185781f,
      1.29683955f, 1.35425555f, 1.41421356f, 1.47682615f, 1.54221083f, 1.61049033f,
      1.68179283f, 1.75625216f, 1.83400809f, 1.91520656f);
  const vec power = (vec)_mm512_permutexvar_ps((__m512i)shifted, powers);
  vec p = 5.55041087e-2f * f + 2.40226507e-1f;
  p = p * f + 6.93147181e-1f;
  // times 2^floor(r)
  return (vec)_mm512_scalef_ps((__m512)(p * (f * power) + power), (__m512)(shifted - sixteenths));
}
#endif

#if defined(__AVX512F__)
// 2^(j / 32)
alignas(64) constexpr float powers[32] = {
    1.0f, 1.02189715f, 1.04427378f, 1.0671404f, 1.09050773f, 1.11438674f,
    1.13878863f, 1.16372486f, 1.18920712f, 1.21524736f, 1.24185781f, 1.26905096f,
    1.29683955f, 1.32523664f, 1.35425555f, 1.38390988f, 1.41421356f, 1.44518081f,
    1.47682615f, 1.50916443f, 1.54221083f, 1.57598085f, 1.61049033f, 1.64575548f,
    1.68179283f, 1.7186193f, 1.75625216f, 1.79470908f, 1.83400809f, 1.87416763f,
    1.91520656f, 1.95714412f};
#endif

// 2^x in the place of each x, step by step side by side, as each step waits for the one before.
// Relative error at most 2e-7 from -126 to 128, next to nothing below. 2^0 is exactly 1; NaN gives NaN.
//
// x = r + f with r a multiple of 1/32 and |f| <= 1/64: 2^r is one of 32 numbers in two registers
// and an exponent, 2^f three terms of a polynomial.
template <int K>
BM_INLINE void to_decays(vec (&x)[K]) {
#if defined(__AVX512F__)
  constexpr float parts = 393216.0f;  // 1.5 * 2^18: the low bits of x + this count in 1/32
  const __m512 low = (__m512)load(powers), high = (__m512)load(powers + 16);
  vec r[K], f[K], power[K];
#pragma GCC unroll 16
  for (int i = 0; i < K; ++i) r[i] = x[i] + parts;
#pragma GCC unroll 16
  for (int i = 0; i < K; ++i)
    power[i] = (vec)_mm512_permutex2var_ps(low, (__m512i)r[i], high);
#pragma GCC unroll 16
  for (int i = 0; i < K; ++i) r[i] = r[i] - parts;
#pragma GCC unroll 16
  for (int i = 0; i < K; ++i) f[i] = x[i] - r[i];
#pragma GCC unroll 16
  for (int i = 0; i < K; ++i) x[i] = 2.40226507e-1f * f[i] + 6.93157343e-1f;
#pragma GCC unroll 16
  for (int i = 0; i < K; ++i)  // times 2^floor(r)
    x[i] = (vec)_mm512_scalef_ps((__m512)(x[i] * (f[i] * power[i]) + power[i]), (__m512)r[i]);
#else
  // no state sees 2^-126, and numbers below it are slow on some processors
  for (int i = 0; i < K; ++i) {
    const vec bounded = at_most(at_least(x[i], -126.0f), 128.0f);
    const vec shifted = bounded + 12582912.0f;
    const vec f = bounded - (shifted - 12582912.0f);
    vec p = splat(1.3264724e-3f);
    p = p * f + 9.6715132e-3f;
    p = p * f + 5.5507338e-2f;
    p = p * f + 2.4022242e-1f;
    p = p * f + 6.9314698e-1f;
    p = p * f + 1.0f;
    x[i] = as_float(as_int(p) + (as_int(shifted) << 23));
  }
#endif
}

// 1 / x for x in [1, 2]
BM_INLINE vec reciprocal(vec x) {
#if defined(__AVX512F__)
  const vec r = (vec)_mm512_rcp14_ps((__m512)x);
  return r + r * (1.0f - x * r);
#else
  return 1.0f / x;
#endif
}

// e^-|x|: relative error at most 3e-7 down to e^-87, that where it would be less
BM_INLINE vec exp_of_minus(vec x) {
  // log2(e) in two parts
  constexpr float high = -1.4426950216293335f, low = -1.9259629911266175e-8f;
#if defined(__AVX512F__)
  const vec m = (vec)_mm512_min_ps((__m512)splat(87.0f), _mm512_abs_ps((__m512)x));  // NaN wins
  const vec shifted = m * high + sixteenths;
  return exp2_of_parts(shifted, (m * high - (shifted - sixteenths)) + m * low);
#else
  const vec m = at_most(as_float(as_int(x) & 0x7fffffff), 87.0f);
  const vec shifted = m * high + 12582912.0f;
  const vec f = (m * high - (shifted - 12582912.0f)) + m * low;
  vec p = splat(1.3264724e-3f);
  p = p * f + 9.6715132e-3f;
  p = p * f + 5.5507338e-2f;
  p = p * f + 2.4022242e-1f;
  p = p * f + 6.9314698e-1f;
  p = p * f + 1.0f;
  return as_float(as_int(p) + (as_int(shifted) << 23));
#endif
}

// 1 / (1 + e^-x)
BM_INLINE vec gate_of(vec x) {
  const vec e = exp_of_minus(x);
  return (x < 0.0f ? e : splat(1.0f)) * reciprocal(1.0f + e);
}

struct Rate {
  vec delta;  // ln(1 + e^x)
  vec slope;  // its derivative, the sigmoid
};

// Relative error of delta about 4e-7; exactly 0 below -87. Infinity and NaN pass through.
template <bool with_slope>
BM_INLINE Rate softplus_rate(vec x) {
  const vec e = x < -87.0f ? vec{} : exp_of_minus(x);
  // ln(1 + e) / e on [0, 1], fitted like the polynomials of simd.hpp: no division, no exponent
  vec p = splat(5.36481896e-3f);
  p = p * e - 3.00657731e-2f;
  p = p * e + 7.92045072e-2f;
  p = p * e - 1.37538001e-1f;
  p = p * e + 1.91536546e-1f;
  p = p * e - 2.48571634e-1f;
  p = p * e + 3.33213240e-1f;
  p = p * e - 4.99996483e-1f;
  p = p * e + 1.0f;
  Rate out;
  out.delta = (x < 0.0f ? vec{} : x) + e * p;
  if constexpr (with_slope) out.slope = (x < 0.0f ? e : splat(1.0f)) * reciprocal(1.0f + e);
  return out;
}

// The sums of `lanes` rows of `lanes` floats, 64-byte aligned.
BM_INLINE vec row_sums(const float* rows) {
#if defined(__AVX512F__)
  // Halve the number of rows four times; each vector then holds twice as many rows' partial sums.
  __m512 eight[8], four[4], two[2];
  for (int i = 0; i < 8; ++i) {  // rows i and i + 8
    const __m512 a = _mm512_load_ps(rows + i * 16), b = _mm512_load_ps(rows + (i + 8) * 16);
    eight[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  }
  for (int i = 0; i < 4; ++i) {  // quarters [i, i, i+8, i+8] to [i, i+4, i+8, i+12]
    const __m512 a = eight[i], b = eight[i + 4];
    four[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  }
  // quarters of four[i]: rows i, i + 8, i + 4, i + 12
  for (int i = 0; i < 2; ++i) {
    const __m512 a = four[i], b = four[i + 2];
    two[i] = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  }
  // in each quarter of two[i]: [i, i+2, i, i+2]
  const __m512 low = _mm512_shuffle_ps(two[0], two[1], 0x44), high = _mm512_shuffle_ps(two[0], two[1], 0xee);
  const __m512 one = _mm512_add_ps(low, high);  // each quarter: rows 0, 2, 1, 3 of its four
  const __m512i order = _mm512_setr_epi32(0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15);
  return (vec)_mm512_permutexvar_ps(order, one);
#elif defined(__AVX2__)
  __m256 four[4], two[2];
  for (int i = 0; i < 4; ++i)
    four[i] = _mm256_hadd_ps(_mm256_load_ps(rows + i * 16), _mm256_load_ps(rows + i * 16 + 8));
  for (int i = 0; i < 2; ++i) two[i] = _mm256_hadd_ps(four[2 * i], four[2 * i + 1]);
  return (vec)_mm256_add_ps(_mm256_permute2f128_ps(two[0], two[1], 0x20),
                            _mm256_permute2f128_ps(two[0], two[1], 0x31));
#else
  vec out;
  for (int i = 0; i < lanes; ++i) out[i] = sum(load(rows + i * lanes));
  return out;
#endif
}

// Four rows of partial sums in one: each lane belongs to one of them.
BM_INLINE vec fold(const vec (&rows)[4]) {
#if defined(__AVX512F__)
  // halves, then halves of quarters: [r0 r0 r1 r1] twice, [r2 r2 r3 r3] twice
  const auto halves = [](__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_mask_blend_ps(0xff00, a, b), _mm512_shuffle_f32x4(a, b, 0x4e));
  };
  const __m512 even = halves((__m512)rows[0], (__m512)rows[2]);
  const __m512 odd = halves((__m512)rows[1], (__m512)rows[3]);
  return (vec)_mm512_add_ps(_mm512_mask_blend_ps(0xcccc, even, odd), _mm512_shuffle_ps(even, odd, 0x4e));
#elif defined(__AVX2__)
  // [r0 r1 r2 r3] twice
  return (vec)_mm256_hadd_ps(_mm256_hadd_ps((__m256)rows[0], (__m256)rows[1]),
                             _mm256_hadd_ps((__m256)rows[2], (__m256)rows[3]));
#else
  return vec{sum(rows[0]), sum(rows[1]), sum(rows[2]), sum(rows[3])};
#endif
}

// The four sums.
BM_INLINE void unfold(vec v, float* sums) {
#if defined(__AVX512F__)
  const __m512 w = (__m512)v;
  const __m512 pairs = _mm512_add_ps(_mm512_shuffle_ps(w, w, 0x88), _mm512_shuffle_ps(w, w, 0xdd));
  const __m128 low = _mm_add_ps(_mm512_extractf32x4_ps(pairs, 0), _mm512_extractf32x4_ps(pairs, 1));
  const __m128 high = _mm_add_ps(_mm512_extractf32x4_ps(pairs, 2), _mm512_extractf32x4_ps(pairs, 3));
  _mm_storeu_ps(sums, _mm_movelh_ps(low, high));
#else
  for (int i = 0; i < 4; ++i) {
    sums[i] = v[i];
    for (int j = i + 4; j < lanes; j += 4) sums[i] += v[j];
  }
#endif
}

}  // namespace
}  // namespace bm
