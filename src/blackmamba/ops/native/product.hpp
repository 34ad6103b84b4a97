// Products of a matrix with a few vectors, for which reading the matrix is the whole cost: each
// weight is read from memory once, whatever the number of vectors, in one forward stream.
//
// The vectors are first put into the form that the kind of weights wants: `prepare`, once a product
// and thread. A dot product is summed in the same order whatever the block of rows it falls in and
// however many vectors there are.
#pragma once

#include "native/product_quantized.hpp"
#include "native/simd.hpp"
#include "native/targets.hpp"
#include "native/threads.hpp"
#include "native/weights.hpp"

namespace bm {
namespace {

// Bytes of one prepared vector.
BM_INLINE std::int64_t prepared_bytes(const Weights& w) {
  if (is_quantized(w.kind)) return quantized_length(w) * 4;
  return (w.cols + 2 * lanes) / (2 * lanes) * (2 * lanes) * 4;
}

// float32 weights: the numbers as they are. bfloat16: of every 2 lanes numbers first the even ones,
// then the odd ones: that is how a word of two bfloat16 comes apart with one shift and one mask.
// Quantised weights: see product_quantized.hpp.
void prepare(const Weights& w, const float* x, void* prepared) {
  const std::int64_t cols = w.cols;
  float* const out = static_cast<float*>(prepared);
  if (w.kind == WeightKind::float32) {
    std::memcpy(out, x, cols * sizeof(float));
    return;
  }
  if (is_quantized(w.kind)) return prepare_quantized(w, x, out);
  std::int64_t c = 0;
  for (; c + 2 * lanes <= cols; c += 2 * lanes)
    for (int i = 0; i < lanes; ++i) {
      out[c + i] = x[c + 2 * i];
      out[c + lanes + i] = x[c + 2 * i + 1];
    }
  for (; c < cols; ++c) out[c] = x[c];
}

// 2 lanes numbers of a row
BM_INLINE void load_pair(const float* w, vec& a, vec& b) {
  a = load(w);
  b = load(w + lanes);
}
BM_INLINE void load_pair(const bf16* w, vec& a, vec& b) {
  uvec words;
  std::memcpy(&words, w, sizeof words);
  a = (vec)(words << 16);
  b = (vec)(words & 0xffff0000u);
}

// Asks for what lies a page behind the 2 lanes numbers of a row from number c on, into the second
// cache.
template <class T>
BM_INLINE void ask_a_page_ahead(const T* row, std::int64_t c) {
  constexpr int page = 4096, line = 64, bytes = 2 * lanes * sizeof(T);
  if (bytes < line && c * static_cast<int>(sizeof(T)) % line != 0) return;
  const char* const at = reinterpret_cast<const char*>(row + c) + page;
  for (int i = 0; i < bytes; i += line) __builtin_prefetch(at + i, 0, 2);
}

// y[b * ldy + i] = row i of w . x[b], for so many rows and prepared vectors
template <int rows, int batch, class T>
BM_INLINE void dot_rows(const T* w, std::int64_t cols, const float* x, std::int64_t ldx, float* y,
                        std::int64_t ldy, bool ahead) {
  vec even[rows][batch] = {}, odd[rows][batch] = {};
  std::int64_t c = 0;
  for (; c + 2 * lanes <= cols; c += 2 * lanes) {
    vec a[rows], b[rows];
    for (int i = 0; i < rows; ++i) load_pair(w + i * cols + c, a[i], b[i]);
    if (ahead)
      for (int i = 0; i < rows; ++i) ask_a_page_ahead(w + i * cols, c);
    for (int j = 0; j < batch; ++j) {
      const vec first = load(x + j * ldx + c), second = load(x + j * ldx + c + lanes);
      for (int i = 0; i < rows; ++i) {
        even[i][j] += a[i] * first;
        odd[i][j] += b[i] * second;
      }
    }
  }
  for (; c < cols; c += lanes) {
    const int n = static_cast<int>(cols - c < lanes ? cols - c : lanes);
    for (int i = 0; i < rows; ++i) {
      const vec a = load_some(w + i * cols + c, n);
      for (int j = 0; j < batch; ++j) even[i][j] += a * load_some(x + j * ldx + c, n);
    }
  }
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < batch; ++j) y[j * ldy + i] = sum(even[i][j] + odd[i][j]);
}

// One row at a time is one stream of memory. From 4 vectors on arithmetic counts more: two rows
// share what is read of the vectors, and the block of rows waits in the cache for the next four.
template <class T>
void float_product(const T* w, std::int64_t cols, std::int64_t n_rows, const float* x,
                   std::int64_t ldx, int batch, float* y, std::int64_t ldy) {
  const bool ahead = reads_ahead_to_a_page_end();
  int b = 0;
  for (; b + 4 <= batch; b += 4) {
    std::int64_t i = 0;
    for (; i + 2 <= n_rows; i += 2)
      dot_rows<2, 4>(w + i * cols, cols, x + b * ldx, ldx, y + b * ldy + i, ldy, ahead);
    for (; i < n_rows; ++i)
      dot_rows<1, 4>(w + i * cols, cols, x + b * ldx, ldx, y + b * ldy + i, ldy, ahead);
  }
  for (std::int64_t i = 0; i < n_rows; ++i) {
    const T* const row = w + i * cols;
    if (batch - b == 3) dot_rows<1, 3>(row, cols, x + b * ldx, ldx, y + b * ldy + i, ldy, ahead);
    if (batch - b == 2) dot_rows<1, 2>(row, cols, x + b * ldx, ldx, y + b * ldy + i, ldy, ahead);
    if (batch - b == 1) dot_rows<1, 1>(row, cols, x + b * ldx, ldx, y + b * ldy + i, ldy, ahead);
  }
}

// y[b * ldy + i] = W[first + i] . x[b] for i < n_rows and b < batch; x as `prepare` made them, one
// behind the other.
void product_rows(const Weights& w, std::int64_t first, std::int64_t n_rows, const void* x,
                  int batch, float* y, std::int64_t ldy) {
  const std::int64_t ldx = prepared_bytes(w) / 4;
  const float* const vectors = static_cast<const float*>(x);
  switch (w.kind) {
    case WeightKind::float32:
      return float_product(static_cast<const float*>(w.data) + first * w.cols, w.cols, n_rows,
                           vectors, ldx, batch, y, ldy);
    case WeightKind::bfloat16:
      return float_product(static_cast<const bf16*>(w.data) + first * w.cols, w.cols, n_rows,
                           vectors, ldx, batch, y, ldy);
    case WeightKind::int8:
      return quantized_product<std::int8_t>(w, first, n_rows, vectors, ldx, batch, y, ldy);
    case WeightKind::int4:
      return quantized_product<std::uint8_t>(w, first, n_rows, vectors, ldx, batch, y, ldy);
  }
}

// x[b] for b < batch, `ldx` numbers apart, as a product with w wants them; the calling thread's, until
// it prepares others
const void* prepared(const Weights& w, const float* x, std::int64_t ldx, int batch) {
  const std::int64_t bytes = prepared_bytes(w);
  char* const out = scratch<char>(Slot::b, batch * bytes);
  for (int b = 0; b < batch; ++b) prepare(w, x + b * ldx, out + b * bytes);
  return out;
}

// the b-th of prepared vectors
BM_INLINE const void* of_row(const void* x, const Weights& w, std::int64_t b) {
  return static_cast<const char*>(x) + b * prepared_bytes(w);
}

// A product's rows in blocks for one thread each. A row's result does not depend on its block.
//
// Where a block begins that does not follow the thread's last one, it waits for memory: few long blocks
// are a quarter faster than many of 64 KiB. From 5 vectors on a block is read several times, and has to
// stay in the cache.
constexpr int blocks_each = 4;          // of a thread, so that it can help one that is held up
constexpr int cached_bytes = 1 << 16;  // of weights
constexpr int shared_bytes = 1 << 17;  // of a block that follows the thread's last one

struct Blocks {
  std::int64_t rows, n_rows, count;
  // of a product with so many rows of so many bytes and so many vectors
  Blocks(std::int64_t total, std::int64_t row_bytes, int n_threads, int batch)
      : rows(batch <= 4 ? total / (n_threads > 1 ? blocks_each * n_threads : 1) + 1
                        : cached_bytes / (row_bytes > 0 ? row_bytes : 1)),
        n_rows(total) {
    cut(4);
  }
  // The same for threads that have a share of neighbouring blocks each (crew.hpp): they wait at a share's
  // beginning alone, so blocks are short for the last ones to end at the same time. A block has a multiple
  // of so many rows.
  static Blocks of_shares(std::int64_t total, std::int64_t row_bytes, int n_threads, int batch,
                          int multiple) {
    Blocks blocks(total, row_bytes, n_threads, batch);
    if (batch <= 4) {
      const std::int64_t most = shared_bytes / (row_bytes > 0 ? row_bytes : 1);
      blocks.rows = total / (8 * n_threads);
      if (blocks.rows > most) blocks.rows = most;
    }
    blocks.cut(multiple);
    return blocks;
  }
  std::int64_t first(std::int64_t i) const { return i * rows; }
  std::int64_t size(std::int64_t i) const {
    const std::int64_t left = n_rows - i * rows;
    return left < rows ? left : rows;
  }

 private:
  void cut(int multiple) {
    rows = rows > 0 ? (rows + multiple - 1) / multiple * multiple : multiple;
    count = (n_rows + rows - 1) / rows;
  }
};

}  // namespace
}  // namespace bm
