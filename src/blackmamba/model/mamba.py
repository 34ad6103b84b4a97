"""The Mamba-1 layer: a state-space model whose dt, B and C depend on the token.

Letters: b batch, l sequence, m d_model, d d_inner, r dt_rank, n d_state, k d_conv.

Source: Gu and Dao 2023 (arXiv 2312.00752), section 3.4, figure 3 and algorithm 2; Lieber et al.
2024 (arXiv 2403.19887), section 6.4, for the norms of dt, B and C.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from blackmamba.config import ModelConfig
from blackmamba.model.linear import Linear
from blackmamba.model.norm import RMSNorm
from blackmamba.model.state import MambaState
from blackmamba.ops import causal_conv1d, mamba_mixer, selective_scan, selective_state_update
from blackmamba.ops.causal_conv1d import last_inputs
from blackmamba.ops.recompute import Recompute, not_kept
from blackmamba.ops.sequence import Pieces, inputs_before, selective_scan_of_pieces


class Mamba(nn.Module):
    """in_proj -> causal conv, SiLU -> dt, B, C of the token -> selective scan, gate -> out_proj."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        device: torch.device | None,
        dtype: torch.dtype,
        wide: torch.dtype,
    ):
        super().__init__()
        m, d, n, k, r = (
            config.d_model,
            config.d_inner,
            config.d_state,
            config.d_conv,
            config.dt_rank,
        )
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_proj = Linear(m, 2 * d, bias=config.linear_bias, **options)  # rows [x | z]
        self.conv_weight = nn.Parameter(torch.empty(d, k, **options))
        self.conv_bias = nn.Parameter(torch.empty(d, **options))
        self.x_proj = Linear(d, r + 2 * n, bias=False, **options)  # rows [dt | B | C]
        self.dt_proj = Linear(r, d, bias=False, **options)
        self.dt_bias = nn.Parameter(torch.empty(d, device=device, dtype=wide))
        self.A_log = nn.Parameter(torch.empty(d, n, device=device, dtype=wide))
        self.D = nn.Parameter(torch.empty(d, device=device, dtype=wide))
        self.out_proj = Linear(d, m, bias=config.linear_bias, **options)
        self.dt_norm: RMSNorm | None = None
        self.B_norm: RMSNorm | None = None
        self.C_norm: RMSNorm | None = None
        if config.mamba_norm:
            self.dt_norm, self.B_norm, self.C_norm = (
                RMSNorm(width, config.norm_eps, device=device, dtype=wide) for width in (r, n, n)
            )
        self.recompute: Recompute = "none"
        self._split = (r, n, n)
        self._conv_shape = (d, k - 1)
        self._ssm_shape = (d, n)

    def initial_state(self, batch_size: int, dtype: torch.dtype) -> MambaState:
        """No tokens read yet: zeros. `dtype` is that of the products."""
        return MambaState(
            conv=torch.zeros(batch_size, *self._conv_shape, device=self.D.device, dtype=dtype),
            ssm=torch.zeros(batch_size, *self._ssm_shape, device=self.D.device, dtype=self.D.dtype),
        )

    def forward(
        self,
        u: Tensor,
        state: MambaState | Pieces | None,
        lengths: Tensor | None,
        seq_idx: Tensor | None = None,
    ) -> tuple[Tensor, MambaState]:
        """Read a piece of each sequence.

        Args:
            u: (b, l, m).
            state: memory of what came before, None for nothing; or `Pieces`, if rows are cut over
                ranks: the previous rank has that memory, and all ranks read at the same time.
            lengths: (b,) int64, rows are right-padded; a pad neither decays nor feeds the state.
            seq_idx: (b, l), integers: which document of its row each token is of.
        Returns:
            (b, l, m) and the new memory.
        """
        xz = self.in_proj(u)
        is_whole = state is None and lengths is None and self.dt_norm is None
        if is_whole and isinstance(self.x_proj, Linear):  # pyright: ignore[reportUnnecessaryIsInstance] # or a quantised one
            y, state = self._mix(xz, seq_idx)
            return self.out_proj(y), state
        before, z = xz.chunk(2, dim=-1)
        if isinstance(state, Pieces):
            conv = inputs_before(before, self._conv_shape[1], state, seq_idx)
        else:
            conv = None if state is None else state.conv
        convolve = partial(
            causal_conv1d,
            before,
            self.conv_weight.to(xz.dtype),
            self.conv_bias.to(xz.dtype),
            initial_state=conv,
            lengths=lengths,
            seq_idx=seq_idx,
        )
        x, conv = convolve()
        with not_kept(x, lambda: convolve()[0], self.training and self.recompute == "cheap"):
            y, ssm = self._scanned(x, z, state, lengths, seq_idx)
        return self.out_proj(y), MambaState(conv, ssm)

    def _scanned(
        self,
        x: Tensor,
        z: Tensor,
        state: MambaState | Pieces | None,
        lengths: Tensor | None,
        seq_idx: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """From the convolution's output to out_proj's input, (b, l, d); and the scan's state."""
        dt, B, C = self.dt_B_C(x)
        dt = self.dt_proj(dt)
        if lengths is not None:  # softplus(-inf) = 0: exp(0 A) = 1 and 0 B x = 0 leave h as it is
            pad = torch.arange(x.shape[1], device=x.device) >= lengths[:, None]
            dt = dt.masked_fill(pad[:, :, None], -torch.inf)
        inputs = (x, dt, self.decay_rates(), B, C, self.D, z)
        options: dict[str, Any] = {"dt_bias": self.dt_bias, "dt_softplus": True, "seq_idx": seq_idx}
        if isinstance(state, Pieces):
            return selective_scan_of_pieces(*inputs, state, **options)
        return selective_scan(
            *inputs, initial_state=None if state is None else state.ssm, **options
        )

    def dt_B_C(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # noqa: N802 # the paper's names
        """What the scan takes from each token: dt (before dt_proj), B and C. From the convolution's
        output (..., d) to (..., r), (..., n) and (..., n)."""
        dt, B, C = self.x_proj(x).split(self._split, dim=-1)
        if self.dt_norm is None or self.B_norm is None or self.C_norm is None:
            return dt, B, C
        return self.dt_norm(dt), self.B_norm(B), self.C_norm(C)

    def _mix(self, xz: Tensor, seq_idx: Tensor | None) -> tuple[Tensor, MambaState]:
        """Everything from in_proj to out_proj, for whole sequences: (b, l, 2 d) to (b, l, d)."""
        d, memory = self._conv_shape
        y, ssm = mamba_mixer(
            xz,
            self.conv_weight.to(xz.dtype),
            self.conv_bias.to(xz.dtype),
            self.x_proj.weight.to(xz.dtype),
            self.dt_proj.weight.to(xz.dtype),
            self.dt_bias,
            self.decay_rates(),
            self.D,
            seq_idx=seq_idx,
            recompute=self.training and self.recompute == "cheap",
        )
        return y, MambaState(last_inputs(xz[..., :d], None, memory, None, seq_idx), ssm)

    def step(self, u: Tensor, state: MambaState) -> tuple[Tensor, MambaState]:
        """Read one token of each sequence: u (b, m) to (b, m), and the new memory."""
        x, z = self.in_proj(u).chunk(2, dim=-1)
        x, conv = causal_conv1d(
            x[:, None],
            self.conv_weight.to(x.dtype),
            self.conv_bias.to(x.dtype),
            initial_state=state.conv,
        )
        x = x[:, 0]
        dt, B, C = self.dt_B_C(x)
        y, ssm = selective_state_update(
            state.ssm,
            x,
            self.dt_proj(dt),
            self.decay_rates(),
            B,
            C,
            self.D,
            z,
            dt_bias=self.dt_bias,
            dt_softplus=True,
        )
        return self.out_proj(y), MambaState(conv, ssm)

    def decay_rates(self) -> Tensor:
        """A = -exp(A_log), (d, n), negative: the state can only decay."""
        return -torch.exp(self.A_log)
