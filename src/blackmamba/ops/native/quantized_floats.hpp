// Dot products with quantised rows where vectors stay float32 and weights become so: part of
// product_quantized.hpp.
#pragma once

#include "native/simd.hpp"
#include "native/weights.hpp"

namespace bm {
namespace {
namespace floats {

constexpr int block_of_runs = 128;  // columns of int4 that are taken at once with AVX-512

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
BM_INLINE std::int64_t quantized_length(const Weights& w) {
  const std::int64_t whole = w.kind == WeightKind::int4 && by_blocks ? block_of_runs : run;
  return (w.cols + whole - 1) / whole * whole;
}

BM_INLINE void prepare_quantized(const Weights& w, const float* x, float* out) {
  const std::int64_t length = quantized_length(w);
  std::memcpy(out, x, w.cols * sizeof(float));
  std::memset(out + w.cols, 0, (length - w.cols) * sizeof(float));
  if (w.kind == WeightKind::int4 && by_blocks) prepare_blocks(out, length);
}

}  // namespace floats
}  // namespace
}  // namespace bm
