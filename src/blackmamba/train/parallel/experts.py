"""Experts spread over ranks: tokens travel to the expert that they chose, and back.

Letters: t tokens of this rank, e experts, n ranks that share them, m d_model, f d_expert.

Rank i holds experts i e/n .. (i + 1) e/n - 1. Tokens are sorted by expert, so that what goes to a
rank lies together; how many that is differs from step to step, and the host has to know it: one
wait for the device in each layer. Nothing is dropped and nothing padded.

A shared expert depends on no other rank: it is computed while tokens travel to the experts, and its
gradients while those of the tokens travel back. (The backward pass takes the steps of the forward
pass from the last to the first, so what was begun before it there is ended behind it here.)

Source: Lepikhin et al. 2020 (arXiv 2006.16668), section 3, without its capacity.
"""

from collections.abc import Callable
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
        plus: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        """As `expert_mlp`, with fc1 (e/n, 2f or f, m) and the others being this rank's own.

        Args:
            plus: gives what is added to the result, (t, m); computed while tokens travel.
        """
        ids, k = expert_ids.flatten(), 1 if expert_ids.dim() == 1 else expert_ids.shape[1]
        own = len(fc1)
        order = torch.argsort(ids, stable=True)
        place = torch.empty_like(order)
        place.scatter_(0, order, torch.arange(len(order), device=order.device))
        leaving = torch.bincount(ids, minlength=own * self._size).view(self._size, own)
        coming = torch.empty_like(leaving)  # of each rank, for each of our experts
        dist.all_to_all_single(coming, leaving, group=self._group)
        sent, received = torch.stack((leaving.sum(1), coming.sum(1))).tolist()

        journey = _Journey(received, sent, self._group)
        rows = journey.begin(_reorder(x, order, place, k))
        added = None if plus is None else plus()
        rows = journey.end(rows)
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
        back = _Journey(sent, received, self._group)
        y = _reorder(back.end(back.begin(y)), place, order)
        if gate is not None:
            y = (y * gate.flatten()[:, None]).to(x.dtype)
        y = y if expert_ids.dim() == 1 else summed(y, len(x))
        return y if added is None else y + added


class _Journey:
    """Rows to the ranks of a group in turn, and what comes from them, in their order; gradients
    travel the same way back. What stands between `begin` and `end` is computed meanwhile, forward
    and backward.

    Args:
        received, sent: rows from each rank, and to each.
        group: of these ranks.
    """

    def __init__(self, received: list[int], sent: list[int], group: dist.ProcessGroup):
        self._received, self._sent, self._group = received, sent, group
        self._under_way: tuple[dist.Work, Tensor] | None = None

    def begin(self, rows: Tensor) -> Tensor:
        """What will be the rows that come, to be given to `end` and to nothing else."""
        return cast(Tensor, _Begin.apply(rows, self))

    def end(self, coming: Tensor) -> Tensor:
        """The rows that have come."""
        return cast(Tensor, _End.apply(coming, self))

    def leave(self, rows: Tensor, *, is_back: bool) -> Tensor:
        """Send rows, and give the memory of those that will come."""
        received, sent = self._received, self._sent
        if is_back:
            received, sent = sent, received
        out = rows.new_empty(sum(received), *rows.shape[1:])
        rows = rows.contiguous()
        work = dist.all_to_all_single(out, rows, received, sent, group=self._group, async_op=True)
        assert work is not None
        self._under_way = work, out
        return out

    def arrive(self) -> Tensor:
        """Wait for them (on a GPU, let what is computed next wait): the rows that came."""
        assert self._under_way is not None
        (work, out), self._under_way = self._under_way, None
        work.wait()
        return out


class _Begin(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, journey: _Journey) -> Tensor:
        ctx.journey = journey
        return journey.leave(rows, is_back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        del grads  # those that were sent from here
        return ctx.journey.arrive(), None


class _End(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, coming: Tensor, journey: _Journey) -> Tensor:
        ctx.journey = journey
        journey.arrive()
        return coming.view_as(coming)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.journey.leave(grads[0], is_back=True)
        return grads[0], None  # of the shape that is due; what comes, `_Begin` takes
