#include "grouped_product/cpu.hpp"
#include "native/bindings.hpp"

#include <nanobind/stl/tuple.h>

namespace nb = nanobind;

namespace bm {

void bind_grouped_product(nb::module_& m) {
  using Address = std::uintptr_t;
  using Size = std::int64_t;
  using Rows = std::tuple<Address, Size, Address>;
  m.def(
      "grouped_order",
      [](Address ids, Size t, Size g, Address order, Address ends) {
        return BM_PICK(grouped).sort(
            {pointer<Size>(ids), t, g, pointer<Size>(order), pointer<Size>(ends)});
      },
      nb::call_guard<nb::gil_scoped_release>());
  m.def(
      "grouped_product",
      [](Rows a, Address b, bool transposed, Rows c, Address scale, Address ends,
         std::tuple<Size, Size, Size> shape, int n_threads) {
        const auto [a_data, a_row, a_rows] = a;
        const auto [c_data, c_row, c_rows] = c;
        const auto [g, n, k] = shape;
        BM_PICK(grouped).product({pointer<void>(a_data), a_row, pointer<Size>(a_rows),
                                  pointer<void>(b), transposed, pointer<void>(c_data), c_row,
                                  pointer<Size>(c_rows), pointer<float>(scale), pointer<Size>(ends),
                                  g, n, k, n_threads});
      },
      nb::call_guard<nb::gil_scoped_release>(),
      "Rows are an address, their stride, and the address of their numbers.");
  m.def(
      "grouped_outer",
      [](Rows a, Address scale, Rows b, Address c, Address ends, std::tuple<Size, Size, Size> shape,
         int n_threads) {
        const auto [a_data, a_row, a_rows] = a;
        const auto [b_data, b_row, b_rows] = b;
        const auto [g, rows, columns] = shape;
        BM_PICK(grouped).outer({pointer<void>(a_data), a_row, pointer<Size>(a_rows),
                                pointer<float>(scale), pointer<void>(b_data), b_row,
                                pointer<Size>(b_rows), pointer<void>(c), pointer<Size>(ends), g,
                                rows, columns, n_threads});
      },
      nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace bm
