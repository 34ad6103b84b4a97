#include <algorithm>
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
      "all_within",
      [](std::uintptr_t x, std::int64_t n, std::int64_t last, std::int64_t ignored) {
        const std::int64_t* const numbers = pointer<const std::int64_t>(x);
        bool all = true;
        for (std::int64_t i = 0; i < n; ++i)
          all &= (numbers[i] >= 0 && numbers[i] <= last) || numbers[i] == ignored;
        return all;
      },
      nb::call_guard<nb::gil_scoped_release>(),
      "Whether n int64 are each 0 .. last, or `ignored`.");
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
  m.def(
      "pairs_against_floats",
      [] {
        const Elementwise& kernels = BM_PICK(elementwise);
        if (kernels.multiply_pairs == nullptr) return 0.0;
        constexpr std::int64_t rounds = 4'000;  // some 20 us
        const auto seconds = [&](float (*run)(std::int64_t)) {
          const auto start = std::chrono::steady_clock::now();
          volatile float sink = run(rounds);
          static_cast<void>(sink);
          return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
        };
        double pairs = 1, floats = 1;
        for (int i = 0; i < 10; ++i) {  // the least times: whatever else ran took some of the others
          pairs = std::min(pairs, seconds(kernels.multiply_pairs));
          floats = std::min(floats, seconds(kernels.multiply_adds));
        }
        return 2 * floats / pairs;
      },
      nb::call_guard<nb::gil_scoped_release>(),
      "Products of bfloat16 by instructions for pairs in the time of one of float32; 0 without them.");
}

}  // namespace bm
