"""One change to the paper's network at a time."""

import dataclasses

from blackmamba.analyse import ablations as choices
from blackmamba.analyse import figures
from blackmamba.analyse.intervals import mean
from blackmamba.analyse.lab import Lab, section
from blackmamba.analyse.report import Section, Table
from blackmamba.analyse.runs import Plan
from blackmamba.model.size import parameters


def plans(lab: Lab) -> list[Plan]:
    """Every variant with every seed, by the settings of the ladder's first BlackMamba."""
    seeds = range(lab.scale.ablation_seeds)
    return [_plan(lab, variant, seed) for variant in _variants(lab) for seed in seeds]


def ablations(lab: Lab) -> Section:
    """One change to the paper's network at a time."""
    scale = lab.scale
    losses: dict[str, list[float]] = {}
    differs: set[str] = set()
    rows: list[tuple[str, ...]] = []
    for variant in _variants(lab):
        runs = [lab.bench.curve(_plan(lab, variant, seed)) for seed in range(scale.ablation_seeds)]
        losses[variant.name] = [run.final_nats for run in runs]
        pairs = zip(losses[variant.name], losses[choices.PAPER], strict=True)
        change = mean([own - paper for own, paper in pairs])
        differs |= {variant.name} if abs(change.value) > change.half_width else set()
        count = parameters(variant.config)
        rows.append((
            variant.name, variant.question, f"{count.total:,}", f"{count.active:,}",
            f"{runs[0].flops[-1]:.3g}", str(mean(losses[variant.name])),
            "" if variant.name == choices.PAPER else f"{change:+}",
        ))  # fmt: skip
    picture = lab.out / "ablations.png"
    figures.draw_ablations(picture, losses, choices.PAPER)
    head = ("variant", "of", "parameters", "active", "training FLOPs",
            "validation, nats a token", "less the paper's, by seed")  # fmt: skip
    lowest = min(losses, key=lambda name: mean(losses[name]).value)
    return section(
        "ablations",
        finding=f"Lowest here: {lowest}. {scale.ablation_seeds} seed(s) each; ± is the 95 % "
        "interval of so few. A difference smaller than its interval says nothing; larger are those "
        f"of {', '.join(v.name for v in _variants(lab) if v.name in differs) or 'none'}.",
        tables=(Table("ablations", head, tuple(rows)),),
        pictures=(("Each dot a seed, the bar their mean", picture),),
        numbers=(
            Table(
                "ablations-seeds",
                ("variant", "seed", "validation, nats a token"),
                tuple(
                    (name, f"{seed}", f"{loss:.4f}")
                    for name, found in losses.items()
                    for seed, loss in enumerate(found)
                ),
            ),
        ),
    )


def _variants(lab: Lab) -> list[choices.Variant]:
    base = lab.network("blackmamba", lab.scale.ladder[0])
    return choices.variants(base, lab.scale.experts)


def _plan(lab: Lab, variant: choices.Variant, seed: int) -> Plan:
    paper = lab.plan("blackmamba", lab.scale.ladder[0], seed)
    if variant.name == choices.PAPER:
        return paper
    return dataclasses.replace(paper, name=f"ablation-{variant.name}", config=variant.config)
