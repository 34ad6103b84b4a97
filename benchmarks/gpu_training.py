"""A whole training step on a GPU: tokens a second, utilisation, memory, and where the time goes.

A step is what `blackmamba train` does: loss, backward, norm of the gradient, clipping, AdamW.
Utilisation is that of docs/performance.md: FLOPs that training a token takes at least, times tokens
a second, over the measured rate of a large bfloat16 product. Weights are random, tokens too. Beside
ours, where transformers is installed, its Jamba in that shape, one row at a time; with mamba_ssm's
and causal_conv1d's kernels where those are, too.

    python benchmarks/gpu_training.py [--preset blackmamba-1.5b] [--rows 8 16] [--profile]
    python benchmarks/gpu_training.py --rows 16 --recompute none cheap layers
"""

import argparse
import dataclasses
import itertools
import json
import re
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from blackmamba.model import BlackMamba
from blackmamba.model.size import parameters, training_flops_per_token
from blackmamba.presets import presets
from blackmamba.train import TrainConfig, train_step
from blackmamba.train.mixed import narrow_weights
from blackmamba.train.optimizer import build_optimizer
from blackmamba.train.origin import origin
from blackmamba.train.step import CapturedGradients, GradientsOfBatch
from gpu_measure import DEVICE, installed, limits, machine
from peers import jamba_peer, transformers_version

HAS_KERNELS = DEVICE.type == "cuda" and installed("mamba_ssm") and installed("causal_conv1d")
"""Whether transformers can use those."""

CLASSES = (
    ("scan", r"scan|^(pack|carry|forward|backward|backward_local|sum)_kernel"),
    ("convolution, x_proj, dt_proj", r"projected"),
    ("convolution", r"conv1d|causal_conv"),
    ("norm", r"rms_norm|layer_norm|LayerNorm|GammaBeta"),
    ("loss", r"cross_entropy|loss_scale"),
    ("optimizer", r"adamw|lpnorm|multi_tensor"),
    ("router", r"sinkhorn|router|choice"),
    ("experts' products", r"GroupProblemShape|Grouped|grouped|enable_3x_kernel_for_sm9x"),
    (
        "experts",
        r"^(count|place|gather|scatter|activate|activate_backward)_kernel|expert|sort|histogram",
    ),
    ("products", r"gemm|cutlass|nvjet|xmma|cublas|splitK"),
    ("elementwise", r"elementwise|vectorized|Copy|copy|Memset|Memcpy|fill|Cat|index|reduce|embed"),
)
"""Name and pattern of the classes that kernels are counted in; the first that fits."""


def main(
    repeats: int = 10,
    tiny: bool = False,
    preset: str = "blackmamba-1.5b",
    rows: Sequence[int] = (8, 16),
    length: int = 2048,
    weights: Sequence[str] = ("master",),
    recompute: Sequence[str] = ("none",),
    residual: str = "float32",
    capture: bool = False,
    profile: bool = False,
    peer: bool = True,
) -> None:
    """Print a row for each combination."""
    if tiny:
        preset, rows, length = "tiny", (2,), 16
    facts = machine()
    print("gpu_training: " + ", ".join(f"{k} {v}" for k, v in facts.items()))
    rate = limits(tiny).flops_s
    count = parameters(presets[preset])
    print(
        f"  {preset}: {count.total:,} parameters, {count.active:,} active; rows of {length}; "
        f"residual stream {residual}; product {rate / 1e12:,.0f} TFLOP/s"
    )
    print(f"  {'rows':>4} {'weights':<12}{'recompute':<10}{'ms':>9}{'tokens/s':>11}"
          f"{'TFLOP/s':>9}{'MFU':>7}{'peak GB':>9}{'reserved':>9}")  # fmt: skip
    found: list[dict[str, Any]] = []
    for n_rows, how, what in itertools.product(rows, weights, recompute):
        case: dict[str, Any] = {"rows": n_rows, "weights": how, "recompute": what}
        try:
            case |= measure(preset, n_rows, length, how, what, residual, capture, repeats, profile)
        except torch.OutOfMemoryError:
            print(f"  {n_rows:>4} {how:<12}{what:<10}  out of memory", flush=True)
            continue
        finally:
            if DEVICE.type == "cuda":
                torch.cuda.empty_cache()
        flops = training_flops_per_token(presets[preset], length) * case["tokens_s"]
        case |= {"tflop_s": flops / 1e12, "mfu": flops / rate}
        print(
            f"  {n_rows:>4} {how:<12}{what:<10}{case['ms']:>9.1f}{case['tokens_s']:>11,.0f}"
            f"{case['tflop_s']:>9.1f}{case['mfu']:>7.1%}{case['peak_gb']:>9.2f}"
            f"{case['reserved_gb']:>9.2f}",
            flush=True,
        )
        _print_classes(case)
        found.append(case)
    theirs: dict[str, float] = {}
    if peer and transformers_version():
        try:
            theirs = measure_peer(preset, length, min(repeats, 3))
            print(
                f"  {1:>4} transformers {transformers_version()}, Jamba {theirs['ms']:>8.1f}"
                f"{theirs['tokens_s']:>11,.0f}"
            )
        except torch.OutOfMemoryError:
            print("  transformers' Jamba: out of memory")
    print(
        json.dumps(
            {
                "benchmark": "gpu_training",
                "peer": theirs,
                **facts,
                **origin(),
                "tiny": tiny,
                "preset": preset,
                "length": length,
                "residual": residual,
                "capture": capture,
                "product_tflop_s": rate / 1e12,
                "cases": found,
            }
        )
    )


def measure(
    preset: str,
    rows: int,
    length: int,
    weights: str,
    recompute: str,
    residual: str,
    capture: bool,
    repeats: int,
    profile: bool,
) -> dict[str, Any]:
    """Median of steps that follow each other without a pause, after three to warm up."""
    config = dataclasses.replace(presets[preset], residual_dtype=residual)  # pyright: ignore
    settings = TrainConfig(
        steps=1000, batch_size=rows, seq_len=length, lr=1e-4, dtype="bfloat16",
        weights=weights, recompute=recompute,
    )  # fmt: skip  # pyright: ignore
    torch.manual_seed(0)
    model = BlackMamba(config, device=DEVICE, compute_dtype=torch.bfloat16).train()
    model.recompute = settings.recompute
    masters = {} if weights == "float32" else narrow_weights(model, torch.bfloat16)
    optimizer = build_optimizer(model, settings, masters)
    del masters
    gradients = (CapturedGradients if capture else GradientsOfBatch)(model)
    ids = torch.randint(0, config.n_tokens, (rows, length + 1), device=DEVICE)
    inputs, labels = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def step() -> None:
        train_step(model, optimizer, inputs, labels, lr=1e-4, grad_clip=1.0, gradients=gradients)

    for _ in range(3):
        step()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    seconds = seconds_apart(step, repeats)
    found: dict[str, Any] = {
        "ms": 1e3 * seconds,
        "tokens_s": rows * length / seconds,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
        "reserved_gb": torch.cuda.max_memory_reserved() / 1e9,
    }
    if profile:
        found["classes"], found["kernels"] = kernel_classes(step)
    return found


def measure_peer(preset: str, length: int, repeats: int) -> dict[str, float]:
    """The same of transformers' Jamba, of one row: loss, backward, AdamW; bfloat16 weights."""
    config = presets[preset]
    model = jamba_peer(config, torch.bfloat16, HAS_KERNELS).to(DEVICE).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=DEVICE.type == "cuda")
    ids = torch.randint(0, config.n_tokens, (1, length), device=DEVICE)

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    seconds = seconds_apart(step, repeats)
    return {"ms": 1e3 * seconds, "tokens_s": length / seconds}


def seconds_apart(step: Any, repeats: int) -> float:
    """Median seconds from one end of a step to the next; the host waits for none of them."""
    if DEVICE.type != "cuda":
        start = time.perf_counter()
        for _ in range(repeats):
            step()
        return (time.perf_counter() - start) / repeats
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    times = [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(events)]
    return statistics.median(times)


# ---- where the time goes --------------------------------------------------------------------


def kernel_classes(step: Any) -> tuple[dict[str, float], list[tuple[str, float, int]]]:
    """Milliseconds of each class of kernels in one step, and the kernels that take most."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profiled(activities=activities, acc_events=True) as profile:
        step()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
    classes = {name: 0.0 for name, _ in CLASSES} | {"other": 0.0}
    kernels: list[tuple[str, float, int]] = []
    for event in profile.key_averages():
        if event.device_type != DeviceType.CUDA:
            continue
        ms = event.self_device_time_total / 1e3
        classes[kernel_class(event.key)] += ms
        kernels.append((event.key, ms, event.count))
    kernels.sort(key=lambda k: -k[1])
    return classes, kernels[:40]


def kernel_class(name: str) -> str:
    """The class that a kernel of this name is counted in."""
    return next((c for c, pattern in CLASSES if re.search(pattern, name)), "other")


def _print_classes(case: dict[str, Any]) -> None:
    if "classes" not in case:
        return
    total = sum(case["classes"].values()) or 1.0
    print("      kernels of one step, by class:")
    for name, ms in sorted(case["classes"].items(), key=lambda item: -item[1]):
        print(f"        {name:<30}{ms:>9.2f} ms{ms / total:>8.1%}")
    print(f"        {'all':<30}{total:>9.2f} ms, of {case['ms']:.2f} ms between steps")
    print("      the longest kernels:")
    for name, ms, count in case["kernels"]:
        print(f"        {ms:>9.2f} ms {count:>5} x  {kernel_class(name):<18} {name[:90]}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--preset", default="blackmamba-1.5b")
    parser.add_argument("--rows", nargs="+", type=int, default=[8, 16])
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--weights", nargs="+", default=["master"])
    parser.add_argument("--recompute", nargs="+", default=["none"])
    parser.add_argument("--residual", choices=("float32", "compute"), default="float32")
    parser.add_argument("--capture", action="store_true", help="forward and backward as a graph")
    parser.add_argument("--profile", action="store_true", help="kernels by class")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to see that it runs")
    parser.add_argument("--no-peer", dest="peer", action="store_false", help="ours alone")
    main(**vars(parser.parse_args()))
