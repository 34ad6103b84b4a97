// One token of each sequence through a whole stack of layers, in place: the plan of a model.
//
// Letters: b batch, m d_model, d d_inner, r dt_rank, n d_state, k d_conv, e experts, f d_expert,
// v vocabulary.
#pragma once

#include <cstdint>
#include <vector>

#include "native/targets.hpp"
#include "native/weights.hpp"

namespace bm {

// A product W x + bias; no bias where it is null.
struct Linear {
  Weights weights;
  const float* bias = nullptr;
};

struct Mamba {
  Linear in_proj, x_proj, dt_proj, out_proj;
  const float *conv_weight, *conv_bias;  // (k, d), (d)
  const float *dt_bias, *A, *D;          // (d), (d, n) = -exp(A_log), (d)
  float *conv_state, *ssm_state;         // (b, k - 1, d) oldest first, (b, d, n)
};

struct FeedForward {
  int n_experts;  // 0: dense, no router
  const float *router_weight, *router_bias;  // (e, m), (e)
  Linear fc1, fc2;  // of the first expert; the others follow at equal distance
  bool gated, gelu;
};

struct Norm {
  const float *weight = nullptr, *bias = nullptr;
  float eps = 0;
  bool subtract_mean = false;  // LayerNorm; else RMSNorm
};

// A layer has a mixer, a feed-forward part, or both side by side.
struct DecodeLayer {
  Norm norm, feed_forward_norm;  // the second for both
  bool has_mamba = false, has_feed_forward = false;
  Mamba mamba;
  FeedForward feed_forward;
};

struct DecodePlan {
  int batch, m, d, r, n, k, v, widest_expert, most_experts;
  Weights embedding;
  Linear head;
  Norm final_norm;
  std::vector<DecodeLayer> layers;
  std::vector<float> memory;  // what one step needs, made once
};

struct Decode {
  std::int64_t (*workspace)(const DecodePlan& plan);  // numbers of `memory`
  // reads ids (b), advances the states, writes logits (b, v)
  void (*step)(DecodePlan& plan, const std::int64_t* ids, float* logits, int n_threads);
};

BM_DECLARE(Decode, decode);

}  // namespace bm
