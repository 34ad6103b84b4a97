"""What `sinkhorn` means, in log space."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from blackmamba.ops.checks import wide_dtype


class SinkhornResult(NamedTuple):
    plan: Tensor
    """(t, e): rows sum to 1 / t, columns to 1 / e."""
    iterations: int
    """Row-and-column steps taken."""
    error: float
    """Largest relative error of a row or column sum."""


@torch.no_grad()
def sinkhorn_reference(
    logits: Tensor, scale: float, start: str, tolerance: float, max_iterations: int
) -> SinkhornResult:
    """log P = scale * logits + r + c; r and c in turn make the rows and the columns right."""
    t, e = logits.shape
    limit = torch.finfo(torch.float32).max / 16  # keeps every sum below finite
    log_cost = (logits.to(wide_dtype(logits)) * scale).clamp(-limit, limit)
    if t == 0:
        return SinkhornResult(log_cost, 0, 0.0)
    if start == "paper":
        c = -math.log(e) - log_cost.logsumexp(dim=0)
        c = c - c.max()  # a shift of all columns, which r takes back
    else:
        c = log_cost.new_zeros(e)
    iterations, error = 0, math.inf
    plan = log_cost
    while iterations < max_iterations and not error < tolerance:
        iterations += 1
        r = -math.log(t) - (log_cost + c).logsumexp(dim=1)
        rows_right = log_cost + r[:, None]
        c = -math.log(e) - rows_right.logsumexp(dim=0)
        plan = (rows_right + c).exp()  # in this order: at most 1 / e, whatever the logits
        error = float((t * plan.sum(dim=1) - 1).abs().max())  # the columns are exact now
    return SinkhornResult(plan, iterations, error)
