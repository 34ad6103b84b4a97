"""How rows are cut over the ranks of a group.

Letters: b batch, l tokens of this rank's piece, p pieces (ranks).
"""

import dataclasses

import torch
from torch import Tensor
from torch import distributed as dist

from blackmamba.ops.checks import check_any_integers, check_dims


@dataclasses.dataclass(frozen=True)
class Pieces:
    """A batch of rows, of which rank i of `group` holds the i-th piece. See `cut`."""

    group: dist.ProcessGroup
    rank: int
    """This process's, within the group."""
    size: int
    goes_on: Tensor | None
    """(p, b) bool: whether piece i begins inside of a document, the one that piece i - 1 ends with.
    None: always, but for the first piece."""

    @staticmethod
    def cut(group: dist.ProcessGroup, seq_idx: Tensor | None) -> "Pieces":
        """How the rows at hand are cut; every rank of the group calls it.

        Args:
            group: in the order of the pieces.
            seq_idx: (b, l), any integer dtype: which document each token of this rank's piece is
                of; documents are numbered alike on all ranks. None (on all): a row is one document.
        Raises:
            InputError: seq_idx is not of an integer dtype.
        """
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        if seq_idx is None:
            return Pieces(group, rank, size, None)
        check_dims("Pieces.cut", "seq_idx", seq_idx, "bl")
        check_any_integers("Pieces.cut", "seq_idx", seq_idx)
        ends = gathered(seq_idx[:, [0, -1]].to(torch.int64), group)
        goes_on = torch.zeros(size, len(seq_idx), dtype=torch.bool, device=seq_idx.device)
        goes_on[1:] = ends[1:, :, 0] == ends[:-1, :, 1]
        return Pieces(group, rank, size, goes_on)

    def only_where_it_goes_on(self, memory: Tensor, rank: int) -> Tensor:
        """`memory` (b, ...), handed to piece `rank`, in rows whose document goes on; else zeros."""
        if self.goes_on is None:
            return memory
        keep = self.goes_on[rank].view(-1, *(1 for _ in memory.shape[1:]))
        return memory.where(keep, memory.new_zeros(()))


def gathered(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(p, ...): the tensor of every rank, in their order; no gradient."""
    out = tensor.new_empty(dist.get_world_size(group), *tensor.shape)
    dist.all_gather(list(out.unbind()), tensor.contiguous(), group=group)
    return out


def shifted(tensor: Tensor, pieces: Pieces, by: int) -> Tensor:
    """The tensor of the rank `by` (1 or -1) places before this one; zeros where there is none."""
    received = torch.zeros_like(tensor, memory_format=torch.contiguous_format)
    operations: list[dist.P2POp] = []
    for peer, call, what in (
        (pieces.rank + by, dist.isend, tensor.contiguous()),
        (pieces.rank - by, dist.irecv, received),
    ):
        if 0 <= peer < pieces.size:
            peer = dist.get_global_rank(pieces.group, peer)
            operations.append(dist.P2POp(call, what, peer, pieces.group))
    if operations:
        for work in dist.batch_isend_irecv(operations):
            work.wait()
    return received
