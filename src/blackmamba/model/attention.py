"""Causal self-attention with rotary positions and grouped heads, for the baselines of the paper.

Letters: b batch, l sequence, m d_model, q query heads, g key and value heads, h d_head, s
positions.

Source: Vaswani et al. 2017 (arXiv 1706.03762), eq. 1; Su et al. 2021 (arXiv 2104.09864), eq. 34;
Ainslie et al. 2023 (arXiv 2305.13245).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blackmamba.config import ModelConfig
from blackmamba.model.linear import Linear
from blackmamba.model.state import AttentionState
from blackmamba.ops import rotary


class Attention(nn.Module):
    """softmax(Q K^T / sqrt(h)) V over the tokens so far."""

    def __init__(self, config: ModelConfig, *, device: torch.device | None, dtype: torch.dtype):
        super().__init__()
        self.n_heads, self.n_kv_heads, self.d_head = (
            config.n_heads,
            config.n_kv_heads,
            config.d_head,
        )
        self.rope_theta = config.rope_theta
        m, bias = config.d_model, config.linear_bias
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.q_proj = Linear(m, self.n_heads * self.d_head, bias=bias, **options)
        self.k_proj = Linear(m, self.n_kv_heads * self.d_head, bias=bias, **options)
        self.v_proj = Linear(m, self.n_kv_heads * self.d_head, bias=bias, **options)
        self.out_proj = Linear(self.n_heads * self.d_head, m, bias=bias, **options)

    def initial_state(self, batch_size: int, dtype: torch.dtype) -> AttentionState:
        """No tokens read yet: no keys and no values."""
        device = self.out_proj.weight.device
        empty = torch.zeros(batch_size, self.n_kv_heads, 0, self.d_head, device=device, dtype=dtype)
        return AttentionState(
            empty, empty, torch.zeros(batch_size, device=device, dtype=torch.int64)
        )

    def forward(
        self,
        u: Tensor,
        state: AttentionState | None,
        lengths: Tensor | None,
        seq_idx: Tensor | None = None,
    ) -> tuple[Tensor, AttentionState]:
        """Read a piece of each sequence.

        Args:
            u: (b, l, m).
            state: keys and values of what came before, None for nothing.
            lengths: (b,) int64, rows are right-padded; a pad is overwritten by the next token.
            seq_idx: (b, l), integers: which document of its row each token is of: it sees no other,
                and positions begin anew. Then there is neither a state nor lengths.
        Returns:
            (b, l, m) and the new memory.
        """
        b, l, _ = u.shape
        fresh = state is None or state.keys.shape[2] == 0
        past = u.new_zeros(b, dtype=torch.int64) if state is None else state.lengths
        positions_bl = torch.arange(l, device=u.device)[None]  # for all rows alike
        if state is not None:
            positions_bl = past[:, None] + positions_bl
        starts_bl = None if seq_idx is None else _starts(seq_idx)
        if starts_bl is not None:
            positions_bl = positions_bl - starts_bl
        cos, sin = self._turns(positions_bl)
        q, k, v = (
            product(u).unflatten(-1, (n, self.d_head))
            for product, n in (
                (self.q_proj, self.n_heads),
                (self.k_proj, self.n_kv_heads),
                (self.v_proj, self.n_kv_heads),
            )
        )
        q, k = rotary(q, cos, sin), rotary(k, cos, sin)
        q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))

        if fresh:
            keys, values, mask = k, v, None
            if starts_bl is not None:  # a document begins where another has not
                mask = (starts_bl[:, :, None] == starts_bl[:, None]).tril()[:, None]
        else:
            assert state is not None
            keys = _append(state.keys, k, positions_bl)
            values = _append(state.values, v, positions_bl)
            seen = torch.arange(keys.shape[2], device=u.device)
            mask = (seen <= positions_bl[:, :, None])[:, None]  # (b, 1, l, s)
        y = F.scaled_dot_product_attention(
            q,
            keys,
            values,
            mask,
            is_causal=mask is None,
            enable_gqa=self.n_heads != self.n_kv_heads,
        )
        y = self.out_proj(y.transpose(1, 2).reshape(b, l, -1))
        return y, AttentionState(keys, values, past + (l if lengths is None else lengths))

    def step(self, u: Tensor, state: AttentionState) -> tuple[Tensor, AttentionState]:
        """Read one token of each sequence: u (b, m) to (b, m), and the new memory."""
        y, state = self.forward(u[:, None], state, None)
        return y[:, 0], state

    def _turns(self, positions_bl: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine of position * theta^(-2i/h) for pair i: (b or 1, l, h/2), float32."""
        half = self.d_head // 2
        powers = torch.arange(half, device=positions_bl.device, dtype=torch.float32) / half
        angles = positions_bl[:, :, None] * self.rope_theta**-powers
        return angles.cos(), angles.sin()


def _starts(seq_idx: Tensor) -> Tensor:
    """(b, l): where in its row the document of each token begins."""
    places = torch.arange(seq_idx.shape[1], device=seq_idx.device)
    begins = seq_idx != seq_idx.roll(1, dims=1)
    return (begins * places).cummax(dim=1).values  # the first token is at place 0 either way


def _append(cache: Tensor, new: Tensor, positions_bl: Tensor) -> Tensor:
    """(b, g, s, h) and (b, g, l, h) to (b, g, s + l, h): each row's new entries go to its own end.

    Rows may differ in length: what lies behind a row's end is masked out until it is overwritten.
    """
    b, g, l, h = new.shape
    room = torch.cat((cache, torch.zeros_like(new)), dim=2)
    return room.scatter(2, positions_bl[:, None, :, None].expand(b, g, l, h), new)
