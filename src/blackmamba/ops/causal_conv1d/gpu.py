"""The causal convolution on the GPU: launches of kernels.py, and what autograd needs to know.

Letters: b batch, l sequence, d d_inner, k width.
"""

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What was chosen by measuring on an H100."""

    block: int
    """Channels of a program."""
    warps: int
    unrolled: int
    """Tokens whose loads are under way at once."""
    chunk: int
    """Tokens of a program."""


FORWARD = Tuning(block=128, warps=1, unrolled=8, chunk=64)
FORWARD_OF_FEW = Tuning(block=128, warps=1, unrolled=8, chunk=16)
FEW = 2048
"""Programs that are too few to hide how long memory takes."""
BACKWARD = Tuning(block=128, warps=2, unrolled=4, chunk=64)


def causal_conv1d_gpu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    before: Tensor | None,
    seq_idx: Tensor | None,
    activation: str,
) -> Tensor:
    """`causal_conv1d` without its final state, computed in float32; x is read as it lies in
    memory."""
    return _forward(x, weight, bias, before, seq_idx, activation == "silu")


@torch.library.custom_op("blackmamba::causal_conv1d_gpu", mutates_args=())
def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    before: Tensor | None,
    seq_idx: Tensor | None,
    silu: bool,
) -> Tensor:
    y = x.new_empty(x.shape)
    if x.numel() == 0:
        return y
    kept = _Kept(x, weight, bias, before, seq_idx, silu)
    _, l, d = x.shape
    tuning = FORWARD if math.prod(kept.grid(FORWARD)) >= FEW else FORWARD_OF_FEW
    _kernels().conv1d_forward_kernel[kept.grid(tuning)](
        *kept.tensors, y, l, d, tuning.chunk, *kept.strides, **kept.flags, **_sizes(tuning)
    )
    return y


@torch.library.custom_op("blackmamba::causal_conv1d_gpu_backward", mutates_args=())
def _backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    before: Tensor | None,
    seq_idx: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and before; empty for what is absent."""
    grads = _gradients_of(x, weight, bias, before)
    backward_into(grads, grad_y, x, weight, bias, before, seq_idx, silu)
    return grads


def backward_into(
    grads: tuple[Tensor, ...],
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    before: Tensor | None,
    seq_idx: Tensor | None,
    silu: bool,
) -> None:
    """Fill `grads`, of x, weight, bias and before in this order; of x's only the last dimension
    need be contiguous, so that it may be part of a wider gradient."""
    grad_x, grad_weight, grad_bias, grad_before = grads
    if x.numel() == 0:
        for grad in (grad_weight, grad_bias, grad_before):
            grad.zero_()
        return
    kept = _Kept(x, weight, bias, before, seq_idx, silu)
    grad_y = _rows(grad_y)
    (b, l, d), k = x.shape, weight.shape[1]
    grid = kept.grid(BACKWARD)
    sums = x.new_empty(b * grid[1], k + 1, d, dtype=torch.float32)
    _kernels().conv1d_backward_kernel[grid](
        *kept.tensors,
        grad_y,
        grad_x,
        grad_before,
        sums,
        l,
        d,
        BACKWARD.chunk,
        *kept.strides,
        *grad_y.stride()[:2],
        *grad_x.stride()[:2],
        **kept.flags,
        **_sizes(BACKWARD),
    )
    total = sums.sum(0)
    grad_weight.copy_(total[:k].t())
    if bias is not None:
        grad_bias.copy_(total[k])


class _Kept:
    """The inputs as the kernels take them."""

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        before: Tensor | None,
        seq_idx: Tensor | None,
        silu: bool,
    ):
        x, weight = _rows(x), weight.contiguous()
        bias = None if bias is None else bias.contiguous()
        before = None if before is None else before.contiguous()
        absent = weight
        self._size = x.shape
        self.tensors = (
            x,
            weight,
            absent if bias is None else bias,
            absent if before is None else before,
            absent if seq_idx is None else seq_idx,
        )
        self.strides = (*x.stride()[:2], *((0, 0) if seq_idx is None else seq_idx.stride()))
        self.flags = {
            "K": weight.shape[1],
            "HAS_BIAS": bias is not None,
            "HAS_BEFORE": before is not None,
            "HAS_SEQ": seq_idx is not None,
            "SILU": silu,
        }

    def grid(self, tuning: Tuning) -> tuple[int, int, int]:
        b, l, d = self._size
        return math.ceil(d / tuning.block), math.ceil(l / tuning.chunk), b


def _sizes(tuning: Tuning) -> dict[str, int]:
    return {"BD": tuning.block, "U": tuning.unrolled, "num_warps": tuning.warps}


def _kernels() -> Any:
    """kernels.py, whose language Python's types do not describe; triton is imported only now."""
    from blackmamba.ops.causal_conv1d import kernels

    return kernels


def _rows(tensor: Tensor) -> Tensor:
    """The tensor with its last dimension contiguous."""
    return tensor if tensor.shape[-1] < 2 or tensor.stride(-1) == 1 else tensor.contiguous()


def _gradients_of(*inputs: Tensor | None) -> Any:
    """Contiguous memory for each gradient; no numbers where the input is absent."""
    present = inputs[0]
    assert present is not None
    return tuple(present.new_empty(0) if t is None else t.new_empty(t.shape) for t in inputs)


# ---- what autograd, torch.compile and fake tensors need to know ----------------------------------


@_forward.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


@_backward.register_fake
def _(grad_y: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return _gradients_of(*rest[:4])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, grad_y: Tensor) -> tuple[Any, ...]:
    grads = _backward(grad_y, *ctx.saved_tensors, ctx.silu)
    kept = [None if t is None else g for g, t in zip(grads, ctx.saved_tensors[:4], strict=True)]
    return *kept, None, None


_forward.register_autograd(_gradients, setup_context=_save)
