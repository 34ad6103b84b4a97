"""A few tokens' logits at a time; their gradients are taken at once: none is kept or redone.

Source: the idea of computing the gradient in the forward pass is that of Hsu et al. 2024 (Liger,
arXiv 2410.10989), section 3.2.
"""

import math
from typing import Any

import torch
from torch import Tensor

from blackmamba.ops import native
from blackmamba.ops.checks import readable, wide_dtype
from blackmamba.ops.linear import native as linear_native
from blackmamba.ops.linear import product

_CHUNK_BYTES = 1 << 24  # of the logits held at a time
_LEAST_CHUNK = 1024  # tokens; fewer make the products of long vocabularies slow
_COLUMNS = 2048  # of the vocabulary, whose weights' gradient is added up while in cache


def linear_cross_entropy_chunked(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    divisor: Tensor | None,
) -> Tensor:
    """`linear_cross_entropy` in chunks of tokens; softmax in float32, or float64 for float64."""
    return _run(x, weight, labels, bias, ignore_index, divisor, False)


def linear_cross_entropy_native(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    divisor: Tensor | None,
) -> Tensor:
    """The same, with loss and gradient of a chunk's logits in one pass over them."""
    return _run(x, weight, labels, bias, ignore_index, divisor, True)


def _run(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    divisor: Tensor | None,
    is_native: bool,
) -> Tensor:
    grad = torch.is_grad_enabled()
    needs = [grad and t is not None and t.requires_grad for t in (x, weight, bias)]
    return _forward(x, weight, labels, bias, ignore_index, divisor, needs, is_native)[0]


@torch.library.custom_op("blackmamba::linear_cross_entropy", mutates_args=())
def _forward(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    divisor: Tensor | None,
    needs: list[bool],
    is_native: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum over the divisor; its gradients by x, weight and bias, empty for those not needed."""
    factor = 1.0 if divisor is None else 1.0 / divisor.item() if divisor else math.inf
    wide = wide_dtype(x)
    needs_x, needs_weight, needs_bias = needs
    grad_x = x.new_empty(x.shape if needs_x else 0)
    rows = max(_LEAST_CHUNK, _CHUNK_BYTES // (x.dtype.itemsize * max(1, len(weight))))
    make = weight.new_empty if len(x) else weight.new_zeros
    sum_dtype = wide if len(x) > rows else x.dtype  # there is nothing to add to
    grad_weight = make(weight.shape if needs_weight else 0, dtype=sum_dtype)
    grad_bias = weight.new_zeros(len(weight) if needs_bias else 0, dtype=wide)
    narrow_weight = weight.to(x.dtype)
    narrow_bias = None if bias is None else bias.to(x.dtype)
    total = x.new_zeros((), dtype=wide)
    softmax = _softmax_native if is_native else _softmax_torch
    for start in range(0, len(x), rows):
        part = slice(start, start + rows)
        logits = product(x[part], narrow_weight, narrow_bias, use_native=is_native)
        loss, g = softmax(logits, labels[part], ignore_index, any(needs), factor)
        total += loss
        if needs_x:
            grad_x[part] = product(g, narrow_weight.t(), use_native=is_native)
        if needs_weight and is_native and linear_native.fits(g.t(), x[part].t()):
            linear_native.multiply(g.t(), x[part].t(), grad_weight, accumulate=start > 0)
        elif needs_weight:
            for column in range(0, len(weight), _COLUMNS):
                some = slice(column, column + _COLUMNS)
                found = product(g[:, some].t(), x[part].t(), use_native=is_native)
                grad_weight[some] = found if start == 0 else grad_weight[some].add_(found)
        if needs_bias:
            grad_bias += g.sum(0, dtype=wide)
    return (
        total if divisor is None else total / divisor,
        grad_x,
        grad_weight.to(weight.dtype),
        grad_bias if bias is None else grad_bias.to(bias.dtype),
    )


def _softmax_torch(
    logits: Tensor, labels: Tensor, ignore_index: int, gradient: bool, factor: float
) -> tuple[Tensor, Tensor]:
    """Sum of the losses, and the logits' gradient times a factor, in their dtype."""
    log_p = logits.to(wide_dtype(logits)).log_softmax(dim=-1)
    counted = labels != ignore_index
    label = labels.where(counted, labels.new_zeros(()))[:, None]
    loss = -log_p.gather(1, label)[:, 0].where(counted, log_p.new_zeros(())).sum()
    if not gradient:
        return loss, logits
    g = log_p.exp_()  # softmax - one-hot
    g.scatter_add_(1, label, g.new_full((), -1.0).expand_as(label))
    if factor != 1.0:
        g *= factor
    return loss, g.where(counted[:, None], g.new_zeros(())).to(logits.dtype)


def _softmax_native(
    logits: Tensor, labels: Tensor, ignore_index: int, gradient: bool, factor: float
) -> tuple[Tensor, Tensor]:
    """The same in one pass; the gradient takes the logits' memory."""
    losses = logits.new_empty(len(logits), dtype=torch.float32)
    labels = labels.contiguous()
    native.extension().softmax_cross_entropy(
        logits.data_ptr(),
        labels.data_ptr(),
        *logits.shape,
        ignore_index,
        gradient,
        factor,
        logits.dtype == torch.bfloat16,
        torch.get_num_threads(),
        losses.data_ptr(),
    )
    return losses.sum(), logits


@_forward.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    divisor: Tensor | None,
    needs: list[bool],
    is_native: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    bias_dtype = wide_dtype(x) if bias is None else bias.dtype
    return (
        x.new_empty((), dtype=wide_dtype(x)),
        x.new_empty(x.shape if needs[0] else 0),
        weight.new_empty(weight.shape if needs[1] else 0),
        weight.new_empty(weight.shape[0] if needs[2] else 0, dtype=bias_dtype),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.needs = inputs[6]
    ctx.set_materialize_grads(False)  # the gradients are outputs too, of which none is asked
    ctx.save_for_backward(*output[1:])


def _gradients(ctx: Any, g: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if g is None:
        return (None,) * 8
    is_done = readable(g) and g.item() == 1  # a mean's: nothing is left to multiply
    x, weight, bias = (
        (t if is_done else t * g.to(t.dtype)) if needed else None
        for t, needed in zip(ctx.saved_tensors, ctx.needs, strict=True)
    )
    return x, weight, None, bias, None, None, None, None


_forward.register_autograd(_gradients, setup_context=_save)
