"""How fast Sinkhorn's iteration balances: the paper's start against the ordinary one.

Two ways to count. By equal accuracy: steps until every marginal is right within a tolerance. And by
the authors' stopping test, which looks at how much the column factors d1 change: as d1 itself is
small after their start where there are thousands of tokens, it passes at once, whatever the balance
is by then.

Letters: t tokens, e experts.
"""

import dataclasses
import itertools
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from blackmamba.errors import InputError
from blackmamba.ops import sinkhorn_choice
from blackmamba.ops.sinkhorn import SinkhornStep, sinkhorn_steps

Start = Literal["paper", "ones"]
STARTS: tuple[Start, ...] = ("ones", "paper")
TOLERANCES = (1e-1, 1e-2, 1e-3)
LOOKED_AT = (1, 2, 4)
"""After how many steps the load is looked at, beside the last."""
AUTHORS_TOLERANCE = 1e-4
"""Of the mean change of d1 in one step; source: the authors' inference and training code."""


@dataclasses.dataclass(frozen=True)
class Convergence:
    """One iteration, run to its end."""

    start: Start
    errors: tuple[float, ...]
    """Largest relative error of a marginal after each step."""
    steps_to: dict[float, int]
    """By tolerance, how many steps it took; 0: it did not get there."""
    authors_steps: int
    """Where the authors' test would have stopped; 0: never."""
    overload: dict[int, float]
    """By number of steps, the busiest expert's tokens over the mean, less 1; the last is of all."""


def converge(
    logits: Tensor, start: Start, *, scale: float = 2.0, max_steps: int = 300
) -> Convergence:
    """Run the iteration until every tolerance is reached.

    Args:
        logits: (t, e), t at least 1.
        start: see `sinkhorn`.
        scale: see `sinkhorn`.
        max_steps: stop after so many in any case.
    Raises:
        InputError: there is no token.
    """
    if len(logits) == 0:
        raise InputError("logits has no row: balancing needs at least one token")
    wide = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
    errors: list[float] = []
    overload: dict[int, float] = {}
    step: SinkhornStep | None = None
    for step in sinkhorn_steps(wide, scale, start, max_steps):
        errors.append(step.error)
        if step.number in LOOKED_AT:
            overload[step.number] = overload_of(step.plan)
        if not step.error >= min(TOLERANCES):
            break
    assert step is not None
    overload[step.number] = overload_of(step.plan)
    return Convergence(
        start=start,
        errors=tuple(errors),
        steps_to={t: _first_below(errors, t) for t in TOLERANCES},
        authors_steps=authors_steps(wide, start, scale, max_steps),
        overload=overload,
    )


def authors_steps(logits: Tensor, start: Start, scale: float, max_steps: int) -> int:
    """After how many steps the authors' loop stops; 0: not within max_steps.

    Their test is on the mean change of d1, and their sums have 1e-8 added, which lets the test pass
    at last where d1 is large. In float64, where theirs is float32.
    """
    cost = (scale * logits.double()).exp()
    t, e = cost.shape
    d1 = torch.ones_like(cost[0]) if start == "ones" else 1 / (e * cost.sum(0))
    for number in range(1, max_steps + 1):
        d0 = (1 / t) / (cost @ d1 + 1e-8)
        before, d1 = d1, (1 / e) / (d0 @ cost + 1e-8)
        if float((before - d1).abs().mean()) < AUTHORS_TOLERANCE:
            return number
    return 0


def overload_of(scores: Tensor) -> float:
    """The busiest expert's tokens over the mean, less 1, if tokens take their largest of (t, e)."""
    t, e = scores.shape
    load = torch.bincount(scores.argmax(dim=-1), minlength=e)
    return float(load.max()) * e / t - 1


@dataclasses.dataclass(frozen=True)
class Setting:
    """How random logits are drawn: N(0, spread^2) for each, and N(0, bias^2) for each expert."""

    tokens: int
    experts: int
    spread: float
    bias: float

    def logits(self, seed: int) -> Tensor:
        """(t, e) float32."""
        random = torch.Generator().manual_seed(seed)
        own = torch.randn(self.tokens, self.experts, generator=random) * self.spread
        return own + torch.randn(self.experts, generator=random) * self.bias


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Both starts on the same logits; medians over seeds."""

    setting: Setting
    argmax_overload: float
    """Without balancing."""
    steps_to: dict[Start, dict[float, float]]
    authors_steps: dict[Start, float]
    overload: dict[Start, dict[int, float]]
    """After `LOOKED_AT` steps, and under 0 after all."""


def settings(tokens: Sequence[int], experts: Sequence[int]) -> list[Setting]:
    """Every number of tokens and experts, with logits from nearly equal to far apart."""
    spreads = ((0.1, 0.1), (0.5, 0.5), (1.0, 1.0), (2.0, 2.0))
    return [Setting(t, e, *s) for t, e, s in itertools.product(tokens, experts, spreads)]


def compare(chosen: Sequence[Setting], *, seeds: int = 3) -> Iterator[Comparison]:
    """Run both starts on each setting."""
    for setting in chosen:
        drawn = [setting.logits(seed) for seed in range(seeds)]
        runs: dict[Start, list[Convergence]] = {
            start: [converge(logits, start) for logits in drawn] for start in STARTS
        }
        yield Comparison(
            setting=setting,
            argmax_overload=statistics.median(map(overload_of, drawn)),
            steps_to={
                s: {t: statistics.median(c.steps_to[t] or math.inf for c in r) for t in TOLERANCES}
                for s, r in runs.items()
            },
            authors_steps={
                s: statistics.median(c.authors_steps or math.inf for c in r)
                for s, r in runs.items()
            },
            overload={
                s: {n: statistics.median(_after(c, n) for c in r) for n in (*LOOKED_AT, 0)}
                for s, r in runs.items()
            },
        )


def milliseconds(setting: Setting, start: Start, device: torch.device, repeats: int = 5) -> float:
    """What one choice of experts takes, at the tolerance of training; the median."""
    logits = setting.logits(0).to(device)
    times: list[float] = []
    for _ in range(repeats + 1):
        _wait(device)
        begun = time.perf_counter()
        sinkhorn_choice(logits, start=start, tolerance=1e-2, max_iterations=100)
        _wait(device)
        times.append(time.perf_counter() - begun)
    return 1000 * statistics.median(times[1:])


def _first_below(errors: Sequence[float], tolerance: float) -> int:
    return next((i for i, error in enumerate(errors, 1) if error < tolerance), 0)


def _after(run: Convergence, steps: int) -> float:
    """Overload after so many steps, or after all if there were fewer; 0: after all."""
    return run.overload.get(steps, list(run.overload.values())[-1])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
