// The selective scan on the CPU, forward and backward: h' = exp(delta A) h + delta x B, y = C h' + D x.
//
// What the arithmetic allows. Per (b, l, d, n) the forward pass takes 18 operations, a multiply-add
// counting as 2:
//     exp(delta A)      13   times log2(e) A; rounding, the rest of it; 5 multiply-adds; times 2^i
//     h' and C h'        5
// and the backward pass, which computes every state again, 32:
//     the state again   16,  C h' (for the gate's gradient) 2,  grad C 2
//     g = gy C + g'      2,  grad B 2,  B g 2,  decay g 1,  times h 1,  grad A 2,  grad delta 2
// The work per (b, l, d), softplus, gates and sums, is left out. At b=4, l=1024, d=1536, n=16 that is
// 1.8 + 3.2 GFLOP: no less than 3.6 + 6.4 ms at the 505 GFLOP/s of two Zen 5 cores. What is lost
// beside it: not all operations are multiply-adds (the processor's ports allow 70%), loads and stores
// of decays, states and sums, and waiting for memory.
#pragma once

#include <cstdint>

#include "native/targets.hpp"

namespace bm {

// A tensor (b, l, width) of the input dtype; strides in elements, the last dimension contiguous.
struct Rows {
  const void* data = nullptr;
  std::int64_t batch = 0, row = 0;
};

// Absent tensors are null.
struct Scan {
  std::int64_t b, l, d, n;
  bool bfloat16, softplus;
  int n_threads;
  Rows x, dt, B, C, z;
  const float *A, *D, *dt_bias, *initial_state;  // (d, n), (d,), (d,), (b, d, n)
  const std::int64_t* seq_idx;                   // (b, l)
};

struct ScanOutputs {
  void* y;             // (b, l, d)
  float* final_state;  // (b, d, n)
  float* starts;       // each chunk's first state, see scan_starts(); null: not kept
};

struct ScanGradients {
  void *x, *dt, *B, *C;                 // like the inputs, contiguous
  void* z;                              // strides in numbers, last one 1; may be null
  std::int64_t z_batch, z_row;
  float *A, *D, *dt_bias, *initial_state;  // D and dt_bias may be null
};

struct SelectiveScan {
  void (*forward)(const Scan& scan, const ScanOutputs& out);
  void (*backward)(const Scan& scan, const float* starts, const Rows& grad_y,
                   const float* grad_final_state, const ScanGradients& out);
};

// Tokens whose states are in the cache at once: 16 of them with 4 states of each of 32 channels fill
// half of a first-level cache of 32 KB. The forward pass keeps the state before each such chunk, as
// many numbers as x has at n = 16, and the backward pass computes the others again.
constexpr std::int64_t scan_chunk = 16;

BM_DECLARE(SelectiveScan, selective_scan);

}  // namespace bm
