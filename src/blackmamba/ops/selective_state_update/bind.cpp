#include <nanobind/stl/tuple.h>

#include "native/bindings.hpp"
#include "selective_state_update/cpu.hpp"

namespace nb = nanobind;

namespace bm {
namespace {

using Address = std::uintptr_t;
using View = std::tuple<Address, std::int64_t>;  // address and row stride

TokenRows rows(const View& view) {
  return {pointer<const void>(std::get<0>(view)), std::get<1>(view)};
}

}  // namespace

void bind_selective_state_update(nb::module_& m) {
  m.def(
      "selective_state_update",
      [](const std::tuple<std::int64_t, std::int64_t, std::int64_t>& sizes, bool bfloat16,
         bool softplus, int n_threads, Address state, const View& x, const View& dt, Address A,
         const View& B, const View& C, Address D, const View& z, Address dt_bias, Address y,
         Address new_state) {
        const auto& [b, d, n] = sizes;
        BM_PICK(selective_state_update)
            .update({.b = b,
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
                     .state = pointer<const float>(state),
                     .new_state = pointer<float>(new_state),
                     .y = pointer<void>(y)});
      },
      nb::call_guard<nb::gil_scoped_release>(), "See ops/selective_state_update/cpu.hpp.");
}

}  // namespace bm
