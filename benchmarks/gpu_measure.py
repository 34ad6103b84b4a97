"""What the GPU benchmarks share: timing by events, the card's two limits, its description.

Without a GPU the clock is the host's, so that a script can be tried at toy sizes with interpreted
kernels; its numbers then mean nothing.
"""

import dataclasses
import importlib.util
import statistics
import time
from collections.abc import Callable, Mapping

import torch

Call = Callable[[], object]
_HEAD_START = 10_000_000  # clock cycles: some 6 ms
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclasses.dataclass(frozen=True)
class Limits:
    """What this card reached."""

    bytes_s: float
    """Read plus written by a large copy."""
    flops_s: float
    """bfloat16 product of three large matrices, 8192 a side."""


def timed(contenders: Mapping[str, Call], repeats: int, warmup: int = 3) -> dict[str, float]:
    """Median seconds of each call; the contenders take turns.

    Before each call a large tensor is filled and the device made to wait: no cache holds an input,
    and the host is ahead of the device, so that what is measured is the device's work.
    """
    flush = torch.empty(1 << 28 if DEVICE.type == "cuda" else 1, dtype=torch.uint8, device=DEVICE)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    warmup = warmup if DEVICE.type == "cuda" else 0
    for turn in range(warmup + repeats):
        for name, run in contenders.items():
            flush.zero_()
            if DEVICE.type == "cuda":
                torch.cuda._sleep(_HEAD_START)
            seconds = _seconds(run)
            if turn >= warmup:
                times[name].append(seconds)
    return {name: statistics.median(found) for name, found in times.items()}


def _seconds(run: Call) -> float:
    if DEVICE.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def limits(tiny: bool) -> Limits:
    """Measured now."""
    side, size = (64, 1 << 16) if tiny else (8192, 1 << 31)
    a, b = (torch.randn(side, side, device=DEVICE).bfloat16() for _ in range(2))
    source = torch.ones(size, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    found = timed({"product": lambda: a @ b, "copy": lambda: target.copy_(source)}, 10)
    return Limits(bytes_s=2 * size / found["copy"], flops_s=2 * side**3 / found["product"])


def machine() -> dict[str, object]:
    """What the numbers depend on besides the code."""
    return {
        "gpu": torch.cuda.get_device_name() if DEVICE.type == "cuda" else "none",
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "triton": importlib.import_module("triton").__version__ if installed("triton") else "",
    }


def installed(name: str) -> bool:
    """Whether a peer can be compared with."""
    return importlib.util.find_spec(name) is not None


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    """Random numbers on the device."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=DEVICE).to(dtype)
