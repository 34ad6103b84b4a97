"""What this machine's CPU can do: the rates that the other scripts' results are shares of.

python benchmarks/cpu_limits.py [--repeats 5]
"""

import torch

from measure import (
    PRODUCT,
    READ_BYTES,
    TINY_PRODUCT,
    arguments,
    matrix_rate,
    print_header,
    print_json,
    print_row,
    read_bandwidth,
)


def main(repeats: int = 5, tiny: bool = False) -> None:
    """Measure and print the rates of reading memory and of products."""
    print_header("What this CPU can do")
    size, shape = (1 << 20, TINY_PRODUCT) if tiny else (READ_BYTES, PRODUCT)
    found: dict[str, object] = {}
    bandwidth = read_bandwidth(size, repeats)
    print_row("reading memory", f"{bandwidth.rate / 1e9:.1f} GB/s", f"  ({bandwidth.how})")
    found["read_GB_s"] = round(bandwidth.rate / 1e9, 2)
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        limit = matrix_rate(dtype, shape, repeats)
        print_row(f"product, {name}", f"{limit.rate / 1e9:.0f} GFLOP/s", f"  ({limit.how})")
        found[f"product_{name}_GFLOP_s"] = round(limit.rate / 1e9, 1)
        found[f"product_{name}_by"] = limit.how
    print_json("cpu_limits", repeats=repeats, tiny=tiny, **found)


if __name__ == "__main__":
    args = arguments(__doc__).parse_args()
    main(args.repeats, args.tiny)
