"""The routed experts forward and backward on a GPU, beside plain and compiled PyTorch, and beside
scattermoe where that is installed (it is on GitHub alone: pip install
git+https://github.com/shawntan/scattermoe).

Tokens are routed at random, weights are random, everything is bfloat16. The limit is the measured
rate of a large product; FLOPs are those of the three products each way, 18 t m f.

    python benchmarks/gpu_experts.py [--presets blackmamba-1.5b blackmamba-2.8b] [--tokens 16384]
    python benchmarks/gpu_experts.py --parts    # each product alone, products.cu beside torch's
"""

import argparse
import importlib
import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from blackmamba.ops import expert_mlp
from blackmamba.ops.expert_mlp import hopper, library
from blackmamba.ops.expert_mlp.order import sort_by_expert
from blackmamba.presets import presets
from gpu_measure import DEVICE, installed, limits, machine, normal, timed


def main(
    names: Sequence[str] = ("blackmamba-1.5b", "blackmamba-2.8b"),
    tokens: int = 16384,
    repeats: int = 20,
    tiny: bool = False,
) -> None:
    """Print a line for each contender and preset."""
    rate = limits(tiny).flops_s
    print(f"large product: {rate / 1e12:,.0f} TFLOP/s")
    print(f"{'':<18}{'':<24}{'ms':>8}{'TFLOP/s':>10}{'of limit':>10}")
    found: dict[str, float] = {}
    for name in ("tiny",) if tiny else names:
        config = presets[name]
        m, f, e = config.d_model, config.d_expert, config.n_experts
        x = normal(tokens, m).requires_grad_()
        fc1 = (normal(e, 2 * f, m, seed=1) / m**0.5).requires_grad_()
        fc2 = (normal(e, m, f, seed=2) / f**0.5).requires_grad_()
        gate = torch.rand(tokens, device=DEVICE).requires_grad_()
        ids = torch.randint(0, e, (tokens,), device=DEVICE)
        grad = normal(tokens, m, seed=3)

        def run(backend: str) -> Tensor:
            return expert_mlp(x, ids, fc1, fc2, gate=gate, backend=backend)  # noqa: B023 # pyright: ignore

        def step(forward: Callable[[], Tensor]) -> None:
            for leaf in (x, fc1, fc2, gate):  # noqa: B023
                leaf.grad = None
            forward().backward(grad)  # noqa: B023

        compiled = torch.compile(lambda: run("torch"))
        contenders = {
            "ours": lambda: step(lambda: run("triton")),
            "PyTorch, grouped": lambda: step(lambda: run("torch")),
            "PyTorch, compiled": lambda: step(compiled),  # noqa: B023
        }
        if tiny:
            del contenders["PyTorch, compiled"]
        if installed("scattermoe"):
            peer = scattermoe_layer(m, f, e)

            def theirs() -> Tensor:
                peer.zero_grad()  # noqa: B023
                return peer(x, gate[:, None].to(x.dtype), ids[:, None])  # noqa: B023

            contenders["scattermoe"] = lambda: step(theirs)
        for which, seconds in timed(contenders, repeats).items():
            flops_s = 18 * tokens * m * f / seconds
            found[f"{name}, {which}"] = seconds * 1e3
            found[f"{name}, {which}, of limit"] = flops_s / rate
            print(
                f"{name:<18}{which:<24}{seconds * 1e3:>8.3f}{flops_s / 1e12:>10,.0f}"
                f"{flops_s / rate:>10.1%}"
            )
    print(json.dumps({"benchmark": "gpu_experts", "tokens": tokens, **machine(), **found}))


def parts(names: Sequence[str], tokens: int, repeats: int) -> None:
    """Print each product of both passes: torch's with the kernels beside it, and products.cu's."""
    rate = limits(False).flops_s
    print(f"large product: {rate / 1e12:,.0f} TFLOP/s; {tokens} tokens; ms, TFLOP/s, of limit")
    found: dict[str, float] = {}
    for name in names:
        config = presets[name]
        m, f, e = config.d_model, config.d_expert, config.n_experts
        ids = torch.randint(0, e, (tokens,), device=DEVICE)
        order, ends = sort_by_expert(ids, e)
        x, y = normal(tokens, m), normal(tokens, m, seed=3)
        hidden, h = normal(tokens, f, seed=4), normal(tokens, 2 * f, seed=5)
        fc1, fc2 = normal(e, 2 * f, m, seed=1) / m**0.5, normal(e, m, f, seed=2) / f**0.5
        gate = torch.rand(tokens, device=DEVICE)
        print(name)
        for what, wide, calls in part_calls(x, y, hidden, h, fc1, fc2, gate, order, ends):
            flops = 2 * tokens * m * f * wide
            for which, seconds in timed(calls, repeats).items():
                found[f"{name}, {what}, {which}"] = seconds * 1e3
                print(
                    f"  {what:<40}{which:<8}{seconds * 1e3:>8.3f}{flops / seconds / 1e12:>8,.0f}"
                    f"{flops / seconds / rate:>8.1%}",
                    flush=True,
                )
    print(json.dumps({"benchmark": "gpu_experts parts", "tokens": tokens, **machine(), **found}))


def part_calls(
    x: Tensor,
    y: Tensor,
    hidden: Tensor,
    h: Tensor,
    fc1: Tensor,
    fc2: Tensor,
    gate: Tensor,
    order: Tensor,
    ends: Tensor,
) -> list[tuple[str, int, dict[str, Callable[[], object]]]]:
    """Of each product: what it is, how many times t m f multiply-adds, and the ways to do it."""
    calls: list[tuple[str, int, Callable[[Any], object]]] = [
        ("fc1, activation", 2, lambda by: by.gated(x, fc1, ends, False, False)),
        ("the same, its product kept", 2, lambda by: by.gated(x, fc1, ends, False, True)),
        ("fc2, gate, in order", 1, lambda by: by.placed(hidden, fc2, ends, order, gate)),
        ("gradient of what fc2 reads", 1, lambda by: by.product(y, fc2, ends)),
        ("gradient of x, in order", 2, lambda by: by.placed(h, fc1, ends, order, by_columns=True)),
        ("gradient of fc1", 2, lambda by: by.gradient(h, x, ends)),
        ("gradient of fc2", 1, lambda by: by.gradient(y, hidden, ends)),
    ]  # fmt: skip
    return [
        (name, wide, {"torch": partial(call, library), "ours": partial(call, hopper)})
        for name, wide, call in calls
    ]


def scattermoe_layer(m: int, f: int, e: int) -> torch.nn.Module:
    """Its gated experts of these widths, one a token, with random weights."""
    layer = importlib.import_module("scattermoe.mlp").GLUMLP(
        input_size=m, hidden_size=f, num_experts=e, top_k=1, activation=torch.nn.SiLU()
    )
    return layer.to(DEVICE, torch.bfloat16)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--presets", nargs="+", default=["blackmamba-1.5b", "blackmamba-2.8b"])
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to try the script")
    parser.add_argument("--parts", action="store_true", help="each product alone; a Hopper only")
    options = parser.parse_args()
    if options.parts:
        parts(options.presets, options.tokens, options.repeats)
    else:
        main(options.presets, options.tokens, options.repeats, options.tiny)
