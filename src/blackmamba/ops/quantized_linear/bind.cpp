#include "native/bindings.hpp"
#include "quantized_linear/cpu.hpp"

namespace nb = nanobind;

namespace bm {

void bind_weight_product(nb::module_& m) {
  m.def(
      "weight_product",
      [](std::uintptr_t x, std::int64_t x_stride, std::int64_t t, bool narrow, int kind,
         std::uintptr_t data, std::uintptr_t scales, std::int64_t o, std::int64_t i,
         std::int64_t group, bool narrow_product, std::uintptr_t bias, std::uintptr_t y,
         int n_threads) {
        const Weights weights{static_cast<WeightKind>(kind), pointer<const void>(data),
                              pointer<const void>(scales), o, i, group, narrow_product};
        BM_PICK(weight_product)
            .few_vectors({t, narrow, pointer<const void>(x), x_stride, weights,
                          pointer<const float>(bias), pointer<void>(y), n_threads});
      },
      nb::call_guard<nb::gil_scoped_release>(),
      "See quantized_linear/cpu.hpp; kind: 0 float32, 1 bfloat16, 2 int8, 3 int4.");
}

}  // namespace bm
