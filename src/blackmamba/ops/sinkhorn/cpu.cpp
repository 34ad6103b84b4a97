// One thread: a few thousand numbers stay in its cache. They lie across, tokens side by side, so that
// a vector is of tokens and a row's sum needs no other lane; pads of the last vector are left out of
// the columns. Bytes moved: the logits once. Bound: exponentials, two a number and iteration.
#include "sinkhorn/cpu.hpp"

#include <algorithm>
#include <cmath>

#include "native/simd.hpp"
#include "native/threads.hpp"

namespace bm {
namespace {

constexpr float floor_of_cost = -1e4f;  // as in reference.py

BM_INLINE vec larger(vec a, vec b) { return b <= a ? a : b; }  // NaN if b is one

// The numbers, (e, padded t), and how many of a vector are tokens.
struct Table {
  const SinkhornInputs& in;
  std::int64_t padded;
  float* cost;  // the scaled logits, less their token's largest
  float* c;     // (e)

  vec at(std::int64_t j, std::int64_t i) const { return load(cost + j * padded + i); }
  int left(std::int64_t i) const { return static_cast<int>(std::min<std::int64_t>(lanes, in.t - i)); }
};

// ln of the sum over experts of exp(cost + c), of a vector of tokens
BM_INLINE vec log_row(const Table& table, std::int64_t i) {
  vec top = table.at(0, i) + table.c[0], sum{};
  for (std::int64_t j = 1; j < table.in.e; ++j) top = larger(top, table.at(j, i) + table.c[j]);
  for (std::int64_t j = 0; j < table.in.e; ++j) sum += exp(table.at(j, i) + table.c[j] - top);
  return top + log1p_positive(sum - 1.0f);
}

// ln of the sum over tokens of exp(column j + r), with r one number a token
float log_column(const Table& table, std::int64_t j, const float* r) {
  vec tops = splat(-__builtin_inff());  // the pads are copies, which change no maximum
  for (std::int64_t i = 0; i < table.in.t; i += lanes)
    tops = larger(tops, table.at(j, i) + load(r + i));
  float top = tops[0];
  for (int lane = 1; lane < lanes; ++lane)
    if (!(tops[lane] <= top)) top = tops[lane];
  vec sums{};
  for (std::int64_t i = 0; i < table.in.t; i += lanes)
    sums += keep(exp(table.at(j, i) + load(r + i) - top), table.left(i));
  return top + std::log(sum(sums));
}

void choice(const SinkhornInputs& in, std::int64_t* ids) {
  if (in.t == 0) return;
  const std::int64_t padded = (in.t + lanes - 1) / lanes * lanes;
  float* const memory = scratch<float>(Slot::a, (in.e + 2) * padded + in.e);
  float* const largest = memory + in.e * padded;  // of each token
  float* const r = largest + padded;
  const Table table{in, padded, memory, r + padded};
  float highest = -__builtin_inff();
  for (std::int64_t i = 0; i < padded; ++i) {
    const float* row = in.logits + std::min(i, in.t - 1) * in.e;  // pads are copies of the last
    float top = row[0];
    for (std::int64_t j = 1; j < in.e; ++j)
      if (!(row[j] <= top)) top = row[j];
    for (std::int64_t j = 0; j < in.e; ++j)
      memory[j * padded + i] = std::max((row[j] - top) * in.scale, floor_of_cost);
    largest[i] = top;
    highest = std::max(highest, top);
  }
  for (std::int64_t j = 0; j < in.e; ++j) table.c[j] = 0.0f;
  if (in.paper_start) {
    for (std::int64_t i = 0; i < padded; ++i)
      r[i] = std::max((largest[i] - highest) * in.scale, floor_of_cost);
    for (std::int64_t j = 0; j < in.e; ++j) table.c[j] = -log_column(table, j, r);
  }
  const float log_t = std::log(static_cast<float>(in.t));
  const float log_e = std::log(static_cast<float>(in.e));
  for (std::int64_t i = 0; i < padded; i += lanes) store(r + i, -log_t - log_row(table, i));
  for (std::int64_t number = 1;; ++number) {
    for (std::int64_t j = 0; j < in.e; ++j) table.c[j] = -log_e - log_column(table, j, r);
    if (number >= in.max_iterations) break;
    vec errors{};  // of the row sums; those of the columns are right
    for (std::int64_t i = 0; i < padded; i += lanes) {
      const vec log_sum = log_t + log_row(table, i), off = exp(log_sum + load(r + i)) - 1.0f;
      errors = larger(errors, as_float(as_int(off) & 0x7fffffff));
      store(r + i, -log_sum);
    }
    bool goes_on = false;  // NaN, which comes of NaN logits alone, stops too
    for (int lane = 0; lane < lanes; ++lane) goes_on = goes_on || errors[lane] >= in.tolerance;
    if (!goes_on) break;
  }
  for (std::int64_t i = 0; i < in.t; ++i) {
    std::int64_t best = 0;
    for (std::int64_t j = 1; j < in.e; ++j)
      if (memory[j * padded + i] + table.c[j] > memory[best * padded + i] + table.c[best]) best = j;
    ids[i] = best;
  }
}

}  // namespace

BM_DEFINE(Sinkhorn, sinkhorn) = {choice};

}  // namespace bm
