"""What a step was, and the line about it in metrics.jsonl."""

import dataclasses

import torch

from blackmamba.data import MixtureSampler
from blackmamba.train.evaluation import Validations
from blackmamba.train.metrics import ExpertLoad, Row, finite
from blackmamba.train.speed import peak_memory
from blackmamba.train.step import StepOutcome


@dataclasses.dataclass
class Step:
    """A step that was begun."""

    number: int
    """From 1."""
    batch: int
    """The sampler's number of what it read."""
    tokens: int
    """Read up to its end."""
    n_tokens: int
    """Its own."""
    lr: float
    outcome: StepOutcome
    experts: ExpertLoad | None
    is_logged: bool
    seconds: float = 0.0
    """From the end of the step before to its own."""


class Rows:
    """Makes a line of metrics.jsonl of each step that is done.

    Args:
        sampler: of the run's batches, whatever its kind.
        rate: FLOPs per second that utilisation is a share of.
        flops_per_token: that training takes at least.
        device: where it runs.
    """

    def __init__(self, sampler: object, rate: float, flops_per_token: float, device: torch.device):
        self._mixture = sampler if isinstance(sampler, MixtureSampler) else None
        self._rate, self._flops_per_token, self._device = rate, flops_per_token, device
        self._unlogged = [0.0, 0]  # seconds and tokens of the steps since the last log
        self.rolled_back: dict[str, int] | None = None
        """To be written down with the next step."""

    def row(self, step: Step, found: Validations | None) -> Row:
        """What there is to say of a step, but for the time; waits until it is done."""
        outcome = step.outcome
        row: Row = {
            "step": step.number,
            "loss": finite(outcome.loss),
            "lr": step.lr,
            "grad_norm": finite(outcome.grad_norm),
            "skipped": not outcome.is_taken,
            "tokens": step.tokens,
        }
        if outcome.is_spike:
            row["spike"] = True
        if self.rolled_back is not None:
            row["rolled_back"], self.rolled_back = self.rolled_back, None
        row["tokens_per_s"] = round(step.n_tokens / step.seconds, 1)
        self._unlogged[0] += step.seconds
        self._unlogged[1] += step.n_tokens
        if step.experts is not None:
            row["experts"] = step.experts.by_layer()
        if step.is_logged:
            row["grad_norms"] = {k: finite(v) for k, v in outcome.part_norms.items()}
            row["machine"] = self._machine()
            if self._mixture is not None:
                usage = self._mixture.usage(step.batch + 1)
                row["sources"] = {k: dataclasses.asdict(v) for k, v in usage.items()}
        if found is not None:
            row |= found.row()
        return row

    def _machine(self) -> dict[str, float]:
        """How fast the steps since the last time were, and what they took."""
        seconds, tokens = self._unlogged
        self._unlogged = [0.0, 0]
        speed = tokens / seconds
        return {
            "tokens_per_s": round(speed, 1),
            "mfu": round(speed * self._flops_per_token / self._rate, 4),
            "memory_bytes": peak_memory(self._device.type),
        }
