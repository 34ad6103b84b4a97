#include "native/bindings.hpp"
#include "sinkhorn/cpu.hpp"

namespace nb = nanobind;

namespace bm {

void bind_sinkhorn(nb::module_& m) {
  using Address = std::uintptr_t;
  m.def(
      "sinkhorn_choice",
      [](Address logits, std::int64_t t, std::int64_t e, double scale, bool paper_start,
         double tolerance, std::int64_t max_iterations, Address ids) {
        BM_PICK(sinkhorn).choice({pointer<float>(logits), t, e, static_cast<float>(scale),
                                  static_cast<float>(tolerance), paper_start, max_iterations},
                                 pointer<std::int64_t>(ids));
      },
      nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace bm
