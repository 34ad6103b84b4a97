"""Products on a CPU by our own kernels or by oneDNN, and all others as torch does them.

torch takes MKL for float32, which leaves the wide vectors of processors of another maker unused: a
Zen 5 gives 200 GFLOP/s by MKL, 320 to 480 by oneDNN and 380 to 490 by our kernel, of 505.
Everything stays float32.

bfloat16 is torch's but where the processor multiplies float32 faster (native/bfloat16.py): there
our kernel widens it on the way.
"""

import platform
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from blackmamba.ops.checks import readable
from blackmamba.ops.linear import native

_HAS_ONEDNN = (
    platform.machine() in ("x86_64", "AMD64")
    and torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)
_LEAST_PRODUCTS = 1 << 20  # multiply-adds; below, a call costs more than it saves
_FEW_ROWS = 48  # for which packing, as our kernel does, is worth less
_FEW_OF_BFLOAT16 = 6  # the same of bfloat16
_FEW_COLUMNS = 24  # of which our products of bfloat16 leave most of their vectors empty
_NARROW = 128  # columns below which a transposed left side should come out transposed


def linear_native(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`linear`; its gradients are the same kind of product."""
    is_ours = _is_large(x, weight) or native.fits(x, weight)
    return _any(x, weight, bias, True) if is_ours else F.linear(x, weight, bias)


def linear_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The same without the extension."""
    return _any(x, weight, bias, False) if _is_large(x, weight) else F.linear(x, weight, bias)


def product(a: Tensor, b: Tensor, bias: Tensor | None = None, *, use_native: bool = True) -> Tensor:
    """a (t, k) times b (n, k) transposed, plus bias (n,), in any layout; not differentiable.

    The three products of a layer, weight w and gradient g of its output: `product(x, w)`,
    `product(g, w.t())` for x and `product(g.t(), x.t())` for w.
    """
    if use_native and native.fits(a, b) and not _is_better_by_library(a, b):
        out = a.new_empty(len(a), len(b))
        native.multiply(a, b, out, bias=None if bias is None else bias.float())
        return out
    if not (_HAS_ONEDNN and _is_large(a, b)):
        return F.linear(a, b, bias)
    if len(b) < _NARROW and len(a) > len(b) and a.stride(1) != 1 and bias is None:
        return _onednn(b, a).t().contiguous()
    return _onednn(a, b, bias)


def is_by_native(rows: int, weight: Tensor) -> bool:
    """Whether all three products of so many rows with this weight are by our kernel."""
    return (
        rows >= _FEW_ROWS
        and rows * weight.numel() >= _LEAST_PRODUCTS
        and weight.device.type == "cpu"
        and weight.dtype == torch.float32
    )


def add_product_(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Add `product(a, b)` to out (t, n), whose rows are contiguous."""
    if native.fits(a, b):
        native.multiply(a, b, out, accumulate=True)
    else:
        out += product(a, b)


def _is_better_by_library(a: Tensor, b: Tensor) -> bool:
    if a.dtype == torch.bfloat16:
        return len(a) < _FEW_OF_BFLOAT16 or len(b) < _FEW_COLUMNS
    in_rows = a.stride(1) == 1 and b.stride(1) == 1
    return _HAS_ONEDNN and in_rows and len(a) < _FEW_ROWS


def _onednn(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")


def _is_large(a: Tensor, b: Tensor) -> bool:
    return (
        a.device.type == "cpu"
        and a.dtype == b.dtype == torch.float32
        and a.numel() * len(b) >= _LEAST_PRODUCTS
    )


def _any(x: Tensor, weight: Tensor, bias: Tensor | None, use_native: bool) -> Tensor:
    if not readable(x):
        return _linear(x, weight, bias, use_native)
    given = (x, weight) if bias is None else (x, weight, bias)
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        return cast(Tensor, _Linear.apply(x, weight, bias, use_native))
    return _run(x, weight, bias, use_native)


def _run(x: Tensor, weight: Tensor, bias: Tensor | None, use_native: bool) -> Tensor:
    bias = None if bias is None else bias.contiguous()
    y = product(x.flatten(0, -2), weight, bias, use_native=use_native)
    return y.view(*x.shape[:-1], len(weight))


class _Linear(torch.autograd.Function):
    """The same as the operation `_linear`, at a third of its cost for each call."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, use_native: bool
    ) -> Tensor:
        _save(ctx, (x, weight, bias, use_native), x)
        return _run(x, weight, bias, use_native)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _gradients_by(product, ctx, grads[0])


@torch.library.custom_op("blackmamba::linear", mutates_args=())
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, use_native: bool) -> Tensor:
    return _run(x, weight, bias, use_native)


@torch.library.custom_op("blackmamba::linear_product", mutates_args=())
def _product_op(a: Tensor, b: Tensor, use_native: bool) -> Tensor:
    return product(a, b, use_native=use_native)


@_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, use_native: bool) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@_product_op.register_fake
def _(a: Tensor, b: Tensor, use_native: bool) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[0]))


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None, bool], output: Tensor) -> None:
    x, weight, _, ctx.use_native = inputs
    ctx.save_for_backward(x, weight)


def _gradients(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
    def by_op(a: Tensor, b: Tensor, *, use_native: bool) -> Tensor:
        return _product_op(a, b, use_native)

    return _gradients_by(by_op, ctx, g)


def _gradients_by(
    multiply: Callable[..., Tensor], ctx: Any, g: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
    x, weight = ctx.saved_tensors
    needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
    rows, x_rows = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])
    return (
        multiply(rows, weight.t(), use_native=ctx.use_native).view(x.shape) if needs_x else None,
        multiply(rows.t(), x_rows.t(), use_native=ctx.use_native) if needs_weight else None,
        rows.sum(0) if needs_bias else None,
        None,
    )


_linear.register_autograd(_gradients, setup_context=_save)
