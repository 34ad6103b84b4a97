"""What `selective_scan` means: one `selective_state_update` after another."""

import torch
from torch import Tensor

from blackmamba.ops.checks import wide_dtype
from blackmamba.ops.selective_state_update.reference import selective_state_update_reference


def selective_scan_reference(
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
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Token by token; float64 in, float64 out: tests take that as exact."""
    wide = wide_dtype(x)
    if initial_state is None:
        state = x.new_zeros(x.shape[0], *A.shape, dtype=wide)
    else:
        state = initial_state.to(wide)
    outputs: list[Tensor] = []
    for t in range(x.shape[1]):
        if seq_idx is not None and t > 0:
            begins = seq_idx[:, t] != seq_idx[:, t - 1]  # another document
            state = state.masked_fill(begins[:, None, None], 0)
        z_t = None if z is None else z[:, t]
        y, state = selective_state_update_reference(
            state, x[:, t], dt[:, t], A, B[:, t], C[:, t], D, z_t, dt_bias, dt_softplus
        )
        outputs.append(y)
    return torch.stack(outputs, dim=1) if outputs else torch.zeros_like(x), state
