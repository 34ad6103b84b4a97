#include "causal_conv1d/cpu.hpp"
#include "native/bindings.hpp"

#include <nanobind/stl/tuple.h>

namespace nb = nanobind;

namespace bm {
namespace {

using Address = std::uintptr_t;
using Size = std::int64_t;
using Rows = std::tuple<Address, Size, Size>;  // address, stride of the batch and of a row

ConvInputs inputs(Address x, Size x_batch, Size x_row, Address weight, Address bias, Address before,
                  Address seq_idx, Size b, Size l, Size d, Size k, bool silu, bool is_bf16,
                  int n_threads) {
  return {pointer<void>(x), x_batch, x_row, pointer<float>(weight), pointer<float>(bias),
          pointer<void>(before), pointer<std::int64_t>(seq_idx), b, l, d, k, silu, is_bf16,
          n_threads};
}

}  // namespace

void bind_causal_conv1d(nb::module_& m) {
  nb::class_<ConvInputs>(m, "ConvInputs");
  m.def("causal_conv1d_inputs", &inputs);
  m.def(
      "causal_conv1d",
      [](const ConvInputs& in, Address y) { BM_PICK(causal_conv1d).forward(in, pointer<void>(y)); },
      nb::call_guard<nb::gil_scoped_release>());
  m.def(
      "causal_conv1d_backward",
      [](const ConvInputs& in, Rows y, Rows x, Address weight, Address bias, Address before) {
        const auto [y_data, y_batch, y_row] = y;
        const auto [x_data, x_batch, x_row] = x;
        BM_PICK(causal_conv1d)
            .backward(in, {pointer<void>(y_data), y_batch, y_row, pointer<void>(x_data), x_batch,
                           x_row, pointer<float>(weight), pointer<float>(bias),
                           pointer<void>(before)});
      },
      nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace bm
