"""Norm, loss, optimizer, activation on a GPU: each beside plain and compiled PyTorch and a limit.

The limit is the larger of two times: bytes that must move at the rate of a large copy, and
operations that must be done at the rate of a large product. Both rates are measured first. Liger's
kernels are in the table where they are installed. Prints medians and ends with a line of JSON.

    python benchmarks/gpu_losses.py [--only norm loss optimizer activation] [--tokens 32768]
"""

import argparse
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from blackmamba.model import BlackMamba
from blackmamba.ops import (
    AdamWTensors,
    activate,
    adamw_,
    adamw_factors,
    add_rms_norm,
    global_norm,
    linear_cross_entropy,
)
from blackmamba.presets import presets
from blackmamba.train.origin import origin
from gpu_measure import DEVICE, Limits, installed, limits, machine, normal, timed

PARTS = ("norm", "loss", "optimizer", "activation")
EPS = 1e-5


def main(
    repeats: int = 20,
    tiny: bool = False,
    only: Sequence[str] = PARTS,
    tokens: int = 32_768,
    preset: str = "blackmamba-1.5b",
) -> None:
    """Print a table for each part."""
    if tiny:
        tokens, preset = 32, "tiny"
    facts = machine()
    print("gpu_losses: " + ", ".join(f"{k} {v}" for k, v in facts.items()))
    limit = limits(tiny)
    print(f"  copy {limit.bytes_s / 1e9:,.0f} GB/s, product {limit.flops_s / 1e12:,.0f} TFLOP/s")
    run: dict[str, Callable[[], dict[str, Any]]] = {
        "norm": lambda: norm(presets[preset].d_model, tokens, limit, repeats, tiny),
        "loss": lambda: loss(preset, tokens, limit, repeats, tiny),
        "optimizer": lambda: optimizer(preset, limit, repeats),
        "activation": lambda: activation(tokens, limit, repeats, tiny),
    }
    found = {part: run[part]() for part in only}
    rates = {"copy_gb_s": limit.bytes_s / 1e9, "product_tflop_s": limit.flops_s / 1e12}
    print(
        json.dumps(
            {
                "benchmark": "gpu_losses",
                **facts,
                **origin(),
                "tiny": tiny,
                "tokens": tokens,
                "preset": preset,
                **rates,
                **found,
            }
        )
    )


# ---- the parts ------------------------------------------------------------------------------


def norm(m: int, t: int, limit: Limits, repeats: int, tiny: bool) -> dict[str, Any]:
    """x + update and its norm, one layer's worth; stream float32 or bfloat16, layers bfloat16."""
    found: dict[str, Any] = {}
    for stream in (torch.float32, torch.bfloat16):
        size = stream.itemsize
        moved = {"forward": t * m * (2 * size + 4), "backward": t * m * (3 * size + 4)}
        if stream == torch.bfloat16:
            moved["backward"] -= 2 * t * m  # the update's gradient is the stream's
        name = f"add_rms_norm, {t} x {m}, {str(stream).removeprefix('torch.')} stream"
        found[name] = {
            way: _table(f"{name}, {way}", seconds, moved[way] / limit.bytes_s)
            for way, seconds in _norm_seconds(stream, m, t, repeats, tiny).items()
        }
    return found


def _norm_seconds(
    stream: torch.dtype, m: int, t: int, repeats: int, tiny: bool
) -> dict[str, dict[str, float]]:
    x, update = normal(t, m, dtype=stream), normal(t, m, seed=1)
    leaves = tuple(p.requires_grad_() for p in (x, update, torch.ones(m, device=DEVICE)))
    grads = normal(t, m, dtype=stream, seed=2), normal(t, m, seed=3)

    def plain(x: Tensor, update: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = (x + update).to(x.dtype)
        y = F.rms_norm(total.float(), (x.shape[-1],), weight, EPS)
        return total, y.to(torch.bfloat16)

    def ours(x: Tensor, update: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return add_rms_norm(x, update, weight, EPS, out_dtype=torch.bfloat16, backend="triton")

    programs: dict[str, Any] = {"ours": ours, "plain": plain}
    if not tiny:
        programs["compiled"] = torch.compile(plain, dynamic=False)
    outputs = {name: program(*leaves) for name, program in programs.items()}
    return {
        "forward": timed(
            {name: lambda p=program: p(*leaves) for name, program in programs.items()}, repeats
        ),
        "backward": timed(
            {
                name: lambda o=output: torch.autograd.grad(o, leaves, grads, retain_graph=True)
                for name, output in outputs.items()
            },
            repeats,
        ),
    }


def loss(preset: str, t: int, limit: Limits, repeats: int, tiny: bool) -> dict[str, Any]:
    """Head and cross-entropy, forward and backward."""
    config = presets[preset]
    m, v = config.d_model, config.vocab_size
    x, weight = normal(t, m).requires_grad_(), (0.02 * normal(v, m, seed=1)).requires_grad_()
    labels = torch.randint(0, v, (t,), device=DEVICE)

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, weight).float(), labels, reduction="sum")

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(x, weight, labels, backend="triton")

    programs: dict[str, Any] = {"ours": ours, "plain": plain}
    if not tiny:
        programs["compiled"] = torch.compile(plain, dynamic=False)
    if installed("liger_kernel") and not tiny:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        module = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        programs["liger"] = lambda x, weight: module(weight, x, labels)
    memory: dict[str, float] = {}

    def call(name: str) -> None:
        if DEVICE.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        torch.autograd.grad(programs[name](x, weight), (x, weight))
        if DEVICE.type == "cuda":
            memory[name] = (torch.cuda.max_memory_allocated() - before) / 1e9

    seconds = timed({name: lambda n=name: call(n) for name in programs}, repeats)
    name = f"linear_cross_entropy, {t} x {m} x {v}, forward and backward"
    found = _table(name, seconds, 6 * t * m * v / limit.flops_s, memory)
    return {name: {**found, "peak_gb": memory}}


def optimizer(preset: str, limit: Limits, repeats: int) -> dict[str, Any]:
    """AdamW over a whole model, with clipping and what each way of keeping weights costs."""
    with torch.device("meta"):
        shapes = [p.shape for p in BlackMamba(presets[preset]).parameters()]
    n = sum(s.numel() for s in shapes)
    with torch.no_grad():
        seconds = _our_optimizer(shapes, repeats) | _torchs_optimizer(shapes, repeats)
    name = f"AdamW with clipping, {n:,} parameters"
    return {name: _table(name, seconds, n * (28 + 2) / limit.bytes_s)}


def _our_optimizer(shapes: list[torch.Size], repeats: int) -> dict[str, float]:
    betas = {"beta1": 0.9, "beta2": 0.95}
    step = torch.zeros((), device=DEVICE)
    parameters, gradients = _zeros(shapes, torch.bfloat16), _zeros(shapes, torch.bfloat16)
    wide = [_zeros(shapes, torch.float32) for _ in range(3)]

    tensors = {
        has_master: [
            AdamWTensors(
                parameter=p, gradient=g, exp_avg=m, exp_avg_sq=v, master=w if has_master else None,
                decay=0.1,
            )
            for p, g, m, v, w in zip(parameters, gradients, *wide, strict=True)
        ]
        for has_master in (True, False)
    }  # fmt: skip

    def run(has_master: bool) -> None:
        norm = global_norm(gradients, backend="triton")
        scale = (1.0 / (norm + 1e-6)).clamp(max=1.0)
        factors = adamw_factors(1e-4, step, **betas, gradient_scale=scale, go=norm.isfinite())
        adamw_(tensors[has_master], factors, **betas, eps=1e-8, backend="triton")

    return timed(
        {
            "ours, bfloat16 weights with float32 masters": lambda: run(True),
            "ours, bfloat16 weights rounded at random": lambda: run(False),
        },
        repeats,
    )


def _torchs_optimizer(shapes: list[torch.Size], repeats: int) -> dict[str, float]:
    parameters = _zeros(shapes, torch.float32)
    for p, g in zip(parameters, _zeros(shapes, torch.float32), strict=True):
        p.grad = g
    adamw = torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.95), fused=True)

    def run() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        adamw.step()
        for p in parameters:
            p.to(torch.bfloat16)  # what the products of the next step read

    return timed({"torch, fused; float32 weights cast once": run}, repeats)


def _zeros(shapes: list[torch.Size], dtype: torch.dtype) -> list[Tensor]:
    return [torch.zeros(s, device=DEVICE, dtype=dtype) for s in shapes]


def activation(t: int, limit: Limits, repeats: int, tiny: bool) -> dict[str, Any]:
    """Of gated dense layers as wide as the ladder's narrow and wide transformers have them."""
    found: dict[str, Any] = {}
    for f, kind in ((12, "silu"),) if tiny else ((664, "silu"), (1736, "silu"), (1736, "gelu")):
        moved = {"forward": 3 * t * f * 2, "backward": 5 * t * f * 2}
        for way, seconds in _activation_seconds(f, kind, t, repeats, tiny).items():
            name = f"activate {kind}, {t} x 2 x {f}, {way}"
            found[name] = _table(name, seconds, moved[way] / limit.bytes_s)
    return found


def _activation_seconds(
    f: int, kind: Any, t: int, repeats: int, tiny: bool
) -> dict[str, dict[str, float]]:
    h, grad = normal(t, 2 * f).requires_grad_(), normal(t, f, seed=1)

    def plain(h: Tensor) -> Tensor:
        return activate(h, kind, backend="reference")

    def ours(h: Tensor) -> Tensor:
        return activate(h, kind, backend="triton")

    programs: dict[str, Any] = {"ours": ours, "plain": plain}
    if not tiny:
        programs["compiled"] = torch.compile(plain, dynamic=False)
    outputs = {name: program(h) for name, program in programs.items()}
    return {
        "forward": timed(
            {name: lambda p=program: p(h) for name, program in programs.items()}, repeats
        ),
        "backward": timed(
            {
                name: lambda o=output: torch.autograd.grad(o, h, grad, retain_graph=True)
                for name, output in outputs.items()
            },
            repeats,
        ),
    }


def _table(
    name: str, seconds: dict[str, float], least: float, memory: dict[str, float] | None = None
) -> dict[str, float]:
    print(f"\n{name}\n  {'limit':<48}{1e3 * least:>10.3f} ms")
    best = next(iter(seconds.values()))
    for who, s in seconds.items():
        peak = f"{memory[who]:>8.2f} GB" if memory else ""
        print(
            f"  {who:<48}{1e3 * s:>10.3f} ms{100 * least / s:>7.0f} % of the limit"
            f"{s / best:>8.2f} x ours{peak}",
            flush=True,
        )
    return {"limit_ms": 1e3 * least, **{f"{who}_ms": 1e3 * s for who, s in seconds.items()}}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--preset", default="blackmamba-1.5b")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to see that it runs")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    main(**vars(parser.parse_args()))
