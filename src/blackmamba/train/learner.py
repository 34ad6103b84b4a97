"""What a run trains: the model, where it lies, its optimizer and the average of its weights."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from blackmamba.checkpoint import save, save_adapter
from blackmamba.data import Tokenizer
from blackmamba.model import BlackMamba
from blackmamba.train.average import WeightAverage
from blackmamba.train.config import RunConfig
from blackmamba.train.mixed import narrow_weights
from blackmamba.train.muon import Muon
from blackmamba.train.optimizer import build_optimizer
from blackmamba.train.parallel.ranks import Ranks
from blackmamba.train.parts import parameters_by_part
from blackmamba.train.start import DTYPES, started
from blackmamba.train.step import CapturedGradients, GradientsOfBatch

if TYPE_CHECKING:
    from blackmamba.train.parallel.spread import Spread


@dataclasses.dataclass(frozen=True, kw_only=True)
class Learner:
    """A model and what belongs to it while it is trained."""

    model: BlackMamba
    optimizer: torch.optim.Optimizer
    average: WeightAverage | None
    """None: none is wanted."""
    spread: "Spread | None"
    """The model on its ranks; None where there is one process."""

    @classmethod
    def build(
        cls, config: RunConfig, tokenizer: Tokenizer, out: Path, ranks: Ranks, *, resumed: bool
    ) -> "Learner":
        """As it is before the first step, on the device of this rank; all ranks call it.

        Args:
            config: of the run.
            tokenizer: of its data.
            out: its folder.
            ranks: who shares the model.
            resumed: a checkpoint's numbers come in next.
        Raises:
            ConfigError, CheckpointError: see `started`.
        """
        settings = config.train
        model = started(config, tokenizer, out, resumed=resumed, ranks=ranks)
        is_narrow = settings.weights != "float32"
        masters = narrow_weights(model, DTYPES[settings.dtype]) if is_narrow else {}
        model.to(ranks.device).recompute = settings.recompute
        spread = _spread(model, config, ranks)
        holder: nn.Module = model
        if spread is not None:
            holder = spread.shards
            masters = {name: spread.shards.piece(name, whole) for name, whole in masters.items()}
        optimizer = build_optimizer(holder, settings, masters)
        if spread is not None and isinstance(optimizer, Muon):
            optimizer.shards = spread.shards
        del masters  # they may be on the device by now
        average: WeightAverage | None = None
        if settings.ema_decay:
            is_spread = spread is not None
            average = WeightAverage(holder, optimizer, settings.ema_decay, is_spread=is_spread)
        return cls(model=model, optimizer=optimizer, average=average, spread=spread)

    def gradients(self, *, capture: bool) -> GradientsOfBatch:
        """What computes gradients of a batch.

        Args:
            capture: as a CUDA graph, where there is one process.
        """
        if self.spread is not None:
            return self.spread.gradients()
        return (CapturedGradients if capture else GradientsOfBatch)(self.model)

    def parts(self) -> Mapping[str, Sequence[nn.Parameter]]:
        """The parameters that gradients are of, by the part of the model."""
        if self.spread is None:
            return parameters_by_part(self.model)
        return parameters_by_part(self.model, self.spread.shards.named_parameters())

    def save_model(self, folder: Path, tokenizer: Tokenizer, adapter: Path | None = None) -> None:
        """Write the model folder; of many ranks, all of which call this, the first writes.

        Args:
            folder: of the model.
            tokenizer: goes with it.
            adapter: folder for the model's adapters alone; None: it has none, or they are not
                wanted.
        """
        whole = self.model if self.spread is None else self.spread.gathered()
        if whole is not None:
            save(whole, folder, tokenizer=tokenizer)
            if adapter is not None:
                save_adapter(whole, adapter, tokenizer)


def _spread(model: BlackMamba, config: RunConfig, ranks: Ranks) -> "Spread | None":
    if not ranks.is_group:
        return None
    from blackmamba.train.parallel.spread import Spread

    return Spread.over(ranks, model, config.parallel)
