"""What `sinkhorn` means, in log space."""

import math
from collections.abc import Iterator
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


_FLOOR = -1e4  # least scaled logit, relative to its row's largest; its exp is 0 in any dtype


@torch.no_grad()
def sinkhorn_reference(
    logits: Tensor, scale: float, start: str, tolerance: float, max_iterations: int
) -> SinkhornResult:
    """log P = scale * logits + r + c, where r and c are updated in turn: r so that the rows have
    the right sums, then c so that the columns do.

    Each row's largest logit is subtracted first, so that nothing overflows; r makes up for it.
    """
    logits = logits.to(wide_dtype(logits))
    if len(logits) == 0:
        return SinkhornResult(logits.clone(), 0, 0.0)
    step = None
    for step in sinkhorn_steps(logits, scale, start, max_iterations):
        if not step.error >= tolerance:  # NaN, which only NaN logits cause, stops too
            break
    assert step is not None
    return SinkhornResult(step.plan, step.number, step.error)


class SinkhornStep(NamedTuple):
    """One row-and-column step of the iteration."""

    number: int
    """From 1."""
    plan: Tensor
    """(t, e)."""
    error: float
    """Largest relative error of a row sum; the columns are exact."""


@torch.no_grad()
def sinkhorn_steps(
    logits: Tensor, scale: float, start: str, max_iterations: int
) -> Iterator[SinkhornStep]:
    """The iteration itself, step by step; logits (t, e), float32 or wider, t at least 1."""
    t, e = logits.shape
    largest = logits.amax(dim=1, keepdim=True)
    log_cost = ((logits - largest) * scale).clamp(min=_FLOOR)
    c = logits.new_zeros(e)
    if start == "paper":  # column sums of exp(scale * logits); r makes up for a common factor
        weight = ((largest - largest.max()) * scale).clamp(min=_FLOOR)
        c = -(log_cost + weight).logsumexp(dim=0)
    for number in range(1, max_iterations + 1):
        r = -math.log(t) - (log_cost + c).logsumexp(dim=1)
        rows_right = log_cost + r[:, None]
        c = -math.log(e) - rows_right.logsumexp(dim=0)
        plan = (rows_right + c).exp()
        error = float((t * plan.sum(dim=1) - 1).abs().max())
        yield SinkhornStep(number, plan, error)
