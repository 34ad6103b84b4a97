"""What tests let ranks do: count what their collectives send, and tell in which order."""

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from blackmamba.config import ModelConfig
from blackmamba.model import BlackMamba
from blackmamba.ops import expert_mlp
from blackmamba.train.parallel.config import ParallelConfig
from blackmamba.train.parallel.experts import SpreadExperts
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


class _Told:
    """A collective under way that says when it is waited for."""

    def __init__(self, work: Any, told: list[str]):
        self._work, self._told = work, told

    def wait(self) -> None:
        self._told.append("arrive")
        self._work.wait()


class _Beside(torch.autograd.Function):
    """Twice its input, which says when it is computed."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, told: list[str]) -> torch.Tensor:
        ctx.told = told
        told.append("beside")
        return 2 * x

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        ctx.told.append("beside")
        return 2 * grads[0], None


def experts_beside() -> tuple[list[str], list[float]]:
    """What two ranks with two experts each do in turn, forward and backward; and how far output and
    gradients are from those of all experts at once."""
    told: list[str] = []
    exchange = dist.all_to_all_single

    def exchanges(*args: Any, **options: Any) -> Any:
        work = exchange(*args, **options)
        told.append("sizes" if work is None else "leave")
        return None if work is None else _Told(work, told)

    with join(torch.device("cpu"), 60) as ranks:
        assert ranks.all_told(ranks.rank + 0.1) == [0.1, 1.1]
        random = torch.Generator().manual_seed(0)
        options: dict[str, Any] = {"generator": random, "dtype": torch.float64}
        xs = torch.randn(2, 7, 6, **options)
        ids = torch.tensor([[0, 1, 2, 3, 3, 3, 1], [2, 2, 2, 0, 3, 2, 2]])
        fc1, fc2 = torch.randn(4, 10, 6, **options), torch.randn(4, 6, 5, **options)
        leaves = [t.clone().requires_grad_() for t in (xs, fc1, fc2)]
        rows = leaves[0].view(14, 6)
        whole = expert_mlp(rows, ids.flatten(), *leaves[1:]) + 2 * rows
        whole.square().sum().backward()

        own = slice(2 * ranks.rank, 2 * ranks.rank + 2)
        mine = [t.clone().requires_grad_() for t in (xs[ranks.rank], fc1[own], fc2[own])]
        x = mine[0]
        dist.all_to_all_single = exchanges
        try:
            assert dist.group.WORLD is not None
            experts = SpreadExperts(dist.group.WORLD)
            y = experts(x, ids[ranks.rank], *mine[1:], plus=lambda: _Beside.apply(x, told))
            told.append("backward")
            y.square().sum().backward()
        finally:
            dist.all_to_all_single = exchange
    expected = [whole[7 * ranks.rank :][:7], leaves[0].grad[ranks.rank]]  # pyright: ignore
    expected += [leaf.grad[own] for leaf in leaves[1:]]  # pyright: ignore
    found = [y, *(leaf.grad for leaf in mine)]
    pairs = zip(found, expected, strict=True)
    return told, [(a - b).abs().max().item() for a, b in pairs]  # pyright: ignore
