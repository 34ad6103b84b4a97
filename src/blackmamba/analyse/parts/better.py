"""A recipe meant to reach the paper's loss with at most 70 % of its training FLOPs."""

from blackmamba.analyse.intervals import mean
from blackmamba.analyse.lab import BETTER, Lab, Rung, section
from blackmamba.analyse.report import Section, Table
from blackmamba.analyse.runs import Plan
from blackmamba.model.size import parameters, training_flops_per_token

_SHARE = 0.7


def plans(lab: Lab) -> list[Plan]:
    """Both recipes at every rung."""
    return [
        plan
        for rung, seeds in zip(lab.scale.ladder, lab.scale.seeds, strict=True)
        for seed in range(seeds)
        for plan in (lab.plan("blackmamba", rung, seed), _plan(lab, rung, seed))
    ]


def _plan(lab: Lab, rung: Rung, seed: int) -> Plan:
    """The better recipe, ended where it has done its share of the paper recipe's FLOPs."""
    paper, ours = (
        training_flops_per_token(lab.network(name, rung), lab.scale.settings.seq_len)
        for name in ("blackmamba", BETTER)
    )
    return lab.plan(BETTER, rung, seed, _SHARE * paper / ours)


def better(lab: Lab) -> Section:
    """Whether it gets there."""
    rows: list[tuple[str, ...]] = []
    verdicts: list[str] = []
    for rung, seeds in zip(lab.scale.ladder, lab.scale.seeds, strict=True):
        paper = [lab.bench.curve(lab.plan("blackmamba", rung, seed)) for seed in range(seeds)]
        ours = [lab.bench.curve(_plan(lab, rung, seed)) for seed in range(seeds)]
        pairs = zip(ours, paper, strict=True)
        beyond = mean([our.final_nats - base.final_nats for our, base in pairs])
        for label, runs in (("paper's", paper), ("better", ours)):
            count = parameters(runs[0].config)
            rows.append((
                f"{label}, {rung[0]} wide", f"{count.total:,}", f"{count.active:,}",
                f"{runs[0].tokens[-1] / 1e6:.3g}", f"{runs[0].flops[-1]:.3g}",
                str(mean([run.final_nats for run in runs])),
                f"{beyond:+}" if runs is ours else "", f"{seeds}",
            ))  # fmt: skip
        reached = "reaches" if beyond.value <= 0 else "does not reach"
        spent = ours[0].flops[-1] / paper[0].flops[-1]
        verdicts.append(f"{rung[0]} wide: {reached} it, with {100 * spent:.0f} % of the FLOPs")
    head = ("recipe", "parameters", "active", "million tokens", "training FLOPs",
            "validation, nats a token", "less the paper's, by seed", "seeds")  # fmt: skip
    return section(
        "better",
        finding="The paper's loss with 70 % of its training FLOPs? " + "; ".join(verdicts) + ".",
        tables=(Table("better", head, tuple(rows)), lab.rates_table([BETTER])),
    )
