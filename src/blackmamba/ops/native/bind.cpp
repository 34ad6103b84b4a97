#include <chrono>

#include "native/bindings.hpp"
#include "native/cpu.hpp"
#include "native/threads.hpp"

namespace nb = nanobind;

namespace bm {

void bind_elementwise(nb::module_& m) {
  m.def(
      "elementwise",
      [](int function, std::uintptr_t x, std::uintptr_t y, std::int64_t n) {
        BM_PICK(elementwise).apply(static_cast<Function>(function), pointer<const float>(x),
                                   pointer<float>(y), n);
      },
      "y[i] = f(x[i]) for float32 arrays of n numbers.");
  m.def(
      "flops_per_second",
      [](int n_threads) {
        constexpr std::int64_t rounds = 4'000'000;
        const Elementwise& kernels = BM_PICK(elementwise);
        volatile float sink = 0;
        const auto start = std::chrono::steady_clock::now();
        parallel_for(n_threads, n_threads, [&](std::int64_t) { sink = kernels.multiply_adds(rounds); });
        const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
        return 2.0 * 16 * kernels.lanes * rounds * n_threads / seconds.count();
      },
      nb::call_guard<nb::gil_scoped_release>(),
      "Float32 operations a second of this many threads in multiply-adds that depend on no memory.");
}

}  // namespace bm
