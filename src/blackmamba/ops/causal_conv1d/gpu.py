"""The causal convolution on the GPU: launches of kernels.py, and what autograd needs to know.

Letters: b batch, l sequence, d d_inner, k width.
"""

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from blackmamba.ops.gpu import tuning


@dataclasses.dataclass(frozen=True)
class Cut:
    """How a pass is cut into programs."""

    block: int
    """Channels of a program."""
    warps: int
    unrolled: int
    """Tokens whose loads are under way at once."""
    chunk: int
    """Tokens of a program."""


FORWARD = Cut(block=128, warps=1, unrolled=8, chunk=64)
FORWARD_OF_FEW = Cut(block=128, warps=1, unrolled=8, chunk=16)
FEW_FORWARD = 8192
BACKWARD = Cut(block=128, warps=1, unrolled=4, chunk=64)
BACKWARD_OF_FEW = Cut(block=64, warps=1, unrolled=8, chunk=32)
FEW_BACKWARD = 2048
"""Programs that are too few to hide how long memory takes. Chosen by measuring on an H200."""
FORWARD_CUTS = (
    *(Cut(block, warps, 8, chunk)
      for block, warps in ((64, 1), (128, 1), (256, 2), (512, 4))
      for chunk in (16, 32, 64, 128)),
    Cut(128, 1, 4, 64), Cut(128, 1, 16, 64), Cut(256, 1, 4, 64),
)  # fmt: skip
BACKWARD_CUTS = tuple(
    Cut(block, warps, unrolled, chunk)
    for block, warps in ((64, 1), (128, 1), (128, 2), (256, 2), (256, 4))
    for unrolled in (4, 8)
    for chunk in (32, 64)
)
"""What `blackmamba tune` tries."""


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
    if x.numel():
        _run_forward(_Kept(x, weight, bias, before, seq_idx, silu), y, y, y)
    return y


def forward_of_prompt(
    x: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor | None, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`causal_conv1d` with SiLU and its final state, of rows that are not empty, in one launch and
    without a gradient; `before` is in x's dtype."""
    (b, _, d), k = x.shape, weight.shape[1]
    y, last = x.new_empty(x.shape), x.new_empty(b, d, k - 1)
    flags = {"LAST": True, "HAS_LENGTHS": lengths is not None}
    kept = _Kept(x, weight, bias, before, None, True)
    _run_forward(kept, y, last, y if lengths is None else lengths, **flags)
    return y, last


def _run_forward(kept: "_Kept", y: Tensor, last: Tensor, lengths: Tensor, **flags: bool) -> None:
    _, l, d = y.shape

    def run(cut: Cut) -> None:
        _kernels().conv1d_forward_kernel[kept.grid(cut)](
            *kept.tensors, y, last, lengths, l, d, cut.chunk, *kept.strides,
            **kept.flags, **flags, **_sizes(cut),
        )  # fmt: skip

    is_few = math.prod(kept.grid(FORWARD)) < FEW_FORWARD
    default = FORWARD_OF_FEW if is_few else FORWARD
    name = "causal_conv1d forward"
    run(tuning.pick(name, kept.size(), default, lambda: FORWARD_CUTS, run))


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

    def run(cut: Cut) -> None:
        grid = kept.grid(cut)
        sums = x.new_empty(b * grid[1], k + 1, d, dtype=torch.float32)
        _kernels().conv1d_backward_kernel[grid](
            *kept.tensors,
            grad_y,
            grad_x,
            grad_before,
            sums,
            l,
            d,
            cut.chunk,
            *kept.strides,
            *grad_y.stride()[:2],
            *grad_x.stride()[:2],
            **kept.flags,
            **_sizes(cut),
        )
        total = sums.sum(0)
        grad_weight.copy_(total[:k].t())
        if bias is not None:
            grad_bias.copy_(total[k])

    is_few = math.prod(kept.grid(BACKWARD)) < FEW_BACKWARD
    default = BACKWARD_OF_FEW if is_few else BACKWARD
    name = "causal_conv1d backward"
    run(tuning.pick(name, kept.size(), default, lambda: BACKWARD_CUTS, run))


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

    def grid(self, cut: Cut) -> tuple[int, int, int]:
        b, l, d = self._size
        return math.ceil(d / cut.block), math.ceil(l / cut.chunk), b

    def size(self) -> str:
        """What the best cut depends on."""
        b, l, d = self._size
        n_bytes = self.tensors[0].element_size()
        return f"b={tuning.rounded(b)} l={tuning.rounded(l)} d={d} bytes={n_bytes}"


def _sizes(cut: Cut) -> dict[str, int]:
    return {"BD": cut.block, "U": cut.unrolled, "num_warps": cut.warps}


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
