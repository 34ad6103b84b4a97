"""Products in C++: any layout, picked rows, results added to what is there."""

from collections.abc import Iterator

import torch
from torch import Tensor

from blackmamba.ops import native
from blackmamba.ops.native import bfloat16

_LEAST_PRODUCTS = 1 << 20  # multiply-adds; below, the library's call costs less


def fits(a: Tensor, b: Tensor) -> bool:
    """Whether `multiply` can, and should, multiply these."""
    return (
        native.missing() is None
        and a.device.type == "cpu"
        and (a.dtype == torch.float32 or _is_widened(a.dtype))
        and a.dtype == b.dtype
        and a.numel() * len(b) >= _LEAST_PRODUCTS
    )


def takes(dtype: torch.dtype) -> bool:
    """Whether groups of rows of this dtype are multiplied faster here than by the library."""
    return dtype == torch.float32 or _is_widened(dtype) or _has_tiles(dtype)


def _is_widened(dtype: torch.dtype) -> bool:
    return dtype == torch.bfloat16 and bfloat16.multiplied_by() == "floats"


def _has_tiles(dtype: torch.dtype) -> bool:
    return dtype == torch.bfloat16 and bfloat16.has_own_tiles()


def multiply(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    accumulate: bool = False,
    a_rows: Tensor | None = None,
    out_rows: Tensor | None = None,
    out_scale: Tensor | None = None,
    tokens: Tensor | None = None,
    left_tokens: Tensor | None = None,
    left_scale: Tensor | None = None,
) -> None:
    """out = a (t, k) times b (n, k) transposed, on CPU, in any layout.

    a and b are float32, or both are bfloat16: sums are float32 all the same, and rounded once.
    Matrix units round a number times left_scale, too. Index tensors are int64 and contiguous;
    nothing checks their numbers.

    Args:
        out: (t, n), its rows contiguous; written. float32, or bfloat16 as a and b are.
        bias: (n,), contiguous, added; float32, as all scales are.
        accumulate: add to out instead; then neither bias nor out_scale.
        a_rows: (t,), which rows of a to take.
        out_rows: (t,), which rows of out to write, each once.
        out_scale: multiplies row out_rows[i] by out_scale[out_rows[i]].
        tokens: (k,), which columns of b to take.
        left_tokens: (k,), which columns of a to take.
        left_scale: multiplies a's column left_tokens[j] by left_scale[left_tokens[j]].
    """
    t = len(a) if a_rows is None else len(a_rows)
    k = a.shape[1] if left_tokens is None else len(left_tokens)
    of_b = b.shape[1] if tokens is None else len(tokens)
    assert of_b == k, (a.shape, b.shape)
    assert out.shape[1] == len(b), (out.shape, b.shape)
    assert out_rows is not None or len(out) == t, (out.shape, t)
    extension = native.extension()
    if a.dtype == torch.float32:
        product = extension.product
    else:
        by = "product_tiles" if _has_tiles(a.dtype) else "product_narrow"
        product = getattr(extension, by if out.dtype == a.dtype else f"{by}_to_float")
    product(
        (a.data_ptr(), a.stride(0), a.stride(1), _address(a_rows), _address(left_tokens)),
        (b.data_ptr(), b.stride(0), b.stride(1), 0, _address(tokens)),
        out.data_ptr(),
        out.stride(0),
        _address(out_rows),
        _address(bias),
        _address(out_scale),
        _address(left_scale),
        (t, len(b), k),
        accumulate,
        torch.get_num_threads(),
    )


def multiply_groups(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    ends: Tensor,
    *,
    bias: Tensor | None = None,
    a_rows: Tensor | None = None,
    out_rows: Tensor | None = None,
    out_scale: Tensor | None = None,
) -> None:
    """`multiply` for each group of sorted rows with its matrix of b (g, n, k): all at once.

    Group j's rows end at ends[j]; b may have any layout, a's and out's rows are contiguous. Of
    bfloat16 one after the other.

    Args:
        bias: (g, n), contiguous.
        a_rows, out_rows: for each sorted row, where it is; None: they lie one behind the other.
        out_scale: as for `multiply`; only with out_rows.
    """
    assert b.shape == (len(ends), out.shape[1], a.shape[1]), (b.shape, a.shape, out.shape)
    assert a.stride(1) == out.stride(1) == 1, (a.stride(), out.stride())
    if a.dtype != torch.float32:
        for j, rows in groups(ends):
            multiply(
                a if a_rows is not None else a[rows],
                b[j],
                out if out_rows is not None else out[rows],
                bias=None if bias is None else bias[j],
                a_rows=None if a_rows is None else a_rows[rows],
                out_rows=None if out_rows is None else out_rows[rows],
                out_scale=out_scale,
            )
        return
    native.extension().products_of_groups(
        (a.data_ptr(), a.stride(0), _address(a_rows)),
        (b.data_ptr(), *b.stride()),
        (out.data_ptr(), out.stride(0), _address(out_rows)),
        _address(bias),
        _address(out_scale),
        ends.data_ptr(),
        tuple(b.shape),
        torch.get_num_threads(),
    )


def multiply_outer_groups(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    ends: Tensor,
    *,
    a_rows: Tensor | None = None,
    a_scale: Tensor | None = None,
    b_rows: Tensor | None = None,
) -> None:
    """out (g, m, n), contiguous: for each group a's rows (m,) transposed times b's rows (n,); 0 for
    an empty one. `a_scale` multiplies row a_rows[i] of a by a_scale[a_rows[i]]."""
    assert out.shape == (len(ends), a.shape[1], b.shape[1]), (out.shape, a.shape, b.shape)
    assert a.stride(1) == b.stride(1) == 1, (a.stride(), b.stride())
    if a.dtype != torch.float32:
        for j, rows in groups(ends):
            multiply(
                (a if a_rows is not None else a[rows]).t(),
                (b if b_rows is not None else b[rows]).t(),
                out[j],
                left_tokens=None if a_rows is None else a_rows[rows],
                left_scale=a_scale,
                tokens=None if b_rows is None else b_rows[rows],
            )
        return
    native.extension().outer_products_of_groups(
        (a.data_ptr(), a.stride(0), _address(a_rows)),
        _address(a_scale),
        (b.data_ptr(), b.stride(0), _address(b_rows)),
        out.data_ptr(),
        ends.data_ptr(),
        tuple(out.shape),
        torch.get_num_threads(),
    )


def groups(ends: Tensor) -> Iterator[tuple[int, slice]]:
    """Number of each group, and which of the sorted rows are its own."""
    start = 0
    for j, end in enumerate(ends.tolist()):
        yield j, slice(start, end)
        start = end


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
