"""Going back from an outlier: the run as it was at a checkpoint, and on with other data."""

import dataclasses
from pathlib import Path

import torch

from blackmamba.errors import TrainingError
from blackmamba.train.checkpoints import Counters, newest_checkpoint, remove_later
from blackmamba.train.config import TrainConfig
from blackmamba.train.learner import Learner
from blackmamba.train.restoring import restore
from blackmamba.train.rows import Step
from blackmamba.train.spikes import SpikeGuard


def new_guard(settings: TrainConfig, counters: Counters, device: torch.device) -> SpikeGuard | None:
    """One that goes on from the counters; None if outliers do not matter."""
    if settings.spikes == "ignore":
        return None
    remembered = counters.recent_losses, counters.recent_norms
    return SpikeGuard(settings.spike_window, settings.spike_threshold, device, remembered)


def go_back(
    step: Step, checkpoints: Path, settings: TrainConfig, learner: Learner, counters: Counters
) -> dict[str, int] | None:
    """Give learner and counters the values of the newest checkpoint of `checkpoint_every`; the
    sampler goes on behind the step's batch. Later checkpoints are of the way that was left.

    All ranks call it together, when no checkpoint is being written.

    Args:
        step: an outlier.
        checkpoints: the run's folder of them.
        settings, learner, counters: of the run; the latter two are changed in place.
    Returns:
        From which step it went and how many batches are left out, for the metrics; None: there is
        no checkpoint yet, and nothing has changed.
    Raises:
        TrainingError: the run went back too often.
        CheckpointError: the checkpoint is damaged.
    """
    checkpoint = newest_checkpoint(checkpoints, settings.checkpoint_every)
    if checkpoint is None:
        return None
    rollbacks = counters.rollbacks + 1
    if rollbacks > settings.max_rollbacks:
        raise TrainingError(
            f"step {step.number}: loss {step.outcome.loss:.4g} or gradient norm "
            f"{step.outcome.grad_norm:.4g} is an outlier, after {counters.rollbacks} "
            f"roll-backs (train.max_rollbacks); try a train.lr below {settings.lr:g}, "
            "or a larger train.spike_threshold"
        )
    restore(checkpoint, learner.model, learner.optimizer, learner.average, learner.spread)
    if learner.spread is None or learner.spread.ranks.is_first:
        remove_later(checkpoints, checkpoint.counters.step)
    spikes, kept = counters.spikes + 1, checkpoint.counters
    for field in dataclasses.fields(counters):
        setattr(counters, field.name, getattr(kept, field.name))
    counters.spikes, counters.rollbacks = spikes, rollbacks
    counters.skipped_batches = step.batch + 1 - counters.step
    skipped = counters.skipped_batches - kept.skipped_batches
    return {"from_step": step.number, "skipped_batches": skipped}
