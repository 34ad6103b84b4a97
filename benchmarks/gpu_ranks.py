"""A training step on several GPUs of one machine: tokens a second under each layout, and what of it
is communication; beside what `blackmamba plan` says of the same step.

Weights and tokens are random, each GPU has so many rows. Communication is the time of NCCL's
kernels in one step of the first rank; "waited" is the part of it in which no other kernel runs.

    torchrun --nproc-per-node 2 benchmarks/gpu_ranks.py [--preset blackmamba-1.5b] [--rows 16]

Without torchrun there is one GPU, and one layout.
"""

import argparse
import gc
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from blackmamba.analyse.machines import H200
from blackmamba.analyse.scaling import Grid, plan
from blackmamba.config import ModelConfig
from blackmamba.model import BlackMamba
from blackmamba.model.size import training_flops_per_token
from blackmamba.presets import presets
from blackmamba.train import TrainConfig, train_step
from blackmamba.train.mixed import narrow_weights
from blackmamba.train.optimizer import build_optimizer
from blackmamba.train.origin import origin
from blackmamba.train.parallel.config import ParallelConfig
from blackmamba.train.parallel.ranks import Ranks, join
from blackmamba.train.parallel.spread import Spread
from blackmamba.train.step import StepOutcome
from gpu_measure import DEVICE, machine
from gpu_training import seconds_apart

LAYOUTS: dict[str, dict[str, Any] | None] = {
    "alone": None,  # each GPU for itself, at the same time: what one process does
    "data parallel": {},
    "full": {"shard": "full"},
    "experts": {"expert": 2},
    "full, experts": {"shard": "full", "expert": 2},
    "hybrid": {"shard": "hybrid", "shard_degree": 1},
}


def main(
    preset: str = "blackmamba-1.5b",
    rows: int = 16,
    length: int = 2048,
    repeats: int = 8,
    layouts: Sequence[str] = tuple(LAYOUTS),
    tiny: bool = False,
) -> None:
    """Print a row for each layout; the first rank speaks."""
    if tiny:
        preset, rows, length = "tiny", 2, 16
    config = presets[preset]
    facts: dict[str, Any] = {"preset": preset, "rows": rows, "length": length, "tiny": tiny}
    with join(torch.device(DEVICE.type), 120) as ranks:

        def say(line: str) -> None:
            if ranks.is_first:
                print(line, flush=True)

        facts |= {"gpus": ranks.size, "links": _links(ranks, tiny)}
        say("gpu_ranks: " + ", ".join(f"{k} {v}" for k, v in (machine() | facts).items()))
        say(f"  {'layout':<18}{'ms':>9}{'tokens/s':>11}{'times 1':>9}{'MFU':>7}{'peak GB':>9}"
            f"{'NCCL ms':>9}{'waited':>9}{'plan ms':>16}{'plan GB':>9}  loss")  # fmt: skip
        found: dict[str, dict[str, Any]] = {}
        for name in layouts if ranks.is_group else ("alone",):
            try:
                case = _measure(config, rows, length, name, repeats, ranks)
            except torch.OutOfMemoryError:
                say(f"  {name:<18}  out of memory")
                continue
            finally:
                gc.collect()
                if DEVICE.type == "cuda":
                    torch.cuda.empty_cache()
            first = found.get("alone", {}).get("tokens_s", 0.0)
            times = case["tokens_s"] / first if first else 1.0
            low, high = case["plan_ms"]
            say(
                f"  {name:<18}{case['ms']:>9.1f}{case['tokens_s']:>11,.0f}{times:>9.3f}"
                f"{case['mfu']:>7.1%}{case['peak_gb']:>9.2f}{case['nccl_ms']:>9.1f}"
                f"{case['waited_ms']:>9.1f}{low:>8.1f}{high:>8.1f}{case['plan_gb']:>9.2f}"
                f"  {case['loss']:.6f}"
            )
            found[name] = case
        say(
            json.dumps({"benchmark": "gpu_ranks", **machine(), **origin(), **facts, "found": found})
        )


def _measure(
    config: ModelConfig, rows: int, length: int, name: str, repeats: int, ranks: Ranks
) -> dict[str, Any]:
    """Median of steps that follow each other without a pause, the slowest rank's."""
    layout = LAYOUTS[name]
    parallel = ParallelConfig(**(layout or {}))
    size = 1 if layout is None else ranks.size
    weights = "master" if parallel.shard == "none" else "float32"
    settings = TrainConfig(
        steps=1000, batch_size=rows * size, seq_len=length, lr=1e-4, dtype="bfloat16",
        weights=weights,
    )  # fmt: skip
    torch.manual_seed(0)
    model = BlackMamba(config, device=ranks.device, compute_dtype=torch.bfloat16).train()
    masters = narrow_weights(model, torch.bfloat16) if weights == "master" else {}
    spread = None if layout is None else Spread.over(ranks, model, parallel)
    if spread is not None:
        masters = {n: spread.shards.piece(n, whole) for n, whole in masters.items()}
    optimizer = build_optimizer(model if spread is None else spread.shards, settings, masters)
    del masters
    gradients = None if spread is None else spread.gradients()
    torch.manual_seed(ranks.rank)
    ids = torch.randint(0, config.n_tokens, (rows, length + 1), device=ranks.device)
    inputs, labels = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def step() -> StepOutcome:
        return train_step(
            model, optimizer, inputs, labels, lr=1e-4, grad_clip=1.0, gradients=gradients
        )

    for _ in range(3):
        step()
    _wait()
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = _slowest(seconds_apart(step, repeats), ranks)
    nccl, waited, names = _communication(step)
    loss = step().loss
    tokens = rows * length * size
    grid = Grid(
        gpus=size,
        node_gpus=size,
        shards=size if parallel.shard == "full" else 1,
        experts=parallel.expert,
    )
    planned = plan(config, settings, grid, H200)
    flops = training_flops_per_token(config, length) * tokens / seconds
    peak = torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else 0
    return {
        "ms": 1e3 * seconds,
        "tokens_s": tokens / seconds,
        "mfu": flops / (H200.product_flop_s * size),
        "peak_gb": peak / 1e9,
        "nccl_ms": nccl,
        "waited_ms": waited,
        "kernels": names,
        "plan_ms": [1e3 * s for s in planned.step_s],
        "plan_gb": planned.memory_bytes / 1e9,
        "plan_traffic_ms": {t.what: 1e3 * t.seconds(H200, grid) for t in planned.traffic},
        "plan_sent_gb": {t.what: t.sent_bytes / 1e9 for t in planned.traffic},
        "loss": loss,
    }


def _slowest(seconds: float, ranks: Ranks) -> float:
    """Of all ranks."""
    told = torch.tensor([seconds], device=ranks.device)
    if ranks.is_group:
        dist.all_reduce(told, op=dist.ReduceOp.MAX)
    return told.item()


def _communication(step: Callable[[], object]) -> tuple[float, float, dict[str, float]]:
    """Milliseconds of NCCL's kernels in a step, of those beside which nothing runs, by name."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    if DEVICE.type != "cuda":
        step()
        return 0.0, 0.0, {}
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiled:
        step()
        torch.cuda.synchronize()
    results = profiled.profiler.kineto_results  # pyright: ignore
    ours: list[tuple[int, int]] = []
    others: list[tuple[int, int]] = []
    names: dict[str, float] = {}
    for event in results.events():
        if event.device_type() != DeviceType.CUDA:
            continue
        span = event.start_ns(), event.start_ns() + event.duration_ns()
        is_nccl = "nccl" in event.name().lower()
        (ours if is_nccl else others).append(span)
        if is_nccl:
            name = event.name()[:60]
            names[name] = names.get(name, 0.0) + event.duration_ns() / 1e6
    either = _covered(ours + others)
    return _covered(ours) / 1e6, (either - _covered(others)) / 1e6, names


def _covered(spans: Sequence[tuple[int, int]]) -> int:
    """How long at least one of them lasts."""
    total, until = 0, 0
    for start, end in sorted(spans):
        total += max(0, end - max(start, until))
        until = max(until, end)
    return total


def _links(ranks: Ranks, tiny: bool) -> dict[str, float]:
    """Gigabytes a second that a rank sends in large collectives, as a ring counts them."""
    if not ranks.is_group:
        return {}
    n, numbers = ranks.size, 1 << (10 if tiny else 29)
    whole = torch.zeros(numbers, dtype=torch.bfloat16, device=ranks.device)
    parts = list(whole.chunk(n))
    twin = torch.zeros_like(whole)
    share = (n - 1) / n * whole.nbytes
    kinds: dict[str, tuple[float, Callable[[], object]]] = {
        "sum": (2 * share, lambda: dist.all_reduce(whole)),
        "gather": (share, lambda: dist.all_gather(parts, twin[: numbers // n])),
        "all to all": (share, lambda: dist.all_to_all_single(twin, whole)),
    }
    found: dict[str, float] = {}
    for name, (sent, run) in kinds.items():
        run()
        _wait()
        start = time.perf_counter()
        for _ in range(5):
            run()
        _wait()
        found[name] = round(5 * sent / (time.perf_counter() - start) / 1e9, 1)
    return found


def _wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="blackmamba-1.5b")
    parser.add_argument("--rows", type=int, default=16, help="of each GPU")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--layouts", nargs="+", choices=tuple(LAYOUTS), default=tuple(LAYOUTS))
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to see that it runs")
    main(**vars(parser.parse_args()))
