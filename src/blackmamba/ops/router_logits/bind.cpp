#include "native/bindings.hpp"
#include "router_logits/cpu.hpp"

#include <nanobind/stl/tuple.h>

namespace nb = nanobind;

namespace bm {

void bind_router_logits(nb::module_& m) {
  using Address = std::uintptr_t;
  using Size = std::int64_t;
  using Shape = std::tuple<Size, Size, Size>;
  m.def(
      "router_logits",
      [](Address x, Size x_row, bool is_bf16, Address weight, Shape shape, int n_threads,
         Address bias, Address logits) {
        const auto [t, m, e] = shape;
        BM_PICK(router_logits).forward({pointer<void>(x), x_row, is_bf16, pointer<float>(weight), t,
                                        m, e, n_threads},
                                       pointer<float>(bias), pointer<float>(logits));
      },
      nb::call_guard<nb::gil_scoped_release>());
  m.def(
      "router_logits_backward",
      [](Address x, Size x_row, bool is_bf16, Address weight, Shape shape, int n_threads,
         Address grad_logits, Address grad_x, Address grad_weight, Address grad_bias) {
        const auto [t, m, e] = shape;
        BM_PICK(router_logits).backward({pointer<void>(x), x_row, is_bf16, pointer<float>(weight),
                                         t, m, e, n_threads},
                                        {pointer<float>(grad_logits), pointer<void>(grad_x),
                                         pointer<float>(grad_weight), pointer<float>(grad_bias)});
      },
      nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace bm
