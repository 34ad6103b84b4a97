"""The choice of experts on the GPU: one kernel, and the host waits for nothing."""

import math

import torch
from torch import Tensor

from blackmamba.ops import gpu

MOST_EXPERTS = 256
_NUMBERS = 4096  # of a tile
_PROGRAMS = 64  # fewer than any data-centre GPU has multiprocessors: all run at once


def choice(
    logits: Tensor, scale: float, start: str, tolerance: float, max_iterations: int
) -> Tensor:
    """`sinkhorn_choice` in float32, of at most MOST_EXPERTS experts."""
    from blackmamba.ops.sinkhorn import kernels

    t, e = logits.shape
    logits = logits.float().contiguous()
    ids = logits.new_empty(t, dtype=torch.int64)
    if t == 0:
        return ids
    padded = max(2, 1 << (e - 1).bit_length())
    block = max(1, _NUMBERS // padded)
    # interpreted programs run one after another and could not wait for each other
    programs = 1 if gpu.interpreted() else min(_PROGRAMS, -(-t // block))
    gpu.launch(
        kernels.choice_kernel,
        (programs,),
        logits,
        ids,
        logits.new_empty(programs),
        logits.new_empty(2 * programs * (2 * padded + 1)),
        torch.zeros(1, dtype=torch.int32, device=logits.device),
        t,
        e,
        scale,
        tolerance,
        max_iterations,
        math.log(t),
        math.log(e),
        PAPER=start == "paper",
        E=padded,
        BLOCK=block,
        PROGRAMS=programs,
        ROWS=max(2, 1 << (programs - 1).bit_length()),
        num_warps=8,
    )
    return ids
