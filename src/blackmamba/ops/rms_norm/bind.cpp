#include "native/bindings.hpp"
#include "rms_norm/cpu.hpp"

namespace nb = nanobind;

namespace bm {

void bind_rms_norm(nb::module_& m) {
  using Address = std::uintptr_t;
  m.def(
      "rms_norm",
      [](Address x, Address weight, float eps, std::int64_t t, std::int64_t m, bool x_is_bf16,
         bool y_is_bf16, int n_threads, Address update, bool update_is_bf16, Address total,
         Address y) {
        BM_PICK(rms_norm).forward({pointer<void>(x), pointer<float>(weight), eps, t, m, x_is_bf16,
                                   y_is_bf16, n_threads},
                                  {pointer<void>(update), update_is_bf16, pointer<void>(total)},
                                  pointer<void>(y));
      },
      nb::call_guard<nb::gil_scoped_release>());
  m.def(
      "rms_norm_backward",
      [](Address x, Address weight, float eps, std::int64_t t, std::int64_t m, bool x_is_bf16,
         bool y_is_bf16, int n_threads, Address grad_y, Address grad_total, Address grad_x,
         Address grad_weight, Address narrow) {
        BM_PICK(rms_norm).backward({pointer<void>(x), pointer<float>(weight), eps, t, m, x_is_bf16,
                                    y_is_bf16, n_threads},
                                   pointer<void>(grad_y), pointer<void>(grad_total),
                                   pointer<void>(grad_x), pointer<float>(grad_weight),
                                   pointer<void>(narrow));
      },
      nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace bm
