#include <nanobind/stl/array.h>

#include <array>

#include "expert_mlp/cpu.hpp"
#include "native/bindings.hpp"

namespace nb = nanobind;

namespace bm {

void bind_quantized_expert_mlp(nb::module_& m) {
  using Address = std::uintptr_t;
  m.def(
      "quantized_expert_mlp",
      [](Address x, std::int64_t x_stride, Address expert_ids, Address fc1_data, Address fc1_scales,
         Address fc2_data, Address fc2_scales, std::array<int, 2> kinds,
         std::array<std::int64_t, 2> groups, Address fc1_bias, Address fc2_bias, Address gate,
         Address y, std::array<std::int64_t, 5> sizes, bool narrow, bool gated, bool gelu,
         int n_threads) {
        const auto [t, e, rows, d_model, f] = sizes;
        FewTokens c;
        c.n_tokens = static_cast<int>(t);
        c.n_experts = static_cast<int>(e);
        c.narrow = narrow;
        c.x = pointer<const void>(x);
        c.x_stride = x_stride;
        c.expert_ids = pointer<const std::int64_t>(expert_ids);
        c.fc1 = {static_cast<WeightKind>(kinds[0]), pointer<const void>(fc1_data),
                 pointer<const void>(fc1_scales), rows, d_model, groups[0], narrow};
        c.fc2 = {static_cast<WeightKind>(kinds[1]), pointer<const void>(fc2_data),
                 pointer<const void>(fc2_scales), d_model, f, groups[1], narrow};
        c.fc1_bias = pointer<const float>(fc1_bias);
        c.fc2_bias = pointer<const float>(fc2_bias);
        c.gate = pointer<const float>(gate);
        c.gated = gated;
        c.gelu = gelu;
        c.y = pointer<void>(y);
        c.n_threads = n_threads;
        BM_PICK(expert_mlp).few_tokens(c);
      },
      nb::call_guard<nb::gil_scoped_release>(), "See expert_mlp/cpu.hpp.");
}

}  // namespace bm
