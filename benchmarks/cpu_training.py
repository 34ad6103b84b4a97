"""A training step on the CPU: dense Mamba of the 130M shape against transformers', and BlackMamba.

A step is the loss, its gradients and a fused AdamW update, all in float32, from random weights. The
process keeps freed memory, as `blackmamba train` makes it; transformers runs in the same process.

    python benchmarks/cpu_training.py [--repeats 5] [--only peer alone blackmamba]

Parts:
    peer        batch 1 x 128: ours against transformers' MambaForCausalLM, the same shapes
    alone       batch 4 x 512: tokens/s, 6 x parameters x tokens/s as a share of the float32 product
                rate, and the peak memory of a process that does nothing else
    blackmamba  batch 4 x 512: 12 pairs of Mamba and expert layers of the same width. A network of
                the same efficiency has the same active parameters x tokens/s.
"""

import dataclasses
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import torch

from blackmamba.config import ModelConfig
from blackmamba.model import BlackMamba
from blackmamba.model.size import parameters
from blackmamba.train.memory import keep_freed_memory
from measure import (
    PRODUCT,
    TINY_PRODUCT,
    Call,
    arguments,
    milliseconds,
    print_header,
    print_json,
    print_row,
    product,
    resident_bytes,
    timed,
)
from peers import mamba_peer, transformers_version

PARTS = ("peer", "alone", "blackmamba")
DENSE = ModelConfig(
    layers=("mamba",) * 24, d_model=768, vocab_size=50_280, final_norm="rms_norm"
)  # 129M parameters
BLACKMAMBA = dataclasses.replace(DENSE, layers=("mamba", "moe") * 12, n_experts=8, d_expert=2048)


def main(repeats: int = 5, tiny: bool = False, only: Sequence[str] = PARTS) -> None:
    """Measure the parts that `only` names and print what they give."""
    print_header("Training on the CPU, float32")
    keep_freed_memory(torch.device("cpu"))
    found: dict[str, object] = {"repeats": repeats, "tiny": tiny}
    if "peer" in only:
        found["peer"] = against_peer(repeats, tiny)
    if "alone" in only or "blackmamba" in only:
        found["dense"] = dense = in_fresh_process("dense", repeats, tiny)
        print_row("\n4 x 512 tokens", "dense Mamba")
        print_row("tokens/s", f"{dense['tokens_s']:.0f}")
        limit = f"  of {dense['product_GFLOP_s']:.0f} GFLOP/s ({dense['product_by']})"
        print_row("6 x parameters x tokens/s", f"{dense['share']:.1%}", limit)
        print_row("peak resident memory", f"{dense['peak_bytes'] / 1e9:.2f} GB")
    if "blackmamba" in only:
        moe = in_fresh_process("blackmamba", repeats, tiny)
        work = moe["tokens_s"] * moe["active"] / (dense["tokens_s"] * dense["active"])
        print_row("\n4 x 512 tokens", "dense Mamba", "BlackMamba")
        for name, key in (("active parameters", "active"), ("tokens/s", "tokens_s")):
            print_row(name, f"{dense[key]:,.0f}", f"{moe[key]:,.0f}")
        print_row(
            "peak resident memory", *(f"{r['peak_bytes'] / 1e9:.2f} GB" for r in (dense, moe))
        )
        print_row("active parameters x tokens/s, of the dense one's", "", f"{work:.1%}")
        found["blackmamba"] = {**moe, "work_ratio": round(work, 4)}
    print_json("cpu_training", transformers=transformers_version(), **found)


def against_peer(repeats: int, tiny: bool) -> dict[str, object]:
    """A step at batch 1 x 128, by us and by transformers."""
    config, (batch, length) = _config("dense", tiny), (1, 16) if tiny else (1, 128)
    steps: dict[str, Call] = {"ours": training_step(BlackMamba(config), batch, length)}
    theirs = mamba_peer(config)
    if theirs is not None:
        optimizer = torch.optim.AdamW(theirs.parameters(), fused=True)
        ids = torch.randint(0, config.vocab_size, (batch, length))

        def step() -> None:
            optimizer.zero_grad()
            theirs(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()

        steps["transformers"] = step
    times = timed(steps, repeats)
    speed = {name: batch * length / statistics.median(t) for name, t in times.items()}
    print_row(f"{batch} x {length} tokens", *speed)
    print_row("tokens/s", *(f"{rate:.1f}" for rate in speed.values()))
    found: dict[str, object] = {f"{name}_ms": milliseconds(t) for name, t in times.items()}
    if theirs is None:
        print("transformers is not installed, so there is no ratio: pip install '.[bench]'")
    else:
        found["ratio"] = round(speed["ours"] / speed["transformers"], 2)
        print_row("ratio", f"{found['ratio']:.1f}")
    return found


def training_step(model: BlackMamba, batch: int, length: int) -> Call:
    """The call that does a step, always on the same random tokens."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ids = torch.randint(0, model.config.vocab_size, (batch, length + 1))

    def step() -> None:
        optimizer.zero_grad()
        model.loss(ids[:, :-1], ids[:, 1:]).backward()
        optimizer.step()

    return step


def in_fresh_process(which: str, repeats: int, tiny: bool) -> dict[str, Any]:
    """`alone` in a process of its own, so that the peak of its memory is that of training."""
    command = [sys.executable, __file__, "--alone", which, "--repeats", str(repeats)]
    done = subprocess.run(
        command + ["--tiny"] * tiny, check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def alone(which: str, repeats: int, tiny: bool) -> dict[str, Any]:
    """Tokens/s and memory of a step at batch 4 x 512, in turn with products."""
    keep_freed_memory(torch.device("cpu"))
    config, (batch, length) = _config(which, tiny), (2, 16) if tiny else (4, 512)
    limit = product(torch.float32, TINY_PRODUCT if tiny else PRODUCT)
    step = training_step(BlackMamba(config), batch, length)
    times = timed({"step": step, "product": limit.call}, repeats)
    count, speed = parameters(config), batch * length / statistics.median(times["step"])
    return {
        "step_ms": milliseconds(times["step"]),
        "tokens_s": round(speed, 1),
        "parameters": count.total,
        "active": count.active,
        "product_GFLOP_s": round(limit.rate(times["product"]) / 1e9, 1),
        "product_by": limit.how,
        "share": round(6 * count.active * speed / limit.rate(times["product"]), 4),
        "peak_bytes": resident_bytes(peak=True),
    }


def _config(which: str, tiny: bool) -> ModelConfig:
    config = DENSE if which == "dense" else BLACKMAMBA
    if not tiny:
        return config
    width = {"d_expert": 32} if which != "dense" else {}
    return dataclasses.replace(config, layers=config.layers[:2], d_model=32, vocab_size=64, **width)


if __name__ == "__main__":
    parser = arguments(__doc__, PARTS)
    parser.add_argument(
        "--alone", choices=("dense", "blackmamba"), help="used by the script itself"
    )
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.alone:
        print(json.dumps(alone(args.alone, args.repeats, args.tiny)))
    else:
        main(args.repeats, args.tiny, args.only)
