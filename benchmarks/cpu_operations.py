"""The fast versions of the operations against their references, on this machine's CPU.

Prints one row per case with both medians and their ratio, and ends with one line of JSON.

    python benchmarks/cpu_operations.py [--repeats 7]
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from blackmamba.ops import causal_conv1d, expert_mlp, selective_scan
from blackmamba.train.origin import origin


def main(repeats: int) -> None:
    """Time every case `repeats` times, the two versions in turn."""
    print(f"{'case':<44}{'reference':>12}{'ours':>12}{'ratio':>8}")
    rows: list[dict[str, object]] = []
    for name, reference, ours in [*scan_cases(), *conv_cases(), *expert_cases()]:
        slow, fast = timed(reference, ours, repeats)
        ratio = statistics.median(slow) / statistics.median(fast)
        print(
            f"{name:<44}{statistics.median(slow) * 1e3:>9.1f} ms"
            f"{statistics.median(fast) * 1e3:>9.1f} ms{ratio:>8.2f}"
        )
        rows.append({
            "case": name,
            "reference_ms": [round(1e3 * t, 3) for t in sorted(slow)],
            "ours_ms": [round(1e3 * t, 3) for t in sorted(fast)],
            "ratio": round(ratio, 3),
        })  # fmt: skip
    machine = {
        "machine": platform.machine(),
        "vector_unit": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    print(json.dumps({"benchmark": "cpu_operations", **machine, **origin(), "rows": rows}))


def timed(
    first: Callable[[], object], second: Callable[[], object], repeats: int
) -> tuple[list[float], list[float]]:
    """Seconds of each call, after one of each to warm up; in turn, so that noise hits both."""
    first(), second()
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for run, found in zip((first, second), times, strict=True):
            start = time.perf_counter()
            run()
            found.append(time.perf_counter() - start)
    return times


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def scan_cases():
    """Sequential reference against the chunked scan, forward and with backward."""
    for b, l, d, n in [(8, 256, 512, 16), (1, 2048, 512, 16), (4, 1024, 1536, 16)]:
        leaves = [
            normal(b, l, d),
            normal(b, l, d) - 3,
            -torch.exp(normal(d, n)),
            normal(b, l, n),
            normal(b, l, n, seed=1),
        ]

        def forward(backend: str, leaves: list[Tensor] = leaves) -> Callable[[], object]:
            return lambda: selective_scan(*leaves, dt_softplus=True, backend=backend)  # pyright: ignore

        def both(backend: str, leaves: list[Tensor] = leaves) -> Callable[[], object]:
            def run() -> None:
                inputs = [t.detach().requires_grad_() for t in leaves]
                y, _ = selective_scan(*inputs, dt_softplus=True, backend=backend)  # pyright: ignore
                y.sum().backward()

            return run

        size = f"b {b}, l {l}, d {d}, n {n}"
        with torch.no_grad():
            yield f"scan, {size}", forward("reference"), forward("torch")
        yield f"scan + backward, {size}", both("reference"), both("torch")


def conv_cases():
    """torch's depthwise conv1d with its transposes against shifted multiply-adds, with backward."""
    x, weight, bias = normal(8, 256, 512), normal(512, 4), normal(512)

    def theirs() -> None:
        leaf = x.detach().requires_grad_()
        y = F.conv1d(leaf.transpose(1, 2), weight[:, None], bias, padding=3, groups=512)
        F.silu(y[..., :256].transpose(1, 2)).sum().backward()

    def ours() -> None:
        causal_conv1d(x.detach().requires_grad_(), weight, bias)[0].sum().backward()

    yield "conv + backward against F.conv1d, 8 x 256 x 512", theirs, ours


def expert_cases():
    """Every expert on every token against the grouped products, with backward."""
    e, m, f = 8, 256, 512
    fc1, fc2 = normal(e, 2 * f, m) / 16, normal(e, m, f) / 16
    for t in (1, 16, 2048):
        x = normal(t, m)
        ids = torch.randint(0, e, (t,), generator=torch.Generator().manual_seed(0))

        def dense(x: Tensor = x, ids: Tensor = ids) -> None:
            w1, w2 = fc1.detach().requires_grad_(), fc2.detach().requires_grad_()
            y = torch.zeros_like(x)
            for j in range(e):
                gate, up = F.linear(x, w1[j]).chunk(2, -1)
                y = torch.where((ids == j)[:, None], F.linear(F.silu(gate) * up, w2[j]), y)
            y.sum().backward()

        def grouped(x: Tensor = x, ids: Tensor = ids) -> None:
            w1, w2 = fc1.detach().requires_grad_(), fc2.detach().requires_grad_()
            expert_mlp(x, ids, w1, w2).sum().backward()

        yield f"8 experts + backward, {t} tokens", dense, grouped


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    main(parser.parse_args().repeats)
