"""Several experts a token: all implementations take choices, k in a row for each token.

Letters: t tokens, k choices of a token, m their width.
"""

from torch import Tensor


def choices_per_token(x: Tensor, expert_ids: Tensor) -> int:
    """k of expert_ids (t k,) for x (t, m)."""
    return len(expert_ids) // max(1, len(x)) or 1


def repeated(x: Tensor, k: int) -> Tensor:
    """(t, m) to (t k, m): each token once for each of its choices."""
    return x if k == 1 else x[:, None].expand(-1, k, -1).flatten(0, 1)


def summed(y: Tensor, t: int) -> Tensor:
    """(t k, m) to (t, m): what belongs to one token added up."""
    return y.view(t, -1, y.shape[1]).sum(1) if t else y
