#include "adamw/cpu.hpp"
#include "native/bindings.hpp"

#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <vector>

namespace nb = nanobind;

namespace bm {

void bind_adamw(nb::module_& m) {
  using Address = std::uintptr_t;
  using Size = std::int64_t;
  using Tensor = std::tuple<Address, Address, Address, Address, Address, Size, Size, bool, bool, double>;
  using Factors = std::tuple<double, double, double, double, Size>;
  m.def(
      "adamw",
      [](const std::vector<Tensor>& tensors, const Factors& factors, double beta1, double beta2,
         double eps, int n_threads) {
        std::vector<AdamWTensor> given;
        for (const auto& [parameter, gradient, exp_avg, exp_avg_sq, master, n, number, p_is_bf16,
                          g_is_bf16, decay] : tensors)
          given.push_back({pointer<void>(parameter), pointer<void>(gradient),
                           pointer<float>(exp_avg), pointer<float>(exp_avg_sq),
                           pointer<float>(master), n, static_cast<std::uint32_t>(number), p_is_bf16,
                           g_is_bf16, static_cast<float>(decay)});
        const auto [lr, c1, c2, scale, seed] = factors;
        const auto narrow = [](double x) { return static_cast<float>(x); };
        BM_PICK(adamw).update(given.data(), static_cast<Size>(given.size()),
                              {narrow(lr), narrow(c1), narrow(c2), narrow(scale), seed,
                               narrow(beta1), narrow(1 - beta1), narrow(beta2), narrow(1 - beta2),
                               narrow(eps)},
                              n_threads);
      },
      nb::call_guard<nb::gil_scoped_release>(),
      "A tensor is addresses of parameter, gradient, moments and master (0: none), its size, number, "
      "whether parameter and gradient are bfloat16, decay; factors: lr, c1, c2, scale, seed.");
  m.def(
      "sum_of_squares",
      [](const std::vector<std::tuple<Address, Size, bool>>& tensors, int n_threads) {
        std::vector<NormTensor> given;
        for (const auto& [data, n, is_bf16] : tensors)
          given.push_back({pointer<void>(data), n, is_bf16});
        return BM_PICK(adamw).squares(given.data(), static_cast<Size>(given.size()), n_threads);
      },
      nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace bm
