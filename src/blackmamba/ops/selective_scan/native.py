"""The selective scan in C++ (cpu.cpp), with its gradient.

Letters: b batch, l sequence, d d_inner, n d_state.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from blackmamba.ops.checks import readable
from blackmamba.ops.native import extension

CHUNK = 16
"""Tokens between the states that the forward pass keeps: scan_chunk in cpu.hpp."""

FLOPS_PER_ELEMENT = (18, 32)
"""Forward and backward operations for each of b * l * d * n; cpu.hpp has the count."""


def selective_scan_native(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`selective_scan`, computed in float32; inputs of one dtype are read as they lie in memory."""
    dtype = x.dtype
    if any(t is not None and t.dtype != dtype for t in (dt, B, C, z)):
        x, dt, B, C = (t.float() for t in (x, dt, B, C))
        z = None if z is None else z.float()
    A = A.float()
    D, dt_bias, initial_state = (
        None if t is None else t.float() for t in (D, dt_bias, initial_state)
    )
    if seq_idx is not None:
        seq_idx = seq_idx.to(torch.int64)
    present = (x, dt, A, B, C, D, z, dt_bias, initial_state)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in present)
    if not readable(x):
        y, final_state, _ = _forward(*present, seq_idx, dt_softplus, keep)
    elif keep:
        y, final_state = _Scan.apply(*present, seq_idx, dt_softplus, keep)  # pyright: ignore
    else:
        y, final_state, _ = _run(*present, seq_idx, dt_softplus, keep)
    return y.to(dtype), final_state


class _Scan(torch.autograd.Function):
    """The same as the operation `_forward`, at a third of its cost for each call."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        y, final_state, starts = _run(*inputs)
        _save(ctx, inputs, (y, final_state, starts))
        return y, final_state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore
        saved = ctx.saved_tensors
        grads = _run_backward(*(*grad_outputs, *saved, ctx.dt_softplus))
        return *_of_present(grads, saved), None, None, None


class _Call:
    """What the forward and the backward pass hand to the extension alike."""

    def __init__(
        self,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        dt_bias: Tensor | None,
        initial_state: Tensor | None,
        seq_idx: Tensor | None,
        dt_softplus: bool,
    ):
        rows = [_rows(t) for t in (x, dt, B, C, z)]
        whole = [_contiguous(t) for t in (A, D, dt_bias, initial_state, seq_idx)]
        self._kept = (rows, whole)  # as long as their addresses are in use
        x_, dt_, B_, C_, z_ = (_view(t) for t in rows)
        A_, D_, bias_, state_, seq_ = (_address(t) for t in whole)
        self.arguments = (
            (*x.shape, A.shape[1]),
            (x_, dt_, A_, B_, C_, D_, z_, bias_, state_, seq_),
            x.dtype == torch.bfloat16,
            dt_softplus,
            torch.get_num_threads(),
        )


def _rows(tensor: Tensor | None) -> Tensor | None:
    """The tensor with its last dimension contiguous."""
    if tensor is None or tensor.shape[-1] < 2 or tensor.stride(-1) == 1:
        return tensor
    return tensor.contiguous()


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _view(tensor: Tensor | None) -> tuple[int, int, int]:
    return (0, 0, 0) if tensor is None else (tensor.data_ptr(), tensor.stride(0), tensor.stride(1))


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _run(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    dt_softplus: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the final state and, if `keep`, each chunk's first state for the backward pass."""
    call = _Call(x, dt, A, B, C, D, z, dt_bias, initial_state, seq_idx, dt_softplus)
    y, final_state, starts = _outputs(x, A, keep)
    if keep and x.shape[2] % 16:
        starts[:, :, -1].zero_()  # narrow vectors leave padding unwritten
    extension().selective_scan(
        *call.arguments, y.data_ptr(), final_state.data_ptr(), starts.data_ptr() if keep else 0
    )
    return y, final_state, starts


def _outputs(x: Tensor, A: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for what `_forward` returns."""
    (b, l, d), n = x.shape, A.shape[1]
    starts = (b, -(-l // CHUNK), -(-d // 16), 16 * n) if keep else (0,)
    return x.new_empty(x.shape), A.new_empty(b, d, n), A.new_empty(starts)


def _run_backward(
    grad_y: Tensor,
    grad_final: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    starts: Tensor,
    dt_softplus: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, A, B, C, D, z, dt_bias and initial_state; empty for absent inputs."""
    inputs = (x, dt, A, B, C, D, z, dt_bias, initial_state, seq_idx)
    grad_z = x.new_empty(0) if z is None else z.new_empty(z.shape)
    return backward_into(grad_z, grad_y, grad_final, *inputs, starts, dt_softplus)


def backward_into(
    grad_z: Tensor,
    grad_y: Tensor,
    grad_final: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    starts: Tensor,
    dt_softplus: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The same, with z's gradient written into `grad_z`, whose rows need be contiguous alone."""
    call = _Call(x, dt, A, B, C, D, z, dt_bias, initial_state, seq_idx, dt_softplus)
    grad_y, grad_final = _rows(grad_y), grad_final.contiguous()  # pyright: ignore[reportAssignmentType]
    grads = _gradients_of(x, dt, A, B, C, D, None, dt_bias, grad_final)
    gx, gdt, gA, gB, gC, gD, _, g_bias, g_state = (t.data_ptr() for t in grads)
    of_z = _view(None if z is None else grad_z)
    extension().selective_scan_backward(
        *call.arguments,
        starts.data_ptr(),
        _view(grad_y),
        grad_final.data_ptr(),
        (gx, gdt, gB, gC, of_z),
        (gA, gD, g_bias, g_state),
    )
    g_x, g_dt, g_A, g_B, g_C, g_D, _, g_dt_bias, g_state = grads
    return g_x, g_dt, g_A, g_B, g_C, g_D, grad_z, g_dt_bias, g_state


def _gradients_of(*inputs: Tensor | None) -> Any:
    """Contiguous memory for each gradient; no numbers where the input is absent."""
    present = inputs[0]
    assert present is not None
    return tuple(present.new_empty(0) if t is None else t.new_empty(t.shape) for t in inputs)


def _of_present(grads: Iterable[Tensor], inputs: Sequence[Tensor | None]) -> list[Tensor | None]:
    """None as the gradient of each absent input."""
    return [None if t is None else g for g, t in zip(grads, inputs, strict=False)]


# ---- what autograd, torch.compile and fake tensors need to know ----------------------------------

_forward = torch.library.custom_op("blackmamba::selective_scan_native", _run, mutates_args=())
_backward = torch.library.custom_op(
    "blackmamba::selective_scan_native_backward", _run_backward, mutates_args=()
)


@_forward.register_fake
def _(x: Tensor, dt: Tensor, A: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(x, A, rest[-1])


@_backward.register_fake
def _(grad_y: Tensor, grad_final: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return _gradients_of(*rest[:8], grad_final)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, dt_softplus, _ = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.dt_softplus = dt_softplus


def _save_and_mark(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _save(ctx, inputs, output)
    ctx.mark_non_differentiable(output[2])


def _gradients(ctx: Any, grad_y: Tensor, grad_final: Tensor, _: Tensor) -> tuple[Any, ...]:
    saved = ctx.saved_tensors  # once: a checkpointed layer computes them when they are asked for
    grads = _backward(grad_y, grad_final, *saved, ctx.dt_softplus)
    return *_of_present(grads, saved), None, None, None


_forward.register_autograd(_gradients, setup_context=_save_and_mark)
