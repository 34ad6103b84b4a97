"""Products of float32 on x86 CPUs by oneDNN, where torch would take MKL; else as torch does them.

On processors that MKL does not know as its maker's own, it leaves the wide vectors unused: a Zen 5
gives 200 GFLOP/s by MKL and 350 to 480 by oneDNN, of 505. Everything stays float32.
"""

import platform
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_HAS_ONEDNN = (
    platform.machine() in ("x86_64", "AMD64")
    and torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)
_LEAST_PRODUCTS = 1 << 20  # multiply-adds; below, a call costs more than it saves
_NARROW = 128  # columns below which a transposed left side should come out transposed


def linear_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`linear`; its gradients are the same kind of product."""
    if not _fits(x, weight, x.numel() * len(weight)):
        return F.linear(x, weight, bias)
    return _linear(x, weight, bias)


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a (t, k) times b (n, k) transposed, plus bias (n,), in any layout; not differentiable.

    The three products of a layer, weight w and gradient g of its output: `product(x, w)`,
    `product(g, w.t())` for x and `product(g.t(), x.t())` for w.
    """
    if not _fits(a, b, a.numel() * len(b)):
        return F.linear(a, b, bias)
    if len(b) < _NARROW and len(a) > len(b) and a.stride(1) != 1 and bias is None:
        return _onednn(b, a).t().contiguous()
    return _onednn(a, b, bias)


def _onednn(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")


def _fits(a: Tensor, b: Tensor, n_products: int) -> bool:
    return (
        _HAS_ONEDNN
        and n_products >= _LEAST_PRODUCTS
        and a.device.type == "cpu"
        and a.dtype == b.dtype == torch.float32
    )


@torch.library.custom_op("blackmamba::linear", mutates_args=())
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _onednn(x.flatten(0, -2), weight, bias).view(*x.shape[:-1], len(weight))


@torch.library.custom_op("blackmamba::linear_product", mutates_args=())
def _product_op(a: Tensor, b: Tensor) -> Tensor:
    return product(a, b)


@_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@_product_op.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[0]))


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight)


def _gradients(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    x, weight = ctx.saved_tensors
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad
    rows = g.reshape(-1, g.shape[-1])
    return (
        _product_op(rows, weight.t()).view(x.shape) if needs_x else None,
        _product_op(rows.t(), x.reshape(-1, x.shape[-1]).t()) if needs_weight else None,
        rows.sum(0) if needs_bias else None,
    )


_linear.register_autograd(_gradients, setup_context=_save)
