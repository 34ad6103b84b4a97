"""Tokens in the order of their experts on a GPU: which they are, and rows moved there and back.

Letters: t tokens, m numbers of a row, e experts.
"""

import torch
from torch import Tensor

from blackmamba.ops import gpu

_TOKENS = 512  # of a program that counts
_ROWS = 2  # of a program that moves them


def sort_by_expert(expert_ids: Tensor, n_experts: int) -> tuple[Tensor, Tensor]:
    """The tokens in the order of their experts, (t,) int32, and each group's end, (e,) int32."""
    from blackmamba.ops.expert_mlp import kernels

    t = len(expert_ids)
    padded = max(2, 1 << (n_experts - 1).bit_length())
    n_blocks = -(-t // _TOKENS)
    new = expert_ids.new_empty
    ends, order = new(padded, dtype=torch.int32), new(t, dtype=torch.int32)
    if n_blocks == 1:
        gpu.launch(
            kernels.place_kernel, (1,), expert_ids, ends, order, ends, t, 1,
            E=padded, BLOCK=max(16, 1 << (t - 1).bit_length()), BLOCKS=0,
        )  # fmt: skip
        return order, ends[:n_experts]
    counts = new(n_blocks, padded, dtype=torch.int32)
    gpu.launch(kernels.count_kernel, (n_blocks,), expert_ids, counts, t, E=padded, BLOCK=_TOKENS)
    gpu.launch(
        kernels.place_kernel, (n_blocks,),
        expert_ids, counts, order, ends, t, n_blocks, E=padded, BLOCK=_TOKENS, BLOCKS=16,
    )  # fmt: skip
    return order, ends[:n_experts]


def gathered(order: Tensor, *tensors: Tensor) -> list[Tensor]:
    """x[order] of one or two tensors of the same shape and dtype."""
    from blackmamba.ops.expert_mlp import kernels

    rows = [x if x.stride(1) == 1 else x.contiguous() for x in tensors]
    outs = [x.new_empty(len(order), x.shape[1]) for x in rows]
    gpu.launch(
        kernels.gather_kernel, (-(-len(order) // _ROWS), len(rows)),
        rows[0], order, outs[0], rows[-1], outs[-1], *outs[0].shape,
        rows[0].stride(0), rows[-1].stride(0), **_row_blocks(rows[0]),
    )  # fmt: skip
    return outs


def scattered(x: Tensor, order: Tensor, scale: Tensor | None) -> Tensor:
    """out[order[i]] = x[i] scale[order[i]]."""
    from blackmamba.ops.expert_mlp import kernels

    out = torch.empty_like(x)
    gpu.launch(
        kernels.scatter_kernel, (-(-len(x) // _ROWS),),
        x, order, x if scale is None else scale, out, *x.shape,
        HAS_SCALE=scale is not None, **_row_blocks(x),
    )  # fmt: skip
    return out


def _row_blocks(x: Tensor) -> dict[str, int]:
    """Rows that a program moves, and how much of them at once."""
    return {"ROWS": _ROWS, "BLOCK": min(2048, max(16, 1 << (x.shape[1] - 1).bit_length()))}
