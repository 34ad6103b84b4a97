"""The four networks trained at every rung, each with a learning rate of its own."""

from collections.abc import Mapping, Sequence

from blackmamba.analyse import figures
from blackmamba.analyse.architectures import NAMES
from blackmamba.analyse.intervals import mean
from blackmamba.analyse.lab import Lab, section, settings_words
from blackmamba.analyse.report import Section, Table
from blackmamba.analyse.runs import Curve, Plan
from blackmamba.model.size import parameters


def plans(lab: Lab) -> list[Plan]:
    """All runs but the trials of learning rates, which must be done; first what it is about."""
    return [
        lab.plan(name, rung, seed)
        for rung, seeds in zip(lab.scale.ladder, lab.scale.seeds, strict=True)
        for name in reversed(NAMES)
        for seed in range(seeds)
    ]


def curves_table(curves: Mapping[str, Sequence[Curve]]) -> Table:
    """The lines of the picture."""
    rows = tuple(
        (name, f"{run.seed}", f"{flops:.5g}", f"{seconds:.2f}", f"{loss:.4f}", f"{tokens:.0f}")
        for name, runs in curves.items()
        for run in runs
        for flops, seconds, loss, tokens in figures.line(run)
    )
    return Table("ladder-curves", figures.CURVES_HEAD, rows)


def _training_rule(runs: Sequence[Curve]) -> str:
    """The validation loss with the experts that training would choose; empty: it has none."""
    losses = [run.final_training_nats for run in runs if run.final_training_nats is not None]
    has_experts = any(spec.feed_forward == "moe" for spec in runs[0].config.layer_specs)
    return str(mean(losses)) if has_experts and losses else ""


def _rate_words(is_tuned: bool) -> str:
    if is_tuned:
        return "for each network the learning rate that was best in its own short runs"
    return "one learning rate"


def ladder(lab: Lab) -> Section:
    """Train the four at every rung."""
    scale, curves = lab.scale, dict[str, list[Curve]]()
    rows: list[tuple[str, ...]] = []
    best: list[str] = []
    for rung, seeds in zip(scale.ladder, scale.seeds, strict=True):
        found = {
            name: [lab.bench.curve(lab.plan(name, rung, seed)) for seed in range(seeds)]
            for name in NAMES
        }
        ends = {n: mean([run.final_nats for run in runs]) for n, runs in found.items()}
        best.append(min(ends, key=lambda name: ends[name].value))
        for name, runs in found.items():
            curves[f"{name}/{rung[0]}"] = runs
            pairs = zip(runs, found["mamba"], strict=True)
            beyond = mean([run.final_nats - dense.final_nats for run, dense in pairs])
            rows.append((
                f"{name}, {rung[0]} wide", f"{parameters(runs[0].config).active:,}",
                f"{lab.plan(name, rung, 0).settings.lr:.3g}", f"{runs[0].flops[-1]:.3g}",
                str(ends[name]), f"{beyond:+}" if name != "mamba" else "", _training_rule(runs),
                str(mean([run.final_bits for run in runs])), f"{seeds}",
            ))  # fmt: skip
    picture = lab.out / "ladder.png"
    figures.draw_ladder(picture, figures.lines(curves), lab.jobs)
    head = ("network", "active parameters", "learning rate", "training FLOPs",
            "validation, nats a token", "less dense Mamba's, by seed",
            "by the training rule", "bits a byte",
            "seeds")  # fmt: skip
    wins = best.count("blackmamba")
    return section(
        "ladder",
        finding=f"BlackMamba has the lowest mean validation loss on {wins} of {len(best)} rungs"
        + ("." if wins == len(best) else f"; the lowest were {', '.join(best)}.")
        + f" {settings_words(scale.settings)}; ± is the 95 % interval of so few seeds. Same text, "
        f"order, tokens and optimizer for all, and {_rate_words(len(scale.lrs) > 1)} at the first "
        "rung, divided by the width beyond it. Validation is in windows as long as in training, by "
        "the inference rule of routing; the training rule, which sees later tokens, has a column "
        "of its own.",
        tables=(Table("ladder", head, tuple(rows)), lab.rates_table(NAMES)),
        pictures=(("Training loss, one line a run", picture),),
        numbers=(curves_table(curves),),
    )
