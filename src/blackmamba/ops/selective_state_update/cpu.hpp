// One token of the selective scan on the CPU: h' = exp(delta A) h + delta x B, y = C h' + D x.
#pragma once

#include <cstdint>

#include "native/targets.hpp"

namespace bm {

// A tensor (b, width) of the input dtype; stride in elements, the last dimension contiguous.
struct TokenRows {
  const void* data = nullptr;
  std::int64_t row = 0;
};

// Absent tensors are null.
struct StateUpdate {
  std::int64_t b, d, n;
  bool bfloat16, softplus;
  int n_threads;
  TokenRows x, dt, B, C, z;
  const float *A, *D, *dt_bias;  // (d, n), (d,), (d,)
  const float* state;            // (b, d, n)
  float* new_state;              // (b, d, n); may be `state`
  void* y;                       // (b, d)
};

// One row of the batch, everything float32: x, dt, z, y, D, dt_bias (d,), B, C (n,), A, state (d, n).
struct StateUpdateRow {
  std::int64_t n;
  bool softplus;
  const float *x, *dt, *A, *B, *C, *D, *z, *dt_bias;  // D, z and dt_bias may be null
  float* state;                                      // changed in place
  float* y;
};

struct SelectiveStateUpdate {
  void (*update)(const StateUpdate& args);
  // Channels d0 .. d1 - 1 of one row, on the calling thread: for a kernel that is parallel itself.
  // The result does not depend on how the channels are cut into calls.
  void (*state_update_rows)(const StateUpdateRow& args, std::int64_t d0, std::int64_t d1);
};

BM_DECLARE(SelectiveStateUpdate, selective_state_update);

}  // namespace bm
