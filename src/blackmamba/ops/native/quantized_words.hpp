// Dot products with quantised rows as sums of whole numbers: part of product_quantized.hpp, for
// processors with AVX512-VNNI.
//
// A number x of a vector becomes q 2^e with a whole q, of 16 bits in a narrow product and of 32 else,
// as two words of 16. Weights become words too, and all their products are summed exactly. The power
// is shared by those columns whose products one lane of a register sums, four of int8 and eight of
// int4, and is the least that holds the largest of them, |x| <= M. So q is off by at most 1/2, and
//     |q 2^e - x| <= 2^-15 M in a narrow product, 2^-31 M else
// (down to M = 2^-96; below, as if M were that). A number far larger than its neighbours takes digits
// from no more than seven. A bfloat16 that is at least 2^-7 M loses nothing.
#pragma once

#include <type_traits>

#include "native/simd.hpp"
#include "native/weights.hpp"

namespace bm {
namespace {
namespace words {

constexpr int words_of(bool narrow) { return narrow ? 1 : 2; }

// 64 bytes of weights are a part: 64 columns of int8 in two vectors of words, 128 of int4 in four. In
// units of 4 bytes a part of a prepared vector has
//     for each of those, the columns' q: the higher words, 16 units, and the lower ones
//     for int4 -8 times each lane's sum, of each word: codes are 8 more than the weight
//     the powers, one for each lane
constexpr int vectors_of_part(bool int4) { return int4 ? 4 : 2; }
constexpr int columns_of_part(bool int4) { return 32 * vectors_of_part(int4); }
constexpr int units_of_part(bool int4, int words) { return 16 * ((int4 ? 5 : 2) * words + 1); }

BM_INLINE __m512i load_bytes(const void* p) {
  __m512i out;
  std::memcpy(&out, p, sizeof out);
  return out;
}
// Once: for each use the compiler would read memory again.
BM_INLINE __m512i load_once(const void* p) {
  __m512i out = load_bytes(p);
  asm("" : "+v"(out));
  return out;
}

// the first n of 64 bytes; zeros behind them
BM_INLINE __m512i load_some_bytes(const void* p, std::int64_t n) {
#if defined(BM_SANITIZE)  // sanitizers do not look into intrinsics
  __m512i out = _mm512_setzero_si512();
  std::memcpy(&out, p, n);
  return out;
#else
  return _mm512_maskz_loadu_epi8(n >= 64 ? ~__mmask64{0} : (__mmask64{1} << n) - 1, p);
#endif
}

// 64 bytes of int8 as words: a lane gets the columns 2 j and 2 j + 1 of each half ...
BM_INLINE void unpack(const std::int8_t* p, __m512i out[2]) {
  for (int k = 0; k < 2; ++k) {
    __m256i half;
    std::memcpy(&half, p + 32 * k, sizeof half);
    out[k] = _mm512_cvtepi8_epi16(half);
  }
}
// ... and of int4: in lane 4 R + j, of run R, vector k has the columns 4 j and 4 j + 2, plus k / 2,
// plus 16 (k % 2).
BM_INLINE void unpack(const std::uint8_t* p, __m512i out[4]) {
  const __m512i bytes = load_once(p), low = _mm512_set1_epi16(15);
  out[0] = _mm512_and_si512(bytes, low);
  out[1] = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), low);
  out[2] = _mm512_and_si512(_mm512_srli_epi16(bytes, 8), low);
  out[3] = _mm512_srli_epi16(bytes, 12);
}

// A scale in the lanes that it is for: of 64 columns of int8, or of fewer, one; of 128 of int4 ...
constexpr int scales_of_part(bool int4, int runs) { return (int4 ? 4 : 2) > runs ? (int4 ? 4 : 2) / runs : 1; }
BM_INLINE vec scale_of_all(const bf16* p) {
  return (vec)_mm512_maskz_set1_epi16(0xaaaaaaaa, static_cast<short>(p->bits));
}
// ... up to four, `runs` apart
template <int runs>
BM_INLINE vec scales_of_runs(const bf16* p) {
  if constexpr (runs == 4) return scale_of_all(p);
  struct Words {
    alignas(64) std::int16_t of[32];
  };
  static constexpr Words which = [] {
    Words words{};
    for (int i = 0; i < 32; ++i) words.of[i] = static_cast<std::int16_t>(i / 8 / runs);
    return words;
  }();
  std::int64_t bits = 0;
  std::memcpy(&bits, p, 4 / runs * sizeof(bf16));
  return (vec)_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, load_bytes(which.of),
                                             _mm512_castsi128_si512(_mm_cvtsi64_si128(bits)));
}

// y[b * ldy + i] = row i . x[b] for i < rows and b < batch; `runs` of them share a scale. The rows
// are `bytes` and their scales `groups` apart.
template <int rows, int batch, int runs, bool narrow, class T>
BM_INLINE void quantized_dots(const T* w, std::int64_t bytes, const bf16* scales,
                              std::int64_t groups, std::int64_t cols, const float* x,
                              std::int64_t ldx, float* y, std::int64_t ldy) {
  constexpr bool int4 = std::is_same_v<T, std::uint8_t>;
  constexpr int words = words_of(narrow), part = columns_of_part(int4), vectors = vectors_of_part(int4);
  constexpr int units = units_of_part(int4, words), n_scales = scales_of_part(int4, runs);
  // of int8 a lane has columns of both halves: where each has its scale, they are summed apart
  constexpr int sums = int4 ? 1 : n_scales, summed = vectors / sums;
  vec total[rows][batch] = {};
  const auto add = [&](const T* p, std::int64_t between, const bf16* scale,
                       std::int64_t between_scales) __attribute__((always_inline)) {
    __m512i of_w[rows][vectors];
    for (int i = 0; i < rows; ++i) unpack(p + i * between, of_w[i]);
    for (int s = 0; s < sums; ++s) {
      vec s_of[rows];
      for (int i = 0; i < rows; ++i) {
        const bf16* const own = scale + i * between_scales + s;
        if constexpr (int4) s_of[i] = scales_of_runs<runs>(own);
        else s_of[i] = scale_of_all(own);
      }
      for (int b = 0; b < batch; ++b) {
        const float* const at = x + b * ldx;
        __m512i sum[rows][words];
        for (int d = 0; d < words; ++d) {
          const __m512i first = int4 ? load_once(at + 16 * (vectors * words + d)) : _mm512_setzero_si512();
          for (int i = 0; i < rows; ++i) sum[i][d] = first;
          for (int k = s * summed; k < (s + 1) * summed; ++k) {
            const __m512i of_x = load_once(at + 16 * (k * words + d));
            for (int i = 0; i < rows; ++i) sum[i][d] = _mm512_dpwssd_epi32(sum[i][d], of_w[i][k], of_x);
          }
        }
        const vec powers = load(at + units - 16);
        for (int i = 0; i < rows; ++i) {
          __m512 value = _mm512_cvtepi32_ps(sum[i][0]);
          if constexpr (words == 2)
            value = _mm512_fmadd_ps(value, _mm512_set1_ps(65536), _mm512_cvtepi32_ps(sum[i][1]));
          value = _mm512_mul_ps(value, (__m512)s_of[i]);
          total[i][b] = (vec)_mm512_fmadd_ps(value, (__m512)powers, (__m512)total[i][b]);
        }
      }
    }
  };
  for (int i = 0; i < rows; ++i)  // as many as lie in 64 bytes
    for (std::int64_t g = 0; g < groups; g += 32)
      __builtin_prefetch(scales + i * groups + g + scales_ahead);
  std::int64_t c = 0;
  for (; c + part <= cols; c += part, w += 64, x += units) {
    for (int i = 0; i < rows; ++i) ask_for(w + i * bytes);
    add(w, bytes, scales + c / (runs * run), groups);
  }
  if (c < cols) {  // x is zero behind the last column
    const std::int64_t left = cols - c, n_left = (left + runs * run - 1) / (runs * run);
    T some[rows][64];
    bf16 few[rows][32];
    for (int i = 0; i < rows; ++i) {
      const __m512i data = load_some_bytes(w + i * bytes, int4 ? (left + run - 1) / run * 16 : left);
      const __m512i own = load_some_bytes(scales + i * groups + c / (runs * run), 2 * n_left);
      std::memcpy(some[i], &data, sizeof data);
      std::memcpy(few[i], &own, sizeof own);
    }
    add(some[0], 64, few[0], 32);
  }
  for (int i = 0; i < rows; ++i)
    for (int b = 0; b < batch; ++b) y[b * ldy + i] = sum(total[i][b]);
}

// numbers of a prepared vector
BM_INLINE std::int64_t quantized_length(const Weights& w) {
  const bool int4 = w.kind == WeightKind::int4;
  const std::int64_t part = columns_of_part(int4);
  return (w.cols + part - 1) / part * units_of_part(int4, words_of(w.narrow));
}

// The q of 16 columns, chunk `chunk` of a part: see `unpack`.
template <bool int4, int words>
BM_INLINE void place(__m512i q, int chunk, float* part) {
  for (int d = words - 1; d >= 0; --d) {
    const __m256i word = _mm512_cvtepi32_epi16(q);
    if constexpr (int4) {
      for (int k = chunk % 2; k < 4; k += 2) {
        const __m128i every_other = _mm256_cvtepi32_epi16(k < 2 ? word : _mm256_srli_epi32(word, 16));
        std::memcpy(part + 16 * (k * words + d) + chunk / 2 * 4, &every_other, sizeof every_other);
      }
    } else {
      std::memcpy(part + 16 * (chunk / 2 * words + d) + chunk % 2 * 8, &word, sizeof word);
    }
    q = _mm512_srai_epi32(_mm512_add_epi32(q, _mm512_set1_epi32(1 << 15)), 16);  // words have a sign
  }
}

template <bool int4, int words>
void prepare_parts(const float* x, std::int64_t cols, float* out) {
  constexpr int part = columns_of_part(int4), units = units_of_part(int4, words);
  constexpr int highest = 16 * words - 2;  // bit of q
  constexpr int apart = int4 ? 1 : 2;      // chunks of columns that meet in a lane
  for (std::int64_t begin = 0; begin < cols; begin += part, out += units) {
    for (int p = 0; p < part / 32; ++p) {
      const int chunks[2] = {int4 ? 2 * p : p, (int4 ? 2 * p : p) + apart};
      vec v[2];
      __m512i largest = _mm512_setzero_si512();  // bits of M
      for (int h = 0; h < 2; ++h) {
        const std::int64_t c = begin + 16 * chunks[h], left = cols - c;
        v[h] = left > 0 ? load_some(x + c, static_cast<int>(left < 16 ? left : 16)) : vec{};
        const __m512i size = _mm512_and_si512((__m512i)v[h], _mm512_set1_epi32(0x7fffffff));
        largest = _mm512_max_epu32(largest, size);
      }
      largest = _mm512_max_epu32(largest, _mm512_shuffle_epi32(largest, _MM_PERM_CDAB));
      if (int4) largest = _mm512_max_epu32(largest, _mm512_shuffle_epi32(largest, _MM_PERM_BADC));
      // Biased exponents. An M that would round to a power of two has that one's.
      __m512i exponent = _mm512_srli_epi32(_mm512_add_epi32(largest, _mm512_set1_epi32(256)), 23);
      exponent = _mm512_max_epu32(exponent, _mm512_set1_epi32(16 * words));  // else 2^e is denormal
      const __m512i down = _mm512_sub_epi32(_mm512_set1_epi32(254 + highest), exponent);
      for (int h = 0; h < 2; ++h) {
        const vec scaled = v[h] * (vec)_mm512_slli_epi32(down, 23);
        place<int4, words>(_mm512_cvtps_epi32((__m512)scaled), chunks[h], out);
      }
      const __m512i up = _mm512_sub_epi32(exponent, _mm512_set1_epi32(highest));
      __m512 power = (__m512)_mm512_slli_epi32(up, 23);
      const __m512i infinity = _mm512_set1_epi32(0x7f800000);
      power = _mm512_mask_blend_ps(_mm512_cmpge_epu32_mask(largest, infinity), power,
                                   _mm512_set1_ps(__builtin_nanf("")));
      power = _mm512_maskz_compress_ps(int4 ? 0x1111 : 0x5555, power);
      std::memcpy(out + units - 16 + p * (int4 ? 4 : 8), &power, (int4 ? 4 : 8) * sizeof(float));
    }
    for (int d = 0; int4 && d < words; ++d) {
      __m512i sum = _mm512_setzero_si512();
      for (int k = 0; k < 4; ++k)
        sum = _mm512_dpwssd_epi32(sum, load_bytes(out + 16 * (k * words + d)), _mm512_set1_epi16(-8));
      std::memcpy(out + 16 * (4 * words + d), &sum, sizeof sum);
    }
  }
}

void prepare_quantized(const Weights& w, const float* x, float* out) {
  const auto prepare = w.kind == WeightKind::int4
                           ? (w.narrow ? prepare_parts<true, 1> : prepare_parts<true, 2>)
                           : (w.narrow ? prepare_parts<false, 1> : prepare_parts<false, 2>);
  prepare(x, w.cols, out);
}

}  // namespace words
}  // namespace
}  // namespace bm
