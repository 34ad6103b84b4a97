"""Generation by the paper's models on one GPU, with random weights: decoding and prefill.

Decoding is greedy. "steps" are tokens a second of the steps alone, "generate" those of a whole call
that reads a prompt and writes new tokens, text aside. The limit is the time to read once what a
step must: the weights of all but the experts, those of the experts that so many tokens choose among
at random, and the state, read and written. Prefill is measured against the rate of a large product.

    python benchmarks/gpu_generation.py [--preset blackmamba-1.5b] [--batches 1 4 16 64 256]
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence

import torch

import blackmamba
from blackmamba.generate.captured import CapturedDecoder
from blackmamba.generate.prefill import read_piece
from blackmamba.model import BlackMamba, State
from blackmamba.model.size import training_flops_per_token
from blackmamba.presets import presets
from blackmamba.train.origin import origin
from gpu_measure import DEVICE, limits, machine


def main(
    preset: str = "blackmamba-1.5b",
    batches: Sequence[int] = (1, 4, 16, 64, 256),
    contexts: Sequence[int] = (1024, 100_000),
    prefills: Sequence[int] = (2048, 16384, 131072, 262144),
    prompt: int = 128,
    new: int = 128,
    steps: int = 200,
    tiny: bool = False,
) -> None:
    """Print a table of decoding, one of contexts and one of prefill."""
    config = presets[preset]
    limit = limits(tiny)
    model = BlackMamba(config, device=DEVICE, dtype=torch.bfloat16).eval()
    found: dict[str, float] = {}
    print(f"{preset}: {limit.bytes_s / 1e9:,.0f} GB/s, {limit.flops_s / 1e12:,.0f} TFLOP/s")
    print(f"{'batch':>8}{'steps':>12}{'limit':>12}{'ratio':>8}{'generate':>12}   tokens/s")
    with torch.inference_mode():
        for b in batches:
            rate = decode_rate(model, torch.randint(0, config.n_tokens, (b, prompt)), steps)
            bound = b * limit.bytes_s / step_bytes(model, b)
            prompts = [[(7 * i + j) % config.n_tokens for j in range(prompt)] for i in range(b)]
            blackmamba.generate(model, prompts, max_new_tokens=4)
            seconds = clock(lambda p=prompts: blackmamba.generate(model, p, max_new_tokens=new), 3)
            found[f"decode {b}"], found[f"generate {b}"] = rate, b * new / seconds
            whole = found[f"generate {b}"]
            print(f"{b:>8}{rate:>12,.0f}{bound:>12,.0f}{rate / bound:>8.0%}{whole:>12,.0f}")
        for length in contexts:
            ids = torch.randint(0, config.n_tokens, (1, length))
            found[f"after {length}"] = decode_rate(model, ids, steps)
            print(f"batch 1 after {length:>8,} tokens{found[f'after {length}']:>12,.0f} tokens/s")
        for b, length in [(8, prefills[0]), *((1, length) for length in prefills)]:
            ids = torch.randint(0, config.n_tokens, (b, length), device=DEVICE)
            torch.cuda.reset_peak_memory_stats()
            seconds = clock(lambda ids=ids: read(model, ids), 3)
            rate = ids.numel() / seconds
            # forward alone, and the head for the last token only
            flops = training_flops_per_token(config, length) / 3
            flops -= 2 * config.vocab_size * config.d_model
            found[f"prefill {b} x {length}"] = rate
            found[f"prefill {b} x {length}, of the product's rate"] = rate * flops / limit.flops_s
            share, peak = rate * flops / limit.flops_s, torch.cuda.max_memory_allocated() / 1e9
            print(
                f"prefill {b} x {length:>8,}{rate:>12,.0f} tokens/s{share:>7.0%} "
                f"of the product's rate, {peak:.1f} GB"
            )
    print(
        json.dumps(
            {"benchmark": "gpu_generation", "preset": preset, **machine(), **origin(), **found}
        )
    )


def read(model: BlackMamba, ids: torch.Tensor, most: int = 16384) -> State:
    """A prefill, of many tokens piece by piece: memory does not grow with the rows."""
    state = None
    for part in ids.split(max(1, most // len(ids)), dim=1):
        _, state = read_piece(model, part, state, None)
    assert state is not None
    return state


def decode_rate(model: BlackMamba, ids: torch.Tensor, steps: int) -> float:
    """Tokens a second of greedy steps after prompts (b, l). No two are alike: sequences that were
    would all choose the same experts."""
    decoder = CapturedDecoder(model, read(model, ids))
    batch = len(ids)
    decoder.step(ids[:, 0].contiguous())

    def run() -> None:
        for _ in range(steps):
            decoder.step(None)

    return batch * steps / clock(run, 3)


def step_bytes(model: BlackMamba, batch: int) -> float:
    """What a step must read and write: each weight once, of the experts those chosen."""
    config = model.config
    experts = sum(
        p.numel() * p.element_size()
        for name, p in model.named_parameters()
        if ".feed_forward.fc" in name
    )
    whole = sum(p.numel() * p.element_size() for p in model.parameters()) - experts
    chosen = 1 - (1 - 1 / config.n_experts) ** batch
    return whole + experts * chosen + 2 * model.initial_state(1).nbytes * batch


def clock(run: Callable[[], object], repeats: int) -> float:
    """Median seconds of a call, after two to warm up, each waited for."""
    times: list[float] = []
    for i in range(repeats + 2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        if i >= 2:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="blackmamba-1.5b")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 16, 64, 256])
    parser.add_argument("--contexts", nargs="*", type=int, default=[1024, 100_000])
    parser.add_argument("--prefills", nargs="+", type=int, default=[2048, 16384, 131072, 262144])
    options = parser.parse_args()
    main(options.preset, options.batches, options.contexts, options.prefills)
