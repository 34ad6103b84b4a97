#include "linear/cpu.hpp"
#include "native/bindings.hpp"

#include <nanobind/stl/tuple.h>

#include <vector>

namespace nb = nanobind;

namespace bm {
namespace {

// Sorted rows from `first` on: their numbers say where they are, or they lie one behind the other.
std::tuple<float*, std::int64_t, const std::int64_t*> from_row(
    const std::tuple<std::uintptr_t, std::int64_t, std::uintptr_t>& rows, std::int64_t first) {
  const auto [data, row, numbers] = rows;
  if (numbers) return {pointer<float>(data), row, pointer<std::int64_t>(numbers) + first};
  return {pointer<float>(data) + first * row, row, nullptr};
}

}  // namespace

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
  def("product_tiles", &Linear::multiply_tiles, bits(), bits());
  def("product_tiles_to_float", &Linear::multiply_tiles_to_float, bits(), float());
  using Rows = std::tuple<Address, Size, Address>;
  using Matrices = std::tuple<Address, Size, Size, Size>;
  m.def(
      "products_of_groups",
      [](Rows a, Matrices b, Rows c, Address bias, Address row_scale, Address ends, Shape shape,
         int n_threads) {
        const auto [n_groups, n, k] = shape;
        const auto [data, matrix, row, column] = b;
        const Size* end = pointer<Size>(ends);
        std::vector<Product<float>> products(n_groups);
        for (Size j = 0, first = 0; j < n_groups; first = end[j++]) {
          const auto [a_data, a_row, a_rows] = from_row(a, first);
          const auto [c_data, c_row, c_rows] = from_row(c, first);
          products[j] = {{a_data, a_row, 1, a_rows, nullptr},
                         {pointer<float>(data) + j * matrix, row, column, nullptr, nullptr},
                         c_data, c_row, c_rows,
                         bias ? pointer<float>(bias) + j * n : nullptr,
                         pointer<float>(row_scale), nullptr, end[j] - first, n, k, false, n_threads};
        }
        BM_PICK(linear).multiply_each(products.data(), n_groups, n_threads);
      },
      nb::call_guard<nb::gil_scoped_release>(),
      "Rows are an address, their stride, and the address of their numbers; matrices an address and "
      "strides.");
  m.def(
      "outer_products_of_groups",
      [](Rows a, Address a_scale, Rows b, Address c, Address ends, Shape shape, int n_threads) {
        const auto [n_groups, rows, columns] = shape;
        const Size* end = pointer<Size>(ends);
        std::vector<Product<float>> products(n_groups);
        for (Size j = 0, first = 0; j < n_groups; first = end[j++]) {
          const auto [a_data, a_row, a_rows] = from_row(a, first);
          const auto [b_data, b_row, b_rows] = from_row(b, first);
          products[j] = {{a_data, 1, a_row, nullptr, a_rows},
                         {b_data, 1, b_row, nullptr, b_rows},
                         pointer<float>(c) + j * rows * columns, columns, nullptr, nullptr, nullptr,
                         pointer<float>(a_scale), rows, columns, end[j] - first, false, n_threads};
        }
        BM_PICK(linear).multiply_each(products.data(), n_groups, n_threads);
      },
      nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace bm
