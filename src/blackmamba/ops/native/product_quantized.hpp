// Dot products with rows of 8- and 4-bit weights, part of product.hpp; the format is that of
// ops/quantized_linear/weights.py.
//
// The vectors keep float32's accuracy. With the integer products of AVX512-VNNI each number becomes
// four digits of 8 bits under one power of two, 30 bits below the vector's largest number; sums of
// digits times whole weights are exact. Without them the vectors stay float32. Either way a
// group of columns is summed over its whole numbers, and the sum multiplied by the group's scale.
#pragma once

#include <type_traits>

#include "native/simd.hpp"
#include "native/weights.hpp"

namespace bm {
namespace {

constexpr int run = 32;  // columns; of int4 they share 16 bytes, j in the low halves, j + 16 in the high

// Weights are asked for long before they are needed, into the second cache: a Zen 4 reads ahead on its
// own where a row is little work, as one of bfloat16 is, but not here. Into the first cache it brings
// them half as fast. Scales are too slow a stream to be foreseen.
constexpr int weights_ahead = 12288;  // bytes
constexpr int scales_ahead = 512;
BM_INLINE void ask_for(const void* weights) {
  __builtin_prefetch(static_cast<const char*>(weights) + weights_ahead, 0, 2);
}

constexpr int block_of_runs = 128;  // columns of int4 that are taken at once with AVX-512

#if !defined(__AVX512VNNI__)
// a scale in all lanes
BM_INLINE vec scale_of(const bf16* p) {
#if defined(__AVX512BW__)
  return (vec)_mm512_slli_epi32(_mm512_set1_epi16(static_cast<short>(p->bits)), 16);
#else
  return splat(to_float(*p));
#endif
}

// the whole numbers of a run in the order of the columns: 32 of int8 ...
constexpr int vecs_of_run = run / lanes;
BM_INLINE void load_run(const std::int8_t* p, vec out[vecs_of_run]) {
  for (int k = 0; k < vecs_of_run; ++k) {
#if defined(__AVX512F__)
    __m128i narrow;
    std::memcpy(&narrow, p + k * lanes, sizeof narrow);
    out[k] = (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(narrow));
#else
    typedef std::int8_t narrow_vec __attribute__((vector_size(BM_LANES)));
    narrow_vec narrow;
    std::memcpy(&narrow, p + k * lanes, sizeof narrow);
    out[k] = __builtin_convertvector(__builtin_convertvector(narrow, ivec), vec);
#endif
  }
}
// ... and 16 bytes of int4
BM_INLINE void load_run(const std::uint8_t* p, vec out[vecs_of_run]) {
  constexpr int half = vecs_of_run / 2;
  for (int k = 0; k < half; ++k) {
    typedef std::uint8_t narrow_vec __attribute__((vector_size(BM_LANES)));
    narrow_vec narrow;
    std::memcpy(&narrow, p + k * lanes, sizeof narrow);
    const ivec codes = __builtin_convertvector(narrow, ivec);
    out[k] = __builtin_convertvector((codes & 15) - 8, vec);
    out[half + k] = __builtin_convertvector((codes >> 4) - 8, vec);
  }
}

constexpr int bytes_of_run(const std::int8_t*) { return run; }
constexpr int bytes_of_run(const std::uint8_t*) { return run / 2; }

// y[b * ldy + i] = row i . x[b] for i < rows and b < batch; `runs` of them share a scale. The rows
// are `bytes` and their scales `groups` apart.
template <int rows, int batch, int runs, class T>
BM_INLINE void quantized_dots(const T* w, std::int64_t bytes, const bf16* scales,
                              std::int64_t groups, std::int64_t cols, const float* x,
                              std::int64_t ldx, float* y, std::int64_t ldy) {
  constexpr int step = bytes_of_run(static_cast<const T*>(nullptr)), group = runs * run;
  vec total[rows][batch] = {}, part[rows][batch];
  const auto begin = [&]() __attribute__((always_inline)) {
    for (int i = 0; i < rows; ++i)
      for (int b = 0; b < batch; ++b) part[i][b] = vec{};
  };
  const auto add = [&](int i, const T* p, const float* at) __attribute__((always_inline)) {
    vec v[vecs_of_run];
    load_run(p, v);
    for (int k = 0; k < vecs_of_run; ++k)
      for (int b = 0; b < batch; ++b) part[i][b] += v[k] * load(at + b * ldx + k * lanes);
  };
  const auto finish = [&](std::int64_t g) __attribute__((always_inline)) {
    for (int i = 0; i < rows; ++i) {
      const vec s = scale_of(scales + i * groups + g);
      for (int b = 0; b < batch; ++b) total[i][b] += part[i][b] * s;
    }
  };
  std::int64_t c = 0, g = 0;
  for (; c + group <= cols; c += group, w += runs * step, x += group, ++g) {
    begin();
    for (int i = 0; i < rows; ++i) {
      ask_for(w + i * bytes);
      if (runs * step > 64) ask_for(w + i * bytes + 64);
      __builtin_prefetch(scales + i * groups + g + scales_ahead);
    }
    for (int r = 0; r < runs; ++r)
      for (int i = 0; i < rows; ++i) add(i, w + i * bytes + r * step, x + r * run);
    finish(g);
  }
  if (c < cols) {  // the last group is shorter
    begin();
    for (; c + run <= cols; c += run, w += step, x += run)
      for (int i = 0; i < rows; ++i) add(i, w + i * bytes, x);
    if (c < cols)
      for (int i = 0; i < rows; ++i) {
        T some[run] = {};
        std::memcpy(some, w + i * bytes, step == run ? cols - c : step);
        add(i, some, x);
      }
    finish(g);
  }
  for (int i = 0; i < rows; ++i)
    for (int b = 0; b < batch; ++b) y[b * ldy + i] = sum(total[i][b]);
}

#if defined(__AVX512BW__)
// Int4 by blocks of 4 runs, 64 bytes: of each lane's 32 bits the lowest 4 name the number in a table,
// eight times. So vector k of a block has the columns 32 R + 4 q + k / 2 + 16 (k % 2) in its lanes
// 4 R + q, and x comes in that order (`prepare_blocks`).
BM_INLINE __m512i which_scales(int runs) {
  alignas(64) std::int16_t words[32];
  for (int i = 0; i < 32; ++i) words[i] = static_cast<std::int16_t>(i / 2 / 4 / runs);
  __m512i out;
  std::memcpy(&out, words, sizeof out);
  return out;
}

// runs scales in the lowest bits
template <int runs>
BM_INLINE __m512i load_scales(const bf16* p) {
  if constexpr (runs == 1) return _mm512_castsi128_si512(_mm_loadl_epi64((const __m128i*)p));
  std::int32_t bits = p[0].bits;
  if constexpr (runs == 2) std::memcpy(&bits, p, sizeof bits);
  return _mm512_castsi128_si512(_mm_cvtsi32_si128(bits));
}

template <int rows, int batch, int runs>
BM_INLINE void quantized_dots(const std::uint8_t* w, std::int64_t bytes, const bf16* scales,
                              std::int64_t groups, std::int64_t cols, const float* x,
                              std::int64_t ldx, float* y, std::int64_t ldy) {
  const __m512 values = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
  const __m512i which = which_scales(runs);
  vec total[rows][batch] = {};
  const auto add = [&](const std::uint8_t* p, std::int64_t between, const bf16* scale,
                       std::int64_t between_scales) __attribute__((always_inline)) {
    __m512i codes[rows];
    vec part[rows][batch] = {};
    for (int i = 0; i < rows; ++i) std::memcpy(&codes[i], p + i * between, 64);
    for (int k = 0; k < 8; ++k) {
      vec v[rows];
      for (int i = 0; i < rows; ++i) {
        v[i] = (vec)_mm512_permutexvar_ps(codes[i], values);
        codes[i] = _mm512_srli_epi32(codes[i], 4);
      }
      for (int b = 0; b < batch; ++b) {
        const vec other = load(x + b * ldx + 16 * k);
        for (int i = 0; i < rows; ++i) part[i][b] += v[i] * other;
      }
    }
    for (int i = 0; i < rows; ++i) {
      const vec s = (vec)_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, which,
                                                        load_scales<runs>(scale + i * between_scales));
      for (int b = 0; b < batch; ++b) total[i][b] += part[i][b] * s;
    }
  };
  std::int64_t c = 0;
  for (; c + block_of_runs <= cols; c += block_of_runs, x += block_of_runs, w += 64, scales += 4 / runs) {
    for (int i = 0; i < rows; ++i) {
      ask_for(w + i * bytes);
      __builtin_prefetch(scales + i * groups + scales_ahead);
    }
    add(w, bytes, scales, groups);
  }
  if (c < cols) {  // x is zero behind the last column
    std::uint8_t some[rows][64] = {};
    bf16 few[rows][4] = {};
    for (int i = 0; i < rows; ++i) {
      std::memcpy(some[i], w + i * bytes, (cols - c + run - 1) / run * 16);
      std::memcpy(few[i], scales + i * groups,
                  (cols - c + run * runs - 1) / (run * runs) * sizeof(bf16));
    }
    add(some[0], 64, few[0], 4);
  }
  for (int i = 0; i < rows; ++i)
    for (int b = 0; b < batch; ++b) y[b * ldy + i] = sum(total[i][b]);
}

// the order that int4 wants; x has a whole number of blocks
BM_INLINE void prepare_blocks(float* x, std::int64_t cols) {
  for (float* const end = x + cols; x < end; x += block_of_runs) {
    __m512 in[8], out[8];  // in[2 R + h]: columns 32 R + 16 h ..
    std::memcpy(in, x, sizeof in);
    for (int j = 0; j < 4; ++j) {
      const __m512i every_fourth = _mm512_setr_epi32(j, j + 4, j + 8, j + 12, j + 16, j + 20, j + 24,
                                                     j + 28, 0, 0, 0, 0, 0, 0, 0, 0);
      for (int h = 0; h < 2; ++h)
        out[2 * j + h] = _mm512_shuffle_f32x4(
            _mm512_permutex2var_ps(in[h], every_fourth, in[2 + h]),
            _mm512_permutex2var_ps(in[4 + h], every_fourth, in[6 + h]), 0x44);
    }
    std::memcpy(x, out, sizeof out);
  }
}
constexpr bool by_blocks = true;
#else
inline void prepare_blocks(float*, std::int64_t) {}
constexpr bool by_blocks = false;
#endif

// numbers of a prepared vector
BM_INLINE std::int64_t quantized_length(WeightKind kind, std::int64_t cols) {
  const std::int64_t whole = kind == WeightKind::int4 && by_blocks ? block_of_runs : run;
  return (cols + whole - 1) / whole * whole;
}

BM_INLINE void prepare_quantized(WeightKind kind, const float* x, std::int64_t cols, float* out) {
  const std::int64_t length = quantized_length(kind, cols);
  std::memcpy(out, x, cols * sizeof(float));
  std::memset(out + cols, 0, (length - cols) * sizeof(float));
  if (kind == WeightKind::int4 && by_blocks) prepare_blocks(out, length);
}
// Rows that are taken with so many vectors. One row at a time is one stream of memory. With more
// vectors arithmetic counts more: then two rows share what is read of the vectors.
template <int batch>
constexpr std::integral_constant<int, batch == 4 && lanes == 16 ? 2 : 1> taken;

#else  // __AVX512VNNI__
// Rows that are taken with so many vectors: reading digits is what takes the time, as far as there
// are registers.
template <int batch>
constexpr std::integral_constant<int, batch == 4 ? 1 : 2> taken;

constexpr int digits = 4;  // of 8 bits, the highest first

// The instruction multiplies numbers without a sign by numbers with one. Weights of int8 have one, so
// the vector's numbers q become q + 2^31, and 128 times the weights is taken off the highest digit's
// sum. Codes of int4, 8 more than the weight, have none: so the digits of q have, and 8 times those is
// taken off.
//
// In units of 4 bytes a prepared vector has, for 64 bytes of weights,
//     int8, 64 columns: 4 digits of 16 units
//     int4, 128 columns: 4 digits for the low halves, 4 for the high ones, 8 times their sum in two
//                        pairs of digits
// and at its end the power of two by which all are too large.
constexpr std::int64_t columns_of_part(bool int4) { return int4 ? 128 : 64; }
constexpr std::int64_t units_of_part(bool int4) { return int4 ? 160 : 64; }

BM_INLINE __m512i load_bytes(const void* p) {
  __m512i out;
  std::memcpy(&out, p, sizeof out);
  return out;
}

// the first n of 64 bytes, or of 4 scales; zeros behind them
BM_INLINE __m512i load_some_bytes(const void* p, std::int64_t n) {
#if defined(BM_SANITIZE)  // sanitizers do not look into intrinsics
  __m512i out = _mm512_setzero_si512();
  std::memcpy(&out, p, n);
  return out;
#else
  return _mm512_maskz_loadu_epi8(n >= 64 ? ~__mmask64{0} : (__mmask64{1} << n) - 1, p);
#endif
}
BM_INLINE __m128i load_some_scales(const bf16* p, std::int64_t n) {
  return _mm512_castsi512_si128(load_some_bytes(p, n * sizeof(bf16)));
}

// Sums by digit, in two pairs and as a number. The pairs are exact.
BM_INLINE __m512i pair(__m512i higher, __m512i lower) {
  return _mm512_add_epi32(_mm512_slli_epi32(higher, 8), lower);
}
BM_INLINE vec value(__m512i high, __m512i low) {
  return (vec)_mm512_cvtepi32_ps(high) * 65536.0f + (vec)_mm512_cvtepi32_ps(low);
}

// The scales of 64 bytes of weights in lanes: of int8 a lane has 4 columns, of int4 it has 4 in the
// low halves and 4 in the high ones of a run; `runs` share a scale.
template <class T, int runs>
struct Scales {
  static constexpr bool int4 = std::is_same_v<T, std::uint8_t>;
  static constexpr int lanes_of_group = (int4 ? 4 : 8) * runs < 16 ? (int4 ? 4 : 8) * runs : 16;
  static constexpr int count = 16 / lanes_of_group;
  struct Words {
    alignas(64) std::int16_t of[32];
  };
  static constexpr Words which = [] {
    Words words{};
    for (int i = 0; i < 32; ++i) words.of[i] = static_cast<std::int16_t>(i / 2 / lanes_of_group);
    return words;
  }();
  static BM_INLINE __m128i load(const bf16* p) {
    std::int64_t bits = 0;
    std::memcpy(&bits, p, count * sizeof(bf16));
    return _mm_cvtsi64_si128(bits);
  }
  static BM_INLINE vec in_lanes(__m128i few) {
    return (vec)_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, load_bytes(which.of),
                                               _mm512_castsi128_si512(few));
  }
};

// as above, in parts of 64 bytes of weights; what is read of x serves all rows
template <int rows, int batch, int runs, class T>
BM_INLINE void quantized_dots(const T* w, std::int64_t bytes, const bf16* scales,
                              std::int64_t groups, std::int64_t cols, const float* x,
                              std::int64_t ldx, float* y, std::int64_t ldy) {
  constexpr bool int4 = std::is_same_v<T, std::uint8_t>;
  constexpr std::int64_t part = columns_of_part(int4), units = units_of_part(int4);
  constexpr std::int64_t group = runs * run;  // columns that share a scale
  constexpr int parts = group > part ? group / part : 1;
  using Scale = Scales<T, runs>;
  const float* const own_scale = x + (cols + part - 1) / part * units;
  vec total[rows][batch] = {};
  __m512i sums[rows][batch][digits], of_weights[rows];
  const auto begin = [&]() __attribute__((always_inline)) {
    for (int i = 0; i < rows; ++i) {
      of_weights[i] = _mm512_setzero_si512();
      for (int b = 0; b < batch; ++b)
        for (int d = 0; d < digits; ++d) sums[i][b][d] = _mm512_setzero_si512();
    }
  };
  const auto add = [&](const __m512i stored[rows], const float* at) __attribute__((always_inline)) {
    for (int half = 0; half < (int4 ? 2 : 1); ++half, at += 16 * digits) {
      __m512i some[rows];
      for (int i = 0; i < rows; ++i) {
        some[i] = half ? _mm512_srli_epi16(stored[i], 4) : stored[i];
        if (int4)
          some[i] = _mm512_and_si512(some[i], _mm512_set1_epi8(15));
        else
          of_weights[i] = _mm512_dpbusd_epi32(of_weights[i], _mm512_set1_epi8(-128), some[i]);
      }
      for (int b = 0; b < batch; ++b)
        for (int d = 0; d < digits; ++d) {
          const __m512i of_x = load_bytes(at + b * ldx + 16 * d);
          for (int i = 0; i < rows; ++i)
            sums[i][b][d] = int4 ? _mm512_dpbusd_epi32(sums[i][b][d], some[i], of_x)
                                 : _mm512_dpbusd_epi32(sums[i][b][d], of_x, some[i]);
        }
    }
  };
  // of the part before x
  const auto finish = [&](const __m128i few[rows]) __attribute__((always_inline)) {
    for (int i = 0; i < rows; ++i) {
      const vec s = Scale::in_lanes(few[i]);
      for (int b = 0; b < batch; ++b) {
        const __m512i* const sum = sums[i][b];
        __m512i high = sum[0], low = pair(sum[2], sum[3]);
        if (int4) {
          high = _mm512_sub_epi32(pair(high, sum[1]), load_bytes(x + b * ldx - 32));
          low = _mm512_sub_epi32(low, load_bytes(x + b * ldx - 16));
        } else {
          high = pair(_mm512_sub_epi32(high, of_weights[i]), sum[1]);
        }
        total[i][b] += value(high, low) * s;
      }
    }
  };
  __m512i stored[rows];
  __m128i few[rows];
  std::int64_t c = 0;
  for (; c + parts * part <= cols; c += parts * part, scales += Scale::count) {
    begin();
    for (int k = 0; k < parts; ++k, w += 64, x += units) {
      for (int i = 0; i < rows; ++i) {
        ask_for(w + i * bytes);
        stored[i] = load_bytes(w + i * bytes);
      }
      add(stored, x);
    }
    for (int i = 0; i < rows; ++i) {
      __builtin_prefetch(scales + i * groups + scales_ahead);
      few[i] = Scale::load(scales + i * groups);
    }
    finish(few);
  }
  if (c < cols) {  // x is zero behind the last column
    begin();
    for (int i = 0; i < rows; ++i)
      few[i] = load_some_scales(scales + i * groups, (cols - c + group - 1) / group);
    for (; c < cols; c += part, w += 64, x += units) {
      const std::int64_t left = cols - c < part ? cols - c : part;
      for (int i = 0; i < rows; ++i)
        stored[i] = load_some_bytes(w + i * bytes, int4 ? (left + run - 1) / run * 16 : left);
      add(stored, x);
    }
    finish(few);
  }
  for (int i = 0; i < rows; ++i)
    for (int b = 0; b < batch; ++b) y[b * ldy + i] = sum(total[i][b]) * own_scale[b * ldx];
}

BM_INLINE std::int64_t quantized_length(WeightKind kind, std::int64_t cols) {
  const std::int64_t part = columns_of_part(kind == WeightKind::int4);
  return (cols + part - 1) / part * units_of_part(kind == WeightKind::int4) + 16;
}

void prepare_quantized(WeightKind kind, const float* x, std::int64_t cols, float* out) {
  const bool int4 = kind == WeightKind::int4;
  vec largest{}, wrong{};
  for (std::int64_t c = 0; c < cols; c += lanes) {
    const vec v = load_some(x + c, static_cast<int>(cols - c < lanes ? cols - c : lanes));
    const vec size = as_float(as_int(v) & 0x7fffffff);
    largest = size > largest ? size : largest;
    wrong += v * 0.0f;  // of infinity and NaN it is NaN
  }
  // q = x / 2^e is at most 127 256^3 + 127 256^2 + 127 256 + 127 = 2^31 / 1.004
  int e;
  std::frexp(_mm512_reduce_max_ps((__m512)largest) * 1.005f, &e);
  e = (e < -92 ? -92 : e) - 31;
  const float power = std::ldexp(1.0f, -e);
  const std::int64_t part = columns_of_part(int4), units = units_of_part(int4);
  float* at = out;
  for (std::int64_t begin = 0; begin < cols; begin += part, at += units) {
    for (std::int64_t c = begin; c < begin + part; c += lanes) {
      const std::int64_t left = cols - c, chunk = (c - begin) / lanes;
      const vec v = load_some(x + c, static_cast<int>(left < 0 ? 0 : left < lanes ? left : lanes));
      float* to = int4 ? at + chunk % 2 * 16 * digits + chunk / 2 * 4 : at + chunk * 4;
      __m512i q = _mm512_cvtps_epi32((__m512)(v * power));
      // digits without a sign are the bytes of q + 2^31; those with one round to the nearest
      if (!int4) q = _mm512_xor_si512(q, _mm512_set1_epi32(1 << 31));
      for (int d = digits - 1; d >= 0; --d) {
        const __m128i bytes = _mm512_cvtepi32_epi8(q);
        std::memcpy(to + 16 * d, &bytes, sizeof bytes);
        q = _mm512_srai_epi32(int4 ? _mm512_add_epi32(q, _mm512_set1_epi32(128)) : q, 8);
      }
    }
    for (int d = 0; int4 && d < digits; d += 2) {
      __m512i eight[2] = {};
      for (int k = d; k < 2 * digits; k += k % 2 ? digits - 1 : 1)
        eight[k % 2] = _mm512_dpbusd_epi32(eight[k % 2], _mm512_set1_epi8(8), load_bytes(at + 16 * k));
      const __m512i both = pair(eight[0], eight[1]);
      std::memcpy(at + (2 * digits + d / 2) * 16, &both, sizeof both);
    }
  }
  *at = std::ldexp(1.0f, e) + sum(wrong);
}
#endif

// see product_rows
template <int runs, class T>
void quantized_product(const Weights& w, std::int64_t first, std::int64_t n_rows, const float* x,
                       std::int64_t ldx, int batch, float* y, std::int64_t ldy) {
  const std::int64_t bytes = w.row_bytes(), groups = w.row_scales();
  const T* const data = static_cast<const T*>(w.data) + first * bytes;
  const bf16* const scales = static_cast<const bf16*>(w.scales) + first * groups;
  int b = 0;
  // so many rows and vectors at once
  const auto take = [&](auto rows, auto many) {
    for (; b + many.value <= batch; b += many.value) {
      std::int64_t i = 0;
      for (; i + rows.value <= n_rows; i += rows.value)
        quantized_dots<rows.value, many.value, runs>(data + i * bytes, bytes, scales + i * groups,
                                                     groups, w.cols, x + b * ldx, ldx,
                                                     y + b * ldy + i, ldy);
      for (; i < n_rows; ++i)
        quantized_dots<1, many.value, runs>(data + i * bytes, bytes, scales + i * groups, groups,
                                            w.cols, x + b * ldx, ldx, y + b * ldy + i, ldy);
    }
  };
  take(taken<4>, std::integral_constant<int, 4>());
  take(taken<2>, std::integral_constant<int, 2>());
  take(taken<1>, std::integral_constant<int, 1>());
}

template <class T>
void quantized_product(const Weights& w, std::int64_t first, std::int64_t n_rows, const float* x,
                       std::int64_t ldx, int batch, float* y, std::int64_t ldy) {
  switch (w.group / run) {
    case 1: return quantized_product<1, T>(w, first, n_rows, x, ldx, batch, y, ldy);
    case 2: return quantized_product<2, T>(w, first, n_rows, x, ldx, batch, y, ldy);
    default: return quantized_product<4, T>(w, first, n_rows, x, ldx, batch, y, ldy);
  }
}

}  // namespace
}  // namespace bm
