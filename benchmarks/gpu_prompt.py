"""The parts of a pass over a prompt, each by itself and in its alternatives, on a GPU.

The time beside each is that of its bytes at the rate of a copy.

    python benchmarks/gpu_prompt.py [--preset blackmamba-1.5b] [--tokens 16384 2048] [--only norm]
"""

import argparse
import json
from collections.abc import Sequence

import torch

from blackmamba.ops import add_rms_norm, linear, router_choice
from blackmamba.ops.causal_conv1d import gpu as conv
from blackmamba.ops.mamba_mixer import gpu as mixer
from blackmamba.ops.mamba_mixer import hopper
from blackmamba.ops.prompt import gpu as prompt
from blackmamba.presets import presets
from gpu_measure import DEVICE, Call, limits, machine, normal, timed


def main(
    repeats: int = 20,
    tiny: bool = False,
    preset: str = "blackmamba-1.5b",
    tokens: Sequence[int] = (16384, 2048),
    only: Sequence[str] = ("",),
) -> None:
    """Print microseconds of each, and of its bytes at the rate of a copy."""
    if tiny:
        preset, tokens = "tiny", (16,)
    limit = limits(tiny)
    found: dict[str, dict[str, float]] = {}
    for t in tokens:
        parts = _parts(preset, t)
        parts = {name: part for name, part in parts.items() if any(word in name for word in only)}
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
    norm = torch.ones(m, device=DEVICE)
    weight, wide = normal(m, d) / d**0.5, normal(2 * d, m) / m**0.5
    router = normal(e, m, dtype=torch.float32) / m**0.5, torch.zeros(e, device=DEVICE)
    found: dict[str, tuple[Call, float]] = {
        "in_proj": (lambda: linear(update, wide), 2 * (t * m + 2 * d * m + 2 * t * d)),
        "out_proj": (lambda: linear(y, weight), 2 * (t * d + d * m + t * m)),
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
    d, r, n, k = config.d_inner, config.dt_rank, config.d_state, config.d_conv
    rates = torch.ones(d, n, device=DEVICE)
    weights = mixer.PromptWeights.of(
        normal(d, k), normal(d), normal(r + 2 * n, d) / d**0.5, normal(d, r) / r**0.5,
        normal(d), rates, normal(d), torch.bfloat16,
    )  # fmt: skip
    x = normal(8, t // 8, 2 * d)[..., :d]
    moved = 2 * 3 * t * d + 8 * t * n
    of_layer = weights.conv_weight, weights.conv_bias, weights.x_proj, weights.dt_proj
    if hopper.fits(x, *of_layer):
        found["convolution, x_proj, dt_proj in one kernel"] = (
            lambda: hopper.projected(x, *of_layer, last=True),
            moved,
        )

    def apart() -> None:
        y, _ = conv.forward_of_prompt(x, weights.conv_weight, weights.conv_bias, None, None)
        mixer._products(y, weights.x_proj, weights.dt_proj)

    found["convolution, x_proj, dt_proj"] = apart, moved + 2 * t * d
    folded = router[0] * norm, router[1]
    found["norm of the sum and router, one kernel"] = (
        lambda: prompt.norm(stream, norm, 1e-5, torch.bfloat16, update=update, router=folded),
        12 * t * m,
    )
    if prompt.chooses(stream, update, torch.bfloat16, folded[0]):
        for cut in prompt.NORM_CUTS:
            found[f"norm of the sum and router, {cut.rows} rows, {cut.warps} warps"] = (
                lambda c=cut: prompt.norm_and_choice(stream, update, norm, 1e-5, folded, c),
                12 * t * m,
            )
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--preset", default="blackmamba-1.5b")
    parser.add_argument("--tokens", nargs="+", type=int, default=[16384, 2048])
    parser.add_argument(
        "--only", nargs="+", default=[""], help="parts whose names hold one of these"
    )
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to see that it runs")
    main(**vars(parser.parse_args()))
