"""Generation and a training step of the paper's models on one GPU, with random weights.

Prints medians and ends with one line of JSON.

    python benchmarks/gpu_generation.py [--preset blackmamba-1.5b]
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

from blackmamba.model import BlackMamba
from blackmamba.model.size import parameters
from blackmamba.presets import presets
from blackmamba.train.origin import origin


def main(preset: str) -> None:
    """Time decoding at batch 1 and 16, a prefill of 2,048 tokens, and a bfloat16 training step."""
    config = presets[preset]
    count = parameters(config)
    model = BlackMamba(config, device="cuda", dtype=torch.bfloat16).eval()
    found: dict[str, float] = {}
    with torch.inference_mode():
        for batch in (1, 16):
            ids = torch.randint(0, config.n_tokens, (batch, 2048), device="cuda")
            seconds = median(lambda ids=ids: model.prefill(ids, logits="last"), 3)
            found[f"prefill of 2048, batch {batch}, tokens/s"] = ids.numel() / seconds
            _, state = model.prefill(ids[:, :16], logits="last")
            step = torch.zeros(batch, dtype=torch.int64, device="cuda")
            seconds = median(lambda step=step, state=state: model.step(step, state), 20)
            found[f"decode, batch {batch}, tokens/s"] = batch / seconds
    del model, state
    torch.cuda.empty_cache()
    model = BlackMamba(config, device="cuda", compute_dtype=torch.bfloat16).train()
    ids = torch.randint(0, config.n_tokens, (2, 2048), device="cuda")

    def train_step() -> None:
        model.zero_grad()
        model.loss(ids, ids).backward()

    seconds = median(train_step, 3)
    found["forward and backward, 2 x 2048, tokens/s"] = ids.numel() / seconds
    found["peak memory, GB"] = torch.cuda.max_memory_allocated() / 1e9
    for name, value in found.items():
        print(f"{name:<44}{value:>12,.1f}")
    gpu = torch.cuda.get_device_name()
    facts = {
        "benchmark": "gpu_generation",
        "preset": preset,
        "gpu": gpu,
        "torch": torch.__version__,
    }
    print(json.dumps({**facts, "active": count.active, **origin(), **found}))


def median(run: Callable[[], object], repeats: int) -> float:
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
    main(parser.parse_args().preset)
