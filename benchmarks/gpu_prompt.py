"""The parts of a pass over a prompt, each by itself and in its alternatives, on a GPU.

python benchmarks/gpu_prompt.py [--preset blackmamba-1.5b] [--tokens 16384 2048]
"""

import argparse
import json
from collections.abc import Sequence

import torch

from blackmamba.ops import rms_norm
from blackmamba.ops.linear_cross_entropy.gpu import _add_product
from blackmamba.ops.rms_norm import add_rms_norm
from blackmamba.presets import presets
from gpu_measure import DEVICE, Call, limits, machine, normal, timed


def main(
    repeats: int = 20,
    tiny: bool = False,
    preset: str = "blackmamba-1.5b",
    tokens: Sequence[int] = (16384, 2048),
) -> None:
    """Print microseconds of each, and of its bytes at the rate of a copy."""
    if tiny:
        preset, tokens = "tiny", (16,)
    limit = limits(tiny)
    found: dict[str, dict[str, float]] = {}
    for t in tokens:
        parts = _parts(preset, t)
        with torch.inference_mode():
            seconds = timed({name: run for name, (run, _) in parts.items()}, repeats)
        print(f"{preset}, {t} tokens{'us':>38}{'bytes alone':>13}")
        for name, (_, n_bytes) in parts.items():
            us = 1e6 * seconds[name]
            found.setdefault(str(t), {})[name] = us
            print(f"  {name:<48}{us:>9.1f}{1e6 * n_bytes / limit.bytes_s:>13.1f}")
    facts = {"tiny": tiny, "preset": preset, **machine()}
    print(json.dumps({"benchmark": "gpu_prompt", **facts, "us": found}))


def _parts(preset: str, t: int) -> dict[str, tuple[Call, float]]:
    """What to call, and the bytes that it moves at least."""
    config = presets[preset]
    m, d = config.d_model, config.d_inner
    stream, update, y = normal(t, m, dtype=torch.float32), normal(t, m), normal(t, d)
    weight, norm = normal(m, d) / d**0.5, torch.ones(m, device=DEVICE)
    added, wide = stream.clone(), torch.empty_like(stream)

    def add_norm() -> None:
        add_rms_norm(stream, update, norm, out_dtype=torch.bfloat16)

    product = 2 * (t * d + d * m)
    return {
        "out_proj": (lambda: torch.mm(y, weight.t(), out=update), product + 2 * t * m),
        "out_proj, float32": (
            lambda: _add_product(wide, y, weight.t(), beta=0),
            product + 4 * t * m,
        ),
        "out_proj, added to the stream": (
            lambda: _add_product(added, y, weight.t(), beta=1),
            product + 8 * t * m,
        ),
        "norm of the sum": (add_norm, 12 * t * m),
        "norm": (lambda: rms_norm(stream, norm, out_dtype=torch.bfloat16), 6 * t * m),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--preset", default="blackmamba-1.5b")
    parser.add_argument("--tokens", nargs="+", type=int, default=[16384, 2048])
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to see that it runs")
    main(**vars(parser.parse_args()))
