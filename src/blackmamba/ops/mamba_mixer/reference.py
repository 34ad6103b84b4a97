"""What `mamba_mixer` means: other operations in turn."""

from torch import Tensor

from blackmamba.ops.causal_conv1d import causal_conv1d
from blackmamba.ops.linear import linear
from blackmamba.ops.recompute import not_kept
from blackmamba.ops.selective_scan import selective_scan


def mamba_mixer_reference(
    xz: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    seq_idx: Tensor | None,
    recompute: bool,
) -> tuple[Tensor, Tensor]:
    """Each of them by its own fastest backend; float64 in, float64 out."""
    before, z = xz.chunk(2, dim=-1)
    x, _ = causal_conv1d(before, conv_weight, conv_bias, seq_idx=seq_idx)
    r, n = dt_proj.shape[1], A.shape[1]

    def again() -> Tensor:
        return causal_conv1d(before, conv_weight, conv_bias, seq_idx=seq_idx)[0]

    with not_kept(x, again, recompute):
        dt, B, C = linear(x, x_proj).split((r, n, n), dim=-1)
        dt = linear(dt, dt_proj)
        return selective_scan(
            x, dt, A, B, C, D, z, dt_bias=dt_bias, dt_softplus=True, seq_idx=seq_idx
        )
