"""What the benchmark scripts share: timing in turn, this machine's limits, tables, memory.

A measured rate only means something beside what the machine could do: `read_bandwidth` bounds
generation at batch 1, which reads every active weight once a token, and `matrix_rate` bounds
training and the reading of prompts, which are products. As probes (`reading`, `product`) the same
are timed in turn with what they bound.
"""

import argparse
import dataclasses
import json
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from blackmamba.ops import native
from blackmamba.ops.native.pages import want_huge_pages
from blackmamba.train.origin import origin

Call = Callable[[], object]
Shape = tuple[int, int, int]

READ_BYTES = 1 << 31
PRODUCT: Shape = (512, 1152, 4608)
"""Rows, inner size and columns of the product: the 1.5B model's in_proj on a prompt of 512."""
TINY_PRODUCT: Shape = (8, 16, 32)


@dataclasses.dataclass(frozen=True)
class Probe:
    """Work that shows one limit of the machine, to be timed in turn with what it limits."""

    call: Call
    work: float
    """Bytes, or floating-point operations, of a call."""
    how: str

    def rate(self, times: Sequence[float]) -> float:
        """Work per second at the median of these times of a call."""
        return self.work / statistics.median(times)


@dataclasses.dataclass(frozen=True)
class Limit:
    """A rate that this machine reached, and with what."""

    rate: float
    """Bytes per second, or floating-point operations per second."""
    how: str


# ---- timing ---------------------------------------------------------------------------------


def timed(contenders: Mapping[str, Call], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call, sorted, by contender; one call of each before, to warm up.

    The contenders take turns, so that whatever else the machine does hits all of them.
    """
    for run in contenders.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: sorted(seconds) for name, seconds in times.items()}


def median_seconds(run: Call, repeats: int) -> float:
    """Median of `repeats` calls after one to warm up."""
    return statistics.median(timed({"it": run}, repeats)["it"])


# ---- limits ---------------------------------------------------------------------------------


def read_bandwidth(buffer_bytes: int = READ_BYTES, repeats: int = 5) -> Limit:
    """Bytes per second that this machine reads, see `reading`."""
    probe = reading(buffer_bytes)
    return Limit(probe.work / median_seconds(probe.call, repeats), probe.how)


def matrix_rate(dtype: torch.dtype, shape: Shape = PRODUCT, repeats: int = 5) -> Limit:
    """Operations per second of a product, see `product`."""
    probe = product(dtype, shape)
    return Limit(probe.work / median_seconds(probe.call, repeats), probe.how)


def reading(buffer_bytes: int = READ_BYTES) -> Probe:
    """One sum over a buffer far larger than the caches, on torch's threads."""
    buffer = torch.empty(buffer_bytes // 4)
    want_huge_pages([buffer])
    buffer.fill_(1)
    return Probe(buffer.sum, buffer.nbytes, f"float32 sum over {buffer_bytes / 2**30:.3g} GiB")


def product(dtype: torch.dtype, shape: Shape = PRODUCT, times: int = 10) -> Probe:
    """Products of rows x inner by inner x columns, by the fastest library call there is.

    float32 is torch.mm or, where torch has it, oneDNN with weights packed beforehand; other dtypes
    are torch.mm. What float32 takes bounds bfloat16 as well, which can be widened: some processors
    multiply it slower. A multiply-add is two operations.
    """
    rows, inner, columns = shape
    wide = torch.randn(rows, inner), torch.randn(inner, columns)
    x, weight = (t.to(dtype) for t in wide)
    calls: dict[str, Call] = {"torch.mm": lambda: torch.mm(x, weight)}
    packed = _packed_product(*wide)
    if packed is not None:
        name = "oneDNN with packed weights"
        calls[name if dtype == torch.float32 else f"float32 {name}"] = packed
    found = timed(calls, times)
    best = min(found, key=lambda name: statistics.median(found[name]))

    def run() -> None:
        for _ in range(times):
            calls[best]()

    return Probe(run, times * 2 * rows * inner * columns, f"{best}, {rows}x{inner}x{columns}")


def _packed_product(x: torch.Tensor, weight: torch.Tensor) -> Call | None:
    """x times weight by oneDNN with the weight in its own layout; None where torch lacks that."""
    operations = torch.ops.mkldnn
    if not (
        torch.backends.mkldnn.is_available()
        and hasattr(operations, "_reorder_linear_weight")
        and hasattr(operations, "_linear_pointwise")
    ):
        return None
    packed = operations._reorder_linear_weight(weight.t().contiguous(), len(x))
    return lambda: operations._linear_pointwise(x, packed, None, "none", [], "")


# ---- memory ---------------------------------------------------------------------------------


def resident_bytes(peak: bool = False) -> int:
    """Memory of this process that is in use now, or the most that ever was."""
    status = Path("/proc/self/status")
    if status.exists():  # unlike getrusage, it does not count what the parent process had
        field = "VmHWM:" if peak else "VmRSS:"
        (line,) = (line for line in status.read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) * 1024
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# ---- what a script prints -------------------------------------------------------------------


def machine() -> dict[str, object]:
    """What the numbers depend on besides the code."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "vector_unit": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "native": native.describe(),
    }


def print_header(title: str) -> None:
    """The script's name and the machine."""
    print(title)
    for name, value in machine().items():
        print(f"  {name:<12} {value}")
    print(flush=True)


def print_row(name: str, *cells: str, width: int = 16) -> None:
    """One line of a table: its name, then cells aligned to the right."""
    print(f"{name:<56}" + "".join(f"{cell:>{width}}" for cell in cells), flush=True)


def print_json(benchmark: str, **found: object) -> None:
    """The last line: everything, with machine and commit, for a program to read."""
    print(json.dumps({"benchmark": benchmark, **machine(), **origin(), **found}))


def milliseconds(times: Sequence[float]) -> list[float]:
    """For the record: what `timed` gave, in ms."""
    return [round(1e3 * t, 3) for t in times]


def arguments(
    text: str | None, parts: Sequence[str] = (), repeats: int = 5
) -> argparse.ArgumentParser:
    """The options that scripts share. `parts` are what --only may name."""
    parser = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--repeats", type=int, default=repeats, help=f"timed calls (default {repeats})"
    )
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to see that it runs")
    if parts:
        parser.add_argument(
            "--only", nargs="+", choices=parts, default=list(parts), help="parts to measure"
        )
    return parser


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names: Iterator[str] = iter(())
    if info.exists():
        lines = info.read_text().splitlines()
        names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
