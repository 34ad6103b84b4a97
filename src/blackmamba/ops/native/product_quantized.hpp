// Dot products with rows of 8- and 4-bit weights, part of product.hpp; the format is that of
// ops/quantized_linear/weights.py.
//
// Vectors keep float32's accuracy, or in a narrow product a bfloat16's and more. A group of columns is
// summed over its whole numbers, and the sum multiplied by the group's scale.
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

}  // namespace
}  // namespace bm

#include "native/quantized_floats.hpp"
#if defined(__AVX512VNNI__)
#include "native/quantized_words.hpp"
#endif

namespace bm {
namespace {

// Which vectors become whole numbers. With those of 32 bits that is worth it for int4 alone: int8 by
// floats takes a twentieth longer with one vector, and with four or more a quarter less.
#if defined(__AVX512VNNI__)
constexpr bool has_narrow = true;
constexpr bool by_words(bool int4, bool narrow) { return int4 || narrow; }
#else
constexpr bool has_narrow = false;
constexpr bool by_words(bool, bool) { return false; }
namespace words = floats;
#endif
// Rows that are taken with so many vectors. They share what is read of the vectors, which counts with
// words, and with floats from four vectors on; one row at a time is one stream of memory.
constexpr int rows_at_once(bool words, int vectors) {
  if (words) return vectors == 1 ? 4 : 2;
  return vectors == 4 && lanes == 16 ? 2 : 1;
}

BM_INLINE bool by_words(const Weights& w) { return by_words(w.kind == WeightKind::int4, w.narrow); }

// numbers of a prepared vector
BM_INLINE std::int64_t quantized_length(const Weights& w) {
  return by_words(w) ? words::quantized_length(w) : floats::quantized_length(w);
}
BM_INLINE void prepare_quantized(const Weights& w, const float* x, float* out) {
  by_words(w) ? words::prepare_quantized(w, x, out) : floats::prepare_quantized(w, x, out);
}

// see product_rows
template <int runs, bool narrow, class T>
void quantized_product(const Weights& w, std::int64_t first, std::int64_t n_rows, const float* x,
                       std::int64_t ldx, int batch, float* y, std::int64_t ldy) {
  const std::int64_t bytes = w.row_bytes(), groups = w.row_scales();
  const T* const data = static_cast<const T*>(w.data) + first * bytes;
  const bf16* const scales = static_cast<const bf16*>(w.scales) + first * groups;
  constexpr bool whole = by_words(std::is_same_v<T, std::uint8_t>, narrow);
  int b = 0;
  const auto dots = [&](auto rows, auto many, std::int64_t i) {
    const T* const from = data + i * bytes;
    const bf16* const own = scales + i * groups;
    float* const to = y + b * ldy + i;
    if constexpr (whole)
      words::quantized_dots<rows.value, many.value, runs, narrow>(from, bytes, own, groups, w.cols,
                                                                  x + b * ldx, ldx, to, ldy);
    else
      floats::quantized_dots<rows.value, many.value, runs>(from, bytes, own, groups, w.cols,
                                                           x + b * ldx, ldx, to, ldy);
  };
  const auto take = [&](auto many) {  // so many vectors at once
    constexpr std::integral_constant<int, rows_at_once(whole, many.value)> rows;
    for (; b + many.value <= batch; b += many.value) {
      std::int64_t i = 0;
      for (; i + rows.value <= n_rows; i += rows.value) dots(rows, many, i);
      for (; i < n_rows; ++i) dots(std::integral_constant<int, 1>(), many, i);
    }
  };
  take(std::integral_constant<int, 4>());
  take(std::integral_constant<int, 2>());
  take(std::integral_constant<int, 1>());
}

template <int runs, class T>
void quantized_product(const Weights& w, std::int64_t first, std::int64_t n_rows, const float* x,
                       std::int64_t ldx, int batch, float* y, std::int64_t ldy) {
  if constexpr (has_narrow)
    if (w.narrow)
      return quantized_product<runs, true, T>(w, first, n_rows, x, ldx, batch, y, ldy);
  quantized_product<runs, false, T>(w, first, n_rows, x, ldx, batch, y, ldy);
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
