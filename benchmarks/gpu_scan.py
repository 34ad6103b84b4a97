"""The selective scan and the causal convolution on one GPU, forward and backward.

Limits. With E = batch x length x d_inner numbers of y and n states, a pass is bound by the largest
of

- bytes: forward reads x, dt, z and writes y (4 E numbers) and, to be used by the backward pass, one
  state in 16 tokens (4 n / 16 E bytes); backward reads x, dt, z, the gradient of y and those
  states, and writes the gradients of x, dt and z (7 E numbers). Over the rate of a copy, measured.
- exponentials: n for each number of y, and 3 more for softplus and gate (the gate's division is one
  too); the backward pass does no fewer. 16 a clock and multiprocessor.
- instructions: for each state, forward 5 (the exponent's product, the exponential, the drive's
  product, a multiply-add for the state, one for y), backward 13 (the four that compute the state
  again; a multiply-add each for the state's gradient, y, and the gradients of x, dt and A; products
  for the gradients of B and C, for the decay, and for decay's gradient). 128 a clock and
  multiprocessor.

Sums over channels and states, loads, and what is done once for each number of y are not counted.
The convolution is bound by bytes: 2 E numbers forward, 3 E backward.

Beside ours are what mamba_ssm's and causal_conv1d's CUDA kernels took on an H100 at batch 8,
d_inner 2304, length 2048, 16 states in bfloat16, scaled by the size. Where mamba_ssm, causal_conv1d
or flash-linear-attention (its convolution) are installed, they are measured in the same run. Times
are medians of replays of captured graphs: what the GPU takes.
The last line is JSON.

    python benchmarks/gpu_scan.py
    python benchmarks/gpu_scan.py --plans forward    # ways to cut a pass into blocks, compared
    ncu --clock-control none -k regex:scan_ python benchmarks/gpu_scan.py --once    # for profilers
"""

import argparse
import functools
import json
import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from blackmamba.ops import causal_conv1d, selective_scan
from blackmamba.ops.gpu import hopper
from blackmamba.ops.selective_scan import call as scan_call
from blackmamba.ops.selective_scan.plan import (
    CUDA_BACKWARD,
    CUDA_FORWARD,
    CUDA_FORWARD_UNITS,
    CUDA_OTHERS,
    Plan,
    Tuning,
    cuts,
    planned,
)
from blackmamba.train.origin import origin
from gpu_measure import DEVICE, installed, limits

SHAPES = ((8, 2048, 2304), (16, 2048, 2304), (1, 32768, 2304), (8, 2048, 2944))
PEER_SHAPE = (8, 2048, 2304)
PEER_MS = {"scan": (0.655, 2.73), "conv": (0.084, 0.31)}
N_STATES = 16
N_TAPS = 4


def main(repeats: int = 30) -> None:
    """Time all shapes, on a stream of their own: the usual one cannot be captured."""
    with torch.cuda.stream(torch.cuda.Stream()):
        measure(repeats)


def measure(repeats: int) -> None:
    """The table."""
    rates = machine_rates()
    print(", ".join(f"{name} {rate:.3g}/s" for name, rate in rates.items()))
    print(
        f"{'':<44}{'ours ms':>10}{'peer ms':>10}{'ratio':>8}{'limit ms':>10}{'of limit':>10}  bound"
    )
    found: dict[str, object] = {}
    for shape in SHAPES:
        for name, calls, least_of in (
            ("scan", scan_calls(*shape), scan_limits(*shape, rates)),
            ("conv", conv_calls(*shape), conv_limits(*shape, rates)),
        ):
            times = [median_ms(call, repeats) for call in calls]
            (which, theirs), *others = peers_ms(name, shape, repeats).items()
            passes = zip(("forward", "backward"), times, theirs, least_of, strict=True)
            total = [0.0, 0.0, 0.0]
            for what, ours, peer, limit in passes:
                bound, least = max(limit.items(), key=lambda item: item[1])
                show(f"{name} {what} {shape}", ours, peer, least, bound)
                total = [a + b for a, b in zip(total, (ours, peer, least), strict=True)]
            show(f"{name} both {shape}", *total, f"peer: {which}")
            for other, ms in others:
                show(f"{name} both {shape}", total[0], sum(ms), total[2], f"peer: {other}")
            with torch.inference_mode():
                alone = median_ms(calls[0], repeats)
            bound, least = max(least_of[0].items(), key=lambda item: item[1])
            show(f"{name} forward, no gradient {shape}", alone, theirs[0], least, bound)
            found[f"{name} {shape}"] = {
                "ms": times, "no_gradient_ms": alone, "limits_ms": least_of, "peer_ms": theirs,
                "peer": which, "others_ms": dict(others),
            }  # fmt: skip
    gpu = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    print(json.dumps({"benchmark": "gpu_scan", **gpu, **origin(), "rates": rates, **found}))


def once() -> None:
    """A forward and a backward pass, after one that compiles."""
    forward, backward = scan_calls(*PEER_SHAPE)
    for _ in range(2):
        forward()
        backward()
    torch.cuda.synchronize()


def compare_plans(which: str, repeats: int) -> None:
    """Milliseconds of a pass by blocks' channels, a multiprocessor's warps and rows' chunks."""
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    usual = scan_call.plan
    here = torch.device("cuda", torch.cuda.current_device())
    forward = CUDA_FORWARD + (CUDA_FORWARD_UNITS if hopper.runs_on(here) else ())
    with torch.cuda.stream(torch.cuda.Stream()):
        for shape in SHAPES:
            size = (*shape, N_STATES, processors)
            mine = forward if which == "forward" else CUDA_BACKWARD
            rows: list[tuple[float, Plan]] = []
            for cut in dict.fromkeys(cuts(*size, *mine, *CUDA_OTHERS)):
                tried = functools.partial(tried_plan, usual, mine, planned(cut, shape[1]))
                scan_call.plan = tried
                call = scan_calls(*shape)[0 if which == "forward" else 1]
                rows.append((median_ms(call, repeats), planned(cut, shape[1])))
            scan_call.plan = usual
            chosen = usual(*size, *mine)
            print(f"{which} {shape}; chosen: {chosen}")
            for time, cut in sorted(rows, key=lambda row: row[0])[:6]:
                print(f"  {time:.3f} ms  {cut}", flush=True)


def tried_plan(
    usual: Callable[..., Plan], mine: tuple[Tuning, ...], tried: Plan, *args: int | Tuning
) -> Plan:
    """In place of `plan`: the plan that is tried, for the pass that has these tunings."""
    return tried if args[-len(mine) :] == mine else usual(*args)


def numbers(shape: tuple[int, int, int]) -> int:
    """How many y has."""
    b, l, d = shape
    return b * l * d


def show(name: str, ours: float, peer: float, limit: float, bound: str) -> None:
    """One line of the table."""
    cells = f"{ours:>10.3f}{peer:>10.3f}{peer / ours:>8.2f}{limit:>10.3f}{limit / ours:>10.0%}"
    print(f"{name:<44}{cells}  {bound}", flush=True)


def machine_rates() -> dict[str, float]:
    """Bytes a second of a copy; exponentials and instructions a second at the highest clock."""
    properties = torch.cuda.get_device_properties(0)
    clock = properties.multi_processor_count * getattr(properties, "clock_rate", 1_980_000) * 1e3
    return {
        "bytes": limits(tiny=False).bytes_s,
        "exponentials": 16 * clock,
        "instructions": 128 * clock,
    }


def scan_limits(b: int, l: int, d: int, rates: dict[str, float]) -> list[dict[str, float]]:
    """Milliseconds of each limit, forward and backward."""
    e, n = b * l * d, N_STATES
    states = e * 4 * n / 16
    work = (
        {"bytes": 4 * 2 * e + states, "exponentials": (n + 3) * e, "instructions": 5 * n * e},
        {"bytes": 7 * 2 * e + states, "exponentials": (n + 3) * e, "instructions": 13 * n * e},
    )
    return [{name: 1e3 * amount / rates[name] for name, amount in one.items()} for one in work]


def conv_limits(b: int, l: int, d: int, rates: dict[str, float]) -> list[dict[str, float]]:
    """The same for the convolution."""
    return [{"bytes": 1e3 * count * 2 * b * l * d / rates["bytes"]} for count in (2, 3)]


def scan_calls(b: int, l: int, d: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """A forward and a backward pass of a layer's scan, its inputs as the layer has them."""
    r = d // 32
    xz, columns = random(b, l, 2 * d), random(b, l, r + 2 * N_STATES)
    x, dt = random(b, l, d), random(b, l, d)
    A = -torch.arange(1.0, N_STATES + 1, device="cuda").repeat(d, 1)
    D, bias = torch.ones(d, device="cuda"), torch.randn(d, device="cuda") - 3
    B, C = columns[..., r : r + N_STATES], columns[..., r + N_STATES :]
    leaves = [t.detach().requires_grad_() for t in (x, dt, A, B, C, D, xz[..., d:], bias)]
    grad = random(b, l, d)

    def forward() -> Tensor:
        *inputs, dt_bias = leaves
        return selective_scan(*inputs, dt_bias=dt_bias, dt_softplus=True)[0]

    y = forward()
    return forward, lambda: torch.autograd.grad(y, leaves, grad, retain_graph=True)


def conv_calls(b: int, l: int, d: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """The same of its convolution."""
    leaves = [random(b, l, 2 * d)[..., :d], random(d, N_TAPS), random(d)]
    leaves = [t.detach().requires_grad_() for t in leaves]
    grad = random(b, l, d)

    def forward() -> Tensor:
        return causal_conv1d(*leaves)[0]

    y = forward()
    return forward, lambda: torch.autograd.grad(y, leaves, grad, retain_graph=True)


def random(*shape: int) -> Tensor:
    """Bfloat16 numbers."""
    return torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)


def peers_ms(
    name: str, shape: tuple[int, int, int], repeats: int
) -> dict[str, tuple[float, float]]:
    """Forward and backward milliseconds of the packages that are installed; published ones where
    none is."""
    calls: dict[str, tuple[Callable[[], Tensor], list[Tensor], tuple[int, ...]]] = {}
    b, l, d = shape
    if name == "scan" and installed("mamba_ssm"):
        calls["mamba_ssm, measured"] = (*_mamba_ssm(b, l, d), (b, d, l))
    if name == "conv" and installed("causal_conv1d"):
        calls["causal_conv1d, measured"] = (*_causal_conv1d(b, l, d), (b, d, l))
    if name == "conv" and installed("fla"):
        calls["flash-linear-attention, measured"] = (*_fla(b, l, d), shape)
    if not calls:
        scale = numbers(shape) / numbers(PEER_SHAPE)
        forward_ms, backward_ms = PEER_MS[name]
        return {"published, scaled": (forward_ms * scale, backward_ms * scale)}
    found: dict[str, tuple[float, float]] = {}
    for which, (forward, leaves, size) in calls.items():
        y, grad = forward(), random(*size)

        def backward(y: Tensor = y, leaves: list[Tensor] = leaves, grad: Tensor = grad) -> object:
            return torch.autograd.grad(y, leaves, grad, retain_graph=True)

        found[which] = median_ms(forward, repeats), median_ms(backward, repeats)
    return found


def _mamba_ssm(b: int, l: int, d: int) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """A forward pass and what has gradients; y is (b, d, l)."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    inputs = [random(b, d, l), random(b, d, l), -torch.rand(d, N_STATES, device=DEVICE)]
    inputs += [random(b, 1, N_STATES, l), random(b, 1, N_STATES, l)]
    inputs += [torch.ones(d, device=DEVICE), random(b, d, l), torch.randn(d, device=DEVICE)]
    leaves = [t.requires_grad_() for t in inputs]
    return lambda: selective_scan_fn(*leaves, delta_softplus=True), leaves


def _causal_conv1d(b: int, l: int, d: int) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """The same."""
    from causal_conv1d import causal_conv1d_fn

    leaves = [t.requires_grad_() for t in (random(b, d, l), random(d, N_TAPS), random(d))]
    return lambda: causal_conv1d_fn(*leaves, activation="silu"), leaves


def _fla(b: int, l: int, d: int) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """The same, but y is (b, l, d)."""
    try:
        from fla.modules.conv import causal_conv1d as by_fla
    except ImportError:  # as it was called
        from fla.modules.convolution import causal_conv1d as by_fla
    x, weight, bias = (t.requires_grad_() for t in (random(b, l, d), random(d, N_TAPS), random(d)))

    def forward() -> Tensor:
        out = by_fla(x=x, weight=weight, bias=bias, activation="silu")
        return out[0] if isinstance(out, tuple) else out  # most give the last state besides

    return forward, [x, weight, bias]


def median_ms(run: Callable[[], object], repeats: int) -> float:
    """Median milliseconds of a replay of the call."""
    run()
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        run()
    times: list[float] = []
    for i in range(repeats + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        if i >= 3:
            times.append(start.elapsed_time(end))
    return statistics.median(times)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=30, help="timed calls (default 30)")
    parser.add_argument("--once", action="store_true", help="one call of each pass, no times")
    parser.add_argument("--plans", choices=("forward", "backward"), help="time other plans")
    given = parser.parse_args()
    if given.once:
        once()
    elif given.plans:
        compare_plans(given.plans, given.repeats)
    else:
        main(given.repeats)
