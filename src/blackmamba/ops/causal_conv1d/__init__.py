"""Depthwise causal convolution along time, with the memory that continues it."""

from typing import Literal

import torch
from torch import Tensor

from blackmamba.errors import InputError
from blackmamba.ops.backend import Backend, Implementations
from blackmamba.ops.causal_conv1d.gpu import causal_conv1d_gpu
from blackmamba.ops.causal_conv1d.native import causal_conv1d_native
from blackmamba.ops.causal_conv1d.reference import causal_conv1d_reference
from blackmamba.ops.causal_conv1d.torch_shifted import causal_conv1d_shifted
from blackmamba.ops.checks import (
    check_any_integers,
    check_dims,
    check_floating,
    check_integers,
    check_shapes,
)
from blackmamba.ops.documents import documents

_IMPLEMENTATIONS = Implementations(
    "causal_conv1d",
    {
        "native": causal_conv1d_native,
        "triton": causal_conv1d_gpu,
        "torch": causal_conv1d_shifted,
        "reference": causal_conv1d_reference,
    },
)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    lengths: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    activation: Literal["silu", "none"] = "silu",
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """y_t = act(sum_j weight[:, j] x_{t - (k - 1) + j} + bias), each channel by itself.

    Args:
        x: (b, l, d), any floating-point dtype; l may be 0.
        weight: (d, k); weight[:, -1] meets the newest input.
        bias: (d,).
        initial_state: (b, d, k - 1), the inputs before x, oldest first; None: zeros.
        lengths: (b,) int64, 0 .. l: rows are right-padded and only so many inputs are real.
        seq_idx: (b, l), any integer dtype, which document each input is of: to an output, inputs of
            another document are zeros. initial_state is of the row's first document.
        cu_seqlens: the same of a single row, by where documents end: (documents + 1,), any integer
            dtype, rising from 0 to l.
        activation: "silu" or "none".
        backend: see ops/backend.py.
    Returns:
        y: (b, l, d), in x's dtype.
        final_state: (b, d, k - 1), the last k - 1 real inputs, oldest first, in x's dtype; with
            seq_idx, zeros for those that are not of the last real input's document.
    Raises:
        InputError: a shape or dtype is wrong, a length is out of range (checked on CPU), k is 0, or
            an unknown activation.
        BackendError: `backend` cannot run.
    Source:
        Gu and Dao 2023 (arXiv 2312.00752), section 3.4 and figure 3.
    """
    name = "causal_conv1d"
    check_dims(name, "x", x, "bld")
    check_dims(name, "weight", weight, "dk")
    check_floating(name, x=x, weight=weight, bias=bias, initial_state=initial_state)
    seq_idx = documents(name, x, seq_idx, cu_seqlens)
    if seq_idx is not None:
        check_any_integers(name, "seq_idx", seq_idx)
    b, l, d = x.shape
    k = weight.shape[1]
    if k == 0:
        raise InputError(f"{name}: weight has shape {tuple(weight.shape)}, k must be at least 1")
    check_shapes(
        name,
        weight=(weight, (d, k)),
        bias=(bias, (d,)),
        initial_state=(initial_state, (b, d, k - 1)),
        lengths=(lengths, (b,)),
        seq_idx=(seq_idx, (b, l)),
    )
    if lengths is not None:
        check_integers(name, "lengths", lengths, l)
    if activation not in ("silu", "none"):
        raise InputError(f"{name}: activation={activation!r}, must be 'silu' or 'none'")
    before = None if initial_state is None else initial_state.to(x.dtype)
    run = _IMPLEMENTATIONS.pick(backend, x, weight, bias)
    y = run(x, weight, bias, before, seq_idx, activation)
    return y, last_inputs(x, before, k - 1, lengths, seq_idx)


def last_inputs(
    x: Tensor,
    before: Tensor | None,
    memory: int,
    lengths: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> Tensor:
    """(b, d, memory): the final state; reaches back into `before` where x (b, l, d) is too short.

    The arguments are those of `causal_conv1d`, with memory = k - 1.
    """
    b, l, d = x.shape
    plain = lengths is None and seq_idx is None
    if plain and l >= memory:
        return x[:, l - memory :].transpose(1, 2).contiguous()
    if before is None:
        before = x.new_zeros(b, d, memory)
    if plain or l == 0:
        return torch.cat((before[:, :, l:], x.transpose(1, 2)), dim=2)
    seen = torch.cat((before, x.transpose(1, 2)), dim=2)  # input t of x stands at memory + t
    ends = x.new_full((b,), l, dtype=torch.int64) if lengths is None else lengths
    places = ends[:, None] + torch.arange(memory, device=x.device)
    state = seen.gather(2, places[:, None].expand(b, d, memory))
    if seq_idx is None:
        return state
    seen_idx = torch.cat((seq_idx[:, :1].expand(b, memory), seq_idx), dim=1)
    last = seq_idx.gather(1, (ends - 1).clamp(min=0)[:, None])
    return state.where((seen_idx.gather(1, places) == last)[:, None], state.new_zeros(()))
