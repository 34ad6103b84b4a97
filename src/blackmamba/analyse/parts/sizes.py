"""Parameters and FLOPs of the four networks, and torch's count of them."""

import dataclasses

from blackmamba.analyse.architectures import NAMES
from blackmamba.analyse.flops import counted_flops
from blackmamba.analyse.lab import Lab, section
from blackmamba.analyse.report import Section, Table
from blackmamba.model.size import forward_flops, parameters, training_flops_per_token


def sizes(lab: Lab) -> Section:
    """Parameters and FLOPs of the four networks, and torch's count of them."""
    rows: list[tuple[str, ...]] = []
    exact = True
    for rung in lab.scale.ladder:
        for name in NAMES:
            config = lab.network(name, rung)
            count, flops = parameters(config), forward_flops(config, 0)
            small = dataclasses.replace(config, vocab_size=64, unused_vocab=0)
            counted = counted_flops(small, 1, 16)
            exact &= counted.forward == counted.expected_forward
            exact &= counted.training == 3 * counted.forward
            rows.append((
                f"{name}, {rung[0]} wide", f"{config.n_layers}", f"{count.total:,}",
                f"{count.active:,}", f"{flops.total:,}",
                f"{training_flops_per_token(config, lab.scale.settings.seq_len):,}",
            ))  # fmt: skip
    head = ("network", "layers", "parameters", "active a token", "forward FLOPs a token",
            "training FLOPs a token")  # fmt: skip
    verdict = "exactly" if exact else "NOT"
    return section(
        "sizes",
        finding="The closed forms of products and attention agree "
        f"{verdict} with torch's operation counter, forward and three times that with the "
        "backward pass.",
        tables=(Table("sizes", head, tuple(rows)),),
    )
