"""What the test of the scaling plan lets ranks do: count what their collectives send."""

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from blackmamba.config import ModelConfig
from blackmamba.model import BlackMamba
from blackmamba.train.parallel.config import ParallelConfig
from blackmamba.train.parallel.ranks import join
from blackmamba.train.parallel.spread import Spread

_FEW = 8
"""Numbers: loss, norm and counts of labels are no traffic to plan for."""


class _Sent(TorchDispatchMode):
    """By collective, the bytes of floating-point numbers that this rank gives to it, and how
    often."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._opname.strip("_")
            given = args[0] if name in ("allreduce", "send") else args[1]
            many = [
                t
                for t in tree_leaves(given)
                if isinstance(t, torch.Tensor) and t.is_floating_point() and t.numel() > _FEW
            ]
            self.bytes[name] += sum(t.nbytes for t in many)
            self.calls[name] += bool(many)
        return func(*args, **(kwargs or {}))


def sent(
    config: ModelConfig, parallel: dict[str, Any], rows: int, length: int, accumulate: int
) -> tuple[dict[str, int], dict[str, int]]:
    """What one rank gives to each kind of collective for the gradients of its rows: bytes, and how
    often."""
    with join(torch.device("cpu"), 60) as ranks:
        torch.manual_seed(0)
        model = BlackMamba(config).train()
        gradients = Spread.over(ranks, model, ParallelConfig(**parallel)).gradients()
        ids = torch.randint(0, config.vocab_size, (rows, length))
        with _Sent() as counted:
            gradients(ids, ids, None, accumulate, None)
        return dict(counted.bytes), dict(counted.calls)


def sent_in_all(
    cases: list[tuple[ModelConfig, dict[str, Any], int, int, int]],
) -> list[tuple[dict[str, int], dict[str, int]]]:
    """Of each case, one after the other."""
    return [sent(*case) for case in cases]
