"""Two ways to say which tokens of a row belong together."""

import torch
from torch import Tensor

from blackmamba.errors import InputError
from blackmamba.ops.checks import check_any_integers, check_dims, readable


def documents(
    operation: str, x: Tensor, seq_idx: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor | None:
    """`seq_idx` (b, l) as it is given, or of what `cu_seqlens` says; nothing waits for the device.

    Args:
        operation: its name, for messages.
        x: (b, l, d), what is read.
        seq_idx: (b, l), which document each token is of.
        cu_seqlens: (documents + 1,), any integer dtype: 0, then the end of each document, the last
            one l; a document may be empty. b must be 1.
    Raises:
        InputError: both are given, b is not 1, a wrong dtype or shape, or, where that can be seen
            without waiting, ends that do not rise from 0 to l.
    """
    if cu_seqlens is None:
        return seq_idx
    b, l = x.shape[:2]
    if seq_idx is not None:
        raise InputError(f"{operation}: seq_idx and cu_seqlens say the same, give one of them")
    check_dims(operation, "cu_seqlens", cu_seqlens, "n")
    check_any_integers(operation, "cu_seqlens", cu_seqlens)
    if b != 1:
        raise InputError(f"{operation}: cu_seqlens is for one row of documents, x has {b} rows")
    if len(cu_seqlens) < 2:
        raise InputError(
            f"{operation}: cu_seqlens has {len(cu_seqlens)} numbers, must have 2 or more"
        )
    if readable(cu_seqlens):
        ends = cu_seqlens.tolist()
        if ends[0] != 0 or ends[-1] != l or sorted(ends) != ends:
            raise InputError(f"{operation}: cu_seqlens is {ends}, must rise from 0 to {l}")
    places = torch.arange(l, device=x.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens.to(x.device), places, right=True)[None]
