"""One token of the selective scan in C++ (cpu.cpp). It has no gradient."""

from typing import Any

import torch
from torch import Tensor

from blackmamba.ops.checks import readable
from blackmamba.ops.native import extension


def selective_state_update_native(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
) -> tuple[Tensor, Tensor]:
    """`selective_state_update`, computed in float32."""
    # an operation that torch knows of costs several times what a call does
    run = _update if readable(x) else _operation
    return run(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)


def _update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
) -> tuple[Tensor, Tensor]:
    dtype = x.dtype
    tokens = (x, dt, B, C) if z is None else (x, dt, B, C, z)
    if any(t.dtype != dtype for t in tokens):
        tokens = tuple(t.float() for t in tokens)
    tokens = tuple(t if t.stride(1) == 1 or t.shape[1] < 2 else t.contiguous() for t in tokens)
    state_in, *whole = (
        None if t is None else t.float().contiguous() for t in (state, A, D, dt_bias)
    )
    assert state_in is not None
    A_, D_, bias_ = (0 if t is None else t.data_ptr() for t in whole)
    x_, dt_, B_, C_, *z_ = ((t.data_ptr(), t.stride(0)) for t in tokens)
    y = tokens[0].new_empty(x.shape)
    new_state = state_in.new_empty(state.shape)
    extension().selective_state_update(
        tuple(state.shape),
        y.dtype == torch.bfloat16,
        dt_softplus,
        torch.get_num_threads(),
        state_in.data_ptr(),
        x_,
        dt_,
        A_,
        B_,
        C_,
        D_,
        z_[0] if z_ else (0, 0),
        bias_,
        y.data_ptr(),
        new_state.data_ptr(),
    )
    return y.to(dtype), new_state.to(state.dtype)


_operation = torch.library.custom_op(
    "blackmamba::selective_state_update_native", _update, mutates_args=()
)


@_operation.register_fake
def _(state: Tensor, x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), state.new_empty(state.shape)
