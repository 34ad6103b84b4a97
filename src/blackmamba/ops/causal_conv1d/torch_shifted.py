"""The convolution as k shifted multiply-adds, channels innermost; saves only its input."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from blackmamba.ops.checks import wide_dtype


def causal_conv1d_shifted(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    before: Tensor | None,
    seq_idx: Tensor | None,
    activation: str,
) -> Tensor:
    """`causal_conv1d` without its final state; computed in float32, or float64 for float64."""
    if before is None:
        before = x.new_zeros(x.shape[0], x.shape[2], weight.shape[1] - 1)
    return _forward(x, weight, bias, before, seq_idx, activation == "silu")


def _seen(x: Tensor, before: Tensor) -> Tensor:
    """All inputs (b, k - 1 + l, d), in the wide dtype."""
    return torch.cat((before.transpose(1, 2), x), dim=1).to(wide_dtype(x))


def _same_document(seq_idx: Tensor | None, k: int) -> list[Tensor | None]:
    """For each j < k, (b, l, 1): whether the input that weight[:, j] meets counts; None: all do."""
    if seq_idx is None:
        return [None] * k
    b, l = seq_idx.shape
    seen = torch.cat((seq_idx[:, :1].expand(b, k - 1), seq_idx), dim=1) if l else seq_idx
    return [(seen[:, j : j + l] == seq_idx)[:, :, None] for j in range(k)]


def _kept(value: Tensor, same: Tensor | None) -> Tensor:
    return value if same is None else value.where(same, value.new_zeros(()))


def _linear_part(
    seen: Tensor, same: list[Tensor | None], weight: Tensor, bias: Tensor | None
) -> Tensor:
    """(b, l, d) before the activation, in the wide dtype."""
    k = len(same)
    l = seen.shape[1] - (k - 1)
    rows = weight.to(seen.dtype).t().contiguous()
    y = seen[:, k - 1 :] * rows[k - 1]
    for j in range(k - 1):
        y.addcmul_(_kept(seen[:, j : j + l], same[j]), rows[j])
    if bias is not None:
        y += bias.to(y.dtype)
    return y


# custom operations, no autograd function: compiled by torch 2.11 that gave gradients of zero
@torch.library.custom_op("blackmamba::causal_conv1d_shifted", mutates_args=())
def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    before: Tensor,
    seq_idx: Tensor | None,
    silu: bool,
) -> Tensor:
    same = _same_document(seq_idx, weight.shape[1])
    y = _linear_part(_seen(x, before), same, weight, bias)
    return (F.silu(y) if silu else y).to(x.dtype)


@torch.library.custom_op("blackmamba::causal_conv1d_shifted_backward", mutates_args=())
def _backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    before: Tensor,
    seq_idx: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and before."""
    l, k = x.shape[1], weight.shape[1]
    seen, same = _seen(x, before), _same_document(seq_idx, k)
    g = grad_y.to(seen.dtype)
    if silu:
        g = torch.ops.aten.silu_backward(g, _linear_part(seen, same, weight, bias))
    rows = weight.to(g.dtype).t().contiguous()
    grad_seen, grad_rows = torch.zeros_like(seen), torch.empty_like(rows)
    product = torch.empty_like(g)
    for j in range(k):
        here = slice(j, j + l)
        grad_seen[:, here].addcmul_(_kept(g, same[j]), rows[j])
        grad_rows[j] = torch.mul(g, _kept(seen[:, here], same[j]), out=product).sum((0, 1))
    return (
        grad_seen[:, k - 1 :].to(x.dtype, copy=True),
        grad_rows.t().to(weight.dtype).contiguous(),
        g.sum((0, 1)).to(weight.dtype if bias is None else bias.dtype),
        grad_seen[:, : k - 1].transpose(1, 2).to(before.dtype).contiguous(),
    )


@_forward.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_backward.register_fake
def _(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    before: Tensor,
    seq_idx: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    like_bias = weight.new_empty(weight.shape[0]) if bias is None else bias
    return (
        x.new_empty(x.shape),
        weight.new_empty(weight.shape),
        like_bias.new_empty(like_bias.shape),
        before.new_empty(before.shape),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # once: a checkpointed layer computes them when they are asked for
    x, weight, bias, before = _backward(grad_y, *saved, ctx.silu)
    return x, weight, None if saved[2] is None else bias, before, None, None


_forward.register_autograd(_gradients, setup_context=_save)
