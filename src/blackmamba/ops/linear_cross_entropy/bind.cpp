#include "linear_cross_entropy/cpu.hpp"
#include "native/bindings.hpp"

namespace nb = nanobind;

namespace bm {

void bind_linear_cross_entropy(nb::module_& m) {
  using Address = std::uintptr_t;
  m.def(
      "softmax_cross_entropy",
      [](Address logits, Address labels, std::int64_t t, std::int64_t v, std::int64_t ignore_index,
         bool gradient, float factor, bool is_bf16, int n_threads, Address losses) {
        BM_PICK(softmax_cross_entropy)
            .run({pointer<void>(logits), pointer<std::int64_t>(labels), t, v, ignore_index, gradient,
                  factor, is_bf16, n_threads},
                 pointer<float>(losses));
      },
      nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace bm
