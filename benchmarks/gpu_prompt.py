"""The parts of a pass over a prompt, each by itself and in its alternatives, on a GPU.

python benchmarks/gpu_prompt.py [--preset blackmamba-1.5b] [--tokens 16384 2048]
"""

import argparse
import json
from collections.abc import Sequence

import torch

from blackmamba.ops import add_rms_norm, linear, router_choice
from blackmamba.ops.prompt import gpu as prompt
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
    m, d, e = config.d_model, config.d_inner, config.n_experts
    stream, update, y = normal(t, m, dtype=torch.float32), normal(t, m), normal(t, d)
    norm, none = torch.ones(m, device=DEVICE), torch.zeros(m, device=DEVICE).bfloat16()
    weight, wide = normal(m, d) / d**0.5, normal(2 * d, m) / m**0.5
    none_wide = torch.zeros(2 * d, device=DEVICE).bfloat16()
    router = normal(e, m, dtype=torch.float32) / m**0.5, torch.zeros(e, device=DEVICE)
    found: dict[str, tuple[Call, float]] = {
        "in_proj": (lambda: linear(update, wide), 2 * (t * m + 2 * d * m + 2 * t * d)),
        "in_proj, with a bias": (
            lambda: linear(update, wide, none_wide),
            2 * (t * m + 2 * d * m + 2 * t * d),
        ),
        "in_proj, in halves": (
            lambda: [linear(part, wide) for part in update.chunk(2)],
            2 * (t * m + 2 * d * m + 2 * t * d),
        ),
        "out_proj": (lambda: linear(y, weight), 2 * (t * d + d * m + t * m)),
        "out_proj, with a bias": (lambda: linear(y, weight, none), 2 * (t * d + d * m + t * m)),
        "norm of the sum, then router": (
            lambda: router_choice(
                add_rms_norm(stream, update, norm, out_dtype=torch.bfloat16)[1], *router
            ),
            12 * t * m,
        ),
        "norm of the sum": (
            lambda: add_rms_norm(stream, update, norm, out_dtype=torch.bfloat16),
            12 * t * m,
        ),
    }
    for cut in prompt.NORM_CUTS:
        for name, own in ("norm of the sum and router", router), ("norm of the sum", None):
            found[f"{name}, {cut.rows} rows by {cut.warps} warps"] = (
                lambda cut=cut, own=own: _norm(stream, update, norm, own, cut),
                12 * t * m,
            )
    return found


def _norm(
    stream: torch.Tensor,
    update: torch.Tensor,
    weight: torch.Tensor,
    router: tuple[torch.Tensor, torch.Tensor] | None,
    cut: prompt.NormCut,
) -> None:
    usual, prompt.NORM = prompt.NORM, cut
    prompt.norm(stream, weight, 1e-5, torch.bfloat16, update=update, router=router)
    prompt.NORM = usual


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--preset", default="blackmamba-1.5b")
    parser.add_argument("--tokens", nargs="+", type=int, default=[16384, 2048])
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to see that it runs")
    main(**vars(parser.parse_args()))
