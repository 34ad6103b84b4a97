"""What `selective_state_update` means. Float64 in, float64 out: tests take that as exact."""

import torch
from torch import Tensor
from torch.nn import functional as F


def selective_state_update_reference(
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
    """The recurrence as it is written; computed in the state's dtype."""
    dtype, wide = x.dtype, state.dtype
    x, dt, A, B, C = (t.to(wide) for t in (x, dt, A, B, C))
    if dt_bias is not None:
        dt = dt + dt_bias.to(wide)
    delta_bd = F.softplus(dt) if dt_softplus else dt

    decay_bdn = torch.exp(delta_bd[:, :, None] * A)
    drive_bdn = (delta_bd * x)[:, :, None] * B[:, None, :]
    state_bdn = decay_bdn * state + drive_bdn
    y_bd = (state_bdn * C[:, None, :]).sum(-1)
    if D is not None:
        y_bd = y_bd + D.to(wide) * x
    if z is not None:
        y_bd = y_bd * F.silu(z.to(wide))
    return y_bd.to(dtype), state_bdn
