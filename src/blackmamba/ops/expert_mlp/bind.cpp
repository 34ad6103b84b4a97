#include "expert_mlp/cpu.hpp"
#include "native/bindings.hpp"

namespace nb = nanobind;

namespace bm {

void bind_expert_mlp(nb::module_& m) {
  m.def(
      "expert_mlp_few_tokens",
      [](std::uintptr_t x, std::int64_t x_stride, std::uintptr_t expert_ids, std::uintptr_t fc1,
         std::uintptr_t fc2, std::uintptr_t fc1_bias, std::uintptr_t fc2_bias, std::uintptr_t gate,
         std::uintptr_t y, std::uintptr_t h, int t, int e, std::int64_t rows, std::int64_t d_model,
         std::int64_t f, bool narrow, bool narrow_weights, bool gated, bool gelu, int n_threads) {
        FewTokens c;
        c.n_tokens = t;
        c.n_experts = e;
        c.narrow = narrow;
        c.x = pointer<const void>(x);
        c.x_stride = x_stride;
        c.expert_ids = pointer<const std::int64_t>(expert_ids);
        const WeightKind kind = narrow_weights ? WeightKind::bfloat16 : WeightKind::float32;
        c.fc1 = {kind, pointer<const void>(fc1), nullptr, rows, d_model, 0};
        c.fc2 = {kind, pointer<const void>(fc2), nullptr, d_model, f, 0};
        c.fc1_bias = pointer<const float>(fc1_bias);
        c.fc2_bias = pointer<const float>(fc2_bias);
        c.gate = pointer<const float>(gate);
        c.gated = gated;
        c.gelu = gelu;
        c.y = pointer<void>(y);
        c.h = pointer<float>(h);
        c.n_threads = n_threads;
        BM_PICK(expert_mlp).few_tokens(c);
      },
      nb::call_guard<nb::gil_scoped_release>(), "See expert_mlp/cpu.hpp.");
}

}  // namespace bm
