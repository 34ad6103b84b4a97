"""A model on all ranks of a run, and what belongs to it."""

import dataclasses
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from blackmamba.errors import ConfigError
from blackmamba.model import BlackMamba
from blackmamba.model.lora import adaptation, add_adapters
from blackmamba.model.router import Router
from blackmamba.train.parallel.config import ParallelConfig
from blackmamba.train.parallel.gradients import GradientsOfRanks
from blackmamba.train.parallel.mesh import Mesh, build_mesh
from blackmamba.train.parallel.ranks import Ranks
from blackmamba.train.parallel.sharding import spread
from blackmamba.train.parallel.shards import Shards


@dataclasses.dataclass(frozen=True)
class Spread:
    """What the ranks of a process group make of one model."""

    model: BlackMamba
    """Computes with all of it, and holds this rank's part."""
    shards: Shards
    """This rank's part, for the optimizer."""
    ranks: Ranks
    mesh: Mesh
    group: dist.ProcessGroup
    """Of all ranks, for checkpoints alone, so that they can be written beside the training."""

    @classmethod
    def over(cls, ranks: Ranks, model: BlackMamba, config: ParallelConfig) -> "Spread":
        """Spread a model, which all ranks have built alike, in place.

        Raises:
            ConfigError: its experts are quantised and are to be spread.
            PeerError: the same, on ranks but the first.
        """
        ranks.first(partial(_check, model, config))
        mesh = build_mesh(config, ranks)
        group = dist.new_group(backend="gloo")
        model.reduce_load = ranks.sum_
        for module in model.modules():
            if isinstance(module, Router):
                module.gather = _gathering(ranks)
        assert isinstance(group, dist.ProcessGroup)
        return cls(model, spread(model, config, mesh), ranks, mesh, group)

    def gradients(self) -> GradientsOfRanks:
        """What computes gradients of a batch."""
        return GradientsOfRanks(self.model, self.shards, self.ranks, self.mesh)

    @torch.no_grad()
    def gathered(self) -> BlackMamba | None:
        """The whole model in the first rank's memory, None on the others; all ranks call it."""
        whole: BlackMamba | None = None
        if self.ranks.is_first:
            whole = BlackMamba(
                self.model.config,
                device="meta",
                compute_dtype=self.model.compute_dtype,
                quantization=self.model.quantization,
            )
            if (adapted := adaptation(self.model)) is not None:
                add_adapters(whole, adapted)  # on the meta device nothing is drawn
            whole.to_empty(device="cpu")
            for name, buffer in self.model.named_buffers():
                whole.get_buffer(name).copy_(buffer)
        parameters = {} if whole is None else dict(whole.named_parameters())
        for name, piece in self.shards.named_parameters():
            tensor = self.shards.whole(name, piece.detach())
            if whole is not None:
                parameters[name].data = tensor.to("cpu", copy=True)
        return whole


def _check(model: BlackMamba, config: ParallelConfig) -> None:
    """See that the experts can be spread, if they are to be."""
    if config.expert > 1 and model.quantization is not None:
        raise ConfigError(
            f"parallel.expert={config.expert}: experts of {model.quantization.bits} bits are whole "
            "on every rank, as they are small; set it to 1"
        )


def _gathering(ranks: Ranks) -> Callable[[Tensor], tuple[Tensor, int]]:
    """Makes logits (t, e) of this rank those of all ranks, (T, e), and says where its own begin."""

    def gather(logits: Tensor) -> tuple[Tensor, int]:
        every = logits.new_empty(ranks.size * len(logits), logits.shape[1])
        dist.all_gather(list(every.chunk(ranks.size)), logits.contiguous())
        return every, ranks.rank * len(logits)

    return gather
