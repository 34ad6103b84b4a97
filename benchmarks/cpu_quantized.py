"""How much of this machine's read bandwidth the weights of each kind reach when one token is read.

First single products at the shapes of the 1.5B preset, with the matrix in memory rather than in the
cache; then whole decoding steps of a model of those shapes with fewer layers (random weights, which
change no time). Every measurement stands beside one of the read bandwidth made right before it.
Ends with one line of JSON.

    python benchmarks/cpu_quantized.py [--pairs 4] [--batch 1 4 16] [--repeats 9]
"""

import argparse
import dataclasses
import json
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from blackmamba.config import QuantizationConfig
from blackmamba.generate.decoder import Decoder
from blackmamba.model import BlackMamba, QuantizedStorage
from blackmamba.ops import QuantizedWeight, native
from blackmamba.ops.quantized_linear import storage_dtype, storage_shapes
from blackmamba.ops.quantized_linear.native import KINDS
from blackmamba.presets import presets
from blackmamba.train.origin import origin

GIB = 1 << 30
KINDS_OF_WEIGHTS = {
    "float32": (32, 0), "bfloat16": (16, 0), "int8 64": (8, 64), "int4 64": (4, 64),
    "int4 32": (4, 32),
}  # fmt: skip


def main(pairs: int, batches: list[int], repeats: int) -> None:
    """Products, then models."""
    memory = torch.ones(GIB // 4)
    rows: list[dict[str, object]] = []
    print(f"{'case':<34}{'read GB/s':>11}{'GB/s':>8}{'share':>8}{'tok/s':>9}")

    def show(case: str, n_bytes: int, run: Callable[[], object], tokens: int = 0) -> None:
        reads, times = [], []
        run()
        for _ in range(repeats):
            reads.append(seconds(memory.sum))
            times.append(seconds(run))
        read = GIB / statistics.median(reads) / 1e9
        median = statistics.median(times)
        rate = n_bytes / median / 1e9
        speed = f"{tokens / median:>9.1f}" if tokens else ""
        print(f"{case:<34}{read:>11.1f}{rate:>8.1f}{100 * rate / read:>7.0f}%{speed}")
        rows.append({
            "case": case, "read_gb_s": round(read, 2), "gb_s": round(rate, 2),
            "share": round(rate / read, 3), "tokens_per_s": round(tokens / median, 2),
            "spread": [round(min(times) / median, 2), round(max(times) / median, 2)],
        })  # fmt: skip

    for name in KINDS_OF_WEIGHTS:
        for columns in (1152, 3072):
            for batch in batches:
                weight = in_memory(name, columns)
                x = torch.randn(batch, columns)
                y = torch.empty(batch, len(weight[0]))
                n_bytes = sum(t.nbytes for t in weight if isinstance(t, Tensor))
                show(f"{name}, {columns} columns, batch {batch}", n_bytes, product(x, weight, y))
    del memory
    memory = torch.ones(GIB // 4)
    with torch.inference_mode():
        for name in ("bfloat16", "int8 64", "int4 32"):
            model = build(name, pairs)
            active = active_bytes(model)
            decoder = Decoder(model, model.initial_state(1))
            ids = torch.zeros(1, dtype=torch.int64)
            show(f"{pairs} pairs of 1.5B, {name}", active, partial(decoder.step, ids), 1)
    machine = {
        "machine": platform.machine(), "native": native.describe(),
        "threads": torch.get_num_threads(), "torch": torch.__version__,
    }  # fmt: skip
    print(json.dumps({"benchmark": "cpu_quantized", **machine, **origin(), "rows": rows}))


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def in_memory(name: str, columns: int) -> tuple[Tensor, Tensor | None, int]:
    """A matrix of a quarter of a GiB, its scales, and its group size."""
    bits, group_size = KINDS_OF_WEIGHTS[name]
    n_rows = GIB // 4 * 8 // bits // columns
    if bits > 8:
        dtype = torch.float32 if bits == 32 else torch.bfloat16
        return torch.ones(n_rows, columns, dtype=dtype), None, 0
    data, scales = storage_shapes((n_rows, columns), bits, group_size)
    made = QuantizedWeight(
        torch.full(data, 17, dtype=storage_dtype(bits)),
        torch.full(scales, 0.01, dtype=torch.bfloat16),
        group_size,
        columns,
    )
    return made.data, made.scales, group_size


def product(
    x: Tensor, weight: tuple[Tensor, Tensor | None, int], y: Tensor
) -> Callable[[], object]:
    data, scales, group_size = weight
    return lambda: native.extension().weight_product(
        x.data_ptr(), x.stride(0), len(x), False, KINDS[data.dtype], data.data_ptr(),
        0 if scales is None else scales.data_ptr(), len(data), x.shape[1], group_size, 0,
        y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip


def build(name: str, pairs: int) -> BlackMamba:
    """Of random bits where it is quantised: quantising random numbers would take minutes."""
    config = dataclasses.replace(presets["blackmamba-1.5b"], layers=("mamba", "moe") * pairs)
    bits, group_size = KINDS_OF_WEIGHTS[name]
    if bits > 8:
        return BlackMamba(config, dtype=torch.bfloat16).eval()
    quantization = QuantizationConfig(bits=bits, group_size=group_size, what="all")  # pyright: ignore
    model = BlackMamba(config, device="meta", dtype=torch.bfloat16, quantization=quantization)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.normal_(std=0.05)
    for module in model.modules():
        if isinstance(module, QuantizedStorage):
            module.data.random_(-100 if module.bits == 8 else 0, 100 if module.bits == 8 else 255)
            module.scales.fill_(1e-4 if module.bits == 8 else 1e-3)
    return model


def active_bytes(model: BlackMamba) -> int:
    """Of the weights that one token uses: of stacked experts one."""
    total = 0
    for name, tensor in model.state_dict().items():
        stacked = ".fc1" in name or ".fc2" in name
        total += tensor.nbytes // (model.config.n_experts if stacked else 1)
    return total


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    main(arguments.pairs, arguments.batch, arguments.repeats)
