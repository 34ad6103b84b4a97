"""How much of this machine's read bandwidth weights of each kind reach.

First single products, with the matrix in memory rather than in the cache, for one vector and for a
few; then decoding steps of a model of the 1.5B preset's shapes with fewer layers (random weights,
which change no time). Reading memory is timed in turn with each.

    python benchmarks/cpu_quantized.py [--only products models] [--repeats 9]
"""

import dataclasses
import functools
import itertools

import torch
from torch import Tensor

from blackmamba.config import QuantizationConfig
from blackmamba.generate.decoder import Decoder
from blackmamba.model import BlackMamba, QuantizedStorage
from blackmamba.ops import native
from blackmamba.ops.quantized_linear import storage_dtype, storage_shapes
from blackmamba.ops.quantized_linear.native import KINDS
from blackmamba.presets import presets
from measure import (
    Call,
    Probe,
    arguments,
    milliseconds,
    print_header,
    print_json,
    print_row,
    reading,
    timed,
)

PARTS = ("products", "models")
GROUPS = {
    "int8, groups of 64": (8, 64),
    "int4, groups of 64": (4, 64),
    "int4, groups of 32": (4, 32),
}
FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main(repeats: int = 9, tiny: bool = False, only: tuple[str, ...] = PARTS) -> None:
    """Products, then models."""
    print_header("Bytes of weights per second, as a share of the read bandwidth")
    print_row("", "GB/s", "reading", "share", "calls/s", width=12)
    probe = reading(1 << (20 if tiny else 30))
    rows: list[dict[str, object]] = []
    if "products" in only:
        for name in (*FLOATS, *GROUPS):
            for columns in (64, 96) if tiny else (1152, 3072):
                data, scales, group_size = matrix(name, columns, 1 << (16 if tiny else 28))
                n_bytes = data.nbytes + (0 if scales is None else scales.nbytes)
                for batch, narrow in itertools.product(
                    (1, 4, 16), (False,) if scales is None else (True, False)
                ):
                    x = torch.randn(batch, columns)
                    run = product(x, data, scales, group_size, narrow)
                    case = f"{name}, {columns} columns, {batch} {'narrow ' * narrow}vectors"
                    rows.append(measured(case, n_bytes, run, probe, repeats))
    if "models" in only:
        for name in ("bfloat16", *GROUPS):
            model = build(name, tiny)
            decoder = Decoder(model, model.initial_state(1))
            run = functools.partial(decoder.step, torch.zeros(1, dtype=torch.int64))
            case = f"decoding, {model.config.n_layers} layers, {name}"
            rows.append(measured(case, active_bytes(model), run, probe, repeats))
    print_json("cpu_quantized", repeats=repeats, tiny=tiny, rows=rows)


def measured(case: str, n_bytes: int, run: Call, probe: Probe, repeats: int) -> dict[str, object]:
    """One row: printed, and as plain data."""
    times = timed({"ours": run, "reading": probe.call}, repeats)
    ours = Probe(run, n_bytes, case).rate(times["ours"])
    read = probe.rate(times["reading"])
    print_row(
        case, f"{ours / 1e9:.1f}", f"{read / 1e9:.1f}", f"{ours / read:.0%}",
        f"{ours / n_bytes:.1f}", width=12,
    )  # fmt: skip
    return {
        "case": case, "bytes": n_bytes, "share": round(ours / read, 3),
        "ms": milliseconds(times["ours"]), "reading_ms": milliseconds(times["reading"]),
    }  # fmt: skip


def matrix(name: str, columns: int, n_bytes: int) -> tuple[Tensor, Tensor | None, int]:
    """About so many bytes of weights, their scales, and the group size."""
    if name in FLOATS:
        dtype = FLOATS[name]
        return torch.ones(n_bytes // dtype.itemsize // columns, columns, dtype=dtype), None, 0
    bits, group_size = GROUPS[name]
    data, scales = storage_shapes((n_bytes * 8 // bits // columns, columns), bits, group_size)
    return (
        torch.full(data, 17, dtype=storage_dtype(bits)),
        torch.full(scales, 0.01, dtype=torch.bfloat16),
        group_size,
    )


def product(x: Tensor, data: Tensor, scales: Tensor | None, group_size: int, narrow: bool) -> Call:
    """The kernel itself, which takes weights of any kind; narrow: as in a bfloat16 model."""
    y = torch.empty(len(x), len(data))

    def run() -> None:
        native.extension().weight_product(
            x.data_ptr(), x.stride(0), len(x), False, KINDS[data.dtype], data.data_ptr(),
            0 if scales is None else scales.data_ptr(), len(data), x.shape[1], group_size, narrow,
            0, y.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip

    return run


@torch.no_grad()
def build(name: str, tiny: bool) -> BlackMamba:
    """Of random bits where it is quantised: quantising random numbers would take minutes."""
    config = presets["tiny"] if tiny else presets["blackmamba-1.5b"]
    config = dataclasses.replace(config, layers=("mamba", "moe") * (2 if tiny else 4))
    quantization = None
    if name in GROUPS:
        bits, group_size = GROUPS[name]
        quantization = QuantizationConfig(bits=bits, group_size=group_size, what="all")  # pyright: ignore
    options = {"dtype": torch.bfloat16, "quantization": quantization}
    model = BlackMamba(config, device="meta", **options).eval()  # pyright: ignore
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.normal_(std=0.02)
    for module in model.modules():
        if isinstance(module, QuantizedStorage):
            module.data.random_(*((-100, 100) if module.bits == 8 else (0, 255)))
            module.scales.fill_(3e-4 if module.bits == 8 else 4e-3)
    return model


def active_bytes(model: BlackMamba) -> int:
    """Of the weights that one token uses: one of the stacked experts."""
    return sum(
        t.nbytes // (model.config.n_experts if ".fc1" in name or ".fc2" in name else 1)
        for name, t in model.state_dict().items()
    )


if __name__ == "__main__":
    args = arguments(__doc__, PARTS, repeats=9).parse_args()
    main(args.repeats, args.tiny, tuple(args.only))
