"""A moving average of the weights: often better than the last ones, at no cost in gradients.

Source: Polyak and Juditsky 1992 for averaging; the exponential form with a decay that begins small,
so that the first random weights are soon forgotten, is that of TensorFlow's
ExponentialMovingAverage.
"""

import contextlib
from collections.abc import Generator

import torch
from torch import Tensor, nn


class WeightAverage:
    """Float32 averages of all trained parameters.

    After step n, from 1: average = d average + (1 - d) weight, with d = min(decay, (1 + n) /
    (10 + n)). A step that was skipped counts as one that changed nothing.

    Args:
        model: whose parameters; they keep being read.
        optimizer: whose float32 masters are read in place of narrow parameters.
        decay: above 0, below 1.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, decay: float):
        self.decay = decay
        self._parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._optimizer = optimizer
        self.tensors: dict[str, Tensor] = {
            name: self._wide(p).clone() for name, p in self._parameters.items()
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After training step `step`, counted from 1."""
        rest = 1 - min(self.decay, (1 + step) / (10 + step))
        weights = [self._wide(p) for p in self._parameters.values()]
        torch._foreach_lerp_(list(self.tensors.values()), weights, rest)

    @contextlib.contextmanager
    def in_place(self) -> Generator[None]:
        """While this lasts the model has the averages for weights; nothing is copied."""
        weights = {name: p.data for name, p in self._parameters.items()}
        try:
            for name, p in self._parameters.items():
                p.data = self.tensors[name]
            yield
        finally:
            for name, p in self._parameters.items():
                p.data = weights[name]

    def _wide(self, parameter: nn.Parameter) -> Tensor:
        """Its value in float32: its own memory, its master's, or a copy."""
        return self._optimizer.state[parameter].get("master", parameter.detach()).float()
