"""What a run's machine can do, to say what share of it training uses."""

import functools
import resource
import sys
import time
from collections.abc import Sequence

import torch

from blackmamba.ops import linear

_SECONDS = 0.1  # spent on timing, after one product to warm up
_SIZE = {"cpu": 1024, "cuda": 8192}
_SLOW = 0.7


@functools.cache
def product_rate(kind: str, dtype: torch.dtype) -> float:
    """FLOPs per second of a large square product, the best of several in a tenth of a second.

    Measured once in a process. What else the machine does meanwhile makes it smaller.

    Args:
        kind: "cpu" or "cuda".
        dtype: of its factors.
    """
    n = _SIZE[kind]
    a = torch.full((n, n), 0.5, dtype=dtype, device=kind)
    best, begun, warm = float("inf"), 0.0, False
    with torch.inference_mode():
        while not warm or time.perf_counter() - begun < _SECONDS:
            since = _now(kind)
            linear(a, a)
            seconds = _now(kind) - since
            if warm:
                best = min(best, seconds)
            else:
                warm, begun = True, time.perf_counter()
    if kind == "cuda":
        torch.cuda.reset_peak_memory_stats()  # these matrices are not the run's
    return 2 * n**3 / best


def slow_ranks(rates: Sequence[float]) -> list[str]:
    """A line for each rank whose `product_rate` is far below the median's: the others wait for it.

    Args:
        rates: of all ranks, in their order.
    """
    middle = sorted(rates)[(len(rates) - 1) // 2]
    return [
        f"rank {rank} multiplies at {rate / middle:.0%} of the rate of most ranks, which wait for "
        "it in every step"
        for rank, rate in enumerate(rates)
        if rate < _SLOW * middle
    ]


def peak_memory(kind: str) -> int:
    """Most bytes so far: of this process on a CPU, of torch's tensors on a GPU."""
    if kind == "cuda":
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _now(kind: str) -> float:
    if kind == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
