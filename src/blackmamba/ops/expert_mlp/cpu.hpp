// A few tokens through one expert each, forward.
//
// Letters: t tokens, m d_model, e experts, f d_expert.
#pragma once

#include <cstdint>

#include "native/targets.hpp"
#include "native/weights.hpp"

namespace bm {

struct FewTokens {
  int n_tokens, n_experts;
  bool narrow;           // x and y are bfloat16, else float32
  const void* x;         // (t, m), rows x_stride numbers apart
  std::int64_t x_stride;
  const std::int64_t* expert_ids;  // (t)
  Weights fc1, fc2;      // of the first expert, (2f or f, m) and (m, f); the others follow
  const float *fc1_bias, *fc2_bias, *gate;  // (e, 2f or f), (e, m), (t), or null
  bool gated, gelu;
  void* y;               // (t, m)
  float* h = nullptr;    // (t, 2f or f): fc1's output with its bias, sorted by expert; or null
  int n_threads;
};

struct ExpertMlp {
  void (*few_tokens)(const FewTokens& call);
};

BM_DECLARE(ExpertMlp, expert_mlp);

}  // namespace bm
