"""Triton kernels of `linear_cross_entropy`: loss and gradient of rows of logits, in place.

Letters: t rows, v vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 8192  # logits of a row that are on chip at once
_WARPS = 16


@triton.jit
def _softmax_cross_entropy_kernel(
    logits_ptr, labels_ptr, losses_ptr, v, ignored,
    BLOCKS: tl.constexpr, BLOCK: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    # Owns a row. On chip: a block of it; maximum and sum of exponentials so far of every BLOCK-th
    # logit, so that threads meet once a row, not once a block.
    # Bytes: the row is read twice, the second time from the L2 cache (rows that are being worked
    # on take 27 MB), and written once. Bound: device memory.
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    logits_ptr += row * v
    label = tl.load(labels_ptr + row)
    if label == ignored:
        tl.store(losses_ptr + row, 0.0)
        if GRADIENT:
            zeros = tl.zeros((BLOCK,), logits_ptr.dtype.element_ty)
            for block in range(BLOCKS):
                at = block * BLOCK + columns
                tl.store(logits_ptr + at, zeros, mask=at < v)
    else:
        tops = tl.full((BLOCK,), -float("inf"), tl.float32)
        totals = tl.zeros((BLOCK,), tl.float32)
        for block in range(BLOCKS):
            at = block * BLOCK + columns
            logits = tl.load(logits_ptr + at, mask=at < v, other=-float("inf"))
            logits = logits.to(tl.float32) * 1.4426950408889634  # exp2 is the processor's own
            higher = tl.maximum(tops, logits)
            origin = tl.where(higher == -float("inf"), 0.0, higher)  # none is possible so far
            totals = totals * tl.exp2(tops - origin) + tl.exp2(logits - origin)
            tops = higher
        top = tl.max(tops, axis=0)
        origin = tl.where(top == -float("inf"), 0.0, top)
        total = tl.sum(totals * tl.exp2(tops - origin), axis=0)
        known = (label >= 0) & (label < v)  # others make the loss NaN
        chosen = tl.load(logits_ptr + label, mask=known, other=float("nan")).to(tl.float32)
        tl.store(losses_ptr + row, (top + tl.log2(total)) * 0.6931471805599453 - chosen)
        if GRADIENT:
            share = 1 / total
            tl.debug_barrier()  # no logit is written before every thread has the label's
            for block in range(BLOCKS):
                at = block * BLOCK + columns
                logits = tl.load(
                    logits_ptr + at, mask=at < v, other=-float("inf"), eviction_policy="evict_first"
                )
                p = tl.exp2(logits.to(tl.float32) * 1.4426950408889634 - origin) * share
                p -= tl.where(at == label, 1.0, 0.0)
                p = p.to(logits_ptr.dtype.element_ty)
                tl.store(logits_ptr + at, p, mask=at < v, eviction_policy="evict_first")


def softmax_cross_entropy_(
    logits: Tensor, labels: Tensor, losses: Tensor, ignored: int, gradient: bool
) -> None:
    """Write each row's loss, zero where its label is `ignored`, and put gradients over logits.

    Args:
        logits: (t, v), contiguous.
        labels: (t,) int64, contiguous.
        losses: (t,) float32, contiguous.
        ignored: a label.
        gradient: whether the logits become their gradients.
    """
    t, v = logits.shape
    if t:
        block = min(_BLOCK, triton.next_power_of_2(v))
        _softmax_cross_entropy_kernel[(t,)](
            logits, labels, losses, v, ignored,
            BLOCKS=triton.cdiv(v, block), BLOCK=block, GRADIENT=gradient,
            num_warps=min(_WARPS, max(1, block // 256)),
        )  # fmt: skip


@triton.jit
def _loss_scale_kernel(x_ptr, factor_ptr, y_ptr, n, BLOCK: tl.constexpr):
    # Owns BLOCK numbers; nothing stays on chip. Bytes: read once, written once. Bound: memory.
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n, other=0.0).to(tl.float32)
    y = x * tl.load(factor_ptr).to(tl.float32)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=at < n)


def scaled(x: Tensor, factor: Tensor) -> Tensor:
    """x times a scalar on its device, which is not rounded to x's dtype before."""
    x = x.contiguous()
    y = torch.empty_like(x)
    if x.numel():
        _loss_scale_kernel[(triton.cdiv(x.numel(), 2048),)](x, factor, y, x.numel(), BLOCK=2048)
    return y
