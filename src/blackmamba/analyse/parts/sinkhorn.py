"""Steps to balance from both starts."""

import itertools
import math
import statistics

from blackmamba.analyse import figures
from blackmamba.analyse.experts import router_logits_of
from blackmamba.analyse.lab import Lab, section
from blackmamba.analyse.report import Section, Table
from blackmamba.analyse.runs import Plan
from blackmamba.analyse.sinkhorn import (
    STARTS,
    Setting,
    Start,
    authors_steps,
    compare,
    converge,
    milliseconds,
    settings,
)


def plans(lab: Lab) -> list[Plan]:
    """One run that keeps checkpoints."""
    return [lab.probe()]


def sinkhorn(lab: Lab) -> Section:
    """Steps to balance from both starts."""
    scale = lab.scale
    chosen = settings(scale.sinkhorn_tokens, scale.sinkhorn_experts)
    rows: list[tuple[str, ...]] = []
    saved: list[float] = []
    for found in compare(chosen, seeds=3):
        s = found.setting
        ones, paper = found.steps_to["ones"], found.steps_to["paper"]
        saved.append(ones[1e-2] - paper[1e-2])
        rows.append((
            f"{s.tokens:,} x {s.experts}, logits ±{s.spread:g}",
            *(f"{_count(ones[t])} → {_count(paper[t])}" for t in (1e-2, 1e-3)),
            f"{_count(found.authors_steps['ones'])} → {_count(found.authors_steps['paper'])}",
            f"{found.argmax_overload:.2f}",
            *(
                f"{found.overload['ones'][n]:.2f} → {found.overload['paper'][n]:.2f}"
                for n in (1, 2, 4, 0)
            ),
        ))  # fmt: skip
    head = ("tokens x experts", "steps to 1 %", "to 0.1 %", "authors' test", "overload without",
            "after 1", "after 2", "after 4", "after all")  # fmt: skip
    tokens, n_experts = max(scale.sinkhorn_tokens), min(scale.sinkhorn_experts)
    panels = {
        f"logits ±{x:g}": {
            start: converge(Setting(tokens, n_experts, x, x).logits(0), start) for start in STARTS
        }
        for x in (0.5, 1.0, 2.0)
    }
    picture = lab.out / "sinkhorn.png"
    figures.draw_sinkhorn(picture, panels)
    cost = tuple(
        (
            f"{t:,} x {n_experts}",
            start,
            f"{milliseconds(Setting(t, n_experts, 1.0, 1.0), start, lab.device):.3f}",
        )
        for t, start in itertools.product(scale.sinkhorn_tokens, STARTS)
    )
    return section(
        "sinkhorn",
        finding="At equal accuracy (every marginal within 1 %) the paper's start saves "
        f"{statistics.fmean(saved):.1f} steps on average over {len(chosen)} settings, "
        f"{min(saved):.0f} to {max(saved):.0f}. The authors' stopping test is on the change of "
        "the column factors; with their start those are so small that it passes at once, "
        "balanced or not. → is from the ordinary start to the paper's; overload is the busiest "
        "expert's tokens over the mean, less 1.",
        tables=(
            Table("sinkhorn", head, tuple(rows)),
            Table(
                "sinkhorn-cost",
                ("tokens x experts", "start", f"ms on this {lab.device.type}"),
                cost,
            ),
            _in_training(lab),
        ),
        pictures=(
            (
                f"Error after each step, {tokens:,} tokens, {n_experts} experts; dotted: where "
                "the authors' test stops",
                picture,
            ),
        ),
        numbers=(
            Table(
                "sinkhorn-errors",
                ("panel", "start", "step", "largest error of a marginal", "authors' test stops at"),
                tuple(
                    (title, start, f"{step}", f"{error:.4g}", f"{run.authors_steps}")
                    for title, runs in panels.items()
                    for start, run in runs.items()
                    for step, error in enumerate(run.errors, 1)
                ),
            ),
        ),
    )


def _in_training(lab: Lab) -> Table:
    """The same of a model's own logits."""
    curve, models = lab.probed()
    data = lab.bench.opened(curve)
    [(ids, _)] = lab.batches(data, 1)
    rows: list[tuple[str, ...]] = []
    for step, model in sorted(models.items()):
        layers = router_logits_of(model.to(lab.device), ids)
        steps: dict[Start, str] = {}
        for start in STARTS:
            runs = [converge(logits, start) for logits in layers.values()]
            balanced = statistics.fmean(run.steps_to[1e-2] or math.inf for run in runs)
            theirs = statistics.fmean(
                authors_steps(logits, start, 2.0, 300) or math.inf for logits in layers.values()
            )
            steps[start] = f"{_count(balanced)} ({_count(theirs)})"
        spread = statistics.fmean(float(logits.std()) for logits in layers.values())
        rows.append((f"{step}", f"{spread:.2f}", steps["ones"], steps["paper"]))
    head = (
        "training step",
        "spread of logits",
        "ordinary start: to 1 % (authors' test)",
        "paper's start",
    )
    return Table("sinkhorn-training", head, tuple(rows))


def _count(steps: float) -> str:
    return "never" if math.isinf(steps) else f"{steps:g}" if steps == int(steps) else f"{steps:.1f}"
