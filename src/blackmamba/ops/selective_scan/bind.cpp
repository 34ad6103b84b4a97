#include <nanobind/stl/tuple.h>

#include "native/bindings.hpp"
#include "selective_scan/cpu.hpp"

namespace nb = nanobind;

namespace bm {
namespace {

using Address = std::uintptr_t;
using View = std::tuple<Address, std::int64_t, std::int64_t>;  // address, batch and row stride
using Sizes = std::tuple<std::int64_t, std::int64_t, std::int64_t, std::int64_t>;
using Inputs = std::tuple<View, View, Address, View, View, Address, View, Address, Address, Address>;

Rows rows(const View& view) {
  return {pointer<const void>(std::get<0>(view)), std::get<1>(view), std::get<2>(view)};
}

Scan scan(const Sizes& sizes, const Inputs& inputs, bool bfloat16, bool softplus, int n_threads) {
  const auto& [b, l, d, n] = sizes;
  const auto& [x, dt, A, B, C, D, z, dt_bias, initial_state, seq_idx] = inputs;
  return {.b = b,
          .l = l,
          .d = d,
          .n = n,
          .bfloat16 = bfloat16,
          .softplus = softplus,
          .n_threads = n_threads,
          .x = rows(x),
          .dt = rows(dt),
          .B = rows(B),
          .C = rows(C),
          .z = rows(z),
          .A = pointer<const float>(A),
          .D = pointer<const float>(D),
          .dt_bias = pointer<const float>(dt_bias),
          .initial_state = pointer<const float>(initial_state),
          .seq_idx = pointer<const std::int64_t>(seq_idx)};
}

}  // namespace

void bind_selective_scan(nb::module_& m) {
  m.def(
      "selective_scan",
      [](const Sizes& sizes, const Inputs& inputs, bool bfloat16, bool softplus, int n_threads,
         Address y, Address final_state, Address starts) {
        BM_PICK(selective_scan)
            .forward(scan(sizes, inputs, bfloat16, softplus, n_threads),
                     {pointer<void>(y), pointer<float>(final_state), pointer<float>(starts)});
      },
      nb::call_guard<nb::gil_scoped_release>(), "See ops/selective_scan/cpu.hpp.");
  m.def(
      "selective_scan_backward",
      [](const Sizes& sizes, const Inputs& inputs, bool bfloat16, bool softplus, int n_threads,
         Address starts, const View& grad_y, Address grad_final_state,
         const std::tuple<Address, Address, Address, Address, View>& like_inputs,
         const std::tuple<Address, Address, Address, Address>& wide) {
        const auto& [x, dt, B, C, z] = like_inputs;
        const auto& [z_data, z_batch, z_row] = z;
        const auto& [A, D, dt_bias, initial_state] = wide;
        BM_PICK(selective_scan)
            .backward(scan(sizes, inputs, bfloat16, softplus, n_threads),
                      pointer<const float>(starts), rows(grad_y),
                      pointer<const float>(grad_final_state),
                      {.x = pointer<void>(x),
                       .dt = pointer<void>(dt),
                       .B = pointer<void>(B),
                       .C = pointer<void>(C),
                       .z = pointer<void>(z_data),
                       .z_batch = z_batch,
                       .z_row = z_row,
                       .A = pointer<float>(A),
                       .D = pointer<float>(D),
                       .dt_bias = pointer<float>(dt_bias),
                       .initial_state = pointer<float>(initial_state)});
      },
      nb::call_guard<nb::gil_scoped_release>(), "See ops/selective_scan/cpu.hpp.");
}

}  // namespace bm
