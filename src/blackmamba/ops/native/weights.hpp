// A matrix of weights as it lies in memory.
#pragma once

#include <cstddef>
#include <cstdint>

namespace bm {

enum class WeightKind : int { float32, bfloat16, int8, int4 };

constexpr bool is_quantized(WeightKind kind) {
  return kind == WeightKind::int8 || kind == WeightKind::int4;
}

struct Weights {
  WeightKind kind = WeightKind::float32;
  const void* data = nullptr;    // rows x cols, a row after the other
  const void* scales = nullptr;  // int8 and int4: rows x groups of a row, bfloat16
  std::int64_t rows = 0, cols = 0;
  std::int64_t group = 0;        // int8 and int4: how many columns share a scale; 32, 64 or 128
  bool narrow = false;           // int8 and int4: vectors are worth 16 bits, as of a bfloat16 model

  std::int64_t row_bytes() const {
    switch (kind) {
      case WeightKind::float32: return 4 * cols;
      case WeightKind::bfloat16: return 2 * cols;
      case WeightKind::int8: return cols;
      case WeightKind::int4: return (cols + 31) / 32 * 16;  // see ops/quantized_linear/weights.py
    }
    return 0;
  }

  std::int64_t row_scales() const { return group > 0 ? (cols + group - 1) / group : 0; }

  // the i-th of several matrices of this shape that lie one behind the other
  Weights at(std::int64_t i) const {
    Weights other = *this;
    other.data = static_cast<const char*>(data) + i * rows * row_bytes();
    if (scales) other.scales = static_cast<const std::uint16_t*>(scales) + i * rows * row_scales();
    return other;
  }
};

}  // namespace bm
