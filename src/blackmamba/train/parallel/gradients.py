"""Loss, gradients and their norm of a batch that many ranks read together."""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from blackmamba.model import BlackMamba, Trace
from blackmamba.ops import global_norm
from blackmamba.train.parallel.mesh import Mesh
from blackmamba.train.parallel.ranks import Ranks
from blackmamba.train.parallel.shards import Shards
from blackmamba.train.step import GradientsOfBatch

_TOGETHER = 1 << 24  # numbers; what is larger is summed alone, without a copy


class GradientsOfRanks(GradientsOfBatch):
    """As `GradientsOfBatch`, of the batch that is the rows of all ranks.

    Ranks exchange gradients once a step: FSDP in the backward pass of the last micro-batch, the
    rest after it. Loss and norm are those of the whole batch, so that all ranks decide alike;
    gradients are of what the rank holds of each parameter.
    """

    def __init__(self, model: BlackMamba, shards: Shards, ranks: Ranks, mesh: Mesh):
        super().__init__(model)
        self._shards, self._ranks, self._mesh = shards, ranks, mesh
        self.reduce = ranks.sum_
        if mesh.sequence > 1:
            self.sequence_group = mesh.rows.get_group("piece")

    def __call__(
        self,
        input_ids: Tensor,
        labels: Tensor,
        seq_idx: Tensor | None,
        accumulate: int,
        trace: Trace | None,
    ) -> tuple[Tensor, dict[nn.Parameter, Tensor], Tensor]:
        """Of the rank's own rows; all ranks have as many and call it together."""
        self._shards.zero_grad()
        loss, found = self._accumulated(input_ids, labels, seq_idx, accumulate, trace)
        found = self._summed(found)
        size = self._ranks.size
        squares = self._squares(found).to(loss.device)
        told = torch.stack((loss.double() / size, squares, squares.new_tensor(self.wants_stop)))
        self._ranks.sum_(told)
        self.stop = told[2] > 0
        return told[0].float(), found, told[1].sqrt().float()

    def _begin(self, *, is_last: bool) -> None:
        if isinstance(self._model, FSDPModule):
            self._model.set_requires_gradient_sync(is_last)

    def _ratios(self, counted: Tensor, parts: Sequence[slice]) -> Sequence[Tensor | float]:
        mean = self._ranks.sum_(counted.sum()) / self._ranks.size  # gradients are averaged
        return [mean / counted[part].sum() for part in parts]

    def norms_of(
        self, parts: Mapping[str, Sequence[nn.Parameter]], found: Mapping[nn.Parameter, Tensor]
    ) -> dict[str, Tensor]:
        """The norm of the gradients of each part, over all ranks."""
        if not parts:
            return {}
        own = [self._squares({p: found[p] for p in ps}) for ps in parts.values()]
        norms = self._ranks.sum_(torch.stack(own)).sqrt().float()
        return dict(zip(parts, norms.unbind(), strict=True))

    def _summed(self, found: dict[nn.Parameter, Tensor]) -> dict[nn.Parameter, Tensor]:
        """Average what FSDP did not, and give all by what the rank holds, no narrower than float32.

        Experts that are spread have the sum of what the tokens of their ranks gave; FSDP has
        divided that by the number of ranks that hold the same, not by all.
        """
        shards, size = self._shards, self._ranks.size
        world = dist.group.WORLD
        result: dict[nn.Parameter, Tensor] = {}
        alone: dict[dist.ProcessGroup | None, list[Tensor]] = {}
        for name, own, twin in shards.pairs():
            if own is not twin:
                gradient = shards.piece_of_gradient(name)
                if gradient is None:
                    continue
                if shards.is_expert(name):
                    gradient.mul_(1 / self._mesh.experts)
            elif own in found:
                gradient = found[own].float()
                group = self._mesh.held.get_group("replicate") if shards.is_expert(name) else world
                alone.setdefault(group, []).append(gradient)
            else:
                continue
            result[twin] = gradient
            if twin.dtype == gradient.dtype:
                twin.grad = gradient
        for group, gradients in alone.items():
            _sum(gradients, group)
            torch._foreach_mul_(gradients, 1 / size)
        return result

    def _squares(self, found: Mapping[nn.Parameter, Tensor]) -> Tensor:
        """What this rank adds to the sum of squares of all gradients, each counted once."""
        kinds: dict[tuple[int, torch.device], list[Tensor]] = {}
        for name, _, twin in self._shards.pairs():
            if twin in found:
                kind = self._shards.copies(name), found[twin].device
                kinds.setdefault(kind, []).append(found[twin])
        total = torch.zeros((), dtype=torch.float64, device=self._ranks.device)
        for (copies, _), gradients in kinds.items():
            total += global_norm(gradients).to(total) ** 2 / copies
        return total


def _sum(tensors: Sequence[Tensor], group: dist.ProcessGroup | None) -> None:
    """The sum of each over the ranks of a group, in place; small ones go together."""
    if group is None or group.size() == 1:
        return
    small: list[Tensor] = []
    for tensor in tensors:
        if tensor.numel() > _TOGETHER:
            dist.all_reduce(tensor, group=group)
        else:
            small.append(tensor)
    while small:
        batch: list[Tensor] = []
        while small and sum(t.numel() for t in batch) <= _TOGETHER:
            batch.append(small.pop())
        flat = torch.cat([t.flatten() for t in batch])
        dist.all_reduce(flat, group=group)
        for tensor, summed in zip(batch, flat.split([t.numel() for t in batch]), strict=True):
            tensor.copy_(summed.view_as(tensor))
