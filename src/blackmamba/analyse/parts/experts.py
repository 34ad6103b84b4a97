"""What the experts of one trained model do, and what its two rules of routing cost."""

import statistics

from blackmamba.analyse import figures
from blackmamba.analyse.experts import expert_use, rule_gap
from blackmamba.analyse.lab import Lab, section
from blackmamba.analyse.report import Section, Table
from blackmamba.analyse.runs import Plan


def plans(lab: Lab) -> list[Plan]:
    """One run that keeps checkpoints."""
    return [lab.probe()]


def experts(lab: Lab) -> Section:
    """What the experts of one trained model do, and what its two rules of routing cost."""
    curve, models = lab.probed()
    data = lab.bench.opened(curve)
    last = models[max(models)]
    held_out = lab.batches(data)
    uses = expert_use(last.to(lab.device), lab.domains(data))
    heat, through = lab.out / "experts.png", lab.out / "experts-training.png"
    figures.draw_experts(heat, uses)
    steps, gaps = (
        sorted(models),
        [rule_gap(models[s].to(lab.device), held_out) for s in sorted(models)],
    )
    agreement = [
        statistics.fmean(
            u.agreement for u in expert_use(models[s], {"": [ids for ids, _ in held_out]})
        )
        for s in steps
    ]
    figures.draw_through_training(
        through,
        steps,
        {
            "validation loss (nats per token)": {
                "largest logit (inference)": [g.inference_nats for g in gaps],
                "Sinkhorn (training)": [g.training_nats for g in gaps],
            },
            "cost of the switch (nats per token)": {
                "inference less training": [g.cost for g in gaps]
            },
            "share of tokens with the same expert": {"mean of layers": agreement},
        },
    )
    spell = data.tokenizer.decode
    use_rows = tuple(
        (
            f"{u.layer}", f"{u.entropy:.3f}", f"{u.token_information:.3f}",
            f"{u.chance_information:.3f}", f"{u.position_information:.3f}",
            f"{u.agreement:.3f}",
        )
        for u in uses
    )  # fmt: skip
    words = tuple(
        (f"{u.layer}", f"{expert}", " ".join(repr(spell([i])) for i in ids))
        for u in uses
        for expert, ids in enumerate(u.favourites)
    )
    gap_rows = tuple(
        (
            f"{s}",
            f"{g.inference_nats:.4f}",
            f"{g.training_nats:.4f}",
            f"{g.cost:+.4f}",
            f"{a:.3f}",
        )
        for s, g, a in zip(steps, gaps, agreement, strict=True)
    )
    use_head = ("layer", "evenness", "token tells expert", "by chance", "position tells expert",
                "same expert in training")  # fmt: skip
    return section(
        "experts",
        finding="Counted by the inference rule. Training chooses by Sinkhorn's plan, inference "
        f"by the largest logit; at the end the switch costs {gaps[-1].cost:+.4f} nats a token "
        f"and {100 * (1 - agreement[-1]):.1f} % of tokens change their expert.",
        tables=(
            Table("experts", use_head, use_rows),
            Table(
                "experts-rules",
                ("step", "inference rule", "training rule", "cost", "same expert"),
                gap_rows,
            ),
            Table("experts-tokens", ("layer", "expert", "tokens beyond its share"), words),
        ),
        pictures=(
            ("Share of tokens by expert and domain", heat),
            (
                "Through training: loss by both rules, their difference, how often they agree",
                through,
            ),
        ),
        numbers=(
            Table(
                "experts-shares",
                ("layer", "domain", *(f"expert {e}" for e in range(len(uses[0].favourites)))),
                tuple(
                    (f"{u.layer}", domain, *(f"{part:.4f}" for part in share))
                    for u in uses
                    for domain, share in u.share.items()
                ),
            ),
        ),
    )
