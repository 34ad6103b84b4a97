#include "linear/cpu.hpp"
#include "native/bindings.hpp"

#include <nanobind/stl/tuple.h>

namespace nb = nanobind;

namespace bm {

void bind_linear(nb::module_& m) {
  using Address = std::uintptr_t;
  using Size = std::int64_t;
  using View = std::tuple<Address, Size, Size, Address, Address>;
  using Shape = std::tuple<Size, Size, Size>;
  const auto def = [&](const char* name, auto entry, auto number, auto result) {
    using T = decltype(number);
    using C = decltype(result);
    m.def(
        name,
        [entry](View a, View b, Address c, Size c_row, Address c_rows, Address bias,
                Address row_scale, Address k_scale, Shape shape, bool accumulate, int n_threads) {
          const auto operand = [](const View& v) {
            return Operand<T>{pointer<T>(std::get<0>(v)), std::get<1>(v), std::get<2>(v),
                              pointer<Size>(std::get<3>(v)), pointer<Size>(std::get<4>(v))};
          };
          const auto [rows, columns, k] = shape;
          (BM_PICK(linear).*entry)({operand(a), operand(b), pointer<C>(c), c_row,
                                    pointer<Size>(c_rows), pointer<float>(bias),
                                    pointer<float>(row_scale), pointer<float>(k_scale), rows,
                                    columns, k, accumulate, n_threads});
        },
        nb::call_guard<nb::gil_scoped_release>(),
        "c = a b^T; a view is an address, strides of rows and columns, and addresses of their "
        "indices.");
  };
  using bits = std::uint16_t;  // of a bfloat16
  def("product", &Linear::multiply, float(), float());
  def("product_narrow", &Linear::multiply_narrow, bits(), bits());
  def("product_narrow_to_float", &Linear::multiply_narrow_to_float, bits(), float());
}

}  // namespace bm
