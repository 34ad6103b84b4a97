// A Mamba layer between its outer projections, in float32, as one call each way: the kernels of
// convolution, product and scan one after the other. A call from Python and the tensors that it takes
// cost 20 to 40 us each once the weights have swept the caches, as much as a small product.
//
// Letters: t = b l tokens, d d_inner, n d_state, r dt_rank, k d_conv, w = r + 2 n.
#include <nanobind/stl/tuple.h>

#include <algorithm>
#include <tuple>

#include "causal_conv1d/cpu.hpp"
#include "linear/cpu.hpp"
#include "native/bindings.hpp"
#include "selective_scan/cpu.hpp"

namespace nb = nanobind;

namespace bm {
namespace {

using Address = std::uintptr_t;
using Size = std::int64_t;
using View = std::tuple<Address, Size, Size>;              // address, stride of the batch and of a row
using Sizes = std::tuple<Size, Size, Size, Size, Size, Size>;  // b, l, d, n, r, k
// conv_weight (d, k), conv_bias (d), x_proj (w, d), dt_proj (d, r), dt_bias (d), A (d, n), D (d)
using Weights = std::tuple<Address, Address, Address, Address, Address, Address, Address>;

Size lines(Size numbers) { return (numbers + 15) / 16 * 16; }  // parts of a buffer begin on one

// Where in one buffer the forward pass leaves what the backward pass reads.
struct Kept {
  Size x, columns, dt, taps, starts, all;
  Kept(const Sizes& sizes) {
    const auto [b, l, d, n, r, k] = sizes;
    const Size chunks = (l + scan_chunk - 1) / scan_chunk;
    x = 0;
    columns = x + lines(b * l * d);
    dt = columns + lines(b * l * (r + 2 * n));
    taps = dt + lines(b * l * d);
    starts = taps + lines(d * k);
    all = starts + b * chunks * lines(d) * n;
  }
};

struct Mixer {
  Size b, l, d, n, r, k, w, t;
  View xz;
  const float *conv_bias, *x_proj, *dt_proj, *dt_bias, *A, *D;
  const Size* seq_idx;
  float *x, *columns, *dt, *starts;
  float* taps;  // (k, d), conv_weight as the convolution takes it
  int n_threads;

  Mixer(const Sizes& sizes, const View& xz_, const Weights& weights, Address seq, Address kept,
        int threads)
      : xz(xz_), seq_idx(pointer<const Size>(seq)), n_threads(threads) {
    std::tie(b, l, d, n, r, k) = sizes;
    w = r + 2 * n, t = b * l;
    conv_bias = pointer<const float>(std::get<1>(weights));
    x_proj = pointer<const float>(std::get<2>(weights));
    dt_proj = pointer<const float>(std::get<3>(weights));
    dt_bias = pointer<const float>(std::get<4>(weights));
    A = pointer<const float>(std::get<5>(weights));
    D = pointer<const float>(std::get<6>(weights));
    const Kept at(sizes);
    float* const buffer = pointer<float>(kept);
    x = buffer + at.x, columns = buffer + at.columns, dt = buffer + at.dt;
    taps = buffer + at.taps, starts = buffer + at.starts;
  }

  ConvInputs convolution() const {
    const auto [data, batch, row] = xz;
    return {pointer<const void>(data), batch, row, taps, conv_bias, nullptr, seq_idx, b, l, d, k,
            true, false, n_threads};
  }
  Scan scan() const {
    const auto [data, batch, row] = xz;
    return {.b = b, .l = l, .d = d, .n = n, .bfloat16 = false, .softplus = true,
            .n_threads = n_threads, .x = {x, l * d, d}, .dt = {dt, l * d, d},
            .B = {columns + r, l * w, w}, .C = {columns + r + n, l * w, w},
            .z = {pointer<const float>(data) + d, batch, row}, .A = A, .D = D, .dt_bias = dt_bias,
            .initial_state = nullptr, .seq_idx = seq_idx};
  }
  // c = a b^T, its rows `c_row` apart
  void product(Operand<float> a, Operand<float> b_, float* c, Size c_row, Size rows, Size columns_,
               Size inner, bool adds = false) const {
    BM_PICK(linear).multiply({a, b_, c, c_row, nullptr, nullptr, nullptr, nullptr, rows, columns_,
                              inner, adds, n_threads});
  }
};

Operand<float> rows_of(const float* data, Size row) { return {data, row, 1, nullptr, nullptr}; }
Operand<float> columns_of(const float* data, Size row) { return {data, 1, row, nullptr, nullptr}; }

void forward(const Sizes& sizes, const View& xz, const Weights& weights, Address seq_idx,
             Address kept, Address y, Address final_state, int n_threads) {
  const Mixer m(sizes, xz, weights, seq_idx, kept, n_threads);
  const float* const weight = pointer<const float>(std::get<0>(weights));
  for (Size i = 0; i < m.d; ++i)
    for (Size j = 0; j < m.k; ++j) m.taps[j * m.d + i] = weight[i * m.k + j];
  BM_PICK(causal_conv1d).forward(m.convolution(), m.x);
  m.product(rows_of(m.x, m.d), rows_of(m.x_proj, m.d), m.columns, m.w, m.t, m.w, m.d);
  m.product(rows_of(m.columns, m.w), rows_of(m.dt_proj, m.r), m.dt, m.d, m.t, m.d, m.r);
  if (m.d % 16 != 0)  // narrow vectors leave padding unwritten
    std::fill_n(m.starts, Kept(sizes).all - Kept(sizes).starts, 0.0f);
  BM_PICK(selective_scan)
      .forward(m.scan(), {pointer<void>(y), pointer<float>(final_state), m.starts});
}

// `gradients`: of xz, whose rows are contiguous, and of the weights.
void backward(const Sizes& sizes, const View& xz, const Weights& weights, Address seq_idx,
              Address kept, const View& grad_y, Address grad_final, const View& grad_xz,
              const Weights& gradients, Address buffer, int n_threads) {
  const Mixer m(sizes, xz, weights, seq_idx, kept, n_threads);
  const auto [g_xz, g_batch, g_row] = grad_xz;
  const auto [g_conv, g_conv_bias, g_x_proj, g_dt_proj, g_dt_bias, g_A, g_D] = gradients;
  float* const g_x = pointer<float>(buffer);
  float* const g_dt = g_x + lines(m.t * m.d);
  float* const g_columns = g_dt + lines(m.t * m.d);
  float* const g_B = g_columns + lines(m.t * m.w);
  float* const g_C = g_B + lines(m.t * m.n);
  float* const g_taps = g_C + lines(m.t * m.n);
  const auto [y_data, y_batch, y_row] = grad_y;
  BM_PICK(selective_scan)
      .backward(m.scan(), m.starts, {pointer<const void>(y_data), y_batch, y_row},
                pointer<const float>(grad_final),
                {.x = g_x, .dt = g_dt, .B = g_B, .C = g_C, .z = pointer<float>(g_xz) + m.d,
                 .z_batch = g_batch, .z_row = g_row, .A = pointer<float>(g_A),
                 .D = pointer<float>(g_D), .dt_bias = pointer<float>(g_dt_bias),
                 .initial_state = g_taps + lines(m.d * m.k)});
  m.product(rows_of(g_dt, m.d), columns_of(m.dt_proj, m.r), g_columns, m.w, m.t, m.r, m.d);
  for (Size i = 0; i < m.t; ++i) {
    std::copy_n(g_B + i * m.n, m.n, g_columns + i * m.w + m.r);
    std::copy_n(g_C + i * m.n, m.n, g_columns + i * m.w + m.r + m.n);
  }
  m.product(columns_of(g_dt, m.d), columns_of(m.columns, m.w), pointer<float>(g_dt_proj), m.r, m.d,
            m.r, m.t);
  m.product(columns_of(g_columns, m.w), columns_of(m.x, m.d), pointer<float>(g_x_proj), m.d, m.w,
            m.d, m.t);
  m.product(rows_of(g_columns, m.w), columns_of(m.x_proj, m.d), g_x, m.d, m.t, m.d, m.w, true);
  BM_PICK(causal_conv1d)
      .backward(m.convolution(), {g_x, m.l * m.d, m.d, pointer<float>(g_xz), g_batch, g_row, g_taps,
                                  pointer<float>(g_conv_bias), nullptr});
  float* const g_weight = pointer<float>(g_conv);
  for (Size i = 0; i < m.d; ++i)
    for (Size j = 0; j < m.k; ++j) g_weight[i * m.k + j] = g_taps[j * m.d + i];
}

}  // namespace

void bind_mamba_mixer(nb::module_& m) {
  m.def("mamba_mixer_kept", [](const Sizes& sizes) { return Kept(sizes).all; },
        "How many numbers `mamba_mixer` keeps for `mamba_mixer_backward`.");
  m.def(
      "mamba_mixer_buffer",
      [](const Sizes& sizes) {
        const auto [b, l, d, n, r, k] = sizes;
        return 2 * lines(b * l * d) + lines(b * l * (r + 2 * n)) + 2 * lines(b * l * n) +
               lines(d * k) + lines(b * d * n);
      },
      "How many numbers `mamba_mixer_backward` needs to work with.");
  m.def("mamba_mixer", &forward, nb::call_guard<nb::gil_scoped_release>());
  m.def("mamba_mixer_backward", &backward, nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace bm
