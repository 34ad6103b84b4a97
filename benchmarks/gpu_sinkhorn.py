"""What Sinkhorn's choice of experts costs on a GPU: by tokens, experts and start.

Random logits, N(0, 1) for each and N(0, 1) for each expert. "to 1 %" is a whole choice as training
makes it, with as many iterations as it takes until every marginal is right within 1 %, from the
ordinary start and from the paper's; "an iteration" is the slope between 1 and 33 of them.

    python benchmarks/gpu_sinkhorn.py [--tokens 2048 16384 65536] [--experts 8 32 64]
"""

import argparse
import itertools
import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from blackmamba.analyse.sinkhorn import STARTS, Setting, Start, converge
from blackmamba.ops import sinkhorn_choice
from blackmamba.train.origin import origin
from gpu_measure import DEVICE, machine, timed

_FEW, _MANY = 1, 33
TOLERANCE = 1e-2


def main(
    repeats: int = 30,
    tiny: bool = False,
    tokens: Sequence[int] = (2048, 16_384, 65_536),
    experts: Sequence[int] = (8, 32, 64),
) -> None:
    """Print a row for each number of tokens and of experts."""
    if tiny:
        tokens, experts = (64,), (4,)
    facts = machine()
    print("gpu_sinkhorn: " + ", ".join(f"{k} {v}" for k, v in facts.items()))
    print(f"  {'tokens x experts':<18}{'ordinary start':>16}{'us':>8}{'paper start':>14}{'us':>8}"
          f"{'an iteration, us':>18}{'float32 read, us':>18}")  # fmt: skip
    found: list[dict[str, Any]] = []
    for t, e in itertools.product(tokens, experts):
        case = measure(Setting(t, e, 1.0, 1.0).logits(0).to(DEVICE), repeats)
        ones, paper = (case[start] for start in STARTS)
        print(
            f"  {f'{t:,} x {e}':<18}{ones['iterations']:>11} iter.{ones['us']:>8.1f}"
            f"{paper['iterations']:>9} iter.{paper['us']:>8.1f}{case['iteration_us']:>18.2f}"
            f"{case['read_us']:>18.1f}",
            flush=True,
        )
        found.append({"tokens": t, "experts": e, **case})
    print(
        json.dumps({"benchmark": "gpu_sinkhorn", **facts, **origin(), "tiny": tiny, "cases": found})
    )


def measure(logits: Tensor, repeats: int) -> dict[str, Any]:
    """Of (t, e) logits: iterations and time by start, time of one more iteration."""

    def choice(start: Start, tolerance: float, most: int) -> Callable[[], Tensor]:
        return partial(
            sinkhorn_choice, logits, start=start, tolerance=tolerance, max_iterations=most
        )

    calls: dict[str, Callable[[], object]] = {s: choice(s, TOLERANCE, 100) for s in STARTS}
    calls |= {f"{n}": choice("ones", 1e-30, n) for n in (_FEW, _MANY)}
    calls["read"] = partial(logits.sum)
    us = {name: 1e6 * seconds for name, seconds in timed(calls, repeats).items()}
    whole: dict[str, Any] = {
        s: {"iterations": converge(logits, s).steps_to[TOLERANCE], "us": round(us[s], 2)}
        for s in STARTS
    }
    each = (us[f"{_MANY}"] - us[f"{_FEW}"]) / (_MANY - _FEW)
    return whole | {"iteration_us": round(each, 3), "read_us": round(us["read"], 2)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=30, help="timed calls (default 30)")
    parser.add_argument("--tokens", nargs="+", type=int, default=[2048, 16_384, 65_536])
    parser.add_argument("--experts", nargs="+", type=int, default=[8, 32, 64])
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to see that it runs")
    args = parser.parse_args()
    main(args.repeats, args.tiny, args.tokens, args.experts)
