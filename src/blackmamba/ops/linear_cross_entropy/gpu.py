"""Thousands of tokens' logits at a time: the library's products and one kernel between them.

As `chunked` does on the CPU, the gradients are computed with the loss: no logits are kept and no
product is done twice. The weight's gradient is added up in float32 inside of the product.
"""

from typing import Any

import torch
from torch import Tensor

_CHUNK_BYTES = 1 << 29  # of the logits held at a time
_LEAST_CHUNK = 128  # tokens


def linear_cross_entropy_triton(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    divisor: Tensor | None,
) -> Tensor:
    """`linear_cross_entropy`; logits in x's dtype, softmax in float32."""
    grad = torch.is_grad_enabled()
    needs = [grad and t is not None and t.requires_grad for t in (x, weight, bias)]
    total = _forward(x, weight, labels, bias, ignore_index, needs)[0]
    return total if divisor is None else total / divisor


@torch.library.custom_op("blackmamba::linear_cross_entropy_triton", mutates_args=())
def _forward(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum, and its gradients by x, weight and bias; empty for those that are not needed."""
    from blackmamba.ops.linear_cross_entropy.kernels import softmax_cross_entropy_

    needs_x, needs_weight, needs_bias = needs
    (t, m), v = x.shape, len(weight)
    x, labels = x.contiguous(), labels.contiguous()
    narrow = weight.to(x.dtype).contiguous()
    narrow_bias = None if bias is None else bias.to(x.dtype)
    rows = chunk_rows(v, x.dtype)
    wide: dict[str, Any] = {"dtype": torch.float32}
    logits = x.new_empty(min(rows, t), v)
    losses = x.new_empty(t, **wide)
    grad_x = x.new_empty(x.shape if needs_x else 0)
    grad_weight = (x.new_empty if t else x.new_zeros)((v, m) if needs_weight else 0, **wide)
    grad_bias = x.new_zeros(v if needs_bias else 0, **wide)
    for start in range(0, t, rows):
        part = slice(start, min(t, start + rows))
        g = logits[: part.stop - start]
        if narrow_bias is None:
            torch.mm(x[part], narrow.t(), out=g)
        else:
            torch.addmm(narrow_bias, x[part], narrow.t(), out=g)
        softmax_cross_entropy_(g, labels[part], losses[part], ignore_index, any(needs))
        if needs_x:
            torch.mm(g, narrow, out=grad_x[part])
        if needs_weight:
            _add_product(grad_weight, g.t(), x[part], beta=0 if start == 0 else 1)
        if needs_bias:
            grad_bias += g.sum(0, dtype=torch.float32)
    bias_dtype = torch.float32 if bias is None else bias.dtype
    return losses.sum(), grad_x, grad_weight.to(weight.dtype), grad_bias.to(bias_dtype)


def chunk_rows(v: int, dtype: torch.dtype) -> int:
    """Tokens of a chunk: a power of 2, so that usual batches are cut evenly."""
    rows = _CHUNK_BYTES // (dtype.itemsize * max(1, v))
    return max(_LEAST_CHUNK, 1 << max(0, rows.bit_length() - 1))


def _add_product(total: Tensor, a: Tensor, b: Tensor, *, beta: int) -> None:
    """total = beta total + a @ b; total is float32, a and b may be narrower. 0 reads no total."""
    if a.dtype == torch.float32:
        total.addmm_(a, b, beta=beta)
    elif a.device.type == "cuda" and torch.version.hip is None:
        torch.ops.aten.addmm.dtype_out(total, a, b, torch.float32, beta=beta, out=total)
    elif beta:
        total += torch.mm(a, b)
    else:
        total.copy_(torch.mm(a, b))


@_forward.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        x.new_empty((), dtype=torch.float32),
        x.new_empty(x.shape if needs[0] else 0),
        weight.new_empty(weight.shape if needs[1] else 0),
        weight.new_empty(
            weight.shape[0] if needs[2] else 0, dtype=torch.float32 if bias is None else bias.dtype
        ),
    )


@torch.library.custom_op("blackmamba::scaled_triton", mutates_args=())
def _scaled(x: Tensor, factor: Tensor) -> Tensor:
    from blackmamba.ops.linear_cross_entropy.kernels import scaled

    return scaled(x, factor)


@_scaled.register_fake
def _(x: Tensor, factor: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.needs = inputs[5]
    ctx.set_materialize_grads(False)  # the gradients are outputs too, of which none is asked
    ctx.save_for_backward(*output[1:])


def _gradients(ctx: Any, g: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    x, weight, bias = (
        _scaled(t, g) if needed and g is not None else None
        for t, needed in zip(ctx.saved_tensors, ctx.needs, strict=True)
    )
    return x, weight, None, bias, None, None


_forward.register_autograd(_gradients, setup_context=_save)
