"""A moving average of the weights: often better than the last ones, at no cost in gradients.

Source: Polyak and Juditsky 1992 for averaging; the exponential form with a decay that begins small,
so that the first random weights are soon forgotten, is that of TensorFlow's
ExponentialMovingAverage.
"""

import contextlib
from collections.abc import Generator, Mapping

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
        is_spread: the parameters are pieces of those that the model computes with, in one memory.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        decay: float,
        *,
        is_spread: bool = False,
    ):
        self.decay = decay
        self._is_spread = is_spread
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
        """While this lasts the model has the averages for weights; copied only if it is spread."""
        copied = self._is_spread
        weights = {n: p.data.clone() if copied else p.data for n, p in self._parameters.items()}
        try:
            self._put(self.tensors)
            yield
        finally:
            self._put(weights)

    def _put(self, tensors: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            if self._is_spread:
                parameter.data.copy_(tensors[name])
            else:
                parameter.data = tensors[name]

    def _wide(self, parameter: nn.Parameter) -> Tensor:
        """Its value in float32: its own memory, its master's, or a copy."""
        return self._optimizer.state[parameter].get("master", parameter.detach()).float()
