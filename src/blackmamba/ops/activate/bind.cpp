#include "activate/cpu.hpp"
#include "native/bindings.hpp"

namespace nb = nanobind;

namespace bm {

void bind_activate(nb::module_& m) {
  using Address = std::uintptr_t;
  using Size = std::int64_t;
  m.def(
      "activate",
      [](Address h, Size h_row, Size t, Size f, bool gelu, bool gated, bool is_bf16, int n_threads,
         Address y) {
        BM_PICK(activate).forward({pointer<void>(h), h_row, t, f, gelu, gated, is_bf16, n_threads},
                                  pointer<void>(y));
      },
      nb::call_guard<nb::gil_scoped_release>());
  m.def(
      "activate_backward",
      [](Address h, Size h_row, Size t, Size f, bool gelu, bool gated, bool is_bf16, int n_threads,
         Address grad_y, Size y_row, Address grad_h, Address scale, Address dots,
         Address places) {
        BM_PICK(activate).backward({pointer<void>(h), h_row, t, f, gelu, gated, is_bf16, n_threads},
                                   {pointer<void>(grad_y), y_row, pointer<void>(grad_h),
                                    pointer<float>(scale), pointer<float>(dots),
                                    pointer<Size>(places)});
      },
      nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace bm
