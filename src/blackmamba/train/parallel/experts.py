"""Experts spread over ranks: tokens travel to the expert that they chose, and back.

Letters: t tokens of this rank, e experts, n ranks that share them, m d_model, f d_expert.

Rank i holds experts i e/n .. (i + 1) e/n - 1. Tokens are sorted by expert, so that what goes to a
rank lies together; how many that is differs from step to step, and the host has to know it: one
wait for the device in each layer. Nothing is dropped and nothing padded.

Source: Lepikhin et al. 2020 (arXiv 2006.16668), section 3, without its capacity.
"""

from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from blackmamba.ops import expert_mlp
from blackmamba.ops.expert_mlp.choices import summed
from blackmamba.ops.expert_mlp.torch_grouped import _reorder


class SpreadExperts:
    """`expert_mlp` of which each rank of `group` holds an equal part of the experts.

    All ranks of the group call it together. It equals `expert_mlp` of all their tokens at once with
    all experts; a gradient of this rank's experts holds what the tokens of all ranks gave.
    """

    def __init__(self, group: dist.ProcessGroup):
        self._group = group
        self._size = group.size()

    def __call__(
        self,
        x: Tensor,
        expert_ids: Tensor,
        fc1: Tensor,
        fc2: Tensor,
        *,
        activation: Literal["silu", "gelu"] = "silu",
        gated: bool = True,
        fc1_bias: Tensor | None = None,
        fc2_bias: Tensor | None = None,
        gate: Tensor | None = None,
    ) -> Tensor:
        """As `expert_mlp`, with fc1 (e/n, 2f or f, m) and the others being this rank's own."""
        ids, k = expert_ids.flatten(), 1 if expert_ids.dim() == 1 else expert_ids.shape[1]
        own = len(fc1)
        order = torch.argsort(ids, stable=True)
        place = torch.empty_like(order)
        place.scatter_(0, order, torch.arange(len(order), device=order.device))
        leaving = torch.bincount(ids, minlength=own * self._size).view(self._size, own)
        coming = torch.empty_like(leaving)  # of each rank, for each of our experts
        dist.all_to_all_single(coming, leaving, group=self._group)
        sent, received = torch.stack((leaving.sum(1), coming.sum(1))).tolist()

        rows = _exchange(_reorder(x, order, place, k), received, sent, self._group)
        of_rows = torch.arange(own, device=x.device).repeat(self._size)
        of_rows = of_rows.repeat_interleave(coming.flatten(), output_size=sum(received))
        y = expert_mlp(
            rows,
            of_rows,
            fc1,
            fc2,
            activation=activation,
            gated=gated,
            fc1_bias=fc1_bias,
            fc2_bias=fc2_bias,
        )
        y = _reorder(_exchange(y, sent, received, self._group), place, order)
        if gate is not None:
            y = (y * gate.flatten()[:, None]).to(x.dtype)
        return y if expert_ids.dim() == 1 else summed(y, len(x))


def _exchange(
    rows: Tensor, received: list[int], sent: list[int], group: dist.ProcessGroup
) -> Tensor:
    """Rows to the ranks in turn, `sent` of them to each; what comes from them, in their order."""
    return cast(Tensor, _Exchange.apply(rows, received, sent, group))


class _Exchange(torch.autograd.Function):
    """Gradients travel the same way back."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, received: list[int], sent: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.way = received, sent, group
        out = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(out, rows.contiguous(), received, sent, group=group)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        received, sent, group = ctx.way
        back = grads[0].new_empty(sum(sent), *grads[0].shape[1:])
        dist.all_to_all_single(back, grads[0].contiguous(), sent, received, group=group)
        return back, None, None, None
