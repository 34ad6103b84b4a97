#include "linear/cpu.hpp"
#include "native/bindings.hpp"

#include <nanobind/stl/tuple.h>

namespace nb = nanobind;

namespace bm {

void bind_linear(nb::module_& m) {
  using Address = std::uintptr_t;
  using Size = std::int64_t;
  using View = std::tuple<Address, Size, Size, Address, Address>;
  m.def(
      "product",
      [](View a, View b, Address c, Size c_row, Address c_rows, Address bias, Address row_scale,
         Address k_scale, std::tuple<Size, Size, Size> shape, bool accumulate, int n_threads) {
        const auto operand = [](const View& v) {
          return Operand{pointer<float>(std::get<0>(v)), std::get<1>(v), std::get<2>(v),
                         pointer<Size>(std::get<3>(v)), pointer<Size>(std::get<4>(v))};
        };
        const auto [rows, columns, k] = shape;
        BM_PICK(linear).multiply({operand(a), operand(b), pointer<float>(c), c_row,
                                  pointer<Size>(c_rows), pointer<float>(bias),
                                  pointer<float>(row_scale), pointer<float>(k_scale), rows, columns,
                                  k, accumulate, n_threads});
      },
      nb::call_guard<nb::gil_scoped_release>(),
      "c = a b^T; a view is address, strides of rows and columns, and addresses of their indices.");
}

}  // namespace bm
